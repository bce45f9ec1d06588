"""A rank's memory: what its layers and its work will take, whether that fits, and what was taken."""

from typing import Any

from jobs.environment import free_memory, resident
from jobs.place import Place, shared_slice, spec_of
from jobs.request import ProbeRequest
from moe_ep.cost import Wire
from moe_ep.footprint import WORK_OF, Sharing, work_bytes
from moe_ep.layer import MoELayer
from moe_ep.reading import buffer_bytes

GB = 10**9
READING = "reading buffers"
"""Among the parts of a rank's work."""


class DoesNotFitError(RuntimeError):
    """The rank's share of the model is larger than the memory it has."""


def check_fits(request: ProbeRequest, where: Place, impl: str | None = None) -> dict[str, int]:
    """Bytes of the layers that this rank will hold, by item; what its work takes beside them must fit too.

    Raises
    ------
    DoesNotFitError
        If they are more than the memory that is free now.
    """
    spec = spec_of(request, where, request.layers[0])
    planned = request.shape.held_bytes(
        _held_at_once(request),
        spec.num_local_experts,
        expert_tp=request.expert_tp,
        shared_tp=shared_slice(request, where).size,
    )
    work = planned_work(request, where, impl or request.impl)
    workspace = max(work.values())
    # Ranks on a CPU share the host's memory.
    free = free_memory(where.device) // (request.ranks_per_node if where.device.type == "cpu" else 1)
    total = sum(planned.values()) + workspace
    if total > free:
        raise DoesNotFitError(
            f"{total / GB:.1f} GB would be held ({planned['routed experts'] / GB:.1f} GB of routed experts, "
            f"{workspace / GB:.1f} GB of workspace, "
            f"{spec.num_local_experts} of {spec.num_experts} at ep={request.ep}), "
            f"but {free / GB:.1f} GB are free on {where.device}: use more ranks and a larger topology.ep"
        )
    return planned


def planned_work(request: ProbeRequest, where: Place, impl: str) -> dict[str, int]:
    """Bytes beside the weights, by part of the work, and of the buffers that files are read into."""
    spec = spec_of(request, where, request.layers[0])
    work = work_bytes(
        request.shape,
        len(_held_at_once(request)),
        spec.num_local_experts,
        tokens=max(request.batch_sizes),
        parity_tokens=request.parity_tokens,
        parity_share=where.group_size,
        expert_tp=request.expert_tp,
        shared_tp=shared_slice(request, where).size,
        kernels=impl != "reference",
        presharded=request.presharded is not None and request.kind == "probe",
        made=request.made_skew is not None,
        fp8=request.activation_dtype == "fp8",
        sharing=Sharing(
            where.group_size if request.own_tokens else 1,
            Wire(request.comm.payload).row_bytes(request.shape),
            exchanges=where.device.type == "cpu" or request.comm.strategy != "all_gather",
            gpu=where.device.type != "cpu",
        ),
    )
    parts = {part: count for part, count in work.items() if part in WORK_OF.get(request.kind, work)}
    needed = request.made_skew is None and (where.device.type != "cpu" or request.read_direct)
    return {READING: buffer_bytes(request.read_threads) if needed else 0, **parts}


def _held_at_once(request: ProbeRequest) -> tuple[int, ...]:
    """A pre-sharding holds one layer after another."""
    return request.layers[:1] if request.kind == "preshard" else request.layers


def memory(
    where: Place,
    layers: dict[int, MoELayer],
    planned: dict[str, int],
    allocated: int | None,
    work: dict[str, int],
    most: dict[str, int],
) -> dict[str, Any]:
    """Bytes planned for this rank, bytes that its layers took, and what the process and the device say.

    `allocated` is by how much the allocator's count grew over the loading; where it does not count, the
    layers' storages are added up. `work`: beside the layers, planned; `most`: measured, by the same parts.
    """
    tensors = [t for layer in layers.values() for t in (*layer.parameters(), *layer.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    total, measured = sum(planned.values()), sum(storages.values()) if allocated is None else allocated
    return {
        "planned": planned,
        "planned_total": total,
        "measured_total": measured,
        "difference": measured / total - 1,
        "work": {part: {"planned": bytes_, "measured": most.get(part)} for part, bytes_ in work.items()},
        "process_resident": resident(),
        "free": free_memory(where.device),
    }
