"""Ranks that read a matrix by rows together hold it by columns, and none reads what another has read."""

from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ep import exchange as exchanging
from moe_ep.backends.base import MoEBackend
from moe_ep.checkpoint import Checkpoint
from moe_ep.comm import Alone
from moe_ep.exchange import ColumnExchange
from moe_ep.layer import MoELayer
from moe_ep.loading import load_layers, plan_loading
from moe_ep.placement import WHOLE, Slice
from moe_ep.selector import select_backend
from moe_ep.shape import ModelShape
from moe_ep.spec import MoELayerSpec, Mxfp4Config
from moe_ep.synthetic import write_checkpoint
from tests.moe_ep.ranks import connect, on_ranks

# 3 slices of I divide neither the 160 rows of w2 nor the 2 rows of the shared expert's scales.
SHAPE = ModelShape(hidden=160, intermediate=768, layers=2, experts=3, top_k=2, vocab=32, hash_layers=1)
CPU = torch.device("cpu")
# Once for each size, not for each example: Gloo does not always connect while the machine is busy.
connected = lru_cache(connect)


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 4),
    count=st.integers(1, 4),
    height=st.integers(1, 13),
    width=st.integers(1, 9),
    together=st.sampled_from([1, 200, 1 << 20]),
)
def test_what_was_read_by_rows_lies_by_columns(size: int, count: int, height: int, width: int, together: int) -> None:
    whole = torch.randint(0, 256, (count, height, size * width), dtype=torch.uint8)
    rows = height // size

    def columns(rank: int, group: dist.ProcessGroup) -> torch.Tensor:
        mine = torch.zeros(count, height, width, dtype=torch.uint8)
        mine[:, : rows * size] = whole[:, rank * rows : (rank + 1) * rows].reshape(count, rows * size, width)
        mine[:, rows * size :] = whole[:, rows * size :, rank * width : (rank + 1) * width]
        ColumnExchange(Slice(rank, size), group)(mine)
        return mine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchanging, "EXCHANGE_BYTES", together)
        assert torch.equal(torch.cat(on_ranks(size, columns, connected(size)), dim=-1), whole)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    write_checkpoint(path, SHAPE, seed=5)
    return path


def backends_of(rank: int, size: int) -> dict[int, MoEBackend]:
    specs = {layer: MoELayerSpec.of_rank(SHAPE, layer, 0, 1, rank, size) for layer in SHAPE.all_layers}
    return {n: select_backend(s, Mxfp4Config(), arch="cpu", impl="reference") for n, s in specs.items()}


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_exchange_hold_what_each_would_have_read_and_read_what_they_hold(path: Path, size: int) -> None:
    def load(rank: int, group: dist.ProcessGroup) -> tuple[dict[int, MoELayer], int]:
        checkpoint, place = Checkpoint.open(path), Slice(rank, size)
        exchange = ColumnExchange(place, group)
        layers = load_layers(checkpoint, backends_of(rank, size), Alone(), CPU, shared=place, exchange=exchange)
        return layers, checkpoint.bytes_read

    needed = sum(
        info.nbytes if ".gate." in name else info.nbytes // size for name, info in Checkpoint.open(path).tensors.items()
    )
    for rank, (layers, read) in enumerate(on_ranks(size, load)):
        alone = load_layers(Checkpoint.open(path), backends_of(rank, size), Alone(), CPU, shared=Slice(rank, size))
        for number in SHAPE.all_layers:
            held, expected = (
                dict(m[number].named_parameters()) | dict(m[number].named_buffers()) for m in (layers, alone)
            )
            assert held.keys() == expected.keys()
            assert all(torch.equal(held[name], expected[name]) for name in held)
        assert needed <= read <= 1.01 * needed


def test_together_they_read_each_byte_of_a_matrix_that_is_cut_by_columns_once(path: Path) -> None:
    checkpoint, size = Checkpoint.open(path), 3
    name = "layers.1.ffn.experts.2.w2.weight"
    read = []
    for rank in range(size):
        place = Slice(rank, size)
        _, reads = plan_loading(checkpoint, backends_of(rank, size), CPU, place, place)
        read += [(p.offset, p.end) for r in reads for p in r.pieces if p.name == name]
    info = checkpoint.tensors[name]
    read.sort()
    assert (read[0][0], read[-1][1]) == (info.offset, info.offset + info.nbytes)
    assert all(a[1] == b[0] for a, b in pairwise(read))


def test_ranks_meet_once_all_has_been_read_and_before_anything_is_exchanged(path: Path) -> None:
    order: list[str] = []

    class Recorded(ColumnExchange):
        def __call__(self, matrices: torch.Tensor) -> None:
            order.append("exchange")

    exchange = Recorded(Slice(0, 2), None, lambda: order.append("meet"))
    load_layers(
        *(Checkpoint.open(path), backends_of(0, 2), Alone(), CPU),
        exchange=exchange,
        on_progress=lambda progress: order.append("all read" if progress.done == progress.total else "reading"),
    )
    assert order[-6:] == ["all read", "meet", *["exchange"] * 4], "w2 and its scales of two layers"


def test_a_rank_that_exchanges_another_slice_than_it_holds_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"w2\.weight: this rank holds slice .*rank=0, size=2.*exchanges columns as"):
        plan_loading(Checkpoint.open(path), backends_of(0, 2), CPU, WHOLE, Slice(1, 2))
