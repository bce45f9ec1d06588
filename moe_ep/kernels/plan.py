"""Which routes the grouped GEMMs compute together: routes by local expert, cut into blocks, with nothing read back.

A route is token·TOP_K + slot. Its expert's row on this rank is looked up where it is needed, so remote routes, padding
and ids that do not exist are never listed anywhere.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def local_row(ids_ptr, map_ptr, route, mask, known, LOCAL: tl.constexpr, HAS_MAP: tl.constexpr):
    """The local row of each route's expert, −1 where this rank has none. `known` is how many experts there are."""
    wide = tl.load(ids_ptr + route, mask=mask, other=-1)
    exists = mask & (wide >= 0) & (wide < known)  # of unsigned ids, what is not loaded looks like one
    # A negative id must not wrap to the last entry of the map, nor one of 64 bits to another expert's.
    expert = tl.where(exists, wide, 0).to(tl.int32)
    row = tl.load(map_ptr + expert, mask=exists, other=-1).to(tl.int32) if HAS_MAP else expert
    return tl.where(exists & (row < LOCAL), row, -1)


@triton.jit
def shift(x_ptr, shifted_ptr, program, elements, BLOCK_X: tl.constexpr):
    """x times 2^64, which the weights lack that the kernels decode."""
    i = program.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    x = tl.load(x_ptr + i, mask=i < elements, other=0.0).to(tl.float32)
    tl.store(shifted_ptr + i, (x * 18446744073709551616.0).to(tl.bfloat16), mask=i < elements)  # 2^64


@triton.jit(do_not_specialize=["routes", "known", "elements"])
def count_kernel(
    ids_ptr,  # int [M·TOP_K]: experts
    map_ptr,  # int [known]: local row of each expert, read if HAS_MAP
    count_ptr,  # out: int32 [tiles, BLOCK_L]: routes of each tile that each local expert has
    x_ptr,  # bf16 [M·H]
    shifted_ptr,  # out: bf16 [M·H], times 2^64
    routes,
    known,
    elements,  # M·H, 0 for not to shift
    LOCAL: tl.constexpr,
    HAS_MAP: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_L: tl.constexpr,  # a power of two, at least LOCAL
    BLOCK_T: tl.constexpr,  # routes of a tile
    BLOCK_X: tl.constexpr,  # elements of x a program
):
    # Layout: the first programs count a tile of routes each; those after them shift a part of x each, which has
    # nothing to do with it but the launch.
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tiles = (routes + BLOCK_T - 1) // BLOCK_T
    program = tl.program_id(0)
    if program < tiles:
        route = program * BLOCK_T + tl.arange(0, BLOCK_T)
        rows = local_row(ids_ptr, map_ptr, route, route < routes, known, LOCAL, HAS_MAP)
        counts = tl.histogram(rows, BLOCK_L, mask=rows >= 0)
        tl.store(count_ptr + program * BLOCK_L + tl.arange(0, BLOCK_L), counts)
    else:
        shift(x_ptr, shifted_ptr, program - tiles, elements, BLOCK_X)


