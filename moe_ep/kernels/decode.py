"""Device functions: weights in kernel order to bfloat16, and their scales.

A weight comes out of its bits as value · 2^-126, and its scale as 2^(code − 65) (`moe_ep.order`). What is missing is in
the activations, which the kernels get times 2^64: then the products are of middle size in f32.

    bits    any device: the f32 sum of each block is multiplied by the scale
    ptx     NVIDIA: a packed bfloat16 product applies it to two weights at once, so that sums need no scale. Weights
            under scales below 2^-68 lose bits, and then flush to zero.

A scale of 2^66 and more, and an activation of 2^64 and more, overflows in both, to infinity or NaN and not to a wrong
number; code 255 stays NaN.
"""

import triton
import triton.language as tl

_DECODE_PTX = tl.constexpr("""
{
.reg .b32 w, a, b;
mov.b32 w, $4;
and.b32 a, w, 0x81C081C0;
mul.rn.bf16x2 $0, a, $5;
shl.b32 a, w, 6;
and.b32 a, a, 0x81C081C0;
mul.rn.bf16x2 $1, a, $6;
shf.r.wrap.b32 a, w, w, 6;
and.b32 a, a, 0x81C081C0;
mul.rn.bf16x2 $2, a, $7;
shl.b32 a, w, 4;
and.b32 a, a, 0x81808180;
shr.b32 b, w, 4;
lop3.b32 a, b, 0x00400040, a, 0xEA;
mul.rn.bf16x2 $3, a, $8;
}
""")


@triton.jit
def in_tiles(row, groups):
    """Where a row's first group lies, in groups: rows are in tiles of 16, a tile's rows side by side for each group."""
    return row // 16 * (groups * 16) + row % 16


@triton.jit
def scale_f32(fields, BLOCK: tl.constexpr):
    """2^(code−65) of block BLOCK (0…3) of a group's exponent fields uint32: infinity where the field is 255."""
    return (((fields >> (8 * BLOCK)) & 0xFF) << 23).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def scale_bf16(fields, BLOCK: tl.constexpr):
    """The same as bf16."""
    return (((fields >> (8 * BLOCK)) & 0xFF) << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def decode_bits(words):
    """uint16 [N, 32] → the four blocks bf16 [N, 32] of value · 2^-126."""
    even, odd = tl.split(words.reshape(words.shape[0], words.shape[1] // 2, 2))
    other = tl.join(odd, even).reshape(words.shape)
    first = words & 0x81C0
    second = (words << 6) & 0x81C0
    third = ((words >> 6) & 0x01C0) | ((other << 10) & 0x8000)
    fourth = ((words << 4) & 0x8180) | ((words >> 4) & 0x0040)
    return (
        first.to(tl.uint16).to(tl.bfloat16, bitcast=True),
        second.to(tl.uint16).to(tl.bfloat16, bitcast=True),
        third.to(tl.uint16).to(tl.bfloat16, bitcast=True),
        fourth.to(tl.uint16).to(tl.bfloat16, bitcast=True),
    )


@triton.jit
def decode_ptx(words, scales):
    """uint16 [N, 32] and the group's scales uint32 [N] → the four blocks bf16 [N, 32], times 2^-64."""
    return tl.inline_asm_elementwise(
        _DECODE_PTX,
        "=r,=r,=r,=r,r,r,r,r,r",
        [
            words,
            tl.broadcast_to(scale_bf16(scales, 0)[:, None], words.shape),
            tl.broadcast_to(scale_bf16(scales, 1)[:, None], words.shape),
            tl.broadcast_to(scale_bf16(scales, 2)[:, None], words.shape),
            tl.broadcast_to(scale_bf16(scales, 3)[:, None], words.shape),
        ],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def load_group(row_ptr, k, start, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Activations bf16 [M, 32] of block BLOCK of the group at `start`; `row_ptr` [M, 32] points at k of each row."""
    offset = start + 32 * BLOCK
    if WIDTH % 128 == 0:
        return tl.load(row_ptr + offset, mask=mask, other=0.0)
    return tl.load(row_ptr + offset, mask=mask & (offset + k < WIDTH)[None, :], other=0.0)


@triton.jit
def multiply_group(acc, words, scales, x0, x1, x2, x3, DECODE: tl.constexpr):
    """acc [N, M] + W·xᵀ over a group of 128, of W's words [N, 32] and the group's four blocks of x [M, 32].

    Layout: the weights are the left operand, so that the matrix units take them from registers, where they are
    decoded; a row of weights stays in the lanes that loaded it. W·xᵀ has the shape of the transposed result.
    """
    if DECODE == "ptx":
        w0, w1, w2, w3 = decode_ptx(words, scales)
        acc = tl.dot(w0, x0.T, acc)
        acc = tl.dot(w1, x1.T, acc)
        acc = tl.dot(w2, x2.T, acc)
        acc = tl.dot(w3, x3.T, acc)
    else:
        w0, w1, w2, w3 = decode_bits(words)
        acc += tl.dot(w0, x0.T) * scale_f32(scales, 0)[:, None]
        acc += tl.dot(w1, x1.T) * scale_f32(scales, 1)[:, None]
        acc += tl.dot(w2, x2.T) * scale_f32(scales, 2)[:, None]
        acc += tl.dot(w3, x3.T) * scale_f32(scales, 3)[:, None]
    return acc
