"""Routes sorted by local expert and cut into blocks, without a host synchronisation."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moe_ep.kernels.bound import BoundLaunch
from moe_ep.kernels.plan import count_kernel, place_kernel

_SHIFT_BLOCK = 4096  # elements of x a program
_MOST_ROUTES = 2048  # routes a program looks at in a step
_ALONE_ROUTES = 1024  # up to these, counting them in every program is faster than one launch more


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

    @property
    def blocks(self) -> int:
        """B, used or not."""
        return self.block_expert.numel()


@dataclass(frozen=True)
class Planner:
    """The launches that plan an op's routes, for one shape of it."""

    plan: RoutePlan
    shifted: Tensor
    counts: Tensor
    count: BoundLaunch | None
    place: BoundLaunch
    known: int

    def __call__(self, x: Tensor, topk_ids: Tensor, expert_map: Tensor | None) -> None:
        """Write the plan of int [M, k] expert ids, and x times 2^64 (`kernels.decode` says why)."""
        mapped = topk_ids if expert_map is None else expert_map
        routes, elements, plan = topk_ids.numel(), x.numel(), self.plan
        if self.count is not None:
            self.count(topk_ids, mapped, self.counts, x, self.shifted, routes, self.known, elements)
        self.place(
            *(topk_ids, mapped, self.counts, plan.route, plan.block_expert, plan.block_start, plan.block_end),
            *(x, self.shifted, routes, self.known, plan.blocks, elements),
        )


def plan_parts(
    tokens: int, hidden: int, top_k: int, local_experts: int, block_m: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What a plan is written to."""
    blocks = block_bound(tokens * top_k, local_experts, block_m)
    return {
        "counts": ((local_experts,), torch.int32),
        "route": ((tokens * top_k,), torch.int32),
        "block_expert": ((blocks,), torch.int32),
        "block_start": ((blocks,), torch.int32),
        "block_end": ((blocks,), torch.int32),
        "shifted": ((tokens, hidden), torch.bfloat16),
    }


def planner(
    parts: dict[str, Tensor], local_experts: int, known: int, block_m: int, *, mapped: bool, in_places: bool, pdl: bool
) -> Planner:
    """The launches that write `parts`, those of `plan_parts`, for expert ids below `known`.

    The number of blocks is a bound that depends on shapes only, so the launches need no number from the device and
    can be captured in a graph. `in_places` says where activations go (`kernels.warpgroup`).
    """
    routes, shifts = parts["route"].numel(), triton.cdiv(parts["shifted"].numel(), _SHIFT_BLOCK)
    alone = routes <= _ALONE_ROUTES
    options = {
        "LOCAL": local_experts,
        "HAS_MAP": mapped,
        "IN_PLACES": in_places,
        "PDL": pdl,
        "BLOCK_R": min(_MOST_ROUTES, max(64, triton.next_power_of_2(routes))),
        "BLOCK_X": _SHIFT_BLOCK,
    }
    place = {"ALONE": alone, "BLOCK_L": triton.next_power_of_2(local_experts), "BLOCK_M": block_m, **options}
    return Planner(
        RoutePlan(*(parts[name] for name in ("route", "block_expert", "block_start", "block_end"))),
        parts["shifted"],
        parts["counts"],
        None if alone else BoundLaunch(count_kernel, local_experts + shifts, options, pdl=pdl),
        BoundLaunch(place_kernel, local_experts + 1 + (shifts if alone else 0), place, pdl=pdl),
        known,
    )


def block_bound(routes: int, local_experts: int, block_m: int) -> int:
    """The most blocks that `routes` routes can fill: each hit expert may leave one block partly empty."""
    hit = min(routes, local_experts)
    return hit + (routes - hit) // block_m
