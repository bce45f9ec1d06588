"""The dense reference of a layer: every hit expert read anew, dequantised, computed in f32.

Shares no code with the backends beyond the formats and the router, and holds one expert at a time, so it
checks a layer whose experts would not fit the device dequantised.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from moe_ep.fp8 import dequantise_blocks
from moe_ep.fp8_activations import rounded
from moe_ep.mxfp4 import dequantise
from moe_ep.routing import route
from moe_ep.shape import ModelShape
from moe_ep.spec import ActivationDtype


class Weights(Protocol):
    """Where single tensors of a model come from: a `Checkpoint`, or `MadeWeights`."""

    shape: ModelShape

    def read_expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """As `Checkpoint.read_expert`; so are the others."""
        ...

    def read_shared_expert(self, layer: int) -> dict[str, Tensor]: ...

    def read_gate(self, layer: int) -> dict[str, Tensor]: ...


def dense_layer(
    weights: Weights,
    layer: int,
    hidden_states: Tensor,
    token_ids: Tensor,
    activation_dtype: ActivationDtype = "bf16",
) -> Tensor:
    """Output f32 [M, H] of a whole MoE layer for hidden_states bf16 [M, H] and token_ids int64 [M].

    With fp8 activations the routed experts' are rounded as DeepSeek's own kernels do it (W4A8).
    """
    fp8 = activation_dtype == "fp8"
    shape = weights.shape
    device = hidden_states.device
    gate = {name: t.to(device) for name, t in weights.read_gate(layer).items()}
    topk = route(
        hidden_states,
        gate["weight"],
        shape.top_k,
        shape.routed_scaling,
        bias=gate.get("bias"),
        tid2eid=gate.get("tid2eid"),
        token_ids=token_ids,
    )
    x = hidden_states.float()
    routed, out = rounded(x) if fp8 else x, torch.zeros_like(x)
    for expert in topk.topk_ids.unique().tolist():
        hit = topk.topk_ids == expert
        tokens = hit.any(-1)
        weight = (topk.topk_weights * hit).sum(-1, keepdim=True)[tokens]
        w1, w2, w3 = _matrices(weights.read_expert(layer, expert), device, dequantise)
        h = weight * _activation(routed[tokens], w1, w3, shape.swiglu_limit)
        out[tokens] += linear(rounded(h.bfloat16().float()) if fp8 else h, w2)
        del w1, w2, w3  # before the next one's are made
    if shape.shared_experts:
        w1, w2, w3 = _matrices(weights.read_shared_expert(layer), device, dequantise_blocks)
        out += linear(_activation(x, w1, w3, shape.swiglu_limit), w2)
    return out


def _matrices(
    parts: Mapping[str, Tensor], device: torch.device, dequantised: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """w1, w2, w3 in f32."""
    w1, w2, w3 = (
        dequantised(parts[f"{name}.weight"].to(device), parts[f"{name}.scale"].to(device))
        for name in ("w1", "w2", "w3")
    )
    return w1, w2, w3


def _activation(x: Tensor, w1: Tensor, w3: Tensor, limit: float) -> Tensor:
    gate = linear(x, w1).clamp(max=limit)
    up = linear(x, w3).clamp(-limit, limit)
    return silu(gate) * up
