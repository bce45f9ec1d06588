"""The HTTP service without ranks: what is refused, and what clients are told when the engine fails."""

import asyncio
import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from engine.api.app import make_app
from engine.api.server import Server, allow_files, bind
from engine.api.service import Limits, Service
from engine.core import Engine
from engine.group import Group
from engine.model import ServedModel
from engine.scheduler import Scheduler
from engine.text import Tokenizer
from moe_ep.synthetic import TINY
from moe_ep.tokens import write_tokenizer
from tests.engine.parrot import Alone, Parrot
from tests.waiting import until

KEY = "a secret of clients"
MODEL = "parrot"
LIMITS = Limits(context=64, completion_tokens=40, prompts=4, body_bytes=2000, request_s=30)


class Running:
    """A service on a port, its engine in a thread."""

    def __init__(self, folder: Path, queue: int = 1, limits: Limits = LIMITS) -> None:
        self.parrot = Parrot()
        self.service = Service(MODEL, limits, KEY)
        self.server = Server(self.service, bind("127.0.0.1", 0))
        self.server.start()
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.tokenizer = Tokenizer(folder, TINY.vocab)
        self.engine = Engine(
            cast("ServedModel", self.parrot),
            cast("Group", Alone()),
            Scheduler(sequences=2, step_tokens=16, queue=queue),
        )
        self.broke: list[str] = []
        self.thread = threading.Thread(target=self._loop)

    def begin(self) -> "Running":
        self.service.tokenizer, self.service.engine = self.tokenizer, self.engine
        self.engine.open()
        self.thread.start()
        return self

    def _loop(self) -> None:
        try:
            self.engine.run()
        except RuntimeError as error:
            self.broke.append(str(error))

    def end(self) -> None:
        self.parrot.go.set()
        self.engine.drain(0, "the test is over")
        if self.thread.ident is not None:
            self.thread.join(10)
        self.server.stop()

    def ask(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        asked = {"model": MODEL, "prompt": [7, 8], "temperature": 0, "max_tokens": 3} | body
        return httpx.post(f"{self.url}{path}", json=asked, headers=self.headers, timeout=30)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=self.headers, timeout=30)

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith(f"vllm:{name}")]
        return sum(float(line.split()[-1]) for line in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, TINY.vocab)
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Running]:
    running = Running(folder).begin()
    yield running
    running.end()


@pytest.fixture
def own(folder: Path) -> Iterator[Running]:
    running = Running(folder).begin()
    yield running
    running.end()


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "another model": ({"model": "gpt"}, 404, "there is no model 'gpt'; there is 'parrot'"),
    "an unknown key": ({"tools": []}, 400, "tools: unknown or not supported here"),
    "a wrong type": ({"max_tokens": "many"}, 400, "max_tokens: "),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens: "),
    "too hot": ({"temperature": 2.5}, 400, "temperature: "),
    "too many tokens": ({"max_tokens": 41}, 400, "max_tokens: 41 is more than 40"),
    "a full context": ({"prompt": [7] * 62}, 400, "62 tokens, and 3 for the answer, are more than"),
    "an empty prompt": ({"prompt": ""}, 400, "prompt: is empty"),
    "no prompt": ({"prompt": []}, 400, "prompt: "),
    "no such token": ({"prompt": [512]}, 400, "prompt: token 512 is not one of 0 to 511"),
    "a bias of no token": ({"logit_bias": {"600": 1}}, 400, "logit_bias: there is no token 600"),
    "too many choices": ({"n": 5}, 400, "n × prompts is 5 × 1, at most 4"),
    "too many prompts": ({"prompt": [[7]] * 5}, 400, "n × prompts is 1 × 5, at most 4"),
    "options without a stream": ({"stream_options": {"include_usage": True}}, 400, "only with stream: true"),
    "echo": ({"echo": True}, 400, "echo: "),
    "too long a body": ({"user": "x" * 3000}, 413, "larger than 2000 bytes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_refused_with_one_clear_error(what: str, shared: Running) -> None:
    body, status, text = REFUSED[what]
    answer = shared.ask(**body)
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert text in error["message"]


def test_a_chat_that_does_not_end_with_the_user_is_refused(shared: Running) -> None:
    body = {"model": MODEL, "messages": [{"role": "assistant", "content": "x"}]}
    answer = httpx.post(f"{shared.url}/v1/chat/completions", json=body, headers=shared.headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_a_body_that_is_not_json_is_refused(shared: Running) -> None:
    answer = httpx.post(f"{shared.url}/v1/completions", content=b'{"model": ', headers=shared.headers)
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]["message"]


def test_a_body_that_does_not_say_how_long_it_is_is_refused_once_it_is_too_long(shared: Running) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b" " * 1000

    answer = httpx.post(f"{shared.url}/v1/completions", content=endless(), headers=shared.headers)
    assert answer.status_code == 413


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)])
def test_paths_and_methods_that_are_not_there_have_errors_of_the_same_shape(
    method: str, path: str, status: int, shared: Running
) -> None:
    answer = httpx.request(method, f"{shared.url}{path}", headers=shared.headers)
    assert answer.status_code == status
    assert path in answer.json()["error"]["message"]


