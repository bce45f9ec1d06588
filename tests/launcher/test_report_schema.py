"""report.json has a published schema, and what older versions wrote is still read."""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from launcher import report_schema
from launcher.compare import differences
from launcher.errors import InputError
from launcher.html import page
from launcher.report_text import markdown
from launcher.sample import sample_of
from launcher.samples import samples_of
from tests.checkout import ROOT

PUBLISHED = ROOT / "docs" / "schema" / "probe-report-2.json"
OLD = Path(__file__).parent / "reports" / "version-1.json"


def valid(report: dict[str, Any]) -> None:
    """Check a report against the published schema."""
    jsonschema.validate(report, json.loads(PUBLISHED.read_text()), jsonschema.Draft202012Validator)


def test_the_published_schema_is_the_one_that_is_used() -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        PUBLISHED.write_text(json.dumps(report_schema.json_schema(), indent=2) + "\n")
    published = json.loads(PUBLISHED.read_text())
    assert published == report_schema.json_schema()
    jsonschema.Draft202012Validator.check_schema(published)


def test_a_report_of_version_1_is_read_shown_and_compared() -> None:
    report = report_schema.read(OLD)
    valid(report)
    (first, second) = report["throughput"]
    old = json.loads(OLD.read_text())["throughput"]
    assert [first["total_token_throughput"], second["total_token_throughput"]] == [o["tokens_per_s"] for o in old]
    assert first["median_latency_ms"] == pytest.approx(old[0]["us_per_layer"] * 4 / 1e3)
    assert first["p99_latency_ms"] is None, "it was not measured then"
    assert report["run"]["id"] in markdown(report)
    assert report["run"]["id"] in page(report)
    sample = sample_of(report)
    assert sample.problems == ()
    assert {metric.gate for metric in sample.metrics} == {"throughput", "latency", "memory", "parity"}


def changed(folder: Path, **change: Any) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(OLD.read_text()) | change))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "schema_version is 3, this launcher reads 1 to 2; use a newer one"),
        ({"schema": "other"}, "not a report: expected the key schema with 'moe-ep/probe-report'"),
        ({"run": {}}, r"run\.name: Field required"),
        ({"ranks": 4}, "damaged"),
        ({"ranks": []}, "damaged: ZeroDivisionError"),
        ({"planned_bytes": float("nan")}, "NaN is not JSON"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
    ],
)
def test_what_is_no_report_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = changed(tmp_path, **change)
    with pytest.raises(InputError, match=rf"{path}: {message}"):
        report_schema.read(path)


def test_what_is_no_json_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json: "):
        report_schema.read(tmp_path / "x.json")


def test_a_report_without_what_is_compared_is_refused_by_name(tmp_path: Path) -> None:
    report = report_schema.read(changed(tmp_path, config={"model": {"name": "tiny"}}))
    with pytest.raises(InputError, match=rf"report of {report['run']['name']} {report['run']['id']}: damaged: .*'job'"):
        samples_of([report])


def test_a_run_whose_experts_are_cut_otherwise_is_another_topology() -> None:
    report = report_schema.read(OLD)
    before = sample_of(report).identity
    report["config"]["topology"] |= {"expert_tp": 1, "shared_expert": "replicated"}
    assert sample_of(report).identity == before, "what older runs did without saying so"
    report["config"]["topology"] |= {"expert_tp": 2}
    assert list(differences(sample_of(report).identity, before)) == ["topology.expert_tp is None instead of 2"]


@pytest.mark.parametrize("key", ["total_token_throughput", "us_per_layer", "median_latency_ms"])
def test_a_number_that_cannot_be_is_no_measurement(key: str) -> None:
    report = report_schema.read(OLD)
    report["throughput"][0][key] = 0.0
    assert sample_of(report).problems == (f"batch {report['throughput'][0]['batch_size']}: {key} is 0.0, not above 0",)
