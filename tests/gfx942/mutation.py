"""What the tests are worth: opcodes that do something else, and programs that use another register.

An opcode mutant is killed if the statements of that opcode notice it. A program mutant is killed if the expert kernels
that it breaks raise a fault or leave the tolerance that their tests have; else it survives, either with the same bits
(the change was of nothing that matters to this input) or with others within the tolerance.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.gfx942 import global_memory, machine, matrix, packed, scalar, shared, vector
from tests.gfx942.assembly import Instruction, Program, parse_instruction
from tests.gfx942.compiled import instruction_class
from tests.gfx942.driver import emulated
from tests.gfx942.faults import Fault
from tests.gfx942.statements import PACKED, SCALAR, VECTOR, Statement
from tests.gfx942.test_opcodes import check_scalar, check_vector
from tests.moe_ep.experts import _partial as partial_here
from tests.moe_ep.experts import by_formula, make_experts, make_tokens, relative_error
from tests.moe_ep.test_fused import TOLERANCE

Compute = Callable[..., Any]
Outcome = Literal["fault", "wrong", "same bits", "within tolerance"]


def _first(value: Any) -> Any:
    """The result of a scalar instruction stands before its scc."""
    return value[0] if isinstance(value, tuple) else value


def _with_first(value: Any, new: Any) -> Any:
    return (new, *value[1:]) if isinstance(value, tuple) else new


def _swapped(compute: Compute) -> Compute:
    return lambda a, b, *rest: compute(b.astype(a.dtype), a.astype(b.dtype), *rest)


def _off_by_a_bit(compute: Compute) -> Compute:
    """Wrong in the last bit, and only where the first operand's last bits are 101."""

    def mutant(a: Any, *rest: Any) -> Any:
        value = compute(a, *rest)
        result = np.ascontiguousarray(_first(value))
        if result.dtype == bool:
            return _with_first(value, result ^ _rare(a, result.shape))
        unsigned = result.view(f"u{result.itemsize}")
        changed = unsigned ^ _rare(a, result.shape).astype(unsigned.dtype)
        return _with_first(value, changed.view(result.dtype))

    return mutant


def _rare(a: Any, shape: tuple[int, ...]) -> Any:
    bits = np.ascontiguousarray(a).view(f"u{np.asarray(a).itemsize}") if np.asarray(a).dtype != bool else a
    return np.broadcast_to((bits & 7) == 5, shape)


def _last_ignored(compute: Compute) -> Compute:
    return lambda *a: compute(*a[:-1], np.zeros_like(a[-1]))


def _sign_ignored(compute: Compute) -> Compute:
    """The first operand's highest bit is taken for 0."""

    def mutant(a: Any, *rest: Any) -> Any:
        a = np.ascontiguousarray(a)
        if a.dtype == bool:
            return compute(a & False, *rest)
        unsigned = a.view(f"u{a.itemsize}")
        low = unsigned & unsigned.dtype.type((1 << (8 * a.itemsize - 1)) - 1)
        return compute(low.view(a.dtype), *rest)

    return mutant


MUTATORS: dict[str, Callable[[Compute], Compute]] = {
    "operands swapped": _swapped,
    "a rare bit wrong": _off_by_a_bit,
    "last operand 0": _last_ignored,
    "sign of the first ignored": _sign_ignored,
}

COMMUTATIVE = re.compile(
    r"[vs]_(pk_)?(add|mul|and|or|xor|nand|nor|xnor|min|max|add3|or3|max3|min3|med3|fma|fmac|fmamk|fmaak|mad|cmp_eq|"
    r"cmp_ne|cmp_neq|cmp_lg|cmp_nlg|cmp_o|cmp_u|cmpk_eq|cmpk_lg|addc|xad|and_or|div_fmas)_"
)
"""Whose first two operands may be swapped without a change: such a mutant is none."""

SIGNLESS = re.compile(
    r"v_(lshlrev_b|lshrrev_b|ashrrev_i|pk_lshlrev|pk_lshrrev|pk_ashrrev|bfm|mul_u32_u24|mul_i32_i24|mad_u32_u24|"
    r"mad_i32_i24|cvt_f32_ubyte[012]|alignbyte|alignbit|mbcnt_hi|cmp_[ou]_|lshl_add_u64)|s_(bfm|sext|pack_l|lshl\d_add)"
)
"""Whose first operand's highest bit does not count."""


