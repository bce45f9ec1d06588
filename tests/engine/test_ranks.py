"""A service of four ranks, as its users meet it: by the official client, by curl, and by the launcher's commands.

One service for all of it: what ends it stands last.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from launcher.events import read_events
from moe_ep.synthetic import TINY
from tests.checkout import CONFIGS, importable
from tests.engine.dense import greedy
from tests.waiting import PATIENCE_S, until

MODEL = "tiny-chat"
KEY = "the key of these tests"
CHAT: Any = [{"role": "user", "content": "Tell me something."}]


class Service:
    """`launcher submit`, and the other commands on its run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | importable() | {"COLUMNS": "200", "TEST_KEY": KEY}
        keys = ("engine.port=0", "engine.restarts=1", "engine.drain_s=30", "engine.api_key.env=TEST_KEY")
        command = [*self._launcher("submit"), str(CONFIGS / "serve-tiny.yaml"), *(f"--set={key}" for key in keys)]
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(command, cwd=folder, env=self.environment, stdout=self.log, stderr=self.log)

    def launcher(self, *args: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self._launcher(*args),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def wait_until_ready(self, attempt: int = 0) -> None:
        log = self.folder / "log"

        def ready() -> bool:
            assert self.process.poll() is None, log.read_text()
            return any(e.stage == "ready" and e.attempt == attempt and e.rank == 0 for e in read_events(self.run_dir))

        until(ready, log.read_text)
        until((self.run_dir / "endpoint.json").exists, log.read_text)

    @property
    def run_dir(self) -> Path:
        found = [*self.folder.glob("runs/serve-tiny/*")]
        return found[0] if found else self.folder

    @property
    def url(self) -> str:
        return self.launcher("url", "serve-tiny").stdout.strip()

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.launcher("status", "serve-tiny", "--json").stdout)["runs"][0]
        return status

    def _launcher(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "launcher", *args]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"))
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.process.send_signal(signal.SIGTERM)
        service.process.wait(60)
        service.log.close()


@pytest.fixture(scope="module")
def url(service: Service) -> str:
    return service.url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=60, max_retries=0)


def test_a_chat_is_answered_whole_and_in_pieces_alike(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 12, "temperature": 0}
    asked |= {"extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].usage == whole.usage
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"


def test_a_seed_says_the_same_again_and_choices_differ(client: openai.OpenAI) -> None:
    def choices() -> list[str | None]:
        found = client.chat.completions.create(
            model=MODEL, messages=CHAT, max_tokens=8, temperature=1.5, seed=4, n=3, top_p=0.9
        )
        return [choice.message.content for choice in found.choices]

    first = choices()
    assert len(set(first)) == 3
    assert choices() == first


def test_chats_tell_log_probabilities(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=4,
        extra_body={"ignore_eos": True},
    )
    assert found.choices[0].logprobs is not None
    lines = found.choices[0].logprobs.content
    assert lines is not None
    assert [len(line.top_logprobs) for line in lines] == [4, 4, 4]
    assert all(line.logprob == line.top_logprobs[0].logprob for line in lines)


@pytest.mark.parametrize("length", [20, 150, 300])
def test_what_comes_by_http_is_what_the_dense_model_says(
    length: int, client: openai.OpenAI, dense: DeepseekV4ForCausalLM
) -> None:
    """EP=4, attention shared out over 4 ranks, prompts read in pieces, against transformers' own experts."""
    prompt = torch.randint(7, TINY.vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    found = client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=10,
        temperature=0,
        logprobs=20,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
    )
    told = found.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.top_logprobs is not None
    logits, answer = greedy(dense, prompt, 10)
    assert [int(token.removeprefix("token_id:")) for token in told.tokens] == answer
    expected = logits.log_softmax(-1)
    differences = [abs(v - float(expected[int(k.removeprefix("token_id:"))])) for k, v in told.top_logprobs[0].items()]
    assert len(differences) == 20
    assert max(differences) < 0.3


def test_requests_of_all_sizes_at_once_get_their_own_answers(client: openai.OpenAI) -> None:
    """More than there are places; each is the same as alone."""
    prompts = [[7 + n] * (1 + 13 * n) for n in range(12)]

    def answer(prompt: list[int]) -> str:
        made = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4 + len(prompt) % 7, temperature=0)
        text: str = made.choices[0].text
        return text

    alone = [answer(prompt) for prompt in prompts[::4]]
    found: dict[int, str] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: answer(prompts[n])})) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(0, 12, 4)] == alone
    assert len(found) == 12


