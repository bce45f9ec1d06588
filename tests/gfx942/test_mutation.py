"""The tests of the emulated chip notice when an opcode or a program is wrong."""

import random

import pytest

from tests.gfx942.assembly import parse_instruction
from tests.gfx942.mutation import change_register, opcode_mutants, program_mutants, skipped_mutants


def test_every_opcode_that_does_something_else_is_noticed() -> None:
    mutants = list(opcode_mutants())
    assert len(mutants) > 900
    assert [f"{m.opcode}: {m.change}" for m in mutants if not m.killed] == []


def test_a_changed_register_is_another_of_the_same_width() -> None:
    rng = random.Random(0)
    seen = [change_register(parse_instruction("v_pk_mul_f32 v[8:9], v[10:11], s[2:3]"), rng) for _ in range(40)]
    assert {i.text for i in seen if i} == {
        "v_pk_mul_f32 v[10:11], v[10:11], s[2:3]",
        "v_pk_mul_f32 v[8:9], v[12:13], s[2:3]",
        "v_pk_mul_f32 v[8:9], v[10:11], s[4:5]",
    }
    assert change_register(parse_instruction("s_nop 1"), rng) is None


@pytest.mark.nightly
def test_every_opcode_of_memory_lanes_and_matrices_that_does_nothing_is_noticed() -> None:
    assert [m.opcode for m in skipped_mutants() if not m.killed] == []


@pytest.mark.nightly
def test_most_programs_with_a_wrong_register_are_noticed() -> None:
    mutants = list(program_mutants(300, seed=1))
    assert sum(m.killed for m in mutants) > 0.75 * len(mutants)
