"""Experts with fp8 activations against DeepSeek's W4A8 arithmetic in f64.

On gfx942 they are multiplied as fp8; in every other way their rounded values are multiplied as bf16.
"""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_ep import explain_selection, fused_moe_mxfp4, select_backend
from moe_ep.backends.call import Shape, using
from moe_ep.backends.op import Op, op_of
from moe_ep.backends.target import Target
from moe_ep.kernels.bound import BoundLaunch
from moe_ep.kernels.launch import FP8_KERNELS, Gemm, LaunchConfig, fit_fp8
from moe_ep.mxfp4 import dequantise, pack
from moe_ep.order import KernelOrder, to_kernel_order
from moe_ep.placement import Placement
from moe_ep.shape import ModelShape
from moe_ep.spec import MoELayerSpec, Mxfp4Config, SwigluArg, TopKOutput
from moe_ep.weights import ExpertWeights
from tests.gfx942 import kernels
from tests.gfx942.driver import emulated
from tests.moe_ep.experts import (
    Experts,
    Tokens,
    _partial,
    by_formula,
    make_experts,
    make_tokens,
    partial,
    relative_error,
)
from tests.moe_ep.ways import WAYS, Way, every_way

TOLERANCE = 2e-3
"""Sums in f32 differ in their last bits from f64's, so that now and then one activation in thousands is rounded to the
other neighbour, 2^-4 away."""
CPU = torch.device("cpu")


def w4a8(experts: Experts, batch: Tokens, **options: Any) -> torch.Tensor:
    return by_formula(experts, batch, activation_dtype="fp8", **options)


def got(experts: Experts, batch: Tokens, way: Way, **options: Any) -> torch.Tensor:
    return partial(experts, batch, way, activation_dtype="fp8", **options)


@every_way
@pytest.mark.parametrize(("hidden", "inner", "top_k"), [(64, 32, 6), (160, 96, 1), (256, 160, 3)], ids=str)
def test_one_rank_computes_deepseeks_arithmetic(
    way: Way, hidden: int, inner: int, top_k: int, device: torch.device
) -> None:
    experts = make_experts(8, hidden, inner, device, bias=True)
    batch = make_tokens(17, hidden, 8, top_k, device)
    result = got(experts, batch, way)
    assert relative_error(result, w4a8(experts, batch)) < TOLERANCE
    assert 0.01 < relative_error(result, by_formula(experts, batch)) < 0.1, "it is no bf16 arithmetic"


@every_way
@pytest.mark.parametrize("ep_size", [2, 4])
def test_partials_add_up_to_the_whole_and_each_is_its_experts_share(
    way: Way, ep_size: int, device: torch.device
) -> None:
    experts = make_experts(10, 64, 64, device)  # 10 over 4 ranks: uneven
    batch = make_tokens(9, 64, 10, 6, device)
    placement = Placement(10, ep_size)
    partials = [got(experts, batch, way, ep_rank=r, ep_size=ep_size) for r in range(ep_size)]
    for rank, share in enumerate(partials):
        assert relative_error(share, w4a8(experts, batch, only=placement.experts(rank))) < TOLERANCE
    assert relative_error(torch.stack(partials).sum(0), w4a8(experts, batch)) < TOLERANCE


@every_way
def test_a_nan_in_a_scale_or_a_token_reaches_what_it_touches_and_no_other(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 160, 32, device)
    experts.w13_scale[0, 3, 1] = 255
    batch = make_tokens(5, 160, 4, 1, device)
    batch.ids[:, 0] = torch.tensor([0, 1, 2, 1, -1])
    batch.x[3, 150] = float("nan")  # of the second group, which is not full
    batch.x[4, 0] = float("inf")  # of a token that goes nowhere
    assert got(experts, batch, way).isnan().any(-1).tolist() == [True, False, False, True, False]


@every_way
def test_a_negative_zero_is_a_zero_and_scale_0_is_no_nan(way: Way, device: torch.device) -> None:
    experts = make_experts(2, 128, 32, device)
    batch = make_tokens(5, 128, 2, 2, device)
    batch.x[0, :64], batch.x[1, :64], batch.x[2] = -0.0, -1e-30, 0.0
    zeros = []
    for nibble in (0x0, 0x8):  # in e4m3fnuz the bits of −0 are NaN
        low = torch.where(experts.w13 & 0x7 < 4, experts.w13 & 0xF0 | nibble, experts.w13)
        high = torch.where(experts.w2 & 0x70 < 0x40, experts.w2 & 0xF | nibble << 4, experts.w2)
        scale = experts.w13_scale.clone()
        scale[0, 5] = 0
        zeros.append(replace(experts, w13=low, w2=high, w13_scale=scale))
    positive, negative = (got(e, batch, way) for e in zeros)
    assert torch.equal(positive, negative)
    assert relative_error(positive, w4a8(zeros[0], batch)) < TOLERANCE


