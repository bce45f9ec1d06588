"""Activations rounded to fp8, of tokens and of what lies between the GEMMs: `moe_ep.fp8_activations` on the device.

native      the elements as e4m3fnuz, which gfx942's matrix units take, and their scales
otherwise   the rounded values as bf16, times 2^64, for the kernels that multiply bf16 (`kernels.decode`)
"""

import triton
import triton.language as tl

from moe_ep.kernels.plan import local_row

GROUP = tl.constexpr(128)
SHIFT = tl.constexpr(18446744073709551616.0)  # 2^64, which the weights lack that the bf16 kernels decode


@triton.jit
def scale_of(amax):
    """The scale of e4m3fn elements under a largest magnitude f32, NaN where that is not finite."""
    # By bits: a mantissa above 448's, 1.75, takes the next power of two.
    bits = tl.maximum(amax, 1e-4).to(tl.int32, bitcast=True)
    scale = ((((bits + 0x1FFFFF) >> 23) - 8) << 23).to(tl.float32, bitcast=True)
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def quantise_rows(x, row, mask, k, out_ptr, scale_ptr, WIDTH: tl.constexpr, NATIVE: tl.constexpr):
    """Round x f32 [R, 128], the group of k of the rows int64 [R], 0 past the last k, and store it."""
    groups: tl.constexpr = (WIDTH + 127) // 128
    magnitude = tl.abs(x)
    # A maximum drops NaNs, a sum keeps them, and infinity times 0 is one.
    scale = scale_of(tl.max(magnitude, 1) + tl.sum(magnitude * 0.0, 1))
    if NATIVE:
        doubled = scale * 2.0  # in e4m3fnuz the same bits are half the value
        y = x * (1.0 / doubled)[:, None]
        # What rounds to 0, from the left too: −0 has the bits of NaN, whatever the conversion makes of it.
        elements = tl.where(tl.abs(y) > 0.00048828125, y, 0.0).to(out_ptr.dtype.element_ty)  # 2^-11
        tl.store(out_ptr + row[:, None] * (groups * GROUP) + k[None, :], elements, mask=mask[:, None])
        tl.store(scale_ptr + row * groups + tl.min(k, 0) // GROUP, doubled, mask=mask)
    else:
        # To e4m3 by hand, which not every device converts to: adding 1.5 · 2^23 units of the last place, and taking
        # them away again, rounds to nearest even.
        y = x * (1.0 / scale)[:, None]
        exponent = tl.maximum(y.to(tl.int32, bitcast=True) >> 23 & 0xFF, 121)  # denormals are below 2^-6
        large = ((exponent + 20) << 23).to(tl.float32, bitcast=True) * 1.5  # a unit is 2^(e − 3)
        values = ((y + large) - large) * scale[:, None] * SHIFT
        inside = mask[:, None] & (k < WIDTH)[None, :]
        tl.store(out_ptr + row[:, None] * WIDTH + k[None, :], values.to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def quantise_tokens(
    x_ptr,  # bf16 [rows, WIDTH]
    out_ptr,  # out: e4m3fnuz [rows, K], K = WIDTH padded to whole groups with 0; else bf16 [rows, WIDTH] · 2^64
    scale_ptr,  # out if NATIVE: f32 [rows, K/128]
    rows,
    WIDTH: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows a program
):
    # Layout: one program makes one group of BLOCK_R rows.
    groups: tl.constexpr = (WIDTH + 127) // 128
    row = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(0) % groups * GROUP + tl.arange(0, GROUP)
    inside = (row < rows)[:, None] & (k < WIDTH)[None, :]
    x = tl.load(x_ptr + row[:, None] * WIDTH + k[None, :], mask=inside, other=0.0).to(tl.float32)
    quantise_rows(x, row, row < rows, k, out_ptr, scale_ptr, WIDTH, NATIVE)


@triton.jit
def quantise_routes(
    h_ptr,  # [routes, WIDTH], row = position in the sorted routes: bf16 with the routing weight in it, else f32
    weight_ptr,  # f32 [M·TOP_K]: routing weights, read unless NATIVE
    out_ptr,  # out: e4m3fnuz [routes, K], K = WIDTH padded to whole groups with 0; else bf16 [routes, WIDTH] · 2^64
    scale_ptr,  # out if NATIVE: f32 [routes, K/128]
    route_ptr,  # int32 [routes]
    block_expert_ptr,  # int32 [blocks]: local expert of the block, −1 past the last
    block_start_ptr,  # int32 [blocks]
    block_end_ptr,  # int32 [blocks]
    WIDTH: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # routes of one expert
):
    # Layout: one program makes one group of a block of routes; remote routes are in no block.
    groups: tl.constexpr = (WIDTH + 127) // 128
    block = tl.program_id(0) // groups
    if tl.load(block_expert_ptr + block) < 0:
        return
    position = tl.load(block_start_ptr + block) + tl.arange(0, BLOCK_M)
    mask = position < tl.load(block_end_ptr + block)
    row = position.to(tl.int64)
    k = tl.program_id(0) % groups * GROUP + tl.arange(0, GROUP)
    inside = mask[:, None] & (k < WIDTH)[None, :]
    h = tl.load(h_ptr + row[:, None] * WIDTH + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if not NATIVE:
        route = tl.load(route_ptr + position, mask=mask, other=0)
        h *= tl.load(weight_ptr + route, mask=mask, other=0.0)[:, None]
        h = h.to(tl.bfloat16).to(tl.float32)
    quantise_rows(h, row, mask, k, out_ptr, scale_ptr, WIDTH, NATIVE)


@triton.jit(do_not_specialize=["known"])
def quantise_local(
    h_ptr,  # bf16 [M·TOP_K, WIDTH] with the routing weight in it, row = route
    out_ptr,  # out: e4m3fnuz [M·TOP_K, K], K = WIDTH padded to whole groups with 0; rows of remote routes are left
    scale_ptr,  # out: f32 [M·TOP_K, K/128]
    ids_ptr,  # int [M·TOP_K]
    map_ptr,  # int [known], read if HAS_MAP
    known,
    WIDTH: tl.constexpr,
    LOCAL: tl.constexpr,
    HAS_MAP: tl.constexpr,
):
    # Layout: one program makes one group of one route.
    groups: tl.constexpr = (WIDTH + 127) // 128
    route = tl.program_id(0) // groups
    if local_row(ids_ptr, map_ptr, route, route >= 0, known, LOCAL, HAS_MAP) < 0:
        return
    row = route.to(tl.int64) + tl.arange(0, 1)
    k = tl.program_id(0) % groups * GROUP + tl.arange(0, GROUP)
    h = tl.load(h_ptr + row[:, None] * WIDTH + k[None, :], mask=(k < WIDTH)[None, :], other=0.0).to(tl.float32)
    quantise_rows(h, row, row >= 0, k, out_ptr, scale_ptr, WIDTH, True)
