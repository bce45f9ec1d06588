"""Where a rank stands, and which part of a layer is its own."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from jobs.request import ProbeRequest
from moe_ep.bench.cases import RankShape
from moe_ep.comm.watch import Watch
from moe_ep.placement import WHOLE, Slice
from moe_ep.spec import MoELayerSpec


@dataclass(frozen=True)
class Place:
    """A rank's device and its place among the ranks that hold a layer's experts together."""

    rank: int
    world: int
    group_rank: int
    group_size: int
    replica: int
    """Which group: the groups hold the same experts and work on different tokens."""
    group: dist.ProcessGroup | None
    device: torch.device
    watch: Watch | None = None
    """Of waits that all ranks of the world take part in, beside the collectives of their groups."""

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Where the host waits for all ranks: who does not come is named. The same on every rank."""
        return nullcontext() if self.watch is None else self.watch.during(what)

    def tokens_of(self, request: ProbeRequest, count: int) -> list[int]:
        """By rank of the group, how many of `count` tokens it has: a share where each has its own, else all."""
        if not request.own_tokens:
            return [count] * self.group_size
        return [count // self.group_size + (r < count % self.group_size) for r in range(self.group_size)]


def place(request: ProbeRequest, rank: int, device: torch.device) -> Place:
    """Split the world into groups of consecutive ranks. Every rank must call it."""
    size, mine = request.group_size, None
    for first in range(0, request.world, size):
        # Without a timeout of its own a group takes the backend's default, half an hour.
        group = dist.new_group(list(range(first, first + size)), timeout=timedelta(seconds=request.rank_timeout_s))
        if first <= rank < first + size:
            mine = group
    return Place(rank, request.world, rank % size, size, rank // size, mine, device)


def share(request: ProbeRequest, name: str) -> RankShape:
    """The experts that a rank of this run holds, for what is measured without a checkpoint."""
    shape = request.shape
    inner = shape.intermediate // request.expert_tp
    return RankShape(name, shape.hidden, inner, shape.experts, request.ep, shape.top_k)


def shared_slice(request: ProbeRequest, where: Place) -> Slice:
    """What this rank holds of the shared expert."""
    return Slice(where.group_rank, where.group_size) if request.shard_shared_expert else WHOLE


def spec_of(request: ProbeRequest, where: Place, layer: int) -> MoELayerSpec:
    """This rank's share of a layer, as backends are asked for it."""
    if request.expert_tp > 1:
        return MoELayerSpec.of_rank(request.shape, layer, 0, 1, where.group_rank, where.group_size)
    # A backend knows slots only; where experts lie in order, they are the experts.
    slots = len(request.slots[0]) if request.slots else request.shape.experts
    return MoELayerSpec.of_rank(replace(request.shape, experts=slots), layer, where.group_rank, where.group_size)
