"""An engine that is a program of its own: the first rank of each node starts the node's part and looks after it, the
others follow what node 0 tells. starting → loading → warming → ready → serving → draining → done, as all services."""

import os
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from jobs.board import FAILED, Board
from jobs.engine_health import Health
from jobs.engine_http import NotReadyError, answers, counter, get, warm
from jobs.engine_process import EngineProcess, shards, surroundings
from jobs.events import EventLog
from jobs.phases import Phases
from jobs.rank import Rank, port_block
from jobs.redact import redact, secrets_of
from jobs.request import ProbeRequest
from jobs.serving import DRAINED_S, ENDPOINT, Ending, Endpoint, ServeRequest

LOOK_S = 0.2
"""How often it is looked whether the engine lives, and what the other nodes tell."""

COUNT_S = 1.0
"""How often it is looked what the engine has answered."""

FOLLOWING = 8
"""Ports after the meeting's that engines take by themselves."""

READY_PATH = {"vllm": "/health", "sglang": "/health", "tokenspeed": "/readiness"}

COUNTERS = {
    engine: {
        "requests": f"{engine}:{finished}",
        "prompt_tokens": f"{engine}:prompt_tokens_total",
        "answer_tokens": f"{engine}:generation_tokens_total",
    }
    for engine, finished in (("vllm", "request_success_total"), ("sglang", "num_requests_total"))
}
"""What /metrics counts, by our names. tokenspeed's gateway has its metrics on another port."""


class OtherNodeError(RuntimeError):
    """The engine's part on another node has ended."""


def run(request: ProbeRequest, folder: Path, rank: Rank, log: EventLog, ending: Ending) -> None:
    """Serve until told to end. Raises whatever keeps the service from being ready, or breaks it."""
    serve = request.serve
    assert serve is not None
    board = Board(folder, rank.attempt)
    told = threading.Event()
    whys: list[str] = []

    def drain(why: str) -> float:
        whys.append(why)
        told.set()
        return serve.drain_s + 2 * DRAINED_S

    ending.by(drain)
    if rank.local_rank:
        with ExitStack() as stack:
            _accompany(board, Phases(log, stack), told, serve)
        return
    node = _Node(request, serve, folder, rank, log, board, told)
    try:
        with ExitStack() as stack:
            node.run(Phases(log, stack))
        if node.is_head and not node.was_ready:  # it ended as it was told to, but nobody was served: no good end
            log.write("failed", error={"type": "Signal", "text": whys[0]})
    except OtherNodeError:
        raise
    except BaseException as error:
        # After this rank's own event, so that it is the first to have failed; the rest of the text is the engine's log.
        board.post(f"{FAILED}-{node.node}", text=redact(str(error).partition("\n")[0], secrets_of()))
        raise
    finally:
        node.close()


def _accompany(board: Board, phases: Phases, told: threading.Event, serve: ServeRequest) -> None:
    """A rank that starts nothing: its devices are worked on by the process that its node's first rank started."""
    phases.enter("starting")
    deadline = None
    while (note := board.read("phase")) is None or note["phase"] != "done":
        if note is not None and note["phase"] != phases.name:
            phases.enter(note["phase"])
        _raise_of_others(board, None)
        if told.is_set():
            deadline = deadline or time.monotonic() + serve.drain_s + DRAINED_S
            if time.monotonic() > deadline:
                break
        time.sleep(LOOK_S)
    phases.enter("done")


def _raise_of_others(board: Board, own: int | None) -> None:
    for name in board.names(FAILED):
        node = int(name.removeprefix(f"{FAILED}-"))
        note = board.read(name) if node != own else None
        if note is not None:
            raise OtherNodeError(f"node {node}: {note['text'] or 'failed'}")


