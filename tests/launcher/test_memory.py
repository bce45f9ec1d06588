"""What a rank would hold: the published figures of DeepSeek-V4 on MI300A, and what is refused."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.config import load
from launcher.errors import InputError
from launcher.fit import MemoryPlan, plan_memory
from launcher.memory import Item, RankMemory, kv_bytes
from launcher.plan import make_plan, problems_on_site
from launcher.show_memory import describe
from moe_ep.footprint import PEER_BYTES, loading_bytes
from moe_ep.headers import CONFIG, INDEX
from moe_ep.reading import buffer_bytes
from moe_ep.synthetic import write_checkpoint
from tests.checkout import CONFIGS, ROOT, importable
from tests.waiting import PATIENCE_S

PUBLISHED_DENSE = (
    "shared experts",
    "routers",
    "dense weights, sharded by TP",
    "dense weights, replicated",
    "embeddings and head",
)


def planned(name: str, *overrides: str) -> MemoryPlan:
    return plan_memory(load(CONFIGS / f"{name}.yaml", overrides, {"SCRATCH": "/scratch/user"}))


def gb(rank: RankMemory, names: Sequence[str]) -> float:
    """Of the whole model."""
    return sum(item.model for item in rank.items if item.name in names) / 1e9


@pytest.mark.parametrize(
    ("name", "experts", "with_dense"),
    [
        ("v4flash-1node", 36.8, 45.8),
        ("v4flash-2node", 18.4, 27.4),
        ("v4pro-2node", 102.8, 131.9),
        ("v4pro-4node", 51.4, 80.6),
    ],
)
def test_experts_and_replicated_dense_weights_are_the_published_gigabytes(
    name: str, experts: float, with_dense: float
) -> None:
    plan = planned(name, "topology.dense=replicated", "topology.shared_expert=replicated")
    rank = plan.ranks[-1]
    assert gb(rank, ["routed experts"]) == pytest.approx(experts, abs=0.05)
    mtp = gb(rank, ["MTP layers"]) - gb(rank, ["routed experts"]) / (43 if "flash" in name else 61)
    assert gb(rank, ["routed experts", *PUBLISHED_DENSE]) + mtp == pytest.approx(with_dense, abs=0.15)


def test_with_tp_for_the_dense_part_pro_on_two_nodes_takes_108_to_110_gb_a_rank() -> None:
    rank = planned("v4pro-2node", "topology.shared_expert=sharded").ranks[0]
    assert 108 <= gb(rank, ["routed experts", *PUBLISHED_DENSE]) <= 110


def test_the_report_that_began_this_is_refused_as_it_was_found() -> None:
    ep1, ep4 = planned("repro-1node-ep1"), planned("repro-1node-ep4")
    assert ep1.job.state == ep4.job.state == "does not fit"
    assert {round(rank.items[0].job / 1e9) for rank in ep1.ranks} == {822}
    assert {round(rank.items[0].job / 1e8) for rank in ep4.ranks} == {2055}
    assert ep4.job.advice == ("4 nodes (topology.nodes=4, tp=16, ep=16)",)
    assert describe(ep4.job).startswith("does not fit: 227.6 GB of 125.8 GB a rank; would fit: 4 nodes")


def test_pro_on_two_nodes_is_tight_as_a_probe_and_too_large_as_a_whole_and_comfortable_on_four() -> None:
    two, four = planned("v4pro-2node"), planned("v4pro-4node")
    assert (two.job.state, two.model.state) == ("tight", "does not fit")
    assert (four.job.state, four.model.state) == ("fits", "fits")
    assert [planned(f"v4flash-{n}node").model.state for n in (1, 2)] == ["fits", "fits"]


@pytest.mark.parametrize(("engine", "slices"), [("vllm", True), ("tokenspeed", False)])
def test_an_engine_that_is_a_program_holds_the_whole_model_and_is_advised_what_it_can_do(
    engine: str, slices: bool
) -> None:
    four = planned(f"serve-v4pro-{engine}")
    assert (four.job.state, four.job.needed) == ("fits", four.model.needed)
    spread = ["topology.ep=1", "topology.expert_tp=8"] if slices else ["topology.ep=8"]
    two = planned(f"serve-v4pro-{engine}", "topology.nodes=2", "topology.tp=8", *spread)
    assert two.job.state == "does not fit"
    more = "expert_tp=16" if slices else "ep=16"
    assert f"4 nodes (topology.nodes=4, tp=16, {more})" in two.job.advice


def test_a_service_of_a_long_context_is_told_that_a_shorter_one_would_fit() -> None:
    plan = planned("serve-v4flash-1node", "memory.context=1048576", "memory.batch=16")
    assert plan.job.state == "does not fit"
    (shorter,) = [text for text in plan.job.advice if text.startswith("memory.context=")]
    assert planned("serve-v4flash-1node", shorter, "memory.batch=16").job.state == "fits"


def test_what_is_advised_fits() -> None:
    advised = [
        ("repro-1node-ep4", ["topology.nodes=4", "topology.tp=16", "topology.ep=16"]),
        ("v4flash-1node", ["memory.context=131072", "memory.batch=64"]),
    ]
    plan = planned("v4flash-1node", "memory.context=1048576", "memory.batch=64")
    assert plan.model.state == "does not fit"
    assert "memory.context=131072" in plan.model.advice
    for name, overrides in advised:
        assert planned(name, *overrides).model.state == "fits"


def test_advice_names_slicing_and_sharding_where_they_suffice() -> None:
    shared = planned("v4pro-2node", "topology.shared_expert=replicated", "cluster.device_memory_gb=124")
    assert shared.job.state == "does not fit"
    assert "topology.shared_expert=sharded (tight)" in shared.job.advice
    dense = planned("v4pro-4node", "topology.dense=replicated", "cluster.device_memory_gb=98")
    assert any(text.startswith("topology.dense=sharded") for text in dense.model.advice)
    ep = planned("v4pro-4node", "topology.ep=4")
    assert "topology.ep=16" in ep.job.advice


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("v4pro-2node", ()),
        ("repro-1node-ep4", ("topology.shared_expert=sharded",)),
        ("v4pro-2node", ("topology={nodes: 2, ranks_per_node: 4, tp: 8, ep: 1, expert_tp: 4}",)),
    ],
    ids=["slices that more ranks would cut below fp8 blocks", "sharded on one node", "slices of experts"],
)
def test_advice_names_every_key_that_must_change_with_it(name: str, overrides: tuple[str, ...]) -> None:
    advice = planned(name, *overrides).job.advice
    assert advice
    for text in advice:
        section = ""
        changes = []
        for given, key, value in re.findall(r"(?:(\w+)\.)?(\w+)=(\w+)", text):
            section = given or section
            changes.append(f"{section}.{key}={value}")
        state = planned(name, *overrides, *changes).job.state
        assert state == ("tight" if text.endswith("(tight)") else "fits"), text


@pytest.mark.parametrize(
    ("model", "kind", "per_token", "window"),
    [
        ("v4flash-1node", "fp8", 3850, 3.2e6),
        ("v4flash-1node", "bf16", 6880, None),
        ("v4pro-2node", "fp8", 5511, 4.6e6),
        ("v4pro-2node", "bf16", 9848, None),
    ],
)
def test_the_cache_takes_the_published_bytes(model: str, kind: str, per_token: int, window: float | None) -> None:
    config = load(CONFIGS / f"{model}.yaml", (), {"SCRATCH": "/x"})
    attention, layers = config.model.attention_sizes, config.model.sizes.layers
    assert attention is not None
    assert kind in ("fp8", "bf16")
    small, large = (kv_bytes(attention, layers, n, 1, "fp8" if kind == "fp8" else "bf16") for n in (1 << 19, 1 << 20))
    assert (large - small) / (1 << 19) == pytest.approx(per_token, abs=1)
    if window is not None:
        assert 2 * small - large == pytest.approx(window, rel=0.02)


def test_the_workspace_is_that_of_the_largest_part_of_the_job_and_of_a_pass_when_served() -> None:
    def item(*overrides: str, name: str = "workspace") -> Item:
        return next(i for i in planned("v4pro-4node", *overrides).ranks[0].items if i.name == name)

    probe = item()
    assert probe.job == pytest.approx(probe.model, rel=0.01), "but for what the parity's pass has left"
    assert probe.job > 3 * item("job.throughput.batch_sizes=[2048]").job > 1e9
    small = item("job.throughput.batch_sizes=[1]")
    assert small.job > 450e6 > 100e6 > small.model, "one expert of the dense reference, not a pass of a token"
    assert "parity 494 MB" in small.how, "files reach a GPU a matrix at a time"
    made = item("job.throughput.batch_sizes=[1]", "model.checkpoint=null", "model.synthetic={skew: 0}")
    assert "parity 526.3 MB" in made.how, "which makes all three there"
    written = item("job.throughput.batch_sizes=[1]", "job.kind=preshard", "model.presharded=/x")
    assert 300e6 < written.job < small.job, "an expert on its way to the kernels' order"
    assert item("job.kind=tune").how.startswith("largest pass")
    assert item("model.presharded=/x", "job.throughput.batch_sizes=[1]").how.startswith("loading 0")
    assert item("job.reading.threads=4", name="reading buffers").job == 4 << 24


@pytest.mark.parametrize("name", ["v4flash-1node", "v4flash-2node", "v4pro-2node", "v4pro-4node"])
def test_loading_takes_less_than_a_gibibyte_beside_the_share(name: str) -> None:
    config = load(CONFIGS / f"{name}.yaml", (), {"SCRATCH": "/x"})
    shape, topology = config.model.sizes, config.topology
    local = -(-shape.experts // topology.ep)
    for expert_tp, held in ((1, local), (topology.ranks, shape.experts)):
        taken = loading_bytes(shape, shape.layers, held, expert_tp=expert_tp, shared_tp=topology.shared_tp)
        assert taken + buffer_bytes(config.job.reading.threads) < 1 << 30


def test_a_machine_of_its_own_is_not_told_to_use_more_nodes() -> None:
    plan = planned("tiny", "cluster.device_memory_gb=0.001")
    assert (plan.job.state, plan.job.advice) == ("does not fit", ())


def test_an_odd_number_of_experts_makes_ranks_that_hold_more_and_the_fullest_decides() -> None:
    plan = planned("v4flash-1node", "model.shape.experts=255")
    held = [rank.items[0].job for rank in plan.ranks]
    assert held[0] == held[1] == held[2] == held[3] * 64 // 63
    assert plan.job.needed == plan.ranks[0].total("job") > plan.ranks[3].total("job")


def test_slices_of_experts_and_the_shared_expert_take_their_part() -> None:
    whole, cut = (
        planned("v4flash-1node", "topology.ep=1"),
        planned(
            "v4flash-1node",
            "topology={nodes: 1, ranks_per_node: 4, tp: 4, ep: 1, expert_tp: 4, shared_expert: sharded}",
        ),
    )
    items = [{item.name: item.job for item in plan.ranks[0].items} for plan in (whole, cut)]
    for name in ("routed experts", "shared experts"):
        assert items[0][name] == 4 * items[1][name]


def test_two_gpus_that_write_each_others_memory_hold_it() -> None:
    def communicator(*overrides: str) -> int:
        (item,) = (item for item in planned("v4flash-gpus", *overrides).ranks[0].items if item.name == "communicator")
        return item.job

    without = communicator("comm.peer_copies=false")
    assert communicator() - without == PEER_BYTES
    assert communicator("topology={nodes: 1, ranks_per_node: 4, tp: 4, ep: 4}") == without
    assert communicator("job.kind=tune") == without, "which combines nothing"


def test_a_checkpoint_of_other_sizes_or_a_damaged_one_is_an_input_error(tmp_path: Path) -> None:
    config = load(CONFIGS / "tiny.yaml")
    write_checkpoint(tmp_path / "model", config.model.sizes)
    assert plan_memory(config, tmp_path / "model").source == f"headers of {tmp_path}/model"
    other = load(CONFIGS / "tiny.yaml", ["model.shape.experts=8"])
    with pytest.raises(InputError, match=r"sizes are .*the model file says"):
        plan_memory(other, tmp_path / "model")
    index = tmp_path / "model" / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["layers.3.ffn.experts.7.w2.scale"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"model: no tensor layers\.3\.ffn\.experts\.7\.w2\.scale, expected F8_E8M0"):
        plan_memory(config, tmp_path / "model")
    (tmp_path / "model" / CONFIG).write_text("{}")
    with pytest.raises(InputError, match=r"config\.json: model_type is None"):
        plan_memory(config, tmp_path / "model")


def test_a_checkpoint_that_may_not_be_looked_at_from_here_is_planned_from_the_model_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at = os.stat

    def denied(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path).startswith("/secret/"):
            raise PermissionError(13, "Permission denied", str(path))
        return looked_at(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", denied)
    config = load(CONFIGS / "v4flash-1node.yaml", ["model.checkpoint=/secret/flash"], {"SCRATCH": "/scratch/user"})
    assert plan_memory(config, Path("/secret/flash")).source == "the model file's sizes"
    problems = problems_on_site(make_plan(config, "run"))
    assert problems[0].startswith("model.checkpoint: /secret/flash: no file /secret/flash/config.json")


def launcher(cwd: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    env = os.environ | importable() | {"COLUMNS": "120", "SCRATCH": str(cwd)}
    command = [sys.executable, "-m", "launcher", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_the_command_shows_items_nodes_and_verdicts_and_exits_by_the_job(tmp_path: Path) -> None:
    done = launcher(tmp_path, "plan", str(ROOT / "configs/v4pro-2node.yaml"))
    assert done.returncode == 0, done.stderr
    for text in (
        "v4pro-2node: rank 0–7",
        "102.8 GB",
        "48 of 384 a layer",
        "0, 1",
        "this probe: tight: 117.8 GB of 125.8",
    ):
        assert text in done.stdout
    refused = launcher(tmp_path, "plan", str(ROOT / "configs/repro-1node-ep4.yaml"), "--json")
    assert refused.returncode == 1
    plan = json.loads(refused.stdout)
    assert plan["job"]["state"] == "does not fit"
    assert plan["nodes"][0]["job"] == sum(item["job"] for rank in plan["ranks"] for item in rank["items"])


def test_submit_refuses_what_does_not_fit_and_says_what_would(tmp_path: Path) -> None:
    tiny = [str(ROOT / "configs/tiny.yaml"), "--set", "cluster.device_memory_gb=0.001"]
    done = launcher(tmp_path, "submit", *tiny)
    assert done.returncode == 2
    assert "memory: does not fit: 1.373 MB of 1 MB a rank" in done.stderr
    assert "--force submits it" in done.stderr
    assert list(tmp_path.iterdir()) == []
    shown = launcher(tmp_path, "submit", *tiny, "--dry-run")
    assert "would not be submitted: memory: does not fit" in shown.stdout
    forced = launcher(tmp_path, "submit", *tiny, "--force", "--dry-run")
    assert "would not be submitted" not in forced.stdout
