"""What the HTTP service needs to know: the engine, once there is one, its tokenizer, and the limits."""

import time
from dataclasses import dataclass, field, replace

from engine.api.errors import ApiError
from engine.api.metrics import Metrics
from engine.api.schema import ChatRequest, TextRequest
from engine.core import Engine
from engine.sequence import Sampling, Wish
from engine.text import ChatError, Tokenizer


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    context: int
    """Tokens of a prompt and its answer together."""
    completion_tokens: int
    prompts: int
    body_bytes: int
    request_s: float
    connections: int = 512
    """Of clients, open at once."""
    client_s: float = 30
    """Within which a request must be there, once it has begun, and a client must take something of its answer."""


@dataclass
class Service:
    """One model's. `engine` and `tokenizer` are None until it is loaded; `loading` says how far that is."""

    model: str
    limits: Limits
    key: str | None = None
    engine: Engine | None = None
    tokenizer: Tokenizer | None = None
    loading: str = "starting"
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.model, self._gauges)

    @property
    def phase(self) -> str:
        """starting, loading, warming, ready, serving, draining, or broken; stalled while a step does not end."""
        if self.engine is None:
            return self.loading
        if self.engine.broken:
            return "broken"
        return "stalled" if self.engine.stalled else self.engine.phase

    def ready(self) -> tuple[Engine, Tokenizer]:
        """The engine, if it takes requests. Raises `ApiError` (503) if it does not."""
        if self.engine is None or self.tokenizer is None or self.phase not in ("ready", "serving"):
            raise ApiError(503, f"the service is {self.phase}", code="not_ready")
        return self.engine, self.tokenizer

    def check_model(self, name: str) -> None:
        """Raise `ApiError` (404) if another model is asked for."""
        if name != self.model:
            raise ApiError(
                404, f"there is no model {name!r}; there is {self.model!r}", param="model", code="model_not_found"
            )

    def chat_wishes(self, asked: ChatRequest, tokenizer: Tokenizer) -> list[Wish]:
        """What a chat asks of the engine, a wish a choice. Raises `ApiError` (400) beyond the limits."""
        try:
            prompt = tokenizer.chat([message.plain() for message in asked.messages])
        except ChatError as error:
            raise ApiError(400, str(error), param="messages") from None
        return self._choices(asked, [(prompt, "messages")], tokenizer)

    def text_wishes(self, asked: TextRequest, tokenizer: Tokenizer) -> list[Wish]:
        """Likewise of text completions: the choices of the first prompt, then those of the next."""
        prompts = [p if isinstance(p, list) else tokenizer.encode(p) for p in asked.prompts]
        if not prompts:
            raise ApiError(400, "prompt: there is none", param="prompt")
        return self._choices(asked, [(prompt, "prompt") for prompt in prompts], tokenizer)

    def _choices(
        self, asked: ChatRequest | TextRequest, prompts: list[tuple[list[int], str]], tokenizer: Tokenizer
    ) -> list[Wish]:
        choices = asked.n or 1
        if choices * len(prompts) > self.limits.prompts:
            raise ApiError(
                400,
                f"n × prompts is {choices} × {len(prompts)}, at most {self.limits.prompts} are answered at once",
                param="n" if choices > 1 else prompts[0][1],
            )
        wishes = []
        for prompt, param in prompts:
            wish = self._wish(asked, tuple(prompt), param, tokenizer)
            for choice in range(choices):  # the choices of a seed differ, and are the same another time
                seed = wish.sampling.seed
                own = replace(wish.sampling, seed=None if seed is None else seed + choice)
                wishes.append(replace(wish, sampling=own))
        return wishes

    def _wish(
        self, asked: ChatRequest | TextRequest, prompt: tuple[int, ...], param: str, tokenizer: Tokenizer
    ) -> Wish:
        if not prompt:
            raise ApiError(400, f"{param}: is empty", param=param)
        wrong = next((token for token in prompt if not 0 <= token < tokenizer.vocab), None)
        if wrong is not None:
            raise ApiError(400, f"{param}: token {wrong} is not one of 0 to {tokenizer.vocab - 1}", param=param)
        most = self._most_tokens(asked, len(prompt), param)
        bias = tuple((asked.logit_bias or {}).items())
        wrong = next((token for token, _ in bias if not 0 <= token < tokenizer.vocab), None)
        if wrong is not None:
            raise ApiError(400, f"logit_bias: there is no token {wrong}", param="logit_bias")
        return Wish(
            prompt=prompt,
            most_tokens=most,
            sampling=Sampling(
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_p=asked.top_p or 1.0,
                top_k=asked.top_k or 0,
                presence_penalty=asked.presence_penalty or 0.0,
                frequency_penalty=asked.frequency_penalty or 0.0,
                bias=bias,
                seed=asked.seed,
            ),
            stop_tokens=frozenset() if asked.ignore_eos else tokenizer.end_tokens,
            fewest_tokens=min(asked.min_tokens or 0, most),
            logprobs=asked.logprobs_count,
        )

    def _most_tokens(self, asked: ChatRequest | TextRequest, prompt: int, param: str) -> int:
        limits, wanted = self.limits, asked.most_tokens
        left = limits.context - prompt
        if left < 1 or (wanted is not None and wanted > left):
            raise ApiError(
                400,
                f"{param}: {prompt} tokens, and {wanted or 1} for the answer, are more than the model's context of "
                f"{limits.context} tokens here",
                param=param,
                code="context_length_exceeded",
            )
        if wanted is not None and wanted > limits.completion_tokens:
            raise ApiError(
                400, f"max_tokens: {wanted} is more than {limits.completion_tokens}, the most here", param="max_tokens"
            )
        return wanted or min(left, limits.completion_tokens)

    def _gauges(self) -> dict[str, tuple[str, float]]:
        running, waiting = self.engine.load if self.engine else (0, 0)
        places = self.engine.places if self.engine else 0
        held = self.engine.tokens_held if self.engine else 0
        return {
            "num_requests_running": ("Sequences that are worked on.", running),
            "num_requests_waiting": ("Sequences that wait for a place.", waiting),
            "kv_cache_usage_perc": (
                "Share of the tokens that may be held: 1 is all.",
                held / (places * self.limits.context) if places else 0.0,
            ),
        }
