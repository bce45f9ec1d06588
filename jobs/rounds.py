"""Several ways of doing a thing, timed in rounds of all of them until two halves of the rounds agree."""

from collections.abc import Sequence

NEAR = 0.05
"""What the fastest way by one half may take, by the other, above the fastest there."""

Rounds = Sequence[Sequence[float]]
"""Times of every call in every round."""
Ways = Sequence[Sequence[int]]
"""Of every way, which calls it is made of."""


def least(rounds: Rounds, ways: Ways) -> list[float]:
    """By way, the sum of the least that its calls took: others only ever add to a time."""
    calls = [min(times) for times in zip(*rounds, strict=True)]
    return [sum(calls[call] for call in way) for way in ways]


def agree(rounds: Rounds, ways: Ways) -> bool:
    """Whether the fastest by every other round is near the fastest by those between, and the other way round. Two
    rounds at least."""
    halves = least(rounds[::2], ways), least(rounds[1::2], ways)
    return all(there[here.index(min(here))] <= (1 + NEAR) * min(there) for here, there in (halves, halves[::-1]))
