"""How runs are doing: from their folders first, and from Slurm for what the folders cannot know."""

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher import slurm
from launcher.events import LAUNCHER, Event, read_events
from launcher.files import write_atomically
from launcher.outcome import Outcome, judge
from launcher.plan import read_plan
from launcher.processes import Process
from launcher.runs import Submission, submissions

FINAL = "final.json"
STAGES = ("start", "env", "selector", "weights", "parity", "memory", "throughput", "done")
# Slurm may requeue a job whose node failed or that was preempted, so these two are not written down as the end.
_SETTLED = ("completed", "failed", "cancelled", "timeout", "out of memory")
_ENDED = (*_SETTLED, "node failed", "preempted")
_FROM_SLURM = {
    "COMPLETED": "completed",
    "FAILED": "failed",
    "CANCELLED": "cancelled",
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "OUT_OF_MEMORY": "out of memory",
    "NODE_FAIL": "node failed",
    "BOOT_FAIL": "node failed",
    "PREEMPTED": "preempted",
    "PENDING": "pending",
}


@dataclass(frozen=True)
class RunStatus:
    """One run at one moment.

    `state` is pending, running, one of the ends, or unknown where neither the folder nor Slurm can say.
    """

    run_dir: str
    name: str
    run_id: str
    job_id: str
    state: str
    reason: str = ""
    elapsed: str = ""
    limit: str = ""
    progress: str = ""
    first_failing_rank: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing will change it any more, but a resume."""
        return self.state in _ENDED


def statuses(run_dirs: Sequence[Path]) -> tuple[list[RunStatus], tuple[str, ...]]:
    """The status of every run, in order, and what went wrong with asking Slurm.

    squeue and sacct are asked once for all runs together, and not about runs whose end is known: an end is
    written into the run's folder when it is first seen, since accounting does not keep it for ever.
    """
    settled = {run: final for run in run_dirs if (final := _final(run)) is not None}
    open_runs = {run: last for run in run_dirs if run not in settled and (last := _last(run)) is not None}
    answer = slurm.query([s.job_id for s in open_runs.values() if s.scheduler == "slurm"])
    found = []
    for run in run_dirs:
        status = settled.get(run) or _status(run, open_runs.get(run), answer)
        if status.state in _SETTLED and run not in settled:
            write_atomically(run / FINAL, json.dumps(asdict(status)) + "\n")
        found.append(status)
    return found, answer.problems


def _final(run_dir: Path) -> RunStatus | None:
    """An end that was written down, unless the run has been resumed since."""
    try:
        final = RunStatus(**json.loads((run_dir / FINAL).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    last = _last(run_dir)
    return final if last is None or last.job_id == final.job_id else None


def _last(run_dir: Path) -> Submission | None:
    known = submissions(run_dir)
    return known[-1] if known else None


def _status(run_dir: Path, submission: Submission | None, answer: slurm.Answer) -> RunStatus:
    plan = read_plan(run_dir)
    base = RunStatus(str(run_dir), plan["config"]["run"]["name"], plan["run_id"], "", "unknown", "never submitted")
    if submission is None:
        return base
    world = len(plan["topology"])
    events = [e for e in read_events(run_dir) if e.attempt >= submission.attempt]
    outcome = judge(events, world)
    job = answer.jobs.get(submission.job_id)
    state, reason = _state(submission, job, outcome, events)
    failure = outcome.failure
    return RunStatus(
        run_dir=base.run_dir,
        name=base.name,
        run_id=base.run_id,
        job_id=submission.job_id,
        state=state,
        reason=reason or (f"{failure.error_type}: {failure.error}".splitlines()[0] if failure else ""),
        elapsed=job.elapsed if job else "",
        limit=job.limit if job else "",
        progress=progress(events, world),
        first_failing_rank=failure.rank if failure else None,
    )


def _state(
    submission: Submission, job: slurm.JobState | None, outcome: Outcome, events: Sequence[Event]
) -> tuple[str, str]:
    """State and, where Slurm gives one, its reason.

    An end needs a witness: every rank's own last event, the batch script's, or accounting's. That squeue
    knows nothing of a job is none.
    """
    if outcome.state == "completed":
        return "completed", ""
    if submission.scheduler == "local":
        return _local_state(submission, outcome)
    if job is not None and not job.ended:
        return ("pending" if job.state == "PENDING" else "running"), job.reason
    if job is not None:
        # A step may fail and its job count as completed; the ranks know better.
        if job.state == "COMPLETED":
            return "failed", "the job ended before all ranks were done"
        return _FROM_SLURM.get(job.state, "failed"), _reason(job)
    if any(e.rank == LAUNCHER and e.event == "ended" for e in events):
        return "failed", ""
    return "unknown", "not in the queue, and accounting does not know it"


def _reason(job: slurm.JobState) -> str:
    code = f"exit code {job.exit_code}" if job.exit_code not in ("", "0:0") else ""
    return ", ".join(filter(None, (job.reason, code))) if job.state != "FAILED" else ""


def _local_state(submission: Submission, outcome: Outcome) -> tuple[str, str]:
    if submission.host != socket.gethostname():
        return "unknown", f"runs on {submission.host}, ask there"
    if Process(int(submission.job_id), submission.pid_started).alive:
        return "running", ""
    return "failed", "" if outcome.failure else "its processes are gone"


def progress(events: Sequence[Event], world: int) -> str:
    """The stage of the rank that is furthest behind, with its count where it has one."""
    latest: dict[int, Event] = {}
    for event in events:
        if event.rank != LAUNCHER and event.event in ("started", "begin", "progress", "end"):
            latest[event.rank] = event
    if not latest:
        return ""
    last = min(latest.values(), key=_how_far)
    text = last.stage
    if last.event == "progress":
        text += f" {last.data['done']}/{last.data['total']}"
    return text if len(latest) == world else f"{text}, {len(latest)} of {world} ranks"


def _how_far(event: Event) -> tuple[int, float]:
    stage = STAGES.index(event.stage) if event.stage in STAGES else 0
    return stage, event.data["done"] if event.event == "progress" else float("inf") if event.event == "end" else 0
