"""Grouped GEMM of w2, weighted per route, and the combine of a token's routes."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_ep.kernels.decode import in_tiles, load_group, multiply_group
from moe_ep.kernels.plan import local_row


@triton.jit
def down_kernel(
    h_ptr,  # bf16 [routes, INTER], times 2^64; row = position in the sorted routes
    w2_ptr,  # uint16 [L, HIDDEN, K/4] in kernel order, K = INTER padded
    scale_ptr,  # uint32 [L, HIDDEN, K/128]
    bias_ptr,  # f32 [L, HIDDEN], read if HAS_BIAS
    weight_ptr,  # f32 [M·TOP_K]: routing weights
    y_ptr,  # out: f32 [M·TOP_K, HIDDEN], row = route; rows of remote routes are not written
    route_ptr,  # int32 [routes]
    block_expert_ptr,  # int32 [blocks]
    block_start_ptr,  # int32 [blocks]
    block_end_ptr,  # int32 [blocks]
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED_H: tl.constexpr,  # h has the routing weight in it
    DECODE: tl.constexpr,  # "ptx" or "bits"
    BLOCK_M: tl.constexpr,  # routes of one expert
    BLOCK_N: tl.constexpr,  # hidden features
):
    # Layout: one program makes a [BLOCK_N, BLOCK_M] tile of yᵀ, 128 of K a step, and scatters it to the rows of its
    # routes: every route has a row of its own, so nothing is added up here and no atomics are needed.
    n_tiles: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    groups: tl.constexpr = (INTER + 127) // 128
    block = tl.program_id(0) // n_tiles
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    position = tl.load(block_start_ptr + block) + tl.arange(0, BLOCK_M)
    row_mask = position < tl.load(block_end_ptr + block)
    route = tl.load(route_ptr + position, mask=row_mask, other=0)

    n = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < HIDDEN
    row = expert.to(tl.int64) * HIDDEN + tl.minimum(n, HIDDEN - 1)  # rows past the last read the last

    k = tl.arange(0, 32)
    first = in_tiles(row, groups)
    w2_rows = w2_ptr + first[:, None] * 32 + k[None, :]
    scale_rows = scale_ptr + first
    h_rows = h_ptr + position.to(tl.int64)[:, None] * INTER + k[None, :]
    h_mask = row_mask[:, None] & (k < 32)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for group in range(groups):
        w2 = tl.load(w2_rows + group * 512)
        s2 = tl.load(scale_rows + group * 16)
        h0 = load_group(h_rows, k, group * 128, h_mask, INTER, 0)
        h1 = load_group(h_rows, k, group * 128, h_mask, INTER, 1)
        h2 = load_group(h_rows, k, group * 128, h_mask, INTER, 2)
        h3 = load_group(h_rows, k, group * 128, h_mask, INTER, 3)
        acc = multiply_group(acc, w2, s2, h0, h1, h2, h3, DECODE)

    weight = tl.load(weight_ptr + route, mask=row_mask, other=0.0)[None, :]
    if WEIGHTED_H:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + row)[:, None] * weight
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + row)[:, None]
        acc *= weight
    y_mask = row_mask[:, None] & n_mask[None, :]
    tl.store(y_ptr + route.to(tl.int64)[:, None] * HIDDEN + n[None, :], acc.T, mask=y_mask)


@triton.jit(do_not_specialize=["known"])
def combine_kernel(
    y_ptr,  # f32 or bf16 [M·TOP_K, HIDDEN]
    ids_ptr,  # int [M·TOP_K]
    map_ptr,  # int [known], read if HAS_MAP
    weight_ptr,  # f32 [M·TOP_K]: routing weights, read if WEIGHS
    out_ptr,  # out: [M, HIDDEN]
    known,
    WEIGHS: tl.constexpr,  # the rows of y are not weighted yet
    ZEROED: tl.constexpr,  # out is 0 already where a token has no local route
    LOCAL: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_H: tl.constexpr,  # hidden features at a time
    PARTS: tl.constexpr,  # of a row, a program each
):
    # The trick: a token's routes are added in the order of its slots by one program, so the sum is the same
    # in every run; remote slots were never written and are not read.
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    # Looked up once: what is loaded after a store is loaded again.
    local = ()
    weights = ()
    for slot in tl.static_range(TOP_K):
        route = token * TOP_K + slot
        here = local_row(ids_ptr, map_ptr, route, route >= 0, known, LOCAL, HAS_MAP) >= 0
        local = local + (here,)  # type: ignore[assignment]
        if WEIGHS:
            weights = weights + (tl.load(weight_ptr + route),)  # type: ignore[assignment]
    if ZEROED:
        any_local = local[0]  # type: ignore[misc]
        for slot in tl.static_range(1, TOP_K):
            any_local |= local[slot]
        if not any_local:
            return
    for first in range(tl.program_id(0) % PARTS * BLOCK_H, HIDDEN, PARTS * BLOCK_H):
        n = first + tl.arange(0, BLOCK_H)
        n_mask = n < HIDDEN
        acc = tl.zeros((BLOCK_H,), dtype=tl.float32)
        for slot in tl.static_range(TOP_K):
            y_row = y_ptr + (token * TOP_K + slot) * HIDDEN
            y = tl.load(y_row + n, mask=n_mask & local[slot], other=0.0).to(tl.float32)
            acc += y * weights[slot] if WEIGHS else y
        tl.store(out_ptr + token * HIDDEN + n, acc.to(out_ptr.dtype.element_ty), mask=n_mask)
