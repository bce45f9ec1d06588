"""Counts and orders of bits, of integers of any width."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def reversed_bits(value: Array) -> Array:
    """The bits of uint32 in the opposite order."""
    for step, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        value = ((value >> np.uint32(step)) & np.uint32(mask)) | ((value & np.uint32(mask)) << np.uint32(step))
    return (value >> np.uint32(16)) | (value << np.uint32(16))


def leading_zeros(value: Array) -> Array:
    """As uint32, −1 where there is no one."""
    width = value.dtype.itemsize * 8
    filled = value.copy()
    for step in (1, 2, 4, 8, 16, 32):
        if step < width:
            filled |= filled >> value.dtype.type(step)
    return np.where(value == 0, np.uint32(0xFFFFFFFF), (width - np.bitwise_count(filled)).astype(np.uint32))


def trailing_zeros(value: Array) -> Array:
    """As uint32, −1 where there is no one."""
    lowest = value & (~value + value.dtype.type(1))
    position = np.bitwise_count(lowest - value.dtype.type(1)).astype(np.uint32)
    return np.where(value == 0, np.uint32(0xFFFFFFFF), position)
