"""The experts as Triton and Gluon kernels: plan the routes, two grouped GEMMs, combine."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from triton.runtime import driver

from moe_ep import tables, workspace
from moe_ep.backends.base import Mxfp4Backend, activation_dtype
from moe_ep.backends.call import Impl, Shape, launch_config, order_for, override, table_name
from moe_ep.backends.gemms import GemmLaunch
from moe_ep.backends.op import Op, RouteOp, SingleOp, cut_of, op_of
from moe_ep.backends.target import Target, current_target, interpreted, runs_on
from moe_ep.kernels.bound import BoundLaunch
from moe_ep.kernels.launch import FALLBACK
from moe_ep.order import order_in_place
from moe_ep.spec import ActivationDtype, MoELayerSpec
from moe_ep.weights import ExpertWeights


def experts(
    x: Tensor,
    weights: ExpertWeights,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    topk_weights: Tensor,
    swiglu_limit: float | None,
    out: Tensor,
    activation_dtype: ActivationDtype = "bf16",
    impl: Impl = "triton_kernel",
) -> None:
    """As `reference.experts`. Raises `ValueError` where the kernels do not run on x's device, or not in this order."""
    if topk_ids.numel() == 0 or weights.count == 0:
        out.zero_()
        return
    _check_runs_on(x.device)
    weights = _ordered(weights, activation_dtype)
    with torch.cuda.device(x.device) if _elsewhere(x) else nullcontext():  # Triton launches where torch is
        shape = _shape(x, weights, topk_ids, expert_map, topk_weights, swiglu_limit, out, activation_dtype, impl)
        op = op_of(shape)
        inputs = _Inputs.of(x, weights, topk_ids, expert_map, topk_weights, swiglu_limit)
        if isinstance(op, SingleOp):
            _at_once(op, inputs, out)
            return
        if isinstance(op, RouteOp):
            _by_route(op, inputs, out)
            return
        op.plan(x, topk_ids, expert_map)
        if op.both is not None:
            _both_gemms(op, inputs, out)
            return
        _first_gemm(op, inputs)
        _second_gemm(op, inputs, op.down, op.combine, op.y, op.plan.plan.block_expert, out)


def experts_by_columns(
    x: Tensor,
    weights: ExpertWeights,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    topk_weights: Tensor,
    swiglu_limit: float | None,
    outs: Sequence[Tensor],
    activation_dtype: ActivationDtype = "bf16",
    spare: int = 0,
    impl: Impl = "triton_kernel",
) -> Iterator[None]:
    """As `experts`, into `outs` [M, H / parts] one after the other: each is computed when this yields."""
    parts = len(outs)
    cut = None
    if parts > 1 and topk_ids.numel() and weights.count and not _elsewhere(x):
        _check_runs_on(x.device)
        weights = _ordered(weights, activation_dtype)
        shape = _shape(x, weights, topk_ids, expert_map, topk_weights, swiglu_limit, outs[0], activation_dtype, impl)
        cut = cut_of(shape, parts, spare)
    if cut is None:
        whole = torch.empty(x.shape, dtype=outs[0].dtype, device=x.device)
        experts(x, weights, topk_ids, expert_map, topk_weights, swiglu_limit, whole, activation_dtype, impl)
        for out, columns in zip(outs, whole.chunk(parts, 1), strict=True):
            out.copy_(columns)
            yield
        return
    op = cut.op
    inputs = _Inputs.of(x, weights, topk_ids, expert_map, topk_weights, swiglu_limit)
    op.plan(x, topk_ids, expert_map)
    numbers = torch.arange(parts, dtype=torch.int32, device=x.device, out=cut.numbers)
    torch.add(numbers[:, None], op.plan.plan.block_expert, alpha=parts, out=cut.block_expert)
    _first_gemm(op, inputs)
    for part, out in enumerate(outs):
        down = cut.down if part else cut.first_down
        _second_gemm(op, inputs, down, cut.combine, cut.y, cut.block_expert[part], out)
        yield


@dataclass(frozen=True)
class _Inputs:
    """A call's tensors, as the kernels take them."""

    w13: Tensor
    s13: Tensor
    b13: Tensor
    w2: Tensor
    s2: Tensor
    b2: Tensor
    x: Tensor
    topk_ids: Tensor
    mapped: Tensor
    topk_weights: Tensor
    known: int
    limit: float

    @classmethod
    def of(
        cls,
        x: Tensor,
        weights: ExpertWeights,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        topk_weights: Tensor,
        swiglu_limit: float | None,
    ) -> "_Inputs":
        """What is not there is stood for by what is."""
        word = torch.int32 if weights.order == "kernel-fp8" else torch.uint16
        return cls(
            weights.w13.view(word),
            weights.w13_scale.view(torch.uint32),
            x if weights.b13 is None else weights.b13,
            weights.w2.view(word),
            weights.w2_scale.view(torch.uint32),
            x if weights.b2 is None else weights.b2,
            x,
            topk_ids,
            topk_ids if expert_map is None else expert_map,
            topk_weights,
            weights.count if expert_map is None else expert_map.numel(),
            0.0 if swiglu_limit is None else float(swiglu_limit),
        )

    @property
    def routes(self) -> tuple[Tensor, Tensor, int]:
        """Experts of the routes, where they are, and how many there can be."""
        return self.topk_ids, self.mapped, self.known


