"""Writing a small checkpoint in DeepSeek-V4's on-disk form, from a seed: `python -m moe_ep.synthetic --help`."""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_ep.attention import AttentionShape
from moe_ep.checkpoint import DTYPES
from moe_ep.fp8 import quantise_blocks
from moe_ep.headers import CONFIG, INDEX
from moe_ep.mxfp4 import quantise
from moe_ep.shape import ModelShape
from moe_ep.tensors import TensorSpec, block_prefix, dense_specs, gate_specs, layer_prefix
from moe_ep.tokens import BOS, EOS, write_tokenizer

CPU = torch.device("cpu")

TINY = ModelShape(
    hidden=128, intermediate=128, layers=4, experts=16, top_k=6, vocab=512, hash_layers=1, routed_scaling=1.5
)
TINY_ATTENTION = AttentionShape(
    heads=4,
    head_dim=32,
    q_rank=64,
    o_groups=4,
    o_rank=32,
    index_heads=2,
    index_dim=32,
    streams=4,
    window=16,
    ratios=(0, 4, 128, 4),
)
"""A V4 with every kind of layer that a laptop computes in milliseconds."""


def write_checkpoint(
    path: Path,
    shape: ModelShape,
    *,
    seed: int = 0,
    attention: AttentionShape | None = None,
    device: torch.device = CPU,
) -> None:
    """Write the MoE part of a model: config.json, one safetensors shard a layer, and the index; with `attention`, all
    of a model that answers, and a tokenizer.

    Names, dtypes and packing are DeepSeek-V4's: routed experts I8 + F8_E8M0 (mxfp4), shared expert F8_E4M3 +
    F8_E8M0 (128×128 blocks), gate BF16 with an F32 bias or, in hash layers, an I64 table by token id; MTP
    layers as mtp.N. The weights are normal with variance 1/K, so activations keep their size; they are made on
    `device`, another kind of which makes others of the same seed. The directory appears when it is complete.

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
        _write_files(unfinished, shape, attention, seed, device)
        try:
            unfinished.rename(path)
        except OSError:
            if not path.exists():
                raise
            raise FileExistsError(f"{path}: another process wrote it meanwhile") from None


def _write_files(
    path: Path, shape: ModelShape, attention: AttentionShape | None, seed: int, device: torch.device
) -> None:
    config = shape.to_config() | ({} if attention is None else _whole_config(attention))
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if attention is not None:
        write_tokenizer(path, shape.vocab)
    blocks = list(shape.all_layers) if attention is None else [*shape.all_layers, None]
    weight_map: dict[str, str] = {}
    total = 0
    for i, layer in enumerate(blocks):
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + i)
        file = f"model-{i + 1:05d}-of-{len(blocks):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        if layer is not None:
            hash_layer = shape.is_hash_layer(layer)
            prefix = layer_prefix(shape, layer)
            output = 1.0 if attention is None else (2 * shape.layers) ** -0.5
            tensors |= dict(
                _layer_tensors(prefix, shape, hash_layer=hash_layer, generator=generator, output_scale=output)
            )
        if attention is not None:
            tensors |= dict(_dense_tensors(shape, attention, layer, generator))
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _whole_config(attention: AttentionShape) -> dict[str, Any]:
    """What config.json says beside the sizes; V4's own values where a small model can have them."""
    return {
        **attention.to_config(),
        "num_key_value_heads": 1,
        "qk_rope_head_dim": min(64, attention.head_dim // 2),
        "index_topk": 8,
        "hc_eps": 1e-6,
        "hc_sinkhorn_iters": 20,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": 1048576,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def _dense_tensors(
    shape: ModelShape, attention: AttentionShape, layer: int | None, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """What is not MoE of a layer, or, where it is None, of no layer."""
    dot = f"{block_prefix(shape, layer)}." if layer is not None else ""
    for name, spec in dense_specs(shape, attention, layer).items():
        values = torch.randn(spec.shape, generator=generator, device=generator.device)
        if spec.dtype == "F8_E4M3":
            output_scale = (2 * shape.layers) ** -0.5 if name == "attn.wo_b.weight" else 1
            weight, scale = quantise_blocks(values * output_scale / spec.shape[-1] ** 0.5)
            yield f"{dot}{name}", weight
            yield f"{dot}{name.removesuffix('weight')}scale", scale.view(torch.float8_e8m0fnu)
        elif spec.dtype != "F8_E8M0":  # a scale comes with its weight
            yield f"{dot}{name}", _dense_values(name, spec, values).to(DTYPES[spec.dtype])


def _dense_values(name: str, spec: TensorSpec, normal: Tensor) -> Tensor:
    """Weights that leave the size of activations as it is, and small differences where a constant would do."""
    if name.endswith(("norm.weight", "_scale")):
        return 1 + 0.1 * normal
    if name in ("embed.weight", "head.weight"):  # logits a few units apart, as a trained model's
        return normal if name == "embed.weight" else 4 * normal / spec.shape[-1] ** 0.5
    return normal / spec.shape[-1] ** 0.5 if len(spec.shape) > 1 else 0.1 * normal


def _layer_tensors(
    prefix: str, shape: ModelShape, *, hash_layer: bool, generator: torch.Generator, output_scale: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    hidden, inner = shape.hidden, shape.intermediate

    def normal(rows: int, columns: int) -> Tensor:
        weight: Tensor = torch.randn(rows, columns, generator=generator, device=generator.device) / columns**0.5
        return weight

    for e in range(shape.experts):
        for name, size in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
            weight, scale = quantise(normal(*size) * (output_scale if name == "w2" else 1))
            yield f"{prefix}.experts.{e}.{name}.weight", weight.view(torch.int8)
            yield f"{prefix}.experts.{e}.{name}.scale", scale.view(torch.float8_e8m0fnu)
    inner *= shape.shared_experts
    for name, size in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
        weight, scale = quantise_blocks(normal(*size) * (output_scale if name == "w2" else 1))
        yield f"{prefix}.shared_experts.{name}.weight", weight
        yield f"{prefix}.shared_experts.{name}.scale", scale.view(torch.float8_e8m0fnu)
    gate = {
        "weight": lambda: normal(shape.experts, hidden).bfloat16(),
        "bias": lambda: torch.randn(shape.experts, generator=generator, device=generator.device) * 0.1,
        "tid2eid": lambda: (
            torch.rand(shape.vocab, shape.experts, generator=generator, device=generator.device)
            .argsort(-1)[:, : shape.top_k]
            .contiguous()
        ),
    }
    for name in gate_specs(shape, hash_layer=hash_layer):
        yield f"{prefix}.gate.{name}", gate[name]()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe_ep.synthetic", description="Make a small DeepSeek-V4 in its on-disk form, with a tokenizer."
    )
    parser.add_argument("folder", type=Path, help="where; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.add_argument("--device", type=torch.device, default=CPU, help="where they are made, e.g. cuda (default cpu)")
    for name in ("hidden", "intermediate", "layers", "experts", "top_k", "vocab", "hash_layers"):
        default = getattr(TINY, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    return parser


def main() -> None:
    """The command line."""
    parser = _parser()
    args = vars(parser.parse_args())
    folder, seed, device = args.pop("folder"), args.pop("seed"), args.pop("device")
    ratios = tuple(TINY_ATTENTION.ratios[i % 4] for i in range(args["layers"]))
    try:
        shape = dataclasses.replace(TINY, **args)
        attention = dataclasses.replace(TINY_ATTENTION, ratios=ratios)
        write_checkpoint(folder, shape, seed=seed, attention=attention, device=device)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
