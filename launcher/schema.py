"""The keys that a configuration may have, with their types and defaults."""

from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, create_model, model_validator

from launcher.engine_schema import Engine
from launcher.fields import NAME, STRICT, Option, Scratch, Text, Variable
from moe_ep.attention import AttentionShape
from moe_ep.network import Link, Network
from moe_ep.shape import ModelShape
from moe_ep.spec import ActivationDtype

MOST_TOKENS = 10**7


class _Section(BaseModel):
    model_config = STRICT


class Run(_Section):
    """How the run is called, where its results go, and what seeds its tokens and made weights."""

    name: str = Field(pattern=NAME, max_length=100)
    seed: int = Field(default=0, ge=0, le=10**9)
    folder: Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f%\\]*$")] = "runs"  # Slurm expands % and \\


class Container(_Section):
    """A container per task, by the Slurm plug-in that takes `--environment` on srun (CSCS's EDF)."""

    environment: Text
    python: Text = "python3"


class LinkFigures(_Section):
    """µs of a collective's step over a link, and the GB/s (decimal) that a rank sends over it while all send."""

    step_us: float = Field(ge=0)
    gb_per_s: float = Field(gt=0)

    @property
    def link(self) -> Link:
        """As the cost model takes it."""
        return Link(self.step_us, self.gb_per_s * 1e9)


class NetworkFigures(_Section):
    """What communication costs on a cluster, for comm.strategy auto: see moe_ep/network.py. source: where from.

    copy_gb_per_s: read plus written, GB/s (decimal), where a rank packs rows; pass_us: of such a pass besides.
    """

    call_us: float = Field(ge=0)
    peer_us: float = Field(ge=0)
    host_us: float = Field(ge=0)
    node: LinkFigures
    fabric: LinkFigures
    source: Text
    copy_gb_per_s: float = Field(default=3500, gt=0)
    pass_us: float = Field(default=3, ge=0)

    @property
    def network(self) -> Network:
        """As the cost model takes it."""
        links = (self.node.link, self.fabric.link)
        times = (self.call_us, self.peer_us, self.host_us)
        return Network(*times, *links, self.source, self.copy_gb_per_s * 1e9, self.pass_us)


class Cluster(_Section):
    """A site: its scheduler, its nodes, and the environment that works there.

    scratch: a run's own folder on the nodes' disks, an absolute path whose last part holds `{run_id}`; it is
    removed when the ranks end. env's values may name it as `{scratch}`. device_memory_gb: of one device; with
    unified_memory it is the host's too, and reserve_gb of it is for the system, the runtime and the rank's own
    process. communicator_gb: what the collectives' library takes a rank.
    """

    name: str = Field(pattern=NAME)
    scheduler: Literal["local", "slurm"]
    arch: str = Field(pattern=r"^(cpu|gfx[0-9a-f]+|sm[0-9]+)$")
    devices_per_node: int = Field(ge=0)
    device_memory_gb: float | None = Field(default=None, gt=0)
    unified_memory: bool = False
    reserve_gb: float = Field(default=0, ge=0)
    communicator_gb: float = Field(default=0, ge=0)
    account: Text | None = None
    partition: Text | None = None
    qos: Text | None = None
    cpus_per_task: int | None = Field(default=None, ge=1)
    mem_mb: int | None = Field(default=None, ge=1)
    time_limit_min: int | None = Field(default=None, ge=1)
    exclude: list[Text] = []
    sbatch_args: dict[Option, Text | int | bool] = {}
    srun_args: list[Text] = []
    container: Container | None = None
    scratch: Scratch | None = None
    env: dict[Variable, Annotated[str, Field(pattern=r"^[^\x00]*$")] | int] = {}
    unset: list[Variable] = []
    network: NetworkFigures | None = None


_SKEW = 0.1  # what written checkpoints have


class Synthetic(_Section):
    """Made weights, of run.seed. folder: where the job writes a checkpoint of them if there is none. Without it every
    rank of a probe makes what it holds on its own device, at once and of any size; skew is then the standard deviation
    of the routers' selection bias: from about 0.3 some experts get most of the tokens.
    """

    folder: Text | None = None
    skew: float = Field(default=_SKEW, ge=0, le=10)

    @model_validator(mode="after")
    def _skew_is_of_devices(self) -> Self:
        if self.folder is not None and self.skew != _SKEW:  # what a plan keeps has the default too
            raise ValueError("skew is for weights that ranks make on their devices; leave out folder, or skew")
        return self


