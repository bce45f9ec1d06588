"""Memory that is kept between calls, so that after the first call of a size nothing is allocated."""

import math
from functools import cache

import torch
from torch import Tensor

_ALIGNMENT = 256  # bytes; parts at multiples of 16 and more never have the kernels compiled anew


def carve(
    device: torch.device, stream: int, parts: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> dict[str, Tensor]:
    """Named tensors of the given shapes and dtypes in the memory kept for this device and stream, uninitialised.

    What is carved for one call is overwritten by the next on the same stream. CUDA graphs that are captured keep
    what they were given: two that may be replayed at once must be captured on streams of their own.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in parts.items()}
    spans = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values()]
    memory = _memory(device, stream, max(sum(spans), 1).bit_length())
    pieces = memory[: sum(spans)].split(spans)
    return {
        name: piece[: sizes[name]].view(dtype).view(shape)
        for piece, (name, (shape, dtype)) in zip(pieces, parts.items(), strict=True)
    }


@cache
def _memory(device: torch.device, stream: int, size_bits: int) -> Tensor:
    """By powers of two, and never given back: a captured graph may hold addresses of any of them."""
    return torch.empty(1 << size_bits, dtype=torch.uint8, device=device)
