"""A collective that one of two ranks enters late, on GPUs, where the host need not wait for it."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ep.comm import Group, Pending
from moe_ep.comm.watch import Watch
from tests.waiting import until

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # not in __all__


def check_who_is_waited_for(
    store: "Store", rank: int, make_group: Callable[[Watch], Group], tensor: Callable[[], Tensor]
) -> None:
    """A rank that begins an all-reduce which the other does not is told who that is, while its host is free."""
    said: list[str] = []
    watch = Watch(store, "late", rank, (0, 1), 1.0, said.append)
    group = make_group(watch)

    def begin(place: str) -> Pending:
        return group.all_reduce(tensor(), place)

    begin("layer 0").wait()
    torch.cuda.synchronize()
    if rank == 0:
        late = begin("layer 1")
        until(lambda: said)
        assert "layer 1: all_reduce (number 2) waits for" in said[0]
        assert "not entered by rank 1 of 2: rank 1 last entered layer 0: all_reduce (number 1)" in said[0]
    else:
        time.sleep(4)
        late = begin("layer 1")
    assert torch.equal(late.wait(), 2 * tensor())
    torch.cuda.synchronize()
    watch.close()
