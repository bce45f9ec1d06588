"""V4's router: sqrt-softplus scores, a bias that only selects, and hash layers that go by token id."""

from functools import cache

import torch
from torch import Tensor, nn

from moe_ep.spec import TopKOutput


def route(
    hidden_states: Tensor,
    gate_weight: Tensor,
    top_k: int,
    routed_scaling: float,
    *,
    bias: Tensor | None = None,
    tid2eid: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> TopKOutput:
    """Choose and weigh the experts of every token.

    s = √softplus(x · Wᵀ) in f32. A hash layer takes the experts tid2eid[token]; any other layer the top k of
    s + bias. The weights are s[idx] / Σ s[idx] · routed_scaling either way: the bias selects only, and the
    factor is applied here and nowhere else.

    Parameters
    ----------
    hidden_states: [M, H]
    gate_weight: [E, H]
    bias: f32 [E]
    tid2eid: int64 [V, k], token_ids: int64 [M]; both or neither

    Raises
    ------
    ValueError
        If a hash layer is called without token ids.
    """
    logits = gate_logits(hidden_states, gate_weight)
    scores = torch.nn.functional.softplus(logits).sqrt()
    if tid2eid is not None:
        if token_ids is None:
            raise ValueError("token_ids: missing, but this is a hash layer, which routes by token id")
        # A padding token (−1) must not wrap to the table's last row: it goes nowhere.
        ids = torch.where((token_ids >= 0).unsqueeze(-1), tid2eid[token_ids.clamp(min=0)], -1)
    else:
        ids = (scores if bias is None else scores + bias).topk(top_k, dim=-1).indices
    chosen = scores.gather(-1, ids.clamp(min=0))
    # Scores below about e^-100 are zeros in f32; a token with nothing but these weighs nothing, not NaN.
    weights = chosen / chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) * routed_scaling
    return TopKOutput(topk_weights=weights, topk_ids=ids.int(), router_logits=logits)


def gate_logits(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
    """x · Wᵀ in f32 [M, E] of x [M, H] and W [E, H].

    A product of two bf16 is exact in f32, so on a GPU that adds them up in f32 anyway bf16 goes in as it is, at the
    matrix units' rate for it: in another order, so that logits differ in the last places.
    """
    both_bf16 = hidden_states.dtype == gate_weight.dtype == torch.bfloat16
    if both_bf16 and hidden_states.is_cuda and len(hidden_states) and _multiplies_to_f32(hidden_states.device):
        logits: Tensor = torch.mm(hidden_states, gate_weight.t(), out_dtype=torch.float32)
        return logits
    return torch.nn.functional.linear(hidden_states.float(), gate_weight.float())


@cache
def _multiplies_to_f32(device: torch.device) -> bool:
    """Whether torch multiplies bf16 to f32 there: 2.8 brought it, and a GPU's library may not have it."""
    one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


class Router(nn.Module):
    """The router of one layer: gate bf16 [E, H] and either bias f32 [E] or tid2eid int64 [V, k]."""

    gate_weight: Tensor
    bias: Tensor | None
    tid2eid: Tensor | None

    def __init__(
        self,
        gate_weight: Tensor,
        top_k: int,
        routed_scaling: float,
        bias: Tensor | None,
        tid2eid: Tensor | None,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.routed_scaling = routed_scaling
        self.register_buffer("gate_weight", gate_weight)
        self.register_buffer("bias", bias)
        self.register_buffer("tid2eid", tid2eid)

    def forward(self, hidden_states: Tensor, token_ids: Tensor | None = None) -> TopKOutput:
        """See `route`."""
        return route(
            hidden_states,
            self.gate_weight,
            self.top_k,
            self.routed_scaling,
            bias=self.bias,
            tid2eid=self.tid2eid,
            token_ids=token_ids,
        )