def _at_once(op: SingleOp, inputs: _Inputs, out: Tensor) -> None:
    """out of x."""
    op.launch(
        *(inputs.x, inputs.w13, inputs.s13, inputs.b13, inputs.w2, inputs.s2, inputs.b2, inputs.topk_weights),
        *(op.h, op.y, out, op.state, inputs.topk_ids, inputs.mapped, inputs.x.shape[0], inputs.known, inputs.limit),
    )


def _by_route(op: RouteOp, inputs: _Inputs, out: Tensor) -> None:
    """out of x."""
    w13, w2 = (inputs.w13, inputs.s13, inputs.b13), (inputs.w2, inputs.s2, inputs.b2)
    rounds = op.rounder
    if rounds is None:
        op.gate_up(inputs.x, *w13, op.h, *inputs.routes, inputs.limit)
        op.down(op.h, *w2, inputs.topk_weights, out, *inputs.routes)
        return
    rounds.round_tokens(inputs.x)
    op.gate_up(rounds.x, rounds.x_scale, *w13, inputs.topk_weights, op.h, *inputs.routes, inputs.limit)
    rounds.round_local(op.h, *inputs.routes)
    op.down(rounds.h, rounds.h_scale, *w2, inputs.topk_weights, out, *inputs.routes)


def _both_gemms(op: Op, inputs: _Inputs, out: Tensor) -> None:
    """y of the planned routes, and out of y."""
    assert op.both is not None
    plan = op.plan.plan
    blocks = (plan.route, plan.block_expert, plan.block_start, plan.block_end, plan.state)
    w13, w2 = (inputs.w13, inputs.s13, inputs.b13), (inputs.w2, inputs.s2, inputs.b2)
    op.both(
        *(inputs.x, w13, op.h, w2, op.y, *blocks, out, inputs.topk_ids, inputs.mapped),
        *(inputs.x.shape[0], inputs.known, inputs.limit),
    )
    op.combine(op.y, inputs.topk_ids, inputs.mapped, inputs.topk_weights, out, inputs.known)


def _first_gemm(op: Op, inputs: _Inputs) -> None:
    """h of the planned routes, rounded if activations are."""
    x, plan, rounds = inputs.x, op.plan.plan, op.rounder
    blocks = (plan.route, plan.block_expert, plan.block_start, plan.block_end)
    weights = (inputs.w13, inputs.s13, inputs.b13)
    if rounds is None:
        op.gate_up(x if op.plan.shifted is None else op.plan.shifted, *weights, op.h, *blocks, inputs.limit)
        return
    rounds.round_tokens(x)
    if rounds.native:
        op.gate_up(rounds.x, rounds.x_scale, *weights, inputs.topk_weights, op.h, *blocks, inputs.limit)
    else:
        op.gate_up(rounds.x, *weights, op.h, *blocks, inputs.limit)
    rounds.round_routes(op.h, inputs.topk_weights, plan)


def _second_gemm(
    op: Op, inputs: _Inputs, down: GemmLaunch, combine: BoundLaunch, y: Tensor, block_expert: Tensor, out: Tensor
) -> None:
    """y of h, and out of y."""
    plan, rounds = op.plan.plan, op.rounder
    blocks = (plan.route, block_expert, plan.block_start, plan.block_end)
    weights = (inputs.w2, inputs.s2, inputs.b2)
    if rounds is None:
        down(op.h, *weights, *(() if op.combine_weighs else (inputs.topk_weights,)), y, *blocks)
    else:
        h = (rounds.h, rounds.h_scale) if rounds.native else (rounds.h,)
        down(*h, *weights, inputs.topk_weights, y, *blocks)
    combine(y, inputs.topk_ids, inputs.mapped, inputs.topk_weights, out, inputs.known)


def _check_runs_on(device: torch.device) -> None:
    if not runs_on(device):
        raise ValueError(
            f"impl 'triton_kernel' does not run on {device} here: set TRITON_INTERPRET=1 before "
            "moe_ep's kernels are imported (Triton's interpreter), or use impl 'reference'"
        )


