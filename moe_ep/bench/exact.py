"""The op in f64, rounded nowhere: what errors are measured against."""

import torch
from torch import Tensor

from moe_ep.bench.cases import Batch, Weights
from moe_ep.mxfp4 import dequantise

LIMIT = 10.0
"""V4's clamp."""


def exact(weights: Weights, batch: Batch) -> Tensor:
    """The partial f64 [M, H] of DeepSeek-V4's formula, for weights in checkpoint order."""
    out = torch.zeros(batch.x.shape, dtype=torch.float64, device=batch.x.device)
    rows = weights.expert_map[batch.ids.long()]
    for row in rows[rows >= 0].unique().tolist():
        token, slot = (rows == row).nonzero(as_tuple=True)
        w13 = dequantise(weights.w13[row], weights.w13_scale[row]).double()
        w2 = dequantise(weights.w2[row], weights.w2_scale[row]).double()
        gate, up = (batch.x[token].double() @ w13.T).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
        out.index_add_(0, token, (h @ w2.T) * batch.weights[token, slot, None].double())
    return out
