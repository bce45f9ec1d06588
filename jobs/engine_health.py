"""Whether an engine that was ready still answers: its health address is asked again and again, by a thread."""

import threading
import time

from jobs.engine_http import answers

FEWEST = 3
"""Failures in a row before an engine is taken for hung, however long they take."""

MOST_EVERY_S = 10.0


class EngineHungError(RuntimeError):
    """An engine's process is there, but does not answer any more."""


class Health:
    """Of an engine that has answered at `url`. `raise_if_hung` after `within_s` without an answer; 0: nobody asks."""

    def __init__(self, name: str, url: str, key: str | None, within_s: float) -> None:
        self._name, self._url, self._key, self._within_s = name, url, key, within_s
        self._every_s = min(within_s / FEWEST, MOST_EVERY_S)
        self._failures, self._answered = 0, time.monotonic()
        self._over = threading.Event()
        if within_s > 0:
            threading.Thread(target=self._ask, name="engine's health", daemon=True).start()

    @property
    def well(self) -> bool:
        """Whether it answered when it was asked last."""
        return self._failures == 0

    def raise_if_hung(self) -> None:
        """Raises `EngineHungError`."""
        silent = time.monotonic() - self._answered
        if self._failures >= FEWEST and silent >= self._within_s:
            raise EngineHungError(
                f"{self._name} was ready and does not answer any more: {self._failures} times in a row no 200 from "
                f"{self._url}, for {silent:.0f} s (engine.health_s {self._within_s:g})"
            )

    def end(self) -> None:
        """Ask no more."""
        self._over.set()

    def _ask(self) -> None:
        while not self._over.wait(self._every_s):
            if answers(self._url, self._key, timeout_s=self._every_s):
                self._failures, self._answered = 0, time.monotonic()
            else:
                self._failures += 1
