"""Which kernel makes the grouped GEMMs, with which tile: by arch and regime from a table, else a fallback."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from moe_ep.order import padded

Kernel = Literal["single", "stream", "warpgroup", "tile", "cdna3", "route"]
"""single: a handful of tokens on NVIDIA, in one launch, `kernels.single`. stream: few rows an expert, `kernels.stream`.
warpgroup: about one or more, on Hopper, `kernels.experts`. tile: any device, any shape. Of gluon_kernel, on gfx942:
route for a handful of tokens, `kernels.route_direct`; cdna3 for more, `kernels.cdna3`. Activations are multiplied as
fp8 by `kernels.stream_fp8` for stream, and `kernels.route_fp8` for route."""
REGISTER_KERNELS: tuple[Kernel, ...] = ("single", "stream", "cdna3", "route")
"""Those that take weights to registers in tiles of 16 rows, by slices of K and by stages."""
FP8_KERNELS: tuple[Kernel, ...] = ("stream", "route")
"""Those of them that multiply activations as fp8, of every H and I."""


def has_bf16_products(arch: str) -> bool:
    """Whether an arch multiplies two bf16 at once, as the kernels that scale weights or activations in pairs do."""
    return arch.startswith("sm") and int(arch.removeprefix("sm")) >= 90


@dataclass(frozen=True)
class Gemm:
    """Tile of one grouped GEMM: rows of weights, warps, slices of K that warps share out, and stages under way.

    Of the warpgroup kernel `warps` are one warpgroup's, 4; there are always two.
    """

    block_n: int
    warps: int
    stages: int
    slices: int = 1

    def __str__(self) -> str:
        sliced = f", K in {self.slices}" if self.slices > 1 else ""
        return f"{self.block_n} rows / {self.warps} warps / {self.stages} stages{sliced}"


@dataclass(frozen=True)
class LaunchConfig:
    """What computes an op's two GEMMs. `block_m` is also what the routes are blocked by: the two must agree.

    Of the single kernel it is the most tokens, and its two tiles are the same.
    """

    kernel: Kernel
    block_m: int
    gate_up: Gemm
    down: Gemm

    def __str__(self) -> str:
        if self.kernel == "single":
            return f"single, up to {self.block_m} tokens; {self.gate_up}"
        return f"{self.kernel}, {self.block_m} routes; gate_up {self.gate_up}; down {self.down}"


@dataclass(frozen=True)
class Regime:
    """A configuration for up to `rows` routes an expert, on average over all experts of the model."""

    rows: float
    config: LaunchConfig


@dataclass(frozen=True)
class Table:
    """The regimes of an arch by rising rows, and where they come from."""

    arch: str
    source: str
    regimes: tuple[Regime, ...]
    fp8: tuple[Regime, ...] = ()
    """Those for activations that are multiplied as fp8."""


_WARPGROUP_BYTES = 218 * 1024
"""Shared memory for what is copied ahead: of Hopper's 227 KiB some is for turning results."""

FALLBACK = "fallback: tiles for any device and shape"
"""The source of configurations that no table gives."""


def tile(rows: float, warp_size: int = 32) -> LaunchConfig:
    """A tile that every device takes: the smallest that holds most experts' routes at once.

    Every further block of an expert decodes its weights again; beyond the largest tile, the largest. 16 rows are the
    least that a matrix instruction takes. CDNA's waves hold a tile of 128 rows only by spilling.
    """
    sizes, stages = ((16, 32, 64), 2) if warp_size == 64 else ((16, 32, 64, 128), 3)
    block_m = next((size for size in sizes if rows * 5 / 4 <= size), sizes[-1])
    gemm = Gemm(block_n=64, warps=4, stages=stages)
    return LaunchConfig("tile", block_m, gemm, gemm)


def choose(
    table: Table | None, tokens: int, top_k: int, num_experts: int, hidden: int, inner: int, warp_size: int = 32
) -> LaunchConfig:
    """The configuration for M·k routes over all `num_experts` experts of the model, this rank's among them.

    The first regime of the table that holds them, the last beyond that, made to fit H and this rank's I; where it
    cannot, the next one for fewer rows that can; the fallback where none can, or where there is no table.
    """
    rows = tokens * top_k / num_experts
    if table is not None:
        regimes = [r for r in table.regimes if r.config.kernel != "single" or tokens <= r.config.block_m]
        fewer = sum(rows > regime.rows for regime in regimes)
        for regime in reversed(regimes[: fewer + 1]):
            if fitted := fit(regime.config, hidden, inner):
                return fitted
    return tile(rows, warp_size)


