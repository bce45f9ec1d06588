"""A run's folder, which is the truth about it: what was planned, what was submitted, where things lie."""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launcher.errors import InputError
from launcher.events import read_events
from launcher.files import is_file, write_atomically
from launcher.plan import PLAN
from launcher.processes import Process

SUBMISSIONS = "submissions.json"


@dataclass(frozen=True)
class Submission:
    """One time that a run was handed to a scheduler. `job_id` is Slurm's, or the pid of the local controller."""

    attempt: int
    scheduler: str
    job_id: str
    host: str
    time: float
    git_revision: str | None = None
    """Of the code that the ranks of this attempt import."""
    pid_started: int = 0
    """When the local controller started, so that its number is not mistaken for another process's."""
    exclude: tuple[str, ...] = ()
    """Nodes that were left out beside the cluster's own, since an earlier attempt has shown them to be bad."""


def record_submission(
    run_dir: Path,
    attempt: int,
    scheduler: str,
    job_id: str,
    git_revision: str | None = None,
    exclude: Sequence[str] = (),
) -> Submission:
    """Write one into the run's folder, in the place of what was known of the same attempt.

    To be called before the scheduler is, with job_id "", so that a job of which the answer was lost is not
    taken for none; and again with its id.
    """
    process = Process.of(int(job_id)) if scheduler == "local" and job_id else None
    started = process.started if process else 0
    host, now = socket.gethostname(), time.time()
    new = Submission(attempt, scheduler, job_id, host, now, git_revision, started, tuple(exclude))
    known = [*(s for s in submissions(run_dir) if s.attempt != attempt), new]
    write_atomically(run_dir / SUBMISSIONS, json.dumps([asdict(s) for s in known], indent=2) + "\n")
    return new


def forget_submission(run_dir: Path, attempt: int) -> None:
    """Take back what was written before a scheduler that then refused: the attempt before is the last again."""
    known = [asdict(s) for s in submissions(run_dir) if s.attempt != attempt]
    write_atomically(run_dir / SUBMISSIONS, json.dumps(known, indent=2) + "\n")


def last_submission(run_dir: Path) -> Submission | None:
    """The last time that a run was submitted; its job's id from the ranks where the scheduler's answer was lost."""
    known = submissions(run_dir)
    if not known or known[-1].job_id:
        return known[-1] if known else None
    last = known[-1]
    said = [e.data.get("job_id") for e in read_events(run_dir) if e.event == "started" and e.attempt >= last.attempt]
    return replace(last, job_id=str(said[-1])) if said and said[-1] is not None else last


def submissions(run_dir: Path) -> list[Submission]:
    """What was submitted, in order; [] before the first. Raises `InputError` if the record is damaged."""
    try:
        lines = json.loads((run_dir / SUBMISSIONS).read_text())
        return [Submission(**{**line, "exclude": tuple(line.get("exclude", ()))}) for line in lines]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{run_dir / SUBMISSIONS}: {error.strerror or error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{run_dir / SUBMISSIONS}: damaged: not a list of submissions: {error}") from None


def find_run(text: str, folder: Path) -> Path:
    """The folder of a run that is named by its path, its id, or its name (the newest of that name).

    Raises
    ------
    InputError
        If there is none.
    """
    path = Path(text)
    try:
        if (path / PLAN).is_file():
            return path.absolute()
    except PermissionError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except OSError:  # a name that is too long for a file
        pass
    found = [run for run in all_runs(folder) if text in (run.name, run.parent.name)]
    if not found:
        known = sorted({run.parent.name for run in all_runs(folder)})
        raise InputError(
            f"{text}: no such run: not a run's folder, nor an id or a name in {folder} "
            f"({', '.join(known) or 'which holds no runs'}); --folder says where else to look"
        )
    return max(found, key=lambda run: run.name)


def all_runs(folder: Path) -> list[Path]:
    """Every run below a folder of runs, oldest first."""
    found = [Path(run).absolute() for name in _folders(folder) for run in _folders(name) if is_file(Path(run, PLAN))]
    return sorted(found, key=lambda run: run.name)


def _folders(folder: Path | str) -> list[str]:
    try:
        return [entry.path for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return []
