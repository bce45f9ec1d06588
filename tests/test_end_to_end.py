"""Whole runs on this machine: real processes, real collectives, a real checkpoint on disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from launcher.config import load
from launcher.plan import make_plan
from moe_ep import tables
from moe_ep.headers import read_headers
from moe_ep.synthetic import write_checkpoint
from tests.checkout import ROOT, importable
from tests.launcher.test_report_schema import valid
from tests.waiting import PATIENCE_S, until

TINY = ROOT / "configs" / "tiny.yaml"


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "launcher", "submit", str(TINY), *args]


def run(cwd: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*args), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )


def environment() -> dict[str, str]:
    return os.environ | importable() | {"COLUMNS": "200"}


def only_run(cwd: Path) -> Path:
    (folder,) = (cwd / "runs" / "tiny").iterdir()
    return folder


def read_report(cwd: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((only_run(cwd) / "report.json").read_text())
    return result


def test_a_tune_job_leaves_a_table_of_what_its_ranks_measured(tmp_path: Path) -> None:
    topology = "topology={nodes: 1, ranks_per_node: 2, tp: 2, ep: 2}"
    tokens = "job.tune={tokens: [1, 9], quick: true}"
    done = run(tmp_path, "--set", topology, "--set", "job.kind=tune", "--set", tokens)
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path)
    assert [list(rank["stages"]) for rank in report["ranks"]] == [["env", "tune", "done"]] * 2
    path = Path(report["tune"]["table"])
    assert path == only_run(tmp_path) / "tables" / "interpreter.yaml"
    table = tables.read(path)
    assert [str(regime.config) for regime in table.regimes] == [line["config"] for line in report["tune"]["regimes"]]
    # 16 experts, top-6: a regime ends at the geometric mean of its tokens' rows and the next one's, in three digits.
    assert [regime.rows for regime in table.regimes] == [1.12, 1e6]
    assert "measured on a CPU" in done.stdout


def test_a_check_job_compares_the_backends_of_its_ranks_devices(tmp_path: Path) -> None:
    topology = "topology={nodes: 1, ranks_per_node: 2, tp: 2, ep: 2}"
    tokens = "job.tune={tokens: [1, 5]}"
    done = run(tmp_path, "--set", topology, "--set", "job.kind=check", "--set", tokens)
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path)
    valid(report)
    assert [list(rank["stages"]) for rank in report["ranks"]] == [["env", "check", "done"]] * 2
    checks = report["check"]["checks"]
    # gluon_kernel is not among them: its kernels run on gfx942 alone.
    assert {(c["tokens"], c["kernel"]) for c in checks} == {
        (n, kernel) for n in (1, 5) for kernel in ("triton_kernel", "reference")
    }
    assert {c["rank"] for c in checks} == {0, 1}
    for line in checks:
        assert 0 < line["error"] < 5e-3
        assert line["repeats"]
        assert 0.1 < line["same"] <= 1
        assert (line["apart"] == 0) == (line["same"] == 1)
    assert all(line["same"] == 1 for line in checks if line["kernel"] == "triton_kernel"), "the first here"
    assert "5 tokens, triton_kernel" in done.stdout
    assert "same bits as the first" in (only_run(tmp_path) / "report.html").read_text()


def test_one_command_goes_from_a_yaml_to_a_report(tmp_path: Path) -> None:
    done = run(tmp_path, "--set", "job.throughput={batch_sizes: [0, 1, 5], warmup: 1, repeats: 3}")
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path)
    valid(report)
    assert report["run"]["state"] == "completed"
    assert report["selector"]["by_rank"] == {str(r): "triton_kernel" for r in range(4)}
    routings = {line["routing"]: line["relative_error"] for line in report["parity"]["layers"].values()}
    assert set(routings) == {"hash", "top-k"}
    assert all(0 < error <= 2e-2 for error in routings.values())
    for line in report["memory"]:
        assert line["measured_total"] == pytest.approx(line["planned_total"], rel=0.05)
        assert line["work"].keys() == {"reading buffers", "loading", "parity", "largest pass"}
        for part, took in line["work"].items():
            assert took["measured"] == pytest.approx(took["planned"], rel=0.05), part
    assert [line["batch_size"] for line in report["throughput"]] == [0, 1, 5]
    for line in report["throughput"][1:]:
        assert line["us_per_layer_min"] <= line["us_per_layer"] <= line["us_per_layer_max"]
        assert line["median_latency_ms"] == pytest.approx(line["us_per_layer"] * 4e-3)
        assert line["median_latency_ms"] <= line["p99_latency_ms"] <= line["us_per_layer_max"] * 4e-3 * (1 + 1e-9)
        assert 0 < line["floor_us_per_layer"] < line["us_per_layer"]
        assert (line["requested"], line["completed"]) == (3, 3)
        assert line["total_token_throughput"] == pytest.approx(
            line["batch_size"] / (line["us_per_layer"] * 4e-6), rel=1e-6
        )
    stages = ["env", "selector", "weights", "parity", "memory", "comm", "throughput", "done"]
    assert [list(rank["stages"]) for rank in report["ranks"]] == [stages] * 4
    # Every token of every layer has six routes, whichever ranks they go to.
    assert {layer: sum(routes) for layer, routes in report["expert_load"]["by_layer"].items()} == dict.fromkeys(
        "0123", 5 * 6
    )
    # Each rank reads a quarter of the experts; the rest is replicated.
    read = [rank["weights"]["bytes_read"] for rank in report["ranks"]]
    experts = report["planned_bytes"]["routed experts"]
    whole = sum(f.stat().st_size for f in (tmp_path / "runs/checkpoints").glob("*/*.safetensors"))
    assert max(read) < whole - 2 * experts
    # The table, the progress and the path of the report are on the terminal.
    for word in ("cpu/mxfp4 triton_kernel", "layer 0 (hash routing)", "rank 3", "tokens/s"):
        assert word in done.stdout
    assert done.stdout.splitlines()[-1] == f"report: {only_run(tmp_path) / 'report.md'}"
    assert "rank 0: weights 680.1 kB of 680.1 kB, " in done.stderr
    assert all(abs(line["difference"]) <= 0.05 for line in report["memory"])


def test_ranks_with_tokens_of_their_own_and_experts_arranged_by_the_load_of_an_earlier_probe(tmp_path: Path) -> None:
    own = ["--set", "topology={nodes: 1, ranks_per_node: 3, tp: 1, ep: 3}", "--set", "job.layers=[0, 3]", "--json"]
    quick = ["--set", "job.throughput={batch_sizes: [4], warmup: 0, repeats: 1}"]
    first = run(tmp_path, *own, *quick)
    assert first.returncode == 0, first.stderr
    before = json.loads(first.stdout)
    (measured,) = before["communication"]
    assert {line["strategy"] for line in measured["strategies"]} == {"all_gather", "all_to_all"}
    assert all(line["sent_bytes"] > 0 for line in measured["strategies"])
    (choice,) = before["selector"]["comm"]["choices"]
    assert choice["name"] == measured["chosen"]
    assert "each rank with tokens of its own, 3 ranks on 1 node" in choice["why"]
    profile = only_run(tmp_path) / "expert_load.json"
    arranged = ["--set", f"placement={{profile: {profile}, redundant_gb: 0.00006}}"]
    done = run(tmp_path, *own, *quick, *arranged)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    valid(report)
    assert all(0 < line["relative_error"] <= 2e-2 for line in report["parity"]["layers"].values())
    load = report["expert_load"]
    assert load["by_layer"] == before["expert_load"]["by_layer"], "the same tokens go to the same experts"
    assert load["balancedness"] > load["balancedness_in_order"] == before["expert_load"]["balancedness"]
    assert all(sum(ranks) == pytest.approx(4 * 6) for ranks in load["by_rank"].values()), "each route counts once"
    assert all(abs(line["difference"]) <= 0.05 for line in report["memory"])


@pytest.mark.nightly
def test_two_ep_groups_of_two_ranks_work_on_tokens_of_their_own(tmp_path: Path) -> None:
    quick = "job.throughput={batch_sizes: [2], repeats: 2}"
    direct = "job.reading={direct: true, threads: 3}"
    done = run(tmp_path, "--set", "topology.ep=2", "--set", quick, "--set", direct, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [rank["ep_group"] for rank in report["ranks"]] == [0, 0, 1, 1]
    buffers = {"planned": 3 << 24, "measured": 3 << 24}
    assert all(line["work"]["reading buffers"] == buffers for line in report["memory"])
    (line,) = report["throughput"]
    assert line["total_token_throughput"] == pytest.approx(2 * 2 / (line["us_per_layer"] * 4e-6), rel=1e-6)


def test_a_rank_reads_its_own_file_once_a_job_has_pre_sharded_and_what_does_not_match_is_refused(
    tmp_path: Path,
) -> None:
    folder, quick = f"model.presharded={tmp_path}/pre", "job.throughput={batch_sizes: [2], warmup: 0, repeats: 1}"
    cut = "topology={nodes: 1, ranks_per_node: 2, tp: 2, ep: 1, expert_tp: 2, shared_expert: replicated}"
    spread = "topology={nodes: 1, ranks_per_node: 2, tp: 2, ep: 2}"
    written = run(tmp_path, "--set", spread, "--set", folder, "--set", "job.kind=preshard", "--json")
    assert written.returncode == 0, written.stderr
    report = json.loads(written.stdout)
    assert [list(rank["stages"]) for rank in report["ranks"]] == [["env", "selector", "weights", "done"]] * 2
    sizes = [file.stat().st_size for file in sorted((tmp_path / "pre").glob("*.safetensors"))]
    assert [rank["weights"]["bytes_written"] for rank in report["ranks"]] == sizes
    done = run(tmp_path, "--set", spread, "--set", folder, "--set", quick, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert all(rank["weights"]["read_from"] == f"{tmp_path}/pre" for rank in report["ranks"])
    assert all(rank["weights"]["bytes_read"] < size for rank, size in zip(report["ranks"], sizes, strict=True))
    assert all(0 < line["relative_error"] <= 2e-2 for line in report["parity"]["layers"].values())
    other = run(tmp_path, "--set", cut, "--set", folder, "--set", quick)
    assert other.returncode == 1
    assert "pre-sharded for something else: experts is ((0, 8), (8, 16))" in other.stderr


def test_experts_that_are_cut_into_slices_agree_with_the_reference(tmp_path: Path) -> None:
    model = tmp_path / "odd.yaml"
    shape = "{hidden: 128, intermediate: 256, layers: 2, experts: 5, top_k: 3, vocab: 64}"
    model.write_text(f"{{name: odd, synthetic: {{folder: made}}, shape: {shape}}}\n")
    cut = "topology={nodes: 1, ranks_per_node: 2, tp: 2, ep: 1, expert_tp: 2, shared_expert: sharded}"
    quick = "job.throughput={batch_sizes: [2], warmup: 0, repeats: 1}"
    done = run(tmp_path, "--set", f"model={model}", "--set", cut, "--set", quick, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["selector"]["candidates"][0]["reason"] == "takes ep_size=1, tp_size=2, bf16 activations"
    assert all(0 < line["relative_error"] <= 2e-2 for line in report["parity"]["layers"].values())
    assert all(abs(line["difference"]) <= 0.05 for line in report["memory"])
    (made,) = (tmp_path / "made").iterdir()
    tensors = read_headers(made).tensors
    needed = sum(info.nbytes if ".gate." in name else info.nbytes // 2 for name, info in tensors.items())
    assert all(needed <= rank["weights"]["bytes_read"] <= 1.02 * needed for rank in report["ranks"])


def test_a_parity_beyond_its_tolerance_fails_the_job_and_reports_the_figure(tmp_path: Path) -> None:
    done = run(tmp_path, "--set", "job.parity.tolerance=1e-6")
    assert done.returncode == 1
    report = read_report(tmp_path)
    assert (report["run"]["state"], report["failure"]["stage"]) == ("failed", "parity")
    assert report["failure"]["error_type"] == "ParityError"
    assert report["parity"]["layers"]["0"]["relative_error"] > 1e-6
    assert "ABOVE 1e-06" in done.stdout


def test_a_rank_that_raises_ends_the_run_within_seconds_and_is_named_first(tmp_path: Path) -> None:
    # A checkpoint in which an expert of rank 2 is damaged: the other ranks load theirs and wait.
    plan = make_plan(load(TINY, [f"model.synthetic.folder={tmp_path}/made"]), "id")
    made = Path(plan.checkpoint)
    write_checkpoint(made, plan.config.model.sizes)
    damaged = "layers.3.ffn.experts.9.w2.scale"
    shard = made / json.loads((made / "model.safetensors.index.json").read_text())["weight_map"][damaged]
    data = bytearray(shard.read_bytes())
    header = int.from_bytes(data[:8], "little")
    data[8 + header + json.loads(data[8 : 8 + header])[damaged]["data_offsets"][0]] = 255  # a scale that is NaN
    shard.write_bytes(data)
    done = run(tmp_path, "--set", f"model.synthetic.folder={tmp_path}/made")
    assert done.returncode == 1
    report = read_report(tmp_path)
    failure = report["failure"]
    assert (failure["rank"], failure["stage"], failure["error_type"]) == (2, "weights", "CheckpointError")
    assert damaged in failure["error"]
    assert any("CheckpointError" in line for line in failure["log_tail"])
    assert "rank 2, stage weights" in done.stdout
    assert seconds_from_failure_to_end(tmp_path) < 15


def seconds_from_failure_to_end(cwd: Path) -> float:
    events = [
        json.loads(line) for file in (only_run(cwd) / "events").iterdir() for line in file.read_text().splitlines()
    ]
    first = min(e["time"] for e in events if e["event"] in ("failed", "vanished"))
    return float(max(e["time"] for e in events if e["event"] == "ended") - first)


def wait_for(cwd: Path, rank: int, stage: str) -> int:
    """The pid of a rank once it has come some way into a stage."""

    def pid() -> int | None:
        for file in cwd.glob(f"runs/tiny/*/events/rank-{rank:05d}.jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            if any(e["stage"] == stage and e["event"] == "progress" for e in lines):
                return int(next(e["data"]["pid"] for e in lines if e["event"] == "started"))
        return None

    return until(pid, lambda: f"for rank {rank} to reach {stage}")


@contextmanager
def launched(cwd: Path, *args: str) -> "Iterator[subprocess.Popen[str]]":
    """A launcher in a session of its own, of which nothing is left afterwards."""
    launcher = subprocess.Popen(
        command(*args),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield launcher
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.communicate()


def processes_of(pid: int) -> list[str]:
    """Command lines that still run in the session of a launcher."""
    found = subprocess.run(["ps", "-s", str(pid), "-o", "args="], capture_output=True, text=True, check=False)
    return [line for line in found.stdout.splitlines() if "<defunct>" not in line]  # ended, but not collected


LONG = "job.throughput={batch_sizes: [1, 16], warmup: 0, repeats: 8}"
"""Its first batch size is soon measured, and its second is not."""


@pytest.mark.nightly  # the lab has one too
def test_a_rank_killed_in_the_middle_leaves_a_readable_partial_report(tmp_path: Path) -> None:
    with launched(tmp_path, "--set", LONG) as launcher:
        os.kill(wait_for(tmp_path, 2, "throughput"), signal.SIGKILL)
        out, _ = launcher.communicate(timeout=PATIENCE_S)
        assert processes_of(launcher.pid) == []
    assert launcher.returncode == 1
    report = read_report(tmp_path)
    valid(report)
    failure = report["failure"]
    assert (failure["rank"], failure["stage"], failure["error_type"]) == (2, "throughput", "Vanished")
    assert report["parity"]["layers"], "what was done before is in the report"
    assert len(report["memory"]) == 4
    assert [line["batch_size"] for line in report["throughput"]] == [1]
    assert "first at rank 2" in out
    assert seconds_from_failure_to_end(tmp_path) < 15
    # The same from the folder alone, another day.
    shutil.rmtree(tmp_path / "runs" / "checkpoints")
    again = [sys.executable, "-m", "launcher", "report", str(only_run(tmp_path))]
    done = subprocess.run(again, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "first at rank 2" in done.stdout


@pytest.mark.nightly  # the lab has one too
def test_a_rank_that_stands_still_is_named_when_the_others_have_waited_long_enough(tmp_path: Path) -> None:
    with launched(tmp_path, "--set", LONG, "--set", "limits.rank_timeout_s=5") as launcher:
        os.kill(wait_for(tmp_path, 3, "throughput"), signal.SIGSTOP)
        launcher.communicate(timeout=PATIENCE_S)
        assert processes_of(launcher.pid) == []
    failure = read_report(tmp_path)["failure"]
    assert (failure["rank"], failure["stage"]) == (3, "throughput")


def test_an_interrupted_run_ends_its_ranks_and_keeps_what_was_done(tmp_path: Path) -> None:
    with launched(tmp_path, "--set", LONG) as launcher:
        wait_for(tmp_path, 0, "throughput")
        os.killpg(launcher.pid, signal.SIGINT)  # as the terminal does: launcher, controller and ranks
        time.sleep(0.2)
        launcher.terminate()  # and once more, as `timeout` does
        launcher.communicate(timeout=PATIENCE_S)
        assert processes_of(launcher.pid) == []
    assert launcher.returncode == 1
    report = read_report(tmp_path)
    assert (report["failure"]["rank"], report["failure"]["error_type"]) == (None, "Interrupted")
    assert [line["batch_size"] for line in report["throughput"]] == [1]


@pytest.mark.nightly
def test_a_run_whose_processes_are_all_gone_is_reported_from_its_folder_as_failed(tmp_path: Path) -> None:
    with launched(tmp_path, "--set", LONG) as launcher:
        wait_for(tmp_path, 0, "throughput")
        os.killpg(launcher.pid, signal.SIGKILL)  # the ranks too: a machine that goes down
        launcher.wait()
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "report", str(only_run(tmp_path)), "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["run"]["state"] == "failed"
    assert [line["batch_size"] for line in report["throughput"]] == [1]


def test_a_rank_that_dies_before_its_first_line_ends_the_run_within_seconds(tmp_path: Path) -> None:
    # A sitecustomize of the user's that kills rank 2's interpreter.
    broken = "import os\nif os.environ.get('SUBMITIT_LOCAL_GLOBALID') == '2': os._exit(9)\n"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(broken)
    env = environment() | importable(tmp_path / "site")
    started = time.monotonic()
    done = subprocess.run(command(), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert time.monotonic() - started < 60, "far below rank_timeout_s"
    failure = read_report(tmp_path)["failure"]
    assert (failure["rank"], failure["error_type"]) == (2, "NeverStarted")