# The keys of a model file's shape are the fields of ModelShape, whatever they are.
_SIZES: dict[str, Any] = {f.name: (f.type, ... if f.default is MISSING else f.default) for f in fields(ModelShape)}
Shape: Any = create_model("Shape", __base__=_Section, **_SIZES)


class Attention(_Section):
    """Sizes of the model beside its experts, for `plan` where the checkpoint cannot be reached: see AttentionShape."""

    heads: int
    head_dim: int
    q_rank: int
    o_groups: int
    o_rank: int
    index_heads: int
    index_dim: int
    streams: int
    window: int
    ratios: list[int]


class Model(_Section):
    """A model: where its checkpoint lies, and its sizes (checked against the checkpoint's own).

    presharded: a folder with each rank's tensors in one file in the backend's order; job.kind preshard writes it, and a
    probe reads it instead of the checkpoint.
    """

    name: str = Field(pattern=NAME)
    checkpoint: Text | None = None
    presharded: Text | None = None
    synthetic: Synthetic | None = None
    shape: Shape
    attention: Attention | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.checkpoint is None) == (self.synthetic is None):
            raise ValueError("give either checkpoint (a folder) or synthetic (made weights)")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        _ = self.sizes, self.attention_sizes  # dataclasses that check themselves
        return self

    @property
    def made_skew(self) -> float | None:
        """The skew of weights that ranks make on their devices; None where there is a checkpoint, or will be one."""
        return self.synthetic.skew if self.synthetic is not None and self.synthetic.folder is None else None

    @property
    def sizes(self) -> ModelShape:
        """The sizes as the library takes them."""
        return ModelShape(**self.shape.model_dump())

    @property
    def attention_sizes(self) -> AttentionShape | None:
        """Likewise of what is not experts; None where the file does not give them."""
        if self.attention is None:
            return None
        values = self.attention.model_dump()
        return AttentionShape(**{**values, "ratios": tuple(values["ratios"])})


class Topology(_Section):
    """nodes × ranks_per_node ranks, one device each.

    tp: ranks of a tensor-parallel group, which see the same tokens. ep: ranks over which a layer's experts
    are spread; an EP group lies within a TP group, or tp is 1 and each of its ranks has tokens of its own. expert_tp:
    ranks that share out each expert's intermediate size instead; ep and expert_tp are not both above 1. shared_expert:
    whether the ranks that combine experts each hold all of the shared expert or a slice. dense: whether a TP group
    shards what is not experts, or each rank holds it all.
    """

    nodes: int = Field(ge=1, le=10_000)
    ranks_per_node: int = Field(ge=1, le=64)
    tp: int = Field(ge=1)
    ep: int = Field(ge=1)
    expert_tp: int = Field(default=1, ge=1)
    shared_expert: Literal["replicated", "sharded"] = "replicated"
    dense: Literal["replicated", "sharded"] = "sharded"

    @property
    def shared_tp(self) -> int:
        """Into how many slices the shared expert is cut."""
        return max(self.ep, self.expert_tp) if self.shared_expert == "sharded" else 1

    @property
    def own_tokens(self) -> bool:
        """Whether each rank of an EP group has tokens of its own (data-parallel attention)."""
        return self.tp == 1 and self.ep > 1

    @property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        return self.nodes * self.ranks_per_node


class Backend(_Section):
    """Which experts' implementation to use; auto takes the first that the selector finds.

    activation_dtype: what the routed experts' weights are multiplied with; fp8 is DeepSeek's own W4A8 arithmetic.
    """

    impl: Literal["auto", "gluon_kernel", "triton_kernel", "reference"] = "auto"
    activation_dtype: ActivationDtype = "bf16"


class Parity(_Section):
    """The comparison with the dense reference; by default the first hash and the first other layer."""

    tokens: int = Field(default=16, ge=1, le=MOST_TOKENS)
    tolerance: float = Field(default=2e-2, gt=0)
    layers: Annotated[list[int], Field(min_length=1)] | None = None


class Throughput(_Section):
    """The sweep: tokens of an EP group per pass, passes before timing, timed passes."""

    batch_sizes: list[Annotated[int, Field(ge=0, le=MOST_TOKENS)]] = Field(default=[1, 8, 64, 512, 4096], min_length=1)
    warmup: int = Field(default=3, ge=0, le=10**6)
    repeats: int = Field(default=20, ge=1, le=10**6)


class Tune(_Section):
    """Of a tune job: the tokens that a rank sees, one regime of the table each; quick tries a third of the tiles."""

    tokens: list[Annotated[int, Field(ge=1, le=MOST_TOKENS)]] = Field(
        default=[1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192], min_length=1
    )
    quick: bool = False

    @model_validator(mode="after")
    def _they_rise(self) -> Self:
        if self.tokens != sorted(set(self.tokens)):
            raise ValueError(f"tokens is {self.tokens}; they must rise")
        return self


