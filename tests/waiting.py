"""Waiting for what a process, a thread or Slurm does while a test looks on."""

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 600.0
"""What a busy machine may take. Only a test that fails waits so long."""

_T = TypeVar("_T")


def until(what: Callable[[], _T | None], why: Callable[[], object] = lambda: "") -> _T:
    """What `what` returns once that is true; after too long, an AssertionError with what `why` returns then."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        asked = time.monotonic()
        if found := what():
            return found
        now = time.monotonic()
        assert now < deadline, f"waited {PATIENCE_S:.0f} s in vain {why()}"
        time.sleep(max(0.02, now - asked))  # a question that starts a process leaves others the time for an answer
