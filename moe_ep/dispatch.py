"""Routes sorted by local expert and cut into blocks, without a host synchronisation."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutePlan:
    """Which routes a grouped GEMM computes together.

    route: int32 [R], route numbers m·k + slot sorted by local expert, the order within one kept; remote
    routes stand at the end, outside every block. block_expert, block_start, block_end: int32 [B], with
    block_expert = −1 past the last block.
    """

    route: Tensor
    block_expert: Tensor
    block_start: Tensor
    block_end: Tensor


def block_bound(routes: int, local_experts: int, block_m: int) -> int:
    """The most blocks that `routes` routes can fill: each hit expert may leave one block partly empty."""
    hit = min(routes, local_experts)
    return hit + (routes - hit) // block_m


def plan_routes(local_ids: Tensor, local_experts: int, block_m: int) -> RoutePlan:
    """Plan int32 [M, k] local rows (−1 = not local) for tiles of `block_m` routes.

    The number of blocks is a bound that depends on shapes only, so the launch needs no number from the
    device and can be captured in a graph.
    """
    key = local_ids.flatten().long()
    key = torch.where(key < 0, local_experts, key)
    sorted_key, route = torch.sort(key, stable=True)
    # Bounds of expert e in the sorted routes, by search: bincount would synchronise.
    experts = torch.arange(local_experts + 1, device=key.device)
    bounds = torch.searchsorted(sorted_key, experts)
    blocks = (bounds[1:] - bounds[:-1] + block_m - 1) // block_m
    last_block = blocks.cumsum(0)
    block = torch.arange(block_bound(key.numel(), local_experts, block_m), device=key.device)
    expert = torch.searchsorted(last_block, block, right=True)
    used = expert < local_experts
    expert = expert.clamp(max=local_experts - 1)
    start = bounds[expert] + (block - (last_block - blocks)[expert]) * block_m
    end = torch.minimum(start + block_m, bounds[expert + 1])
    return RoutePlan(
        route=route.int(),
        block_expert=torch.where(used, expert, -1).int(),
        block_start=start.int(),
        block_end=end.int(),
    )
