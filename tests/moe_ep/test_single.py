"""The kernel that makes an op of a handful of tokens in one launch: its programs wait for each other by atomics.

It is compiled for gfx942 and executed by the emulated chip, whose workgroups run side by side, so that they do wait;
tables name it for NVIDIA's GPUs, where `test_kernels` runs it too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_ep import fused_moe_mxfp4, workspace
from moe_ep.backends.call import using
from moe_ep.backends.op import op_of
from moe_ep.fused import fused_moe_mxfp4_by_columns
from moe_ep.kernels.launch import Gemm, LaunchConfig, fit
from tests.gfx942.driver import Chip, emulated
from tests.moe_ep.experts import Experts, Tokens, _partial, by_formula, make_experts, make_tokens, relative_error

CPU = torch.device("cpu")
HIDDEN, INNER = 512, 256
HELD = [0, 1, 3]
"""Experts of four that are local."""


def config(gemm: Gemm) -> LaunchConfig:
    fitted = fit(LaunchConfig("single", 16, gemm, gemm), HIDDEN, INNER)
    assert fitted is not None
    return fitted


CONFIG = config(Gemm(16, 2, 1, slices=2))


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters that no failed op has left."""
    monkeypatch.setattr(workspace, "_counters", {})
    op_of.cache_clear()


@contextmanager
def chip() -> Iterator[Chip]:
    with emulated() as found:
        found.shares_memory = True  # programs read what others made, after they have waited for it
        yield found


def partial(experts: Experts, tokens: Tokens, chosen: LaunchConfig = CONFIG, **options: Any) -> torch.Tensor:
    """Of the local experts."""
    local = Experts(*(None if t is None else t[HELD].contiguous() for t in vars(experts).values()))  # type: ignore[arg-type]
    with using(chosen):
        return _partial(local, tokens, "triton_kernel", expert_map=torch.tensor([0, 1, -1, 2]), **options)


def expected(experts: Experts, tokens: Tokens, **options: Any) -> torch.Tensor:
    return by_formula(experts, replace(tokens, ids=torch.where(tokens.ids == 2, -1, tokens.ids)), **options)


@pytest.mark.parametrize(
    ("gemm", "limit"),
    [(Gemm(16, 4, 1, slices=4), 10.0), (Gemm(16, 2, 2, slices=1), None), (Gemm(64, 4, 2), 10.0)],
    ids=str,
)
def test_it_computes_the_formula_in_one_launch(gemm: Gemm, limit: float | None) -> None:
    experts, tokens = make_experts(4, HIDDEN, INNER, CPU, bias=True), make_tokens(5, HIDDEN, 4, 2, CPU)
    with chip() as found:
        got = partial(experts, tokens, config(gemm), limit=limit)
    assert [launch.execution.program for launch in found.launches if launch.execution] == ["experts_single"]
    assert relative_error(got, expected(experts, tokens, limit=limit)) < 5e-3


@pytest.mark.parametrize("count", [1, 16])
def test_it_takes_from_one_to_all_columns(count: int) -> None:
    experts, tokens = make_experts(4, HIDDEN, INNER, CPU), make_tokens(count, HIDDEN, 4, 2, CPU)
    with chip():
        got = partial(experts, tokens)
    assert relative_error(got, expected(experts, tokens)) < 5e-3


def test_an_expert_that_a_token_takes_twice_counts_twice_and_ids_that_do_not_exist_never() -> None:
    experts, tokens = make_experts(4, HIDDEN, INNER, CPU), make_tokens(3, HIDDEN, 4, 3, CPU)
    tokens.ids[:] = torch.tensor([[3, 3, 1], [-1, 99, 0], [2, -1, 4]])
    with chip():
        got = partial(experts, tokens)
    known = replace(tokens, ids=torch.where((tokens.ids < 0) | (tokens.ids > 3), -1, tokens.ids))
    assert relative_error(got[:2], expected(experts, known)[:2]) < 5e-3
    assert not got[2].any()


def test_without_local_routes_all_tokens_are_zero() -> None:
    experts, tokens = make_experts(4, HIDDEN, INNER, CPU), make_tokens(4, HIDDEN, 4, 2, CPU)
    tokens.ids.fill_(2)
    with chip():
        assert not partial(experts, tokens).any()


def test_a_nan_reaches_its_token_only() -> None:
    experts, tokens = make_experts(4, HIDDEN, INNER, CPU), make_tokens(4, HIDDEN, 4, 2, CPU)
    tokens.ids[:] = torch.tensor([[0, 1], [1, 3], [0, 2], [3, 2]])
    experts.w2_scale[1, 37, 2] = 255
    tokens.weights[3, 1] = float("nan")  # of a remote route, whose weight is another rank's matter
    with chip():
        got = partial(experts, tokens)
    assert got.isnan().nonzero().tolist() == [[0, 37], [1, 37]]


def test_its_counters_are_zero_again_and_the_next_op_gives_the_same_bits() -> None:
    experts = make_experts(4, HIDDEN, INNER, CPU)
    first, second = (make_tokens(6, HIDDEN, 4, 2, CPU, seed) for seed in range(2))
    with chip():
        once = partial(experts, first)
        state = workspace.counters(CPU, 0)
        assert state is not None
        assert not state.any()
        partial(experts, second)
        assert torch.equal(partial(experts, first), once)
        assert not state.any()


def test_where_counters_are_no_more_an_op_is_made_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, tokens = make_experts(4, HIDDEN, INNER, CPU), make_tokens(5, HIDDEN, 4, 2, CPU)
    monkeypatch.setattr(workspace, "counters", lambda device, stream: None)
    with chip() as found:
        got = partial(experts, tokens)
    assert len(found.launches) == 4
    assert relative_error(got, expected(experts, tokens)) < 5e-3


def test_ranges_of_columns_are_the_whole_s_where_counters_are_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, tokens = make_experts(3, HIDDEN, INNER, CPU), make_tokens(5, HIDDEN, 3, 2, CPU)
    monkeypatch.setattr(workspace, "counters", lambda device, stream: None)
    packed = (tokens.x, experts.w13, experts.w13_scale, experts.w2, experts.w2_scale, tokens.ids, tokens.weights)
    with chip(), using(CONFIG):
        ranges = list(fused_moe_mxfp4_by_columns(*packed, impl="triton_kernel", parts=2))
        assert torch.equal(torch.cat(ranges, 1), fused_moe_mxfp4(*packed, impl="triton_kernel"))


@pytest.mark.parametrize(("count", "top_k"), [(17, 2), (16, 9)])
def test_what_it_does_not_take_is_made_in_several_launches(count: int, top_k: int) -> None:
    experts, tokens = make_experts(12, HIDDEN, INNER, CPU), make_tokens(count, HIDDEN, 12, top_k, CPU)
    with chip() as found, using(CONFIG):
        got = _partial(experts, tokens, "triton_kernel")
    assert len(found.launches) == 4
    assert relative_error(got, by_formula(experts, tokens)) < 5e-3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_it_takes_ids_of_any_integer_type_and_gives_f32(dtype: torch.dtype) -> None:
    experts, tokens = make_experts(3, HIDDEN, INNER, CPU), make_tokens(3, HIDDEN, 3, 2, CPU)
    with chip(), using(CONFIG):
        packed = (tokens.x, experts.w13, experts.w13_scale, experts.w2, experts.w2_scale, tokens.ids.to(dtype))
        got = fused_moe_mxfp4(*packed, tokens.weights, impl="triton_kernel", out_dtype=torch.float32)
    assert got.dtype == torch.float32
    assert relative_error(got, by_formula(experts, tokens)) < 5e-3
