"""Ranks, layers and tokens to time communication with, and how works are timed on all ranks at once."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ep.comm import Alone
from moe_ep.comm.groups import EpGroups
from moe_ep.layer import MoELayer, RoutedExperts, SharedExpert
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

REPEATS = 15
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

    def us(self, work: Callable[[], object], repeats: int = REPEATS) -> float:
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
