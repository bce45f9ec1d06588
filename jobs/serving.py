"""What the launcher asks of a serve job's ranks, and how they tell where they serve. Needs no torch."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

PROMPT = "The capital of France is"
TOKENS, FEWEST = 8, 2
"""Of the answer that a service gives before it is ready: the first is of the prefill, the second of a decode."""

DRAINED_S = 10.0
"""What the ranks of a service need to end after its last answer."""

ENDPOINT = "endpoint.json"
"""In the run's folder once the service is ready: where it listens."""


class WrongAnswerError(RuntimeError):
    """The service does not answer as it must before it is ready."""


@dataclass(frozen=True)
class ServeLimits:
    """What a client may ask for, and how many at once."""

    context: int
    """Tokens of a prompt and its answer together."""
    sequences: int
    """Sequences that are worked on at once."""
    body_bytes: int
    completion_tokens: int
    prompts: int
    """Prompts of one text completion."""
    queue: int
    """Requests that may wait for a place."""
    step_tokens: int
    """Tokens of one step over all sequences."""
    request_s: int
    connections: int = 512
    client_s: int = 30


@dataclass(frozen=True)
class ServeRequest:
    """How an engine is brought up, and its HTTP service."""

    engine: Literal["embedded", "tokenspeed", "vllm", "sglang"]
    host: str
    port: int
    """0: any free one."""
    model: str
    """The model's name for clients."""
    api_key_env: str | None
    api_key_file: str | None
    limits: ServeLimits
    ready_s: int
    drain_s: int
    answer: str | None
    """File with a recorded answer."""
    dtype: Literal["bf16", "f32"]
    """What the embedded engine computes with, but for the experts."""
    shard_dense: bool
    """Whether the ranks share out what is not experts, or each holds it all."""
    command: tuple[str, ...] | None
    args: dict[str, str | int | float | bool]
    env: dict[str, str | int]
    """Of a program of its own: how it is started."""
    commands: tuple[tuple[str, ...], ...] = ()
    """Likewise, by node; {head}, {meeting} and {http} in a word are filled in by the nodes."""
    key_variable: str | None = None
    """Likewise: where it takes the key that clients must send."""
    health_s: int = 0
    """Likewise: after how long without an answer of its health address it is taken for hung; 0: never."""

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "ServeRequest":
        """From what `asdict` made and JSON kept."""
        command = fields["command"]
        return cls(
            **{
                **fields,
                "limits": ServeLimits(**fields["limits"]),
                "command": None if command is None else tuple(command),
                "commands": tuple(map(tuple, fields.get("commands", ()))),
            }
        )

    def api_key(self) -> str | None:
        """The key that clients must send, None where none is asked for.

        Raises
        ------
        ValueError
            If the variable is not set, the file cannot be read, or what is there is empty; never shows the key.
        """
        if self.api_key_env is not None:
            key, where = os.environ.get(self.api_key_env, ""), f"engine.api_key.env: {self.api_key_env} is not set here"
        elif self.api_key_file is not None:
            where = f"engine.api_key.file: {self.api_key_file}: empty"
            try:
                key = Path(self.api_key_file).read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"engine.api_key.file: {self.api_key_file}: {type(error).__name__}") from None
        else:
            return None
        if not key.strip():
            raise ValueError(where)
        return key.strip()


@dataclass(frozen=True)
class Endpoint:
    """Where a service listens. `attempt`: of which submission of the run."""

    host: str
    """Of the node."""
    address: str
    """That it is bound to."""
    port: int
    model: str
    needs_key: bool
    attempt: int

    @property
    def url(self) -> str:
        """The base of its paths: http://HOST:PORT, by the node's name where it listens to others than itself."""
        name = self.host if self.address in ("0.0.0.0", "::") else self.address
        return f"http://[{name}]:{self.port}" if ":" in name else f"http://{name}:{self.port}"

    def save(self, run_dir: Path) -> None:
        """Tell it, at once and whole."""
        unfinished = run_dir / f".{ENDPOINT}.{os.getpid()}"
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n")
        unfinished.replace(run_dir / ENDPOINT)

    @classmethod
    def load(cls, run_dir: Path) -> "Endpoint | None":
        """What was told, None before that, and after the service has ended well."""
        try:
            return cls(**json.loads((run_dir / ENDPOINT).read_text()))
        except (OSError, ValueError, TypeError):
            return None


class Ending:
    """What a rank that serves does when it is told to end: drain, and end by itself before its time is over."""

    def __init__(self) -> None:
        self._drain: Callable[[str], float] | None = None

    def by(self, drain: Callable[[str], float]) -> None:
        """From now on `drain` is called with why; it begins to drain and returns how many seconds that may take."""
        self._drain = drain

    def grace(self, why: str) -> float:
        """Seconds that the process has after a signal; none while there is nothing to drain."""
        return self._drain(why) if self._drain is not None else 0.0
