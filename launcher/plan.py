"""A config becomes a plan: everything that is decided before anything is started."""

import hashlib
import json
import secrets
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import jobs
from jobs.request import ProbeRequest
from launcher.config import layer_numbers, parity_layers, unresolved
from launcher.files import write_atomically
from launcher.schema import Config
from launcher.topology import RankPlace, rank_places

PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """One run, fixed: what will be asked of the scheduler and of the ranks follows from it alone."""

    config: Config
    run_id: str
    run_dir: Path
    """Absolute, on a file system that all nodes share."""
    checkpoint: str
    code_root: Path | None
    """The source checkout that the ranks import from; None where the package is installed."""
    git_revision: str | None
    """Commit of the checkout, with "-dirty" where files differ from it."""
    command: tuple[str, ...]
    """The command line, so that the run can be repeated."""

    @property
    def places(self) -> tuple[RankPlace, ...]:
        """The ranks."""
        return rank_places(self.config.topology, self.config.model.sizes.experts)

    def request(self) -> ProbeRequest:
        """What the ranks will read."""
        config = self.config
        return ProbeRequest(
            seed=config.run.seed,
            nodes=config.topology.nodes,
            ranks_per_node=config.topology.ranks_per_node,
            tp=config.topology.tp,
            ep=config.topology.ep,
            arch=config.cluster.arch,
            impl=config.backend.impl,
            activation_dtype=config.backend.activation_dtype,
            checkpoint=self.checkpoint,
            synthesise=config.model.synthetic is not None,
            shape=config.model.sizes,
            layers=tuple(layer_numbers(config)),
            parity_layers=tuple(parity_layers(config)),
            parity_tokens=config.job.parity.tokens,
            parity_tolerance=config.job.parity.tolerance,
            batch_sizes=tuple(config.job.throughput.batch_sizes),
            warmup=config.job.throughput.warmup,
            repeats=config.job.throughput.repeats,
            rank_timeout_s=config.limits.rank_timeout_s,
        )

    def save(self) -> None:
        """Write plan and request into the run folder, which must exist."""
        record = {
            "config": self.config.model_dump(mode="json"),
            "run_id": self.run_id,
            "checkpoint": self.checkpoint,
            "code_root": str(self.code_root) if self.code_root else None,
            "git_revision": self.git_revision,
            "command": list(self.command),
            "topology": [asdict(p) | {"experts": [p.experts.start, p.experts.stop]} for p in self.places],
            "planned_bytes": self.config.model.sizes.held_bytes(
                layer_numbers(self.config), len(self.places[0].experts)
            ),
        }
        write_atomically(self.run_dir / PLAN, json.dumps(record, indent=2) + "\n")
        self.request().save(self.run_dir)


def new_run_id(now: datetime) -> str:
    """Sorts by time; two runs of one second differ."""
    return f"{now.astimezone(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def make_plan(config: Config, run_id: str, command: Sequence[str] = ()) -> Plan:
    """The plan of a config. Looks at the checkout's git state and writes nothing."""
    root = _checkout()
    return Plan(
        config=config,
        run_id=run_id,
        run_dir=Path(config.run.folder).absolute() / config.run.name / run_id,
        checkpoint=_checkpoint(config),
        code_root=root,
        git_revision=_revision(root),
        command=tuple(command),
    )


def problems_on_site(plan: Plan) -> list[str]:
    """What is wrong with the files that the run needs, as far as this machine can see."""
    if plan.config.model.synthetic is not None:
        return []
    key = f"model.checkpoint: {plan.checkpoint}"
    unset = unresolved(plan.checkpoint)
    if unset:
        return [f"{key}: {', '.join(unset)} is not set here; set it, or --set model.checkpoint=/path/to/checkpoint"]
    needed = [Path(plan.checkpoint) / name for name in ("config.json", "model.safetensors.index.json")]
    return [f"{key}: no file {path}; expected a DeepSeek-V4 checkpoint" for path in needed if not path.is_file()]


def _checkpoint(config: Config) -> str:
    model = config.model
    if model.synthetic is None:
        return str(model.checkpoint)
    # Made weights depend on sizes and seed alone, so runs that agree in these share them.
    identity = json.dumps([model.shape.model_dump(), config.run.seed], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return str(Path(model.synthetic.folder).absolute() / f"{model.name}-{digest}")


def _checkout() -> Path | None:
    root = Path(jobs.__file__).parents[1]
    return root if (root / "pyproject.toml").is_file() else None


def _revision(root: Path | None) -> str | None:
    if root is None:
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
