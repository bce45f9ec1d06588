"""Grouped GEMM of w1 and w3 with the clamped SwiGLU fused."""

import triton
import triton.language as tl

from moe_ep.kernels.decode import dequantise, load_scales


@triton.jit
def gate_up_kernel(
    x_ptr,  # bf16 [M, HIDDEN]
    w13_ptr,  # uint8 [L, 2·INTER, HIDDEN/2]
    scale_ptr,  # uint8 [L, 2·INTER, HIDDEN/32]
    bias_ptr,  # f32 [L, 2·INTER], read if HAS_BIAS
    h_ptr,  # out: bf16 [routes, INTER], row = position in the sorted routes
    route_ptr,  # int32 [routes]: token·TOP_K + slot, sorted by local expert
    block_expert_ptr,  # int32 [blocks]: local expert of the block, −1 past the last
    block_start_ptr,  # int32 [blocks]: first position of the block
    block_end_ptr,  # int32 [blocks]: one past its last position
    swiglu_limit,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,  # routes of one expert
    BLOCK_N: tl.constexpr,  # intermediate features
    BLOCK_K: tl.constexpr,  # hidden features a step, a multiple of 32
):
    # Layout: one program makes a [BLOCK_M, BLOCK_N] tile of h from rows n of w1 and of w3; programs of one
    # block of routes are neighbours, so that its x rows stay in cache.
    n_tiles: tl.constexpr = (INTER + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0) // n_tiles
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    position = tl.load(block_start_ptr + block) + tl.arange(0, BLOCK_M)
    row_mask = position < tl.load(block_end_ptr + block)
    token = tl.load(route_ptr + position, mask=row_mask, other=0) // TOP_K

    n = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < INTER
    # 64 bits: expert · 2·INTER · HIDDEN/2 passes 2^31 at 98 experts of V4-Pro.
    gate_row = expert.to(tl.int64) * (2 * INTER) + n
    up_row = gate_row + INTER

    k = tl.arange(0, BLOCK_K)
    k_pair = tl.arange(0, BLOCK_K // 2)
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        x_mask = row_mask[:, None] & (start + k < HIDDEN)[None, :]
        x = tl.load(x_ptr + token.to(tl.int64)[:, None] * HIDDEN + (start + k)[None, :], mask=x_mask, other=0.0)
        pair = start // 2 + k_pair
        w_mask = n_mask[:, None] & (pair < HIDDEN // 2)[None, :]
        w1 = tl.load(w13_ptr + gate_row[:, None] * (HIDDEN // 2) + pair[None, :], mask=w_mask, other=0)
        w3 = tl.load(w13_ptr + up_row[:, None] * (HIDDEN // 2) + pair[None, :], mask=w_mask, other=0)
        s1 = load_scales(scale_ptr, gate_row, n_mask, start, HIDDEN, BLOCK_K)
        s3 = load_scales(scale_ptr, up_row, n_mask, start, HIDDEN, BLOCK_K)
        gate = tl.dot(x, dequantise(w1, s1, BLOCK_N, BLOCK_K).T, gate)
        up = tl.dot(x, dequantise(w3, s3, BLOCK_N, BLOCK_K).T, up)

    if HAS_BIAS:
        gate += tl.load(bias_ptr + gate_row, mask=n_mask, other=0.0)[None, :]
        up += tl.load(bias_ptr + up_row, mask=n_mask, other=0.0)[None, :]
    if HAS_LIMIT:
        # V4's clamp is asymmetric, and a NaN must stay one.
        gate = tl.minimum(gate, swiglu_limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, swiglu_limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -swiglu_limit, propagate_nan=tl.PropagateNan.ALL)
    h = gate * tl.sigmoid(gate) * up
    h_mask = row_mask[:, None] & n_mask[None, :]
    tl.store(h_ptr + position.to(tl.int64)[:, None] * INTER + n[None, :], h.to(tl.bfloat16), mask=h_mask)
