"""The dry run: the same text as what is submitted, for every config in the repository."""

import io
import os
import shlex
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launcher import show
from launcher.plan import Plan
from launcher.render import job_folder, python_command, sbatch_script, slurm_parameters
from launcher.submit import submit
from tests.checkout import CONFIGS
from tests.launcher.plans import fixed_plan

GOLDEN = Path(__file__).parent / "golden"


def dry_run_text(plan: Plan) -> str:
    out = Console(file=io.StringIO(), width=100, color_system=None)
    show.dry_run(plan, [], out, as_json=False)
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines()) + "\n"


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.yaml")))
def test_the_dry_run_is_the_golden_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    text = dry_run_text(fixed_plan(name, ["model.synthetic.folder=/scratch/user/made"] if name == "tiny" else []))
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "UPDATE_GOLDEN=1 writes the golden files anew; read the difference"


def test_no_golden_file_is_left_over() -> None:
    assert {p.stem for p in GOLDEN.glob("*.txt")} == {p.stem for p in CONFIGS.glob("*.yaml")}


NASTY = "a b'c\"d$(touch x);e"


def test_every_value_reaches_the_shell_as_one_word() -> None:
    plan = fixed_plan(
        "v4pro-2node",
        [
            "cluster.account=" + _quoted(NASTY),
            "cluster.partition=" + _quoted(NASTY),
            "cluster.exclude=[nid1, " + _quoted(NASTY) + "]",
            "cluster.env.X=" + _quoted(NASTY),
            "cluster.srun_args=[" + _quoted(NASTY) + "]",
            "cluster.sbatch_args={comment: " + _quoted(NASTY) + "}",
            "cluster.container.environment=" + _quoted(NASTY),
            "cluster.container.python=" + _quoted(NASTY),
        ],
    )
    lines = sbatch_script(plan).splitlines()
    directives = dict(
        shlex.split(line.removeprefix("#SBATCH "))[0].split("=", 1) for line in lines if line.startswith("#SBATCH")
    )
    assert directives["--account"] == directives["--partition"] == directives["--comment"] == NASTY
    assert directives["--exclude"] == f"nid1,{NASTY}"
    assert [shlex.split(line) for line in lines if line.startswith("export X=")] == [["export", f"X={NASTY}"]]
    words = shlex.split(next(line for line in lines if line.startswith("srun")))
    assert NASTY in words
    assert f"--environment={NASTY}" in words
    assert words[words.index("env") :][:5] == ["env", "-u", "ROCR_VISIBLE_DEVICES", NASTY, "-u"]


def _quoted(text: str) -> str:
    """A YAML single-quoted scalar."""
    return "'" + text.replace("'", "''") + "'"


def test_what_is_optional_is_left_out_where_it_is_not_set() -> None:
    plan = fixed_plan("v4pro-2node", ["cluster.mem_mb=null", "cluster.cpus_per_task=null", "cluster.container=null"])
    script = sbatch_script(plan)
    for word in ("--account", "--mem", "--cpus-per-task", "--environment", "--qos", "--exclude"):
        assert word not in script
    assert shlex.quote(sys.executable) in python_command(plan), "without a container the ranks run this interpreter"


def test_submitit_is_asked_for_nothing_that_the_script_does_not_show() -> None:
    parameters = slurm_parameters(fixed_plan("v4pro-2node", ["cluster.account=a-1", "cluster.qos=debug"]))
    script = sbatch_script(fixed_plan("v4pro-2node", ["cluster.account=a-1", "cluster.qos=debug"]))
    for flag in (
        "account=a-1",
        "qos=debug",
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "mem=480000M",
        "time=120",
    ):
        assert f"#SBATCH --{flag}\n" in script
    assert "--kill-on-bad-exit=1" in parameters["srun_args"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that keeps the script it is given, and an srun to be found."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "sbatch").write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/submitted.sh && echo Submitted batch job 4711\n')
    (commands / "srun").write_text("#!/bin/sh\nexit 1\n")
    for command in commands.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    return tmp_path


def test_what_the_dry_run_shows_is_what_sbatch_gets_byte_for_byte(slurm: Path) -> None:
    plan = fixed_plan("v4pro-2node", [f"run.folder={slurm}/runs"])
    plan.run_dir.mkdir(parents=True)
    plan.save()
    shown = dry_run_text(plan)
    job = submit(plan)
    assert job.job_id == "4711"
    submitted = (slurm / "submitted.sh").read_text()
    assert submitted == sbatch_script(plan)
    assert submitted in shown
    assert (job_folder(plan) / "4711_submitted.pkl").is_file()
