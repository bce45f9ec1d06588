"""Block sizes by problem, with a fallback for every arch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of a grouped GEMM. `block_m` is also what the routes are blocked by: the two must agree."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def choose(routes: int, num_experts: int) -> LaunchConfig:
    """A tile for `routes` = M·k routes over all `num_experts` experts of the model, this rank's among them.

    Not tuned: 16 rows is the least that a matrix instruction takes; above that a tile that holds most experts'
    routes at once, since every further block of an expert decodes its weights again. Compiled for gfx942 by
    triton 3.6.0 at V4-Pro's sizes, they take at most 24 KB of a compute unit's 64 KB of LDS and spill nothing.
    """
    likely = routes * 5 // (4 * num_experts)
    if likely <= 16:
        return LaunchConfig(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=2)
    if likely <= 32:
        return LaunchConfig(block_m=32, block_n=64, block_k=128, num_warps=4, num_stages=2)
    return LaunchConfig(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=2)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is decided when they are defined."""
    from triton.runtime.interpreter import InterpretedFunction

    from moe_ep.kernels.down import combine_kernel

    return isinstance(combine_kernel, InterpretedFunction)
