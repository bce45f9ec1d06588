"""Bytes and time that the strategies of `moe_ep.comm` take, by formula. Needs no torch.

T: tokens of the group, H: hidden, k: routes a token, p: ranks, n: nodes, q: ranks a node, c: bytes of an element in
which partials are added up, row: bytes of a token on its way to the experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, comb, log2
from typing import Any, Literal

from moe_ep.network import Device, Layout, Network
from moe_ep.shape import FP8_BLOCK, ModelShape

Name = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]
SAME_TOKENS: tuple[Name, ...] = ("all_reduce", "reduce_scatter")
"""Strategies for tokens that all ranks have."""
OWN_TOKENS: tuple[Name, ...] = ("all_gather", "all_to_all")
"""Strategies for ranks that have tokens of their own."""

_ROUTE_BYTES = 8
_REACHED = 0.7
_GATHERS = 0.8  # of an all-reduce's rate that gathers and reduce-scatters reached within a node (NCCL 2.28, two H200)
_NEAR = 0.1  # by which another must be faster than the plain strategy: the model misses by as much
_NEAR_MEASURED = 0.03


@dataclass(frozen=True)
class Wire:
    """Forms on the wire: `payload` of hidden states at dispatch, `sum_bytes` of an element that is added up."""

    payload: Literal["bf16", "fp8"] = "bf16"
    sum_bytes: int = 4

    def row_bytes(self, shape: ModelShape) -> int:
        """Of a token with its routes, as `moe_ep.comm.wire` packs it."""
        state = 2 * shape.hidden if self.payload == "bf16" else shape.hidden + ceil(shape.hidden / FP8_BLOCK)
        return ceil(state / 4) * 4 + _ROUTE_BYTES * shape.top_k


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends on average for one layer, to ranks of its node and to other nodes."""

    within: float
    between: float

    @property
    def total(self) -> float:
        """To anyone."""
        return self.within + self.between


@dataclass(frozen=True)
class Parts:
    """µs of a layer on the rank with the most work. `hidden`: of the shared expert and the combine, what lies under
    the other of the two."""

    dispatch: float
    experts: float
    shared: float
    combine: float

    @property
    def hidden(self) -> float:
        return min(self.shared, self.combine)

    @property
    def total(self) -> float:
        """Of the layer: router and everything outside it are not in it."""
        return self.dispatch + self.experts + max(self.shared, self.combine)

    @property
    def communication(self) -> float:
        """Dispatch and combine, as if nothing hid them."""
        return self.dispatch + self.combine


def hit_probability(experts: int, held: int, top_k: int) -> float:
    """That a token with `top_k` distinct experts, all alike, has one of the `held`: 1 − C(E−held, k) / C(E, k)."""
    return 1 - comb(experts - held, top_k) / comb(experts, top_k)


def copies(layout: Layout, experts: int, top_k: int) -> tuple[float, float]:
    """Of each token that an all-to-all sends: between nodes (once to each node that it has a route to, less its own),
    and within nodes (from the rank that a node got it at to the others of the node that hold its experts)."""
    p, n, q = layout.ranks, layout.nodes, layout.per_node
    between = (n - 1) * hit_probability(experts, round(experts * q / p), top_k)
    return between, (p - n) * hit_probability(experts, max(1, round(experts / p)), top_k)


def traffic(name: Name, layout: Layout, shape: ModelShape, tokens: float, wire: Wire) -> Traffic:
    """Bytes that a rank sends for a layer of `tokens` T, on average over the ranks.

    all_reduce 2(p−1)/p·T·H·c, of which the share of a ring's hops that leave the node goes between nodes;
    reduce_scatter (p−1)/p·T·H·(c+2); all_gather (p−1)/p·T·(row + H·c); all_to_all T/p·copies·(row + H·c).
    """
    p, n = layout.ranks, layout.nodes
    row, total = wire.row_bytes(shape), shape.hidden * wire.sum_bytes
    if name == "all_to_all":
        between, within = copies(layout, shape.experts, shape.top_k)
        return Traffic(tokens / p * within * (row + total), tokens / p * between * (row + total))
    bytes_of = {"all_reduce": 2 * total, "reduce_scatter": total + 2 * shape.hidden, "all_gather": row + total}
    sent = (p - 1) / p * tokens * bytes_of[name]
    crossing = n / p if n > 1 else 0.0  # a ring's hops that leave a node
    return Traffic(sent * (1 - crossing), sent * crossing)


