"""VMEM instructions: buffer, global, flat and scratch accesses, and atomics on memory."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.assembly import Instruction
from tests.gfx942.faults import OutOfBounds, UnknownOpcode
from tests.gfx942.formats import bf16_to_f32, f32_to_bf16
from tests.gfx942.operands import Read, destination, register, scalar, vector
from tests.gfx942.transfer import SIZES, Transfer
from tests.gfx942.waves import LANES, Waves

Step = Callable[[Waves], None]
Array = NDArray[Any]
Where = tuple[Array, NDArray[np.bool_]]
"""Byte addresses uint64 [W, 64] and which lanes access them."""

_ACCESS = re.compile(
    r"(buffer|global|flat|scratch)_(load|store)_(ubyte|sbyte|ushort|sshort|short|byte|dword(?:x\d)?)(_d16)?(_hi)?$"
)
_LOADS = ("ubyte", "sbyte", "ushort", "sshort", "dword", "dwordx2", "dwordx3", "dwordx4")
_LOADS_D16 = ("ubyte_d16", "sbyte_d16", "short_d16", "ubyte_d16_hi", "sbyte_d16_hi", "short_d16_hi")
_STORES = ("byte", "short", "byte_d16_hi", "short_d16_hi", "dword", "dwordx2", "dwordx3", "dwordx4")
_SPACES = ("buffer", "global", "flat", "scratch")

NO_OPERATIONS = {"buffer_wbl2", "buffer_inv"}
"""Caches are not emulated."""

Combine = Callable[[Array, Array], Array]


def _packed(to: Callable[[Array], Array], back: Callable[[Array], Array]) -> Combine:
    """The sum of two pairs of 16-bit floats, each as the two halves of a dword."""
    return lambda old, new: back(to(old.view(np.uint16)) + to(new.view(np.uint16))).view(np.uint32)


ATOMICS: dict[str, Combine] = {
    "add": lambda old, new: old + new,
    "sub": lambda old, new: old - new,
    "smin": lambda old, new: np.minimum(old.view(np.int32), new.view(np.int32)).view(np.uint32),
    "smax": lambda old, new: np.maximum(old.view(np.int32), new.view(np.int32)).view(np.uint32),
    "umin": np.minimum,
    "umax": np.maximum,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "swap": lambda old, new: new,
    "add_f32": lambda old, new: (old.view(np.float32) + new.view(np.float32)).view(np.uint32),
    "pk_add_f16": _packed(lambda x: x.view(np.float16), lambda x: x.view(np.uint16)),
    "pk_add_bf16": _packed(bf16_to_f32, f32_to_bf16),
}
"""uint32 of memory and of the lane → what memory becomes."""

OPCODES = {
    *(f"{s}_load_{t}" for s in _SPACES for t in (*_LOADS, *_LOADS_D16)),
    *(f"{s}_store_{t}" for s in _SPACES for t in _STORES),
    *(f"global_atomic_{name}" for name in ATOMICS),
    *(f"buffer_atomic_{name}" for name in ATOMICS if name != "pk_add_bf16"),  # which gfx942 has not
    *NO_OPERATIONS,
}
_KNOWN = {"offset", "offen", "sc0", "sc1", "nt"}


def compile_memory(instruction: Instruction) -> Step:
    """Raises `UnknownOpcode` for what is not implemented: idxen, LDS as the target, swizzled buffers."""
    opcode = instruction.opcode
    if opcode in NO_OPERATIONS:
        return lambda waves: None
    if opcode not in OPCODES or set(instruction.modifiers) - _KNOWN:
        raise UnknownOpcode(instruction.text)
    if "_atomic_" in opcode:
        return _atomic(instruction)
    found = _ACCESS.match(opcode)
    assert found is not None
    space, way, type_name, d16, high = found.groups()
    size, signed = SIZES[type_name]
    loads = way == "load"
    # Data and address: buffer has the data first in both ways, the others in the order of the assignment.
    operands = list(instruction.operands)
    if space != "buffer" and not loads:
        operands[:2] = operands[1::-1]
    transfer = Transfer(destination(operands[0]), size, signed=signed, d16=bool(d16) and loads, high=bool(high))
    if space == "scratch":
        return _scratch(transfer, _scratch_offset(instruction, operands[1:]), loads)
    where = _addresses(space, instruction, operands[1:], size)

    def load(waves: Waves) -> None:
        addresses, lanes = where(waves)
        transfer.put(waves, waves.memory.read(addresses, size, lanes))

    def store(waves: Waves) -> None:
        addresses, lanes = where(waves)
        waves.memory.write(addresses, transfer.get(waves), lanes)

    return load if loads else store


def _addresses(space: str, instruction: Instruction, operands: list[str], size: int) -> Callable[[Waves], Where]:
    offset = int(instruction.modifiers.get("offset", "0"), 0)
    if space == "buffer":
        return _buffer_addresses(instruction, operands, offset, size)
    base = None if len(operands) < 2 or operands[1] == "off" else scalar(operands[1], "u64")
    lane: Read = vector(operands[0], "u64" if base is None else "u32")
    step = np.int64(offset).astype(np.uint64)  # a negative offset wraps, as the sum does

    def where(waves: Waves) -> Where:
        addresses = lane(waves).astype(np.uint64) + step
        if base is not None:
            addresses = addresses + base(waves)[:, None]
        return np.broadcast_to(addresses, (waves.count, LANES)), waves.lanes

    return where


def _buffer_addresses(
    instruction: Instruction, operands: list[str], offset: int, size: int
) -> Callable[[Waves], Where]:
    """A raw buffer: what lies past num_records loads 0 and is not stored.

    The descriptor is 48 bits of base, a stride (0 here), num_records in bytes, and flags.
    """
    descriptor = register(operands[1])
    if descriptor is None or not descriptor.scalar:
        raise UnknownOpcode(f"{instruction.text}: {operands[1]} is no buffer descriptor")
    n = descriptor.index
    lane = vector(operands[0], "u32") if "offen" in instruction.modifiers else None
    more = scalar(operands[2])

    def where(waves: Waves) -> Where:
        if ((waves.scalar[n + 1] >> np.uint32(16))[waves.running]).any():
            raise UnknownOpcode(f"{instruction.text}: a buffer with a stride or swizzle")
        start = np.uint64(offset) + more(waves).astype(np.uint64)[:, None]
        if lane is not None:
            start = start + lane(waves).astype(np.uint64)
        start = np.broadcast_to(start, (waves.count, LANES))
        base = waves.pair(n) & np.uint64((1 << 48) - 1)
        inside = start + np.uint64(size) <= waves.scalar[n + 2].astype(np.uint64)[:, None]
        return base[:, None] + start, waves.lanes & inside

    return where


def _scratch_offset(instruction: Instruction, operands: list[str]) -> Callable[[Waves], Array]:
    constant = int(instruction.modifiers.get("offset", "0"), 0)
    lane = None if operands[0] == "off" else vector(operands[0], "i32")
    more = None if len(operands) < 2 or operands[1] == "off" else scalar(operands[1], "i32")

    def offset(waves: Waves) -> Array:
        total = np.full((waves.count, LANES), constant, np.int64)
        total = total if lane is None else total + lane(waves)
        return total if more is None else total + more(waves)[:, None]

    return offset


def _scratch(transfer: Transfer, offset: Callable[[Waves], Array], loads: bool) -> Step:
    """Memory of each lane's own, where registers are spilled to."""

    def step(waves: Waves) -> None:
        start, size = offset(waves), waves.scratch.shape[2]
        outside = waves.lanes & ((start < 0) | (start + transfer.size > size))
        if outside.any():
            wave, lane = np.argwhere(outside)[0]
            raise OutOfBounds(f"scratch byte {start[wave, lane]} of {size} by lane {lane}", int(wave))
        index = np.where(waves.lanes, start, 0)[..., None] + np.arange(transfer.size)
        if loads:
            transfer.put(waves, np.take_along_axis(waves.scratch, index, axis=2))
        else:
            wave, lane = np.nonzero(waves.lanes)
            waves.scratch[wave[:, None], lane[:, None], index[wave, lane]] = transfer.get(waves)[wave, lane]

    return step


