"""Triton's interpreter, mended, against torch's arithmetic on the same short floats."""

from collections.abc import Callable
from inspect import getattr_static
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import moe_ep.kernels  # noqa: F401  # mends the interpreter, where Triton interprets
from tests.moe_ep.ways import call

SHORT = [torch.bfloat16, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e4m3fn, torch.float8_e5m2]
_COUNT = 1 << 16


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, y_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    if OP == "add":
        y = a + b
    elif OP == "sub":
        y = a - b
    elif OP == "mul":
        y = a * b
    elif OP == "less":
        y = tl.where(a < b, a, b)
    elif OP == "max":
        y = tl.maximum(a, b)
    elif OP == "neg":
        y = -a
    tl.store(y_ptr + i, y)


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(y_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i)))


@triton.jit
def loop_kernel(n_ptr, y_ptr):
    total = 0
    for i in range(tl.load(n_ptr)):
        total += i
    tl.store(y_ptr, total)


@triton.jit
def sums_kernel(x_ptr, y_ptr):
    i = tl.arange(0, 16)
    for row in range(16):
        tl.store(y_ptr + row, tl.sum(tl.load(x_ptr + row * 16 + i)))  # a device function of Triton's own


def _all_bf16() -> torch.Tensor:
    return torch.arange(_COUNT, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def _hard_f32() -> torch.Tensor:
    """Around every bfloat16, a little below a tie, at it and above, so that each way of rounding shows."""
    high = torch.arange(0, _COUNT, dtype=torch.int64) << 16
    low = torch.tensor([0x7FFF, 0x8000, 0x8001, 0]).repeat(_COUNT // 4)
    return (high | low).to(torch.uint32).view(torch.float32)


def _launch(kernel: str, tensors: list[torch.Tensor], y: torch.Tensor, **options: Any) -> torch.Tensor:
    globals()[kernel][(1,)](*tensors, y, **options)
    return y


def interpret(kernel: str, tensors: list[torch.Tensor], y: torch.Tensor, **options: Any) -> torch.Tensor:
    """Run a kernel of this file in a process whose Triton interprets."""
    out: torch.Tensor = call("interpreter", _launch, kernel, tensors, y, **options)
    return out


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_f32_rounds_to_a_short_float_as_torch_does(dtype: torch.dtype) -> None:
    x = _hard_f32()
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)  # past that, saturation is the compiler's choice
    same(interpret("cast_kernel", [x], torch.empty(_COUNT, dtype=dtype), BLOCK=_COUNT), x.to(dtype))


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_code_of_a_short_float_widens_to_its_value(dtype: torch.dtype, to: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else _all_bf16()
    same(interpret("cast_kernel", [codes], torch.empty(codes.numel(), dtype=to), BLOCK=codes.numel()), codes.to(to))


def test_integers_become_bfloat16_by_their_value() -> None:
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    same(interpret("cast_kernel", [x], torch.empty(_COUNT, dtype=torch.bfloat16), BLOCK=_COUNT), x.bfloat16())


OPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "less": lambda a, b: torch.where(a < b, a, b),
    "max": torch.maximum,
    "neg": lambda a, b: -a,
}


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_arithmetic_is_torchs(op: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = _all_bf16(), _all_bf16()[torch.randperm(_COUNT, generator=generator)]
    got = interpret("arithmetic_kernel", [a, b], torch.empty_like(a), OP=op, BLOCK=_COUNT)
    numbers = ~(a.isnan() | b.isnan()) if op == "max" else slice(None)  # which operand wins over a NaN is left open
    same(got[numbers], OPS[op](a.float(), b.float()).bfloat16()[numbers])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float16], ids=str
)
def test_a_dot_multiplies_values_not_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    got = interpret("dot_kernel", [a, b], torch.empty(16, 16))
    torch.testing.assert_close(got, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_a_loop_may_run_as_often_as_a_tensor_says() -> None:
    got = interpret("loop_kernel", [torch.tensor([7], dtype=torch.int32)], torch.zeros(1, dtype=torch.int32))
    assert got.item() == 21


def _launch_and_look() -> tuple[torch.Tensor, list[str], list[str]]:
    """The sums of rows, what of the language is not as it was before, and the parts of it that were looked through."""
    seen: list[str] = []

    def patch(part: Any, *args: Any) -> None:
        seen.append(part.__name__)
        original(part, *args)

    def names() -> dict[tuple[str, str], Any]:
        owners = (tl, tl.math, tl.core, tl.core.tensor, tl.core.dtype)
        listed = ((owner, name) for owner in owners for name in dir(owner) if name != "__annotations__")
        return {(owner.__name__, name): getattr_static(owner, name) for owner, name in listed}

    with pytest.MonkeyPatch.context() as patched:
        original = interpreter._patch_builtin
        patched.setattr(interpreter, "_patch_builtin", patch)
        before = names()
        sums = torch.empty(16)
        sums_kernel[(4,)](torch.arange(256.0), sums)
        after = names()
    assert before.keys() == after.keys()
    return sums, [name for (owner, name) in before if before[owner, name] is not after[owner, name]], seen


def test_a_launch_looks_through_the_language_once_and_leaves_it_as_it_was() -> None:
    sums, changed, seen = call("interpreter", _launch_and_look)
    same(sums, torch.arange(256.0).view(16, 16).sum(dim=1))
    assert changed == []
    assert seen.count(tl.math.__name__) == 1