def dispatch_us(name: Name, layout: Layout, shape: ModelShape, tokens: float, wire: Wire, network: Network) -> float:
    """Until the experts have what they compute on."""
    row, state = wire.row_bytes(shape), 2 * shape.hidden
    if layout.ranks == 1 or name in SAME_TOKENS:
        return 0.0
    packed = network.pass_over(ceil(tokens / layout.ranks) * (state + row))
    if name == "all_gather":
        return packed + _gather_us(layout, tokens * row, network) + network.pass_over(tokens * (row + state))
    found = tokens / layout.ranks * (1 + sum(copies(layout, shape.experts, shape.top_k)))
    return (
        packed + _exchange_us(layout, shape, tokens, row, network, asks=True) + network.pass_over(found * (row + state))
    )


def combine_us(name: Name, layout: Layout, shape: ModelShape, tokens: float, wire: Wire, network: Network) -> float:
    """From the partials to the sum."""
    if layout.ranks == 1:
        return 0.0
    elements, mine = tokens * shape.hidden, tokens / layout.ranks * shape.hidden
    size = elements * wire.sum_bytes
    cast = network.pass_over(elements * (4 + wire.sum_bytes)) if wire.sum_bytes != 4 else 0.0  # partials are f32
    if name == "all_reduce":
        return cast + _reduce_us(layout, size, network)
    if name == "reduce_scatter":
        rounded = network.pass_over(mine * (4 + 2)) if wire.sum_bytes != 2 else 0.0
        return cast + _gather_us(layout, size, network) + rounded + _gather_us(layout, elements * 2, network)
    if name == "all_gather":
        return cast + _gather_us(layout, size, network)
    # A row for every copy, and all of them are added up where the token is.
    sent = mine * sum(copies(layout, shape.experts, shape.top_k))
    added = network.pass_over((mine + 3 * sent) * wire.sum_bytes)
    return _exchange_us(layout, shape, tokens, shape.hidden * wire.sum_bytes, network, asks=False) + added


def _reduce_us(layout: Layout, size: float, network: Network) -> float:
    """An all-reduce of `size` bytes: a tree's steps, up and down; within a node each rank sends 2(q−1)/q of it, and a
    node sends 2(n−1)/n of it to others through all its ranks' links, at the same time."""
    n, q = layout.nodes, layout.per_node
    steps = 2 * ceil(log2(q)) * network.node.step_us + 2 * ceil(log2(n)) * network.fabric.step_us
    within = 2 * (q - 1) / q * size / network.node.bytes_per_s
    between = 2 * (n - 1) / n * size / q / network.fabric.bytes_per_s
    return network.call_us + steps + max(within, between) * 1e6


def _gather_us(layout: Layout, size: float, network: Network) -> float:
    """An all-gather to, or a reduce-scatter of, `size` bytes: a ring's p−1 steps; each rank receives the share of the
    others, those of other nodes once a node through all its ranks' links."""
    n, q, p = layout.nodes, layout.per_node, layout.ranks
    if p == 1:
        return 0.0
    steps = (p - n) * network.node.step_us + (n - 1) * network.fabric.step_us
    within = (q - 1) / q * size / (_GATHERS * network.node.bytes_per_s)
    between = (n - 1) / n * size / q / network.fabric.bytes_per_s
    return network.call_us + steps + max(within, between) * 1e6


