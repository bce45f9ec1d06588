"""What a user may write, and what is said where it is wrong."""

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from jobs.request import REQUEST, ProbeRequest
from launcher.config import layer_numbers, load, parity_layers
from launcher.errors import InputError
from launcher.fit import plan_memory
from launcher.plan import make_plan, problems_on_site
from launcher.schema import Shape
from moe_ep.shape import ModelShape
from tests.checkout import CONFIGS

TINY = CONFIGS / "tiny.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_in_the_repository_loads_and_is_named_as_its_file(path: Path) -> None:
    assert load(path).run.name == path.stem


def test_the_shape_of_a_model_file_has_the_fields_of_the_library() -> None:
    assert list(Shape.model_fields) == [f.name for f in fields(ModelShape)]


def test_overrides_win_over_every_file_and_are_read_as_yaml() -> None:
    config = load(
        TINY,
        [
            "topology.ranks_per_node=2",
            "topology.tp=2",
            "topology.ep=2",
            "job.layers=[1, 3]",
            "model.shape.experts=12",
            "cluster.env.NCCL_DEBUG=INFO",
            "cluster.name=laptop",
        ],
    )
    assert (config.topology.ranks, config.topology.ep) == (2, 2)
    assert layer_numbers(config) == [1, 3]
    assert config.model.sizes.experts == 12
    assert config.cluster.env["NCCL_DEBUG"] == "INFO"
    assert config.cluster.env["OMP_NUM_THREADS"] == 1, "the other keys of the section stay"
    assert config.cluster.name == "laptop"


def test_another_cluster_can_be_put_under_a_run() -> None:
    config = load(CONFIGS / "v4flash-1node.yaml", ["cluster=local", "model=tiny"])
    assert (config.cluster.name, config.model.name) == ("local", "tiny")


def test_parity_looks_at_one_layer_of_each_routing_unless_told() -> None:
    assert parity_layers(load(TINY)) == [0, 2]
    assert parity_layers(load(TINY, ["job.layers=[3]"])) == [3]
    assert parity_layers(load(TINY, ["job.parity.layers=[1]"])) == [1]


def test_numbers_may_be_written_without_a_dot() -> None:
    config = load(TINY, ["job.parity.tolerance=1e-6", "model.shape.routed_scaling=25e-1"])
    assert (config.job.parity.tolerance, config.model.sizes.routed_scaling) == (1e-6, 2.5)


def test_yaml_merges_work_as_everywhere(copied: Path) -> None:
    text = (copied / "tiny.yaml").read_text().replace("limits: {", "limits: {<<: {time_min: 3, rank_timeout_s: 7}, ")
    (copied / "tiny.yaml").write_text(text)
    assert load(copied / "tiny.yaml").limits.time_min == 10, "what is written wins over what is merged"


def test_a_path_to_a_cluster_is_meant_from_the_runs_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text((CONFIGS / "clusters/local.yaml").read_text().replace("local", "mine", 1))
    (tmp_path / "run.yaml").write_text(TINY.read_text().replace("cluster: local", "cluster: mine.yaml"))
    assert load(tmp_path / "run.yaml", [f"model={CONFIGS}/models/tiny.yaml"]).cluster.scheduler == "local"


