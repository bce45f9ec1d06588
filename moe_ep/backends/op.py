"""An op's launches and the memory between them, by the shape of the call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from moe_ep import tables, workspace
from moe_ep.backends.target import Target
from moe_ep.dispatch import Planner, plan_parts, planner
from moe_ep.kernels.bound import BoundLaunch
from moe_ep.kernels.down import combine_kernel, down_kernel
from moe_ep.kernels.gate_up import gate_up_kernel
from moe_ep.kernels.launch import FP8_KERNELS, Gemm, LaunchConfig, choose, choose_fp8, fit_down, tile
from moe_ep.order import TILE_ROWS, KernelOrder
from moe_ep.rounding import Rounder, local_rounder, rounder, rounding_parts
from moe_ep.spec import ActivationDtype

GemmLaunch = Callable[..., None]
"""A `BoundLaunch`, or a `kernels.boxes.BoxedLaunch`, which is imported only where Gluon runs."""
_Gemms = tuple[GemmLaunch, GemmLaunch]
Impl = Literal["triton_kernel", "gluon_kernel"]
"""The backends that launch these kernels."""

_COMBINE_BLOCK = 1024
_TWO_WAVES: dict[str, Any] = {"waves_per_eu": 2}
"""With two waves a SIMD in view the compiler keeps MFMA's sums in vector registers, where they are scaled; else it puts
them in accumulation registers and copies each out, half an operation a weight."""
_GATHERING, _COPYING = (224, 56), (240, 24)
"""Registers of a warpgroup kernel's threads, of those that multiply and of those that copy: the latter keep a row for
each of the pieces that they gather, or nothing."""
_PROGRAMS = 3
"""Of the single kernel on a multiprocessor: as many as have room there."""
_REGISTERS, _MOST_REGISTERS = 65536, 248  # of a multiprocessor, and of a thread
_SINGLE_COUNTERS = 2  # besides one for each route and tile of features: `kernels.single`
_MOST_ROUTES = 128  # of that block: it compares each with each
_FEWEST_ROUTES = 64  # of a block of them that the single kernel looks at, so that it is compiled once
_KEPT_SHAPES = 4096  # ops of other shapes that are kept ready: every number of tokens of a prefill is one


def order_for(activations: ActivationDtype, arch: str) -> KernelOrder:
    """The order in which the kernels read weights on an arch, "gfx942" or "gfx94": only these multiply e4m3fnuz."""
    return "kernel-fp8" if activations == "fp8" and arch.startswith("gfx94") else "kernel"


def table_name(arch: str, impl: Impl) -> str:
    """The table that a backend's launches are chosen from: gluon_kernel has one of its own."""
    return tables.GLUON_TABLE if impl == "gluon_kernel" else arch


def launch_config(
    tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    inner: int,
    target: Target,
    activations: ActivationDtype = "bf16",
    order: KernelOrder = "kernel",
    impl: Impl = "triton_kernel",
) -> LaunchConfig:
    """What computes tokens' routes over all of the model's experts on this target, with weights in this order."""
    table = tables.find(table_name(target.arch, impl))
    if order == "kernel-fp8":
        return choose_fp8(table, tokens * top_k, num_experts, hidden, inner)
    if activations == "fp8":  # the routing weight is in what is rounded, which of the bf16 kernels only this one does
        return tile(tokens * top_k / num_experts, target.warp_size)
    return choose(table, tokens, top_k, num_experts, hidden, inner, target.warp_size)


_override: LaunchConfig | None = None


@contextmanager
def using(config: LaunchConfig) -> Iterator[None]:
    """Compute all ops with one configuration, which must fit them, whatever the tables say."""
    global _override
    before, _override = _override, config
    try:
        yield
    finally:
        _override = before


def override() -> LaunchConfig | None:
    """The configuration of `using`, where that is under way."""
    return _override


