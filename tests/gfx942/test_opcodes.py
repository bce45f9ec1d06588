"""Every arithmetic opcode against an independent statement of its meaning, on edges and at random."""

import math
from typing import Any

import numpy as np
import pytest

from tests.gfx942 import matrix, packed, scalar, shared, vector
from tests.gfx942.assembler import assemble
from tests.gfx942.assembly import parse_instruction
from tests.gfx942.faults import UnknownOpcode
from tests.gfx942.inputs import bit_patterns
from tests.gfx942.machine import compile_instruction
from tests.gfx942.snippet import execute, get
from tests.gfx942.statements import PACKED, SCALAR, VECTOR, Statement, f16, f16_bits, f32, f32_bits, signed
from tests.gfx942.waves import LANES

_WAVES = 6


def decode(kind: str, bits: int) -> Any:
    """The Python number that a kind's bits mean."""
    if kind == "f32":
        return f32(bits)
    if kind == "f16":
        return f16(bits)
    if kind == "f64":
        return float(np.array(bits, np.uint64).view(np.float64))
    return signed(bits, int(kind[1:])) if kind[0] == "i" else bits


def encode(kind: str, value: Any) -> int:
    """The bits of a result; a 16-bit result leaves the upper half 0."""
    if kind == "f32":
        return f32_bits(value)
    if kind == "f16":
        return f16_bits(value)
    width = {"f16x2": 32, "f32x2": 64}.get(kind) or int(kind[1:])
    return int(value) & ((1 << width) - 1)


def same(kind: str, got: int, expected: int, zero_signs: bool) -> bool:
    """Equal bits, or two NaNs, or, where their signs are open, two zeros."""
    if kind in ("f16x2", "f32x2"):
        width = 16 if kind == "f16x2" else 32
        mask = (1 << width) - 1
        return all(same(kind[:3], g & mask, e & mask, zero_signs) for g, e in
                   ((got, expected), (got >> width, expected >> width)))  # fmt: skip
    if kind not in ("f16", "f32"):
        return got == expected
    to = f16 if kind == "f16" else f32
    if kind == "f16" and got >> 16:
        return False
    if math.isnan(to(expected)):
        return math.isnan(to(got))
    return got == expected or (not zero_signs and to(got) == 0 == to(expected))


def check_vector(statement: Statement, **options: Any) -> None:
    """Run a vector statement on every lane of some waves. Raises `AssertionError` with the first difference."""
    sources, result = statement.kinds.split(" -> ")
    kinds = [k for k in sources.split() if k not in ("none", "lane")]
    places = [i for i, k in enumerate(sources.split()) if k not in ("none", "lane")]
    columns = bit_patterns(kinds, _WAVES * LANES, statement.text)
    registers: dict[str, Any] = {"v8": 0x3FC00000, "v9": 0, "s[0:1]": 0x9249249249249249, "a1": 0x3F8000A1}
    for place, kind, column in zip(places, kinds, columns, strict=True):
        n = 2 * place
        name = f"v[{n}:{n + 1}]" if kind.endswith("64") or kind == "f32x2" else f"v{n}"
        registers[name] = np.array(column, np.uint64).reshape(_WAVES, LANES)
    state = execute(statement.text.strip(), registers, waves=_WAVES, **options)
    if result == "mask":
        got = state.mask(8).astype(int).ravel().tolist()
    else:
        wide = result.endswith("64") or result == "f32x2"
        got = get(state, "a8" if result == "a32" else "v[8:9]" if wide else "v8").ravel().tolist()
    for i in range(_WAVES * LANES):
        values = [
            decode(k, c[i]) if "x" not in k and k != "bytes" else c[i] for k, c in zip(kinds, columns, strict=True)
        ]
        values += [i % LANES] if "lane" in sources else []
        expected = statement.meaning(*values)
        if result == "mask":
            assert got[i] == int(expected), f"{statement.text}: {values} gave {got[i]}, expected {int(expected)}"
        else:
            kind = "u32" if result == "a32" else result
            bits = encode(kind, expected)
            assert same(kind, got[i], bits, statement.zero_signs), (
                f"{statement.text}: {values} gave {got[i]:#x}, expected {bits:#x}"
            )