@pytest.mark.parametrize("header", ["", "Bearer wrong", f"Basic {KEY}", "Bearer ｋ"])
def test_without_the_key_nothing_below_v1_is_answered(header: str, shared: Running) -> None:
    headers = {"Authorization": header.encode()} if header else {}
    answer = httpx.get(f"{shared.url}/v1/models", headers=headers)
    assert answer.status_code == 401
    assert KEY not in answer.text
    assert httpx.get(f"{shared.url}/health").status_code == 200


def test_a_stop_text_ends_the_answer_and_its_work(own: Running) -> None:
    text = own.tokenizer.token_text(12)
    own.parrot.free = 8  # else all is answered before the stop is seen
    answer = own.ask(max_tokens=30, stop=[text]).json()["choices"][0]
    own.parrot.free = -1
    own.parrot.go.set()
    expected = "".join(own.tokenizer.token_text(token) for token in range(9, 12))
    assert (answer["text"], answer["finish_reason"]) == (expected, "stop")
    until(lambda: own.engine.load == (0, 0))
    until(lambda: own.engine.counts.requests == {"stop": 1})


def test_choices_of_several_prompts_come_in_order(shared: Running) -> None:
    answer = shared.ask(prompt=[[7], [20]], n=1, max_tokens=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][1]["text"] == shared.tokenizer.decode([21, 22])
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}


def test_one_too_many_is_told_to_come_again(own: Running) -> None:
    own.parrot.go.clear()
    threads = [threading.Thread(target=own.ask) for _ in range(3)]  # two have places, one waits
    for thread in threads:
        thread.start()
    until(lambda: sum(own.engine.load) == 3)
    answer = own.ask()
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["code"] == "queue_full"
    own.parrot.go.set()
    for thread in threads:
        thread.join()
    assert own.ask().status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_nobody_works_for_a_client_that_has_left(stream: bool, own: Running) -> None:
    own.parrot.go.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{own.url}/v1/completions",
            json={"model": MODEL, "prompt": [7], "max_tokens": 40, "ignore_eos": True, "stream": stream},
            headers=own.headers,
            timeout=0.3,
        )
    until(lambda: not own.engine._cancelled.empty() or own.engine.counts.requests)
    own.parrot.go.set()
    until(lambda: own.engine.load == (0, 0))
    assert own.engine.counts.requests == {"cancelled": 1}
    until(lambda: own.parrot.forgotten == [0])


def test_a_client_that_leaves_in_the_middle_of_a_stream_frees_its_place(own: Running) -> None:
    body = {"model": MODEL, "prompt": [7], "max_tokens": 40, "ignore_eos": True, "stream": True}
    own.parrot.free = 2
    with httpx.stream("POST", f"{own.url}/v1/completions", json=body, headers=own.headers) as answer:
        lines = answer.iter_lines()  # kept: an iterator that is dropped closes the connection at once
        next(lines)
        until(lambda: not own.parrot.go.is_set())
    until(lambda: not own.engine._cancelled.empty())
    own.parrot.go.set()
    until(lambda: own.engine.load == (0, 0))
    assert own.engine.counts.requests.get("length", 0) == 0


@pytest.mark.parametrize("stream", [True, False])
def test_when_the_engine_breaks_clients_get_errors_not_silence(stream: bool, own: Running) -> None:
    own.parrot.go.clear()
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(own.ask(stream=stream)))
    thread.start()
    until(lambda: sum(own.engine.load) == 1)
    own.parrot.error = "a rank has gone"
    own.parrot.go.set()
    thread.join(20)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["message"] == "the engine has broken: RuntimeError"
    own.thread.join(10)
    assert own.broke == ["a rank has gone"]
    assert own.ask().status_code == 503
    assert own.get("/health").status_code == 503


