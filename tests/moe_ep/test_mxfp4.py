"""The format, against OCP MX v1.0 stated independently."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ep import mxfp4

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_every_e2m1_code_has_its_value() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert mxfp4.e2m1_to_float(codes).tolist() == VALUES + [-v for v in VALUES]
    assert torch.signbit(mxfp4.e2m1_to_float(codes[8:9])).item(), "code 8 is −0"


def test_the_low_nibble_holds_the_even_k() -> None:
    packed = mxfp4.pack(torch.tensor([0x2, 0xF], dtype=torch.uint8))
    assert packed.tolist() == [0xF2]
    assert mxfp4.unpack(packed).tolist() == [0x2, 0xF]


@given(st.lists(st.integers(0, 255), min_size=1, max_size=64))
def test_unpack_and_pack_are_inverse(data: list[int]) -> None:
    packed = torch.tensor(data, dtype=torch.uint8)
    assert torch.equal(mxfp4.pack(mxfp4.unpack(packed)), packed)


def test_every_e8m0_byte_has_its_value_with_nan_at_255_and_a_denormal_at_0() -> None:
    values = mxfp4.e8m0_to_float(torch.arange(256, dtype=torch.uint8)).tolist()
    assert values[:255] == [2.0 ** (b - 127) for b in range(255)]
    assert values[0] == 2.0**-127 != 0
    assert math.isnan(values[255])


def test_e8m0_agrees_with_torchs_own_dtype() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    ours, torchs = mxfp4.e8m0_to_float(codes), codes.view(torch.float8_e8m0fnu).float()
    assert torch.equal(ours.view(torch.int32)[:255], torchs.view(torch.int32)[:255])


def test_e8m0_tensors_are_taken_as_their_bytes_not_converted() -> None:
    codes = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)
    assert torch.equal(mxfp4.as_bytes(codes.view(torch.float8_e8m0fnu)), codes)


@given(st.floats(-8, 8, width=32))
def test_rounding_is_to_the_nearest_value_and_to_the_even_code_on_ties(x: float) -> None:
    code = int(mxfp4.float_to_e2m1(torch.tensor([x]))[0])
    distance = [abs(abs(x) - v) for v in VALUES]
    nearest = [c for c, d in enumerate(distance) if d == min(distance)]
    assert code & 7 == (nearest[0] if len(nearest) == 1 else next(c for c in nearest if c % 2 == 0))
    assert code >> 3 == (math.copysign(1, x) < 0)


@pytest.mark.parametrize(("x", "rounded"), [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4)])
def test_ties_between_neighbours(x: float, rounded: float) -> None:
    assert mxfp4.e2m1_to_float(mxfp4.float_to_e2m1(torch.tensor([x, -x]))).tolist() == [rounded, -rounded]


def test_the_scale_is_the_floor_of_the_exponent_less_two_and_elements_saturate() -> None:
    block = torch.zeros(32)
    block[0], block[1] = 7.9, -1.0  # floor(log2 7.9) = 2: scale 2^0, and 7.9 saturates at 6
    packed, scale = mxfp4.quantise(block)
    assert scale.tolist() == [127]
    assert mxfp4.dequantise(packed, scale)[:2].tolist() == [6, -1]


@given(st.integers(-120, 120), st.integers(0, 2**32 - 1))
def test_quantising_what_is_representable_changes_nothing(exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (2, 64), generator=generator, dtype=torch.uint8)
    codes[:, ::32] = 7  # a 6 in every block fixes the scale
    values = mxfp4.e2m1_to_float(codes) * 2.0**exponent
    assert torch.equal(mxfp4.dequantise(*mxfp4.quantise(values)), values)


@given(st.integers(0, 2**32 - 1))
def test_the_error_of_a_block_is_within_the_format(seed: int) -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(seed))
    restored = mxfp4.dequantise(*mxfp4.quantise(x)).view(4, 3, 32)
    step = 2.0 ** (torch.floor(torch.log2(x.view(4, 3, 32).abs().amax(-1, keepdim=True))) - 2)
    # Half of the widest gap (4…6), or what saturation at 6 takes off a value below 8.
    assert ((x.view(4, 3, 32) - restored).abs() <= 2 * step).all()


def test_a_block_with_nan_or_infinity_becomes_nan_and_only_that_block() -> None:
    x = torch.ones(3, 32)
    x[0, 3], x[1, 5] = math.nan, math.inf
    packed, scale = mxfp4.quantise(x)
    assert scale.flatten().tolist()[:2] == [255, 255]
    restored = mxfp4.dequantise(packed, scale)
    assert restored[:2].isnan().all()
    assert (restored[2] == 1).all()


def test_zeros_and_the_extremes_of_float32_survive() -> None:
    x = torch.zeros(3, 32)
    x[1], x[2] = 2.0**-127, 2.0**126
    assert torch.equal(mxfp4.dequantise(*mxfp4.quantise(x)), x)


def test_a_length_that_is_no_multiple_of_the_block_is_refused() -> None:
    with pytest.raises(ValueError, match="K = 33 is not a multiple of 32"):
        mxfp4.quantise(torch.zeros(33))
