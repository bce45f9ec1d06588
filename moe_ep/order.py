"""The order in which the kernels read weights: the codes of a group of 128 lie so that two operations decode two.

A group of 128 codes along K is 32 words of 16 bits. Word i holds the codes of k = i, 32 + i, 64 + i and 96 + i, each of
which belongs to a block of its own with a scale of its own:

    bit    15  14  13  12  11  10   9   8   7   6   5   4   3   2   1   0
    code  0s  2e  2e  2m  3s  3m  1s  0e  0e  0m  2s' 3e  3e  1e  1e  1m       s sign, e exponent, m mantissa

Masked with 0x81C0 the word is a bfloat16 of the first code's value times 2^-126: the sign in its place, the exponent in
the lowest two exponent bits, the mantissa in the highest mantissa bit, which is right for e2m1's denormals too. Shifted
left by 6 it is that of the second. Two words in 32 bits, rotated right by 6, are those of the third: so the sign of a
word's third code is in the other word of its pair (2s'). Only the fourth takes more: its mantissa is shifted right by
4, the rest left by 4. Masks and shifts hold for two words in 32 bits at once.

Rows are in tiles of 16: of a tile come the first groups of all its rows, then the second groups, so that what is read
together is a kilobyte in one piece. Their scales lie in the same order.

A scale is a byte here too, but of the exponent field of 2^(code − 65) in f32 and bf16, so that a shift makes a float of
it: code + 62, and 255, infinity, from code 193 on. The codes of a block whose scale is NaN (255) are 0: zero times
infinity is NaN again, whatever the activations. A group's scales are four bytes, in the order of the codes.
"""

import torch
from torch import Tensor

from moe_ep.mxfp4 import pack, unpack
from moe_ep.shape import KERNEL_GROUP, MXFP4_BLOCK

NAN_SCALE = 255
"""e8m0's NaN; in kernel order infinity, over codes that are 0."""
FIELD_OF_CODE_0 = 62
TILE_ROWS = 16
_BLOCKS = KERNEL_GROUP // MXFP4_BLOCK


def padded(width: int) -> int:
    """K as the kernels have it: a multiple of `KERNEL_GROUP`."""
    return -(-width // KERNEL_GROUP) * KERNEL_GROUP


def to_kernel_order(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales as checkpoints have them → as the kernels read them.

    Packed uint8 [..., N, K/2] and scales uint8 [..., N, K/32] → uint8 [..., N, padded(K)/2] and
    [..., N, padded(K)/32], padded with 0; N is a multiple of 16.
    """
    codes = unpack(packed).unflatten(-1, (-1, MXFP4_BLOCK)).masked_fill((scale == NAN_SCALE)[..., None], 0).flatten(-2)
    fields = scale.int().add_(FIELD_OF_CODE_0).clamp_(max=NAN_SCALE).to(torch.uint8)
    return _tiled(_words(_pad(codes, KERNEL_GROUP)), KERNEL_GROUP // 2), _tiled(_pad(fields, _BLOCKS), _BLOCKS)


def _tiled(rows: Tensor, group: int) -> Tensor:
    """[..., N, G · group] in rows → in tiles of 16 rows."""
    tiles = rows.unflatten(-1, (-1, group)).unflatten(-3, (-1, TILE_ROWS))
    tiled: Tensor = tiles.transpose(-3, -2).reshape(rows.shape)
    return tiled


def _untiled(tiles: Tensor, group: int) -> Tensor:
    shape = (*tiles.shape[:-2], tiles.shape[-2] // TILE_ROWS, tiles.shape[-1] // group, TILE_ROWS, group)
    return tiles.reshape(shape).transpose(-3, -2).reshape(tiles.shape)


def _words(codes: Tensor) -> Tensor:
    first, second, third, fourth = codes.int().unflatten(-1, (-1, _BLOCKS, MXFP4_BLOCK)).unbind(-2)
    word = (first >> 3) << 15 | (first & 7) << 6
    word |= (second >> 3) << 9 | second & 7
    word |= _swapped(third >> 3) << 5 | (third & 7) << 12
    word |= (fourth >> 3) << 11 | (fourth >> 1 & 3) << 3 | (fourth & 1) << 10
    packed: Tensor = word.to(torch.uint16).flatten(-2).view(torch.uint8)
    return packed


def _swapped(words: Tensor) -> Tensor:
    """The other word of each pair."""
    swapped: Tensor = words.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return swapped


def from_kernel_order(ordered: Tensor, fields: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The inverse, with K = `width`: packed uint8 [..., N, K/2] and scales uint8 [..., N, K/32].

    What is not told apart in kernel order comes back as NaN: scales from 193 on.
    """
    word = _untiled(ordered, KERNEL_GROUP // 2).view(torch.uint16).int().unflatten(-1, (-1, MXFP4_BLOCK))

    def take(sign: Tensor, rest: Tensor) -> Tensor:
        code: Tensor = (sign & 1) << 3 | rest & 7
        return code

    first, second = take(word >> 15, word >> 6), take(word >> 9, word)
    third = take(_swapped(word >> 5), word >> 12)
    fourth = take(word >> 11, (word >> 3 & 3) << 1 | word >> 10 & 1)
    codes = torch.stack((first, second, third, fourth), dim=-2)
    taken = _untiled(fields, _BLOCKS)[..., : width // MXFP4_BLOCK]
    scale = torch.where(taken == NAN_SCALE, taken, taken - FIELD_OF_CODE_0)
    return pack(codes.flatten(-3)[..., :width].to(torch.uint8)), scale


def order_in_place(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`to_kernel_order` of [L, N, K/2] and [L, N, K/32], in the same memory where K is whole groups.

    One expert at a time, since on the way a code takes four bytes.
    """
    if 2 * packed.shape[-1] % KERNEL_GROUP:
        width = padded(2 * packed.shape[-1])
        ordered = (
            packed.new_empty(*packed.shape[:-1], width // 2),
            scale.new_empty(*scale.shape[:-1], width // MXFP4_BLOCK),
        )
    else:
        ordered = packed, scale
    for expert in range(len(packed)):
        codes, fields = to_kernel_order(packed[expert], scale[expert])
        ordered[0][expert].copy_(codes)
        ordered[1][expert].copy_(fields)
    return ordered


def _pad(tensor: Tensor, multiple: int) -> Tensor:
    missing = -tensor.shape[-1] % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor
