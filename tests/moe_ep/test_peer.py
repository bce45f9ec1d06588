"""What groups, strategies and layers do with a peer's memory; here gloo brings what it would hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ep.comm import AllGather, AllReduce, Combine, Group, ReduceScatter
from moe_ep.comm.peer import PeerMemory
from moe_ep.layer import SharedExpert, finish
from moe_ep.spec import TopKOutput
from tests.moe_ep.test_layer import on_ranks

HIDDEN, TOP_K = 64, 2
COUNTS = ([3, 3], [4, 1], [0, 2], [0, 0])


class OverGloo:
    """Takes what is not empty; counts what has been read."""

    def __init__(self) -> None:
        self.read = 0

    def takes(self, nbytes: int) -> bool:
        return nbytes > 0

    def exchange(self, sent: Tensor) -> Any:
        received = torch.empty_like(sent)
        peer = 1 - dist.get_rank()
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
        ):
            work.wait()
        return _Arrived(self, received)


class _Arrived:
    def __init__(self, peer: OverGloo, received: Tensor) -> None:
        self.peer, self.received = peer, received

    @contextmanager
    def read(self) -> Iterator[Tensor]:
        yield self.received
        self.peer.read += 1


def sums_through_a_peer_are_those_of_collectives(rank: int, world: int) -> None:
    peer = OverGloo()
    plain, paired = Group(), Group(peer=cast(PeerMemory, peer))
    shared = SharedExpert(torch.randn(32, HIDDEN).bfloat16(), torch.randn(HIDDEN, 16).bfloat16(), 10.0)
    torch.manual_seed(rank)
    for counts in COUNTS:
        for dtype in (torch.float32, torch.bfloat16):
            for kind in (AllReduce, ReduceScatter):
                x = torch.randn(sum(counts), HIDDEN).bfloat16()
                check(kind(plain, dtype), kind(paired, dtype), x, None, shared, peer)
            x = torch.randn(counts[rank], HIDDEN).bfloat16()
            check(AllGather(plain, dtype=dtype), AllGather(paired, dtype=dtype), x, counts, shared, peer)
    assert paired.sent == plain.sent, "the same bytes, by another way"


def check(
    plain: Combine, paired: Combine, x: Tensor, counts: list[int] | None, shared: SharedExpert, peer: OverGloo
) -> None:
    """Alone, and as the end of a layer in two ranges of columns."""
    topk = TopKOutput(torch.ones(len(x), TOP_K), torch.zeros(len(x), TOP_K, dtype=torch.int32), None)
    routed = [combine.dispatch(x, topk, counts) for combine in (plain, paired)]
    partial = torch.randn(len(routed[0].x), HIDDEN)
    expected = plain(partial.clone(), routed[0])
    read = peer.read
    assert torch.equal(paired(partial.clone(), routed[1]), expected)
    assert (peer.read == read + 1) == (len(partial) > 0), "what has been read is given back"
    ranges = [half.contiguous() for half in partial.chunk(2, 1)]
    ends = [
        finish(x, [combine.begin(half.clone(), one) for half in ranges], shared)
        for combine, one in zip((plain, paired), routed, strict=True)
    ]
    # Sums in bf16 are rounded once less where the last pass adds the two up.
    exact = expected.dtype == torch.float32 or paired.name == "reduce_scatter"
    torch.testing.assert_close(*ends, rtol=0 if exact else 2e-2, atol=0 if exact else 4e-2)


def test_sums_through_a_peer_are_those_of_collectives(tmp_path: Path) -> None:
    on_ranks(2, tmp_path / "store", sums_through_a_peer_are_those_of_collectives)
