"""Routes sorted by local expert and cut into blocks, without a host synchronisation."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moe_ep.kernels.plan import count_kernel, place_kernel

_SHIFT_BLOCK = 4096  # elements of x a program
_MOST_ROUTES = 2048  # routes a program looks at in a step


@dataclass(frozen=True)
class RoutePlan:
    """Which routes a grouped GEMM computes together.

    route: int32 [R], route numbers m·k + slot sorted by local expert, the order within one kept; as many are written as
    there are local routes. block_expert, block_start, block_end: int32 [B], with block_expert = −1 past the last block.
    """

    route: Tensor
    block_expert: Tensor
    block_start: Tensor
    block_end: Tensor


def plan_routes(
    x: Tensor, topk_ids: Tensor, expert_map: Tensor | None, local_experts: int, block_m: int
) -> tuple[RoutePlan, Tensor]:
    """The plan of int [M, k] expert ids for tiles of `block_m` routes, and x times 2^64 (`kernels.decode` says why).

    The number of blocks is a bound that depends on shapes only, so the launches need no number from the device and
    can be captured in a graph.
    """
    routes, blocks = topk_ids.numel(), block_bound(topk_ids.numel(), local_experts, block_m)
    known = local_experts if expert_map is None else expert_map.numel()
    sizes = (local_experts, routes, blocks, blocks, blocks)
    # One allocation, its parts at multiples of 16 bytes: else other shapes would have the kernels compiled anew.
    spans = [-(-size // 4) * 4 for size in sizes]
    parts = x.new_empty(sum(spans), dtype=torch.int32).split(spans)
    counts, route, block_expert, block_start, block_end = (p[:n] for p, n in zip(parts, sizes, strict=True))
    shifted = torch.empty_like(x)
    mapped = topk_ids if expert_map is None else expert_map
    options = {
        "LOCAL": local_experts,
        "HAS_MAP": expert_map is not None,
        "BLOCK_R": min(_MOST_ROUTES, max(64, triton.next_power_of_2(routes))),
    }
    count_kernel[(local_experts + triton.cdiv(x.numel(), _SHIFT_BLOCK),)](
        *(topk_ids, mapped, counts, x, shifted), routes, known, x.numel(), BLOCK_X=_SHIFT_BLOCK, **options
    )
    place_kernel[(local_experts + 1,)](
        *(topk_ids, mapped, counts, route, block_expert, block_start, block_end),
        *(routes, known, blocks),
        BLOCK_L=triton.next_power_of_2(local_experts),
        BLOCK_M=block_m,
        **options,
    )
    return RoutePlan(route, block_expert, block_start, block_end), shifted


def block_bound(routes: int, local_experts: int, block_m: int) -> int:
    """The most blocks that `routes` routes can fill: each hit expert may leave one block partly empty."""
    hit = min(routes, local_experts)
    return hit + (routes - hit) // block_m