class _Node:
    """The engine's part on this node."""

    def __init__(
        self,
        request: ProbeRequest,
        serve: ServeRequest,
        folder: Path,
        rank: Rank,
        log: EventLog,
        board: Board,
        told: threading.Event,
    ) -> None:
        self.request, self.serve, self.folder, self.rank = request, serve, folder, rank
        self.log, self.board, self.told = log, board, told
        self.node = rank.rank // request.ranks_per_node
        self.process: EngineProcess | None = None
        self.health: Health | None = None
        self.http = 0
        self.was_ready = False
        self.key: str | None = None
        self._shards: tuple[int, int] | None = None
        self._at_ready: dict[str, int] = {}
        self._answered = 0

    @property
    def is_head(self) -> bool:
        """Whether this node answers requests."""
        return self.node == 0

    def run(self, phases: Phases) -> None:
        """All of it."""
        self.phases = phases
        self._start(phases.enter("starting"))
        self._look_after()
        if self.was_ready or not self.is_head:
            phases.enter("done")

    def _start(self, data: dict[str, Any]) -> None:
        """Agree where to meet, and start the engine's process."""
        if self.is_head:
            (self.folder / ENDPOINT).unlink(missing_ok=True)  # of an attempt that broke
            self.key = self.serve.api_key()
            meeting, self.http = _ports(self.rank.job_id, self.serve)
            self.board.post("head", address=_address(self.request.nodes), meeting=meeting, http=self.http)
        head = self.board.await_note(
            "head", self.request.rank_timeout_s, lambda: _raise_of_others(self.board, self.node)
        )
        values = {"{head}": head["address"], "{meeting}": str(head["meeting"]), "{http}": str(head["http"])}
        command = [_filled(word, values) for word in self.serve.commands[self.node]]
        env = surroundings(os.environ, self.serve.env)
        if self.key is not None and self.serve.key_variable is not None:
            env[self.serve.key_variable] = self.key
        data |= {"engine": self.serve.engine, "host": self.rank.host, "command": command}
        self.process = EngineProcess(command, env, self._hear)

    def _hear(self, line: str) -> None:
        self._shards = shards(line) or self._shards

    def _look_after(self) -> None:
        """Until the service has ended: follow the engine to its readiness, then see that it lives."""
        deadline = time.monotonic() + self.serve.ready_s
        while self.phases.name not in ("ready", "serving"):
            self._tell_loading()
            self._check()
            if self.told.is_set():
                return self._drain()
            if time.monotonic() > deadline:
                raise NotReadyError(f"{self.serve.engine} is not ready after engine.ready_s, {self.serve.ready_s} s")
            if self.is_head and answers(self._url(READY_PATH[self.serve.engine]), self.key):
                self._become_ready()
            elif not self.is_head:
                self._follow()
            time.sleep(LOOK_S)
        counted = time.monotonic()
        while not self.told.is_set():
            self._check()
            if not self.is_head:
                self._follow()
            elif time.monotonic() - counted >= COUNT_S:
                counted = time.monotonic()
                self._count()
            time.sleep(LOOK_S)
        if self.is_head:
            self._count()
        return self._drain()

    def _check(self) -> None:
        assert self.process is not None
        if self.process.exit_code is not None:
            if self.told.wait(1.0):  # a signal to the whole job reaches the engine too
                return
            raise self.process.died(f"{self.serve.engine} on {self.rank.host}")
        if self.health is not None:
            self.health.raise_if_hung()
        _raise_of_others(self.board, self.node)

    def _tell_loading(self) -> None:
        if self._shards is None:
            return
        if self.phases.name == "starting":
            self._enter("loading")
        done, total = self._shards
        self._shards = None
        self.log.write("progress", done=done, total=total)

    def _enter(self, phase: str) -> dict[str, Any]:
        if self.is_head:
            self.board.post("phase", phase=phase)
        return self.phases.enter(phase)

    def _follow(self) -> None:
        note = self.board.read("phase")
        if note is None or note["phase"] == self.phases.name:
            return
        if note["phase"] in ("draining", "done"):  # a short draining may be over between two looks
            self.told.set()
        else:
            self.phases.enter(note["phase"])

    def _become_ready(self) -> None:
        data = self._enter("warming")
        data |= warm(self._url("/v1/completions"), self.serve, self.key)
        endpoint = Endpoint(
            self.rank.host, self.serve.host, self.http, self.serve.model, self.key is not None, self.rank.attempt
        )
        self._at_ready = self._counts()
        self._enter("ready")["url"] = endpoint.url
        endpoint.save(self.folder)
        self.was_ready = True
        name = f"{self.serve.engine} on {self.rank.host}"
        self.health = Health(name, self._url(READY_PATH[self.serve.engine]), self.key, self.serve.health_s)
        if self.serve.engine not in COUNTERS:  # nothing tells whether anybody asks
            self._enter("serving")

    def _counts(self) -> dict[str, int]:
        names = COUNTERS.get(self.serve.engine, {})
        metrics = get(self._url("/metrics"), self.key) if names else None
        found = {ours: counter(metrics, theirs) for ours, theirs in names.items()}
        return {ours: int(value) for ours, value in found.items() if value is not None}

    def _count(self) -> None:
        """Tell what was answered since the service was ready, when that has changed."""
        if self.health is not None and not self.health.well:
            return
        now = self._counts()
        self._at_ready = now | self._at_ready  # what could not be read when it was ready counts from now on
        since: dict[str, Any] = {name: max(0, now[name] - self._at_ready[name]) for name in now}
        if since.get("requests", 0) <= self._answered:
            return
        self._answered = since["requests"]
        if self.phases.name == "ready":
            self._enter("serving")
        told = since | {"requests": {"answered": self._answered}}
        self.log.write("progress", done=self._answered, total=self._answered, **told)

    def _drain(self) -> None:
        assert self.process is not None
        if self.is_head:
            (self.folder / ENDPOINT).unlink(missing_ok=True)  # nobody else may come
            self._enter("draining")
            self.process.end(self.serve.drain_s)
            self.board.post("phase", phase="done")
            return
        self.phases.enter("draining")
        deadline = time.monotonic() + self.serve.drain_s + DRAINED_S / 2
        while time.monotonic() < deadline and self.process.exit_code is None:
            note = self.board.read("phase")
            if note is not None and note["phase"] == "done":
                break
            time.sleep(LOOK_S)
        self.process.end(DRAINED_S / 2)

    def close(self) -> None:
        """Leave nothing running, however this ends."""
        if self.health is not None:
            self.health.end()
        if self.process is not None and self.process.exit_code is None:
            self.process.end(min(self.serve.drain_s, DRAINED_S / 2))

    def _url(self, path: str) -> str:
        host = "127.0.0.1" if self.serve.host in ("0.0.0.0", "::", "localhost") else self.serve.host
        return f"http://[{host}]:{self.http}{path}" if ":" in host else f"http://{host}:{self.http}{path}"


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _address(nodes: int) -> str:
    """How the other nodes reach this one: its address, or its name where that means this machine itself."""
    name = socket.gethostname()
    if nodes == 1:
        return "127.0.0.1"  # a laptop's own name may not resolve
    with suppress(OSError):
        address = socket.gethostbyname(name)
        if not address.startswith("127."):
            return address
    return name


def _ports(job_id: int, serve: ServeRequest) -> tuple[int, int]:
    """The first of a run of free ports to meet at, and the service's.

    Raises
    ------
    OSError
        If there are none, or the service's own is taken.
    """
    block = port_block(job_id)
    starts = range(block.start, block.stop - FOLLOWING - 1)
    meeting = next((p for p in starts if all(_is_free("", p + i) for i in range(FOLLOWING))), None)
    if meeting is None:
        raise OSError(
            f"{socket.gethostname()}: no {FOLLOWING} free ports together in {block.start} to {block.stop - 1}"
        )
    if serve.port and not _is_free(serve.host, serve.port):
        raise OSError(
            f"engine.port: {serve.port} of {serve.host} is in use on {socket.gethostname()}; use another, or 0"
        )
    http = serve.port or next(p for p in range(meeting + FOLLOWING, 65536) if _is_free(serve.host, p))
    return meeting, http


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
