"""Verdicts: the gate of validity, the rolling baseline, and how often they are wrong on synthetic histories."""

import io
import json
import math
import random
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from launcher.baseline import judge, noise_of
from launcher.compare import Comparison, compare
from launcher.junit import Case, junit
from launcher.sample import Gate, Metric
from launcher.schema import Compare
from launcher.verdicts import cases, show
from tests.launcher.samples import IDENTITY, sample

GOOD = [sample(i, value) for i, value in enumerate((1000.0, 1004.0, 998.0), start=1)]


def gates(comparison: Comparison) -> dict[str, str]:
    return {gate.gate: gate.verdict for gate in comparison.gates}


def metric(value: float, gate: Gate = "throughput", error: float = 0.0) -> Metric:
    return Metric("m", gate, value, "x", error)


def test_an_unchanged_run_passes_every_gate() -> None:
    found = compare(sample(9, 1001.0), GOOD, Compare())
    assert (found.verdict, set(gates(found).values())) == ("passed", {"passed"})
    assert list(gates(found)) == ["validity", "throughput", "latency", "memory", "parity"]
    assert found.baseline == tuple(s.run_id for s in GOOD)


@pytest.mark.parametrize(
    ("change", "gate", "verdict"),
    [
        ({"throughput": 945.0}, "throughput", "regressed"),
        ({"throughput": 955.0}, "throughput", "passed"),
        ({"throughput": 2000.0}, "throughput", "passed"),
        ({"p99": 11.1}, "latency", "regressed"),
        ({"p99": 10.9}, "latency", "passed"),
        ({"memory": 1.11e9}, "memory", "regressed"),
        ({"memory": 0.5e9}, "memory", "passed"),
        ({"parity": 3.0001e-3}, "parity", "regressed"),
        ({"parity": 2e-3}, "parity", "passed"),
    ],
)
def test_each_metric_has_its_threshold_and_better_is_never_worse(
    change: dict[str, float], gate: str, verdict: str
) -> None:
    found = compare(sample(9, **change), GOOD, Compare())  # type: ignore[arg-type]
    assert gates(found).pop(gate) == verdict
    assert found.verdict == verdict
    assert {v for g, v in gates(found).items() if g != gate} == {"passed"}, "the other gates are not concerned"


def test_thresholds_are_the_configurations() -> None:
    assert compare(sample(9, 945.0), GOOD, Compare(throughput=6)).verdict == "passed"
    assert compare(sample(9, parity=3.1e-3), GOOD, Compare(parity=5)).verdict == "passed"


def test_noise_larger_than_the_threshold_gives_no_verdict() -> None:
    noisy = [sample(i, value) for i, value in enumerate((1000.0, 1120.0, 900.0, 1060.0), start=1)]
    for throughput in (880.0, 1000.0):
        found = compare(sample(9, throughput), noisy, Compare())
        assert (found.verdict, gates(found)["throughput"]) == ("no verdict", "no verdict")
        (reason,) = next(gate.reasons for gate in found.gates if gate.gate == "throughput")
        assert "is larger than the threshold of 5 %" in reason


def test_what_no_noise_explains_has_regressed_nevertheless() -> None:
    noisy = [sample(i, value) for i, value in enumerate((1000.0, 1060.0, 960.0, 1020.0), start=1)]
    assert compare(sample(9, 300.0), noisy, Compare()).verdict == "regressed"
    assert compare(sample(9, 700.0), noisy, Compare()).verdict == "no verdict", "the noise is 10 %"


def test_the_spread_within_a_run_is_noise_too() -> None:
    assert compare(sample(9, 940.0, error=0.0), GOOD, Compare()).verdict == "regressed"
    assert compare(sample(9, 940.0, error=40.0), GOOD, Compare()).verdict == "no verdict"