def _exchange_us(
    layout: Layout, shape: ModelShape, tokens: float, row: float, network: Network, *, asks: bool
) -> float:
    """All-to-alls between nodes and within: one step each and a little for every peer. With `asks` the numbers of rows
    are exchanged before, through the host."""
    n, q, p = layout.nodes, layout.per_node, layout.ranks
    between, within = copies(layout, shape.experts, shape.top_k)
    us = 0.0
    for peers, sent, link in ((n, between, network.fabric), (q, within, network.node)):
        if peers > 1:
            us += network.call_us + link.step_us + (peers - 2) * network.peer_us
            us += tokens / p * sent * row / link.bytes_per_s * 1e6
            us += _ask_us(peers, link.step_us, network) if asks else 0.0
    return us


def _ask_us(peers: int, step_us: float, network: Network) -> float:
    return network.call_us + (peers - 1) * step_us + network.host_us


def experts_us(layout: Layout, shape: ModelShape, tokens: float, device: Device, imbalance: float = 1.0) -> float:
    """The floor of the routed experts of a rank: the packed bytes of those that are hit, or the FLOPs of its routes.

    Experts alike: of the E/p that it holds a share 1 − (1−k/E)^T is hit. imbalance: the busiest rank's routes over the
    mean.
    """
    held = shape.experts / layout.ranks
    missed: float = (1 - shape.top_k / shape.experts) ** tokens
    hit = held * (1 - missed)
    routes = imbalance * tokens * shape.top_k / layout.ranks
    flops = 6 * shape.hidden * shape.intermediate
    return max(hit * shape.expert_bytes / device.bytes_per_s, routes * flops / device.flop_per_s) * 1e6


def op_us(layout: Layout, shape: ModelShape, tokens: float, device: Device) -> float:
    """About what the kernels take for the routed experts: reading and matmuls one after the other, at the share of the
    device's rates that they reach (V4's shapes on an H200, 1 024 and 8 192 tokens)."""
    held = shape.experts / layout.ranks
    missed: float = (1 - shape.top_k / shape.experts) ** tokens
    read = held * (1 - missed) * shape.expert_bytes / device.bytes_per_s
    flops = 6 * shape.hidden * shape.intermediate * tokens * shape.top_k / layout.ranks
    return (read + flops / device.flop_per_s) * 1e6 / _REACHED


def shared_us(shape: ModelShape, tokens: float, device: Device, slices: int = 1) -> float:
    """The floor of the shared expert, in bf16, of the tokens that a rank puts through it or through a slice."""
    weights = 3 * shape.hidden * shape.intermediate * shape.shared_experts / slices
    return max(2 * weights / device.bytes_per_s, 2 * weights * tokens / device.flop_per_s) * 1e6 if tokens else 0.0


def predict(
    name: Name,
    layout: Layout,
    shape: ModelShape,
    tokens: float,
    wire: Wire,
    network: Network,
    device: Device,
    imbalance: float = 1.0,
) -> Parts:
    """A layer of the group's `tokens` T by one strategy; every rank holds the whole shared expert and computes it for
    the tokens that it has."""
    mine = tokens if name in SAME_TOKENS else ceil(tokens / layout.ranks)
    return Parts(
        dispatch_us(name, layout, shape, tokens, wire, network),
        experts_us(layout, shape, tokens, device, imbalance),
        shared_us(shape, mine, device),
        combine_us(name, layout, shape, tokens, wire, network),
    )


@dataclass(frozen=True)
class Choice:
    """The strategy for a number of tokens, µs of communication predicted by strategy, and the reason in words."""

    name: Name
    tokens: int
    us: dict[Name, float]
    why: str


Measured = Mapping[int, Mapping[Name, float]]
"""µs of dispatch and combine of every strategy, by the group's number of tokens."""


