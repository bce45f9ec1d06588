"""Five nights on a real Slurm: three good ones, a slow one, one in which a node dies; and one more."""

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from launcher.history import History
from launcher.lab import control
from launcher.processes import children
from tests.checkout import importable
from tests.slurm.conftest import CONFIG, Lab
from tests.waiting import PATIENCE_S, until

# Ranks that this folder's Python starts rest in every timed pass until a second and a half are over, so that passes
# take the same time on a busy machine; and longer by the fraction that SLOWER says.
STEADY = """
import importlib.abc, importlib.util, os, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "jobs.throughput":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            timed = module.timed
            def slower(one_pass, device):
                if sys._getframe(1).f_code.co_name != "seconds_of_a_pass":
                    return timed(one_pass, device)
                def whole():
                    started = time.perf_counter()
                    out = one_pass()
                    whole_s = 1.5 * (1 + float(os.environ.get("SLOWER", "0")))
                    time.sleep(max(0.0, started + whole_s - time.perf_counter()))
                    return out
                return timed(whole, device)
            module.timed = slower
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
SECOND = "nid001002"


def options(cwd: Path, slower: float, repeats: int = 3) -> list[str]:
    overrides = [
        f"cluster.env.PYTHONPATH={cwd}/steady",
        f"cluster.env.SLOWER='{slower}'",
        "backend.impl=reference",
        "job.layers=[2]",
        f"job.throughput={{batch_sizes: [4], warmup: 1, repeats: {repeats}}}",
        "limits={time_min: 10, rank_timeout_s: 60, stall_s: 90, pending_s: 12}",
    ]
    return [word for override in overrides for word in ("--set", override)]


def command(cwd: Path, slower: float = 0.0, repeats: int = 3) -> list[str]:
    args = ["nightly", str(CONFIG), "--history", str(cwd / "history"), "--junit", str(cwd / "junit.xml"), "--json"]
    return [sys.executable, "-m", "launcher", *args, *options(cwd, slower, repeats)]


def night(lab: Lab, cwd: Path, slower: float = 0.0) -> tuple[int, dict[str, Any]]:
    done = lab.run(*command(cwd, slower), cwd=cwd)
    assert done.stdout, done.stderr
    (config,) = json.loads(done.stdout)["configs"]
    return done.returncode, config


def verdicts(config: dict[str, Any]) -> dict[str, str]:
    return {gate["gate"]: gate["verdict"] for gate in config["comparison"]["gates"]}


@pytest.mark.nightly
def test_the_verdicts_on_five_nights_are_right(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "steady").mkdir()
    (tmp_path / "steady" / "sitecustomize.py").write_text(STEADY)
    for earlier in range(3):
        code, config = night(lab, tmp_path)
        assert (code, config["verdict"], config["state"]) == (0, "no verdict", "completed"), config
        (reason,) = config["reasons"]
        assert reason.startswith(f"{earlier} valid run")

    code, config = night(lab, tmp_path, slower=0.12)
    assert (code, config["verdict"]) == (1, "regressed"), config["reasons"]
    found = verdicts(config)
    assert (found["validity"], found["throughput"], found["memory"]) == ("passed", "regressed", "passed")
    (judgement,) = (g["judgements"][0] for g in config["comparison"]["gates"] if g["gate"] == "throughput")
    assert 8 < judgement["change"] < 14, "0.12 / 1.12 = 10.7 %"

    code, config = night_in_which_a_node_dies(lab, tmp_path)
    assert (code, config["verdict"]) == (1, "failed")
    assert "after it had run" in config["reasons"][0]
    assert f"node {SECOND} is down" in config["reasons"][0]
    page = (tmp_path / "history" / config["report"]).read_text()
    assert f"node {SECOND} is down" in page
    cases = {c.get("name"): [child.tag for child in c] for c in ET.parse(tmp_path / "junit.xml").iter("testcase")}
    skipped = ("throughput", "latency", "memory", "parity")
    assert cases == {"validity": ["failure"]} | {gate: ["skipped"] for gate in skipped}

    kill_a_nightly_once_it_has_submitted(lab, tmp_path)
    code, config = night(lab, tmp_path)
    assert len(list((tmp_path / "history" / "nights").iterdir())) == 6, "it went on with the night that was killed"
    assert len(list((tmp_path / "runs" / "lab-2node").iterdir())) == 6, "and submitted nothing again"
    assert verdicts(config)["throughput"] == "passed", config["reasons"]
    assert (code, len(config["comparison"]["baseline"])) == (0, 3), "neither the slow nor the failed night is in it"
    kept = History(tmp_path / "history").records()
    assert [record.verdict for record in kept][3:5] == ["regressed", "failed"]
    index = (tmp_path / "history" / "index.html").read_text()
    assert all(record.sample.run_id in index for record in kept)


def begun(lab: Lab, cwd: Path, repeats: int = 3) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        control.inside(lab.spec, command(cwd, repeats=repeats)),
        cwd=cwd,
        env=os.environ | importable(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_a_nightly_once_it_has_submitted(lab: Lab, cwd: Path) -> None:
    runs = cwd / "runs" / "lab-2node"
    before = len(list(runs.glob("*/submissions.json")))
    process = begun(lab, cwd)

    def submitted() -> bool:
        """The id is written once sbatch has answered."""
        return len([f for f in runs.glob("*/submissions.json") if '"job_id": ""' not in f.read_text()]) != before

    until(submitted)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)


def night_in_which_a_node_dies(lab: Lab, cwd: Path) -> tuple[int, dict[str, Any]]:
    process = begun(lab, cwd, repeats=30)
    runs = cwd / "runs" / "lab-2node"
    before = set(runs.iterdir())
    try:

        def measuring() -> bool:
            assert process.poll() is None, process.communicate()
            ours = set(runs.iterdir()) - before
            files = (file for run in ours for file in run.glob("events/rank-00000.jsonl"))
            return any("expert_load" in file.read_text() for file in files)

        until(measuring)
        control.node(lab.spec.root, "kill", SECOND)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        control.node(lab.spec.root, "start", SECOND)
    assert out, err
    (config,) = json.loads(out)["configs"]
    return process.returncode, config
