"""The weights of a rank's experts as one value."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """The L experts of a rank in the engines' layout; everything is contiguous and on one device.

    w13 uint8 [L, 2I, H/2] (w1's rows, then w3's), w13_scale uint8 [L, 2I, H/32], w2 uint8 [L, H, I/2],
    w2_scale uint8 [L, H, I/32]; biases f32 [L, 2I] and [L, H], or None.
    """

    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    b13: Tensor | None
    b2: Tensor | None

    @property
    def count(self) -> int:
        """L."""
        return self.w13.shape[0]

    @property
    def inner(self) -> int:
        """I, or this rank's slice of it."""
        return self.w13.shape[1] // 2
