"""The collectives of a group of ranks: begun without waiting, counted in bytes, watched."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ep.comm.peer import PeerMemory

# torch 2.13 has new names for these two, and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SPARED = 24
"""Multiprocessors that a collective takes at most, a block each: what NCCL takes by itself between two H200."""

_PAUSE_CYCLES = 10_000  # about 5 µs


class CollectiveError(RuntimeError):
    """A collective did not come to its end; says which, where in the model, and what is known of the other ranks."""


class Watcher(Protocol):
    """Who is told when a rank enters and leaves collectives (`moe_ep.comm.watch.Watch`)."""

    def entered(self, what: str, work: Any) -> int:
        """A collective was begun; its number."""
        ...

    def left(self, number: int) -> None:
        """It has ended, as far as the host has waited for it."""
        ...

    def suspects(self, number: int) -> str:
        """What is known of the ranks that have not entered collective `number`."""
        ...


@dataclass(frozen=True)
class Pending:
    """A result that is under way. `wait` gives it; on a GPU only the current stream waits, not the host.

    kept: what other streams use until then, and would else be given out again on this one. give_up: to be called
    instead of `wait` after an error, that what is begun later finds the group as the other ranks do.
    """

    finish: Callable[[], Tensor]
    pair: Callable[[], AbstractContextManager[tuple[Tensor, Tensor]]] | None = None
    kept: tuple[object, ...] = ()
    give_up: Callable[[], None] = lambda: None

    def wait(self) -> Tensor:
        """The result. Raises `CollectiveError`."""
        return self.finish()

    @contextmanager
    def summands(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Instead of `wait`: the result, or two tensors whose sum it is, for what is launched within."""
        if self.pair is None:
            yield self.finish(), None
        else:
            with self.pair() as both:
                yield both


