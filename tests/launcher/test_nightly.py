"""A night: what it starts when, for how long it waits, and what it leaves, however its process fares."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher import nightly as nights
from launcher.errors import InputError, UnclearSubmissionError
from launcher.history import History, Record
from launcher.night import Entry, Night, begin, broken_off
from launcher.nightly import deadline_missed
from launcher.plan import Plan
from launcher.runs import record_submission
from launcher.schema import Limits
from launcher.status import RunStatus
from launcher.summary import show, summary_of
from tests.checkout import CONFIGS, importable
from tests.launcher.probes import write_probe
from tests.launcher.samples import sample
from tests.waiting import PATIENCE_S, until

LIMITS = Limits(time_min=60, stall_s=100, pending_s=1000)


def status(state: str, reason: str = "", progress: str = "") -> RunStatus:
    return RunStatus("/run", "tiny", "id", "7", state, reason, progress=progress)


def entry(**values: Any) -> Entry:
    return Entry("c.yaml", "c", phase="running", changed=1000.0, **values)


@pytest.mark.parametrize(
    ("found", "quiet", "missed"),
    [
        (status("pending", "Priority"), 999, ""),
        (status("pending", "Priority"), 1001, "pending for 1001 s (Priority)"),
        (status("running", progress="weights 3/43"), 99, ""),
        (
            status("running", progress="weights 3/43"),
            101,
            "running, but no rank has made progress for 101 s (at weights 3/43)",
        ),
        (status("unknown", "not in the queue"), 299, ""),
        (status("unknown", "not in the queue"), 301, "unknown for 301 s: not in the queue"),
        (status("node failed"), 299, ""),
        (status("node failed", "by Slurm"), 301, "node failed for 301 s: by Slurm"),
    ],
)
def test_a_deadline_counts_from_the_last_progress(found: RunStatus, quiet: float, missed: str) -> None:
    assert deadline_missed(entry(), found, LIMITS, 1000.0 + quiet, blind=False) == missed


def test_a_run_that_waits_again_after_it_ran_is_said_to() -> None:
    assert "again, after it had run" in deadline_missed(entry(ran=True), status("pending"), LIMITS, 9e9, blind=False)


def test_a_slurm_that_does_not_answer_loses_no_run() -> None:
    assert deadline_missed(entry(), status("unknown"), Limits(time_min=1, stall_s=900), 1800.0, blind=True) == ""


class Cluster:
    """Runs that end when a test says so."""

    def __init__(self) -> None:
        self.submitted: list[Plan] = []
        self.states: dict[str, str] = {}
        self.problem: Callable[[Plan], None] = lambda plan: None
        self.at_once = False

    def submit(self, plan: Plan) -> None:
        self.problem(plan)
        record_submission(plan.run_dir, 0, "local", "")
        self.submitted.append(plan)
        self.states[str(plan.run_dir)] = "running"
        if self.at_once:
            self.finish(plan)

    def statuses(self, run_dirs: list[Path]) -> tuple[list[RunStatus], tuple[str, ...]]:
        found = [RunStatus(str(run), run.parent.name, run.name, "7", self.states[str(run)]) for run in run_dirs]
        return found, ()

    def finish(self, plan: Plan) -> None:
        write_probe(plan)
        self.states[str(plan.run_dir)] = "completed"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(nights, "_submit", cluster.submit)
    monkeypatch.setattr(nights, "statuses", cluster.statuses)
    monkeypatch.setattr(nights, "POLL_S", 0.0)
    monkeypatch.chdir(tmp_path)
    return cluster


def configs_named(folder: Path, *names: str) -> list[Path]:
    found = []
    for name in names:
        path = folder / f"{name}.yaml"
        text = (CONFIGS / "tiny.yaml").read_text().replace("name: tiny", f"name: {name}")
        text = text.replace("cluster: local", f"cluster: {CONFIGS}/clusters/local.yaml")
        path.write_text(text.replace("model: tiny", f"model: {CONFIGS}/models/tiny.yaml"))
        found.append(path)
    return found


def worker_of(tmp_path: Path, configs: list[Path]) -> tuple[Any, Night]:
    night = begin(tmp_path / "history", configs, [])
    return nights._Worker(night, History(tmp_path / "history")), night


def test_no_more_runs_are_submitted_at_once_than_allowed(cluster: Cluster, tmp_path: Path) -> None:
    worker, night = worker_of(tmp_path, configs_named(tmp_path, "a", "b", "c"))
    worker.round(2)
    assert [entry.phase for entry in night.entries] == ["running", "running", "waiting"]
    worker.round(2)
    assert len(cluster.submitted) == 2
    cluster.finish(cluster.submitted[0])
    worker.round(2)
    worker.round(2)
    assert [entry.phase for entry in night.entries] == ["judged", "running", "running"]


def test_a_service_which_does_not_end_is_no_nights_work(cluster: Cluster, tmp_path: Path) -> None:
    worker, night = worker_of(tmp_path, [CONFIGS / "serve-tiny.yaml"])
    worker.round(1)
    assert cluster.submitted == []
    assert "job.kind: serve: a service does not end by itself" in night.entries[0].reasons[0]


def test_a_broken_config_and_a_refused_one_leave_the_others_alone(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = configs_named(tmp_path, "good", "broken", "refused", "large")
    configs[1].write_text("run: {name: x\n")
    small = tmp_path / "small.yaml"
    small.write_text((CONFIGS / "clusters/local.yaml").read_text() + "device_memory_gb: 0.001\n")
    configs[3].write_text(configs[3].read_text().replace(f"{CONFIGS}/clusters/local.yaml", str(small)))

    def refuse(plan: Plan) -> None:
        if plan.config.run.name == "refused":
            raise InputError("sbatch refused the request: Invalid account")

    cluster.problem, cluster.at_once = refuse, True
    options: dict[str, Any] = {"parallel": 4, "resume": False, "junit_file": tmp_path / "j.xml", "as_json": True}
    code = nights.nightly([*configs, tmp_path / "nope.yaml"], tmp_path / "history", [], **options)
    assert code == 1
    found = {line["name"]: line for line in json.loads(capsys.readouterr().out)["configs"]}
    assert found["good"]["verdict"] == "no verdict"
    assert "not YAML" in found["broken"]["reasons"][0]
    assert found["refused"]["reasons"] == ["sbatch refused the request: Invalid account"]
    assert "no such file" in found["nope"]["reasons"][0]
    assert "memory: does not fit: 1.373 MB of 1 MB a rank" in found["large"]["reasons"][0]
    assert [path.name for path in (tmp_path / "runs").iterdir() if any(path.iterdir())] == ["good"]
    failures = [case.get("classname") for case in ET.parse(tmp_path / "j.xml").iter("testcase") if len(case)]
    assert {"broken", "refused", "large", "nope"} <= set(failures)
    (folder,) = (tmp_path / "history" / "nights").iterdir()
    assert json.loads((folder / "summary.json").read_text())["verdict"] == "failed"
    assert (tmp_path / "history" / found["good"]["report"]).is_file(), "the report outlives the run's folder"


def test_a_job_that_may_have_been_taken_is_not_submitted_again(cluster: Cluster, tmp_path: Path) -> None:
    def lose_the_answer(plan: Plan) -> None:
        record_submission(plan.run_dir, 0, "slurm", "")
        cluster.states[str(plan.run_dir)] = "unknown"
        raise UnclearSubmissionError("the job may be queued or not")

    cluster.problem = lose_the_answer
    worker, night = worker_of(tmp_path, configs_named(tmp_path, "a"))
    worker.round(1)
    worker.round(1)
    assert (night.entries[0].phase, night.entries[0].state) == ("running", "unknown")


def test_a_run_that_stands_still_is_ended_and_has_failed(cluster: Cluster, tmp_path: Path) -> None:
    worker, night = worker_of(tmp_path, configs_named(tmp_path, "a"))
    worker.round(1)
    (entry,) = night.entries
    entry.changed -= 3601
    worker.round(1)
    assert entry.phase == "stopping"
    cluster.states[entry.run_dir] = "cancelled"
    worker.round(1)
    assert (entry.phase, entry.verdict) == ("judged", "failed")
    assert "no rank has made progress for 360" in entry.reasons[0]
    report = json.loads((Path(entry.run_dir) / "report.json").read_text())
    assert report["failure"]["error_type"] == "GivenUp"


def test_a_run_whose_folder_is_damaged_leaves_the_others_alone(cluster: Cluster, tmp_path: Path) -> None:
    worker, night = worker_of(tmp_path, configs_named(tmp_path, "a", "b", "c"))
    worker.round(3)
    for plan in cluster.submitted:
        cluster.finish(plan)
    odd = {"time": 1.0, "rank": 0, "stage": "throughput", "event": "progress", "data": {}}
    (cluster.submitted[0].run_dir / "events" / "odd.jsonl").write_text(json.dumps(odd) + "\n")
    shutil.rmtree(cluster.submitted[1].run_dir)
    worker.round(3)
    assert [(entry.phase, entry.verdict) for entry in night.entries] == [
        ("judged", "failed"),
        ("judged", "failed"),
        ("judged", "no verdict"),
    ]
    assert night.entries[0].reasons == ["KeyError: 'latest'"]
    assert "not the folder of a run" in night.entries[1].reasons[0]


def test_a_folder_for_runs_that_cannot_be_written_leaves_the_others_alone(cluster: Cluster, tmp_path: Path) -> None:
    def full(plan: Plan) -> None:
        if plan.config.run.name == "a":
            raise OSError(28, "No space left on device")

    cluster.problem = full
    worker, night = worker_of(tmp_path, configs_named(tmp_path, "a", "b"))
    worker.round(2)
    assert [entry.phase for entry in night.entries] == ["judged", "running"]
    assert "No space left" in night.entries[0].reasons[0]


def test_a_clock_that_is_set_forward_ends_no_run(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, night = worker_of(tmp_path, configs_named(tmp_path, "a"))
    worker.round(1)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 86_400)
    worker.round(1)
    assert (night.entries[0].phase, night.entries[0].reasons) == ("running", [])


def test_a_night_whose_junit_file_cannot_be_written_has_ended(cluster: Cluster, tmp_path: Path) -> None:
    cluster.at_once = True
    configs, history = configs_named(tmp_path, "a"), tmp_path / "history"
    options: dict[str, Any] = {"parallel": 1, "resume": False, "junit_file": tmp_path / "no" / "x.xml", "as_json": True}
    for nights_so_far in (1, 2):
        with pytest.raises(InputError, match=r"--junit .*x\.xml"):
            nights.nightly(configs, history, [], **options)
        assert len(list(history.glob("nights/*/summary.json"))) == nights_so_far, "the next one is another night"


def test_two_that_saw_the_same_night_abandoned_do_not_both_take_it(tmp_path: Path) -> None:
    configs, history = configs_named(tmp_path, "a"), tmp_path / "history"
    state = begin(history, configs, []).folder / "night.json"
    value = json.loads(state.read_text())
    value["owner"]["started"] -= 1
    state.write_text(json.dumps(value))
    assert broken_off(history, configs, []) is not None
    state.write_text(json.dumps(value))  # as it was when the other read it
    assert broken_off(history, configs, []) is None


def test_a_narrow_log_shows_whole_ids(tmp_path: Path) -> None:
    night = begin(tmp_path, [tmp_path / "a.yaml"], [])
    night.entries[0].run_dir = "/scratch/runs/a/20260101-000000-abcd"
    night.entries[0].reasons = ["noise of 213.4 % is larger than the threshold of 5 %"]
    out = Console(file=io.StringIO(), width=60)
    show(summary_of(night), night, History(tmp_path), out)
    assert isinstance(out.file, io.StringIO)
    assert "…" not in out.file.getvalue()


def test_a_night_whose_process_is_gone_is_gone_on_with_by_one(tmp_path: Path) -> None:
    configs = configs_named(tmp_path, "a")
    history = tmp_path / "history"
    first = begin(history, configs, [])
    assert broken_off(history, configs, []) is None, "its process (this one) lives"
    state = json.loads((first.folder / "night.json").read_text())
    state["owner"]["started"] -= 1
    (first.folder / "night.json").write_text(json.dumps(state))
    assert broken_off(history, configs, ["run.seed=1"]) is None, "not with other overrides"
    found = broken_off(history, configs, [])
    assert found is not None
    assert found.night == first.night
    assert broken_off(history, configs, []) is None, "it is taken"


SMALL = [
    "--set",
    "topology={nodes: 1, ranks_per_node: 2, tp: 2, ep: 2}",
    "--set",
    "job.throughput={batch_sizes: [1], warmup: 0, repeats: 4}",
]


def test_a_nightly_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "nightly", str(CONFIGS / "tiny.yaml"), "--history", "history", *SMALL]
    env = os.environ | importable()
    first = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, start_new_session=True)
    until(lambda: list(tmp_path.glob("runs/tiny/*/events/rank-00000.jsonl")))
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    done = subprocess.run(
        [*command, "--json", "--resume"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert "going on with night" in done.stderr
    summary = json.loads(done.stdout)
    assert (done.returncode, summary["configs"][0]["state"]) == (0, "completed")
    assert len(list((tmp_path / "runs" / "tiny").iterdir())) == 1, "nothing was submitted twice"
    assert len(list((tmp_path / "history" / "nights").iterdir())) == 1
    assert [r.sample.run_id for r in History(tmp_path / "history").records()] == [summary["configs"][0]["run_id"]]


def test_two_nightlies_at_once_keep_what_both_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "nightly", str(CONFIGS / "tiny.yaml"), "--history", "history", *SMALL]
    command += ["--set", "backend.impl=reference"]
    both = [subprocess.Popen(command, cwd=tmp_path, env=os.environ | importable()) for _ in range(2)]
    assert [process.wait(timeout=PATIENCE_S) for process in both] == [0, 0]
    history = History(tmp_path / "history")
    found = history.records()
    assert len({record.night for record in found}) == len({record.sample.run_id for record in found}) == 2
    assert len(list((tmp_path / "history" / "nights").glob("*/summary.json"))) == 2
    assert found[-1].sample.run_id in (tmp_path / "history" / "index.html").read_text()


def test_where_no_night_was_broken_off_resume_begins_none(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "nightly", str(CONFIGS / "tiny.yaml"), "--history", "history"]
    done = subprocess.run([*command, "--resume"], cwd=tmp_path, env=os.environ | importable())
    assert (done.returncode, list(tmp_path.iterdir())) == (0, [])


def test_a_history_that_is_full_is_said_and_the_night_can_be_gone_on_with(cluster: Cluster, tmp_path: Path) -> None:
    cluster.at_once = True
    history = tmp_path / "history"
    (history / "index.html").mkdir(parents=True)  # cannot be written over
    options: dict[str, Any] = {"parallel": 1, "resume": False, "junit_file": None, "as_json": True}
    with pytest.raises(InputError, match=r"--history .*index\.html.*; the same command goes on with night"):
        nights.nightly(configs_named(tmp_path, "a"), history, [], **options)
    (state,) = history.glob("nights/*/night.json")
    assert json.loads(state.read_text())["finished"] is False


def test_an_accepted_run_is_said_to_be(tmp_path: Path) -> None:
    one = sample(1)
    History(tmp_path).append(Record("n", "/run", "regressed", "completed", (), one))
    command = [sys.executable, "-m", "launcher", "accept", "--history", str(tmp_path), "--json"]
    env = os.environ | importable()
    done = subprocess.run([*command, one.run_id], env=env, capture_output=True, text=True)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"accepted": one.run_id})
    assert History(tmp_path).baseline("tiny") == [one]
    assert subprocess.run([*command, "nonesuch"], env=env, capture_output=True).returncode == 2


def test_a_nightly_of_nothing_but_wrong_configs_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "nightly", "nope.yaml", "--history", "history"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | importable(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "nope.yaml: no such file" in done.stderr
