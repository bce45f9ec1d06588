"""Tokens of one's own: gathered from all ranks before the experts, the partials reduce-scattered after them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ep.comm.group import Group, Pending
from moe_ep.comm.reduce import combine_place
from moe_ep.comm.strategy import Combine, Routed
from moe_ep.comm.wire import Payload, RowFormat
from moe_ep.spec import TopKOutput


@dataclass(frozen=True)
class _Way:
    """Rows of each rank that were gathered, with padding, and how many of them are this rank's own tokens."""

    rows: int
    own: int


class AllGather(Combine):
    """All-gather of the tokens, reduce-scatter of the partials (data-parallel attention).

    A rank with fewer tokens than the largest pads its share with tokens that have no routes. With T = p times the
    largest M: bytes sent per rank (p−1)/p · T · (row + H · c), row = H·b + 8·k of `RowFormat` and c the bytes of
    `dtype`, in which partials are added up.
    """

    name = "all_gather"
    own_tokens = True

    def __init__(self, group: Group, payload: Payload = "bf16", dtype: torch.dtype = torch.float32) -> None:
        self.group, self.payload, self.dtype = group, payload, dtype

    def dispatch(self, x: Tensor, topk: TopKOutput, counts: Sequence[int] | None = None, place: str = "") -> Routed:
        """See `Combine`: all ranks' tokens, rank by rank."""
        own = x.shape[0]
        if counts is None:
            counts = [one for (one,) in self.group.counts([own], x.device, f"{place} dispatch")]
        if len(counts) != self.group.size or counts[self.group.rank] != own:
            raise ValueError(
                f"counts is {list(counts)}, but rank {self.group.rank} of {self.group.size} has {own} tokens"
            )
        row = RowFormat(x.shape[1], topk.topk_ids.shape[1], self.payload)
        rows = row.pack(x, topk)
        if own < max(counts):
            padding = rows.new_zeros(max(counts) - own, rows.shape[1])
            row.nobody(padding)
            rows = torch.cat((rows, padding))
        everybodys = self.group.all_gather(rows, f"{place} dispatch").wait()
        return Routed(*row.unpack(everybodys), _Way(max(counts), own), place)

    def begin(self, partial: Tensor, routed: Routed | None = None) -> Pending:
        """See `Combine`."""
        way = _way(routed)
        whole = self.group.reduce_scatter(partial.to(self.dtype), combine_place(routed))
        if way.own == way.rows:
            return whole
        return Pending(lambda: whole.wait()[: way.own], give_up=whole.give_up)

    def spared(self, routed: Routed, parts: int) -> int:
        """See `Combine`."""
        return self.group.spared(routed.x.numel() // parts * self.dtype.itemsize // self.group.size, parts)


def _way(routed: Routed | None) -> _Way:
    if routed is None or not isinstance(routed.way, _Way):
        raise TypeError(f"all_gather combines what its own dispatch has given, not {routed!r}")
    return routed.way