@every_way
def test_equal_inputs_give_equal_bits_and_a_clamp_comes_before_the_rounding(way: Way, device: torch.device) -> None:
    experts = make_experts(3, 64, 32, device)
    batch = make_tokens(8, 64, 3, 2, device)
    result = got(experts, batch, way, limit=0.5)
    assert relative_error(result, w4a8(experts, batch, limit=0.5)) < TOLERANCE
    assert torch.equal(result, got(experts, batch, way, limit=0.5))
    unlimited = got(experts, batch, way, limit=None)
    assert relative_error(unlimited, w4a8(experts, batch, limit=None)) < TOLERANCE


@pytest.mark.parametrize(
    ("block_m", "gemm"),
    [
        (16, Gemm(16, 1, 1)),
        (16, Gemm(64, 4, 2)),
        (16, Gemm(16, 4, 2, slices=4)),
        (32, Gemm(64, 4, 2)),
        (64, Gemm(64, 4, 2)),
    ],
    ids=str,
)
def test_every_tile_of_gfx942_computes_several_blocks_and_remote_routes(block_m: int, gemm: Gemm) -> None:
    hidden, inner = (512 if gemm.slices == 4 else 256), 224  # the last group of I is not full
    experts = make_experts(4, hidden, inner, CPU, bias=True)
    batch = make_tokens(block_m + 5, hidden, 4, 2, CPU)
    batch.ids[:, 0] = 1  # more than one block of routes, the second not full
    batch.ids[:, 1] = torch.where(batch.ids[:, 1] == 1, 3, batch.ids[:, 1])
    expert_map = torch.tensor([0, 1, -1, 2])
    held = Experts(*(None if t is None else t[[0, 1, 3]].contiguous() for t in vars(experts).values()))  # type: ignore[arg-type]
    config = fit_fp8(LaunchConfig("stream", block_m, gemm, gemm), hidden, inner)
    with emulated() as chip, using(config):
        chip.protect(batch.x, batch.ids, batch.weights, expert_map)
        result = fused_moe_mxfp4(
            *(batch.x, held.w13, held.w13_scale, held.w2, held.w2_scale, batch.ids, batch.weights),
            b13=held.b13,
            b2=held.b2,
            expert_map=expert_map,
            activation_dtype="fp8",
            impl="triton_kernel",
            out_dtype=torch.float32,
        )
    remote = replace(batch, ids=torch.where(batch.ids == 2, -1, batch.ids))
    assert relative_error(result, w4a8(experts, remote)) < TOLERANCE
    names = [launch.program.name for launch in chip.launches if launch.program.name != "count_kernel"]
    assert names == [
        *("place_kernel", "quantise_tokens", "gate_up_stream_fp8", "quantise_routes", "down_stream_fp8"),
        "combine_kernel",
    ]


@pytest.mark.parametrize(
    ("tokens", "gemm", "limit"),
    [(n, *((Gemm(16, 4, 2, slices=4), 0.5) if n % 2 else (Gemm(32, 2, 1), None))) for n in range(1, 5)],
    ids=str,
)
def test_routes_without_a_plan_have_the_bits_of_those_with_one(tokens: int, gemm: Gemm, limit: float | None) -> None:
    hidden, inner = 512, 160  # the last group of I is not full
    experts = make_experts(4, hidden, inner, CPU, bias=True)
    batch = make_tokens(tokens, hidden, 4, 3, CPU)
    batch.ids[0, 1] = -1
    by_kernel = {}
    for kernel in FP8_KERNELS:
        config = fit_fp8(LaunchConfig(kernel, 16, gemm, gemm), hidden, inner)
        with emulated() as chip, using(config):
            chip.protect(batch.x, batch.ids, batch.weights)
            by_kernel[kernel] = [
                _partial(experts, batch, "triton_kernel", ep_rank=rank, ep_size=2, activation_dtype="fp8", limit=limit)
                for rank in range(2)
            ]
        assert f"gate_up_{kernel}_fp8" in {launch.program.name for launch in chip.launches}
    for direct, planned, only in zip(*by_kernel.values(), (range(2), range(2, 4)), strict=True):
        assert torch.equal(direct, planned)
        assert relative_error(direct, w4a8(experts, batch, only=only, limit=limit)) < TOLERANCE


