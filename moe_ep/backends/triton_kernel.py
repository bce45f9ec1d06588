"""The experts as Triton and Gluon kernels: plan the routes, two grouped GEMMs, combine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
import triton
from torch import Tensor, nn
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from moe_ep import tables, workspace
from moe_ep.backends.base import Mxfp4Backend, activation_dtype
from moe_ep.dispatch import Planner, plan_parts, planner
from moe_ep.kernels.bound import BoundLaunch
from moe_ep.kernels.down import combine_kernel, down_kernel
from moe_ep.kernels.gate_up import gate_up_kernel
from moe_ep.kernels.launch import (
    FALLBACK,
    FP8_KERNELS,
    Gemm,
    LaunchConfig,
    choose,
    choose_fp8,
    fit_down,
    tile,
)
from moe_ep.order import TILE_ROWS, KernelOrder, order_in_place
from moe_ep.rounding import Rounder, local_rounder, rounder, rounding_parts
from moe_ep.spec import ActivationDtype, MoELayerSpec
from moe_ep.weights import ExpertWeights

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
_KEPT_SHAPES = 4096  # ops of other shapes that are kept ready: every number of tokens of a prefill is one


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is decided when they are defined."""
    return isinstance(combine_kernel, InterpretedFunction)


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device: in Triton's interpreter any, else that of Triton's active driver."""
    if interpreted():
        return True
    try:
        active: torch.device = driver.active.get_active_torch_device()
    except RuntimeError:  # no driver found a device
        return False
    return active.type == device.type


@dataclass(frozen=True)
class Target:
    """What Triton compiles for: "cuda" with sm90, or "hip" with gfx942. The interpreter takes what AMD's GPUs take."""

    backend: str
    arch: str
    warp_size: int
    processors: int = 1
    """Multiprocessors or compute units of the device."""

    @property
    def xcds(self) -> int:
        """Dies of a gfx942, to which workgroups go in turn: 38 compute units each, 6 on an MI300A, 8 on an MI300X."""
        return max(1, self.processors // 38) if self.arch == "gfx942" else 1

    @property
    def pdl(self) -> bool:
        """Whether a kernel may start before the one before it has ended (programmatic dependent launch)."""
        return self.backend == "cuda" and int(self.arch.removeprefix("sm")) >= 90


def current_target() -> Target:
    """Of Triton's active driver and torch's current device."""
    if interpreted():
        return Target("hip", "interpreter", 64)
    target = driver.active.get_current_target()
    if target.backend != "cuda":
        return Target(target.backend, target.arch, target.warp_size, _compute_units(driver.active.get_current_device()))
    return Target("cuda", f"sm{target.arch}", target.warp_size, _processors(torch.cuda.current_device()))


@lru_cache
def _processors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@lru_cache
def _compute_units(device: int) -> int:
    count: int = driver.active.utils.get_device_properties(device)["multiprocessor_count"]
    return count


def order_for(activations: ActivationDtype, arch: str) -> KernelOrder:
    """The order in which the kernels read weights on an arch, "gfx942" or "gfx94": only these multiply e4m3fnuz."""
    return "kernel-fp8" if activations == "fp8" and arch.startswith("gfx94") else "kernel"


def table_name(arch: str, impl: Impl) -> str:
    """The table that a backend's launches are chosen from: gluon_kernel has one of its own."""
    return tables.GLUON_TABLE if impl == "gluon_kernel" else arch


def launch_config(
    routes: int,
    num_experts: int,
    hidden: int,
    inner: int,
    target: Target,
    activations: ActivationDtype = "bf16",
    order: KernelOrder = "kernel",
    impl: Impl = "triton_kernel",
) -> LaunchConfig:
    """What computes `routes` routes over all of the model's experts on this target, with weights in this order."""
    table = tables.find(table_name(target.arch, impl))
    if order == "kernel-fp8":
        return choose_fp8(table, routes, num_experts, hidden, inner)
    if activations == "fp8":  # the routing weight is in what is rounded, which of the bf16 kernels only this one does
        return tile(routes / num_experts, target.warp_size)
    return choose(table, routes, num_experts, hidden, inner, target.warp_size)


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


@dataclass(frozen=True)
class _Shape:
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
class _Op:
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
class _RouteOp:
    """An op of a handful of tokens: no plan, no combine."""

    gate_up: BoundLaunch
    down: BoundLaunch
    h: Tensor
    rounder: Rounder | None


@dataclass(frozen=True)
class _Cut:
    """An op whose second GEMM is made in ranges of columns, each with the same launches but for the first's.

    The rows of w2 that make a range are those of an expert of its own to the kernels: of H / parts features, in the
    same memory, expert e's range i numbered e · parts + i.
    """

    op: _Op
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


def _config(shape: _Shape) -> LaunchConfig:
    routes = shape.tokens * shape.top_k
    impl = shape.impl if 2 * shape.tokens * shape.hidden < _BUFFER_BYTES else "triton_kernel"
    config = shape.override or launch_config(
        *(routes, shape.known, shape.hidden, shape.inner, shape.target), shape.activations, shape.order, impl
    )
    if shape.rounds and config.kernel not in (FP8_KERNELS if shape.fp8 else ("tile",)):
        raise ValueError(f"fp8 activations with weights in {shape.order} order: no {config.kernel} kernel takes them")
    if config.kernel == "warpgroup" and (not shape.copied or shape.tokens * shape.hidden >= _OFFSETS):
        return tile(routes / shape.known, shape.target.warp_size)
    return config


@lru_cache(maxsize=_KEPT_SHAPES)
def _op(shape: _Shape) -> _Op | _RouteOp:
    routes, config = shape.tokens * shape.top_k, _config(shape)
    if config.kernel == "route":
        return _route_op(shape, config)
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
    gate_up, down = _gemms(shape, config, plan.plan.blocks)
    rounds = None
    if shape.rounds:
        sizes = (shape.hidden, shape.inner, plan.plan.blocks, config.block_m)
        rounds = rounder(parts, *sizes, native=shape.fp8)
    return _Op(plan, gate_up, down, _combine(shape, raw), raw, parts["h"], parts["y"], rounds)


def _combine(shape: _Shape, weighs: bool) -> BoundLaunch:
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
def _cut(shape: _Shape, parts: int, spare: int) -> _Cut | None:
    """None where the kernels do not take ranges of H / parts."""
    op, config, width = _op(shape), _config(shape), shape.hidden // parts
    if isinstance(op, _RouteOp) or width % TILE_ROWS:
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
    return _Cut(
        op,
        _gemms(narrow, replace(config, down=down), blocks)[1],
        _gemms(spared, replace(config, down=down), blocks)[1],
        _combine(narrow, op.combine_weighs),
        memory["y"],
        memory["cut_parts"],
        memory["cut_experts"],
    )


def _route_op(shape: _Shape, config: LaunchConfig) -> _RouteOp:
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
    return _RouteOp(
        _cdna3(gate_up_gluon, routes, shape.inner, config.gate_up, gate_up),
        _cdna3(down_gluon, shape.tokens, shape.hidden // 2, config.down, down),
        parts["h"],
        local_rounder(parts, shape.hidden, shape.inner, shape.local, mapped=shape.mapped) if shape.fp8 else None,
    )


def _cdna3(kernel: Any, blocks: int, rows: int, gemm: Gemm, constants: dict[str, Any]) -> BoundLaunch:
    """A kernel for CDNA3 alone: a multiple of the XCDs for each block or route (`kernels.cdna3.tile_of`)."""
    xcds = constants["XCDS"]
    programs = blocks * triton.cdiv(rows // gemm.block_n, xcds) * xcds
    own = {**constants, "BLOCK_N": gemm.block_n, "SLICES": gemm.slices, "STAGES": gemm.stages}
    return BoundLaunch(kernel, programs, own, warps=gemm.warps, stages=gemm.stages, **_TWO_WAVES)


def _gemms(shape: _Shape, config: LaunchConfig, blocks: int) -> _Gemms:
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
    shape: _Shape, config: LaunchConfig, blocks: int, gate_up: dict[str, Any], down: dict[str, Any]
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


def experts(
    x: Tensor,
    weights: ExpertWeights,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    topk_weights: Tensor,
    swiglu_limit: float | None,
    out: Tensor,
    activation_dtype: ActivationDtype = "bf16",
    impl: Impl = "triton_kernel",
) -> None:
    """As `reference.experts`. Raises `ValueError` where the kernels do not run on x's device, or not in this order."""
    if topk_ids.numel() == 0 or weights.count == 0:
        out.zero_()
        return
    _check_runs_on(x.device)
    weights = _ordered(weights, activation_dtype)
    with torch.cuda.device(x.device) if _elsewhere(x) else nullcontext():  # Triton launches where torch is
        shape = _shape(x, weights, topk_ids, expert_map, topk_weights, swiglu_limit, out, activation_dtype, impl)
        op = _op(shape)
        inputs = _Inputs.of(x, weights, topk_ids, expert_map, topk_weights, swiglu_limit)
        if isinstance(op, _RouteOp):
            _by_route(op, inputs, out)
            return
        op.plan(x, topk_ids, expert_map)
        _first_gemm(op, inputs)
        _second_gemm(op, inputs, op.down, op.combine, op.y, op.plan.plan.block_expert, out)


def experts_by_columns(
    x: Tensor,
    weights: ExpertWeights,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    topk_weights: Tensor,
    swiglu_limit: float | None,
    outs: Sequence[Tensor],
    activation_dtype: ActivationDtype = "bf16",
    spare: int = 0,
    impl: Impl = "triton_kernel",
) -> Iterator[None]:
    """As `experts`, into `outs` [M, H / parts] one after the other: each is computed when this yields."""
    parts = len(outs)
    cut = None
    if parts > 1 and topk_ids.numel() and weights.count and not _elsewhere(x):
        _check_runs_on(x.device)
        weights = _ordered(weights, activation_dtype)
        shape = _shape(x, weights, topk_ids, expert_map, topk_weights, swiglu_limit, outs[0], activation_dtype, impl)
        cut = _cut(shape, parts, spare)
    if cut is None:
        whole = torch.empty(x.shape, dtype=outs[0].dtype, device=x.device)
        experts(x, weights, topk_ids, expert_map, topk_weights, swiglu_limit, whole, activation_dtype, impl)
        for out, columns in zip(outs, whole.chunk(parts, 1), strict=True):
            out.copy_(columns)
            yield
        return
    op = cut.op
    inputs = _Inputs.of(x, weights, topk_ids, expert_map, topk_weights, swiglu_limit)
    op.plan(x, topk_ids, expert_map)
    numbers = torch.arange(parts, dtype=torch.int32, device=x.device, out=cut.numbers)
    torch.add(numbers[:, None], op.plan.plan.block_expert, alpha=parts, out=cut.block_expert)
    _first_gemm(op, inputs)
    for part, out in enumerate(outs):
        down = cut.down if part else cut.first_down
        _second_gemm(op, inputs, down, cut.combine, cut.y, cut.block_expert[part], out)
        yield


@dataclass(frozen=True)
class _Inputs:
    """A call's tensors, as the kernels take them."""

    w13: Tensor
    s13: Tensor
    b13: Tensor
    w2: Tensor
    s2: Tensor
    b2: Tensor
    x: Tensor
    topk_ids: Tensor
    mapped: Tensor
    topk_weights: Tensor
    known: int
    limit: float

    @classmethod
    def of(
        cls,
        x: Tensor,
        weights: ExpertWeights,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        topk_weights: Tensor,
        swiglu_limit: float | None,
    ) -> "_Inputs":
        """What is not there is stood for by what is."""
        word = torch.int32 if weights.order == "kernel-fp8" else torch.uint16
        return cls(
            weights.w13.view(word),
            weights.w13_scale.view(torch.uint32),
            x if weights.b13 is None else weights.b13,
            weights.w2.view(word),
            weights.w2_scale.view(torch.uint32),
            x if weights.b2 is None else weights.b2,
            x,
            topk_ids,
            topk_ids if expert_map is None else expert_map,
            topk_weights,
            weights.count if expert_map is None else expert_map.numel(),
            0.0 if swiglu_limit is None else float(swiglu_limit),
        )

    @property
    def routes(self) -> tuple[Tensor, Tensor, int]:
        """Experts of the routes, where they are, and how many there can be."""
        return self.topk_ids, self.mapped, self.known


def _by_route(op: _RouteOp, inputs: _Inputs, out: Tensor) -> None:
    """out of x."""
    w13, w2 = (inputs.w13, inputs.s13, inputs.b13), (inputs.w2, inputs.s2, inputs.b2)
    rounds = op.rounder
    if rounds is None:
        op.gate_up(inputs.x, *w13, op.h, *inputs.routes, inputs.limit)
        op.down(op.h, *w2, inputs.topk_weights, out, *inputs.routes)
        return
    rounds.round_tokens(inputs.x)
    op.gate_up(rounds.x, rounds.x_scale, *w13, inputs.topk_weights, op.h, *inputs.routes, inputs.limit)
    rounds.round_local(op.h, *inputs.routes)
    op.down(rounds.h, rounds.h_scale, *w2, inputs.topk_weights, out, *inputs.routes)


def _first_gemm(op: _Op, inputs: _Inputs) -> None:
    """h of the planned routes, rounded if activations are."""
    x, plan, rounds = inputs.x, op.plan.plan, op.rounder
    blocks = (plan.route, plan.block_expert, plan.block_start, plan.block_end)
    weights = (inputs.w13, inputs.s13, inputs.b13)
    if rounds is None:
        op.gate_up(x if op.plan.shifted is None else op.plan.shifted, *weights, op.h, *blocks, inputs.limit)
        return
    rounds.round_tokens(x)
    if rounds.native:
        op.gate_up(rounds.x, rounds.x_scale, *weights, inputs.topk_weights, op.h, *blocks, inputs.limit)
    else:
        op.gate_up(rounds.x, *weights, op.h, *blocks, inputs.limit)
    rounds.round_routes(op.h, inputs.topk_weights, plan)


def _second_gemm(
    op: _Op, inputs: _Inputs, down: GemmLaunch, combine: BoundLaunch, y: Tensor, block_expert: Tensor, out: Tensor
) -> None:
    """y of h, and out of y."""
    plan, rounds = op.plan.plan, op.rounder
    blocks = (plan.route, block_expert, plan.block_start, plan.block_end)
    weights = (inputs.w2, inputs.s2, inputs.b2)
    if rounds is None:
        down(op.h, *weights, *(() if op.combine_weighs else (inputs.topk_weights,)), y, *blocks)
    else:
        h = (rounds.h, rounds.h_scale) if rounds.native else (rounds.h,)
        down(*h, *weights, inputs.topk_weights, y, *blocks)
    combine(y, inputs.topk_ids, inputs.mapped, inputs.topk_weights, out, inputs.known)


def _check_runs_on(device: torch.device) -> None:
    if not runs_on(device):
        raise ValueError(
            f"impl 'triton_kernel' does not run on {device} here: set TRITON_INTERPRET=1 before "
            "moe_ep's kernels are imported (Triton's interpreter), or use impl 'reference'"
        )


def _elsewhere(x: Tensor) -> bool:
    """Whether x is on another GPU than torch's current one."""
    return x.is_cuda and x.device.index != torch.cuda.current_device()


def _ordered(weights: ExpertWeights, activations: ActivationDtype) -> ExpertWeights:
    """The weights as they are, or from a checkpoint's order in that for these activations on the current device."""
    if weights.order == "kernel":
        return weights
    arch = current_target().arch
    order = order_for(activations, arch)
    if weights.order == "kernel-fp8" and order != "kernel-fp8":
        raise ValueError(
            f"the weights are in kernel-fp8 order, which takes fp8 activations on gfx942; these are {activations} "
            f"activations on {arch}: load the weights anew"
        )
    return weights.in_kernel_order(order)


def _shape(
    x: Tensor,
    weights: ExpertWeights,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    topk_weights: Tensor,
    swiglu_limit: float | None,
    out: Tensor,
    activations: ActivationDtype,
    impl: Impl,
) -> _Shape:
    mapped = topk_ids if expert_map is None else expert_map
    b13, b2 = x if weights.b13 is None else weights.b13, x if weights.b2 is None else weights.b2
    codes, scales = (weights.w13, weights.w2), (weights.w13_scale, weights.w2_scale)
    tensors = (x, *codes, *scales, topk_ids, mapped, topk_weights, out, b13, b2)
    return _Shape(
        tokens=x.shape[0],
        hidden=x.shape[1],
        inner=weights.inner,
        top_k=topk_ids.shape[1],
        local=weights.count,
        known=weights.count if expert_map is None else expert_map.numel(),
        mapped=expert_map is not None,
        biased=(weights.b13 is not None, weights.b2 is not None),
        limited=swiglu_limit is not None,
        dtypes=(topk_ids.dtype, mapped.dtype, out.dtype),
        aligned=tuple(t.data_ptr() % 16 == 0 for t in tensors),
        device=x.device,
        stream=driver.active.get_current_stream(x.device.index) if x.is_cuda else 0,
        target=current_target(),
        tables=tables.directory(),
        override=_override,
        activations=activations,
        order="kernel-fp8" if weights.order == "kernel-fp8" else "kernel",
        impl=impl,
    )


class TritonKernelBackend(Mxfp4Backend):
    """Grouped GEMMs in Triton and Gluon on any GPU that Triton compiles for, and in its interpreter on a CPU."""

    impl: ClassVar[Impl] = "triton_kernel"

    @classmethod
    def launch_configs(cls, spec: MoELayerSpec, quant_config: object, arch: str) -> dict[str, Any]:
        """The table that the launches are chosen from, and what it gives at numbers of tokens by powers of four."""
        # tokenspeed's names of archs drop the stepping, tables have it.
        full = {"gfx94": "gfx942", "gfx95": "gfx950", "gfx90": "gfx90a", "cpu": "interpreter"}.get(arch, arch)
        on_nvidia = arch.startswith("sm")
        target = Target("cuda" if on_nvidia else "hip", full, 32 if on_nvidia else 64)
        table, activations, chosen = tables.find(table_name(full, cls.impl)), activation_dtype(quant_config), {}
        order = order_for(activations, arch)
        for tokens in (4**n for n in range(8)):
            sizes = (spec.num_experts, spec.hidden_size, spec.intermediate_size // spec.tp_size)
            chosen[str(tokens)] = str(launch_config(tokens * spec.top_k, *sizes, target, activations, order, cls.impl))
        regimes = () if table is None else table.fp8 if order == "kernel-fp8" else table.regimes
        from_table = table is not None and regimes and (activations == "bf16" or order == "kernel-fp8")
        return {"weights": order, "table": table.source if table and from_table else FALLBACK, "tokens": chosen}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put codes and scales in kernel order, in place where K is a multiple of 128."""
        if getattr(layer, "weight_order", "checkpoint") != "checkpoint":
            return
        order = order_for(activation_dtype(self.quant_config), self.key.arch)
        for name in ("w13_weight", "w2_weight"):
            weight, scale = layer.get_parameter(name), layer.get_parameter(f"{name}_scale")
            weight.data, scale.data = order_in_place(weight.data, scale.data, order)
        layer.weight_order = order  # type: ignore[assignment]  # an attribute like swiglu_arg

    @classmethod
    def device_refusal(cls, arch: str) -> str | None:
        """On a CPU the kernels run only in the interpreter."""
        if arch == "cpu" and not interpreted():
            return "no GPU; on a CPU the kernels run in Triton's interpreter, which TRITON_INTERPRET=1 turns on"
        return None
