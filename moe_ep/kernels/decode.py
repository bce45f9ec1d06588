"""Device functions: mxfp4 to bf16, and what Triton's interpreter gets wrong about bf16."""

import triton
import triton.language as tl


@triton.jit
def e8m0_to_f32(byte):
    """2^(byte−127) by bits: byte 0 is the denormal 2^-127, byte 255 is NaN."""
    byte = byte.to(tl.uint32)
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    bits = tl.where(byte == 255, 0x7FC00000, bits)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_to_f32(code):
    """Value of e2m1 codes 0…15.

    The trick: s·ee·m put into a half's sign, low exponent bits and top mantissa bit means the value
    times 2^-14, for the subnormal codes too. No table, no branches.
    """
    code = code.to(tl.uint16)
    bits = ((code & 8) << 12) | ((code & 7) << 9)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def dequantise(packed, scale, INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """bf16 [BLOCK_N, BLOCK_K] of packed uint8 [BLOCK_N, BLOCK_K/2] and e8m0 [BLOCK_N, BLOCK_K/32].

    Exact: an e2m1 value times a power of two fits a bf16, denormals too. Triton 3.6's interpreter gets
    those wrong, so there the same values stay f32.
    """
    # Low nibble = even k: joined on a new last axis and flattened, the codes are in the order of k.
    codes = tl.join(packed & 0xF, packed >> 4)
    values = e2m1_to_f32(codes).reshape(BLOCK_N, BLOCK_K // 32, 32)
    scaled = (values * e8m0_to_f32(scale)[:, :, None]).reshape(BLOCK_N, BLOCK_K)
    return scaled if INTERPRETED else scaled.to(tl.bfloat16)


@triton.jit
def round_bf16(x, INTERPRETED: tl.constexpr):
    """f32 → bf16, to nearest even. Triton 3.6's interpreter truncates, so there it is done by bits."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def dot_bf16(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a·b with bf16 operands. Triton 3.6's interpreter multiplies their bits, so there it is done in f32."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, acc)
