"""Launch configurations measured on a device.

For each number of tokens the rank's op is timed with every kernel and block of routes that suit its rows an expert:
first with each tile for both projections, then, with the best of these for gate and up, each tile for down. A table has
a regime for each number of tokens; between two of them lies the geometric mean of their rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

import torch
import triton

from moe_ep.backends.call import Impl, table_name, using
from moe_ep.backends.target import current_target
from moe_ep.bench.cases import RankShape, Weights, random_batch, random_weights
from moe_ep.bench.clock import eager_us, graph_us
from moe_ep.bench.contenders import CONTENDERS, own
from moe_ep.bench.peers import Op
from moe_ep.bench.runs import relative_error
from moe_ep.kernels.launch import Gemm, Kernel, LaunchConfig, Regime, Table, fit, fit_fp8, has_bf16_products
from moe_ep.spec import ActivationDtype

KEPT = "; the rest: "
"""Between the source of what was measured and that of what a table had before."""

MOST_ERROR = 1e-2
"""A candidate whose result is further from f64 than this is not taken, however fast."""

_STREAM = tuple(
    Gemm(block_n, warps, stages, slices)
    for block_n, warps, slices in ((16, 1, 1), (16, 2, 2), (16, 4, 4), (32, 4, 2), (64, 4, 1), (64, 8, 2))
    for stages in (1, 2, 3)
)
_ROUTE = tuple(
    Gemm(block_n, slices * across, stages, slices)
    for block_n, slices, across in ((16, 4, 1), (16, 8, 1), (32, 4, 2), (32, 4, 1), (32, 8, 1))
    for stages in (1, 2, 3)
)
_WARPGROUP = tuple(Gemm(block_n, 4, stages) for block_n in (64, 128) for stages in (4, 6, 8))
_TILE = tuple(Gemm(block_n, 4, stages) for block_n in (32, 64, 128) for stages in (2, 3))


@dataclass(frozen=True)
class Timed:
    """A configuration with the µs that an op took with it."""

    config: LaunchConfig
    us: float


def tuned_impl() -> Impl:
    """The backend whose tiles are tuned unless another is named: the one that the selector prefers here."""
    return "gluon_kernel" if CONTENDERS["gluon_kernel"].available else "triton_kernel"


def families(
    arch: str, rows: float, impl: Impl = "triton_kernel", activations: ActivationDtype = "bf16"
) -> Iterator[tuple[Kernel, int, tuple[Gemm, ...]]]:
    """Kernels and blocks of routes of a backend for `rows` routes an expert, with the tiles to try.

    With fp8 activations only gfx942 has any: elsewhere the fallback multiplies them.
    """
    if activations == "fp8":
        if impl == "gluon_kernel" and arch == "gfx942" and rows <= 1:
            yield "route", 16, _ROUTE
        sizes: tuple[int, ...] = (16, 32, 64) if arch == "gfx942" else ()
        yield from (("stream", size, _STREAM) for size in sizes if size <= max(16, 4 * rows) and rows <= 6 * size)
        return
    if impl == "gluon_kernel":
        if rows <= 1:
            yield "route", 16, _ROUTE
        if rows <= 96:
            yield "cdna3", 16, _STREAM
        if rows >= 8:
            yield "cdna3", 32, _STREAM
        return

    def suits(block_m: int) -> bool:
        return block_m <= max(16, 4 * rows) and rows <= 6 * block_m

    stream_blocks: tuple[int, ...] = ()
    if arch == "gfx942":
        stream_blocks = (16,)
    elif arch.startswith("sm") and int(arch.removeprefix("sm")) >= 80:
        stream_blocks = (8, 16) if has_bf16_products(arch) else (8,)
        if rows <= 1 and has_bf16_products(arch):
            yield "single", 8, _STREAM
    yield from (("stream", block_m, _STREAM) for block_m in stream_blocks if suits(block_m))
    if arch == "sm90":
        blocks = (block_m for block_m in (32, 64, 128) if suits(block_m) or (block_m == 32 and 0.5 <= rows < 8))
        yield from (("warpgroup", block_m, _WARPGROUP) for block_m in blocks)
    if arch != "sm90":  # there the other two are faster at every size
        sizes = (16, 32, 64, 128) if arch.startswith("sm") else (16, 32, 64)  # CDNA's waves hold 128 only by spilling
        yield from (("tile", block_m, _TILE) for block_m in sizes if suits(block_m))


def measure(
    shape: RankShape,
    tokens: Sequence[int],
    device: torch.device,
    quick: bool,
    impl: Impl,
    activations: ActivationDtype = "bf16",
) -> Iterator[tuple[int, Timed]]:
    """A backend's fastest configuration for each number of tokens, as it is found. `quick` tries a third of the tiles.

    Raises
    ------
    RuntimeError
        If no candidate runs for some number of tokens.
    """
    weights = random_weights(shape, device, 0)
    op, arch = own(impl, activations)(shape, weights), current_target().arch
    for count in tokens:
        best: Timed | None = None
        for kernel, block_m, gemms in families(arch, count * shape.top_k / shape.experts, impl, activations):
            if kernel == "single" and count > block_m:
                continue
            tried = gemms[1::3] if quick else gemms
            for timed in _family(shape, count, device, op, weights, kernel, block_m, tried, activations):
                print(f"{count:>6} tokens {timed.us:>10.1f} µs  {timed.config}", flush=True)
                if best is None or timed.us < best.us:
                    best = timed
        if best is None:
            raise RuntimeError(f"no candidate ran for {count} tokens of {shape.name}, {activations}, on {arch}")
        yield count, best


def table_of(
    shape: RankShape,
    found: Mapping[int, LaunchConfig],
    where: str,
    impl: Impl,
    activations: ActivationDtype = "bf16",
    before: Table | None = None,
) -> Table:
    """The backend's table: a regime for each number of tokens, up to the geometric mean of it and the next.

    What is for other activations is that of the table `before`. Raises `ValueError` if there must be some and is none.
    """
    tokens = sorted(found)
    regimes = []
    for count, following in zip(tokens, [*tokens[1:], None], strict=True):
        rows = 1e6 if following is None else math.sqrt(count * following) * shape.top_k / shape.experts
        regimes.append(Regime(float(f"{rows:.3g}"), found[count]))
    name, bf16 = table_name(current_target().arch, impl), activations == "bf16"
    if before is None or not (before.fp8 if bf16 else before.regimes):
        if not bf16:
            raise ValueError(f"{name}: there is no table whose regimes for bf16 activations could be kept")
        return Table(name, where, tuple(regimes))
    kept = before.source.split(KEPT)[0]
    both = (tuple(regimes), before.fp8) if bf16 else (before.regimes, tuple(regimes))
    return Table(name, f"{activations} {where}{KEPT}{kept}", *both)


def source(device: torch.device, what: str) -> str:
    """Where, on what and when a table was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"measured on {name}, {what}, {versions}, {datetime.now(UTC):%Y-%m-%d}"


