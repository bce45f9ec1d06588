"""DS instructions: LDS reads, writes and atomics, and moves between lanes that use no LDS."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.assembly import Instruction
from tests.gfx942.faults import UnknownOpcode
from tests.gfx942.operands import destination, vector
from tests.gfx942.transfer import SIZES, Transfer
from tests.gfx942.waves import LANES, Waves

Step = Callable[[Waves], None]
Array = NDArray[Any]
_LANE = np.arange(LANES)

_ACCESS = re.compile(r"ds_(read|write)(2)?(st64)?_([biu]\d+)(_d16)?(_hi)?$")
_SINGLE = ("b32", "b64", "b96", "b128")
OPCODES = {
    *(f"ds_read_{t}" for t in (*_SINGLE, "u8", "i8", "u16", "i16")),
    *(f"ds_read_{t}_d16{hi}" for t in ("u8", "i8", "u16") for hi in ("", "_hi")),
    *(f"ds_write_{t}" for t in (*_SINGLE, "b8", "b16", "b8_d16_hi", "b16_d16_hi")),
    *(f"ds_{way}2{stride}_{t}" for way in ("read", "write") for stride in ("", "st64") for t in ("b32", "b64")),
    "ds_add_u32", "ds_bpermute_b32", "ds_permute_b32", "ds_swizzle_b32",
}  # fmt: skip


def compile_shared(instruction: Instruction) -> Step:
    """Raises `UnknownOpcode` for what is not implemented."""
    if instruction.opcode not in OPCODES or set(instruction.modifiers) - {"offset", "offset0", "offset1"}:
        raise UnknownOpcode(instruction.text)
    if instruction.opcode == "ds_add_u32":
        return _add(instruction)
    if instruction.opcode == "ds_swizzle_b32":
        return _swizzle(instruction)
    if instruction.opcode.endswith("permute_b32"):
        return _permute(instruction)
    return _access(instruction)


def _offset(instruction: Instruction, name: str = "offset") -> int:
    return int(instruction.modifiers.get(name, "0"), 0)


def _sum(address: Array, offset: int) -> Array:
    """Of 32 bits: LLVM folds offsets onto negative addresses."""
    return (address + np.uint32(offset)).astype(np.int64)


def _access(instruction: Instruction) -> Step:
    found = _ACCESS.match(instruction.opcode)
    assert found is not None
    way, two, stride, type_name, d16, high = found.groups()
    size, signed = SIZES[type_name]
    unit = size * (64 if stride else 1)
    offsets = [_offset(instruction, f"offset{i}") * unit for i in (0, 1)] if two else [_offset(instruction)]
    operands = instruction.operands
    address = vector(operands[1 if way == "read" else 0], "u32")
    if way == "read":
        first = destination(operands[0])
        each = max(1, size // 4)
        parts = [
            Transfer(first + i * each, size, signed=signed, d16=bool(d16), high=bool(high)) for i in range(len(offsets))
        ]
    else:
        parts = [Transfer(destination(text), size, high=bool(high)) for text in operands[1 : 1 + len(offsets)]]

    def step(waves: Waves) -> None:
        where = np.broadcast_to(address(waves), (waves.count, LANES))
        if way == "read":
            # Both are read before either is written: the address register may be overwritten.
            values = [waves.lds.load(_sum(where, offset), size, waves.lanes) for offset in offsets]
            for part, value in zip(parts, values, strict=True):
                part.put(waves, value)
        else:
            for part, offset in zip(parts, offsets, strict=True):
                waves.lds.store(_sum(where, offset), part.get(waves), waves.lanes)

    return step


def _add(instruction: Instruction) -> Step:
    """An atomic: neither a race among atomics nor a question of order, since addition of integers has none."""
    address, value = (vector(text, "u32") for text in instruction.operands[:2])
    offset = _offset(instruction)

    def step(waves: Waves) -> None:
        where = _sum(np.broadcast_to(address(waves), (waves.count, LANES)), offset)
        addend = np.broadcast_to(value(waves), where.shape)
        waves.lds.add(where, addend, waves.lanes)

    return step


def _permute(instruction: Instruction) -> Step:
    """bpermute pulls from the lane that the address names (in bytes, modulo 64 lanes), permute pushes to it."""
    n = destination(instruction.operands[0])
    address, value = (vector(text, "u32") for text in instruction.operands[1:3])
    offset = np.uint32(_offset(instruction))
    pulls = instruction.opcode == "ds_bpermute_b32"

    def step(waves: Waves) -> None:
        lane = ((np.broadcast_to(address(waves), (waves.count, LANES)) + offset) >> np.uint32(2)) & np.uint32(63)
        values = np.broadcast_to(value(waves), lane.shape)
        if pulls:
            active = np.take_along_axis(waves.lanes, lane, axis=1)
            moved = np.where(active, np.take_along_axis(values, lane, axis=1), np.uint32(0))
        else:
            moved = np.zeros(lane.shape, np.uint32)
            wave, source = np.nonzero(waves.lanes)
            moved[wave, lane[wave, source]] = values[wave, source]
        waves.set_vector(n, moved)

    return step


def _swizzle(instruction: Instruction) -> Step:
    n, value = destination(instruction.operands[0]), vector(instruction.operands[1], "u32")
    source = _swizzle_lanes(instruction.modifiers.get("offset", "0"))

    def step(waves: Waves) -> None:
        values = np.broadcast_to(value(waves), (waves.count, LANES))
        waves.set_vector(n, np.where(waves.lanes[:, source], values[:, source], np.uint32(0)))

    return step


def _swizzle_lanes(pattern: str) -> Array:
    """The lane that each lane reads, by the assembler's macros."""
    found = re.match(r"swizzle\((\w+),(.*)\)$", pattern)
    if not found:
        raise UnknownOpcode(f"ds_swizzle offset:{pattern}")
    mode, arguments = found[1], found[2]
    if mode == "BITMASK_PERM":
        # One letter a bit of the lane within 32, the highest first: kept, inverted, or set to 0 or 1.
        keep = sum((c in "pi") << (4 - i) for i, c in enumerate(arguments.strip('"')))
        flip = sum((c in "i1") << (4 - i) for i, c in enumerate(arguments.strip('"')))
        return (_LANE & 32) | ((_LANE & 31 & keep) ^ flip)
    numbers = [int(x) for x in arguments.split(",")]
    lanes = {
        "SWAP": lambda: _LANE ^ numbers[0],
        "REVERSE": lambda: _LANE ^ (numbers[0] - 1),
        "BROADCAST": lambda: (_LANE & ~(numbers[0] - 1)) + numbers[-1],
        "QUAD_PERM": lambda: (_LANE & ~3) + np.array(numbers)[_LANE & 3],
    }
    if mode not in lanes:
        raise UnknownOpcode(f"ds_swizzle offset:{pattern}")
    return lanes[mode]()
