"""Counted cost of a kernel on gfx942, and the bounds that the chip's rates set on it. No timing: nothing is timed.

    valu lane-ops / weight = executed VALU wave instructions × 64 / weights touched
    mfma flops             = Σ executed MFMA × 2·M·N·K

Bounds, of a whole MI300A with every compute unit busy and nothing else in the way:

    valu  = VALU wave instructions / (CUs × clock)        one is issued a cycle and compute unit
    mfma  = Σ MFMA × cycles / (SIMDs × clock)             16×16×16 bf16 and 16×16×32 fp8 take a SIMD 16 cycles
    hbm   = distinct bytes / bandwidth                    each weight, scale, token and result once

Assumed: 228 CUs of 4 SIMDs at 2.1 GHz, 5.3 TB/s (AMD's data sheet of the MI300A); a VALU instruction of 64 lanes
occupies a SIMD of 16 lanes for 4 cycles, and there are 4; a packed f32 instruction counts as one. Left out: waits,
hazards, bank conflicts, caches, launches, and what overlaps with what. The largest bound says what binds at best.
"""

import re
from collections import Counter
from dataclasses import dataclass

from tests.gfx942.compiled import classes

COMPUTE_UNITS, SIMDS, CLOCK, BANDWIDTH = 228, 4, 2.1e9, 5.3e12
_MFMA = re.compile(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_?(\w+?)(?:_e64)?$")
_FLOPS_A_CYCLE = {"f32": 64 * 2, "f16": 512, "bf16": 512, "fp8": 1024, "bf8": 1024}
"""Of one SIMD: 980.6 TFLOP/s of bf16 are 228 × 4 × 512 × 2.1e9, and fp8 has twice that."""


@dataclass(frozen=True)
class Cost:
    """Executed wave instructions by class, and what they are for."""

    valu: int
    mfma: int
    lds: int
    vmem: int
    scalar: int
    mfma_cycles: int
    weights: int
    bytes: int

    @property
    def valu_per_weight(self) -> float:
        """VALU lane operations for each weight that is used."""
        return self.valu * 64 / self.weights

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds below which each unit cannot go."""
        return {
            "valu": self.valu / (COMPUTE_UNITS * CLOCK),
            "mfma": self.mfma_cycles / (COMPUTE_UNITS * SIMDS * CLOCK),
            "hbm": self.bytes / BANDWIDTH,
        }


def mfma_cycles(opcode: str) -> int:
    """Cycles that a matrix instruction occupies its SIMD."""
    found = _MFMA.match(opcode)
    if found is None:
        raise ValueError(f"{opcode} is no matrix instruction that is known")
    m, n, k = (int(found[i]) for i in (1, 2, 3))
    return 2 * m * n * k // _FLOPS_A_CYCLE[found[4].split("_")[0]]


def cost(executed: Counter[str], *, weights: int, distinct_bytes: int) -> Cost:
    """The cost of what was executed on `weights` weights and `distinct_bytes` bytes of device memory."""
    counts = classes(executed)
    return Cost(
        valu=counts["valu"],
        mfma=counts["mfma"],
        lds=counts["lds"],
        vmem=counts["vmem"],
        scalar=counts["scalar"],
        mfma_cycles=sum(mfma_cycles(op) * n for op, n in executed.items() if op.startswith("v_mfma_")),
        weights=weights,
        bytes=distinct_bytes,
    )
