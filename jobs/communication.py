"""The strategy that a run combines with, what all of them take, and who a collective waits for."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jobs.events import UNWRITABLE, EventLog, RunFolderError
from jobs.graphs import MOST_TOKENS, capture
from jobs.place import Place
from jobs.request import ProbeRequest
from jobs.rounds import agree, least
from jobs.scratch import remove
from jobs.stages import tokens
from jobs.throughput import of_the_slowest_rank, slowest, timed
from moe_ep.comm import Auto, Combine
from moe_ep.comm.groups import EpGroups, ep_groups
from moe_ep.comm.watch import Watch
from moe_ep.cost import (
    OWN_TOKENS,
    PARTS,
    SAME_TOKENS,
    Choice,
    Measured,
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
from moe_ep.spec import TopKOutput

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # not in __all__

EARLY = 0.9
"""Of the time limit of a collective: who is missing is told before the library ends the process."""

_ROW = 8  # calls in a CUDA graph, so that its own launch counts for little
_PASS = 8  # layers that a strategy's layer time is taken over: more weights than a cache holds

_ROUNDS = 12  # at least, of every strategy
_MOST, _MOST_S = 8, 1.0  # as many times those, or seconds, after which they need not agree

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
        of_groups = (where.world, where.rank, layout, request.rank_timeout_s, watch)
        self.groups: EpGroups = ep_groups(*of_groups, peer_copies=request.comm.peer_copies)
        self.names = OWN_TOKENS if request.own_tokens else SAME_TOKENS
        self.measured: dict[int, dict[Name, float]] = {}
        self._choose = lru_cache(_KEPT)(self.choose)
        self._cut = lru_cache(_KEPT)(self._parts)  # asked for by every layer of every pass

    def strategy(self, name: str) -> Combine:
        """A strategy by its name; "auto" for the cost model's choice."""
        if self.groups.whole is not None and name == "auto":
            return Auto({one: self.strategy(one) for one in self.names}, self.groups.whole, self._choose)
        slots = len(self.request.slots[0]) if self.request.slots else self.request.shape.experts
        dtype = torch.float32 if self.wire.sum_bytes == 4 else torch.bfloat16
        return self.groups.strategy(name, slots, self.request.comm.payload, dtype)

    def choose(self, tokens: int, capturing: bool = False) -> Choice:
        """For T tokens of the group: by the cost model, corrected by what this run has measured."""
        return self._by_model(tokens, capturing, self.measured)

    def _by_model(self, tokens: int, capturing: bool = False, measured: Measured | None = None) -> Choice:
        request = self.request
        of_model = (request.own_tokens, self.groups.layout, request.shape, tokens, self.wire, request.comm.network)
        return choose(*of_model, capturing=capturing, measured=measured)

    @property
    def cut(self) -> Callable[[int], int] | None:
        """Into how many ranges a layer's second GEMM is cut, if it is: by the number of rows alone, so that ranks
        agree."""
        return self._cut if self.request.comm.chunked and self.groups.whole is not None else None

    def _parts(self, rows: int) -> int:
        request, comm = self.request, self.request.comm
        named = [name for name in self.names if name == comm.strategy]
        name = named[0] if named else self._choose(rows, False).name
        of_model = (name, self.groups.layout, request.shape, rows, self.wire, comm.network, comm.device)
        whole_shared, copied = not request.shard_shared_expert, self._copied(name, rows)
        return cut_for_overlap(*of_model, whole_shared=whole_shared, copied=copied)

    def _copied(self, name: Name, rows: int) -> int:
        """Into how many ranges the sums of so many rows may be cut, at most, for copy engines to bring each."""
        whole, sums = self.groups.whole, rows * self.request.shape.hidden * self.wire.sum_bytes
        if whole is None or name not in ("all_reduce", "all_gather"):  # the sums of others go by collectives too
            return 0
        sent = sums if name == "all_reduce" else sums // whole.size
        return max((parts for parts in PARTS if whole.spared(sent // parts, parts) == 0), default=0)

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
            "peer_copies": self.groups.whole.peer is not None,
            "layout": asdict(self.groups.layout),
            "network": comm.network.source,
            "choices": taken,
        }

    def line(self, layers: Mapping[int, MoELayer], batch: int) -> dict[str, Any]:
        """Every strategy's dispatch and combine of `batch` tokens of the group, of the slowest rank, beside the model,
        and a layer with it. Where a strategy can be captured, of passes replayed from a CUDA graph (`jobs.graphs`).

        They are measured twice, in turn. After the first time `auto` goes by what was measured at these tokens.
        by_model: what it would have taken without; over_model: how far that is above the fastest. chosen, over_best:
        what it takes from now on, by the second time, of which the lines are.
        """
        x, token_ids = tokens(self.request, self.where, batch, salt=-1)
        topk = next(iter(layers.values())).route(x, token_ids)
        trials = [self._trial(name, batch, x, topk) for name in self.names]
        by_model = self._by_model(batch).name
        took = {trial.name: trial.dispatch_us + trial.combine_us for trial in self._timed(trials)}
        self.measured[batch] = took
        self._choose.cache_clear()
        self._cut.cache_clear()
        chosen, again = self.choose(batch), self._timed(trials)
        then = {trial.name: trial.dispatch_us + trial.combine_us for trial in again}
        return {
            "tokens": batch,
            "by_model": by_model,
            "over_model": took[by_model] / min(took.values()) - 1,
            "chosen": chosen.name,
            "why": chosen.why,
            "over_best": then[chosen.name] / min(then.values()) - 1,
            "rounds": again[0].rounds,
            "agreed": again[0].agreed,
            "strategies": [
                self._line(trial, batch)
                | {"layer_us": self._layer_us(trial.name, [*layers.values()][:_PASS], batch, x, token_ids)}
                for trial in again
            ],
        }

    def _trial(self, name: Name, batch: int, x: Tensor, topk: TopKOutput) -> "_Trial":
        combine, counts = self.strategy(name), self.where.tokens_of(self.request, batch)
        routed = combine.dispatch(x, topk, counts, "comm stage")
        summands = torch.zeros(routed.x.shape[0], self.request.shape.hidden, device=self.where.device)
        before = self._sent()
        combine(summands, combine.dispatch(x, topk, counts, "comm stage"))
        sent = self._sent() - before
        capturable = combine.capturable and 0 < batch <= MOST_TOKENS
        # There is nothing to bring where all ranks have the tokens.
        there = (
            self._call(lambda: combine.dispatch(x, topk, counts, "comm stage").x, capturable)
            if combine.own_tokens
            else None
        )
        return _Trial(name, there, self._call(lambda: combine.arrive(summands, routed), capturable), sent)

    def _timed(self, trials: Sequence["_Trial"]) -> list["_Trial"]:
        """The least of rounds, each of which does everything once, until two halves of them agree on the fastest."""
        calls = [call for trial in trials for call in (trial.dispatch, trial.combine)]
        ways = [(2 * trial, 2 * trial + 1) for trial in range(len(trials))]
        repeats, rounds = max(_ROUNDS, self.request.repeats), list[list[float]]()
        while True:
            seconds = [self._seconds(call) if call else 0.0 for _ in range(repeats) for call in calls]
            times = slowest(seconds, self.where)
            rounds += [times[at : at + len(calls)] for at in range(0, len(times), len(calls))]
            agreed = agree(rounds, ways)
            spent = sum(call.times * one for times in rounds for call, one in zip(calls, times, strict=True) if call)
            if agreed or len(rounds) >= _MOST * repeats or spent > _MOST_S:
                break
        us = [1e6 * one for one in least(rounds, [(call,) for call in range(len(calls))])]
        return [
            replace(trial, dispatch_us=dispatch, combine_us=combine, rounds=len(rounds), agreed=agreed)
            for trial, dispatch, combine in zip(trials, us[::2], us[1::2], strict=True)
        ]

    def _line(self, trial: "_Trial", batch: int) -> dict[str, Any]:
        request = self.request
        of_model: Any = (trial.name, self.groups.layout, request.shape, batch, self.wire, request.comm.network)
        return {
            "strategy": trial.name,
            "captured": trial.combine.captured,
            "dispatch_us": trial.dispatch_us,
            "combine_us": trial.combine_us,
            "predicted_dispatch_us": dispatch_us(*of_model),
            "predicted_combine_us": combine_us(*of_model),
            "sent_bytes": trial.sent,
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
            call = self._call(one_pass, combine.capturable and 0 < batch <= MOST_TOKENS, 1)
            times = [self._seconds(call) for _ in range(self.request.repeats)]
            return median(of_the_slowest_rank(times, self.where)) * 1e6 / len(layers)
        finally:
            for layer in layers:
                layer.combine = usual

    def _call(self, work: Callable[[], object], capturable: bool, times: int = _ROW) -> "_Call":
        """`work`, done once here; `times` in a row where it can be captured in a CUDA graph. All ranks must call it."""

        def several() -> None:
            for _ in range(times):
                work()

        work()
        replay = capture(several, self.where) if capturable else None
        return _Call(replay or work, times if replay else 1, replay is not None)

    def _seconds(self, call: "_Call") -> float:
        return timed(call.run, self.where)[0] / call.times

    def _sent(self) -> int:
        return sum(group.sent for group in {id(group): group for group in self.groups.all}.values())

    def close(self) -> None:
        """End the watches."""
        for watch in self._watches:
            watch.close()


@dataclass(frozen=True)
class _Call:
    """What is timed: `run` does it `times` times."""

    run: Callable[[], object]
    times: int
    captured: bool


@dataclass(frozen=True)
class _Trial:
    """A strategy's two halves for one number of tokens, the bytes that they send, and what they took."""

    name: Name
    dispatch: _Call | None
    combine: _Call
    sent: int
    dispatch_us: float = 0.0
    combine_us: float = 0.0
    rounds: int = 0
    agreed: bool = False


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
