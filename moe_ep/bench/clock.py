"""Times on a device, and what it reaches at best."""

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Work = Callable[[], object]
_REPEATS = 7
_FEWEST_REPEATS = 3
_ENOUGH_US = 2e5  # after which no more than the fewest are made: what is slow needs no finer clock
_CPU_REPEATS = 2  # where kernels are interpreted, which shows that they run and not how fast
_SLEEP_CYCLES = 1_000_000  # about half a millisecond, in which the host launches what is timed


@dataclass(frozen=True)
class Rates:
    """What this device reaches: bytes/s (read plus written) of a copy, FLOP/s of a bf16 matmul."""

    copy: float
    matmul: float

    def floor_us(self, hit: float, routes: float, expert_bytes: float, route_flops: int) -> float:
        """The larger of two times.

        The packed bytes of the experts that are hit, once, at the copy rate; the FLOPs of the local routes at the
        matmul rate.
        """
        return max(hit * expert_bytes / self.copy, routes * route_flops / self.matmul) * 1e6


def measure_rates(device: torch.device) -> Rates:
    """A copy of 2 GiB and a matmul of 8192³ on random data; on a CPU a sixteenth, and 512³."""
    big = device.type == "cuda"
    source = torch.randint(0, 2**31, (2**29 if big else 2**25,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    size = 8192 if big else 512
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    copy = eager_us([lambda: target.copy_(source)], device)
    matmul = eager_us([lambda: torch.matmul(a, b)], device)
    return Rates(copy=2 * source.nbytes / copy * 1e6, matmul=2 * size**3 / matmul * 1e6)


def eager_us(works: Sequence[Work], device: torch.device) -> float:
    """Median µs of one of the works, launched one after the other from the host."""

    def once() -> None:
        for work in works:
            work()

    once()
    repeats = _REPEATS if device.type == "cuda" else _CPU_REPEATS
    return _median(lambda: _elapsed_us(once, device), repeats) / len(works)


def _median(measure: Callable[[], float], repeats: int) -> float:
    times: list[float] = []
    while len(times) < min(repeats, _FEWEST_REPEATS) or (len(times) < repeats and sum(times) < _ENOUGH_US):
        times.append(measure())
    return statistics.median(times)


def graph_us(works: Sequence[Work]) -> float:
    """Median µs of one of the works, all of which are captured in one CUDA graph that is replayed.

    The device's time: replays are queued, and the one that is timed follows one that is not, as a layer follows another
    in a serving step. What the host takes to launch a graph is not in it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for work in works:
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for work in works:
            work()
    return _median(lambda: _queued_us(graph), _REPEATS) / len(works)


def _queued_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_SLEEP_CYCLES)
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def _elapsed_us(work: Work, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """What runs within gets a TimeoutError once time.monotonic() has reached the deadline; inf for none.

    For the main thread. Python raises it between two of its own steps, so not while one call waits for the device.
    """
    if math.isinf(deadline):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError("its time was used up")

    left = deadline - time.monotonic()
    if left <= 0:
        stop()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
