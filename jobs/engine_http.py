"""What is asked of an engine's HTTP service: whether it is ready, a first answer, and what it has counted."""

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.serving import FEWEST, PROMPT, TOKENS, ServeRequest, WrongAnswerError

# The engine runs on this node: a proxy that the site's environment names would not reach it, and would see the key.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

_BROKEN = (OSError, ValueError, http.client.HTTPException)
"""What asking raises where nobody answers, or not to the end, or not in HTTP."""


class NotReadyError(RuntimeError):
    """The engine does not answer, or not as it must, before it is ready."""


def warm(url: str, serve: ServeRequest, key: str | None) -> dict[str, Any]:
    """One answer: to the recorded prompt, or to a sentence. It must be there, and as recorded.

    Raises
    ------
    WrongAnswerError, NotReadyError
        If it is not, or the service does not answer.
    """
    recorded = _recorded(serve.answer) if serve.answer is not None else None
    body = {
        "model": serve.model,
        "prompt": recorded["prompt"] if recorded else PROMPT,
        "max_tokens": len(recorded["tokens"]) if recorded else TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, tokens, times = "", 0, [time.monotonic()]
    for chunk in _stream(url, body, key, serve.limits.request_s):
        try:
            said = "".join(choice["text"] for choice in chunk["choices"])
            tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else tokens
        except (KeyError, TypeError):
            raise NotReadyError(f"{url}: not a piece of a completion: {json.dumps(chunk)[:300]}") from None
        if said:
            text += said
            times.append(time.monotonic())
    if not text.strip() or tokens < FEWEST:
        raise WrongAnswerError(
            f"{url}: answered {text!r}, {tokens} tokens; expected {body['max_tokens']} that say something"
        )
    if recorded is not None and text != recorded["text"]:
        raise WrongAnswerError(
            f"engine.answer: {serve.answer}: the service answers {text!r}, recorded is {recorded['text']!r}"
        )
    return {
        "answer": text,
        "tokens": tokens,
        "recorded": recorded is not None,
        "prefill_ms": (times[1] - times[0]) * 1e3,
        "decode_ms": (times[-1] - times[1]) / (tokens - 1) * 1e3,
    }


def _recorded(path: str) -> dict[str, Any]:
    """A recorded answer, in the form that the embedded engine writes: what counts is its text, since a program does
    not tell token ids.

    Raises
    ------
    WrongAnswerError
        If the file is none.
    """
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if not (found["prompt"] and found["tokens"] and isinstance(found["text"], str)):
            raise ValueError("it must hold a prompt, the tokens of its answer, and their text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WrongAnswerError(f"engine.answer: {path}: no recorded answer: {type(error).__name__}: {error}") from None
    return found


def counter(metrics: str | None, name: str) -> float | None:
    """The sum over a counter's labels in Prometheus's text; None where it is not there, or has counted nothing that a
    counter can: NaN, Inf, less than 0."""
    sample = re.compile(rf"{re.escape(name)}(?:{{.*}})?\s+(\S+)(?:\s+-?\d+)?\s*")  # a time may stand behind it
    found = [match[1] for line in (metrics or "").splitlines() if (match := sample.fullmatch(line))]
    values = [_number(text) for text in found]
    return sum(values) if values and all(math.isfinite(value) and value >= 0 for value in values) else None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key is not None else {}


def answers(url: str, key: str | None, timeout_s: float = 5) -> bool:
    """Whether it is answered 200."""
    return get(url, key, timeout_s) is not None


def get(url: str, key: str | None, timeout_s: float = 5) -> str | None:
    """The body, None unless it is answered 200."""
    try:
        with _DIRECT.open(urllib.request.Request(url, headers=_headers(key)), timeout=timeout_s) as answer:
            body: str = answer.read().decode(errors="replace")
            return body if answer.status == 200 else None
    except _BROKEN:
        return None


def _stream(url: str, body: dict[str, Any], key: str | None, timeout_s: float) -> Iterator[Any]:
    """The pieces of a streamed answer (server-sent events)."""
    headers = {"Content-Type": "application/json", **_headers(key)}
    asked = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with _DIRECT.open(asked, timeout=timeout_s) as answer:
            for line in answer:
                field, _, value = line.decode(errors="replace").partition(":")
                if field == "data" and value.strip() != "[DONE]":
                    yield json.loads(value)
    except urllib.error.HTTPError as error:
        told = error.read().decode(errors="replace")[:300]
        raise NotReadyError(f"{url}: HTTP {error.code}: {told}") from None
    except _BROKEN as error:
        raise NotReadyError(f"{url}: {error}") from None
