"""Bytes that a rank would hold, item by item, before anything is started."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engine.footprint import cache_bytes, kept_bytes, step_bytes, widened
from launcher.arranging import slots_of
from launcher.config import layer_numbers
from launcher.errors import InputError
from launcher.files import is_file
from launcher.schema import Config
from launcher.topology import RankPlace, rank_places
from launcher.units import GB, size
from moe_ep.attention import INDEXED_RATIO, AttentionShape
from moe_ep.cost import Wire
from moe_ep.footprint import PEER_BYTES, WORK_OF, Sharing, pass_bytes, work_bytes
from moe_ep.headers import CONFIG, CheckpointError, CheckpointHeaders, checked, read_headers
from moe_ep.network import Layout
from moe_ep.reading import buffer_bytes
from moe_ep.shape import ModelShape
from moe_ep.tensors import TensorSpec, dense_held_bytes, model_specs, moe_specs

Scope = Literal["job", "model"]

# Matrices of attention that a TP group shards, by columns of heads and groups of heads (as DeepSeek's own code does).
_SHARDED = ("attn.wq_b.", "attn.wo_a.", "attn.wo_b.", "attn.attn_sink")

# Bytes of V4's cache entry: 448 values and 64 rotary ones in bf16 with scales, and the indexer's 128 with one scale.
_ENTRY_WIDTH, _KEY_WIDTH = 512, 128
_ENTRY = {"fp8": (448 + 2 * 64 + 8, 128 + 4), "bf16": (2 * 512, 2 * 128)}


@dataclass(frozen=True)
class Item:
    """What bytes of a rank are for. `job`: those that the config's job takes; `model`: of the whole model, served."""

    name: str
    job: int
    model: int
    how: str

    def of(self, scope: Scope) -> int:
        """Bytes of one of the two."""
        return self.job if scope == "job" else self.model


@dataclass(frozen=True)
class RankMemory:
    """One rank's items."""

    rank: int
    node: int
    items: tuple[Item, ...]

    def total(self, scope: Scope) -> int:
        """Bytes of all items."""
        return sum(item.of(scope) for item in self.items)


@dataclass(frozen=True)
class Weights:
    """Bytes of a checkpoint by what they are for."""

    experts: tuple[int, ...]
    """By global expert, over all layers."""
    shared: int
    routers: int
    embeddings: int
    sharded: int
    """What a TP group can shard of attention."""
    rest: int
    mtp_experts: tuple[int, ...]
    mtp_rest: int


