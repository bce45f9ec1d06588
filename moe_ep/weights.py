"""The weights of a rank's experts as one value."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moe_ep.order import from_kernel_order, pad_scales, to_kernel_order
from moe_ep.shape import MXFP4_BLOCK

Order = Literal["checkpoint", "kernel"]


@dataclass(frozen=True)
class ExpertWeights:
    """The L experts of a rank; everything is contiguous and on one device.

    w13 uint8 [L, 2I, H/2] (w1's rows, then w3's), w13_scale uint8 [L, 2I, H/32], w2 uint8 [L, H, I/2],
    w2_scale uint8 [L, H, I/32]; biases f32 [L, 2I] and [L, H], or None. In kernel order the codes lie as
    `moe_ep.order` says, and K, the last dimension, is padded there to a multiple of 128.
    """

    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    b13: Tensor | None
    b2: Tensor | None
    order: Order = "checkpoint"

    @property
    def count(self) -> int:
        """L."""
        return self.w13.shape[0]

    @property
    def inner(self) -> int:
        """I, or this rank's slice of it."""
        return self.w13.shape[1] // 2

    def in_kernel_order(self) -> "ExpertWeights":
        """These weights, or a copy of them in kernel order."""
        if self.order == "kernel":
            return self
        return replace(
            self,
            w13=_ordered(self.w13),
            w13_scale=pad_scales(self.w13_scale).contiguous(),
            w2=_ordered(self.w2),
            w2_scale=pad_scales(self.w2_scale).contiguous(),
            order="kernel",
        )

    def expert(self, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One expert's w13, w13_scale, w2 and w2_scale as a checkpoint has them."""
        w13, s13, w2, s2 = (t[row] for t in (self.w13, self.w13_scale, self.w2, self.w2_scale))
        if self.order == "checkpoint":
            return w13, s13, w2, s2
        hidden, inner = self.w2.shape[1], self.inner
        return (
            from_kernel_order(w13, hidden),
            s13[:, : hidden // MXFP4_BLOCK],
            from_kernel_order(w2, inner),
            s2[:, : inner // MXFP4_BLOCK],
        )


def _ordered(packed: Tensor) -> Tensor:
    """One expert at a time: on the way a code takes four bytes."""
    return torch.stack([to_kernel_order(expert) for expert in packed]) if len(packed) else to_kernel_order(packed)
