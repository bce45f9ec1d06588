"""The LDS of the workgroups of a batch, with a shadow that finds races and reads of what was never written."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.faults import LdsRace, OutOfBounds, UninitialisedLds

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_FILL = 0xCD  # what a read of uninitialised LDS would give, were it not a fault


class Lds:
    """`size` bytes for each of `groups` workgroups of `group_waves` waves.

    The shadow has, for each byte, one bit a wave for who read it and who wrote it since the last barrier. Its element
    is 8 or 16 bits wide, so four bytes' shadows are one integer, and an aligned access checks a dword at once.
    """

    def __init__(self, groups: int, size: int, group_waves: int) -> None:
        # Padded to a dword, so that the whole can be viewed as dwords; accesses are checked against `size`.
        self.size = size
        self.stride = -(-size // 4) * 4
        self.group_waves = group_waves
        self.data = np.full(groups * self.stride, _FILL, np.uint8)
        self._bits: Any
        self._quad: Any
        self._bits, self._quad = (np.uint8, np.uint32) if group_waves <= 8 else (np.uint16, np.uint64)
        self._written, self._read, self._added, self._initialised = (
            np.zeros(groups * self.stride, self._bits) for _ in range(4)
        )

    def barrier(self, groups: NDArray[np.bool_]) -> None:
        """These workgroups passed a barrier: what was before it races with nothing after."""
        for shadow in (self._written, self._read, self._added):
            shadow.reshape(groups.size, self.stride)[groups] = 0

    def load(self, address: NDArray[np.int64], size: int, lanes: Mask) -> Bytes:
        """uint8 [W, 64, size] at byte addresses [W, 64] of each wave's workgroup; zeros where a lane is inactive."""
        self._check_bounds(address, size, lanes, "read")
        out = np.zeros((*address.shape, size), np.uint8)
        for wave, active, index, unit in self._waves(address, size, lanes):
            self._check_read(wave, active, index, unit)
            values = self._units(unit)[index]
            out[wave :: self.group_waves][active] = values.reshape(len(index), -1).view(np.uint8)
        return out

    def store(self, address: NDArray[np.int64], data: Bytes, lanes: Mask) -> None:
        """Write data uint8 [W, 64, size]."""
        size = data.shape[-1]
        self._check_bounds(address, size, lanes, "write")
        for wave, active, index, unit in self._waves(address, size, lanes):
            values = np.ascontiguousarray(data[wave :: self.group_waves][active])
            values = values.view(np.uint32) if unit == 4 else values
            self._check_write(wave, active, index, unit, values)
            self._units(unit)[index] = values
            conflict = self._units(unit)[index] != values
            if conflict.any():
                place = tuple(np.argwhere(conflict)[0])
                raise LdsRace(
                    f"LDS byte {int(index[place]) * unit % self.stride} is written with two values by lanes of wave "
                    f"{wave} of the workgroup",
                    self._wave(wave, active, int(place[0])),
                )

    def add(self, address: NDArray[np.int64], value: NDArray[np.uint32], lanes: Mask) -> None:
        """Add uint32 [W, 64] atomically: atomics do not race with each other, but with reads and writes they do."""
        self._check_bounds(address, 4, lanes, "atomic")
        for wave, active, index, unit in self._waves(address, 4, lanes):
            if unit != 4:
                raise OutOfBounds("an LDS atomic at an address that is no multiple of 4", wave)
            self._check_initialised(wave, active, index, unit)
            mine = self._bit(wave, unit)
            for shadow, before in ((self._read, "read"), (self._written, "written")):
                others = self._shadow(shadow, unit)[index] & ~mine
                if others.any():
                    raise self._race("added to", before, others, wave, active, index, unit)
            self._shadow(self._added, unit)[index] |= mine
            np.add.at(self._units(unit), index[:, 0], value[wave :: self.group_waves][active])

    def _check_bounds(self, address: NDArray[np.int64], size: int, lanes: Mask, what: str) -> None:
        outside = lanes & ((address < 0) | (address + size > self.size))
        if outside.any():
            wave, lane = np.argwhere(outside)[0]
            raise OutOfBounds(
                f"LDS {what} of {size} bytes at {address[wave, lane]} by lane {lane}; the workgroup has {self.size}",
                int(wave),
            )

    def _waves(
        self, address: NDArray[np.int64], size: int, lanes: Mask
    ) -> Iterator[tuple[int, Mask, NDArray[np.int64], int]]:
        """(wave of the workgroup, active lanes, indices in units, bytes of a unit), one wave of each workgroup at once.

        Within one such set an element of the shadow belongs to one wave, so that fancy assignment loses nothing.
        """
        group = np.arange(address.shape[0]) // self.group_waves * self.stride
        start = address + group[:, None]
        unit = 4 if size % 4 == 0 and not (start[lanes] & 3).any() else 1
        steps = np.arange(size // unit)
        for wave in range(self.group_waves):
            active = lanes[wave :: self.group_waves]
            if active.any():
                yield wave, active, (start[wave :: self.group_waves][active] // unit)[:, None] + steps, unit

    def _units(self, unit: int) -> NDArray[np.unsignedinteger]:
        return self.data.view(np.uint32) if unit == 4 else self.data

    def _bit(self, wave: int, unit: int) -> Any:
        """This wave's bit in the shadow of a unit."""
        bit = 1 << wave
        if unit == 4:
            width = np.dtype(self._bits).itemsize * 8
            return self._quad(sum(bit << (width * i) for i in range(4)))
        return self._bits(bit)

    def _shadow(self, array: NDArray[Any], unit: int) -> NDArray[Any]:
        return array.view(self._quad) if unit == 4 else array

    def _check_read(self, wave: int, active: Mask, index: NDArray[np.int64], unit: int) -> None:
        self._check_initialised(wave, active, index, unit)
        mine = self._bit(wave, unit)
        others = (self._shadow(self._written, unit)[index] | self._shadow(self._added, unit)[index]) & ~mine
        if others.any():
            raise self._race("read", "written", others, wave, active, index, unit)
        self._shadow(self._read, unit)[index] |= mine

    def _check_initialised(self, wave: int, active: Mask, index: NDArray[np.int64], unit: int) -> None:
        unwritten = self._shadow(self._initialised, unit)[index] != self._bit(0, unit)
        if unwritten.any():
            place = tuple(np.argwhere(unwritten)[0])
            raise UninitialisedLds(
                f"LDS byte {index[place] * unit % self.stride} was never written",
                self._wave(wave, active, int(place[0])),
            )

    def _check_write(
        self, wave: int, active: Mask, index: NDArray[np.int64], unit: int, values: NDArray[np.unsignedinteger]
    ) -> None:
        mine = self._bit(wave, unit)
        for shadow, before in ((self._read, "read"), (self._added, "added to")):
            others = self._shadow(shadow, unit)[index] & ~mine
            if others.any():
                raise self._race("written", before, others, wave, active, index, unit)
        written = self._shadow(self._written, unit)
        writers = written[index] & ~mine
        if writers.any():
            # Triton lets several waves store one value that they all hold; only different values race.
            different = self._units(unit)[index] != values
            if (different & (writers != 0)).any():
                raise self._race("written", "written", writers, wave, active, index, unit)
        written[index] |= mine
        self._shadow(self._initialised, unit)[index] = self._bit(0, unit)

    def _race(
        self,
        what: str,
        before: str,
        others: NDArray[Any],
        wave: int,
        active: Mask,
        index: NDArray[np.int64],
        unit: int,
    ) -> LdsRace:
        place = tuple(np.argwhere(others != 0)[0])
        width = np.dtype(self._bits).itemsize * 8
        mask = int(others[place])
        other = next(w for w in range(16) for i in range(4) if mask >> (width * i) & (1 << w))
        return LdsRace(
            f"LDS byte {int(index[place]) * unit % self.stride} is {what} by wave {wave} of the workgroup and was "
            f"{before} by wave {other}, with no barrier between",
            self._wave(wave, active, int(place[0])),
        )

    def _wave(self, wave: int, active: Mask, place: int) -> int:
        """The batch's wave of the `place`-th active lane."""
        return int(np.argwhere(active)[place][0]) * self.group_waves + wave
