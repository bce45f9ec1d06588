"""The grouped GEMMs of about one row an expert or more on Hopper, each by itself, and what their tiles are made of.

`kernels.experts` makes both GEMMs of these tiles; here are the launches for ranges of columns, and for unlike tiles.

One program a multiprocessor makes one tile after the other: two warpgroups multiply (`kernels.pipe`), one warp feeds
the copy engine, and for gate and up two warps gather activations. Here scales are applied to the weights, which come
out as their value times 2^-64; the sums are multiplied by 2^64, so the activations are taken as they are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_ep.kernels.fragments import swiglu
from moe_ep.kernels.pipe import (
    BOXES,
    COPIES,
    WARPGROUPS,
    accumulator_layout,
    columns,
    expect,
    fill_boxes,
    fill_rows,
    fill_weights,
    first_column,
    hand_over_last,
    open_pipe,
    piece_count,
    products,
    row_bytes,
    wait_free,
    weight_bytes,
    width,
    width_count,
)


@gluon.jit
def block_of(plan, block, blocks):
    """(expert, first position, one past the last) of a block of routes; expert −1 past the last of `blocks`."""
    _route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr = plan
    inside = block < blocks
    expert = gl.load(block_expert_ptr + block, mask=inside, other=-1)
    start = gl.load(block_start_ptr + block, mask=inside, other=0)
    return expert, start, gl.load(block_end_ptr + block, mask=inside, other=0)


@gluon.jit
def _block(plan, blocks, tile, N_TILES: gl.constexpr):
    """A tile's block of routes."""
    return block_of(plan, tile // N_TILES, blocks)


@gluon.jit
def _tokens(route_ptr, block, TOP_K: gl.constexpr, BLOCK_M: gl.constexpr):
    """Tokens of a block's positions. Those past its last repeat it, and are not read."""
    expert, start, end = block
    copies: gl.constexpr = COPIES
    position = gl.minimum(start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, copies)), end - 1)
    return gl.load(route_ptr + position, mask=(position >= 0) & (expert >= 0), other=0) // TOP_K


