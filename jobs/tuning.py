"""Tuning the experts' launch configurations on a cluster's devices: the ranks share out the numbers of tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from jobs.request import ProbeRequest
from jobs.stages import Place
from moe_ep import tables
from moe_ep.bench.cases import RankShape
from moe_ep.bench.tuner import measure, source, table_of
from moe_ep.kernels.launch import LaunchConfig

TABLES = "tables"
"""Folder in the run's: what MOE_EP_TABLES may name."""


def run(
    request: ProbeRequest, where: Place, folder: Path, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measure this rank's part; rank 0 writes the table of all of them. Its path and regimes, on every rank.

    Every rank measures the share of experts that it would hold, and numbers of tokens that are spread over small and
    large ones, so that all take about as long.
    """
    shape = request.shape
    inner = shape.intermediate // request.expert_tp
    share = RankShape("tune", shape.hidden, inner, shape.experts, request.ep, shape.top_k)
    mine = request.tune_tokens[where.rank :: where.world]
    found: dict[int, LaunchConfig] = {}
    for done, (tokens, timed) in enumerate(measure(share, mine, where.device, request.tune_quick), start=1):
        found[tokens] = timed.config
        line = {"tokens": tokens, "us": timed.us, "config": str(timed.config)}
        progress({"done": done, "total": len(mine), "latest": line})
    parts: list[dict[int, LaunchConfig]] = [{}] * where.world
    dist.all_gather_object(parts, found)
    everything = {tokens: config for part in parts for tokens, config in part.items()}
    table = table_of(share, everything, source(where.device, f"{shape.hidden} x {inner}, ep={request.ep}"))
    path = folder / TABLES / f"{table.arch}.yaml"
    if where.rank == 0:
        path.parent.mkdir(exist_ok=True)
        tables.write(path, table)
    dist.barrier()
    return {
        "table": str(path),
        "source": table.source,
        "regimes": [{"rows": regime.rows, "config": str(regime.config)} for regime in table.regimes],
    }
