"""The experts in plain torch: any device, f32 arithmetic, written as the formulas stand."""

import torch
from torch import Tensor

from moe_ep.activation import swiglu
from moe_ep.backends.base import Mxfp4Backend
from moe_ep.mxfp4 import dequantise


def expert(x: Tensor, w13: Tensor, w2: Tensor, b13: Tensor | None, b2: Tensor | None, limit: float | None) -> Tensor:
    """One expert: x f32 [M, H], w13 f32 [2I, H], w2 f32 [H, I] → f32 [M, H]."""
    gate, up = torch.nn.functional.linear(x, w13, b13).chunk(2, dim=-1)
    # The engines keep the activation between the two GEMMs in bf16, and so do the kernels.
    hidden = swiglu(gate, up, limit).bfloat16().float()
    return torch.nn.functional.linear(hidden, w2, b2)


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
    x = hidden_states.float()
    out = torch.zeros_like(x)
    for e in range(w13.shape[0]):
        token, slot = (local_ids == e).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        y = expert(
            x[token],
            dequantise(w13[e], w13_scale[e]),
            dequantise(w2[e], w2_scale[e]),
            None if b13 is None else b13[e].float(),
            None if b2 is None else b2[e].float(),
            swiglu_limit,
        )
        out.index_add_(0, token, y * topk_weights[token, slot].float().unsqueeze(-1))
    return out


class ReferenceBackend(Mxfp4Backend):
    """Plain torch on any device. Correct and slow; dequantises one expert at a time."""

    impl = "reference"
