"""An op's launches and the memory between them."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from moe_ep import workspace
from moe_ep.backends.call import Shape, config_of
from moe_ep.backends.gemms import BothLaunch, GemmLaunch, both_of, cdna3_launch, constants_of, gemms_of
from moe_ep.dispatch import Planner, plan_parts, planner
from moe_ep.kernels.bound import BoundLaunch
from moe_ep.kernels.down import combine_kernel
from moe_ep.kernels.launch import LaunchConfig, fit_down
from moe_ep.order import TILE_ROWS
from moe_ep.rounding import Rounder, local_rounder, rounder, rounding_parts

_COMBINE_BLOCK = 1024
_ROWS_AT_ONCE = 1024  # from as many tokens on a program combines a whole row of one, else a block of it
_PROGRAMS = 3
"""Of the single kernel on a multiprocessor: as many as have room there."""
_REGISTERS, _MOST_REGISTERS = 65536, 248  # of a multiprocessor, and of a thread
_SINGLE_COUNTERS = 2  # of the single kernel, besides one for each route and for each tile of features
_FEWEST_ROUTES, _MOST_ROUTES = 64, 128
"""Of the block that the single kernel compares with itself: no smaller, so that it is compiled once, and larger ones
spill."""
_KEPT_SHAPES = 4096  # ops of other shapes that are kept ready: every number of tokens of a prefill is one


@dataclass(frozen=True)
class Op:
    """An op's launches and the memory between them, ready for one shape."""

    plan: Planner
    gate_up: GemmLaunch
    down: GemmLaunch
    both: BothLaunch | None
    """Instead of the two, where they are not cut; it also zeroes what combine then leaves."""
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
    # With this kernel the sums of a token's routes are of bf16, as the engines' are, unless more is asked for.
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
        shares=raw,
        warp_size=shape.target.warp_size,
    )
    gate_up, down = gemms_of(shape, config, plan.plan.blocks)
    both = both_of(shape, config, plan.plan.blocks)
    rounds = None
    if shape.rounds:
        sizes = (shape.hidden, shape.inner, plan.plan.blocks, config.block_m)
        rounds = rounder(parts, *sizes, native=shape.fp8)
    combine = _combine(shape, raw, zeroed=both is not None)
    return Op(plan, gate_up, down, both, combine, raw, parts["h"], parts["y"], rounds)


def _combine(shape: Shape, weighs: bool, *, zeroed: bool = False) -> BoundLaunch:
    parts = triton.cdiv(shape.hidden, _COMBINE_BLOCK) if shape.tokens < _ROWS_AT_ONCE else 1
    constants = {
        "WEIGHS": weighs,
        "ZEROED": zeroed,
        "LOCAL": shape.local,
        "HAS_MAP": shape.mapped,
        "HIDDEN": shape.hidden,
        "TOP_K": shape.top_k,
        "PDL": shape.target.pdl,
        "BLOCK_H": _COMBINE_BLOCK,
        "PARTS": parts,
    }
    return BoundLaunch(combine_kernel, shape.tokens * parts, constants, pdl=shape.target.pdl)


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
        cdna3_launch(gate_up_gluon, routes, shape.inner, config.gate_up, gate_up),
        cdna3_launch(down_gluon, shape.tokens, shape.hidden // 2, config.down, down),
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
        **constants_of(shape),
        "CDNA": shape.target.backend == "hip",
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
