"""The order of weights that the kernels read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ep.mxfp4 import E2M1_MAGNITUDES, pack, unpack
from moe_ep.order import from_kernel_order, order_in_place, pad_scales, padded, to_kernel_order


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 4), blocks=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_order_can_be_undone(rows: int, blocks: int, seed: int) -> None:
    packed = pack(random_codes(rows, 32 * blocks, seed=seed))
    ordered = to_kernel_order(packed)
    assert ordered.shape == (rows, padded(32 * blocks) // 2)
    assert torch.equal(from_kernel_order(ordered, 32 * blocks), packed)


def test_masks_and_shifts_of_a_word_are_bfloat16s_of_four_blocks() -> None:
    """What the kernels rely on: each word, masked, is the weights' values times 2^-126."""
    codes = random_codes(16, 256)
    words = to_kernel_order(pack(codes)).view(torch.uint16).int().unflatten(-1, (-1, 32))
    fourth = (words << 1 & 0x8000) | (words >> 5 & 0x100) | (words >> 4 & 0xC0)
    blocks = torch.stack((words & 0x81C0, words << 3 & 0x81C0, words << 6 & 0x81C0, fourth), dim=-2)
    values = blocks.to(torch.uint16).view(torch.bfloat16).double() * 2.0**126
    magnitudes = torch.tensor([*E2M1_MAGNITUDES, *(-m for m in E2M1_MAGNITUDES)], dtype=torch.float64)
    torch.testing.assert_close(values.flatten(-3), magnitudes[codes.long()], rtol=0, atol=0)


def test_every_bit_of_a_word_is_used_once() -> None:
    for k in range(0, 128, 32):
        for bit in range(4):
            codes = torch.zeros(1, 128, dtype=torch.uint8)
            codes[0, k] = 1 << bit
            word = int(to_kernel_order(pack(codes)).view(torch.uint16)[0, 0])
            assert word.bit_count() == 1
    all_ones = to_kernel_order(pack(torch.full((1, 128), 15, dtype=torch.uint8)))
    assert (all_ones == 255).all()


def test_whole_groups_are_ordered_in_their_own_memory() -> None:
    packed = pack(random_codes(3, 4, 256))
    expected, address = to_kernel_order(packed.clone()), packed.data_ptr()
    got = order_in_place(packed)
    assert torch.equal(got, expected)
    assert got.data_ptr() == address


def test_padding_is_zero_codes() -> None:
    ordered = to_kernel_order(pack(random_codes(2, 160)))
    assert not unpack(from_kernel_order(ordered, 256))[:, 160:].any()
    assert pad_scales(torch.full((2, 5), 7, dtype=torch.uint8)).tolist() == [[7] * 5 + [0] * 3] * 2


@pytest.mark.parametrize(("width", "expected"), [(32, 128), (128, 128), (160, 256), (7168, 7168)])
def test_k_is_padded_to_whole_groups(width: int, expected: int) -> None:
    assert padded(width) == expected
