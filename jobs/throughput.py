"""Timing the layers over a list of batch sizes."""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.events import event_file
from jobs.request import ProbeRequest
from jobs.stages import Place, tokens
from moe_ep.layer import MoELayer


def sweep_one(request: ProbeRequest, where: Place, layers: dict[int, MoELayer], batch: int) -> dict[str, Any]:
    """Time passes of `batch` tokens (per EP group) through all loaded layers.

    A pass calls the layers one after another, so no cache holds the weights of the next. Its time is that of
    the slowest rank. tokens_per_s counts the tokens of all EP groups through all loaded layers, and only
    these: attention and the rest of a model are not in it.
    """
    x, token_ids = tokens(request, where, batch, salt=-1)

    def one_pass() -> None:
        for layer in layers.values():
            layer(x, token_ids)

    for _ in range(request.warmup):
        one_pass()
    seconds = torch.tensor([_timed(one_pass, where.device) for _ in range(request.repeats)], device=where.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    passes = sorted(seconds.tolist())
    median = statistics.median(passes)
    groups = where.world // where.group_size
    return {
        "batch_size": batch,
        "layers": len(layers),
        "repeats": len(passes),
        "tokens_per_s": batch * groups / median,
        "us_per_layer": median / len(layers) * 1e6,
        "us_per_layer_min": passes[0] / len(layers) * 1e6,
        "us_per_layer_max": passes[-1] / len(layers) * 1e6,
        "us_per_layer_mad": statistics.median(abs(p - median) for p in passes) / len(layers) * 1e6,
    }


def measured_before(run_dir: Path, attempt: int) -> dict[int, dict[str, Any]]:
    """What an earlier attempt of the run measured, by batch size; the same on every rank, which all must call it."""
    found: list[dict[int, dict[str, Any]]] = [{}]
    if dist.get_rank() == 0:
        for text in event_file(run_dir, 0).read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line that a crash left broken, or another event
                line = json.loads(text)
                if line["attempt"] < attempt and line["stage"] == "throughput":
                    found[0][line["data"]["latest"]["batch_size"]] = line["data"]["latest"]
    dist.broadcast_object_list(found)
    return found[0]


def _timed(one_pass: Callable[[], None], device: torch.device) -> float:
    """Seconds of one pass, begun on all ranks together."""
    dist.barrier()
    if device.type != "cuda":
        started = time.perf_counter()
        one_pass()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    one_pass()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3