def test_one_outlier_does_not_move_the_baseline() -> None:
    values = (1000.0, 1003.0, 999.0, 400.0, 1001.0, 998.0, 1002.0)
    history = [sample(i, value) for i, value in enumerate(values, start=1)]
    assert compare(sample(9, 1000.0), history, Compare()).verdict == "passed"
    assert compare(sample(9, 900.0), history, Compare()).verdict == "regressed"


def test_the_baseline_is_the_last_valid_runs_of_the_same_kind() -> None:
    other = sample(3, 10.0, identity=IDENTITY | {"topology": {"nodes": 2, "ep": 4}})
    broken = sample(4, 10.0, problems=["the run is failed"])
    old = [sample(i, 500.0) for i in range(20, 24)]
    found = compare(sample(9), [*old, *GOOD, other, broken, sample(9)], Compare(window=3))
    assert (found.verdict, found.baseline) == ("passed", tuple(s.run_id for s in GOOD))
    assert [why for _, why in found.excluded] == [
        "topology.nodes is 2 instead of 1",
        "not valid: the run is failed",
        "is the run itself",
    ]


def test_too_few_valid_runs_are_no_baseline() -> None:
    found = compare(sample(9), GOOD[:2], Compare())
    assert (found.verdict, gates(found)["throughput"]) == ("no verdict", "no verdict")
    assert "2 valid runs to compare with, 3 are needed" in found.gates[1].reasons[0]
    assert compare(sample(9), GOOD[:2], Compare(min_runs=2)).verdict == "passed"


def test_a_window_that_holds_too_few_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="min_runs is 20, more than the window of 10: never a verdict"):
        Compare(min_runs=20)


def test_a_run_that_is_not_valid_is_not_compared() -> None:
    found = compare(sample(9, 10.0, problems=["3 of 5 passes completed"]), GOOD, Compare())
    assert found.verdict == "failed"
    assert gates(found) == {"validity": "failed"} | dict.fromkeys(
        ("throughput", "latency", "memory", "parity"), "no verdict"
    )


def test_a_metric_that_a_run_lacks_is_not_passed() -> None:
    without = replace(sample(9), metrics=sample(9).metrics[:2])
    assert gates(compare(without, GOOD, Compare()))["memory"] == "no verdict"


def test_one_metric_of_several_that_a_run_lacks_is_said() -> None:
    peak = Metric("memory peak, most of any rank", "memory", 2e9, "B")
    history = [replace(one, metrics=(*one.metrics, peak)) for one in GOOD]
    found = compare(sample(9), history, Compare())
    assert gates(found) | {"memory": ""} == gates(compare(sample(9), GOOD, Compare())) | {"memory": ""}
    assert gates(found)["memory"] == "no verdict"
    assert found.gates[3].reasons == (f"{peak.name}: no verdict: the run has none, its baseline has",)


def test_a_run_that_is_named_twice_counts_once() -> None:
    found = compare(sample(9), [GOOD[0]] * 3, Compare())
    assert (found.verdict, found.baseline) == ("no verdict", (GOOD[0].run_id,))
    assert found.excluded == ((GOOD[0].run_id, "is named twice"),) * 2


def test_a_baseline_of_zero_can_be_compared_with() -> None:
    zeros = [metric(0.0, "parity")] * 3
    assert judge(metric(0.0, "parity"), zeros, 0, 3).verdict == "passed"
    found = judge(metric(1e-9, "parity"), zeros, 0, 3)
    assert (found.verdict, found.change) == ("regressed", math.inf)
    regressed = compare(sample(9, parity=1e-9), [sample(i, parity=0.0) for i in range(3)], Compare())
    assert "Infinity" not in json.dumps(regressed.as_dict())


def test_noise_is_two_standard_deviations_of_the_difference_to_a_median() -> None:
    # σ = 1.4826 · MAD · b_n: ten values with a MAD of 1 and the factor 10 / 9.2.
    history = [metric(100 + d) for d in (-1, 1, -1, 1, -1, 1, -1, 1, 0, 0)]
    assert noise_of(metric(100), history) == pytest.approx(2 * 1.4826 * 10 / 9.2 * math.sqrt(1 + math.pi / 20))


