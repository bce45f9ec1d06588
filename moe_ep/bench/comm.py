"""python -m torch.distributed.run --nproc-per-node N -m moe_ep.bench.comm: what communication takes, and overlap hides.

For each shape and number of tokens T of the group: dispatch and combine of every strategy beside the cost model, what
follows the experts beside its parts, each alone, then a whole layer beside its parts and beside the same layer without
communication.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial as partial_of
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import triton
import typer

from moe_ep.bench.clock import measure_rates
from moe_ep.bench.fit import Sample, fit
from moe_ep.bench.overlap import graphs_equal, overlap, tail
from moe_ep.bench.rig import REPEATS, SHAPES, Bench, build_layers, router_and_shared, tokens_of
from moe_ep.comm.groups import ep_groups
from moe_ep.cost import OWN_TOKENS, SAME_TOKENS, Name, Wire, choose, predict
from moe_ep.network import Device, Layout, Link, Network
from moe_ep.routing import Router
from moe_ep.shape import ModelShape

NVLINK = Network(6, 1, 800, Link(3, 290e9), Link(3, 290e9), "to fit from: NVLink within a node")
LAYERS = 2
"""Layers that are called in turn, so that no cache holds the weights of the next."""


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
        dispatch, back = (median(times) for times in bench.rounds(works, REPEATS))
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
