"""Tokens that every rank of the group has: the partials are added up on all of them. Or there is one rank."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from moe_ep.comm.group import Group, Pending
from moe_ep.comm.strategy import Combine, Routed
from moe_ep.spec import TopKOutput


class _SameTokens(Combine):
    """Nothing moves before the experts. `dtype`: in which partials are added up; None for their own."""

    own_tokens = False

    def __init__(self, group: Group, dtype: torch.dtype | None = None) -> None:
        self.group, self.dtype = group, dtype

    def dispatch(self, x: Tensor, topk: TopKOutput, counts: Sequence[int] | None = None, place: str = "") -> Routed:
        """See `Combine`."""
        return Routed(x, topk, place=place)

    def _summands(self, partial: Tensor) -> Tensor:
        return partial.to(self.dtype or partial.dtype)


class AllReduce(_SameTokens):
    """One all-reduce: for tokens that every rank of the group has (tensor-parallel attention).

    Bytes sent per rank: 2(p−1)/p · T · H · c, c of an element of the partial or of `dtype`.
    """

    name = "all_reduce"

    def begin(self, partial: Tensor, routed: Routed | None = None) -> Pending:
        """See `Combine`; in place where the dtype is kept."""
        return self.group.all_reduce(self._summands(partial), combine_place(routed))

    def spared(self, routed: Routed, parts: int) -> int:
        """See `Combine`."""
        return self.group.spared(routed.x.numel() // parts * (self.dtype or torch.float32).itemsize, parts)


class ReduceScatter(_SameTokens):
    """A reduce-scatter of the partials, then an all-gather of the sums in bf16: as `AllReduce` for tokens that every
    rank has, with fewer bytes where partials are f32 and one rounding to bf16 more.

    Bytes sent per rank: (p−1)/p · T · H · (c + 2), T rounded up to a multiple of p.
    """

    name = "reduce_scatter"

    def begin(self, partial: Tensor, routed: Routed | None = None) -> Pending:
        """See `Combine`: on a CPU, where the host has to wait for the sums, the all-gather begins at `wait`."""
        place, tokens, p = combine_place(routed), partial.shape[0], self.group.size
        summands, padding = self._summands(partial), -tokens % p
        if padding:
            summands = torch.nn.functional.pad(summands, (0, 0, 0, padding))
        part = self.group.reduce_scatter(summands, place)
        if not partial.is_cuda:
            return Pending(lambda: self.group.all_gather(part.wait().bfloat16(), place).wait()[:tokens])
        sums = torch.empty_like(summands, dtype=torch.bfloat16)
        mine, side = sums.chunk(p)[self.group.rank], _side(sums.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            mine.copy_(part.wait())
            whole = self.group.all_gather(mine, place, sums)

        def give_up() -> None:
            torch.cuda.current_stream().wait_stream(side)

        return Pending(lambda: whole.wait()[:tokens], kept=(summands, part), give_up=give_up)


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


class Alone(Combine):
    """A group of one rank: its partial is the result."""

    name = "none"
    own_tokens = True

    def dispatch(self, x: Tensor, topk: TopKOutput, counts: Sequence[int] | None = None, place: str = "") -> Routed:
        """See `Combine`."""
        return Routed(x, topk, place=place)

    def begin(self, partial: Tensor, routed: Routed | None = None) -> Pending:
        """See `Combine`."""
        return Pending(lambda: partial)

    def spared(self, routed: Routed, parts: int) -> int:
        """See `Combine`."""
        return 0


def combine_place(routed: Routed | None) -> str:
    """Where a combine stands, for errors."""
    return f"{routed.place} combine" if routed is not None and routed.place else "combine"
