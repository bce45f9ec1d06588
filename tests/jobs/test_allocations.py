"""What a rank's work allocates is what was planned for it, part by part."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from jobs.allocations import Allocations
from moe_ep import workspace
from moe_ep.backends import op
from moe_ep.checkpoint import Checkpoint
from moe_ep.comm import Alone
from moe_ep.comm.groups import ep_groups
from moe_ep.cost import OWN_TOKENS, Wire
from moe_ep.dense import dense_layer
from moe_ep.exchange import ColumnExchange
from moe_ep.footprint import Sharing, kept_bytes, loading_bytes, parity_bytes, pass_bytes
from moe_ep.loading import load_layers
from moe_ep.network import Layout
from moe_ep.placement import WHOLE, Slice
from moe_ep.selector import select_backend
from moe_ep.shape import ModelShape
from moe_ep.spec import MoELayerSpec, Mxfp4Config
from moe_ep.synthetic import write_checkpoint
from tests.moe_ep.test_layer import on_ranks
from tests.moe_ep.ways import WAYS, Way, arch_of, call, device_of, impl_of

WIDE = ModelShape(hidden=512, intermediate=256, layers=2, experts=4, top_k=3, vocab=64)
DEEP = ModelShape(hidden=256, intermediate=512, layers=2, experts=4, top_k=3, vocab=64, shared_experts=2)
PADDED = ModelShape(hidden=160, intermediate=256, layers=2, experts=5, top_k=3, vocab=64, shared_experts=0)
# On a GPU allocations are rounded, and a library's own among them.
LARGE = ModelShape(hidden=2048, intermediate=1024, layers=2, experts=8, top_k=6, vocab=64)
SHAPES = {"wide": WIDE, "deep": DEEP, "padded": PADDED} | ({"large": LARGE} if torch.cuda.is_available() else {})
PARITY, TOKENS = 8, 16
CASES = [
    *((way, *case) for way in ("reference", "interpreter") for case in (("wide", 1), ("deep", 2), ("padded", 1))),
    *((way, "large", cut) for way in WAYS if way == "cuda" for cut in (1, 2)),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, shape in SHAPES.items():
        write_checkpoint(folder / name, shape)
    return folder


def to_oneself(arrived: torch.Tensor, sent: torch.Tensor, group: object) -> None:
    """As much comes as goes."""
    arrived.copy_(sent)


def most_tokens(way: Way) -> int:
    return 512 if way == "cuda" else 32


def measured(path: Path, way: Way, cut: int) -> dict[str, int]:
    """Bytes beyond the weights by part, for the first of `cut` slices of each expert, as a probe goes about it."""
    op.op_of.cache_clear()  # the workspace of tests before this one
    workspace._kept.clear()
    # The reference's own figures are of a CPU: on a GPU a library's share of these sizes is too large.
    device, checkpoint = torch.device("cpu") if way == "reference" else device_of(way), Checkpoint.open(path)
    shape, place = checkpoint.shape, Slice(0, cut) if cut > 1 else WHOLE
    specs = {n: MoELayerSpec.of_rank(shape, n, 0, 1, 0, cut) for n in shape.all_layers}
    backends = {n: select_backend(s, Mxfp4Config(), arch=arch_of(way), impl=impl_of(way)) for n, s in specs.items()}
    for dtype in (torch.float32, torch.bfloat16):  # the matrix library's workspace
        torch.ones(256, 256, dtype=dtype, device=device) @ torch.ones(256, 256, dtype=dtype, device=device)
    watch = Allocations(device)

    def tokens(count: int) -> torch.Tensor:
        return torch.randn(count, shape.hidden).bfloat16().to(device)

    exchange = ColumnExchange(place, None) if cut > 1 else None
    with watch.during("loading"), patch.object(torch.distributed, "all_to_all_single", to_oneself):
        layers = load_layers(checkpoint, backends, Alone(), device, shared=place, exchange=exchange)
    held = watch.now
    with watch.during("parity"):
        x = tokens(PARITY)
        out = layers[0](x)
        dense_layer(checkpoint, 0, x, torch.zeros(PARITY, dtype=torch.int64, device=device))
        del x, out
    with watch.during("pass"):
        out = x = tokens(most_tokens(way))
        for layer in layers.values():
            out = layer(x)
        del x, out
    weights = sum(t.nbytes for m in layers.values() for t in (*m.parameters(), *m.buffers()))
    return {part: most - held for part, most in watch.most.items()} | {"held": held, "weights": weights}


@pytest.mark.parametrize(("way", "name", "cut"), CASES)
def test_what_was_planned_is_what_is_allocated_within_five_percent(
    way: Way, name: str, cut: int, checkpoints: Path
) -> None:
    shape = SHAPES[name]
    found = call(way, measured, checkpoints / name, way, cut)
    cuts: dict[str, Any] = {"expert_tp": cut, "shared_tp": cut}
    kernels, sharing = way != "reference", Sharing(gpu=way == "cuda")
    planned = {
        "loading": loading_bytes(shape, shape.layers, shape.experts, **cuts, kernels=kernels),
        "parity": parity_bytes(shape, PARITY, PARITY, **cuts, kernels=kernels, sharing=sharing),
        "pass": pass_bytes(shape, most_tokens(way), kept=PARITY, **cuts, kernels=kernels, sharing=sharing),
        "weights": sum(shape.held_bytes(shape.all_layers, shape.experts, **cuts).values()),
    }
    if way == "reference" and name == "padded":
        del planned["loading"], planned["weights"]  # nothing is converted, and nothing padded
    assert found.keys() >= planned.keys()
    for part, bytes_ in planned.items():
        assert found[part] == pytest.approx(bytes_, rel=0.05), part
    assert found["held"] == pytest.approx(found["weights"], rel=5e-3)


class _OneAtATime(dict[str, torch.Tensor]):
    """Gives a copy of what is asked for, as a host's tensor reaches a GPU."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).clone()


