"""The passes over memory as kernels against their twins in torch, bit by bit where both round alike."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ep.activation import swiglu_halves
from moe_ep.comm.wire import Payload, RowFormat
from moe_ep.layer import add_columns
from moe_ep.spec import TopKOutput
from tests.moe_ep.ways import Way, call

WAYS: list[Any] = ["interpreter", "gfx942"]
if torch.cuda.is_available():
    WAYS.append("cuda")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


@pytest.fixture
def device(way: Way) -> torch.device:
    return torch.device("cuda" if way == "cuda" else "cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 4


def swiglu(*args: Any) -> Tensor:
    from moe_ep import passes  # where kernels are interpreted, which is decided when they are imported

    return passes.swiglu(*args)


def added(total: Tensor, other: Tensor | None, shared: Tensor | None, out: Tensor, first: int) -> Tensor:
    from moe_ep import passes

    passes.add(total, other, shared, out, first)
    return out


def packed(x: Tensor, ids: Tensor, weights: Tensor, rows: Tensor, ids_at: int, fp8: bool) -> Tensor:
    from moe_ep import passes

    passes.pack(x, ids, weights, rows, ids_at, fp8=fp8)
    return rows


def unpacked(rows: Tensor, x: Tensor, ids: Tensor, weights: Tensor, ids_at: int, fp8: bool) -> tuple[Tensor, ...]:
    from moe_ep import passes

    passes.unpack(rows, x, ids, weights, ids_at, fp8=fp8)
    return x, ids, weights


@pytest.mark.parametrize("limit", [10.0, None])
@pytest.mark.parametrize(("tokens", "inner"), [(0, 128), (3, 96), (2, 1280)])
def test_the_activation(way: Way, tokens: int, inner: int, limit: float | None, device: torch.device) -> None:
    gate_up = normal(tokens, 2 * inner).bfloat16()
    if tokens:
        gate_up[1, :4] = torch.tensor([100.0, -100.0, float("nan"), float("inf")])
        gate_up[1, inner : inner + 4] = torch.tensor([-100.0, 100.0, 1.0, float("nan")])
    got, expected = call(way, swiglu, gate_up.to(device), limit).cpu(), swiglu_halves(gate_up, limit)
    assert torch.equal(got.isnan(), expected.isnan())
    # An exponential in f32 is not the same everywhere, so a result may round to the next bf16.
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("with_other", "with_shared"), [(False, True), (False, False), (True, True), (True, False)])
@pytest.mark.parametrize(("tokens", "hidden", "parts"), [(0, 128, 1), (3, 96, 1), (2, 2560, 2)])
def test_the_sum_with_the_shared_expert(
    way: Way,
    tokens: int,
    hidden: int,
    parts: int,
    with_other: bool,
    with_shared: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    width = hidden // parts
    shared = normal(tokens, hidden, seed=1).bfloat16() if with_shared else None
    got, expected = (torch.full((tokens, hidden), -1.0).bfloat16() for _ in range(2))
    for part in range(parts):
        total = normal(tokens, width, seed=2 + part).to(dtype)
        other = normal(tokens, width, seed=4 + part).to(dtype) if with_other else None
        add_columns(total, shared, expected, part * width, other)
        summands = [None if one is None else one.to(device) for one in (total, other, shared)]
        got = call(way, added, *summands, got.to(device), part * width).cpu()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("payload", ["bf16", "fp8"])
@pytest.mark.parametrize(("tokens", "hidden", "top_k"), [(0, 128, 2), (3, 160, 6), (2, 1152, 1)])
def test_rows_on_the_wire(
    way: Way, tokens: int, hidden: int, top_k: int, payload: Payload, device: torch.device
) -> None:
    x = normal(tokens, hidden).bfloat16()
    if tokens:
        scales = torch.tensor([2.0**-40, 2.0**-3, 1.0, 2.0**20, 0.0]).repeat_interleave(32)
        x[0, :160] *= scales.bfloat16()
        x[1, :2] = torch.tensor([float("inf"), 470.0])  # beside infinity nothing is scaled
        x[1, 130] = float("nan")
    ids = torch.arange(tokens * top_k).view(tokens, top_k).int() - 1
    weights = normal(tokens, top_k, seed=1)
    row = RowFormat(hidden, top_k, payload)
    expected = row.pack(x, TopKOutput(weights, ids, None))
    rows, fp8 = torch.full_like(expected, 255), payload == "fp8"
    got = call(way, packed, *(t.to(device) for t in (x, ids, weights, rows)), row.ids_at, fp8).cpu()
    assert torch.equal(got, expected)
    blank = (torch.empty_like(x), torch.empty_like(ids), torch.empty_like(weights))
    found = call(way, unpacked, got.to(device), *(t.to(device) for t in blank), row.ids_at, fp8)
    state, topk = row.unpack(expected)
    for one, wanted in zip(found, (state, topk.topk_ids, topk.topk_weights), strict=True):
        torch.testing.assert_close(one.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
