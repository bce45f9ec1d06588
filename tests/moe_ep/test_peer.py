"""What groups, strategies and layers do with a peer's memory; here gloo brings what it would hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock, patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from moe_ep.comm import AllGather, AllReduce, Combine, Group, ReduceScatter
from moe_ep.comm.group import SPARED
from moe_ep.comm.peer import _ARRIVED, _READ, LEAST_BYTES, PeerMemory, peer_memory
from moe_ep.layer import SharedExpert, finish
from moe_ep.spec import TopKOutput
from tests.moe_ep.test_layer import on_ranks

HIDDEN, TOP_K = 64, 2
COUNTS = ([3, 3], [4, 1], [0, 2], [0, 0])


class OverGloo:
    """Takes what is not empty; notes what it is asked to take and sends, and counts what has been read."""

    def __init__(self) -> None:
        self.read = 0
        self.asked, self.sent = (0, 0), 0

    def takes(self, nbytes: int, parts: int = 1) -> bool:
        self.asked = (nbytes, parts)
        return nbytes > 0

    def exchange(self, sent: Tensor) -> Any:
        self.sent = sent.nbytes
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

    def give_up(self) -> None:
        raise AssertionError("nothing failed")

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
    spared, asked = paired.spared(routed[1], 2), peer.asked
    ends = [
        finish(x, [combine.begin(half.clone(), one) for half in ranges], shared)
        for combine, one in zip((plain, paired), routed, strict=True)
    ]
    if paired.name != "reduce_scatter" and len(partial):
        assert (spared, asked) == (0, (peer.sent, 2)), "it asks for what it sends, and for both ranges"
    else:
        assert spared == plain.spared(routed[0], 2) == SPARED, "a collective takes part in it"
    # Sums in bf16 are rounded once less where the last pass adds the two up.
    exact = expected.dtype == torch.float32 or paired.name == "reduce_scatter"
    torch.testing.assert_close(*ends, rtol=0 if exact else 2e-2, atol=0 if exact else 4e-2)


def test_sums_through_a_peer_are_those_of_collectives(tmp_path: Path) -> None:
    on_ranks(2, tmp_path / "store", sums_through_a_peer_are_those_of_collectives)


class _Signals:
    """A rank's end of shared memory, which writes down what is asked of it."""

    rank = 0

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.places: list[int] = []

    def get_buffer(self, rank: int, shape: Any, dtype: torch.dtype, at: int) -> Tensor:
        self.places += [at * dtype.itemsize] if rank == self.rank else []
        return torch.zeros(shape, dtype=dtype)

    def put_signal(self, peer: int, channel: int, timeout_ms: int) -> None:
        assert (peer, timeout_ms) == (1, 7_000)
        self.told.append(("put", channel))

    def wait_signal(self, peer: int, channel: int, timeout_ms: int) -> None:
        assert (peer, timeout_ms) == (1, 7_000)
        self.told.append(("wait", channel))


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> tuple[PeerMemory, _Signals]:
    """12 MiB of it, on streams that are none."""
    for name in ("Stream", "Event", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    signals = _Signals()
    monkeypatch.setattr(symmetric, "rendezvous", lambda memory, group: signals)
    memory = PeerMemory(MagicMock(), torch.empty(3 * LEAST_BYTES, dtype=torch.uint8), 7)
    assert signals.told == [("put", _READ)], "there is nothing yet that the other might overwrite"
    signals.told.clear()
    return memory, signals


COPIED = [("put", _ARRIVED), ("wait", _ARRIVED)]
SENT = torch.zeros(LEAST_BYTES // 4 + 1)


def test_the_other_writes_again_when_all_that_was_under_way_at_once_has_been_read(
    shared: tuple[PeerMemory, _Signals],
) -> None:
    memory, signals = shared
    for _ in range(2):
        arrivals = [memory.exchange(SENT) for _ in range(2)]
        assert not memory.takes(LEAST_BYTES), "the room beside them is less"
        for arrival in arrivals:
            assert ("put", _READ) not in signals.told
            with arrival.read():
                pass
        assert signals.told == [("wait", _READ), *COPIED, *COPIED, ("put", _READ)]
        assert signals.places == [0, LEAST_BYTES + 512]
        assert memory.takes(3 * LEAST_BYTES)
        signals.told.clear()
        signals.places.clear()


def test_after_an_error_the_memory_is_as_it_was(shared: tuple[PeerMemory, _Signals]) -> None:
    memory, signals = shared
    arrivals = [memory.exchange(SENT) for _ in range(2)]
    with pytest.raises(RuntimeError, match="no memory"), arrivals[0].read():
        raise RuntimeError("no memory")
    assert not memory.takes(LEAST_BYTES)
    for arrival in (*arrivals, *arrivals):
        arrival.give_up()
    assert signals.told == [("wait", _READ), *COPIED, *COPIED, ("put", _READ)]
    assert memory.takes(3 * LEAST_BYTES)


def test_ranges_are_copied_if_all_of_them_fit_at_once(shared: tuple[PeerMemory, _Signals]) -> None:
    memory, _ = shared
    assert memory.takes(LEAST_BYTES, 3)
    assert not memory.takes(LEAST_BYTES, 4)
    assert not memory.takes(LEAST_BYTES - 1, 2)


def both_do_without_what_one_cannot_have(rank: int, world: int) -> None:
    group = dist.new_group([0, 1])
    assert group is not None
    entered = []

    def allocated(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(1, dtype=dtype)

    def refused(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        raise torch.OutOfMemoryError("out of memory on rank 1\nand more")

    def mapped(memory: Tensor, group_name: str) -> Any:
        entered.append(rank)
        if rank == 1:
            raise RuntimeError("rank 1 may not map it")
        return MagicMock(rank=0)

    about: dict[str, Any] = {
        "get_device_properties": lambda index: SimpleNamespace(uuid=f"GPU-{getattr(index, 'index', index)}")
    }
    about |= {"device_count": lambda: 2, "can_device_access_peer": lambda mine, others: True, "Stream": MagicMock()}
    with patch.multiple(torch.cuda, **about), patch.object(symmetric, "rendezvous", mapped):
        for empty, why in ((refused if rank else allocated, "out of memory on rank 1$"), (allocated, "rank 1 may not")):
            assert entered == [], "nobody waits for who has failed before"
            with patch.object(symmetric, "empty", empty), pytest.warns(UserWarning, match=f"sums go by NCCL: {why}"):
                assert peer_memory(group, torch.device("cuda", rank), 60) is None
    assert entered == [rank]


def test_both_do_without_what_one_cannot_have(tmp_path: Path) -> None:
    on_ranks(2, tmp_path / "store", both_do_without_what_one_cannot_have)


def test_on_amd_where_nothing_was_measured_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    # There is no process group, and no device that could be asked.
    assert peer_memory(cast(dist.ProcessGroup, None), torch.device("cuda", 0), 60) is None
