"""Memory that is kept between calls, so that after the first call of a size nothing is allocated."""

import math
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

_BY_32_BITS = 2**31 - 1


def carve(
    device: torch.device, stream: int, parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> dict[str, Tensor]:
    """Named tensors of the given shapes and dtypes in the memory kept for this device and stream, uninitialised.

    What is carved for one call is overwritten by the next on the same stream; among it is what programs wait for, so
    that of two calls at once neither might ever end. CUDA graphs that are captured keep what
    they were given: one that may be replayed beside other calls or graphs must be captured on a stream of its own
    (`torch.cuda.graph` captures all on one unless it is given others).
    """
    return {
        name: _memory(device, stream, name, math.prod(shape) * dtype.itemsize)[: math.prod(shape) * dtype.itemsize]
        .view(dtype)
        .view(shape)
        for name, (shape, dtype) in parts.items()
    }


_STREAMS, _COUNTERS = 256, 1024
"""Streams of a device that have counters, and int32 counters of each."""


def counters(device: torch.device, stream: int) -> Tensor | None:
    """int32 [1024] for this device and stream, zero unless a kernel that leaves them zero runs.

    Two such kernels at once would take each other's counts and might never end, which `carve`'s rule for graphs
    excludes. None where the counters would have to be made while a graph is captured, which would fill them only as it
    is replayed, or once there are no more. Backends make them when they load weights (`make_counters`).
    """
    if device not in _counters and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    make_counters(device)
    rows, of_stream = _counters[device]
    with _lock:
        row = of_stream.setdefault(stream, len(of_stream))
    return rows[row] if row < _STREAMS else None


def make_counters(device: torch.device) -> None:
    """Make those of all streams of a device, if there are none."""
    with _lock:
        if device in _counters:
            return
        rows = torch.zeros(_STREAMS, _COUNTERS, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams take them too
        _counters[device] = (rows, {})


_lock = threading.Lock()
_counters: dict[torch.device, tuple[Tensor, dict[int, int]]] = {}
_kept: dict[tuple[torch.device, int, str], list[Tensor]] = {}


def _memory(device: torch.device, stream: int, name: str, size: int) -> Tensor:
    """The largest piece that is kept of a part, or a new one where that is too small.

    A piece is never given back, since a captured graph may hold its addresses; each is twice the last if it can be, so
    that together they are at most four times what the largest op takes, and just that where it came first. No piece
    passes 2 GiB for that alone: up to there Triton addresses AMD's memory by 32 bits.
    """
    pieces = _kept.setdefault((device, stream, name), [])
    if not pieces or pieces[-1].numel() < size:
        twice = 2 * pieces[-1].numel() if pieces else 1
        pieces.append(torch.empty(max(size, min(twice, _BY_32_BITS)), dtype=torch.uint8, device=device))
    return pieces[-1]