def test_without_a_plan_a_nan_reaches_what_it_touches_and_no_other() -> None:
    experts = make_experts(4, 256, 128, CPU)
    experts.w13_scale[0, 3, 1] = experts.w2_scale[3, 37, 2] = 255
    batch = make_tokens(4, 256, 4, 2, CPU)
    batch.ids[:] = torch.tensor([[0, 1], [1, 2], [2, 3], [2, 1]])
    batch.x[3, 200] = float("nan")
    gemm = Gemm(16, 2, 1, slices=2)
    with emulated(), using(fit_fp8(LaunchConfig("route", 16, gemm, gemm), 256, 128)):
        got = _partial(experts, batch, "triton_kernel", activation_dtype="fp8").isnan()
    assert got.sum(-1).tolist() == [256, 0, 1, 256]
    assert got[2, 37]


def test_every_code_with_every_scale_is_its_value_on_gfx942() -> None:
    # Row = scale of all four blocks; along it every code, in every place of a word, beside every other.
    codes = torch.arange(128, dtype=torch.uint8).view(4, 32)
    codes = ((codes + torch.arange(4, dtype=torch.uint8)[:, None]) % 16).flatten().expand(256, 128)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 4).contiguous()
    ordered, fields = to_kernel_order(pack(codes), scale, "kernel-fp8")
    ones = torch.eye(128).to(torch.float8_e4m3fnuz)
    missing = torch.full((16,), 2.0**-55)  # what a weight and its scale come out short of
    out = torch.empty(256, 128)
    with emulated():
        kernels.fp8_weights[(16, 8)](
            ordered.view(torch.int32), fields.view(torch.uint32).flatten(), ones, missing, out, num_warps=1
        )
    expected = dequantise(pack(codes), scale)
    torch.testing.assert_close(out[:193], expected[:193], rtol=0, atol=0)
    assert out[255].isnan().all()
    assert (~out[193:255].isfinite() | (expected[193:255] == 0)).all(), "an overflow is no wrong number"


def test_weights_in_bf16s_order_give_the_same_on_gfx942() -> None:
    """Rounded activations multiplied as bf16 are what fp8's products are: one arithmetic on every device."""
    experts = make_experts(3, 256, 160, CPU)
    batch = make_tokens(9, 256, 3, 2, CPU)
    plain = ExpertWeights(experts.w13, experts.w13_scale, experts.w2, experts.w2_scale, None, None)
    results = []
    for order in get_args(KernelOrder):
        held = plain.in_kernel_order(order)
        with emulated():
            results.append(
                fused_moe_mxfp4(
                    *(batch.x, held.w13, held.w13_scale, held.w2, held.w2_scale, batch.ids, batch.weights),
                    activation_dtype="fp8",
                    weight_order=held.order,
                    impl="triton_kernel",
                    out_dtype=torch.float32,
                )
            )
    assert relative_error(results[0], results[1]) < TOLERANCE


def test_weights_in_fp8s_order_are_refused_where_nothing_reads_them() -> None:
    experts = make_experts(2, 128, 128, CPU)
    batch = make_tokens(2, 128, 2, 1, CPU)
    held = ExpertWeights(experts.w13, experts.w13_scale, experts.w2, experts.w2_scale, None, None)
    held = held.in_kernel_order("kernel-fp8")
    with (
        emulated(),
        pytest.raises(ValueError, match="kernel-fp8 order, which takes fp8 activations on gfx942; these are"),
    ):
        fused_moe_mxfp4(
            *(batch.x, held.w13, held.w13_scale, held.w2, held.w2_scale, batch.ids, batch.weights),
            weight_order="kernel-fp8",
            impl="triton_kernel",
        )


W4A8 = Mxfp4Config(is_w4a8_fp8=True)
TINY = ModelShape(hidden=160, intermediate=96, layers=1, experts=4, top_k=2, vocab=8)


@pytest.mark.parametrize(("arch", "order"), [("gfx942", "kernel-fp8"), ("sm90", "kernel"), ("gfx950", "kernel")])
def test_the_record_says_what_the_weights_are_multiplied_with_and_in_which_order(arch: str, order: str) -> None:
    spec = MoELayerSpec.of_rank(TINY, 0, 0, 2)
    record = explain_selection(spec, W4A8, arch=arch).as_dict()
    assert record["activation_dtype"] == "fp8"
    assert record["candidates"][-1]["reason"].endswith("fp8 activations")
    assert record["launch"]["weights"] == order
    assert record["launch"]["table"].startswith("fallback") == (order == "kernel")
    assert {config.split(",")[0] for config in record["launch"]["tokens"].values()} == {
        "stream" if order == "kernel-fp8" else "tile"
    }
    bf16 = explain_selection(spec, Mxfp4Config(), arch=arch).as_dict()
    assert (bf16["activation_dtype"], bf16["launch"]["weights"]) == ("bf16", "kernel")


