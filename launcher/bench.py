"""Load on a service that does not wait for its answers (open loop), and what users feel of it.

Names and meanings are those of `vllm bench serve`: TTFT, time to first token; ITL, time between a token and the next;
TPOT, time per output token after the first, (E2EL − TTFT) / (tokens − 1); E2EL, end-to-end latency; goodput, requests a
second that kept all limits.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median, pstdev
from typing import Any

import httpx

from launcher.errors import InputError

GOALS = ("ttft", "tpot", "e2el")
_PERCENTILES = (99,)


@dataclass(frozen=True)
class Load:
    """What is asked of the service. request_rate: a second, on average; arrivals are a gamma process of that
    burstiness, 1 being Poisson's. Prompts are random tokens of `vocab`, answers exactly output_len tokens."""

    num_prompts: int
    request_rate: float
    input_len: int
    output_len: int
    vocab: int
    seed: int = 0
    burstiness: float = 1.0
    goodput: tuple[tuple[str, float], ...] = ()
    """Limits that a request must keep, in milliseconds."""


@dataclass(frozen=True)
class Target:
    """A service: its base URL, the model's name, and the key that it wants."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)


@dataclass
class Sample:
    """One request, in seconds. `begun`: since the load began, as it should have been and as it was."""

    planned: float
    begun: float = 0.0
    ttft: float | None = None
    itl: list[float] = field(default_factory=list)
    e2el: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def tpot(self) -> float | None:
        """None of an answer of one token."""
        if self.e2el is None or self.ttft is None or self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)


def parse_goodput(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Limits from texts like `ttft:500`. Raises `InputError` for what is none."""
    found = []
    for text in texts:
        name, _, value = text.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = 0.0
        if name not in GOALS or not 0 < limit < float("inf"):
            raise InputError(f"--goodput {text}: expected NAME:MILLISECONDS with a name of {', '.join(GOALS)}")
        found.append((name, limit))
    return tuple(found)


def arrivals(load: Load) -> list[float]:
    """Seconds at which the requests are sent, the first at 0."""
    if load.request_rate == float("inf"):
        return [0.0] * load.num_prompts
    generator = random.Random(load.seed)
    scale = 1 / (load.request_rate * load.burstiness)
    gaps = (generator.gammavariate(load.burstiness, scale) for _ in range(load.num_prompts - 1))
    return [0.0, *itertools.accumulate(gaps)] if load.num_prompts else []


def prompts(load: Load) -> Iterator[list[int]]:
    """Random tokens; no two prompts begin alike, so that no cache of prefixes helps."""
    generator = random.Random(load.seed + 1)
    for _ in range(load.num_prompts):
        yield [generator.randrange(load.vocab) for _ in range(load.input_len)]


async def drive(target: Target, load: Load, on_sample: Callable[[Sample], None]) -> tuple[list[Sample], float]:
    """Send every request at its time, however the service keeps up. All samples, and the seconds until the last."""
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    began = time.perf_counter()
    # A transport of our own: a proxy that the environment names would not reach a node, and would see the key.
    direct = httpx.AsyncHTTPTransport(limits=limits)
    async with httpx.AsyncClient(base_url=target.url, headers=headers, transport=direct, timeout=None) as client:

        async def one(planned: float, prompt: list[int]) -> Sample:
            await asyncio.sleep(planned - (time.perf_counter() - began))
            sample = Sample(planned, time.perf_counter() - began)
            await _ask(client, target.model, prompt, load.output_len, sample)
            on_sample(sample)
            return sample

        times = zip(arrivals(load), prompts(load), strict=True)
        samples = await asyncio.gather(*(one(planned, prompt) for planned, prompt in times))
    return [*samples], time.perf_counter() - began


async def _ask(client: httpx.AsyncClient, model: str, prompt: list[int], tokens: int, sample: Sample) -> None:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = last = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                sample.error = f"{response.status_code}: {text[:500]}"
                return
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ").strip()
                if not data or data == "[DONE]":
                    continue
                chunk, now = json.loads(data), time.perf_counter()
                if "error" in chunk:
                    sample.error = str(chunk["error"].get("message", chunk["error"]))
                    return
                if chunk.get("choices"):
                    if sample.ttft is None:
                        sample.ttft = now - began
                    else:
                        sample.itl.append(now - last)
                    last = now
                if chunk.get("usage"):
                    sample.prompt_tokens = chunk["usage"]["prompt_tokens"]
                    sample.output_tokens = chunk["usage"]["completion_tokens"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        sample.error = f"{type(error).__name__}: {error}"
        return
    if sample.ttft is None or not sample.output_tokens:
        sample.error = "the answer was empty"
        return
    sample.e2el = last - began


def figures(samples: Sequence[Sample], duration: float, load: Load) -> dict[str, Any]:
    """What `vllm bench serve` reports; times in milliseconds, None where nothing was measured."""
    good = [sample for sample in samples if not sample.error]
    read, written = sum(s.prompt_tokens for s in good), sum(s.output_tokens for s in good)
    kept = sum(_keeps(sample, load.goodput) for sample in good)
    result: dict[str, Any] = {
        "num_prompts": load.num_prompts,
        "request_rate": None if load.request_rate == float("inf") else load.request_rate,
        "burstiness": load.burstiness,
        "duration": duration,
        "completed": len(good),
        "failed": len(samples) - len(good),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": len(good) / duration,
        "request_goodput": kept / duration if load.goodput else None,
        "output_throughput": written / duration,
        "total_token_throughput": (read + written) / duration,
    }
    measured = {
        "ttft": [s.ttft for s in good if s.ttft is not None],
        "tpot": [s.tpot for s in good if s.tpot is not None],
        "itl": [gap for s in good for gap in s.itl],
        "e2el": [s.e2el for s in good if s.e2el is not None],
    }
    for name, values in measured.items():
        result |= _spread(name, values)
    late = [sample.begun - sample.planned for sample in samples]
    return result | {"late_ms_max": max(late, default=0.0) * 1e3}


def _keeps(sample: Sample, goals: Sequence[tuple[str, float]]) -> bool:
    values = {"ttft": sample.ttft, "tpot": sample.tpot or 0.0, "e2el": sample.e2el}
    return all((value := values[name]) is not None and value * 1e3 <= limit for name, limit in goals)


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    values = sorted(value * 1e3 for value in seconds)
    found: dict[str, Callable[[Sequence[float]], float]] = {"mean": fmean, "median": median, "std": pstdev}
    spread = {f"{kind}_{name}_ms": of(values) if values else None for kind, of in found.items()}
    return spread | {f"p{p}_{name}_ms": percentile(values, p) for p in _PERCENTILES}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Of values in rising order, between neighbours linearly."""
    if not values:
        return None
    at = (len(values) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def as_line(sample: Sample) -> str:
    """One request as a line of JSON."""
    return json.dumps(asdict(sample)) + "\n"
