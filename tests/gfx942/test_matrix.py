"""MFMA against AMD's formulas of which lane holds what, and what is known of its rounding."""

import re

import numpy as np
import pytest
import torch

from tests.gfx942.assembler import assemble
from tests.gfx942.matrix import OPCODES
from tests.gfx942.snippet import execute, get
from tests.gfx942.waves import LANES

TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fnuz,
         "bf8": torch.float8_e5m2fnuz}  # fmt: skip


def shape_of(opcode: str) -> tuple[int, int, list[str]]:
    """(M = N, K, element types of A and B)."""
    found = re.fullmatch(r"v_mfma_f32_(\d+)x\d+x(\d+)_(\w+)", opcode)
    assert found is not None
    kinds = found[3].split("_")
    return int(found[1]), int(found[2]), [kinds[0], kinds[-1]]


def bits(values: torch.Tensor) -> np.ndarray:
    return values.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[values.element_size()]).numpy()


def operand(values: torch.Tensor, kind: str) -> np.ndarray:
    """Registers uint64 [n, 64] that hold values [rows, K], by AMD's matrix instruction calculator.

    A[i, k] is in lane i + M·⌊k / k'⌋, with k' the elements of a lane, the (k mod k')-th of them from the low end.
    """
    rows, depth = values.shape
    each = rows * depth // LANES
    encoded = bits(values.to(TORCH[kind]))
    width = encoded.itemsize
    raw = np.zeros((LANES, each * width), np.uint8)
    for i in range(rows):
        for k in range(depth):
            lane = i + rows * (k // each)
            at = k % each * width
            raw[lane, at : at + width] = np.frombuffer(encoded[i, k].tobytes(), np.uint8)
    return raw.view(np.uint32).T.astype(np.uint64)


def place(i: int, j: int, size: int) -> tuple[int, int]:
    """(register, lane) of D[i, j]: of 16×16, lane 16·⌊i/4⌋ + j; of 32×32, rows of 4 alternate between the halves."""
    if size == 16:
        return i % 4, 16 * (i // 4) + j
    return 4 * (i // 8) + i % 4, 32 * (i // 4 % 2) + j


def run(opcode: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, agpr: bool = False) -> torch.Tensor:
    """D f32 of A [M, K], B [N, K] and C [M, N]."""
    size, _, kinds = shape_of(opcode)
    registers = {}
    for start, values, kind in ((100, a, kinds[0]), (110, b, kinds[1])):
        for i, row in enumerate(operand(values, kind)):
            registers[f"v{start + i}"] = row
    count = size * size // LANES
    file = "a" if agpr else "v"
    words = np.zeros((count, LANES), np.uint64)
    for i in range(size):
        for j in range(size):
            words[place(i, j, size)] = np.float32(c[i, j]).view(np.uint32)
    registers |= {f"{file}{r}": words[r] for r in range(count)}
    width = operand(a, kinds[0]).shape[0]
    last = lambda start: f"v[{start}:{start + width - 1}]" if width > 1 else f"v{start}"  # noqa: E731
    text = f"{opcode} {file}[0:{count - 1}], {last(100)}, {last(110)}, {file}[0:{count - 1}]"
    assemble([text])
    state = execute(text, {**registers, "exec": 0})  # MFMA ignores exec
    out = torch.empty(size, size)
    for i in range(size):
        for j in range(size):
            r, lane = place(i, j, size)
            out[i, j] = float(get(state, f"{file}{r}").astype(np.uint32)[0, lane : lane + 1].view(np.float32)[0])
    return out


@pytest.mark.parametrize("opcode", sorted(OPCODES))
def test_a_product_of_small_integers_is_exact(opcode: str) -> None:
    """Every element differs from its neighbours, so a wrong lane, register or k shows."""
    size, depth, _ = shape_of(opcode)
    generator = torch.Generator().manual_seed(size * depth)
    a, b, c = (
        torch.randint(-7, 8, s, generator=generator).float() for s in ((size, depth), (size, depth), (size, size))
    )
    torch.testing.assert_close(run(opcode, a, b, c), c + a @ b.T, rtol=0, atol=0)


def test_the_accumulation_registers_work_as_the_vector_ones() -> None:
    a, b, c = torch.eye(16), torch.arange(256.0).reshape(16, 16) % 64, torch.ones(16, 16)
    torch.testing.assert_close(run("v_mfma_f32_16x16x16_bf16", a, b, c, agpr=True), b.T + 1, rtol=0, atol=0)


@pytest.mark.parametrize(("opcode", "group"), [("v_mfma_f32_16x16x16_bf16", 8), ("v_mfma_f32_16x16x32_fp8_fp8", 16)])
def test_the_sum_is_rounded_to_f32_once_a_group(opcode: str, group: int) -> None:
    """2^24 + 1 + 1: a group's two ones reach the accumulator together, those of two groups are each lost."""
    depth = shape_of(opcode)[1]
    b = torch.ones(16, depth)
    c = torch.full((16, 16), 2.0**24)
    together, apart = torch.zeros(16, depth), torch.zeros(16, depth)
    together[:, :2] = 1
    apart[:, [0, group]] = 1
    assert run(opcode, together, b, c).unique().tolist() == [2.0**24 + 2]
    assert run(opcode, apart, b, c).unique().tolist() == [2.0**24]


def test_f32_products_are_added_one_at_a_time() -> None:
    a = torch.zeros(16, 4)
    a[:, :2] = 1
    got = run("v_mfma_f32_16x16x4_f32", a, torch.ones(16, 4), torch.full((16, 16), 2.0**24))
    assert got.unique().tolist() == [2.0**24]


def test_denormals_are_kept() -> None:
    a, b = torch.zeros(16, 16), torch.ones(16, 16)
    a[:, 3] = 2.0**-130
    assert run("v_mfma_f32_16x16x16_bf16", a, b, torch.zeros(16, 16)).unique().tolist() == [2.0**-130]


def test_a_nan_or_infinity_reaches_its_row_only() -> None:
    a, b = torch.ones(16, 32), torch.ones(16, 32)
    a[5, 9] = float("nan")
    got = run("v_mfma_f32_16x16x32_fp8_fp8", a, b, torch.zeros(16, 16))
    assert got.isnan().all(1).tolist() == [i == 5 for i in range(16)]
    assert got[0].unique().tolist() == [32.0]


def test_a_constant_accumulator_starts_from_it() -> None:
    ones = torch.ones(16, 16)
    registers = {f"v{s + i}": row for s in (100, 110) for i, row in enumerate(operand(ones, "bf16"))}
    state = execute("v_mfma_f32_16x16x16_bf16 v[0:3], v[100:101], v[110:111], 2.0", registers)
    assert set(get(state, "v3").astype(np.uint32).view(np.float32).ravel()) == {18.0}
