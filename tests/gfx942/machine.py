"""A program on a grid: batches of workgroups in lockstep, divergence, barriers, and what is counted."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.assembly import Instruction, Program
from tests.gfx942.faults import DivergentBarrier, Fault, OutOfBounds, Runaway, UnknownOpcode
from tests.gfx942.global_memory import compile_memory
from tests.gfx942.lds import Lds
from tests.gfx942.matrix import compile_matrix
from tests.gfx942.memory import Memory
from tests.gfx942.operands import LAST_SCALAR, register, strip_modifiers
from tests.gfx942.packed import compile_packed
from tests.gfx942.scalar import ControlFlow, compile_scalar
from tests.gfx942.shared import compile_shared
from tests.gfx942.vector import compile_vector
from tests.gfx942.waves import AGPR, LANES, Waves

Step = Callable[[Waves], None]

LDS_BYTES = 65536
_DIRECTIVES = {
    **{f"user_sgpr_{n}": 0 for n in ("dispatch_ptr", "queue_ptr", "dispatch_id", "private_segment_size",
                                     "private_segment_buffer", "flat_scratch_init")},
    "system_vgpr_workitem_id": 0, "ieee_mode": 1, "dx10_clamp": 1, "float_denorm_mode_32": 3,
    "float_denorm_mode_16_64": 3, "float_round_mode_32": 0, "float_round_mode_16_64": 0, "fp16_overflow": 0,
}  # fmt: skip
"""What a kernel may ask for of how it starts and computes: what Triton asks for."""
_NUMBERED = re.compile(r"[vsa][\d\[]")
_F16_ARITHMETIC = re.compile(r"v_(pk_)?(add|sub|mul|fma)_f16")
_PATIENCE = 200
"""Backward jumps after which others go on as far as they can: they may be who is waited for."""
_BATCH_WAVES = 128
"""Waves that execute together: enough to hide Python behind numpy, few enough for the registers to stay in cache."""


@dataclass(frozen=True)
class Grid:
    """Workgroups in x, y and z, each of `waves` waves of 64 lanes in x."""

    x: int
    y: int = 1
    z: int = 1
    waves: int = 1

    def groups(self) -> Iterator[tuple[int, int, int]]:
        """Every workgroup's (x, y, z), x fastest."""
        return ((x, y, z) for z in range(self.z) for y in range(self.y) for x in range(self.x))


@dataclass
class Execution:
    """What a launch did: wave instructions executed by opcode, and bytes that lanes moved by buffer."""

    program: str
    grid: Grid
    executed: Counter[str] = field(default_factory=Counter)
    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    widths: dict[str, set[int]] = field(default_factory=dict)
    """Bytes of a lane's loads, by buffer."""


def compile_instruction(instruction: Instruction, labels: dict[str, int]) -> Step | ControlFlow:
    """The function that executes an instruction. Raises `UnknownOpcode` for what is not implemented."""
    opcode = instruction.opcode
    if opcode.startswith("s_"):
        return compile_scalar(instruction, labels)
    if opcode.startswith("v_mfma_"):
        return compile_matrix(instruction)
    if opcode.startswith("v_pk_"):
        return compile_packed(instruction)
    if opcode.startswith("v_"):
        return compile_vector(instruction)
    if opcode.startswith("ds_"):
        return compile_shared(instruction)
    return compile_memory(instruction)


