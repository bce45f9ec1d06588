"""Both grouped GEMMs for many rows an expert on Hopper, where the matrix units are the bound.

One program a multiprocessor, or two, make one tile after the other with two warpgroups that take turns
(`kernels.pipe`): while one decodes, the other multiplies. Here scales are applied to the weights, which come out as
their value times 2^-64; the sums are multiplied by 2^64, so the activations are taken as they are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_ep.kernels.fragments import swiglu
from moe_ep.kernels.pipe import (
    COPIES,
    accumulator_layout,
    begin,
    columns,
    first_column,
    hand_over_first,
    open_pipe,
    piece_count,
    products,
    row_sources,
    weight_sources,
    width,
    width_count,
)


@gluon.jit
def _block(plan, blocks, tile, N_TILES: gl.constexpr):
    """(expert, first position, one past the last) of a tile's block of routes; expert −1 past the last tile."""
    _route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr = plan
    block = tile // N_TILES
    inside = block < blocks
    expert = gl.load(block_expert_ptr + block, mask=inside, other=-1)
    start = gl.load(block_start_ptr + block, mask=inside, other=0)
    return expert, start, gl.load(block_end_ptr + block, mask=inside, other=0)


@gluon.jit
def _own(start, HALF: gl.constexpr, ROWS: gl.constexpr):
    """Positions whose activations this warpgroup copies."""
    copies: gl.constexpr = COPIES
    return start + HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, copies))


@gluon.jit
def _tokens(route_ptr, block, HALF: gl.constexpr, TOP_K: gl.constexpr, ROWS: gl.constexpr):
    """Tokens of this warpgroup's positions. Those past the block's last repeat it, and are not read."""
    expert, start, end = block
    position = gl.minimum(_own(start, HALF, ROWS), end - 1)
    return gl.load(route_ptr + position, mask=(position >= 0) & (expert >= 0), other=0) // TOP_K


