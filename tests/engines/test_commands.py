"""A config becomes the command of every node, and what is known against it is said before anything is submitted."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.engine_http import counter
from jobs.engine_process import shards, surroundings
from launcher.cli import app
from launcher.config import load
from launcher.engines import read_flags
from launcher.engines.flags import has_flag
from launcher.engines.known import PROGRAMS, limits_of, node_commands
from launcher.engines.program import Launch
from launcher.errors import InputError
from tests.checkout import CONFIGS

PRO = "serve-v4pro-vllm"
SGLANG = ["engine.name=sglang", "engine.args={mem-fraction-static: 0.8}"]
SPREAD = ["topology.ep=16", "topology.expert_tp=1"]


def commands(name: str, *overrides: str) -> list[dict[str, str | None]]:
    """By node: flag → value."""
    config = load(CONFIGS / f"{name}.yaml", overrides)
    return [flags(command) for command in node_commands(config, "/models/pro", "python3")]


def flags(command: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for word, after in zip(command, [*command[1:], "--"], strict=True):
        if word.startswith("--"):
            assert word not in found, f"{word} stands twice"
            found[word] = None if after.startswith("--") else after
    return found


def only(command: dict[str, str | None], *names: str) -> dict[str, str | None]:
    return {name: command[name] for name in names if name in command}


def test_vllm_over_nodes_is_one_tensor_parallel_group_and_headless_but_for_the_first() -> None:
    nodes = commands(PRO)
    assert len(nodes) == 4
    for number, node in enumerate(nodes):
        assert node["--tensor-parallel-size"] == "16"
        assert only(node, "--nnodes", "--node-rank", "--master-addr", "--master-port") == {
            "--nnodes": "4",
            "--node-rank": str(number),
            "--master-addr": "{head}",
            "--master-port": "{meeting}",
        }
        assert ("--headless" in node) == (number > 0)
        assert ("--port" in node) == (number == 0)
        assert "--enable-expert-parallel" not in node
        assert node["--moe-backend"] == "triton_unfused"


def test_vllm_with_data_parallelism_starts_every_nodes_replicas() -> None:
    nodes = commands(PRO, "topology.tp=2", *SPREAD)
    for number, node in enumerate(nodes):
        assert only(node, "--data-parallel-size", "--data-parallel-size-local", "--data-parallel-rpc-port") == {
            "--data-parallel-size": "8",
            "--data-parallel-size-local": "2",
            "--data-parallel-rpc-port": "{meeting}",
        }
        assert node.get("--data-parallel-start-rank") == (str(2 * number) if number else None)
        assert "--enable-expert-parallel" in node
        assert "--nnodes" not in node


def test_sglang_has_all_ranks_in_one_group_of_which_attention_takes_parts() -> None:
    for number, node in enumerate(commands(PRO, *SGLANG, "topology.tp=4", *SPREAD)):
        assert only(node, "--tp-size", "--attn-dp-size", "--ep-size", "--node-rank", "--dist-init-addr") == {
            "--tp-size": "16",
            "--attn-dp-size": "4",
            "--ep-size": "16",
            "--node-rank": str(number),
            "--dist-init-addr": "{head}:{meeting}",
        }
        assert node["--max-running-requests"] == "64"


def test_tokenspeed_starts_the_ranks_of_its_node_with_these_experts() -> None:
    for number, node in enumerate(commands("serve-v4pro-tokenspeed")):
        assert only(node, "--nnodes", "--node-rank", "--nprocs-per-node", "--world-size", "--attn-tp-size") == {
            "--nnodes": "4",
            "--node-rank": str(number),
            "--nprocs-per-node": "4",
            "--world-size": "16",
            "--attn-tp-size": "16",
        }
        assert node["--expert-parallel-size"] == "16"
        assert "--moe-tp-size" not in node
        assert "--data-parallel-size" not in node
    sliced = commands("serve-v4pro-tokenspeed", "topology.ep=1", "topology.expert_tp=16", "topology.tp=8")[0]
    assert only(sliced, "--moe-tp-size", "--expert-parallel-size", "--data-parallel-size") == {
        "--moe-tp-size": "16",
        "--data-parallel-size": "2",
    }


def test_a_users_arguments_come_last_and_take_the_place_of_defaults() -> None:
    node = commands(
        PRO, "engine.args={max-num-seqs: 3, enforce-eager: true, moe-backend: marlin, cpu-offload-gb: 0.5}"
    )[1]
    assert only(node, "--max-num-seqs", "--enforce-eager", "--moe-backend", "--cpu-offload-gb") == {
        "--max-num-seqs": "3",
        "--enforce-eager": None,
        "--moe-backend": "marlin",
        "--cpu-offload-gb": "0.5",
    }


def test_another_command_is_started_in_its_place() -> None:
    config = load(CONFIGS / f"{PRO}.yaml", ["engine.command=[env, A=1, /opt/vllm, serve]"])
    assert node_commands(config, "/models/pro", "python3")[0][:5] == ["env", "A=1", "/opt/vllm", "serve", "/models/pro"]


@pytest.mark.parametrize(
    ("engine", "overrides", "says"),
    [
        ("vllm", ["engine.args.master-port=3"], "engine.args.master-port: follows from topology.nodes for vllm"),
        ("sglang", ["engine.args.ep=3"], "engine.args.ep: follows from topology.ep for sglang; set that instead"),
        ("tokenspeed", ["engine.args.tp=3"], "engine.args.tp: follows from topology.tp for tokenspeed"),
        ("vllm", ["engine.args.enforce-eager=false"], "engine.args.enforce-eager: false: a flag is given (true) or"),
        ("vllm", ["topology.ep=8", "topology.expert_tp=1"], "use ep 16 (whole experts) or expert_tp 16 (slices"),
        ("vllm", ["topology.tp=8"], "a data-parallel replica of vllm lies on one node, where there are 4 ranks"),
        ("sglang", ["engine.api_key.env=K"], "engine.api_key: sglang takes its key on its command line, which every"),
        (
            "vllm",
            ["engine.limits.queue=3"],
            "engine.limits: of the embedded engine; set vllm's own flags in engine.arg",
        ),
        ("vllm", ["engine.args={Enforce Eager: true}"], "engine.args"),
        ("vllm", ["engine.args.max-num-seq=3"], "vllm has no --max-num-seq in what was read of it (vllm 0.33.0"),
        ("vllm", ["engine.args.max-num-seq=3"], "did you mean 'max-num-seqs'?; engine.allow_unknown_args: true lets"),
        ("sglang", ["engine.args.mem-fraction=0.8"], "did you mean 'mem-fraction-static'?"),
        ("tokenspeed", ["engine.args.gpu-memory-utilisation=1"], "did you mean 'gpu-memory-utilization'?"),
        ("vllm", ["model.presharded=/x"], "model.presharded: vllm reads the checkpoint; remove it"),
    ],
)
def test_what_cannot_be_started_is_refused_with_what_would_be_right(
    engine: str, overrides: list[str], says: str
) -> None:
    with pytest.raises(InputError) as refused:
        load(CONFIGS / f"{PRO}.yaml", [f"engine.name={engine}", *overrides])
    assert says in str(refused.value)


def test_a_flag_that_is_not_known_passes_where_that_is_asked_for_and_switches_may_be_turned_off() -> None:
    args = "engine.args={brand-new: 3, no-async-scheduling: true}"
    node = commands(PRO, args, "engine.allow_unknown_args=true")[0]
    assert only(node, "--brand-new", "--no-async-scheduling") == {"--brand-new": "3", "--no-async-scheduling": None}
    with pytest.raises(InputError, match=r"^--set engine\.args\.brand-new: vllm has no --brand-new[^\n]*$"):
        load(CONFIGS / f"{PRO}.yaml", [args])
    with pytest.raises(InputError, match=r"allow_unknown_args: of an engine that is a program"):
        load(CONFIGS / "serve-tiny.yaml", ["engine.allow_unknown_args=true"])


@pytest.mark.parametrize(
    ("engine", "key", "way"),
    [
        ("vllm", "args.hf-token", "export HF_TOKEN in the shell that submits"),
        ("sglang", "args.admin-api-key", "everybody on the node can read a command line"),
        ("sglang", "args.ssl-keyfile-password", "everybody on the node can read a command line"),
        ("tokenspeed", "args.app-key", "everybody on the node can read a command line"),
        ("vllm", "args.chat-template", "export it in the shell that submits"),
        ("vllm", "env.OPENAI_API_KEY", "export it in the shell that submits"),
    ],
)
def test_a_secret_for_an_engine_is_refused_with_the_way_to_do_it_and_not_repeated(
    engine: str, key: str, way: str
) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    with pytest.raises(InputError) as refused:
        load(CONFIGS / f"{PRO}.yaml", [f"engine.name={engine}", f"engine.{key}={secret}"])
    assert f"engine.{key}: a secret does not belong here: scripts and reports show it; " in str(refused.value)
    assert way in str(refused.value)
    assert secret not in str(refused.value)


@pytest.mark.parametrize("key", ["api_key", "api_key.env"])
def test_a_key_that_is_written_where_its_name_belongs_is_not_repeated(key: str) -> None:
    with pytest.raises(InputError, match=r"engine\.api_key") as refused:
        load(CONFIGS / f"{PRO}.yaml", [f"engine.{key}=hf_abcdefghijklmnopqrstuvwxyz-1"])
    assert "abcdef" not in str(refused.value)


def test_what_is_no_secret_passes() -> None:
    args = "{hf-token: true, ssl-keyfile: /home/me/key.pem, max-num-batched-tokens: 8192, tokenizer: /m}"
    load(CONFIGS / f"{PRO}.yaml", [f"engine.args={args}"])


def made(folder: Path, name: str, text: str) -> Path:
    path = folder / "package" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return folder / "package"


def test_an_engines_flags_are_read_in_its_sources(tmp_path: Path) -> None:
    vllm = "class FrontendArgs:\n    api_key: str = ''\nclass Other:\n    hidden: int = 0\n"
    vllm += "group.add_argument('-tp', '--tensor-parallel-size', type=int, help='--not-this one')\n"
    package = made(tmp_path, "vllm/engine/arg_utils.py", vllm)
    assert read_flags.read(package) == ("vllm", ["api-key", "tensor-parallel-size"])
    wheel = tmp_path / "sglang.whl"
    sglang = "class F:\n    tp_size: A[int, Arg(help='h', aliases=['--tp-ranks'])] = 1\n    own: A[int, 'help'] = 1\n"
    sglang += "    inner: A[int, Arg(no_cli=True)] = 1\n    other: A[int, Arg(cli_name='--called')] = 1\n"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("sglang/srt/arg_groups/fields/one.py", sglang)
        file.writestr("sglang/srt/other.py", "p.add_argument('--elsewhere')")
    assert read_flags.read(wheel) == ("sglang", ["called", "own", "tp-ranks", "tp-size"])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"the sources of no engine; expected one of"):
        read_flags.read(tmp_path / "nothing")


@pytest.mark.parametrize("engine", sorted(PROGRAMS))
def test_the_flags_that_the_launcher_gives_are_known_of_the_engine(engine: str) -> None:
    program = PROGRAMS[engine]
    for tp, ep, sliced in ((8, 8, 1), (4, 8, 1), (8, 1, 8)):
        launch = Launch("/m", "m", 2, 4, tp, ep, sliced, 8192, 8, "fp8", "gfx942", "0.0.0.0", 600)
        for node in range(2):
            for name, _ in [*program.fixed(launch, node), *program.defaults(launch)]:
                assert has_flag(engine, name.removeprefix("--")), name


def test_experts_may_be_spread_over_data_parallel_groups_by_these_engines_alone() -> None:
    assert load(CONFIGS / f"{PRO}.yaml", ["topology.tp=4", *SPREAD]).topology.ep == 16
    with pytest.raises(InputError, match=r"topology\.ep: 16 does not divide tp 4"):
        load(CONFIGS / f"{PRO}.yaml", ["job.kind=probe", "topology.tp=4", *SPREAD])


@pytest.mark.parametrize(
    ("engine", "overrides", "stops", "says"),
    [
        ("sglang", [], True, "no mxfp4 experts for DeepSeek-V4 on gfx942"),
        ("vllm", SPREAD, True, "vllm with expert parallelism on gfx942"),
        ("vllm", [], False, "bf16 activations"),
        ("tokenspeed", SPREAD, False, "Detected unsupported AMD GPU architecture 'gfx942'"),
    ],
)
def test_what_is_known_on_gfx942_is_said(engine: str, overrides: list[str], stops: bool, says: str) -> None:
    overrides = [f"engine.name={engine}", "engine.args={}", *overrides]
    limits = limits_of(load(CONFIGS / f"{PRO}.yaml", overrides))
    assert any(limit.stops for limit in limits) == stops
    assert any(says in limit.text for limit in limits)
    elsewhere = limits_of(load(CONFIGS / f"{PRO}.yaml", [*overrides, "cluster.arch=gfx950"]))
    assert [limit.stops for limit in elsewhere] == [False]


@pytest.fixture
def no_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def launcher(*args: str) -> Any:
    return CliRunner().invoke(app, args)


@pytest.mark.usefixtures("no_checkpoint")
def test_the_dry_run_shows_every_nodes_command_and_what_is_known() -> None:
    shown = launcher("submit", str(CONFIGS / "serve-v4pro-tokenspeed.yaml"), "--dry-run").output
    for node in range(4):
        assert f"node {node}: TS_SERVE_ENGINE_MODULE=moe_ep.plugins.tokenspeed_engine ts serve" in shown
        assert f"--node-rank {node}" in shown
    assert "--dist-init-addr {head}:{meeting}" in shown
    assert "known: tokenspeed: 0.1.1 and later refuse gfx942" in shown
    value = json.loads(launcher("submit", str(CONFIGS / "serve-v4pro-tokenspeed.yaml"), "--dry-run", "--json").output)
    assert len(value["engine"]["commands"]) == 4
    assert not any(limit["stops"] for limit in value["engine"]["limits"])


@pytest.mark.usefixtures("no_checkpoint")
def test_plan_says_it_and_submit_refuses_it() -> None:
    config = [str(CONFIGS / f"{PRO}.yaml"), *(word for change in SGLANG for word in ("--set", change))]
    planned = launcher("plan", *config)
    assert planned.exit_code == 1
    assert "known: engine.name: sglang has no mxfp4 experts" in planned.output
    assert "sglang has no mxfp4 experts" in json.loads(launcher("plan", *config, "--json").output)["limits"][0]["text"]
    refusal = launcher("submit", *config, "--dry-run").output
    assert "would not be submitted: engine.name: sglang has no mxfp4 experts" in refusal
    assert "--force submits it" in refusal
    forced = launcher("submit", *config, "--dry-run", "--force").output
    assert "would not be submitted: engine.name" not in forced


@pytest.mark.parametrize("engine", sorted(PROGRAMS))
def test_what_a_config_sets_cannot_be_set_by_an_argument_too(engine: str) -> None:
    launch = Launch("/m", "m", 2, 4, 8, 8, 1, 8192, 8, "fp8", "gfx942", "0.0.0.0", 600)
    program = PROGRAMS[engine]
    for node in range(2):
        for name, _ in program.fixed(launch, node):
            assert program.argument_problems({name.removeprefix("--"): 1}), name


def test_a_line_of_the_log_tells_how_much_is_read() -> None:
    line = "Loading safetensors checkpoint shards:  25% Completed | 16/64 [00:12<00:36,  1.33it/s]"
    assert shards(f"(EngineCore pid=7) {line}") == (16, 64)
    assert shards("INFO 11-23 05:00:00 Loading weights took 12.3 seconds") is None


def test_an_engine_does_not_take_itself_for_the_rank_that_started_it() -> None:
    rank = {"LOCAL_RANK": "0", "RANK": "4", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2", "PATH": "/bin"}
    assert surroundings(rank | {"SUBMITIT_EXECUTOR": "slurm"}, {"A": 1}) == {"PATH": "/bin", "A": "1"}


def test_requests_answered_are_summed_over_their_reasons() -> None:
    text = (
        "# TYPE vllm:request_success_total counter\n"
        'vllm:request_success_total{finished_reason="stop"} 3.0\n'
        'vllm:request_success_total{finished_reason="length"} 2.0\n'
        'vllm:request_success_created{finished_reason="stop"} 1.7e9\n'
    )
    assert counter(text, "vllm:request_success_total") == 5.0
    assert counter(text.replace("3.0", "3.0 1795411144000"), "vllm:request_success_total") == 5.0
    assert counter("a 1\na_total 2\n", "a") == 1.0
    assert counter(text, "sglang:num_requests_total") is None
    assert counter(None, "vllm:request_success_total") is None


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1.0", "many", "1e400"])
def test_what_no_counter_can_have_counted_is_not_counted(value: str) -> None:
    assert counter(f'a{{reason="stop"}} 3.0\na{{reason="length"}} {value}\n', "a") is None
