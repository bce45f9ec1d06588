"""One night: which configs it runs and how far each has come, kept in a file so that it outlives its process."""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from launcher.compare import Verdict
from launcher.errors import InputError
from launcher.files import write_atomically
from launcher.history import NIGHTS
from launcher.plan import new_run_id
from launcher.processes import Process

_STATE = "night.json"
_SILENT_S = 600.0
"""A night on another host that has not been heard of for so long has no process any more."""

Phase = Literal["waiting", "running", "stopping", "judged"]


@dataclass
class Entry:
    """One config of the night. `changed`: Unix seconds of the last sign of progress, which was `sign`."""

    config: str
    name: str
    phase: Phase = "waiting"
    run_dir: str = ""
    state: str = ""
    changed: float = 0.0
    sign: str = ""
    ran: bool = False
    reasons: list[str] = field(default_factory=list)
    verdict: Verdict = "no verdict"
    comparison: dict[str, Any] | None = None
    page: str = ""


@dataclass
class Night:
    """A night in its folder; saved whenever something changes."""

    night: str
    folder: Path
    overrides: list[str]
    entries: list[Entry]
    finished: bool = False

    def save(self) -> None:
        """Write it down, with a sign of life of this process."""
        me = Process.of(os.getpid())
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": me.started if me else 0}
        value = {
            "night": self.night,
            "overrides": self.overrides,
            "entries": [asdict(entry) for entry in self.entries],
            "finished": self.finished,
            "owner": owner,
            "alive": time.time(),
        }
        write_atomically(self.folder / _STATE, json.dumps(value, indent=2) + "\n")


def broken_off(history: Path, configs: Sequence[Path], overrides: Sequence[str]) -> Night | None:
    """The night of the same configs and overrides that has not ended and whose process is gone; it is this process's
    from now on. None if there is none, or another process took it. Raises `InputError` if it cannot be written."""
    wanted = [str(path.absolute()) for path in configs]
    try:
        for state in sorted((history / NIGHTS).glob(f"*/{_STATE}")):
            found, owner = _abandoned(state.parent, wanted, list(overrides))
            if found is not None and _claim(found, owner):
                found.save()
                return found
    except OSError as error:
        raise InputError(f"--history {history}: cannot be written: {error}") from None
    return None


def begin(history: Path, configs: Sequence[Path], overrides: Sequence[str]) -> Night:
    """A new night. Raises `InputError` if the folder cannot be written."""
    wanted = [str(path.absolute()) for path in configs]
    try:
        night = new_run_id(datetime.now(UTC))
        entries = [Entry(config, Path(config).stem) for config in wanted]
        new = Night(night, history / NIGHTS / night, list(overrides), entries)
        new.folder.mkdir(parents=True)
        new.save()
    except OSError as error:
        raise InputError(f"--history {history}: cannot be written: {error}") from None
    return new


def _abandoned(folder: Path, configs: list[str], overrides: list[str]) -> tuple[Night | None, str]:
    """A night that nobody goes on with, and a name of the process that did until then."""
    try:
        value = json.loads((folder / _STATE).read_text())
        entries = [Entry(**entry) for entry in value["entries"]]
        owner, alive = value["owner"], value["alive"]
        found = Night(value["night"], folder, value["overrides"], entries, value["finished"])
        here = owner["host"] == socket.gethostname()
        gone = not Process(owner["pid"], owner["started"]).alive if here else time.time() - alive > _SILENT_S
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""  # half a night that was never begun
    same = [entry.config for entry in entries] == configs and found.overrides == overrides
    return (found if gone and same and not found.finished else None), f"{owner['host']}-{owner['pid']}-{alive}"


def _claim(night: Night, owner: str) -> bool:
    """Whether this process goes on with it: of several that would follow an owner, one makes the file."""
    try:
        (night.folder / f"taken-from-{owner}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
