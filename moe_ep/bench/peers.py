"""Public kernels for the same job, called as their own users call them. Nothing here is needed to run ours.

xkernels        ResearchComputer/xkernels, `fused_moe_mxfp4`: the whole op
triton_kernels  triton's `matmul_ogs`, as vLLM 0.20 ships it: both GEMMs, V4's activation in the first and the sum over
                a token's routes after the second, as vLLM calls them; the sort is torch's
marlin          vLLM's `moe_wna16_marlin_gemm` behind its `moe_align_block_size`: the whole op, with this package's
                activation. The bytes are taken for weights in Marlin's order, which changes no time, so its result is
                not compared.
tokenspeed      tokenspeed-kernel's portable Triton kernel for mxfp4 experts, weight-only: the whole op, behind torch's
                look-up of local experts. Of its package only what this kernel imports is imported.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from moe_ep.activation import swiglu_halves
from moe_ep.bench.cases import Batch, RankShape, Weights
from moe_ep.bench.exact import LIMIT

Op = Callable[[Batch], Tensor]
"""A rank's partial [M, H] of a batch."""


def xkernels(shape: RankShape, weights: Weights) -> Op:
    """As its README calls it."""
    from xkernels import fused_moe_mxfp4

    def op(batch: Batch) -> Tensor:
        result: Tensor = fused_moe_mxfp4(
            *(batch.x, *weights.packed, batch.ids, batch.weights),
            swiglu_limit=LIMIT,
            expert_map=weights.expert_map,
            backend="triton",
        )
        return result

    return op


