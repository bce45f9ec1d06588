"""Backends through tokenspeed's interface."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_ep.selector import detect_arch, select_backend
from moe_ep.shape import ModelShape
from moe_ep.spec import MoELayerSpec, Mxfp4Config, SwigluArg, TopKOutput
from tests.moe_ep.experts import Experts, Tokens, by_formula, make_experts, make_tokens, relative_error
from tests.moe_ep.ways import Way, arch_of, call, every_way, impl_of

SHAPE = ModelShape(hidden=64, intermediate=64, layers=1, experts=4, top_k=3, vocab=8)


def run(spec: MoELayerSpec, held: Experts, batch: Tokens, way: Way, limit: float | None = 10.0) -> Tensor:
    """The partial of a rank that holds `held`, computed this way."""
    out: Tensor = call(way, _run, spec, held, batch, impl_of(way), arch_of(way), limit)
    return out


def _run(spec: MoELayerSpec, held: Experts, batch: Tokens, impl: str, arch: str | None, limit: float | None) -> Tensor:
    """By the calls that an engine makes."""
    backend = select_backend(spec, Mxfp4Config(), arch=arch or detect_arch(), impl=impl)
    layer = nn.Module()
    layer.swiglu_arg = SwigluArg(limit=limit)  # type: ignore[assignment]  # an engine's layer has such attributes
    with batch.x.device:
        backend.create_layer_weights(layer, with_bias=held.b13 is not None)
    for name, tensor in zip(
        ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"), vars(held).values(), strict=False
    ):
        layer.get_parameter(name).data.copy_(tensor)
    if held.b13 is not None and held.b2 is not None:
        layer.get_parameter("w13_weight_bias").data.copy_(held.b13)
        layer.get_parameter("w2_weight_bias").data.copy_(held.b2)
    backend.process_weights_after_loading(layer)
    topk = TopKOutput(batch.weights, batch.ids, None)
    return backend.forward(layer, batch.x, topk, len(batch.x), len(batch.x))


def column_slice(experts: Experts, tp_rank: int) -> Experts:
    """One of two tensor-parallel slices of I."""
    inner = 32
    rows = slice(tp_rank * inner, (tp_rank + 1) * inner)

    def gate_and_up(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.cat([half[:, rows] for half in t.chunk(2, dim=1)], dim=1)

    w13, w13_scale = gate_and_up(experts.w13), gate_and_up(experts.w13_scale)
    assert w13 is not None
    assert w13_scale is not None
    return Experts(
        w13,
        w13_scale,
        experts.w2[:, :, tp_rank * 16 : (tp_rank + 1) * 16].contiguous(),
        experts.w2_scale[:, :, tp_rank : tp_rank + 1].contiguous(),
        gate_and_up(experts.b13),
        experts.b2,
    )


@every_way
def test_the_interface_computes_the_formula_in_the_type_of_the_tokens(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 64, device, bias=True)
    batch = make_tokens(5, 64, 4, 3, device)
    got = run(MoELayerSpec.of_rank(SHAPE, 0, 0, 1), experts, batch, way, limit=0.7)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, by_formula(experts, batch, limit=0.7)) < 1e-2


@every_way
def test_a_layer_without_a_limit_is_not_clamped(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 64, device)
    batch = make_tokens(5, 64, 4, 3, device)
    batch = replace(batch, x=batch.x * 50)
    got = run(MoELayerSpec.of_rank(SHAPE, 0, 0, 1), experts, batch, way, limit=None)
    assert relative_error(got, by_formula(experts, batch, limit=None)) < 1e-2


@every_way
def test_tensor_parallel_slices_add_up_and_the_down_bias_counts_on_one_rank(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 64, device, bias=True)
    batch = make_tokens(5, 64, 4, 3, device)
    spec = MoELayerSpec.of_rank(SHAPE, 0, 0, 1)
    partials = [run(replace(spec, tp_rank=r, tp_size=2), column_slice(experts, r), batch, way) for r in range(2)]
    assert relative_error(partials[0].float() + partials[1].float(), by_formula(experts, batch)) < 1e-2
