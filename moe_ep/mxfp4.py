"""The mxfp4 format: e2m1 codes, two a byte, and one e8m0 scale per 32 of them. The one place that knows nibbles.

Source: OCP Microscaling Formats (MX) v1.0, and DeepSeek-V4's checkpoints for the packing.
"""

from itertools import pairwise

import torch
from torch import Tensor

from moe_ep.shape import MXFP4_BLOCK

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of codes 0…7; bit 3 is the sign."""

_E2M1_EMAX = 2  # exponent of the largest magnitude, 6 = 1.5 · 2^2
_E8M0_BIAS = 127
_E8M0_NAN = 255


def pack(codes: Tensor) -> Tensor:
    """Pack e2m1 codes uint8 [..., K] (0…15) into bytes uint8 [..., K/2]: low nibble = even k, high = odd k."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Codes uint8 [..., K] of packed bytes uint8 [..., K/2]; the inverse of `pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def e2m1_to_float(codes: Tensor) -> Tensor:
    """Value f32 of e2m1 codes."""
    values = torch.tensor(E2M1_MAGNITUDES, dtype=torch.float32, device=codes.device)
    return torch.cat((values, -values))[codes.long()]


def float_to_e2m1(x: Tensor) -> Tensor:
    """Nearest e2m1 code, ties to the even code, saturating at ±6. NaN has no code and gives 6."""
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for i, (low, high) in enumerate(pairwise(E2M1_MAGNITUDES)):
        midpoint = (low + high) / 2
        # Leaving code i for i + 1: at a tie the even one of the two wins.
        rounds_up = magnitude >= midpoint if i % 2 else magnitude > midpoint
        code += rounds_up | magnitude.isnan()
    return code | (x.signbit().to(torch.uint8) << 3)


def e8m0_to_float(scale: Tensor) -> Tensor:
    """Value f32 of e8m0 bytes: 2^(byte−127), with byte 0 = 2^-127 (a denormal) and byte 255 = NaN.

    Built from bits, since adding exponents in integers corrupts both ends.
    """
    byte = as_bytes(scale).to(torch.int32)
    bits = byte << 23
    bits = torch.where(byte == 0, 0x0040_0000, bits)
    bits = torch.where(byte == _E8M0_NAN, 0x7FC0_0000, bits)
    return bits.view(torch.float32)


def as_bytes(scale: Tensor) -> Tensor:
    """The bytes of an e8m0 tensor. `copy_` and `.to` between float8_e8m0fnu and uint8 convert numerically."""
    return scale if scale.dtype == torch.uint8 else scale.view(torch.uint8)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise f32 [..., K] to packed uint8 [..., K/2] and scales uint8 [..., K/32].

    OCP MX v1.0, section 6.3: the scale is 2^(floor(log2(amax)) − 2), elements round to nearest even and
    saturate. A block with a NaN or an infinity gets the NaN scale; a block of zeros gets 2^-127.

    Raises
    ------
    ValueError
        If K is not a multiple of 32.
    """
    if x.shape[-1] % MXFP4_BLOCK:
        raise ValueError(f"K = {x.shape[-1]} is not a multiple of {MXFP4_BLOCK}")
    blocks = x.float().unflatten(-1, (-1, MXFP4_BLOCK))
    amax = blocks.abs().amax(-1)
    exponent = torch.frexp(amax).exponent - 1  # amax = m · 2^(exponent+1), m in [0.5, 1)
    exponent = torch.where(amax == 0, -_E8M0_BIAS, exponent - _E2M1_EMAX)
    byte = (exponent.clamp(-_E8M0_BIAS, _E8M0_BIAS) + _E8M0_BIAS).to(torch.uint8)
    byte = torch.where(amax.isfinite(), byte, _E8M0_NAN)
    # float64 holds x · 2^127 for every float32 x, so the division is exact.
    scaled = (blocks.double() / e8m0_to_float(byte).double().unsqueeze(-1)).nan_to_num(nan=0.0)
    return pack(float_to_e2m1(scaled.flatten(-2))), byte


def dequantise(packed: Tensor, scale: Tensor) -> Tensor:
    """Values f32 [..., K] of packed uint8 [..., K/2] and scales [..., K/32] (uint8 or float8_e8m0fnu)."""
    blocks: Tensor = e2m1_to_float(unpack(packed)).unflatten(-1, (-1, MXFP4_BLOCK))
    return (blocks * e8m0_to_float(scale).unsqueeze(-1)).flatten(-2)