@dataclass(frozen=True)
class OpcodeMutant:
    """An opcode whose meaning was changed, and whether its statements noticed."""

    opcode: str
    change: str
    killed: bool


@contextmanager
def _replaced(table: dict[str, Any], opcode: str, entry: Any) -> Iterator[None]:
    before = table[opcode]
    table[opcode] = entry
    try:
        yield
    finally:
        table[opcode] = before


def _with_compute(entry: Any, mutator: Callable[[Compute], Compute]) -> Any:
    """A table's entry with another meaning: an op, or (kind, function), or a function."""
    if isinstance(entry, tuple):
        return (entry[0], mutator(entry[1]))
    return replace(entry, compute=mutator(entry.compute)) if hasattr(entry, "compute") else mutator(entry)


_TABLES: list[tuple[dict[str, Any], list[Statement], Callable[[Statement], None]]] = [
    (vector.VECTOR_OPS, VECTOR, check_vector),
    (vector.COMPARE_OPS, VECTOR, check_vector),
    (packed.HALF_OPS, PACKED, check_vector),
    (packed.FULL_OPS, PACKED, check_vector),
    (scalar.SCALAR_OPS, SCALAR, check_scalar),
    (scalar.COMPARE_OPS, SCALAR, check_scalar),
]


def opcode_mutants() -> Iterator[OpcodeMutant]:
    """Every opcode of the tables under every mutator that changes it."""
    for table, statements, check in _TABLES:
        for opcode in list(table):
            about = [s for s in statements if parse_instruction(s.text).base == opcode]
            if not about:  # tested elsewhere
                continue
            sources = len([k for k in about[0].kinds.split(" -> ")[0].split() if k != "none"])
            for change, mutator in MUTATORS.items():
                pointless = (
                    (change == "operands swapped" and (sources < 2 or COMMUTATIVE.match(opcode)))
                    or (change == "sign of the first ignored" and (sources == 0 or SIGNLESS.match(opcode)))
                    or sources == 0
                )
                if not pointless:
                    with _replaced(table, opcode, _with_compute(table[opcode], mutator)):
                        yield OpcodeMutant(opcode, change, _noticed(about, check))


def _noticed(statements: list[Statement], check: Callable[[Statement], None]) -> bool:
    try:
        for statement in statements:
            check(statement)
    except (AssertionError, TypeError, ValueError):
        return True
    return False


_MOVES = {op for op in shared.OPCODES if "permute" in op or "swizzle" in op}
_SKIPPABLE = {
    "test_lanes.py": set(vector.SPECIAL_OPS) | _MOVES,
    "test_matrix.py": matrix.OPCODES,
    "test_memory.py": (global_memory.OPCODES - global_memory.NO_OPERATIONS) | (shared.OPCODES - _MOVES),
    "test_machine.py": set(scalar.SAVEEXEC_OPS),
}
"""What does not fit a table of meanings, and the tests of it."""


def skipped_mutants() -> Iterator[OpcodeMutant]:
    """Opcodes that do nothing: those of memory, lanes and matrices, by the tests of their family."""
    compile_instruction = machine.compile_instruction
    stated = {parse_instruction(s.text).base for s in VECTOR}
    for file, opcodes in _SKIPPABLE.items():
        for opcode in sorted(opcodes - stated):
            tests = "test_formats.py" if "cvt" in opcode else file

            def compiled(instruction: Instruction, labels: dict[str, int], opcode: str = opcode) -> Any:
                step = compile_instruction(instruction, labels)
                return (lambda waves: None) if instruction.base == opcode else step

            machine.compile_instruction = compiled
            try:
                with redirect_stdout(StringIO()):
                    failed = pytest.main(["-x", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent / tests)])
            finally:
                machine.compile_instruction = compile_instruction
            yield OpcodeMutant(opcode, "does nothing", failed == pytest.ExitCode.TESTS_FAILED)