class Reading(_Section):
    """How ranks read a checkpoint: threads a rank, and whether by O_DIRECT, past the page cache."""

    threads: int = Field(default=8, ge=1, le=256)
    direct: bool = False


class Job(_Section):
    """What the ranks do: probe the model; tune the experts' launch configurations on the cluster's devices; check the
    backends against each other on them, at tune's tokens; write each rank's tensors once in the backend's order
    (preshard); or bring up an engine that answers (serve)."""

    kind: Literal["probe", "tune", "check", "preshard", "serve"] = "probe"
    layers: Literal["all"] | list[int] = "all"
    parity: Parity = Parity()
    throughput: Throughput = Throughput()
    tune: Tune = Tune()
    reading: Reading = Reading()


class Comm(_Section):
    """How the ranks' partials become the result: docs/communication.md.

    strategy: auto takes the one that the cost model expects to be fastest for the number of tokens. payload: of hidden
    states on their way to experts. sums: in which partials are added up over ranks. chunked: whether the second GEMM is
    cut where that pays, so that a range of columns is combined while the next is computed. peer_copies: whether two
    NVIDIA GPUs of one host that make an EP group send each other large sums by their copy engines.
    """

    strategy: Literal["auto", "all_reduce", "reduce_scatter", "all_gather", "all_to_all"] = "auto"
    payload: Literal["bf16", "fp8"] = "bf16"
    sums: Literal["f32", "bf16"] = "f32"
    chunked: bool = True
    peer_copies: bool = True


class Placing(_Section):
    """Experts arranged by load. profile: an expert_load.json that a probe has left, or a report.json. redundant_gb: of
    a rank's memory, for further copies of the experts with the most load."""

    profile: Text | None = None
    redundant_gb: float = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_a_profile(self) -> Self:
        if self.redundant_gb and self.profile is None:
            raise ValueError("redundant_gb needs a profile, which says the experts to copy")
        return self


class Memory(_Section):
    """What a rank's memory is planned for: sequences of `context` tokens each, `batch` of them in a TP group, with a
    cache in `kv` (fp8, as V4's own, or bf16)."""

    context: int = Field(default=8192, ge=1, le=2**24)
    batch: int = Field(default=8, ge=1, le=10**6)
    kv: Literal["fp8", "bf16"] = "fp8"


class Limits(_Section):
    """time_min: of the job. signal_s: so many seconds before its end Slurm tells the ranks, which then write their
    last and leave (up to a minute earlier: Slurm's own resolution). rank_timeout_s: of one collective, and of waiting
    for rank 0.

    stall_s, pending_s: for how long a launcher that waits (submit --wait, nightly) does so for the next event of a
    running job, and for a job to start, before it ends it. bad_node_retries: how often it submits a run again that
    failed for a node which cannot start it, without that node.
    """

    time_min: int = Field(ge=1, le=10**6)
    signal_s: int = Field(default=90, ge=1, le=3600)
    rank_timeout_s: int = Field(default=600, ge=1, le=10**6)
    stall_s: int = Field(default=3600, ge=1, le=10**7)
    pending_s: int = Field(default=12 * 3600, ge=1, le=10**7)
    bad_node_retries: int = Field(default=0, ge=0, le=10)


class Compare(_Section):
    """By how many percent a run may be worse than the median of its baseline before it has regressed.

    window: the last so many valid runs are the baseline. min_runs: with fewer there is no verdict.
    """

    throughput: float = Field(default=5, ge=0, le=100)
    latency: float = Field(default=10, ge=0, le=1000)
    memory: float = Field(default=10, ge=0, le=1000)
    parity: float = Field(default=0, ge=0, le=1000)
    window: int = Field(default=10, ge=2, le=1000)
    min_runs: int = Field(default=3, ge=2, le=1000)

    @model_validator(mode="after")
    def _window_holds_enough(self) -> Self:
        if self.min_runs > self.window:
            raise ValueError(f"min_runs is {self.min_runs}, more than the window of {self.window}: never a verdict")
        return self


class Config(_Section):
    """A run, its cluster and model files read in."""

    run: Run
    cluster: Cluster
    model: Model
    topology: Topology
    backend: Backend = Backend()
    job: Job = Job()
    engine: Engine = Engine()
    comm: Comm = Comm()
    placement: Placing = Placing()
    memory: Memory = Memory()
    limits: Limits
    compare: Compare = Compare()
