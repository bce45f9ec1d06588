"""Reading what the ranks wrote, while they write and after."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.events import EVENTS
from launcher.files import is_file
from launcher.units import size

LAUNCHER = -1
"""The rank of events that the launcher itself wrote, or the batch script."""
LAUNCHER_FILE = "launcher.jsonl"


@dataclass(frozen=True)
class Event:
    """One line of a rank's event file. `time` is Unix seconds by the clock of the rank's host."""

    time: float
    rank: int
    stage: str
    event: str
    attempt: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] = field(default_factory=dict)
    """type, text and traceback of a failure."""


class Tail:
    """New events of a run at each call; a line that is still being written waits for the next."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / EVENTS
        self._read: dict[Path, int] = {}
        self._latest: dict[tuple[Path, int], float] = {}

    def new(self) -> list[Event]:
        """Events since the last call, by time; those of a file's attempt in its order, though a clock was set."""
        found: list[tuple[float, Event]] = []
        for file in sorted(self._folder.glob("*.jsonl")):
            if not is_file(file):  # a pipe would never end, nor a device
                continue
            try:
                with file.open("rb") as f:
                    f.seek(self._read.get(file, 0))
                    text = f.read()
            except OSError:
                continue
            whole = text.rfind(b"\n") + 1
            self._read[file] = self._read.get(file, 0) + whole
            for event in filter(None, map(_parse, text[:whole].splitlines())):
                at = file, event.attempt
                self._latest[at] = max(event.time, self._latest.get(at, event.time))
                found.append((self._latest[at], event))
        return [event for _, event in sorted(found, key=lambda pair: pair[0])]


def read_events(run_dir: Path) -> list[Event]:
    """All events of a run so far, by time."""
    return Tail(run_dir).new()


def write_note(run_dir: Path, attempt: int, event: str, **data: int | str) -> None:
    """Append an event of the launcher's own to a run. Raises `OSError` if the folder takes nothing more."""
    line = {
        "time": time.time(),
        "rank": LAUNCHER,
        "stage": "watch",
        "event": event,
        "attempt": attempt,
        "data": data,
    }
    with (run_dir / EVENTS / LAUNCHER_FILE).open("a") as f:
        f.write(json.dumps(line) + "\n")


def progress_text(event: Event) -> str:
    """How far a stage is: a count, or bytes with their rate and the time that the rest takes at it."""
    done, total = event.data["done"], event.data["total"]
    if "running" in event.data:
        return f"{event.stage}: {event.data['running']} running, {event.data['waiting']} waiting, {done} answered"
    if event.data.get("unit") != "bytes":
        return f"{event.stage} {done}/{total}"
    rate, left = event.data.get("rate"), event.data.get("left_s")
    text = f"{event.stage} {size(done)} of {size(total)}"
    text += f", {size(rate)}/s" if rate else ""
    return text + (f", {left:,.0f} s left" if left is not None and done < total else "")


def _parse(line: bytes) -> Event | None:
    """None for a line that is no event: a full disk or a crash may leave one."""
    try:
        event = Event(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = isinstance(event.time, int | float) and isinstance(event.rank, int) and isinstance(event.attempt, int)
    words = isinstance(event.stage, str) and isinstance(event.event, str)
    good = numbers and math.isfinite(event.time) and words
    return event if good and isinstance(event.data, dict) and isinstance(event.error, dict) else None
