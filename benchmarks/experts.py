"""Time of `fused_moe_mxfp4` at V4's expert-parallel shapes beside the floor, with its error beside both.

    python benchmarks/experts.py [--shape flash-ep4 …] [--tokens 1 8 …] [--impl triton_kernel …]

The floor is the larger of two times: the packed bytes of the experts that are hit, once, at the copy rate of
this device, and the FLOPs of the local routes at its bf16 matmul rate; both rates are measured first, in the
same run. Every repeat takes other tokens and so other experts, lest a cache hold the weights. Each line gives
the median over the repeats: eager, and replayed from a CUDA graph.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
from torch import Tensor

from moe_ep import fused_moe_mxfp4
from moe_ep.order import FIELD_OF_CODE_0
from moe_ep.placement import Placement
from moe_ep.shape import ModelShape

T = TypeVar("T")

FLASH = ModelShape(hidden=4096, intermediate=2048, layers=43, experts=256, top_k=6, vocab=129280)
PRO = ModelShape(hidden=7168, intermediate=3072, layers=61, experts=384, top_k=6, vocab=129280)
SHAPES = {
    "flash-ep4": (FLASH, 4),
    "flash-ep8": (FLASH, 8),
    "pro-ep8": (PRO, 8),
    "pro-ep16": (PRO, 16),
    "pro-ep32": (PRO, 32),
}
WARMUP, REPEATS = 3, 15


@dataclass(frozen=True)
class Rates:
    """What this device reaches: bytes/s (read plus written) of a copy, FLOP/s of a bf16 matmul."""

    copy: float
    matmul: float


@dataclass(frozen=True)
class Batch:
    """Tokens of one repeat, with routes uniform over all experts of the model."""

    x: Tensor
    ids: Tensor
    weights: Tensor


def main() -> None:
    """Print one line for each shape, number of tokens and implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["flash-ep4", "pro-ep8"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512, 2048])
    parser.add_argument("--impl", nargs="+", default=["triton_kernel"])
    args = parser.parse_args()
    rates = measure_rates()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"copy {rates.copy / 1e12:.2f} TB/s, bf16 matmul {rates.matmul / 1e12:.0f} TFLOP/s; times in µs")
    heads = (
        "shape",
        "tokens",
        "impl",
        "hit",
        "routes",
        "floor",
        "eager",
        "graph",
        "eager/floor",
        "graph/floor",
        "error",
    )
    print(" ".join(f"{head:>12}" for head in heads))
    for name in args.shape:
        shape, ep_size = SHAPES[name]
        held = len(Placement(shape.experts, ep_size).experts(0))
        weights = random_weights(shape, held)
        for tokens in args.tokens:
            batches = [random_batch(shape, tokens, seed) for seed in range(WARMUP + REPEATS)]
            hit, routes = (
                statistics.fmean(len(local(b, held).unique()) for b in batches),
                statistics.fmean(len(local(b, held)) for b in batches),
            )
            flops = routes * 6 * shape.hidden * shape.intermediate
            floor = max(hit * shape.expert_bytes / rates.copy, flops / rates.matmul) * 1e6
            for impl in args.impl:
                eager, graph, error = timed_line(shape, weights, batches, impl)
                numbers = f"{hit:>12.1f} {routes:>12.1f} {floor:>12.1f} {eager:>12.1f} {graph:>12.1f}"
                ratios = f"{eager / floor:>12.2f} {graph / floor:>12.2f} {error:>12.1e}"
                print(f"{name:>12} {tokens:>12} {impl:>12.12} {numbers} {ratios}", flush=True)


def local(batch: Batch, held: int) -> Tensor:
    """The routes that rank 0 computes."""
    return batch.ids[batch.ids < held]


def timed_line(
    shape: ModelShape, weights: tuple[Tensor, ...], batches: list[Batch], impl: str
) -> tuple[float, float, float]:
    """Median µs eager and by graph, and the error of the last batch against the reference."""
    held = weights[0].shape[0]
    expert_map = torch.full((shape.experts,), -1, dtype=torch.int32, device="cuda")
    expert_map[:held] = torch.arange(held, device="cuda")
    fixed = Batch(*(t.clone() for t in vars(batches[0]).values()))

    def run(batch: Batch, impl: str = impl) -> Tensor:
        w13, w13_scale, w2, w2_scale = weights
        return fused_moe_mxfp4(
            *(batch.x, w13, w13_scale, w2, w2_scale, batch.ids, batch.weights),
            expert_map=expert_map,
            weight_order="kernel",  # random codes are as good in one order as in another
            impl=impl,
        )

    eager = median_us(run, batches)
    if impl == "reference":  # synchronises by nature
        return eager, float("nan"), 0.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(fixed)

    def fill(batch: Batch) -> None:
        for name, target in vars(fixed).items():
            target.copy_(getattr(batch, name))

    replayed = median_us(lambda _: graph.replay(), batches, before=fill)
    error = float("nan")
    if len(fixed.x) <= 128:
        expected = run(batches[-1], "reference").float()
        error = float((out.float() - expected).norm() / expected.norm())
    return eager, replayed, error


def median_us(work: Callable[[T], object], inputs: Sequence[T], before: Callable[[T], None] | None = None) -> float:
    """Median µs of `work` over the inputs after the first WARMUP; `before` is called first and not timed."""
    times: list[float] = []
    for value in inputs:
        if before:
            before(value)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work(value)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[WARMUP:])


def random_weights(shape: ModelShape, held: int) -> tuple[Tensor, ...]:
    """Random codes; the scales keep activations near 1."""

    def codes(rows: int, k: int) -> tuple[Tensor, Tensor]:
        scale = FIELD_OF_CODE_0 + 127 - 1 - int(k).bit_length() // 2
        return (
            torch.randint(0, 256, (held, rows, k // 2), dtype=torch.uint8, device="cuda"),
            torch.randint(scale - 1, scale + 2, (held, rows, k // 32), dtype=torch.uint8, device="cuda"),
        )

    return (*codes(2 * shape.intermediate, shape.hidden), *codes(shape.hidden, shape.intermediate))


def random_batch(shape: ModelShape, tokens: int, seed: int) -> Batch:
    """Every token takes top_k distinct experts; at least one route of the batch is local."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    ids = torch.rand(tokens, shape.experts, device="cuda", generator=generator).argsort(-1)[:, : shape.top_k].int()
    ids[0, 0] = torch.where((ids[0] == 0).any(), ids[0, 0], 0)
    x = torch.randn(tokens, shape.hidden, device="cuda", generator=generator).bfloat16()
    return Batch(x, ids, torch.rand(tokens, shape.top_k, device="cuda", generator=generator))


def measure_rates() -> Rates:
    """A 2 GiB copy and an 8192³ bf16 matmul, on random data."""
    source = torch.randint(0, 2**31, (2**29,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    copy = median_us(target.copy_, [source] * (WARMUP + REPEATS))
    matmul = median_us(a.matmul, [b] * (WARMUP + REPEATS))
    return Rates(copy=2 * source.nbytes / copy * 1e6, matmul=2 * 8192**3 / matmul * 1e6)


if __name__ == "__main__":
    main()
