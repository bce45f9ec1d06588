"""Routes sorted by local expert and cut into blocks, without a host synchronisation."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moe_ep.kernels.bound import BoundLaunch
from moe_ep.kernels.plan import count_kernel, place_kernel

_SHIFT_BLOCK = 4096  # elements of x a program
_CHUNK = 64  # the most routes a program places at once
_PAIRS = 2**16  # the most pairs of a route and an expert that a program compares at once
_WRITTEN = 64  # blocks a program
_COUNTS = 2**13  # the most counts of a tile and an expert that a program adds at once
_TILES = 256  # for more routes they grow, since each program adds up the counts of all
_ALONE = 1024  # up to these routes, counting all in every program is faster than one launch more
_WARPS = 8
_SMALL_WARPS = 4  # of 32 lanes, where a program does not count all routes alone


@dataclass(frozen=True)
class RoutePlan:
    """Which routes a grouped GEMM computes together.

    route: int32 [R], route numbers m·k + slot sorted by local expert, the order within one kept; as many are written as
    there are local routes. block_expert, block_start, block_end: int32 [B], with block_expert = −1 past the last block.
    state: int32 [2 + B], what programs count in that share out the blocks' tiles (`kernels.experts`), if they do.
    """

    route: Tensor
    block_expert: Tensor
    block_start: Tensor
    block_end: Tensor
    state: Tensor

    @property
    def blocks(self) -> int:
        """B, used or not."""
        return self.block_expert.numel()


@dataclass(frozen=True)
class Planner:
    """The launches that plan an op's routes, for one shape of it; `shifted` is None where x is taken as it is."""

    plan: RoutePlan
    shifted: Tensor | None
    counts: Tensor
    count: BoundLaunch | None
    place: BoundLaunch
    known: int

    def __call__(self, x: Tensor, topk_ids: Tensor, expert_map: Tensor | None) -> None:
        """Write the plan of int [M, k] expert ids, and x times 2^64 (`kernels.decode` says why)."""
        mapped = topk_ids if expert_map is None else expert_map
        shifted, elements = (x, 0) if self.shifted is None else (self.shifted, x.numel())
        routes, plan = topk_ids.numel(), self.plan
        if self.count is not None:
            self.count(topk_ids, mapped, self.counts, x, shifted, routes, self.known, elements)
        self.place(
            *(topk_ids, mapped, self.counts, plan.route, plan.block_expert, plan.block_start, plan.block_end),
            *(plan.state, x, shifted, routes, self.known, plan.blocks, elements),
        )


def plan_parts(
    tokens: int, hidden: int, top_k: int, local_experts: int, block_m: int, *, shifts: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What a plan is written to, for `planner`."""
    blocks = block_bound(tokens * top_k, local_experts, block_m)
    width = triton.next_power_of_2(local_experts)
    parts = {
        "counts": ((triton.cdiv(tokens * top_k, _tile(tokens * top_k, width)[0]), width), torch.int32),
        "route": ((tokens * top_k,), torch.int32),
        "block_expert": ((blocks,), torch.int32),
        "block_start": ((blocks,), torch.int32),
        "block_end": ((blocks,), torch.int32),
        "state": ((2 + blocks,), torch.int32),
    }
    return {**parts, "shifted": ((tokens, hidden), torch.bfloat16)} if shifts else parts


def planner(
    parts: dict[str, Tensor],
    local_experts: int,
    known: int,
    block_m: int,
    *,
    mapped: bool,
    pdl: bool,
    shares: bool,
    warp_size: int,
) -> Planner:
    """The launches that write `parts`, those of `plan_parts`, for expert ids below `known`.

    The number of blocks is a bound that depends on shapes only, so the launches need no number from the device and
    can be captured in a graph.
    """
    plan = RoutePlan(*(parts[name] for name in ("route", "block_expert", "block_start", "block_end", "state")))
    shifted = parts.get("shifted")
    shifts = 0 if shifted is None else triton.cdiv(shifted.numel(), _SHIFT_BLOCK)
    tiles, width = parts["counts"].shape
    routes = plan.route.numel()
    alone = routes <= _ALONE
    tile, chunk = _tile(routes, width)
    options = {
        "LOCAL": local_experts,
        "HAS_MAP": mapped,
        "PDL": pdl,
        "BLOCK_L": width,
        "BLOCK_T": tile,
        "BLOCK_X": _SHIFT_BLOCK,
    }
    warps = _SMALL_WARPS if warp_size == 32 and not alone else _WARPS  # CDNA's waves would spill
    count = None if alone else BoundLaunch(count_kernel, tiles + shifts, options, warps=warps, pdl=pdl)
    programs = tiles + triton.cdiv(plan.blocks, _WRITTEN) + (shifts if alone else 0)
    own = {
        "BLOCK_M": block_m,
        "BLOCK_A": triton.next_power_of_2(max(routes, tile)) if alone else tile,
        "BLOCK_R": chunk,
        "BLOCK_B": _WRITTEN,
        "BLOCK_C": max(16, _COUNTS // width),
    }
    place = {**options, "SHARES": shares, "ALONE": alone, **own}
    return Planner(
        plan, shifted, parts["counts"], count, BoundLaunch(place_kernel, programs, place, warps=warps, pdl=pdl), known
    )


def _tile(routes: int, width: int) -> tuple[int, int]:
    """Routes of a program's tile, and of it those that are placed at once, beside `width` experts."""
    chunk = max(16, min(triton.next_power_of_2(routes), _CHUNK, _PAIRS // width))
    return chunk * triton.next_power_of_2(triton.cdiv(routes, chunk * _TILES)), chunk


def block_bound(routes: int, local_experts: int, block_m: int) -> int:
    """The most blocks that `routes` routes can fill: each hit expert may leave one block partly empty."""
    hit = min(routes, local_experts)
    return hit + (routes - hit) // block_m