class Group:
    """The ranks that combine experts, or a part of them. `process_group` None is torch's default group.

    Two of them that have `peer` memory send each other large sums through it.

    `sent` counts the bytes that this rank's collectives have sent to other ranks: of an all-to-all as they are, of the
    others as a ring sends them (an all-reduce 2(p−1)/p of its tensor, a gather and a reduce-scatter (p−1)/p of the
    whole), which is what gloo puts on the wire; NCCL may choose another algorithm.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        watch: Watcher | None = None,
        peer: PeerMemory | None = None,
    ) -> None:
        self.process_group, self.watch, self.peer = process_group, watch, peer
        self.size = dist.get_world_size(process_group)
        self.rank = dist.get_rank(process_group)
        self.sent = 0
        self._sums_by_exchange = dist.get_backend(process_group) == "gloo"

    def all_reduce(self, tensor: Tensor, place: str = "") -> Pending:
        """The sum over the ranks, in place."""
        self.sent += 2 * (self.size - 1) * tensor.nbytes // self.size
        if self.peer is not None and self.peer.takes(tensor.nbytes):
            return self._exchange(self.peer, "all_reduce", place, tensor, tensor)
        return self._begin("all_reduce", place, dist.all_reduce, tensor, tensor)

    def all_gather(self, tensor: Tensor, place: str = "", out: Tensor | None = None) -> Pending:
        """[p·R, …] of [R, …]: the ranks' rows in their order, in `out` where it is given, of which `tensor` may be this
        rank's part. R must be the same on all."""
        self.sent += (self.size - 1) * tensor.nbytes
        if out is None:
            out = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        return self._begin("all_gather", place, _all_gather, out, out, tensor)

    def reduce_scatter(self, tensor: Tensor, place: str = "") -> Pending:
        """[R, …] of [p·R, …]: this rank's rows, summed over the ranks.

        On gloo, which would reduce all rows on every rank, the rows are exchanged and added here in the ranks' order.
        """
        rows = tensor.shape[0] // self.size
        if self.peer is not None and self.peer.takes(tensor.nbytes // 2):
            self.sent += tensor.nbytes // 2
            halves = tensor.chunk(2)
            return self._exchange(self.peer, "reduce_scatter", place, halves[self.rank], halves[1 - self.rank])
        if self._sums_by_exchange:
            whole = self.all_to_all(tensor, [rows] * self.size, [rows] * self.size, place)
            return Pending(lambda: whole.wait().view(self.size, rows, *tensor.shape[1:]).sum(0))
        self.sent += (self.size - 1) * tensor.nbytes // self.size
        out = tensor.new_empty((rows, *tensor.shape[1:]))
        return self._begin("reduce_scatter", place, _reduce_scatter, out, out, tensor)

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int], place: str = "") -> Pending:
        """Rows sent by rank in order of ranks → rows received, likewise; `send` and `receive` count them."""
        row = tensor[:1].nbytes if len(tensor) else 0
        self.sent += (sum(send) - send[self.rank]) * row
        out = tensor.new_empty((sum(receive), *tensor.shape[1:]))
        return self._begin("all_to_all", place, dist.all_to_all_single, out, out, tensor, list(receive), list(send))

    def counts(self, own: Sequence[int], device: torch.device, place: str = "") -> list[list[int]]:
        """Everybody's numbers, by rank. Waits for the device, so not in a CUDA graph."""
        refuse_capture(f"{place}: the ranks' numbers of rows are exchanged through the host")
        mine = torch.tensor([list(own)], dtype=torch.int64, device=device)
        found: list[list[int]] = self.all_gather(mine, place).wait().tolist()
        return found

    def spared(self, nbytes: int, parts: int = 1) -> int:
        """Multiprocessors that the sums of `parts` tensors of `nbytes` take, at most, all under way at once."""
        return 0 if self.peer is not None and self.peer.takes(nbytes, parts) else SPARED

    def _exchange(self, peer: PeerMemory, name: str, place: str, mine: Tensor, sent: Tensor) -> Pending:
        """`mine` and what the other sends for it: equal bits on both ranks, as two summands have one sum."""
        arrival = peer.exchange(sent)
        if self.watch is not None and not torch.cuda.is_current_stream_capturing():
            self.watch.entered(f"{place}: {name}" if place else name, arrival)

        @contextmanager
        def pair() -> Iterator[tuple[Tensor, Tensor]]:
            with arrival.read() as theirs:
                yield mine, theirs

        def finish() -> Tensor:
            with pair() as (total, theirs):
                return total.add_(theirs)

        return Pending(finish, pair, give_up=arrival.give_up)

    def _begin(self, name: str, place: str, call: Callable[..., Any], result: Tensor, *args: Any) -> Pending:
        what = f"{place}: {name}" if place else name
        try:
            work = call(*args, group=self.process_group, async_op=True)
        except RuntimeError as error:
            raise self._failed(what, None, error) from error
        capturing = result.is_cuda and torch.cuda.is_current_stream_capturing()
        number = None if self.watch is None or capturing else self.watch.entered(what, work)

        def finish() -> Tensor:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._failed(what, number, error) from error
            if number is not None and self.watch is not None and not result.is_cuda:
                self.watch.left(number)
            return result

        return Pending(finish)

    def _failed(self, what: str, number: int | None, error: RuntimeError) -> CollectiveError:
        text = f"{what} did not end on rank {dist.get_rank()}: {str(error).splitlines()[0]}"
        if number is not None and self.watch is not None:
            text += f"; {self.watch.suspects(number)}"
        return CollectiveError(text)


def refuse_capture(why: str) -> None:
    """Raise `RuntimeError` while a CUDA graph is captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"cannot be captured in a CUDA graph: {why}")


def let_collectives_begin(device: torch.device) -> None:
    """A pause of some µs on the current stream, in which a collective that was just begun takes its multiprocessors.

    A matmul whose blocks stay to its end, as cuBLAS's do, would keep them all. Only on NVIDIA, where it was measured.
    """
    if device.type == "cuda" and torch.version.hip is None:
        torch.cuda._sleep(_PAUSE_CYCLES)