def test_an_engine_that_hangs_is_not_healthy(own: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.core.STALLED_S", 0.3)
    own.parrot.go.clear()
    thread = threading.Thread(target=own.ask)
    thread.start()
    until(lambda: own.get("/health").json() == {"status": "stalled"})
    assert own.get("/health").status_code == own.get("/ready").status_code == own.ask().status_code == 503
    own.parrot.go.set()
    thread.join()
    monkeypatch.undo()
    assert own.get("/health").status_code == 200


def test_an_answer_that_is_no_number_ends_its_own_request_alone(own: Running) -> None:
    own.parrot.nan_after = 30
    answer = own.ask(prompt=[30])
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_error")
    assert "not finite" in answer.json()["error"]["message"]
    assert own.ask(prompt=[40]).status_code == 200


def test_a_stream_that_has_begun_ends_with_the_error(own: Running) -> None:
    body = {"model": MODEL, "prompt": [7], "max_tokens": 40, "ignore_eos": True, "stream": True}
    own.parrot.free = 2
    with httpx.stream("POST", f"{own.url}/v1/completions", json=body, headers=own.headers, timeout=20) as answer:
        lines = answer.iter_lines()
        next(lines)
        until(lambda: not own.parrot.go.is_set())
        own.parrot.error = "a rank has gone"
        own.parrot.go.set()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["error"]["code"] == "engine_error"


def test_draining_finishes_what_runs_and_takes_no_more(own: Running) -> None:
    own.parrot.go.clear()
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(own.ask()))
    thread.start()
    until(lambda: sum(own.engine.load) == 1)
    own.engine.drain(20, "the time limit is near")
    refused = own.ask()
    assert refused.status_code == 503
    assert "draining" in refused.json()["error"]["message"]
    assert own.get("/ready").status_code == 503
    own.parrot.go.set()
    thread.join(20)
    assert answers[0].json()["choices"][0]["finish_reason"] == "length"
    own.thread.join(10)
    assert not own.thread.is_alive()


def test_clients_are_told_when_the_time_is_over_even_if_a_step_hangs(own: Running) -> None:
    own.parrot.go.clear()
    found: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: found.append(own.ask()))
    asking.start()
    until(lambda: own.engine.load[0] == 1)
    own.engine.drain(0.2, "the service is ending: a rank is gone")
    asking.join(10)
    assert not own.parrot.go.is_set()
    assert found[0].status_code == 503
    assert "a rank is gone; the answer was not finished in time" in found[0].json()["error"]["message"]
    own.parrot.go.set()
    own.thread.join(10)
    assert own.engine.counts.requests == {"error": 1}


def test_before_it_is_loaded_a_service_says_so(folder: Path) -> None:
    running = Running(folder)
    try:
        running.service.loading = "loading"
        answer = running.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
        assert running.get("/health").status_code == 200
        assert running.ask().json()["error"]["message"] == "the service is loading"
    finally:
        running.server.stop()


def test_what_is_measured_has_the_names_that_dashboards_know(own: Running) -> None:
    own.ask(max_tokens=5)
    assert own.metric("prompt_tokens_total") == 2
    assert own.metric("generation_tokens_total") == 5
    assert own.metric("time_to_first_token_seconds_count") == 1
    assert own.metric("inter_token_latency_seconds_count") == 4
    assert own.metric("e2e_request_latency_seconds_count") == 1
    assert own.metric('request_success_total{finished_reason="length"') == 1
    assert own.metric("num_requests_running") == 0
    own.ask(max_tokens=99)
    assert own.metric("request_failure_total") == 1


def test_a_request_that_takes_too_long_is_given_up(folder: Path) -> None:
    running = Running(folder)
    running.service.limits = Limits(context=64, completion_tokens=40, prompts=4, body_bytes=2000, request_s=0.2)
    running.begin()
    try:
        running.parrot.go.clear()
        assert running.ask().status_code == 504
        running.parrot.go.set()
        until(lambda: running.engine.load == (0, 0))
    finally:
        running.end()


@pytest.fixture
def impatient(folder: Path) -> Iterator[Running]:
    """Two connections at once, and half a second for each request."""
    running = Running(folder, limits=replace(LIMITS, connections=2, client_s=0.5)).begin()
    yield running
    running.end()


