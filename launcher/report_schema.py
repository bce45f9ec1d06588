"""The form of report.json: what every key is, published as a JSON schema, and older versions brought up to it."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launcher.errors import InputError
from launcher.files import no_number

SCHEMA = "moe-ep/probe-report"
SCHEMA_VERSION = 2


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunPart(_Part):
    """The run. Times are ISO 8601 in UTC."""

    name: str
    id: str
    state: str
    attempt: int
    started: str | None
    last_event: str | None
    seed: int
    command: list[str]
    git_revision: str | None
    checkpoint: str


class SubmissionPart(_Part):
    """One time that the run was handed to a scheduler. time: Unix seconds."""

    attempt: int
    scheduler: str
    job_id: str
    host: str
    time: float
    git_revision: str | None
    pid_started: int
    exclude: list[str] = Field(default=[], description="nodes left out since an earlier attempt has shown them bad")


class DiagnosisPart(_Part):
    """A known cause: the line that shows it, where that stands (number: in the file), and what to do. keys: of the
    config, that the fix is about."""

    line: str
    cause: str
    fix: str
    rule: str | None = None
    keys: list[str] = []
    file: str | None = None
    number: int | None = None
    rank: int | None = None
    host: str | None = None
    time: str | None = None


class FailurePart(_Part):
    """The rank that failed first (null: no rank's fault), and what it said."""

    rank: int | None
    host: str | None
    stage: str
    error_type: str
    error: str
    traceback: str
    log: str | None
    log_tail: list[str]
    diagnosis: DiagnosisPart | None


class CandidatePart(_Part):
    """A backend that was looked at, and why it was taken or not."""

    impl: str
    verdict: str
    reason: str


class SelectorPart(BaseModel):
    """The record of the selection, and what each rank chose."""

    model_config = ConfigDict(extra="allow", frozen=True)
    arch: str
    quant: str
    selected: str | None
    candidates: list[CandidatePart]
    by_rank: dict[str, str | None]


class ParityLayer(_Part):
    """‖out − dense‖ / ‖dense‖ of a layer; null if it is not a number."""

    relative_error: float | None
    routing: Literal["hash", "top-k"]


class ParityPart(_Part):
    """The comparison with the dense reference, by layer."""

    tolerance: float
    tokens: int | None = None
    seconds: float | None = None
    kept_from: int | None = Field(default=None, description="the attempt that measured it, if it was an earlier one")
    layers: dict[str, ParityLayer]


class WorkMemory(_Part):
    """Bytes that a part of a rank's work took at most beside its weights."""

    planned: int
    measured: int | None


class MemoryPart(_Part):
    """Bytes of a rank: planned by item, held by its layers after loading, at the peak of torch's allocator (null on a
    CPU), of the process, and free. difference: held over planned, less 1. work: beside the weights, by part; one part
    follows another."""

    rank: int
    planned: dict[str, int]
    planned_total: int
    measured_total: int
    difference: float | None = Field(default=None, description="measured over planned, less 1")
    work: dict[str, WorkMemory] = {}
    process_resident: int
    free: int | None = None
    seconds: float | None = None
    kept_from: int | None = None
    device_peak: int | None


class ThroughputPart(_Part):
    """One batch size: tokens of an EP group a pass, through all loaded layers; times are of the slowest rank.

    total_token_throughput: tokens/s of all EP groups, by the median pass. latency: of a pass. combine_us: the combine
    of one layer alone. floor_us_per_layer: the larger of the packed bytes of the experts that are hit at the copy
    rate and the FLOPs of the routes at the matmul rate, on the rank with the most. graph_us_per_layer: of passes that
    are replayed from a CUDA graph, up to 512 tokens on a GPU.
    """

    batch_size: int
    layers: int
    requested: int
    completed: int
    total_token_throughput: float
    tokens_per_s_per_gpu: float | None
    mean_latency_ms: float | None
    median_latency_ms: float
    p99_latency_ms: float | None
    us_per_layer: float
    us_per_layer_min: float
    us_per_layer_max: float
    us_per_layer_mad: float
    combine_us: float | None
    floor_us_per_layer: float | None
    graph_us_per_layer: float | None = None


class StrategyPart(_Part):
    """A way to combine experts over ranks, alone: µs of the slowest rank, and bytes that rank 0 sent, as the cost model
    predicts them (bytes on average over ranks) and as measured. layer_us: of a whole layer with it, on a GPU.
    captured: whether the times are of passes that are replayed from a CUDA graph."""

    strategy: str
    dispatch_us: float
    combine_us: float
    predicted_dispatch_us: float
    predicted_combine_us: float
    sent_bytes: int
    predicted_bytes: float
    layer_us: float | None = None
    captured: bool = False


class CommunicationPart(_Part):
    """One number of tokens of an EP group, measured twice. by_model: the cost model's choice, by over_model slower than
    the fastest of the first time (0: it is the fastest). chosen: what auto takes since, and why; over_best: the same of
    it, by the second time, of so many rounds, two halves of which agreed on the fastest, or did not in time."""

    tokens: int
    by_model: str | None = None
    over_model: float | None = None
    chosen: str
    why: str
    over_best: float
    rounds: int | None = None
    agreed: bool | None = None
    strategies: list[StrategyPart]


class ExpertLoadPart(_Part):
    """Routes of seeded random tokens. by_layer: by global expert. by_rank: by EP rank; where experts have copies, these
    share their routes alike. balance: mean/max tokens of the experts of a layer. balancedness: mean/max tokens of the
    ranks, averaged over the layers; 1 is even. balancedness_in_order: the same if experts lay on ranks in order."""

    tokens: int
    by_layer: dict[str, list[int]]
    by_rank: dict[str, list[float]]
    balance: dict[str, float]
    balancedness: float
    balancedness_in_order: float | None = None


class StagePart(_Part):
    """begun_s: seconds from the first event of the attempt to the stage's beginning."""

    state: Literal["begun", "done", "failed"]
    begun_s: float | None
    seconds: float | None


class RankPart(_Part):
    """A rank: its place, what it runs on, and how far it came."""

    rank: int
    node: int
    local_rank: int
    tp_group: int
    ep_group: int
    ep_rank: int
    experts: tuple[int, int] = Field(description="first global expert, and the one after the last")
    host: str | None
    pid: int | None
    environment: dict[str, Any]
    weights: dict[str, int | float | str | None] = Field(
        description="bytes_read, load_seconds and read_from of a load; bytes_written and folder of a pre-sharding"
    )
    stages: dict[str, StagePart]


class ServicePart(_Part):
    """What a service did since it was last started: seconds until it was ready, its first answer (whether that had to
    be a recorded one, and how long the prompt and then each token took), requests by how they ended, and tokens."""

    ready_s: float
    restarts: int
    first_answer: str
    as_recorded: bool
    prefill_ms: float
    decode_ms: float
    requests: dict[str, int]
    prompt_tokens: int
    answer_tokens: int


class Report(_Part):
    """The report of one run."""

    schema_: Literal["moe-ep/probe-report"] = Field(alias="schema")
    schema_version: Literal[2]
    run: RunPart
    submissions: list[SubmissionPart]
    failure: FailurePart | None
    selector: SelectorPart | None
    tune: dict[str, Any] | None
    check: dict[str, Any] | None = None
    parity: ParityPart | None
    memory: list[MemoryPart]
    throughput: list[ThroughputPart]
    communication: list[CommunicationPart] = []
    expert_load: ExpertLoadPart | None
    service: ServicePart | None = None
    ranks: list[RankPart]
    planned_bytes: dict[str, int]
    config: dict[str, Any]
    not_written: str | None = None


def json_schema() -> dict[str, Any]:
    """The published JSON schema (draft 2020-12)."""
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema(by_alias=True)}
    return found | {"title": f"{SCHEMA} {SCHEMA_VERSION}"}


