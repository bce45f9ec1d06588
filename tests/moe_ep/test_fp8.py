"""128×128 block fp8, the format of V4's other weights."""

import torch

from moe_ep.fp8 import dequantise_blocks, quantise_blocks
from moe_ep.shape import block_grid


def test_partial_edge_blocks_have_scales_of_their_own() -> None:
    x = torch.randn(200, 300) * torch.logspace(-3, 3, 300)
    weight, scale = quantise_blocks(x)
    assert weight.dtype == torch.float8_e4m3fn
    assert scale.shape == block_grid(200, 300) == (2, 3)
    for i in range(2):
        for j in range(3):
            block = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
            amax = x[block].abs().max()
            assert 224 < amax / 2.0 ** (int(scale[i, j]) - 127) <= 448, "the largest magnitude uses e4m3's top binade"
    assert (dequantise_blocks(weight, scale) - x).abs().max() <= x.abs().max() / 16


def test_a_zero_weight_stays_zero() -> None:
    weight, scale = quantise_blocks(torch.zeros(128, 64))
    assert not dequantise_blocks(weight, scale).any()
