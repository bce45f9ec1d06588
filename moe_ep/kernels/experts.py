"""Both grouped GEMMs of about one row an expert or more on Hopper in one launch, so that none ends with idle programs.

As `kernels.warpgroup`, but for the order: the warp that feeds the copy engine takes tiles by a ticket each, first all
of gate and up, then all of down, and tells the other warps. A tile of down waits until its block's h is there.

A program that waits, waits for tickets before its own, which programs that run have taken: whatever else the device
does, it goes on.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_ep.kernels.fragments import local_rows
from moe_ep.kernels.pipe import GATHERERS, WARPGROUPS, hand_over_last, open_pipe, vouch, wait_free
from moe_ep.kernels.ring import hear, hear_for_others, open_ring, tell
from moe_ep.kernels.tickets import await_count, barrier, count_later, value
from moe_ep.kernels.tiles import block_of, down_tile, fill_down, fill_gate_up, gate_up_tile, gather_tile

# Places in the memory that the plan resets: the next ticket, the blocks that there are, then for each block the halves
# of its tiles of gate and up that are made.
_TICKET = gl.constexpr(0)
_BLOCKS = gl.constexpr(1)
_MADE = gl.constexpr(2)
# Groups of 128 k before a tile's last at which the next one's ticket is taken: as late as its value is still there in
# time, so that who is done first takes it.
_AHEAD = gl.constexpr(4)
# Groups of a tile that are brought to the second-level cache beforehand; all programs' take a third of the cache.
_PREFETCHED = gl.constexpr(8)


@gluon.jit
def _between_proxies():
    """Order what threads have stored in memory, and what the copy engine reads there."""
    threads: gl.constexpr = gl.num_warps() * 32
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    nothing = gl.arange(0, threads, layout=layout)
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [nothing], dtype=gl.int32, is_pure=False, pack=1
    )


@constexpr_function
def _prefetch_ptx(GROUPS):
    lines = [f"@inside cp.async.bulk.prefetch.L2.global [${i}], {GROUPS * size};" for i, size in ((1, 1024), (2, 64))]
    return "\n".join(["{", ".reg .pred inside;", "setp.ne.s32 inside, $3, 0;", *lines, "mov.b32 $0, $3;", "}"])


@gluon.jit
def _prefetch(
    words_ptr, scales_ptr,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, LOCAL: gl.constexpr, BLOCK_N: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Bring the first groups of one tile of gate and up to the second-level cache.

    Of the tile that is likely this program's if all experts are hit, with one block each; if not, some of these tiles
    are others', and some nobody's. Nobody waits for it.
    """
    tiles: gl.constexpr = INTER // BLOCK_N
    half: gl.constexpr = BLOCK_N // 16
    expert = gl.program_id(0) // tiles
    i = gl.arange(0, gl.num_warps() * 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    row = (2 * expert + i // half) * (INTER // 16) + gl.program_id(0) % tiles * half + i % half
    first = row.to(gl.int64) * (HIDDEN // 128)
    words, scales = words_ptr.to(gl.int64) + first * 1024, scales_ptr.to(gl.int64) + first * 64
    inside = ((i < 2 * half) & (expert < LOCAL)).to(gl.int32)
    gl.inline_asm_elementwise(
        _prefetch_ptx(GROUPS), "=r,l,l,r", [words, scales, inside], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _tile_of(ticket, blocks, plan, UP_TILES: gl.constexpr, DOWN_TILES: gl.constexpr):
    """A ticket's tile (`kernels.ring`), numbered from −1 downwards if it is of down; its expert is −1 past the last."""
    up = ticket < blocks * UP_TILES
    at = ticket if up else ticket - blocks * UP_TILES
    block = at // UP_TILES if up else at // DOWN_TILES
    number = at % UP_TILES if up else -1 - at % DOWN_TILES
    expert, start, end = block_of(plan, block, blocks)
    return number, block, expert, start, end


@gluon.jit
def _take(
    rows_desc, w13_descs, w2_descs, plan, state_ptr, pipe, ring,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Take tickets, and copy all weights of their tiles, and the activations of those of down."""
    up_tiles: gl.constexpr = INTER // BLOCK_N
    down_tiles: gl.constexpr = HIDDEN // (2 * BLOCK_N)
    taken = count_later(state_ptr + _TICKET, "relaxed", False)
    blocks = gl.load(state_ptr + _BLOCKS)
    tile = _tile_of(value(taken), blocks, plan, up_tiles, down_tiles)
    tell(ring, tile, 0)
    turn = 1
    index = 0
    while tile[2] >= 0:
        up = tile[0] >= 0
        if not up:
            await_count(state_ptr + _MADE + tile[1], WARPGROUPS * up_tiles)
            _between_proxies()
        groups = HIDDEN // 128 if up else INTER // 128
        late = gl.maximum(groups - _AHEAD, 0)
        later = gl.maximum(groups - _AHEAD // 2, 0)
        _fill(
            rows_desc, w13_descs, w2_descs, tile, pipe, index, 0, late,
            HIDDEN, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
        taken = count_later(state_ptr + _TICKET, "relaxed", False)
        _fill(
            rows_desc, w13_descs, w2_descs, tile, pipe, index, late, later,
            HIDDEN, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
        following = _tile_of(value(taken), blocks, plan, up_tiles, down_tiles)
        _fill(
            rows_desc, w13_descs, w2_descs, tile, pipe, index, later, groups,
            HIDDEN, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
        # Before anything that waits for this program's own tiles: who gathers hands over the last groups only then.
        tell(ring, following, turn)
        if not up:  # who gathers had no more to hear
            hear_for_others(ring, turn, GATHERERS)
        tile = following
        turn += 1
        index += groups


@gluon.jit
def _fill(
    rows_desc, w13_descs, w2_descs, tile, pipe, first, begin, end,
    HIDDEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A tile's groups from `begin` to `end`; its first is the first-th of all."""
    number = tile[0]
    row = tile[2] * (HIDDEN // 16) + (-1 - number) * (2 * BLOCK_N // 16)  # of down
    for group in range(begin, end):
        index = first + group
        wait_free(pipe, index, STAGES)
        if number >= 0:
            fill_gate_up(
                w13_descs[0], w13_descs[1], pipe, tile[2], number * (BLOCK_N // 16), group, index, BLOCK_N, STAGES
            )  # fmt: skip
        else:
            vouch(pipe, index, STAGES)
            fill_down(
                rows_desc, w2_descs[0], w2_descs[1], pipe, tile[2:], row, group, index, BLOCK_M, BLOCK_N, STAGES
            )  # fmt: skip


@gluon.jit
def _gather(
    x_ptr, out_ptr, route_ptr, ids_ptr, map_ptr, tokens, known, pipe, ring,
    GATHERER: gl.constexpr, TOP_K: gl.constexpr, HIDDEN: gl.constexpr, LOCAL: gl.constexpr, HAS_MAP: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warp's share of the activations of all tiles of gate and up, which come first, then of the result's zeros."""
    tile = hear(ring, 0)
    turn = 1
    while (tile[0] >= 0) & (tile[2] >= 0):
        first = (turn - 1) * (HIDDEN // 128)
        gather_tile(x_ptr, route_ptr, pipe, tile[2:], first, GATHERER, TOP_K, HIDDEN, BLOCK_M, STAGES)
        tile = hear(ring, turn)
        turn += 1
    hand_over_last(pipe, (turn - 1) * (HIDDEN // 128), STAGES)
    _zero_remote(out_ptr, ids_ptr, map_ptr, tokens, known, GATHERER, TOP_K, HIDDEN, LOCAL, HAS_MAP)


@gluon.jit
def _zero_remote(
    out_ptr, ids_ptr, map_ptr, tokens, known,
    GATHERER: gl.constexpr, TOP_K: gl.constexpr, HIDDEN: gl.constexpr, LOCAL: gl.constexpr, HAS_MAP: gl.constexpr,
):  # fmt: skip
    """This warp's share of the tokens that have no local route."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    size: gl.constexpr = gl.num_warps() * 256
    n = gl.arange(0, size, layout=layout)
    zeros = gl.zeros([size], out_ptr.dtype.element_ty, layout=layout)
    for token in range(gl.program_id(0) * GATHERERS + GATHERER, tokens, gl.num_programs(0) * GATHERERS):
        found = -1
        for slot in gl.static_range(TOP_K):
            row = local_rows(ids_ptr, map_ptr, token * TOP_K + slot, token < tokens, known, LOCAL, HAS_MAP)
            found = gl.maximum(found, row)
        if found < 0:
            row_ptr = out_ptr + token.to(gl.int64) * HIDDEN  # type: ignore[attr-defined]
            for begin in range(0, HIDDEN, size):
                gl.store(row_ptr + begin + n, zeros, mask=begin + n < HIDDEN)


@gluon.jit
def _multiply(
    b13_ptr, h_ptr, b2_ptr, y_ptr, route_ptr, state_ptr, limit, pipe, ring,
    WARPGROUP: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_B13: gl.constexpr, HAS_B2: gl.constexpr,
    HAS_LIMIT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup's half of all tiles of this program."""
    tile = hear(ring, 0)
    turn = 1
    index = 0
    while tile[2] >= 0:
        number, block, _expert, _start, _end = tile
        if number >= 0:
            gate_up_tile(
                b13_ptr, h_ptr, limit, pipe, index, tile[2:], number * BLOCK_N,
                WARPGROUP, HIDDEN, INTER, HAS_B13, HAS_LIMIT, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
            _between_proxies()
            barrier()
            gl.atomic_add(state_ptr + _MADE + block, 1, sem="release", scope="gpu")
            index += HIDDEN // 128
        else:
            down_tile(
                b2_ptr, y_ptr, route_ptr, pipe, index, tile[2:], (-1 - number) * (2 * BLOCK_N),
                WARPGROUP, HIDDEN, INTER, HAS_B2, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
            index += INTER // 128
        tile = hear(ring, turn)
        turn += 1


@gluon.jit(do_not_specialize=["tokens", "known"])
def experts_warpgroup(
    x_ptr,  # bf16 [M, HIDDEN]
    w13_words_desc,  # as in gate_up_warpgroup
    w13_scales_desc,
    w13_words_ptr,  # the same
    w13_scales_ptr,
    b13_ptr,  # f32 [L, 2·INTER], read if HAS_B13
    h_ptr,  # bf16 [routes, INTER]; row = position in the sorted routes
    rows_desc,  # h again, as in down_warpgroup
    w2_words_desc,
    w2_scales_desc,
    b2_ptr,  # f32 [L, HIDDEN], read if HAS_B2
    y_ptr,  # out: bf16 or f32 [M·TOP_K, HIDDEN], row = route, not weighted; of remote routes not written
    route_ptr,  # int32 [routes]: token·TOP_K + slot, sorted by local expert
    block_expert_ptr,  # int32 [blocks]: local expert of the block
    block_start_ptr,  # int32 [blocks]: first position of the block
    block_end_ptr,  # int32 [blocks]: one past its last position
    state_ptr,  # int32 [2 + blocks], as the plan leaves it
    out_ptr,  # out: [M, HIDDEN]: 0 where a token has no local route, else not written
    ids_ptr,  # int [M·TOP_K]
    map_ptr,  # int [known], read if HAS_MAP
    tokens,  # M
    known,
    limit,
    TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr,  # a multiple of 128 and of 2·BLOCK_N
    INTER: gl.constexpr,  # a multiple of 128 and of BLOCK_N
    LOCAL: gl.constexpr,
    HAS_MAP: gl.constexpr,
    HAS_B13: gl.constexpr,
    HAS_B2: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert, at most
    BLOCK_N: gl.constexpr,  # features of a tile: intermediate ones, or hidden ones of each warpgroup's half: 64 or 128
    STAGES: gl.constexpr,  # groups in shared memory
    REGISTERS: gl.constexpr,  # of a thread that multiplies
    LOADER_REGISTERS: gl.constexpr,  # of one that copies
):
    # Layout: tickets count the tiles of `gate_up_warpgroup`, block after block, then those of `down_warpgroup`.
    # The trick: loaders and warpgroups go from one matrix to the other within the same pipe, which never empties.
    gl.static_assert(GATHERERS == 2)  # as many are begun below
    pipe = open_pipe(w13_words_desc, w13_scales_desc, BLOCK_M, STAGES, 1 + GATHERERS)
    ring = open_ring(WARPGROUPS + GATHERERS)
    if PDL:
        # While the plan is made the memory has nothing to do, and weights are not what another kernel makes.
        _prefetch(w13_words_ptr, w13_scales_ptr, HIDDEN, INTER, LOCAL, BLOCK_N, min(_PREFETCHED, HIDDEN // 128))
        gdc_wait()
        gdc_launch_dependents()
    plan = (route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr)
    w13_descs = (w13_words_desc, w13_scales_desc)
    w2_descs = (w2_words_desc, w2_scales_desc)
    gl.warp_specialize(
        [
            (_multiply, (
                b13_ptr, h_ptr, b2_ptr, y_ptr, route_ptr, state_ptr, limit, pipe, ring,
                gl.constexpr(0), HIDDEN, INTER, HAS_B13, HAS_B2, HAS_LIMIT, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_multiply, (
                b13_ptr, h_ptr, b2_ptr, y_ptr, route_ptr, state_ptr, limit, pipe, ring,
                gl.constexpr(1), HIDDEN, INTER, HAS_B13, HAS_B2, HAS_LIMIT, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_take, (
                rows_desc, w13_descs, w2_descs, plan, state_ptr, pipe, ring, HIDDEN, INTER, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_gather, (
                x_ptr, out_ptr, route_ptr, ids_ptr, map_ptr, tokens, known, pipe, ring,
                gl.constexpr(0), TOP_K, HIDDEN, LOCAL, HAS_MAP, BLOCK_M, STAGES,
            )),
            (_gather, (
                x_ptr, out_ptr, route_ptr, ids_ptr, map_ptr, tokens, known, pipe, ring,
                gl.constexpr(1), TOP_K, HIDDEN, LOCAL, HAS_MAP, BLOCK_M, STAGES,
            )),
        ],
        [4, 1, 1, 1],
        [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
