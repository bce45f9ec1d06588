"""Block sizes by device and problem, with a fallback for every problem."""

from dataclasses import dataclass
from typing import Literal

Target = Literal["cuda", "hip"]


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of a grouped GEMM. `block_m` is also what the routes are blocked by: the two must agree."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


TABLES: dict[Target, tuple[LaunchConfig, ...]] = {
    # Measured on an H100 at V4's shapes.
    "cuda": (
        LaunchConfig(block_m=16, block_n=64, num_warps=4, num_stages=3),
        LaunchConfig(block_m=32, block_n=64, num_warps=4, num_stages=3),
        LaunchConfig(block_m=64, block_n=64, num_warps=4, num_stages=3),
        LaunchConfig(block_m=128, block_n=64, num_warps=4, num_stages=3),
    ),
    # Not measured: compiled, they spill nothing and leave LDS for two workgroups and more.
    "hip": (
        LaunchConfig(block_m=16, block_n=64, num_warps=4, num_stages=2),
        LaunchConfig(block_m=32, block_n=64, num_warps=4, num_stages=2),
        LaunchConfig(block_m=64, block_n=64, num_warps=4, num_stages=2),
    ),
}
"""By rising rows. 16 rows is the least that a matrix instruction takes."""


def choose(routes: int, num_experts: int, target: Target) -> LaunchConfig:
    """A tile for `routes` = M·k routes over all `num_experts` experts of the model, this rank's among them.

    The smallest that holds most experts' routes at once, since every further block of an expert decodes its weights
    again; beyond the largest tile, the largest.
    """
    likely = routes * 5 // (4 * num_experts)
    return next((tile for tile in TABLES[target] if likely <= tile.block_m), TABLES[target][-1])


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is decided when they are defined."""
    from triton.runtime.interpreter import InterpretedFunction

    from moe_ep.kernels.down import combine_kernel

    return isinstance(combine_kernel, InterpretedFunction)
