"""The keys of `engine`: what a serve job brings up, where it listens, what it takes, and how it ends."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from launcher.fields import STRICT, Option, Text, Variable

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _Section(BaseModel):
    model_config = STRICT


class ApiKey(_Section):
    """Where the key that clients must send is found: a variable or a file of the node of rank 0.

    The key itself stands in no YAML, plan, script, log or report.
    """

    env: Variable | None = None
    file: Text | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.env is None) == (self.file is None):
            raise ValueError("give either env (a variable's name) or file (a path)")
        return self


class EngineLimits(_Section):
    """What a client may ask for; more is a 4xx error. memory.context and memory.batch are the limits of a sequence's
    tokens and of sequences at once.

    body_kb: of a request's body. completion_tokens: of one answer. prompts: of one text completion. queue: requests
    that wait for a place; more are told to come again (429). step_tokens: of one step over all sequences, so a longer
    prompt is read in several. request_s: of one request, from its arrival to its last token. connections: of clients,
    open at once; more are told 503. client_s: within which a request must be there whole, once its connection is open
    or it has begun (408), and a client must take something of its answer.
    """

    body_kb: int = Field(default=1024, ge=1, le=10**6)
    completion_tokens: int = Field(default=4096, ge=1, le=2**24)
    prompts: int = Field(default=8, ge=1, le=10**4)
    queue: int = Field(default=64, ge=0, le=10**6)
    step_tokens: int = Field(default=512, ge=1, le=2**24)
    request_s: int = Field(default=600, ge=1, le=10**6)
    connections: int = Field(default=512, ge=1, le=10**5)
    client_s: int = Field(default=30, ge=1, le=10**5)


class Engine(_Section):
    """Of a serve job: which engine, and its HTTP service.

    embedded: transformers' model with this project's experts, in the ranks themselves; its service runs in rank 0. The
    others are programs of their own, started on every node with `args` after the flags that follow from the topology.
    port 0: any free one. served_name: the model's name for clients, by default model.name. restarts: how often the
    ranks are brought up again after one of them has died, before the service has failed. ready_s: from a rank's start
    to the first answer. drain_s: for what is running when the service is told to end, by cancel or the time limit.
    answer: a file with a recorded answer (see docs/serving.md), which the service must give before it is ready. dtype:
    of what the embedded engine computes beside the experts; f32 to compare the experts alone. command, args, env,
    health_s: of an engine that is a program; one that was ready and whose health address has not answered for health_s
    is taken for hung, and has failed (0: it is not asked). allow_unknown_args: lets flags in args pass that the engine
    is not known to have (launcher/engines/flags.yaml).
    """

    name: Literal["embedded", "tokenspeed", "vllm", "sglang"] = "embedded"
    host: Text = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    served_name: Text | None = None
    api_key: ApiKey | None = None
    limits: EngineLimits = EngineLimits()
    restarts: int = Field(default=0, ge=0, le=1000)
    ready_s: int = Field(default=3600, ge=1, le=10**6)
    drain_s: int = Field(default=20, ge=0, le=3600)
    health_s: int = Field(default=120, ge=0, le=10**6)
    answer: Text | None = None
    dtype: Literal["bf16", "f32"] = "bf16"
    command: Annotated[list[Text], Field(min_length=1)] | None = None
    args: dict[Option, Text | int | float | bool] = {}
    allow_unknown_args: bool = False
    env: dict[Variable, Annotated[str, Field(pattern=r"^[^\x00]*$")] | int] = {}

    @property
    def public(self) -> bool:
        """Whether others than this host's own processes may reach the service."""
        return self.host not in LOOPBACK
