"""Whether what ranks would hold fits, and what would."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.host import available
from launcher.engines.known import program_of
from launcher.memory import RankMemory, Scope, Weights, ranks_of, tensors_of, weigh
from launcher.schema import Config
from launcher.units import GB
from moe_ep.attention import AttentionShape
from moe_ep.shape import FP8_BLOCK, MXFP4_BLOCK

TIGHT = 0.08
"""Where less than this share of the memory is left, nobody should count on it."""

SHORTEST, MOST_NODES = 1024, 64
"""How far advice goes: tokens of context, nodes."""

State = Literal["fits", "tight", "does not fit", "unknown"]
Change = Mapping[str, Mapping[str, object]]
"""New values of keys, by section."""


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


def plan_memory(config: Config, checkpoint: Path | None = None) -> MemoryPlan:
    """The plan of a config: from the headers in `checkpoint` where that is a folder of one, else from the model file.

    Raises
    ------
    InputError
        If the checkpoint is there but damaged, or its sizes are not the model file's.
    """
    specs, attention, source = tensors_of(config, checkpoint)
    weights = weigh(specs, config.model.sizes)
    ranks = ranks_of(config, weights, attention)
    capacity = _capacity(config)
    verdicts = {scope: _verdict(ranks, capacity, scope) for scope in ("job", "model")}

    def advised(scope: Scope) -> Verdict:
        verdict = verdicts[scope]
        if verdict.state in ("fits", "unknown"):
            return verdict
        advice = tuple(_advice(config, weights, attention, scope))
        return Verdict(verdict.state, verdict.needed, verdict.capacity, advice)

    return MemoryPlan(source, ranks, capacity, advised("job"), advised("model"))


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
        with suppress(OSError):  # else nobody says
            host = available()
    if host is None or cluster.arch != "cpu":
        return Capacity(None, None, "cluster.device_memory_gb is not given")
    return Capacity(host // ranks, host, "the host's memory, shared by its ranks")


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
        return _verdict(ranks_of(changed, weights, attention), _capacity(changed), scope).state

    now = _verdict(ranks_of(config, weights, attention), _capacity(config), scope).state
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
    serves = config.job.kind == "serve"  # whose shared expert is whole, and which holds the whole model
    if group > 1 and not serves and topology.shared_expert == "replicated" and shared % (FP8_BLOCK * group) == 0:
        yield {"topology.shared_expert=sharded": {"topology": {"shared_expert": "sharded"}}}
    if topology.tp > 1 and topology.dense == "replicated" and (scope == "model" or serves):
        yield {"topology.dense=sharded (TP for what is not experts)": {"topology": {"dense": "sharded"}}}
    if (scope == "model" or serves) and attention is not None:
        contexts = [config.memory.context >> n for n in range(1, 24) if config.memory.context >> n >= SHORTEST]
        yield {f"memory.context={n}": {"memory": {"context": n}} for n in contexts}
    program = program_of(config) is not None  # which spreads the experts over all ranks, whole or in slices
    sliced = program and topology.expert_tp > 1
    wider = [
        ep for ep in range(topology.ep + 1, topology.tp + 1) if topology.tp % ep == 0 and ep <= experts and not program
    ]
    yield {f"topology.{_told(keys)}": {"topology": keys} for ep in wider for keys in [_spread(config, {"ep": ep})]}
    if config.cluster.scheduler == "local":
        return  # there is but this machine
    nodes = {n: n * topology.ranks_per_node for n in range(topology.nodes + 1, MOST_NODES + 1)}
    yield {
        f"{n} nodes (topology.{_told(keys)})": {"topology": keys}
        for n, ranks in nodes.items()
        if (config.model.sizes.intermediate % (MXFP4_BLOCK * ranks) == 0 if sliced else ranks <= experts)
        and (attention is None or attention.heads % ranks == 0)
        for keys in [
            {"nodes": n, "tp": ranks, "expert_tp": ranks}
            if sliced
            else _spread(config, {"nodes": n, "tp": ranks, "ep": ranks})
        ]
    }


def _spread(config: Config, keys: dict[str, int]) -> dict[str, object]:
    """The keys of a larger `ep`, with those that must change beside it."""
    topology, sizes = config.topology, config.model.sizes
    whole_blocks = sizes.shared_experts * sizes.intermediate % (FP8_BLOCK * keys["ep"]) == 0
    more: dict[str, object] = {"expert_tp": 1} if topology.expert_tp > 1 else {}
    if topology.shared_expert == "sharded" and not whole_blocks:
        more["shared_expert"] = "replicated"
    return keys | more


def _told(keys: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in keys.items())
