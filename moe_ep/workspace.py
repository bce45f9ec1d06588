"""Memory that is kept between calls, so that after the first call of a size nothing is allocated."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_ALIGNMENT = 256  # bytes; parts at multiples of 16 and more never have the kernels compiled anew


def carve(
    device: torch.device, stream: int, parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> dict[str, Tensor]:
    """Named tensors of the given shapes and dtypes in the memory kept for this device and stream, uninitialised.

    What is carved for one call is overwritten by the next on the same stream. CUDA graphs that are captured keep what
    they were given: one that may be replayed beside other calls or graphs must be captured on a stream of its own
    (`torch.cuda.graph` captures all on one unless it is given others).
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in parts.items()}
    spans = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values()]
    pieces = _memory(device, stream, sum(spans))[: sum(spans)].split(spans)
    return {
        name: piece[: sizes[name]].view(dtype).view(shape)
        for piece, (name, (shape, dtype)) in zip(pieces, parts.items(), strict=True)
    }


_kept: dict[tuple[torch.device, int], list[Tensor]] = {}


def _memory(device: torch.device, stream: int, size: int) -> Tensor:
    """The largest piece that is kept, or a new one where that is too small.

    A piece is never given back, since a captured graph may hold its addresses; each is twice the last at least, so that
    together they are at most four times what the largest op takes, and just that where it came first.
    """
    pieces = _kept.setdefault((device, stream), [])
    if not pieces or pieces[-1].numel() < size:
        largest = pieces[-1].numel() if pieces else 0
        pieces.append(torch.empty(max(size, 2 * largest), dtype=torch.uint8, device=device))
    return pieces[-1]
