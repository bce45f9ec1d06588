"""`MoELayer`: router, this rank's experts, the shared expert, and the combine."""

import torch
from torch import Tensor, nn

from moe_ep.activation import swiglu
from moe_ep.backends.base import MoEBackend
from moe_ep.comm import Combine
from moe_ep.routing import Router
from moe_ep.spec import SwigluArg


class SharedExpert(nn.Module):
    """The expert that every token takes: w13 bf16 [2I, H] (w1's rows, then w3's) and w2 bf16 [H, I]."""

    w13: Tensor
    w2: Tensor

    def __init__(self, w13: Tensor, w2: Tensor, swiglu_limit: float | None) -> None:
        super().__init__()
        self.swiglu_limit = swiglu_limit
        self.register_buffer("w13", w13)
        self.register_buffer("w2", w2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """bf16 [M, H] of hidden_states bf16 [M, H]."""
        gate, up = torch.nn.functional.linear(hidden_states, self.w13).float().chunk(2, dim=-1)
        hidden = swiglu(gate, up, self.swiglu_limit).to(hidden_states.dtype)
        return torch.nn.functional.linear(hidden, self.w2)


class RoutedExperts(nn.Module):
    """The weights of this rank's experts, as the backend lays them out, and the backend itself."""

    def __init__(self, backend: MoEBackend, swiglu_limit: float | None, *, with_bias: bool = False) -> None:
        super().__init__()
        self.backend = backend
        self.swiglu_arg = SwigluArg(alpha=1.0, limit=swiglu_limit)
        self.partial_dtype = torch.float32  # V4 adds its experts up in f32, over the ranks too
        backend.create_layer_weights(self, with_bias=with_bias)

    def process_weights_after_loading(self) -> None:
        """To be called once the weights are loaded."""
        self.backend.process_weights_after_loading(self)

    def forward(self, hidden_states: Tensor, topk_output: object) -> Tensor:
        """This rank's partial [M, H]."""
        tokens = hidden_states.shape[0]
        return self.backend.forward(self, hidden_states, topk_output, tokens, tokens)


class MoELayer(nn.Module):
    """One MoE layer of DeepSeek-V4 on one rank of its EP group.

    The ranks of the group see the same tokens. The shared expert counts once: where each of them holds and computes
    all of it, it is added after the combine; where each holds a slice of it, a part of the sum, before.
    """

    def __init__(
        self,
        router: Router,
        experts: RoutedExperts,
        combine: Combine,
        shared_expert: SharedExpert | None = None,
        *,
        shared_is_sharded: bool = False,
    ) -> None:
        super().__init__()
        self.shared_is_sharded = shared_is_sharded
        self.router = router
        self.experts = experts
        self.combine = combine
        self.shared_expert = shared_expert

    def forward(self, hidden_states: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """[M, H] of hidden_states bf16 [M, H]; token_ids int64 [M] are needed by hash layers.

        Experts are added up in f32 over the ranks, then the shared expert, then the sum is cast.
        """
        partial = self.experts(hidden_states, self.router(hidden_states, token_ids))
        if self.shared_expert is not None and self.shared_is_sharded:
            partial = partial + self.shared_expert(hidden_states)
        out = self.combine(partial)
        if self.shared_expert is not None and not self.shared_is_sharded:
            out = out + self.shared_expert(hidden_states)
        return out.to(hidden_states.dtype)
