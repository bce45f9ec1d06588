"""One metric of a run against the same metric of earlier runs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.sample import MAD_TO_SIGMA, MEDIAN_ERROR, Metric

Verdict = Literal["passed", "regressed", "no verdict"]

_Z = 2.0
_BEYOND_DOUBT = 3.0
"""Times the noise that a change must exceed to count where the noise is larger than the threshold: a collapse is one,
a bad hour of a busy machine is not."""

_FEW = 6
"""Below so many values their range is used beside the MAD, which of so few is often near 0 by chance."""

# The MAD of few normal values is too small on average; Croux & Rousseeuw 1992, "Time-efficient algorithms for two
# highly robust estimators of scale", table of b_n.
_SMALL = {2: 1.196, 3: 1.495, 4: 1.363, 5: 1.206, 6: 1.200, 7: 1.140, 8: 1.129, 9: 1.107}


@dataclass(frozen=True)
class Judgement:
    """A metric beside its baseline. Change, noise and threshold are percent; a positive change is for the worse."""

    metric: Metric
    verdict: Verdict
    reason: str
    runs: int
    median: float | None
    mad: float | None
    change: float | None
    noise: float | None
    threshold: float


def judge(metric: Metric, history: Sequence[Metric], threshold: float, min_runs: int) -> Judgement:
    """The verdict on one metric.

    With B the median of the history, noise is what an unchanged run may differ from B by (`noise_of`), and

        no verdict   noise > threshold, unless change > threshold + 3 noise
        regressed    change > threshold
        passed       else

    Parity is deterministic: it has regressed if it is worse than the worst of the history by more than the threshold.

    Parameters
    ----------
    history: the same metric of earlier valid runs.
    threshold: percent.
    """
    values = [m.value for m in history]
    if len(values) < min_runs:
        reason = f"{len(values)} valid run{'s'[: len(values) != 1]} to compare with, {min_runs} are needed"
        return Judgement(metric, "no verdict", reason, len(values), None, None, None, None, threshold)
    middle = statistics.median(values)
    mad = statistics.median(abs(v - middle) for v in values)
    reference = max(values) if metric.gate == "parity" else middle
    change = _percent(metric, metric.value - reference, reference)
    noise = 0.0 if metric.gate == "parity" else _percent(metric, noise_of(metric, history), middle, sign=1)
    verdict: Verdict = "regressed" if change > threshold else "passed"
    reason = ""
    if noise > threshold and change <= threshold + _BEYOND_DOUBT * noise:
        verdict, reason = "no verdict", f"noise of {noise:.1f} % is larger than the threshold of {threshold:g} %"
    return Judgement(metric, verdict, reason, len(values), middle, mad, change, noise, threshold)


def noise_of(metric: Metric, history: Sequence[Metric]) -> float:
    """What an unchanged run may differ from the median of the history by, in the metric's unit.

    2 σ √(1 + π/2n): two standard deviations of the difference between one more value and the median of n. σ is
    estimated by the history's MAD, and is at least what the runs saw within themselves. Of fewer than six runs it is
    at least their range.
    """
    values = [m.value for m in history]
    n = len(values)
    middle = statistics.median(values)
    mad = statistics.median(abs(v - middle) for v in values)
    between = mad * MAD_TO_SIGMA * _SMALL.get(n, n / (n - 0.8))
    within = max(metric.error, statistics.median(m.error for m in history))
    noise = _Z * max(between, within) * math.sqrt(1 + MEDIAN_ERROR**2 / n)
    return max(noise, max(values) - min(values)) if n < _FEW else noise


def _percent(metric: Metric, difference: float, reference: float, sign: int = 0) -> float:
    """`difference` in percent of `reference`, positive for the worse."""
    sign = sign or (-1 if metric.gate == "throughput" else 1)
    if reference == 0:
        return 0.0 if difference == 0 else math.copysign(math.inf, sign * difference)
    return 100 * sign * difference / abs(reference)
