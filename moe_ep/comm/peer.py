"""Two GPUs of one host that write into each other's memory by their copy engines, which take no multiprocessor."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ep.footprint import PEER_BYTES

LEAST_BYTES = 4 << 20
"""Below this a copy with its signals takes longer than NCCL (two H200)."""

_ALIGNMENT = 512
_ARRIVED, _READ = 0, 1  # channels of signals


@dataclass(frozen=True)
class Arrival:
    """What the other rank has sent, in this rank's memory, from `event` on. `left` is told when it has been read."""

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
        yield self.received
        self.left()


class PeerMemory:
    """A piece of each rank's memory that the other one writes.

    Both ranks must exchange tensors of the same sizes in the same order, and read them on one stream. Everything is
    ordered by signals on the device, an equal number of each kind in every exchange, so that eager calls and replays of
    CUDA graphs may follow one another.
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device, size: int = PEER_BYTES) -> None:
        """Both ranks of the group must call it. Raises `RuntimeError` where the memory cannot be shared."""
        import torch.distributed._symmetric_memory as symmetric

        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing is sent to several at once
        self._size, self._used, self._open = size, 0, 0
        self._memory = symmetric.empty(size, dtype=torch.uint8, device=device)
        self._shared: Any = symmetric.rendezvous(self._memory, process_group.group_name)
        self._rank, self._peer = self._shared.rank, 1 - self._shared.rank
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._shared.put_signal(self._peer, _READ)

    def takes(self, nbytes: int) -> bool:
        """Whether a contiguous tensor of `nbytes` is sent faster this way, and has room beside what is under way."""
        return LEAST_BYTES <= nbytes <= self._size - (self._used if self._open else 0)

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
                shared.wait_signal(self._peer, _READ)
            shared.get_buffer(self._peer, sent.shape, sent.dtype, at).copy_(sent)
            shared.put_signal(self._peer, _ARRIVED)
            shared.wait_signal(self._peer, _ARRIVED)
            event.record()
        self._open += 1
        self._used += -(-sent.nbytes // _ALIGNMENT) * _ALIGNMENT
        return Arrival(received, event, self._left)

    def _left(self) -> None:
        self._open -= 1
        if not self._open:
            self._shared.put_signal(self._peer, _READ)


def peer_memory(process_group: dist.ProcessGroup, device: torch.device) -> PeerMemory | None:
    """For a group of two ranks of one host; None where it cannot be had, with a warning that says why if that comes as
    a surprise. Both ranks must call it.

    Only on NVIDIA, where it was measured, and only if each rank sees the other's device and can reach its memory.
    """
    uuids = _of_both(str(torch.cuda.get_device_properties(device).uuid), process_group)
    other = next((uuid for uuid in uuids if uuid != uuids[dist.get_rank(process_group)]), None)
    seen = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    reached = (
        torch.version.hip is None and other in seen and torch.cuda.can_device_access_peer(device.index, seen[other])
    )
    if not all(_of_both(reached, process_group)):
        return None
    found, why = None, ""
    try:
        found = PeerMemory(process_group, device)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
    problems = [one for one in _of_both(why, process_group) if one]
    if problems:
        warnings.warn(f"no memory is shared between two GPUs, so their sums go by NCCL: {problems[0]}", stacklevel=2)
        return None
    return found


def _of_both(mine: Any, process_group: dist.ProcessGroup) -> list[Any]:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, mine, group=process_group)
    return found
