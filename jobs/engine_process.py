"""An engine's process on one node: started apart from the ranks' own surroundings, its log passed on and read."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

LAST_LINES = 40
"""Of its log, that an error repeats."""

_PR_SET_PDEATHSIG = 1

# What vLLM, SGLang and tokenspeed all say while they read a checkpoint: Hugging Face's bar over its shards.
_SHARDS = re.compile(r"Loading safetensors checkpoint shards:\s+\d+% Completed \| (\d+)/(\d+)")

# The engines look at these and take them for their own ranks': vLLM LOCAL_RANK, tokenspeed Slurm's.
_RANKS_OWN = re.compile(r"^(RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|(SLURM|SLURMD|SUBMITIT|PMI|PMIX)_\w+)$")


class EngineDiedError(RuntimeError):
    """An engine's process ended by itself."""


def surroundings(environ: Mapping[str, str], extra: Mapping[str, str | int]) -> dict[str, str]:
    """The environment of an engine: the rank's, without what says which rank of which job it is, and `extra`."""
    kept = {name: value for name, value in environ.items() if not _RANKS_OWN.match(name)}
    return kept | {name: str(value) for name, value in extra.items()}


def shards(line: str) -> tuple[int, int] | None:
    """How many files of how many a line of the log says are read, None if it says nothing of it."""
    found = _SHARDS.search(line)
    return (int(found[1]), int(found[2])) if found else None


class EngineProcess:
    """A started engine. Its lines go to this process's standard output, and to `on_line`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], on_line: Callable[[str], None]) -> None:
        if shutil.which(command[0], path=env.get("PATH")) is None:
            raise FileNotFoundError(
                f"engine.command: {command[0]}: not found on {os.uname().nodename}; install it into the ranks' image, "
                "or say where it is"
            )
        _widen()
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._on_line = on_line
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
            start_new_session=True,  # so that what it starts can be ended with it
            preexec_fn=_die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, name="engine's log", daemon=True)
        self._reader.start()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def died(self, name: str) -> EngineDiedError:
        """What to raise where it has ended by itself: how, and the end of its log."""
        self._reader.join(2)
        code = self._process.returncode
        how = f"signal {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        return EngineDiedError("\n".join([f"{name} ended by itself: {how}", *self._last]))

    def tell_to_end(self) -> None:
        """SIGTERM, to the process that was started: it ends its own."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def end(self, grace_s: float) -> None:
        """Tell it to end, and kill it and all that it started when it has not after `grace_s`."""
        self.tell_to_end()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(grace_s, 0.1))
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # a bar's carriage returns count as ends of lines
            sys.stdout.write(line)
            sys.stdout.flush()
            if line.strip():
                self._last.append(line.rstrip())
            self._on_line(line)


def _signal_name(number: int) -> str:
    """Real-time signals have no names of their own but for the first and the last."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}" if signal.SIGRTMIN < number < signal.SIGRTMAX else str(number)


def _widen() -> None:
    """Let what is started run on all of the node's processors that the job has, not on this rank's alone."""
    with suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def _die_with_parent() -> None:
    """For a child before exec: the kernel tells it to end when the rank is killed."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
