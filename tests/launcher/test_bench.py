"""Load on a service, and the figures of it."""

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Any

import pytest

from launcher.bench import Load, Sample, Target, arrivals, drive, figures, parse_goodput, percentile, prompts
from launcher.errors import InputError

LOAD = Load(num_prompts=4, request_rate=10, input_len=5, output_len=3, vocab=100)


def sample(**fields: Any) -> Sample:
    """Two prompts' worth: the first token after 0.1 s, then one every 0.05 s."""
    usual: dict[str, Any] = {"ttft": 0.1, "itl": [0.05, 0.05], "e2el": 0.2, "prompt_tokens": 5, "output_tokens": 3}
    return Sample(0.0, 0.0, **(usual | fields))


def test_figures_have_the_names_and_meanings_of_vllms() -> None:
    samples = [sample(), sample(ttft=0.3, e2el=0.4), sample(error="503: no", ttft=None, e2el=None)]
    found = figures(samples, 2.0, LOAD)
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["request_throughput"], found["output_throughput"]) == (1.0, 3.0)
    assert found["total_token_throughput"] == 8.0
    assert found["request_goodput"] is None
    assert (found["mean_ttft_ms"], found["median_ttft_ms"]) == pytest.approx((200, 200))
    assert found["p99_ttft_ms"] == pytest.approx(298)
    assert found["std_ttft_ms"] == pytest.approx(100)
    assert found["mean_tpot_ms"] == pytest.approx(50)
    assert found["mean_itl_ms"] == pytest.approx(50)
    assert found["mean_e2el_ms"] == pytest.approx(300)


@pytest.mark.parametrize(
    ("limits", "goodput"), [(["ttft:150"], 0.5), (["ttft:400", "tpot:50.1"], 1.0), (["e2el:199"], 0.0)]
)
def test_goodput_counts_requests_that_keep_every_limit(limits: list[str], goodput: float) -> None:
    load = Load(**{**vars(LOAD), "goodput": parse_goodput(limits)})
    assert figures([sample(), sample(ttft=0.3, e2el=0.4)], 2.0, load)["request_goodput"] == goodput


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:0", "ttft:nan", "itl:5", "speed:1"])
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"--goodput {text}: expected NAME:MILLISECONDS"):
        parse_goodput([text])


def test_without_any_answer_there_are_no_times() -> None:
    found = figures([sample(error="x", ttft=None, e2el=None, itl=[])], 1.0, LOAD)
    assert found["completed"] == 0
    assert all(found[f"{kind}_{name}_ms"] is None for kind in ("mean", "p99") for name in ("ttft", "tpot", "itl"))


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(Load(**{**vars(LOAD), "num_prompts": 20_000}))
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0
    assert fmean(gaps) == pytest.approx(0.1, rel=0.03)
    assert pstdev(gaps) == pytest.approx(0.1, rel=0.05)  # an exponential's mean and deviation are the same
    burst = arrivals(Load(**{**vars(LOAD), "num_prompts": 20_000, "burstiness": 0.25}))
    assert pstdev(b - a for a, b in pairwise(burst)) == pytest.approx(0.2, rel=0.1)
    assert arrivals(Load(**{**vars(LOAD), "request_rate": float("inf")})) == [0.0] * 4


def test_a_seed_makes_the_same_load_and_prompts_differ() -> None:
    assert [*prompts(LOAD)] == [*prompts(LOAD)]
    assert len({tuple(prompt) for prompt in prompts(LOAD)}) == 4
    assert all(0 <= token < 100 for prompt in prompts(LOAD) for token in prompt)


def test_percentiles_lie_between_neighbours() -> None:
    values = sorted(random.Random(0).random() for _ in range(11))
    assert [percentile(values, p) for p in (0, 50, 100)] == [values[0], values[5], values[10]]
    assert percentile([1.0, 3.0], 75) == 2.5
    assert percentile([], 99) is None


class _Slow(BaseHTTPRequestHandler):
    """Answers three tokens, 50 ms apart; the second request gets an error in its stream, the third a status."""

    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        number = len(self.asked)
        self.send_response(503 if number == 3 else 200)
        self.end_headers()
        if number == 3:
            self.wfile.write(b'{"error": {"message": "full"}}')
            return
        for n in range(3):
            if number == 2 and n == 1:
                self._event({"error": {"message": "it broke"}})
                return
            time.sleep(0.05)
            self._event({"choices": [{"text": "x"}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


@pytest.fixture
def slow() -> Iterator[str]:
    _Slow.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_requests_are_sent_at_their_times_and_failures_are_told(slow: str) -> None:
    seen: list[Sample] = []
    samples, duration = asyncio.run(drive(Target(slow, "m", "k"), LOAD, seen.append))
    assert len(samples) == len(seen) == len(_Slow.asked) == 4
    assert [s.error for s in sorted(samples, key=lambda s: s.begun)][1:3] == [
        "it broke",
        '503: {"error": {"message": "full"}}',
    ]
    good = [s for s in samples if not s.error]
    assert all(s.ttft is not None and s.ttft >= 0.05 and len(s.itl) == 2 and s.output_tokens == 3 for s in good)
    assert all(s.begun >= s.planned for s in samples)
    assert duration >= arrivals(LOAD)[-1]
    assert _Slow.asked[0]["prompt"] == next(prompts(LOAD))
    assert (_Slow.asked[0]["max_tokens"], _Slow.asked[0]["ignore_eos"]) == (3, True)


def test_a_service_is_asked_directly_whatever_proxy_the_site_has(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    samples, _ = asyncio.run(drive(Target(slow, "m", "k"), LOAD, lambda _: None))
    assert any(not sample.error for sample in samples)


def test_a_service_that_is_not_there_fails_every_request() -> None:
    samples, _ = asyncio.run(drive(Target("http://127.0.0.1:9", "m"), LOAD, lambda _: None))
    assert all(s.error.startswith("ConnectError") for s in samples)
