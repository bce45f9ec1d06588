"""The process groups of expert parallelism: all ranks that hold a layer, those of a node, and those across nodes."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_ep.comm.all_to_all import AllToAll
from moe_ep.comm.gather import AllGather
from moe_ep.comm.group import SPARED, Group, Watcher
from moe_ep.comm.peer import peer_memory
from moe_ep.comm.reduce import AllReduce, Alone, ReduceScatter
from moe_ep.comm.strategy import Combine
from moe_ep.comm.wire import Payload
from moe_ep.cost import OWN_TOKENS, SAME_TOKENS
from moe_ep.network import Layout
from moe_ep.placement import Placement

MakeWatch = Callable[[str, tuple[int, ...]], Watcher | None]


@dataclass(frozen=True)
class EpGroups:
    """This rank's groups: `whole` of all ranks that hold a layer's experts, `node` of those of them on its node, and
    `rail` of those at its place of every node. None where it would be alone."""

    layout: Layout
    whole: Group | None
    node: Group | None
    rail: Group | None

    def strategy(
        self, name: str, experts: int, payload: Payload = "bf16", dtype: torch.dtype = torch.float32
    ) -> Combine:
        """A strategy by its name, for experts that are spread as `Placement`.

        Raises
        ------
        ValueError
            If there is none of that name.
        """
        if self.whole is None:
            return Alone()
        if name == AllReduce.name:
            return AllReduce(self.whole, dtype)
        if name == ReduceScatter.name:
            return ReduceScatter(self.whole, dtype)
        if name == AllGather.name:
            return AllGather(self.whole, payload, dtype)
        if name == AllToAll.name:
            return AllToAll(owners(experts, self.layout.ranks), self.node, self.rail, payload, dtype)
        raise ValueError(f"strategy is {name!r}; there are {', '.join(SAME_TOKENS + OWN_TOKENS)}")

    @property
    def all(self) -> list[Group]:
        """Those that there are."""
        return [group for group in (self.whole, self.node, self.rail) if group is not None]


def owners(experts: int, ranks: int) -> torch.Tensor:
    """int64 [E], the EP rank of each expert."""
    placement = Placement(experts, ranks)
    held = torch.tensor([len(placement.experts(rank)) for rank in range(ranks)])
    return torch.arange(ranks).repeat_interleave(held)


def _options() -> Any:
    """For NCCL, streams of high priority: else the shared expert's blocks, all queued at once, come before those of the
    collective that they are to hide. On NVIDIA it takes no more than the processors that are spared for it."""
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if torch.version.hip is None:
        options.config.max_ctas = SPARED
    return options


def ep_groups(
    world: int,
    rank: int,
    layout: Layout,
    timeout_s: float,
    make_watch: MakeWatch = lambda name, ranks: None,
    *,
    peer_copies: bool = True,
) -> EpGroups:
    """Split the world into EP groups of `layout.ranks` consecutive ranks. Every rank of the world must call it.

    peer_copies: whether two ranks of one host send each other sums by copy engines, where they can.
    """
    size, per_node = layout.ranks, layout.per_node
    mine: dict[str, Group | None] = {"whole": None, "node": None, "rail": None}
    for first in range(0, world, size):
        members = range(first, first + size)
        wanted = {"whole": [tuple(members)]}
        if 1 < per_node < size:
            wanted["node"] = [tuple(members[i : i + per_node]) for i in range(0, size, per_node)]
        if layout.nodes > 1 and per_node > 1:
            wanted["rail"] = [tuple(members[i::per_node]) for i in range(per_node)]
        for kind, groups in wanted.items():
            for ranks in groups if size > 1 else ():
                # Without a timeout of its own a group takes the backend's default, half an hour.
                group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s), pg_options=_options())
                if rank in ranks:
                    pair = peer_copies and size == per_node == 2 and dist.get_backend() == "nccl"
                    peer = (
                        peer_memory(group, torch.device("cuda", torch.cuda.current_device()), timeout_s)
                        if pair
                        else None
                    )
                    mine[kind] = Group(group, make_watch(f"{kind} {ranks[0]}-{ranks[-1]}", ranks), peer)
    if layout.nodes == 1:
        mine["node"] = mine["whole"]
    elif per_node == 1:
        mine["rail"] = mine["whole"]
    return EpGroups(layout, mine["whole"], mine["node"], mine["rail"])
