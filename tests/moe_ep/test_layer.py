"""The layer over several ranks: real processes, real collectives, a real checkpoint."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from moe_ep.arrangement import Arrangement, arrange
from moe_ep.checkpoint import Checkpoint
from moe_ep.comm import AllToAll, Alone, Pending, Routed, combine_for
from moe_ep.comm.groups import ep_groups
from moe_ep.cost import OWN_TOKENS, SAME_TOKENS
from moe_ep.dense import dense_layer
from moe_ep.fp8 import dequantise_blocks
from moe_ep.layer import MoELayer, SharedExpert
from moe_ep.loading import load_layer, load_layers, load_shared_expert
from moe_ep.mxfp4 import dequantise
from moe_ep.network import Layout
from moe_ep.selector import select_backend
from moe_ep.shape import ModelShape
from moe_ep.spec import ActivationDtype, MoELayerSpec, Mxfp4Config
from moe_ep.synthetic import write_checkpoint
from tests.moe_ep.experts import relative_error
from tests.moe_ep.ways import CPU_WAYS, Way, arch_of, impl_of, interpreting, running

HASH, NORMAL = 0, 1
SHAPE = ModelShape(
    hidden=64, intermediate=32, layers=2, experts=10, top_k=6, vocab=32, hash_layers=1, routed_scaling=2.5
)
TOLERANCE = 8e-3
BF16, W4A8 = Mxfp4Config(), Mxfp4Config(is_w4a8_fp8=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    write_checkpoint(path, SHAPE, seed=3)
    return path


def tokens(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, SHAPE.hidden, generator=generator).bfloat16()
    return x, torch.randint(0, SHAPE.vocab, (count,), generator=generator)


def layer_of(
    path: Path, number: int, rank: int, world: int, way: Way, quantisation: Mxfp4Config = BF16
) -> tuple[Checkpoint, MoELayer]:
    checkpoint = Checkpoint.open(path)
    spec = MoELayerSpec.of_rank(checkpoint.shape, number, rank, world)
    backend = select_backend(spec, quantisation, arch=arch_of(way) or "cpu", impl=impl_of(way))
    return checkpoint, load_layer(checkpoint, number, backend, combine_for(world), torch.device("cpu"))


def _start(rank: int, world: int, store: str, work: Callable[..., None], args: tuple[object, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    work(rank, world, *args)
    dist.destroy_process_group()


def on_ranks(world: int, store: Path, work: Callable[..., None], *args: object) -> None:
    """Run `work(rank, world, *args)` in `world` processes; a failure in one is a failure here."""
    with interpreting() if "interpreter" in args else nullcontext():
        spawn(_start, (world, str(store), work, args), nprocs=world)


def equals_the_dense_reference(rank: int, world: int, path: Path, way: Way) -> None:
    for number in (HASH, NORMAL):
        checkpoint, layer = layer_of(path, number, rank, world, way)
        for count in (0, 1, 7, 33):
            x, token_ids = tokens(count)
            with running(way):
                out = layer(x, token_ids)
            assert out.dtype == torch.bfloat16
            assert out.shape == (count, SHAPE.hidden)
            if count:
                # The shared expert, added once a rank instead of once, would be far outside.
                assert relative_error(out, dense_layer(checkpoint, number, x, token_ids)) < TOLERANCE
            everybodys = [torch.empty_like(out) for _ in range(world)]
            dist.all_gather(everybodys, out)
            assert all(torch.equal(out, other) for other in everybodys), "all ranks hold the same result"


@pytest.mark.parametrize("way", CPU_WAYS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_layer_over_ranks_equals_the_dense_reference(world: int, way: Way, path: Path, tmp_path: Path) -> None:
    # 10 experts: over 4 ranks they are uneven.
    on_ranks(world, tmp_path / "store", equals_the_dense_reference, path, way)


def every_way_of_the_layer_equals_the_dense_reference(rank: int, world: int, path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    groups = ep_groups(world, rank, Layout(4, 2), 60)
    for number in (HASH, NORMAL):
        loads = [float(expert**2) for expert in range(SHAPE.experts)]
        arranged = arrange(loads, world, redundant=6)
        for arrangement in (None, arranged):
            slots = len(arrangement.slots) if arrangement else SHAPE.experts
            spec = MoELayerSpec.of_rank(replace(SHAPE, experts=slots), number, rank, world)
            backend = select_backend(spec, Mxfp4Config(), arch="cpu", impl="reference")
            held = {number: arrangement} if arrangement else None
            one = load_layers(checkpoint, {number: backend}, Alone(), torch.device("cpu"), arrangements=held)[number]
            for name in (*SAME_TOKENS, *OWN_TOKENS):
                one.combine = groups.strategy(name, slots)
                check_against_dense(checkpoint, number, one, rank)
                if arrangement:
                    check_copies_take_turns(one, arrangement, rank)


def check_copies_take_turns(layer: MoELayer, arrangement: Arrangement, rank: int) -> None:
    """The same copy on ranks with the same token; with tokens of their own each rank begins with another."""
    x, token_ids = tokens(1)
    (ids,) = layer.router(x, token_ids).topk_ids.tolist()
    (slots,) = layer.route(x, token_ids).topk_ids.tolist()
    turn = rank if layer.combine.own_tokens else 0
    assert slots == [own[turn % len(own)] for own in (arrangement.slots_of[expert] for expert in ids)]


def check_against_dense(checkpoint: Checkpoint, number: int, layer: MoELayer, rank: int) -> None:
    """Whole and in ranges of columns, tokens alike and of one's own; the counted load is that of all routes, once."""
    x, token_ids = tokens(13)
    counts = [6, 0, 4, 3] if layer.combine.own_tokens else [13] * 4
    first = sum(counts[:rank]) if layer.combine.own_tokens else 0
    mine = slice(first, first + counts[rank])
    expected = dense_layer(checkpoint, number, x[mine], token_ids[mine]) if counts[rank] else x[mine]
    for parts in (1, 2, 4):
        layer.cut = lambda rows, parts=parts: parts
        layer.record_load()
        out = layer(x[mine], token_ids[mine], counts)
        assert out.shape == expected.shape
        if counts[rank]:
            assert relative_error(out, expected) < TOLERANCE, (layer.combine.name, parts)
        assert layer.load is not None
        assert int(layer.load.sum()) == counts[rank] * SHAPE.top_k
        assert len(layer.load) == SHAPE.experts, "experts are counted, wherever their copies are"


