"""The order of weights that the kernels read."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ep.mxfp4 import E2M1_MAGNITUDES, pack, unpack
from moe_ep.order import from_kernel_order, order_in_place, padded, to_kernel_order


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_scales(*shape: int, seed: int = 0) -> torch.Tensor:
    """Scales that kernel order tells apart."""
    return torch.randint(0, 193, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def ordered_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] in kernel order, under scales of 1."""
    return to_kernel_order(pack(codes), torch.full((len(codes), codes.shape[1] // 32), 127, dtype=torch.uint8))[0]


@settings(max_examples=40, deadline=None)
@given(tiles=st.integers(1, 3), blocks=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_order_can_be_undone(tiles: int, blocks: int, seed: int) -> None:
    rows = 16 * tiles
    packed, scale = pack(random_codes(rows, 32 * blocks, seed=seed)), random_scales(rows, blocks, seed=seed)
    ordered, fields = to_kernel_order(packed, scale)
    assert ordered.shape == (rows, padded(32 * blocks) // 2)
    assert fields.shape == (rows, padded(32 * blocks) // 32)
    codes, scales = from_kernel_order(ordered, fields, 32 * blocks)
    assert torch.equal(codes, packed)
    assert torch.equal(scales, scale)


def test_a_scale_is_the_exponent_field_of_two_to_the_code_minus_65() -> None:
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 4).contiguous()
    packed = pack(torch.full((256, 128), 5, dtype=torch.uint8))
    ordered, fields = to_kernel_order(packed, scale)
    values = (fields[:, 0].int() << 23).view(torch.float32)
    assert values[:193].tolist() == [2.0 ** (code - 65) for code in range(193)]
    assert values[193:].isinf().all()
    assert not ordered[255].any(), "the codes under a NaN are 0, so that zero times infinity is NaN again"
    assert ordered[254].any()


def test_masks_and_shifts_of_a_word_are_bfloat16s_of_four_blocks() -> None:
    """What the kernels rely on: each word, masked, is the weights' values times 2^-126."""
    codes = random_codes(32, 256)
    # Tiles of 16 rows, in each its two groups, in each the rows.
    words = ordered_codes(codes).view(torch.uint16).int().view(2, 2, 16, 32).transpose(1, 2).reshape(32, 2, 32)
    other = words.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    third = (words >> 6 & 0x1C0) | (other << 10 & 0x8000)
    fourth = (words << 4 & 0x8180) | (words >> 4 & 0x40)
    blocks = torch.stack((words & 0x81C0, words << 6 & 0x81C0, third, fourth), dim=-2)
    values = blocks.to(torch.uint16).view(torch.bfloat16).double() * 2.0**126
    magnitudes = torch.tensor([*E2M1_MAGNITUDES, *(-m for m in E2M1_MAGNITUDES)], dtype=torch.float64)
    torch.testing.assert_close(values.flatten(-3), magnitudes[codes.long()], rtol=0, atol=0)


def test_every_bit_of_a_word_is_used_once() -> None:
    for k in range(0, 128, 32):
        for bit in range(4):
            codes = torch.zeros(16, 128, dtype=torch.uint8)
            codes[0, k] = 1 << bit
            pair = ordered_codes(codes).view(torch.uint16)[0, :2].tolist()
            assert sum(word.bit_count() for word in pair) == 1
    all_ones = ordered_codes(torch.full((16, 128), 15, dtype=torch.uint8))
    assert (all_ones == 255).all()


def test_what_a_tile_of_rows_reads_together_lies_together() -> None:
    codes = torch.zeros(48, 384, dtype=torch.uint8)
    codes[16:32, 128:256] = 15  # the second tile's second group
    ones = (ordered_codes(codes).flatten() == 255).nonzero().flatten()
    assert ones.tolist() == list(range(1024 * 4, 1024 * 5))


def test_whole_groups_are_ordered_in_their_own_memory() -> None:
    packed, scale = pack(random_codes(3, 32, 256)), random_scales(3, 32, 8)
    expected = to_kernel_order(packed.clone(), scale.clone())
    addresses = packed.data_ptr(), scale.data_ptr()
    got = order_in_place(packed, scale)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert (got[0].data_ptr(), got[1].data_ptr()) == addresses


def test_padding_is_zeros() -> None:
    ordered, fields = order_in_place(pack(random_codes(2, 16, 160)), random_scales(2, 16, 5))
    assert not unpack(from_kernel_order(ordered, fields, 256)[0])[..., 160:].any()
    assert (fields != 0).sum() <= 2 * 16 * 5
