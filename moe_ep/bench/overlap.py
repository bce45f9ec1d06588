"""What of a layer's communication its other parts hide, on all ranks of a group."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ep.bench.fit import Part, Sample
from moe_ep.bench.rig import REPEATS, Bench, tokens_of
from moe_ep.comm import Alone, Combine, Routed
from moe_ep.cost import PARTS, Name, Wire
from moe_ep.layer import MoELayer, SharedExpert, add_columns, finish
from moe_ep.routing import Router
from moe_ep.shape import ModelShape

_ROUNDS = 9  # of a layer and all its parts


def tail(
    name: str, shape: ModelShape, router: Router, shared: SharedExpert, tokens: int, strategy: Name, bench: Bench
) -> None:
    """What a layer does after its experts, beside its parts: combine, shared expert, and the last sum.

    hidden: (all parts − the tail) over the smaller of shared and combine, the median over rounds.
    """
    combine = bench.groups.strategy(strategy, shape.experts)
    captured = bench.device.type == "cuda" and combine.capturable
    x, counts = tokens_of(shape, tokens, bench, own=combine.own_tokens)
    routed = combine.dispatch(x, router(x), counts)
    partial = torch.zeros(routed.x.shape[0], shape.hidden, device=bench.device)
    added, sums = torch.zeros_like(x), last_sums(combine, partial, routed, x)
    pause = combine.spared(routed, 1) > 0

    def one(work: Callable[[], object]) -> Callable[[], object]:
        return bench.graph([work]) if captured else work

    works = {
        "shared": one(lambda: shared(x)),
        "combine": one(lambda: combine.arrive(partial, routed)),
        "add": one(lambda: sums(added)),
        "tail": one(lambda: finish(x, [combine.begin(partial, routed)], shared, pause=pause)),
    }
    took = {part: torch.tensor(us) for part, us in zip(works, bench.rounds(list(works.values()), REPEATS), strict=True)}
    saved = took["shared"] + took["combine"] + took["add"] - took["tail"]
    line: dict[str, Any] = {"kind": "tail", "shape": name, "tokens": tokens, "strategy": strategy, "captured": captured}
    line |= {f"{part}_us": float(us.median()) for part, us in took.items()}
    bench.add(line | {"hidden": float((saved / torch.minimum(took["shared"], took["combine"])).median())})


def last_sums(combine: Combine, partial: Tensor, routed: Routed, x: Tensor) -> Callable[[Tensor | None], None]:
    """A layer's last pass, given the shared expert's result or None, over as many summands as the combine gives."""
    with combine.begin(partial, routed).summands() as given:
        total, other = (None if one is None else torch.zeros_like(one) for one in given)
    assert total is not None
    out = torch.empty_like(x)
    return lambda shared: add_columns(total, shared, out, 0, other)


def overlap(
    name: str, shape: ModelShape, layers: list[MoELayer], tokens: int, strategy: Name, bench: Bench
) -> list[Sample]:
    """A layer with its combine beside its parts, in rounds of all of them, replayed from graphs where they can be.

    A share that is hidden is of each round, and the median of these. hidden_shared: (all parts − layer) over the
    smaller of shared and combine. hidden_against_alone: (alone + combine − layer) over the same, where all ranks have
    the tokens: alone is the layer without communication, one device with its share of the experts. Without shared
    expert: hidden_N with the second GEMM in N ranges, where experts_N are the experts so, over the smaller of it, a
    third of the experts, and combine; saved_N_us: against the layer in one range. hidden_both_N: with both, over the
    combine. Returns the parts, for a fit.
    """
    combine = bench.groups.strategy(strategy, shape.experts)
    captured = bench.device.type == "cuda" and combine.capturable
    x, counts = tokens_of(shape, tokens, bench, own=combine.own_tokens)
    topk = layers[0].router(x)
    routed = combine.dispatch(x, topk, counts)
    partial = torch.zeros(routed.x.shape[0], shape.hidden, device=bench.device)
    added, sums = torch.zeros_like(x), last_sums(combine, partial, routed, x)
    shared = [layer.shared_expert for layer in layers]

    def each(work: Callable[[MoELayer], object]) -> Callable[[], object]:
        works = [lambda layer=layer: work(layer) for layer in layers]
        return bench.graph(works) if captured else lambda: [one() for one in works]

    def whole(how: Combine, parts: int = 1, *, bare: bool = False) -> Callable[[], object]:
        given = routed.x if how.name == "none" else x

        def one(layer: MoELayer) -> Tensor:
            layer.shared_expert = None if bare else shared[layers.index(layer)]
            layer.combine, layer.cut = how, lambda rows: parts
            done: Tensor = layer(given, counts=counts)
            return done

        return each(one)

    works = {
        "router": each(lambda layer: layer.router(x)),
        "experts": each(lambda layer: layer.experts(routed.x, routed.topk)),
        "shared": each(lambda layer: shared[layers.index(layer)](x)),  # type: ignore[misc]
        "combine": each(lambda layer: combine.arrive(partial, routed)),
        "add": each(lambda layer: sums(added)),
        "cast": each(lambda layer: sums(None)),
        "alone": whole(Alone()),
        "layer": whole(combine),
    }
    if combine.own_tokens:
        works["dispatch"] = each(lambda layer: combine.dispatch(x, topk, counts))
    cuts = [parts for parts in PARTS if combine.parts(routed, parts) == parts]
    works |= {
        f"experts_{parts}": each(lambda layer, parts=parts: [*layer.experts.by_columns(routed.x, routed.topk, parts)])  # type: ignore[misc]
        for parts in cuts
        if parts > 1
    }
    works |= {f"bare_{parts}": whole(combine, parts, bare=True) for parts in cuts}
    works |= {f"both_{parts}": whole(combine, parts) for parts in cuts if parts > 1}
    for layer, one in zip(layers, shared, strict=True):
        layer.shared_expert = one
    measured = bench.rounds(list(works.values()), _ROUNDS if bench.device.type == "cuda" else 3)
    for layer, one in zip(layers, shared, strict=True):
        layer.shared_expert, layer.cut = one, None
    took = dict(zip(works, (torch.tensor(times) / len(layers) for times in measured), strict=True))
    took.setdefault("dispatch", torch.zeros_like(took["layer"]))
    bench.add(
        {
            "kind": "layer",
            "shape": name,
            "tokens": tokens,
            "strategy": strategy,
            "captured": captured,
            **{f"{part}_us": float(times.median()) for part, times in took.items()},
            **_hidden(took, same_tokens=not combine.own_tokens),
        }
    )
    parts: dict[Part, Tensor] = {"combine": took["combine"]}
    if combine.own_tokens:
        parts["dispatch"] = took["dispatch"]
    layout = bench.groups.layout
    return [Sample(strategy, part, layout, shape, tokens, Wire(), float(us.median())) for part, us in parts.items()]


def _hidden(took: dict[str, Tensor], *, same_tokens: bool) -> dict[str, float]:
    """The shares of `overlap`, from µs by round."""
    smaller = torch.minimum(took["shared"], took["combine"])
    second = torch.minimum(took["experts"] / 3, took["combine"])
    around = took["router"] + took["dispatch"] + took["combine"]
    everything = around + took["experts"] + took["shared"] + took["add"]
    found = {"sum_us": everything, "hidden_shared": (everything - took["layer"]) / smaller}
    if same_tokens:
        found["hidden_against_alone"] = (took["alone"] + took["combine"] - took["layer"]) / smaller
    for label, times in took.items():
        kind, _, parts = label.partition("_")
        if kind == "bare":
            experts = took["experts" if parts == "1" else f"experts_{parts}"]
            found[f"hidden_{parts}"] = (around + experts + took["cast"] - times) / second
            found[f"saved_{parts}_us"] = took["bare_1"] - times
        elif kind == "both":
            found[f"hidden_both_{parts}"] = (everything - times) / took["combine"]
    return {label: float(shares.median()) for label, shares in found.items()}


def graphs_equal(name: str, shape: ModelShape, layer: MoELayer, tokens: int, strategy: Name, bench: Bench) -> None:
    """Whether a captured layer, replayed on other tokens, gives the bits of the eager one."""
    layer.combine = bench.groups.strategy(strategy, shape.experts)
    x, counts = tokens_of(shape, tokens, bench, own=layer.combine.own_tokens)
    fixed, out = x.clone(), torch.empty_like(x)
    replay = bench.graph([lambda: out.copy_(layer(fixed, counts=counts))])
    fixed.copy_(x.flip(0))
    replay()
    torch.cuda.synchronize()
    same = torch.tensor([int(torch.equal(out, layer(x.flip(0).contiguous(), counts=counts)))], device=bench.device)
    dist.all_reduce(same, op=dist.ReduceOp.MIN)
    bench.add({"kind": "graph", "shape": name, "tokens": tokens, "strategy": strategy, "equal": bool(same.item())})