@gluon.jit
def _gate_up_sources(
    x_ptr, w13_ptr, scale_ptr, block, tile, token,
    HALF: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    expert, start, end = block
    groups: gl.constexpr = HIDDEN // 128
    copies: gl.constexpr = COPIES
    row = expert.to(gl.int64) * (2 * INTER) + tile % (INTER // BLOCK_N) * BLOCK_N
    words, fields = weight_sources(w13_ptr, scale_ptr, row, BLOCK_N, groups, INTER * groups, HALF)
    inside = (_own(start, HALF, token.shape[0]) < end)[:, None]
    return row_sources(x_ptr, token, HIDDEN, copies), inside, words, fields


@gluon.jit
def _gate_up(
    x_ptr, w13_ptr, scale_ptr, bias_ptr, h_ptr, plan, limit, blocks, pipe,
    HALF: gl.constexpr, TOP_K: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup's half of all tiles of this program."""
    n_tiles: gl.constexpr = INTER // BLOCK_N
    rows: gl.constexpr = BLOCK_M // 2
    inputs = (x_ptr, w13_ptr, scale_ptr)
    outputs = (h_ptr, bias_ptr, limit)
    step = gl.num_programs(0)
    tile = gl.program_id(0)
    index = 0
    block = _block(plan, blocks, tile, n_tiles)
    following = _block(plan, blocks, tile + step, n_tiles)
    token = _tokens(plan[0], block, HALF, TOP_K, rows)
    if block[0] >= 0:
        sources = _gate_up_sources(x_ptr, w13_ptr, scale_ptr, block, tile, token, HALF, HIDDEN, INTER, BLOCK_N)
        begin(pipe, sources, index, HALF, STAGES)
    while block[0] >= 0:
        # What the next tile needs is on its way while this one is made.
        next_token = _tokens(plan[0], following, HALF, TOP_K, rows)
        later = _block(plan, blocks, tile + 2 * step, n_tiles)
        hand_over_first(pipe, index, STAGES)
        routes = block[2] - block[1]
        for i in gl.static_range(width_count(BLOCK_M)):
            if (routes > width(BLOCK_M, i - 1)) & (routes <= width(BLOCK_M, i)):
                _gate_up_tile(
                    inputs, outputs, pipe, index, block, tile, token, following, tile + step, next_token,
                    HALF, HIDDEN, INTER, HAS_BIAS, HAS_LIMIT, BLOCK_N, width(BLOCK_M, i), STAGES,
                )  # fmt: skip
        block = following
        following = later
        token = next_token
        tile += step
        index += HIDDEN // 128


@gluon.jit
def _gate_up_tile(
    inputs, outputs, pipe, index, block, tile, token, following, next_tile, next_token,
    HALF: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LIMIT: gl.constexpr,
    BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Make one tile; the next one's first groups are copied while this one is stored."""
    tiles: gl.constexpr = BLOCK_N // 64
    count: gl.constexpr = piece_count(WIDTH)
    x_ptr, w13_ptr, scale_ptr = inputs
    h_ptr, bias_ptr, limit = outputs
    expert, start, end = block
    sources = _gate_up_sources(x_ptr, w13_ptr, scale_ptr, block, tile, token, HALF, HIDDEN, INTER, BLOCK_N)
    accs = products(pipe, sources, index, HALF, tiles, HIDDEN // 128, WIDTH, STAGES)
    if following[0] >= 0:
        ahead = _gate_up_sources(
            x_ptr, w13_ptr, scale_ptr, following, next_tile, next_token, HALF, HIDDEN, INTER, BLOCK_N
        )
        begin(pipe, ahead, index + HIDDEN // 128, HALF, STAGES)
    n_first = tile % (INTER // BLOCK_N) * BLOCK_N
    row = expert.to(gl.int64) * (2 * INTER) + n_first
    for i in gl.static_range(tiles * count):
        n = 32 * (HALF * tiles + i // count)
        _store_h(
            accs[i], h_ptr, bias_ptr + row + n, limit, n_first + n, start + first_column(WIDTH, i % count), end,
            INTER, HAS_BIAS, HAS_LIMIT, columns(WIDTH, i % count),
        )  # fmt: skip


@gluon.jit
def _store_h(
    acc, h_ptr, bias_ptr, limit, n_first, start, end,
    INTER: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LIMIT: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """acc [64, COLUMNS], eight rows of gate and of up in turn → 32 features of h.

    Through shared memory, so that a lane stores 16 bytes.
    """
    out: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [1, 4], [0, 1])
    gate, up = (acc * 18446744073709551616.0).reshape([4, 2, 8, COLUMNS]).permute((0, 2, 3, 1)).split()  # 2^64
    gate = gate.reshape([32, COLUMNS])
    up = up.reshape([32, COLUMNS])
    if HAS_BIAS:
        n = gl.arange(0, 32, layout=gl.SliceLayout(1, gate.type.layout))
        gate += gl.load(bias_ptr + n)[:, None]
        up += gl.load(bias_ptr + n + INTER)[:, None]
    h = gl.convert_layout(swiglu(gate, up, limit, HAS_LIMIT), out)
    n = n_first + gl.arange(0, 32, layout=gl.SliceLayout(1, out))
    m = start + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, out))
    gl.store(h_ptr + m.to(gl.int64)[None, :] * INTER + n[:, None], h, mask=(m < end)[None, :])


@gluon.jit
def _down_sources(
    h_ptr, w2_ptr, scale_ptr, block, tile,
    HALF: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, BLOCK_N: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    expert, start, end = block
    copies: gl.constexpr = COPIES
    row = expert.to(gl.int64) * HIDDEN + tile % (HIDDEN // (2 * BLOCK_N)) * (2 * BLOCK_N)
    words, fields = weight_sources(w2_ptr, scale_ptr, row, BLOCK_N, INTER // 128, 0, HALF)
    own = _own(start, HALF, ROWS)
    return row_sources(h_ptr, own, INTER, copies), (own < end)[:, None], words, fields


@gluon.jit
def _down(
    h_ptr, w2_ptr, scale_ptr, bias_ptr, y_ptr, plan, blocks, pipe,
    HALF: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup's half of all tiles of this program."""
    n_tiles: gl.constexpr = HIDDEN // (2 * BLOCK_N)
    rows: gl.constexpr = BLOCK_M // 2
    inputs = (h_ptr, w2_ptr, scale_ptr)
    outputs = (y_ptr, bias_ptr, plan[0])
    step = gl.num_programs(0)
    tile = gl.program_id(0)
    index = 0
    block = _block(plan, blocks, tile, n_tiles)
    following = _block(plan, blocks, tile + step, n_tiles)
    if block[0] >= 0:
        sources = _down_sources(h_ptr, w2_ptr, scale_ptr, block, tile, HALF, HIDDEN, INTER, BLOCK_N, rows)
        begin(pipe, sources, index, HALF, STAGES)
    while block[0] >= 0:
        later = _block(plan, blocks, tile + 2 * step, n_tiles)
        hand_over_first(pipe, index, STAGES)
        routes = block[2] - block[1]
        for i in gl.static_range(width_count(BLOCK_M)):
            if (routes > width(BLOCK_M, i - 1)) & (routes <= width(BLOCK_M, i)):
                _down_tile(
                    inputs, outputs, pipe, index, block, tile, following, tile + step,
                    HALF, HIDDEN, INTER, HAS_BIAS, BLOCK_N, rows, width(BLOCK_M, i), STAGES,
                )  # fmt: skip
        block = following
        following = later
        tile += step
        index += INTER // 128


@gluon.jit
def _down_tile(
    inputs, outputs, pipe, index, block, tile, following, next_tile,
    HALF: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_N: gl.constexpr,
    ROWS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Make one tile; the next one's first groups are copied while this one is stored."""
    tiles: gl.constexpr = BLOCK_N // 64
    count: gl.constexpr = piece_count(WIDTH)
    h_ptr, w2_ptr, scale_ptr = inputs
    y_ptr, bias_ptr, route_ptr = outputs
    expert, start, end = block
    sources = _down_sources(h_ptr, w2_ptr, scale_ptr, block, tile, HALF, HIDDEN, INTER, BLOCK_N, ROWS)
    accs = products(pipe, sources, index, HALF, tiles, INTER // 128, WIDTH, STAGES)
    if following[0] >= 0:
        ahead = _down_sources(h_ptr, w2_ptr, scale_ptr, following, next_tile, HALF, HIDDEN, INTER, BLOCK_N, ROWS)
        begin(pipe, ahead, index + INTER // 128, HALF, STAGES)
    n_first = tile % (HIDDEN // (2 * BLOCK_N)) * (2 * BLOCK_N)
    row = expert.to(gl.int64) * HIDDEN + n_first
    for i in gl.static_range(tiles * count):
        n = 64 * (HALF * tiles + i // count)
        _store_y(
            accs[i], y_ptr, bias_ptr + row + n, route_ptr, n_first + n, start + first_column(WIDTH, i % count), end,
            HIDDEN, HAS_BIAS, columns(WIDTH, i % count),
        )  # fmt: skip


@gluon.jit
def _store_y(
    acc, y_ptr, bias_ptr, route_ptr, n_first, start, end,
    HIDDEN: gl.constexpr, HAS_BIAS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """acc [64, COLUMNS] → rows of y: of bf16 through shared memory, 16 bytes a lane."""
    mma: gl.constexpr = accumulator_layout(COLUMNS)
    small: gl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth == 16
    out: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]) if small else mma
    m = start + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, out))
    route = gl.load(route_ptr + m, mask=m < end, other=0)
    acc *= 18446744073709551616.0  # 2^64
    if HAS_BIAS:
        acc += gl.load(bias_ptr + gl.arange(0, 64, layout=gl.SliceLayout(1, mma)))[:, None]
    y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), out)
    n = n_first + gl.arange(0, 64, layout=gl.SliceLayout(1, out))
    gl.store(y_ptr + route.to(gl.int64)[None, :] * HIDDEN + n[:, None], y, mask=(m < end)[None, :])


@gluon.jit(do_not_specialize=["blocks"])
def gate_up_warpgroup(
    x_ptr,  # bf16 [M, HIDDEN]
    w13_ptr,  # uint16 [L, 2·INTER, HIDDEN/4] in kernel order
    scale_ptr,  # uint32 [L, 2·INTER, HIDDEN/128]: exponent fields
    bias_ptr,  # f32 [L, 2·INTER], read if HAS_BIAS
    h_ptr,  # out: bf16 [routes, INTER]; row = position in the sorted routes
    route_ptr,  # int32 [routes]: token·TOP_K + slot, sorted by local expert
    block_expert_ptr,  # int32 [blocks]: local expert of the block, −1 past the last
    block_start_ptr,  # int32 [blocks]: first position of the block
    block_end_ptr,  # int32 [blocks]: one past its last position
    limit,
    blocks,  # the most that there can be
    TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr,  # a multiple of 128, and at least STAGES − 1 of them
    INTER: gl.constexpr,  # a multiple of BLOCK_N
    HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert, at most
    BLOCK_N: gl.constexpr,  # intermediate features of a tile: 64 or 128
    STAGES: gl.constexpr,  # groups in shared memory
    REGISTERS: gl.constexpr,  # of a thread: 256, or 128 where two programs share a multiprocessor
):
    # Layout: a tile is [BLOCK_N, up to BLOCK_M] of hᵀ, from rows n of w1 and of w3, half of it each warpgroup's; tiles
    # of one block of routes are made at a time, so that its x rows stay in cache.
    # The trick: a block that is not full takes products of fewer columns.
    pipe = open_pipe(BLOCK_M, BLOCK_N, STAGES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    plan = (route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr)
    gl.warp_specialize(
        [
            (_gate_up, (
                x_ptr, w13_ptr, scale_ptr, bias_ptr, h_ptr, plan, limit, blocks, pipe,
                gl.constexpr(0), TOP_K, HIDDEN, INTER, HAS_BIAS, HAS_LIMIT, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_gate_up, (
                x_ptr, w13_ptr, scale_ptr, bias_ptr, h_ptr, plan, limit, blocks, pipe,
                gl.constexpr(1), TOP_K, HIDDEN, INTER, HAS_BIAS, HAS_LIMIT, BLOCK_M, BLOCK_N, STAGES,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["blocks"])
def down_warpgroup(
    h_ptr,  # bf16 [routes, INTER]; row = position in the sorted routes
    w2_ptr,  # uint16 [L, HIDDEN, INTER/4] in kernel order
    scale_ptr,  # uint32 [L, HIDDEN, INTER/128]: exponent fields
    bias_ptr,  # f32 [L, HIDDEN], read if HAS_BIAS
    y_ptr,  # out: bf16 or f32 [M·TOP_K, HIDDEN], row = route, not weighted; of remote routes not written
    route_ptr,  # int32 [routes]
    block_expert_ptr,  # int32 [blocks]
    block_start_ptr,  # int32 [blocks]
    block_end_ptr,  # int32 [blocks]
    blocks,
    HIDDEN: gl.constexpr,  # a multiple of 2·BLOCK_N
    INTER: gl.constexpr,  # a multiple of 128, and at least STAGES − 1 of them
    HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert, at most
    BLOCK_N: gl.constexpr,  # hidden features of each warpgroup's half of a tile: 64 or 128
    STAGES: gl.constexpr,  # groups in shared memory
    REGISTERS: gl.constexpr,  # of a thread: 256, or 128 where two programs share a multiprocessor
):
    # Layout: a tile is [2·BLOCK_N, up to BLOCK_M] of yᵀ, half of it each warpgroup's, and is scattered to the rows of
    # its routes: every route has a row of its own, so no atomics are needed.
    pipe = open_pipe(BLOCK_M, BLOCK_N, STAGES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    plan = (route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr)
    gl.warp_specialize(
        [
            (_down, (
                h_ptr, w2_ptr, scale_ptr, bias_ptr, y_ptr, plan, blocks, pipe,
                gl.constexpr(0), HIDDEN, INTER, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_down, (
                h_ptr, w2_ptr, scale_ptr, bias_ptr, y_ptr, plan, blocks, pipe,
                gl.constexpr(1), HIDDEN, INTER, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip
