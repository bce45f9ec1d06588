"""The same plan on paper for few and for many ranks: where ranks lie, bytes on each link, µs of a layer by strategy."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launcher.arranging import redundant_slots
from launcher.errors import InputError
from launcher.schema import Config
from moe_ep.cost import OWN_TOKENS, SAME_TOKENS, Name, Wire, choose, predict, traffic
from moe_ep.network import SLINGSHOT, Layout, Network, device_of

RANKS = tuple(4 * 2**i for i in range(10))
TOKENS = (1, 64, 512, 4096)


@dataclass(frozen=True)
class ScaleLine:
    """A layer of one EP group by one strategy. tokens: of each rank. within, between: bytes that a rank sends to its
    node and to other nodes. µs as `moe_ep.cost.Parts`; fits: whether the routed experts are within a device's memory,
    None where the cluster file does not tell that."""

    ranks: int
    nodes: int
    ep: int
    groups: int
    tokens: int
    strategy: Name
    chosen: bool
    within: float
    between: float
    experts_us: float
    communication_us: float
    layer_us: float
    fits: bool | None


def lines(config: Config, ranks: Sequence[int], tokens: Sequence[int]) -> list[ScaleLine]:
    """Every number of ranks, of tokens a rank, and strategy. An EP group takes all ranks, or where these are more than
    the experts, the largest part of them that is not: the groups then work beside one another on tokens of their own.

    Raises
    ------
    InputError
        If ranks are not whole nodes.
    """
    found: list[ScaleLine] = []
    for count in ranks:
        per_node = min(config.topology.ranks_per_node, count)
        if count < 1 or count % per_node:
            raise InputError(f"--ranks {count}: not a multiple of topology.ranks_per_node {per_node}")
        ep = next(e for e in range(min(count, config.model.sizes.experts), 0, -1) if count % e == 0)
        for each in tokens:
            found += _lines(config, count, per_node, ep, each)
    return found


def _lines(config: Config, count: int, per_node: int, ep: int, each: int) -> list[ScaleLine]:
    shape, network = config.model.sizes, network_of(config)
    layout = Layout.of(ep, per_node)
    wire = Wire(config.comm.payload, 4 if config.comm.sums == "f32" else 2)
    total = each * ep
    best = {own: choose(own, layout, shape, total, wire, network).name for own in (False, True)}
    memory = config.cluster.device_memory_gb
    held = shape.layers * -(-(shape.experts + redundant_slots(config)) // ep) * shape.expert_bytes
    found = []
    for name in (*SAME_TOKENS, *OWN_TOKENS):
        parts = predict(name, layout, shape, total, wire, network, device_of(config.cluster.arch))
        sent = traffic(name, layout, shape, total, wire)
        found.append(
            ScaleLine(
                *(count, count // per_node, ep, count // ep, each, name, name == best[name in OWN_TOKENS]),
                *(sent.within, sent.between, parts.experts, parts.communication, parts.total),
                None if memory is None else held <= memory * 1e9,
            )
        )
    return found


def network_of(config: Config) -> Network:
    """The cluster file's figures, or those of MI300A nodes on Slingshot."""
    return config.cluster.network.network if config.cluster.network else SLINGSHOT


def assumptions(config: Config) -> list[str]:
    """What the predictions take for granted."""
    network, device = network_of(config), device_of(config.cluster.arch)
    return [
        f"network: {network.source}",
        f"a collective {network.call_us:g} µs and {network.node.step_us:g} µs a step within a node, "
        f"{network.fabric.step_us:g} µs between; a rank sends {network.node.bytes_per_s / 1e9:g} GB/s within and "
        f"{network.fabric.bytes_per_s / 1e9:g} GB/s between nodes, all ranks at once, and nothing contends above",
        f"device: {device.bytes_per_s / 1e12:g} TB/s of weights, {device.flop_per_s / 1e12:g} TFLOP/s, floors",
        f"rows packed and cast at {network.copy_bytes_per_s / 1e12:g} TB/s, {network.pass_us:g} µs a pass",
        "every expert equally likely, every rank with as many tokens; router and attention are not in it",
        "all_reduce: a tree's steps; gathers and reduce-scatters: a ring's; the shared expert lies under the combine",
    ]


def scale(config: Config, ranks: Sequence[int], tokens: Sequence[int], *, as_json: bool, plot: Path | None) -> int:
    """Show the lines. Exit code 0."""
    found = lines(config, ranks, tokens)
    if plot is not None:
        draw(plot, config, found)
    if as_json:
        print(json.dumps({"assumptions": assumptions(config), "lines": [asdict(line) for line in found]}))
        return 0
    console = Console()
    console.print(table(config, found))
    for text in assumptions(config):
        console.print(f"- {text}", highlight=False)
    return 0


def table(config: Config, found: Sequence[ScaleLine]) -> Table:
    """A row for each number of ranks and tokens: µs of a layer by strategy, the cost model's choices starred."""
    names = (*SAME_TOKENS, *OWN_TOKENS)
    heads = ("ranks", "nodes", "EP", "tokens a rank", "experts", *names, "MB a rank: node", "fabric")
    shown = Table(*heads, title=f"{config.model.name}: predicted µs of a layer; * chosen")
    rows: dict[tuple[int, int], dict[Name, ScaleLine]] = {}
    for line in found:
        rows.setdefault((line.ranks, line.tokens), {})[line.strategy] = line
    for by_name in rows.values():
        own = next(line for name, line in by_name.items() if name in OWN_TOKENS and line.chosen)
        us = [f"{by_name[name].layer_us:,.0f}{'*' * by_name[name].chosen}" for name in names]
        ep = str(own.ep) if own.fits is not False else f"{own.ep} (experts do not fit)"
        cells: list[Any] = [own.ranks, own.nodes, ep, own.tokens, f"{own.experts_us:,.0f}", *us]
        shown.add_row(*map(str, cells), f"{own.within / 1e6:,.2f}", f"{own.between / 1e6:,.2f}")
    return shown


def draw(path: Path, config: Config, found: Sequence[ScaleLine]) -> None:
    """A panel for each number of tokens a rank: µs of a layer over ranks, a curve for each strategy.

    Raises
    ------
    InputError
        If matplotlib is not there, or the file cannot be written.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        raise InputError("--plot takes matplotlib: pip install 'moe-ep[bench]'") from None
    tokens = sorted({line.tokens for line in found})
    figure, axes = plt.subplots(1, len(tokens), figsize=(3.6 * len(tokens), 3.6), squeeze=False)
    for axis, each in zip(axes[0], tokens, strict=True):
        mine = [line for line in found if line.tokens == each]
        for name in (*SAME_TOKENS, *OWN_TOKENS):
            points = [(x.ranks, x.layer_us) for x in mine if x.strategy == name]
            axis.plot(*zip(*points, strict=True), ".--" if name == "all_gather" else ".-", label=name)
        floor = [(x.ranks, x.experts_us) for x in mine if x.strategy == OWN_TOKENS[0]]
        axis.plot(*zip(*floor, strict=True), ":", color="grey", label="experts alone")
        axis.set(xscale="log", yscale="log", xlabel="ranks", title=f"{each} tokens a rank")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("predicted µs of a layer")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"{config.model.name} on {config.cluster.name}, by the cost model")
    figure.tight_layout()
    unfinished = path.with_name(f".{path.name}")
    try:
        figure.savefig(unfinished, dpi=110, format=path.suffix.lstrip(".") or "png")
        unfinished.replace(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: {error}") from None
    finally:
        plt.close(figure)