@gluon.jit
def gather_tile(
    x_ptr, route_ptr, pipe, block, first,
    TOP_K: gl.constexpr, HIDDEN: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the activations of a tile of gate and up, whose first group is the first-th."""
    copies: gl.constexpr = COPIES
    inside = block[1] + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, copies)) < block[2]
    rows = _tokens(route_ptr, block, TOP_K, BLOCK_M) * (HIDDEN // 128)
    for group in range(HIDDEN // 128):
        wait_free(pipe, first + group, STAGES)
        fill_rows(pipe, x_ptr, rows, inside, group, first + group, STAGES)


@gluon.jit
def _load_x(
    x_ptr, plan, blocks, pipe,
    TOP_K: gl.constexpr, HIDDEN: gl.constexpr, N_TILES: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the activations of all tiles of this program."""
    step = gl.num_programs(0)
    tile = gl.program_id(0)
    index = 0
    block = _block(plan, blocks, tile, N_TILES)
    while block[0] >= 0:
        following = _block(plan, blocks, tile + step, N_TILES)
        gather_tile(x_ptr, plan[0], pipe, block, index, TOP_K, HIDDEN, BLOCK_M, STAGES)
        block = following
        tile += step
        index += HIDDEN // 128
    hand_over_last(pipe, index, STAGES)


@gluon.jit
def fill_gate_up(
    words_desc, scales_desc, pipe, expert, row, group, index, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Begin to copy a group of both warpgroups' weights, from a 16-row tile of w1 and of w3 on."""
    own: gl.constexpr = BLOCK_N // WARPGROUPS // 16
    expect(pipe, index, weight_bytes(BLOCK_N), True, STAGES)
    for half in gl.static_range(WARPGROUPS):
        at = (2 * expert, row + half * own)
        fill_weights(pipe, words_desc, scales_desc, at, group, index, half, STAGES)


@gluon.jit
def fill_down(
    rows_desc, words_desc, scales_desc, pipe, block, row, group, index,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Begin to copy a group of both warpgroups' weights, from a 16-row tile of w2 on, and of the block's h."""
    box_rows: gl.constexpr = BLOCK_M // BOXES
    own: gl.constexpr = BLOCK_N // 16
    boxes = (block[2] - block[1] + box_rows - 1) // box_rows
    for some in gl.static_range(1, BOXES + 1):
        expect(pipe, index, weight_bytes(BLOCK_N) + row_bytes(some * box_rows), boxes == some, STAGES)
    for half in gl.static_range(WARPGROUPS):
        fill_weights(pipe, words_desc, scales_desc, (row + half * own,), group, index, half, STAGES)
    fill_boxes(pipe, rows_desc, block[1], boxes, group, index, BLOCK_M, STAGES)


@gluon.jit
def _load_w13(
    words_desc, scales_desc, plan, blocks, pipe,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the weights of all tiles of this program."""
    n_tiles: gl.constexpr = INTER // BLOCK_N
    step = gl.num_programs(0)
    tile = gl.program_id(0)
    index = 0
    block = _block(plan, blocks, tile, n_tiles)
    while block[0] >= 0:
        following = _block(plan, blocks, tile + step, n_tiles)
        row = tile % n_tiles * (BLOCK_N // 16)
        for group in range(HIDDEN // 128):
            wait_free(pipe, index, STAGES)
            fill_gate_up(words_desc, scales_desc, pipe, block[0], row, group, index, BLOCK_N, STAGES)
            index += 1
        block = following
        tile += step


@gluon.jit
def _load_down(
    rows_desc, words_desc, scales_desc, plan, blocks, pipe,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy all that this program's tiles of the down projection take."""
    n_tiles: gl.constexpr = HIDDEN // (2 * BLOCK_N)
    step = gl.num_programs(0)
    tile = gl.program_id(0)
    index = 0
    block = _block(plan, blocks, tile, n_tiles)
    while block[0] >= 0:
        following = _block(plan, blocks, tile + step, n_tiles)
        row = block[0] * (HIDDEN // 16) + tile % n_tiles * (2 * BLOCK_N // 16)
        for group in range(INTER // 128):
            wait_free(pipe, index, STAGES)
            fill_down(
                rows_desc, words_desc, scales_desc, pipe, block, row, group, index, BLOCK_M, BLOCK_N, STAGES
            )  # fmt: skip
            index += 1
        block = following
        tile += step


@gluon.jit
def _gate_up(
    bias_ptr, h_ptr, plan, limit, blocks, pipe,
    WARPGROUP: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup's half of all tiles of this program."""
    n_tiles: gl.constexpr = INTER // BLOCK_N
    step = gl.num_programs(0)
    tile = gl.program_id(0)
    index = 0
    block = _block(plan, blocks, tile, n_tiles)
    while block[0] >= 0:
        following = _block(plan, blocks, tile + step, n_tiles)
        gate_up_tile(
            bias_ptr, h_ptr, limit, pipe, index, block, tile % n_tiles * BLOCK_N,
            WARPGROUP, HIDDEN, INTER, HAS_BIAS, HAS_LIMIT, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
        block = following
        tile += step
        index += HIDDEN // 128


@gluon.jit
def gate_up_tile(
    bias_ptr, h_ptr, limit, pipe, index, block, n_first,
    WARPGROUP: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of a tile, whose first group is the index-th, by as few columns as its routes take."""
    routes = block[2] - block[1]
    for i in gl.static_range(width_count(BLOCK_M)):
        if (routes > width(BLOCK_M, i - 1)) & (routes <= width(BLOCK_M, i)):
            _gate_up_columns(
                bias_ptr, h_ptr, limit, pipe, index, block, n_first,
                WARPGROUP, HIDDEN, INTER, HAS_BIAS, HAS_LIMIT, BLOCK_N, width(BLOCK_M, i), STAGES,
            )  # fmt: skip


@gluon.jit
def _gate_up_columns(
    bias_ptr, h_ptr, limit, pipe, index, block, n_first,
    WARPGROUP: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    tiles: gl.constexpr = BLOCK_N // (32 * WARPGROUPS)
    count: gl.constexpr = piece_count(WIDTH)
    expert, start, end = block
    accs = products(pipe, index, WARPGROUP, tiles, True, HIDDEN // 128, WIDTH, STAGES)
    row = expert.to(gl.int64) * (2 * INTER) + n_first
    for i in gl.static_range(tiles * count):
        n = 32 * (WARPGROUP * tiles + i // count)
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
def _down(
    bias_ptr, y_ptr, plan, blocks, pipe,
    WARPGROUP: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup's half of all tiles of this program."""
    n_tiles: gl.constexpr = HIDDEN // (2 * BLOCK_N)
    step = gl.num_programs(0)
    tile = gl.program_id(0)
    index = 0
    block = _block(plan, blocks, tile, n_tiles)
    while block[0] >= 0:
        following = _block(plan, blocks, tile + step, n_tiles)
        down_tile(
            bias_ptr, y_ptr, plan[0], pipe, index, block, tile % n_tiles * (2 * BLOCK_N),
            WARPGROUP, HIDDEN, INTER, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
        block = following
        tile += step
        index += INTER // 128


@gluon.jit
def down_tile(
    bias_ptr, y_ptr, route_ptr, pipe, index, block, n_first,
    WARPGROUP: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `gate_up_tile`."""
    routes = block[2] - block[1]
    for i in gl.static_range(width_count(BLOCK_M)):
        if (routes > width(BLOCK_M, i - 1)) & (routes <= width(BLOCK_M, i)):
            _down_columns(
                bias_ptr, y_ptr, route_ptr, pipe, index, block, n_first,
                WARPGROUP, HIDDEN, INTER, HAS_BIAS, BLOCK_N, width(BLOCK_M, i), STAGES,
            )  # fmt: skip


@gluon.jit
def _down_columns(
    bias_ptr, y_ptr, route_ptr, pipe, index, block, n_first,
    WARPGROUP: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    tiles: gl.constexpr = BLOCK_N // (32 * WARPGROUPS)
    count: gl.constexpr = piece_count(WIDTH)
    expert, start, end = block
    accs = products(pipe, index, WARPGROUP, tiles, False, INTER // 128, WIDTH, STAGES)
    row = expert.to(gl.int64) * HIDDEN + n_first
    for i in gl.static_range(tiles * count):
        n = 64 * (WARPGROUP * tiles + i // count)
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
    words_desc,  # w13, uint16 [L·2, INTER/16, HIDDEN/128, 16, 32], in boxes [2, BLOCK_N/32, 1, 16, 32]
    scales_desc,  # uint32 [L·2, INTER/16, HIDDEN/128, 16]: exponent fields, in boxes of the same rows
    bias_ptr,  # f32 [L, 2·INTER], read if HAS_BIAS
    h_ptr,  # out: bf16 [routes, INTER]; row = position in the sorted routes
    route_ptr,  # int32 [routes]: token·TOP_K + slot, sorted by local expert
    block_expert_ptr,  # int32 [blocks]: local expert of the block, −1 past the last
    block_start_ptr,  # int32 [blocks]: first position of the block
    block_end_ptr,  # int32 [blocks]: one past its last position
    limit,
    blocks,  # the most that there can be
    TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr,  # a multiple of 128
    INTER: gl.constexpr,  # a multiple of BLOCK_N
    HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert, at most
    BLOCK_N: gl.constexpr,  # intermediate features of a tile: 64 or 128
    STAGES: gl.constexpr,  # groups in shared memory
    REGISTERS: gl.constexpr,  # of a thread that multiplies
    LOADER_REGISTERS: gl.constexpr,  # of one that copies
):
    # Layout: a tile is [BLOCK_N, up to BLOCK_M] of hᵀ, from rows n of w1 and of w3, half of it each warpgroup's; tiles
    # of one block of routes are made at a time, so that its x rows stay in cache.
    # The trick: a block that is not full takes products of fewer columns.
    pipe = open_pipe(words_desc, scales_desc, BLOCK_M, STAGES, 2)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    plan = (route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr)
    gl.warp_specialize(
        [
            (_gate_up, (
                bias_ptr, h_ptr, plan, limit, blocks, pipe,
                gl.constexpr(0), HIDDEN, INTER, HAS_BIAS, HAS_LIMIT, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_gate_up, (
                bias_ptr, h_ptr, plan, limit, blocks, pipe,
                gl.constexpr(1), HIDDEN, INTER, HAS_BIAS, HAS_LIMIT, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_load_w13, (words_desc, scales_desc, plan, blocks, pipe, HIDDEN, INTER, BLOCK_N, STAGES)),
            (_load_x, (x_ptr, plan, blocks, pipe, TOP_K, HIDDEN, INTER // BLOCK_N, BLOCK_M, STAGES)),
        ],
        [4, 1, 2],
        [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["blocks"])
def down_warpgroup(
    rows_desc,  # h, bf16 [routes, INTER], row = position in the sorted routes, in boxes [BLOCK_M/4, 64]
    words_desc,  # w2, uint16 [L·HIDDEN/16, INTER/128, 16, 32], in boxes [BLOCK_N/16, 1, 16, 32]
    scales_desc,  # uint32 [L·HIDDEN/16, INTER/128, 16]: exponent fields, in boxes of the same rows
    bias_ptr,  # f32 [L, HIDDEN], read if HAS_BIAS
    y_ptr,  # out: bf16 or f32 [M·TOP_K, HIDDEN], row = route, not weighted; of remote routes not written
    route_ptr,  # int32 [routes]
    block_expert_ptr,  # int32 [blocks]
    block_start_ptr,  # int32 [blocks]
    block_end_ptr,  # int32 [blocks]
    blocks,
    HIDDEN: gl.constexpr,  # a multiple of 2·BLOCK_N
    INTER: gl.constexpr,  # a multiple of 128
    HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert, at most
    BLOCK_N: gl.constexpr,  # hidden features of each warpgroup's half of a tile: 64 or 128
    STAGES: gl.constexpr,  # groups in shared memory
    REGISTERS: gl.constexpr,  # of a thread that multiplies
    LOADER_REGISTERS: gl.constexpr,  # of one that copies
):
    # Layout: a tile is [2·BLOCK_N, up to BLOCK_M] of yᵀ, half of it each warpgroup's, and is scattered to the rows of
    # its routes: every route has a row of its own, so no atomics are needed.
    pipe = open_pipe(words_desc, scales_desc, BLOCK_M, STAGES, 1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    plan = (route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr)
    gl.warp_specialize(
        [
            (_down, (
                bias_ptr, y_ptr, plan, blocks, pipe,
                gl.constexpr(0), HIDDEN, INTER, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_down, (
                bias_ptr, y_ptr, plan, blocks, pipe,
                gl.constexpr(1), HIDDEN, INTER, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_load_down, (
                rows_desc, words_desc, scales_desc, plan, blocks, pipe, HIDDEN, INTER, BLOCK_M, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