def choose_fp8(table: Table | None, routes: int, num_experts: int, hidden: int, inner: int) -> LaunchConfig:
    """As `choose`, where activations are multiplied as fp8: by kernels that then take every H and I."""
    rows = routes / num_experts
    if table is None or not table.fp8:
        block_m = tile(rows, 64).block_m
        gemm = Gemm(block_n=64, warps=4, stages=2 if block_m < 64 else 1)  # two stages of 64 rows spill
        config = LaunchConfig("stream", block_m, gemm, gemm)
    else:
        config = next((regime for regime in table.fp8 if rows <= regime.rows), table.fp8[-1]).config
    return fit_fp8(config, hidden, inner)


def fit_fp8(config: LaunchConfig, hidden: int, inner: int) -> LaunchConfig:
    """As `fit` for such a configuration, with K padded as the weights' is."""
    gate_up = _fit_stream(config.gate_up, padded(hidden), inner)
    down = _fit_stream(config.down, padded(inner), hidden // 2)
    if gate_up is None or down is None:
        raise ValueError(f"H = {hidden} and I = {inner} must be multiples of 32")
    return replace(config, gate_up=gate_up, down=down)


def fit(config: LaunchConfig, hidden: int, inner: int) -> LaunchConfig | None:
    """The configuration with tiles, slices and stages made smaller until they divide H and I; None where none do."""
    if config.kernel == "tile":
        return config
    # The down projection's tile is two halves of block_n rows, as gate and up are.
    if config.kernel == "single":
        gate_up = down = _fit_single(config.gate_up, hidden, inner)
    elif config.kernel in REGISTER_KERNELS:
        gate_up, down = _fit_stream(config.gate_up, hidden, inner), _fit_stream(config.down, inner, hidden // 2)
    else:
        gate_up = _fit_warpgroup(config.gate_up, config.block_m, hidden, inner)
        down = _fit_warpgroup(config.down, config.block_m, inner, hidden // 2)
        if gate_up and down and config.gate_up == config.down:  # alike, they are one launch
            block_n = min(gate_up.block_n, down.block_n)
            gate_up = _fit_warpgroup(replace(config.gate_up, block_n=block_n), config.block_m, hidden, inner)
            down = _fit_warpgroup(replace(config.down, block_n=block_n), config.block_m, inner, hidden // 2)
    return replace(config, gate_up=gate_up, down=down) if gate_up and down else None


def fit_down(config: LaunchConfig, hidden: int, inner: int, *, fp8: bool = False) -> Gemm | None:
    """The second GEMM's part of `fit`, or with `fp8` of `fit_fp8`, alone: for a range of `hidden` features."""
    if config.kernel == "tile":
        return config.down
    if config.kernel in REGISTER_KERNELS:
        return _fit_stream(config.down, padded(inner) if fp8 else inner, hidden // 2)
    return _fit_warpgroup(config.down, config.block_m, inner, hidden // 2)


def _fit_stream(gemm: Gemm, k: int, n: int) -> Gemm | None:
    groups, across = k // 128, gemm.warps // gemm.slices
    if k % 128 or n % 16:
        return None
    slices = _halved(gemm.slices, groups)
    stages = next(s for s in range(gemm.stages, 0, -1) if groups // slices % s == 0)
    block_n = max(16, _halved(gemm.block_n, n))
    return Gemm(block_n, slices * min(across, block_n // 16), stages, slices)


def _fit_single(gemm: Gemm, hidden: int, inner: int) -> Gemm | None:
    """One tile for both GEMMs."""
    first = _fit_stream(gemm, hidden, inner)
    both = first and _fit_stream(first, inner, hidden // 2)
    if both is None:
        return None
    steps = math.gcd(hidden // 128 // both.slices, inner // 128 // both.slices)
    return replace(both, stages=next(s for s in range(both.stages, 0, -1) if steps % s == 0))


def _fit_warpgroup(gemm: Gemm, block_m: int, k: int, n: int) -> Gemm | None:
    block_n = _halved(gemm.block_n, n)
    group_bytes = 128 * (2 * block_m + block_n) + 8 * block_n  # of activations, codes, scales
    stages = min(gemm.stages, _WARPGROUP_BYTES // group_bytes)
    if k % 128 or block_n < 64 or stages < 3:  # each warpgroup takes 64 rows of both matrices
        return None
    return replace(gemm, block_n=block_n, stages=stages)


def _halved(size: int, whole: int) -> int:
    """The largest of size, size/2, … 1 that divides `whole`."""
    while whole % size:
        size //= 2
    return size
