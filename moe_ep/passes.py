"""Passes over memory around the experts, one kernel each where the tensors are on a GPU: `kernels.passes` launched.

Every one has a twin in plain torch where it is used, which is what runs elsewhere and what it is tested against.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from moe_ep.kernels.bound import BoundLaunch
from moe_ep.kernels.passes import add_kernel, pack_kernel, swiglu_kernel, unpack_kernel

_BLOCK = 1024
_KEPT = 4096  # launches of other shapes that are kept ready


def takes(*tensors: Tensor) -> bool:
    """Whether kernels take these: contiguous, and all on torch's current GPU, where Triton launches."""
    return all(t.is_cuda and t.is_contiguous() and t.device.index == torch.cuda.current_device() for t in tensors)


def swiglu(gate_up: Tensor, limit: float | None) -> Tensor:
    """bf16 [M, I] of gate and up bf16 [M, 2I]: silu(min(g, limit)) · clamp(u, ±limit) in f32, rounded once."""
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, inner)
    if tokens:
        constants = {"INTER": inner, "HAS_LIMIT": limit is not None}
        launch = _launch(swiglu_kernel, tokens, inner, tuple(constants.items()), _key(gate_up, out))
        launch(gate_up, out, 0.0 if limit is None else float(limit))
    return out


def add(total: Tensor, other: Tensor | None, shared: Tensor | None, out: Tensor, first: int) -> None:
    """Columns from `first` on of out bf16 [M, H]: total [M, W] + other [M, W] + those of shared bf16 [M, H] in f32,
    rounded once."""
    (tokens, width), hidden = total.shape, out.shape[1]
    if tokens == 0:
        return
    constants = {"WIDTH": width, "HIDDEN": hidden, "HAS_OTHER": other is not None, "HAS_SHARED": shared is not None}
    into = out.view(-1)[first:]
    given = (total, total if other is None else other, into if shared is None else shared.view(-1)[first:], into)
    launch = _launch(add_kernel, tokens, width, tuple(constants.items()), _key(*given))
    launch(*given)


def pack(x: Tensor, ids: Tensor, weights: Tensor, rows: Tensor, ids_at: int, *, fp8: bool) -> None:
    """Write rows uint8 [M, R] of x bf16 [M, H], ids int [M, k] and weights f32 [M, k]; see `moe_ep.comm.wire`."""
    if len(x):
        typed, constants = _row_constants(x, ids, rows, ids_at, fp8)
        launch = _launch(pack_kernel, *x.shape, constants, _key(x, ids, weights, rows))
        launch(x, ids, weights, typed, rows.view(torch.int32))


def unpack(rows: Tensor, x: Tensor, ids: Tensor, weights: Tensor, ids_at: int, *, fp8: bool) -> None:
    """The inverse of `pack`: writes x bf16, ids int32 and weights f32."""
    if len(x):
        typed, constants = _row_constants(x, ids, rows, ids_at, fp8)
        launch = _launch(unpack_kernel, *x.shape, constants, _key(rows, x, ids, weights))
        launch(typed, rows.view(torch.int32), x, ids, weights)


def _row_constants(x: Tensor, ids: Tensor, rows: Tensor, ids_at: int, fp8: bool) -> tuple[Tensor, tuple[Any, ...]]:
    top_k = ids.shape[1]
    constants = {
        "HIDDEN": x.shape[1],
        "TOP_K": top_k,
        "ROW": rows.shape[1],
        "IDS_AT": ids_at,
        "FP8": fp8,
        "BLOCK_K": triton.next_power_of_2(top_k),
    }
    return rows if fp8 else rows.view(torch.bfloat16), tuple(constants.items())


def _key(*tensors: Tensor) -> tuple[Any, ...]:
    """What a compiled kernel depends on: device, dtypes, and which tensors lie at multiples of 16 bytes."""
    return tensors[0].device, *((t.dtype, t.data_ptr() % 16 == 0) for t in tensors)


@lru_cache(maxsize=_KEPT)
def _launch(kernel: Any, rows: int, width: int, constants: tuple[Any, ...], key: tuple[Any, ...]) -> BoundLaunch:
    """A program for each row and block of `width`; `key` only tells launches apart."""
    block = max(128, min(_BLOCK, triton.next_power_of_2(width)))
    return BoundLaunch(kernel, rows * triton.cdiv(width, block), {**dict(constants), "BLOCK": block})