def _family(
    shape: RankShape,
    tokens: int,
    device: torch.device,
    op: Op,
    weights: Weights,
    kernel: Kernel,
    block_m: int,
    gemms: Sequence[Gemm],
    activations: ActivationDtype,
) -> Iterator[Timed]:
    few = 1 if device.type == "cpu" else 4 if tokens > 256 else 8
    batches = [random_batch(shape, tokens, "uniform", device, seed) for seed in range(few)]
    works = [partial(op, batch) for batch in batches]
    tried: set[LaunchConfig] = set()  # what fits may be the same for several

    def timed(config: LaunchConfig) -> Timed | None:
        fitted = (fit_fp8 if activations == "fp8" else fit)(config, shape.hidden, shape.inner)
        if fitted is None or fitted in tried:
            return None
        tried.add(fitted)
        try:
            with using(fitted):
                error = relative_error(op, weights, batches[0], activations)
                if not error <= MOST_ERROR:
                    print(f"{tokens:>6} tokens: error {error:.1e}, not taken: {fitted}", flush=True)
                    return None
                return Timed(fitted, graph_us(works) if device.type == "cuda" else eager_us(works, device))
        except (RuntimeError, triton.runtime.errors.TritonError) as error:
            print(f"{tokens:>6} tokens: {str(error).splitlines()[0]}: {fitted}", flush=True)
            return None

    best: Timed | None = None
    for gemm in gemms:
        if (found := timed(LaunchConfig(kernel, block_m, gemm, gemm))) and (best is None or found.us < best.us):
            best = found
    if best is None:
        return
    yield best
    for gemm in gemms:
        if found := timed(replace(best.config, down=gemm)):
            yield found