def check_scalar(statement: Statement, **options: Any) -> None:
    """Run a scalar statement on some waves, each with inputs and a carry of its own."""
    sources, result = statement.kinds.split(" -> ")
    kinds = [k for k in sources.split() if k not in ("none", "carry")]
    count = 96
    columns = bit_patterns(kinds, count, statement.text)
    registers: dict[str, Any] = {"s8": 0, "s9": 0, "s11": np.arange(count) % 2}
    for i, (kind, column) in enumerate(zip(kinds, columns, strict=True)):
        name = f"s[{2 * i}:{2 * i + 1}]" if kind.endswith("64") else f"s{2 * i}"
        registers[name] = np.array(column, np.uint64)
    state = execute(f"s_cmp_lg_u32 s11, 0\n{statement.text}", registers, groups=count, **options)
    got = get(state, "s0" if "same" in result else "s[8:9]" if "u64" in result else "s8").tolist()
    for i in range(count):
        values = [decode(k, c[i]) for k, c in zip(kinds, columns, strict=True)]
        outcome = statement.meaning(*values, *([i % 2] if "carry" in sources else []))
        value, scc = outcome if isinstance(outcome, tuple) else (outcome, bool(i % 2))
        if result == "scc":
            value, scc = None, outcome
        assert value is None or got[i] == value, f"{statement.text}: {values} gave {got[i]:#x}, expected {value:#x}"
        assert bool(state.scc[i]) == bool(scc), f"{statement.text}: {values} gave scc {state.scc[i]}, expected {scc}"


@pytest.mark.parametrize("statement", VECTOR + PACKED, ids=lambda s: s.text.strip().replace(" ", "_"))
def test_a_vector_instruction_computes_what_it_means(statement: Statement) -> None:
    check_vector(statement)


@pytest.mark.parametrize("statement", SCALAR, ids=lambda s: s.text.replace(" ", "_"))
def test_a_scalar_instruction_computes_what_it_means(statement: Statement) -> None:
    check_scalar(statement)


def _stated(statements: list[Statement]) -> set[str]:
    return {parse_instruction(s.text).base for s in statements}


ELSEWHERE = {
    "v_cmp", "v_readfirstlane_b32", "v_readlane_b32", "v_writelane_b32",  # test_lanes
    "v_cvt_pk_f32_fp8", "v_cvt_pk_f32_bf8", "v_cvt_pk_fp8_f32", "v_cvt_pk_bf8_f32",  # test_formats
    "v_cvt_f32_fp8", "v_cvt_f32_bf8",
    "v_div_fixup_f32",  # test_lanes: its meaning is that of the sequence
}  # fmt: skip


def test_every_arithmetic_opcode_has_a_statement() -> None:
    assert vector.OPCODES - _stated(VECTOR) <= ELSEWHERE
    assert _stated(PACKED) == packed.OPCODES
    control = {*scalar.BRANCHES, *scalar.NO_OPERATIONS, *scalar.SAVEEXEC_OPS, "s_barrier", "s_endpgm"}
    loads = {op for op in scalar.OPCODES if op.startswith("s_load")}
    assert scalar.OPCODES - _stated(SCALAR) == control | loads | {"s_setreg_imm32_b32"}


@pytest.mark.parametrize("family", [VECTOR, PACKED, SCALAR], ids=["vector", "packed", "scalar"])
def test_the_statements_are_instructions_of_gfx942_to_llvm(family: list[Statement]) -> None:
    assemble([s.text.strip() for s in family])


def test_the_assembler_refuses_what_is_no_instruction() -> None:
    with pytest.raises(ValueError, match="v_add_f32_e32"):
        assemble(["v_add_f32_e32 v0, v1"])


_REAL_BUT_UNKNOWN = [
    "v_sin_f32_e32 v0, v1",
    "v_mfma_f32_4x4x4_16b_f16 v[0:3], v[4:5], v[6:7], v[0:3]",
    "v_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[0:3] cbsz:1",
    "v_add_f32_e64 v0, v1, v2 clamp mul:2 bogus:1",
    "v_min_u32_e64 v0, v1, v2 clamp",
    "v_pk_add_u16 v0, v1, v2 clamp",
    "s_memtime s[0:1]",
    "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 3",
    "buffer_load_dword v0, v1, s[0:3], 0 idxen",
    "buffer_load_dword v1, s[0:3], 0 offen lds",
    "ds_append v0",
    "ds_swizzle_b32 v0, v1 offset:0x8055",
    "global_load_lds_dword v[0:1], off",
    "v_add_f32_e32 v0, q1, v2",
    "frobnicate v0",
]


@pytest.mark.parametrize("text", _REAL_BUT_UNKNOWN)
def test_what_is_not_implemented_is_refused_not_guessed(text: str) -> None:
    with pytest.raises(UnknownOpcode):
        compile_instruction(parse_instruction(text), {})


def test_the_families_do_not_share_an_opcode() -> None:
    families = [vector.OPCODES, packed.OPCODES, scalar.OPCODES, matrix.OPCODES, shared.OPCODES]
    assert sum(map(len, families)) == len(set().union(*families))
