"""A made model is a whole one, in the form that DeepSeek's checkpoints have."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from transformers import DeepseekV4Config

from engine.names import module_name
from moe_ep.checkpoint import Checkpoint
from moe_ep.synthetic import TINY, TINY_ATTENTION, write_checkpoint
from moe_ep.tensors import dense_specs, model_specs
from tests.checkout import ROOT
from tests.waiting import PATIENCE_S


def test_it_has_every_tensor_of_its_sizes_and_no_other(tmp_path: Path) -> None:
    shape, attention = replace(TINY, mtp_layers=1), replace(TINY_ATTENTION, ratios=(*TINY_ATTENTION.ratios, 0))
    write_checkpoint(tmp_path / "model", shape, attention=attention)
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert (checkpoint.shape, checkpoint.headers.attention) == (shape, attention)
    assert {name: info.spec for name, info in checkpoint.tensors.items()} == dict(model_specs(shape, attention))


def test_transformers_reads_its_sizes(made: Path) -> None:
    config = DeepseekV4Config.from_pretrained(made)
    kinds = ["sliding", "compressed_sparse", "heavily_compressed", "compressed_sparse"]
    assert config.layer_types == [f"{kind}_attention" for kind in kinds]
    assert config.mlp_layer_types == ["hash_moe", "moe", "moe", "moe"]
    assert (config.hidden_size, config.o_groups, config.sliding_window) == (128, 4, 16)
    assert config.rope_parameters["compress"]["rope_type"] == "yarn"


def test_the_same_seed_writes_the_same_bytes(made: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "again", TINY, seed=0, attention=TINY_ATTENTION)
    for file in made.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_every_dense_tensor_has_a_place_in_transformers_model() -> None:
    layers = (None, *range(TINY.layers))
    names = [
        module_name(name, layer)
        for layer in layers
        for name in dense_specs(TINY, TINY_ATTENTION, layer)
        if not name.endswith(".scale")
    ]
    assert len(set(names)) == len(names)


def test_the_command_makes_one_or_says_what_is_wrong(tmp_path: Path) -> None:
    def make(*args: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "moe_ep.synthetic", str(tmp_path / "made"), *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)

    wrong = make("--vocab", "100")
    assert (wrong.returncode, "vocab = 100 must be at least 263" in wrong.stderr) == (2, True)
    assert not (tmp_path / "made").exists()
    assert make("--layers", "2", "--experts", "8").returncode == 0
    assert json.loads((tmp_path / "made" / "config.json").read_text())["n_routed_experts"] == 8
    again = make()
    assert (again.returncode, "a checkpoint is not overwritten" in again.stderr) == (2, True)
