"""MFMA: a wave's matrix product, D[M, N] = A[M, K]·B[K, N] + C, on registers spread over its 64 lanes.

Where an element lives, by AMD's matrix instruction calculator, for the instructions with one block:
    A[i, k]  lane i + M·(k ÷ k'), the k mod k'-th element of its registers, with k' = K·M/64; B[k, j] likewise with j
    D[i, j]  lane j + N·((i ÷ 4) mod (64/N)), register i mod 4 + 4·(i ÷ (4·64/N))

AMD does not document how the sum over k is rounded. What is known was measured: Xie et al., "Bit-Accurate Modeling of
GPU Matrix Multiply-Accumulate Units" (arXiv 2511.10909), find that CDNA3 adds up groups of 8 products (f16, bf16; 16
for fp8) before it adds the group to the accumulator and rounds once to f32, to nearest even, and that it keeps
denormals. So it is done here. They also find that within a group the products are aligned to the largest and cut off
24 bits below it, and the accumulator 24 bits below the larger of the two; that is not emulated: a group's sum is exact
here, and differs from the chip's by at most a few units of 2^-24 of its largest product. f32 is one product at a time.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.assembly import Instruction
from tests.gfx942.faults import UnknownOpcode
from tests.gfx942.formats import BF8, FP8, bf16_to_f32
from tests.gfx942.operands import constant, destination, register
from tests.gfx942.waves import LANES, Waves

Step = Callable[[Waves], None]
Array = NDArray[Any]

_NAME = re.compile(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_?(\w+)$")
_ELEMENTS: dict[str, Callable[[Array], Array]] = {
    "f32": lambda words: words.view(np.float32),
    "f16": lambda words: words.view(np.float16),
    "bf16": lambda words: bf16_to_f32(words.view(np.uint16)),
    "fp8": lambda words: FP8[words.view(np.uint8)],
    "bf8": lambda words: BF8[words.view(np.uint8)],
}
"""uint32 [W, 64, registers] → values [W, 64, k']."""
_GROUP = {"f32": 1, "f16": 8, "bf16": 8, "fp8": 16, "bf8": 16}

OPCODES = {
    f"v_mfma_f32_{size}_{kind}"
    for size, kinds in {
        "16x16x4": ("f32",), "32x32x2": ("f32",),
        "16x16x16": ("f16", "bf16"), "32x32x8": ("f16", "bf16"),
        "16x16x32": ("fp8_fp8", "fp8_bf8", "bf8_fp8", "bf8_bf8"),
        "32x32x16": ("fp8_fp8", "fp8_bf8", "bf8_fp8", "bf8_bf8"),
    }.items()
    for kind in kinds
}  # fmt: skip
"""The one-block instructions that Triton emits for gfx942."""


def compile_matrix(instruction: Instruction) -> Step:
    """Raises `UnknownOpcode` for what is not implemented, the cbsz, abid and blgp modifiers among it."""
    if instruction.base not in OPCODES or instruction.modifiers:
        raise UnknownOpcode(instruction.text)
    name = _NAME.match(instruction.base)
    assert name is not None
    rows, _, depth = (int(name[i]) for i in (1, 2, 3))
    kinds = name[4].split("_")
    target, *sources = instruction.operands
    n = destination(target)
    a = _fragment(sources[0], kinds[0], rows, depth)
    b = _fragment(sources[1], kinds[-1], rows, depth)
    registers = rows * rows // LANES
    c = _accumulator(sources[2], registers)
    row, column = accumulator_map(rows)
    group = _GROUP[kinds[0]]

    def step(waves: Waves) -> None:
        left, right = a(waves).astype(np.float64), b(waves).astype(np.float64)
        total = c(waves)
        for k in range(0, depth, group):
            product = np.matmul(left[:, :, k : k + group], right[:, :, k : k + group].transpose(0, 2, 1))
            total = (product[:, row, column] + total).astype(np.float32)
        # EXEC is ignored: all lanes take part and all are written.
        bits = total.transpose(1, 0, 2).view(np.uint32)
        np.copyto(waves.vector[n : n + registers], bits, where=waves.running[None, :, None])

    return step


def accumulator_map(size: int) -> tuple[Array, Array]:
    """(row, column) of D for each register and lane, int [size²/64, 64]."""
    register_index, lane = np.arange(size * size // LANES)[:, None], np.arange(LANES)[None]
    groups = LANES // size
    row = 4 * groups * (register_index // 4) + 4 * (lane // size) + register_index % 4
    return row, np.broadcast_to(lane % size, row.shape)


def _fragment(text: str, kind: str, rows: int, depth: int) -> Callable[[Waves], Array]:
    """Values [W, rows, depth] of A, or of B transposed: both lie in registers the same way."""
    found = register(text)
    if found is None or found.scalar:
        raise UnknownOpcode(f"{text} is no vector register of a matrix")
    n, count, each = found.index, found.count, depth * rows // LANES

    def read(waves: Waves) -> Array:
        words = np.ascontiguousarray(waves.vector[n : n + count].transpose(1, 2, 0))
        values = _ELEMENTS[kind](words).reshape(waves.count, LANES // rows, rows, each)
        return values.transpose(0, 2, 1, 3).reshape(waves.count, rows, depth)

    return read


def _accumulator(text: str, registers: int) -> Callable[[Waves], Array]:
    """f32 that broadcasts to [W, registers, 64]."""
    found = register(text)
    if found is None:
        value = np.array(constant(text, "f32"), np.uint32).view(np.float32)
        return lambda waves: value
    n = found.index
    return lambda waves: waves.vector[n : n + registers].view(np.float32).transpose(1, 0, 2)