@dataclass(frozen=True)
class Shape:
    """All that the launches of an op depend on, besides what its tensors hold."""

    tokens: int
    hidden: int
    inner: int
    top_k: int
    local: int
    known: int
    mapped: bool
    biased: tuple[bool, bool]
    limited: bool
    dtypes: tuple[torch.dtype, ...]
    aligned: tuple[bool, ...]
    """Whether each tensor lies at a multiple of 16 bytes: activations and codes first."""
    device: torch.device
    stream: int
    target: Target
    tables: str | None
    override: LaunchConfig | None
    activations: ActivationDtype = "bf16"
    order: KernelOrder = "kernel"
    impl: Impl = "triton_kernel"

    @property
    def rounds(self) -> bool:
        """Whether activations are rounded to fp8."""
        return self.activations == "fp8"

    @property
    def fp8(self) -> bool:
        """Whether they are multiplied as fp8 too."""
        return self.order == "kernel-fp8"

    @property
    def copied(self) -> bool:
        """Whether asynchronous copies take the activations, codes and scales."""
        return all(self.aligned[:5])


@dataclass(frozen=True)
class Op:
    """An op's launches and the memory between them, ready for one shape."""

    plan: Planner
    gate_up: GemmLaunch
    down: GemmLaunch
    combine: BoundLaunch
    combine_weighs: bool
    """Whether combine multiplies by the routing weights, and not down."""
    h: Tensor
    y: Tensor
    rounder: Rounder | None


@dataclass(frozen=True)
class RouteOp:
    """An op of a handful of tokens: no plan, no combine."""

    gate_up: BoundLaunch
    down: BoundLaunch
    h: Tensor
    rounder: Rounder | None


@dataclass(frozen=True)
class SingleOp:
    """An op of a few tokens: one launch."""

    launch: BoundLaunch
    h: Tensor
    y: Tensor
    state: Tensor


@dataclass(frozen=True)
class Cut:
    """An op whose second GEMM is made in ranges of columns, each with the same launches but for the first's.

    The rows of w2 that make a range are those of an expert of its own to the kernels: of H / parts features, in the
    same memory, expert e's range i numbered e · parts + i.
    """

    op: Op
    first_down: GemmLaunch
    down: GemmLaunch
    """With multiprocessors spared."""
    combine: BoundLaunch
    y: Tensor
    numbers: Tensor
    """int32 [parts], for those of the ranges."""
    block_expert: Tensor
    """int32 [parts, B]; −1 past the last block stays below 0."""


_OFFSETS = 2**31
"""Elements that an offset of 32 bits reaches."""
_BUFFER_BYTES = 2**31
"""What a buffer load reaches from its base."""


def config_of(shape: Shape) -> LaunchConfig:
    impl = shape.impl if 2 * shape.tokens * shape.hidden < _BUFFER_BYTES else "triton_kernel"
    config = shape.override or launch_config(
        *(shape.tokens, shape.top_k, shape.known, shape.hidden, shape.inner, shape.target),
        shape.activations,
        shape.order,
        impl,
    )
    if shape.rounds and config.kernel not in (FP8_KERNELS if shape.fp8 else ("tile",)):
        raise ValueError(f"fp8 activations with weights in {shape.order} order: no {config.kernel} kernel takes them")
    if config.kernel == "warpgroup" and (not shape.copied or shape.tokens * shape.hidden >= _OFFSETS):
        return tile(shape.tokens * shape.top_k / shape.known, shape.target.warp_size)
    return config


