"""From a checkpoint to one rank's `MoELayer`s: one plan of reads for all of them, into their final tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_ep.arrangement import Arrangement
from moe_ep.backends.base import MoEBackend
from moe_ep.checkpoint import DTYPES, Checkpoint, check_table
from moe_ep.comm import Combine
from moe_ep.exchange import ColumnExchange
from moe_ep.fp8 import dequantise_blocks
from moe_ep.headers import CheckpointError, TensorInfo
from moe_ep.layer import MoELayer, RoutedExperts, SharedExpert
from moe_ep.order import NAN_SCALE
from moe_ep.placement import WHOLE, Placement, Slice
from moe_ep.ranges import Piece, Read, plan_reads
from moe_ep.reading import Allocate, Progress, fetch
from moe_ep.routing import Router
from moe_ep.shape import ModelShape
from moe_ep.slots import SlotMap
from moe_ep.targets import allocator, into, into_columns, into_rows
from moe_ep.tensors import TensorSpec, expert_specs, gate_specs, layer_prefix, shared_specs


@dataclass(frozen=True)
class Reading:
    """How a checkpoint is read. `direct`: by O_DIRECT. `stall_s`: how long no byte may arrive."""

    threads: int = 8
    direct: bool = False
    stall_s: float | None = None


USUAL = Reading()


@dataclass
class Parts:
    """A layer's tensors while they are read."""

    experts: RoutedExperts
    gate: dict[str, Tensor]
    shared: dict[str, Tensor]
    shared_slice: Slice
    held: Sequence[int]
    """Global experts, in the order of the local rows."""
    arrangement: Arrangement | None = None
    files: dict[str, TensorInfo] = field(default_factory=dict)
    """Of the tensors that are looked at when they have come, by name."""


def load_layers(
    checkpoint: Checkpoint,
    backends: Mapping[int, MoEBackend],
    combine: Combine,
    device: torch.device,
    *,
    shared: Slice = WHOLE,
    exchange: ColumnExchange | None = None,
    arrangements: Mapping[int, Arrangement] | None = None,
    reading: Reading = USUAL,
    on_progress: Callable[[Progress], None] = lambda _: None,
    allocate: Allocate | None = None,
) -> dict[int, MoELayer]:
    """Read what the backends' rank holds of each layer: its experts, the router, its slice of the shared expert.

    `arrangements` by layer say which expert each slot holds; the backends are then of slots, not experts.

    Every byte is read once, from the first to the last of each file, into the memory where it stays; only what the
    kernels want otherwise (their order of codes, bf16 of the shared expert) is converted then, one layer at a time.
    Of matrices that are cut by columns (w2) the ranks of a group read each a part and exchange it: all of them must
    call this with the same layers and their `exchange`. Without one a rank reads these matrices whole. `allocate` gives
    the buffers, where reads need some.

    Raises
    ------
    CheckpointError
        If a tensor is missing, of another dtype or shape, has NaN among its scales, or cannot be read.
    StalledError
        As `fetch`.
    """
    parts, reads = plan_loading(
        checkpoint, backends, device, shared, exchange.place if exchange else None, arrangements
    )
    checkpoint.bytes_read += fetch(
        reads,
        checkpoint.stamps,
        threads=reading.threads,
        direct=reading.direct,
        stall_s=reading.stall_s,
        on_progress=on_progress,
        allocate=allocate or allocator(device),
    )
    del reads  # they hold what they were read into
    if exchange is not None:
        exchange.meet()
        for matrices in (m for part in parts.values() for m in _cut_by_columns(part)):
            exchange(matrices)
    # Popped one by one, so that what is converted does not stay beside what it becomes.
    return {layer: _checked(parts.pop(layer), checkpoint.shape, combine, device) for layer in list(parts)}


def plan_loading(
    checkpoint: Checkpoint,
    backends: Mapping[int, MoEBackend],
    device: torch.device,
    shared: Slice = WHOLE,
    exchange: Slice | None = None,
    arrangements: Mapping[int, Arrangement] | None = None,
) -> tuple[dict[int, Parts], list[Read]]:
    """The layers' tensors, with nothing in them yet, and the reads that fill them.

    `exchange`: this rank's place among those that read matrices cut by columns together; None where it is alone.

    Raises
    ------
    CheckpointError
        If a tensor is missing, or of another dtype or shape.
    """
    parts: dict[int, Parts] = {}
    pieces: list[Piece] = []
    for layer, backend in backends.items():
        arrangement = (arrangements or {}).get(layer)
        parts[layer] = empty_parts(checkpoint.shape, layer, backend, shared, device, arrangement)
        pieces += _pieces(checkpoint, layer, parts[layer], exchange)
    return parts, plan_reads(pieces)


def load_layer(
    checkpoint: Checkpoint, layer: int, backend: MoEBackend, combine: Combine, device: torch.device
) -> MoELayer:
    """One layer, as `load_layers`."""
    return load_layers(checkpoint, {layer: backend}, combine, device)[layer]


def load_shared_expert(checkpoint: Checkpoint, layer: int) -> SharedExpert:
    """The whole shared expert in bf16, on the CPU."""
    return _shared_expert(checkpoint.read_shared_expert(layer), checkpoint.shape.swiglu_limit)


