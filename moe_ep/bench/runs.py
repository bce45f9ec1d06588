"""One case timed for each contender, and the lines that come of it."""

import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from moe_ep.bench.cases import Batch, RankShape, Routing, Weights, random_batch, random_weights
from moe_ep.bench.clock import Rates, eager_us, graph_us, until
from moe_ep.bench.contenders import Contender
from moe_ep.bench.exact import exact
from moe_ep.bench.peers import Op
from moe_ep.spec import ActivationDtype

_ROTATED_BYTES = 2**28  # of weights at least, so that no cache holds what the last op read
_MOST_SETS = 8
_CHECKED_TOKENS = 32  # for more, f64 takes too long


@dataclass(frozen=True)
class Line:
    """What one contender takes for one case, in µs an op.

    `eager` is launched from the host op by op, `graph` replayed from a CUDA graph of all ops, None where it cannot be
    captured. hit: experts that are read, on average. error: relative, of the norm, against f64.
    """

    shape: str
    tokens: int
    routing: Routing
    kernel: str
    hit: float
    routes: float
    floor: float
    eager: float | None
    graph: float | None
    gb_per_s: float | None
    tflop_per_s: float | None
    error: float | None
    failure: str | None = None

    @property
    def best(self) -> float | None:
        """The faster of the two ways to launch, None where it failed."""
        return min((us for us in (self.eager, self.graph) if us is not None), default=None)

    @property
    def ratio(self) -> float | None:
        """The best time over the floor."""
        return None if self.best is None else self.best / self.floor

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ratio": self.ratio}


def time_shape(
    shape: RankShape,
    cases: Sequence[tuple[int, Routing]],
    contenders: Sequence[Contender],
    rates: Rates,
    device: torch.device,
    limit: float | None = None,
) -> Iterator[Line]:
    """A line for each case and contender, as it is measured. Each op has other tokens and, in turn, other weights.

    limit: seconds that a contender has for all cases. Those that it does not come to have a line that says so.
    """
    sets = max(1, min(_MOST_SETS, round(_ROTATED_BYTES / (shape.held * shape.expert_bytes))))
    weights = [random_weights(shape, device, seed) for seed in range(sets)]
    for contender in contenders:
        deadline = math.inf if limit is None else time.monotonic() + limit
        ops, failure = _prepared(contender, shape, weights, deadline)
        for tokens, routing in cases:
            batches = [random_batch(shape, tokens, routing, device, seed) for seed in range(_batches(tokens, sets))]
            yield _time(shape, routing, contender, ops, failure, weights[0], batches, rates, device, deadline)
        del ops
        gc.collect()


def _prepared(
    contender: Contender, shape: RankShape, weights: list[Weights], deadline: float
) -> tuple[list[Op], str | None]:
    """Its ops, or why there are none: a peer that cannot be imported or set up must not end the others' run."""
    try:
        with until(deadline):
            return [contender.prepare(shape, one) for one in weights], None
    except Exception as caught:
        return [], f"{type(caught).__name__}: {caught}"


def _batches(tokens: int, sets: int) -> int:
    return max(sets, 4 if tokens > 1024 else 12)


def _time(
    shape: RankShape,
    routing: Routing,
    contender: Contender,
    ops: list[Op],
    failure: str | None,
    weights: Weights,
    batches: list[Batch],
    rates: Rates,
    device: torch.device,
    deadline: float,
) -> Line:
    locals_ = [batch.local(shape.held) for batch in batches]
    hit = sum(len(ids.unique()) for ids in locals_) / len(batches)
    routes = sum(len(ids) for ids in locals_) / len(batches)
    floor = rates.floor_us(hit, routes, shape.expert_bytes, shape.route_flops)
    eager = graph = error = None
    try:
        if failure is None:
            works = [partial(ops[i % len(ops)], batch) for i, batch in enumerate(batches)]
            with until(deadline):
                eager = eager_us(works, device)
                if contender.checked:
                    error = relative_error(ops[0], weights, batches[0], contender.activations)
                if device.type == "cuda" and contender.capturable:
                    graph = graph_us(works)
    except Exception as caught:  # nor must one that does not take a shape
        failure = f"{type(caught).__name__}: {caught}"
    line = Line(
        *(shape.name, len(batches[0].x), routing, contender.name, hit, routes, floor, eager, graph, None, None, error),
        failure=failure,
    )
    if line.best is None:
        return line
    return replace(
        line,
        gb_per_s=hit * shape.expert_bytes / line.best / 1e3,
        tflop_per_s=routes * shape.route_flops / line.best / 1e6,
    )


def relative_error(op: Op, weights: Weights, batch: Batch, activations: ActivationDtype = "bf16") -> float:
    """‖op − exact‖ / ‖exact‖, exact with the roundings of these activations.

    Over at most `_CHECKED_TOKENS` of the tokens that this rank has routes of.
    """
    mine = (weights.expert_map[batch.ids.long()] >= 0).any(dim=1).nonzero().flatten()
    mine = mine[:: -(-len(mine) // _CHECKED_TOKENS)]
    expected = exact(weights, Batch(batch.x[mine], batch.ids[mine], batch.weights[mine]), activations)
    return float((op(batch)[mine].double() - expected).norm() / expected.norm())
