"""Ranks that a collective waits for are named, with the collective's place, and never waited for in silence."""

import os
import re
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_ep.comm import Group
from moe_ep.comm.watch import Watch
from tests.moe_ep.test_layer import on_ranks
from tests.waiting import until

RANKS = (4, 5, 6)


class Work:
    """A collective that ends when it is told to."""

    def __init__(self) -> None:
        self.done = False

    def is_completed(self) -> bool:
        return self.done


class Ranks:
    """The watches of three ranks, in one process."""

    def __init__(self, timeout_s: float) -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        self.said: dict[int, list[str]] = {rank: [] for rank in RANKS}
        self.watches = {r: Watch(store, "whole", r, RANKS, timeout_s, self.said[r].append) for r in RANKS}

    def enter(self, rank: int, what: str) -> tuple[int, Work]:
        work = Work()
        return self.watches[rank].entered(what, work), work

    def wait_for_words_of(self, rank: int) -> str:
        return until(lambda: self.said[rank])[0]


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    found = Ranks(timeout_s=0.4)
    yield found
    for watch in found.watches.values():
        watch.close()


def test_who_has_not_entered_is_named_with_where_it_was_last(ranks: Ranks) -> None:
    for rank in RANKS:
        number, _ = ranks.enter(rank, "layer 3 dispatch: all_gather")
        ranks.watches[rank].left(number)
    for rank in (4, 6):
        ranks.enter(rank, "layer 3 combine: reduce_scatter")
    said = ranks.wait_for_words_of(4)
    assert said.startswith("layer 3 combine: reduce_scatter (number 2) waits for ")
    assert "not entered by rank 5 of 3: rank 5 last entered layer 3 dispatch: all_gather (number 1)" in said
    assert not ranks.said[5], "the rank that is late waits for nobody"


def test_a_wait_of_the_host_is_followed_like_a_collective(ranks: Ranks) -> None:
    for rank in RANKS:
        with ranks.watches[rank].during("the beginning of a pass"):
            pass
    with ranks.watches[4].during("the end of a pass"):
        said = ranks.wait_for_words_of(4)
    assert said.startswith("the end of a pass (number 2) waits for ")
    assert "not entered by ranks 5, 6 of 3: rank 5 last entered the beginning of a pass (number 1)" in said


def test_ranks_in_different_collectives_are_told_apart(ranks: Ranks) -> None:
    for rank, what in zip(RANKS, ("layer 0: all_reduce", "layer 1: all_reduce", "layer 0: all_reduce"), strict=True):
        ranks.enter(rank, what)
    assert (
        "the ranks are in different collectives: layer 0: all_reduce, layer 1: all_reduce" in ranks.wait_for_words_of(6)
    )


def test_a_rank_that_entered_and_then_stood_still_is_no_ones_absence(ranks: Ranks) -> None:
    for rank in RANKS:
        ranks.enter(rank, "layer 0: all_reduce")
    assert "all 3 ranks have entered it" in ranks.wait_for_words_of(4)


def freezes_within_a_collective(rank: int, world: int) -> None:
    """Rank 2 enters first, tells so, and is frozen; the others enter, and rank 0 thaws it when all is said."""
    store = dist.distributed_c10d._get_default_store()
    said: list[str] = []
    ranks = tuple(range(world))
    watch = Watch(store, "whole", rank, ranks, 2.0, said.append)
    group = Group(dist.new_group(list(ranks), timeout=timedelta(seconds=20)), watch)
    if rank == 2:
        store.set("pid", str(os.getpid()))
        pending = group.all_reduce(torch.ones(4), "layer 7 combine")
        time.sleep(0.6)  # until it has been told
        store.set("frozen", "")
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        store.wait(["frozen"])
        time.sleep(0.1)
        pending = group.all_reduce(torch.ones(4), "layer 7 combine")
        until(lambda: said)
        store.set(f"said/{rank}", "")
        if rank == 0:
            store.wait(["said/1"])
            os.kill(int(store.get("pid")), signal.SIGCONT)
        text = r"layer 7 combine: all_reduce \(number 1\) waits for \d+ s; all 3 ranks have entered it: "
        assert re.fullmatch(text + r"rank 2 has given no sign of life for \d+ s", said[0])
    assert pending.wait().tolist() == [3.0] * 4
    watch.close()


def test_a_rank_that_is_frozen_within_a_collective_is_named(tmp_path: Path) -> None:
    on_ranks(3, tmp_path / "store", freezes_within_a_collective)


def test_a_store_that_is_gone_ends_no_watch() -> None:
    class Gone:
        def set(self, key: str, value: str) -> None:
            if not value.startswith('[0, "none"'):
                raise dist.DistNetworkError("Broken pipe")

        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("Broken pipe")

    said: list[str] = []
    watch = Watch(Gone(), "whole", 4, RANKS, 0.4, said.append)  # type: ignore[arg-type]
    watch.entered("layer 3 combine: all_reduce", Work())
    until(lambda: said)
    watch.close()
    assert "layer 3 combine: all_reduce (number 1) waits for" in said[0]
    assert said[0].endswith("the ranks' store does not answer: Broken pipe")


def test_collectives_that_end_are_not_complained_of(ranks: Ranks) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < 1.2:  # three time limits
        for rank in RANKS:
            _, work = ranks.enter(rank, "layer 0: all_reduce")
            work.done = True  # as on a GPU: found out when the next is begun
        time.sleep(0.02)
    assert ranks.said == {4: [], 5: [], 6: []}
