"""How the ranks' partials become the result."""

from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Combine(Protocol):
    """Turns this rank's partial [M, H] into the sum over the ranks of its EP group."""

    def __call__(self, partial: Tensor) -> Tensor:
        """The sum, which may overwrite `partial`. Every rank of the group must call it, with M = 0 too."""
        ...


class AllReduce:
    """One all-reduce: for tokens that every rank of the group has (tensor-parallel attention).

    Bytes sent per rank: 2(p−1)/p · M · H · bytes of an element.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __call__(self, partial: Tensor) -> Tensor:
        """See `Combine`; in place."""
        dist.all_reduce(partial, group=self.group)
        return partial


class Alone:
    """A group of one rank: its partial is the result."""

    def __call__(self, partial: Tensor) -> Tensor:
        """See `Combine`."""
        return partial


def combine_for(ep_size: int, group: dist.ProcessGroup | None = None) -> Combine:
    """The combine of an EP group of `ep_size` ranks; `group` None is the default group of torch.distributed."""
    return AllReduce(group) if ep_size > 1 else Alone()
