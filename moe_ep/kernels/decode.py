"""Device functions: reading mxfp4, and mxfp4 to bf16."""

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


@triton.jit
def load_scales(scale_ptr, row, row_mask, start, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """e8m0 codes [BLOCK_N, BLOCK_K/32] of rows `row` from element `start` of K on; 0 outside.

    WIDTH is K. The trick: four codes are one dword, so a lane loads a dword a row and takes it apart, where K allows;
    a byte a lane would cost as many requests as the weights themselves.
    """
    COUNT: tl.constexpr = BLOCK_K // 32
    if COUNT == 4 and WIDTH % 128 == 0:
        words_ptr = scale_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
        words = tl.load(words_ptr + row * (WIDTH // 128) + start // 128, mask=row_mask, other=0)
        return ((words[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 0xFF).to(tl.uint8)
    block = start // 32 + tl.arange(0, COUNT)
    mask = row_mask[:, None] & (block < WIDTH // 32)[None, :]
    return tl.load(scale_ptr + row[:, None] * (WIDTH // 32) + block[None, :], mask=mask, other=0)
