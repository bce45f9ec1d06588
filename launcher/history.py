"""What nightlies have seen: a folder of append-only JSON lines, one file a night.

No two processes ever append to one file, so that any number of nightlies may write at once without a lock. That is
why it is not one SQLite database: clusters keep such a folder on NFS or Lustre, where SQLite's locks do not hold, and
where appends of two hosts to one file may overwrite each other. A line is one write; a line that a crash left broken
is passed over.
"""

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from launcher.errors import InputError
from launcher.files import no_number
from launcher.sample import Sample

RECORDS, NIGHTS = "records", "nights"
_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One run that a night has judged. run_dir: where its report lay."""

    night: str
    run_dir: str
    verdict: str
    state: str
    reasons: tuple[str, ...]
    sample: Sample

    @property
    def page(self) -> str:
        """Path of the copy of its report, below the history's folder and without its suffix."""
        return f"{NIGHTS}/{self.night}/{self.sample.config}-{self.sample.run_id}"


class History:
    """The records in a folder."""

    def __init__(self, folder: Path) -> None:
        """Raises `InputError` if the folder is something else."""
        try:
            other = folder.exists() and not folder.is_dir()
        except OSError as error:
            raise InputError(f"--history {folder}: {error.strerror}") from None
        if other:
            raise InputError(f"--history {folder}: not a folder")
        self.folder = folder

    def append(self, record: Record) -> None:
        """Add a record to its night's file. Raises `InputError` if it cannot be written."""
        self._append(record.night, {"record": asdict(record)})

    def accept(self, run_id: str) -> None:
        """Let the baseline of a run's config begin anew with this run, whatever its verdict was.

        Raises
        ------
        InputError
            If there is no such valid run.
        """
        found = [record for record in self.records() if record.sample.run_id == run_id]
        if not found or not found[0].sample.valid:
            why = f"not valid: {found[0].sample.problems[0]}" if found else "no such run in this history"
            raise InputError(f"{run_id}: {why}; only a valid run can be a baseline")
        self._append(f"accepted-{run_id}-{socket.gethostname()}-{os.getpid()}", {"accept": run_id})

    def records(self) -> list[Record]:
        """All records, in the order in which the runs were planned; one a run."""
        found = {
            (record.sample.run_id, record.sample.config): record
            for line in self._lines()
            if "record" in line and (record := _record(line["record"])) is not None
        }
        return [found[key] for key in sorted(found)]

    def baseline(self, config: str) -> list[Sample]:
        """Valid runs of a config, oldest first, that did not regress; from the last accepted one on."""
        accepted = [line["accept"] for line in self._lines() if "accept" in line]
        found = [record for record in self.records() if record.sample.config == config and record.sample.valid]
        first = max((i for i, record in enumerate(found) if record.sample.run_id in accepted), default=0)
        return [
            record.sample
            for record in found[first:]
            if record.verdict != "regressed" or record.sample.run_id in accepted
        ]

    def _append(self, writer: str, line: dict[str, Any]) -> None:
        path = self.folder / RECORDS / f"{writer}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(file).st_size
                broken = size and os.pread(file, 1, size - 1) != b"\n"  # it was killed as it wrote
                text = json.dumps({"format": _FORMAT, **line}, allow_nan=False) + "\n"
                os.write(file, (b"\n" if broken else b"") + text.encode())
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise InputError(f"--history {self.folder}: cannot be written: {error}") from None

    def _lines(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted((self.folder / RECORDS).glob("*.jsonl")):
            try:
                texts = path.read_bytes().splitlines()
            except OSError as error:  # without it the baseline would be another
                raise InputError(f"--history {self.folder}: cannot be read: {error}") from None
            for text in texts:
                try:
                    line = json.loads(text, parse_constant=no_number)
                except (ValueError, RecursionError):
                    continue
                if isinstance(line, dict) and line.get("format") == _FORMAT:
                    found.append(line)
        return found


_RECORD = TypeAdapter(Record)


def _record(value: Any) -> Record | None:
    """None for what is no record, or lacks something of one."""
    try:
        return _RECORD.validate_python(value)
    except ValidationError:
        return None
