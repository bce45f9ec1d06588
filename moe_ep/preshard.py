"""Each rank's tensors in one file, in the order that its backend reads: written once, then read from end to end.

A folder holds `manifest.json` and a safetensors file for every rank of a group. The manifest says which checkpoint,
layers, placement, backend and order of weights the files are of; what does not match is refused.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ep.backends.base import MoEBackend
from moe_ep.checkpoint import DTYPES, Checkpoint, checked, host_bytes
from moe_ep.comm import Alone, Combine
from moe_ep.headers import CheckpointError, TensorInfo, encode_header, fingerprint, read_header
from moe_ep.layer import MoELayer, RoutedExperts, SharedExpert
from moe_ep.loading import USUAL, Reading, load_layers
from moe_ep.order import padded, to_kernel_order
from moe_ep.placement import Slice
from moe_ep.ranges import Piece, plan_reads
from moe_ep.reading import Progress, fetch
from moe_ep.routing import Router
from moe_ep.shape import KERNEL_GROUP, MXFP4_BLOCK, ModelShape
from moe_ep.shape import PRESHARD_MANIFEST as MANIFEST
from moe_ep.targets import allocator, into
from moe_ep.tensors import TensorSpec

FORMAT = 1
"""Raised when files of this form are laid out otherwise."""

_WEIGHTS = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
_NAMES = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
_ALIGNMENT = 4096
_HEADER_BYTES_A_TENSOR = 256


@dataclass(frozen=True)
class Manifest:
    """What the files of a folder are of. `experts`: by place in the group, the first and the one after the last."""

    format: int
    source: str
    """Fingerprint of the checkpoint (`moe_ep.headers.fingerprint`)."""
    shape: dict[str, Any]
    layers: tuple[int, ...]
    experts: tuple[tuple[int, int], ...]
    expert_tp: int
    shared_tp: int
    backend: str
    order: str
    """Of codes and scales: "checkpoint", or a fingerprint of what the kernels' order makes of a sample."""
    versions: dict[str, str]

    @property
    def files(self) -> tuple[str, ...]:
        """By place in the group."""
        return tuple(f"rank-{r:05d}-of-{len(self.experts):05d}.safetensors" for r in range(len(self.experts)))


def manifest_of(
    checkpoint: Checkpoint,
    backends: Mapping[int, MoEBackend],
    experts: Sequence[range],
    shared: Slice,
) -> Manifest:
    """The manifest that files of these would have. Reads samples of the checkpoint. Errors as `fingerprint`."""
    backend = next(iter(backends.values()))
    return Manifest(
        format=FORMAT,
        source=fingerprint(checkpoint.headers),
        shape=asdict(checkpoint.shape),
        layers=tuple(backends),
        experts=tuple((r.start, r.stop) for r in experts),
        expert_tp=backend.spec.tp_size,
        shared_tp=shared.size,
        backend=backend.key.impl,
        order=kernel_order() if _in_kernel_order(backend) else "checkpoint",
        versions={name: _version(name) for name in ("moe-ep", "torch", "triton")},
    )


