"""Tokens of one's own: each sent once to every node that holds one of its experts, and there to the ranks that do."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ep.comm.group import Group, Pending, refuse_capture
from moe_ep.comm.strategy import Combine, Routed
from moe_ep.comm.wire import Payload, RowFormat
from moe_ep.spec import TopKOutput


@dataclass(frozen=True)
class _Copies:
    """Rows that were copied to peers of a group: `send` and `receive` count them by peer; `back` int64 [rows, n] says
    where the copies of each row stand among those sent, in the order of peers, and past the last where there are
    fewer."""

    send: list[int]
    receive: list[int]
    back: Tensor


@dataclass(frozen=True)
class _Way:
    """Between nodes, then within the node; None where a group has one rank."""

    between: _Copies | None
    within: _Copies | None


class AllToAll(Combine):
    """All-to-all of tokens to the ranks that hold their experts, and of partials back (data-parallel attention).

    Rank l of a node sends a token once to rank l of every node that it has a route to; that rank hands it on to the
    ranks of its node which hold the experts, adds up their partials, and sends one row back. What a rank gets has only
    the routes that are its own. Bytes sent per token: (row + H · c) for each copy between nodes and each one within.

    How many rows move depends on the routes, so the host waits for the device: for prefill, not for CUDA graphs.
    """

    name = "all_to_all"
    own_tokens = True
    capturable = False

    def __init__(
        self,
        owners: Tensor,
        node: Group | None,
        rail: Group | None,
        payload: Payload = "bf16",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Parameters
        ----------
        owners: int [E], the EP rank that holds each expert; ranks are numbered node by node
        node: this node's ranks; None where there is one a node
        rail: the ranks at this place of all nodes; None where there is one node
        """
        self.owners, self.node, self.rail = owners.long(), node, rail
        self.payload, self.dtype = payload, dtype
        self._per_node = node.size if node else 1
        self.rank = (rail.rank if rail else 0) * self._per_node + (node.rank if node else 0)

    def dispatch(self, x: Tensor, topk: TopKOutput, counts: Sequence[int] | None = None, place: str = "") -> Routed:
        """See `Combine`; `counts` are not needed."""
        refuse_capture("all_to_all sends as many rows as the routes say; capture all_gather instead")
        row = RowFormat(x.shape[1], topk.topk_ids.shape[1], self.payload)
        rows, between, within = row.pack(x, topk), None, None
        if self.rail is not None:
            nodes = self._owner(row.ids(rows)) // self._per_node
            rows, between = _copy(self.rail, rows, nodes, f"{place} dispatch between nodes")
        if self.node is not None:
            owner = self._owner(row.ids(rows))
            here = torch.where(owner // self._per_node == self.rank // self._per_node, owner % self._per_node, -1)
            rows, within = _copy(self.node, rows, here, f"{place} dispatch within the node")
        x, topk = row.unpack(rows)
        mine = torch.where(self._owner(topk.topk_ids) == self.rank, topk.topk_ids, -1)
        return Routed(x, topk._replace(topk_ids=mine), _Way(between, within), place)

    def begin(self, partial: Tensor, routed: Routed | None = None) -> Pending:
        """See `Combine`: the way within the node is gone before this returns, that between nodes is under way."""
        if routed is None or not isinstance(routed.way, _Way):
            raise TypeError(f"all_to_all combines what its own dispatch has given, not {routed!r}")
        way, pending = routed.way, Pending(lambda: partial.to(self.dtype))
        if self.node is not None and way.within is not None:
            pending = _return(self.node, pending.wait(), way.within, f"{routed.place} combine within the node")
        if self.rail is not None and way.between is not None:
            pending = _return(self.rail, pending.wait(), way.between, f"{routed.place} combine between nodes")
        return pending

    def parts(self, routed: Routed, wanted: int) -> int:
        """See `Combine`: one, since every rank has a number of rows of its own."""
        return 1

    def _owner(self, ids: Tensor) -> Tensor:
        """int64, −1 for padding."""
        if self.owners.device != ids.device:
            self.owners = self.owners.to(ids.device)
        return torch.where(ids >= 0, self.owners[ids.long().clamp(min=0)], -1)


def _copy(group: Group, rows: Tensor, peers: Tensor, place: str) -> tuple[Tensor, _Copies]:
    """Rows [R, W] copied once to each of their `peers` int [R, k] (−1: none): those received, and the way back."""
    hit = torch.zeros(rows.shape[0], group.size + 1, dtype=torch.bool, device=rows.device)
    hit.scatter_(1, torch.where(peers >= 0, peers, group.size), True)
    hit = hit[:, : group.size]
    peer, row = hit.t().nonzero(as_tuple=True)
    send = hit.sum(0).tolist()
    receive = [theirs[group.rank] for theirs in group.counts(send, rows.device, place)]
    found = group.all_to_all(rows[row], send, receive, place).wait()
    back = torch.full((rows.shape[0], min(peers.shape[1], group.size)), len(row), device=rows.device)
    back[row, (hit.cumsum(1) - 1)[row, peer]] = torch.arange(len(row), device=rows.device)
    return found, _Copies(send, receive, back)


def _return(group: Group, partial: Tensor, copies: _Copies, place: str) -> Pending:
    """The sums over the copies of each row, in the order of peers whatever arrives first."""
    under_way = group.all_to_all(partial, copies.receive, copies.send, place)

    def finish() -> Tensor:
        found = under_way.wait()
        out = found.new_zeros(copies.back.shape[0], found.shape[1])
        for column in copies.back.unbind(1) if len(found) else ():
            copied = (column < len(found))[:, None]
            out.add_(found[column.clamp(max=len(found) - 1)].masked_fill_(~copied, 0))
        return out

    return Pending(finish)
