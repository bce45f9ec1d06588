"""Both grouped GEMMs for many rows an expert on Hopper, where the matrix units are the bound.

Activations and weights are copied ahead into shared memory; the activations stay there as the right operand, the
weights are decoded in registers as the left one, of w1 while w3's products are under way and the other way round.
"""

import math

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_ep.kernels.fragments import decode_scaled, swiglu


@constexpr_function
def words_layout(rows, warps):
    """[rows, 4, 8] words of a group: a lane has the eight of one row that make its part of the left operand."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [8, 0, 0]]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    across = [[16 << i, 0, 0] for i in range(int(math.log2(warps)))]
    registers += [[16 * warps << i, 0, 0] for i in range(int(math.log2(rows // (16 * warps))))]
    return gl.DistributedLinearLayout(registers, lanes, across, [], [rows, 4, 8])


@gluon.jit
def _operand(blocks, ROWS: gl.constexpr, mma: gl.constexpr):
    """Four blocks [ROWS, 4 q, 8 = 4 j × 2 e] → the left operand [ROWS, 128], k = 32·block + 8j + 2q + e."""
    # The trick: lane q holds k = 8q + 2j + e, but as an operand it stands for 8j + 2q + e. The activations are
    # stored with the same change of places, so nothing moves.
    pairs = gl.join(gl.join(blocks[0], blocks[1]), gl.join(blocks[2], blocks[3]))
    k = pairs.reshape([ROWS, 4, 4, 2, 2, 2]).permute((0, 5, 4, 2, 1, 3)).reshape([ROWS, 128])
    return gl.convert_layout(k, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)


@gluon.jit
def _fetch(x_buffers, w_buffers, x_rows, words_ptr, FAR: gl.constexpr, group, stage):
    async_copy.async_copy_global_to_shared(x_buffers.index(stage), x_rows + group * 128)
    async_copy.async_copy_global_to_shared(w_buffers.index(2 * stage), words_ptr + group * 32)
    async_copy.async_copy_global_to_shared(w_buffers.index(2 * stage + 1), words_ptr + FAR * 32 + group * 32)
    async_copy.commit_group()


@gluon.jit
def _gemms(
    words_ptr,
    field_ptr,
    x_rows,
    FAR: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    mma: gl.constexpr,
):
    """Two products [ROWS, BLOCK_M] with the same activations: of the rows at the pointers, and FAR groups on."""
    layout: gl.constexpr = words_layout(ROWS, gl.num_warps())
    x_buffers = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, 128], gl.NVMMASharedLayout(128, 16, 2))
    w_buffers = gl.allocate_shared_memory(
        gl.uint16, [2 * STAGES, ROWS, 4, 8], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    for stage in gl.static_range(STAGES - 2):
        _fetch(x_buffers, w_buffers, x_rows, words_ptr, FAR, min(stage, GROUPS - 1), stage)
    first = gl.zeros([ROWS, BLOCK_M], gl.float32, layout=mma)
    second = gl.zeros([ROWS, BLOCK_M], gl.float32, layout=mma)
    first_fields = gl.load(field_ptr)
    second_fields = gl.load(field_ptr + FAR)
    for group in range(GROUPS):
        async_copy.wait_group(STAGES - 3)
        fence_async_shared()
        first_words = w_buffers.index(group % STAGES * 2).load(layout)
        second_words = w_buffers.index(group % STAGES * 2 + 1).load(layout)
        # Two buffers are not fetched into: this step's, and the last one's, whose products may be under way.
        ahead = group + STAGES - 2
        _fetch(x_buffers, w_buffers, x_rows, words_ptr, FAR, gl.minimum(ahead, GROUPS - 1), ahead % STAGES)
        following = gl.minimum(group + 1, GROUPS - 1)
        next_first = gl.load(field_ptr + following)
        next_second = gl.load(field_ptr + FAR + following)
        x = x_buffers.index(group % STAGES).permute((1, 0))
        first = warpgroup_mma(_operand(decode_scaled(first_words, first_fields), ROWS, mma), x, first, is_async=True)
        first, second = warpgroup_mma_wait(1, deps=(first, second))
        second = warpgroup_mma(
            _operand(decode_scaled(second_words, second_fields), ROWS, mma), x, second, is_async=True
        )
        first, second = warpgroup_mma_wait(1, deps=(first, second))
        first_fields = next_first
        second_fields = next_second
    async_copy.wait_group(0)
    return warpgroup_mma_wait(0, deps=(first, second))


@gluon.jit
def _weight_pointers(w_ptr, field_ptr, first, GROUPS: gl.constexpr, ROWS: gl.constexpr):
    """Pointers [ROWS, 4, 8] to a group's words and [ROWS] to its scales, of rows from `first` on."""
    layout: gl.constexpr = words_layout(ROWS, gl.num_warps())
    n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    q = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    e = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    # 64 bits for the first row, 32 within the tile.
    within = n[:, None, None] * (GROUPS * 32) + q[None, :, None] * 8 + e[None, None, :]
    return w_ptr + first * (GROUPS * 32) + within, field_ptr + first * GROUPS + n * GROUPS