def test_variables_in_paths_come_from_the_environment() -> None:
    config = load(CONFIGS / "v4pro-2node.yaml", environ={"SCRATCH": "/scratch/me"})
    assert config.model.checkpoint == "/scratch/me/models/DeepSeek-V4-Pro"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("topolgy.ep=2", r"topolgy: unknown key; did you mean 'topology'\?"),
        (
            "topology.epp=2",
            r"topology\.epp: unknown key; did you mean 'ep'\? \(there are: dense, ep, expert_tp, nodes,",
        ),
        ("model.shape.hiden=64", r"model\.shape\.hiden: unknown key; did you mean 'hidden'\?"),
        ("backend.impl=triton", r"backend\.impl: 'triton' is wrong: input should be 'auto', .*'triton_kernel'"),
        ("topology.ep=four", r"topology\.ep: 'four' is wrong: input should be a valid integer"),
        ("topology.ep=2.5", r"topology\.ep: 2\.5 is wrong"),
        ("topology.nodes=true", r"topology\.nodes: True is wrong"),
        ("limits={}", r"limits\.time_min: missing, expected int"),
        ("run.name=../x", r"run\.name: '\.\./x' is wrong: must match"),
        ("job.layers=every", r"job\.layers: 'every' is wrong: input should be 'all'; or .* a valid list"),
        ("job.parity.tolerance=0", r"job\.parity\.tolerance: 0 is wrong: input should be greater than 0"),
        ("model.shape.hidden=100", r"model: hidden = 100 must be a positive multiple of 32"),
        ("model.checkpoint=/x", r"model: give either checkpoint .* or synthetic"),
        ("model.synthetic={folder: x, skew: 0.2}", r"skew is for weights that ranks make on their devices"),
        ("topology.ep=3", r"ep: 3 does not divide nodes 1 × ranks_per_node 4 = 4 ranks; use one of 1, 2, 4"),
        ("topology.tp=3", r"tp: 3 does not divide nodes 1 × ranks_per_node 4 = 4 ranks; use one of 1, 2, 4"),
        ("topology.tp=2", r"ep: 4 does not divide tp 2: .* use an ep of 1, 2, or tp 4"),
        ("model.shape.experts=3", r"3 is more than the 3 experts|top_k = 6 is more than experts = 3"),
        ("topology.nodes=2", r"nodes: 2, but local runs on this machine alone; use 1"),
        ("job.layers=[0, 9]", r"job\.layers: \[0, 9\] is not 'all' or a rising list from 0\.\.3"),
        ("job.parity.layers=[7]", r"job\.parity\.layers: \[7\] are not all among the loaded layers"),
        ("job.throughput.batch_sizes=[-1]", r"batch_sizes\.0: -1 is wrong"),
        ("cluster=bevern", r"--set cluster: 'bevern' is not the name of a file .*did you mean 'beverin'\?"),
        ("model=3", r"model: 3 is not the name of a file"),
        ("topology", r"--set topology: expected key=value"),
        ("int=3", r"--set int: unknown key \(there are: backend, cluster"),
        ("topology.int=3", r"--set topology\.int: unknown key"),
        ("cluster.env={'A B;touch x': 1}", r"cluster\.env\.A B;touch x: 'A B;touch x' is wrong: must match"),
        ("cluster.unset=['A B']", r"cluster\.unset\.0: 'A B' is wrong: must match"),
        ("cluster.sbatch_args={'x y': 1}", r"cluster\.sbatch_args\.x y: 'x y' is wrong: must match"),
        ('cluster.partition="p\\nrm -rf x"', r"cluster\.partition: .* is wrong: must match"),
        ('run.folder="a\\0b"', r"run\.folder: .* is wrong: must match"),
        ("run.folder=", r"run\.folder: None is wrong"),
        ("run.seed=99999999999999999999", r"run\.seed: .* less than or equal to"),
        ("run.seed=0x_", r"--set run\.seed=0x_: not YAML"),
        ("model.shape.routed_scaling=.nan", r"routed_scaling: nan is wrong: .* finite"),
        ("model.shape.shared_experts=-1", r"shared_experts = -1 must be a whole number from 0"),
        ("model.shape.layers=1000000000", r"layers = 1000000000 must be"),
        ("job.parity.tolerance=.inf", r"job\.parity\.tolerance: inf is wrong: .* finite"),
        ("job.parity.layers=[]", r"job\.parity\.layers: \[\] is wrong: .*at least 1 item"),
        ("topology.ranks_per_node=1000000", r"ranks_per_node: 1000000 is wrong: .*less than or equal to 64"),
        ("topology=3", r"--set topology: 3 is wrong: expected a section with nodes, ranks_per_node, tp, ep"),
        ("cluster=" + "x" * 5000, r"--set cluster: 'x+' is not the name of a file"),
        ("cluster.scheduler=pbs", r"cluster\.scheduler: 'pbs' is wrong: input should be 'local' or 'slurm'"),
        ("cluster.scratch=/tmp", r"cluster\.scratch: '/tmp' is wrong: must match .*run_id"),
        ("cluster.scratch='/tmp/{run_id}/..'", r"cluster\.scratch: .* is wrong: must match"),
        ("cluster.scratch='x-{run_id}'", r"cluster\.scratch: .* is wrong: must match"),
        ("topology.ep.x=1", r"--set topology\.ep\.x: topology\.ep is a value, it has no keys"),
        ("topology.ep=[", r"--set topology\.ep=\[: not YAML"),
    ],
)
def test_a_wrong_key_gets_one_line_with_the_key_and_the_right_form(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as failure:
        load(TINY, [override])
    assert len(str(failure.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        (
            "{nodes: 1, ranks_per_node: 4, tp: 4, ep: 2, expert_tp: 2}",
            "topology.expert_tp: 2 beside ep 2: experts are either spread over ranks",
        ),
        (
            "{nodes: 1, ranks_per_node: 4, tp: 2, ep: 1, expert_tp: 4}",
            "topology.expert_tp: 4 does not divide tp 2: .* use one of 1, 2",
        ),
        (
            "{nodes: 1, ranks_per_node: 8, tp: 8, ep: 1, expert_tp: 8}",
            "topology.expert_tp: 8 slices of I = 128 are not whole mxfp4 blocks of 32",
        ),
        (
            "{nodes: 1, ranks_per_node: 2, tp: 2, ep: 2, shared_expert: sharded}",
            "topology.shared_expert: 2 slices of the shared expert's 128 rows are not whole fp8 blocks",
        ),
    ],
)
def test_slices_that_cannot_be_cut_are_explained(topology: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as failure:
        load(TINY, [f"topology={topology}"])
    assert len(str(failure.value).splitlines()) == 1


def test_fp8_activations_reach_the_ranks_and_their_groups_are_not_cut() -> None:
    assert load(TINY).backend.activation_dtype == "bf16"
    fp8, two = "backend.activation_dtype=fp8", "topology={nodes: 1, ranks_per_node: 2, tp: 2, ep: 1, expert_tp: 2}"
    assert load(TINY, [fp8]).backend.activation_dtype == "fp8"
    with pytest.raises(InputError, match=r"backend\.activation_dtype: fp8, but 2 slices of I = 128 are not multiples"):
        load(TINY, [fp8, two])
    with pytest.raises(InputError, match=r"backend\.activation_dtype: fp8, but on cpu there is nothing to tune"):
        load(TINY, [fp8, "job.kind=tune"])
    with pytest.raises(InputError, match=r"backend\.activation_dtype: 'fp4' is wrong: input should be 'bf16' or 'fp8'"):
        load(TINY, ["backend.activation_dtype=fp4"])


def test_copies_between_two_gpus_are_turned_off_on_all_ranks_alike(tmp_path: Path) -> None:
    written = []
    for said in ([], ["comm.peer_copies=false"]):
        make_plan(load(CONFIGS / "v4flash-gpus.yaml", said, {}), "id").request().save(tmp_path)
        assert ProbeRequest.load(tmp_path).comm.peer_copies is not bool(said)
        written.append((tmp_path / REQUEST).read_bytes())
    assert written[0] != written[1], "whose hash the ranks compare"
    with pytest.raises(InputError, match=r"comm\.peer_copies: 'maybe' is wrong: input should be a valid boolean"):
        load(TINY, ["comm.peer_copies=maybe"])


MADE = ["model.checkpoint=null", "model.synthetic={skew: 0.3}"]


def test_weights_that_ranks_make_on_their_devices_need_no_folder() -> None:
    plan = make_plan(load(CONFIGS / "v4flash-gpus.yaml", MADE, {}), "id")
    assert problems_on_site(plan) == []
    assert (plan.request().made_skew, plan.request().synthesise) == (0.3, False)
    assert make_plan(load(TINY), "id").request().made_skew is None


@pytest.mark.parametrize("change", ["job.kind=preshard", "job.kind=serve"])
def test_weights_that_are_nowhere_on_disk_are_for_probes(change: str) -> None:
    with pytest.raises(InputError, match=r"synthetic\.folder: missing: a (preshard|serve) job reads a checkpoint"):
        load(TINY, ["model.synthetic.folder=null", "model.presharded=x", "memory.kv=bf16", change], {})
    with pytest.raises(
        InputError, match=r"presharded: the ranks make their weights \(model\.synthetic\); leave it out"
    ):
        load(TINY, ["model.synthetic.folder=null", "model.presharded=x"], {})


GPUS = [("v4flash-gpus", 2), ("v4flash-gpus", 4), ("v4flash-gpus", 8), ("v4pro-gpus", 8)]


@pytest.mark.parametrize("tokens_of", ["the group", "each rank"])
@pytest.mark.parametrize(("name", "gpus"), GPUS)
def test_the_models_fit_the_gpus_of_one_machine(name: str, gpus: int, tokens_of: str) -> None:
    tp = gpus if tokens_of == "the group" else 1
    keys = [f"topology={{nodes: 1, ranks_per_node: {gpus}, tp: {tp}, ep: {gpus}}}"]
    assert plan_memory(load(CONFIGS / f"{name}.yaml", [*MADE, *keys], {})).job.state == "fits"


def test_a_preshard_job_needs_a_folder_and_mtp_layers_have_numbers_after_the_others() -> None:
    with pytest.raises(InputError, match=r"tiny\.yaml: presharded: missing; it is the folder that a preshard job"):
        load(TINY, ["job.kind=preshard"])
    flash = ["job.layers=[3, 43]"]
    assert layer_numbers(load(CONFIGS / "v4flash-1node.yaml", flash)) == [3, 43]
    with pytest.raises(InputError, match=r"rising list from 0\.\.43"):
        load(CONFIGS / "v4flash-1node.yaml", ["job.layers=[3, 44]"])


def test_more_ranks_than_devices_and_more_time_than_the_cluster_gives_are_refused_together() -> None:
    with pytest.raises(InputError) as failure:
        load(
            CONFIGS / "v4pro-2node.yaml",
            [
                "topology={nodes: 2, ranks_per_node: 8, tp: 16, ep: 16}",
                "limits.time_min=721",
            ],
        )
    devices, time = str(failure.value).splitlines()
    assert devices.endswith("ranks_per_node: 8 is more than the 4 devices of a node of beverin")
    assert time.endswith("limits.time_min: 721 is more than beverin's time_limit_min 720")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(CONFIGS, tmp_path / "configs")
    return tmp_path / "configs"


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("tiny.yaml", "runs: {name: x}", r"tiny\.yaml: runs: unknown key; did you mean 'run'\?"),
        ("clusters/local.yaml", "acount: x", r"clusters/local\.yaml: acount: unknown key; did you mean 'account'\?"),
        ("models/tiny.yaml", "chekpoint: x", r"models/tiny\.yaml: chekpoint: unknown key; did you mean 'checkpoint'\?"),
    ],
)
def test_a_mistake_is_placed_in_the_file_that_holds_it(copied: Path, file: str, line: str, message: str) -> None:
    with (copied / file).open("a") as f:
        f.write(line + "\n")
    with pytest.raises(InputError, match=message):
        load(copied / "tiny.yaml")


def test_a_section_in_place_of_a_value_and_a_file_that_is_no_yaml_are_named(copied: Path) -> None:
    document = yaml.safe_load((copied / "tiny.yaml").read_text())
    (copied / "tiny.yaml").write_text(yaml.safe_dump(document | {"limits": 3}))
    with pytest.raises(InputError, match=r"tiny\.yaml: limits: 3 is wrong"):
        load(copied / "tiny.yaml")
    (copied / "clusters/local.yaml").write_text("name: [")
    with pytest.raises(InputError, match=r"clusters/local\.yaml: not YAML: while parsing"):
        load(copied / "tiny.yaml")
    (copied / "tiny.yaml").write_text("limits: {time_min: 1}\nlimits: {time_min: 2}\n")
    with pytest.raises(InputError, match=r"tiny\.yaml: not YAML: key 'limits' stands twice .*line 1"):
        load(copied / "tiny.yaml")
    (copied / "tiny.yaml").write_text("- a\n- b\n")
    with pytest.raises(InputError, match=r"tiny\.yaml: expected keys and values, found list"):
        load(copied / "tiny.yaml")
    with pytest.raises(InputError, match=r"nope\.yaml: no such file"):
        load(copied / "nope.yaml")
