"""VOP3P: two 16-bit operations, or two f32 operations, in one instruction."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.assembly import Instruction
from tests.gfx942.faults import UnknownOpcode
from tests.gfx942.formats import fma, fma_f16
from tests.gfx942.operands import Kind, Read, constant, destination, register
from tests.gfx942.waves import Waves

Step = Callable[[Waves], None]
Array = NDArray[Any]
u16, u32, f32 = np.uint16, np.uint32, np.float32


HALF_OPS: dict[str, tuple[Kind, Callable[..., Array]]] = {
    "v_pk_add_u16": ("u16", lambda a, b: a + b),
    "v_pk_sub_u16": ("u16", lambda a, b: a - b),
    "v_pk_add_i16": ("i16", lambda a, b: a + b),
    "v_pk_sub_i16": ("i16", lambda a, b: a - b),
    "v_pk_mul_lo_u16": ("u16", lambda a, b: a * b),
    "v_pk_mad_u16": ("u16", lambda a, b, c: a * b + c),
    "v_pk_min_u16": ("u16", np.minimum),
    "v_pk_max_u16": ("u16", np.maximum),
    "v_pk_min_i16": ("i16", np.minimum),
    "v_pk_max_i16": ("i16", np.maximum),
    "v_pk_lshlrev_b16": ("u16", lambda a, b: b << (a & u16(15))),
    "v_pk_lshrrev_b16": ("u16", lambda a, b: b >> (a & u16(15))),
    "v_pk_ashrrev_i16": ("i16", lambda a, b: b >> (a & np.int16(15))),
    "v_pk_add_f16": ("f16", lambda a, b: a + b),
    "v_pk_mul_f16": ("f16", lambda a, b: a * b),
    "v_pk_min_f16": ("f16", np.fmin),
    "v_pk_max_f16": ("f16", np.fmax),
    "v_pk_fma_f16": ("f16", fma_f16),
}
"""On the two halves of 32-bit registers."""

FULL_OPS: dict[str, Callable[..., Array]] = {
    "v_pk_add_f32": lambda a, b: a + b,
    "v_pk_mul_f32": lambda a, b: a * b,
    "v_pk_fma_f32": fma,
}
"""On the two registers of a pair."""

OPCODES = {*HALF_OPS, *FULL_OPS, "v_pk_mov_b32"}
_KNOWN = {"op_sel", "op_sel_hi", "neg_lo", "neg_hi"}


def compile_packed(instruction: Instruction) -> Step:
    """Raises `UnknownOpcode` for what is not implemented."""
    unknown = set(instruction.modifiers) - _KNOWN
    if unknown:
        raise UnknownOpcode(f"{instruction.text}: modifier {', '.join(sorted(unknown))}")
    if instruction.base in HALF_OPS:
        return _halves(instruction, *HALF_OPS[instruction.base])
    if instruction.base in FULL_OPS:
        return _pairs(instruction, FULL_OPS[instruction.base])
    if instruction.base == "v_pk_mov_b32":
        return _mov(instruction)
    raise UnknownOpcode(instruction.text)


def _flags(instruction: Instruction, name: str, default: int) -> list[int]:
    """A modifier such as op_sel:[0,1], one number a source."""
    count = len(instruction.operands) - 1
    if name not in instruction.modifiers:
        return [default] * count
    return [int(x) for x in instruction.modifiers[name].strip("[]").split(",")]


def _halves(instruction: Instruction, kind: Kind, compute: Callable[..., Array]) -> Step:
    """op_sel and op_sel_hi say which half of a source the low and the high result take."""
    n = destination(instruction.operands[0])
    to = {"u16": np.uint16, "i16": np.int16, "f16": np.float16}[kind]
    reads = [_dword(text, kind) for text in instruction.operands[1:]]
    low = list(zip(_flags(instruction, "op_sel", 0), _flags(instruction, "neg_lo", 0), strict=True))
    high = list(zip(_flags(instruction, "op_sel_hi", 1), _flags(instruction, "neg_hi", 0), strict=True))

    def half(values: list[Array], chosen: list[tuple[int, int]]) -> Array:
        parts = [(v >> u32(16 * s)).astype(u16) ^ u16(0x8000 * g) for v, (s, g) in zip(values, chosen, strict=True)]
        result = np.asarray(compute(*(part.view(to) for part in parts)))
        return result.view(u16).astype(u32)

    def step(waves: Waves) -> None:
        values = [read(waves) for read in reads]
        waves.set_vector(n, half(values, low) | half(values, high) << u32(16))

    return step


def _dword(text: str, kind: Kind) -> Read:
    found = register(text)
    if found is None:
        value = np.array([[constant(text, kind)]], u32)
        return lambda waves: value
    n = found.index
    return (lambda waves: waves.scalar[n][:, None]) if found.scalar else (lambda waves: waves.vector[n])


def _member(text: str, which: int) -> Read:
    """One register of a pair; a constant is the same for both."""
    found = register(text)
    if found is None:
        return _dword(text, "f32")
    n = found.index + which
    return (lambda waves: waves.scalar[n][:, None]) if found.scalar else (lambda waves: waves.vector[n])


def _pairs(instruction: Instruction, compute: Callable[..., Array]) -> Step:
    n = destination(instruction.operands[0])
    sources = instruction.operands[1:]
    sides = []
    for select, negate in (("op_sel", "neg_lo"), ("op_sel_hi", "neg_hi")):
        chosen = _flags(instruction, select, int(select == "op_sel_hi"))
        negated = _flags(instruction, negate, 0)
        sides.append([(_member(t, s), u32(0x80000000 * g)) for t, s, g in zip(sources, chosen, negated, strict=True)])

    def side(waves: Waves, reads: list[tuple[Read, Any]]) -> Array:
        return np.ascontiguousarray(compute(*((read(waves) ^ sign).view(f32) for read, sign in reads))).view(u32)

    def step(waves: Waves) -> None:
        low, high = side(waves, sides[0]), side(waves, sides[1])  # both read before either is written
        waves.set_vector(n, low)
        waves.set_vector(n + 1, high)

    return step


def _mov(instruction: Instruction) -> Step:
    """The low result is a register of the first source, the high one a register of the second, as op_sel says."""
    n = destination(instruction.operands[0])
    first, second = (
        _member(text, which)
        for text, which in zip(instruction.operands[1:], _flags(instruction, "op_sel", 0), strict=True)
    )

    def step(waves: Waves) -> None:
        low, high = first(waves).copy(), second(waves).copy()
        waves.set_vector(n, low)
        waves.set_vector(n + 1, high)

    return step