def read(path: Path) -> dict[str, Any]:
    """A report from its file, as one of the newest version whichever version wrote it.

    Raises
    ------
    InputError
        If it is not a report, damaged, or of a version that this launcher does not know.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"), parse_constant=no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise InputError(f"{path}: not a report: expected the key schema with {SCHEMA!r}")
    version = found.get("schema_version")
    if version not in (1, SCHEMA_VERSION):
        raise InputError(
            f"{path}: schema_version is {version!r}, this launcher reads 1 to {SCHEMA_VERSION}; use a newer one"
        )
    try:
        report = upgraded(found) if version == 1 else found
        Report.model_validate(report)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: damaged: {type(error).__name__}: {error}") from None
    return report


def upgraded(old: dict[str, Any]) -> dict[str, Any]:
    """A report of version 1 as one of version 2; what was not measured then is null."""
    return {
        **old,
        "schema_version": SCHEMA_VERSION,
        "failure": old["failure"] and {**old["failure"], "diagnosis": None},
        "memory": [{**line, "device_peak": None} for line in old["memory"]],
        "throughput": [upgraded_line(line, len(old["ranks"])) for line in old["throughput"]],
        "expert_load": None,
        "ranks": [
            {**rank, "stages": {name: {**stage, "begun_s": None} for name, stage in rank["stages"].items()}}
            for rank in old["ranks"]
        ],
    }


def upgraded_line(line: dict[str, Any], world: int) -> dict[str, Any]:
    """A line of a sweep that version 1 measured. It timed as many passes as were asked for, or failed."""
    if "completed" in line:
        return line
    kept = {key: value for key, value in line.items() if key not in ("tokens_per_s", "repeats")}
    return {
        **kept,
        "requested": line["repeats"],
        "completed": line["repeats"],
        "total_token_throughput": line["tokens_per_s"],
        "tokens_per_s_per_gpu": line["tokens_per_s"] / world,
        "mean_latency_ms": None,
        "median_latency_ms": line["us_per_layer"] * line["layers"] / 1e3,
        "p99_latency_ms": None,
        "combine_us": None,
        "floor_us_per_layer": None,
    }