class Machine:
    """A program ready to run. Raises `UnknownOpcode`, naming all that it does not know, before anything runs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.code: list[Step | ControlFlow] = []
        unknown: list[str] = []
        for instruction in program.instructions:
            try:
                self.code.append(compile_instruction(instruction, program.labels))
            except (UnknownOpcode, KeyError, ValueError, IndexError) as error:
                unknown.append(f"{instruction.source} {error}".strip())
        if unknown:
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise UnknownOpcode(f"{program.name}: not implemented: {'; '.join(unknown[:8])}{more}")
        self._check_directives()

    def _check_directives(self) -> None:
        """The registers that a wave starts with are laid out for what Triton asks for; anything else is refused."""
        for name, expected in _DIRECTIVES.items():
            if self.program.directives.get(name, expected) != expected:
                raise UnknownOpcode(
                    f"{self.program.name}: .amdhsa_{name} {self.program.directives[name]} is not emulated"
                )
        if "next_free_vgpr" in self.program.directives:
            self._check_registers()
        saturates = any(i.opcode.startswith("s_setreg") and i.operands[-1] != "0" for i in self.program.instructions)
        halves = [i.text for i in self.program.instructions if _F16_ARITHMETIC.match(i.opcode)]
        if saturates and halves:
            raise UnknownOpcode(f"{self.program.name}: FP16_OVFL of {halves[0]} is not emulated")

    def _check_registers(self) -> None:
        """No instruction uses a register past those that the kernel asks for: they may be another wave's."""
        directives = self.program.directives
        vectors = min(directives["next_free_vgpr"], directives.get("accum_offset", 512))
        limits = {
            "v": vectors,
            "a": directives["next_free_vgpr"] - directives.get("accum_offset", vectors),
            "s": directives.get("next_free_sgpr", LAST_SCALAR),
        }
        for instruction in self.program.instructions:
            for text in instruction.operands:
                plain = strip_modifiers(text)[0]
                found = register(plain)
                if found is not None and _NUMBERED.match(plain):
                    index = found.index - (AGPR if plain[0] == "a" else 0)
                    if index + found.count > limits[plain[0]]:
                        raise OutOfBounds(
                            f"{self.program.name}: {instruction.text}: {plain} is past the {limits[plain[0]]} "
                            "registers that the kernel asks for"
                        )

    def run(
        self,
        grid: Grid,
        memory: Memory,
        *,
        kernarg: int = 0,
        lds_bytes: int = 0,
        limit: int = 5_000_000,
        prepare: Callable[[Waves], None] | None = None,
    ) -> Execution:
        """Execute every workgroup.

        Parameters
        ----------
        kernarg: address of the kernel's arguments, in a buffer of `memory`
        lds_bytes: a workgroup's LDS
        limit: instructions that a batch of waves may take before it counts as a loop that does not end
        prepare: changes the registers of a batch before it starts

        Raises
        ------
        Fault
            Names the kernel, workgroup, wave, instruction and source line.
        """
        if lds_bytes > LDS_BYTES:
            raise Fault(f"{self.program.name} wants {lds_bytes} bytes of LDS, a compute unit has {LDS_BYTES}")
        counts = np.zeros(len(self.code), np.int64)
        groups, done = grid.groups(), 0
        with np.errstate(all="ignore"):
            while batch := list(islice(groups, max(1, _BATCH_WAVES // grid.waves))):
                memory.groups = np.repeat(np.arange(done + 1, done + 1 + len(batch), dtype=np.int32), grid.waves)
                done += len(batch)
                lds = Lds(len(batch), lds_bytes, grid.waves)
                scratch = self.program.directives.get("private_segment_fixed_size", 0)
                waves = Waves(len(batch) * grid.waves, grid.waves, memory, lds, scratch)
                self._start(waves, batch, kernarg)
                if prepare is not None:
                    prepare(waves)
                _Batch(self, waves, batch, counts, limit).run()
        executed: Counter[str] = Counter()
        for instruction, count in zip(self.program.instructions, counts, strict=True):
            if count:
                executed[instruction.opcode] += int(count)
        return Execution(self.program.name, grid, executed, memory.loaded, memory.stored, memory.widths)

    def _start(self, waves: Waves, batch: list[tuple[int, int, int]], kernarg: int) -> None:
        """v0 is the lane's number in its workgroup; the kernarg address and the workgroup's ids are in scalars.

        Arguments that the chip may preload into registers are not: the code's first block loads them itself, for
        firmware that does not preload.
        """
        lane = np.arange(waves.group_waves)[:, None] * LANES + np.arange(LANES)
        waves.vector[0] = np.tile(lane, (len(batch), 1))
        waves.set_pair(0, np.full(waves.count, kernarg, np.uint64))
        n = self.program.directives.get("user_sgpr_count", 2)
        ids = np.repeat(np.array(batch, np.uint32), waves.group_waves, axis=0)
        for axis, name in enumerate("xyz"):
            if self.program.directives.get(f"system_sgpr_workgroup_id_{name}"):
                waves.scalar[n] = ids[:, axis]
                n += 1


class _Batch:
    """The program counters of a batch of waves.

    The waves at the lowest program counter run; the others wait for them. Compilers lay a divergent branch out so
    that its sides meet further on, so this brings waves back together.
    """

    def __init__(
        self,
        machine: Machine,
        waves: Waves,
        groups: list[tuple[int, int, int]],
        counts: NDArray[np.int64],
        limit: int,
    ) -> None:
        self.machine, self.waves, self.groups, self.counts, self.limit = machine, waves, groups, counts, limit
        self.counter = np.zeros(waves.count, np.int64)
        self.ended = np.zeros(waves.count, bool)
        self.waiting = np.zeros(waves.count, bool)
        self.parked = np.zeros(waves.count, bool)
        self.taken = 0
        self.jumps = 0

    def run(self) -> None:
        """Until every wave has ended."""
        while not self.ended.all():
            ready = ~(self.ended | self.waiting | self.parked)
            if not ready.any():
                self._release()
                continue
            pc = int(self.counter[ready].min())
            running = ready & (self.counter == pc)
            if self.jumps > _PATIENCE:  # they may loop until others have come further
                self.jumps = 0
                self.parked |= running
                continue
            later = self.counter[ready & (self.counter > pc)]
            self._straight(pc, running, int(later.min()) if later.size else len(self.machine.code))

    def _straight(self, pc: int, running: NDArray[np.bool_], stop: int) -> None:
        """Execute from `pc` until control flow, or until others wait at `stop`."""
        waves, code, start = self.waves, self.machine.code, pc
        if not np.array_equal(running, waves.running):
            waves.run(running)
        try:
            while pc < stop and not isinstance(step := code[pc], ControlFlow):
                step(waves)
                pc += 1
        except Fault as fault:
            raise self._located(fault, pc) from None
        active = int(running.sum())
        self.counts[start:pc] += active
        self.taken += pc - start + 1
        if self.taken > self.limit:
            raise self._located(Runaway(f"more than {self.limit} instructions"), pc)
        self.counter[running] = pc
        if pc < stop:
            self.counts[pc] += active
            self._control(step, pc, running)  # type: ignore[arg-type]
        elif pc == len(code):
            raise self._located(Fault("ran past the last instruction"), pc - 1)

    def _control(self, flow: ControlFlow, pc: int, running: NDArray[np.bool_]) -> None:
        self.counter[running] = pc + 1
        if flow.kind == "end":
            self.ended |= running
        elif flow.kind == "barrier":
            self.waiting |= running
        elif flow.taken is not None:
            self.jumps += flow.target <= pc
            self.counter[running & flow.taken(self.waves)] = flow.target

    def _release(self) -> None:
        """Let the workgroups pass of which every wave that has not ended waits at a barrier, and parked waves go on."""
        self.parked[:] = False
        shape = (len(self.groups), self.waves.group_waves)
        waiting, ended = self.waiting.reshape(shape), self.ended.reshape(shape)
        places = self.counter.reshape(shape)
        passing = waiting.any(axis=1) & (waiting | ended).all(axis=1)
        for group in np.nonzero(passing)[0]:
            at = set(places[group][waiting[group]].tolist())
            if len(at) > 1 or ended[group].any():
                where = ", ".join(sorted(self.machine.program.instructions[pc - 1].source or f"{pc - 1}" for pc in at))
                end = f", and {int(ended[group].sum())} waves have ended" if ended[group].any() else ""
                raise self._located(
                    DivergentBarrier(
                        f"waves of a workgroup wait at the barriers at {where}{end}", int(group) * shape[1]
                    ),
                    max(at) - 1,
                )
        self.waves.lds.barrier(np.asarray(passing))
        waiting[passing] = False

    def _located(self, fault: Fault, pc: int) -> Fault:
        """The same fault with its place before the message."""
        wave = fault.wave if fault.wave is not None else int(np.argmax(self.waves.running))
        group, number = divmod(wave, self.waves.group_waves)
        instruction = self.machine.program.instructions[pc]
        place = f"{self.machine.program.name}, workgroup {self.groups[group]}, wave {number}"
        source = f" ({instruction.source})" if instruction.source else ""
        return type(fault)(f"{place}, instruction {pc}: {instruction.text}{source}: {fault}", wave)
