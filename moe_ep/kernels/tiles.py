"""A tile of each grouped GEMM on Hopper: how its groups come into the pipe, and what becomes of its products.

Scales are applied to the weights, which come out as their value times 2^-64; the sums are multiplied by 2^64, so the
activations are taken as they are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_ep.kernels.fragments import swiglu
from moe_ep.kernels.pipe import (
    BOXES,
    COPIES,
    GATHERERS,
    ROWS_AT_ONCE,
    WARPGROUPS,
    accumulator_layout,
    columns,
    expect,
    fill_boxes,
    fill_rows,
    fill_weights,
    first_column,
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
def gather_tile(
    x_ptr, route_ptr, pipe, block, first,
    GATHERER: gl.constexpr, TOP_K: gl.constexpr, HIDDEN: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy a warp's share of the activations of a tile of gate and up, whose first group is the first-th."""
    _expert, start, end = block
    rows: gl.constexpr = ROWS_AT_ONCE
    of_panel: gl.constexpr = gl.SliceLayout(0, COPIES)
    k = gl.arange(0, 64, layout=gl.SliceLayout(0, of_panel))
    offsets = ()
    for piece in gl.static_range(GATHERER * rows, BLOCK_M, GATHERERS * rows):
        position = start + piece + gl.arange(0, rows, layout=gl.SliceLayout(1, of_panel))
        route = gl.load(route_ptr + gl.minimum(position, end - 1))  # past the block's last, that again
        offsets = offsets + ((route // TOP_K * HIDDEN)[:, None] + k[None, :],)  # type: ignore[assignment]
    for group in range(HIDDEN // 128):
        wait_free(pipe, first + group, STAGES)
        fill_rows(pipe, x_ptr, offsets, end - start, group, first + group, GATHERER, BLOCK_M, STAGES)


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