def empty_parts(
    shape: ModelShape,
    layer: int,
    backend: MoEBackend,
    shared: Slice,
    device: torch.device,
    arrangement: Arrangement | None,
) -> Parts:
    """A layer's tensors with nothing in them yet, in the order of a checkpoint."""
    with device:
        experts = RoutedExperts(backend, shape.swiglu_limit)
    gate = gate_specs(shape, hash_layer=shape.is_hash_layer(layer))
    held = {name: s.slice(shared.size, columns=name[1] == "2") for name, s in shared_specs(shape).items()}

    def empty(specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
        return {name: torch.empty(s.shape, dtype=DTYPES[s.dtype], device=device) for name, s in specs.items()}

    rows: Sequence[int] = Placement(backend.spec.num_experts, backend.spec.ep_size).experts(backend.spec.ep_rank)
    if arrangement is not None:
        rows = arrangement.held(backend.spec.ep_rank)
    return Parts(experts, empty(gate), empty(held if shape.shared_experts else {}), shared, rows, arrangement)


def _pieces(checkpoint: Checkpoint, layer: int, parts: Parts, exchange: Slice | None) -> Iterator[Piece]:
    """All that a rank wants of a layer."""
    shape, spec = checkpoint.shape, parts.experts.backend.spec
    prefix = layer_prefix(shape, layer)

    def info(name: str, expected: TensorSpec) -> TensorInfo:
        found = checkpoint.info(f"{prefix}.{name}", expected)
        if name.endswith((".scale", ".tid2eid")):
            parts.files[name] = found
        return found

    for local, expert in enumerate(parts.held):
        for name, expected in expert_specs(shape).items():
            rows = expert_rows(parts.experts, local, name)
            place = Slice(spec.tp_rank, spec.tp_size)
            yield from _slice(info(f"experts.{expert}.{name}", expected), rows, place, name[:2], exchange)
    for name, expected in shared_specs(shape).items() if shape.shared_experts else ():
        found = info(f"shared_experts.{name}", expected)
        yield from _slice(found, parts.shared[name], parts.shared_slice, name[:2], exchange)
    for name, expected in gate_specs(shape, hash_layer=shape.is_hash_layer(layer)).items():
        yield into(info(f"gate.{name}", expected), parts.gate[name])


def expert_rows(experts: RoutedExperts, local: int, name: str) -> Tensor:
    """Where a tensor of one expert, such as `w3.scale`, goes while the weights are in a checkpoint's order."""
    matrix, part = name.split(".")
    suffix = "weight" if part == "weight" else "weight_scale"
    if matrix == "w2":
        return experts.get_parameter(f"w2_{suffix}").data[local]
    return experts.get_parameter(f"w13_{suffix}").data[local].chunk(2)[matrix == "w3"]


def _slice(info: TensorInfo, target: Tensor, place: Slice, matrix: str, exchange: Slice | None) -> Iterator[Piece]:
    """A rank's rows of w1 and w3, or columns of w2."""
    if place.size == 1:
        yield into(info, target)
    elif matrix != "w2":
        yield into(info, target, first_row=place.rank * target.shape[0])
    elif exchange is None:
        yield into_columns(info, target, place.rank * target.shape[1])
    elif exchange == place:
        yield from into_rows(info, target, place)
    else:
        raise ValueError(f"{info.name}: this rank holds slice {place}, but exchanges columns as {exchange}")


def _cut_by_columns(parts: Parts) -> Iterator[Tensor]:
    """What `into_rows` has filled, uint8 [n, rows, columns]."""
    if parts.experts.backend.spec.tp_size > 1:
        yield from (parts.experts.get_parameter(name).data for name in ("w2_weight", "w2_weight_scale"))
    if parts.shared_slice.size > 1:
        yield from (parts.shared[name].view(torch.uint8)[None] for name in ("w2.weight", "w2.scale"))


def finished(parts: Parts, shape: ModelShape, combine: Combine, device: torch.device) -> MoELayer:
    """The layer, once its tensors are filled; the experts go into their backend's order."""
    parts.experts.process_weights_after_loading()
    gate = parts.gate
    router = Router(gate["weight"], shape.top_k, shape.routed_scaling, gate.get("bias"), gate.get("tid2eid"))
    shared = _shared_expert(parts.shared, shape.swiglu_limit) if parts.shared else None
    sharded = parts.shared_slice.size > 1
    slots = SlotMap(parts.arrangement, device) if parts.arrangement is not None else None
    return MoELayer(router, parts.experts, combine, shared, shared_is_sharded=sharded, slots=slots).to(device)


def _checked(parts: Parts, shape: ModelShape, combine: Combine, device: torch.device) -> MoELayer:
    _check_scales(parts)
    if "tid2eid" in parts.gate:
        check_table(parts.gate["tid2eid"], shape, parts.files["gate.tid2eid"])
    return finished(parts, shape, combine, device)


def _check_scales(parts: Parts) -> None:
    """Raise `CheckpointError` for the first tensor that has a NaN (255) among its e8m0 scales."""
    w13, w2 = (parts.experts.get_parameter(f"{name}_weight_scale").data for name in ("w13", "w2"))
    inner = w13.shape[1] // 2
    groups = {"w1": w13[:, :inner], "w3": w13[:, inner:], "w2": w2}
    for matrix, scales in groups.items():
        if scales.numel() and int(scales.amax()) == NAN_SCALE:
            row = int((scales == NAN_SCALE).flatten(1).any(1).nonzero()[0])
            raise _nan(parts.files[f"experts.{parts.held[row]}.{matrix}.scale"])
    for name, tensor in parts.shared.items():
        if name.endswith(".scale") and int(tensor.amax()) == NAN_SCALE:
            raise _nan(parts.files[f"shared_experts.{name}"])


def _nan(info: TensorInfo) -> CheckpointError:
    return CheckpointError(f"{info.file}: {info.name} holds NaN (e8m0 byte 255); expected finite scales")


def _shared_expert(parts: Mapping[str, Tensor], limit: float) -> SharedExpert:
    w1, w2, w3 = (
        dequantise_blocks(parts[f"{name}.weight"], parts[f"{name}.scale"]).bfloat16() for name in ("w1", "w2", "w3")
    )
    return SharedExpert(torch.cat((w1, w3)), w2, limit)
