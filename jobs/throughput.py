"""Timing the layers over a list of batch sizes."""

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.events import event_file
from jobs.graphs import MOST_TOKENS, capture
from jobs.place import Place
from jobs.request import ProbeRequest
from jobs.stages import arrangements, tokens
from moe_ep.bench.clock import Rates
from moe_ep.layer import MoELayer
from moe_ep.placement import Placement

T = TypeVar("T")

PROFILE = "expert_load.json"
"""File of a run's folder."""


def sweep_one(
    request: ProbeRequest, where: Place, layers: dict[int, MoELayer], batch: int, rates: Rates
) -> dict[str, Any]:
    """Time passes of `batch` tokens (per EP group) through all loaded layers.

    A pass calls the layers one after another, so no cache holds the weights of the next. Its time is that of
    the slowest rank; it is completed if what comes out of it is finite on every rank. total_token_throughput
    counts the tokens of all EP groups through all loaded layers, and only these: attention and the rest of a
    model are not in it. graph_us_per_layer is of passes that are replayed from a CUDA graph, as engines decode, None on
    a CPU and for more tokens than `graphs.MOST_TOKENS`. combine_us is the combine of one layer alone,
    floor_us_per_layer what `_floor_us` says.
    """
    x, token_ids = tokens(request, where, batch, salt=-1)
    counts = where.tokens_of(request, batch)
    finite: list[bool] = []

    def one_pass() -> Tensor:
        out = x
        for layer in layers.values():
            out = layer(x, token_ids, counts)
        return out

    def seconds_of_a_pass() -> float:
        seconds, out = timed(one_pass, where)
        finite.append(bool(out.isfinite().all()))
        return seconds

    for _ in range(request.warmup):
        one_pass()
    passes = of_the_slowest_rank([seconds_of_a_pass() for _ in range(request.repeats)], where)
    whole = torch.tensor(finite, dtype=torch.int32, device=where.device)
    dist.all_reduce(whole, op=dist.ReduceOp.MIN)
    median = statistics.median(passes)
    throughput = batch * (where.world // where.group_size) / median
    return {
        "batch_size": batch,
        "layers": len(layers),
        "requested": request.repeats,
        "completed": int(whole.sum()),
        "total_token_throughput": throughput,
        "tokens_per_s_per_gpu": throughput / where.world,
        "mean_latency_ms": statistics.fmean(passes) * 1e3,
        "median_latency_ms": median * 1e3,
        "p99_latency_ms": float(torch.tensor(passes, dtype=torch.float64).quantile(0.99)) * 1e3,
        "us_per_layer": median / len(layers) * 1e6,
        "us_per_layer_min": passes[0] / len(layers) * 1e6,
        "us_per_layer_max": passes[-1] / len(layers) * 1e6,
        "us_per_layer_mad": statistics.median(abs(p - median) for p in passes) / len(layers) * 1e6,
        "graph_us_per_layer": _graph_us(request, where, one_pass, batch, len(layers)),
        "combine_us": _combine_us(request, where, next(iter(layers.values())), x, token_ids, counts),
        "floor_us_per_layer": _floor_us(request, where, layers, x, token_ids, rates),
    }


def expert_load(request: ProbeRequest, where: Place, layers: dict[int, MoELayer], batch: int) -> dict[str, Any]:
    """How many routes each expert gets from `batch` seeded random tokens of every EP group, counted on the device.

    by_layer: routes by global expert, [E] a layer. by_rank: by EP rank, where experts are arranged by load. Every rank
    has the same; every rank must call it.
    """
    x, token_ids = tokens(request, where, batch, salt=-1)
    for layer in layers.values():
        layer.record_load()
        layer.note(layer.router(x, token_ids))
    counts = torch.stack([layer.load for layer in layers.values() if layer.load is not None])
    for layer in layers.values():
        layer.load = None
    if where.group_rank and not request.own_tokens:  # the ranks of a group route the same tokens
        counts.zero_()
    dist.all_reduce(counts)
    by_layer = dict(zip(layers, counts.tolist(), strict=True))
    found = {"tokens": batch * (where.world // where.group_size), "by_layer": by_layer}
    arranged = arrangements(request)
    if arranged:
        found["by_rank"] = {layer: arranged[layer].rank_loads(routes) for layer, routes in by_layer.items()}
    return found


def write_profile(folder: Path, load: dict[str, Any]) -> None:
    """Leave the load of the experts in the run's folder: what placement.profile of a later run may name."""
    unfinished = folder / f".{PROFILE}.{os.getpid()}"
    unfinished.write_text(json.dumps(load) + "\n")
    unfinished.replace(folder / PROFILE)


def _routes(layer: MoELayer, x: Tensor, token_ids: Tensor, slots: int) -> Tensor:
    """Routes by slot, which is the expert where they lie in order; int64 [S]."""
    chosen = layer.route(x, token_ids).topk_ids.flatten()
    return torch.bincount(chosen[chosen >= 0], minlength=slots)


def _floor_us(
    request: ProbeRequest, where: Place, layers: dict[int, MoELayer], x: Tensor, token_ids: Tensor, rates: Rates
) -> float:
    """What the routed experts of a layer take at least, on average over the layers, on the rank with the most work:
    `Rates.floor_us` of the experts hit and the routes that are this rank's. Router, shared expert and combine are
    not in it."""
    shape = request.shape
    slots = len(request.slots[0]) if request.slots else shape.experts
    mine = Placement(slots, request.ep).experts(where.group_rank if request.ep > 1 else 0)
    flops = 6 * shape.hidden * shape.intermediate // request.expert_tp
    floors = []
    for layer in layers.values():
        routes = _routes(layer, x, token_ids, slots)
        if request.own_tokens:
            dist.all_reduce(routes, group=where.group)
        local = routes[mine.start : mine.stop]
        floors.append(
            rates.floor_us(int((local > 0).sum()), int(local.sum()), shape.expert_bytes / request.expert_tp, flops)
        )
    (floor,) = of_the_slowest_rank([statistics.fmean(floors)], where)
    return floor


def _graph_us(
    request: ProbeRequest, where: Place, one_pass: Callable[[], Tensor], batch: int, layers: int
) -> float | None:
    """The median of the slowest rank."""
    replay = capture(one_pass, where) if 0 < batch <= MOST_TOKENS else None
    if replay is None:
        return None
    replay()
    seconds = [timed(replay, where)[0] for _ in range(request.repeats)]
    return statistics.median(of_the_slowest_rank(seconds, where)) / layers * 1e6


def _combine_us(
    request: ProbeRequest, where: Place, layer: MoELayer, x: Tensor, token_ids: Tensor, counts: list[int]
) -> float:
    """The median time of a layer's combine of what its experts give in f32, of the slowest rank."""
    routed = layer.combine.dispatch(x, layer.route(x, token_ids), counts)
    partial = torch.zeros(routed.x.shape[0], request.shape.hidden, device=where.device)
    for _ in range(request.warmup):
        layer.combine(partial, routed)
    seconds = [timed(lambda: layer.combine(partial, routed), where)[0] for _ in range(request.repeats)]
    return statistics.median(of_the_slowest_rank(seconds, where)) * 1e6


def of_the_slowest_rank(values: list[float], where: Place) -> list[float]:
    """Element by element the largest of all ranks, in rising order."""
    return sorted(slowest(values, where))


def slowest(values: list[float], where: Place) -> list[float]:
    """Element by element the largest of all ranks."""
    largest = torch.tensor(values, dtype=torch.float64, device=where.device)
    with where.waiting("the slowest rank's time"):
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        found: list[float] = largest.tolist()
    return found


def measured_before(run_dir: Path, attempt: int, code: str) -> dict[int, dict[str, Any]]:
    """What earlier attempts of the run measured with the same code, by batch size; the same on every rank, which all
    must call it."""
    found: list[dict[int, dict[str, Any]]] = [{}]
    if dist.get_rank() == 0:
        same_code = False
        for text in event_file(run_dir, 0).read_text(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line that a crash left broken, or another event
                line = json.loads(text)
                if line["attempt"] >= attempt:
                    continue
                if (line["stage"], line["event"]) == ("env", "end"):
                    same_code = line["data"]["code"] == code
                elif same_code and line["stage"] == "throughput":
                    found[0][line["data"]["latest"]["batch_size"]] = line["data"]["latest"]
    dist.broadcast_object_list(found)
    return found[0]


def timed(one_pass: Callable[[], T], where: Place) -> tuple[float, T]:
    """Seconds of one pass, begun on all ranks together, and what came out of it."""
    with where.waiting("the beginning of a timed pass"):
        dist.barrier()
    if where.device.type != "cuda":
        started = time.perf_counter()
        out = one_pass()
        return time.perf_counter() - started, out
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(where.device)
    begin.record()
    out = one_pass()
    end.record()
    with where.waiting("the end of a timed pass"):  # collectives in a CUDA graph are watched by nobody else
        end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3, out
