"""The command line: exit codes, and what a wrong input leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.runs import record_submission
from tests.checkout import ROOT, importable
from tests.holes import model_of, write_holes
from tests.launcher.plans import fixed_plan


def launcher(*args: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = os.environ | importable() | {"COLUMNS": "100"} | environment
    return subprocess.run(
        [sys.executable, "-m", "launcher", *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
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


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    plan = fixed_plan("v4flash-1node", [f"run.folder={tmp_path}/runs"])
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
    path = f"{commands}:{os.environ['PATH']}"
    before = (plan.run_dir / "submissions.json").read_text()
    for _ in range(2):  # the second is refused by sbatch as the first was, not by the launcher
        done = launcher("resume", str(plan.run_dir), cwd=tmp_path, PATH=path)
        assert done.returncode == 2
        assert "Invalid account" in done.stderr
    assert (plan.run_dir / "submissions.json").read_text() == before
    assert json.loads(launcher("status", "--json", cwd=tmp_path, PATH=path).stdout)["runs"][0]["state"] == "timeout"


def test_a_report_of_what_is_no_run_exits_with_2(tmp_path: Path) -> None:
    done = launcher("report", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "no such run" in done.stderr
