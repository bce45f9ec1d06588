"""The stages of a probe on one rank. Each takes what it needs and returns what the report will hold."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.arrivals import Arrivals
from jobs.place import Place, shared_slice, spec_of
from jobs.request import ProbeRequest
from moe_ep import manifest as manifests
from moe_ep import preshard as preshard_files
from moe_ep.arrangement import Arrangement
from moe_ep.backends.base import MoEBackend
from moe_ep.checkpoint import Checkpoint
from moe_ep.comm import Combine
from moe_ep.dense import Weights, dense_layer
from moe_ep.exchange import ColumnExchange
from moe_ep.layer import MoELayer
from moe_ep.loading import Reading, load_layers
from moe_ep.made import MadeWeights, make_layers
from moe_ep.placement import Placement, Slice
from moe_ep.reading import Progress
from moe_ep.selector import SelectionRecord, explain_selection, select_backend
from moe_ep.spec import Mxfp4Config
from moe_ep.synthetic import write_checkpoint
from moe_ep.targets import allocator


class ParityError(RuntimeError):
    """The layer's output is too far from the dense reference."""


def select(request: ProbeRequest, where: Place) -> SelectionRecord:
    """The selection for this rank's share of a layer. It is the same for every layer."""
    spec = spec_of(request, where, request.layers[0])
    return explain_selection(spec, _quantisation(request), arch=request.arch, impl=request.impl)


def open_weights(request: ProbeRequest, where: Place) -> Checkpoint | MadeWeights:
    """Where the weights come from: the checkpoint, as `open_checkpoint`, or the ranks themselves."""
    if request.made_skew is None:
        return open_checkpoint(request, where)
    return MadeWeights(request.shape, request.seed, where.device, request.made_skew)


def open_checkpoint(request: ProbeRequest, where: Place) -> Checkpoint:
    """Open the checkpoint; where the request says so and there is none, rank 0 writes it first.

    Raises
    ------
    CheckpointError
        If it cannot be read.
    ValueError
        If its sizes are not those of the request.
    """
    path = Path(request.checkpoint)
    if request.synthesise and where.rank == 0 and not path.exists():
        with suppress(FileExistsError):  # another run made the same meanwhile
            write_checkpoint(path, request.shape, seed=request.seed, attention=request.attention)
    dist.barrier()
    checkpoint = Checkpoint.open(path)
    if checkpoint.shape != request.shape:
        raise ValueError(f"{path}: sizes are {checkpoint.shape}, the model file says {request.shape}")
    return checkpoint


def load(
    request: ProbeRequest,
    where: Place,
    weights: Checkpoint | MadeWeights,
    combine: Combine,
    exchange: ColumnExchange | None,
    on_progress: Callable[[Progress], None],
) -> tuple[dict[int, MoELayer], dict[str, Any]]:
    """This rank's layers, by number, and what the report says of the loading.

    From the pre-sharded folder where the request names one, which must match. Raises as `load_layers` and `load_rank`;
    no byte for rank_timeout_s is an error. Of made weights no byte is read.
    """
    wanted = backends(request, where)
    give, buffers = allocator(where.device), []

    def allocate(nbytes: int) -> memoryview:
        buffers.append(nbytes)
        return give(nbytes)

    started = time.monotonic()
    if isinstance(weights, MadeWeights):
        layers = make_layers(
            *(weights, wanted, combine, where.device),
            shared=shared_slice(request, where),
            arrangements=arrangements(request),
            on_progress=on_progress,
        )
        read = 0
    elif request.presharded is None:
        layers = load_layers(
            *(weights, wanted, combine, where.device),
            shared=shared_slice(request, where),
            exchange=exchange,
            arrangements=arrangements(request),
            reading=reading(request),
            on_progress=on_progress,
            allocate=allocate,
        )
        read = weights.bytes_read
    else:
        folder = Path(request.presharded)
        found = manifests.read_manifest(folder)
        manifests.check_matches(folder, found, manifest(request, where, weights))
        layers, read = preshard_files.load_rank(
            *(folder, found, where.group_rank, wanted, combine, where.device),
            reading=reading(request),
            on_progress=on_progress,
            allocate=allocate,
        )
    return layers, {
        "layers": list(layers),
        "bytes_read": read,
        "buffer_bytes": sum(buffers),
        "read_from": request.presharded or request.checkpoint,
        "load_seconds": time.monotonic() - started,
    }


def preshard(
    request: ProbeRequest,
    where: Place,
    checkpoint: Checkpoint,
    exchange: ColumnExchange | None,
    on_progress: Callable[[Progress], None],
) -> dict[str, Any]:
    """Write this rank's file; `finish_preshard` is for when all have. Every rank must call it.

    Groups hold the same, so only the ranks of the first one write.

    Raises
    ------
    CheckpointError
        If the folder is finished already, a file cannot be read or cannot be written.
    """
    folder = Path(request.presharded or "")
    manifests.check_new(folder)
    dist.barrier()  # nobody finishes it before all have looked
    written = 0
    if where.replica == 0:
        written = preshard_files.write_rank(
            *(
                folder,
                manifest(request, where, checkpoint),
                where.group_rank,
                checkpoint,
                backends(request, where),
                shared_slice(request, where),
            ),
            where.device,
            exchange=exchange,
            reading=reading(request),
            on_progress=on_progress,
        )
    return {"bytes_read": checkpoint.bytes_read, "bytes_written": written, "folder": str(folder)}


