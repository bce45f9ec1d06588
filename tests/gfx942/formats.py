"""Number formats that numpy has not: AMD's fnuz fp8, bfloat16, and a fused multiply-add in f32."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
F32 = NDArray[np.float32]

Array = NDArray[Any]

FNUZ_NAN = 0x80
"""The only NaN of the fnuz formats, where a negative zero would be. They have no infinities."""


def _fnuz_values(mantissa_bits: int, bias: int) -> F32:
    code = np.arange(256)
    exponent = (code & 0x7F) >> mantissa_bits
    fraction = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    magnitude = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    values = np.where(code & 0x80, -magnitude, magnitude).astype(np.float32)
    values[FNUZ_NAN] = np.nan
    return values


FP8 = _fnuz_values(mantissa_bits=3, bias=8)
"""Value of each e4m3fnuz code: ±240 at most."""
BF8 = _fnuz_values(mantissa_bits=2, bias=16)
"""Value of each e5m2fnuz code: ±57344 at most."""


def to_fnuz(x: F32, values: F32, *, saturate: NDArray[np.bool_] | bool) -> U32:
    """Nearest code of an fnuz format, ties to the even code.

    What rounds past the largest value is that value where `saturate`, else NaN; infinities and NaN are NaN. The
    sign of what rounds to zero is lost: there is no negative zero.
    """
    positive = values[:128].astype(np.float64)
    magnitude = np.abs(x.astype(np.float64))
    # One more step past the largest, so that the midpoint beyond which a value overflows is found like any other.
    grid = np.append(positive, 2 * positive[127] - positive[126])
    above = np.clip(np.searchsorted(grid, magnitude), 1, 128)
    low, high = grid[above - 1], grid[above]
    up = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & (above % 2 == 0))
    code = np.where(up, above, above - 1)
    code = np.where(magnitude >= grid[128], 128, code)
    finite = np.isfinite(x)
    code = np.where((code == 128) & saturate, 127, code)
    signed = np.where((x < 0) & (code != 0), code | 0x80, code)
    return np.where(finite & (code < 128), signed, FNUZ_NAN).astype(np.uint32)


def bf16_to_f32(bits: NDArray[np.uint16]) -> F32:
    """A bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: F32) -> NDArray[np.uint16]:
    """Round to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def flush(x: F32) -> F32:
    """Denormals to zero, the sign kept."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def fma(a: F32, b: F32, c: F32) -> F32:
    """a·b + c in f32, rounded once.

    The product is exact in f64. The sum is rounded to odd there: where it is inexact its last bit is set, so the
    second rounding, to f32, cannot meet a tie that is none.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = np.asarray(c).astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # Knuth's two-sum
    bits = np.ascontiguousarray(total).view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    away = (error > 0) == (total > 0)  # the true sum is further from zero than `total`
    odd = bits + np.where(inexact, np.where(away, 1, -1), 0)
    return odd.view(np.float64).astype(np.float32)


def choose(mask: Array, a: Array, b: Array) -> Array:
    """a where `mask`, else b: np.where, whose annotations lose an array of any dtype."""
    return np.asarray(np.where(mask, a, b))


def fma_f16(a: Array, b: Array, c: Array) -> Array:
    """a·b + c in f16, rounded once: of halves the f64 product is exact, and so is a sum near a tie."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16)
