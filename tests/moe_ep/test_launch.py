"""Block sizes for every problem."""

import pytest

from moe_ep.kernels.launch import choose


@pytest.mark.parametrize(
    ("routes", "experts", "rows"), [(1, 256, 16), (3072, 256, 16), (5120, 256, 32), (12288, 256, 64)]
)
def test_a_tile_holds_the_routes_that_most_experts_have(routes: int, experts: int, rows: int) -> None:
    assert choose(routes, experts).block_m == rows


@pytest.mark.parametrize("experts", [1, 7, 228, 384])
@pytest.mark.parametrize("routes", [1, 6, 1000, 10**6])
def test_there_is_a_tile_for_any_number_of_routes_and_experts(routes: int, experts: int) -> None:
    tile = choose(routes, experts)
    assert tile.block_m >= 16
    assert tile.block_k % 32 == 0
