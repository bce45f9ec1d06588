"""Conversions: every code of the small formats, and rounding where it is hard, against torch's own types."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.gfx942.formats import BF8, FP8, bf16_to_f32, f32_to_bf16, fma, to_fnuz
from tests.gfx942.snippet import execute, get
from tests.gfx942.statements import f32, f32_bits, fused
from tests.gfx942.waves import LANES

FNUZ = [("fp8", FP8, torch.float8_e4m3fnuz), ("bf8", BF8, torch.float8_e5m2fnuz)]
by_format = pytest.mark.parametrize(("name", "values", "dtype"), FNUZ, ids=["e4m3fnuz", "e5m2fnuz"])

_ALL_BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()


def floats() -> st.SearchStrategy[float]:
    """Float32 of every size, with the special ones and those near a tie of a shorter format among them."""
    bits = st.integers(0, 2**32 - 1) | st.integers(0, 2**16 - 1).map(lambda high: high << 16 | 0x8000)
    return bits.map(f32) | st.floats(width=32, allow_nan=True)


@by_format
def test_every_code_has_torchs_value(name: str, values: np.ndarray, dtype: torch.dtype) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    np.testing.assert_array_equal(values, expected)


@by_format
def test_every_bfloat16_converts_as_torch_does(name: str, values: np.ndarray, dtype: torch.dtype) -> None:
    with np.errstate(all="ignore"):
        got = to_fnuz(_ALL_BF16.numpy(), values, saturate=False)
    np.testing.assert_array_equal(got, _ALL_BF16.to(dtype).view(torch.uint8).numpy())


@by_format
@settings(max_examples=300, deadline=None)
@given(x=st.lists(floats(), min_size=1, max_size=64))
@example(x=[240.0, 247.99998, 248.0, 256.0, -248.0, float("inf"), float("nan"), -0.0, 2.0**-11, 2.0**-10])
def test_floats_convert_as_torch_does(name: str, values: np.ndarray, dtype: torch.dtype, x: list[float]) -> None:
    tensor = torch.tensor(x, dtype=torch.float32)
    with np.errstate(all="ignore"):
        got = to_fnuz(tensor.numpy(), values, saturate=False)
    np.testing.assert_array_equal(got, tensor.to(dtype).view(torch.uint8).numpy())


@by_format
def test_the_instructions_unpack_every_code(name: str, values: np.ndarray, dtype: torch.dtype) -> None:
    codes = np.arange(256, dtype=np.uint64).reshape(4, LANES)
    # The upper half is picked by SDWA, and the pair that is written overlaps the source.
    state = execute(
        f"v_cvt_f32_{name}_e32 v4, v0\n"
        f"v_cvt_pk_f32_{name}_sdwa v[6:7], v0 src0_sel:WORD_1\n"
        f"v_cvt_pk_f32_{name}_e32 v[0:1], v0",
        {"v0": codes | (255 - codes) << 8 | codes << 16 | (codes ^ 1) << 24},
        waves=4,
    )
    index = codes.astype(int)
    for register, expected in (
        ("v4", values[index]),
        ("v0", values[index]),
        ("v1", values[255 - index]),
        ("v6", values[index]),
        ("v7", values[index ^ 1]),
    ):
        np.testing.assert_array_equal(get(state, register).astype(np.uint32).view(np.float32), expected)


@by_format
@pytest.mark.parametrize("saturate", [False, True])
def test_the_instructions_pack_one_half_and_keep_the_other(
    name: str, values: np.ndarray, dtype: torch.dtype, saturate: bool
) -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -1.5, 0.3, 1e-9, 250.0, -1e9, float("inf"), float("nan"), 17.0, 3e4] * 6)[:LANES]
    y = x.flip(0).contiguous()
    state = execute(
        f"s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), {int(saturate)}\n"
        f"v_cvt_pk_{name}_f32 v4, v0, v2\n"
        f"v_cvt_pk_{name}_f32 v5, v0, v2 op_sel:[0,0,1]",
        {"v0": x.numpy().view(np.uint32), "v2": y.numpy().view(np.uint32), "v4": 0x12345678, "v5": 0x12345678},
    )
    largest = torch.finfo(dtype).max

    def code(t: torch.Tensor) -> np.ndarray:
        bounded = torch.where(t.isfinite(), t.clamp(-largest, largest), t) if saturate else t
        return bounded.to(dtype).view(torch.uint8).numpy().astype(np.uint64)

    pair = code(x) | code(y) << np.uint64(8)
    np.testing.assert_array_equal(get(state, "v4")[0], pair | np.uint64(0x12340000))
    np.testing.assert_array_equal(get(state, "v5")[0], pair << np.uint64(16) | np.uint64(0x5678))


def test_an_overflowing_half_is_infinite_or_with_the_mode_bit_the_largest() -> None:
    text = "v_cvt_f16_f32_e32 v2, v0\ns_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1\nv_cvt_f16_f32_e32 v3, v0"
    state = execute(text, {"v0": np.resize([f32_bits(x) for x in (1e6, -1e6, np.inf, 65519.0)], LANES)})
    assert get(state, "v2")[0, :4].tolist() == [0x7C00, 0xFC00, 0x7C00, 0x7BFF]
    assert get(state, "v3")[0, :4].tolist() == [0x7BFF, 0xFBFF, 0x7C00, 0x7BFF]


@settings(max_examples=300, deadline=None)
@given(x=st.lists(floats(), min_size=1, max_size=64))
@example(x=[1.00390625, 1.01171875, 3.3961775e38, -3.4e38, 2.0**-133, 2.0**-134, float("nan"), float("inf"), -0.0])
def test_bfloat16_rounds_as_torch_does(x: list[float]) -> None:
    tensor = torch.tensor(x, dtype=torch.float32)
    got = torch.from_numpy(f32_to_bf16(tensor.numpy())).view(torch.bfloat16)
    torch.testing.assert_close(got, tensor.bfloat16(), rtol=0, atol=0, equal_nan=True)
    np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(tensor.numpy())), got.float().numpy())


@settings(max_examples=500, deadline=None)
@given(a=floats(), b=floats(), c=floats())
@example(a=1 + 2.0**-12, b=1 - 2.0**-12, c=2.0**-60)  # a tie in f32 but for what f64 loses
@example(a=f32(0x3F800001), b=f32(0x3F800001), c=-1.0)
@example(a=2.0**-100, b=2.0**-49, c=2.0**-149)
def test_a_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    arrays = [np.array([x], np.float32) for x in (a, b, c)]
    with np.errstate(all="ignore"):
        (got,) = fma(*arrays)
    expected = np.array([f32_bits(fused(a, b, c))], np.uint32).view(np.float32)[0]
    np.testing.assert_equal(got, expected)
    assert np.isnan(expected) or np.signbit(got) == np.signbit(expected)
