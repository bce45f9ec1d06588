"""From the events of all ranks to what became of the run, and which rank failed first."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from launcher.events import LAUNCHER, Event

State = Literal["completed", "failed", "unfinished"]

# What a rank says when it is another that went away: gloo, the TCP store, NCCL and RCCL.
_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket ?timeout|remote process exited|"
    r"failed to (recv|send)|(nccl|rccl).*(abort|remote|system error)|watchdog caught|DistNetworkError|DistStoreError",
    re.IGNORECASE,
)
_STOPPED = ("KeyboardInterrupt", "Signal")


@dataclass(frozen=True)
class Failure:
    """The rank that failed first, in which stage, and what it said."""

    rank: int
    stage: str
    error_type: str
    error: str
    traceback: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a run. `unfinished` runs still run, or ended where nobody could write it down."""

    state: State
    failure: Failure | None
    finished_ranks: tuple[int, ...]


def judge(events: Iterable[Event], world: int) -> Outcome:
    """Completed if every rank is done; failed if a rank said so, vanished, or the job ended without it.

    The first failing rank is, in this order: the earliest that raised an error of its own; one that ended
    without a word (killed from outside) while others complained of a lost peer; the earliest complaint.
    """
    events = list(events)
    attempt = max((e.attempt for e in events), default=0)
    events = [e for e in events if e.attempt == attempt or e.rank == LAUNCHER]
    done = {e.rank for e in events if e.stage == "done" and e.event == "end"}
    if len(done) == world:
        return Outcome("completed", None, tuple(sorted(done)))
    failed = [e for e in events if e.event == "failed" and e.rank != LAUNCHER]
    ended = any(e.rank == LAUNCHER and e.event == "ended" for e in events)
    own = [e for e in failed if not _is_consequence(e)]
    silent = [rank for rank in range(world) if rank not in done | {e.rank for e in failed}]
    vanished = [e.data["rank"] for e in events if e.rank == LAUNCHER and e.event == "vanished"]
    failure: Failure | None = None
    if own:
        failure = _said(own[0])
    elif vanished:
        failure = _silent(events, vanished[0])
    elif silent and (ended or (failed and len(silent) == 1)):
        failure = _silent(events, silent[0])
    elif failed:
        failure = _said(failed[0])
    return Outcome("failed" if failure else "unfinished", failure, tuple(sorted(done)))


def _is_consequence(event: Event) -> bool:
    kind, text = event.data.get("error_type", ""), event.data.get("error", "")
    return kind in _STOPPED or bool(_PEER.search(f"{kind}: {text}"))


def _said(event: Event) -> Failure:
    data = event.data
    return Failure(
        event.rank, event.stage, data.get("error_type", ""), data.get("error", ""), data.get("traceback", "")
    )


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
