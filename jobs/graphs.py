"""What work takes on a GPU without the host's launches: captured in a CUDA graph, as engines decode."""

import sys
from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist

from jobs.place import Place

MOST_TOKENS = 512
"""Of a pass that is captured. Above it engines launch too, and a captured pass would need a workspace of its own that
no plan of memory has."""


def capture(work: Callable[[], object], where: Place) -> Callable[[], None] | None:
    """Replays `work`, in which all ranks may take part in collectives. Every rank must call it.

    None on a CPU, and where one of the ranks cannot capture it, which then says why in its log.
    """
    if where.device.type != "cuda":
        return None
    side = _stream(where.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # compiles, and takes the memory that is kept for this stream
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize(where.device)
    with where.waiting("all ranks before a capture"):
        dist.barrier()
        torch.cuda.synchronize(where.device)
    graph, captured = torch.cuda.CUDAGraph(), torch.ones(1, dtype=torch.int32, device=where.device)
    try:
        # thread_local: what the threads that watch collectives ask the device meanwhile does not end the capture.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            work()
    except RuntimeError as error:
        print(f"cannot be captured in a CUDA graph: {error}", file=sys.stderr, flush=True)
        captured.zero_()
    with where.waiting("all ranks after a capture"):
        dist.all_reduce(captured, op=dist.ReduceOp.MIN)
        everywhere = bool(captured.item())
    return graph.replay if everywhere else None


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: the experts keep a workspace for each stream."""
    return torch.cuda.Stream(device)
