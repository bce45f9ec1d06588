"""The keys of a serve job, and what follows from them."""

import subprocess
from pathlib import Path

import pytest

from jobs.events import EventLog
from jobs.request import ProbeRequest
from jobs.serving import Endpoint, ServeRequest
from launcher.commands import service_broke
from launcher.config import load
from launcher.engines.known import limits_of
from launcher.errors import InputError
from launcher.plan import Plan, make_plan, problems_on_site
from launcher.render import sbatch_script
from tests.checkout import CONFIGS
from tests.waiting import PATIENCE_S

TINY = CONFIGS / "serve-tiny.yaml"
LAB = CONFIGS / "serve-lab.yaml"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ("engine.ports=1", r"engine\.ports: unknown key; did you mean 'port'"),
        ("engine.port=70000", r"engine\.port: .*65535"),
        ("engine.name=llama", r"engine\.name: .*embedded"),
        ("engine.api_key=secret", r"engine\.api_key: "),
        ("engine.api_key={}", r"engine\.api_key: .*give either env"),
        ("engine.args={--x: 1}", r"engine\.args"),
        ("engine.args={x: 1}", r"engine\.args: of an engine that is a program of its own; engine\.name is embedded"),
        ("topology.tp=2", r"topology\.tp: 2, but the embedded engine's 4 ranks all see the same tokens; use tp 4"),
        ("topology.shared_expert=sharded", r"topology\.shared_expert: sharded: the embedded engine holds it whole"),
        ("job.layers=[0]", r"job\.layers: \[0\]: a service needs all layers"),
        ("model.presharded=x", r"model\.presharded: the embedded engine reads the checkpoint"),
        ("placement.profile=x", r"placement\.profile: the embedded engine holds the experts in order"),
        ("model=tiny", r"model\.attention|attention: missing: only experts would be made"),
        ("model.attention.o_groups=2", r"topology\.dense: sharded: 2 groups of heads .* over tp 4; use replicated"),
        ("memory.kv=fp8", r"memory\.kv: fp8: the embedded engine's caches are bf16"),
        ("engine.limits.step_tokens=4", r"step_tokens: 4 is less than memory\.batch 8"),
        ("engine.limits.completion_tokens=2048", r"completion_tokens: 2048 leaves no token for a prompt"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_starts(change: str, wrong: str) -> None:
    extra = ["topology.ep=2"] if change == "topology.tp=2" else []
    with pytest.raises(InputError, match=wrong):
        load(TINY, [change, *extra], {})


def test_what_the_ranks_read_is_what_was_planned(tmp_path: Path) -> None:
    config = load(TINY, [f"run.folder={tmp_path}", "engine.api_key.env=KEY", "engine.served_name=mine"], {})
    plan = make_plan(config, "id")
    plan.save()
    request = ProbeRequest.load(plan.run_dir)
    assert request == plan.request()
    assert request.serve is not None
    assert (request.serve.model, request.serve.limits.sequences, request.batch_sizes) == ("mine", 8, (128,))


def request_of(*changes: str) -> ServeRequest:
    return make_plan(load(TINY, changes, {}), "id").serve_request()


def test_a_key_is_read_where_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert request_of().api_key() is None
    monkeypatch.setenv("KEY", " abc ")
    assert request_of("engine.api_key.env=KEY").api_key() == "abc"
    file = tmp_path / "key"
    file.write_text("def\n")
    assert request_of(f"engine.api_key.file={file}").api_key() == "def"
    file.write_text("\n")
    with pytest.raises(ValueError, match=rf"engine\.api_key\.file: {file}: empty"):
        request_of(f"engine.api_key.file={file}").api_key()
    monkeypatch.delenv("KEY")
    with pytest.raises(ValueError, match=r"engine\.api_key\.env: KEY is not set here"):
        request_of("engine.api_key.env=KEY").api_key()


def test_a_key_that_the_submitting_shell_lacks_is_said_before_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(load(TINY, ["engine.api_key.env=KEY"], {}), "id")
    monkeypatch.setenv("KEY", "abc")
    assert problems_on_site(plan) == []
    monkeypatch.delenv("KEY")
    assert problems_on_site(plan) == ["engine.api_key.env: KEY is not set here; export it in the shell that submits"]


def test_a_file_of_a_key_that_is_not_there_is_said_before_the_queue(tmp_path: Path) -> None:
    def problems(file: str) -> list[str]:
        return problems_on_site(make_plan(load(TINY, [f"engine.api_key.file={file}"], {}), "id"))

    assert problems(f"{tmp_path}/key") == [f"engine.api_key.file: no file {tmp_path}/key"]
    assert problems("/a/folder/of/the/nodes/key") == []
    assert problems("$NOWHERE/key")[0].startswith("engine.api_key.file: $NOWHERE/key: NOWHERE is not set here")
    (tmp_path / "key").write_text("abc")
    assert problems(f"{tmp_path}/key") == []


@pytest.mark.parametrize(("changes", "said"), [([], False), (["engine.host=0.0.0.0"], True)])
def test_a_service_that_is_open_to_all_is_said_to_be(changes: list[str], said: bool) -> None:
    known = limits_of(load(TINY, changes, {}))
    assert any("engine.host: 0.0.0.0 without engine.api_key" in limit.text for limit in known) == said
    assert limits_of(load(TINY, [*changes, "engine.api_key.env=K"], {})) == []


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://nid1:80"),
        ("::", "http://nid1:80"),
        ("::1", "http://[::1]:80"),
    ],
)
def test_a_url_is_one_that_others_can_use(address: str, url: str, tmp_path: Path) -> None:
    endpoint = Endpoint("nid1", address, 80, "m", needs_key=False, attempt=0)
    endpoint.save(tmp_path)
    assert Endpoint.load(tmp_path) == endpoint
    assert endpoint.url == url


