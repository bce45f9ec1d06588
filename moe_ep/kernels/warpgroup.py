"""Both grouped GEMMs for many rows an expert on Hopper, where the matrix units are the bound.

Activations and weights are copied ahead into shared memory; the activations stay there as the right operand, the
weights are decoded in registers as the left one. Here scales are applied to the weights, which come out as their value
times 2^-64; the sums are multiplied by 2^64, so the activations are taken as they are.
"""

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

# Triton 3.9 has another name for it.
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def _buffers(STAGES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr):
    """For each stage: activations [BLOCK_M, 128], and words [BLOCK_N, 32] of two matrices.

    An allocation each, so that the compiler sees which of them a copy and a product share, and puts no barrier between
    those that share none.
    """
    # 64 bytes a row: two rows a phase, four phases of 16 bytes, so that eight rows' parts lie in different banks.
    w_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    buffers = ()
    for _stage in gl.static_range(STAGES):
        x = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, 128], gl.NVMMASharedLayout(128, 16, 2))
        first = gl.allocate_shared_memory(gl.uint16, [BLOCK_N, 32], w_layout)
        second = gl.allocate_shared_memory(gl.uint16, [BLOCK_N, 32], w_layout)
        buffers = buffers + ((x, first, second),)  # type: ignore[assignment]
    return buffers


@gluon.jit
def _fetch(buffers, x_rows, words_ptr, FAR: gl.constexpr, group):
    _copy(buffers[0], x_rows + group * 128)
    _copy(buffers[1], words_ptr + group * 512)
    _copy(buffers[2], words_ptr + FAR * 32 + group * 512)
    async_copy.commit_group()


@gluon.jit
def _multiply(acc, words, fields, x):
    """acc [N, M] + a group's 128 products, which may still be under way; no earlier ones are."""
    for block in gl.static_range(4):
        right = x.slice(32 * block, 32, 1).permute((1, 0))
        acc = warpgroup_mma(decode_scaled(words, fields[:, None], block), right, acc, is_async=True)
    return acc


@gluon.jit
def _gemms(
    words_ptr,
    field_ptr,
    x_rows,
    FAR: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    mma: gl.constexpr,
):
    """Two products [BLOCK_N, BLOCK_M] with the same activations: of the rows at the pointers, and FAR groups on."""
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    buffers = _buffers(STAGES, BLOCK_N, BLOCK_M)
    for stage in gl.static_range(STAGES - 1):
        _fetch(buffers[stage], x_rows, words_ptr, FAR, stage)
    first = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=mma)
    second = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=mma)
    first_fields = gl.load(field_ptr)
    second_fields = gl.load(field_ptr + FAR)
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    # The trick: while the matrix units multiply by one matrix's weights, the other's are decoded.
    for step in range(0, GROUPS, STAGES):
        for stage in gl.static_range(STAGES):
            following = gl.minimum(step + stage + 1, GROUPS - 1)
            next_first = gl.load(field_ptr + following * 16)
            next_second = gl.load(field_ptr + FAR + following * 16)
            first = _multiply(first, buffers[stage][1].load(left), first_fields, buffers[stage][0])
            # Only these four products may be under way, none of the last step; after the barrier that comes with the
            # wait that holds for all warps, so the last step's buffers can be filled again.
            first, second = warpgroup_mma_wait(4, deps=(first, second))
            async_copy.wait_group(STAGES - 3)
            fence_async_shared()
            ahead = gl.minimum(step + stage + STAGES - 1, GROUPS - 1)
            _fetch(buffers[(stage + STAGES - 1) % STAGES], x_rows, words_ptr, FAR, ahead)
            second = _multiply(second, buffers[stage][2].load(left), second_fields, buffers[stage][0])
            first, second = warpgroup_mma_wait(4, deps=(first, second))
            first_fields = next_first
            second_fields = next_second
    first, second = warpgroup_mma_wait(0, deps=(first, second))
    async_copy.wait_group(0)
    return first * 18446744073709551616.0, second * 18446744073709551616.0  # 2^64


