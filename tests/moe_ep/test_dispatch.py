"""Blocks of routes, against a plain count, in every way that runs kernels."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_ep.dispatch import RoutePlan, block_bound, plan_parts, planner
from tests.gfx942.driver import emulated
from tests.moe_ep.experts import _partial, make_experts, make_tokens, partial
from tests.moe_ep.ways import WAYS, Way, call, device_of

by_way = pytest.mark.parametrize("way", [way for way in WAYS if way != "reference"])


def plan_of(
    way: Way, ids: list[int], local: int, block_m: int, expert_map: list[int] | None = None
) -> tuple[RoutePlan, torch.Tensor]:
    device = device_of(way)
    mapped = None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32, device=device)
    x = torch.randn(len(ids), 64, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    plan, shifted = call(way, _plan, x, torch.tensor(ids, device=device).unsqueeze(1), mapped, local, block_m)
    assert torch.equal(shifted, x * 2.0**64)
    return plan, shifted


def _plan(
    x: torch.Tensor, ids: torch.Tensor, mapped: torch.Tensor | None, local: int, block_m: int
) -> tuple[RoutePlan, torch.Tensor]:
    parts = {
        name: torch.empty(shape, dtype=dtype, device=x.device)
        for name, (shape, dtype) in plan_parts(x.shape[0], x.shape[1], 1, local, block_m, shifts=True).items()
    }
    known = local if mapped is None else mapped.numel()
    plan = planner(parts, local, known, block_m, mapped=mapped is not None, pdl=False, shares=True, warp_size=64)
    plan(x, ids, mapped)
    assert plan.shifted is not None
    return plan.plan, plan.shifted


def check(plan: RoutePlan, rows: list[int], block_m: int) -> None:
    """Every route whose row is ≥ 0 is in exactly one block of its row, and no other is."""
    seen: list[int] = []
    blocks = zip(plan.block_expert.tolist(), plan.block_start.tolist(), plan.block_end.tolist(), strict=True)
    for expert, start, end in blocks:
        if expert < 0:
            continue
        assert 1 <= end - start <= block_m
        routes = plan.route[start:end].tolist()
        assert all(rows[r] == expert for r in routes)
        assert routes == sorted(routes), "the order of routes within an expert is kept"
        seen += routes
    assert sorted(seen) == [r for r, e in enumerate(rows) if e >= 0]
    used = sum(expert >= 0 for expert in plan.block_expert.tolist())
    assert plan.state.tolist() == [0, used, *[0] * plan.blocks], "no ticket is taken, and no tile made"


@by_way
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9).flatmap(
        lambda experts: st.tuples(
            st.just(experts),
            st.lists(st.integers(-3, experts + 2), min_size=1, max_size=90),
            st.sampled_from([1, 4, 16]),
        )
    )
)
@example((3, [0, 1] + [2] * 33, 16))
@example((2, [-1, 5, 7], 4))
@example((9, [0, 8] * 40, 1))  # more blocks than one program writes
def test_every_local_route_is_in_exactly_one_block_of_its_expert_and_no_other_route(
    way: Way, case: tuple[int, list[int], int]
) -> None:
    local, ids, block_m = case
    plan, _ = plan_of(way, ids, local, block_m)
    check(plan, [e if 0 <= e < local else -1 for e in ids], block_m)


@by_way
def test_a_map_names_the_rows_and_ids_outside_it_have_none(way: Way) -> None:
    expert_map = [2, -1, 0, 1, -1]
    ids = [0, 1, 2, 3, 4, -1, 5, 99, 2, 0, (1 << 32) + 2, -(1 << 32)]
    plan, _ = plan_of(way, ids, 3, 4, expert_map)
    check(plan, [expert_map[e] if 0 <= e < 5 else -1 for e in ids], 4)


@by_way
def test_unsigned_ids_of_many_experts_have_no_padding_that_looks_like_an_expert(way: Way) -> None:
    device = device_of(way)
    ids = torch.tensor([[255], [3], [255]], dtype=torch.uint8, device=device)
    mapped = torch.full((256,), -1, dtype=torch.int32, device=device)
    mapped[255] = 0
    plan, _ = call(way, _plan, torch.zeros(3, 64, dtype=torch.bfloat16, device=device), ids, mapped, 1, 16)
    check(plan, [0, -1, 0], 16)


@by_way
@pytest.mark.parametrize("routes", [200, 1000, 5000])
def test_more_routes_than_a_step_and_more_blocks_than_a_step(way: Way, routes: int) -> None:
    ids = torch.randint(0, 5, (routes,), generator=torch.Generator().manual_seed(0)).tolist()
    plan, _ = plan_of(way, ids, 4, 1)
    check(plan, [e if e < 4 else -1 for e in ids], 1)


@by_way
def test_the_bound_on_blocks_is_reached_by_the_worst_routing(way: Way) -> None:
    # 3 experts: two with a single route, one with the other 33 of 35: 1 + 1 + 3 blocks of 16.
    plan, _ = plan_of(way, [0, 1] + [2] * 33, 3, 16)
    assert int((plan.block_expert >= 0).sum()) == 5 == block_bound(35, 3, 16)


def test_no_number_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, batch = make_experts(4, 64, 32, torch.device("cpu")), make_tokens(7, 64, 4, 3, torch.device("cpu"))
    expert_map = torch.tensor([0, 1, 2, 3])
    monkeypatch.setattr("moe_ep.fused._check_map", lambda *_: None)  # of a map on the CPU it looks at the rows

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a value of a tensor was read on the host")

    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    partial(experts, batch, "gfx942", expert_map=expert_map)


def test_other_numbers_of_tokens_do_not_compile_the_kernels_anew() -> None:
    experts = make_experts(4, 64, 32, torch.device("cpu"))
    with emulated() as chip:
        chip.executes = False
        for tokens in (5, 6, 7, 16, 17, 20, 21):  # 15 … 63 routes: one step of the plan's programs
            _partial(experts, make_tokens(tokens, 64, 4, 3, torch.device("cpu")), "triton_kernel")
    programs = {(launch.program.name, str(launch.constants)) for launch in chip.launches}
    texts = {(launch.program.name, tuple(i.text for i in launch.program.instructions)) for launch in chip.launches}
    assert len(texts) == len(programs)
