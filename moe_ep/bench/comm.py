"""python -m torch.distributed.run --nproc-per-node N -m moe_ep.bench.comm: what communication takes, and overlap hides.

For each shape and number of tokens T of the group: dispatch and combine of every strategy beside the cost model, what
follows the experts beside its parts, each alone, then a whole layer beside its parts and beside the same layer without
communication.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial as partial_of
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import triton
import typer
from torch import Tensor

from moe_ep.bench.clock import measure_rates
from moe_ep.bench.fit import Part, Sample, fit
from moe_ep.comm import Alone, Combine, Routed
from moe_ep.comm.groups import EpGroups, ep_groups
from moe_ep.cost import OWN_TOKENS, PARTS, SAME_TOKENS, Name, Wire, choose, predict
from moe_ep.layer import MoELayer, RoutedExperts, SharedExpert, add_columns, finish
from moe_ep.network import Device, Layout, Link, Network
from moe_ep.routing import Router
from moe_ep.selector import select_backend
from moe_ep.shape import ModelShape
from moe_ep.spec import MoELayerSpec, Mxfp4Config

FLASH = ModelShape(hidden=4096, intermediate=2048, layers=43, experts=256, top_k=6, vocab=8, routed_scaling=1.5)
PRO = ModelShape(hidden=7168, intermediate=3072, layers=61, experts=384, top_k=6, vocab=8, routed_scaling=2.5)
TINY = ModelShape(hidden=256, intermediate=128, layers=2, experts=16, top_k=6, vocab=8)
FEW = replace(FLASH, experts=32)
"""Of Flash's experts as many on each of two ranks as a rank holds of 32 (EP=16)."""
SHAPES = {"flash": FLASH, "pro": PRO, "few": FEW, "tiny": TINY}

NVLINK = Network(6, 1, 800, Link(3, 290e9), Link(3, 290e9), "to fit from: NVLink within a node")
LAYERS = 2
"""Layers that are called in turn, so that no cache holds the weights of the next."""
_REPEATS = 15
_ROUNDS = 9  # of a layer and all its parts
_LAUNCHING = 1_000_000  # cycles, under which the host launches what is not captured