def connect(running: Running, said: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", running.server.port), timeout=10)
    client.sendall(said)
    return client


def heard(client: socket.socket) -> str:
    """All until the service closes the connection."""
    with client:
        return b"".join(iter(lambda: client.recv(65536), b"")).decode()


def test_one_connection_too_many_is_told_so_and_those_that_say_nothing_free_theirs(impatient: Running) -> None:
    idle = [connect(impatient) for _ in range(2)]
    until(lambda: len(impatient.server._server.server_state.connections) == 2)
    answer = impatient.get("/health")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_connections")
    assert "2 connections are open already" in answer.json()["error"]["message"]
    assert all(heard(client).startswith("HTTP/1.1 408 Request Timeout\r\n") for client in idle)
    assert impatient.get("/health").status_code == 200
    assert impatient.metric('request_failure_total{model_name="parrot",status="408"') == 2


def test_a_request_that_comes_byte_by_byte_is_given_up(impatient: Running) -> None:
    client = connect(impatient)
    began = time.monotonic()
    client.settimeout(0.025)
    said = b""
    while not said and time.monotonic() - began < 8:
        client.sendall(b"G")
        with contextlib.suppress(TimeoutError):
            said = client.recv(100)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began > 0.4
    client.close()


@pytest.mark.parametrize(
    "said",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000,
    ],
)
def test_what_is_not_http_is_refused_like_all_else_and_leaves_nothing_in_the_log(
    said: bytes, impatient: Running, caplog: pytest.LogCaptureFixture
) -> None:
    answer = heard(connect(impatient, said))
    assert answer.startswith("HTTP/1.1 400 Bad Request\r\n")
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    until(lambda: not impatient.server._server.server_state.tasks)
    assert caplog.text == ""


def test_a_body_that_does_not_come_is_given_up_and_its_place_is_free(impatient: Running) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 99\r\n\r\n{{"
    answer = heard(connect(impatient, head.encode()))
    assert answer.startswith("HTTP/1.1 408 ")
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    until(lambda: not impatient.server._server.server_state.tasks)
    until(lambda: not impatient.server._server.server_state.connections)


def test_a_request_that_was_refused_before_its_end_does_not_keep_its_connection(impatient: Running) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9999\r\n\r\n"
    client = connect(impatient, head.encode())
    assert client.recv(65536).startswith(b"HTTP/1.1 413 ")
    until(lambda: not impatient.server._server.server_state.connections)
    client.close()


def test_an_answer_that_takes_long_is_waited_for_on_a_connection_that_may_be_used_again(impatient: Running) -> None:
    impatient.parrot.go.clear()
    threading.Timer(0.8, impatient.parrot.go.set).start()
    with httpx.Client(base_url=impatient.url, headers=impatient.headers, timeout=20) as client:
        body = {"model": MODEL, "prompt": [7], "max_tokens": 2}
        assert client.post("/v1/completions", json=body).status_code == 200
        time.sleep(0.7)
        assert client.get("/health").status_code == 200


def test_a_client_that_takes_nothing_of_its_answer_is_left(impatient: Running) -> None:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    client.connect(("127.0.0.1", impatient.server.port))
    client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 3000)
    until(lambda: impatient.server._server.server_state.connections)
    until(lambda: not impatient.server._server.server_state.connections)
    client.close()


def test_a_port_that_is_taken_is_named_before_anything_is_loaded() -> None:
    taken = bind("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(OSError, match=rf"engine\.port: 127\.0\.0\.1:{port}: .*; use another, or 0"):
        bind("127.0.0.1", port)
    taken.close()
    with pytest.raises(OSError, match=r"engine\.host: no\.such\.host\.invalid: "):
        bind("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("limits", "connections", "then"),
    [((1024, 4096), 512, None), ((1024, 4096), 1000, (1512, 4096)), ((1024, resource.RLIM_INFINITY), 5000, (5512, -1))],
)
def test_connections_may_be_as_many_as_files_may_be_open(
    limits: tuple[int, int], connections: int, then: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: found.append(new))
    allow_files(connections)
    assert found == ([then] if then else [])
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    with pytest.raises(OSError, match=r"engine\.limits\.connections: 9000 need 9512 open files.* 4096 .*; use 3584 or"):
        allow_files(9000)


def test_an_exception_nobody_thought_of_is_an_error_without_its_text(folder: Path) -> None:
    service = Service(MODEL, LIMITS, None)

    def broken() -> Any:
        raise LookupError("a path of the server's own")

    service.ready = broken  # type: ignore[method-assign]
    transport = httpx.ASGITransport(app=make_app(service), raise_app_exceptions=False)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post("/v1/completions", json={"model": MODEL, "prompt": "x"})

    answer = asyncio.run(ask())
    assert (answer.status_code, "path" in answer.text) == (500, False)
