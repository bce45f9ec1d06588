"""What is timed: a rank's share of a layer, tokens, and how they are routed."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_ep.placement import Placement
from moe_ep.shape import MXFP4_BLOCK

Routing = Literal["uniform", "zipf", "one"]
"""uniform: experts alike. zipf: the i-th most popular one is taken 1/i as often. one: all of the rank's routes go to
its first expert, the worst case."""


@dataclass(frozen=True)
class RankShape:
    """The share of rank 0: `experts` / `ep_size` experts, and `inner` of each one's intermediate features."""

    name: str
    hidden: int
    inner: int
    experts: int
    ep_size: int
    top_k: int = 6

    @property
    def held(self) -> int:
        """Experts of rank 0."""
        return len(Placement(self.experts, self.ep_size).experts(0))

    @property
    def expert_bytes(self) -> float:
        """Packed codes and scales of one expert."""
        return 3 * self.hidden * self.inner * (1 / 2 + 1 / MXFP4_BLOCK)

    @property
    def route_flops(self) -> int:
        """Of one route: three GEMMs."""
        return 6 * self.hidden * self.inner


SHAPES = {
    shape.name: shape
    for shape in (
        RankShape("flash-ep4", 4096, 2048, 256, 4),
        RankShape("flash-ep8", 4096, 2048, 256, 8),
        RankShape("flash-ep8-i512", 4096, 512, 256, 8),
        RankShape("pro-ep8", 7168, 3072, 384, 8),
        RankShape("pro-ep16", 7168, 3072, 384, 16),
        RankShape("pro-ep32", 7168, 3072, 384, 32),
        RankShape("tiny", 128, 64, 8, 2, top_k=2),
    )
}


@dataclass(frozen=True)
class Batch:
    """x bf16 [M, H], ids int32 [M, k] of the model's experts, weights f32 [M, k]."""

    x: Tensor
    ids: Tensor
    weights: Tensor

    def local(self, held: int) -> Tensor:
        """The ids of the routes that rank 0 computes."""
        return self.ids[self.ids < held]


@dataclass(frozen=True)
class Weights:
    """A rank's experts as checkpoints have them, and the map from the model's experts to their rows."""

    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    expert_map: Tensor

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Without the map."""
        return self.w13, self.w13_scale, self.w2, self.w2_scale


def random_weights(shape: RankShape, device: torch.device, seed: int) -> Weights:
    """Random codes; the scales keep activations near 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def codes(rows: int, k: int) -> tuple[Tensor, Tensor]:
        scale = 127 - 1 - int(k).bit_length() // 2
        return (
            torch.randint(0, 256, (shape.held, rows, k // 2), dtype=torch.uint8, device=device, generator=generator),
            torch.randint(
                *(scale - 1, scale + 2, (shape.held, rows, k // MXFP4_BLOCK)),
                dtype=torch.uint8,
                device=device,
                generator=generator,
            ),
        )

    expert_map = torch.full((shape.experts,), -1, dtype=torch.int32, device=device)
    expert_map[: shape.held] = torch.arange(shape.held, dtype=torch.int32, device=device)
    return Weights(*codes(2 * shape.inner, shape.hidden), *codes(shape.hidden, shape.inner), expert_map)


def random_batch(shape: RankShape, tokens: int, routing: Routing, device: torch.device, seed: int) -> Batch:
    """Every token takes top_k distinct experts; at least one route of the batch is rank 0's."""
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.rand(tokens, shape.experts, device=device, generator=generator)
    if routing == "zipf":
        # The k largest of log p + Gumbel noise are k draws without replacement from p.
        popularity = torch.randperm(shape.experts, device=device, generator=generator).float().add_(1).reciprocal_()
        noise = popularity.log() - noise.log_().neg_().log_()
    ids = noise.argsort(-1, descending=True)[:, : shape.top_k].int()
    if routing == "one":  # the first slot is the first expert's, all others are remote
        ids[:, 1:] = torch.where(ids[:, 1:] < shape.held, ids[:, 1:] + shape.held, ids[:, 1:]) % shape.experts
        ids[:, 0] = 0
    elif not (ids < shape.held).any():
        ids[0, 0] = 0
    x = torch.randn(tokens, shape.hidden, device=device, generator=generator).bfloat16()
    return Batch(x, ids, torch.rand(tokens, shape.top_k, device=device, generator=generator))
