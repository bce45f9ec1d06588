"""Block sizes for every problem."""

import pytest

from moe_ep.kernels.launch import TABLES, Target, choose

TARGETS: list[Target] = ["cuda", "hip"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("routes", "experts", "rows"), [(1, 256, 16), (3072, 256, 16), (5120, 256, 32), (12288, 256, 64)]
)
def test_a_tile_holds_the_routes_that_most_experts_have(routes: int, experts: int, rows: int, target: Target) -> None:
    assert choose(routes, experts, target).block_m == rows


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("experts", [1, 7, 228, 384])
@pytest.mark.parametrize("routes", [1, 6, 1000, 10**6])
def test_there_is_a_tile_for_any_number_of_routes_and_experts(routes: int, experts: int, target: Target) -> None:
    assert choose(routes, experts, target) in TABLES[target]


@pytest.mark.parametrize("target", TARGETS)
def test_tables_rise_so_that_the_first_that_fits_is_the_smallest(target: Target) -> None:
    rows = [tile.block_m for tile in TABLES[target]]
    assert rows == sorted(set(rows))
    assert rows[0] == 16
