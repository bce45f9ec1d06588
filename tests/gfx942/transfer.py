"""Between memory's bytes and vector registers: sizes, signs, and the 16-bit halves of d16."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.waves import LANES, POISON, Waves

Bytes = NDArray[np.uint8]

SIZES = {
    "ubyte": (1, False), "sbyte": (1, True), "byte": (1, False), "u8": (1, False), "i8": (1, True), "b8": (1, False),
    "ushort": (2, False), "sshort": (2, True), "short": (2, False), "u16": (2, False), "i16": (2, True),
    "b16": (2, False), "dword": (4, False), "dwordx2": (8, False), "dwordx3": (12, False), "dwordx4": (16, False),
    "b32": (4, False), "b64": (8, False), "b96": (12, False), "b128": (16, False),
}  # fmt: skip
"""Bytes of a memory instruction's type, and whether a load extends the sign."""

POISON_HALF = np.uint32(POISON & 0xFFFF)

_NARROW: dict[tuple[int, bool], Any] = {
    (1, False): np.uint8,
    (1, True): np.int8,
    (2, False): np.uint16,
    (2, True): np.int16,
}


@dataclass(frozen=True)
class Transfer:
    """`size` bytes to or from vector registers from `register` on."""

    register: int
    size: int
    signed: bool = False
    d16: bool = False
    high: bool = False

    def put(self, waves: Waves, data: Bytes) -> None:
        """Registers of the active lanes from uint8 [W, 64, size]."""
        if self.size >= 4:
            words = np.ascontiguousarray(data).view(np.uint32)
            for i in range(self.size // 4):
                waves.set_vector(self.register + i, words[..., i])
            return
        value = np.ascontiguousarray(data).view(_NARROW[self.size, self.signed])[..., 0]
        wide = value.astype(np.int64).astype(np.uint32)
        if self.d16:
            # With SRAM-ECC, which gfx942 has, the other half is not kept, and LLVM does not rely on it.
            half = wide & np.uint32(0xFFFF)
            wide = half << np.uint32(16) | POISON_HALF if self.high else half | POISON_HALF << np.uint32(16)
        waves.set_vector(self.register, wide)

    def get(self, waves: Waves) -> Bytes:
        """uint8 [W, 64, size] of the registers."""
        if self.size >= 4:
            words = waves.vector[self.register : self.register + self.size // 4].transpose(1, 2, 0)
            return np.ascontiguousarray(words).view(np.uint8)
        word = waves.vector[self.register] >> np.uint32(16 if self.high else 0)
        return word.view(np.uint8).reshape(waves.count, LANES, 4)[..., : self.size]