class _OnTheHost:
    """A checkpoint's first layer, which is read before anybody counts."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.shape, self._checkpoint = checkpoint.shape, checkpoint
        self._experts = [_OneAtATime(checkpoint.read_expert(0, expert)) for expert in range(self.shape.experts)]
        self._shared = _OneAtATime(checkpoint.read_shared_expert(0) if self.shape.shared_experts else {})

    def read_gate(self, layer: int) -> dict[str, torch.Tensor]:
        return self._checkpoint.read_gate(layer)

    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        return self._experts[expert]

    def read_shared_expert(self, layer: int) -> dict[str, torch.Tensor]:
        return self._shared


@pytest.mark.parametrize("name", ["wide", "deep", "padded"])
@pytest.mark.parametrize("made", [False, True])
def test_matrices_of_the_reference_reach_a_gpu_one_at_a_time_unless_they_are_made_there(
    name: str, made: bool, checkpoints: Path
) -> None:
    checkpoint = Checkpoint.open(checkpoints / name)
    weights = checkpoint if made else _OnTheHost(checkpoint)
    watch = Allocations(torch.device("cpu"))
    with watch.during("reference"):
        x = torch.randn(PARITY, checkpoint.shape.hidden).bfloat16()
        dense_layer(weights, 0, x, torch.zeros(PARITY, dtype=torch.int64))
    planned = parity_bytes(checkpoint.shape, PARITY, PARITY, made=made, sharing=Sharing(gpu=True))
    assert watch.most["reference"] == pytest.approx(planned - kept_bytes(checkpoint.shape, PARITY), rel=0.03)


def tokens_of_ones_own_take_what_is_planned(rank: int, world: int, path: Path, way: Way) -> None:
    """Gathered, unpacked, computed and scattered; an all-to-all takes at most that."""
    checkpoint, device = Checkpoint.open(path), torch.device("cpu")
    shape, groups = checkpoint.shape, ep_groups(world, rank, Layout(world, world), 60)
    spec = MoELayerSpec.of_rank(shape, 0, rank, world)
    backend = select_backend(spec, Mxfp4Config(), arch="cpu", impl=impl_of(way))
    layer = load_layers(checkpoint, {0: backend}, Alone(), device)[0]
    given = torch.randn(TOKENS // world, shape.hidden).bfloat16()
    planned = pass_bytes(shape, TOKENS, sharing=Sharing(world, Wire().row_bytes(shape)))
    for name in OWN_TOKENS:
        layer.combine = groups.strategy(name, shape.experts)
        op.op_of.cache_clear()
        workspace._kept.clear()
        watch = Allocations(device)
        with watch.during("pass"):
            out = x = given.clone()
            for _ in range(2):
                out = layer(out, torch.zeros(len(given), dtype=torch.int64), [len(given)] * world)
            del x, out
        if name == "all_gather":
            assert watch.most["pass"] == pytest.approx(planned, rel=0.05)
        else:
            assert watch.most["pass"] <= 1.05 * planned


def test_buffers_of_tokens_of_ones_own_are_planned(checkpoints: Path, tmp_path: Path) -> None:
    on_ranks(2, tmp_path / "store", tokens_of_ones_own_take_what_is_planned, checkpoints / "wide", "interpreter")


def test_a_part_counts_what_lives_at_the_same_time_and_forgets_what_was_there_before() -> None:
    watch = Allocations(torch.device("cpu"))
    before = torch.zeros(1000)
    with watch.during("first"):
        kept = [before + 1, before[10:20]]
        for _ in range(3):
            before.add_(torch.ones(1000))
    with watch.during("second"):
        kept.append(torch.ones(500) @ torch.ones(500, 2))
    assert watch.most == {"first": 8000, "second": 4000 + 2000 + 4000 + 8}
    assert watch.now == 4000 + 8
    kept.clear()
    assert watch.now == 0


def test_a_part_that_fails_is_not_kept() -> None:
    watch = Allocations(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="size"), watch.during("part"):
        torch.ones(3) + torch.ones(4)
    assert watch.most == {}


def test_kept_workspace_grows_as_the_kernels_let_it() -> None:
    token = kept_bytes(WIDE, 1)
    assert kept_bytes(WIDE, 10, before=4) == 14 * token
    assert kept_bytes(WIDE, 10, before=8) == 24 * token, "a larger piece is at least twice the last"
    assert kept_bytes(WIDE, 10, before=10) == 10 * token