@dataclass(frozen=True)
class Bench:
    """Where a run stands."""

    rank: int
    world: int
    device: torch.device
    groups: EpGroups
    lines: list[dict[str, Any]]
    about: dict[str, Any]
    path: Path | None
    side: Any
    """A stream for what is captured: one, since the experts keep a workspace for each."""
    pool: Any = None
    """Memory of what is captured: one, since graphs are replayed one after the other."""

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line: rank 0 prints it and writes all so far, atomically."""
        self.lines.append(line)
        if self.rank:
            return
        print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()}), flush=True)
        if self.path is not None:
            unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            unfinished.write_text(json.dumps({**self.about, "lines": self.lines}, indent=1) + "\n")
            unfinished.replace(self.path)

    def us(self, work: Callable[[], object], repeats: int = _REPEATS) -> float:
        """Median µs of a call, begun on all ranks together, of the slowest rank each time."""
        return median(self.rounds([work], repeats)[0])

    def rounds(self, works: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
        """µs of every work in every round, of the slowest rank. A round does each once: a device that grows hot and
        slow does so for all alike."""
        for work in works:
            work()
        found = torch.tensor([[self._once(work) for work in works] for _ in range(repeats)], dtype=torch.float64)
        slowest = found.to(self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        columns: list[list[float]] = slowest.t().tolist()
        return columns

    def _once(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            dist.barrier()
            begun = time.perf_counter()
            work()
            return (time.perf_counter() - begun) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        torch.cuda.synchronize()
        # What the host takes to launch lies under this, on every rank alike.
        torch.cuda._sleep(_LAUNCHING)
        dist.all_reduce(torch.zeros(1, device=self.device))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def graph(self, works: Sequence[Callable[[], object]]) -> Callable[[], None]:
        """All works in one CUDA graph."""
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            for work in works:
                work()
        torch.cuda.current_stream().wait_stream(self.side)
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.side, pool=self.pool):
            for work in works:
                work()
        replay: Callable[[], None] = graph.replay
        return replay


def build_layers(shape: ModelShape, bench: Bench, count: int) -> list[MoELayer]:
    """Layers of this rank with random weights; the combine is set later."""
    generator = torch.Generator(bench.device).manual_seed(bench.rank)
    same = torch.Generator(bench.device).manual_seed(99)
    found = []
    for number in range(count):
        spec = MoELayerSpec.of_rank(shape, number, bench.rank, bench.world)
        backend = select_backend(spec, Mxfp4Config())
        with bench.device:
            experts = RoutedExperts(backend, shape.swiglu_limit)
        for name, parameter in experts.named_parameters():
            low, high = (118, 122) if name.endswith("_scale") else (0, 256)
            parameter.data.random_(low, high, generator=generator)
        experts.process_weights_after_loading()

        router, shared = router_and_shared(shape, bench, same)
        found.append(MoELayer(router, experts, Alone(), shared))
    return found


def router_and_shared(shape: ModelShape, bench: Bench, generator: torch.Generator) -> tuple[Router, SharedExpert]:
    """With random weights, the same on all ranks."""

    def normal(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator, device=bench.device)
        scaled: Tensor = values.div_(size[-1] ** 0.5).bfloat16()
        return scaled

    shared = SharedExpert(normal(2 * shape.intermediate, shape.hidden), normal(shape.hidden, shape.intermediate), 10)
    return Router(normal(shape.experts, shape.hidden), shape.top_k, shape.routed_scaling, None, None), shared


def tokens_of(shape: ModelShape, tokens: int, bench: Bench, *, own: bool) -> tuple[Tensor, list[int]]:
    """x bf16 of this rank, and the ranks' numbers of tokens: its share of T, or all of them."""
    generator = torch.Generator(bench.device).manual_seed(tokens)
    x = torch.randn(tokens, shape.hidden, generator=generator, device=bench.device).bfloat16()
    counts = [tokens // bench.world + (r < tokens % bench.world) for r in range(bench.world)]
    start = sum(counts[: bench.rank])
    return (x[start : start + counts[bench.rank]].contiguous() if own else x), counts


def communication(name: str, shape: ModelShape, router: Router, tokens: int, wire: Wire, bench: Bench) -> list[Sample]:
    """Dispatch and combine of every strategy, alone, eager; lines with what the model predicts before any fit.

    Returns them for a fit.
    """
    samples: list[Sample] = []
    dtype = torch.float32 if wire.sum_bytes == 4 else torch.bfloat16
    for strategy in (*SAME_TOKENS, *OWN_TOKENS):
        combine = bench.groups.strategy(strategy, shape.experts, wire.payload, dtype)
        x, counts = tokens_of(shape, tokens, bench, own=combine.own_tokens)
        topk = router(x)
        routed = combine.dispatch(x, topk, counts)
        partial = torch.zeros(routed.x.shape[0], shape.hidden, device=bench.device)
        works = (partial_of(combine.dispatch, x, topk, counts), partial_of(combine.arrive, partial, routed))
        dispatch, back = (median(times) for times in bench.rounds(works, _REPEATS))
        predicted = predict(strategy, bench.groups.layout, shape, tokens, wire, NVLINK, Device(4e12, 6e14))
        line = {"kind": "communication", "shape": name, "tokens": tokens, "strategy": strategy, **asdict(wire)}
        line |= {
            "dispatch_us": dispatch,
            "combine_us": back,
            "total_us": back + (dispatch if combine.own_tokens else 0),
        }
        bench.add(line | {"predicted_us": predicted.communication})
        of_model = (bench.groups.layout, shape, tokens, wire)
        samples.append(Sample(strategy, "combine", *of_model, back))
        if combine.own_tokens:
            samples.append(Sample(strategy, "dispatch", *of_model, dispatch))
    return samples


def tail(
    name: str, shape: ModelShape, router: Router, shared: SharedExpert, tokens: int, strategy: Name, bench: Bench
) -> None:
    """What a layer does after its experts, beside its parts: combine, shared expert, and the last sum.

    hidden: (all parts − the tail) over the smaller of shared and combine, the median over rounds.
    """
    combine = bench.groups.strategy(strategy, shape.experts)
    captured = bench.device.type == "cuda" and combine.capturable
    x, counts = tokens_of(shape, tokens, bench, own=combine.own_tokens)
    routed = combine.dispatch(x, router(x), counts)
    partial = torch.zeros(routed.x.shape[0], shape.hidden, device=bench.device)
    added, sums = torch.zeros_like(x), last_sums(combine, partial, routed, x)
    pause = combine.spared(routed, 1) > 0

    def one(work: Callable[[], object]) -> Callable[[], object]:
        return bench.graph([work]) if captured else work

    works = {
        "shared": one(lambda: shared(x)),
        "combine": one(lambda: combine.arrive(partial, routed)),
        "add": one(lambda: sums(added)),
        "tail": one(lambda: finish(x, [combine.begin(partial, routed)], shared, pause=pause)),
    }
    took = {
        part: torch.tensor(us) for part, us in zip(works, bench.rounds(list(works.values()), _REPEATS), strict=True)
    }
    saved = took["shared"] + took["combine"] + took["add"] - took["tail"]
    line: dict[str, Any] = {"kind": "tail", "shape": name, "tokens": tokens, "strategy": strategy, "captured": captured}
    line |= {f"{part}_us": float(us.median()) for part, us in took.items()}
    bench.add(line | {"hidden": float((saved / torch.minimum(took["shared"], took["combine"])).median())})


def last_sums(combine: Combine, partial: Tensor, routed: Routed, x: Tensor) -> Callable[[Tensor | None], None]:
    """A layer's last pass, given the shared expert's result or None, over as many summands as the combine gives."""
    with combine.begin(partial, routed).summands() as given:
        total, other = (None if one is None else torch.zeros_like(one) for one in given)
    assert total is not None
    out = torch.empty_like(x)
    return lambda shared: add_columns(total, shared, out, 0, other)


def overlap(
    name: str, shape: ModelShape, layers: list[MoELayer], tokens: int, strategy: Name, bench: Bench
) -> list[Sample]:
    """A layer with its combine beside its parts, in rounds of all of them, replayed from graphs where they can be.

    A share that is hidden is of each round, and the median of these. hidden_shared: (all parts − layer) over the
    smaller of shared and combine. hidden_against_alone: (alone + combine − layer) over the same, where all ranks have
    the tokens: alone is the layer without communication, one device with its share of the experts. Without shared
    expert: hidden_N with the second GEMM in N ranges, where experts_N are the experts so, over the smaller of it, a
    third of the experts, and combine; saved_N_us: against the layer in one range. hidden_both_N: with both, over the
    combine. Returns the parts, for a fit.
    """
    combine = bench.groups.strategy(strategy, shape.experts)
    captured = bench.device.type == "cuda" and combine.capturable
    x, counts = tokens_of(shape, tokens, bench, own=combine.own_tokens)
    topk = layers[0].router(x)
    routed = combine.dispatch(x, topk, counts)
    partial = torch.zeros(routed.x.shape[0], shape.hidden, device=bench.device)
    added, sums = torch.zeros_like(x), last_sums(combine, partial, routed, x)
    shared = [layer.shared_expert for layer in layers]

    def each(work: Callable[[MoELayer], object]) -> Callable[[], object]:
        works = [lambda layer=layer: work(layer) for layer in layers]
        return bench.graph(works) if captured else lambda: [one() for one in works]

    def whole(how: Combine, parts: int = 1, *, bare: bool = False) -> Callable[[], object]:
        given = routed.x if how.name == "none" else x

        def one(layer: MoELayer) -> Tensor:
            layer.shared_expert = None if bare else shared[layers.index(layer)]
            layer.combine, layer.cut = how, lambda rows: parts
            done: Tensor = layer(given, counts=counts)
            return done

        return each(one)

    works = {
        "router": each(lambda layer: layer.router(x)),
        "experts": each(lambda layer: layer.experts(routed.x, routed.topk)),
        "shared": each(lambda layer: shared[layers.index(layer)](x)),  # type: ignore[misc]
        "combine": each(lambda layer: combine.arrive(partial, routed)),
        "add": each(lambda layer: sums(added)),
        "cast": each(lambda layer: sums(None)),
        "alone": whole(Alone()),
        "layer": whole(combine),
    }
    if combine.own_tokens:
        works["dispatch"] = each(lambda layer: combine.dispatch(x, topk, counts))
    cuts = [parts for parts in PARTS if combine.parts(routed, parts) == parts]
    works |= {
        f"experts_{parts}": each(lambda layer, parts=parts: [*layer.experts.by_columns(routed.x, routed.topk, parts)])  # type: ignore[misc]
        for parts in cuts
        if parts > 1
    }
    works |= {f"bare_{parts}": whole(combine, parts, bare=True) for parts in cuts}
    works |= {f"both_{parts}": whole(combine, parts) for parts in cuts if parts > 1}
    for layer, one in zip(layers, shared, strict=True):
        layer.shared_expert = one
    measured = bench.rounds(list(works.values()), _ROUNDS if bench.device.type == "cuda" else 3)
    for layer, one in zip(layers, shared, strict=True):
        layer.shared_expert, layer.cut = one, None
    took = dict(zip(works, (torch.tensor(times) / len(layers) for times in measured), strict=True))
    took.setdefault("dispatch", torch.zeros_like(took["layer"]))
    bench.add(
        {
            "kind": "layer",
            "shape": name,
            "tokens": tokens,
            "strategy": strategy,
            "captured": captured,
            **{f"{part}_us": float(times.median()) for part, times in took.items()},
            **_hidden(took, same_tokens=not combine.own_tokens),
        }
    )
    parts: dict[Part, Tensor] = {"combine": took["combine"]}
    if combine.own_tokens:
        parts["dispatch"] = took["dispatch"]
    layout = bench.groups.layout
    return [Sample(strategy, part, layout, shape, tokens, Wire(), float(us.median())) for part, us in parts.items()]


def _hidden(took: dict[str, Tensor], *, same_tokens: bool) -> dict[str, float]:
    """The shares of `overlap`, from µs by round."""
    smaller = torch.minimum(took["shared"], took["combine"])
    second = torch.minimum(took["experts"] / 3, took["combine"])
    around = took["router"] + took["dispatch"] + took["combine"]
    everything = around + took["experts"] + took["shared"] + took["add"]
    found = {"sum_us": everything, "hidden_shared": (everything - took["layer"]) / smaller}
    if same_tokens:
        found["hidden_against_alone"] = (took["alone"] + took["combine"] - took["layer"]) / smaller
    for label, times in took.items():
        kind, _, parts = label.partition("_")
        if kind == "bare":
            experts = took["experts" if parts == "1" else f"experts_{parts}"]
            found[f"hidden_{parts}"] = (around + experts + took["cast"] - times) / second
            found[f"saved_{parts}_us"] = took["bare_1"] - times
        elif kind == "both":
            found[f"hidden_both_{parts}"] = (everything - times) / took["combine"]
    return {label: float(shares.median()) for label, shares in found.items()}


def choices(lines: Sequence[dict[str, Any]], layout: Layout, network: Network) -> list[dict[str, Any]]:
    """What the model takes, by these constants, beside the fastest that was measured, for all lines of communication.

    over_best: the time of what it takes over that of the fastest, less 1.
    """
    measured: dict[tuple[Any, ...], dict[Name, float]] = {}
    for line in lines:
        if line["kind"] == "communication":
            for own, names in ((False, SAME_TOKENS), (True, OWN_TOKENS)):
                if line["strategy"] in names:
                    key = (line["shape"], line["tokens"], line["payload"], line["sum_bytes"], own)
                    measured.setdefault(key, {})[line["strategy"]] = line["total_us"]
    found = []
    for (name, tokens, payload, sum_bytes, own), us in measured.items():
        taken = choose(own, layout, SHAPES[name], tokens, Wire(payload, sum_bytes), network).name
        best = min(us, key=lambda one: us[one])
        line = {"kind": "choice", "shape": name, "tokens": tokens, "payload": payload, "sum_bytes": sum_bytes}
        line |= {"own_tokens": own, "taken": taken, "best": best, "over_best": us[taken] / us[best] - 1}
        found.append(line)
    return found


def graphs_equal(name: str, shape: ModelShape, layer: MoELayer, tokens: int, strategy: Name, bench: Bench) -> None:
    """Whether a captured layer, replayed on other tokens, gives the bits of the eager one."""
    layer.combine = bench.groups.strategy(strategy, shape.experts)
    x, counts = tokens_of(shape, tokens, bench, own=layer.combine.own_tokens)
    fixed, out = x.clone(), torch.empty_like(x)
    replay = bench.graph([lambda: out.copy_(layer(fixed, counts=counts))])
    fixed.copy_(x.flip(0))
    replay()
    torch.cuda.synchronize()
    same = torch.tensor([int(torch.equal(out, layer(x.flip(0).contiguous(), counts=counts)))], device=bench.device)
    dist.all_reduce(same, op=dist.ReduceOp.MIN)
    bench.add({"kind": "graph", "shape": name, "tokens": tokens, "strategy": strategy, "equal": bool(same.item())})


def main(
    shape: Annotated[list[str], typer.Option(help=f"of {', '.join(SHAPES)}")] = ["flash", "few", "pro"],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(help="of the group, to communicate")] = [1, 16, 128, 1024, 8192],  # noqa: B006
    layer_tokens: Annotated[list[int], typer.Option(help="of the group, of layers")] = [16, 1024, 8192],  # noqa: B006
    whole_layers: Annotated[bool, typer.Option(help="with experts too, whose kernels are compiled first")] = True,
    peer_copies: Annotated[
        bool, typer.Option(help="large sums of two ranks by copy engines, where they can be")
    ] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="where to write the lines, as they come")] = None,
) -> None:
    """Time every strategy and the overlap on all ranks of this host, one device each."""
    for name in shape:
        if name not in SHAPES:
            raise typer.BadParameter(f"--shape {name}: there are {', '.join(SHAPES)}")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    measured = measure_rates(device)
    about = {
        "device": torch.cuda.get_device_name(device) if gpu else "CPU",
        "ranks": world,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "copy": measured.copy,
        "matmul": measured.matmul,
    }
    groups = ep_groups(world, rank, Layout(world, world), 60, peer_copies=peer_copies)
    about["peer_copies"] = groups.whole is not None and groups.whole.peer is not None
    side, pool = (torch.cuda.Stream(), torch.cuda.graph_pool_handle()) if gpu else (None, None)
    bench = Bench(rank, world, device, groups, [], about, json_file, side, pool)
    samples: list[Sample] = []
    for name in shape:
        router, shared = router_and_shared(SHAPES[name], bench, torch.Generator(device).manual_seed(99))
        for count in tokens:
            for wire in (Wire(), Wire("fp8", 2)):
                samples += communication(name, SHAPES[name], router, count, wire, bench)
        for count in layer_tokens:
            for strategy in (*SAME_TOKENS, *OWN_TOKENS):
                tail(name, SHAPES[name], router, shared, count, strategy, bench)
        if not whole_layers:
            continue
        layers = build_layers(SHAPES[name], bench, LAYERS)
        for count in layer_tokens:
            if gpu:
                for captured in ("all_reduce", "reduce_scatter", "all_gather"):
                    graphs_equal(name, SHAPES[name], layers[0], min(count, 128), captured, bench)
            for strategy in (*SAME_TOKENS, *OWN_TOKENS):
                samples += overlap(name, SHAPES[name], layers, count, strategy, bench)
        del layers
        if gpu:
            torch.cuda.empty_cache()
    found = fit(samples, NVLINK, f"fitted on {world} × {about['device']}, {about['date']}")
    bench.add({"kind": "fit", **asdict(found)})
    for line in choices(bench.lines, groups.layout, found.network):
        bench.add(line)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
