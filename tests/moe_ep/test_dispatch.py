"""Blocks of routes, against a plain count."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_ep.dispatch import block_bound, plan_routes
from moe_ep.fused import localise


@given(
    st.integers(1, 9).flatmap(
        lambda experts: st.tuples(
            st.just(experts),
            st.lists(st.integers(-1, experts - 1), min_size=1, max_size=90),
            st.sampled_from([1, 4, 16]),
        )
    )
)
def test_every_local_route_is_in_exactly_one_block_of_its_expert_and_no_remote_one(
    case: tuple[int, list[int], int],
) -> None:
    experts, ids, block_m = case
    plan = plan_routes(torch.tensor(ids, dtype=torch.int32).unsqueeze(1), experts, block_m)
    seen: list[int] = []
    blocks = zip(plan.block_expert.tolist(), plan.block_start.tolist(), plan.block_end.tolist(), strict=True)
    for expert, start, end in blocks:
        if expert < 0:
            continue
        assert 1 <= end - start <= block_m
        routes = plan.route[start:end].tolist()
        assert all(ids[r] == expert for r in routes)
        assert routes == sorted(routes), "the order of routes within an expert is kept"
        seen += routes
    assert sorted(seen) == [r for r, e in enumerate(ids) if e >= 0]


def test_the_bound_on_blocks_is_reached_by_the_worst_routing() -> None:
    # 3 experts: two with a single route, one with the other 33 of 35: 1 + 1 + 3 blocks of 16.
    ids = torch.tensor([0, 1] + [2] * 33, dtype=torch.int32).unsqueeze(1)
    plan = plan_routes(ids, 3, 16)
    assert int((plan.block_expert >= 0).sum()) == 5 == block_bound(35, 3, 16)


def test_no_number_is_read_back_from_the_device() -> None:
    # A fake tensor has no data: .item(), boolean indexing and data-dependent shapes raise.
    with FakeTensorMode():
        ids = torch.zeros(7, 6, dtype=torch.int32)
        plan = plan_routes(localise(ids, torch.zeros(16, dtype=torch.int32), 4), 4, 16)
        assert plan.block_expert.shape == (block_bound(42, 4, 16),)
