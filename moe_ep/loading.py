"""From a checkpoint to one rank's `MoELayer`."""

import torch
from torch import Tensor

from moe_ep.backends.base import MoEBackend
from moe_ep.checkpoint import Checkpoint
from moe_ep.comm import Combine
from moe_ep.fp8 import dequantise_blocks
from moe_ep.layer import MoELayer, RoutedExperts, SharedExpert
from moe_ep.placement import Placement
from moe_ep.routing import Router


def load_layer(
    checkpoint: Checkpoint, layer: int, backend: MoEBackend, combine: Combine, device: torch.device
) -> MoELayer:
    """Read the experts of the backend's EP rank, and what every rank holds (router, shared expert).

    Raises
    ------
    CheckpointError
        If a tensor is missing or of another dtype or shape.
    """
    shape = checkpoint.shape
    placement = Placement(shape.experts, backend.spec.ep_size)
    with device:
        experts = RoutedExperts(backend, shape.swiglu_limit)
    fill_experts(experts, checkpoint, layer, placement.experts(backend.spec.ep_rank))
    experts.process_weights_after_loading()
    gate = checkpoint.read_gate(layer)
    router = Router(gate["weight"], shape.top_k, shape.routed_scaling, gate.get("bias"), gate.get("tid2eid"))
    shared = load_shared_expert(checkpoint, layer) if shape.shared_experts else None
    return MoELayer(router, experts, combine, shared).to(device)


def fill_experts(experts: RoutedExperts, checkpoint: Checkpoint, layer: int, rows: range) -> None:
    """Copy the global experts `rows` into the local rows 0, 1, … of the backend's weights."""
    inner = checkpoint.shape.intermediate
    targets: dict[str, Tensor] = {name: p.data for name, p in experts.named_parameters()}
    for local, expert in enumerate(rows):
        parts = checkpoint.read_expert(layer, expert)
        for part, suffix in (("weight", "weight"), ("scale", "weight_scale")):
            w13, w2 = targets[f"w13_{suffix}"][local], targets[f"w2_{suffix}"][local]
            w13[:inner].copy_(parts[f"w1.{part}"])
            w13[inner:].copy_(parts[f"w3.{part}"])
            w2.copy_(parts[f"w2.{part}"])


def load_shared_expert(checkpoint: Checkpoint, layer: int) -> SharedExpert:
    """The shared expert in bf16, on the CPU."""
    parts = checkpoint.read_shared_expert(layer)
    w1, w2, w3 = (
        dequantise_blocks(parts[f"{name}.weight"], parts[f"{name}.scale"]).bfloat16() for name in ("w1", "w2", "w3")
    )
    return SharedExpert(torch.cat((w1, w3)), w2, checkpoint.shape.swiglu_limit)
