"""Weights that ranks make themselves: the same whoever makes them, of the right size, cut in every way."""

import pytest
import torch

from moe_ep.arrangement import Arrangement
from moe_ep.comm import Alone
from moe_ep.dense import dense_layer
from moe_ep.layer import MoELayer
from moe_ep.made import MadeWeights, make_layers
from moe_ep.mxfp4 import dequantise
from moe_ep.placement import WHOLE, Slice
from moe_ep.routing import route
from moe_ep.selector import select_backend
from moe_ep.shape import ModelShape
from moe_ep.spec import MoELayerSpec, Mxfp4Config
from moe_ep.tensors import expert_specs, gate_specs, shared_specs
from tests.moe_ep.experts import relative_error

SHAPE = ModelShape(
    hidden=256, intermediate=256, layers=2, experts=5, top_k=3, vocab=32, hash_layers=1, routed_scaling=2
)
HASH, NORMAL = 0, 1


def made(seed: int = 0, skew: float = 0.1, device: str = "cpu") -> MadeWeights:
    return MadeWeights(SHAPE, seed, torch.device(device), skew)


def layers(ep: Slice = WHOLE, tp: Slice = WHOLE, shared: Slice = WHOLE, device: str = "cpu") -> dict[int, MoELayer]:
    specs = {n: MoELayerSpec.of_rank(SHAPE, n, ep.rank, ep.size, tp.rank, tp.size) for n in (HASH, NORMAL)}
    arch, impl = ("cpu", "reference") if device == "cpu" else (None, "auto")
    backends = {n: select_backend(s, Mxfp4Config(), arch=arch, impl=impl) for n, s in specs.items()}
    return make_layers(made(device=device), backends, Alone(), torch.device(device), shared=shared)


def tokens(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, SHAPE.hidden, generator=generator).bfloat16().to(device), torch.arange(9, device=device)


@pytest.mark.parametrize("way", ["ep", "tp"])
def test_what_ranks_make_adds_up_to_the_dense_layer_of_the_same_seed(way: str) -> None:
    x, ids = tokens()
    cuts = [Slice(rank, 2) for rank in range(2)]
    ranks = [layers(ep=cut, shared=cut) if way == "ep" else layers(tp=cut, shared=cut) for cut in cuts]
    for number in (HASH, NORMAL):
        partials = [rank[number].experts(x, rank[number].router(x, ids)).float() for rank in ranks]
        shared = [rank[number].shared_expert(x).float() for rank in ranks]  # type: ignore[misc]
        total = torch.stack(partials + shared).sum(0)
        assert relative_error(total, dense_layer(made(), number, x, ids)) < 8e-3


def test_experts_that_are_arranged_by_load_are_those_that_their_slots_name() -> None:
    spec = MoELayerSpec.of_rank(SHAPE, NORMAL, 0, 1)
    backend = select_backend(spec, Mxfp4Config(), arch="cpu", impl="reference")
    order = Arrangement((4, 3, 2, 1, 0), SHAPE.experts, 1)
    layer = make_layers(made(), {NORMAL: backend}, Alone(), torch.device("cpu"), arrangements={NORMAL: order})[NORMAL]
    x, ids = tokens()
    assert relative_error(layer(x, ids), dense_layer(made(), NORMAL, x, ids)) < 8e-3


def test_parts_have_the_names_types_and_sizes_of_a_checkpoint() -> None:
    weights = made()
    parts = {
        "expert": (weights.read_expert(NORMAL, 3), expert_specs(SHAPE)),
        "shared": (weights.read_shared_expert(NORMAL), shared_specs(SHAPE)),
        "hash": (weights.read_gate(HASH), gate_specs(SHAPE, hash_layer=True)),
        "gate": (weights.read_gate(NORMAL), gate_specs(SHAPE, hash_layer=False)),
    }
    for found, specs in parts.values():
        assert {name: tuple(t.shape) for name, t in found.items()} == {name: s.shape for name, s in specs.items()}
    assert int(weights.read_gate(HASH)["tid2eid"].max()) < SHAPE.experts


def test_the_seed_the_layer_and_the_expert_all_make_a_difference() -> None:
    first = made().read_expert(NORMAL, 0)["w1.weight"]
    assert torch.equal(first, made().read_expert(NORMAL, 0)["w1.weight"])
    for other in (made(seed=1).read_expert(NORMAL, 0), made().read_expert(HASH, 0), made().read_expert(NORMAL, 1)):
        assert not torch.equal(first, other["w1.weight"])


def test_activations_keep_about_their_size() -> None:
    parts = made().read_expert(NORMAL, 0)
    for name in ("w1", "w2", "w3"):
        weight = dequantise(parts[f"{name}.weight"], parts[f"{name}.scale"])
        variance = float(weight.square().mean()) * weight.shape[1]
        assert 0.5 < variance < 2


def test_with_more_skew_fewer_experts_get_the_tokens() -> None:
    x = torch.randn(512, SHAPE.hidden, generator=torch.Generator().manual_seed(1)).bfloat16()

    def least_busy(skew: float) -> int:
        gate = made(skew=skew).read_gate(NORMAL)
        chosen = route(x, gate["weight"], SHAPE.top_k, 1.0, bias=gate["bias"]).topk_ids
        return int(torch.bincount(chosen.flatten(), minlength=SHAPE.experts).min())

    assert least_busy(0.0) > 2 * least_busy(1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_what_the_dense_layer_makes_there() -> None:
    x, ids = tokens("cuda")
    for number, layer in layers(device="cuda").items():
        assert relative_error(layer(x, ids), dense_layer(made(device="cuda"), number, x, ids)) < 8e-3
