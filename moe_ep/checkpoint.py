"""A DeepSeek-V4 checkpoint on disk: its tensors by header, and reading just those that are asked for."""

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ep.fp8 import block_grid
from moe_ep.shape import MXFP4_BLOCK, ModelShape

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

# Packed e2m1 and e8m0 are bytes here, whatever torch calls them.
_DTYPES = {
    "I8": torch.uint8,
    "F8_E8M0": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class TensorSpec:
    """dtype as safetensors names it, and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, from its file's header."""

    name: str
    file: Path
    spec: TensorSpec
    offset: int
    """Of its first byte in the file."""
    nbytes: int


class CheckpointError(ValueError):
    """The checkpoint is not what was expected; the message names the file or the tensor."""


def layer_prefix(layer: int) -> str:
    """Where the tensors of a layer's MoE stand."""
    return f"layers.{layer}.ffn"


def expert_specs(shape: ModelShape) -> dict[str, TensorSpec]:
    """Tensors of one routed expert, below its prefix."""
    hidden, inner = shape.hidden, shape.intermediate
    gate_up = TensorSpec("I8", (inner, hidden // 2)), TensorSpec("F8_E8M0", (inner, hidden // MXFP4_BLOCK))
    down = TensorSpec("I8", (hidden, inner // 2)), TensorSpec("F8_E8M0", (hidden, inner // MXFP4_BLOCK))
    return {
        f"{name}.{part}": spec
        for name, specs in (("w1", gate_up), ("w2", down), ("w3", gate_up))
        for part, spec in zip(("weight", "scale"), specs, strict=True)
    }


def shared_specs(shape: ModelShape) -> dict[str, TensorSpec]:
    """Tensors of a layer's shared expert, below its prefix."""
    hidden, inner = shape.hidden, shape.shared_experts * shape.intermediate
    sizes = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
    weights = {f"{name}.weight": TensorSpec("F8_E4M3", size) for name, size in sizes.items()}
    scales = {f"{name}.scale": TensorSpec("F8_E8M0", block_grid(*size)) for name, size in sizes.items()}
    return weights | scales


def gate_specs(shape: ModelShape, *, hash_layer: bool) -> dict[str, TensorSpec]:
    """Tensors of a layer's router, below its prefix."""
    weight = {"weight": TensorSpec("BF16", (shape.experts, shape.hidden))}
    if hash_layer:
        return weight | {"tid2eid": TensorSpec("I64", (shape.vocab, shape.top_k))}
    return weight | {"bias": TensorSpec("F32", (shape.experts,))}


class Checkpoint:
    """A checkpoint directory: config.json, an index, and safetensors shards.

    Only headers are read on opening. `bytes_read` counts what `read` has fetched since.
    """

    def __init__(self, path: Path, shape: ModelShape, tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.shape = shape
        self.tensors = tensors
        self.bytes_read = 0

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read config.json, the index and every shard's header.

        Raises
        ------
        CheckpointError
            If a file is missing or unreadable, or the model is not a DeepSeek-V4 with mxfp4 experts.
        """
        try:
            shape = ModelShape.from_config(_read_json(path / CONFIG), where=str(path / CONFIG))
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        weight_map = _read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{path / INDEX}: expected a weight_map from tensor names to file names")
        headers = {file: {info.name: info for info in _headers(path / file)} for file in set(weight_map.values())}
        missing = sorted(name for name, file in weight_map.items() if name not in headers[file])
        if missing:
            raise CheckpointError(
                f"{path / weight_map[missing[0]]}: tensor {missing[0]} of the index is not in the file "
                f"({len(missing)} missing in all)"
            )
        # A name may stand in several files: the index says which one counts.
        return cls(path, shape, {name: headers[file][name] for name, file in weight_map.items()})

    def info(self, name: str, expected: TensorSpec) -> TensorInfo:
        """A tensor's header, checked against what the model's sizes say.

        Raises
        ------
        CheckpointError
            If it is missing or has another dtype or shape; names tensor and file.
        """
        found = self.tensors.get(name)
        if found is None:
            raise CheckpointError(f"{self.path}: no tensor {name}, expected {expected.dtype} {list(expected.shape)}")
        if found.spec != expected:
            raise CheckpointError(
                f"{found.file}: {name} is {found.spec.dtype} {list(found.spec.shape)}, "
                f"expected {expected.dtype} {list(expected.shape)}"
            )
        itemsize = _DTYPES[expected.dtype].itemsize
        if found.nbytes != math.prod(expected.shape) * itemsize:
            raise CheckpointError(f"{found.file}: the header gives {name} {found.nbytes} bytes, which its shape denies")
        return found

    def read(self, name: str, expected: TensorSpec) -> Tensor:
        """One tensor on the CPU; packed e2m1 and e8m0 come as uint8, bit for bit. Errors as `info`."""
        info = self.info(name, expected)
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        # Read, not mapped: on unified memory a mapped file's pages take the device's memory a second time.
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset)
            view, done = memoryview(data.numpy().data), 0
            while done < info.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{info.file}: truncated, {name} ends past the end of the file")
                done += count
        self.bytes_read += info.nbytes
        return data.view(_DTYPES[info.spec.dtype]).view(info.spec.shape)

    def read_part(self, prefix: str, specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
        """The tensors of one part of a layer (expert, shared expert, router), by name below `prefix`."""
        return {name: self.read(f"{prefix}.{name}", spec) for name, spec in specs.items()}

    def read_expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """w1, w2, w3 of one routed expert: `.weight` and `.scale`, uint8."""
        return self.read_part(f"{layer_prefix(layer)}.experts.{expert}", expert_specs(self.shape))

    def read_shared_expert(self, layer: int) -> dict[str, Tensor]:
        """w1, w2, w3 of the shared expert: `.weight` float8_e4m3fn and `.scale` uint8."""
        return self.read_part(f"{layer_prefix(layer)}.shared_experts", shared_specs(self.shape))

    def read_gate(self, layer: int) -> dict[str, Tensor]:
        """The router: `weight` bf16, and `bias` f32 or, in a hash layer, `tid2eid` int64."""
        specs = gate_specs(self.shape, hash_layer=self.shape.is_hash_layer(layer))
        gate = self.read_part(f"{layer_prefix(layer)}.gate", specs)
        table = gate.get("tid2eid")
        if table is not None and not 0 <= int(table.min()) <= int(table.max()) < self.shape.experts:
            raise CheckpointError(
                f"{self.path}: {layer_prefix(layer)}.gate.tid2eid names experts outside 0..{self.shape.experts - 1}"
            )
        return gate


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _headers(file: Path) -> Iterator[TensorInfo]:
    """A safetensors file begins with the length of its header (u64) and the header (JSON)."""
    try:
        with file.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            total = os.fstat(f.fileno()).st_size
            if length > total:
                raise ValueError("the header is longer than the file")
            header = json.loads(f.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            spec = TensorSpec(entry["dtype"], tuple(entry["shape"]))
            info = TensorInfo(name, file, spec, offset=8 + length + start, nbytes=end - start)
            if start < 0 or end < start:
                raise ValueError(f"{name} has data_offsets {start}, {end}")
            if info.offset + info.nbytes > total:
                raise CheckpointError(f"{file}: truncated, {name} ends past the end of the file")
            yield info
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file, but the index names it") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {type(error).__name__}: {error}") from None
