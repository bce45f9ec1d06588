"""Engines that are programs of their own, started by the launcher through its ranks; small programs stand in."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, cast

import pytest

from jobs import engine_health, engine_http, external
from jobs.board import Board
from jobs.engine_process import EngineProcess
from jobs.events import EventLog
from jobs.phases import Phases
from jobs.rank import Rank
from jobs.request import ProbeRequest
from jobs.serving import Ending, Endpoint, ServeRequest, WrongAnswerError
from launcher.config import load
from launcher.events import read_events
from launcher.outcome import judge
from launcher.plan import make_plan
from moe_ep.synthetic import write_checkpoint
from tests.checkout import CONFIGS, importable
from tests.engines import program
from tests.waiting import PATIENCE_S, until

PROGRAM = Path(__file__).parent / "program.py"
LAYOUT = {"vllm": "tp: 2, ep: 1, expert_tp: 2", "sglang": "tp: 1, ep: 2", "tokenspeed": "tp: 2, ep: 2"}
START = {"vllm": ["vllm", "serve"], "sglang": ["sglang"], "tokenspeed": ["tokenspeed", "serve"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    write_checkpoint(path, load(CONFIGS / "tiny.yaml", []).model.sizes)
    return path


def write_config(folder: Path, engine: str, checkpoint: Path, **more: Any) -> Path:
    """A run of one engine on this machine: a node of two ranks."""
    settings = {
        "name": engine,
        "port": 0,
        "command": [sys.executable, str(PROGRAM), *START[engine]],
        "drain_s": 5,
        "ready_s": 60,
        **more,
    }
    model = (CONFIGS / "models" / "tiny.yaml").read_text()
    lines = [line for line in model.splitlines() if not line.startswith(("synthetic:", "  folder:"))]
    (folder / "model.yaml").write_text("\n".join([*lines, f"checkpoint: {checkpoint}"]))
    config = folder / "serve.yaml"
    config.write_text(
        "run: {name: serve}\ncluster: "
        + str(CONFIGS / "clusters" / "local.yaml")
        + f"\nmodel: {folder / 'model.yaml'}\n"
        + f"topology: {{nodes: 1, ranks_per_node: 2, {LAYOUT[engine]}}}\n"
        + "job: {kind: serve}\nmemory: {context: 256, batch: 4}\n"
        + "limits: {time_min: 5, rank_timeout_s: 60}\n"
        + f"engine: {json.dumps(settings)}\n"
    )
    return config


def launcher(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "launcher", *args],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def environment(**more: str) -> dict[str, str]:
    return os.environ | importable() | {"COLUMNS": "200", "SLURM_STEP_NUM_NODES": "7"} | more


@contextmanager
def submitted(config: Path, **env: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "launcher", "submit", str(config)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=config.parent, env=environment(**env), stdout=pipe, stderr=pipe, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


def run_dir(folder: Path) -> Path:
    (found,) = (folder / "runs" / "serve").iterdir()
    return found


def endpoint(folder: Path, process: "subprocess.Popen[str]") -> dict[str, Any]:
    def found() -> dict[str, Any]:
        assert process.poll() is None, f"not ready: {process.communicate(timeout=PATIENCE_S)}"
        return next((json.loads(path.read_text()) for path in folder.glob("runs/serve/*/endpoint.json")), {})

    return until(found)


def ask(url: str, model: str, key: str | None = None) -> Any:
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 4}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=10) as answer:
        return json.loads(answer.read())


def events(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = run_dir(folder) / "events" / f"rank-{rank:05d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def stages(folder: Path, rank: int) -> list[str]:
    return [event["stage"] for event in events(folder, rank) if event["event"] == "begin"]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tokenspeed"])
def test_an_engine_is_brought_up_answers_and_is_told_to_end(engine: str, checkpoint: Path, tmp_path: Path) -> None:
    key = {"api_key": {"env": "THE_KEY"}} if engine == "vllm" else {}
    config = write_config(tmp_path, engine, checkpoint, **key)
    with submitted(config, THE_KEY="secret", ENGINE_TEST="own-ranks") as process:
        where = endpoint(tmp_path, process)
        url = f"http://127.0.0.1:{where['port']}"
        assert where["needs_key"] == bool(key)
        assert ask(url, "tiny", "secret" if key else None)["choices"][0]["text"]
        assert launcher(tmp_path, "url", "serve").stdout.strip() == url
        if engine != "tokenspeed":
            until(lambda: "serving" in stages(tmp_path, 1))
        assert launcher(tmp_path, "cancel", "serve").returncode == 0
        out, err = process.communicate(timeout=PATIENCE_S)
    assert stages(tmp_path, 0) == ["starting", "loading", "warming", "ready", "serving", "draining", "done"], err
    warmed = next(e["data"] for e in events(tmp_path, 0) if e["event"] == "end" and e["stage"] == "warming")
    report = json.loads((run_dir(tmp_path) / "report.json").read_text())
    assert report["run"]["state"] == "completed"
    assert report["service"]["first_answer"] == warmed["answer"] == " Paris. It is a city"
    if engine != "tokenspeed":
        assert report["service"]["requests"] == {"answered": 1}
        assert report["service"]["answer_tokens"] == 4
    assert stages(tmp_path, 1)[-1] == "done"
    loaded = [e["data"] for e in events(tmp_path, 0) if e["event"] == "progress" and e["stage"] == "loading"]
    files = len(list(checkpoint.glob("*.safetensors")))
    assert loaded[-1]["total"] == files
    assert loaded[-1]["done"] == files
    log = launcher(tmp_path, "logs", "serve", "--rank", "0").stdout
    assert f"{engine} node 0 of 1" in log
    assert "secret" not in log + (run_dir(tmp_path) / "plan.json").read_text() + out
    assert not (run_dir(tmp_path) / "endpoint.json").exists()


def test_an_engine_that_dies_while_it_loads_fails_the_run_with_the_end_of_its_log(
    checkpoint: Path, tmp_path: Path
) -> None:
    with submitted(write_config(tmp_path, "vllm", checkpoint), ENGINE_TEST="die-loading") as process:
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
    (failed,) = [event for event in events(tmp_path, 0) if event["event"] == "failed"]
    assert failed["stage"] == "loading"
    assert re.search("vllm on .* ended by itself: exit code 1", failed["error"]["text"])
    assert "HIP out of memory" in failed["error"]["text"]
    (note,) = (run_dir(tmp_path) / "engine" / "0").glob("failed-*")
    assert json.loads(note.read_text())["text"] == failed["error"]["text"].splitlines()[0]  # of the log nothing


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of completions of a stand-in in this process."""
    monkeypatch.setattr(program.Api, "args", Namespace(api_key="secret", served_model_name="tiny"), raising=False)
    monkeypatch.setattr(program.Api, "engine", "vllm", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), program.Api)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/completions"
    server.shutdown()
    server.server_close()


