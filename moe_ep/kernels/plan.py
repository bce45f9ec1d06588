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
    exists = (wide >= 0) & (wide < known)
    # A negative id must not wrap to the last entry of the map, nor one of 64 bits to another expert's.
    expert = tl.where(exists, wide, 0).to(tl.int32)
    row = tl.load(map_ptr + expert, mask=exists, other=-1).to(tl.int32) if HAS_MAP else expert
    return tl.where(exists & (row < LOCAL), row, -1)


@triton.jit
def shift(x_ptr, shifted_ptr, program, elements, IN_PLACES: tl.constexpr, BLOCK_X: tl.constexpr):
    """x times 2^64, which the kernels' weights lack; in the places of `kernels.warpgroup` if IN_PLACES."""
    i = program.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    x = tl.load(x_ptr + i, mask=i < elements, other=0.0).to(tl.float32)
    # The rows' width is a multiple of 32, so places within a row are places within all of x.
    to = (i & -32) | ((i & 6) << 2) | ((i & 24) >> 2) | (i & 1) if IN_PLACES else i
    tl.store(shifted_ptr + to, (x * 18446744073709551616.0).to(tl.bfloat16), mask=i < elements)  # 2^64


@triton.jit(do_not_specialize=["routes", "known", "elements"])
def count_kernel(
    ids_ptr,  # int [M·TOP_K]: experts
    map_ptr,  # int [known]: local row of each expert, read if HAS_MAP
    count_ptr,  # out: int32 [LOCAL]: routes of each local expert
    x_ptr,  # bf16 [M·H]
    shifted_ptr,  # out: bf16 [M·H], times 2^64
    routes,
    known,
    elements,  # M·H
    LOCAL: tl.constexpr,
    HAS_MAP: tl.constexpr,
    IN_PLACES: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_R: tl.constexpr,  # routes a step
    BLOCK_X: tl.constexpr,  # elements of x a program
):
    # Layout: the first LOCAL programs count the routes of an expert each; those after them shift a part of x each,
    # which has nothing to do with it but the launch.
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    if program < LOCAL:
        found = tl.zeros((BLOCK_R,), dtype=tl.int32)
        for start in range(0, routes, BLOCK_R):
            route = start + tl.arange(0, BLOCK_R)
            found += (local_row(ids_ptr, map_ptr, route, route < routes, known, LOCAL, HAS_MAP) == program).to(tl.int32)
        tl.store(count_ptr + program, tl.sum(found, 0))
    else:
        shift(x_ptr, shifted_ptr, program - LOCAL, elements, IN_PLACES, BLOCK_X)


@triton.jit
def count_all(ids_ptr, map_ptr, routes, known, LOCAL: tl.constexpr, HAS_MAP: tl.constexpr, BLOCK_L: tl.constexpr):
    """The routes of each local expert, int32 [BLOCK_L], counted by this program alone."""
    row = tl.arange(0, BLOCK_L)
    counts = tl.zeros((BLOCK_L,), dtype=tl.int32)
    for start in range(0, routes, 64):
        route = start + tl.arange(0, 64)
        rows = local_row(ids_ptr, map_ptr, route, route < routes, known, LOCAL, HAS_MAP)
        counts += tl.sum((rows[:, None] == row[None, :]).to(tl.int32), 0)
    return counts


@triton.jit(do_not_specialize=["routes", "known", "blocks", "elements"])
def place_kernel(
    ids_ptr,  # int [M·TOP_K]
    map_ptr,  # int [known], read if HAS_MAP
    count_ptr,  # int32 [LOCAL], read unless ALONE
    route_ptr,  # out: int32 [routes]: routes sorted by local row, the order within one kept; the rest is not written
    block_expert_ptr,  # out: int32 [blocks]: local row of each block, −1 past the last
    block_start_ptr,  # out: int32 [blocks]: its first position in the sorted routes
    block_end_ptr,  # out: int32 [blocks]: one past its last
    x_ptr,  # as in count_kernel, read if ALONE
    shifted_ptr,  # out: as in count_kernel, written if ALONE
    routes,
    known,
    blocks,  # the most that there can be
    elements,
    ALONE: tl.constexpr,  # there was no count_kernel: count and shift here
    LOCAL: tl.constexpr,
    HAS_MAP: tl.constexpr,
    IN_PLACES: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_L: tl.constexpr,  # a power of two, at least LOCAL
    BLOCK_M: tl.constexpr,  # routes of a block
    BLOCK_R: tl.constexpr,  # routes, and blocks, a step
    BLOCK_X: tl.constexpr,  # elements of x a program
):
    # Layout: program e places the routes and blocks of expert e; one more marks the blocks that are not used; those
    # after it shift x.
    # The trick: each adds up the counts of the experts before it, so no program waits for another.
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0)
    if expert > LOCAL:
        shift(x_ptr, shifted_ptr, expert - LOCAL - 1, elements, IN_PLACES, BLOCK_X)
        return
    row = tl.arange(0, BLOCK_L)
    if ALONE:
        counts = count_all(ids_ptr, map_ptr, routes, known, LOCAL, HAS_MAP, BLOCK_L)
    else:
        counts = tl.load(count_ptr + row, mask=row < LOCAL, other=0)
    before = row < expert
    first = tl.sum(tl.where(before, counts, 0), 0)
    first_block = tl.sum(tl.where(before, (counts + BLOCK_M - 1) // BLOCK_M, 0), 0)
    step = tl.arange(0, BLOCK_R)
    if expert == LOCAL:
        for start in range(first_block, blocks, BLOCK_R):
            tl.store(block_expert_ptr + start + step, tl.full((BLOCK_R,), -1, tl.int32), mask=start + step < blocks)
        return
    own = tl.sum(tl.where(row == expert, counts, 0), 0)
    if own == 0:
        return
    placed = first
    for start in range(0, routes, BLOCK_R):
        route = start + step
        hit = local_row(ids_ptr, map_ptr, route, route < routes, known, LOCAL, HAS_MAP) == expert
        rank = tl.cumsum(hit.to(tl.int32), 0)
        tl.store(route_ptr + placed + rank - 1, route, mask=hit)
        placed += tl.sum(hit.to(tl.int32), 0)
    for start in range(0, (own + BLOCK_M - 1) // BLOCK_M, BLOCK_R):
        block = start + step
        used = block * BLOCK_M < own
        begin = first + block * BLOCK_M
        tl.store(block_expert_ptr + first_block + block, tl.zeros((BLOCK_R,), tl.int32) + expert, mask=used)
        tl.store(block_start_ptr + first_block + block, begin, mask=used)
        tl.store(block_end_ptr + first_block + block, tl.minimum(begin + BLOCK_M, first + own), mask=used)
