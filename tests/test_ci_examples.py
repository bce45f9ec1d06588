"""The examples of docs/ci do what they say, as far as a machine without their services can show it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checkout import CONFIGS, ROOT, importable
from tests.waiting import PATIENCE_S

CI = ROOT / "docs" / "ci"

SMALL = """
run: {{name: small}}
cluster: {clusters}/local.yaml
model: {models}/tiny.yaml
topology: {{nodes: 1, ranks_per_node: 2, tp: 2, ep: 2}}
backend: {{impl: reference}}
job: {{layers: [2], throughput: {{batch_sizes: [1], warmup: 0, repeats: 2}}}}
limits: {{time_min: 5}}
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with one small config, a virtual environment's python and the history's place."""
    (tmp_path / "small.yaml").write_text(SMALL.format(clusters=CONFIGS / "clusters", models=CONFIGS / "models"))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "summary.md").touch()
    return tmp_path


def shell(script: str, cwd: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run it as a runner does; bash is also the shell that the crontab asks for."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(cwd), "SCRATCH": str(cwd), **importable(), **env}
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def read(name: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((CI / name).read_text())
    return value


def test_the_gitlab_jobs_run_a_night_and_a_gate(checkout: Path) -> None:
    jobs = read("gitlab-ci.yml")
    variables = {"CONFIGS": "small.yaml", "GATE": "small.yaml", "HISTORY": str(checkout / "history")}
    assert set(variables) == set(jobs["variables"])
    night = shell("\n".join(jobs["nightly"]["script"]), checkout, **variables)
    assert night.returncode == 0, night.stderr
    assert json.loads((checkout / "summary.json").read_text())["configs"][0]["state"] == "completed"
    (checkout / "junit.xml").unlink()
    gate = shell("\n".join(jobs["gate"]["script"]), checkout, **variables)
    assert gate.returncode == jobs["gate"]["allow_failure"]["exit_codes"], "no verdict yet: " + gate.stderr
    for job in ("nightly", "gate"):
        for path in jobs[job]["artifacts"]["paths"]:
            assert (checkout / path).stat().st_size


def test_the_gitlab_gate_does_not_take_wrong_input_for_no_verdict(checkout: Path) -> None:
    script = read("gitlab-ci.yml")["gate"]["script"]
    variables = {"GATE": "nonesuch.yaml", "HISTORY": str(checkout / "history")}
    assert shell("\n".join(script), checkout, **variables).returncode == 1
    (checkout / "report.json").write_text("{}")
    assert shell(script[-1], checkout, **variables).returncode == 1


def test_the_github_steps_run_a_night_and_show_its_verdict(checkout: Path) -> None:
    (job,) = read("github-actions.yml")["jobs"].values()
    steps = {step["name"]: step["run"] for step in job["steps"] if "run" in step and step["name"] != "Install"}
    for name, script in steps.items():
        done = shell(script, checkout, CONFIGS="small.yaml", GITHUB_STEP_SUMMARY=str(checkout / "summary.md"))
        assert done.returncode == 0, f"{name}: {done.stderr}"
    assert (checkout / "summary.md").read_text().startswith("- small: no verdict 0 valid runs to compare with")
    uploads = job["steps"][-1]["with"]["path"].split()
    assert all((checkout / path).stat().st_size for path in uploads)


def test_the_crontab_line_runs_a_night_in_crons_poor_environment(checkout: Path) -> None:
    (checkout / "moe-ep").symlink_to(checkout)
    lines = [line for line in (CI / "crontab").read_text().splitlines() if re.match(r"[\d@]", line)]
    commands = [re.sub(r"^(@\w+|(\S+\s+){4}\S+)\s+", "", line) for line in lines]
    assert [command.startswith("cd ~/moe-ep && ") for command in commands] == [True, True]
    night, again = (re.sub(r"configs/\S+ configs/\S+", "small.yaml", command) for command in commands)
    assert "%" not in night, "cron takes it for the end of the line"
    done = shell(night, checkout)
    assert done.returncode == 0, (checkout / "moe-ep-history.log").read_text()
    assert (checkout / "moe-ep-history" / "index.html").is_file()
    assert shell(again, checkout).returncode == 0
    assert len(list((checkout / "moe-ep-history" / "nights").iterdir())) == 1, "no night was broken off"
