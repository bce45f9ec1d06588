"""A few instructions run alone, with registers set before and read after."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.assembly import parse_fragment
from tests.gfx942.machine import Grid, Machine
from tests.gfx942.memory import Memory
from tests.gfx942.operands import register
from tests.gfx942.waves import LANES, Waves

Values = Mapping[str, Any]
"""Register ("v0", "v[0:1]", "s4", "exec") → integers: one for all, or an array of a wave's lanes or of the waves."""


def execute(
    text: str,
    registers: Values | None = None,
    *,
    waves: int = 1,
    groups: int = 1,
    memory: Memory | None = None,
    lds_bytes: int = 0,
    limit: int = 100_000,
    scratch_bytes: int = 0,
    machine: Machine | None = None,
) -> Waves:
    """Run lines of assembly, ended by s_endpgm, on `groups` workgroups of `waves` waves; the registers after."""
    seen: list[Waves] = []

    def prepare(state: Waves) -> None:
        seen.append(state)
        state.scratch = np.zeros((state.count, LANES, scratch_bytes), np.uint8)
        for name, value in (registers or {}).items():
            put(state, name, value)

    machine = machine or Machine(parse_fragment(f"{text}\ns_endpgm"))
    machine.run(Grid(groups, waves=waves), memory or Memory(), lds_bytes=lds_bytes, limit=limit, prepare=prepare)
    (state,) = seen
    return state


def put(state: Waves, name: str, value: Any) -> None:
    """Set a register, or a pair from 64-bit integers, of every wave and lane."""
    found = register(name)
    assert found is not None
    parts = np.asarray(value, np.uint64)
    for i in range(found.count):
        part = (parts >> np.uint64(32 * i)).astype(np.uint32)
        (state.scalar if found.scalar else state.vector)[found.index + i] = part
    state.update_lanes()


def get(state: Waves, name: str) -> NDArray[np.uint64]:
    """A register, or a pair as 64-bit integers: [W] of a scalar, [W, 64] of a vector."""
    found = register(name)
    assert found is not None
    file = state.scalar if found.scalar else state.vector
    parts = [file[found.index + i].astype(np.uint64) << np.uint64(32 * i) for i in range(found.count)]
    return np.bitwise_or.reduce(parts)


def buffer(memory: Memory, data: NDArray[Any], name: str = "data", *, read_only: bool = False) -> int:
    """Make a numpy array part of the device's memory; its device address."""
    return memory.add(name, data.ctypes.data, data.nbytes, read_only=read_only)