def _elsewhere(x: Tensor) -> bool:
    """Whether x is on another GPU than torch's current one."""
    return x.is_cuda and x.device.index != torch.cuda.current_device()


def _ordered(weights: ExpertWeights, activations: ActivationDtype) -> ExpertWeights:
    """The weights as they are, or from a checkpoint's order in that for these activations on the current device."""
    if weights.order == "kernel":
        return weights
    arch = current_target().arch
    order = order_for(activations, arch)
    if weights.order == "kernel-fp8" and order != "kernel-fp8":
        raise ValueError(
            f"the weights are in kernel-fp8 order, which takes fp8 activations on gfx942; these are {activations} "
            f"activations on {arch}: load the weights anew"
        )
    return weights.in_kernel_order(order)


def _shape(
    x: Tensor,
    weights: ExpertWeights,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    topk_weights: Tensor,
    swiglu_limit: float | None,
    out: Tensor,
    activations: ActivationDtype,
    impl: Impl,
) -> Shape:
    mapped = topk_ids if expert_map is None else expert_map
    b13, b2 = x if weights.b13 is None else weights.b13, x if weights.b2 is None else weights.b2
    codes, scales = (weights.w13, weights.w2), (weights.w13_scale, weights.w2_scale)
    tensors = (x, *codes, *scales, topk_ids, mapped, topk_weights, out, b13, b2)
    return Shape(
        tokens=x.shape[0],
        hidden=x.shape[1],
        inner=weights.inner,
        top_k=topk_ids.shape[1],
        local=weights.count,
        known=weights.count if expert_map is None else expert_map.numel(),
        mapped=expert_map is not None,
        biased=(weights.b13 is not None, weights.b2 is not None),
        limited=swiglu_limit is not None,
        dtypes=(topk_ids.dtype, mapped.dtype, out.dtype),
        aligned=tuple(t.data_ptr() % 16 == 0 for t in tensors),
        device=x.device,
        stream=driver.active.get_current_stream(x.device.index) if x.is_cuda else 0,
        target=current_target(),
        tables=tables.directory(),
        override=override(),
        activations=activations,
        order="kernel-fp8" if weights.order == "kernel-fp8" else "kernel",
        impl=impl,
    )


class TritonKernelBackend(Mxfp4Backend):
    """Grouped GEMMs in Triton and Gluon on any GPU that Triton compiles for, and in its interpreter on a CPU."""

    impl: ClassVar[Impl] = "triton_kernel"

    @classmethod
    def launch_configs(cls, spec: MoELayerSpec, quant_config: object, arch: str) -> dict[str, Any]:
        """The table that the launches are chosen from, and what it gives at numbers of tokens by powers of four."""
        # tokenspeed's names of archs drop the stepping, tables have it.
        full = {"gfx94": "gfx942", "gfx95": "gfx950", "gfx90": "gfx90a", "cpu": "interpreter"}.get(arch, arch)
        on_nvidia = arch.startswith("sm")
        target = Target("cuda" if on_nvidia else "hip", full, 32 if on_nvidia else 64)
        table, activations, chosen = tables.find(table_name(full, cls.impl)), activation_dtype(quant_config), {}
        order = order_for(activations, arch)
        for tokens in (4**n for n in range(8)):
            sizes = (spec.num_experts, spec.hidden_size, spec.intermediate_size // spec.tp_size)
            chosen[str(tokens)] = str(launch_config(tokens, spec.top_k, *sizes, target, activations, order, cls.impl))
        regimes = () if table is None else table.fp8 if order == "kernel-fp8" else table.regimes
        from_table = table is not None and regimes and (activations == "bf16" or order == "kernel-fp8")
        return {"weights": order, "table": table.source if table and from_table else FALLBACK, "tokens": chosen}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put codes and scales in kernel order, in place where K is a multiple of 128."""
        if getattr(layer, "weight_order", "checkpoint") != "checkpoint":
            return
        order = order_for(activation_dtype(self.quant_config), self.key.arch)
        for name in ("w13_weight", "w2_weight"):
            weight, scale = layer.get_parameter(name), layer.get_parameter(f"{name}_scale")
            weight.data, scale.data = order_in_place(weight.data, scale.data, order)
        if self.key.arch.startswith("sm"):  # while nothing is captured
            workspace.make_counters(layer.get_parameter("w13_weight").device)
        layer.weight_order = order  # type: ignore[assignment]  # an attribute like swiglu_arg

    @classmethod
    def device_refusal(cls, arch: str) -> str | None:
        """On a CPU the kernels run only in the interpreter."""
        if arch == "cpu" and not interpreted():
            return "no GPU; on a CPU the kernels run in Triton's interpreter, which TRITON_INTERPRET=1 turns on"
        return None
