"""What a report says that can be compared: of which run, whether it is valid, and its metrics."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Gate = Literal["throughput", "latency", "memory", "parity"]
GATES: tuple[Gate, ...] = ("throughput", "latency", "memory", "parity")

MEDIAN_ERROR = math.sqrt(math.pi / 2)
"""Standard error of a median of n normal values, in σ / √n (for large n)."""

MAD_TO_SIGMA = 1.4826
"""σ of a normal distribution over its median absolute deviation: 1 / Φ⁻¹(3/4)."""


@dataclass(frozen=True)
class Metric:
    """One number of a run. `error` is the standard error that the run itself saw in it, in the unit of the value."""

    name: str
    gate: Gate
    value: float
    unit: str
    error: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One run, as it is compared and kept.

    `identity` must be the same for two runs to be comparable; `problems` say why a run is not valid, [] if it is;
    `trends` are numbers to look at that nothing is decided by.
    """

    config: str
    run_id: str
    time: str
    identity: dict[str, Any]
    problems: tuple[str, ...]
    metrics: tuple[Metric, ...]
    trends: dict[str, float]

    @property
    def valid(self) -> bool:
        """Whether others may be measured against it."""
        return not self.problems


def sample_of(report: dict[str, Any]) -> Sample:
    """The sample of a report of the newest schema version (`report_schema.read` brings older ones up to it)."""
    run = report["run"]
    return Sample(
        config=run["name"],
        run_id=run["id"],
        time=run["started"] or "",
        identity=identity(report),
        problems=tuple(problems(report)),
        metrics=tuple(metrics(report)),
        trends=dict(trends(report)),
    )


def identity(report: dict[str, Any]) -> dict[str, Any]:
    """What two runs must share: model and shapes, layout, kind of device, and the work that is timed."""
    config = report["config"]
    job = config["job"]
    topology = config["topology"]
    return {
        "model": config["model"]["name"],
        "shape": config["model"]["shape"],
        "topology": {key: topology[key] for key in ("nodes", "ranks_per_node", "tp", "ep")} | _slices(topology),
        "layers": job["layers"],
        "batch_sizes": job["throughput"]["batch_sizes"],
        "parity": {key: job["parity"][key] for key in ("tokens", "layers")},
        "seed": config["run"]["seed"],
        "arch": config["cluster"]["arch"],
        "devices": sorted({r["environment"]["device_name"] for r in report["ranks"] if r["environment"]}),
    }


def _slices(topology: dict[str, Any]) -> dict[str, Any]:
    """How experts are cut, where it is not as it was for every run before these keys were."""
    usual = {"expert_tp": 1, "shared_expert": "replicated"}
    return {key: topology[key] for key, value in usual.items() if topology.get(key, value) != value}


def problems(report: dict[str, Any]) -> Iterator[str]:
    """Why the run is not valid: it must have been completed, all that was asked of it, and held parity."""
    run, failure, job = report["run"], report["failure"], report["config"]["job"]
    if job["kind"] != "probe":
        yield f"job.kind is {job['kind']}: only probes are compared"
        return
    if run["state"] != "completed":
        why = f": {failure['error_type']}: {failure['error']}" if failure else ""
        yield f"the run is {run['state']}{why}"
    wanted = job["throughput"]["batch_sizes"]
    measured = [line["batch_size"] for line in report["throughput"]]
    if sorted(measured) != sorted(set(wanted)):
        yield f"batch sizes {measured} were measured, {wanted} were requested"
    for line in report["throughput"]:
        if line["completed"] != line["requested"]:
            yield f"batch {line['batch_size']}: {line['completed']} of {line['requested']} passes completed"
        for key in ("total_token_throughput", "us_per_layer", "median_latency_ms"):
            if line["batch_size"] and not 0 < line[key] < math.inf:
                yield f"batch {line['batch_size']}: {key} is {line[key]}, not above 0"
    parity = report["parity"]
    if not parity or not parity["layers"]:
        yield "parity was not checked"
        return
    for number, line in parity["layers"].items():
        error = line["relative_error"]
        if error is None or not error <= parity["tolerance"]:
            yield f"parity of layer {number}: {error} is not within the tolerance {parity['tolerance']:g}"


def metrics(report: dict[str, Any]) -> Iterator[Metric]:
    """The numbers that gates decide by. A batch of no tokens, or that took no time, has none."""
    for line in report["throughput"]:
        if not line["batch_size"] or not line["us_per_layer"] > 0:
            continue
        at = f"at batch {line['batch_size']}"
        # What the median of this run's own passes may be off by.
        relative = line["us_per_layer_mad"] * MAD_TO_SIGMA * MEDIAN_ERROR / line["us_per_layer"]
        relative /= math.sqrt(max(1, line["completed"]))
        throughput, median = line["total_token_throughput"], line["median_latency_ms"]
        yield Metric(f"total_token_throughput {at}", "throughput", throughput, "tokens/s", relative * throughput)
        yield Metric(f"median_latency {at}", "latency", median, "ms", relative * median)
        if line["p99_latency_ms"] is not None:
            yield Metric(f"p99_latency {at}", "latency", line["p99_latency_ms"], "ms")
    held = [line["measured_total"] for line in report["memory"]]
    if held:
        yield Metric("memory held, most of any rank", "memory", max(held), "B")
    peaks = [line["device_peak"] for line in report["memory"] if line.get("device_peak")]
    if peaks:
        yield Metric("memory peak, most of any rank", "memory", max(peaks), "B")
    for number, line in ((report["parity"] or {}).get("layers") or {}).items():
        if line["relative_error"] is not None:
            yield Metric(f"relative error of layer {number}", "parity", line["relative_error"], "")


def trends(report: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers to look at: load time of the slowest rank, balancedness, time of the combine."""
    loads = [r["stages"]["weights"]["seconds"] for r in report["ranks"] if "weights" in r["stages"]]
    if loads and all(seconds is not None for seconds in loads):
        yield "weights loaded, s", max(loads)
    if report["expert_load"]:
        yield "balancedness (mean/max tokens per rank)", report["expert_load"]["balancedness"]
    combined = [line["combine_us"] for line in report["throughput"] if line["combine_us"] is not None]
    if combined:
        yield "combine of the largest batch, µs", combined[-1]
