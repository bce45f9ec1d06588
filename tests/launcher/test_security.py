"""Attacks: on what is run as code, on the shell, on secrets, on paths out of the run's folder."""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.events import EventLog
from jobs.redact import HIDDEN, is_secret, redact, redacted, secrets_of
from jobs.scratch import ScratchError, make_private, remove
from launcher import report
from launcher.config import load
from launcher.errors import InputError
from launcher.plan import Plan
from launcher.render import sbatch_script
from launcher.runs import find_run, record_submission
from tests.checkout import CONFIGS, ROOT, importable
from tests.launcher.plans import fixed_plan
from tests.launcher.probes import write_probe
from tests.waiting import PATIENCE_S

SECRET = "s3cr3t-c0rrect-horse"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return fixed_plan("v4flash-1node", [f"run.folder={tmp_path}/runs"])


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_a_runs_folder_is_the_users_alone_whatever_the_umask(plan: Plan, umask: int) -> None:
    before = os.umask(umask)
    try:
        if umask == 0:  # then the folder above, which the run makes too, is everybody's: refused, and said
            with pytest.raises(InputError, match=r"run\.folder: .* everybody may write there"):
                plan.save()
            return
        plan.save()
        EventLog(plan.run_dir, 0)
    finally:
        os.umask(before)
    assert mode(plan.run_dir) == 0o700
    assert mode(plan.run_dir.parent) == 0o700
    assert mode(plan.run_dir / "events" / "rank-00000.jsonl") == 0o600


def test_a_folder_in_which_everybody_may_rename_is_refused_but_tmp_is_not(plan: Plan) -> None:
    runs = plan.run_dir.parents[1]
    runs.mkdir()
    runs.chmod(0o777)
    with pytest.raises(InputError, match="what lies in a run's folder is run as code"):
        plan.save()
    assert list(runs.iterdir()) == []
    runs.chmod(0o1777)
    plan.save()


@pytest.mark.skipif(os.getuid() != 0, reason="gives folders away")
def test_a_folder_that_somebody_else_made_before_is_refused(plan: Plan) -> None:
    plan.run_dir.parent.mkdir(parents=True)
    os.chown(plan.run_dir.parent, 65534, 65534)
    with pytest.raises(InputError, match="belongs to user 65534"):
        plan.save()


def test_a_link_in_the_place_of_the_folder_is_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    plan.run_dir.parent.parent.mkdir()
    plan.run_dir.parent.symlink_to(tmp_path / "theirs")
    with pytest.raises(InputError, match="not a folder but a link"):
        plan.save()
    assert list((tmp_path / "theirs").iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="gives folders away")
def test_a_run_of_somebody_else_is_not_resumed_since_it_says_which_code_runs(plan: Plan) -> None:
    plan.save()
    Plan.load(plan.run_dir, attempt=1)
    plan.run_dir.chmod(0o770)
    with pytest.raises(InputError, match=r"others may write to it \(mode 0770\)"):
        Plan.load(plan.run_dir, attempt=1)
    plan.run_dir.chmod(0o700)
    os.chown(plan.run_dir, 65534, 65534)
    with pytest.raises(InputError, match="run as code by you"):
        Plan.load(plan.run_dir, attempt=1)


NASTY = (
    "a b",
    "$(touch PWNED)",
    "`touch PWNED`",
    "'; touch PWNED; '",
    '"; touch PWNED; "',
    "a\\",
    "-rf",
    "*",
    "~root",
    "&touch PWNED",
)


