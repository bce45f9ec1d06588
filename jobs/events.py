"""What a rank says while it runs: one JSON object a line in the rank's own file. Needs no torch.

A line is written with one `write` on a file opened for appending, so a killed rank leaves whole lines and at
most one broken one at the end.
"""

import json
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EVENTS = "events"


class EventLog:
    """Appends a rank's events. Thread-safe, since a signal may end the rank from another thread."""

    def __init__(self, run_dir: Path, rank: int, attempt: int = 0) -> None:
        folder = run_dir / EVENTS
        folder.mkdir(parents=True, exist_ok=True)
        self.rank = rank
        self.attempt = attempt
        self._stage = "start"
        self._lock = threading.Lock()
        self._file = os.open(folder / f"rank-{rank:05d}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, event: str, **data: Any) -> None:
        """Append one event with the current stage and the time (Unix seconds)."""
        line = {
            "time": time.time(),
            "rank": self.rank,
            "attempt": self.attempt,
            "stage": self._stage,
            "event": event,
            "data": data,
        }
        with self._lock:
            os.write(self._file, (json.dumps(line) + "\n").encode())

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """A stage: "begin", then "end" or "failed" with what was put into the yielded dict until then."""
        self._stage = name
        data: dict[str, Any] = {}
        self.write("begin")
        started = time.monotonic()
        try:
            yield data
        except BaseException as error:
            self.write(
                "failed",
                **data,
                error=str(error),
                error_type=type(error).__name__,
                traceback=traceback.format_exc(),
            )
            raise
        self.write("end", seconds=round(time.monotonic() - started, 6), **data)
