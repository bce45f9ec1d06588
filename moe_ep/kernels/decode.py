"""Device functions: mxfp4 to bf16."""

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
def dequantise(packed, scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """bf16 [BLOCK_N, BLOCK_K] of packed uint8 [BLOCK_N, BLOCK_K/2] and e8m0 [BLOCK_N, BLOCK_K/32].

    Exact: an e2m1 value times a power of two fits a bf16, denormals too.
    """
    # Low nibble = even k: joined on a new last axis and flattened, the codes are in the order of k.
    codes = tl.join(packed & 0xF, packed >> 4)
    values = e2m1_to_f32(codes).reshape(BLOCK_N, BLOCK_K // 32, 32)
    scaled = (values * e8m0_to_f32(scale)[:, :, None]).reshape(BLOCK_N, BLOCK_K)
    return scaled.to(tl.bfloat16)