@pytest.mark.parametrize("value", NASTY)
def test_no_value_of_a_yaml_is_run_by_the_batch_script(tmp_path: Path, value: str) -> None:
    """The script itself is run, by a shell whose commands are stand-ins that write down their words."""
    quoted = "'" + value.replace("'", "''") + "'"
    keys = ["cluster.account", "cluster.partition", "cluster.qos", "cluster.container.environment"]
    keys += ["cluster.container.python", "cluster.env.X"]
    overrides = [f"{key}={quoted}" for key in keys]
    overrides += [
        f"cluster.exclude=[{quoted}]",
        f"cluster.srun_args=[{quoted}]",
        f"cluster.sbatch_args={{comment: {quoted}}}",
    ]
    overrides.append("cluster.scratch=" + "'/tmp/" + value.replace("'", "''") + "/x-{run_id}'")
    plan = fixed_plan("v4pro-2node", [f"run.folder={tmp_path}/r u n", *overrides])
    plan.save()
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("srun", "scontrol"):
        (commands / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$0" "$X" "$@" >>"{tmp_path}/words"\n')
        (commands / name).chmod(0o755)
    script = tmp_path / "script.sh"
    script.write_text(sbatch_script(plan))
    env = {"PATH": f"{commands}:/usr/bin:/bin", "HOME": str(tmp_path), "SLURM_JOB_ID": "7"}
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(["bash", str(script)], cwd=work, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert list(work.iterdir()) == []
    assert not list(tmp_path.rglob("PWNED"))
    words = (tmp_path / "words").read_text().splitlines()
    assert {value, f"--environment={value}", f"/tmp/{value}/x-{plan.run_id}"} <= set(words)
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH"):
            assert len(shlex.split(line.removeprefix("#SBATCH "))) == 1
    (event,) = (plan.run_dir / "events" / "batch.jsonl").read_text().splitlines()
    assert json.loads(event)["event"] == "ended"


@pytest.mark.parametrize("text", ["a\n#SBATCH --wrap=x", "a\rb", "a\x00b", "a\x1b[2J"])
def test_a_line_break_or_a_control_character_in_a_value_is_refused(text: str) -> None:
    for key in ("cluster.account", "cluster.exclude", "run.folder", "cluster.srun_args"):
        value = json.dumps([text] if key.endswith(("exclude", "args")) else text)
        with pytest.raises(InputError, match="must match"):
            load(CONFIGS / "v4pro-2node.yaml", [f"{key}={value}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.name=../../etc", "must match"),
        ("run.name=a/b", "must match"),
        ("run.name=.hidden", "must match"),
        ("cluster.name=../x", "must match"),
        ("model.name=a/../b", "must match"),
        ("run.folder='/a/%j'", "must match"),  # Slurm would put the job's number there
        ("run.folder='/a\\b'", "must match"),
        ("cluster.scratch=/tmp", "must match"),
        ("cluster.scratch='/tmp/{run_id}/..'", "must match"),
        ("cluster.scratch='relative-{run_id}'", "must match"),
        ("cluster.sbatch_args={'x --wrap': 1}", "must match"),
        ("cluster.env={'A;touch': 1}", "must match"),
        ("cluster.unset=['A B']", "must match"),
    ],
)
def test_names_that_would_leave_their_place_are_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(CONFIGS / "v4pro-2node.yaml", [override])


def test_a_runs_name_on_the_command_line_reaches_no_other_folder(plan: Plan, tmp_path: Path) -> None:
    plan.save()
    for name in ("../runs", "..", ".", "v4flash-1node/..", "*"):
        with pytest.raises(InputError, match="no such run"):
            find_run(name, tmp_path / "runs")


def test_a_secret_in_a_config_is_refused_and_not_repeated(tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "PGPASSWORD", "MY_CREDENTIALS"):
        with pytest.raises(InputError, match=f"{name}: a secret does not belong here") as error:
            load(CONFIGS / "v4pro-2node.yaml", [f"cluster.env.{name}={SECRET}"])
        assert SECRET not in str(error.value)
    command = [
        sys.executable,
        "-m",
        "launcher",
        "submit",
        str(CONFIGS / "tiny.yaml"),
        "--set",
        f"cluster.env.A_TOKEN={SECRET}",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | importable(), capture_output=True, text=True)
    assert done.returncode == 2
    assert SECRET not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_secrets_of_the_shell_reach_neither_script_nor_plan_nor_report(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    dirty = Plan(
        **{**vars(plan), "command": ("launcher", "submit", "x.yaml", "--set", f"model.checkpoint=/m/{SECRET}")}
    )
    dirty.save()
    record_submission(dirty.run_dir, 0, "slurm", "7")
    write_probe(dirty)
    log = EventLog(dirty.run_dir, 1, attempt=1)
    log.write("started", pid=1, host="n", job_id=7, world=4)
    url = f"https://me:{SECRET}@host/x"
    text = f"401 for {url} with token={SECRET}"
    log.write(
        "failed",
        error={"type": "HTTPError", "text": text, "traceback": f'headers = {{"Authorization": "Bearer {SECRET}"}}'},
    )
    (dirty.run_dir / "submitit").mkdir()
    (dirty.run_dir / "submitit" / "7_1_log.err").write_text(f"HF_TOKEN={SECRET}\nHTTPError: {text}\n")
    result = report.write(dirty.run_dir)
    assert HIDDEN in result["failure"]["error"]
    assert SECRET not in sbatch_script(dirty)
    for file in dirty.run_dir.rglob("*"):
        if file.is_file() and file.parent.name != "submitit":
            assert SECRET not in file.read_text(), file


@pytest.mark.parametrize(
    "text",
    [
        "hf_abcdefghijklmnopqrstuv",
        "ghp_0123456789abcdefghij",
        "AKIAABCDEFGHIJKLMNOP",
        "Authorization: Bearer abcdef0123456789",
        "https://user:pa55word@host/",
        "API_KEY=abcdef12",
        '{"password": "abcdef12"}',
        "HF_TOKEN: abcdef12",
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
        "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2QT4",
    ],
)
def test_tokens_of_known_forms_are_hidden(text: str) -> None:
    hidden = redact(f"before {text} after")
    assert HIDDEN in hidden
    assert "before" in hidden
    assert not any(part in hidden for part in ("abcdef", "pa55", "0123456789ab", "SflK", "AKIAAB"))


@pytest.mark.parametrize(
    "text",
    [
        "tokens: 16, max_tokens=4096, total_token_throughput 123456 tokens/s",
        "PWD=/home/user/moe-ep",
        "HF_TOKEN=$HF_TOKEN",
        "sha256 0123456789abcdef0123456789abcdef",
        "def f(token: Tensor, key: str)",
    ],
)
def test_what_only_looks_like_a_secret_is_left(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_variables_are_known_by_their_names() -> None:
    environ = {
        "HF_TOKEN": "longer-secret",
        "B_TOKEN": "longer",
        "PWD": "/home/x",
        "X_TOKEN": "1",
        "NCCL_NET": "ofi-net",
    }
    assert secrets_of(environ) == ("longer-secret", "longer")
    assert redacted({"a": ["longer-secret!"], "token": "x", "tokens": 3}, secrets_of(environ)) == {
        "a": [f"{HIDDEN}!"],
        "token": HIDDEN,
        "tokens": 3,
    }
    assert not any(map(is_secret, ("total_token_throughput", "TOKENIZERS_PARALLELISM", "top_k", "OLDPWD")))


CRASH = """
import os
from jobs.redact import hide_in_logs
hide_in_logs()
print("begin", end=" "); print(os.environ["HF_TOKEN"][:9], end=""); print(os.environ["HF_TOKEN"][9:])
raise RuntimeError(f"401 with {os.environ['HF_TOKEN']}")
"""


def test_a_ranks_log_holds_no_secret_though_it_comes_in_pieces_or_in_a_traceback() -> None:
    env = os.environ | importable() | {"HF_TOKEN": SECRET}
    done = subprocess.run([sys.executable, "-c", CRASH], env=env, capture_output=True, text=True)
    assert done.stdout == f"begin {HIDDEN}\n"
    assert f"RuntimeError: 401 with {HIDDEN}" in done.stderr
    assert SECRET not in done.stderr


def test_a_ranks_scratch_is_its_own_or_refused(tmp_path: Path) -> None:
    mine = tmp_path / "moe-ep-1"
    make_private(mine)
    make_private(mine)  # the other ranks of the node
    assert mode(mine) == 0o700
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "elsewhere" / "precious").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for planted in ("link", "open"):
        with pytest.raises(ScratchError, match=r"cluster\.scratch: .*somebody made it before"):
            make_private(tmp_path / planted)
    remove(tmp_path / "link")
    assert (tmp_path / "elsewhere" / "precious").exists()
    remove(mine)
    assert not mine.exists()


def test_a_log_that_is_hostile_is_shown_and_not_run(plan: Plan) -> None:
    plan.save()
    record_submission(plan.run_dir, 0, "slurm", "7")
    write_probe(plan, failing=1)
    (plan.run_dir / "submitit").mkdir()
    (plan.run_dir / "submitit" / "7_1_log.err").write_text("<script>alert(1)</script> [bold]x[/bold] \x1b[2J\n" * 30)
    report.write(plan.run_dir)
    assert "<script>alert" not in (plan.run_dir / "report.html").read_text()
    command = [sys.executable, "-m", "launcher", "diagnose", str(plan.run_dir)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | importable(), capture_output=True, text=True)
    assert "Traceback" not in done.stderr
