"""The strategies on two GPUs of one host, through NCCL: sums, graphs, ranges, and who a collective waits for."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from moe_ep.bench.overlap import graphs_equal
from moe_ep.bench.rig import TINY, Bench, build_layers, tokens_of
from moe_ep.comm import Alone, Group
from moe_ep.comm.groups import EpGroups, ep_groups
from moe_ep.comm.peer import LEAST_BYTES
from moe_ep.cost import OWN_TOKENS, SAME_TOKENS
from moe_ep.network import Layout
from tests.moe_ep.experts import relative_error
from tests.moe_ep.late import check_who_is_waited_for

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs of one host")

WORLD = 2
MANY = 32_767
"""Tokens of which even a quarter's sums are large enough for copies between peers."""


def _start(rank: int, store: str) -> None:
    os.environ.update(NCCL_NVLS_ENABLE="0")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    shared = dist.FileStore(store, WORLD)  # type: ignore[attr-defined]  # not in __all__
    dist.init_process_group("nccl", store=shared, rank=rank, world_size=WORLD, device_id=device)
    groups = ep_groups(WORLD, rank, Layout(WORLD, WORLD), 60)
    bench = Bench(rank, WORLD, device, groups, [], {}, None, torch.cuda.Stream())
    check_layers(bench, groups)
    for name in ("all_reduce", "reduce_scatter", "all_gather"):
        (layer,) = build_layers(TINY, bench, 1)
        for tokens in (33, MANY):
            graphs_equal("tiny", TINY, layer, tokens, name, bench)
            assert bench.lines[-1]["equal"], f"{name}, {tokens} tokens: a replayed graph gives other bits"
    check_that_large_sums_are_copied(bench, groups)
    check_that_an_all_to_all_is_not_captured(bench, groups)
    check_who_is_waited_for(shared, rank, lambda watch: Group(None, watch), lambda: torch.ones(4, device=device))
    dist.destroy_process_group()


def check_layers(bench: Bench, groups: EpGroups) -> None:
    """Every strategy, whole and in ranges of columns, against partials that are added up on one device."""
    (layer,) = build_layers(TINY, bench, 1)
    for tokens in (0, 1, 7, 300, MANY):
        whole, counts = tokens_of(TINY, tokens, bench, own=False)
        layer.combine = Alone()
        shared = layer.shared_expert
        layer.shared_expert = None
        partial = layer.experts(whole, layer.router(whole))
        everybodys = [torch.empty_like(partial) for _ in range(WORLD)]
        dist.all_gather(everybodys, partial)
        layer.shared_expert = shared
        assert shared is not None
        expected = torch.stack(everybodys).sum(0) + shared(whole)
        first = sum(counts[: bench.rank])
        for name in (*SAME_TOKENS, *OWN_TOKENS):
            layer.combine = groups.strategy(name, TINY.experts)
            own = layer.combine.own_tokens
            want: Tensor = expected[first : first + counts[bench.rank]] if own else expected
            x, _ = tokens_of(TINY, tokens, bench, own=own)
            for parts in (1, 2, 4):
                layer.cut = lambda rows, parts=parts: parts
                got = layer(x, counts=counts)
                assert got.shape == want.shape
                if len(want):
                    assert relative_error(got, want) < 8e-3, (name, tokens, parts)
        layer.cut = None


def check_that_an_all_to_all_is_not_captured(bench: Bench, groups: EpGroups) -> None:
    (layer,) = build_layers(TINY, bench, 1)
    layer.combine = groups.strategy("all_to_all", TINY.experts)
    x, _ = tokens_of(TINY, 8, bench, own=True)
    layer(x)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="capture all_gather instead"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x)


def check_that_large_sums_are_copied(bench: Bench, groups: EpGroups) -> None:
    """And small ones are not; both give NCCL's bits, which has no other order of two summands."""
    group = groups.whole
    assert group is not None
    assert group.peer is not None, "two GPUs of one host that reach each other"
    for nbytes, copied in ((LEAST_BYTES // 2, False), (LEAST_BYTES, True)):
        given = torch.randn(nbytes // 4, device=bench.device)
        expected = given.clone()
        dist.all_reduce(expected)
        pending = group.all_reduce(given)
        assert (pending.pair is not None) == copied
        assert torch.equal(pending.wait(), expected)


def test_two_gpus_combine_capture_and_name_who_is_late(tmp_path: Path) -> None:
    spawn(_start, (str(tmp_path / "store"),), nprocs=WORLD)
