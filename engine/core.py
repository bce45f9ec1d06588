"""The engine's loop: rank 0 takes requests, makes steps and hands out tokens; the other ranks follow."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from engine.group import BEAT_S, Group
from engine.model import ServedModel
from engine.sampling import Chooser, NotFiniteError
from engine.scheduler import Scheduler, Step
from engine.sequence import Chosen, Finish, Wish

STALLED_S = 60.0
"""After this long without the end of a round the engine is not well: a rank hangs, or a step is far too large."""

Phase = Literal["warming", "ready", "serving", "draining"]


@dataclass(frozen=True)
class Output:
    """What came of a sequence since the last: a token, and whether it was the last; `error` says what went wrong."""

    chosen: Chosen | None
    finish: Finish | None
    error: str = ""


class Listener(Protocol):
    """Takes a sequence's outputs, in the engine's thread; must not block."""

    def __call__(self, output: Output) -> None:
        """The next output."""
        ...


class QueueFullError(RuntimeError):
    """No more requests may wait."""


class ClosedError(RuntimeError):
    """The engine takes no requests: it is being drained, or has broken."""


@dataclass
class Counts:
    """What the engine has done so far, for metrics and those who watch."""

    requests: dict[str, int] = field(default_factory=dict)
    """By how they ended."""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0


class Engine:
    """Rank 0's. `submit` and `cancel` are for other threads; `run` is the loop, until it has drained."""

    def __init__(self, model: ServedModel, group: Group, scheduler: Scheduler) -> None:
        self._model, self._group, self._scheduler = model, group, scheduler
        self._chooser = Chooser()
        self._listeners: dict[int, Listener] = {}
        self._cancelled: queue.SimpleQueue[tuple[int, Finish]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the scheduler, the listeners and what follows
        self._wake = threading.Event()
        self._closed = ""
        self.broken = False
        self._round_at = time.monotonic()
        self._end_at: float | None = None
        self.counts = Counts()
        self.phase: Phase = "warming"

    def submit(self, wish: Wish, listener: Listener) -> int:
        """Let a sequence wait for its place; its outputs go to `listener`. Returns its number.

        Raises
        ------
        QueueFullError
            If too many wait already.
        ClosedError
            If no more are taken; says why.
        """
        (number,) = self.submit_all([(wish, listener)])
        return number

    def submit_all(self, wanted: Sequence[tuple[Wish, Listener]]) -> list[int]:
        """Several sequences of one request, or none of them. Errors as `submit`."""
        with self._lock:
            if self._closed:
                raise ClosedError(self._closed)
            room = self._scheduler.sequences + self._scheduler.queue - len(self._scheduler.numbers())
            if len(wanted) > room:
                raise QueueFullError(
                    f"{len(self._scheduler.waiting)} requests are waiting already, and at most "
                    f"{self._scheduler.queue} may; try again later"
                )
            numbers = [self._scheduler.add(wish) for wish, _ in wanted]
            self._listeners |= {n: listener for n, (_, listener) in zip(numbers, wanted, strict=True)}
            if self.phase == "ready":
                self.phase = "serving"
        self._wake.set()
        return numbers

    def open(self) -> None:
        """Ready for clients: what was done before is not counted as theirs."""
        with self._lock:
            self.counts = Counts()
            if self.phase == "warming":
                self.phase = "ready"

    def cancel(self, number: int, finish: Finish = "cancelled") -> None:
        """Work no more on a sequence; nobody listens to it any longer. It counts as one that ended with `finish`."""
        self._cancelled.put((number, finish))
        self._wake.set()

    def drain(self, within_s: float, why: str) -> None:
        """Take no more requests, and let `run` return when what there is has been answered, or the time is over."""
        with self._lock:
            self._closed = self._closed or why
            self._end_at = min(self._end_at or float("inf"), time.monotonic() + within_s)
            self.phase = "draining"
        self._wake.set()
        # A step that hangs (a rank is gone, and the collective does not notice) must not keep clients waiting.
        late = threading.Timer(within_s, self._tell_late)
        late.daemon = True
        late.start()

    def abandon(self, why: str) -> None:
        """Tell every client that a step will not end. For other threads: the engine's own stands in that step."""
        with self._lock:
            self._closed, self.broken = why, True
            for number in [*self._listeners]:
                self._tell(number, Output(None, "error", why))

    @property
    def load(self) -> tuple[int, int]:
        """Sequences that have a place, and that wait for one."""
        with self._lock:
            return len(self._scheduler.running), len(self._scheduler.waiting)

    @property
    def stalled(self) -> bool:
        """Whether it has been in one round for too long."""
        return time.monotonic() - self._round_at > STALLED_S

    @property
    def places(self) -> int:
        """How many sequences are worked on at once."""
        return self._scheduler.sequences

    @property
    def tokens_held(self) -> int:
        """Tokens in the caches of all sequences; for metrics, so a moment's difference does not matter."""
        with self._lock:
            return sum(s.read for s in self._scheduler.running.values())

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Steps until the engine has drained, or `until` says so between two of them.

        Raises whatever breaks a step, after every client has been told.
        """
        self._round_at = time.monotonic()
        try:
            while not self._drained() and not until():
                self._one_round()
        except BaseException as error:
            self._fail_all(f"the engine has broken: {type(error).__name__}")
            raise

    def stop(self) -> None:
        """Tell the other ranks that no step follows."""
        self._group.send(Step({}, phase=self.phase, last=True))

    def _one_round(self) -> None:
        with self._lock:
            self._drop_cancelled()
            step = self._scheduler.step()
        step = Step(step.pieces, step.forget, self.phase)
        for number in step.forget:
            self._chooser.forget(number)
        self._group.send(step)
        run_step(self._model, step, self._answer)
        self._round_at = time.monotonic()
        if not step.pieces:
            self._wake.wait(BEAT_S)
            self._wake.clear()

    def _answer(self, step: Step, logits: Tensor) -> None:
        rows = {number: row for row, number in enumerate(step.pieces)}
        self.counts.steps += 1
        logits = logits.cpu()  # waits for the device, which nobody else must do for the lock
        with self._lock:
            for sequence in self._scheduler.read(step):
                if not sequence.answer:
                    self.counts.prompt_tokens += len(sequence.wish.prompt)
                try:
                    chosen = self._chooser.choose(sequence, logits[rows[sequence.number]])
                except NotFiniteError as error:  # of this sequence alone; the others are well
                    self._scheduler.drop(sequence.number)
                    self._tell(sequence.number, Output(None, "error", str(error)))
                    continue
                finish = self._scheduler.take(sequence, chosen.token)
                self.counts.answer_tokens += 1
                self._tell(sequence.number, Output(chosen, finish))

    def _tell(self, number: int, output: Output) -> None:
        listener = self._listeners.get(number)
        if listener is None:  # was told that the time is over
            return
        if output.finish is not None:
            del self._listeners[number]
            self.counts.requests[output.finish] = self.counts.requests.get(output.finish, 0) + 1
        listener(output)

    def _drop_cancelled(self) -> None:
        while True:
            try:
                number, finish = self._cancelled.get_nowait()
            except queue.Empty:
                return
            if self._scheduler.drop(number) and self._listeners.pop(number, None) is not None:
                self.counts.requests[finish] = self.counts.requests.get(finish, 0) + 1

    def _drained(self) -> bool:
        with self._lock:
            if self._end_at is None:
                return False
            over = time.monotonic() >= self._end_at
            if over:
                self._tell_all(self._unfinished)
            return over or not self._scheduler.numbers()

    @property
    def _unfinished(self) -> str:
        return f"{self._closed}; the answer was not finished in time"

    def _tell_late(self) -> None:
        """From a thread of its own: what the scheduler holds is the engine's thread's, so that stays."""
        with self._lock:
            for number in [*self._listeners]:
                self._tell(number, Output(None, "error", self._unfinished))

    def _fail_all(self, why: str) -> None:
        with self._lock:
            self._closed, self.broken = why, True
            self._tell_all(why)

    def _tell_all(self, why: str) -> None:
        for number in self._scheduler.numbers():
            self._scheduler.drop(number)
            self._tell(number, Output(None, "error", why))


def run_step(model: ServedModel, step: Step, answer: Callable[[Step, Tensor], None] = lambda *_: None) -> None:
    """What every rank does with a step."""
    for number in step.forget:
        model.forget(number)
    if step.pieces:
        answer(step, model.forward(step.pieces))


def follow(model: ServedModel, group: Group, on_phase: Callable[[str], None]) -> None:
    """The loop of all ranks but 0: until rank 0 says that no step follows, or is gone (`LostError`)."""
    phase = ""
    while True:
        step = group.receive()
        if step.phase != phase:
            phase = step.phase
            on_phase(phase)
        run_step(model, step)
        if step.last:
            return