def choose(
    own_tokens: bool,
    layout: Layout,
    shape: ModelShape,
    tokens: int,
    wire: Wire,
    network: Network,
    *,
    capturing: bool = False,
    measured: Measured | None = None,
) -> Choice:
    """The strategy with the least predicted communication for T tokens of the group.

    all_reduce and all_gather stay unless the other is expected to be faster by 10 %; an all-to-all, which cannot be
    captured in a CUDA graph, is left out while `capturing`. With times that were `measured`, predictions are multiplied
    by what they missed at the nearest number of tokens, and 3 % are enough.
    """
    names = OWN_TOKENS if own_tokens else SAME_TOKENS

    def predicted(name: Name, tokens: int) -> float:
        of_model: Any = (name, layout, shape, tokens, wire, network)
        return dispatch_us(*of_model) + combine_us(*of_model)

    us = {name: predicted(name, tokens) for name in names}
    known, near = "", _NEAR_MEASURED if measured else _NEAR
    if measured:
        at = min(measured, key=lambda t: abs(log2(max(t, 1) / max(tokens, 1))))
        us = {name: us[name] * measured[at][name] / predicted(name, at) if us[name] else 0.0 for name in names}
        known = f"; as measured at {at} tokens"
    open_to = [name for name in names if not (capturing and name == "all_to_all")]
    best = min(open_to, key=lambda name: us[name] * (1 + near * (name != names[0])))
    sent = {name: traffic(name, layout, shape, tokens, wire) for name in names}
    said = ", ".join(f"{name} {us[name]:.0f} µs ({sent[name].total / 1e6:.2f} MB sent a rank)" for name in names)
    whose = "of its own" if own_tokens else "that all ranks have"
    where = f"{layout.ranks} ranks on {layout.nodes} node{'s'[: layout.nodes > 1]}"
    left_out = "; all_to_all cannot be captured" if capturing and own_tokens else ""
    return Choice(best, tokens, us, f"{tokens} tokens, each rank with tokens {whose}, {where}: {said}{known}{left_out}")


def pipeline_us(compute: Sequence[float], combine: Sequence[float]) -> float:
    """Ranges that are computed one after the other, each combined while the next are computed: µs until all are."""
    computed = combined = 0.0
    for a, b in zip(compute, combine, strict=True):
        computed += a
        combined = max(computed, combined) + b
    return combined


PARTS = (1, 2, 4)
"""Ranges of columns that a second GEMM may be cut into."""
_DOWN = 1 / 3  # of the experts' work: w2's, of three matrices
_RANGE_US = 20.0  # that a range of columns costs more, where copy engines bring the sums (two H200)
_RANGE_BESIDE_US = 80.0  # and where a collective takes its multiprocessors and its share of the memory's rate
_BESIDE = 132 / 108  # a range is made on the multiprocessors that the collective beside it leaves (H200)


def cut_for_overlap(
    name: Name,
    layout: Layout,
    shape: ModelShape,
    tokens: int,
    wire: Wire,
    network: Network,
    device: Device,
    *,
    whole_shared: bool = True,
    copied: int = 0,
) -> int:
    """Into how many ranges of columns the second GEMM of T tokens is cut, so that the combine of one lies under the
    next, and that of the last under the shared expert where every rank computes all of it.

    No weight is read twice, but every range has its launches and each collective its steps and its multiprocessors,
    unless there are at most `copied` ranges, which copy engines bring. What the shared expert hides anyway needs no
    cut. all_to_all is not cut.
    """
    if name == "all_to_all" or layout.ranks == 1:
        return 1
    down = _DOWN * op_us(layout, shape, tokens, device)
    mine = tokens if name in SAME_TOKENS else ceil(tokens / layout.ranks)
    shared = shared_us(shape, mine, device) / _REACHED if whole_shared else 0.0

    def us(parts: int) -> float:
        more, beside = (_RANGE_US, 1.0) if parts <= copied else (_RANGE_BESIDE_US, _BESIDE)
        one = down / parts + (more if parts > 1 else 0.0)
        computed = [one, *[one * beside] * (parts - 1)]
        combined = [combine_us(name, layout, shape, tokens / parts, wire, network)] * parts
        return max(sum(computed) + shared, pipeline_us(computed, combined))

    return min((parts for parts in PARTS if shape.hidden % (16 * parts) == 0), key=us)
