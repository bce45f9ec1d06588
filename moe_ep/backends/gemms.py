"""The launches of both grouped GEMMs, by the configuration of a call."""

from collections.abc import Callable
from typing import Any

import triton

from moe_ep.backends.call import Shape
from moe_ep.kernels.bound import BoundLaunch
from moe_ep.kernels.down import down_kernel
from moe_ep.kernels.gate_up import gate_up_kernel
from moe_ep.kernels.launch import Gemm, LaunchConfig

BothLaunch = Callable[..., None]
"""A `kernels.boxes.BoxedOp`."""
GemmLaunch = Callable[..., None]
"""A `BoundLaunch`, or a `kernels.boxes.BoxedLaunch`, which is imported only where Gluon runs."""
_Gemms = tuple[GemmLaunch, GemmLaunch]
_TWO_WAVES: dict[str, Any] = {"waves_per_eu": 2}
"""With two waves a SIMD in view the compiler keeps MFMA's sums in vector registers, where they are scaled; else it puts
them in accumulation registers and copies each out, half an operation a weight."""
_REGISTERS = {"REGISTERS": 232, "LOADER_REGISTERS": 48}
"""Of a warpgroup kernel's threads, of those that multiply and of those that copy, some of which keep a place in x for
each of the rows that they gather."""


def cdna3_launch(kernel: Any, blocks: int, rows: int, gemm: Gemm, constants: dict[str, Any]) -> BoundLaunch:
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
            cdna3_launch(gate_up_stream_fp8, blocks, shape.inner, config.gate_up, gate_up | xcds),
            cdna3_launch(down_stream_fp8, blocks, shape.hidden // 2, config.down, down | xcds),
        )
    if config.kernel == "cdna3":
        from moe_ep.kernels.cdna3 import down_cdna3, gate_up_cdna3

        return (
            cdna3_launch(gate_up_cdna3, blocks, shape.inner, config.gate_up, gate_up | xcds),
            cdna3_launch(down_cdna3, blocks, shape.hidden // 2, config.down, down | xcds),
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


def constants_of(shape: Shape) -> dict[str, Any]:
    """What a kernel of both GEMMs depends on, besides its tiles."""
    return {
        "TOP_K": shape.top_k,
        "HIDDEN": shape.hidden,
        "INTER": shape.inner,
        "LOCAL": shape.local,
        "HAS_MAP": shape.mapped,
        "HAS_B13": shape.biased[0],
        "HAS_B2": shape.biased[1],
        "HAS_LIMIT": shape.limited,
        "PDL": shape.target.pdl,
    }


def both_of(shape: Shape, config: LaunchConfig, blocks: int) -> BothLaunch | None:
    """Both GEMMs in one launch, where there is a kernel that makes them so and their tiles are alike."""
    if config.kernel != "warpgroup" or config.gate_up != config.down:
        return None
    from moe_ep.kernels.boxes import BoxedOp
    from moe_ep.kernels.experts import experts_warpgroup
    from moe_ep.kernels.pipe import BOXES

    gemm = config.gate_up
    constants = {
        **constants_of(shape),
        **_REGISTERS,
        "BLOCK_M": config.block_m,
        "BLOCK_N": gemm.block_n,
        "STAGES": gemm.stages,
    }
    tiles = blocks * max(shape.inner // gemm.block_n, shape.hidden // (2 * gemm.block_n))
    programs = min(tiles, shape.target.processors)
    launch = BoundLaunch(
        experts_warpgroup, programs, constants, warps=gemm.warps, stages=gemm.stages, pdl=shape.target.pdl
    )
    return BoxedOp(launch, gemm.block_n, config.block_m // BOXES.value)


def _warpgroup(
    shape: Shape, config: LaunchConfig, blocks: int, gate_up: dict[str, Any], down: dict[str, Any]
) -> _Gemms:
    """As many programs as the device has at once, each of which makes tiles in turn."""
    from moe_ep.kernels.boxes import BoxedLaunch
    from moe_ep.kernels.pipe import BOXES
    from moe_ep.kernels.warpgroup import down_warpgroup, gate_up_warpgroup

    def launch(kernel: Any, rows: int, gemm: Gemm, constants: dict[str, Any]) -> BoundLaunch:
        programs = min(blocks * (rows // gemm.block_n), shape.target.processors)
        own = {"blocks": blocks, **_REGISTERS}
        return BoundLaunch(
            kernel, programs, constants | own, warps=gemm.warps, stages=gemm.stages, pdl=constants["PDL"]
        )

    first = launch(gate_up_warpgroup, shape.inner, config.gate_up, gate_up)
    second = launch(down_warpgroup, shape.hidden // 2, config.down, down)
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
