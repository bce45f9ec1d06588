"""Operand text → a function that reads it from a batch of waves, typed and with its modifiers applied."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tests.gfx942.faults import UnknownOpcode
from tests.gfx942.waves import AGPR, EXEC, M0, VCC, Waves

Kind = Literal["u16", "i16", "f16", "u32", "i32", "f32", "u64", "i64", "f64"]
Read = Callable[[Waves], Any]
"""Reads a value for every lane, of a shape that broadcasts to [W, 64]; or for every wave, [W]."""

TYPES: dict[str, Any] = {
    "u16": np.uint16, "i16": np.int16, "f16": np.float16,
    "u32": np.uint32, "i32": np.int32, "f32": np.float32,
    "u64": np.uint64, "i64": np.int64, "f64": np.float64,
}  # fmt: skip

_NAMED = {
    "vcc": (VCC, 2), "vcc_lo": (VCC, 1), "vcc_hi": (VCC + 1, 1), "m0": (M0, 1),
    "exec": (EXEC, 2), "exec_lo": (EXEC, 1), "exec_hi": (EXEC + 1, 1), "flat_scratch": (102, 2),
}  # fmt: skip
_REGISTER = re.compile(r"([vsa])(?:(\d+)|\[(\d+)(?::(\d+))?\])$")
LAST_SCALAR = 102
"""s0…s101 are general; past them lie flat_scratch, xnack_mask and vcc."""
_INLINE_FLOATS = {"0.5", "1.0", "2.0", "4.0", "0.15915494", "0.15915494309189532"}
_INV_2PI = 0.15915494309189532

SELECTIONS = {
    "BYTE_0": (0, 8), "BYTE_1": (8, 8), "BYTE_2": (16, 8), "BYTE_3": (24, 8),
    "WORD_0": (0, 16), "WORD_1": (16, 16), "DWORD": (0, 32),
}  # fmt: skip
"""SDWA's parts of a dword: first bit and width."""


@dataclass(frozen=True)
class Register:
    """`count` registers from `index` on; `scalar` or vector (accumulation registers follow the vector ones)."""

    scalar: bool
    index: int
    count: int


def register(text: str) -> Register | None:
    """v3, s[2:3], a[0:15], vcc, …; None if the text is no register."""
    if text in _NAMED:
        return Register(True, *_NAMED[text])
    found = _REGISTER.match(text)
    if not found:
        return None
    file, single, first, last = found.groups()
    index = int(single or first)
    count = 1 if single or last is None else int(last) - index + 1
    if count < 1 or index + count > (LAST_SCALAR if file == "s" else AGPR):
        raise UnknownOpcode(f"register {text} does not exist")
    return Register(file == "s", index + (AGPR if file == "a" else 0), count)


def destination(text: str, *, scalar: bool = False) -> int:
    """Index of the first register that an instruction writes."""
    found = register(text)
    if found is None or found.scalar != scalar:
        raise UnknownOpcode(f"{text} is no {'scalar' if scalar else 'vector'} register")
    return found.index


def bits(kind: str) -> int:
    """Width of a kind: 32 for "f32"."""
    return int(kind[1:])


def constant(text: str, kind: Kind) -> int:
    """The bits of an inline or literal constant, as an operand of this kind has them."""
    width = bits(kind)
    if text.lstrip("-") in _INLINE_FLOATS:
        value = _INV_2PI if text.lstrip("-").startswith("0.159") else float(text.lstrip("-"))
        # An integer operand sees the bits of the float of its width, a 16-bit one those of the f32: op_sel and
        # SDWA then choose a half. A 16-bit float has the constant in its low half.
        flavour = {16: "f16" if kind == "f16" else "f32", 32: "f32", 64: "f64"}[width]
        pattern = np.array(-value if text.startswith("-") else value, TYPES[flavour])
        return int(pattern.view(TYPES[f"u{bits(flavour)}"]))
    try:
        number = int(text, 0)
    except ValueError:
        raise UnknownOpcode(f"operand {text!r}") from None
    # A 32-bit literal of a 64-bit float is its upper half; integers are extended by their sign.
    if kind == "f64" and not -16 <= number <= 64:
        return (number & 0xFFFFFFFF) << 32
    return number & ((1 << max(width, 32)) - 1)


def strip_modifiers(text: str) -> tuple[str, bool, bool, bool]:
    """(operand, negated, absolute, sign-extended) of -v1, |v1|, -|v1|, neg(v1), sext(v1)."""
    sign_extended = text.startswith("sext(")
    if sign_extended:
        text = text[5:-1]
    negated = text.startswith("neg(") or (text.startswith("-") and not text[1].isdigit())
    text = text[4:-1] if text.startswith("neg(") else text.removeprefix("-") if negated else text
    absolute = text.startswith("|")
    return text.strip("|"), negated, absolute, sign_extended


def raw(text: str, wide: bool, kind: Kind = "u32") -> Read:
    """The 32 or 64 bits of an operand, for every lane."""
    found = register(text)
    if found is None:
        value = np.array(constant(text, kind), np.uint64 if wide else np.uint32)[None, None]
        return lambda waves: value
    n = found.index
    if found.scalar:
        return (lambda waves: waves.pair(n)[:, None]) if wide else (lambda waves: waves.scalar[n][:, None])
    if not wide:
        return lambda waves: waves.vector[n]
    high = np.uint64(32)
    return lambda waves: waves.vector[n].astype(np.uint64) | (waves.vector[n + 1].astype(np.uint64) << high)


def vector(text: str, kind: Kind, select: str = "DWORD") -> Read:
    """An operand of a vector instruction, of a numpy type; `select` is SDWA's part of the dword."""
    text, negated, absolute, sign_extended = strip_modifiers(text)
    width = bits(kind)
    read = raw(text, width == 64, kind)
    if select != "DWORD":
        read = _selected(read, *SELECTIONS[select], sign_extended=sign_extended)
    if width == 16:
        read = _narrow(read)
    if negated or absolute:
        read = _signed(read, width, negated, absolute)
    to = TYPES[kind]
    return lambda waves: read(waves).view(to)


def scalar(text: str, kind: Kind = "u32") -> Read:
    """An operand of a scalar instruction: an array [W] of a numpy type."""
    if text == "scc":
        return lambda waves: waves.scc.astype(TYPES[kind])
    read = raw(text, bits(kind) == 64, kind)
    to = TYPES[kind]
    return lambda waves: np.broadcast_to(read(waves)[:, 0], (waves.count,)).view(to)


def _selected(read: Read, first: int, width: int, *, sign_extended: bool) -> Read:
    shift, mask = np.uint32(first), np.uint32((1 << width) - 1)
    if not sign_extended:
        return lambda waves: (read(waves) >> shift) & mask
    up, down = np.uint32(32 - width - first), np.int32(32 - width)
    return lambda waves: ((read(waves) << up).view(np.int32) >> down).view(np.uint32)


def _narrow(read: Read) -> Read:
    return lambda waves: (read(waves) & np.uint32(0xFFFF)).astype(np.uint16)


def _signed(read: Read, width: int, negated: bool, absolute: bool) -> Read:
    unsigned = TYPES[f"u{width}"]
    sign = unsigned(1 << (width - 1))

    def apply(waves: Waves) -> Any:
        value = read(waves)
        value = value & ~sign if absolute else value
        return value ^ sign if negated else value

    return apply