def kv_bytes(attention: AttentionShape, layers: int, context: int, batch: int, kind: Literal["fp8", "bf16"]) -> int:
    """Bytes of the cache of `batch` sequences of `context` tokens over the first `layers` layers.

    A layer keeps one entry for every `ratio` tokens and the last `window` tokens as they are; where the ratio is 4 the
    indexer keeps a key for each entry too. There is one head, so every rank of a TP group holds all of it.
    """
    entry, key = _ENTRY[kind]
    entry, key = entry * attention.head_dim // _ENTRY_WIDTH, key * attention.index_dim // _KEY_WIDTH
    total = 0
    for layer in range(layers):
        ratio = attention.ratio(layer)
        total += min(context, attention.window) * entry
        if ratio:
            total += -(-context // ratio) * (entry + (key if ratio == INDEXED_RATIO else 0))
    return batch * total


def tensors_of(
    config: Config, checkpoint: Path | None
) -> tuple[Iterable[tuple[str, TensorSpec]], AttentionShape | None, str]:
    """Every tensor of the model, attention's sizes, and where they are from: the headers in `checkpoint` where that is
    a folder of one, else the model file.

    Raises
    ------
    InputError
        If the checkpoint is there but damaged or incomplete, or its sizes are not the model file's.
    """
    shape, attention = config.model.sizes, config.model.attention_sizes
    if checkpoint is not None and is_file(checkpoint / CONFIG):
        try:
            headers = read_headers(checkpoint)
        except CheckpointError as error:
            raise InputError(f"model.checkpoint: {error}") from None
        if headers.shape != shape:
            raise InputError(f"model.checkpoint: {checkpoint}: sizes are {headers.shape}, the model file says {shape}")
        _check_complete(config, headers)
        found = ((info.name, info.spec) for info in headers.tensors.values())
        return found, headers.attention or attention, f"headers of {checkpoint}"
    if attention is not None:
        return model_specs(shape, attention), attention, "the model file's sizes"
    specs = (item for layer in shape.all_layers for item in moe_specs(shape, layer).items())
    return specs, None, "the model file's sizes, which do not give attention's: only the MoE part is planned"


def _check_complete(config: Config, headers: CheckpointHeaders) -> None:
    """Raise `InputError` for a tensor that the ranks would miss, or find otherwise, once the job has started."""
    try:
        for layer in layer_numbers(config):
            for name, spec in moe_specs(headers.shape, layer).items():
                checked(headers.path, headers.tensors, name, spec)
    except CheckpointError as error:
        raise InputError(f"model.checkpoint: {error}") from None


def weigh(specs: Iterable[tuple[str, TensorSpec]], shape: ModelShape) -> Weights:
    """Add the tensors' bytes up by what they are for."""
    experts, mtp_experts = [0] * shape.experts, [0] * shape.experts
    sums = dict.fromkeys(("shared", "routers", "embeddings", "sharded", "rest", "mtp_rest"), 0)
    for name, spec in specs:
        _, marker, below = name.partition(".ffn.experts.")
        mtp = name.startswith("mtp.")
        number = below.split(".", 1)[0]
        if marker and number.isdecimal() and int(number) < shape.experts:
            (mtp_experts if mtp else experts)[int(number)] += spec.nbytes
        else:
            sums["mtp_rest" if mtp else _kind(name)] += spec.nbytes
    return Weights(experts=tuple(experts), mtp_experts=tuple(mtp_experts), **sums)


def _kind(name: str) -> str:
    if ".ffn.shared_experts." in name:
        return "shared"
    if ".ffn.gate." in name:
        return "routers"
    if name.startswith(("embed.", "head.")):
        return "embeddings"
    return "sharded" if any(part in name for part in _SHARDED) else "rest"


def ranks_of(config: Config, weights: Weights, attention: AttentionShape | None) -> tuple[RankMemory, ...]:
    """What every rank of a config holds."""
    places = rank_places(config.topology, slots_of(config))
    # Ranks with the same experts hold the same: one of them is planned.
    by_experts = {place.experts: _items(config, place, weights, attention) for place in places}
    return tuple(RankMemory(place.rank, place.node, by_experts[place.experts]) for place in places)


def _items(config: Config, place: RankPlace, weights: Weights, attention: AttentionShape | None) -> tuple[Item, ...]:
    shape, topology, cluster, memory = config.model.sizes, config.topology, config.cluster, config.memory
    serves = config.job.kind == "serve" and config.engine.name == "embedded"
    layers = layer_numbers(config) if config.job.kind == "probe" or serves else layer_numbers(config)[:1]
    local = len(place.experts)  # copies too; all experts have the same bytes
    held = shape.held_bytes(layers, local, expert_tp=topology.expert_tp, shared_tp=topology.shared_tp)
    dense_tp = topology.tp if topology.dense == "sharded" else 1
    job = config.job
    tokens = config.engine.limits.step_tokens if serves else max(_passes(config))
    fp8 = config.backend.activation_dtype == "fp8"
    own = topology.ep if topology.own_tokens else 1
    gpu, exchanges = cluster.arch != "cpu", cluster.arch == "cpu" or config.comm.strategy != "all_gather"
    sharing = Sharing(own, Wire(config.comm.payload).row_bytes(shape), exchanges, gpu)
    value = 4 if serves and config.engine.dtype == "f32" else 2
    held = widened(held, shape, value) if serves else held
    work = work_bytes(
        shape,
        len(layers),
        local,
        tokens=tokens,
        parity_tokens=job.parity.tokens,
        parity_share=max(topology.ep, topology.expert_tp),
        expert_tp=topology.expert_tp,
        shared_tp=topology.shared_tp,
        kernels=_computed_by_kernels(config),
        presharded=config.model.presharded is not None and job.kind == "probe",
        made=config.model.made_skew is not None,
        fp8=fp8,
        sharing=sharing,
    )
    parts = {part: count for part, count in work.items() if part in WORK_OF.get(job.kind, work)}
    if serves and attention:
        sizes = (min(tokens, memory.context), memory.context, dense_tp, value)
        parts["largest pass"] = step_bytes(shape, attention, *sizes, work["largest pass"])
    reads = config.model.made_skew is None
    buffers = buffer_bytes(job.reading.threads) if reads and (cluster.arch != "cpu" or job.reading.direct) else 0
    share = f"{len(place.experts)} of {shape.experts} a layer"
    share += f", 1/{topology.expert_tp} of each" if topology.expert_tp > 1 else ""
    shared = f"1/{topology.shared_tp} of each" if topology.shared_tp > 1 else "replicated"
    dense = f"1/{dense_tp} of each" if dense_tp > 1 else "replicated"
    whole_shared = weights.shared // topology.shared_tp
    cache = kv_bytes(attention, shape.layers, memory.context, memory.batch, memory.kv) if attention else 0
    mtp = sum(weights.mtp_experts) * local // shape.experts // topology.expert_tp + weights.mtp_rest
    engine = dense_held_bytes(shape, attention, dense_tp, value) if serves and attention else {}
    served_cache = 0
    if serves and attention:
        served_cache = memory.batch * cache_bytes(attention, shape.layers, memory.context, value)
        served_cache += kept_bytes(attention, shape.layers, tokens, value)
    in_fp8 = shape.held_bytes(layers, local, shared_tp=topology.shared_tp)["shared experts"] // 2
    combining = Layout.of(max(topology.ep, topology.expert_tp), topology.ranks_per_node)
    copying = config.comm.peer_copies and job.kind in ("probe", "preshard")  # a service sums by collectives
    peers = copying and cluster.arch.startswith("sm") and combining == Layout(2, 2)
    communicator = int(cluster.communicator_gb * GB)
    items = (
        Item(
            "routed experts",
            held["routed experts"],
            sum(weights.experts) * local // shape.experts // topology.expert_tp,
            share,
        ),
        Item("shared experts", in_fp8, whole_shared, shared),
        Item(
            f"shared experts, {'f32' if value == 4 else 'bf16'} instead of fp8",
            held["shared experts"] - in_fp8,
            whole_shared,
            "as the layer holds them",
        ),
        Item("routers", held["routers"] + held["expert maps"], weights.routers, "replicated"),
        Item(
            "dense weights, sharded by TP",
            engine.get("sharded", 0),
            weights.sharded // dense_tp,
            dense,
        ),
        Item(
            "dense weights, replicated",
            engine.get("replicated", 0),
            weights.rest,
            "low ranks, compressors, indexer, norms, mixing",
        ),
        Item(
            "embeddings and head",
            engine.get("vocabulary", 0),
            weights.embeddings // dense_tp,
            f"{dense}; here replicated, the head in f32" if serves and dense_tp > 1 else dense,
        ),
        Item("MTP layers", 0, mtp, share + ", the rest replicated" if mtp else "none"),
        Item(
            "KV cache",
            served_cache,
            cache,
            f"{memory.batch} × {memory.context} tokens, {memory.kv}"
            if attention
            else "not known without attention's sizes",
        ),
        Item(
            "workspace",
            max(parts.values()),
            pass_bytes(
                shape, tokens, expert_tp=topology.expert_tp, shared_tp=topology.shared_tp, fp8=fp8, sharing=sharing
            ),
            f"{', '.join(f'{part} {size(count)}' for part, count in parts.items())}: the largest; {tokens} tokens",
        ),
        Item(
            "reading buffers",
            buffers,
            buffers,
            f"{job.reading.threads} threads" if buffers else "into the tensors",
        ),
        Item(
            "communicator",
            communicator + PEER_BYTES * peers,
            communicator,
            f"cluster's figure{', copies between two GPUs' if peers else ''}",
        ),
        Item("reserve", int(cluster.reserve_gb * GB), int(cluster.reserve_gb * GB), "system, runtime, process"),
    )
    # An engine that is a program holds the whole model; what it takes beside that is its own.
    program = job.kind == "serve" and not serves
    return tuple(replace(item, job=item.model) for item in items) if program else items


def _passes(config: Config) -> tuple[int, ...]:
    """Tokens of each pass of a job that measures."""
    job = config.job
    return tuple(job.tune.tokens if job.kind in ("tune", "check") else job.throughput.batch_sizes)


def _computed_by_kernels(config: Config) -> bool:
    """As the selector will have it: on a CPU the kernels run in Triton's interpreter alone."""
    if config.backend.impl == "auto" and config.cluster.arch == "cpu":
        return str(config.cluster.env.get("TRITON_INTERPRET", "0")) == "1"
    return config.backend.impl != "reference"
