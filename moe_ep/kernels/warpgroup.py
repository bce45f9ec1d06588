"""The grouped GEMMs of about one row an expert or more on Hopper, each by itself.

`kernels.experts` makes both at once; these are for ranges of columns, and for unlike tiles. One program a
multiprocessor makes one tile (`kernels.tiles`) after the other: two warpgroups multiply (`kernels.pipe`), one warp
feeds the copy engine, and for gate and up two gather activations.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_ep.kernels.pipe import GATHERERS, hand_over_last, open_pipe, wait_free
from moe_ep.kernels.tiles import block_of, down_tile, fill_down, fill_gate_up, gate_up_tile, gather_tile


@gluon.jit
def _block(plan, blocks, tile, N_TILES: gl.constexpr):
    """A tile's block of routes."""
    return block_of(plan, tile // N_TILES, blocks)


@gluon.jit
def _load_x(
    x_ptr, plan, blocks, pipe,
    GATHERER: gl.constexpr, TOP_K: gl.constexpr, HIDDEN: gl.constexpr, N_TILES: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy a warp's share of the activations of all tiles of this program."""
    step = gl.num_programs(0)
    tile = gl.program_id(0)
    index = 0
    block = _block(plan, blocks, tile, N_TILES)
    while block[0] >= 0:
        following = _block(plan, blocks, tile + step, N_TILES)
        gather_tile(x_ptr, plan[0], pipe, block, index, GATHERER, TOP_K, HIDDEN, BLOCK_M, STAGES)
        block = following
        tile += step
        index += HIDDEN // 128
    hand_over_last(pipe, index, STAGES)


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
    gl.static_assert(GATHERERS == 2)  # as many are begun below
    pipe = open_pipe(words_desc, scales_desc, BLOCK_M, STAGES, 1 + GATHERERS)
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
            (_load_x, (
                x_ptr, plan, blocks, pipe, gl.constexpr(0), TOP_K, HIDDEN, INTER // BLOCK_N, BLOCK_M, STAGES,
            )),
            (_load_x, (
                x_ptr, plan, blocks, pipe, gl.constexpr(1), TOP_K, HIDDEN, INTER // BLOCK_N, BLOCK_M, STAGES,
            )),
        ],
        [4, 1, 1, 1],
        [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
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
