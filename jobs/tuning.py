"""Tuning the experts' launch configurations on a cluster's devices: the ranks share out the numbers of tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from jobs.place import Place, share
from jobs.request import ProbeRequest
from moe_ep import tables
from moe_ep.backends.call import Impl, table_name
from moe_ep.backends.target import current_target
from moe_ep.bench.tuner import measure, source, table_of, tuned_impl
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
    shape, impl = share(request, "tune"), _impl(request)
    mine = request.tune_tokens[where.rank :: where.world]
    found: dict[int, LaunchConfig] = {}
    activations = request.activation_dtype
    measured = measure(shape, mine, where.device, request.tune_quick, impl, activations)
    for done, (tokens, timed) in enumerate(measured, start=1):
        found[tokens] = timed.config
        line = {"tokens": tokens, "us": timed.us, "config": str(timed.config)}
        progress({"done": done, "total": len(mine), "latest": line})
    parts: list[dict[int, LaunchConfig]] = [{}] * where.world
    dist.all_gather_object(parts, found)
    everything = {tokens: config for part in parts for tokens, config in part.items()}
    where_and_what = source(where.device, f"{shape.hidden} x {shape.inner}, ep={request.ep}")
    before = tables.find(table_name(current_target().arch, impl))
    table = table_of(shape, everything, where_and_what, impl, activations, before)
    path = folder / TABLES / f"{table.arch}.yaml"
    if where.rank == 0:
        path.parent.mkdir(exist_ok=True)
        tables.write(path, table)
    dist.barrier()
    return {
        "table": str(path),
        "source": table.source,
        "regimes": [
            {"rows": regime.rows, "config": str(regime.config)}
            for regime in (table.fp8 if activations == "fp8" else table.regimes)
        ],
    }


def _impl(request: ProbeRequest) -> Impl:
    """The backend that the config names, or the one that is preferred on this device."""
    if request.impl == "reference":
        raise ValueError("backend.impl is reference, which has no launch configurations to tune; leave it out")
    return tuned_impl() if request.impl == "auto" else cast(Impl, request.impl)
