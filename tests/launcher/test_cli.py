"""The command line: exit codes, and what a wrong input leaves behind."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import report
from launcher.plan import Plan
from launcher.runs import record_submission
from tests.checkout import ROOT, importable
from tests.holes import model_of, write_holes
from tests.launcher.plans import fixed_plan
from tests.launcher.probes import write_probe
from tests.waiting import PATIENCE_S

PARITY = {"relative_error": 3e-3, "routing": "hash"}


def launcher(*args: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = os.environ | importable() | {"COLUMNS": "100"} | environment
    return subprocess.run(
        [sys.executable, "-m", "launcher", *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_the_command_line_imports_no_torch() -> None:
    code = (
        "import sys, launcher.cli; print([m for m in ('torch', 'triton', 'numpy', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_dry_run_shows_the_script_and_leaves_nothing(tmp_path: Path) -> None:
    done = launcher("submit", str(ROOT / "configs/v4pro-2node.yaml"), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2" in done.stdout
    assert "--kill-on-bad-exit=1" in done.stdout
    assert "would not be submitted: model.checkpoint" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_also_json(tmp_path: Path) -> None:
    done = launcher("submit", str(ROOT / "configs/v4pro-2node.yaml"), "--dry-run", "--json", cwd=tmp_path)
    shown = json.loads(done.stdout)
    assert shown["script"].startswith("#!/bin/bash")
    assert [row["experts"] for row in shown["topology"]][:2] == ["0–47", "48–95"]
    assert shown["rank_environment"][5] == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["configs/nope.yaml"], "configs/nope.yaml: no such file"),
        (["configs/tiny.yaml", "--set", "topology.ep=3"], "--set topology.ep: 3 does not divide"),
        (["configs/tiny.yaml", "--set", "topolgy.ep=3"], "unknown key; did you mean 'topology'?"),
        (["configs/v4pro-2node.yaml"], "SCRATCH is not set here"),
        (["configs/tiny.yaml", "--set", "run.folder=$NOPE/runs"], "run.folder: $NOPE/runs: NOPE is not set here"),
        (["configs/tiny.yaml", "--set", "run.folder=configs/tiny.yaml"], "run.folder: configs/tiny.yaml: cannot be"),
        (
            ["configs/v4pro-2node.yaml", "--set", "model.checkpoint=/nowhere"],
            "model.checkpoint: /nowhere: no file /nowhere/config.json",
        ),
    ],
)
def test_a_wrong_input_exits_with_2_one_clear_error_and_nothing_submitted(
    args: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = launcher("submit", *args, cwd=tmp_path, SCRATCH="${SCRATCH}")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["configs"]


def test_a_machine_without_slurm_says_so(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    write_holes(checkpoint, model_of("v4pro-2node"), shards=64)
    config = str(ROOT / "configs/v4pro-2node.yaml")
    done = launcher("submit", config, "--set", f"model.checkpoint={checkpoint}", cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 2
    assert "no srun on PATH here; submit on its login node, or use --dry-run" in done.stderr


def test_a_refusal_of_sbatch_is_shown_and_exits_with_2(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    write_holes(checkpoint, model_of("v4pro-2node"), shards=64)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "srun"):
        (commands / name).write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
        (commands / name).chmod(0o755)
    config = str(ROOT / "configs/v4pro-2node.yaml")
    path = f"{commands}:{os.environ['PATH']}"
    done = launcher("submit", config, "--set", f"model.checkpoint={checkpoint}", cwd=tmp_path, PATH=path)
    assert done.returncode == 2
    assert "sbatch refused the request" in done.stderr
    assert "Invalid account" in done.stderr
    assert not list((tmp_path / "runs").glob("*/*")), "a refused request leaves no run behind"


def timed_out(tmp_path: Path, *overrides: str) -> tuple[Plan, str]:
    """A run that Slurm says has timed out, and a PATH with a Slurm that takes nothing more."""
    plan = fixed_plan("lab-2node", [f"run.folder={tmp_path}/runs", *overrides])
    plan.save()
    record_submission(plan.run_dir, 0, "slurm", "7")
    commands = tmp_path / "bin"
    commands.mkdir()
    answers = {
        "squeue": "true",
        "sacct": "echo '7|TIMEOUT|None|1:00:00|1:00:00|nid1|0:0'",
        "srun": "true",
        "sbatch": "echo 'sbatch: error: Invalid account' >&2; exit 1",
    }
    for name, text in answers.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    return plan, f"{commands}:{os.environ['PATH']}"


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    plan, path = timed_out(tmp_path)
    before = (plan.run_dir / "submissions.json").read_text()
    for _ in range(2):  # the second is refused by sbatch as the first was, not by the launcher
        done = launcher("resume", str(plan.run_dir), cwd=tmp_path, PATH=path)
        assert done.returncode == 2
        assert "Invalid account" in done.stderr
    assert (plan.run_dir / "submissions.json").read_text() == before
    assert json.loads(launcher("status", "--json", cwd=tmp_path, PATH=path).stdout)["runs"][0]["state"] == "timeout"


def test_a_resume_refuses_what_submit_would_refuse(tmp_path: Path) -> None:
    plan, path = timed_out(tmp_path, "cluster.device_memory_gb=0.001")
    done = launcher("resume", str(plan.run_dir), cwd=tmp_path, PATH=path)
    assert (done.returncode, f"{plan.run_dir}: memory: does not fit: " in done.stderr) == (2, True), done.stderr
    assert "--force submits it" in done.stderr
    forced = launcher("resume", str(plan.run_dir), "--force", cwd=tmp_path, PATH=path)
    assert "Invalid account" in forced.stderr, "sbatch is asked"


def test_a_resume_of_a_run_whose_checkpoint_is_gone_is_refused(tmp_path: Path) -> None:
    plan, path = timed_out(tmp_path, "model=deepseek-v4-flash", f"model.checkpoint={tmp_path}/gone")
    done = launcher("resume", str(plan.run_dir), "--force", cwd=tmp_path, PATH=path)
    assert done.returncode == 2
    assert f"model.checkpoint: {tmp_path}/gone: no file {tmp_path}/gone/config.json" in done.stderr


def test_a_report_of_what_is_no_run_exits_with_2(tmp_path: Path) -> None:
    done = launcher("report", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "no such run" in done.stderr


def reports(folder: Path, *throughputs: float, **change: object) -> list[str]:
    """Report files of runs that differ in their throughput, and the last one in `change` too."""
    files = []
    for i, throughput in enumerate(throughputs):
        plan = fixed_plan("tiny", [f"run.folder={folder}/runs"])
        plan = replace(plan, run_id=f"2026010{i + 1}-000000-abcd", run_dir=plan.run_dir.parent / f"run-{i}")
        plan.save()
        write_probe(plan, slower=1000 / throughput)
        value = report.build(plan.run_dir)
        if i == len(throughputs) - 1:
            value |= change
        files.append(str(folder / f"{i}.json"))
        Path(files[-1]).write_text(json.dumps(value))
    return files


@pytest.mark.parametrize(
    ("last", "args", "code", "words"),
    [
        (1002, [], 0, "passed"),
        (900, [], 1, "total_token_throughput at batch 16: +10."),
        (900, ["--set", "compare.throughput=20", "--set", "compare.latency=20"], 0, "passed"),
        (1002, ["--set", "compare.min_runs=9"], 2, "3 valid runs to compare with, 9 are needed"),
        (1002, ["--set", "compare.speed=1"], 2, "compare.speed: 1 is wrong"),
        (1002, ["--set", "run.seed=1"], 2, "only compare.… can be overridden"),
        (1002, ["nonesuch"], 2, "nonesuch: no such run"),
    ],
)
def test_compare_says_by_its_exit_code_how_it_went(
    tmp_path: Path, last: float, args: list[str], code: int, words: str
) -> None:
    done = launcher("compare", *reports(tmp_path, 1000, 1003, 998, last), *args, cwd=tmp_path, COLUMNS="200")
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_failed_is_no_regression_but_failed(tmp_path: Path) -> None:
    files = reports(tmp_path, 1000, 1003, 998, 1000, parity={"tolerance": 1e-4, "layers": {"0": PARITY}})
    done = launcher("compare", *files, "--json", "--junit", "j.xml", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"]) == (1, "failed")
    assert found["gates"][0]["reasons"] == ["parity of layer 0: 0.003 is not within the tolerance 0.0001"]
    assert '<failure message="parity of layer 0' in (tmp_path / "j.xml").read_text()


def test_a_run_alone_is_compared_with_the_earlier_ones_of_its_name(tmp_path: Path) -> None:
    reports(tmp_path, 1000, 1003, 998, 1001)
    done = launcher("compare", "tiny", "--json", cwd=tmp_path)
    # Their ranks are done, but nobody has submitted them: such runs are not completed.
    found = json.loads(done.stdout)
    assert [why for _, why in found["excluded"]] == ["not valid: the run is unknown"] * 3
    for i in range(4):
        record_submission(tmp_path / "runs" / "tiny" / f"run-{i}", 0, "local", "")
    done = launcher("compare", "tiny", "--json", cwd=tmp_path)
    assert (done.returncode, len(json.loads(done.stdout)["baseline"])) == (0, 3)
