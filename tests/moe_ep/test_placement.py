"""Which rank holds which expert."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ep.placement import NOT_LOCAL, Placement

placements = st.integers(1, 40).flatmap(lambda ep: st.builds(Placement, st.integers(ep, 400), st.just(ep)))


@given(placements)
def test_every_expert_lives_on_exactly_one_rank_and_loads_differ_by_at_most_one(placement: Placement) -> None:
    held = [placement.experts(r) for r in range(placement.ep_size)]
    assert [e for experts in held for e in experts] == list(range(placement.num_experts))
    sizes = [len(experts) for experts in held]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "the first ranks get one more"


@given(placements, st.data())
def test_the_expert_map_numbers_the_local_experts_from_zero(placement: Placement, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, placement.ep_size - 1))
    expert_map, held = placement.expert_map(rank), placement.experts(rank)
    assert [expert_map[e] for e in held] == list(range(len(held)))
    assert all(expert_map[e] == NOT_LOCAL for e in range(placement.num_experts) if e not in held)


def test_v4_divides_evenly_and_an_odd_split_drops_nobody() -> None:
    assert [len(Placement(384, 8).experts(r)) for r in range(8)] == [48] * 8
    assert [len(Placement(10, 4).experts(r)) for r in range(4)] == [3, 3, 2, 2]


@pytest.mark.parametrize(("experts", "ranks"), [(3, 4), (4, 0)])
def test_a_rank_without_experts_is_refused(experts: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="ep_size"):
        Placement(experts, ranks)


def test_a_rank_outside_the_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ep_rank = 4 must lie in 0\.\.3"):
        Placement(16, 4).experts(4)
