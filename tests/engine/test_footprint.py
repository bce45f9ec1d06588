"""What a rank of the embedded engine holds and takes is what was planned for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.footprint import cache_bytes, kept_bytes, step_bytes, widened
from engine.model import Ranks, ServedModel
from jobs.allocations import Allocations
from moe_ep.comm import Alone
from moe_ep.footprint import pass_bytes
from moe_ep.placement import Slice
from moe_ep.synthetic import TINY, TINY_ATTENTION, write_checkpoint
from moe_ep.tensors import dense_held_bytes
from tests.engine.test_model import loaded, prompt

PIECE, CONTEXT = 256, 1024
ATTENTIONS = {
    "many heads": replace(TINY_ATTENTION, heads=16, head_dim=64, index_dim=64),
    "a wide indexer": replace(TINY_ATTENTION, index_heads=64),
    "windows alone": replace(TINY_ATTENTION, ratios=(0, 0, 0, 0), window=128, heads=16),
    "long entries": replace(TINY_ATTENTION, ratios=(0, 128, 128, 0), heads=16),
}


def storages(value: Any, seen: set[int]) -> int:
    """Bytes of all memory that tensors below a value keep, each once."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if id(value) in seen or isinstance(value, type):
        return 0
    seen.add(id(value))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(storages(part, seen) for part in parts) + storages(getattr(value, "__dict__", ()), seen)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_take_the_memory_that_was_planned_and_no_slice_keeps_its_whole(
    made: Path, heads: int, dtype: torch.dtype
) -> None:
    model = loaded(made, Ranks(Alone(), Alone(), Slice(heads - 1, heads)), 0, heads, dtype)
    planned = widened(TINY.held_bytes(range(TINY.layers), TINY.experts // heads), TINY, dtype.itemsize)
    planned |= dense_held_bytes(TINY, TINY_ATTENTION, heads, dtype.itemsize)
    assert storages(model._model, set()) == pytest.approx(sum(planned.values()), rel=0.01)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("many heads", torch.bfloat16),
        ("many heads", torch.float32),
        ("a wide indexer", torch.bfloat16),
        ("windows alone", torch.bfloat16),
        ("long entries", torch.float32),
    ],
)
def test_caches_and_a_step_take_no_more_than_was_planned_and_not_much_less(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    attention, item = ATTENTIONS[kind], dtype.itemsize
    write_checkpoint(tmp_path / "model", TINY, attention=attention)
    model = loaded(tmp_path / "model", Ranks(Alone(), Alone(), Slice()), 0, 1, dtype)
    tokens = (prompt(300) * 4)[:CONTEXT]
    for at in range(0, CONTEXT - PIECE, PIECE):
        model.forward({0: tokens[at : at + PIECE]})
    before, watch = caches(model), Allocations(torch.device("cpu"))
    with watch.during("step"):
        model.forward({0: tokens[-PIECE:]})
    kept = cache_bytes(attention, TINY.layers, CONTEXT, item)
    assert 0.8 < caches(model) / (kept + kept_bytes(attention, TINY.layers, PIECE, item)) < 1.02
    experts = pass_bytes(TINY, PIECE, kernels=False)
    step = step_bytes(TINY, attention, PIECE, CONTEXT, 1, item, experts)
    assert 0.75 < (watch.most["step"] + before - caches(model)) / step < 1.05
    model.forward({0: [9]})
    assert caches(model) <= 1.01 * kept


def caches(model: ServedModel) -> int:
    return storages([vars(layer) for cache in model._caches.values() for layer in cache.layers], set())