@dataclass(frozen=True)
class ProgramMutant:
    """An instruction of a kernel whose register was changed, and what came of it."""

    kernel: str
    before: str
    after: str
    source: str
    outcome: Outcome

    @property
    def killed(self) -> bool:
        """Whether a test would fail."""
        return self.outcome in ("fault", "wrong")


_NUMBER = re.compile(r"\b([vsa])(?:(\d+)\b|\[(\d+):(\d+)\])")


def change_register(instruction: Instruction, rng: random.Random) -> Instruction | None:
    """The instruction with one of its registers moved on by its width, None if it has none."""
    found = list(_NUMBER.finditer(instruction.text.partition(" ")[2]))
    if not found:
        return None
    chosen = rng.choice(found)
    file, single, first, last = chosen.groups()
    if single is not None:
        new = f"{file}{int(single) + (1 if int(single) < 60 else -1)}"
    else:
        width = int(last) - int(first) + 1
        shift = width if int(first) < 60 else -width
        new = f"{file}[{int(first) + shift}:{int(last) + shift}]"
    operands = instruction.text.partition(" ")[2]
    text = f"{instruction.opcode} {operands[: chosen.start()]}{new}{operands[chosen.end() :]}"
    return parse_instruction(text, instruction.source)


def program_mutants(count: int, seed: int) -> Iterator[ProgramMutant]:
    """`count` changed registers, each of one instruction that the experts' kernels execute on a small layer."""
    rng = random.Random(seed)
    experts = make_experts(6, 256, 128, torch.device("cpu"), bias=True)
    tokens = make_tokens(20, 256, 6, 3, torch.device("cpu"))
    expected = by_formula(experts, tokens, only=range(3))

    def run(rewrite: Callable[[Program], Program] | None) -> tuple[torch.Tensor, list[Program]]:
        with emulated() as chip:
            chip.rewrite, chip.limit = rewrite, 20_000
            chip.protect(*(t for t in vars(experts).values() if t is not None))
            out = partial_here(experts, tokens, "triton_kernel", ep_rank=0, ep_size=2)
            return out, [launch.program for launch in chip.launches]

    good, programs = run(None)
    places = [
        (program.name, i)
        for program in programs
        for i, instruction in enumerate(program.instructions)
        if instruction_class(instruction.opcode) != "scalar" or instruction.opcode.startswith("s_load")
    ]
    while count:
        kernel, index = rng.choice(places)
        instruction = next(p for p in programs if p.name == kernel).instructions[index]
        changed = change_register(instruction, rng)
        if changed is None:
            continue
        count -= 1

        def rewrite(
            program: Program, kernel: str = kernel, index: int = index, changed: Instruction = changed
        ) -> Program:
            if program.name != kernel:
                return program
            body = program.instructions
            return replace(program, instructions=(*body[:index], changed, *body[index + 1 :]))

        outcome: Outcome
        try:
            out, _ = run(rewrite)
        except Fault:
            outcome = "fault"
        else:
            right = relative_error(out, expected) < TOLERANCE
            outcome = "wrong" if not right else "same bits" if torch.equal(out, good) else "within tolerance"
        yield ProgramMutant(kernel, instruction.text, changed.text, instruction.source, outcome)


def report(programs: int, seed: int, console: Console) -> None:
    """Print the kill rates and every survivor."""
    opcodes = [*opcode_mutants(), *skipped_mutants()]
    killed = sum(m.killed for m in opcodes)
    console.print(f"opcodes: {killed} of {len(opcodes)} mutants killed ({killed / len(opcodes):.1%})")
    for mutant in opcodes:
        if not mutant.killed:
            console.print(f"  survived: {mutant.opcode}: {mutant.change}", markup=False)
    if not programs:
        return
    mutants = list(program_mutants(programs, seed))
    counts = Counter(m.outcome for m in mutants)
    killed = sum(m.killed for m in mutants)
    console.print(f"programs: {killed} of {programs} mutants killed ({killed / programs:.1%}): {dict(counts)}")
    for survivor in mutants:
        if not survivor.killed:
            console.print(
                f"  {survivor.outcome}: {survivor.kernel} {survivor.source}: {survivor.before} → {survivor.after}",
                markup=False,
                soft_wrap=True,
            )