@gluon.jit
def _weight_pointers(w_ptr, field_ptr, row, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, mma: gl.constexpr):
    """Pointers [BLOCK_N, 32] to a group's words and [BLOCK_N] to its scales, of rows from `row` on."""
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [1, 0])
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, copies))
    k = gl.arange(0, 32, layout=gl.SliceLayout(0, copies))
    n_left = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, gl.DotOperandLayout(0, mma, 2)))
    # 64 bits for the first row, 32 within the tile.
    words = w_ptr + row * (GROUPS * 32) + ((n[:, None] // 16) * (GROUPS * 512) + (n[:, None] % 16) * 32 + k[None, :])
    return words, field_ptr + row * GROUPS + ((n_left // 16) * (GROUPS * 16) + n_left % 16)


@gluon.jit
def _row_pointers(x_ptr, row, WIDTH: gl.constexpr, copies: gl.constexpr):
    """Pointers [M, 128] to the first group of the activations' rows [M]."""
    return x_ptr + row.to(gl.int64)[:, None] * WIDTH + gl.arange(0, 128, layout=gl.SliceLayout(0, copies))[None, :]


@gluon.jit
def _gate_up_tile(
    x_ptr, w13_ptr, scale_ptr, bias_ptr, h_ptr, route_ptr, expert, start, end, n_first, limit,
    TOP_K: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LIMIT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    groups: gl.constexpr = HIDDEN // 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    row = expert.to(gl.int64) * (2 * INTER) + n_first
    words, fields = _weight_pointers(w13_ptr, scale_ptr, row, groups, BLOCK_N, mma)
    # Positions past the block's last repeat it, and what they compute is not stored.
    position = gl.minimum(start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, copies)), end - 1)
    rows = _row_pointers(x_ptr, gl.load(route_ptr + position) // TOP_K, HIDDEN, copies)
    gate, up = _gemms(words, fields, rows, INTER * groups, groups, STAGES, BLOCK_N, BLOCK_M, mma)
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, mma))
    if HAS_BIAS:
        gate += gl.load(bias_ptr + row + n)[:, None]
        up += gl.load(bias_ptr + row + n + INTER)[:, None]
    m = start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, mma))
    h_rows = h_ptr + m.to(gl.int64)[None, :] * INTER + (n_first + n)[:, None]
    gl.store(h_rows, swiglu(gate, up, limit, HAS_LIMIT), mask=(m < end)[None, :])


@gluon.jit
def _down_tile(
    h_ptr, w2_ptr, scale_ptr, bias_ptr, weight_ptr, y_ptr, route_ptr, expert, start, end, n_first,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    groups: gl.constexpr = INTER // 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    row = expert.to(gl.int64) * HIDDEN + n_first
    words, fields = _weight_pointers(w2_ptr, scale_ptr, row, groups, BLOCK_N, mma)
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
    gl.store(y_rows, (low * weight).to(y_ptr.dtype.element_ty), mask=mask)
    gl.store(y_rows + BLOCK_N, (high * weight).to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit
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
    TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr,  # a multiple of 128·STAGES
    INTER: gl.constexpr,  # a multiple of BLOCK_N
    HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert, at most
    BLOCK_N: gl.constexpr,  # intermediate features: 16 for each warp
    STAGES: gl.constexpr,  # buffers in shared memory, 3 and more
):
    # Layout: one program makes a [BLOCK_N, up to BLOCK_M] tile of hᵀ from rows n of w1 and of w3; programs of one
    # block of routes are neighbours, so that its x rows stay in cache.
    # The trick: a block that is not full takes products of half or a quarter of the width.
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n_tiles: gl.constexpr = INTER // BLOCK_N
    block = gl.program_id(0) // n_tiles
    expert = gl.load(block_expert_ptr + block)
    if expert < 0:
        return
    n_first = gl.program_id(0) % n_tiles * BLOCK_N
    start = gl.load(block_start_ptr + block)
    end = gl.load(block_end_ptr + block)
    for quarters in gl.static_range(3):
        if (end - start <= BLOCK_M >> (2 - quarters)) & ((quarters == 0) | (end - start > BLOCK_M >> (3 - quarters))):
            _gate_up_tile(
                x_ptr, w13_ptr, scale_ptr, bias_ptr, h_ptr, route_ptr, expert, start, end, n_first, limit,
                TOP_K, HIDDEN, INTER, HAS_BIAS, HAS_LIMIT, BLOCK_M >> (2 - quarters), BLOCK_N, STAGES,
            )  # fmt: skip


@gluon.jit
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
    HIDDEN: gl.constexpr,  # a multiple of 2·BLOCK_N
    INTER: gl.constexpr,  # a multiple of 128·STAGES
    HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert, at most
    BLOCK_N: gl.constexpr,  # hidden features of each half of the tile: 16 for each warp
    STAGES: gl.constexpr,  # buffers in shared memory, 3 and more
):
    # Layout: one program makes a [2·BLOCK_N, up to BLOCK_M] tile of yᵀ, in two halves like gate and up, and scatters
    # it to the rows of its routes: every route has a row of its own, so no atomics are needed.
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n_tiles: gl.constexpr = HIDDEN // (2 * BLOCK_N)
    block = gl.program_id(0) // n_tiles
    expert = gl.load(block_expert_ptr + block)
    if expert < 0:
        return
    n_first = gl.program_id(0) % n_tiles * (2 * BLOCK_N)
    start = gl.load(block_start_ptr + block)
    end = gl.load(block_end_ptr + block)
    for quarters in gl.static_range(3):
        if (end - start <= BLOCK_M >> (2 - quarters)) & ((quarters == 0) | (end - start > BLOCK_M >> (3 - quarters))):
            _down_tile(
                h_ptr, w2_ptr, scale_ptr, bias_ptr, weight_ptr, y_ptr, route_ptr, expert, start, end, n_first,
                HIDDEN, INTER, HAS_BIAS, BLOCK_M >> (2 - quarters), BLOCK_N, STAGES,
            )  # fmt: skip
