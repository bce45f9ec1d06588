"""Triton and Gluon kernels on the emulated chip, launched on CPU tensors as on the chip, against torch."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import triton

from tests.gfx942 import kernels
from tests.gfx942.assembly import Program, parse_instruction
from tests.gfx942.driver import emulated
from tests.gfx942.faults import Fault, LdsRace, OutOfBounds, ReadOnly, Runaway


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_warps", [1, 4, 16])
def test_a_softmax_reduces_over_lanes_and_waves(dtype: torch.dtype, num_warps: int) -> None:
    x = (randn(3, 1000) * 4).to(dtype)
    y = torch.empty_like(x)
    with emulated():
        kernels.softmax[(3,)](x, y, 1000, BLOCK=1024, num_warps=num_warps)
    torch.testing.assert_close(y, x.float().softmax(-1).to(dtype))


def test_sorting_scans_atomics_and_histograms() -> None:
    x = torch.randint(0, 256, (256,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ordered, sums, histogram = (torch.empty_like(x) for _ in range(3))
    counts = torch.zeros(8, dtype=torch.int32)
    with emulated():
        kernels.sort_and_count[(1,)](x, ordered, sums, counts, histogram, BLOCK=256)
    assert torch.equal(ordered, x.sort().values)
    assert torch.equal(sums, x.cumsum(0).int())
    assert torch.equal(counts, torch.bincount(x & 7, minlength=8).int())
    assert torch.equal(histogram, torch.bincount(x, minlength=256).int())


def test_rows_quantised_to_fnuz_fp8() -> None:
    x = (randn(8, 128) * torch.logspace(-6, 6, 8)[:, None]).bfloat16()
    y, scale = torch.empty(8, 128, dtype=torch.float8_e4m3fnuz), torch.empty(8)
    with emulated():
        kernels.quantise_rows[(8,)](x, y, scale, BLOCK=128)
    expected = torch.exp2(torch.ceil(torch.log2(x.float().abs().amax(1) / 240)))
    torch.testing.assert_close(scale, expected, rtol=0, atol=0)
    assert torch.equal(y.view(torch.uint8), (x.float() / expected[:, None]).to(torch.float8_e4m3fnuz).view(torch.uint8))


def test_integer_division_and_64_bits() -> None:
    x = torch.randint(-(2**20), 2**20, (256,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    y = torch.empty_like(x)
    with emulated():
        kernels.integers[(1,)](x, y, BLOCK=256)
    wide = x.long() * x * 1234567 + torch.arange(256)
    quotient, remainder = x.div(7, rounding_mode="trunc"), x.fmod(13)  # as C divides
    assert torch.equal(y, quotient + remainder + wide.div(1000003, rounding_mode="trunc").int())


@pytest.mark.parametrize("tile", [(16, 64, 64, 4), (32, 32, 32, 2), (128, 128, 64, 8)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float32], ids=str
)
def test_a_matrix_product_of_every_type(dtype: torch.dtype, tile: tuple[int, int, int, int]) -> None:
    block_m, block_n, block_k, num_warps = tile
    if dtype == torch.float32 and block_m == 128:
        pytest.skip("an f32 tile of this size has more LDS than a compute unit")
    a, b = (randn(2 * rows, 128, seed=rows).to(dtype) for rows in (block_m, block_n))
    c = torch.empty(2 * block_m, 2 * block_n)
    with emulated() as chip:
        kernels.matmul[(2, 2)](
            a, b, c, 2 * block_n, 128, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps
        )
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-5, atol=1e-4)
    did = chip.launches[0].execution
    assert did is not None
    assert any(opcode.startswith("v_mfma") for opcode in did.executed)


def gluon_product() -> tuple[torch.Tensor, torch.Tensor]:
    a, b, c = randn(32, 96).bfloat16(), randn(64, 96, seed=1).bfloat16(), torch.empty(32, 64)
    kernels.gluon_matmul[(1,)](a, b, c, K=96, num_warps=4)
    return c, a.float() @ b.float().T


def test_a_gluon_kernel_runs() -> None:
    with emulated():
        torch.testing.assert_close(*gluon_product(), rtol=1e-5, atol=1e-4)


def without(opcode: str) -> Callable[[Program], Program]:
    """The program with every such instruction replaced by one that does nothing."""

    def rewrite(program: Program) -> Program:
        nothing = parse_instruction("s_nop 0")
        return replace(program, instructions=tuple(nothing if i.opcode == opcode else i for i in program.instructions))

    return rewrite


def test_machine_code_without_its_barriers_races() -> None:
    with emulated() as chip:
        chip.rewrite = without("s_barrier")
        with pytest.raises(LdsRace, match=r"^gluon_matmul, workgroup \(0, 0, 0\), wave .*kernels.py:\d+"):
            gluon_product()


def test_an_access_past_a_tensors_end_names_the_argument_and_the_line() -> None:
    x, y = torch.zeros(1000), torch.zeros(990)
    with (
        emulated(),
        pytest.raises(OutOfBounds, match=r"^copy, workgroup .*\(kernels.py:\d+\).*y_ptr: byte 3960 of 3960"),
    ):
        kernels.copy[(4,)](x, y, 1000, BLOCK=256)


def test_a_view_does_not_open_the_storage_around_it() -> None:
    x = torch.zeros(2000)
    with emulated(), pytest.raises(OutOfBounds, match="x_ptr: byte 4000 of 4000"):
        kernels.copy[(4,)](x[:1000], torch.zeros(1024), 1024, BLOCK=256)


def test_a_protected_tensor_may_be_read_but_not_written() -> None:
    x, y = torch.arange(1000.0), torch.zeros(1000)
    with emulated() as chip:
        chip.protect(x)
        kernels.copy[(4,)](x, y, 1000, BLOCK=256)
        assert torch.equal(x, y)
        for target in (x, x[10:]):
            with pytest.raises(ReadOnly, match="store to y_ptr"):
                kernels.copy[(1,)](y, target, 900, BLOCK=1024)


def test_a_kernel_that_never_ends_is_stopped() -> None:
    with emulated() as chip:
        chip.limit = 10_000
        with pytest.raises(Runaway, match=r"wait_for_ever, .* more than 10000 instructions"):
            kernels.wait_for_ever[(1,)](torch.zeros(1, dtype=torch.int32))


def test_what_a_launch_did_is_counted() -> None:
    x, y = torch.zeros(1000), torch.zeros(1000)
    with emulated() as chip:
        kernels.copy[(4,)](x, y, 1000, BLOCK=256, num_warps=4)
    (launch,) = chip.launches
    did = launch.execution
    assert did is not None
    assert (launch.program.name, launch.constants, did.grid.x, did.grid.waves) == ("copy", {"BLOCK": 256}, 4, 4)
    assert did.loaded["x_ptr"] == did.stored["y_ptr"] == 4000
    assert did.executed["s_endpgm"] == 16


def test_a_chip_that_only_compiles_touches_no_memory() -> None:
    x, y = torch.ones(1000), torch.zeros(1000)
    with emulated() as chip:
        chip.executes = False
        kernels.copy[(4,)](x, y, 1000, BLOCK=256)
    assert not y.any()
    assert chip.launches[0].execution is None


def test_the_device_before_is_back_after() -> None:
    before = triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), emulated():
        raise ZeroDivisionError
    assert triton.runtime.driver._active is before


def test_a_tensor_that_is_not_on_the_cpu_is_refused() -> None:
    with emulated(), pytest.raises(Fault, match="x_ptr is on meta"):
        kernels.copy[(1,)](torch.zeros(8, device="meta"), torch.zeros(8), 8, BLOCK=256)
