"""The sum of a token's routes, in every way that runs kernels."""

import pytest
import torch

from moe_ep.kernels.down import combine_kernel
from tests.moe_ep.ways import WAYS, Way, call, device_of

TOKENS, TOP_K, HIDDEN = 5, 3, 96


def _combine(
    y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, weighs: bool, zeroed: bool, parts: int
) -> torch.Tensor:
    out = torch.full((TOKENS, HIDDEN), -1.0, device=y.device)
    constants = {"LOCAL": 2, "HAS_MAP": False, "HIDDEN": HIDDEN, "TOP_K": TOP_K, "PDL": False, "BLOCK_H": 64}
    combine_kernel[(TOKENS * parts,)](
        y, ids, ids, weights, out, 4, WEIGHS=weighs, ZEROED=zeroed, PARTS=parts, **constants
    )
    return out


@pytest.mark.parametrize("way", [way for way in WAYS if way != "reference"])
@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("parts", [1, 2], ids=["a row a program", "half a row a program"])
def test_local_routes_are_added_and_weighted_where_down_has_not_done_it(
    way: Way, weighs: bool, zeroed: bool, parts: int
) -> None:
    device, generator = device_of(way), torch.Generator().manual_seed(0)
    y = torch.randn(TOKENS * TOP_K, HIDDEN, generator=generator).bfloat16()
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    ids = torch.tensor([[0, 1, 2], [3, 2, 3], [-1, 1, 0], [1, 2, 1], [0, 4, 1]], dtype=torch.int32)
    local = (ids >= 0) & (ids < 2)
    y[~local.flatten()] = torch.nan  # what was never written is not read
    factors = (weights if weighs else torch.ones_like(weights)) * local
    expected = (y.nan_to_num().float().view(TOKENS, TOP_K, HIDDEN) * factors[..., None]).sum(1)
    if zeroed:  # rows without local routes are somebody else's
        expected[~local.any(1)] = -1.0
    got = call(way, _combine, y.to(device), ids.to(device), weights.to(device), weighs, zeroed, parts)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=1e-6)
