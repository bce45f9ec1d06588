"""Which rank holds which expert. Needs no torch."""

from dataclasses import dataclass

NOT_LOCAL = -1
"""Value of an expert map where the expert lives on another rank (vLLM's convention, not aiter's 0/1)."""


@dataclass(frozen=True)
class Slice:
    """Which of `size` equal parts of something is one's own."""

    rank: int = 0
    size: int = 1


WHOLE = Slice()


@dataclass(frozen=True)
class Placement:
    """Contiguous placement of `num_experts` over `ep_size` ranks.

    Where the division leaves a remainder, the first ranks hold one expert more: nobody is dropped.
    """

    num_experts: int
    ep_size: int

    def __post_init__(self) -> None:
        if self.ep_size < 1:
            raise ValueError(f"ep_size = {self.ep_size} must be at least 1")
        if self.num_experts < self.ep_size:
            raise ValueError(
                f"ep_size = {self.ep_size} is more than num_experts = {self.num_experts}: "
                "some ranks would hold no expert"
            )

    def experts(self, ep_rank: int) -> range:
        """The global experts of one rank, in the order of its local rows."""
        if not 0 <= ep_rank < self.ep_size:
            raise ValueError(f"ep_rank = {ep_rank} must lie in 0..{self.ep_size - 1}")
        base, extra = divmod(self.num_experts, self.ep_size)
        start = ep_rank * base + min(ep_rank, extra)
        return range(start, start + base + (ep_rank < extra))

    def expert_map(self, ep_rank: int) -> tuple[int, ...]:
        """For every global expert its local row on `ep_rank`, `NOT_LOCAL` where it has none."""
        local = self.experts(ep_rank)
        return tuple(g - local.start if g in local else NOT_LOCAL for g in range(self.num_experts))
