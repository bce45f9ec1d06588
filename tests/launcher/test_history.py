"""A history is appended to, by several at once, and read whatever a crash left in it."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import InputError
from launcher.history import History, Record
from launcher.sample import Sample
from tests.checkout import importable
from tests.launcher.samples import sample
from tests.waiting import PATIENCE_S


def record(one: Sample, verdict: str = "passed", night: str = "night") -> Record:
    return Record(night, "/scratch/run", verdict, "completed", (), one)


def test_what_is_appended_is_read_back_in_the_order_of_the_runs(tmp_path: Path) -> None:
    history = History(tmp_path / "new" / "folder")
    assert history.records() == []
    kept = [record(sample(i), night=night) for i, night in ((2, "b"), (1, "a"), (3, "a"))]
    for one in kept:
        history.append(one)
    assert history.records() == sorted(kept, key=lambda r: r.sample.run_id)


def test_nothing_that_was_written_is_ever_changed(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.append(record(sample(1)))
    file = next(tmp_path.glob("records/*.jsonl"))
    before = file.read_bytes()
    history.append(record(sample(2)))
    assert file.read_bytes().startswith(before)


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from launcher.history import History
from tests.launcher.samples import sample
from tests.launcher.test_history import record
night, folder = sys.argv[1:]
history = History(Path(folder))
for i in range(40):
    history.append(record(replace(sample(i), run_id=f"{night}-{i:03d}"), night=night))
"""


def test_two_nightlies_write_at_once(tmp_path: Path) -> None:
    env = importable() | {"PATH": "/usr/bin:/bin"}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, night, str(tmp_path)], env=env) for night in ("one", "two")
    ]
    assert [writer.wait(timeout=PATIENCE_S) for writer in writers] == [0, 0]
    found = [r.sample.run_id for r in History(tmp_path).records()]
    assert found == [f"{night}-{i:03d}" for night in ("one", "two") for i in range(40)]


def test_a_line_that_a_crash_broke_is_passed_over_and_the_next_begins_anew(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.append(record(sample(1)))
    file = next(tmp_path.glob("records/*.jsonl"))
    with file.open("ab") as f:
        f.write(b'{"format": 1, "record": {"nig')
    history.append(record(sample(2)))
    with file.open("ab") as f:
        f.write(b"\xff\n[]\n")
        f.write(json.dumps({"format": 1, "record": {"night": "x"}}).encode() + b"\n")
        f.write(json.dumps({"format": 99, "accept": "x"}).encode() + b"\n")
    assert [r.sample.run_id for r in history.records()] == [sample(1).run_id, sample(2).run_id]


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": 5},
        {"run_id": ["a"]},
        {"identity": "tiny"},
        {"problems": [1]},
        {"metrics": [{"name": "m", "gate": "memory", "value": "1 GB", "unit": "B", "error": 0.0}]},
        {"metrics": [{"name": "m", "gate": "memory", "value": float("nan"), "unit": "B", "error": 0.0}]},
        {"trends": None},
    ],
)
def test_a_line_that_is_json_but_no_record_is_passed_over(tmp_path: Path, change: dict[str, Any]) -> None:
    history = History(tmp_path)
    history.append(record(sample(1)))
    line = {"format": 1, "record": asdict(record(sample(2)))}
    line["record"]["sample"] |= change  # type: ignore[index]
    others = ["[" * 100_000, json.dumps({"format": 1, "accept": ["a"]})]
    (tmp_path / "records" / "odd.jsonl").write_text("\n".join([json.dumps(line), *others]))
    assert history.records() == [record(sample(1))]
    assert history.baseline("tiny") == [sample(1)]


def test_records_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    (tmp_path / "records" / "odd.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match=r"--history .*cannot be read: .*odd\.jsonl"):
        History(tmp_path).records()


def test_the_baseline_has_neither_regressed_nor_invalid_runs_nor_those_of_other_configs(tmp_path: Path) -> None:
    history = History(tmp_path)
    for one in (
        record(sample(1)),
        record(sample(2), "no verdict"),
        record(sample(3), "regressed"),
        record(sample(4, problems=["failed"]), "failed"),
        record(sample(5, config="other")),
    ):
        history.append(one)
    assert history.baseline("tiny") == [sample(1), sample(2)]


def test_an_accepted_run_begins_the_baseline_anew(tmp_path: Path) -> None:
    history = History(tmp_path)
    for one in (record(sample(1)), record(sample(2), "regressed"), record(sample(3))):
        history.append(one)
    history.accept(sample(2).run_id)
    assert history.baseline("tiny") == [sample(2), sample(3)]


def test_only_a_valid_run_of_the_history_is_accepted(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.append(record(sample(1, problems=["the run is failed"]), "failed"))
    with pytest.raises(InputError, match="not valid: the run is failed; only a valid run can be a baseline"):
        history.accept(sample(1).run_id)
    with pytest.raises(InputError, match="nonesuch: no such run in this history"):
        history.accept("nonesuch")


def test_a_history_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        History(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        History(tmp_path / "file" / "below").append(record(sample(1)))