def kernel_order() -> str:
    """A fingerprint of the order of weights that the kernels of this version read."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (32, 256), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, (32, 16), generator=generator, dtype=torch.uint8)
    digest = hashlib.sha256()
    for tensor in to_kernel_order(codes, scales):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_new(folder: Path) -> None:
    """Raise `CheckpointError` if the folder holds a finished pre-sharding: it is not overwritten."""
    if (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder / MANIFEST}: exists; a pre-sharded folder is not overwritten, remove it first")


def write_rank(
    folder: Path,
    manifest: Manifest,
    place: int,
    checkpoint: Checkpoint,
    backends: Mapping[int, MoEBackend],
    shared: Slice,
    device: torch.device,
    *,
    reading: Reading = USUAL,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> int:
    """Write the file of one place of the group, a layer at a time. Returns its bytes. The folder is made if need be.

    Raises
    ------
    CheckpointError
        As `load_layers`, or if the file cannot be written.
    """
    file = folder / manifest.files[place]
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as out:
            layers = _layers(checkpoint, backends, shared, device, reading, on_progress)
            _write(out.fileno(), manifest, layers)
            os.fsync(out.fileno())
        unfinished.replace(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return file.stat().st_size


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Once all files are written: what makes the folder whole."""
    unfinished = folder / f".{MANIFEST}.{os.getpid()}"
    unfinished.write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    unfinished.replace(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Raises `CheckpointError` if there is none, or it is not one of this version."""
    try:
        fields = json.loads((folder / MANIFEST).read_text())
        if fields["format"] != FORMAT:
            raise CheckpointError(f"{folder / MANIFEST}: format {fields['format']}, this version reads {FORMAT}")
        fields["layers"] = tuple(fields["layers"])
        fields["experts"] = tuple((start, stop) for start, stop in fields["experts"])
        return Manifest(**fields)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder / MANIFEST}: no such file: the folder was not pre-sharded, or not to its end; "
            "run the config with job.kind=preshard"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: damaged: {type(error).__name__}: {error}") from None


def check_matches(folder: Path, found: Manifest, wanted: Manifest) -> None:
    """Raise `CheckpointError` if the folder's files are not what this run would write; says in what they differ.

    Layers may be more than are wanted. The versions of packages are not compared: the order of weights is.
    """
    differences = [
        f"{name} is {_short(getattr(found, name))}, this run needs {_short(getattr(wanted, name))}"
        for name in ("source", "shape", "experts", "expert_tp", "shared_tp", "backend", "order")
        if getattr(found, name) != getattr(wanted, name)
    ]
    missing = sorted(set(wanted.layers) - set(found.layers))
    differences += [f"layers {missing} are not in it"] if missing else []
    if differences:
        raise CheckpointError(
            f"{folder / MANIFEST}: pre-sharded for something else: {'; '.join(differences)}; "
            "run job.kind=preshard into another folder, or leave model.presharded out"
        )


def load_rank(
    folder: Path,
    manifest: Manifest,
    place: int,
    backends: Mapping[int, MoEBackend],
    combine: Combine,
    device: torch.device,
    *,
    reading: Reading = USUAL,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> tuple[dict[int, MoELayer], int]:
    """The layers of one place from its file, and the bytes read; nothing is converted.

    Raises
    ------
    CheckpointError
        If the file is not there, damaged, or not what the manifest says.
    StalledError
        As `fetch`.
    """
    header = read_header(folder / manifest.files[place])
    if header.metadata.get("manifest") != _digest(manifest):
        raise CheckpointError(f"{header.file}: was not written with {folder / MANIFEST}; pre-shard anew")
    shape = ModelShape(**manifest.shape)
    layers: dict[int, MoELayer] = {}
    pieces: list[Piece] = []
    for number, backend in backends.items():
        layers[number], wanted = _empty(header.file, header.tensors, number, backend, manifest, shape, combine, device)
        pieces += wanted
    read = fetch(
        plan_reads(pieces),
        {header.file: header.stamp},
        threads=reading.threads,
        direct=reading.direct,
        stall_s=reading.stall_s,
        on_progress=on_progress,
        allocate=allocator(device),
    )
    return layers, read


def _empty(
    file: Path,
    tensors: Mapping[str, TensorInfo],
    number: int,
    backend: MoEBackend,
    manifest: Manifest,
    shape: ModelShape,
    combine: Combine,
    device: torch.device,
) -> tuple[MoELayer, list[Piece]]:
    """A layer with memory that nothing has been read into, and what is to be read."""
    pieces: list[Piece] = []

    def empty(name: str, dtype: str, size: tuple[int, ...]) -> Tensor:
        info = checked(file, tensors, f"{number}.{name}", TensorSpec(dtype, size))
        tensor = torch.empty(size, dtype=DTYPES[dtype], device=device)
        pieces.append(into(info, tensor))
        return tensor

    with device:
        experts = RoutedExperts(backend, shape.swiglu_limit)
    for name in _WEIGHTS:
        weight = experts.get_parameter(name)
        size = tuple(weight.shape) if manifest.order == "checkpoint" else _kernel_shape(name, weight.shape)
        weight.data = empty(name, "U8", size)
    if manifest.order != "checkpoint":
        experts.weight_order = "kernel"  # type: ignore[assignment]  # as the backend says it
    hash_layer = shape.is_hash_layer(number)
    router = Router(
        empty("gate.weight", "BF16", (shape.experts, shape.hidden)),
        shape.top_k,
        shape.routed_scaling,
        None if hash_layer else empty("gate.bias", "F32", (shape.experts,)),
        empty("gate.tid2eid", "I64", (shape.vocab, shape.top_k)) if hash_layer else None,
    )
    shared = None
    if shape.shared_experts:
        inner = shape.shared_experts * shape.intermediate // manifest.shared_tp
        w13, w2 = (
            empty("shared.w13", "BF16", (2 * inner, shape.hidden)),
            empty("shared.w2", "BF16", (shape.hidden, inner)),
        )
        shared = SharedExpert(w13, w2, shape.swiglu_limit)
    layer = MoELayer(router, experts, combine, shared, shared_is_sharded=manifest.shared_tp > 1)
    return layer.to(device), pieces


def _kernel_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Of weights in kernel order, K padded to whole groups."""
    codes = MXFP4_BLOCK if name.endswith("_scale") else 2  # that a byte stands for
    return (*shape[:-1], padded(shape[-1] * codes) // codes)


def _layers(
    checkpoint: Checkpoint,
    backends: Mapping[int, MoEBackend],
    shared: Slice,
    device: torch.device,
    reading: Reading,
    on_progress: Callable[[Progress], None],
) -> Iterator[tuple[int, MoELayer]]:
    """One layer after another, ready to compute."""
    started = time.monotonic()
    for count, (number, backend) in enumerate(backends.items()):

        def told(layer: Progress, before: int = count) -> None:
            # All layers take about as much: the bytes of those to come are not planned yet.
            done, total = before * layer.total + layer.done, len(backends) * layer.total
            on_progress(Progress(done, total, time.monotonic() - started))

        yield (
            number,
            load_layers(
                *(checkpoint, {number: backend}, Alone(), device),
                shared=shared,
                reading=reading,
                on_progress=told,
            )[number],
        )


def _write(descriptor: int, manifest: Manifest, layers: Iterator[tuple[int, MoELayer]]) -> None:
    room = 2 * _ALIGNMENT + len(manifest.layers) * 12 * _HEADER_BYTES_A_TENSOR
    begin = -(-room // _ALIGNMENT) * _ALIGNMENT
    specs: dict[str, TensorSpec] = {}
    position = begin
    for number, layer in layers:
        for name, tensor in _tensors(layer):
            data = host_bytes(tensor.detach().cpu().contiguous())
            specs[f"{number}.{name}"] = TensorSpec(_NAMES[tensor.dtype], tuple(tensor.shape))
            position = _put(descriptor, data, position)
    _put(descriptor, memoryview(encode_header(specs, {"manifest": _digest(manifest)}, length=begin)), 0)


def _tensors(layer: MoELayer) -> Iterator[tuple[str, Tensor]]:
    for name in _WEIGHTS:
        yield name, layer.experts.get_parameter(name)
    router = layer.router
    gate = {"weight": router.gate_weight, "bias": router.bias, "tid2eid": router.tid2eid}
    yield from ((f"gate.{name}", tensor) for name, tensor in gate.items() if tensor is not None)
    if layer.shared_expert is not None:
        yield "shared.w13", layer.shared_expert.w13
        yield "shared.w2", layer.shared_expert.w2


def _put(descriptor: int, data: memoryview, position: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)
    return position + done


def _in_kernel_order(backend: MoEBackend) -> bool:
    """Whether the backend reorders weights, which only it knows: one like it is asked, with one small expert."""
    small = replace(
        backend.spec,
        num_experts=1,
        num_local_experts=1,
        hidden_size=KERNEL_GROUP,
        intermediate_size=KERNEL_GROUP,
        tp_rank=0,
        tp_size=1,
        ep_rank=0,
        ep_size=1,
    )
    experts = RoutedExperts(type(backend)(backend.key, small, backend.quant_config), None)
    experts.process_weights_after_loading()
    return getattr(experts, "weight_order", "checkpoint") == "kernel"


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(asdict(manifest), sort_keys=True).encode()).hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
