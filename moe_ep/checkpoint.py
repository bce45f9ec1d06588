"""A DeepSeek-V4 checkpoint on disk: single tensors of it, checked against what the model's sizes say."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_ep.headers import CheckpointError, CheckpointHeaders, FileStamp, TensorInfo, checked, read_headers
from moe_ep.ranges import Piece, plan_reads
from moe_ep.reading import fetch
from moe_ep.shape import ModelShape
from moe_ep.tensors import TensorSpec, expert_specs, gate_specs, layer_prefix, shared_specs

# Packed e2m1 and e8m0 are bytes here, whatever torch calls them.
DTYPES = {
    "I8": torch.uint8,
    "U8": torch.uint8,
    "F8_E8M0": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
}


class Checkpoint:
    """A checkpoint directory: config.json, an index, and safetensors shards.

    Only headers are read on opening. `bytes_read` counts what has been fetched since.
    """

    def __init__(self, headers: CheckpointHeaders) -> None:
        self.headers = headers
        self.path = headers.path
        self.shape = headers.shape
        self.tensors: Mapping[str, TensorInfo] = headers.tensors
        self.stamps: Mapping[Path, FileStamp] = headers.stamps
        self.bytes_read = 0

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read the folder's headers. Raises `CheckpointError` as `read_headers`."""
        return cls(read_headers(path))

    def info(self, name: str, expected: TensorSpec) -> TensorInfo:
        """A tensor's header, checked against what the model's sizes say.

        Raises
        ------
        CheckpointError
            If it is missing or has another dtype or shape; names tensor and file.
        """
        return checked(self.path, self.tensors, name, expected)

    def read(self, name: str, expected: TensorSpec) -> Tensor:
        """One tensor on the CPU; packed e2m1 and e8m0 come as uint8, bit for bit. Errors as `info` and `fetch`."""
        return self.read_part("", {name: expected})[name]

    def read_part(self, prefix: str, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
        """The tensors of one part of a layer (expert, shared expert, router), by name below `prefix`."""
        tensors = {name: torch.empty(spec.shape, dtype=DTYPES[spec.dtype]) for name, spec in specs.items()}
        dot = f"{prefix}." if prefix else ""
        pieces = [piece_of(self.info(f"{dot}{name}", spec), host_bytes(tensors[name])) for name, spec in specs.items()]
        self.bytes_read += fetch(plan_reads(pieces), self.stamps, threads=1)
        return tensors

    def read_expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """w1, w2, w3 of one routed expert: `.weight` and `.scale`, uint8."""
        return self.read_part(f"{layer_prefix(self.shape, layer)}.experts.{expert}", expert_specs(self.shape))

    def read_shared_expert(self, layer: int) -> dict[str, Tensor]:
        """w1, w2, w3 of the shared expert: `.weight` float8_e4m3fn and `.scale` uint8."""
        return self.read_part(f"{layer_prefix(self.shape, layer)}.shared_experts", shared_specs(self.shape))

    def read_gate(self, layer: int) -> dict[str, Tensor]:
        """The router: `weight` bf16, and `bias` f32 or, in a hash layer, `tid2eid` int64."""
        specs = gate_specs(self.shape, hash_layer=self.shape.is_hash_layer(layer))
        prefix = f"{layer_prefix(self.shape, layer)}.gate"
        gate = self.read_part(prefix, specs)
        if "tid2eid" in gate:
            check_table(gate["tid2eid"], self.shape, self.tensors[f"{prefix}.tid2eid"])
        return gate


def check_table(table: Tensor, shape: ModelShape, info: TensorInfo) -> None:
    """Raise `CheckpointError` if a hash layer's table names experts that do not exist."""
    if not 0 <= int(table.min()) <= int(table.max()) < shape.experts:
        raise CheckpointError(f"{info.file}: {info.name} names experts outside 0..{shape.experts - 1}")


def host_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


def piece_of(info: TensorInfo, target: memoryview) -> Piece:
    """A whole tensor into `target`."""
    return Piece(info.name, info.file, info.offset, info.nbytes, target)
