"""Checking the backends on a cluster's devices: against f64, against each other bit by bit, and in time."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from jobs.place import Place, share
from jobs.request import ProbeRequest
from moe_ep.bench.check import Check, check


def run(request: ProbeRequest, where: Place, progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Check this rank's part of the numbers of tokens. The lines of all ranks, on every rank."""
    mine = request.tune_tokens[where.rank :: where.world]
    found: list[Check] = []
    for line in check(share(request, "check"), mine, where.device, request.activation_dtype):
        print(line, flush=True)
        found.append(line)
        progress({"done": len({c.tokens for c in found}), "total": len(mine), "latest": asdict(line)})
    parts: list[list[Check]] = [[]] * where.world
    dist.all_gather_object(parts, found)
    return {"checks": [{"rank": rank} | asdict(line) for rank, part in enumerate(parts) for line in part]}


def refuse(lines: Sequence[dict[str, Any]]) -> None:
    """Raise `RuntimeError` if a backend of any rank is wrong; names backend, tokens and rank."""
    checks = [(line["rank"], Check(**{k: v for k, v in line.items() if k != "rank"})) for line in lines]
    wrong = [f"rank {rank}: {check.wrong}" for rank, check in checks if check.wrong]
    if wrong:
        raise RuntimeError("; ".join(wrong))
