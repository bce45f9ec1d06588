"""Runs on a real Slurm: what is submitted runs, and what is said about it is true."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launcher.lab import control
from launcher.plan import Plan
from launcher.render import sbatch_script
from launcher.slurm import ACTIVE
from tests.checkout import importable
from tests.slurm.conftest import CONFIG, Lab
from tests.waiting import PATIENCE_S, until

REPEATS = 4
LONG = f"job.throughput={{batch_sizes: [1, 256], warmup: 0, repeats: {REPEATS}}}"
"""Its first batch size is soon measured, and its second takes longer than any question about it."""


def run_of(cwd: Path, name: str = "lab-2node") -> Path:
    (folder,) = (cwd / "runs" / name).iterdir()
    return folder


def status(lab: Lab, cwd: Path, *args: str) -> list[dict[str, Any]]:
    done = lab.launcher("status", *args, "--json", cwd=cwd)
    found: list[dict[str, Any]] = json.loads(done.stdout)["runs"]
    return found


def measuring(lab: Lab, cwd: Path, name: str) -> bool:
    (found,) = status(lab, cwd, name)
    assert found["state"] in ("pending", "running"), found
    return str(found["progress"]).startswith("throughput 1/")


def on_nodes(run: Path) -> int:
    """On how many nodes the run's scratch folder is, looked up past Slurm: in what the nodes' first processes see."""
    found = set[str]()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            node = b"launcher.lab.node" in (folder / "cmdline").read_bytes()
            if node and (folder / "root" / "var" / "tmp" / f"moe-ep-{run.name}").is_dir():
                found.add(str((folder / "ns" / "mnt").readlink()))
    return len(found)


def shorten(run: Path) -> None:
    """What a run has not measured yet may be little."""
    request = json.loads((run / "request.json").read_text())
    (run / "request.json").write_text(json.dumps(request | {"batch_sizes": [1, 2], "repeats": 1}))


def process_of_rank(lab: Lab, job_id: str, rank: int) -> int:
    """The process of a rank as this machine sees it, whatever namespace it is in."""
    conf = f"SLURM_CONF={lab.spec.folder}/etc/slurm.conf"
    wanted = {f"SLURM_JOB_ID={job_id}".encode(), f"SLURM_PROCID={rank}".encode(), conf.encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if b"submitit" in command and wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.nightly  # every day test_faults kills one
def test_a_rank_killed_on_a_node_is_the_one_that_is_named(lab: Lab, tmp_path: Path) -> None:
    assert lab.launcher("submit", str(CONFIG), "--set", LONG, cwd=tmp_path).returncode == 0
    until(lambda: measuring(lab, tmp_path, "lab-2node"))
    job_id = status(lab, tmp_path)[0]["job_id"]
    killed = time.monotonic()
    os.kill(process_of_rank(lab, job_id, 3), signal.SIGKILL)
    until(lambda: status(lab, tmp_path)[0]["state"] == "failed")
    assert time.monotonic() - killed < 60
    (found,) = status(lab, tmp_path)
    assert (found["first_failing_rank"], found["reason"].split(":")[0]) == (3, "Vanished")
    assert lab.launcher("logs", "lab-2node", cwd=tmp_path).stdout, "of that rank"


def test_a_container_is_asked_for_on_the_step_and_reaches_every_rank(lab: Lab, tmp_path: Path) -> None:
    container = f"cluster.container={{environment: my-edf, python: {sys.executable}}}"
    short = "job.throughput={batch_sizes: [1], warmup: 0, repeats: 1}"
    done = lab.launcher("submit", str(CONFIG), "--set", container, "--set", short, "--follow", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((run_of(tmp_path) / "report.json").read_text())
    assert [rank["environment"]["env"]["LAB_ENVIRONMENT"] for rank in report["ranks"]] == ["my-edf"] * 4
    assert "rank 0: throughput 1/1" in done.stderr


def test_what_another_job_left_in_the_shell_does_not_reach_the_run(lab: Lab, tmp_path: Path) -> None:
    short = "job.throughput={batch_sizes: [1], warmup: 0, repeats: 1}"
    command = ["env", "SLURM_MEM_PER_CPU=100", "SBATCH_PARTITION=nonesuch", "SLURM_DISTRIBUTION=cyclic", sys.executable]
    command += ["-m", "launcher", "submit", str(CONFIG), "--wait", "--set", short]
    done = lab.run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def accounted(lab: Lab, job_id: str) -> str:
    return lab.ask("sacct", "-n", "-P", "-X", "-o", "State", "-j", job_id)


def test_a_run_over_two_nodes_ends_with_a_report(lab: Lab, tmp_path: Path) -> None:
    done = lab.launcher("submit", str(CONFIG), "--wait", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = run_of(tmp_path)
    report = json.loads((run / "report.json").read_text())
    assert report["run"]["state"] == "completed"
    assert [rank["host"] for rank in report["ranks"]] == ["nid001001"] * 2 + ["nid001002"] * 2
    assert report["ranks"][3]["environment"]["env"].get("ROCR_VISIBLE_DEVICES") is None, "unset for the ranks"
    assert report["selector"]["by_rank"] == {str(r): "triton_kernel" for r in range(4)}
    job_id = json.loads((run / "submissions.json").read_text())[0]["job_id"]
    until(lambda: accounted(lab, job_id) == "COMPLETED")
    # The batch script bears witness of the end, and has tidied up.
    (line,) = (run / "events" / "batch.jsonl").read_text().splitlines()
    assert json.loads(line)["data"] == {"exit": 0, "job_id": job_id}
    assert on_nodes(run) == 0
    # What sbatch got is what the dry run shows for this run.
    submitted = (run / "submitit" / f"{job_id}_submission.sh").read_text()
    assert submitted == sbatch_script(Plan.load(run, attempt=0))
    # Another shell, without Slurm: the folder is the truth.
    env = {"PATH": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-m", "launcher", "status", str(run), "--json"],
        env=env | importable(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(said.stdout)["runs"][0]["state"] == "completed"


def test_a_job_is_watched_cancelled_and_resumed(lab: Lab, tmp_path: Path) -> None:
    first = lab.launcher("submit", str(CONFIG), "--set", LONG, "--set", "run.name=first", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "is queued on lab" in first.stdout
    both = ["--set", "run.name=second", "--set", "cluster.mem_mb=500000"]  # no room beside the first
    assert lab.launcher("submit", str(CONFIG), *both, cwd=tmp_path).returncode == 0
    until(lambda: measuring(lab, tmp_path, "first"))
    found = {line["name"]: line for line in status(lab, tmp_path)}
    assert found["first"]["state"] == "running"
    assert (found["first"]["limit"], found["first"]["first_failing_rank"]) == ("10:00", None)
    assert found["second"]["state"] == "pending"
    assert on_nodes(run_of(tmp_path, "first")) == 2
    assert found["second"]["reason"] in ("Resources", "Priority")
    log = lab.launcher("logs", "first", "--rank", "3", cwd=tmp_path)
    assert "Starting with JobEnvironment" in log.stdout
    assert lab.launcher("logs", "second", cwd=tmp_path).returncode == 2, "it has none yet"

    assert lab.launcher("cancel", "second", cwd=tmp_path).returncode == 0
    assert lab.launcher("cancel", "first", cwd=tmp_path).returncode == 0
    until(lambda: {line["state"] for line in status(lab, tmp_path)} == {"cancelled"})
    assert on_nodes(run_of(tmp_path, "first")) == 0, "the ranks tidied up on their way out"
    (line,) = (run_of(tmp_path, "first") / "events" / "batch.jsonl").read_text().splitlines()
    assert json.loads(line)["event"] == "ended", "the batch script lived to see it"
    again = lab.launcher("cancel", "first", cwd=tmp_path)
    assert (again.returncode, "has ended already: cancelled" in again.stderr) == (2, True)
    partial = lab.launcher("report", "first", "--json", cwd=tmp_path)
    assert partial.returncode == 1
    report = json.loads(partial.stdout)
    assert (report["run"]["state"], report["parity"] is not None) == ("cancelled", True)
    kept = report["throughput"]

    run = run_of(tmp_path, "first")
    shorten(run)
    resumed = lab.launcher("resume", "first", "--wait", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    report = json.loads((run / "report.json").read_text())
    assert (report["run"]["state"], report["run"]["attempt"]) == ("completed", 1)
    assert kept
    assert report["throughput"][: len(kept)] == kept, "what was measured before is kept"
    assert {line["completed"] for line in report["throughput"][len(kept) :]} == {1}
    refused = lab.launcher("resume", "first", cwd=tmp_path)
    assert (refused.returncode, "only a run that broke off is resumed" in refused.stderr) == (2, True)


def test_a_rank_that_fails_ends_the_step_and_is_named(lab: Lab, tmp_path: Path) -> None:
    # All four ranks in a step on one of the two nodes: the probe must not take that for two.
    one = "cluster.srun_args=[--cpu-bind=none, --kill-on-bad-exit=1, --wait=60, --nodes=1, --ntasks=4, --overcommit]"
    done = lab.launcher("submit", str(CONFIG), "--set", one, "--wait", cwd=tmp_path)
    assert done.returncode == 1
    report = json.loads((run_of(tmp_path) / "report.json").read_text())
    assert report["failure"]["stage"] == "env"
    assert "4 ranks run on 1 hosts" in report["failure"]["error"]
    (found,) = status(lab, tmp_path)
    assert found["state"] == "failed"
    assert found["first_failing_rank"] is not None


def test_a_dead_node_requeues_the_job_which_goes_on_when_there_are_nodes_again(lab: Lab, tmp_path: Path) -> None:
    assert lab.launcher("submit", str(CONFIG), "--set", LONG, cwd=tmp_path).returncode == 0
    until(lambda: measuring(lab, tmp_path, "lab-2node"))
    run = run_of(tmp_path)
    shorten(run)
    control.node(lab.spec.root, "kill", "nid001002")
    try:
        until(lambda: status(lab, tmp_path)[0]["state"] == "pending")
    finally:
        control.node(lab.spec.root, "start", "nid001002")
    until(lambda: status(lab, tmp_path)[0]["state"] == "completed")
    assert lab.launcher("report", "lab-2node", cwd=tmp_path).returncode == 0
    report = json.loads((run / "report.json").read_text())
    assert report["run"]["attempt"] == 1
    assert [line["completed"] for line in report["throughput"]] == [REPEATS, 1], (
        "measured before the node died, and after"
    )


def test_what_slurm_refuses_is_said_and_nothing_is_left(lab: Lab, tmp_path: Path) -> None:
    done = lab.launcher(
        "submit", str(CONFIG), "--set", "topology={nodes: 3, ranks_per_node: 2, tp: 6, ep: 6}", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "sbatch refused the request" in done.stderr
    assert not list((tmp_path / "runs").glob("*/*"))


def test_a_following_launcher_that_is_told_to_stop_leaves_the_job_alone(lab: Lab, tmp_path: Path) -> None:
    hears = ["env", "--default-signal=INT"]  # a shell's job in the background ignores it, and so do its children
    command = [*hears, sys.executable, "-m", "launcher", "submit", str(CONFIG), "--follow", "--set", LONG]
    follower = subprocess.Popen(
        control.inside(lab.spec, command),
        cwd=tmp_path,
        env=os.environ | importable(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: list(tmp_path.glob("runs/*/*/events/rank-00000.jsonl")))
    os.killpg(follower.pid, signal.SIGINT)
    _, err = follower.communicate(timeout=PATIENCE_S)
    assert "the job goes on" in err
    (found,) = status(lab, tmp_path)
    assert found["state"] == "running"
    job_id = found["job_id"]
    assert lab.launcher("cancel", "lab-2node", cwd=tmp_path).returncode == 0
    until(lambda: accounted(lab, job_id).split()[0] not in ACTIVE)


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "resume", "report"])
def test_a_run_that_does_not_exist_is_an_input_error(lab: Lab, tmp_path: Path, command: str) -> None:
    done = lab.launcher(command, "nonesuch", cwd=tmp_path)
    assert done.returncode == 2
    assert "nonesuch: no such run" in done.stderr
