"""Bytes a rank holds, item by item, before anything is started; whether they fit, and what would."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.config import layer_numbers
from launcher.errors import InputError
from launcher.schema import Config
from launcher.topology import RankPlace, rank_places
from launcher.units import GB
from moe_ep.attention import INDEXED_RATIO, AttentionShape
from moe_ep.headers import CONFIG, CheckpointError, read_headers
from moe_ep.ranges import READ_BYTES
from moe_ep.shape import FP8_BLOCK, ModelShape
from moe_ep.tensors import TensorSpec, model_specs, moe_specs

TIGHT = 0.08
"""Where less than this share of the memory is left, nobody should count on it."""

SHORTEST, MOST_NODES = 1024, 64
"""How far advice goes: tokens of context, nodes."""

Scope = Literal["job", "model"]
State = Literal["fits", "tight", "does not fit", "unknown"]
Change = Mapping[str, Mapping[str, object]]
"""New values of keys, by section."""

# Matrices of attention that a TP group shards, by columns of heads and groups of heads (as DeepSeek's own code does).
_SHARDED = ("attn.wq_b.", "attn.wo_a.", "attn.wo_b.", "attn.attn_sink")

# Bytes of a cache entry: 448 values and 64 rotary ones in bf16 with scales, and the indexer's 128 with one scale.
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
class Capacity:
    """Bytes that a rank and a node have; None where nobody says."""

    rank: int | None
    node: int | None
    how: str


@dataclass(frozen=True)
class Verdict:
    """Whether the fullest rank and node have room, and what would give it."""

    state: State
    needed: int
    capacity: int | None
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class MemoryPlan:
    """Of one config."""

    source: str
    """Where the tensors' sizes are from."""
    ranks: tuple[RankMemory, ...]
    capacity: Capacity
    job: Verdict
    model: Verdict


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


def plan_memory(config: Config, checkpoint: Path | None = None) -> MemoryPlan:
    """The plan of a config: from the headers in `checkpoint` where that is a folder of one, else from the model file.

    Raises
    ------
    InputError
        If the checkpoint is there but damaged, or its sizes are not the model file's.
    """
    specs, attention, source = _tensors(config, checkpoint)
    weights = _weigh(specs, config.model.sizes)
    ranks = _ranks(config, weights, attention)
    capacity = _capacity(config)
    verdicts = {scope: _verdict(ranks, capacity, scope) for scope in ("job", "model")}

    def advised(scope: Scope) -> Verdict:
        verdict = verdicts[scope]
        if verdict.state in ("fits", "unknown"):
            return verdict
        advice = tuple(_advice(config, weights, attention, scope))
        return Verdict(verdict.state, verdict.needed, verdict.capacity, advice)

    return MemoryPlan(source, ranks, capacity, advised("job"), advised("model"))


