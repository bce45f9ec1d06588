"""The order in which the kernels read weights: the codes of a group of 128 lie so that two operations decode two.

A group of 128 codes along K is 32 words of 16 bits. Word i holds the codes of k = i, 32 + i, 64 + i and 96 + i, each of
which belongs to a block of its own with a scale of its own:

    bit    15  14  13  12  11  10   9   8   7   6   5   4   3   2   1   0
    code  0s  3s  3e  1s  3e  3m  2s  0e  0e  0m  1e  1e  1m  2e  2e  2m       s sign, e exponent, m mantissa

Masked with 0x81C0 the word is a bfloat16 of the first code's value times 2^-126: the sign in its place, the exponent in
the lowest two exponent bits, the mantissa in the highest mantissa bit, which is right for e2m1's denormals too. Shifted
left by 3 and by 6 it is that of the second and third; only the fourth takes more. Masks and shifts hold for two words
in 32 bits at once. The scales of a group are four bytes, in the order of the codes.
"""

import torch
from torch import Tensor

from moe_ep.mxfp4 import pack, unpack
from moe_ep.shape import KERNEL_GROUP, MXFP4_BLOCK

_BLOCKS = KERNEL_GROUP // MXFP4_BLOCK


def padded(width: int) -> int:
    """K as the kernels have it: a multiple of `KERNEL_GROUP`."""
    return -(-width // KERNEL_GROUP) * KERNEL_GROUP


def to_kernel_order(packed: Tensor) -> Tensor:
    """Packed uint8 [..., K/2] as checkpoints have it → uint8 [..., padded(K)/2] in kernel order; padding is 0."""
    codes = _pad(unpack(packed), KERNEL_GROUP).int().unflatten(-1, (-1, _BLOCKS, MXFP4_BLOCK))
    first, second, third, fourth = codes.unbind(-2)

    def place(code: Tensor, sign: int, rest: int) -> Tensor:
        return (code >> 3) << sign | (code & 7) << rest

    word = place(first, 15, 6) | place(second, 12, 3) | place(third, 9, 0)
    word |= (fourth >> 3) << 14 | (fourth >> 2 & 1) << 13 | (fourth & 3) << 10
    return word.to(torch.uint16).flatten(-2).view(torch.uint8)


def from_kernel_order(ordered: Tensor, width: int) -> Tensor:
    """The inverse: packed uint8 [..., K/2] with K = `width`."""
    word = ordered.view(torch.uint16).int().unflatten(-1, (-1, MXFP4_BLOCK))

    def take(sign: int, rest: int) -> Tensor:
        code: Tensor = (word >> sign & 1) << 3 | word >> rest & 7
        return code

    fourth = (word >> 14 & 1) << 3 | (word >> 13 & 1) << 2 | word >> 10 & 3
    codes = torch.stack((take(15, 6), take(12, 3), take(9, 0), fourth), dim=-2)
    return pack(codes.flatten(-3)[..., :width].to(torch.uint8))


def pad_scales(scale: Tensor) -> Tensor:
    """Scales uint8 [..., K/32] → [..., padded(K)/32]; the padding's codes are 0, whatever their scale."""
    return _pad(scale, _BLOCKS)


def _pad(tensor: Tensor, multiple: int) -> Tensor:
    missing = -tensor.shape[-1] % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def order_in_place(packed: Tensor) -> Tensor:
    """`to_kernel_order` of [L, N, K/2], one expert at a time: in the same memory where K is whole groups."""
    if 2 * packed.shape[-1] % KERNEL_GROUP:
        return to_kernel_order(packed)
    for expert in packed:
        expert.copy_(to_kernel_order(expert))
    return packed
