"""Samples of runs that were never run, for tests of what is made of them."""

from collections.abc import Sequence
from typing import Any

from launcher.sample import Metric, Sample

IDENTITY: dict[str, Any] = {"model": "tiny", "topology": {"nodes": 1, "ep": 4}, "batch_sizes": [8]}


def sample(
    index: int,
    throughput: float = 1000.0,
    *,
    p99: float = 10.0,
    memory: float = 1e9,
    parity: float = 3e-3,
    error: float = 0.0,
    problems: Sequence[str] = (),
    identity: dict[str, Any] = IDENTITY,
    config: str = "tiny",
) -> Sample:
    """The run of the night `index`. `error` is the standard error of its throughput."""
    return Sample(
        config=config,
        run_id=f"202601{index:02d}-000000-abcd",
        time=f"2026-01-{index % 28 + 1:02d}T00:00:00.000+00:00",
        identity=identity,
        problems=tuple(problems),
        metrics=(
            Metric("total_token_throughput at batch 8", "throughput", throughput, "tokens/s", error),
            Metric("p99_latency at batch 8", "latency", p99, "ms"),
            Metric("memory held, most of any rank", "memory", memory, "B"),
            Metric("relative error of layer 0", "parity", parity, ""),
        ),
        trends={"weights loaded, s": 2.0},
    )
