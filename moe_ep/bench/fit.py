"""A network's constants from measured times of collectives, with the error that stays."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, hypot, log
from statistics import median
from typing import Literal

from moe_ep.cost import Name, Wire, combine_us, dispatch_us
from moe_ep.network import Layout, Network
from moe_ep.shape import ModelShape

Part = Literal["dispatch", "combine"]

_FACTORS = (2.0, 1.3, 1.1, 1.03, 1.01)
_ROUNDS = 400
_CLOSE = 0.1  # below which errors count by their squares, so that the way to the least is smooth
_CONSTANTS = ("call_us", "peer_us", "host_us", "pass_us", "copy_bytes_per_s")


@dataclass(frozen=True)
class Sample:
    """A measured dispatch or combine of `tokens` T of a group."""

    name: Name
    part: Part
    layout: Layout
    shape: ModelShape
    tokens: int
    wire: Wire
    us: float

    def predicted(self, network: Network) -> float:
        """µs by the cost model."""
        formula = dispatch_us if self.part == "dispatch" else combine_us
        return formula(self.name, self.layout, self.shape, self.tokens, self.wire, network)


@dataclass(frozen=True)
class Fit:
    """The constants, and by what factor less 1 predictions miss measured times: in the median and at worst.

    by_part: the same two of every strategy's dispatch and combine.
    """

    network: Network
    median_error: float
    worst_error: float
    by_part: dict[str, tuple[float, float]]


def fit(samples: Sequence[Sample], start: Network, source: str) -> Fit:
    """The constants from which the samples' predictions differ least, in the mean of the logarithms' magnitudes: small
    times count as much as large ones, and one that was disturbed little more than any.

    Each is changed by a factor, ever finer, as long as that helps. What no sample depends on stays as in `start`.
    """
    best, error = start, _error(samples, start)
    for factor in _FACTORS:
        for _ in range(_ROUNDS):
            tried = [(_error(samples, one), one) for one in _neighbours(best, factor)]
            least, network = min(tried, key=lambda pair: pair[0])
            if least >= error - 1e-12:
                break
            best, error = network, least
    missed: dict[str, list[float]] = {}
    for sample in samples:
        error = exp(abs(log(sample.predicted(best) / sample.us))) - 1
        missed.setdefault(f"{sample.name} {sample.part}", []).append(error)
    everything = [error for errors in missed.values() for error in errors]
    by_part = {part: (median(errors), max(errors)) for part, errors in missed.items()}
    return Fit(replace(best, source=source), median(everything), max(everything), by_part)


def _error(samples: Sequence[Sample], network: Network) -> float:
    return sum(hypot(log(sample.predicted(network) / sample.us), _CLOSE) for sample in samples) / len(samples)


def _neighbours(network: Network, factor: float) -> list[Network]:
    found = []
    for by in (factor, 1 / factor):
        found += [replace(network, **{key: getattr(network, key) * by}) for key in _CONSTANTS]
        for level in ("node", "fabric"):
            link = getattr(network, level)
            for key in ("step_us", "bytes_per_s"):
                found.append(replace(network, **{level: replace(link, **{key: getattr(link, key) * by})}))
    return found
