"""The strategy that a run combines with, what all of them take, and who a collective waits for."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jobs.events import UNWRITABLE, EventLog, RunFolderError
from jobs.graphs import MOST_TOKENS, capture
from jobs.request import ProbeRequest
from jobs.scratch import remove
from jobs.stages import Place, tokens
from jobs.throughput import of_the_slowest_rank, timed
from moe_ep.comm import Auto, Combine
from moe_ep.comm.groups import EpGroups, ep_groups
from moe_ep.comm.watch import Watch
from moe_ep.cost import (
    OWN_TOKENS,
    SAME_TOKENS,
    Choice,
    Name,
    Wire,
    choose,
    combine_us,
    cut_for_overlap,
    dispatch_us,
    traffic,
)
from moe_ep.layer import MoELayer
from moe_ep.network import Layout

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # not in __all__

EARLY = 0.9
"""Of the time limit of a collective: who is missing is told before the library ends the process."""

_ROW = 8  # calls in a CUDA graph, so that its own launch counts for little
_PASS = 8  # layers that a strategy's layer time is taken over: more weights than a cache holds

_KEPT = 4096  # answers of the cost model, by number of tokens


class Communication:
    """A rank's groups and watches, made once; `close` before the process group is destroyed."""

    def __init__(self, request: ProbeRequest, where: Place, store: "Store", log: EventLog) -> None:
        self.request = request
        self.wire = Wire(request.comm.payload, 4 if request.comm.sums == "f32" else 2)
        self._watches: list[Watch] = []
        first_of_node = where.rank % request.ranks_per_node == 0
        stuck = partial(leave, log, request.scratch if first_of_node else None)
        timeout_s = request.rank_timeout_s * EARLY

        def watch(name: str, ranks: tuple[int, ...]) -> Watch:
            found = Watch(store, name, where.rank, ranks, timeout_s, stuck)
            self._watches.append(found)
            return found

        self.where = replace(where, watch=watch("everybody", tuple(range(where.world))) if where.world > 1 else None)
        layout = Layout.of(where.group_size, request.ranks_per_node)
        self.groups: EpGroups = ep_groups(where.world, where.rank, layout, request.rank_timeout_s, watch)
        self.names = OWN_TOKENS if request.own_tokens else SAME_TOKENS

    def strategy(self, name: str) -> Combine:
        """A strategy by its name; "auto" for the cost model's choice."""
        if self.groups.whole is not None and name == "auto":
            return Auto(
                {one: self.strategy(one) for one in self.names}, self.groups.whole, lru_cache(_KEPT)(self.choose)
            )
        slots = len(self.request.slots[0]) if self.request.slots else self.request.shape.experts
        dtype = torch.float32 if self.wire.sum_bytes == 4 else torch.bfloat16
        return self.groups.strategy(name, slots, self.request.comm.payload, dtype)

    def choose(self, tokens: int, capturing: bool = False) -> Choice:
        """For T tokens of the group."""
        request = self.request
        layout, network = self.groups.layout, request.comm.network
        return choose(request.own_tokens, layout, request.shape, tokens, self.wire, network, capturing=capturing)

    @property
    def fractions(self) -> Callable[[int], tuple[float, ...]] | None:
        """How a layer's rows are cut into chunks, if they are: by their number alone, so that ranks agree."""
        request, layout = self.request, self.groups.layout
        if not request.comm.chunked or self.groups.whole is None:
            return None

        @lru_cache(maxsize=_KEPT)  # asked for by every layer of every pass
        def cut(rows: int) -> tuple[float, ...]:
            comm, named = request.comm, [name for name in self.names if name == request.comm.strategy]
            name = named[0] if named else self.choose(rows).name
            return cut_for_overlap(name, layout, request.shape, rows, self.wire, comm.network, comm.device)

        return cut

    def record(self) -> dict[str, Any]:
        """What was configured, and what would be taken for each batch size and why."""
        if self.groups.whole is None:
            return {"strategy": "none", "layout": asdict(self.groups.layout), "choices": []}
        comm = self.request.comm
        choices = [self.choose(batch) for batch in self.request.batch_sizes]
        taken = [{**asdict(c), "name": c.name if comm.strategy == "auto" else comm.strategy} for c in choices]
        return {
            "strategy": comm.strategy,
            "payload": comm.payload,
            "sums": comm.sums,
            "layout": asdict(self.groups.layout),
            "network": comm.network.source,
            "choices": taken,
        }

    def line(self, layers: Mapping[int, MoELayer], batch: int) -> dict[str, Any]:
        """Every strategy's dispatch and combine of `batch` tokens of the group, of the slowest rank, beside the model,
        and a layer with it. Where a strategy can be captured, of passes replayed from a CUDA graph (`jobs.graphs`).

        chosen: by the cost model. over_best: its measured time over that of the fastest, less 1.
        """
        x, token_ids = tokens(self.request, self.where, batch, salt=-1)
        layer = next(iter(layers.values()))
        lines = [
            self._line(name, layer, batch, x, token_ids)
            | {"layer_us": self._layer_us(name, [*layers.values()][:_PASS], batch, x, token_ids)}
            for name in self.names
        ]
        chosen = self.choose(batch)
        took = {line["strategy"]: line["dispatch_us"] + line["combine_us"] for line in lines}
        return {
            "tokens": batch,
            "chosen": chosen.name,
            "why": chosen.why,
            "over_best": took[chosen.name] / min(took.values()) - 1,
            "strategies": lines,
        }

    def _line(self, name: Name, layer: MoELayer, batch: int, x: Tensor, token_ids: Tensor) -> dict[str, Any]:
        request, where = self.request, self.where
        combine, counts = self.strategy(name), where.tokens_of(request, batch)
        topk = layer.route(x, token_ids)
        routed = combine.dispatch(x, topk, counts, "comm stage")
        summands = torch.zeros(routed.x.shape[0], request.shape.hidden, device=where.device)
        of_model: tuple[Any, ...] = (name, self.groups.layout, request.shape, batch, self.wire, request.comm.network)
        before = self._sent()
        combine(summands, combine.dispatch(x, topk, counts, "comm stage"))
        sent = self._sent() - before
        capturable = combine.capturable and 0 < batch <= MOST_TOKENS
        back, captured = self._us(lambda: combine(summands, routed), capturable)
        there = 0.0  # there is none where all ranks have the tokens
        if combine.own_tokens:
            there, _ = self._us(lambda: combine.dispatch(x, topk, counts, "comm stage").x, capturable)
        return {
            "strategy": name,
            "captured": captured,
            "dispatch_us": there,
            "combine_us": back,
            "predicted_dispatch_us": dispatch_us(*of_model),
            "predicted_combine_us": combine_us(*of_model),
            "sent_bytes": sent,
            "predicted_bytes": traffic(*of_model[:5]).total,
        }

    def _layer_us(
        self, name: Name, layers: Sequence[MoELayer], batch: int, x: Tensor, token_ids: Tensor
    ) -> float | None:
        """µs of one of `layers`, which follow one another; None where the strategy cannot be had with them, and on a
        CPU, whose layers take seconds and say nothing."""
        if self.where.device.type != "cuda" or (name == "all_to_all" and layers[0].shared_is_sharded):
            return None
        usual, combine = layers[0].combine, self.strategy(name)
        counts = self.where.tokens_of(self.request, batch)

        def one_pass() -> Tensor:
            out = x
            for layer in layers:
                out = layer(x, token_ids, counts)
            return out

        try:
            for layer in layers:
                layer.combine = combine
            us, _ = self._us(one_pass, combine.capturable and 0 < batch <= MOST_TOKENS, 1)
            return us / len(layers)
        finally:
            for layer in layers:
                layer.combine = usual

    def _us(self, work: Callable[[], Tensor], capturable: bool, row: int = _ROW) -> tuple[float, bool]:
        """The median of the slowest rank, and whether it is of a call of `row` in a CUDA graph."""

        def several() -> None:
            for _ in range(row):
                work()

        work()
        replay = capture(several, self.where) if capturable else None
        calls = row if replay else 1
        seconds = [timed(replay or work, self.where)[0] / calls for _ in range(self.request.repeats)]
        ordered = of_the_slowest_rank(seconds, self.where)
        return ordered[len(ordered) // 2] * 1e6, replay is not None

    def _sent(self) -> int:
        return sum(group.sent for group in {id(group): group for group in self.groups.all}.values())

    def close(self) -> None:
        """End the watches."""
        for watch in self._watches:
            watch.close()


def leave(log: EventLog, scratch: str | None, text: str) -> None:
    """Write down who is missing and end the rank: its main thread stands in the collective, or behind it."""
    status = 1
    try:
        log.write("failed", error={"type": "CollectiveTimeoutError", "text": text, "traceback": ""})
    except RunFolderError as error:  # it must end all the same
        print(f"run.folder: {error}", file=sys.stderr, flush=True)
        status = UNWRITABLE
    if scratch is not None:
        remove(Path(scratch))
    os._exit(status)