def verdicts_on(noise: float, slower: float, nights: int, trials: int) -> Counter[str]:
    """Verdicts on synthetic runs: normal noise, fractions; `slower` is what the last run lost."""
    generator = random.Random(f"{noise} {slower} {nights}")
    draw = lambda factor: metric(1000 * factor * (1 + noise * generator.gauss()))  # noqa: E731
    return Counter(judge(draw(1 - slower), [draw(1) for _ in range(nights)], 5.0, 3).verdict for _ in range(trials))


# Of 2000 synthetic nights each: where the noise is small beside 5 % the verdicts are right, elsewhere there are few.
@pytest.mark.parametrize(
    ("noise", "nights", "false_alarms", "misses", "without"),
    [
        (0.005, 3, 0.001, 0.001, 0.02),
        (0.005, 10, 0.001, 0.001, 0.001),
        (0.01, 3, 0.002, 0.01, 0.2),
        (0.01, 5, 0.001, 0.01, 0.1),
        (0.01, 10, 0.001, 0.002, 0.01),
        (0.02, 3, 0.02, 0.01, 0.55),
        (0.02, 10, 0.01, 0.01, 0.4),
        (0.05, 3, 0.04, 0.025, 0.95),
        (0.05, 10, 0.02, 0.01, 0.98),
        (0.10, 3, 0.025, 0.015, 0.99),
        (0.10, 10, 0.005, 0.005, 1.0),
    ],
)
def test_false_alarms_and_misses_are_rare(
    noise: float, nights: int, false_alarms: float, misses: float, without: float
) -> None:
    trials = 2000
    unchanged = verdicts_on(noise, 0.0, nights, trials)
    slow = verdicts_on(noise, 0.12, nights, trials)
    assert unchanged["regressed"] / trials <= false_alarms
    assert slow["passed"] / trials <= misses
    assert unchanged["no verdict"] / trials <= without


def test_a_slowdown_of_12_percent_is_found_where_the_noise_allows_it() -> None:
    for nights, found in ((3, 0.85), (5, 0.95), (10, 0.99)):
        assert verdicts_on(0.01, 0.12, nights, 2000)["regressed"] / 2000 >= found


def junit_of(comparisons: Sequence[Comparison]) -> ET.Element:
    text = junit([case for comparison in comparisons for case in cases(comparison)], "nightly")
    return ET.fromstring(text.encode())


def test_a_narrow_log_shows_whole_numbers() -> None:
    out = Console(file=io.StringIO(), width=60)
    show(compare(sample(9, 123456.7), GOOD, Compare()), out)
    assert isinstance(out.file, io.StringIO)
    text = out.file.getvalue()
    assert "…" not in text


def test_junit_has_one_case_per_config_and_gate() -> None:
    slow = compare(sample(9, 900.0, config="slow"), GOOD, Compare())
    new = compare(sample(9, config="new"), [], Compare())
    root = junit_of([slow, new])
    found: dict[Any, Any] = {
        (c.get("classname"), c.get("name")): [child.tag for child in c] for c in root.iter("testcase")
    }
    assert len(found) == 10
    assert found[("slow", "throughput")] == ["failure"]
    assert found[("slow", "memory")] == []
    assert found[("new", "throughput")] == ["skipped"]
    assert found[("new", "validity")] == []
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("10", "1", "4")
    message = next(c for c in root.iter("failure")).get("message") or ""
    assert "+10.00 % worse than the baseline, 5 % are allowed" in message


def test_junit_is_xml_whatever_a_log_said() -> None:
    text = junit([Case("c", "validity", "failed", "\x1b[31mred <&\x00> \ud800")], "n")
    assert "red" in (next(ET.fromstring(text.encode()).iter("failure")).text or "")
