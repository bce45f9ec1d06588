"""`fused_moe_mxfp4`: the experts of one rank as one function."""

import math
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from moe_ep.order import padded
from moe_ep.placement import NOT_LOCAL
from moe_ep.shape import MXFP4_BLOCK
from moe_ep.spec import ActivationDtype
from moe_ep.weights import ExpertWeights, Order

_IMPLS = {
    "gluon_kernel": "moe_ep.backends.gluon_kernel",
    "triton_kernel": "moe_ep.backends.triton_kernel",
    "reference": "moe_ep.backends.reference",
}


def fused_moe_mxfp4(
    hidden_states: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    expert_map: Tensor | None = None,
    swiglu_limit: float | None = 10.0,
    activation_dtype: ActivationDtype = "bf16",
    weight_order: Order = "checkpoint",
    impl: str = "auto",
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """This rank's partial of a mixture of mxfp4 experts.

    y[m] = Σ_k topk_weights[m, k] · (w2ₑ · h + b2ₑ), with e = the local row of topk_ids[m, k],
    h = silu(min(g, limit)) · clamp(u, ±limit), g = w1ₑ·x + b1ₑ, u = w3ₑ·x + b3ₑ (DeepSeek-V4). Routes to experts that
    are not local are skipped, not computed with weight 0. The routing weights are used as they come: the
    routed scaling factor is the router's.

    Parameters
    ----------
    hidden_states: bf16 [M, H], any M including 0; the kernels take magnitudes below 2^64
    w13: uint8 [L, 2I, H/2], two e2m1 a byte, low nibble = even k; w1's rows, then w3's
    w13_scale: e8m0 [L, 2I, H/32], uint8 or float8_e8m0fnu
    w2, w2_scale: uint8 [L, H, I/2] and e8m0 [L, H, I/32]
    topk_ids: int [M, k], any k; global experts with an `expert_map`, else local rows; −1 is padding
    topk_weights: float [M, k]
    b13, b2: optional [L, 2I] and [L, H]; w2's bias counts once per route, times its weight
    expert_map: int [E], local row of each global expert, −1 where it is not local; on the tokens' device, or
        it is copied there at each call
    swiglu_limit: the clamp, None for none
    activation_dtype: "bf16", or "fp8": x, and h times the routing weight, are rounded as `moe_ep.fp8_activations` says,
        on every device to the same values. gfx942 multiplies them as fp8 with weights in "kernel-fp8" order; with
        weights in "kernel" order, and elsewhere, they are multiplied as bf16
    weight_order: "checkpoint" as above, or "kernel" or "kernel-fp8" (`moe_ep.order`), in which codes and scales are
        other bytes, of the same shape where K is a multiple of 128; from "checkpoint" the kernels make a copy at each
        call, so for more than a try bring weights into kernel order once, as the backend does
    impl: "gluon_kernel" (gfx942), "triton_kernel", "reference", or "auto": the first that runs here
    out_dtype: of the result; None for that of hidden_states
    out: where to write it, contiguous [M, H] on the tokens' device; None for a new tensor. With it, weights in kernel
        order, and inputs that are contiguous and f32 where floats are asked for, a stream's calls allocate nothing
        after the first of a shape. What lies between the kernels is kept by stream (`moe_ep.workspace`): a CUDA graph
        must not be replayed beside other calls, or another graph, of the stream that it was captured on: results would
        be wrong, or never come

    Returns
    -------
    Tensor [M, H], to be summed over the ranks. Equal inputs give equal bits.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype or device does not fit; names the argument.
    """
    module, inputs = _checked(
        *(hidden_states, w13, w13_scale, w2, w2_scale, topk_ids, topk_weights, b13, b2, expert_map, swiglu_limit),
        *(activation_dtype, weight_order, impl, out_dtype),
    )
    if out is not None:
        _check_out(out, hidden_states, out_dtype)
    else:
        out = torch.empty_like(
            hidden_states, dtype=out_dtype or hidden_states.dtype, memory_format=torch.contiguous_format
        )
    experts: Callable[..., None] = module.experts
    experts(*inputs, out, activation_dtype)
    return out


def fused_moe_mxfp4_by_columns(
    hidden_states: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    parts: int,
    spare: int = 0,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    expert_map: Tensor | None = None,
    swiglu_limit: float | None = 10.0,
    activation_dtype: ActivationDtype = "bf16",
    weight_order: Order = "checkpoint",
    impl: str = "auto",
    out_dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """`fused_moe_mxfp4`, its result in `parts` ranges of columns [M, H / parts] that come as soon as each is computed.

    The second GEMM is made a range at a time, so that what was given can be sent on while the next is made: no weight
    is read twice. All ranges must be taken before another op begins on the stream. Where an implementation makes only
    the whole, or cannot cut it there, the ranges are copies of the whole's.

    Parameters
    ----------
    parts: a divisor of H
    spare: multiprocessors that are left to what runs beside all ranges but the first, where kernels take them all

    Raises
    ------
    ValueError, TypeError
        As `fused_moe_mxfp4`, or if `parts` does not divide H.
    """
    hidden = hidden_states.shape[-1]
    if parts < 1 or hidden % parts:
        raise ValueError(f"parts is {parts}, expected a divisor of H = {hidden}")
    module, inputs = _checked(
        *(hidden_states, w13, w13_scale, w2, w2_scale, topk_ids, topk_weights, b13, b2, expert_map, swiglu_limit),
        *(activation_dtype, weight_order, impl, out_dtype),
    )
    dtype, tokens = out_dtype or hidden_states.dtype, hidden_states.shape[0]
    by_columns: Callable[..., Iterator[None]] | None = getattr(module, "experts_by_columns", None)
    if by_columns is None:
        whole = torch.empty(tokens, hidden, dtype=dtype, device=hidden_states.device)
        module.experts(*inputs, whole, activation_dtype)
        yield from (part.contiguous() for part in whole.chunk(parts, 1))
        return
    outs = [torch.empty(tokens, hidden // parts, dtype=dtype, device=hidden_states.device) for _ in range(parts)]
    for out, _ in zip(outs, by_columns(*inputs, outs, activation_dtype, spare), strict=True):
        yield out


def _checked(
    hidden_states: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    expert_map: Tensor | None,
    swiglu_limit: float | None,
    activation_dtype: ActivationDtype,
    weight_order: Order,
    impl: str,
    out_dtype: torch.dtype | None,
) -> tuple[ModuleType, tuple[Any, ...]]:
    """The implementation, and what it takes before the result."""
    for name, given, known in (
        ("weight_order", weight_order, get_args(Order)),
        ("activation_dtype", activation_dtype, get_args(ActivationDtype)),
    ):
        if given not in known:
            raise ValueError(f"{name} is {given!r}; there are {', '.join(map(repr, known))}")
    _check(hidden_states, w13, w13_scale, w2, w2_scale, topk_ids, topk_weights, b13, b2, expert_map, weight_order)
    if swiglu_limit is not None and not 0 < swiglu_limit < math.inf:
        raise ValueError(f"swiglu_limit is {swiglu_limit!r}, expected a finite number above 0, or None")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype is {out_dtype}, expected a floating-point type")
    weights = ExpertWeights(
        w13.contiguous(),
        w13_scale.view(torch.uint8).contiguous(),
        w2.contiguous(),
        w2_scale.view(torch.uint8).contiguous(),
        None if b13 is None else b13.float().contiguous(),
        None if b2 is None else b2.float().contiguous(),
        weight_order,
    )
    return import_module(_IMPLS[_resolve(impl, hidden_states, weights.inner)]), (
        hidden_states.contiguous(),
        weights,
        topk_ids.contiguous(),
        None if expert_map is None else expert_map.to(topk_ids.device).contiguous(),
        topk_weights.float().contiguous(),
        swiglu_limit,
    )


def _resolve(impl: str, hidden_states: Tensor, inner: int) -> str:
    if impl == "auto":
        from moe_ep.backends import gluon_kernel, target  # triton is imported only where it is wanted

        device = hidden_states.device
        if gluon_kernel.call_refusal(device, hidden_states.shape[1], inner) is None:
            return "gluon_kernel"
        return "triton_kernel" if target.runs_on(device) else "reference"
    if impl not in _IMPLS:
        raise ValueError(f"impl is {impl!r}; there are: auto, {', '.join(_IMPLS)}")
    return impl


def _check(
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    expert_map: Tensor | None,
    order: Order,
) -> None:
    if x.dim() != 2 or w13.dim() != 3:
        raise ValueError(f"hidden_states {list(x.shape)} must be [M, H] and w13 {list(w13.shape)} [L, 2I, H/2]")
    tokens, hidden = x.shape
    local, inner = w13.shape[0], w13.shape[1] // 2
    if hidden % MXFP4_BLOCK or inner % MXFP4_BLOCK:
        raise ValueError(f"H = {hidden} and I = {inner} must be multiples of {MXFP4_BLOCK}, the mxfp4 block")
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids {list(topk_ids.shape)} must be [M, k]")
    k13, k2 = (k if order == "checkpoint" else padded(k) for k in (hidden, inner))
    expected = {
        "w13": (w13, (local, 2 * inner, k13 // 2)),
        "w13_scale": (w13_scale, (local, 2 * inner, k13 // MXFP4_BLOCK)),
        "w2": (w2, (local, hidden, k2 // 2)),
        "w2_scale": (w2_scale, (local, hidden, k2 // MXFP4_BLOCK)),
        "topk_ids": (topk_ids, (tokens, topk_ids.shape[1])),
        "topk_weights": (topk_weights, (tokens, topk_ids.shape[1])),
        "b13": (b13, (local, 2 * inner)),
        "b2": (b2, (local, hidden)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden_states on {x.device}")
    _check_dtypes(x, (w13, w2), (w13_scale, w2_scale), topk_ids, topk_weights)
    if expert_map is not None:
        _check_map(expert_map, local)


def _check_out(out: Tensor, x: Tensor, out_dtype: torch.dtype | None) -> None:
    if out.shape != x.shape or out.device != x.device or not out.is_contiguous() or not out.dtype.is_floating_point:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}, "
            f"expected contiguous floats {list(x.shape)} on {x.device}"
        )
    if out_dtype not in (None, out.dtype):
        raise ValueError(f"out is {out.dtype}, but out_dtype is {out_dtype}")


def _check_map(expert_map: Tensor, local: int) -> None:
    found = f"expert_map is {expert_map.dtype} {list(expert_map.shape)}"
    wanted = "expected integers [E]: the local row of each global expert, -1 where it is not local"
    if expert_map.dim() != 1 or expert_map.numel() == 0 or not _is_integer(expert_map):
        raise ValueError(f"{found}, {wanted}")
    if expert_map.device.type == "cpu":  # on a GPU, looking would synchronise
        if int(expert_map.min()) < NOT_LOCAL or int(expert_map.max()) >= local:
            raise ValueError(f"{found} and names rows outside -1..{local - 1}; {wanted}")
        rows = expert_map[expert_map != NOT_LOCAL]
        if rows.unique().numel() != rows.numel():
            raise ValueError(f"{found} and names a local row twice, as a 0/1 mask does; {wanted}")


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)


def _check_dtypes(
    x: Tensor, weights: tuple[Tensor, ...], scales: tuple[Tensor, ...], topk_ids: Tensor, topk_weights: Tensor
) -> None:
    if x.dtype != torch.bfloat16:
        raise TypeError(f"hidden_states is {x.dtype}, expected torch.bfloat16")
    for weight in weights:
        if weight.dtype != torch.uint8:
            raise TypeError(f"packed weights are {weight.dtype}, expected torch.uint8 (two e2m1 codes a byte)")
    for scale in scales:
        if scale.dtype not in (torch.uint8, torch.float8_e8m0fnu):
            raise TypeError(f"scales are {scale.dtype}, expected torch.uint8 or torch.float8_e8m0fnu")
    if not _is_integer(topk_ids) or not topk_weights.dtype.is_floating_point:
        raise TypeError(
            f"topk_ids is {topk_ids.dtype} and topk_weights {topk_weights.dtype}, expected integers and floats"
        )
