"""The registers of a batch of waves that execute one program in lockstep."""

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.lds import Lds
from tests.gfx942.memory import Memory

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
Mask = NDArray[np.bool_]

LANES = 64
VCC, M0, EXEC = 106, 124, 126
AGPR = 256
"""Rows of `vector` from here on are the accumulation registers a0…a255."""

POISON = 0x7FB0BAD0
"""An uninitialised register: a signalling NaN as f32, absurd as an address. As 8 or 16 bits it is an odd number."""


class Waves:
    """W waves. Registers are arrays over waves, so one numpy operation executes an instruction for all of them.

    vector uint32 [512, W, 64]: v0…v255, then a0…a255. scalar uint32 [128, W]: s0…s101, vcc at 106, m0 at 124, exec
    at 126. scc bool [W]. `running` bool [W] are the waves that execute the current instruction; a write through
    `set_…` touches only those, and of vector registers only the lanes in their exec.
    """

    def __init__(self, count: int, group_waves: int, memory: Memory, lds: Lds, scratch_bytes: int = 0) -> None:
        self.count = count
        self.group_waves = group_waves
        self.memory = memory
        self.lds = lds
        self.vector: U32 = np.full((512, count, LANES), POISON, np.uint32)
        self.scalar: U32 = np.full((128, count), POISON, np.uint32)
        self.scalar[EXEC : EXEC + 2] = 0xFFFFFFFF
        self.scc: Mask = np.zeros(count, bool)
        self.saturates_fp16: Mask = np.zeros(count, bool)
        """MODE.FP16_OVFL: conversions to f16 and fp8 that overflow give the largest value."""
        self.scratch = np.full((count, LANES, scratch_bytes), POISON & 0xFF, np.uint8)
        self.run(np.ones(count, bool))

    def run(self, running: Mask) -> None:
        """Let these waves execute what comes next."""
        self.running = running
        self.all_running = bool(running.all())
        self.update_lanes()

    def update_lanes(self) -> None:
        """Recompute which lanes write, after exec or the running waves changed."""
        self.lanes: Mask = self.mask(EXEC) & self.running[:, None]
        self.all_lanes = bool(self.lanes.all())

    def pair(self, n: int) -> U64:
        """Scalar registers n and n + 1 as uint64 [W]."""
        return self.scalar[n].astype(np.uint64) | (self.scalar[n + 1].astype(np.uint64) << np.uint64(32))

    def mask(self, n: int) -> Mask:
        """Scalar registers n and n + 1 as one bit a lane: bool [W, 64]."""
        words = np.ascontiguousarray(self.scalar[n : n + 2].T)
        return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(bool)

    def set_scalar(self, n: int, value: U32) -> None:
        """Write uint32 [W] to a scalar register of the running waves."""
        if self.all_running:
            self.scalar[n] = value
        else:
            np.copyto(self.scalar[n], value, where=self.running)
        if n in (EXEC, EXEC + 1):
            self.update_lanes()

    def set_pair(self, n: int, value: U64) -> None:
        """Write uint64 [W] to scalar registers n and n + 1."""
        self.set_scalar(n, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        self.set_scalar(n + 1, (value >> np.uint64(32)).astype(np.uint32))

    def set_mask(self, n: int, mask: Mask) -> None:
        """Write a compare's result: one bit a lane, 0 for inactive lanes."""
        words = np.packbits(mask & self.lanes, axis=1, bitorder="little").view(np.uint32)
        self.set_scalar(n, words[:, 0])
        self.set_scalar(n + 1, words[:, 1])

    def set_scc(self, value: Mask) -> None:
        """Write the scalar condition code of the running waves."""
        self.scc = np.where(self.running, value, self.scc)

    def set_vector(self, n: int, value: U32) -> None:
        """Write uint32, broadcastable to [W, 64], to the active lanes of a vector register."""
        if self.all_lanes:
            self.vector[n] = value
        else:
            np.copyto(self.vector[n], value, where=self.lanes)

    def set_vector_pair(self, n: int, value: U64) -> None:
        """Write uint64 [W, 64] to vector registers n and n + 1."""
        self.set_vector(n, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        self.set_vector(n + 1, (value >> np.uint64(32)).astype(np.uint32))
