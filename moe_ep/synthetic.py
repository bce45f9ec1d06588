"""Writing a small checkpoint in DeepSeek-V4's on-disk form, from a seed."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_ep.fp8 import quantise_blocks
from moe_ep.headers import CONFIG, INDEX
from moe_ep.mxfp4 import quantise
from moe_ep.shape import ModelShape
from moe_ep.tensors import gate_specs, layer_prefix


def write_checkpoint(path: Path, shape: ModelShape, *, seed: int = 0) -> None:
    """Write the MoE part of a model: config.json, one safetensors shard a layer, and the index.

    Names, dtypes and packing are DeepSeek-V4's: routed experts I8 + F8_E8M0 (mxfp4), shared expert F8_E4M3 +
    F8_E8M0 (128×128 blocks), gate BF16 with an F32 bias or, in hash layers, an I64 table by token id; MTP
    layers as mtp.N. The weights are normal with variance 1/K, so activations keep their size. The directory
    appears when it is complete.

    Raises
    ------
    FileExistsError
        If `path` exists.
    """
    if path.exists():
        raise FileExistsError(f"{path}: exists; a checkpoint is not overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        unfinished = Path(folder) / "checkpoint"
        unfinished.mkdir()
        _write_files(unfinished, shape, seed)
        try:
            unfinished.rename(path)
        except OSError:
            if not path.exists():
                raise
            raise FileExistsError(f"{path}: another process wrote it meanwhile") from None


def _write_files(path: Path, shape: ModelShape, seed: int) -> None:
    (path / CONFIG).write_text(json.dumps(shape.to_config(), indent=2) + "\n")
    prefixes = [layer_prefix(shape, layer) for layer in shape.all_layers]
    weight_map: dict[str, str] = {}
    total = 0
    for i, prefix in enumerate(prefixes):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        file = f"model-{i + 1:05d}-of-{len(prefixes):05d}.safetensors"
        tensors = dict(_layer_tensors(prefix, shape, hash_layer=shape.is_hash_layer(i), generator=generator))
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _layer_tensors(
    prefix: str, shape: ModelShape, *, hash_layer: bool, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    hidden, inner = shape.hidden, shape.intermediate

    def normal(rows: int, columns: int) -> Tensor:
        weight: Tensor = torch.randn(rows, columns, generator=generator) / columns**0.5
        return weight

    for e in range(shape.experts):
        for name, size in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
            weight, scale = quantise(normal(*size))
            yield f"{prefix}.experts.{e}.{name}.weight", weight.view(torch.int8)
            yield f"{prefix}.experts.{e}.{name}.scale", scale.view(torch.float8_e8m0fnu)
    inner *= shape.shared_experts
    for name, size in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
        weight, scale = quantise_blocks(normal(*size))
        yield f"{prefix}.shared_experts.{name}.weight", weight
        yield f"{prefix}.shared_experts.{name}.scale", scale.view(torch.float8_e8m0fnu)
    gate = {
        "weight": lambda: normal(shape.experts, hidden).bfloat16(),
        "bias": lambda: torch.randn(shape.experts, generator=generator) * 0.1,
        "tid2eid": lambda: (
            torch.rand(shape.vocab, shape.experts, generator=generator).argsort(-1)[:, : shape.top_k].contiguous()
        ),
    }
    for name in gate_specs(shape, hash_layer=hash_layer):
        yield f"{prefix}.gate.{name}", gate[name]()
