"""Public kernels for the same job, called as their own users call them. Nothing here is needed to run ours.

xkernels        ResearchComputer/xkernels, `fused_moe_mxfp4`: the whole op
triton_kernels  triton's `matmul_ogs`, as vLLM 0.20 ships it: both GEMMs and the activation, which is gpt-oss's;
                the sort and the sum over a token's routes are torch's
marlin          vLLM's `moe_wna16_marlin_gemm` behind its `moe_align_block_size`: the whole op, with torch's activation.
                The bytes are taken for weights in Marlin's order, which changes no time, so its result is not compared.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


def triton_kernels(shape: RankShape, weights: Weights) -> Op:
    """Weights in the layouts that it chooses for this device, gate and up rows interleaved as its SwiGLU wants."""
    from triton_kernels import matmul_ogs as ogs
    from triton_kernels.matmul_ogs_details import opt_flags
    from triton_kernels.numerics import InFlexData
    from triton_kernels.swiglu import swiglu_fn
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
    activation = ogs.FusedActivation(ogs.FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2), (1.0, LIMIT))

    def op(batch: Batch) -> Tensor:
        rows = weights.expert_map[batch.ids.long()].flatten()
        route = (rows >= 0).nonzero().flatten()
        route = route[torch.argsort(rows[route], stable=True)]
        counts = torch.bincount(rows[route], minlength=shape.held).int()
        token = (route // shape.top_k).int()
        gammas = batch.weights.flatten()[route].bfloat16()
        routing = ogs.RoutingData(gammas, counts, shape.held, 1, make_ragged_tensor_metadata(counts, len(route)))
        h = ogs.matmul_ogs(
            *(batch.x, w13, None, routing),
            gather_indx=ogs.GatherIndx(token, token),
            precision_config=first,
            fused_activation=activation,
        )
        y = ogs.matmul_ogs(h.view(-1, shape.inner), w2, None, routing, precision_config=second, gammas=gammas)
        out = torch.zeros(batch.x.shape, dtype=torch.float32, device=batch.x.device)
        return out.index_add_(0, token.long(), y.view(-1, shape.hidden).float())

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
        gate, up = both.chunk(2, dim=-1)
        y = batch.x.new_zeros(tokens * top_k, hidden)  # rows of remote routes are not written
        gemm(torch.nn.functional.silu(gate) * up, y, w2, w2_scale, 1, True)
        return y.view(tokens, top_k, hidden).sum(1)

    return op
