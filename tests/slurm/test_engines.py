"""Engines that are programs of their own over two nodes of a real Slurm; small programs stand in for them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.config import load
from moe_ep.synthetic import write_checkpoint
from tests.checkout import CONFIGS
from tests.engines.test_external import PROGRAM, START
from tests.slurm.conftest import Lab
from tests.slurm.test_runs import run_of, status
from tests.waiting import until


def write_config(folder: Path, engine: str, layout: str, env: dict[str, str]) -> Path:
    """A run of one engine on the lab's two nodes, two ranks each."""
    write_checkpoint(folder / "model", load(CONFIGS / "tiny.yaml", []).model.sizes)
    model = (CONFIGS / "models" / "tiny.yaml").read_text()
    lines = [line for line in model.splitlines() if not line.startswith(("synthetic:", "  folder:"))]
    (folder / "model.yaml").write_text("\n".join([*lines, f"checkpoint: {folder / 'model'}"]))
    command = [sys.executable, str(PROGRAM), *START[engine]]
    settings = {"name": engine, "host": "0.0.0.0", "port": 0, "command": command, "drain_s": 5, "env": env}
    config = folder / "serve.yaml"
    config.write_text(
        f"run: {{name: serve}}\ncluster: {CONFIGS / 'clusters' / 'lab.yaml'}\nmodel: {folder / 'model.yaml'}\n"
        f"topology: {{nodes: 2, ranks_per_node: 2, {layout}}}\n"
        "job: {kind: serve}\nmemory: {context: 256, batch: 4}\nlimits: {time_min: 5, rank_timeout_s: 60}\n"
        f"engine: {json.dumps(settings)}\n"
    )
    return config


def found(lab: Lab, cwd: Path) -> dict[str, Any]:
    (one,) = status(lab, cwd, "serve")
    return one


def stages(run: Path, rank: int) -> list[str]:
    lines = (run / "events" / f"rank-{rank:05d}.jsonl").read_text().splitlines()
    return [event["stage"] for line in lines if (event := json.loads(line))["event"] == "begin"]


def test_vllm_serves_over_two_nodes_until_it_is_cancelled(lab: Lab, tmp_path: Path) -> None:
    config = write_config(tmp_path, "vllm", "tp: 4, ep: 1, expert_tp: 4", {"ENGINE_TEST": "own-ranks"})
    done = lab.launcher("submit", str(config), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    until(lambda: "ready" in found(lab, tmp_path)["progress"] or found(lab, tmp_path)["state"] == "failed")
    url = lab.launcher("url", "serve", cwd=tmp_path).stdout.strip()
    assert url.startswith("http://nid"), found(lab, tmp_path)
    code = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1] + '/v1/models', timeout=20).read().decode())"
    answer = lab.run(sys.executable, "-c", code, url, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["data"][0]["id"] == "tiny"
    assert lab.launcher("cancel", "serve", cwd=tmp_path).returncode == 0
    run = run_of(tmp_path, "serve")
    until(lambda: all(stages(run, rank)[-1] == "done" for rank in range(4)))
    assert stages(run, 0) == ["starting", "loading", "warming", "ready", "draining", "done"]
    for rank, node in ((0, 0), (2, 1)):
        log = lab.launcher("logs", "serve", "--rank", str(rank), cwd=tmp_path).stdout
        assert f"vllm node {node} of 2" in log
        assert ("--headless" in log) == (node > 0)


@pytest.mark.parametrize("engine", ["tokenspeed"])
def test_a_part_that_dies_on_another_node_fails_the_run_by_its_name(engine: str, lab: Lab, tmp_path: Path) -> None:
    config = write_config(tmp_path, engine, "tp: 4, ep: 4", {"ENGINE_TEST": "die-loading"})
    done = lab.launcher("submit", str(config), "--follow", cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert found(lab, tmp_path)["first_failing_rank"] == 2
    report = json.loads((run_of(tmp_path, "serve") / "report.json").read_text())
    assert report["failure"]["rank"] == 2
    assert f"{engine} on nid001002 ended by itself: exit code 1" in report["failure"]["error"]