def finish_preshard(request: ProbeRequest, where: Place, checkpoint: Checkpoint) -> None:
    """Once every rank's file is written: the manifest, which makes the folder whole."""
    manifests.write_manifest(Path(request.presharded or ""), manifest(request, where, checkpoint))


def manifest(request: ProbeRequest, where: Place, checkpoint: Checkpoint) -> manifests.Manifest:
    """What files of this run's ranks are of."""
    placement = Placement(request.shape.experts, request.ep)
    places = [placement.experts(r if request.ep > 1 else 0) for r in range(where.group_size)]
    return manifests.manifest_of(checkpoint, backends(request, where), places, shared_slice(request, where))


def backends(request: ProbeRequest, where: Place) -> dict[int, MoEBackend]:
    """The backend of each layer that is loaded."""
    return {
        layer: select_backend(
            spec_of(request, where, layer), _quantisation(request), arch=request.arch, impl=request.impl
        )
        for layer in request.layers
    }


def arrangements(request: ProbeRequest) -> dict[int, Arrangement]:
    """Of the layers whose experts do not lie in order."""
    return {
        layer: Arrangement(slots, request.shape.experts, request.ep)
        for layer, slots in zip(request.layers, request.slots, strict=False)
    }


def reading(request: ProbeRequest) -> Reading:
    """How this run reads."""
    return Reading(request.read_threads, request.read_direct, stall_s=request.rank_timeout_s)


def exchange(request: ProbeRequest, where: Place, arrivals: Arrivals) -> ColumnExchange | None:
    """How the ranks of a group read together what is cut by columns; None where nothing is."""
    if request.expert_tp == 1 and not (request.shard_shared_expert and where.group_size > 1):
        return None
    first = where.replica * where.group_size
    ranks = range(first, first + where.group_size)

    def meet() -> None:
        arrivals.meet(ranks, request.rank_timeout_s)

    return ColumnExchange(Slice(where.group_rank, where.group_size), where.group, meet)


def parity(request: ProbeRequest, where: Place, weights: Weights, layer: MoELayer, number: int) -> float:
    """‖out − dense‖ / ‖dense‖ over all tokens and ranks.

    The ranks of a group compute the same tokens together; each then checks its share of them, so the reference's
    experts are read once, not once a rank.
    """
    x, token_ids = tokens(request, where, request.parity_tokens, salt=number)
    out = layer(x, token_ids, where.tokens_of(request, request.parity_tokens))
    mine = slice(0, None) if request.own_tokens else slice(where.group_rank, None, where.group_size)
    dense = dense_layer(weights, number, x[mine], token_ids[mine], request.activation_dtype)
    error, norm = (out[mine].float() - dense).double(), dense.double()
    sums = torch.stack((error.square().sum(), norm.square().sum()))
    dist.all_reduce(sums)
    return float((sums[0] / sums[1]).sqrt())


def check_parity(request: ProbeRequest, errors: dict[int, float]) -> None:
    """Raise `ParityError` if a layer's error is above the tolerance, or is not a number."""
    for layer, error in errors.items():
        if not error <= request.parity_tolerance:
            raise ParityError(
                f"layer {layer}: relative error {error:.3e} against the dense reference is above "
                f"job.parity.tolerance = {request.parity_tolerance:.1e}"
            )


def tokens(request: ProbeRequest, where: Place, count: int, *, salt: int) -> tuple[Tensor, Tensor]:
    """Seeded hidden states bf16 [count, H] and token ids [count], the same on every rank of an EP group; or this rank's
    share of them, where each has tokens of its own."""
    generator = torch.Generator().manual_seed(request.seed * 1_000_003 + where.replica * 1009 + salt)
    x = torch.randn(count, request.shape.hidden, generator=generator).bfloat16()
    ids = torch.randint(0, request.shape.vocab, (count,), generator=generator)
    if request.own_tokens:
        counts = where.tokens_of(request, count)
        first = sum(counts[: where.group_rank])
        mine = slice(first, first + counts[where.group_rank])
        x, ids = x[mine], ids[mine]
    return x.to(where.device), ids.to(where.device)


def largest_pass(request: ProbeRequest, where: Place, layers: dict[int, MoELayer]) -> Tensor:
    """The most tokens that will pass at once, through two layers, for what they allocate; what comes out of the last.
    Every rank must call it."""
    x, token_ids = tokens(request, where, max(request.batch_sizes), salt=-1)
    out = x
    for layer in list(layers.values())[-2:]:
        out = layer(x, token_ids)
    return out


def _quantisation(request: ProbeRequest) -> Mxfp4Config:
    return Mxfp4Config(is_w4a8_fp8=request.activation_dtype == "fp8")
