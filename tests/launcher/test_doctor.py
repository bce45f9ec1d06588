"""What doctor makes of what Slurm and the nodes say."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs import checkup, clocks
from jobs.code import code_hash
from jobs.rank import Rank
from launcher import config as configuration
from launcher import doctor, slurm
from launcher.checks import Check, gpus, login_checks, measured_rate, minutes, node_check, partition_problems
from launcher.node_checks import differences, node_checks
from launcher.plan import Plan
from launcher.slurm import Node
from tests.checkout import CONFIGS, ROOT, importable
from tests.launcher.plans import fixed_plan
from tests.launcher.probes import write_probe

READ_ONLY = {"folder": "/tmp", "problem": "[Errno 30] Read-only file system", "executable": False, "free": 1}
PARTITION = {"PartitionName": "mi300", "State": "UP", "MaxTime": "12:00:00", "MaxNodes": "8", "TotalNodes": "128"}


def finding(host: str, **changes: Any) -> dict[str, Any]:
    device = {"name": "AMD Instinct MI300A", "arch": "gfx942", "free": 120 * 10**9, "total": 128 * 10**9}
    found: dict[str, Any] = {
        "rank": int(host[-1]),
        "host": host,
        "python": "3.11.9",
        "kernel": "5.14",
        "driver": "6.12.12",
        "cpus": 192,
        "memory_available": 450 * 10**9,
        "nics": {f"hsn{i}": {"state": "up", "speed_mbit": 200_000} for i in range(4)},
        "scratch": {"folder": "/tmp", "problem": None, "executable": True, "free": 10**11},
        "run_folder": None,
        "code": code_hash(),
        "packages": {"torch": "2.11.0"},
        "synchronised": True,
        "clock": {"offset_s": 0.0001, "rtt_s": 0.0002},
        "devices": [device] * 4,
        "complete": True,
    }
    return found | changes


@pytest.fixture
def plan() -> Plan:
    plan = fixed_plan("v4pro-2node")
    return Plan(**{**vars(plan), "code_root": ROOT})


def failed(checks: list[Check]) -> list[str]:
    return [f"{check.name}: {check.text}" for check in checks if check.state == "failed"]


def test_nodes_that_are_alike_and_as_planned_are_well(plan: Plan) -> None:
    nodes = [finding("nid1"), finding("nid2")]
    assert differences(nodes) == {}
    checks = node_checks(plan, nodes)
    assert [check.state for check in checks] == ["ok", "ok"]
    assert checks[0].text.startswith("4 × AMD Instinct MI300A (gfx942), 120 GB free on the fullest, host 450 GB free")
    assert "driver 6.12.12, hsn0 200 Gbit/s, hsn1 200 Gbit/s" in checks[0].text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": []}, "nid2: 0 devices, topology.ranks_per_node=4"),
        ({"code": "0123456789ab"}, "nid2: code 0123456789ab is not this checkout's"),
        ({"scratch": READ_ONLY}, "nid2: cluster.scratch: /tmp: [Errno 30] Read-only"),
        ({"run_folder": "[Errno 13] denied"}, "nid2: run.folder cannot be written from the node: [Errno 13]"),
        ({"clock": {"offset_s": 3.5, "rtt_s": 0.1}}, "nid2: its clock is -3.5 s off the first node's"),
        ({"clock": {"problem": "TimeoutError: x"}}, "nid2: clock: TimeoutError: x"),
        ({"memory_available": 300 * 10**9}, "nid2: 300 GB of the host's memory free, its 4 ranks hold"),
        ({"driver": "6.10.5"}, "nodes differ in driver: nid1: 6.12.12; nid2: 6.10.5"),
        ({"packages": {"torch": "2.10.0"}}, "nodes differ in torch: nid1: 2.11.0; nid2: 2.10.0"),
        ({"nics": {"hsn0": {"state": "up", "speed_mbit": None}}}, "nodes differ in NICs: nid1: hsn0 200 Gbit/s, hsn1"),
    ],
)
def test_what_is_wrong_with_a_node_is_said_of_it(plan: Plan, changes: dict[str, Any], message: str) -> None:
    told = failed(node_checks(plan, [finding("nid1"), finding("nid2", **changes)]))
    assert any(text.startswith(message) for text in told), told


@pytest.mark.parametrize(("sets", "state"), [((), "warning"), (("engine.name=sglang", "engine.args={}"), "failed")])
def test_what_is_known_of_an_engine_is_said(sets: tuple[str, ...], state: str) -> None:
    config = configuration.load(CONFIGS / "serve-v4pro-vllm.yaml", list(sets))
    plan = Plan(**{**vars(fixed_plan("serve-v4pro-vllm")), "config": config})
    told = [check for check in login_checks(plan) if check.name == "engine"]
    assert state in {check.state for check in told}
    assert all(config.engine.name in check.text for check in told)


def test_a_device_of_another_kind_or_with_too_little_free_is_said(plan: Plan) -> None:
    device = finding("nid1")["devices"][0]
    told = failed(
        node_checks(plan, [finding("nid1"), finding("nid2", devices=[device] * 3 + [device | {"arch": "gfx90a"}])])
    )
    assert "nid2: devices are gfx90a, cluster.arch=gfx942" in told
    full = [device] * 3 + [device | {"free": 90 * 10**9}]
    told = failed(node_checks(plan, [finding("nid1"), finding("nid2", devices=full)]))
    assert any(text.startswith("nid2: 90 GB free on a device, a rank holds") for text in told)
    found = differences([finding("nid1"), finding("nid2", devices=full)])
    assert found == {"free device memory": {"120 GB": ["nid1"], "90 GB": ["nid2"]}}


def test_a_node_that_did_not_answer_is_counted(plan: Plan) -> None:
    assert "nodes: 1 of 2 nodes answered: nid1" in failed(node_checks(plan, [finding("nid1")]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MaxTime": "1:00:00"}, "limits.time_min: 120 is more than the 60 minutes of mi300 (MaxTime)"),
        ({"MaxNodes": "1"}, "topology.nodes: 2 is more than the 1 of mi300 (MaxNodes)"),
        ({"State": "DOWN"}, "cluster.partition: mi300 is DOWN"),
        ({"MaxMemPerNode": "1000"}, "cluster.mem_mb: 480000 is more than the 1000 of mi300 (MaxMemPerNode)"),
        ({"AllowQos": "normal,high"}, "cluster.qos: debug is not among those that mi300 takes: normal,high"),
    ],
)
def test_where_a_partition_gives_less_than_is_asked_for(changes: dict[str, str], message: str) -> None:
    plan = fixed_plan("v4pro-2node", ["cluster.qos=debug"])
    assert list(partition_problems(plan, PARTITION)) == []
    assert list(partition_problems(plan, PARTITION | changes)) == [message]


def test_nodes_are_counted_by_what_they_can_take(plan: Plan) -> None:
    good = [Node(f"nid{i}", "idle", 192, 513700, "gpu:mi300a:4") for i in range(2)]
    assert node_check(good, plan).state == "ok"
    small = [good[0], Node("nid1", "idle", 192, 513700, "gpu:mi300a:2(S:0-1)")]
    check = node_check(small, plan)
    assert (check.state, "1 large enough" in check.text) == ("failed", True)
    down = [good[0], Node("nid1", "down*", 192, 513700, "gpu:mi300a:4")]
    assert "1 up" in node_check(down, plan).text


def test_slurms_own_forms_are_read() -> None:
    assert [minutes(text) for text in ("12:00:00", "1-00:00:00", "00:00:30", "UNLIMITED")] == [720, 1440, 0.5, None]
    assert [gpus(text) for text in ("gpu:mi300a:4(S:0-3)", "gpu:2", "tmpfs:1,gpu:h100:8", "(null)")] == [4, 2, 8, 0]


def test_the_rate_of_an_earlier_run_of_the_same_checkpoint_says_how_long_a_load_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "partition", lambda name: PARTITION)
    monkeypatch.setattr(slurm, "nodes", lambda partition: [])
    monkeypatch.setattr(slurm, "test_only", lambda script: (True, "Job 1 to start at 2026-11-23T01:02:03 using 8"))
    plan = fixed_plan("v4pro-2node", [f"run.folder={tmp_path}/runs", "model.checkpoint=/m"])
    assert measured_rate(plan) is None
    (check,) = (check for check in login_checks(plan) if check.name == "time")
    assert (check.state, "no earlier run tells at what rate" in check.text) == ("unknown", True)
    plan.save()
    write_probe(plan)
    weights = [{"bytes_read": 10**9 * (rank + 1), "load_seconds": 100.0} for rank in range(8)]
    value = {"run": {"checkpoint": "/m"}, "ranks": [{"weights": line} for line in weights]}
    (plan.run_dir / "report.json").write_text(json.dumps(value))
    assert measured_rate(plan) == 10**7
    checks = login_checks(plan)
    (check,) = (check for check in checks if check.name == "time")
    assert (check.state, "at 10 MB/s as in the last run; limits.time_min=120" in check.text) == ("failed", True)
    assert any(check.name == "sbatch --test-only" and "would start at 2026" in check.text for check in checks)


def test_a_machine_of_ones_own_is_looked_at_without_a_scheduler(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "doctor", str(CONFIGS / "tiny.yaml"), "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | importable(), capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"]) == (0, "well"), found["checks"]
    (node,) = found["nodes"]
    assert (node["code"], node["devices"], node["scratch"]["folder"]) == (code_hash(), [], "/tmp")
    assert not list(tmp_path.glob("runs/*/*"))


def test_the_checks_are_a_table_with_the_bad_ones_last() -> None:
    out = Console(file=io.StringIO(), width=100)
    doctor.show("x", [Check("b", "failed", "no [bold]disk"), Check("a", "ok", "fine")], out)
    assert isinstance(out.file, io.StringIO)
    text = out.file.getvalue()
    assert text.index("fine") < text.index("no [bold]disk")
    assert "x: something is wrong" in text


def test_one_broken_thing_on_a_node_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no fabric")

    monkeypatch.setattr(checkup, "nics", broken)
    (tmp_path / checkup.REQUEST).write_text(json.dumps({"arch": "cpu", "nodes": 1, "scratch": str(tmp_path)}))
    checkup.examine(tmp_path, Rank(0, 1, 0, 1, "nid1", 7, 0))
    (file,) = (tmp_path / checkup.FINDINGS).iterdir()
    found = json.loads(file.read_text())
    assert found["nics"] == {"problem": "RuntimeError: no fabric"}
    assert (found["scratch"]["executable"], found["complete"]) == (True, True)


def test_clocks_are_compared_by_the_best_of_several_exchanges() -> None:
    assert clocks._best([(5.0, 0.9), (0.2, 0.1), (1.0, 0.5)]) == {"offset_s": 0.2, "rtt_s": 0.1}
    assert clocks.synchronised() in (True, False, None)
