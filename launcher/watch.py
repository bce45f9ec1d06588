"""Following a local run: progress as it happens, and an early end when a rank fails."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import submitit

from jobs.events import EVENTS
from launcher.events import LAUNCHER, Event, Tail

GRACE_S = 2.0
"""How long the other ranks may still write after one has failed."""

_POLL_S = 0.1


def follow(job: "submitit.Job[None]", run_dir: Path, on_event: Callable[[Event], None]) -> None:
    """Until the job's processes are gone, hand on each event; end the job soon after a rank has failed.

    A rank whose process disappears without a last event is written down as vanished.
    """
    tail, pids = Tail(run_dir), dict[int, int]()
    last, gone = set[int](), set[int]()
    stop_at = float("inf")
    while True:
        running = not job.done()
        for event in tail.new():
            if event.event == "started":
                pids[event.rank] = event.data["pid"]
            if event.event == "failed" or (event.stage == "done" and event.event == "end"):
                last.add(event.rank)
            if event.event in ("failed", "vanished"):
                stop_at = min(stop_at, time.monotonic() + GRACE_S)
            on_event(event)
        if not running:
            _note(run_dir, "ended")
            return
        # Its last event may have come between reading and looking: a rank must be gone for two rounds.
        for rank in gone - last:
            last.add(rank)
            _note(run_dir, "vanished", rank=rank, pid=pids[rank])
        gone = {rank for rank, pid in pids.items() if not _alive(pid)}
        if time.monotonic() > stop_at:
            job.cancel()
            stop_at = time.monotonic() + GRACE_S
        time.sleep(_POLL_S)


def _note(run_dir: Path, event: str, **data: int) -> None:
    line = {"time": time.time(), "rank": LAUNCHER, "stage": "watch", "event": event, "data": data}
    folder = run_dir / EVENTS
    folder.mkdir(exist_ok=True)
    with (folder / "launcher.jsonl").open("a") as f:
        f.write(json.dumps(line) + "\n")


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # A killed child stays a zombie until submitit's controller looks.
    return status.rpartition(")")[2].split()[0] != "Z"
