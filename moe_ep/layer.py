"""`MoELayer`: router, this rank's experts, the shared expert, and the combine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from moe_ep.activation import swiglu_halves
from moe_ep.backends.base import MoEBackend, Mxfp4Backend
from moe_ep.comm import Combine, Pending, Routed, let_collectives_begin
from moe_ep.routing import Router
from moe_ep.slots import SlotMap
from moe_ep.spec import SwigluArg, TopKOutput

_TILE = 256 * 128  # elements that a block of cuBLAS's makes at once
_ROUNDS = 3


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
        hidden = swiglu_halves(torch.nn.functional.linear(hidden_states, self.w13), self.swiglu_limit)
        return torch.nn.functional.linear(hidden, self.w2)

    def fills(self, tokens: int) -> bool:
        """Whether its matmuls take all multiprocessors several times over, so that some less cost them their share and
        not a round."""
        tiles = tokens * self.w13.shape[0] / _TILE
        return (
            self.w13.is_cuda
            and tiles >= _ROUNDS * torch.cuda.get_device_properties(self.w13.device).multi_processor_count
        )


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

    def by_columns(self, hidden_states: Tensor, topk_output: object, parts: int, spared: int = 0) -> Iterator[Tensor]:
        """`forward` in `parts` ranges of columns [M, H / parts], each as soon as it is computed, the second and further
        ones with `spared` multiprocessors less."""
        if parts == 1:
            yield self(hidden_states, topk_output)
        elif isinstance(self.backend, Mxfp4Backend):
            yield from self.backend.by_columns(self, hidden_states, topk_output, parts, spared)
        else:
            yield from (part.contiguous() for part in self(hidden_states, topk_output).chunk(parts, 1))


class MoELayer(nn.Module):
    """One MoE layer of DeepSeek-V4 on one rank of its EP group.

    The ranks of the group see the same tokens, or each its own, as `combine` says. The shared expert counts once: where
    each of them holds and computes all of it, it runs while the routed partials are in flight and is added after the
    combine; where each holds a slice of it, a part of the sum, before.

    `slots` says which slot of which rank computes a route, where experts are arranged otherwise than in order.
    `cut` says into how many ranges of columns the second GEMM is cut for a number of rows, a divisor of H: each is
    reduced while the next is computed; all ranks must cut alike. Both None for none.
    """

    load: Tensor | None

    def __init__(
        self,
        router: Router,
        experts: RoutedExperts,
        combine: Combine,
        shared_expert: SharedExpert | None = None,
        *,
        shared_is_sharded: bool = False,
        slots: SlotMap | None = None,
        cut: Callable[[int], int] | None = None,
    ) -> None:
        super().__init__()
        if shared_is_sharded and combine.name == "all_to_all":
            raise ValueError(
                "all_to_all sends a token only to ranks that hold its experts, but every rank holds a slice of the "
                "shared expert: hold all of it on each rank, or use all_gather"
            )
        self.shared_is_sharded = shared_is_sharded
        self.router = router
        self.experts = experts
        self.combine = combine
        self.shared_expert = shared_expert
        self.slots = slots
        self.cut = cut
        self.register_buffer("load", None, persistent=False)

    def record_load(self) -> None:
        """Count from now on, on the device and from zero, the routes of this rank's tokens: `load` int64 [E]."""
        weight = self.router.gate_weight
        self.load = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)

    def route(self, hidden_states: Tensor, token_ids: Tensor | None = None) -> TopKOutput:
        """Where this rank's tokens go: ids of slots, which are the experts' where these lie in order."""
        topk: TopKOutput = self.router(hidden_states, token_ids)
        if self.load is not None:
            self.note(topk)
        if self.slots is None:
            return topk
        slots: TopKOutput = self.slots(topk, self.experts.backend.spec.ep_rank if self.combine.own_tokens else 0)
        return slots

    def note(self, topk: TopKOutput) -> None:
        """Count routes to experts in `load`: without the host, so in a CUDA graph too."""
        assert self.load is not None
        ids: Tensor = topk.topk_ids.flatten().long()
        self.load.scatter_add_(0, ids.clamp(min=0), (ids >= 0).long())

    def forward(
        self, hidden_states: Tensor, token_ids: Tensor | None = None, counts: Sequence[int] | None = None
    ) -> Tensor:
        """[M, H] of hidden_states bf16 [M, H]; token_ids int64 [M] are needed by hash layers.

        `counts` are the ranks' M where each has tokens of its own, so that they need not be asked for.
        Experts are added up in f32 over the ranks unless `combine` says otherwise, then the shared expert, then the sum
        is cast.
        """
        topk = self.route(hidden_states, token_ids)
        place = self.experts.backend.spec.prefix
        routed = self.combine.dispatch(hidden_states, topk, counts, place)
        wanted = self.cut(routed.x.shape[0]) if self.cut is not None else 1
        parts = self.combine.parts(routed, wanted)
        spared = self.combine.spared(routed, parts)
        whole = None if self.shared_is_sharded else self.shared_expert
        under_way: list[Pending] = []
        try:
            self._begin(under_way, routed, parts, spared)
            return finish(hidden_states, under_way, whole, pause=spared > 0)
        except BaseException:
            for pending in under_way:
                with suppress(RuntimeError):  # a device that failed fails again: the first error is the one to tell
                    pending.give_up()
            raise

    def _begin(self, under_way: list[Pending], routed: Routed, parts: int, spared: int) -> None:
        """Begin the combine of each range as soon as it is computed, and keep no partial for longer."""
        for partial in self._partials(routed, parts, spared):
            under_way.append(self.combine.begin(partial, routed))

    def _partials(self, routed: Routed, parts: int, spared: int) -> Iterator[Tensor]:
        """The partial in ranges of columns, with the rank's slice of the shared expert where it has one."""
        shared = None
        if self.shared_expert is not None and self.shared_is_sharded:
            shared = self.shared_expert(routed.x).chunk(parts, 1)
        for part, partial in enumerate(self.experts.by_columns(routed.x, routed.topk, parts, spared)):
            yield partial if shared is None else partial + shared[part]


def finish(
    hidden_states: Tensor, under_way: Sequence[Pending], shared_expert: SharedExpert | None, *, pause: bool = False
) -> Tensor:
    """The layer's result bf16 [M, H]: ranges of columns of the sum over the ranks, which are under way, and the shared
    expert, computed meanwhile; with `pause` it lets collectives begin first where it would take their multiprocessors.
    """
    shared = None
    if shared_expert is not None:
        if pause and shared_expert.fills(len(hidden_states)):
            let_collectives_begin(hidden_states.device)
        shared = shared_expert(hidden_states)
    out = torch.empty_like(hidden_states)
    width = hidden_states.shape[1] // len(under_way)
    for part, pending in enumerate(under_way):
        with pending.summands() as (total, other):
            add_columns(total, shared, out, part * width, other)
    return out


def add_columns(total: Tensor, shared: Tensor | None, out: Tensor, first: int, other: Tensor | None = None) -> None:
    """Columns first … first + W of out bf16 [M, H] = total [M, W] + other [M, W] + those of shared bf16 [M, H], added
    in f32 where total is f32; in one pass on a GPU."""
    if total.is_cuda:
        from moe_ep import passes  # Triton is imported only where there is a GPU

        given = (one for one in (total, other, shared, out) if one is not None)
        if out.dtype == torch.bfloat16 and passes.takes(*given):
            passes.add(total, other, shared, out, first)
            return
    columns = slice(first, first + total.shape[1])
    total = total if other is None else total.float() + other
    out[:, columns] = total if shared is None else total + shared[:, columns]
