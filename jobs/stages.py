"""The stages of a probe on one rank. Each takes what it needs and returns what the report will hold."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.environment import free_memory, resident
from jobs.request import ProbeRequest
from moe_ep.checkpoint import Checkpoint
from moe_ep.comm import combine_for
from moe_ep.dense import dense_layer
from moe_ep.layer import MoELayer
from moe_ep.loading import load_layer
from moe_ep.selector import SelectionRecord, explain_selection, select_backend
from moe_ep.spec import MoELayerSpec, Mxfp4Config
from moe_ep.synthetic import write_checkpoint

GB = 10**9


class DoesNotFitError(RuntimeError):
    """The rank's share of the model is larger than the memory it has."""


class ParityError(RuntimeError):
    """The layer's output is too far from the dense reference."""


@dataclass(frozen=True)
class Place:
    """A rank's device and its place in the expert-parallel world."""

    rank: int
    world: int
    ep_rank: int
    ep_size: int
    replica: int
    """Which EP group: the groups hold the same experts and work on different tokens."""
    group: dist.ProcessGroup | None
    device: torch.device


def place(request: ProbeRequest, rank: int, device: torch.device) -> Place:
    """Split the world into EP groups of consecutive ranks. Every rank must call it."""
    ep, mine = request.ep, None
    for first in range(0, request.world, ep):
        # Without a timeout of its own a group takes the backend's default, half an hour.
        group = dist.new_group(list(range(first, first + ep)), timeout=timedelta(seconds=request.rank_timeout_s))
        if first <= rank < first + ep:
            mine = group
    return Place(rank, request.world, rank % ep, ep, rank // ep, mine, device)


def select(request: ProbeRequest, where: Place) -> SelectionRecord:
    """The selection for this rank's share of a layer. It is the same for every layer."""
    spec = _spec(request, where, request.layers[0])
    return explain_selection(spec, Mxfp4Config(), arch=request.arch, impl=request.impl)


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
            write_checkpoint(path, request.shape, seed=request.seed)
    dist.barrier()
    checkpoint = Checkpoint.open(path)
    if checkpoint.shape != request.shape:
        raise ValueError(f"{path}: sizes are {checkpoint.shape}, the model file says {request.shape}")
    return checkpoint


def check_fits(request: ProbeRequest, where: Place) -> dict[str, int]:
    """Bytes of the layers that this rank will hold, by item; the largest batch's workspace must fit too.

    Raises
    ------
    DoesNotFitError
        If they are more than the memory that is free now.
    """
    spec = _spec(request, where, request.layers[0])
    planned = request.shape.held_bytes(request.layers, spec.num_local_experts)
    workspace = request.shape.workspace_bytes(max(*request.batch_sizes, request.parity_tokens))
    # Ranks on a CPU share the host's memory.
    free = free_memory(where.device) // (request.ranks_per_node if where.device.type == "cpu" else 1)
    total = sum(planned.values()) + workspace
    if total > free:
        raise DoesNotFitError(
            f"{total / GB:.1f} GB would be held ({planned['routed experts'] / GB:.1f} GB of routed experts, "
            f"{workspace / GB:.1f} GB of workspace, "
            f"{spec.num_local_experts} of {spec.num_experts} at ep={where.ep_size}), "
            f"but {free / GB:.1f} GB are free on {where.device}: use more ranks and a larger topology.ep"
        )
    return planned


def load(
    request: ProbeRequest, where: Place, checkpoint: Checkpoint, progress: Callable[[int], None]
) -> dict[int, MoELayer]:
    """This rank's layers, by number; `progress` is called with the number of layers done."""
    layers = {}
    for done, layer in enumerate(request.layers, start=1):
        backend = select_backend(_spec(request, where, layer), Mxfp4Config(), arch=request.arch, impl=request.impl)
        combine = combine_for(where.ep_size, where.group)
        layers[layer] = load_layer(checkpoint, layer, backend, combine, where.device)
        progress(done)
    return layers


def parity(request: ProbeRequest, where: Place, checkpoint: Checkpoint, layer: MoELayer, number: int) -> float:
    """‖out − dense‖ / ‖dense‖ over all tokens and ranks.

    The ranks of an EP group compute the same tokens together; each then checks every ep-th of them, so the
    reference's experts are read once, not once a rank.
    """
    x, token_ids = tokens(request, where, request.parity_tokens, salt=number)
    out = layer(x, token_ids)
    mine = slice(where.ep_rank, None, where.ep_size)
    dense = dense_layer(checkpoint, number, x[mine], token_ids[mine])
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
    """Seeded hidden states bf16 [count, H] and token ids [count], the same on every rank of an EP group."""
    generator = torch.Generator().manual_seed(request.seed * 1_000_003 + where.replica * 1009 + salt)
    x = torch.randn(count, request.shape.hidden, generator=generator).bfloat16()
    ids = torch.randint(0, request.shape.vocab, (count,), generator=generator)
    return x.to(where.device), ids.to(where.device)


def memory(where: Place, layers: dict[int, MoELayer], planned: dict[str, int], allocated: int | None) -> dict[str, Any]:
    """Bytes planned for this rank, bytes that its layers took, and what the process and the device say.

    `allocated` is by how much the allocator's count grew over the loading; where it does not count, the
    layers' storages are added up.
    """
    tensors = [t for layer in layers.values() for t in (*layer.parameters(), *layer.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
        "planned": planned,
        "planned_total": sum(planned.values()),
        "measured_total": sum(storages.values()) if allocated is None else allocated,
        "process_resident": resident(),
        "free": free_memory(where.device),
    }


def _spec(request: ProbeRequest, where: Place, layer: int) -> MoELayerSpec:
    return MoELayerSpec.of_rank(request.shape, layer, where.ep_rank, where.ep_size)
