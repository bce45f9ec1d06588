"""What the compiler made of a kernel: registers, spills, LDS, occupancy, matrix instructions, and access widths."""

import re
from collections import Counter
from dataclasses import dataclass

from tests.gfx942.assembly import Instruction, Program
from tests.gfx942.driver import Launch
from tests.gfx942.transfer import SIZES

VECTOR_REGISTERS = 512  # a lane's of one SIMD, shared by its waves; vector and accumulation registers together
SCALAR_REGISTERS = 800  # of one SIMD
MOST_WAVES = 8  # on one SIMD
SIMDS = 4  # of a compute unit
LDS_BYTES = 65536  # of a compute unit

_ACCESS = re.compile(r"(buffer|global|flat)_(load|store)_(\w+?)(_d16)?(_hi)?$")


@dataclass(frozen=True)
class Resources:
    """Registers are a lane's, spills are registers, bytes are a workgroup's of LDS and a lane's of scratch.

    `occupancy` is in waves of a SIMD. `loads` and `stores` count static accesses to device memory by bytes of a lane,
    and `loop_loads` those within a loop.
    """

    vgpr: int
    agpr: int
    sgpr: int
    spills: int
    scratch: int
    lds: int
    occupancy: int
    mfma: dict[str, int]
    loads: dict[int, int]
    loop_loads: dict[int, int]
    stores: dict[int, int]


def occupancy(vgpr: int, agpr: int, sgpr: int, lds: int, waves: int) -> int:
    """Waves that a SIMD holds of a kernel whose workgroups have `waves` of them.

    CDNA3 allocates vector registers by 8, with the accumulation registers behind the vector ones, which end at a
    multiple of 4; scalar registers by 16. Workgroups are placed whole, so LDS bounds their number on a compute unit.
    """
    vector = -(-(-(-vgpr // 4) * 4 + agpr) // 8) * 8
    by_vector = VECTOR_REGISTERS // max(vector, 8)
    by_scalar = SCALAR_REGISTERS // max(-(-sgpr // 16) * 16, 16)
    on_a_simd = min(MOST_WAVES, by_vector, by_scalar)
    # A workgroup's waves are spread over the SIMDs; what fits by registers, in workgroups:
    groups = on_a_simd * SIMDS // waves
    if lds:
        groups = min(groups, LDS_BYTES // lds)
    return groups * waves // SIMDS if waves >= SIMDS else min(on_a_simd, -(-groups * waves // SIMDS))


def resources(launch: Launch) -> Resources:
    """Of a launched kernel, from the metadata and the text of its assembly."""
    program, metadata = launch.program, launch.program.metadata
    # The metadata's vgpr_count has the accumulation registers in it.
    agpr = metadata[".agpr_count"]
    vgpr = metadata[".vgpr_count"] - agpr
    sgpr = metadata[".sgpr_count"]
    loops = _in_loops(program)
    return Resources(
        vgpr=vgpr,
        agpr=agpr,
        sgpr=sgpr,
        spills=metadata[".vgpr_spill_count"] + metadata[".sgpr_spill_count"],
        scratch=metadata[".private_segment_fixed_size"],
        lds=launch.lds_bytes,
        occupancy=occupancy(vgpr, agpr, sgpr, launch.lds_bytes, launch.num_warps),
        mfma=dict(Counter(i.base.removeprefix("v_mfma_") for i in program.instructions if "_mfma_" in i.opcode)),
        loads=_widths(program.instructions, "load"),
        loop_loads=_widths([i for i, inside in zip(program.instructions, loops, strict=True) if inside], "load"),
        stores=_widths(program.instructions, "store"),
    )


def _widths(instructions: tuple[Instruction, ...] | list[Instruction], way: str) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for instruction in instructions:
        found = _ACCESS.match(instruction.opcode)
        if found and found[2] == way:
            counts[SIZES[found[3]][0]] += 1
    return dict(sorted(counts.items()))


def _in_loops(program: Program) -> list[bool]:
    """Whether each instruction lies between the target of a backward branch and the branch."""
    inside = [False] * len(program.instructions)
    for end, instruction in enumerate(program.instructions):
        target = program.labels.get(instruction.operands[0]) if "branch" in instruction.opcode else None
        if target is not None and target <= end:
            inside[target : end + 1] = [True] * (end + 1 - target)
    return inside


def instruction_class(opcode: str) -> str:
    """mfma, valu, lds, vmem or scalar: the unit that an instruction is issued to."""
    if opcode.startswith("v_mfma_"):
        return "mfma"
    if opcode.startswith("v_"):
        return "valu"
    if opcode.startswith("ds_"):
        return "lds"
    return "scalar" if opcode.startswith("s_") else "vmem"


def classes(executed: Counter[str]) -> Counter[str]:
    """Executed wave instructions by class."""
    out: Counter[str] = Counter()
    for opcode, count in executed.items():
        out[instruction_class(opcode)] += count
    return out