def test_the_client_knows_the_errors(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.chat.completions.create(model="other", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="more than the model's context of 2048"):
        client.completions.create(model=MODEL, prompt=[7] * 3000)
    with pytest.raises(openai.AuthenticationError, match="a key is needed"):
        openai.OpenAI(base_url=f"{url}/v1", api_key="no", max_retries=0).models.list()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_is_answered(url: str) -> None:
    def curl(path: str, *args: str) -> str:
        command = ["curl", "-sS", "-N", "-H", f"Authorization: Bearer {KEY}", *args, f"{url}{path}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout

    asked = {"model": MODEL, "prompt": "Once", "max_tokens": 3, "stream": True, "temperature": 0, "ignore_eos": True}
    lines = [line for line in curl("/v1/completions", "-d", json.dumps(asked)).split("\n\n") if line]
    assert len(lines) == 4
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[2][6:])["choices"][0]["finish_reason"] == "length"
    assert json.loads(curl("/ready"))["status"] == "serving"
    assert "vllm:generation_tokens_total" in curl("/metrics")


def test_status_says_what_the_service_does(service: Service) -> None:
    status = service.status()
    assert status["state"] == "running"
    assert status["progress"].startswith("serving")
    assert len(status["ranks"]) == 4
    warm = [e for e in read_events(service.run_dir) if (e.rank, e.stage, e.event) == (0, "warming", "end")]
    assert len(warm[0].data["tokens"]) == 8
    assert warm[0].data["prefill_ms"] > 0
    stages = [e.stage for e in read_events(service.run_dir) if e.rank == 3 and e.event == "begin"]
    assert stages == ["starting", "selector", "loading", "warming", "ready", "serving"]


def test_bench_reports_what_users_feel(service: Service) -> None:
    sizes = ("--num-prompts=6", "--input-len=20", "--output-len=5", "--request-rate=4")
    done = service.launcher("bench", "serve-tiny", *sizes, "--goodput=ttft:60000", "--goodput=tpot:0.0001", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["completed"], found["failed"], found["total_input_tokens"]) == (6, 0, 120)
    assert found["total_output_tokens"] == 30
    assert found["request_goodput"] == 0  # no answer is that fast
    assert found["output_throughput"] == pytest.approx(30 / found["duration"])
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert 0 < found[f"median_{name}_ms"] <= found[f"p99_{name}_ms"]
    assert found["mean_ttft_ms"] < found["mean_e2el_ms"]
    (lines,) = service.run_dir.glob("bench-*.jsonl")
    assert len(lines.read_text().splitlines()) == 6


def test_a_key_stands_in_no_file_of_the_run(service: Service) -> None:
    files = [file for file in service.run_dir.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


def test_when_a_rank_dies_clients_get_errors_and_the_service_comes_back(
    service: Service, client: openai.OpenAI
) -> None:
    pids = {e.rank: e.data["pid"] for e in read_events(service.run_dir) if e.event == "started"}
    asked: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 500, "extra_body": {"ignore_eos": True}}
    whole: list[BaseException] = []

    def ask() -> None:
        try:
            client.completions.create(**asked)
        except openai.APIError as error:
            whole.append(error)

    def at_work() -> float:
        lines = httpx.get(f"{service.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_"))

    stream = client.completions.create(**asked, stream=True)
    next(stream)
    waiting = [threading.Thread(target=ask) for _ in range(9)]  # more than have a place: some wait in the queue
    for thread in waiting:
        thread.start()
    until(lambda: at_work() >= 10)
    os.kill(pids[2], signal.SIGKILL)
    killed = time.monotonic()
    # What the service still says of it, or else the end of the connection.
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(stream)
    for thread in waiting:
        thread.join(20)
    assert time.monotonic() - killed < 20
    assert len(whole) == len(waiting)
    service.wait_until_ready(attempt=1)
    again = openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, timeout=60, max_retries=0)
    assert again.completions.create(model=MODEL, prompt="Once", max_tokens=2).usage is not None
    assert "the service broke: starting it again (1 restarts left)" in (service.folder / "log").read_text()
    noted = [e.data["rank"] for e in read_events(service.run_dir) if e.event == "vanished"]
    assert noted == [2]


def test_cancel_lets_an_answer_finish_and_the_run_is_completed(service: Service) -> None:
    url = service.url
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=60, max_retries=0)
    asked: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(**asked, stream=True)
    next(stream)
    assert service.launcher("cancel", "serve-tiny").returncode == 0
    assert [piece.choices[0].finish_reason for piece in stream][-1] == "length"
    assert service.process.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    assert service.status()["state"] == "completed"
    ended = service.launcher("url", "serve-tiny")
    assert (ended.returncode, "completed" in ended.stderr) == (1, True)
    report = json.loads((service.run_dir / "report.json").read_text())
    assert report["run"]["state"] == "completed"
    assert "draining" in report["ranks"][3]["stages"]
    assert report["service"]["restarts"] == 1
    assert report["service"]["requests"] == {"length": 2}
    assert report["service"]["answer_tokens"] == 2 + 60
