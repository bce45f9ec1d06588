"""Device memory: the buffers that a launch was given. Any other address is a fault."""

from collections import Counter
from collections.abc import Iterator
from ctypes import c_uint8
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.faults import OutOfBounds, ReadOnly, SharedMemoryRace

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Addresses = NDArray[np.uint64]


_WINDOW = 1 << 36  # of device addresses for a buffer; a descriptor's base has 48 bits
_PAGE = 1 << 12


@dataclass
class Buffer:
    """`size` bytes at a device address, which are `data` in this process.

    `writer` is the workgroup, counted from 1, that stored each byte in this launch; made at the first store.
    """

    name: str
    address: int
    size: int
    read_only: bool
    data: Bytes
    writer: NDArray[np.int32] | None = None


class Memory:
    """Reads and writes of many lanes at once, each of which must fall within one buffer.

    Buffers lie far apart on the device, so an access past the end of one never falls into another. Unless the launch
    `shares`, a workgroup that loads what another has stored, or stores another value over it, is a fault: in which
    order they do so is nobody's choice.
    """

    def __init__(self, *, shares: bool = False) -> None:
        self.groups: NDArray[np.int32] = np.zeros(0, np.int32)
        """The workgroup of each wave, counted from 1; the machine says it for each batch. Empty: no one watches."""
        self._shares = shares
        self._buffers: list[Buffer] = []
        self.loaded: Counter[str] = Counter()
        """Bytes that lanes loaded, by buffer. A byte that 64 lanes load counts 64 times."""
        self.widths: dict[str, set[int]] = {}
        """How many bytes a lane's loads took, by buffer."""
        self.stored: Counter[str] = Counter()

    def add(self, name: str, address: int, size: int, *, read_only: bool = False) -> int:
        """Make `size` bytes of this process at `address` part of the device, as aligned as they are; their address."""
        data = np.ctypeslib.as_array((c_uint8 * size).from_address(address))
        device = (len(self._buffers) + 1) * _WINDOW + address % _PAGE
        self._buffers.append(Buffer(name, device, size, read_only, data))
        return device

    def read(self, addresses: Addresses, size: int, mask: Mask, *, atomic: bool = False) -> Bytes:
        """uint8 [..., size] at each address; zeros where `mask` is false."""
        out = np.zeros((*addresses.shape, size), np.uint8)
        for buffer, where, offset in self._parts(addresses, size, mask, "load"):
            self.loaded[buffer.name] += size * offset.size
            self.widths.setdefault(buffer.name, set()).add(size)
            if not atomic and buffer.writer is not None:
                self._check_sharing(buffer, where, offset, size, None)
            out[where] = _gather(buffer.data, offset, size)
        return out

    def write(self, addresses: Addresses, data: Bytes, mask: Mask, *, atomic: bool = False) -> None:
        """Store data uint8 [..., size]. Lanes that store different values to one place are a fault."""
        size = data.shape[-1]
        for buffer, where, offset in self._parts(addresses, size, mask, "store"):
            if buffer.read_only:
                raise ReadOnly(f"store to {buffer.name}, which is read-only", _first_wave(where))
            self.stored[buffer.name] += size * offset.size
            if not atomic:
                self._check_sharing(buffer, where, offset, size, data[where])
            _scatter(buffer.data, offset, data[where])
            if not self._shares and not atomic:
                _check_conflicts(buffer, where, offset, data[where])

    def _check_sharing(
        self, buffer: Buffer, where: Mask, offset: NDArray[np.int64], size: int, new: Bytes | None
    ) -> None:
        """A load (`new` is None) or a store of bytes that another workgroup stored in this launch is a fault."""
        if self._shares or not self.groups.size or where.ndim != 2 or where.shape[1] == 1:
            return
        if buffer.writer is None:
            buffer.writer = np.zeros(buffer.size, np.int32)
        group = np.broadcast_to(self.groups[:, None], where.shape)[where]
        # The first and last byte stand for the access: stores of one launch are of like size and alignment.
        for at in (offset, offset + size - 1):
            writer = buffer.writer[at]
            foreign = (writer != 0) & (writer != group)
            if foreign.any() and new is not None:
                foreign &= buffer.data[at] != new[:, 0 if at is offset else -1]
            if foreign.any():
                i = int(np.argmax(foreign))
                does = "loads" if new is None else "stores another value over"
                raise SharedMemoryRace(
                    f"workgroup {group[i] - 1} {does} byte {at[i]} of {buffer.name}, which workgroup {writer[i] - 1} "
                    "stored in the same launch",
                    int(np.argwhere(where)[i][0]),
                )
            if new is not None:
                buffer.writer[at] = group

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


def _check_conflicts(buffer: Buffer, where: Mask, offset: NDArray[np.int64], values: Bytes) -> None:
    """What two lanes of one instruction stored to a place must be the same: which of them is last is left open."""
    lost = (_gather(buffer.data, offset, values.shape[-1]).reshape(values.shape) != values).any(axis=-1)
    if lost.any():
        i = int(np.argmax(lost))
        raise SharedMemoryRace(
            f"two lanes store different values to byte {offset[i]} of {buffer.name} in one instruction",
            _first_wave(where) if where.ndim != 2 else int(np.argwhere(where)[i][0]),
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