@triton.jit(do_not_specialize=["routes", "known", "blocks", "elements"])
def place_kernel(
    ids_ptr,  # int [M·TOP_K]
    map_ptr,  # int [known], read if HAS_MAP
    count_ptr,  # int32 [tiles, BLOCK_L], read unless ALONE
    route_ptr,  # out: int32 [routes]: routes sorted by local row, the order within one kept; the rest is not written
    block_expert_ptr,  # out: int32 [blocks]: local row of each block, −1 past the last
    block_start_ptr,  # out: int32 [blocks]: its first position in the sorted routes
    block_end_ptr,  # out: int32 [blocks]: one past its last
    state_ptr,  # out: int32 [2 + blocks], if SHARES: 0, the blocks that there are, a 0 for each
    x_ptr,  # as in count_kernel, read if ALONE
    shifted_ptr,  # out: as in count_kernel, written if ALONE
    routes,
    known,
    blocks,  # the most that there can be
    elements,
    SHARES: tl.constexpr,  # `kernels.experts` shares out the blocks' tiles
    ALONE: tl.constexpr,  # there was no count_kernel: count and shift here, BLOCK_A routes at once, which are all
    LOCAL: tl.constexpr,
    HAS_MAP: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_L: tl.constexpr,  # a power of two, at least LOCAL
    BLOCK_M: tl.constexpr,  # routes of a block
    BLOCK_A: tl.constexpr,
    BLOCK_T: tl.constexpr,  # routes of a tile
    BLOCK_R: tl.constexpr,  # routes that are placed at once
    BLOCK_B: tl.constexpr,  # blocks a program
    BLOCK_C: tl.constexpr,  # tiles whose counts are added at once
    BLOCK_X: tl.constexpr,  # elements of x a program
):
    # Layout: the first programs place a tile of routes each, the next write BLOCK_B blocks each, the last shift x.
    # The trick: each adds up the counts of all tiles, so no program waits for another. A route finds its place among
    # those that are placed with it by comparing itself with each, which needs no scan.
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    tiles = (routes + BLOCK_T - 1) // BLOCK_T
    writers = (blocks + BLOCK_B - 1) // BLOCK_B
    if program >= tiles + writers:
        shift(x_ptr, shifted_ptr, program - tiles - writers, elements, BLOCK_X)
        return
    row = tl.arange(0, BLOCK_L)
    counts = tl.zeros((BLOCK_L,), dtype=tl.int32)
    before = tl.zeros((BLOCK_L,), dtype=tl.int32)  # this tile
    if ALONE:
        every = tl.arange(0, BLOCK_A)
        theirs = local_row(ids_ptr, map_ptr, every, every < routes, known, LOCAL, HAS_MAP)
        counts += tl.histogram(theirs, BLOCK_L, mask=theirs >= 0)
        if BLOCK_A > BLOCK_T:
            before += tl.histogram(theirs, BLOCK_L, mask=(theirs >= 0) & (every < program * BLOCK_T))
    else:
        for first_tile in range(0, tiles, BLOCK_C):
            tile = first_tile + tl.arange(0, BLOCK_C)[:, None]
            own = tl.load(count_ptr + tile * BLOCK_L + row[None, :], mask=tile < tiles, other=0)
            counts += tl.sum(own, 0)
            before += tl.sum(tl.where(tile < program, own, 0), 0)
    first = tl.cumsum(counts, 0) - counts  # position of each expert's first route
    if program < tiles:
        position = first + before  # of each expert's next route
        r = tl.arange(0, BLOCK_R)
        for first_route in range(program * BLOCK_T, (program + 1) * BLOCK_T, BLOCK_R):
            route = first_route + r
            rows = local_row(ids_ptr, map_ptr, route, route < routes, known, LOCAL, HAS_MAP)
            earlier = (rows[:, None] == rows[None, :]) & (r[None, :] < r[:, None])
            hits = (rows[:, None] == row[None, :]).to(tl.int32)
            place = tl.sum(hits * position[None, :], 1) + tl.sum(earlier.to(tl.int32), 1)
            tl.store(route_ptr + place, route, mask=rows >= 0)
            position += tl.sum(hits, 0)
    else:
        used = (counts + BLOCK_M - 1) // BLOCK_M
        last = tl.cumsum(used, 0)  # one past each expert's last block
        block = (program - tiles) * BLOCK_B + tl.arange(0, BLOCK_B)
        expert = tl.sum((last[None, :] <= block[:, None]).to(tl.int32), 1)
        own = (expert[:, None] == row[None, :]).to(tl.int32)
        begin = tl.sum(own * (first - (last - used) * BLOCK_M)[None, :], 1) + block * BLOCK_M
        end = tl.minimum(begin + BLOCK_M, tl.sum(own * (first + counts)[None, :], 1))
        existing = tl.sum(used, 0)
        exists = block < existing
        if SHARES:
            tl.store(state_ptr + 2 + block, 0, mask=block < blocks)
            if program == tiles:
                tl.store(state_ptr, 0)
                tl.store(state_ptr + 1, existing)
        tl.store(block_expert_ptr + block, tl.where(exists, expert, -1), mask=block < blocks)
        tl.store(block_start_ptr + block, begin, mask=exists & (block < blocks))
        tl.store(block_end_ptr + block, end, mask=exists & (block < blocks))
