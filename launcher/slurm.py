"""What Slurm knows about jobs: one squeue and one sacct for any number of them."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

ACTIVE = frozenset(
    {
        "PENDING",
        "CONFIGURING",
        "RUNNING",
        "COMPLETING",
        "SUSPENDED",
        "STOPPED",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "SIGNALING",
        "RESIZING",
    }
)
"""Job states from which a job may still go on; any other is the end of it."""

_TIMEOUT_S = 30


@dataclass(frozen=True)
class JobState:
    """A job as squeue or sacct tells it. `elapsed` and `limit` in Slurm's form [D-]HH:MM:SS."""

    job_id: str
    state: str
    reason: str = ""
    elapsed: str = ""
    limit: str = ""
    nodes: str = ""
    exit_code: str = ""

    @property
    def ended(self) -> bool:
        """Whether the state is a last one."""
        return self.state not in ACTIVE


@dataclass(frozen=True)
class Answer:
    """States by job id; a job that neither command knows is not among them. `problems`: commands that failed."""

    jobs: dict[str, JobState]
    problems: tuple[str, ...] = ()


def query(job_ids: Sequence[str]) -> Answer:
    """Ask squeue for what is going on and, about jobs that it does not know, sacct for how they ended.

    An empty answer means nothing: a job that is in neither is unknown, not finished.
    """
    if not job_ids:
        return Answer({})
    wanted, problems = set(job_ids), []
    jobs: dict[str, JobState] = {}
    queue, problem = _ask(["squeue", "-h", "--me", "-o", "%i|%T|%r|%M|%l|%N"])
    problems += problem
    for line in queue:
        job_id, state, reason, elapsed, limit, nodes = line.split("|", 5)
        if job_id in wanted:
            jobs[job_id] = JobState(job_id, state, "" if reason == "None" else reason, elapsed, limit, nodes)
    rest = sorted(wanted - set(jobs))
    if rest:
        fields = "JobID,State,Reason,Elapsed,Timelimit,NodeList,ExitCode"
        accounted, problem = _ask(["sacct", "-n", "-P", "-X", "-o", fields, "-j", ",".join(rest)])
        problems += problem
        for line in accounted:
            job_id, state, reason, elapsed, limit, nodes, code = line.split("|", 6)
            # "CANCELLED by 1000": the rest of the state says who.
            word, _, who = state.partition(" ")
            jobs[job_id] = JobState(
                job_id, word, who or ("" if reason == "None" else reason), elapsed, limit, nodes, code
            )
    return Answer(jobs, tuple(problems))


def cancel(job_id: str) -> str | None:
    """Tell Slurm to end a job; what it complains of, None if it took it."""
    _, problem = _ask(["scancel", job_id])
    return problem[0] if problem else None


def _ask(command: list[str]) -> tuple[list[str], list[str]]:
    """Lines of a command's output, and what went wrong with it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
    except FileNotFoundError:
        return [], [f"{command[0]}: not found on this machine"]
    except subprocess.TimeoutExpired:
        return [], [f"{command[0]}: no answer within {_TIMEOUT_S} s"]
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return [], [f"{command[0]}: {said[-1] if said else f'exit code {done.returncode}'}"]
    return done.stdout.splitlines(), []
