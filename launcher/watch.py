"""Following a run while it goes on, and ending a local one when a rank fails."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import submitit

from launcher.events import Event, Tail, write_note
from launcher.processes import Process, children
from launcher.status import RunStatus, statuses

GRACE_S = 2.0
"""How long the other ranks may still write after one has failed."""

START_S = 10.0
"""After this a rank of a local run must have a process."""

STATUS_S = 3.0
"""How often Slurm is asked about a job that is followed."""

UNKNOWN_S = 300.0
"""For how long a job may be in neither the queue nor the accounting, which lags, before nobody waits for it."""

_POLL_S = 0.1


def follow(run_dir: Path, attempt: int, going_on: Callable[[], bool], on_event: Callable[[Event], None]) -> None:
    """Until `going_on` is false, hand on each event of an attempt as it happens."""
    tail = Tail(run_dir)
    while True:
        last_round = not going_on()  # asked first, so that nothing written before the end is missed
        for event in tail.new():
            if event.attempt >= attempt:
                on_event(event)
        if last_round:
            return
        time.sleep(_POLL_S)


def until_ended(
    run_dir: Path,
    on_status: Callable[[RunStatus, Sequence[str]], None] = lambda *_: None,
) -> Callable[[], bool]:
    """A question whether a run still goes on, which asks Slurm no more than every few seconds. `on_status` gets each
    answer, with what went wrong with asking.

    A scheduler that does not answer is no end. One that answers, but has not known the job for a while, is: no
    witness of that end will come any more.
    """
    asked, last, known = -STATUS_S, True, time.monotonic()

    def going_on() -> bool:
        nonlocal asked, last, known
        if last and time.monotonic() - asked >= STATUS_S:
            (status,), problems = statuses([run_dir])
            on_status(status, problems)
            if problems or status.state != "unknown":
                known = time.monotonic()
            asked = time.monotonic()
            last = not status.ended and asked - known < UNKNOWN_S
        return last

    return going_on


class Shepherd:
    """Looks after the ranks of a local job: writes down one that vanishes, ends the others when one fails, within
    `grace_s` of being told to.

    (Slurm does both for its jobs: --kill-on-bad-exit, and the batch script's last lines.)
    """

    def __init__(
        self, job: "submitit.Job[None]", run_dir: Path, attempt: int, ranks: int, grace_s: float = GRACE_S
    ) -> None:
        self._job, self._run_dir, self._attempt, self._ranks = job, run_dir, attempt, ranks
        self._controller = Process.of(int(job.job_id))
        self._processes: dict[int, Process] = {}
        self._spoken: set[int] = set()  # ranks that have written their last event
        self._gone: set[int] = set()
        self._begun = time.monotonic()
        self._grace_s = grace_s
        self._stop_at = float("inf")

    def follow(self, on_event: Callable[[Event], None]) -> None:
        """Until all processes are gone. They are gone too when this is interrupted, which is written down."""

        def noted(event: Event) -> None:
            self._note_event(event)
            on_event(event)

        try:
            follow(self._run_dir, self._attempt, self._going_on, noted)
            if self._job.done() and any(p.alive for p in self._processes.values()):
                self._write("orphaned")  # submitit's controller is gone, its ranks are not
        except KeyboardInterrupt:
            self._write("interrupted")
            raise
        finally:
            with put_off():  # an impatient second one must not leave ranks behind
                self._end()
                self._write("ended")

    def _note_event(self, event: Event) -> None:
        if event.event == "failed" or (event.stage == "done" and event.event == "end"):
            self._spoken.add(event.rank)
        if event.event in ("failed", "vanished"):
            self._stop_at = min(self._stop_at, time.monotonic() + GRACE_S)

    def _going_on(self) -> bool:
        self._processes |= rank_processes(self._controller, self._processes)
        late = time.monotonic() - self._begun > START_S
        gone = {r for r in range(self._ranks) if not (self._processes[r].alive if r in self._processes else not late)}
        # Its last event may be written but not yet read: a rank must be gone for two rounds.
        for rank in (gone & self._gone) - self._spoken:
            self._spoken.add(rank)
            self._write("vanished", rank=rank)
        self._gone = gone
        return not self._job.done() and time.monotonic() < self._stop_at

    def _end(self) -> None:
        """Ask the ranks to end by submitit's controller, which hands the signal on; kill what is left after that."""
        self._processes |= rank_processes(self._controller, self._processes)
        if self._controller and self._controller.alive:
            os.kill(self._controller.pid, signal.SIGTERM)
        deadline = time.monotonic() + self._grace_s
        left = [*self._processes.values(), *([self._controller] if self._controller else [])]
        while any(process.alive for process in left) and time.monotonic() < deadline:
            self._job.done()  # collects the controller
            time.sleep(_POLL_S)
        for process in left:
            if process.alive:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def _write(self, event: str, **data: int) -> None:
        write_note(self._run_dir, self._attempt, event, **data)


@contextmanager
def put_off() -> Iterator[None]:
    """What tells the launcher to stop is held back meanwhile. Raises `KeyboardInterrupt` in the end where it came."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda which, _: came.append(which)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def rank_processes(controller: Process | None, known: dict[int, Process]) -> dict[int, Process]:
    """The processes of the ranks that are not known yet, by rank, from the environment that submitit gave them."""
    found: dict[int, Process] = {}
    pids = {process.pid for process in known.values()}
    for pid in children(controller.pid) if controller else []:
        process = Process.of(pid)
        if pid in pids or process is None:
            continue
        with suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(v[24:]): process for v in variables if v.startswith(b"SUBMITIT_LOCAL_GLOBALID=")}
    return found
