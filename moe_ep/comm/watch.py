"""Finding the ranks that a collective waits for: each tells by a store how far it has come.

A collective that some ranks do not enter would wait for ever, or until the library's own timeout, which names nobody.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # not in __all__

_SHARE = 16  # of the timeout: how often a rank tells where it is, and looks whether it is stuck
_LEAST_S, _MOST_S = 0.05, 10.0
_NAMED = 16  # ranks in a message
_SILENT = 2.5  # intervals without a sign of life, after which a rank is said to be frozen or gone


@dataclass(frozen=True)
class _Entered:
    number: int
    what: str
    time: float
    work: Any


class _UntilLeft:
    def is_completed(self) -> bool:
        return False


_UNTIL_LEFT = _UntilLeft()


class Watch:
    """Follows this rank's collectives of one group. All ranks of the group must make one, under the same `name`.

    Collectives are numbered as they are begun, which all ranks must do in the same order. A thread tells the store the
    last one that was entered, a few times within `timeout_s`, and each time counts on, which is its sign of life; if
    one has not ended after `timeout_s`, it looks who has not entered it, whose sign of life has stood still while it
    waited, and calls `on_stuck` once with a text that names them. On a GPU a collective is begun by the host and ends
    on the device: what has ended is found out when the next is begun, without waiting.
    """

    def __init__(
        self,
        store: "Store",
        name: str,
        rank: int,
        ranks: tuple[int, ...],
        timeout_s: float,
        on_stuck: Callable[[str], None],
    ) -> None:
        self.timeout_s = timeout_s
        self._store, self._on_stuck = store, on_stuck
        self._ranks, self._keys = ranks, [f"collectives/{name}/{r}" for r in ranks]
        self._key = f"collectives/{name}/{rank}"
        self._open: deque[_Entered] = deque()
        self._number, self._last, self._beat = 0, "none", 0
        self._seen: dict[int, tuple[int, float]] = {}  # by rank, its last sign of life and since when it is that
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._tell()
        self._thread = threading.Thread(target=self._run, name=f"watch {name}", daemon=True)
        self._thread.start()

    def entered(self, what: str, work: Any) -> int:
        """See `Watcher`."""
        with self._lock:
            while self._open and self._open[0].work.is_completed():
                self._open.popleft()
            self._number, self._last = self._number + 1, what
            self._open.append(_Entered(self._number, what, time.monotonic(), work))
            return self._number

    def left(self, number: int) -> None:
        """See `Watcher`."""
        with self._lock:
            self._open = deque(e for e in self._open if e.number != number)

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Follows a wait of the host in which all ranks take part, as it follows a collective."""
        number = self.entered(what, _UNTIL_LEFT)
        try:
            yield
        finally:
            self.left(number)

    def suspects(self, number: int) -> str:
        """Which ranks have not entered collective `number`, or have entered another one in its place."""
        self._tell()
        deadline = time.monotonic() + self._interval
        while True:
            told = self._read()
            missing = {rank: at for rank, at in told.items() if at[0] < number}
            if not missing or time.monotonic() > deadline:  # who has just entered it has not told yet
                break
            time.sleep(_LEAST_S)
        if missing:
            where = "; ".join(
                f"rank {rank} " + (f"last entered {last} (number {at})" if at else "has entered none")
                for rank, (at, last, _) in list(missing.items())[:_NAMED]
            )
            names = ", ".join(map(str, missing))
            text = f"not entered by rank{'s'[: len(missing) > 1]} {names} of {len(told)}: {where}"
            return "; ".join([text, *self._silent()])
        others = {last for at, last, _ in told.values() if at == number}
        if len(others) > 1:
            return f"the ranks are in different collectives: {', '.join(sorted(others))}"
        silent = self._silent() or ["one that stands still or died since, or the network"]
        return f"all {len(told)} ranks have entered it: {'; '.join(silent)}"

    def close(self) -> None:
        """End the thread. To be called before the process group is destroyed."""
        self._closed.set()
        self._thread.join()

    @property
    def _interval(self) -> float:
        return min(_MOST_S, max(_LEAST_S, self.timeout_s / _SHARE))

    def _read(self) -> dict[int, tuple[int, str, int]]:
        """By rank: number and name of its last collective, and its sign of life."""
        there = self._keys if self._store.check(self._keys) else [k for k in self._keys if self._store.check([k])]
        found = dict(zip(there, self._store.multi_get(there), strict=True))  # one round trip
        told = (json.loads(found.get(key, b'[0, "none", 0]')) for key in self._keys)
        return {rank: (number, last, beat) for rank, (number, last, beat) in zip(self._ranks, told, strict=True)}

    def _tell(self) -> None:
        self._beat += 1
        self._store.set(self._key, json.dumps([self._number, self._last, self._beat]))

    def _look(self) -> None:
        """Note whose sign of life has changed."""
        now = time.monotonic()
        for rank, (_, _, beat) in self._read().items():
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = (beat, now)

    def _silent(self) -> list[str]:
        """What is to be said of ranks whose sign of life has stood still for long."""
        quiet = {rank: time.monotonic() - since for rank, (_, since) in self._seen.items()}
        quiet = {rank: s for rank, s in quiet.items() if s > _SILENT * self._interval}
        return [f"rank {rank} has given no sign of life for {s:.0f} s" for rank, s in list(quiet.items())[:_NAMED]]

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            with suppress(RuntimeError):  # the store's host is gone; who waits then is still to be found
                self._tell()
                if self._waits_long():
                    self._look()
            stuck = self._stuck()
            if stuck is not None:
                waited = time.monotonic() - stuck.time
                self._on_stuck(f"{stuck.what} (number {stuck.number}) waits for {waited:.0f} s; {self._found(stuck)}")
                return

    def _found(self, stuck: _Entered) -> str:
        try:
            return self.suspects(stuck.number)
        except RuntimeError as error:  # the store's host is gone: a rank that died, too
            return f"the ranks' store does not answer: {error}"

    def _waits_long(self) -> bool:
        """Whether a collective has been open for half of the time that it may; until then nobody is watched."""
        with self._lock:
            return bool(self._open) and time.monotonic() - self._open[0].time > self.timeout_s / 2

    def _stuck(self) -> _Entered | None:
        with self._lock:
            oldest = self._open[0] if self._open else None
            if oldest is None or time.monotonic() - oldest.time < self.timeout_s:
                return None
            if oldest.work.is_completed():
                self._open.popleft()
                return None
            return oldest
