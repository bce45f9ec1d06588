"""The strategy that the cost model expects to be fastest, for each number of tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ep.comm.group import Group, Pending
from moe_ep.comm.strategy import Combine, Routed
from moe_ep.cost import Choice, Name
from moe_ep.spec import TopKOutput


@dataclass(frozen=True)
class _Way:
    """The strategy that was taken, and its own way back."""

    strategy: Combine
    way: Any


class Auto(Combine):
    """Takes one of `strategies` by `choose(tokens of the group, capturing)`, which must be the same on all ranks."""

    name = "auto"

    def __init__(self, strategies: Mapping[Name, Combine], group: Group, choose: Callable[[int, bool], Choice]) -> None:
        self.strategies, self.group, self.choose = dict(strategies), group, choose
        self.own_tokens = any(one.own_tokens for one in self.strategies.values())  # type: ignore[misc]

    def dispatch(self, x: Tensor, topk: TopKOutput, counts: Sequence[int] | None = None, place: str = "") -> Routed:
        """See `Combine`."""
        tokens = x.shape[0]
        if self.own_tokens:
            if counts is None:
                counts = [one for (one,) in self.group.counts([tokens], x.device, f"{place} dispatch")]
            tokens = sum(counts)
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        strategy = self.strategies[self.choose(tokens, capturing).name]
        routed = strategy.dispatch(x, topk, counts, place)
        return Routed(routed.x, routed.topk, _Way(strategy, routed.way), place)

    def begin(self, partial: Tensor, routed: Routed | None = None) -> Pending:
        """See `Combine`."""
        strategy, inner = _unwrapped(routed)
        return strategy.begin(partial, inner)

    def parts(self, routed: Routed, wanted: int) -> int:
        """See `Combine`."""
        strategy, inner = _unwrapped(routed)
        return strategy.parts(inner, wanted)

    def spared(self, routed: Routed, parts: int) -> int:
        """See `Combine`."""
        strategy, inner = _unwrapped(routed)
        return strategy.spared(inner, parts)


def _unwrapped(routed: Routed | None) -> tuple[Combine, Routed]:
    if routed is None or not isinstance(routed.way, _Way):
        raise TypeError(f"auto combines what its own dispatch has given, not {routed!r}")
    return routed.way.strategy, Routed(routed.x, routed.topk, routed.way.way, routed.place)