@triton.jit
def _swiglu(pairs: tl.tensor, limit: tl.tensor) -> tl.tensor:
    gate, up = tl.split(tl.reshape(pairs, (pairs.shape[0], pairs.shape[1] // 2, 2)))
    gate = tl.minimum(gate, limit)
    return gate * tl.sigmoid(gate) * tl.clamp(up, -limit, limit)


def triton_kernels(shape: RankShape, weights: Weights) -> Op:
    """Weights in the layouts that it chooses for this device, gate and up rows interleaved as its activations want."""
    from triton_kernels import matmul_ogs as ogs
    from triton_kernels.matmul_ogs_details import opt_flags
    from triton_kernels.numerics import InFlexData
    from triton_kernels.tensor import FP4, convert_layout, make_ragged_tensor_metadata, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    opt_flags.update_opt_flags_constraints({"split_k": 1})  # else it fails for few routes

    def place(codes: Tensor, scale: Tensor) -> tuple[Any, Any]:
        value, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        scales, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
        return (
            convert_layout(wrap_torch_tensor(codes.transpose(-2, -1), dtype=FP4), value, **value_options),
            convert_layout(wrap_torch_tensor(scale.transpose(-2, -1)), scales, **scale_options),
        )

    def interleaved(rows: Tensor) -> Tensor:
        return torch.stack(rows.chunk(2, dim=1), dim=2).flatten(1, 2)

    def precision(scale: Any) -> Any:
        flex = ogs.FlexCtx(rhs_data=InFlexData())
        return ogs.PrecisionConfig(flex_ctx=flex, weight_scale=scale, out_dtype=torch.bfloat16)

    w13, w13_scale = place(interleaved(weights.w13), interleaved(weights.w13_scale))
    w2, w2_scale = place(weights.w2, weights.w2_scale)
    first, second = precision(w13_scale), precision(w2_scale)
    activation = ogs.FusedActivation(ogs.FnSpecs("v4_swiglu", _swiglu, ("limit",), reduction_n=2), (LIMIT,))
    bounds = torch.arange(shape.held + 1, dtype=torch.uint8, device=weights.w13.device)

    def op(batch: Batch) -> Tensor:
        row = weights.expert_map[batch.ids].flatten()
        by_row, order = row.to(torch.uint8).sort(stable=True)  # -1 is 255: remote routes come last, in no GEMM's rows
        counts = torch.searchsorted(by_row, bounds, out_int32=True).diff()
        route = order.int()
        routing = ogs.RoutingData(
            *(batch.weights.flatten()[order], counts, shape.held, shape.top_k),
            make_ragged_tensor_metadata(counts, len(route)),
            expected_tokens_per_expt=max(1, len(route) // shape.experts),
        )
        h = ogs.matmul_ogs(
            *(batch.x, w13, None, routing),
            gather_indx=ogs.GatherIndx(route, row),
            precision_config=first,
            fused_activation=activation,
        )
        result: Tensor = ogs.matmul_ogs(
            *(h.view(-1, shape.inner), w2, None, routing),
            scatter_indx=ogs.ScatterIndx(row, route),  # of the first only its -1, at remote routes, are read
            precision_config=second,
            gammas=routing.gate_scal,
        )
        return result

    return op


_E2M1 = 562949953487106
"""vLLM's id of the scalar type float4_e2m1f."""


def marlin(shape: RankShape, weights: Weights) -> Op:
    """The kernels that vLLM runs for mxfp4 experts on Hopper."""
    import vllm._moe_C  # noqa: F401 - registers torch.ops._moe_C

    ops = torch.ops._moe_C
    device, held, hidden, inner = weights.w13.device, shape.held, shape.hidden, shape.inner
    w13 = weights.w13.view(-1).view(torch.int32).view(held, hidden // 16, 4 * inner)
    w2 = weights.w2.view(-1).view(torch.int32).view(held, inner // 16, 2 * hidden)
    w13_scale = weights.w13_scale.view(-1).view(torch.float8_e8m0fnu).view(held, hidden // 32, 2 * inner)
    w2_scale = weights.w2_scale.view(-1).view(torch.float8_e8m0fnu).view(held, inner // 32, hidden)
    locks = torch.zeros(
        4 * torch.cuda.get_device_properties(device).multi_processor_count, dtype=torch.int, device=device
    )

    def op(batch: Batch) -> Tensor:
        tokens, top_k = batch.ids.shape
        block = next((b for b in (8, 16, 32, 48) if tokens * top_k / held / b < 0.9), 64)
        most = batch.ids.numel() + shape.experts * (block - 1)
        most = min(most, batch.ids.numel() * block) if batch.ids.numel() < shape.experts else most
        route = torch.empty(most, dtype=torch.int32, device=device)
        expert = torch.empty(-(-most // block), dtype=torch.int32, device=device)
        padded = torch.empty(1, dtype=torch.int32, device=device)
        ops.moe_align_block_size(batch.ids, shape.experts, block, route, expert, padded, weights.expert_map)

        def gemm(x: Tensor, y: Tensor, weight: Tensor, scale: Tensor, slots: int, weigh: bool) -> None:
            ops.moe_wna16_marlin_gemm(
                *(x, y, weight, None, scale, None, None, None, None, None, locks, route, expert, padded),
                *(batch.weights, block, slots, weigh, _E2M1, len(x), y.shape[1], x.shape[1]),
                *(True, False, True, False, -1, -1, -1),
            )

        both = batch.x.new_empty(tokens * top_k, 2 * inner)
        gemm(batch.x, both, w13, w13_scale, top_k, False)
        y = batch.x.new_zeros(tokens * top_k, hidden)  # rows of remote routes are not written
        gemm(swiglu_halves(both, LIMIT), y, w2, w2_scale, 1, True)
        return y.view(tokens, top_k, hidden).sum(1)

    return op


@cache
def _tokenspeed_kernel() -> ModuleType:
    """The module of its kernel, without the rest of its package.

    That package's `__init__` files import all kernel libraries that it can use (cutlass, flashinfer, …) and ask for a
    GPU, which this kernel does not: so packages without contents stand for them meanwhile. Its Triton,
    tokenspeed_triton, is a build of Triton under a name of its own; where it is not installed, this process's Triton
    goes by that name.
    """
    package = "tokenspeed_kernel"
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    if find_spec("tokenspeed_triton") is None:
        _lend_triton("tokenspeed_triton")
    before = set(sys.modules)
    for parts in ((), ("ops",), ("ops", "moe"), ("ops", "moe", "triton")):
        empty = ModuleType(".".join((package, *parts)))
        empty.__path__ = [str(Path(spec.origin).parent.joinpath(*parts))]
        sys.modules.setdefault(empty.__name__, empty)
    try:
        return import_module(f"{package}.ops.moe.triton.mxfp4")
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == package:  # who imports it later gets all of it
                del sys.modules[name]


def _lend_triton(name: str) -> None:
    """Let what that kernel imports of a Triton of this name be this process's."""
    for module in ("experimental.gluon.language", "language.extra.libdevice", "tools.tensor_descriptor"):
        import_module(f"triton.{module}")
    with suppress(ImportError):
        import_module("triton.profiler")
    ours = {path: module for path, module in sys.modules.items() if path.partition(".")[0] == "triton"}
    sys.modules.update({path.replace("triton", name, 1): module for path, module in ours.items()})


def tokenspeed(shape: RankShape, weights: Weights) -> Op:
    """With activations as they come (its "input"), which it multiplies by weights decoded to bf16."""
    kernel = _tokenspeed_kernel()
    plan = {"activation": "swiglu", "internal_activation_dtype": "input"}
    layer = SimpleNamespace(
        activation="swiglu",
        swiglu_arg=SimpleNamespace(alpha=1.0, limit=LIMIT),
        w13_weight=weights.w13,
        w13_weight_scale=weights.w13_scale,
        w2_weight=weights.w2,
        w2_weight_scale=weights.w2_scale,
    )
    kernel.triton_mxfp4_moe_weights(plan, layer)

    def op(batch: Batch) -> Tensor:
        local = weights.expert_map[batch.ids]  # its caller's work too; it passes over -1
        result: Tensor = kernel.triton_mxfp4_precomputed_moe_apply(plan, batch.x, layer, None, batch.weights, local)
        return result

    return op
