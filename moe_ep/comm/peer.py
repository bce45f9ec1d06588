"""Two GPUs of one host that write into each other's memory by their copy engines, which take no multiprocessor."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ep.footprint import PEER_BYTES

LEAST_BYTES = 4 << 20
"""Below this a copy with its signals takes longer than NCCL (two H200)."""

_ALIGNMENT = 512
_ARRIVED, _READ = 0, 1  # channels of signals
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Arrival:
    """What the other rank has sent, in this rank's memory, from `event` on. `left` is told when it has been read, or
    will not be; more than once does no harm."""

    received: Tensor
    event: torch.cuda.Event
    left: Callable[[], None]

    def is_completed(self) -> bool:
        """Whether it is there; the host does not wait."""
        there: bool = self.event.query()
        return there

    @contextmanager
    def read(self) -> Iterator[Tensor]:
        """What was received, for what is launched within; the current stream waits for it."""
        torch.cuda.current_stream().wait_event(self.event)
        try:
            yield self.received
        finally:
            self.left()

    def give_up(self) -> None:
        """Instead of `read`: after an error, before what was sent is given out again on the current stream."""
        self.left()
        torch.cuda.current_stream().wait_event(self.event)


class PeerMemory:
    """A piece of each rank's memory that the other one writes.

    Both ranks must exchange tensors of the same sizes in the same order, read them on one stream, and read or give up
    each. Everything is ordered by signals on the device, an equal number of each kind in every exchange, so that eager
    calls and replays of CUDA graphs may follow one another. A signal that has not come after `timeout_s` is an error of
    the device, which ends the process, as a collective's timeout does.
    """

    def __init__(self, process_group: dist.ProcessGroup, memory: Tensor, timeout_s: float) -> None:
        """`memory`: of `shared_memory`. Both ranks of the group must call it. Raises `RuntimeError` where it cannot be
        shared."""
        import torch.distributed._symmetric_memory as symmetric

        self._memory, self._timeout_ms = memory, int(timeout_s * 1000)
        self._used, self._number, self._open = 0, 0, set[int]()
        self._shared: Any = symmetric.rendezvous(memory, process_group.group_name)
        self._rank, self._peer = self._shared.rank, 1 - self._shared.rank
        self._stream = torch.cuda.Stream(memory.device, priority=-1)
        self._put(_READ)

    def takes(self, nbytes: int, parts: int = 1) -> bool:
        """Whether `parts` contiguous tensors of `nbytes` are sent faster this way, and have room at once beside what is
        under way."""
        room = self._memory.nbytes - (self._used if self._open else 0)
        return nbytes >= LEAST_BYTES and parts * _aligned(nbytes) <= room

    def exchange(self, sent: Tensor) -> Arrival:
        """Send a tensor that `takes` takes, and receive the other's of the same size.

        `sent` must stay as it is until the arrival is read.
        """
        if not self._open:
            self._used = 0
        shared, at = self._shared, self._used // sent.itemsize
        event, received = torch.cuda.Event(), shared.get_buffer(self._rank, sent.shape, sent.dtype, at)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if not self._open:
                self._wait(_READ)
            shared.get_buffer(self._peer, sent.shape, sent.dtype, at).copy_(sent)
            self._put(_ARRIVED)
            self._wait(_ARRIVED)
            event.record()
        self._number += 1
        self._open.add(self._number)
        self._used += _aligned(sent.nbytes)
        return Arrival(received, event, partial(self._left, self._number))

    def _left(self, number: int) -> None:
        if number in self._open:
            self._open.remove(number)
            if not self._open:
                self._put(_READ)

    def _put(self, channel: int) -> None:
        self._shared.put_signal(self._peer, channel, self._timeout_ms)

    def _wait(self, channel: int) -> None:
        self._shared.wait_signal(self._peer, channel, self._timeout_ms)


def shared_memory(device: torch.device, size: int = PEER_BYTES) -> Tensor:
    """uint8 [size] that another rank may be let write. Raises `RuntimeError` where there is none."""
    import torch.distributed._symmetric_memory as symmetric

    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing is sent to several at once
    return symmetric.empty(size, dtype=torch.uint8, device=device)


def peer_memory(process_group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> PeerMemory | None:
    """For a group of two ranks of one host; None where it cannot be had, with a warning that says why if that comes as
    a surprise. Both ranks must call it.

    Only on NVIDIA, where it was measured, and only if each rank sees the other's device and can reach its memory.
    """
    if torch.version.hip is not None:
        return None
    uuids = _of_both(str(torch.cuda.get_device_properties(device).uuid), process_group)
    other = next((uuid for uuid in uuids if uuid != uuids[dist.get_rank(process_group)]), None)
    seen = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    reached = other in seen and torch.cuda.can_device_access_peer(device.index, seen[other])
    if not all(_of_both(reached, process_group)):
        return None
    # One after the other: who cannot take the memory must not be waited for where it is shared.
    memory = _made_by_both(lambda: shared_memory(device), process_group)
    return (
        None if memory is None else _made_by_both(lambda: PeerMemory(process_group, memory, timeout_s), process_group)
    )


def _made_by_both(make: Callable[[], _Made], process_group: dist.ProcessGroup) -> _Made | None:
    """What each rank makes; None, with a warning, where one of them cannot."""
    made, why = None, ""
    try:
        made = make()
    except RuntimeError as error:
        why = str(error).partition("\n")[0] or type(error).__name__
    problems = [one for one in _of_both(why, process_group) if one]
    if problems:
        warnings.warn(f"no memory is shared between two GPUs, so their sums go by NCCL: {problems[0]}", stacklevel=3)
        return None
    return made


def _of_both(mine: Any, process_group: dist.ProcessGroup) -> list[Any]:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, mine, group=process_group)
    return found


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
