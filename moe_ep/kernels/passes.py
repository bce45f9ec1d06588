"""What lies around the experts and is bound by memory, in one pass each: activation, last sum, rows on the wire."""

import triton
import triton.language as tl

GROUP = tl.constexpr(128)  # elements under one scale


@triton.jit
def swiglu_kernel(
    gate_up_ptr,  # bf16 [M, 2·INTER]
    out_ptr,  # out: bf16 [M, INTER]
    limit,
    INTER: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,  # features
):
    tiles: tl.constexpr = (INTER + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = n < INTER
    gate = tl.load(gate_up_ptr + row * (2 * INTER) + n, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * INTER) + INTER + n, mask=mask, other=0.0).to(tl.float32)
    if HAS_LIMIT:
        # V4's clamp is asymmetric, and a NaN must stay one.
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    h = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * INTER + n, h.to(tl.bfloat16), mask=mask)


@triton.jit
def add_kernel(
    total_ptr,  # f32 or bf16 [M, WIDTH]
    other_ptr,  # the same, read if HAS_OTHER
    shared_ptr,  # bf16: column `first` of [M, HIDDEN], read if HAS_SHARED
    out_ptr,  # out: bf16: column `first` of [M, HIDDEN]
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK: tl.constexpr,  # features
):
    tiles: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = n < WIDTH
    total = tl.load(total_ptr + row * WIDTH + n, mask=mask, other=0.0).to(tl.float32)
    if HAS_OTHER:
        total += tl.load(other_ptr + row * WIDTH + n, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHARED:
        total += tl.load(shared_ptr + row * HIDDEN + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * HIDDEN + n, total.to(tl.bfloat16), mask=mask)


@triton.jit
def e4m3_bits(y):
    """The bits of f32 y as e4m3fn, to nearest even, NaN past 448: by integers, since not every device has the type."""
    bits = y.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    magnitude = bits.to(tl.float32, bitcast=True)
    # Below 2^-6 a unit is 2^-9, the last place of floats next to 2^14.
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    normal = (bits - (120 << 23) + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    code = tl.where(bits < 0x3C800000, small, normal)
    return sign | tl.where(bits > 0x43E00000, 0x7F, code)


@triton.jit
def e4m3_values(code):
    """f32 of e4m3fn bits int32."""
    exponent = (code >> 3) & 15
    normal = (((code & 0x7F) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    small = (code & 7).to(tl.float32) * 0.001953125  # 2^-9
    value = tl.where(exponent == 0, small, normal)
    value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    return tl.where((code & 0x80) != 0, -value, value)


@triton.jit
def pack_kernel(
    x_ptr,  # bf16 [M, HIDDEN]
    ids_ptr,  # int [M, TOP_K]
    weights_ptr,  # f32 [M, TOP_K]
    rows_ptr,  # out: the rows as bf16, int32 or uint8
    words_ptr,  # the same as int32
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    ROW: tl.constexpr,  # bytes of a row
    IDS_AT: tl.constexpr,  # byte at which the ids begin
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,  # features, a multiple of 128
    BLOCK_K: tl.constexpr,  # at least TOP_K
):
    # Layout: one program makes BLOCK features of a row; the first also writes its routes and padding.
    tiles: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if FP8:
        group = tile * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        n = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(x_ptr + row * HIDDEN + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
        magnitude = tl.abs(x)
        amax = tl.max(magnitude, 1)
        finite = (amax < float("inf")) & (tl.sum(magnitude * 0.0, 1) == 0.0)  # a maximum drops NaNs, a sum keeps them
        # The power of two is taken from the bits: a mantissa above 448's, 1.75, takes the next one.
        bits = tl.maximum(amax, 1e-4).to(tl.int32, bitcast=True)
        scale = tl.where(finite, ((bits + 0x1FFFFF) >> 23) - 8, 127)
        inverse = ((254 - scale) << 23).to(tl.float32, bitcast=True)
        codes = e4m3_bits(x * inverse[:, None])
        tl.store(rows_ptr + row * ROW + n, codes.to(tl.uint8), mask=n < HIDDEN)
        groups: tl.constexpr = (HIDDEN + GROUP - 1) // GROUP
        tl.store(rows_ptr + row * ROW + HIDDEN + group, scale.to(tl.uint8), mask=group < groups)
        padding = HIDDEN + groups + tl.arange(0, 4)
        tl.store(rows_ptr + row * ROW + padding, 0, mask=(padding < IDS_AT) & (tile == 0))
    else:
        n = tile * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * HIDDEN + n, mask=n < HIDDEN, other=0.0)
        tl.store(rows_ptr + row * (ROW // 2) + n, x, mask=n < HIDDEN)
    k = tl.arange(0, BLOCK_K)
    first = (k < TOP_K) & (tile == 0)
    routes = words_ptr + row * (ROW // 4) + IDS_AT // 4 + k
    tl.store(routes, tl.load(ids_ptr + row * TOP_K + k, mask=first, other=0).to(tl.int32), mask=first)
    weights = tl.load(weights_ptr + row * TOP_K + k, mask=first, other=0.0)
    tl.store(routes + TOP_K, weights.to(tl.int32, bitcast=True), mask=first)


@triton.jit
def unpack_kernel(
    rows_ptr,  # the rows as bf16, int32 or uint8
    words_ptr,  # the same as int32
    x_ptr,  # out: bf16 [R, HIDDEN]
    ids_ptr,  # out: int32 [R, TOP_K]
    weights_ptr,  # out: f32 [R, TOP_K]
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    ROW: tl.constexpr,  # bytes of a row
    IDS_AT: tl.constexpr,  # byte at which the ids begin
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,  # features
    BLOCK_K: tl.constexpr,  # at least TOP_K
):
    # Layout: as of `pack_kernel`.
    tiles: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    n = tile * BLOCK + tl.arange(0, BLOCK)
    mask = n < HIDDEN
    if FP8:
        codes = tl.load(rows_ptr + row * ROW + n, mask=mask, other=0).to(tl.int32)
        scale = tl.load(rows_ptr + row * ROW + HIDDEN + n // GROUP, mask=mask, other=127).to(tl.int32)
        x = (e4m3_values(codes) * (scale << 23).to(tl.float32, bitcast=True)).to(tl.bfloat16)
    else:
        x = tl.load(rows_ptr + row * (ROW // 2) + n, mask=mask, other=0.0)
    tl.store(x_ptr + row * HIDDEN + n, x, mask=mask)
    k = tl.arange(0, BLOCK_K)
    first = (k < TOP_K) & (tile == 0)
    routes = words_ptr + row * (ROW // 4) + IDS_AT // 4 + k
    tl.store(ids_ptr + row * TOP_K + k, tl.load(routes, mask=first, other=0), mask=first)
    weights = tl.load(routes + TOP_K, mask=first, other=0).to(tl.float32, bitcast=True)
    tl.store(weights_ptr + row * TOP_K + k, weights, mask=first)