def _atomic(instruction: Instruction) -> Step:
    """Lane after lane, in the order of waves and lanes. With sc0 the old value is returned."""
    space, _, name = instruction.opcode.partition("_atomic_")
    combine = ATOMICS[name]
    returns = "sc0" in instruction.modifiers
    operands = list(instruction.operands)
    if space == "buffer":
        target = value = operands[0]
        rest = operands[1:]
    else:
        target = operands.pop(0) if returns else operands[1]
        value = operands[1]
        rest = [operands[0], *operands[2:]]
    n, new = destination(target), vector(value, "u32")
    where = _addresses(space, instruction, rest, 4)

    def step(waves: Waves) -> None:
        addresses, lanes = where(waves)
        if (addresses[lanes] & np.uint64(3)).any():
            raise OutOfBounds(f"an atomic at {int(addresses[lanes].max()):#x}, which is no multiple of 4")
        values = np.broadcast_to(new(waves), lanes.shape)
        old = np.zeros(lanes.shape, np.uint32)
        for wave, lane in np.argwhere(lanes):
            one = np.zeros(lanes.shape, bool)
            one[wave, lane] = True
            before = waves.memory.read(addresses, 4, one, atomic=True).view(np.uint32)[wave, lane]
            after = np.ascontiguousarray(combine(before, values[wave, lane : lane + 1]))
            data = np.zeros((*lanes.shape, 4), np.uint8)
            data[wave, lane] = after.view(np.uint8)
            waves.memory.write(addresses, data, one, atomic=True)
            old[wave, lane] = before[0]
        if returns:
            waves.set_vector(n, old)

    return step
