"""From the events of all ranks to what became of the run, and which rank failed first."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from launcher.events import LAUNCHER, Event

State = Literal["completed", "failed", "unfinished"]

# What a rank says when it is another that went away: gloo, the TCP store, NCCL and RCCL.
_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket ?timeout|timed out waiting|remote process exited|"
    r"have not arrived|rank 0 has not arrived|"
    r"failed to (recv|send)|(nccl|rccl).*(abort|remote|system error)|watchdog caught|DistNetworkError|DistStoreError",
    re.IGNORECASE,
)
GAVE_UP = "gave up"
"""The launcher's own event when it ends a run that has missed a deadline, with why."""

_STOPPED = ("KeyboardInterrupt", "Signal")


@dataclass(frozen=True)
class Failure:
    """The rank that failed first (None: it was no rank's fault), in which stage, and what it said."""

    rank: int | None
    stage: str
    error_type: str
    error: str
    traceback: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a run. `unfinished` runs still run, or ended where nobody could write it down."""

    state: State
    failure: Failure | None = None


def last_attempt(events: Iterable[Event]) -> list[Event]:
    """The events of the last time that the run was submitted or requeued."""
    events = list(events)
    attempt = max((e.attempt for e in events), default=0)
    return [e for e in events if e.attempt == attempt]


def judge(events: Iterable[Event], world: int) -> Outcome:
    """Completed if every rank is done; failed if a rank said so, vanished, or the job ended without it.

    The first failing rank is, in this order: the earliest that raised an error of its own; one that ended
    without a word (killed from outside) while others complained of a lost peer; the earliest complaint.
    """
    events = [e for e in last_attempt(events) if e.rank < world]
    done = {e.rank for e in events if e.stage == "done" and e.event == "end"}
    if len(done) == world:
        return Outcome("completed")
    failed = [e for e in events if e.event == "failed"]
    own = [e for e in failed if not _is_consequence(e)]
    notes = {e.event: e for e in reversed(events) if e.rank == LAUNCHER}  # the earliest of each kind
    silent = [rank for rank in range(world) if rank not in done | {e.rank for e in failed}]
    if own:
        return Outcome("failed", _said(own[0]))
    if GAVE_UP in notes:
        return Outcome("failed", Failure(None, _last_stage(events), "GivenUp", str(notes[GAVE_UP].data.get("why", ""))))
    if "interrupted" in notes:
        return Outcome("failed", Failure(None, _last_stage(events), "Interrupted", "the launcher was told to stop"))
    if "orphaned" in notes:
        return Outcome("failed", Failure(None, _last_stage(events), "Orphaned", "the ranks' parent was killed"))
    if "vanished" in notes:
        return Outcome("failed", _silent(events, notes["vanished"].data.get("rank", 0)))
    if silent and ("ended" in notes or (failed and len(silent) == 1)):
        return Outcome("failed", _silent(events, silent[0]))
    if failed and all(e.error.get("type") == "Signal" for e in failed):
        return Outcome("failed", replace(_said(failed[0]), rank=None))
    return Outcome("failed", _said(failed[0])) if failed else Outcome("unfinished")


def _is_consequence(event: Event) -> bool:
    kind = event.error.get("type", "")
    return kind in _STOPPED or bool(_PEER.search(f"{kind}: {event.error.get('text', '')}"))


def _said(event: Event) -> Failure:
    error = event.error
    return Failure(event.rank, event.stage, error.get("type", ""), error.get("text", ""), error.get("traceback", ""))


def _last_stage(events: list[Event]) -> str:
    return next((e.stage for e in reversed(events) if e.rank != LAUNCHER), "start")


def _silent(events: list[Event], rank: int) -> Failure:
    last = next((e for e in reversed(events) if e.rank == rank), None)
    if last is None:
        return Failure(rank, "start", "NeverStarted", "its process ended before the job's first line: see its log")
    return Failure(
        rank,
        last.stage,
        "Vanished",
        "ended without a word: killed from outside (SIGKILL, out of memory, lost node)",
    )