@pytest.mark.parametrize("way", [way for way in WAYS if way in ("gfx942", "reference")])
def test_a_backend_puts_weights_in_the_order_that_its_activations_take(way: Way) -> None:
    spec = MoELayerSpec.of_rank(TINY, 0, 1, 2)
    impl = "triton_kernel" if way == "gfx942" else "reference"
    backend = select_backend(spec, W4A8, arch="gfx942", impl=impl)
    layer: Any = nn.Module()
    backend.create_layer_weights(layer)
    layer.swiglu_arg = SwigluArg(limit=10.0)
    layer.partial_dtype = torch.float32
    experts = make_experts(4, 160, 96, CPU)
    for name, tensor in vars(experts.rows(range(2, 4))).items():
        if tensor is not None:
            target = (
                name.replace("w13", "w13_weight").replace("w2", "w2_weight").replace("weight_scale", "weight_scale")
            )
            getattr(layer, target).data.copy_(tensor)
    backend.process_weights_after_loading(layer)
    backend.process_weights_after_loading(layer)  # once is enough
    assert getattr(layer, "weight_order", "checkpoint") == ("kernel-fp8" if way == "gfx942" else "checkpoint")
    batch = make_tokens(6, 160, 4, 2, CPU)
    topk = TopKOutput(batch.weights, batch.ids, None)
    with emulated():
        result = backend.forward(layer, batch.x, topk, 6, 6)
    assert relative_error(result, w4a8(experts, batch, only=range(2, 4))) < TOLERANCE


def test_a_kernel_that_cannot_take_fp8_activations_says_so() -> None:
    experts, batch = make_experts(1, 128, 128, CPU), make_tokens(1, 128, 1, 1, CPU)
    config = LaunchConfig("tile", 16, Gemm(64, 4, 2), Gemm(64, 4, 2))
    message = "fp8 activations with weights in kernel-fp8 order: no tile kernel takes them"
    with emulated(), using(config), pytest.raises(ValueError, match=message):
        fused_moe_mxfp4(
            *(batch.x, experts.w13, experts.w13_scale, experts.w2, experts.w2_scale, batch.ids, batch.weights),
            activation_dtype="fp8",
            impl="triton_kernel",
        )


def test_what_nvidia_runs_with_fp8_activations_compiles_for_hopper() -> None:
    op = op_of(
        Shape(
            *(8, 4096, 2048, 6, 64, 256),
            mapped=True,
            biased=(False, False),
            limited=True,
            dtypes=(torch.int64, torch.int32, torch.bfloat16),
            aligned=(True,) * 11,
            device=CPU,
            stream=-5,
            target=Target("cuda", "sm90", 32, 132),
            tables=None,
            override=None,
            activations="fp8",
        )
    )
    assert isinstance(op, Op)
    assert op.rounder is not None
    gemm = {"x": "bf16", "w13": "u16", "w2": "u16", "scale": "u32", "bias": "fp32", "weight": "fp32", "y": "fp32"}
    for launch, types in (
        (op.rounder.tokens, {"x": "bf16", "out": "bf16", "scale": "bf16"}),
        (op.gate_up, {**gemm, "h": "fp32"}),
        (op.rounder.routes, {"h": "fp32", "weight": "fp32", "out": "bf16", "scale": "bf16"}),
        (op.down, {**gemm, "h": "bf16"}),
    ):
        assert isinstance(launch, BoundLaunch)
        names, signature, pointers = launch.kernel.arg_names, {}, {}
        for i, name in enumerate(names):
            signature[name] = "constexpr" if name in launch.constants else "i32" if name == "rows" else "fp32"
            if name.endswith("_ptr"):
                signature[name] = "*" + types.get(name.removesuffix("_ptr"), "i32")
                pointers[(i,)] = [["tt.divisibility", 16]]
        constants = {name: launch.constants[name] for name in names if name in launch.constants}
        source = ASTSource(launch.kernel, signature, constants, pointers)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
        assert ("mma" in made.asm["ptx"]) == ("quantise" not in made.name)