def serve_request(answer: Path | None = None) -> ServeRequest:
    plan = make_plan(load(CONFIGS / "serve-v4pro-vllm.yaml", ["engine.served_name=tiny"], {"SCRATCH": "/s"}), "id")
    return replace(plan.serve_request(), answer=None if answer is None else str(answer))


def test_the_first_answer_must_say_something(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_http.warm(service, serve_request(), "secret")["answer"] == " Paris. It is a city"
    monkeypatch.setattr(program, "MODE", "silent")
    with pytest.raises(WrongAnswerError, match=r"answered '', 0 tokens; expected 8 that say something"):
        engine_http.warm(service, serve_request(), "secret")
    with pytest.raises(engine_http.NotReadyError, match=r"HTTP 401.*Unauthorized"):
        engine_http.warm(service, serve_request(), None)


def test_the_first_answer_must_be_the_recorded_one(service: str, tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps({"prompt": [1, 2], "tokens": [3, 4], "text": " Paris."}))
    assert engine_http.warm(service, serve_request(answer), "secret")["recorded"]
    answer.write_text(json.dumps({"prompt": [1, 2], "tokens": [3, 4], "text": " Rome."}))
    with pytest.raises(WrongAnswerError, match=r"the service answers ' Paris.', recorded is ' Rome.'"):
        engine_http.warm(service, serve_request(answer), "secret")
    answer.write_text("{}")
    with pytest.raises(WrongAnswerError, match=r"engine.answer: .*answer.json: no recorded answer: KeyError"):
        engine_http.warm(service, serve_request(answer), "secret")


def test_an_engine_is_asked_directly_whatever_proxy_the_site_has(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert engine_http.answers(service.replace("/v1/completions", "/health"), "secret")
    assert engine_http.warm(service, serve_request(), "secret")["answer"] == " Paris. It is a city"


@pytest.mark.parametrize(
    "told", [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nvllm:requ", b"SSH-2.0-OpenSSH\r\n\r\n"]
)
def test_an_answer_that_breaks_off_or_is_no_http_is_none(told: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            for _ in range(2):
                with listening.accept()[0] as one:
                    one.recv(65536)
                    one.sendall(told)

        Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/metrics"
        assert engine_http.get(url, None) is None
        with pytest.raises((engine_http.NotReadyError, WrongAnswerError)):
            engine_http.warm(url, serve_request(), None)


def node(folder: Path, serve: ServeRequest, number: int) -> external._Node:
    request = cast("ProbeRequest", Namespace(ranks_per_node=1, nodes=2, rank_timeout_s=5))
    rank = Rank(number, 2, 0, 2, f"node-{number}", 1, 1)
    log = EventLog(folder, number, 1)
    return external._Node(request, serve, folder, rank, log, Board(folder, 1), threading.Event())


def test_a_node_ends_with_the_service_however_short_its_draining_was(tmp_path: Path) -> None:
    serve = replace(serve_request(), commands=(("true",), ("sleep", "60")), drain_s=60)
    board, other = Board(tmp_path, 1), node(tmp_path, serve, 1)
    board.post("head", address="127.0.0.1", meeting=1, http=2)
    board.post("phase", phase="ready")

    def end() -> None:
        board.post("phase", phase="draining")
        board.post("phase", phase="done")

    threading.Timer(1, end).start()
    with ExitStack() as stack:
        Thread(target=other.run, args=[Phases(EventLog(tmp_path, 1, 1), stack)], daemon=True).start()
        assert other.told.wait(10)
        until(lambda: other.phases.name == "done")


def test_an_engine_that_is_told_to_end_before_it_is_ready_has_not_completed(tmp_path: Path) -> None:
    serve = replace(serve_request(), port=0, commands=(("sleep", "60"),), drain_s=1)
    request = cast("ProbeRequest", Namespace(serve=serve, ranks_per_node=1, nodes=1, rank_timeout_s=5))
    ending, log = Ending(), EventLog(tmp_path, 0)
    threading.Timer(0.5, lambda: ending.grace("time limit is near (SIGUSR2)")).start()
    external.run(request, tmp_path, Rank(0, 1, 0, 1, "node-0", 1, 0), log, ending)
    outcome = judge(read_events(tmp_path), 1)
    assert outcome.state == "failed"
    assert outcome.failure is not None
    assert (outcome.failure.error_type, outcome.failure.error) == ("Signal", "time limit is near (SIGUSR2)")


def test_the_address_of_an_attempt_that_broke_is_gone_when_the_next_starts(tmp_path: Path) -> None:
    Endpoint("node-0", "127.0.0.1", 8000, "tiny", needs_key=False, attempt=0).save(tmp_path)
    head = node(tmp_path, replace(serve_request(), port=0, commands=(("true",), ("true",))), 0)
    head._start({})
    head.close()
    assert Endpoint.load(tmp_path) is None


def test_an_engine_that_dies_ends_the_service_and_leaves_nothing_running(checkpoint: Path, tmp_path: Path) -> None:
    with submitted(write_config(tmp_path, "tokenspeed", checkpoint)) as process:
        where = endpoint(tmp_path, process)
        with pytest.raises(OSError, match=r"."):
            urllib.request.urlopen(f"http://127.0.0.1:{where['port']}/die", timeout=10)
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
    (failed,) = [event for event in events(tmp_path, 0) if event["event"] == "failed"]
    assert failed["stage"] == "serving"
    assert "tokenspeed on" in failed["error"]["text"]
    assert "exit code 139" in failed["error"]["text"]
    assert any(event["event"] == "failed" for event in events(tmp_path, 1))
    with pytest.raises(OSError, match=r"."):
        urllib.request.urlopen(f"http://127.0.0.1:{where['port']}/readiness", timeout=2)


def test_an_engine_that_hangs_after_it_was_ready_has_failed_and_is_started_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, "vllm", checkpoint, health_s=1, restarts=1, drain_s=0)
    with submitted(config) as process:
        port = endpoint(tmp_path, process)["port"]
        with pytest.raises(OSError, match=r"."):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/hang", timeout=0.2)
        until(lambda: endpoint(tmp_path, process)["attempt"] != 0)
        assert ask(f"http://127.0.0.1:{endpoint(tmp_path, process)['port']}", "tiny")["choices"][0]["text"]
    (error,) = [e["error"] for e in events(tmp_path, 0) if e["event"] == "failed" and e["attempt"] == 0]
    assert error["type"] == "EngineHungError"
    assert re.search(
        r"vllm on .* was ready and does not answer any more: \d+ times in a row no 200 from "
        r"http://127.0.0.1:\d+/health, for \d+ s \(engine.health_s 1\)",
        error["text"],
    )


def test_the_health_of_an_engine_that_answers_again_is_good_and_one_failure_is_no_verdict(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    well = threading.Event()

    def answers(*_: object, **__: object) -> bool:
        asked.append(well.is_set())
        return well.is_set()

    monkeypatch.setattr(engine_health, "answers", answers)
    health = engine_health.Health("vllm on node-0", service, "secret", 0.3)
    health.raise_if_hung()
    until(lambda: len(asked) >= 5)
    with pytest.raises(engine_health.EngineHungError, match=r"vllm on node-0 was ready.*engine.health_s 0.3"):
        health.raise_if_hung()
    well.set()
    until(lambda: asked[-1])
    time.sleep(0.05)
    health.raise_if_hung()
    health.end()


@pytest.mark.parametrize(
    ("number", "name"),
    [(9, "SIGKILL"), (35, "SIGRTMIN+1"), (40, "SIGRTMIN+6"), (64, "SIGRTMAX")],
)
def test_an_engine_that_a_signal_ended_is_told_with_its_name(number: int, name: str) -> None:
    process = EngineProcess(["sh", "-c", f"kill -{number} $$; sleep 5"], os.environ, lambda _: None)
    until(lambda: process.exit_code is not None)
    assert str(process.died("vllm")) == f"vllm ended by itself: signal {name}"


def test_a_program_that_is_not_there_is_named(checkpoint: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, "vllm", checkpoint, command=["no-such-engine", "serve"])
    with submitted(config) as process:
        process.communicate(timeout=PATIENCE_S)
    (failed,) = [event for event in events(tmp_path, 0) if event["event"] == "failed"]
    assert "engine.command: no-such-engine: not found on" in failed["error"]["text"]
