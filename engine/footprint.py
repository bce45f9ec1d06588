"""Bytes that a rank of the embedded engine takes beside the weights that every job holds, from the model's sizes.
Needs no torch.

They follow what transformers' eager DeepSeek-V4 allocates and keeps: caches that grow by concatenation and are cut by
views, keys repeated for every head, scores of every token with every entry.
"""

from collections.abc import Iterator, Mapping

from moe_ep.attention import INDEXED_RATIO, AttentionShape
from moe_ep.shape import ModelShape

_F32 = 4
_SCORE = 12
"""Of a score: it, with its sink in f32, and its exponential, which is then brought to the values' dtype or is so."""


def cache_bytes(attention: AttentionShape, layers: int, context: int, item: int) -> int:
    """What a sequence of `context` tokens keeps, `item` bytes a value: the last window, the compressed entries, and the
    tokens that wait until there are enough for the next entry."""
    values = 0
    for ratio, width, series in _parts(attention, layers):
        if series == 0:
            values += min(context, attention.window) * width
        else:
            values += -(-context // ratio) * width + min(context, ratio) * 2 * series * width
            values += 2 * ratio * width if series == 2 else 0  # the window before, which the next overlaps
    return values * item


def kept_bytes(attention: AttentionShape, layers: int, tokens: int, item: int) -> int:
    """What `tokens` tokens of a prompt's piece keep until the sequence's next step, since caches are views of what was
    concatenated."""
    return tokens * item * sum(width * max(1, 2 * series) for _, width, series in _parts(attention, layers))


def widened(held: Mapping[str, int], shape: ModelShape, item: int) -> dict[str, int]:
    """What the layers hold (`ModelShape.held_bytes` of all), where shared experts and routers take `item` bytes a value
    and not bf16's two."""
    more = {"shared experts": held["shared experts"] // 2, "routers": shape.layers * shape.experts * shape.hidden}
    return {name: count + more.get(name, 0) * (item - 2) for name, count in held.items()}


def step_bytes(
    shape: ModelShape, attention: AttentionShape, tokens: int, context: int, heads: int, item: int, experts: int
) -> int:
    """The most that a step takes which reads `tokens` tokens at the end of `context`, with a 1/`heads` share of the
    heads: in a layer's attention, in its MoE (`experts` bytes, of `pass_bytes`), or where the residual streams are
    mixed. Sequences of a step are attended to one after another."""
    kinds = {attention.ratio(layer) for layer in range(shape.layers)}
    attended = max(_layer_bytes(attention, ratio, tokens, context, heads, item) for ratio in kinds)
    row = tokens * shape.hidden
    mixed = row * attention.streams * (4 * item + 2 * _F32)
    return max(mixed, row * (2 * attention.streams + 4) * item + max(attended, experts))


def _layer_bytes(attention: AttentionShape, ratio: int, tokens: int, context: int, heads: int, item: int) -> int:
    own, entries = attention.heads // heads, -(-context // ratio) if ratio else 0
    keys = min(context, attention.window - 1 + tokens) + entries
    queries = 2 * own * tokens * attention.head_dim
    repeated = (2 * own + 1) * keys * attention.head_dim
    taken = (queries + repeated) * item + _SCORE * own * tokens * keys
    if ratio != INDEXED_RATIO:
        return taken
    asked = tokens * attention.index_heads
    return max(taken, _F32 * (asked * attention.index_dim + entries * attention.index_dim + 3 * asked * entries))


def _parts(attention: AttentionShape, layers: int) -> Iterator[tuple[int, int, int]]:
    """Of every layer its caches: tokens an entry, values of an entry, and series of which it is made (0: a token).

    A layer that compresses nothing keeps keys and values, though they are the same.
    """
    for layer in range(layers):
        ratio = attention.ratio(layer)
        yield 1, attention.head_dim if ratio else 2 * attention.head_dim, 0
        if ratio:
            yield ratio, attention.head_dim, 2 if ratio == INDEXED_RATIO else 1
        if ratio == INDEXED_RATIO:
            yield ratio, attention.index_dim, 2
