"""Ranks as threads of this process, with groups as a job has them: real collectives, no start of a process each."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # not in __all__

TIMEOUT = timedelta(seconds=60)
Result = TypeVar("Result")


def connect(size: int) -> list[dist.ProcessGroup]:
    """A group of `size` ranks, as each of them has it."""
    store = HashStore()

    def of_rank(rank: int) -> dist.ProcessGroup:
        group = dist.ProcessGroup(store, rank, size)
        gloo = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, size, TIMEOUT)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        return group

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(of_rank, range(size)))


def on_ranks(
    size: int, do: Callable[[int, dist.ProcessGroup], Result], groups: list[dist.ProcessGroup] | None = None
) -> list[Result]:
    """What `do(rank, group)` returns on each of `size` ranks that are a group: a new one, or one from `connect`."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(do, range(size), groups or connect(size)))
