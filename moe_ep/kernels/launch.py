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

    Not tuned: 16 rows is the least that a matrix instruction takes, and more pay only when an expert has
    more routes than that. Tiles stay below the 64 KB of LDS of a gfx942 compute unit.
    """
    per_expert = routes // num_experts
    if per_expert <= 16:
        return LaunchConfig(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=2)
    if per_expert <= 64:
        return LaunchConfig(block_m=32, block_n=64, block_k=128, num_warps=4, num_stages=2)
    return LaunchConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=2)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is decided when they are defined."""
    from triton.runtime.interpreter import InterpretedFunction

    from moe_ep.kernels.down import combine_kernel

    return isinstance(combine_kernel, InterpretedFunction)
