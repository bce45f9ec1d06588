"""V4's fp8 weights: e4m3fn elements, one power-of-two (e8m0) scale per 128×128 block."""

import torch
from torch import Tensor

from moe_ep.mxfp4 import as_bytes, e8m0_to_float
from moe_ep.shape import FP8_BLOCK, block_grid

_E4M3_MAX = 448.0


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    spread = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return spread[:rows, :columns]


def quantise_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise f32 [R, C] to float8_e4m3fn [R, C] and scales uint8 [⌈R/128⌉, ⌈C/128⌉], value 2^(byte−127).

    The scale is the smallest power of two under which the block's largest magnitude stays within 448.
    """
    rows, columns = x.shape
    grid = block_grid(rows, columns)
    padded = x.new_zeros(grid[0] * FP8_BLOCK, grid[1] * FP8_BLOCK)
    padded[:rows, :columns] = x
    amax = padded.view(grid[0], FP8_BLOCK, grid[1], FP8_BLOCK).abs().amax(dim=(1, 3)).clamp(min=1e-4)
    byte = (torch.ceil(torch.log2(amax / _E4M3_MAX)) + 127).to(torch.uint8)
    return (x / _spread(e8m0_to_float(byte), rows, columns)).to(torch.float8_e4m3fn), byte


def dequantise_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """Values f32 [R, C] of float8_e4m3fn [R, C] and block scales (uint8 or float8_e8m0fnu)."""
    return weight.float() * _spread(e8m0_to_float(as_bytes(scale)), *weight.shape)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise [M, C] to float8_e4m3fn [M, C] and scales uint8 [M, ⌈C/128⌉], value 2^(byte−127), one for each 128.

    As V4's activations: the smallest power of two under which the largest magnitude, at least 1e-4, is within 448.
    What is not finite becomes NaN, and what passes 448 beside it.
    """
    rows, columns = x.shape
    blocks = -(-columns // FP8_BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, blocks * FP8_BLOCK - columns)).view(rows, blocks, FP8_BLOCK)
    amax = padded.abs().amax(-1).nan_to_num(_E4M3_MAX, posinf=_E4M3_MAX).clamp(min=1e-4)
    mantissa, exponent = torch.frexp(amax / _E4M3_MAX)  # exact, where a logarithm next to a power of two is not
    exponent = exponent - (mantissa == 0.5).int()
    scaled = torch.ldexp(padded, -exponent[..., None])
    # Past 448 is only what stands beside something that is not finite; some versions of torch would make it 448.
    codes = scaled.masked_fill(~(scaled.abs() <= _E4M3_MAX), float("nan")).to(torch.float8_e4m3fn)
    return codes.flatten(1)[:, :columns], (exponent + 127).to(torch.uint8)


def dequantise_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """Values f32 [M, C] of what `quantise_rows` gave."""
    spread = e8m0_to_float(scales.contiguous()).repeat_interleave(FP8_BLOCK, 1)[:, : codes.shape[1]]
    return codes.float() * spread
