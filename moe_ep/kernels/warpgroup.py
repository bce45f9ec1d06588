"""Both grouped GEMMs for many rows an expert on Hopper, where the matrix units are the bound.

A program per multiprocessor makes one tile after the other with two warpgroups, each at its own pace (`kernels.pipe`):
while one decodes, the other multiplies. Here scales are applied to the weights, which come out as their value times
2^-64; the sums are multiplied by 2^64, so the activations are taken as they are.
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
    open_pipe,
    piece_count,
    products,
    row_sources,
    weight_sources,
)


@gluon.jit
def _gate_up(
    x_ptr, w13_ptr, scale_ptr, bias_ptr, h_ptr, plan, limit, blocks, pipe,
    HALF: gl.constexpr, TOP_K: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup's half of all tiles of this program."""
    groups: gl.constexpr = HIDDEN // 128
    n_tiles: gl.constexpr = INTER // BLOCK_N
    copies: gl.constexpr = COPIES
    own = HALF * (BLOCK_M // 2) + gl.arange(0, BLOCK_M // 2, layout=gl.SliceLayout(1, copies))
    route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr = plan
    index = 0
    for tile in range(gl.program_id(0), blocks * n_tiles, gl.num_programs(0)):
        block = tile // n_tiles
        expert = gl.load(block_expert_ptr + block)
        if expert >= 0:
            start = gl.load(block_start_ptr + block)
            end = gl.load(block_end_ptr + block)
            n_first = tile % n_tiles * BLOCK_N
            row = expert.to(gl.int64) * (2 * INTER) + n_first
            words, fields = weight_sources(w13_ptr, scale_ptr, row, BLOCK_N, groups, INTER * groups, HALF)
            # Positions past the block's last repeat it, and are not read.
            token = gl.load(route_ptr + gl.minimum(start + own, end - 1)) // TOP_K
            sources = (row_sources(x_ptr, token, HIDDEN, copies), (start + own < end)[:, None], words, fields)
            begin(pipe, sources, index, HALF, STAGES)
            quarters = (end - start + BLOCK_M // 4 - 1) // (BLOCK_M // 4)
            for i in gl.static_range(1, 5):
                if quarters == i:
                    _gate_up_tile(
                        h_ptr, bias_ptr, limit, pipe, sources, index, row, start, end, n_first,
                        HALF, HIDDEN, INTER, HAS_BIAS, HAS_LIMIT, BLOCK_N // 64, i * BLOCK_M // 4, STAGES,
                    )  # fmt: skip
            index += groups


@gluon.jit
def _gate_up_tile(
    h_ptr, bias_ptr, limit, pipe, sources, index, row, start, end, n_first,
    HALF: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LIMIT: gl.constexpr,
    TILES: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    accs = products(pipe, sources, index, HALF, TILES, HIDDEN // 128, WIDTH, STAGES)
    count: gl.constexpr = piece_count(WIDTH)
    for i in gl.static_range(TILES * count):
        n = 32 * (HALF * TILES + i // count)
        _store_h(
            accs[i], h_ptr, bias_ptr + row + n, limit, n_first + n, start + first_column(WIDTH, i % count), end,
            INTER, HAS_BIAS, HAS_LIMIT, columns(WIDTH, i % count),
        )  # fmt: skip


@gluon.jit
def _store_h(
    acc, h_ptr, bias_ptr, limit, n_first, start, end,
    INTER: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LIMIT: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """acc [64, COLUMNS], eight rows of gate and of up in turn → 32 features of h."""
    gate, up = (acc * 18446744073709551616.0).reshape([4, 2, 8, COLUMNS]).permute((0, 2, 3, 1)).split()  # 2^64
    gate = gate.reshape([32, COLUMNS])
    up = up.reshape([32, COLUMNS])
    n = gl.arange(0, 32, layout=gl.SliceLayout(1, gate.type.layout))
    if HAS_BIAS:
        gate += gl.load(bias_ptr + n)[:, None]
        up += gl.load(bias_ptr + n + INTER)[:, None]
    m = start + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gate.type.layout))
    h_rows = h_ptr + m.to(gl.int64)[None, :] * INTER + (n_first + n)[:, None]
    gl.store(h_rows, swiglu(gate, up, limit, HAS_LIMIT), mask=(m < end)[None, :])


@gluon.jit
def _down(
    h_ptr, w2_ptr, scale_ptr, bias_ptr, weight_ptr, y_ptr, plan, blocks, pipe,
    HALF: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup's half of all tiles of this program."""
    groups: gl.constexpr = INTER // 128
    n_tiles: gl.constexpr = HIDDEN // (2 * BLOCK_N)
    copies: gl.constexpr = COPIES
    own = HALF * (BLOCK_M // 2) + gl.arange(0, BLOCK_M // 2, layout=gl.SliceLayout(1, copies))
    route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr = plan
    index = 0
    for tile in range(gl.program_id(0), blocks * n_tiles, gl.num_programs(0)):
        block = tile // n_tiles
        expert = gl.load(block_expert_ptr + block)
        if expert >= 0:
            start = gl.load(block_start_ptr + block)
            end = gl.load(block_end_ptr + block)
            n_first = tile % n_tiles * (2 * BLOCK_N)
            row = expert.to(gl.int64) * HIDDEN + n_first
            words, fields = weight_sources(w2_ptr, scale_ptr, row, BLOCK_N, groups, 0, HALF)
            sources = (row_sources(h_ptr, start + own, INTER, copies), (start + own < end)[:, None], words, fields)
            begin(pipe, sources, index, HALF, STAGES)
            quarters = (end - start + BLOCK_M // 4 - 1) // (BLOCK_M // 4)
            for i in gl.static_range(1, 5):
                if quarters == i:
                    _down_tile(
                        y_ptr, bias_ptr, weight_ptr, route_ptr, pipe, sources, index, row, start, end, n_first,
                        HALF, HIDDEN, INTER, HAS_BIAS, BLOCK_N // 64, i * BLOCK_M // 4, STAGES,
                    )  # fmt: skip
            index += groups


@gluon.jit
def _down_tile(
    y_ptr, bias_ptr, weight_ptr, route_ptr, pipe, sources, index, row, start, end, n_first,
    HALF: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    TILES: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    accs = products(pipe, sources, index, HALF, TILES, INTER // 128, WIDTH, STAGES)
    count: gl.constexpr = piece_count(WIDTH)
    for i in gl.static_range(TILES * count):
        n = 64 * (HALF * TILES + i // count)
        _store_y(
            accs[i], y_ptr, bias_ptr + row + n, weight_ptr, route_ptr, n_first + n,
            start + first_column(WIDTH, i % count), end, HIDDEN, HAS_BIAS, columns(WIDTH, i % count),
        )  # fmt: skip


@gluon.jit
def _store_y(
    acc, y_ptr, bias_ptr, weight_ptr, route_ptr, n_first, start, end,
    HIDDEN: gl.constexpr, HAS_BIAS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """acc [64, COLUMNS] times the routing weights → rows of y: of bf16 through shared memory, 16 bytes a lane."""
    mma: gl.constexpr = accumulator_layout(COLUMNS)
    small: gl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth == 16
    out: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]) if small else mma
    acc *= 18446744073709551616.0  # 2^64
    if HAS_BIAS:
        acc += gl.load(bias_ptr + gl.arange(0, 64, layout=gl.SliceLayout(1, mma)))[:, None]
    m = start + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, mma))
    route = gl.load(route_ptr + m, mask=m < end, other=0)
    acc *= gl.load(weight_ptr + route, mask=m < end, other=0.0)[None, :]
    y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), out)
    m = start + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, out))
    n = n_first + gl.arange(0, 64, layout=gl.SliceLayout(1, out))
    route = gl.load(route_ptr + m, mask=m < end, other=0)
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
    HIDDEN: gl.constexpr,  # a multiple of 128, and at least STAGES of them
    INTER: gl.constexpr,  # a multiple of BLOCK_N
    HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert, at most
    BLOCK_N: gl.constexpr,  # intermediate features of a tile: 64 or 128
    STAGES: gl.constexpr,  # groups in shared memory
):
    # Layout: a tile is [BLOCK_N, up to BLOCK_M] of hᵀ, from rows n of w1 and of w3, half of it each warpgroup's; tiles
    # of one block of routes are made at a time, so that its x rows stay in cache.
    # The trick: a block that is not full takes products of one, two or three quarters of the columns.
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
        [256],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["blocks"])
def down_warpgroup(
    h_ptr,  # bf16 [routes, INTER]; row = position in the sorted routes
    w2_ptr,  # uint16 [L, HIDDEN, INTER/4] in kernel order
    scale_ptr,  # uint32 [L, HIDDEN, INTER/128]: exponent fields
    bias_ptr,  # f32 [L, HIDDEN], read if HAS_BIAS
    weight_ptr,  # f32 [M·TOP_K]: routing weights
    y_ptr,  # out: bf16 or f32 [M·TOP_K, HIDDEN], row = route; rows of remote routes are not written
    route_ptr,  # int32 [routes]
    block_expert_ptr,  # int32 [blocks]
    block_start_ptr,  # int32 [blocks]
    block_end_ptr,  # int32 [blocks]
    blocks,
    HIDDEN: gl.constexpr,  # a multiple of 2·BLOCK_N
    INTER: gl.constexpr,  # a multiple of 128, and at least STAGES of them
    HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert, at most
    BLOCK_N: gl.constexpr,  # hidden features of each warpgroup's half of a tile: 64 or 128
    STAGES: gl.constexpr,  # groups in shared memory
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
                h_ptr, w2_ptr, scale_ptr, bias_ptr, weight_ptr, y_ptr, plan, blocks, pipe,
                gl.constexpr(0), HIDDEN, INTER, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_down, (
                h_ptr, w2_ptr, scale_ptr, bias_ptr, weight_ptr, y_ptr, plan, blocks, pipe,
                gl.constexpr(1), HIDDEN, INTER, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES,
            )),
        ],
        [4],
        [256],
    )  # fmt: skip
