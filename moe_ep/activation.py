"""The activation between the two GEMMs of an expert."""

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """silu(g)·u with V4's asymmetric clamp: the gate from above only, up from both sides."""
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up