@lru_cache(maxsize=_KEPT_SHAPES)
def op_of(shape: Shape) -> Op | RouteOp | SingleOp:
    routes, config = shape.tokens * shape.top_k, config_of(shape)
    if config.kernel == "route":
        return _route_op(shape, config)
    if config.kernel == "single":
        single = _single_op(shape, config)
        if single is not None:
            return single
        config = _several(config)
    raw = config.kernel == "warpgroup"
    shifts = not raw and not shape.rounds
    rounded = rounding_parts(shape.tokens, shape.hidden, routes, shape.inner, native=shape.fp8) if shape.rounds else {}
    # For many routes the sums of a token's routes are of bf16, as the engines' are, unless more is asked for.
    y_dtype = torch.bfloat16 if raw and shape.dtypes[2] != torch.float32 else torch.float32
    parts = workspace.carve(
        shape.device,
        shape.stream,
        {
            **plan_parts(shape.tokens, shape.hidden, shape.top_k, shape.local, config.block_m, shifts=shifts),
            **rounded,
            "h": ((routes, shape.inner), torch.float32 if shape.rounds and not shape.fp8 else torch.bfloat16),
            "y": ((routes, shape.hidden), y_dtype),
        },
    )
    pdl = shape.target.pdl
    plan = planner(
        *(parts, shape.local, shape.known, config.block_m),
        mapped=shape.mapped,
        pdl=pdl,
    )
    gate_up, down = gemms_of(shape, config, plan.plan.blocks)
    rounds = None
    if shape.rounds:
        sizes = (shape.hidden, shape.inner, plan.plan.blocks, config.block_m)
        rounds = rounder(parts, *sizes, native=shape.fp8)
    return Op(plan, gate_up, down, _combine(shape, raw), raw, parts["h"], parts["y"], rounds)


def _combine(shape: Shape, weighs: bool) -> BoundLaunch:
    constants = {
        "WEIGHS": weighs,
        "LOCAL": shape.local,
        "HAS_MAP": shape.mapped,
        "HIDDEN": shape.hidden,
        "TOP_K": shape.top_k,
        "PDL": shape.target.pdl,
        "BLOCK_H": _COMBINE_BLOCK,
    }
    programs = shape.tokens * triton.cdiv(shape.hidden, _COMBINE_BLOCK)
    return BoundLaunch(combine_kernel, programs, constants, pdl=shape.target.pdl)


@lru_cache(maxsize=_KEPT_SHAPES)
def cut_of(shape: Shape, parts: int, spare: int) -> Cut | None:
    """None where the kernels do not take ranges of H / parts."""
    op, config, width = op_of(shape), _several(config_of(shape)), shape.hidden // parts
    if not isinstance(op, Op) or width % TILE_ROWS:
        return None
    down = fit_down(config, width, shape.inner, fp8=shape.fp8)
    if down is None:
        return None
    narrow = replace(shape, hidden=width)
    left = max(1, shape.target.processors - spare)
    spared = replace(narrow, target=replace(shape.target, processors=left)) if config.kernel == "warpgroup" else narrow
    blocks = op.plan.plan.blocks
    memory = workspace.carve(
        shape.device,
        shape.stream,
        {
            "cut_parts": ((parts,), torch.int32),
            "cut_experts": ((parts, blocks), torch.int32),
            "y": ((shape.tokens * shape.top_k, width), op.y.dtype),
        },
    )
    return Cut(
        op,
        gemms_of(narrow, replace(config, down=down), blocks)[1],
        gemms_of(spared, replace(config, down=down), blocks)[1],
        _combine(narrow, op.combine_weighs),
        memory["y"],
        memory["cut_parts"],
        memory["cut_experts"],
    )