def test_every_strategy_whole_in_ranges_and_arranged_by_load_equals_the_dense_reference(
    path: Path, tmp_path: Path
) -> None:
    on_ranks(4, tmp_path / "store", every_way_of_the_layer_equals_the_dense_reference, path)


def test_slices_of_the_shared_expert_do_not_go_with_an_all_to_all(path: Path) -> None:
    _, layer = layer_of(path, NORMAL, 0, 1, "reference")
    combine = AllToAll(torch.zeros(10, dtype=torch.int64), None, None)
    with pytest.raises(ValueError, match="hold all of it on each rank, or use all_gather"):
        MoELayer(layer.router, layer.experts, combine, layer.shared_expert, shared_is_sharded=True)


class _Begun(Alone):
    """Notes what is given up."""

    def __init__(self) -> None:
        self.given_up: list[int] = []

    def begin(self, partial: Tensor, routed: Routed | None = None) -> Pending:
        return Pending(lambda: partial, give_up=lambda: self.note(partial.shape[1]))

    def note(self, width: int) -> None:
        self.given_up.append(width)
        raise RuntimeError("the device has failed already")


def test_a_layer_that_fails_gives_up_what_it_had_begun(path: Path) -> None:
    _, layer = layer_of(path, NORMAL, 0, 1, "reference")
    layer.combine = begun = _Begun()
    layer.cut = lambda rows: 2
    with (
        patch.object(SharedExpert, "forward", side_effect=torch.OutOfMemoryError("no memory")),
        pytest.raises(torch.OutOfMemoryError, match="no memory"),
    ):
        layer(*tokens(3))
    assert begun.given_up == [SHAPE.hidden // 2] * 2
    begun.given_up.clear()
    layer(*tokens(3))
    assert begun.given_up == []


def enters_the_combine_without_work(rank: int, world: int, path: Path) -> None:
    _, layer = layer_of(path, HASH, rank, world, "reference")
    assert layer.router.tid2eid is not None
    # Rank 2 of 3 holds experts 7…9: no token goes there, yet it must enter the collective.
    layer.router.tid2eid = torch.arange(6).expand(SHAPE.vocab, 6).contiguous()
    x, token_ids = tokens(4)
    topk = layer.router(x, token_ids)
    if rank == 2:
        assert not layer.experts(x, topk).any()
    out = layer(x, token_ids)
    everybodys = [torch.empty_like(out) for _ in range(world)]
    dist.all_gather(everybodys, out)
    assert all(torch.equal(out, other) for other in everybodys)
    assert out.any()


def test_a_rank_that_no_token_hits_still_enters_the_combine(path: Path, tmp_path: Path) -> None:
    on_ranks(3, tmp_path / "store", enters_the_combine_without_work, path)


def test_one_rank_needs_no_process_group(path: Path) -> None:
    checkpoint, layer = layer_of(path, NORMAL, 0, 1, "reference")
    assert isinstance(layer.combine, Alone)
    x, token_ids = tokens(5)
    assert relative_error(layer(x, token_ids), dense_layer(checkpoint, NORMAL, x, token_ids)) < TOLERANCE


@pytest.mark.parametrize("way", ["reference", "gfx942"])
def test_fp8_activations_are_those_of_the_dense_reference(way: Way, path: Path) -> None:
    x, token_ids = tokens(7)
    for number in (HASH, NORMAL):
        checkpoint, layer = layer_of(path, number, 0, 1, way, W4A8)
        with running(way):
            out = layer(x, token_ids)
        dense = [dense_layer(checkpoint, number, x, token_ids, dtype) for dtype in get_args(ActivationDtype)]
        assert relative_error(out, dense[1]) < TOLERANCE < relative_error(out, dense[0])


def test_the_scaling_factor_is_applied_once(path: Path) -> None:
    _, layer = layer_of(path, NORMAL, 0, 1, "reference")
    x, token_ids = tokens(5)
    topk = layer.router(x, token_ids)
    unscaled = topk._replace(topk_weights=topk.topk_weights / SHAPE.routed_scaling)
    ratio = layer.experts(x, topk).norm() / layer.experts(x, unscaled).norm()
    assert ratio.item() == pytest.approx(2.5, rel=1e-3)
    assert topk.topk_weights.sum(-1).tolist() == pytest.approx([2.5] * 5)


def test_the_dense_reference_is_the_formula_token_by_token(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    x, token_ids = tokens(3)
    out = dense_layer(checkpoint, HASH, x, token_ids)
    gate = checkpoint.read_gate(HASH)

    def weights(parts: dict[str, Tensor], name: str) -> Tensor:
        weight, scale = parts[f"{name}.weight"], parts[f"{name}.scale"]
        restore = dequantise_blocks if weight.dtype == torch.float8_e4m3fn else dequantise
        return restore(weight, scale).double()

    def expert(parts: dict[str, Tensor], token: Tensor) -> Tensor:
        g = (weights(parts, "w1") @ token).clamp(max=10)
        u = (weights(parts, "w3") @ token).clamp(-10, 10)
        return weights(parts, "w2") @ (g / (1 + torch.exp(-g)) * u)

    for m in range(3):
        token = x[m].double()
        chosen = gate["tid2eid"][token_ids[m]].tolist()
        scores = torch.log1p(torch.exp(gate["weight"].double() @ token)).sqrt()
        total = scores[chosen].sum()
        expected = expert(checkpoint.read_shared_expert(HASH), token)
        for e in chosen:
            expected = expected + scores[e] / total * 2.5 * expert(checkpoint.read_expert(HASH, e), token)
        torch.testing.assert_close(out[m].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_shared_expert_is_clamped_too() -> None:
    w13 = torch.cat((torch.full((32, 64), 1.0), torch.full((32, 64), -1.0))).bfloat16()
    shared = SharedExpert(w13, torch.eye(64, 32).bfloat16(), swiglu_limit=10.0)
    out = shared(torch.ones(1, 64).bfloat16())  # g = 64 → 10, u = −64 → −10
    assert out[0, 0].item() == pytest.approx(-100, rel=1e-2)


def test_the_shared_expert_is_read_in_the_order_w1_w3(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    parts = checkpoint.read_shared_expert(NORMAL)
    shared = load_shared_expert(checkpoint, NORMAL)
    for rows, name in ((shared.w13[:32], "w1"), (shared.w13[32:], "w3"), (shared.w2, "w2")):
        assert torch.equal(rows, dequantise_blocks(parts[f"{name}.weight"], parts[f"{name}.scale"]).bfloat16())
