"""What is said of a run, from its folder and from what Slurm answers."""

import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.events import EventLog
from launcher import cli, show, slurm
from launcher.checks import login_checks
from launcher.errors import InputError
from launcher.events import read_events
from launcher.history import History
from launcher.plan import Plan
from launcher.runs import all_runs, find_run, last_submission, record_submission
from launcher.slurm import Answer, JobState
from launcher.status import RunStatus, progress, statuses
from tests.launcher.plans import fixed_plan

GLOO = "Connection closed by peer"


class Slurm:
    """What squeue and sacct would say, and how often they were asked."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobState] = {}
        self.problems: tuple[str, ...] = ()
        self.asked: list[list[str]] = []

    def query(self, job_ids: Sequence[str], settled: Sequence[str] = ()) -> Answer:
        self.asked.append(list(job_ids))
        return Answer({j: self.jobs[j] for j in (*job_ids, *settled) if j in self.jobs}, self.problems)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    cluster = Slurm()
    monkeypatch.setattr(slurm, "query", cluster.query)
    return cluster


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return saved(tmp_path, "v4flash-1node")


def saved(folder: Path, name: str, job_id: str = "7") -> Plan:
    plan = fixed_plan(name, [f"run.folder={folder}/runs"])
    plan.save()
    record_submission(plan.run_dir, 0, "slurm", job_id)
    return plan


def status(plan: Plan) -> RunStatus:
    (found,), _ = statuses([plan.run_dir])
    return found


def finish(plan: Plan) -> None:
    for rank in range(4):
        with EventLog(plan.run_dir, rank).stage("done"):
            pass


def test_a_pending_job_has_slurms_reason(plan: Plan, cluster: Slurm) -> None:
    cluster.jobs["7"] = JobState("7", "PENDING", "Resources", "0:00", "1:00:00")
    found = status(plan)
    assert (found.state, found.reason, found.limit) == ("pending", "Resources", "1:00:00")


def test_a_running_job_shows_the_rank_that_is_furthest_behind(plan: Plan, cluster: Slurm) -> None:
    cluster.jobs["7"] = JobState("7", "RUNNING", "", "3:01", "1:00:00")
    for rank, done in enumerate((5, 3, 4, 5)):
        log = EventLog(plan.run_dir, rank)
        log._stage = "weights"
        log.write("progress", done=done, total=43)
    found = status(plan)
    assert (found.state, found.progress, found.elapsed) == ("running", "weights 3/43", "3:01")


def test_a_loading_shows_bytes_rate_and_time_left_of_every_rank(plan: Plan, cluster: Slurm) -> None:
    cluster.jobs["7"] = JobState("7", "RUNNING", "", "3:01", "1:00:00")
    for rank, done in enumerate((30e9, 20e9, 36.8e9)):
        log = EventLog(plan.run_dir, rank)
        log._stage = "weights"
        left = (36.8e9 - done) / 0.5e9
        log.write("progress", done=done, total=36.8e9, unit="bytes", rate=0.5e9, left_s=left)
    found = status(plan)
    assert found.progress == "weights 20 GB of 36.8 GB, 500 MB/s, 34 s left, 3 of 4 ranks"
    assert found.ranks == (
        "weights 30 GB of 36.8 GB, 500 MB/s, 14 s left",
        "weights 20 GB of 36.8 GB, 500 MB/s, 34 s left",
        "weights 36.8 GB of 36.8 GB, 500 MB/s",
        "",
    )
    out = Console(file=io.StringIO(), width=200)
    show.statuses([found], (), out, as_json=False)
    assert isinstance(out.file, io.StringIO)
    assert "rank 1: weights 20 GB of 36.8 GB, 500 MB/s, 34 s left\nrank 2:" in out.file.getvalue()
    assert "rank 3: has not begun" in out.file.getvalue()


def test_a_job_in_neither_squeue_nor_sacct_is_unknown_not_ended(plan: Plan, cluster: Slurm) -> None:
    cluster.problems = ("squeue: Unable to contact slurm controller",)
    found, problems = statuses([plan.run_dir])
    assert (found[0].state, found[0].reason) == ("unknown", "squeue: Unable to contact slurm controller")
    assert not found[0].ended
    assert problems == cluster.problems
    assert not (plan.run_dir / "final.json").exists()


@pytest.mark.parametrize(
    ("slurms", "ours"),
    [
        ("CANCELLED", "cancelled"),
        ("TIMEOUT", "timeout"),
        ("OUT_OF_MEMORY", "out of memory"),
        ("NODE_FAIL", "node failed"),
        ("FAILED", "failed"),
        ("COMPLETED", "failed"),  # the batch script ended well, but not all ranks are done
        ("SOMETHING_NEW", "failed"),
    ],
)
def test_an_end_in_accounting_is_an_end(plan: Plan, cluster: Slurm, slurms: str, ours: str) -> None:
    cluster.jobs["7"] = JobState("7", slurms)
    assert (status(plan).state, status(plan).ended) == (ours, True)


def test_all_ranks_done_is_completed_whatever_accounting_lags_behind(plan: Plan, cluster: Slurm) -> None:
    finish(plan)
    assert status(plan).state == "completed"


def test_the_batch_scripts_last_line_is_a_witness_of_the_end(plan: Plan, cluster: Slurm) -> None:
    log = EventLog(plan.run_dir, 2)
    log.write("failed", error={"type": "OSError", "text": "disk gone", "traceback": ""})
    line = {"time": time.time(), "rank": -1, "stage": "batch", "event": "ended", "attempt": 0, "data": {"exit": 1}}
    (plan.run_dir / "events" / "batch.jsonl").write_text(json.dumps(line) + "\n")
    found = status(plan)
    assert (found.state, found.reason, found.first_failing_rank) == ("failed", "OSError: disk gone", 2)


@pytest.mark.parametrize("slurms", ["FAILED", "COMPLETED", "TIMEOUT"])
def test_ranks_that_were_told_of_the_time_limit_ended_by_it(plan: Plan, cluster: Slurm, slurms: str) -> None:
    for rank in range(4):
        EventLog(plan.run_dir, rank).write("failed", error={"type": "Signal", "text": "time limit is near (SIGUSR2)"})
    cluster.jobs["7"] = JobState("7", slurms)
    assert (status(plan).state, status(plan).first_failing_rank) == ("timeout", None)


def test_a_batch_script_that_could_not_write_has_left_an_exit_code(plan: Plan, cluster: Slurm) -> None:
    cluster.jobs["7"] = JobState("7", "FAILED", exit_code="74:0")
    assert (status(plan).state, status(plan).reason) == ("failed", "exit code 74:0")


def test_a_node_that_slurm_lost_is_written_down_when_it_is_seen(
    plan: Plan, cluster: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = slurm.LostNode("nid2", "down*", "Not responding", "2026-11-23T05:00:00")
    drained = slurm.LostNode("nid1", "draining", "bad fan", "2026-11-23T04:00:00")
    monkeypatch.setattr(slurm, "lost_nodes", lambda: {"nid1": drained, "nid2": node, "nid9": node})
    for rank in range(4):
        EventLog(plan.run_dir, rank).write("started", pid=1, host=f"nid{1 + rank // 2}", job_id=7, world=4)
    error = {"type": "RuntimeError", "text": "Timed out waiting 60000ms for recv", "traceback": ""}
    EventLog(plan.run_dir, 0).write("failed", error=error)
    cluster.jobs["7"] = JobState("7", "NODE_FAIL")
    assert (status(plan).state, status(plan).first_failing_rank) == ("node failed", 2)
    monkeypatch.setattr(slurm, "lost_nodes", dict)  # it is up again, and the run's folder still knows
    assert status(plan).reason == "NodeFailed: node nid2 is down: Not responding; ranks 2, 3 ran on it"
    assert (plan.run_dir / "events" / "launcher.jsonl").read_text().count("node down") == 1


def test_an_end_is_kept_since_accounting_forgets_but_a_resume_opens_it_again(plan: Plan, cluster: Slurm) -> None:
    cluster.jobs["7"] = JobState("7", "CANCELLED", "by 1000")
    assert status(plan).state == "cancelled"
    cluster.jobs.clear()
    assert (status(plan).state, status(plan).reason) == ("cancelled", "by 1000")
    record_submission(plan.run_dir, 1, "slurm", "8")
    cluster.jobs["8"] = JobState("8", "PENDING", "Priority")
    assert (status(plan).state, status(plan).job_id) == ("pending", "8")


def test_a_kept_end_is_none_once_slurm_has_the_job_again(plan: Plan, cluster: Slurm) -> None:
    EventLog(plan.run_dir, 2).write("failed", error={"type": "OSError", "text": "disk gone", "traceback": ""})
    cluster.jobs["7"] = JobState("7", "FAILED")
    assert (status(plan).state, status(plan).first_failing_rank) == ("failed", 2)
    cluster.jobs["7"] = JobState("7", "REQUEUE_HOLD", "launch failed requeued held")
    found = status(plan)
    assert (found.state, found.reason) == ("pending", "launch failed requeued held")
    assert (found.progress, found.first_failing_rank) == ("", None), "that was the attempt before"


def test_ranks_that_were_all_told_to_stop_are_the_end_if_slurm_answers_without_the_job(
    plan: Plan, cluster: Slurm
) -> None:
    for rank in range(4):
        EventLog(plan.run_dir, rank).write("failed", error={"type": "Signal", "text": "cancelled (SIGTERM)"})
    cluster.problems = ("squeue: no answer",)
    assert status(plan).state == "unknown"
    cluster.problems = ()
    assert (status(plan).state, status(plan).first_failing_rank) == ("failed", None)


def test_a_job_whose_id_was_lost_is_known_by_its_ranks(tmp_path: Path, cluster: Slurm) -> None:
    plan = fixed_plan("v4flash-1node", [f"run.folder={tmp_path}/runs"])
    plan.save()
    record_submission(plan.run_dir, 0, "slurm", "")  # written before sbatch, and then the launcher died
    assert (status(plan).state, status(plan).job_id) == ("unknown", "")
    EventLog(plan.run_dir, 0).write("started", pid=1, host="nid1", job_id=7, world=4)
    cluster.jobs["7"] = JobState("7", "RUNNING")
    assert (status(plan).state, status(plan).job_id) == ("running", "7")


def test_one_damaged_folder_does_not_hide_the_other_runs(tmp_path: Path, cluster: Slurm) -> None:
    good, bad = saved(tmp_path, "v4flash-1node", "1"), saved(tmp_path, "v4pro-2node", "2")
    (bad.run_dir / "submissions.json").write_text("{")
    (good.run_dir / "final.json").mkdir()
    finish(good)
    found, _ = statuses([good.run_dir, bad.run_dir])
    assert [s.state for s in found] == ["completed", "unknown"]
    assert "submissions.json" in found[1].reason


@pytest.mark.parametrize("record", ["{", "[5]", '{"attempt": 0}', '[{"attempt": 0}]'])
def test_a_damaged_record_of_submissions_is_called_that(record: str, tmp_path: Path) -> None:
    run_dir = saved(tmp_path, "v4flash-1node").run_dir
    (run_dir / "submissions.json").write_text(record)
    with pytest.raises(InputError, match=r"submissions\.json: damaged: not a list of submissions"):
        last_submission(run_dir)


def test_what_is_no_file_among_the_events_is_passed_over(tmp_path: Path) -> None:
    plan = saved(tmp_path, "v4flash-1node")
    EventLog(plan.run_dir, 0).write("started", pid=1)
    (plan.run_dir / "events" / "rank-00001.jsonl").symlink_to("/dev/zero")
    os.mkfifo(plan.run_dir / "events" / "rank-00002.jsonl")
    assert [event.rank for event in read_events(plan.run_dir)] == [0]


def test_a_node_failure_is_not_kept_since_the_job_may_be_requeued(plan: Plan, cluster: Slurm) -> None:
    cluster.jobs["7"] = JobState("7", "NODE_FAIL")
    assert status(plan).state == "node failed"
    cluster.jobs["7"] = JobState("7", "PENDING", "BeginTime")
    assert status(plan).state == "pending"


def test_slurm_is_asked_once_for_all_runs_and_not_about_those_whose_end_is_known(
    tmp_path: Path, cluster: Slurm
) -> None:
    plans = [saved(tmp_path, name, str(i)) for i, name in enumerate(("v4flash-1node", "v4pro-2node", "v4pro-4node"))]
    finish(plans[0])
    runs = [plan.run_dir for plan in plans]
    statuses(runs)
    statuses(runs)
    assert cluster.asked == [["0", "1", "2"], ["1", "2"]]


def test_a_run_is_found_by_folder_id_or_name(tmp_path: Path) -> None:
    plan = saved(tmp_path, "v4flash-1node")
    folder = tmp_path / "runs"
    for text in (str(plan.run_dir), plan.run_id, "v4flash-1node"):
        assert find_run(text, folder) == plan.run_dir
    assert all_runs(folder) == [plan.run_dir]
    with pytest.raises(InputError, match=r"v4flash: no such run: .* \(v4flash-1node\)"):
        find_run("v4flash", folder)
    with pytest.raises(InputError, match="which holds no runs"):
        find_run("x", tmp_path / "nothing")


def test_a_local_run_is_running_while_its_controller_lives_and_not_by_a_reused_number(tmp_path: Path) -> None:
    plan = fixed_plan("tiny", [f"run.folder={tmp_path}/runs"])
    plan.save()
    record_submission(plan.run_dir, 0, "local", "")
    assert (status(plan).state, status(plan).job_id) == ("unknown", "")
    mine = record_submission(plan.run_dir, 0, "local", str(os.getpid()))
    assert status(plan).state == "running"
    reused = mine.__class__(**{**vars(mine), "pid_started": mine.pid_started - 1})
    (plan.run_dir / "submissions.json").write_text(json.dumps([vars(reused)]))
    assert (status(plan).state, status(plan).reason) == ("failed", "its processes are gone")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for stand-ins of squeue and sacct, which is all of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_squeue_knows_what_goes_on_and_sacct_the_rest(commands: Path) -> None:
    stand_in(commands, "squeue", "echo '5|RUNNING|None|1:00|2:00|nid[1-2]'; echo '6|PENDING|QOSMaxJobs|0:00|2:00|'")
    stand_in(commands, "sacct", "echo '7|CANCELLED by 1000|None|0:09|2:00|nid1|0:15'")
    answer = slurm.query(["5", "6", "7", "8"])
    assert answer.problems == ()
    assert {j: s.state for j, s in answer.jobs.items()} == {"5": "RUNNING", "6": "PENDING", "7": "CANCELLED"}
    assert (answer.jobs["6"].reason, answer.jobs["5"].nodes) == ("QOSMaxJobs", "nid[1-2]")
    assert (answer.jobs["7"].reason, answer.jobs["7"].exit_code) == ("by 1000", "0:15")


def test_lines_that_are_no_jobs_are_passed_over(commands: Path) -> None:
    stand_in(commands, "squeue", "echo 'a warning'; echo '5|RUNNING|None|1:00|2:00|n'; echo '6||||||||'")
    stand_in(commands, "sacct", "echo 'slurmdbd is slow today'")
    assert list(slurm.query(["5", "6"]).jobs) == ["5"]


def test_commands_that_fail_or_are_not_there_are_problems_not_states(commands: Path) -> None:
    stand_in(commands, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    answer = slurm.query(["5"])
    assert answer.jobs == {}
    assert answer.problems == (
        "squeue: slurm_load_jobs error: Unable to contact slurm controller",
        "sacct: not found on this machine",
    )


def test_of_a_service_it_is_told_what_it_does(tmp_path: Path) -> None:
    first, second = EventLog(tmp_path, 0), EventLog(tmp_path, 1)
    with first.stage("loading"), second.stage("loading"):
        for log in (first, second):
            log.write("progress", done=500, total=1000, unit="bytes", rate=100.0, left_s=5.0)
        assert progress(read_events(tmp_path), 2) == "loading 500 B of 1 kB, 100 B/s, 5 s left"
    with first.stage("serving"), second.stage("serving"):
        assert progress(read_events(tmp_path), 2) == "serving"
        first.write("progress", done=7, total=10, running=2, waiting=1)
        assert progress(read_events(tmp_path), 2) == "serving: 2 running, 1 waiting, 7 answered"


@pytest.fixture
def denied(monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder at which this user may not look; the superuser may look at any."""
    looked_at = os.stat

    def look(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path).startswith("/secret/"):
            raise PermissionError(13, "Permission denied", str(path))
        return looked_at(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", look)
    return "/secret/folder"


def test_a_run_at_which_one_may_not_look_is_said_to_be_that(denied: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^/secret/folder: Permission denied$"):
        find_run(denied, tmp_path)
    with pytest.raises(InputError, match=r"^--history /secret/folder: Permission denied$"):
        History(Path(denied))
    with pytest.raises(InputError, match="no such run"):
        find_run("x" * 5000, tmp_path)


def test_doctor_says_what_it_may_not_look_at(denied: str) -> None:
    plan = fixed_plan("tiny", [f"run.folder={denied}"])
    (check,) = [check for check in login_checks(plan) if check.name == "run.folder"]
    assert (check.state, check.text) == ("failed", f"{denied}: [Errno 13] Permission denied")


def test_a_file_that_may_not_be_read_is_a_wrong_input_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        raise PermissionError(13, "Permission denied", "/secret/file")

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, capsys.readouterr().err) == (2, "/secret/file: Permission denied\n")