def _route_op(shape: Shape, config: LaunchConfig) -> RouteOp:
    if shape.fp8:
        from moe_ep.kernels.route_fp8 import down_route_fp8 as down_gluon
        from moe_ep.kernels.route_fp8 import gate_up_route_fp8 as gate_up_gluon
    else:
        from moe_ep.kernels.route_direct import down_route as down_gluon
        from moe_ep.kernels.route_direct import gate_up_route as gate_up_gluon

    routes = shape.tokens * shape.top_k
    common: dict[str, Any] = {
        "TOP_K": shape.top_k,
        "HIDDEN": shape.hidden,
        "INTER": shape.inner,
        "LOCAL": shape.local,
        "HAS_MAP": shape.mapped,
        "XCDS": shape.target.xcds,
    }
    gate_up = {**common, "HAS_BIAS": shape.biased[0], "HAS_LIMIT": shape.limited}
    down = {**common, "HAS_BIAS": shape.biased[1]}
    rounded = rounding_parts(shape.tokens, shape.hidden, routes, shape.inner, native=True) if shape.fp8 else {}
    h = {"h": ((routes, shape.inner), torch.bfloat16)}
    parts = workspace.carve(shape.device, shape.stream, {**rounded, **h})
    return RouteOp(
        _cdna3(gate_up_gluon, routes, shape.inner, config.gate_up, gate_up),
        _cdna3(down_gluon, shape.tokens, shape.hidden // 2, config.down, down),
        parts["h"],
        local_rounder(parts, shape.hidden, shape.inner, shape.local, mapped=shape.mapped) if shape.fp8 else None,
    )


def _several(config: LaunchConfig) -> LaunchConfig:
    """The single kernel's tiles in several launches, for any number of tokens."""
    return replace(config, kernel="stream") if config.kernel == "single" else config


def _single_op(shape: Shape, config: LaunchConfig) -> SingleOp | None:
    """None where the kernel does not take the tokens, or there are no counters for it (`workspace.counters`)."""
    from moe_ep.kernels.single import experts_single

    routes, gemm = shape.tokens * shape.top_k, config.gate_up
    block_r = max(_FEWEST_ROUTES, triton.next_power_of_2(routes))
    used = _SINGLE_COUNTERS + block_r + shape.hidden // (2 * gemm.block_n)
    state = workspace.counters(shape.device, shape.stream)
    if state is None or used > state.numel() or shape.tokens > config.block_m or block_r > _MOST_ROUTES:
        return None
    constants = {
        "TOP_K": shape.top_k,
        "HIDDEN": shape.hidden,
        "INTER": shape.inner,
        "LOCAL": shape.local,
        "HAS_MAP": shape.mapped,
        "HAS_B13": shape.biased[0],
        "HAS_B2": shape.biased[1],
        "HAS_LIMIT": shape.limited,
        "CDNA": shape.target.backend == "hip",
        "PDL": shape.target.pdl,
        "PROGRAMS": shape.target.processors * _PROGRAMS,
        "BLOCK_R": block_r,
        "BLOCK_M": config.block_m,
        "BLOCK_N": gemm.block_n,
        "SLICES": gemm.slices,
        "STAGES": gemm.stages,
    }
    parts = workspace.carve(
        shape.device,
        shape.stream,
        {
            "h": ((routes, shape.tokens, shape.inner), torch.bfloat16),
            "y": ((routes, shape.tokens, shape.hidden), torch.float32),
        },
    )
    pdl = shape.target.pdl
    registers = min(_MOST_REGISTERS, _REGISTERS // (_PROGRAMS * gemm.warps * 32) // 8 * 8)
    options = {"maxnreg": registers} if shape.target.backend == "cuda" else {}
    launch = BoundLaunch(
        experts_single, constants["PROGRAMS"], constants, warps=gemm.warps, stages=1, pdl=pdl, **options
    )
    return SingleOp(launch, parts["h"], parts["y"], state)


def _cdna3(kernel: Any, blocks: int, rows: int, gemm: Gemm, constants: dict[str, Any]) -> BoundLaunch:
    """A kernel for CDNA3 alone: a multiple of the XCDs for each block or route (`kernels.cdna3.tile_of`)."""
    xcds = constants["XCDS"]
    programs = blocks * triton.cdiv(rows // gemm.block_n, xcds) * xcds
    own = {**constants, "BLOCK_N": gemm.block_n, "SLICES": gemm.slices, "STAGES": gemm.stages}
    return BoundLaunch(kernel, programs, own, warps=gemm.warps, stages=gemm.stages, **_TWO_WAVES)


def gemms_of(shape: Shape, config: LaunchConfig, blocks: int) -> _Gemms:
    common = {"HIDDEN": shape.hidden, "INTER": shape.inner, "BLOCK_M": config.block_m}
    gate_up: dict[str, Any] = {
        **common,
        "TOP_K": shape.top_k,
        "HAS_BIAS": shape.biased[0],
        "HAS_LIMIT": shape.limited,
        "BLOCK_N": config.gate_up.block_n,
    }
    down: dict[str, Any] = {**common, "HAS_BIAS": shape.biased[1], "BLOCK_N": config.down.block_n}
    if config.kernel == "tile":
        own = {"DECODE": "ptx" if shape.target.backend == "cuda" else "bits"}
        return (
            _gemm(gate_up_kernel, blocks, shape.inner, config.gate_up, gate_up | own),
            _gemm(down_kernel, blocks, shape.hidden, config.down, down | own | {"WEIGHTED_H": shape.rounds}),
        )
    xcds = {"XCDS": shape.target.xcds}
    if shape.fp8:
        from moe_ep.kernels.stream_fp8 import down_stream_fp8, gate_up_stream_fp8

        return (
            _cdna3(gate_up_stream_fp8, blocks, shape.inner, config.gate_up, gate_up | xcds),
            _cdna3(down_stream_fp8, blocks, shape.hidden // 2, config.down, down | xcds),
        )
    if config.kernel == "cdna3":
        from moe_ep.kernels.cdna3 import down_cdna3, gate_up_cdna3

        return (
            _cdna3(gate_up_cdna3, blocks, shape.inner, config.gate_up, gate_up | xcds),
            _cdna3(down_cdna3, blocks, shape.hidden // 2, config.down, down | xcds),
        )
    gate_up |= {"PDL": shape.target.pdl, "STAGES": config.gate_up.stages}
    down |= {"PDL": shape.target.pdl, "STAGES": config.down.stages}
    # Gluon is imported only where it runs: the interpreter has none, and only some devices have these kernels.
    if config.kernel == "warpgroup":
        return _warpgroup(shape, config, blocks, gate_up, down)
    from moe_ep.kernels.stream import down_stream as down_gluon
    from moe_ep.kernels.stream import gate_up_stream as gate_up_gluon

    gate_up |= {"CDNA": shape.target.backend == "hip", "SLICES": config.gate_up.slices}
    down |= {"CDNA": shape.target.backend == "hip", "SLICES": config.down.slices}
    two_waves = bool(gate_up["CDNA"])
    return (
        _gemm(gate_up_gluon, blocks, shape.inner, config.gate_up, gate_up, two_waves),
        _gemm(down_gluon, blocks, shape.hidden // 2, config.down, down, two_waves),
    )


def _warpgroup(
    shape: Shape, config: LaunchConfig, blocks: int, gate_up: dict[str, Any], down: dict[str, Any]
) -> _Gemms:
    """As many programs as the device has at once, each of which makes tiles in turn."""
    from moe_ep.kernels.boxes import BoxedLaunch
    from moe_ep.kernels.pipe import BOXES
    from moe_ep.kernels.warpgroup import down_warpgroup, gate_up_warpgroup

    def launch(
        kernel: Any, rows: int, gemm: Gemm, constants: dict[str, Any], registers: tuple[int, int]
    ) -> BoundLaunch:
        programs = min(blocks * (rows // gemm.block_n), shape.target.processors)
        own = {"blocks": blocks, "REGISTERS": registers[0], "LOADER_REGISTERS": registers[1]}
        return BoundLaunch(
            kernel, programs, constants | own, warps=gemm.warps, stages=gemm.stages, pdl=constants["PDL"]
        )

    first = launch(gate_up_warpgroup, shape.inner, config.gate_up, gate_up, _GATHERING)
    second = launch(down_warpgroup, shape.hidden // 2, config.down, down, _COPYING)
    return (
        BoxedLaunch(first, 2, config.gate_up.block_n),
        BoxedLaunch(second, 1, config.down.block_n, config.block_m // BOXES.value),
    )


def _gemm(
    kernel: Any,
    blocks: int,
    rows: int,
    gemm: Gemm,
    constants: dict[str, Any],
    two_waves: bool = False,
) -> BoundLaunch:
    programs = blocks * triton.cdiv(rows, gemm.block_n)
    options = _TWO_WAVES if two_waves else {}
    pdl = bool(constants.get("PDL"))
    return BoundLaunch(kernel, programs, constants, warps=gemm.warps, stages=gemm.stages, pdl=pdl, **options)
