"""The embedded engine on every rank: starting → loading → warming → ready → serving → draining → done."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from engine import model as models
from engine.api.server import Server, allow_files, bind
from engine.api.service import Limits, Service
from engine.core import Engine, follow
from engine.footprint import cache_bytes, kept_bytes, step_bytes, widened
from engine.group import Group
from engine.model import Ranks, ServedModel
from engine.scheduler import Scheduler
from engine.text import Tokenizer
from jobs import budget, environment, stages
from jobs.arrivals import Arrivals
from jobs.budget import DoesNotFitError
from jobs.communication import EARLY, leave
from jobs.events import EventLog
from jobs.first_answer import Recorded, recorded_answer, warm
from jobs.phases import Phases
from jobs.place import Place
from jobs.probe import end, meet, tell
from jobs.rank import Rank
from jobs.request import ProbeRequest
from jobs.serving import DRAINED_S, ENDPOINT, Ending, Endpoint, ServeRequest
from moe_ep.checkpoint import Checkpoint
from moe_ep.comm import AllReduce, Alone, Combine
from moe_ep.comm.group import Group as Collectives
from moe_ep.comm.watch import Watch
from moe_ep.footprint import pass_bytes
from moe_ep.placement import Slice
from moe_ep.reading import Progress
from moe_ep.selector import NoBackendError
from moe_ep.tensors import dense_held_bytes

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__

TELL_S, BEAT_S = 5.0, 60.0
"""How often a service says how much it does: when that has changed, and when it has not."""

_TOLD_S = 1.0  # for what clients are told to reach them

GB = 10**9


class ServiceBrokenError(RuntimeError):
    """The HTTP service has ended while the engine ran."""


def run(request: ProbeRequest, folder: Path, rank: Rank, log: EventLog, ending: Ending) -> None:
    """Serve until told to end. Raises whatever keeps the service from being ready, or breaks it."""
    serve = request.serve
    assert serve is not None
    with ExitStack() as closing:
        server, service, recorded = None, None, None
        with log.stage("starting") as data:
            if rank.rank == 0:  # what is wrong with key or port is known before anything is loaded
                (folder / ENDPOINT).unlink(missing_ok=True)  # of an attempt that broke
                service = Service(serve.model, _limits(serve), serve.api_key())
                allow_files(serve.limits.connections)
                server = Server(service, bind(serve.host, serve.port))
                server.start()
                closing.callback(server.stop)
                closing.callback(_give_up(service, serve.ready_s, log).cancel)
                recorded = recorded_answer(serve.answer)
            store, where = meet(request, folder, rank, data)
        with log.stage("selector") as data:
            record = stages.select(request, where)
            data |= record.as_dict()
            if record.selected is None:
                raise NoBackendError(record)
        with log.stage("loading") as data:
            checkpoint = stages.open_checkpoint(request, where)
            if service is not None:
                service.loading = "loading"
                service.tokenizer = Tokenizer(checkpoint.path, request.shape.vocab)
            arrivals = Arrivals(store, rank.rank, rank.world)
            stuck = partial(_stuck, log, request.scratch if rank.local_rank == 0 else None, service)
            watched = partial(_watched, store, where, request.rank_timeout_s * EARLY, stuck, closing)
            model = _load(request, serve, where, checkpoint, tell(log, arrivals), data, watched)
            arrivals.tell(0, ended=True)
            arrivals.wait(request.rank_timeout_s)
            # Only now: it waits for all ranks too, but not as long as bytes arrive.
            group = Group(request.rank_timeout_s)
        if service is None or server is None:
            _follow(model, group, log, ending, serve)
        else:
            limits = serve.limits
            service.engine = Engine(model, group, Scheduler(limits.sequences, limits.step_tokens, limits.queue))
            _lead(service, recorded, server, serve, folder, rank, log, ending)
    end(log)
    if rank.rank == 0:
        # Only now: a signal that follows a rank's death drains the others too, and that is no good end.
        (folder / ENDPOINT).unlink(missing_ok=True)


def _limits(serve: ServeRequest) -> Limits:
    limits = serve.limits
    return Limits(
        context=limits.context,
        completion_tokens=limits.completion_tokens,
        prompts=limits.prompts,
        body_bytes=limits.body_bytes,
        request_s=limits.request_s,
        connections=limits.connections,
        client_s=limits.client_s,
    )


def _load(
    request: ProbeRequest,
    serve: ServeRequest,
    where: Place,
    checkpoint: Checkpoint,
    on_progress: Callable[[Progress], None],
    data: dict[str, Any],
    watched: Callable[[str, Sequence[int], dist.ProcessGroup | None], Combine],
) -> ServedModel:
    attention = checkpoint.headers.attention
    if attention is None:
        raise ValueError(f"{checkpoint.path}: config.json does not give attention's sizes; a service needs all of them")
    dtype = torch.float32 if serve.dtype == "f32" else torch.bfloat16
    heads = Slice(where.rank, where.world) if serve.shard_dense else Slice()
    item, limits = dtype.itemsize, serve.limits
    planned = widened(budget.check_fits(request, where), request.shape, item)
    planned["dense weights"] = sum(dense_held_bytes(request.shape, attention, heads.size, item).values())
    planned["caches"] = limits.sequences * cache_bytes(attention, request.shape.layers, limits.context, item)
    planned["caches"] += kept_bytes(attention, request.shape.layers, limits.step_tokens, item)
    planned["a step"] = step_bytes(
        *(request.shape, attention, min(limits.step_tokens, limits.context), limits.context, heads.size, item),
        experts=pass_bytes(
            *(request.shape, limits.step_tokens),
            expert_tp=request.expert_tp,
            kernels=request.impl != "reference",
        ),
    )
    data["planned"] = planned
    free = environment.free_memory(where.device) // (request.ranks_per_node if where.device.type == "cpu" else 1)
    if sum(planned.values()) > free:
        raise DoesNotFitError(
            f"{sum(planned.values()) / GB:.1f} GB would be held, {planned['dense weights'] / GB:.1f} GB of it of "
            f"what is not experts, {planned['caches'] / GB:.1f} GB of caches, but {free / GB:.1f} GB are free on "
            f"{where.device}: use more ranks, a larger topology.ep, topology.dense=sharded, or a smaller "
            "memory.context, memory.batch or engine.limits.step_tokens"
        )
    first = where.rank - where.group_rank
    ranks = Ranks(
        experts=watched("experts", range(first, first + where.group_size), where.group),
        dense=watched("attention", range(heads.size), None),
        heads=heads,
    )
    started = time.monotonic()
    model = models.load(
        *(checkpoint, stages.backends(request, where), ranks, where.device),
        dtype=dtype,
        reading=stages.reading(request),
        on_progress=on_progress,
    )
    data |= {"bytes_read": checkpoint.bytes_read, "read_from": str(checkpoint.path)}
    data["load_seconds"] = time.monotonic() - started
    return model


def _watched(
    store: "TCPStore",
    where: Place,
    timeout_s: float,
    stuck: Callable[[str], None],
    closing: ExitStack,
    what: str,
    ranks: Sequence[int],
    group: dist.ProcessGroup | None,
) -> Combine:
    """The sum over `ranks`; a collective of them that does not end in time names who has not entered it."""
    if len(ranks) == 1:
        return Alone()
    watch = Watch(store, f"{what} {ranks[0]}-{ranks[-1]}", where.rank, tuple(ranks), timeout_s, stuck)
    closing.callback(watch.close)
    return AllReduce(Collectives(group, watch))


def _stuck(log: EventLog, scratch: str | None, service: Service | None, text: str) -> None:
    """Tell the clients, write it down and end the rank, whose main thread stands in the collective or behind it."""
    if service is not None and service.engine is not None:
        service.engine.abandon("the engine has broken: a rank does not answer")
        time.sleep(_TOLD_S)
    leave(log, scratch, text)


def _give_up(service: Service, ready_s: float, log: EventLog) -> threading.Timer:
    """Ends the process when the service is not ready in time: whatever it waits for may wait for ever."""

    def end_late() -> None:
        # Once it was ready, a step that takes long, or what broke it, is not this one's to judge.
        if service.engine is not None and service.engine.phase != "warming":
            return
        text = f"the service is {service.phase} and not ready after {ready_s:.0f} s (engine.ready_s)"
        try:
            log.write("failed", error={"type": "NotReadyError", "text": text})
        finally:
            os._exit(1)

    timer = threading.Timer(ready_s, end_late)
    timer.daemon = True
    timer.start()
    return timer


def _follow(model: ServedModel, group: Group, log: EventLog, ending: Ending, serve: ServeRequest) -> None:
    """All ranks but 0."""
    ending.by(lambda _: serve.drain_s + DRAINED_S)  # rank 0 says when it is over
    with ExitStack() as stack:
        phases = Phases(log, stack)

        def enter(phase: str) -> None:
            phases.enter(phase)

        follow(model, group, enter)


def _lead(
    service: Service,
    recorded: Recorded | None,
    server: Server,
    serve: ServeRequest,
    folder: Path,
    rank: Rank,
    log: EventLog,
    ending: Ending,
) -> None:
    """Rank 0."""
    engine, tokenizer = service.engine, service.tokenizer
    assert engine is not None
    assert tokenizer is not None
    with ExitStack() as stack:
        phases = Phases(log, stack)
        data = phases.enter("warming")
        data |= warm(engine, tokenizer, recorded, serve, folder)
        endpoint = Endpoint(rank.host, serve.host, server.port, serve.model, service.key is not None, rank.attempt)
        phases.enter("ready")

        def drain(why: str) -> float:
            engine.drain(serve.drain_s, f"the service is ending: {why}")
            return serve.drain_s + DRAINED_S

        ending.by(drain)
        engine.open()
        endpoint.save(folder)
        log.write("listening", url=endpoint.url, needs_key=endpoint.needs_key)
        teller = _Teller(engine, log)

        def between_steps() -> bool:
            changed = engine.phase != phases.name
            if changed:
                phases.enter(engine.phase)
            teller.look(now=changed)
            if not server.alive:
                raise ServiceBrokenError("the HTTP service has ended; see rank 0's log")
            return False

        engine.run(between_steps)
        if phases.name != "draining":
            phases.enter("draining")
        engine.stop()
        teller.look(now=True)


class _Teller:
    """Tells how much a service does."""

    def __init__(self, engine: Engine, log: EventLog) -> None:
        self._engine, self._log = engine, log
        self._told: dict[str, Any] = {}
        self._at = self._written = time.monotonic()

    def look(self, *, now: bool = False) -> None:
        """Write it every few seconds, or now, if it is another than the last, or that is long ago."""
        if not now and time.monotonic() - self._at < TELL_S:
            return
        counts, (running, waiting) = self._engine.counts, self._engine.load
        found: dict[str, Any] = {
            "running": running,
            "waiting": waiting,
            "requests": dict(counts.requests),
            "prompt_tokens": counts.prompt_tokens,
            "answer_tokens": counts.answer_tokens,
            "steps": counts.steps,
        }
        self._at = time.monotonic()
        if found != self._told or self._at - self._written >= BEAT_S:
            self._told, self._written = found, self._at
            done = sum(counts.requests.values())
            self._log.write("progress", done=done, total=done + running + waiting, **found)
