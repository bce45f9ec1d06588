"""Inputs that find mistakes: the edges of each kind of number, every pair of them, and random bits."""

import random
import zlib

from tests.gfx942.statements import f16_bits, f32_bits

_INT32 = [0, 1, 2, 3, 5, 13, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFC18, 0xFFFF, 0x10000, 0x7FFFFF, 0x800000,
          0xFFFFFF, 0x7FFFFFFF, 0x80000000, 0x80000001, 0x80007FFF, 0xFFFFFC18, 0xFFFFFFFE, 0xFFFFFFFF]  # fmt: skip
_FLOATS = [0.0, -0.0, 1.0, -1.0, 1.5, 2.5, -2.5, 0.1, 3.0, 6.0, 1e-3, -7.25, 100.0, 1e10, -1e10, 3e38, 2.0**-126,
           -(2.0**-126), 2.0**-130, 2.0**-149, float("inf"), float("-inf"), float("nan"), 65504.0, 65520.0, -65519.0,
           2.0**-14, 2.0**-24, 2.0**-25, 4294967296.0, 2147483648.0, -2147483648.0, 0.49999997, 16777217.0]  # fmt: skip

EDGES: dict[str, list[int]] = {
    "u32": _INT32,
    "i32": _INT32,
    "u16": [0, 1, 2, 15, 16, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF],
    "i16": [0, 1, 2, 15, 16, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF],
    "u64": [x | y << 32 for x in (0, 1, 0x80000000, 0xFFFFFFFF) for y in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)],
    "i64": [x | y << 32 for x in (0, 1, 0x80000000, 0xFFFFFFFF) for y in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)],
    "f32": [f32_bits(x) for x in _FLOATS],
    "f16": [f16_bits(x) for x in _FLOATS],
    "f64": [0, 1 << 63, 0x3FF0000000000000, 0xBFF0000000000000, 0x7FF0000000000000, 0xFFF8000000000000,
            0x3FB999999999999A, 1, 0x7FEFFFFFFFFFFFFF],
    "bytes": [0x03020100, 0x07060504, 0x0B0A0908, 0x0D0C0B0A, 0xFF0E0D0C, 0x00040105, 0x08000C07],
}  # fmt: skip


def bit_patterns(kinds: list[str], count: int, seed: str) -> list[list[int]]:
    """`count` tuples, transposed: a list for each kind. Half of the numbers are edges, some tuples are of equals."""
    rng = random.Random(zlib.crc32(seed.encode()))
    rows = [[_draw(kind, rng) for kind in kinds] for _ in range(count)]
    if len(kinds) == 1 and kinds[0] in EDGES:
        rows[: len(EDGES[kinds[0]])] = [[edge] for edge in EDGES[kinds[0]]]
    for row in rows:
        roll = rng.random()
        if len(set(kinds)) == 1 and len(kinds) > 1 and roll < 0.2:  # equal, or equal but for the highest bit
            row[1] = row[0] ^ (1 << (_width(kinds[0]) - 1) if roll < 0.1 else 0)
    return [list(column) for column in zip(*rows, strict=True)] if kinds else []


def _width(kind: str) -> int:
    return {"f16x2": 32, "f32x2": 64, "bytes": 32}.get(kind) or int(kind[1:])


def _draw(kind: str, rng: random.Random) -> int:
    if kind in ("f16x2", "f32x2"):
        width = 16 if kind == "f16x2" else 32
        return _draw(kind[:3], rng) | _draw(kind[:3], rng) << width
    width = _width(kind)
    roll = rng.random()
    if roll < 0.5:
        return rng.choice(EDGES[kind])
    if kind == "f32" and roll < 0.8:  # of like size, so that sums cancel and round
        return f32_bits(rng.uniform(-4, 4))
    if kind == "f16" and roll < 0.8:
        return f16_bits(rng.uniform(-4, 4))
    if kind == "u32" and roll < 0.7:  # shifts and widths
        return rng.randrange(40)
    return rng.getrandbits(width)
