"""One rank: who it is, how it meets the others, and how it goes when it is told to."""

import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import submitit

from jobs.events import EventLog

if TYPE_CHECKING:
    import torch

_SIGNALS = {signal.SIGTERM: "cancelled (SIGTERM)", signal.SIGUSR2: "time limit is near (SIGUSR2)"}


@dataclass(frozen=True)
class Rank:
    """This process among the ranks of the job."""

    rank: int
    world: int
    local_rank: int
    nodes: int
    host: str
    attempt: int
    """How often the job has been requeued."""

    @classmethod
    def current(cls) -> "Rank":
        """From the environment that submitit or Slurm gave this process."""
        env = submitit.JobEnvironment()
        attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return cls(env.global_rank, env.num_tasks, env.local_rank, env.num_nodes, socket.gethostname(), attempt)

    def export(self) -> None:
        """Set the variables that libraries and people look for, whatever started the ranks."""
        os.environ.update(RANK=str(self.rank), LOCAL_RANK=str(self.local_rank), WORLD_SIZE=str(self.world))


def leave_on_signal(log: EventLog) -> None:
    """Let SIGTERM and SIGUSR2 write a last event and end the process at once.

    The signals are blocked in every thread and waited for in one of their own: a handler would not run while
    the main thread sits in a collective, and submitit's handler ignores SIGTERM. To be called before other
    threads start, since they inherit the mask.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def wait() -> None:
        number = signal.sigwait(_SIGNALS)
        log.write("failed", error=_SIGNALS[signal.Signals(number)], error_type="Signal")
        os._exit(128 + number)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def join(rank: Rank, run_dir: Path, device: "torch.device", timeout_s: int) -> None:
    """Bring up torch.distributed over all ranks.

    Rank 0 listens on a port that the system chooses and publishes it in the run folder, which all ranks
    share: no port number can collide, not with another job's on the same node either.

    Raises
    ------
    TimeoutError
        If rank 0's address does not appear, or not every rank arrives, within `timeout_s`.
    """
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, not in __all__

    timeout = timedelta(seconds=timeout_s)
    address = run_dir / "rendezvous" / f"{rank.attempt}.json"
    if rank.rank == 0:
        # Only a job of several nodes needs a name that others resolve; a laptop's own may not.
        host = rank.host if rank.nodes > 1 else "127.0.0.1"
        store = TCPStore(host, 0, rank.world, is_master=True, wait_for_workers=False, timeout=timeout)
        address.parent.mkdir(exist_ok=True)
        unfinished = address.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"host": host, "port": store.port}))
        unfinished.rename(address)
    else:
        place = json.loads(_wait_for(address, timeout_s))
        store = TCPStore(
            place["host"], place["port"], rank.world, is_master=False, wait_for_workers=False, timeout=timeout
        )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank.rank,
        world_size=rank.world,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )


def _wait_for(path: Path, timeout_s: int) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        # Listing the folder makes a network file system look again; a lookup of the name alone may be cached.
        if path.parent.is_dir() and path in path.parent.iterdir():
            return path.read_text()
        time.sleep(0.05)
    raise TimeoutError(f"{path}: rank 0 did not publish its address within {timeout_s} s; see rank 0's log")
