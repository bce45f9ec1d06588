"""Device memory: the buffers that a launch was given. Any other address is a fault."""

from collections import Counter
from collections.abc import Iterator
from ctypes import c_uint8
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.faults import OutOfBounds, ReadOnly

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Addresses = NDArray[np.uint64]


@dataclass(frozen=True)
class Buffer:
    """`size` bytes of this process's memory at `address`."""

    name: str
    address: int
    size: int
    read_only: bool
    data: Bytes


class Memory:
    """Reads and writes of many lanes at once, each of which must fall within one buffer."""

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []
        self.loaded: Counter[str] = Counter()
        """Bytes that lanes loaded, by buffer. A byte that 64 lanes load counts 64 times."""
        self.stored: Counter[str] = Counter()

    def add(self, name: str, address: int, size: int, *, read_only: bool = False) -> None:
        """Make `size` bytes of this process at `address` part of the device."""
        data = np.ctypeslib.as_array((c_uint8 * size).from_address(address))
        self._buffers.append(Buffer(name, address, size, read_only, data))

    def read(self, addresses: Addresses, size: int, mask: Mask) -> Bytes:
        """uint8 [..., size] at each address; zeros where `mask` is false."""
        out = np.zeros((*addresses.shape, size), np.uint8)
        for buffer, where, offset in self._parts(addresses, size, mask, "load"):
            self.loaded[buffer.name] += size * offset.size
            out[where] = _gather(buffer.data, offset, size)
        return out

    def write(self, addresses: Addresses, data: Bytes, mask: Mask) -> None:
        """Store data uint8 [..., size]; of lanes that store to one address the last wins, as on the chip one does."""
        size = data.shape[-1]
        for buffer, where, offset in self._parts(addresses, size, mask, "store"):
            if buffer.read_only:
                raise ReadOnly(f"store to {buffer.name}, which is read-only", _first_wave(where))
            self.stored[buffer.name] += size * offset.size
            _scatter(buffer.data, offset, data[where])

    def _parts(
        self, addresses: Addresses, size: int, mask: Mask, what: str
    ) -> Iterator[tuple[Buffer, Mask, NDArray[np.int64]]]:
        left = mask
        for buffer in self._buffers:
            if not left.any():
                return
            # Unsigned: an address below the buffer wraps to a huge offset.
            offset = addresses - np.uint64(buffer.address)
            inside = left & (offset <= np.uint64(buffer.size - size)) if buffer.size >= size else left & False
            if inside.any():
                yield buffer, inside, offset[inside].astype(np.int64)
                left = left & ~inside
        if left.any():
            raise self._out_of_bounds(addresses, size, left, what)

    def _out_of_bounds(self, addresses: Addresses, size: int, left: Mask, what: str) -> OutOfBounds:
        place = np.argwhere(left)[0]
        address = int(addresses[tuple(place)])
        nearest = min(self._buffers, key=lambda b: max(b.address - address, address - b.address - b.size), default=None)
        where = "there are no buffers"
        if nearest is not None:
            where = f"the nearest buffer is {nearest.name}: byte {address - nearest.address} of {nearest.size}"
        return OutOfBounds(
            f"{what} of {size} bytes at {address:#x} by lane {place[-1]} ({int(left.sum())} lanes in all); {where}",
            _first_wave(left),
        )


def _first_wave(mask: Mask) -> int | None:
    return int(np.argwhere(mask)[0][0]) if mask.ndim == 2 else None


def _gather(data: Bytes, offset: NDArray[np.int64], size: int) -> Bytes:
    """data[offset : offset + size] of every offset, by dwords where all are aligned: fewer, larger indices."""
    if size % 4 == 0 and data.ctypes.data % 4 == 0 and not (offset & 3).any():
        words = data[: data.size // 4 * 4].view(np.uint32)
        return words[(offset >> 2)[:, None] + np.arange(size // 4)].view(np.uint8)
    return data[offset[:, None] + np.arange(size)]


def _scatter(data: Bytes, offset: NDArray[np.int64], values: Bytes) -> None:
    size = values.shape[-1]
    if size % 4 == 0 and data.ctypes.data % 4 == 0 and not (offset & 3).any():
        words = data[: data.size // 4 * 4].view(np.uint32)
        words[(offset >> 2)[:, None] + np.arange(size // 4)] = np.ascontiguousarray(values).view(np.uint32)
    else:
        data[offset[:, None] + np.arange(size)] = values
