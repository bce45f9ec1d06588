"""nodes × devices → ranks → TP and EP groups, and which experts live where."""

from dataclasses import dataclass

from launcher.schema import Topology
from moe_ep.placement import Placement


@dataclass(frozen=True)
class RankPlace:
    """Where one rank stands. Groups are consecutive ranks, so a group crosses as few nodes as it can.

    An EP group is the ranks that hold a layer's experts together, whole ones or, under expert_tp, slices of all.
    """

    rank: int
    node: int
    local_rank: int
    tp_group: int
    ep_group: int
    ep_rank: int
    experts: range
    """Global experts of every layer that the rank holds."""


def rank_places(topology: Topology, num_experts: int) -> tuple[RankPlace, ...]:
    """All ranks in order; Slurm fills a node before it goes on to the next (block distribution)."""
    placement, group = Placement(num_experts, topology.ep), max(topology.ep, topology.expert_tp)
    return tuple(
        RankPlace(
            rank=rank,
            node=rank // topology.ranks_per_node,
            local_rank=rank % topology.ranks_per_node,
            tp_group=rank // topology.tp,
            ep_group=rank // group,
            ep_rank=rank % topology.ep,
            experts=placement.experts(rank % topology.ep),
        )
        for rank in range(topology.ranks)
    )
