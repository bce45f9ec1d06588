"""The activation between the two GEMMs of an expert."""

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """silu(g)·u with V4's asymmetric clamp: the gate from above only, up from both sides."""
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up


def swiglu_halves(gate_up: Tensor, limit: float | None) -> Tensor:
    """`swiglu` in f32 of gate_up bf16 [M, 2I], the gate first, rounded to bf16 [M, I]; in one pass on a GPU."""
    if gate_up.is_cuda and gate_up.dtype == torch.bfloat16:
        from moe_ep import passes  # Triton is imported only where there is a GPU

        if passes.takes(gate_up):
            return passes.swiglu(gate_up, limit)
    dtype, gate_up = gate_up.dtype, gate_up.float()  # the caller's goes where nobody else holds it
    gate, up = gate_up.chunk(2, dim=-1)
    return swiglu(gate, up, limit).to(dtype)
