"""The experts as Triton kernels: sort the routes, two grouped GEMMs, combine."""

import torch
import triton
from torch import Tensor, nn
from triton.runtime import driver

from moe_ep.backends.base import Mxfp4Backend
from moe_ep.dispatch import plan_routes
from moe_ep.kernels.down import combine_kernel, down_kernel
from moe_ep.kernels.gate_up import gate_up_kernel
from moe_ep.kernels.launch import Target, choose, interpreted
from moe_ep.order import order_in_place, pad_scales
from moe_ep.weights import ExpertWeights

_COMBINE_BLOCK = 1024


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device: in Triton's interpreter any, else that of Triton's active driver."""
    if interpreted():
        return True
    try:
        active: torch.device = driver.active.get_active_torch_device()
    except RuntimeError:  # no driver found a device
        return False
    return active.type == device.type


def _target() -> Target:
    """What Triton compiles for; the interpreter takes what AMD's GPUs take."""
    return "cuda" if not interpreted() and driver.active.get_current_target().backend == "cuda" else "hip"


def experts(
    x: Tensor,
    weights: ExpertWeights,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    topk_weights: Tensor,
    swiglu_limit: float | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `reference.experts`. Raises `ValueError` where the kernels do not run on x's device."""
    tokens, hidden = x.shape
    top_k, inner = topk_ids.shape[1], weights.inner
    routes = tokens * top_k
    if routes == 0 or weights.count == 0:
        return x.new_zeros(tokens, hidden, dtype=out_dtype)
    if not runs_on(x.device):
        raise ValueError(
            f"impl 'triton_kernel' does not run on {x.device} here: set TRITON_INTERPRET=1 before "
            "moe_ep's kernels are imported (Triton's interpreter), or use impl 'reference'"
        )

    weights = weights.in_kernel_order()
    target = _target()
    known = weights.count if expert_map is None else expert_map.numel()
    tile = choose(routes, known, target)
    plan, shifted = plan_routes(x, topk_ids, expert_map, weights.count, tile.block_m)
    blocks = (plan.route, plan.block_expert, plan.block_start, plan.block_end)
    options = {
        "HIDDEN": hidden,
        "INTER": inner,
        "DECODE": "ptx" if target == "cuda" else "bits",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    w13, w2 = weights.w13.view(torch.uint16), weights.w2.view(torch.uint16)
    s13, s2 = weights.w13_scale.view(torch.uint32), weights.w2_scale.view(torch.uint32)
    h = x.new_empty(routes, inner)
    gate_up_kernel[(plan.block_expert.numel() * triton.cdiv(inner, tile.block_n),)](
        *(shifted, w13, s13, x if weights.b13 is None else weights.b13, h),
        *blocks,
        0.0 if swiglu_limit is None else float(swiglu_limit),
        TOP_K=top_k,
        HAS_BIAS=weights.b13 is not None,
        HAS_LIMIT=swiglu_limit is not None,
        **options,
    )
    y = x.new_empty(routes, hidden, dtype=torch.float32)
    down_kernel[(plan.block_expert.numel() * triton.cdiv(hidden, tile.block_n),)](
        *(h, w2, s2, x if weights.b2 is None else weights.b2, topk_weights, y),
        *blocks,
        HAS_BIAS=weights.b2 is not None,
        **options,
    )
    out = x.new_empty(tokens, hidden, dtype=out_dtype)
    combine_kernel[(tokens * triton.cdiv(hidden, _COMBINE_BLOCK),)](
        *(y, topk_ids, topk_ids if expert_map is None else expert_map, out),
        known,
        LOCAL=weights.count,
        HAS_MAP=expert_map is not None,
        HIDDEN=hidden,
        TOP_K=top_k,
        BLOCK_H=_COMBINE_BLOCK,
    )
    return out


class TritonKernelBackend(Mxfp4Backend):
    """Grouped Triton GEMMs on any GPU that Triton compiles for, and in its interpreter on a CPU."""

    impl = "triton_kernel"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put the codes in kernel order, in place where K is a multiple of 128."""
        if getattr(layer, "weight_order", "checkpoint") == "kernel":
            return
        for name in ("w13_weight", "w2_weight"):
            weight, scale = layer.get_parameter(name), layer.get_parameter(f"{name}_scale")
            weight.data = order_in_place(weight.data)
            scale.data = pad_scales(scale.data).contiguous()
        layer.weight_order = "kernel"  # type: ignore[assignment]  # an attribute like swiglu_arg

    @classmethod
    def device_refusal(cls, arch: str) -> str | None:
        """On a CPU the kernels run only in the interpreter."""
        if arch == "cpu" and not interpreted():
            return "no GPU; on a CPU the kernels run in Triton's interpreter, which TRITON_INTERPRET=1 turns on"
        return None
