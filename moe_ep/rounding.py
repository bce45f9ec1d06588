"""Activations rounded to fp8 on the device before each GEMM: the launches of an op, and what they write."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moe_ep.dispatch import RoutePlan
from moe_ep.fp8_activations import groups
from moe_ep.kernels.bound import BoundLaunch
from moe_ep.kernels.quantise import quantise_local, quantise_routes, quantise_tokens
from moe_ep.order import padded

_ROWS = 16  # tokens a program


@dataclass(frozen=True)
class Rounder:
    """The launches that round an op's activations, for one shape of it.

    x [M, H] and h [routes, I] are what the GEMMs take. `native`: e4m3fnuz, K padded to whole groups, with scales f32
    [rows, K/128]; else bf16, times 2^64, with the scales in them. `routes` are of a plan, or those that are local.
    """

    native: bool
    x: Tensor
    x_scale: Tensor
    h: Tensor
    h_scale: Tensor
    tokens: BoundLaunch
    routes: BoundLaunch

    def round_tokens(self, x: Tensor) -> None:
        """From x bf16 [M, H]."""
        self.tokens(x, self.x, self.x_scale, len(x))

    def round_routes(self, h: Tensor, weights: Tensor, plan: RoutePlan) -> None:
        """From h [routes, I] by position in the sorted routes: native bf16, weighted already, else f32."""
        blocks = (plan.block_expert, plan.block_start, plan.block_end)
        self.routes(h, weights, self.h, self.h_scale, plan.route, *blocks)

    def round_local(self, h: Tensor, topk_ids: Tensor, mapped: Tensor, known: int) -> None:
        """From h bf16 [M·k, I] by route, weighted already, native, without a plan."""
        self.routes(h, self.h, self.h_scale, topk_ids, mapped, known)


def rounding_parts(
    tokens: int, hidden: int, routes: int, inner: int, *, native: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What is written, for `rounder`."""
    if not native:
        return {
            "rounded_x": ((tokens, hidden), torch.bfloat16),
            "rounded_h": ((routes, inner), torch.bfloat16),
        }
    return {
        "rounded_x": ((tokens, padded(hidden)), torch.float8_e4m3fnuz),
        "x_scale": ((tokens, groups(hidden)), torch.float32),
        "rounded_h": ((routes, padded(inner)), torch.float8_e4m3fnuz),
        "h_scale": ((routes, groups(inner)), torch.float32),
    }


def rounder(parts: dict[str, Tensor], hidden: int, inner: int, blocks: int, block_m: int, *, native: bool) -> Rounder:
    """The launches that write `parts`, those of `rounding_parts`, for routes in `blocks` blocks of `block_m`."""
    x, h = parts["rounded_x"], parts["rounded_h"]
    routes = {"WIDTH": inner, "NATIVE": native, "BLOCK_M": block_m}
    return Rounder(
        native,
        x,
        parts.get("x_scale", x),
        h,
        parts.get("h_scale", h),
        _of_tokens(x, hidden, native=native),
        BoundLaunch(quantise_routes, blocks * groups(inner), routes),
    )


def local_rounder(parts: dict[str, Tensor], hidden: int, inner: int, local: int, *, mapped: bool) -> Rounder:
    """The native launches that write `parts`, those of `rounding_parts`, for routes to `local` experts, unplanned."""
    x, h = parts["rounded_x"], parts["rounded_h"]
    constants = {"WIDTH": inner, "LOCAL": local, "HAS_MAP": mapped}
    routes = BoundLaunch(quantise_local, len(h) * groups(inner), constants, warps=1)
    return Rounder(True, x, parts["x_scale"], h, parts["h_scale"], _of_tokens(x, hidden, native=True), routes)


def _of_tokens(x: Tensor, hidden: int, *, native: bool) -> BoundLaunch:
    constants = {"WIDTH": hidden, "NATIVE": native, "BLOCK_R": _ROWS}
    return BoundLaunch(quantise_tokens, triton.cdiv(len(x), _ROWS) * groups(hidden), constants)
