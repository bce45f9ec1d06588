"""From the events of all ranks to what became of the run, and which rank failed first."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from launcher.events import LAUNCHER, Event

State = Literal["completed", "failed", "unfinished"]

# What a rank says that knows for whom it has waited (`moe_ep.comm.watch`, `jobs.arrivals`, `jobs.agreement`).
_RANK = r"\d+(?: \(at \d+ bytes\))?"
_MISSED = rf"(?:not entered by|no byte has arrived at|not within \S+ s:) ranks? ({_RANK}(?:, {_RANK})*)"
_NAMED = re.compile(_MISSED)

# What a rank says when it is another that went away: gloo, the TCP store, NCCL and RCCL.
_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket ?timeout|timed out waiting|remote process exited|"
    r"have not arrived|rank 0 has not arrived|"
    r"failed to (recv|send)|(nccl|rccl).*(abort|remote|system error)|watchdog caught|DistNetworkError|DistStoreError|"
    r"the ranks' store does not answer|" + _MISSED,
    re.IGNORECASE,
)
_WAITED = re.compile(r"timed? ?out|timeout|watchdog caught|have not arrived|" + _MISSED, re.IGNORECASE)
"""What a rank says that has waited for another in vain; that one may still be there, and hang."""

GAVE_UP = "gave up"
"""The launcher's own event when it ends a run that has missed a deadline, with why."""

NODE_DOWN = "node down"
"""The launcher's own event when Slurm has lost a node of the run: node, why, and when Slurm saw it."""

PREEMPTED = "preempted"
"""The batch script's event when Slurm pushes the job out for another."""

TIME_LIMIT = "time limit is near"
"""What ranks say that were told so."""

_STOPPED = ("KeyboardInterrupt", "Signal")


@dataclass(frozen=True)
class Failure:
    """The rank that failed first (None: it was no rank's fault), in which stage, and what it said."""

    rank: int | None
    stage: str
    error_type: str
    error: str
    traceback: str = ""
    guessed: bool = False
    """Whether the rank is concluded from what the others said, or did not say: a log may know better."""


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

    The first failing rank is, in this order: the earliest that raised an error of its own; the first on a node that
    Slurm lost; one that others waited for in vain, and that did not complain itself (it hangs); one that ended
    without a word (killed from outside) while others complained of a lost peer; the earliest complaint.
    """
    events = [e for e in last_attempt(events) if e.rank < world]
    done = {e.rank for e in events if e.stage == "done" and e.event == "end"}
    if len(done) == world:
        return Outcome("completed")
    failed = [e for e in events if e.event == "failed"]
    own = own_errors(events)
    notes = {e.event: e for e in reversed(events) if e.rank == LAUNCHER}  # the earliest of each kind
    silent = [rank for rank in range(world) if rank not in done | {e.rank for e in failed}]
    if own:
        return Outcome("failed", _said(own[0]))
    if NODE_DOWN in notes:
        return Outcome("failed", _lost(events, notes[NODE_DOWN].data))
    if PREEMPTED in notes:
        why = "pushed out by a job that goes before it; Slurm has it in its queue again"
        return Outcome("failed", Failure(None, _last_stage(events), "Preempted", why))
    if GAVE_UP in notes:
        return Outcome("failed", Failure(None, _last_stage(events), "GivenUp", str(notes[GAVE_UP].data.get("why", ""))))
    if "interrupted" in notes:
        return Outcome("failed", Failure(None, _last_stage(events), "Interrupted", "the launcher was told to stop"))
    if "orphaned" in notes:
        return Outcome("failed", Failure(None, _last_stage(events), "Orphaned", "the ranks' parent was killed"))
    if "vanished" in notes:
        return Outcome("failed", _silent(events, notes["vanished"].data.get("rank", 0)))
    hanging = _hanging(failed, silent)
    if hanging is not None and (hanging not in silent or "ended" in notes or len(silent) == 1):
        return Outcome("failed", _hung(events, failed, hanging))
    if silent and ("ended" in notes or (failed and len(silent) == 1)):
        return Outcome("failed", _silent(events, silent[0]))
    if failed and all(e.error.get("type") == "Signal" for e in failed):
        return Outcome("failed", replace(_said(failed[0]), rank=None))
    return Outcome("failed", _said(failed[0])) if failed else Outcome("unfinished")


def own_errors(events: Iterable[Event]) -> list[Event]:
    """The errors of ranks that are not about another rank, nor that they were told to stop."""
    return [e for e in events if e.event == "failed" and not _is_consequence(e)]


def _is_consequence(event: Event) -> bool:
    kind = event.error.get("type", "")
    return kind in _STOPPED or bool(_PEER.search(f"{kind}: {event.error.get('text', '')}"))


def _said(event: Event) -> Failure:
    error = event.error
    return Failure(event.rank, event.stage, error.get("type", ""), error.get("text", ""), error.get("traceback", ""))


def _last_stage(events: list[Event]) -> str:
    return next((e.stage for e in reversed(events) if e.rank != LAUNCHER), "start")


def _hanging(failed: list[Event], silent: list[int]) -> int | None:
    """Of the ranks that others waited for in vain, and that were told to stop or said nothing, the first; one that the
    others name before one that was merely stopped with it."""
    waited = [e for e in failed if e.error.get("type") not in _STOPPED and _WAITED.search(e.error.get("text", ""))]
    stopped = sorted(e.rank for e in failed if e.error.get("type") == "Signal")
    named = [rank for e in waited for rank in _named(e.error["text"]) if rank in stopped + silent]
    return next(iter(named + stopped + silent), None) if waited else None


def _named(complaint: str) -> list[int]:
    """The ranks that it says it has waited for."""
    found = _NAMED.search(complaint)
    return [int(word.split()[0]) for word in found[1].split(", ")] if found else []


def _hung(events: list[Event], failed: list[Event], rank: int) -> Failure:
    complaint = next(e for e in failed if _WAITED.search(e.error.get("text", "")))
    last = [e for e in events if e.rank == rank and e.event != "failed"]
    stage, since = (last[-1].stage, last[-1].time) if last else ("start", complaint.time)
    stack = next((e.error.get("traceback", "") for e in failed if e.rank == rank), "")
    why = f"no sign of life for {max(0.0, complaint.time - since):.0f} s; rank {complaint.rank} waited for it in vain"
    return Failure(rank, stage, "Hung", why, stack, guessed=True)


def _lost(events: list[Event], note: dict[str, Any]) -> Failure:
    node = str(note.get("node", ""))
    ranks = sorted({e.rank for e in events if e.event == "started" and host_of(e) == node})
    last = next((e for e in reversed(events) if e.rank in ranks and e.event != "failed"), None)
    who = f"; rank{'s'[: len(ranks) != 1]} {', '.join(map(str, ranks))} ran on it" if ranks else ""
    why = f"node {node} is {note.get('state', 'down')}: {note.get('why') or 'no reason given'}{who}"
    return Failure(ranks[0] if ranks else None, last.stage if last else "start", "NodeFailed", why)


def host_of(event: Event) -> str:
    """The name of the node that a rank said it started on, as Slurm knows it."""
    return str(event.data.get("host", "")).partition(".")[0]


def _silent(events: list[Event], rank: int) -> Failure:
    last = next((e for e in reversed(events) if e.rank == rank), None)
    if last is None:
        why = "its process ended before the job's first line: see its log"
        return Failure(rank, "start", "NeverStarted", why, guessed=True)
    why = "ended without a word: killed from outside (SIGKILL, out of memory, lost node)"
    return Failure(rank, last.stage, "Vanished", why, guessed=True)
