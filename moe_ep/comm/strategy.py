"""What every strategy does: bring tokens to experts, and partials back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor

from moe_ep.comm.group import SPARED, Pending
from moe_ep.spec import TopKOutput


@dataclass(frozen=True)
class Routed:
    """What a rank's experts compute on: x bf16 [R, H] with routes; `way` is how the strategy finds the way back."""

    x: Tensor
    topk: TopKOutput
    way: Any = None
    place: str = ""


class Combine(ABC):
    """A strategy. Every rank of the group must call `dispatch` and `begin` equally often and in the same order, with
    no tokens too, and tells where in the model by `place`, for errors."""

    name: ClassVar[str]
    own_tokens: ClassVar[bool]
    """Whether each rank has tokens of its own (data-parallel), or all have the same."""
    capturable: ClassVar[bool] = True
    """Whether it can be captured in a CUDA graph, given the ranks' numbers of tokens."""

    @abstractmethod
    def dispatch(self, x: Tensor, topk: TopKOutput, counts: Sequence[int] | None = None, place: str = "") -> Routed:
        """What this rank's experts are to compute, of its tokens x bf16 [M, H].

        `counts` are the ranks' M, where the caller knows them; without, strategies that need them ask the others.
        """

    @abstractmethod
    def begin(self, partial: Tensor, routed: Routed | None = None) -> Pending:
        """Begin to combine the experts' partial [R, W], W = H or a range of the columns, into the sum [M, W] for this
        rank's tokens.

        `partial` may be overwritten.
        """

    def __call__(self, partial: Tensor, routed: Routed | None = None) -> Tensor:
        """`begin`, and wait."""
        return self.begin(partial, routed).wait()

    def arrive(self, partial: Tensor, routed: Routed | None = None) -> None:
        """`begin`, and wait until what is to be added up is there, as a layer does: for timing."""
        with self.begin(partial, routed).summands():
            pass

    def parts(self, routed: Routed, wanted: int) -> int:
        """In how many ranges of columns the sums may be combined one after the other: as many on every rank.

        `wanted`, which follows from the rows that there are, unless these differ between ranks.
        """
        return wanted

    def spared(self, routed: Routed, parts: int) -> int:
        """Multiprocessors that are to be left to the combine of one of `parts` ranges, while the next is computed."""
        return SPARED


def combine_for(ep_size: int, group: dist.ProcessGroup | None = None) -> Combine:
    """The combine of an EP group of `ep_size` ranks that have the same tokens; `group` None is torch's default one."""
    from moe_ep.comm.group import Group
    from moe_ep.comm.reduce import AllReduce, Alone

    return AllReduce(Group(group)) if ep_size > 1 else Alone()
