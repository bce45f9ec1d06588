"""A stand-in for a whole checkpoint: every header as it is, and holes for data, which take no disk."""

import json
import os
from pathlib import Path

from launcher.config import load
from launcher.schema import Model
from moe_ep.headers import CONFIG, INDEX, encode_header
from moe_ep.tensors import TensorSpec, model_specs
from tests.checkout import CONFIGS


def model_of(name: str) -> Model:
    """The model that configs/NAME.yaml runs."""
    return load(CONFIGS / f"{name}.yaml", (), {"SCRATCH": "/scratch/user"}).model


def write_holes(folder: Path, model: Model, shards: int) -> int:
    """Write the stand-in; returns the number of its tensors."""
    assert model.attention_sizes is not None
    specs = list(model_specs(model.sizes, model.attention_sizes))
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(model.sizes.to_config()))
    weight_map: dict[str, str] = {}
    each = -(-len(specs) // shards)
    for number in range(shards):
        part: dict[str, TensorSpec] = dict(specs[number * each : (number + 1) * each])
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header = encode_header(part, {"format": "pt"})
        (folder / file).write_bytes(header)
        os.truncate(folder / file, len(header) + sum(spec.nbytes for spec in part.values()))
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return len(specs)
