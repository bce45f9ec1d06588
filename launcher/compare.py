"""A run against earlier ones: the gate of validity, then each metric against its baseline, then the verdict."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jobs.events import finite
from launcher.baseline import Judgement, judge
from launcher.sample import GATES, Gate, Metric, Sample
from launcher.schema import Compare

Verdict = Literal["passed", "regressed", "failed", "no verdict"]
# From bad to good: the verdict on several things is the first of these that any of them has.
_ORDER: tuple[Verdict, ...] = ("failed", "regressed", "no verdict", "passed")


@dataclass(frozen=True)
class GateResult:
    """One gate of one config. `reasons` say why it is not passed."""

    gate: Gate | Literal["validity"]
    verdict: Verdict
    reasons: tuple[str, ...]
    judgements: tuple[Judgement, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The verdict on a run; `excluded`: runs that are not in its baseline, with the reason."""

    config: str
    run_id: str
    verdict: Verdict
    gates: tuple[GateResult, ...]
    baseline: tuple[str, ...]
    excluded: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, where what is infinite (worse than a baseline of 0) is null."""
        value: dict[str, Any] = finite(asdict(self))
        return value

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Comparison":
        """The inverse of `as_dict`."""
        excluded = tuple((run_id, why) for run_id, why in value["excluded"])
        gates = tuple(_gate(gate) for gate in value["gates"])
        return cls(**(value | {"gates": gates, "excluded": excluded, "baseline": tuple(value["baseline"])}))


def compare(sample: Sample, earlier: Sequence[Sample], settings: Compare) -> Comparison:
    """The verdict on a run: failed if it is not valid itself, regressed if a gate is, passed if all gates are.

    Anything else is "no verdict". The baseline is the last `settings.window` of the `earlier` runs, in the order
    given, that are valid and comparable.
    """
    kept: list[Sample] = []
    excluded: list[tuple[str, str]] = []
    for other in earlier:
        why = _not_comparable(sample, other)
        if not why and any(other.run_id == one.run_id for one in kept):
            why = "is named twice"
        if why:
            excluded.append((other.run_id, why))
        else:
            kept.append(other)
    kept = kept[-settings.window :]
    gates = [GateResult("validity", "passed" if sample.valid else "failed", sample.problems)]
    if sample.valid:
        gates += _metric_gates(sample, kept, settings)
    else:
        gates += [GateResult(gate, "no verdict", ("the run is not valid",)) for gate in GATES]
    return Comparison(
        config=sample.config,
        run_id=sample.run_id,
        verdict=worst([gate.verdict for gate in gates]),
        gates=tuple(gates),
        baseline=tuple(other.run_id for other in kept),
        excluded=tuple(excluded),
    )


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on several things; no verdict on none."""
    return min(verdicts, key=_ORDER.index, default="no verdict")


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Where two identities differ, as "key: value instead of value"."""
    for key in [*one, *(key for key in other if key not in one)]:
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} is {b} instead of {a}"


def _not_comparable(sample: Sample, other: Sample) -> str:
    if other.run_id == sample.run_id:
        return "is the run itself"
    if not other.valid:
        return f"not valid: {other.problems[0]}"
    return "; ".join(differences(sample.identity, other.identity))


def _metric_gates(sample: Sample, kept: Sequence[Sample], settings: Compare) -> Iterator[GateResult]:
    history = [{metric.name: metric for metric in other.metrics} for other in kept]
    for gate in GATES:
        judgements = tuple(
            judge(
                metric,
                [run[metric.name] for run in history if metric.name in run],
                getattr(settings, gate),
                settings.min_runs,
            )
            for metric in sample.metrics
            if metric.gate == gate
        )
        reasons = tuple(_reason(j) for j in judgements if j.verdict != "passed")
        if len(kept) < settings.min_runs:
            reasons = (judgements[0].reason,) if judgements else ()
        if not judgements:
            reasons = (f"the run has no metric of {gate}",)
        verdicts = [j.verdict for j in judgements]
        missing = _missing(gate, sample, history, settings.min_runs)
        if judgements and missing:
            reasons += tuple(f"{name}: no verdict: the run has none, its baseline has" for name in missing)
            verdicts.append("no verdict")
        yield GateResult(gate, worst(verdicts), reasons, judgements)


def _missing(gate: Gate, sample: Sample, history: Sequence[dict[str, Metric]], min_runs: int) -> list[str]:
    """Metrics that enough of the history has and the run has not."""
    counts = Counter(name for run in history for name, metric in run.items() if metric.gate == gate)
    known = {metric.name for metric in sample.metrics}
    return [name for name, count in counts.items() if count >= min_runs and name not in known]


def _reason(judgement: Judgement) -> str:
    if judgement.reason or judgement.change is None:
        return f"{judgement.metric.name}: {judgement.verdict}: {judgement.reason}"
    return (
        f"{judgement.metric.name}: {judgement.change:+.2f} % worse than the baseline, "
        f"{judgement.threshold:g} % are allowed (noise {judgement.noise:.2f} %)"
    )


def _gate(value: dict[str, Any]) -> GateResult:
    judgements = tuple(Judgement(**(j | {"metric": Metric(**j["metric"])})) for j in value["judgements"])
    return GateResult(value["gate"], value["verdict"], tuple(value["reasons"]), judgements)
