"""Copies between the memories of two ranks: on two GPUs that reach each other, or two processes on one."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from moe_ep.comm import Group
from moe_ep.comm.peer import LEAST_BYTES, PeerMemory, shared_memory
from moe_ep.comm.reduce import AllReduce
from moe_ep.footprint import PEER_BYTES
from moe_ep.layer import SharedExpert, finish
from tests.moe_ep.late import check_who_is_waited_for

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"
)

TOKENS, HIDDEN = 32_768, 256


def _start(rank: int, store: str) -> None:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    shared = dist.FileStore(store, 2)  # type: ignore[attr-defined]  # not in __all__
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    process_group = dist.new_group([0, 1])
    assert process_group is not None
    peer = PeerMemory(process_group, shared_memory(device), 60)
    torch.manual_seed(rank)
    check_sizes(peer)
    check_sums(Group(process_group, None, peer), device)
    check_graphs(Group(process_group, None, peer), device)
    check_who_is_waited_for(
        shared,
        rank,
        lambda watch: Group(process_group, watch, peer),
        lambda: torch.ones(LEAST_BYTES // 4, device=device),
    )
    dist.barrier()


def summed(tensor: Tensor) -> Tensor:
    """Over the ranks, by gloo: two summands have one sum, whatever adds them."""
    found = tensor.cpu()
    dist.all_reduce(found)
    return found


def check_sizes(peer: PeerMemory) -> None:
    assert peer.takes(LEAST_BYTES)
    assert peer.takes(PEER_BYTES)
    assert not peer.takes(LEAST_BYTES - 1)
    assert not peer.takes(PEER_BYTES + 1)


def check_sums(group: Group, device: torch.device) -> None:
    """Several at once, again and again; what does not fit beside those under way is sent otherwise."""
    assert group.peer is not None
    for odd in range(3):
        given = [torch.randn(size // 4, device=device) for size in (PEER_BYTES // 8 + 4 * odd, LEAST_BYTES)]
        expected = [summed(one) for one in given]
        under_way = [group.all_reduce(one) for one in given]
        assert all(pending.pair is not None for pending in under_way)
        assert not group.peer.takes(PEER_BYTES * 7 // 8)
        for pending, one in zip(under_way, expected, strict=True):
            assert torch.equal(pending.wait().cpu(), one)
    assert group.peer.takes(PEER_BYTES * 7 // 8)
    group.all_reduce(torch.ones(LEAST_BYTES // 4, device=device)).give_up()
    one = torch.randn(LEAST_BYTES // 4, device=device)
    total = summed(one)
    assert torch.equal(group.all_reduce(one).wait().cpu(), total), "what was given up is not in the way"


def check_graphs(group: Group, device: torch.device) -> None:
    """The end of a layer in two ranges beside its shared expert, eager and replayed on other sums, in turn."""
    shared = SharedExpert(
        torch.randn(256, HIDDEN, device=device).bfloat16() / 16, torch.randn(HIDDEN, 128, device=device).bfloat16(), 10
    )
    x = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    parts = [torch.randn(TOKENS, HIDDEN // 2, device=device) for _ in range(2)]
    combine = AllReduce(group, torch.float32)

    def work() -> Tensor:
        return finish(x, [combine.begin(part.clone()) for part in parts], shared)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = work()
    for turn in range(4):
        for part in parts:
            part.normal_()
        x.normal_()
        expected = (summed(torch.cat(parts, 1)).to(device) + shared(x)).bfloat16()
        graph.replay()
        assert torch.equal(out, expected)
        if turn % 2:
            assert torch.equal(work(), expected)


def test_sums_by_copies_are_those_of_a_collective_eager_and_captured_and_name_who_is_late(tmp_path: Path) -> None:
    spawn(_start, (str(tmp_path / "store"),), nprocs=2)
