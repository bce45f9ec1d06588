"""What the launcher asks of the ranks, as the file that every rank reads. Needs no torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jobs.serving import ServeRequest
from moe_ep.attention import AttentionShape
from moe_ep.network import MI300A, SLINGSHOT, Device, Link, Network
from moe_ep.shape import ModelShape
from moe_ep.spec import ActivationDtype

REQUEST = "request.json"


@dataclass(frozen=True)
class CommRequest:
    """How partials become the result; `launcher.schema.Comm` says what the words mean."""

    strategy: str = "auto"
    payload: Literal["bf16", "fp8"] = "bf16"
    sums: Literal["f32", "bf16"] = "f32"
    chunked: bool = True
    peer_copies: bool = True
    network: Network = SLINGSHOT
    device: Device = MI300A
    """The rates by which prefills are cut: the same on all ranks, which a measurement would not be."""


@dataclass(frozen=True)
class ProbeRequest:
    """One probe, tuning, check, pre-sharding or service. Rank r stands at place r % group_size of its group."""

    seed: int
    nodes: int
    ranks_per_node: int
    ep: int
    expert_tp: int
    """Ranks that share out each expert's I; above 1 only where `ep` is 1."""
    shard_shared_expert: bool
    """Whether the ranks that combine experts each hold a slice of the shared expert, or all of it."""
    arch: str
    """What every rank's device must be: "gfx942", "sm90", "cpu"."""
    impl: str
    activation_dtype: ActivationDtype
    checkpoint: str
    presharded: str | None
    """Folder with each rank's tensors in one file, in the backend's order: read by a probe, written by a preshard."""
    read_threads: int
    read_direct: bool
    """Whether files are read by O_DIRECT."""
    synthesise: bool
    """Whether rank 0 writes the checkpoint, from `shape` and `seed`, where it does not exist."""
    shape: ModelShape
    """The sizes that the checkpoint must have."""
    layers: tuple[int, ...]
    parity_layers: tuple[int, ...]
    parity_tokens: int
    parity_tolerance: float
    batch_sizes: tuple[int, ...]
    warmup: int
    repeats: int
    kind: Literal["probe", "tune", "check", "preshard", "serve"]
    tune_tokens: tuple[int, ...]
    tune_quick: bool
    rank_timeout_s: int
    """Seconds after which a collective, or waiting for another rank, is an error."""
    scratch: str | None
    """Folder on the node's own disk that the ranks may use and remove at their end."""
    attention: AttentionShape | None = None
    """With it, a checkpoint that rank 0 writes is a whole model."""
    serve: ServeRequest | None = None
    """Of a serve job."""
    own_tokens: bool = False
    """Whether each rank of a group has tokens of its own; else all have the same."""
    comm: CommRequest = CommRequest()
    made_skew: float | None = None
    """With it every rank makes its weights on its device (`moe_ep.made`), and there is no checkpoint."""
    slots: tuple[tuple[int, ...], ...] = ()
    """By layer of `layers`, the expert that each slot holds; empty where experts lie in order."""

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def group_size(self) -> int:
        """Ranks that hold a layer's experts together, and add their partials up."""
        return max(self.ep, self.expert_tp)

    def save(self, run_dir: Path) -> None:
        """Write it into a run folder."""
        (run_dir / REQUEST).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, run_dir: Path) -> "ProbeRequest":
        """Read it back."""
        fields: dict[str, Any] = json.loads((run_dir / REQUEST).read_text())
        fields["shape"] = ModelShape(**fields["shape"])
        fields["slots"] = tuple(map(tuple, fields["slots"]))
        comm = fields["comm"]
        links = {level: Link(**comm["network"][level]) for level in ("node", "fabric")}
        network = Network(**{**comm["network"], **links})
        fields["comm"] = CommRequest(**{**comm, "network": network, "device": Device(**comm["device"])})
        for name in ("layers", "parity_layers", "batch_sizes", "tune_tokens"):
            fields[name] = tuple(fields[name])
        if fields.get("attention") is not None:
            fields["attention"] = AttentionShape(
                **{**fields["attention"], "ratios": tuple(fields["attention"]["ratios"])}
            )
        if fields.get("serve") is not None:
            fields["serve"] = ServeRequest.of(fields["serve"])
        return cls(**fields)