@gluon.jit
def _row_pointers(x_ptr, row, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Pointers [M, 128] to the first group of the activations' rows [M]."""
    return x_ptr + row.to(gl.int64)[:, None] * WIDTH + gl.arange(0, 128, layout=gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def place(k):
    """Where activation k is stored, so that operand 8j + 2q + e of a block finds what lane q has as 8q + 2j + e."""
    return (k & -32) | ((k & 6) << 2) | ((k & 24) >> 2) | (k & 1)


@gluon.jit
def gate_up_warpgroup(
    x_ptr,  # bf16 [M, HIDDEN], times 2^64, in places
    w13_ptr,  # uint16 [L, 2·INTER, HIDDEN/4] in kernel order
    scale_ptr,  # uint32 [L, 2·INTER, HIDDEN/128]: exponent fields
    bias_ptr,  # f32 [L, 2·INTER], read if HAS_BIAS
    h_ptr,  # out: bf16 [routes, INTER], times 2^64, in places; row = position in the sorted routes
    route_ptr,  # int32 [routes]: token·TOP_K + slot, sorted by local expert
    block_expert_ptr,  # int32 [blocks]: local expert of the block, −1 past the last
    block_start_ptr,  # int32 [blocks]: first position of the block
    block_end_ptr,  # int32 [blocks]: one past its last position
    limit,
    TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr,  # a multiple of 128
    INTER: gl.constexpr,  # a multiple of BLOCK_N
    HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert
    BLOCK_N: gl.constexpr,  # intermediate features: 16 for each warp
    STAGES: gl.constexpr,  # buffers in shared memory, 3 and more
):
    # Layout: one program makes a [BLOCK_N, BLOCK_M] tile of hᵀ from rows n of w1 and of w3; programs of one block of
    # routes are neighbours, so that its x rows stay in cache.
    n_tiles: gl.constexpr = INTER // BLOCK_N
    groups: gl.constexpr = HIDDEN // 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block = gl.program_id(0) // n_tiles
    expert = gl.load(block_expert_ptr + block)
    if expert < 0:
        return
    n_first = gl.program_id(0) % n_tiles * BLOCK_N
    row = expert.to(gl.int64) * (2 * INTER) + n_first
    words, fields = _weight_pointers(w13_ptr, scale_ptr, row, groups, BLOCK_N)
    start = gl.load(block_start_ptr + block)
    end = gl.load(block_end_ptr + block)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    position = gl.minimum(start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, copies)), end - 1)
    token = gl.load(route_ptr + position) // TOP_K
    rows = _row_pointers(x_ptr, token, HIDDEN, copies)
    gate, up = _gemms(words, fields, rows, INTER * groups, groups, STAGES, BLOCK_N, BLOCK_M, mma)

    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, mma))
    if HAS_BIAS:
        gate += gl.load(bias_ptr + row + n)[:, None]
        up += gl.load(bias_ptr + row + n + INTER)[:, None]
    m = start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, mma))
    h_rows = h_ptr + m.to(gl.int64)[None, :] * INTER + place(n_first + n)[:, None]
    gl.store(h_rows, swiglu(gate, up, limit, HAS_LIMIT), mask=(m < end)[None, :])


@gluon.jit
def down_warpgroup(
    h_ptr,  # bf16 [routes, INTER], times 2^64, in places; row = position in the sorted routes
    w2_ptr,  # uint16 [L, HIDDEN, INTER/4] in kernel order
    scale_ptr,  # uint32 [L, HIDDEN, INTER/128]: exponent fields
    bias_ptr,  # f32 [L, HIDDEN], read if HAS_BIAS
    weight_ptr,  # f32 [M·TOP_K]: routing weights
    y_ptr,  # out: f32 [M·TOP_K, HIDDEN], row = route; rows of remote routes are not written
    route_ptr,  # int32 [routes]
    block_expert_ptr,  # int32 [blocks]
    block_start_ptr,  # int32 [blocks]
    block_end_ptr,  # int32 [blocks]
    HIDDEN: gl.constexpr,  # a multiple of 2·BLOCK_N
    INTER: gl.constexpr,  # a multiple of 128
    HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert
    BLOCK_N: gl.constexpr,  # hidden features of each half of the tile: 16 for each warp
    STAGES: gl.constexpr,  # buffers in shared memory, 3 and more
):
    # Layout: one program makes a [2·BLOCK_N, BLOCK_M] tile of yᵀ, in two halves like gate and up, and scatters it to
    # the rows of its routes: every route has a row of its own, so no atomics are needed.
    n_tiles: gl.constexpr = HIDDEN // (2 * BLOCK_N)
    groups: gl.constexpr = INTER // 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block = gl.program_id(0) // n_tiles
    expert = gl.load(block_expert_ptr + block)
    if expert < 0:
        return
    n_first = gl.program_id(0) % n_tiles * (2 * BLOCK_N)
    row = expert.to(gl.int64) * HIDDEN + n_first
    words, fields = _weight_pointers(w2_ptr, scale_ptr, row, groups, BLOCK_N)
    start = gl.load(block_start_ptr + block)
    end = gl.load(block_end_ptr + block)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    position = gl.minimum(start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, copies)), end - 1)
    rows = _row_pointers(h_ptr, position, INTER, copies)
    low, high = _gemms(words, fields, rows, BLOCK_N * groups, groups, STAGES, BLOCK_N, BLOCK_M, mma)

    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, mma))
    if HAS_BIAS:
        low += gl.load(bias_ptr + row + n)[:, None]
        high += gl.load(bias_ptr + row + n + BLOCK_N)[:, None]
    m = start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, mma))
    route = gl.load(route_ptr + m, mask=m < end, other=0)
    weight = gl.load(weight_ptr + route, mask=m < end, other=0.0)[None, :]
    y_rows = y_ptr + route.to(gl.int64)[None, :] * HIDDEN + (n_first + n)[:, None]
    mask = (m < end)[None, :]
    gl.store(y_rows, low * weight, mask=mask)
    gl.store(y_rows + BLOCK_N, high * weight, mask=mask)
