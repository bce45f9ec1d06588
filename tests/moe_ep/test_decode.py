"""The kernels' decoding of mxfp4: every pair of codes with every scale, in every way that runs kernels."""

import pytest
import torch
import triton
import triton.language as tl

from moe_ep.kernels.decode import dequantise
from moe_ep.mxfp4 import dequantise as by_torch
from tests.moe_ep.ways import WAYS, Way, call


@triton.jit
def decode_kernel(packed_ptr, scale_ptr, out_ptr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    packed = tl.load(packed_ptr + n * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)[None, :])
    scale = tl.load(scale_ptr + n * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)[None, :])
    values = dequantise(packed, scale, BLOCK_N, BLOCK_K)
    tl.store(out_ptr + n * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], values)


def _decode(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, width = packed.shape
    out = torch.empty(rows, 2 * width, dtype=torch.bfloat16, device=packed.device)
    decode_kernel[(rows // 16,)](packed, scale, out, BLOCK_N=16, BLOCK_K=2 * width)
    return out


@pytest.mark.parametrize("way", [way for way in WAYS if way != "reference"])
def test_every_byte_with_every_scale_is_its_value(way: Way, device: torch.device) -> None:
    # Row = scale, and along it every byte, so every code in either nibble: 256 × 512 values.
    packed = torch.arange(256, dtype=torch.uint8, device=device).expand(256, 256).contiguous()
    scale = torch.arange(256, dtype=torch.uint8, device=device)[:, None].expand(256, 16).contiguous()
    got = call(way, _decode, packed, scale)
    expected = by_torch(packed, scale)
    assert expected.isnan().sum() == 512
    assert expected[0].abs().max() == 6 * 2.0**-127
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0, equal_nan=True)