def plan_of(tmp_path: Path, *changes: str) -> Plan:
    return make_plan(load(LAB, [f"run.folder={tmp_path}", *changes], {}), "id")


def test_slurm_tells_the_ranks_early_enough_to_drain(tmp_path: Path) -> None:
    assert "#SBATCH --signal=USR2@190" in sbatch_script(plan_of(tmp_path, "engine.drain_s=120"))


@pytest.mark.parametrize(
    ("code", "ready", "restarts", "told", "runs"),
    [
        (1, True, 2, False, 3),  # it breaks each time, until no restart is left
        (1, False, 2, False, 1),  # it was never ready: it would not be the next time
        (0, True, 2, False, 1),  # it was drained
        (1, True, 2, True, 1),  # it was told to end
        (1, True, 0, False, 1),
    ],
)
def test_the_batch_script_begins_anew_when_a_service_broke(
    code: int, ready: bool, restarts: int, told: bool, runs: int, tmp_path: Path
) -> None:
    """The script itself, with a stand-in for srun and the ranks that it would start."""
    plan = plan_of(tmp_path, f"engine.restarts={restarts}")
    plan.save()
    (tmp_path / "bin").mkdir()
    attempt = "$((${MOE_EP_ATTEMPT:-0} + ${MOE_EP_RESTARTS:-0}))"
    stand_in = [
        "#!/bin/bash",
        '[[ "$*" == *submitit* ]] || exit 0',
        f"echo {attempt} >>{tmp_path}/ran",
        f"echo '  \"attempt\": '{attempt} >{plan.run_dir}/endpoint.json" if ready else "",
        "kill -TERM $PPID" if told else "",
        f"exit {code}",
    ]
    (tmp_path / "bin" / "srun").write_text("\n".join(stand_in))
    (tmp_path / "bin" / "srun").chmod(0o755)
    script = tmp_path / "script"
    script.write_text(sbatch_script(plan))
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "ran").read_text().split() == [str(n) for n in range(runs)]
    (ended,) = (plan.run_dir / "events" / "batch.jsonl").read_text().splitlines()
    assert f'"attempt": {runs - 1}' in ended


@pytest.mark.parametrize(
    ("stages", "error", "broke"),
    [
        (("loading", "ready", "serving"), "RuntimeError", True),
        (("loading",), "RuntimeError", False),
        (("loading", "ready", "serving"), "Signal", False),
        (("loading", "ready", "serving", "draining", "done"), "", False),
    ],
)
def test_only_a_service_that_was_ready_is_started_again(
    stages: tuple[str, ...], error: str, broke: bool, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path)
    plan.save()
    for rank in range(4):
        log = EventLog(plan.run_dir, rank)
        for stage in stages:
            with log.stage(stage):
                if error and stage == stages[-1]:
                    log.write("failed", error={"type": error, "text": "", "traceback": ""})
    assert service_broke(plan) is broke
