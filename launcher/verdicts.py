"""`launcher compare`: what is named becomes a verdict, as a table, JSON, JUnit and an exit code."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.baseline import Judgement
from launcher.compare import Comparison, compare
from launcher.config import parse_override
from launcher.errors import InputError
from launcher.files import write_atomically
from launcher.history import History
from launcher.junit import Case, junit
from launcher.samples import earlier_runs, reports_of, samples_of, settings_of
from launcher.units import figure, size

EXIT_CODES = {"passed": 0, "regressed": 1, "failed": 1, "no verdict": 2}

_OUTCOMES = {"passed": "passed", "regressed": "failed", "failed": "failed", "no verdict": "skipped"}


def compare_runs(
    named: Sequence[str],
    folder: Path,
    history: Path | None,
    junit_file: Path | None,
    overrides: Sequence[str],
    *,
    as_json: bool,
) -> int:
    """Returns the exit code of the verdict. Raises `InputError` for runs, files or thresholds that are wrong."""
    *before, last = named
    if not before and history is None:
        before = earlier_runs(last, folder)
    reports = reports_of([*before, last], folder)
    *baseline, sample = samples_of(reports)
    kept = History(history).baseline(sample.config) if history else []
    comparison = compare(sample, [*kept, *baseline], settings_of(reports[-1], _overrides(overrides)))
    out = Console()
    if as_json:
        out.print_json(json.dumps(comparison.as_dict()))
    else:
        show(comparison, out)
    if junit_file:
        try:
            write_atomically(junit_file, junit(cases(comparison), "launcher compare"))
        except OSError as error:
            raise InputError(f"--junit {junit_file}: {error}") from None
    return EXIT_CODES[comparison.verdict]


def cases(comparison: Comparison) -> list[Case]:
    """One case a gate."""
    found = []
    for gate in comparison.gates:
        lines = [*gate.reasons, *(_line(j) for j in gate.judgements if j.verdict == "passed")]
        outcome: Any = _OUTCOMES[gate.verdict]
        found.append(Case(comparison.config, gate.gate, outcome, "\n".join(lines)))
    return found


def show(comparison: Comparison, out: Console) -> None:
    """The verdict as a table: a row a metric, and why a gate is not passed."""
    title = f"{comparison.config} {comparison.run_id}: {comparison.verdict}"
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for head in ("gate", "metric", "run", "baseline", "change", "noise", "allowed", "verdict"):
        table.add_column(head, overflow="fold")  # a log of CI is 80 columns wide, and a number must be whole
    for gate in comparison.gates:
        for j in gate.judgements:
            table.add_row(*map(Text, (gate.gate, *_cells(j))))
        if not gate.judgements:
            table.add_row(gate.gate, *[""] * 6, gate.verdict)
        table.add_section()
    out.print(table)
    count = len(comparison.baseline)
    _plain(out, f"baseline: {count} valid run{'s'[: count != 1]}: {', '.join(comparison.baseline) or 'none'}")
    for run_id, why in comparison.excluded:
        _plain(out, f"not in the baseline: {run_id}: {why}")
    for gate in comparison.gates:
        for reason in gate.reasons:
            _plain(out, f"{gate.gate}: {reason}")


def _overrides(texts: Sequence[str]) -> dict[str, Any]:
    pairs = [parse_override(text) for text in texts]
    wrong = [key for key, _ in pairs if not key.startswith("compare.")]
    if wrong:
        raise InputError(f"--set {wrong[0]}: of a run that is over only compare.… can be overridden")
    return {key.removeprefix("compare."): value for key, value in pairs}


def _cells(j: Judgement) -> list[str]:
    baseline = "–" if j.median is None else f"{quantity(j.median, j.metric.unit)} (n={j.runs})"
    change = "–" if j.change is None else f"{j.change:+.2f} %"
    noise = "–" if j.noise is None else f"±{j.noise:.2f} %"
    allowed = f"{j.threshold:g} %"
    return [j.metric.name, quantity(j.metric.value, j.metric.unit), baseline, change, noise, allowed, j.verdict]


def _line(j: Judgement) -> str:
    return ", ".join(f"{head} {cell}" for head, cell in zip(_HEADS, _cells(j), strict=True))


_HEADS = ("metric", "run", "baseline", "change for the worse", "noise", "allowed", "verdict")


def quantity(value: float, unit: str) -> str:
    """A value with its unit."""
    return size(value) if unit == "B" else f"{figure(value)} {unit}".strip()


def _plain(out: Console, text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
