"""This package's kernels beside every public kernel that is here, on V4's shapes, in one run of a given time.

    python -m benchmarks.peers OUT --seconds 280

First all kernels are compiled side by side, then `python -m moe_ep.bench` times them one after the other, what matters
most first; its lines are in OUT as they come. Then: how many times longer each peer takes, from a CUDA graph and from
the host, and, where one takes less, which launches both spend their time in. Needs a GPU.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from moe_ep.bench import report
from moe_ep.bench.cases import SHAPES, Routing, random_batch, random_weights
from moe_ep.bench.contenders import CONTENDERS, OURS
from moe_ep.bench.runs import Line

V4 = ("flash-ep4", "pro-ep8", "pro-ep16", "flash-ep8-i512", "pro-ep32", "flash-ep8")
TOKENS = (8, 512, 8192, 64, 2048, 1)
FAST, SLOW = ("tokenspeed", "triton_kernels", "marlin"), ("xkernels",)
_COMPILING = 0.35  # of the time, at most
_KERNEL_S = 14.0  # a kernel has for a shape
_EXPLAINED = 4

Way = Literal["graph", "host"]


@dataclass(frozen=True)
class Stage:
    """What one process times."""

    name: str
    kernels: tuple[str, ...]
    shapes: tuple[str, ...]
    routings: tuple[Routing, ...]

    def command(self, tokens: Sequence[int], json: Path) -> list[str]:
        """That times it, and writes its lines there."""
        options = {"shape": self.shapes, "routing": self.routings, "kernel": self.kernels, "tokens": tokens}
        given = [f"--{option}={value}" for option, values in options.items() for value in values]
        return [sys.executable, "-m", "moe_ep.bench", *given, f"--limit={_KERNEL_S}", f"--json={json}"]


def stages(shapes: Sequence[str], kernels: Sequence[str]) -> list[Stage]:
    """In order of value: the peers that take longest last; skewed routing on the first shape."""
    fast, slow = (tuple(k for k in kernels if (k in SLOW) is late) for late in (False, True))
    everywhere: tuple[Sequence[str], tuple[Routing, ...]] = shapes, ("uniform",)
    skewed: tuple[Sequence[str], tuple[Routing, ...]] = shapes[:1], ("zipf", "one")
    return [
        Stage(f"{name}-{routing}", group, tuple(chosen), routings)
        for name, group in (("fast", fast), ("slow", slow))
        for routing, (chosen, routings) in (("uniform", everywhere), ("skewed", skewed))
        if group
    ]


@dataclass(frozen=True, order=True)
class Ratio:
    """A peer's time over this package's, in one case."""

    times: float
    way: Way
    shape: str
    tokens: int
    routing: Routing
    peer: str


def ratios(lines: Sequence[Line]) -> Iterator[Ratio]:
    """Of every case that both have, by either way to launch."""
    ours = {(line.shape, line.tokens, line.routing): line for line in lines if line.kernel == OURS}
    for line in lines:
        mine = ours.get((line.shape, line.tokens, line.routing))
        if mine is None or line.kernel == OURS:
            continue
        ways: tuple[tuple[Way, float | None, float | None], ...] = (
            ("graph", line.graph, mine.graph),
            ("host", line.eager, mine.eager),
        )
        for way, theirs, own in ways:
            if theirs is not None and own is not None:
                yield Ratio(theirs / own, way, line.shape, line.tokens, line.routing, line.kernel)


def compiled(kernel: str, shape: str, tokens: Sequence[int]) -> str | None:
    """Run a kernel once for each number of tokens, so that all it needs is compiled; why it could not be."""
    try:
        device = torch.device("cuda")
        op = CONTENDERS[kernel].prepare(SHAPES[shape], random_weights(SHAPES[shape], device, 0))
        for count in tokens:
            op(random_batch(SHAPES[shape], count, "uniform", device, 0))
            torch.cuda.synchronize()
    except Exception as caught:
        return f"{kernel} on {shape}: {type(caught).__name__}: {caught}"
    return None


def compile_all(kernels: Sequence[str], shapes: Sequence[str], tokens: Sequence[int], seconds: float) -> None:
    """Side by side, each shape of each kernel in a process."""
    jobs = [(kernel, shape, tokens) for shape in shapes for kernel in kernels]
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1), maxtasksperchild=1) as pool:
        try:
            for failure in filter(None, pool.starmap_async(compiled, jobs, chunksize=1).get(seconds)):
                print(failure)
        except multiprocessing.TimeoutError:
            print(f"not everything was compiled after {seconds:.0f} s: some times to come have that in them")


def timed(stage: Stage, tokens: Sequence[int], json: Path, seconds: float) -> list[Line]:
    """The lines of a stage, as many as there are when its time or its process ends."""
    json.unlink(missing_ok=True)
    try:
        subprocess.run(stage.command(tokens, json), check=True, timeout=max(seconds, 1.0))
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as caught:
        print(f"{stage.name}: {caught}"[:300], flush=True)
    return report.load(json)[1] if json.exists() else []


def explain(lost: Ratio) -> None:
    """Print the launches that an op of ours, and one of the peer's, spends most time in: µs, and how often."""
    shape, device, ops = SHAPES[lost.shape], torch.device("cuda"), 6
    weights = random_weights(shape, device, 0)
    batches = [random_batch(shape, lost.tokens, lost.routing, device, seed) for seed in range(ops)]
    for kernel in (OURS, lost.peer):
        op = CONTENDERS[kernel].prepare(shape, weights)
        for batch in batches:
            op(batch)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for batch in batches:
            op(batch)
        host = time.perf_counter() - begin
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for batch in batches:
                op(batch)
            torch.cuda.synchronize()
        print(f"{kernel}, {lost.shape}, {lost.tokens} tokens, {lost.routing}: the host takes {host / ops * 1e6:.0f} µs")
        for event in sorted(profiled.key_averages(), key=lambda event: -event.device_time_total)[:8]:
            print(f"{event.device_time_total / ops:10.1f} µs {event.count / ops:5.1f} x {event.key:.90}")


def main(
    out: Annotated[Path, typer.Argument(help="the folder of the results")],
    seconds: Annotated[float, typer.Option(help="for all of it")] = 300.0,
    shape: Annotated[list[str], typer.Option()] = list(V4),  # noqa: B006
    tokens: Annotated[list[int], typer.Option()] = list(TOKENS),  # noqa: B006
) -> None:
    """Time all peers that can be imported beside this package's kernels."""
    if not torch.cuda.is_available():
        sys.exit("the peers' kernels need a GPU, and torch sees none")
    for name in shape:
        if name not in SHAPES:
            raise typer.BadParameter(f"--shape {name}: there are {', '.join(SHAPES)}")
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    kernels = [kernel for kernel in (OURS, *FAST, *SLOW) if CONTENDERS[kernel].available]
    print("here:", *kernels, flush=True)
    compile_all(kernels, shape, tokens, seconds * _COMPILING)
    lines: list[Line] = []
    for stage in stages(shape, kernels):
        lines += timed(stage, tokens, out / f"{stage.name}.json", deadline - time.monotonic())
    found = sorted(ratios(lines))
    for ratio in found:
        print(f"{ratio.times:8.2f} {ratio.way:>6} {ratio.shape:>15} {ratio.tokens:6} {ratio.routing:>8} {ratio.peer}")
    lost = [ratio for ratio in found if ratio.times < 1]
    print(f"a peer takes less in {len(lost)} of {len(found)}")
    for ratio in lost[:_EXPLAINED]:
        if time.monotonic() < deadline:
            explain(ratio)


if __name__ == "__main__":
    typer.run(main)
