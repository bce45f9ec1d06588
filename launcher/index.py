"""The index page of a history: the last night, and every config's metrics over the nights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from launcher.charts import sparkline
from launcher.history import Record
from launcher.html import render
from launcher.sample import Metric
from launcher.verdicts import quantity

TONES = {"passed": "good", "regressed": "bad", "failed": "bad", "no verdict": "unsure"}
SHOWN = 60
"""Nights of a config that the page shows."""


def index_page(folder: Path, records: Sequence[Record], summary: dict[str, Any]) -> str:
    """The page, to be written into the history's folder: its links are relative to that."""
    names = list(dict.fromkeys(record.sample.config for record in records))
    bands = {line["name"]: _bands(line["comparison"]) for line in summary["configs"] if line["comparison"]}
    return render(
        "index.html.j2",
        title=f"{summary['verdict']}: nightly {summary['night']}",
        summary=summary,
        tones=TONES,
        configs=[
            _config(name, [r for r in records if r.sample.config == name][-SHOWN:], bands.get(name, {}), folder)
            for name in names
        ],
    )


def _config(
    name: str, records: Sequence[Record], bands: dict[str, tuple[float | None, float | None]], folder: Path
) -> dict[str, Any]:
    metrics = {m.name: m for record in records for m in record.sample.metrics}
    trends = [_metric(metric, records, bands.get(metric.name, (None, None))) for metric in metrics.values()]
    for other in dict.fromkeys(trend for record in records for trend in record.sample.trends):
        values = [record.sample.trends.get(other) if record.sample.valid else None for record in records]
        trends.append(_tile(other, values, "", (None, None)))
    nights = [{"verdict": r.verdict, "run_id": r.sample.run_id, "href": _href(folder, r)} for r in records]
    return {"name": name, "nights": nights, "trends": [trend for trend in trends if trend["picture"]]}


def _metric(
    metric: Metric, records: Sequence[Record], band: tuple[float | None, float | None]
) -> dict[str, str | Markup]:
    values = [
        next((m.value for m in record.sample.metrics if m.name == metric.name), None) if record.sample.valid else None
        for record in records
    ]
    return _tile(metric.name, values, metric.unit, band)


def _tile(
    name: str, values: Sequence[float | None], unit: str, band: tuple[float | None, float | None]
) -> dict[str, str | Markup]:
    known = [value for value in values if value is not None]
    picture = sparkline(values, *band)
    return {"name": name, "value": quantity(known[-1], unit) if known else "–", "picture": picture}


def _bands(comparison: dict[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """By metric, the lowest and the highest value that was allowed; one end is open."""
    found: dict[str, tuple[float | None, float | None]] = {}
    for gate in comparison["gates"]:
        for j in gate["judgements"]:
            if j["median"] is not None:
                up = gate["gate"] != "throughput"
                edge = j["median"] * (1 + (1 if up else -1) * j["threshold"] / 100)
                found[j["metric"]["name"]] = (None, edge) if up else (edge, None)
    return found


def _href(folder: Path, record: Record) -> str:
    page = f"{record.page}.html"
    return page if (folder / page).exists() else ""