def kv_bytes(attention: AttentionShape, layers: int, context: int, batch: int, kind: Literal["fp8", "bf16"]) -> int:
    """Bytes of the cache of `batch` sequences of `context` tokens over the first `layers` layers.

    A layer keeps one entry for every `ratio` tokens and the last `window` tokens as they are; where the ratio is 4 the
    indexer keeps a key for each entry too. There is one head, so every rank of a TP group holds all of it.
    """
    entry, key = _ENTRY[kind]
    total = 0
    for layer in range(layers):
        ratio = attention.ratio(layer)
        total += min(context, attention.window) * entry
        if ratio:
            total += -(-context // ratio) * (entry + (key if ratio == INDEXED_RATIO else 0))
    return batch * total


def _tensors(
    config: Config, checkpoint: Path | None
) -> tuple[Iterable[tuple[str, TensorSpec]], AttentionShape | None, str]:
    shape, attention = config.model.sizes, config.model.attention_sizes
    if checkpoint is not None and (checkpoint / CONFIG).is_file():
        try:
            headers = read_headers(checkpoint)
        except CheckpointError as error:
            raise InputError(f"model.checkpoint: {error}") from None
        if headers.shape != shape:
            raise InputError(f"model.checkpoint: {checkpoint}: sizes are {headers.shape}, the model file says {shape}")
        found = ((info.name, info.spec) for info in headers.tensors.values())
        return found, headers.attention or attention, f"headers of {checkpoint}"
    if attention is not None:
        return model_specs(shape, attention), attention, "the model file's sizes"
    specs = (item for layer in shape.all_layers for item in moe_specs(shape, layer).items())
    return specs, None, "the model file's sizes, which do not give attention's: only the MoE part is planned"


def _weigh(specs: Iterable[tuple[str, TensorSpec]], shape: ModelShape) -> Weights:
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


def _ranks(config: Config, weights: Weights, attention: AttentionShape | None) -> tuple[RankMemory, ...]:
    places = rank_places(config.topology, config.model.sizes.experts)
    # Ranks with the same experts hold the same: one of them is planned.
    by_experts = {place.experts: _items(config, place, weights, attention) for place in places}
    return tuple(RankMemory(place.rank, place.node, by_experts[place.experts]) for place in places)


def _items(config: Config, place: RankPlace, weights: Weights, attention: AttentionShape | None) -> tuple[Item, ...]:
    shape, topology, cluster, memory = config.model.sizes, config.topology, config.cluster, config.memory
    layers = layer_numbers(config) if config.job.kind == "probe" else layer_numbers(config)[:1]
    held = shape.held_bytes(layers, len(place.experts), expert_tp=topology.expert_tp, shared_tp=topology.shared_tp)
    dense_tp = topology.tp if topology.dense == "sharded" else 1
    mine = slice(place.experts.start, place.experts.stop)
    tokens = max(*config.job.throughput.batch_sizes, config.job.parity.tokens)
    reference = 3 * shape.hidden * shape.intermediate * 4 if config.job.kind == "probe" else 0
    share = f"{len(place.experts)} of {shape.experts} a layer"
    share += f", 1/{topology.expert_tp} of each" if topology.expert_tp > 1 else ""
    shared = f"1/{topology.shared_tp} of each" if topology.shared_tp > 1 else "replicated"
    dense = f"1/{dense_tp} of each" if dense_tp > 1 else "replicated"
    whole_shared = weights.shared // topology.shared_tp
    cache = kv_bytes(attention, shape.layers, memory.context, memory.batch, memory.kv) if attention else 0
    mtp = sum(weights.mtp_experts[mine]) // topology.expert_tp + weights.mtp_rest
    gpu = cluster.arch != "cpu"
    return (
        Item("routed experts", held["routed experts"], sum(weights.experts[mine]) // topology.expert_tp, share),
        Item("shared experts", held["shared experts"] // 2, whole_shared, shared),
        Item(
            "shared experts, bf16 instead of fp8",
            held["shared experts"] - held["shared experts"] // 2,
            whole_shared,
            "as the layer holds them",
        ),
        Item("routers", held["routers"] + held["expert maps"], weights.routers, "replicated"),
        Item("dense weights, sharded by TP", 0, weights.sharded // dense_tp, dense),
        Item("dense weights, replicated", 0, weights.rest, "low ranks, compressors, indexer, norms, mixing"),
        Item("embeddings and head", 0, weights.embeddings // dense_tp, dense),
        Item("MTP layers", 0, mtp, share + ", the rest replicated" if mtp else "none"),
        Item(
            "KV cache",
            0,
            cache,
            f"{memory.batch} × {memory.context} tokens, {memory.kv}"
            if attention
            else "not known without attention's sizes",
        ),
        Item("workspace", (work := shape.workspace_bytes(tokens)) + reference, work, f"{tokens} tokens"),
        Item(
            "reading",
            (read := config.job.reading.threads * READ_BYTES if gpu else 0),
            read,
            f"{config.job.reading.threads} threads" if gpu else "into the tensors",
        ),
        Item("communicator", int(cluster.communicator_gb * GB), int(cluster.communicator_gb * GB), "cluster's figure"),
        Item("reserve", int(cluster.reserve_gb * GB), int(cluster.reserve_gb * GB), "system, runtime, process"),
    )


def _capacity(config: Config) -> Capacity:
    cluster, ranks = config.cluster, config.topology.ranks_per_node
    host = cluster.mem_mb * 2**20 if cluster.mem_mb else None
    if cluster.device_memory_gb is not None:
        device = int(cluster.device_memory_gb * GB)
        if not cluster.unified_memory:
            return Capacity(device, None, f"{cluster.device_memory_gb:g} GB a device")
        node = min(host or device * ranks, device * max(ranks, cluster.devices_per_node))
        how = f"{cluster.device_memory_gb:g} GB a device, shared with the host"
        return Capacity(min(device, node // ranks), node, how)
    if cluster.arch == "cpu" and cluster.scheduler == "local":
        host = _available()
    if host is None or cluster.arch != "cpu":
        return Capacity(None, None, "cluster.device_memory_gb is not given")
    return Capacity(host // ranks, host, "the host's memory, shared by its ranks")


def _available() -> int | None:
    """Bytes that this machine could give."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024 if found else None


def _verdict(ranks: tuple[RankMemory, ...], capacity: Capacity, scope: Scope) -> Verdict:
    needed = max(rank.total(scope) for rank in ranks)
    nodes: dict[int, int] = {}
    for rank in ranks:
        nodes[rank.node] = nodes.get(rank.node, 0) + rank.total(scope)
    if capacity.rank is None:
        return Verdict("unknown", needed, None)
    room = [(capacity.rank, needed)] + ([(capacity.node, max(nodes.values()))] if capacity.node is not None else [])
    left = min((have - need) / have for have, need in room)
    state: State = "does not fit" if left < 0 else "tight" if left < TIGHT else "fits"
    return Verdict(state, needed, capacity.rank)


def _advice(config: Config, weights: Weights, attention: AttentionShape | None, scope: Scope) -> Iterable[str]:
    """Changes, each by itself, with which it would fit, and whether only just; of each kind the nearest."""

    def state(change: Change) -> State:
        changed = config.model_copy(
            update={name: getattr(config, name).model_copy(update=dict(keys)) for name, keys in change.items()}
        )
        return _verdict(_ranks(changed, weights, attention), _capacity(changed), scope).state

    now = _verdict(_ranks(config, weights, attention), _capacity(config), scope).state
    for changes in _changes(config, attention, scope):
        states = {text: state(change) for text, change in changes.items()}
        good = next((text for text, found in states.items() if found == "fits"), None)
        close = next((text for text, found in states.items() if found == "tight"), None)
        if good is not None:
            yield good
        elif close is not None and now == "does not fit":
            yield f"{close} (tight)"


def _changes(config: Config, attention: AttentionShape | None, scope: Scope) -> Iterable[dict[str, Change]]:
    """Kinds of changes; of each the possible ones, the nearest first."""
    topology, experts = config.topology, config.model.sizes.experts
    shared = config.model.sizes.shared_experts * config.model.sizes.intermediate
    group = max(topology.ep, topology.expert_tp)
    if group > 1 and topology.shared_expert == "replicated" and shared % (FP8_BLOCK * group) == 0:
        yield {"topology.shared_expert=sharded": {"topology": {"shared_expert": "sharded"}}}
    if topology.tp > 1 and topology.dense == "replicated" and scope == "model":
        yield {"topology.dense=sharded (TP for what is not experts)": {"topology": {"dense": "sharded"}}}
    if scope == "model" and attention is not None:
        contexts = [config.memory.context >> n for n in range(1, 24) if config.memory.context >> n >= SHORTEST]
        yield {f"memory.context={n}": {"memory": {"context": n}} for n in contexts}
    wider = [ep for ep in range(topology.ep + 1, topology.tp + 1) if topology.tp % ep == 0 and ep <= experts]
    yield {f"topology.ep={ep}": {"topology": {"ep": ep, "expert_tp": 1}} for ep in wider}
    nodes = {n: n * topology.ranks_per_node for n in range(1, MOST_NODES + 1)}
    yield {
        f"{n} nodes (topology.nodes={n}, tp={ranks}, ep={ranks})": {
            "topology": {"nodes": n, "tp": ranks, "ep": ranks, "expert_tp": 1, "shared_expert": "replicated"}
        }
        for n, ranks in nodes.items()
        if n > topology.nodes and ranks <= experts and (attention is None or attention.heads % ranks == 0)
    }
