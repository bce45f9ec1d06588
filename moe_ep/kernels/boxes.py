"""Descriptors for Hopper's copy engine: which box of a tensor a copy brings, and how it lies in shared memory."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_ep.kernels.bound import BoundLaunch
from moe_ep.order import TILE_ROWS

_WORDS = 32
"""Of 16 bits, which hold a row's group of codes."""
_PANEL = 64
"""Activations of a row that lie together: 128 bytes, the most that are swizzled."""
_KEPT = 4096
"""Descriptors that are kept: four for each layer's weights, and one for each shape's h."""


@dataclass(frozen=True)
class BoxedLaunch:
    """Launches of a kernel that takes weights as descriptors, and activations too if `x_box_rows` is not 0."""

    launch: BoundLaunch
    matrices: int
    box_rows: int
    x_box_rows: int = 0

    def __call__(self, x: Tensor, words: Tensor, scales: Tensor, *args: Any) -> None:
        """As `BoundLaunch`."""
        rows = activations(x, self.x_box_rows) if self.x_box_rows else x
        self.launch(rows, *weights(words, scales, self.matrices, self.box_rows), *args)


@dataclass(frozen=True)
class BoxedOp:
    """Launches of a kernel that makes h of w13 and y of h and w2, each of them as descriptors."""

    launch: BoundLaunch
    box_rows: int
    x_box_rows: int

    def __call__(
        self, x: Tensor, w13: tuple[Tensor, ...], h: Tensor, w2: tuple[Tensor, ...], y: Tensor, *args: Any
    ) -> None:
        """Weights are words, scales and bias; the other arguments as `BoundLaunch`."""
        (words13, scales13, b13), (words2, scales2, b2) = w13, w2
        self.launch(
            *(x, *weights(words13, scales13, 2, self.box_rows), words13, scales13, b13),
            *(h, activations(h, self.x_box_rows), *weights(words2, scales2, 1, self.box_rows), b2, y, *args),
        )


@dataclass(frozen=True)
class _Memory:
    """A tensor's place. Descriptors hold no tensor, so that keeping one keeps no memory."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """As `Tensor.data_ptr`."""
        return self.pointer


def activations(rows: Tensor, box_rows: int) -> TensorDescriptor:
    """Of bf16 [R, K], in boxes [box_rows, 64]."""
    return _descriptor(_Memory(rows.data_ptr(), rows.dtype), tuple(rows.shape), (box_rows, _PANEL), 128)


def weights(words: Tensor, scales: Tensor, matrices: int, box_rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of uint16 [L, N, K/4] and uint32 [L, N, K/128] in kernel order, in boxes of a group of `box_rows` rows.

    With two matrices in each expert's N rows, gate and up, a box has half of its rows from each, at the same places.
    """
    experts, rows, groups = scales.shape
    tiles = rows // TILE_ROWS // matrices
    # One matrix an expert: its tiles of 16 rows follow those of the expert before.
    outer, box = ((experts * tiles,), ()) if matrices == 1 else ((experts * matrices, tiles), (matrices,))
    box = (*box, box_rows // TILE_ROWS // matrices, 1, TILE_ROWS)
    shape = (*outer, groups, TILE_ROWS)
    return (
        _descriptor(_Memory(words.data_ptr(), words.dtype), (*shape, _WORDS), (*box, _WORDS), 64),
        _descriptor(_Memory(scales.data_ptr(), scales.dtype), shape, box, 0),
    )


@lru_cache(maxsize=_KEPT)
def _descriptor(memory: _Memory, shape: tuple[int, ...], box: tuple[int, ...], swizzle: int) -> TensorDescriptor:
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    layout = NVMMASharedLayout(swizzle, 8 * memory.dtype.itemsize, len(shape))
    return TensorDescriptor(memory, list(shape), strides, list(box), layout)
