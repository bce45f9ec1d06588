"""The experts as Triton kernels: sort the routes, two grouped GEMMs, combine."""

import torch
from torch import Tensor
from triton.runtime import driver

from moe_ep.backends.base import Mxfp4Backend
from moe_ep.dispatch import plan_routes
from moe_ep.kernels.down import combine_kernel, down_kernel
from moe_ep.kernels.gate_up import gate_up_kernel
from moe_ep.kernels.launch import choose, interpreted

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


def experts(
    hidden_states: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    local_ids: Tensor,
    num_experts: int,
    topk_weights: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    swiglu_limit: float | None,
) -> Tensor:
    """Partial f32 [M, H] of the local experts; arguments as `fused_moe_mxfp4`, local_ids −1 where not local."""
    tokens, hidden = hidden_states.shape
    local_experts, inner = w13.shape[0], w13.shape[1] // 2
    top_k = local_ids.shape[1]
    routes = tokens * top_k
    if routes == 0 or local_experts == 0:
        return hidden_states.new_zeros(tokens, hidden, dtype=torch.float32)
    if not runs_on(hidden_states.device):
        raise ValueError(
            f"impl 'triton_kernel' does not run on {hidden_states.device} here: set TRITON_INTERPRET=1 before "
            "moe_ep's kernels are imported (Triton's interpreter), or use impl 'reference'"
        )

    tile = choose(routes, num_experts)
    plan = plan_routes(local_ids, local_experts, tile.block_m)
    blocks = (plan.route, plan.block_expert, plan.block_start, plan.block_end)
    x, w13, w13_scale, w2, w2_scale, local_ids = (
        t.contiguous() for t in (hidden_states, w13, w13_scale, w2, w2_scale, local_ids)
    )
    weights = topk_weights.float().contiguous()
    options = {
        "INTERPRETED": interpreted(),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }

    h = x.new_empty(routes, inner)
    gate_up_kernel[(plan.block_expert.numel() * -(-inner // tile.block_n),)](
        *(x, w13, w13_scale, x if b13 is None else b13.float().contiguous(), h),
        *blocks,
        0.0 if swiglu_limit is None else float(swiglu_limit),
        TOP_K=top_k,
        HIDDEN=hidden,
        INTER=inner,
        HAS_BIAS=b13 is not None,
        HAS_LIMIT=swiglu_limit is not None,
        **options,
    )
    y = x.new_empty(routes, hidden, dtype=torch.float32)
    down_kernel[(plan.block_expert.numel() * -(-hidden // tile.block_n),)](
        *(h, w2, w2_scale, x if b2 is None else b2.float().contiguous(), weights, y),
        *blocks,
        HIDDEN=hidden,
        INTER=inner,
        HAS_BIAS=b2 is not None,
        **options,
    )
    out = x.new_empty(tokens, hidden, dtype=torch.float32)
    combine_kernel[(tokens * -(-hidden // _COMBINE_BLOCK),)](
        *(y, local_ids, out),
        HIDDEN=hidden,
        TOP_K=top_k,
        BLOCK_H=_COMBINE_BLOCK,
    )
    return out


class TritonKernelBackend(Mxfp4Backend):
    """Grouped Triton GEMMs on any GPU that Triton compiles for, and in its interpreter on a CPU."""

    impl = "triton_kernel"

    @classmethod
    def device_refusal(cls, arch: str) -> str | None:
        """On a CPU the kernels run only in the interpreter."""
        if arch == "cpu" and not interpreted():
            return "no GPU; on a CPU the kernels run in Triton's interpreter, which TRITON_INTERPRET=1 turns on"
        return None
