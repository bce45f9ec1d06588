"""A config becomes a plan: everything that is decided before anything is started."""

import hashlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jobs
from jobs.events import EVENTS
from jobs.redact import redact, secrets_of
from jobs.request import CommRequest, ProbeRequest
from jobs.serving import DRAINED_S, ServeLimits, ServeRequest
from launcher.arranging import arranged_slots, slots_of
from launcher.config import layer_numbers, parity_layers, unresolved
from launcher.engines.known import node_commands, program_of
from launcher.errors import InputError
from launcher.files import is_file, is_folder, write_atomically
from launcher.folders import check_own, make_private
from launcher.schema import Config
from launcher.topology import RankPlace, rank_places
from moe_ep.network import SLINGSHOT, device_of
from moe_ep.shape import PRESHARD_MANIFEST
from moe_ep.shape import SYNTHETIC_FORMAT as FORMAT

PLAN = "plan.json"
_RECORD = ("config", "run_id", "checkpoint", "code_root", "git_revision", "command", "topology", "planned_bytes")


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
    attempt: int = 0
    """How often the run has been submitted before; a requeue by Slurm counts on from here."""
    exclude: tuple[str, ...] = ()
    """Nodes that an earlier submission has shown to be bad, beside the cluster's own."""

    @property
    def places(self) -> tuple[RankPlace, ...]:
        """The ranks."""
        return rank_places(self.config.topology, slots_of(self.config))

    def request(self) -> ProbeRequest:
        """What the ranks will read."""
        config = self.config
        serves = config.job.kind == "serve"
        return ProbeRequest(
            seed=config.run.seed,
            nodes=config.topology.nodes,
            ranks_per_node=config.topology.ranks_per_node,
            ep=config.topology.ep,
            expert_tp=config.topology.expert_tp,
            shard_shared_expert=config.topology.shared_expert == "sharded",
            arch=config.cluster.arch,
            impl=config.backend.impl,
            activation_dtype=config.backend.activation_dtype,
            checkpoint=self.checkpoint,
            presharded=config.model.presharded,
            read_threads=config.job.reading.threads,
            read_direct=config.job.reading.direct,
            synthesise=config.model.synthetic is not None and config.model.made_skew is None,
            made_skew=config.model.made_skew,
            shape=config.model.sizes,
            layers=tuple(layer_numbers(config)),
            parity_layers=tuple(parity_layers(config)),
            parity_tokens=config.job.parity.tokens,
            parity_tolerance=config.job.parity.tolerance,
            batch_sizes=((config.engine.limits.step_tokens,) if serves else tuple(config.job.throughput.batch_sizes)),
            warmup=config.job.throughput.warmup,
            repeats=config.job.throughput.repeats,
            kind=config.job.kind,
            tune_tokens=tuple(config.job.tune.tokens),
            tune_quick=config.job.tune.quick,
            rank_timeout_s=config.limits.rank_timeout_s,
            scratch=self.scratch,
            attention=config.model.attention_sizes,
            serve=self.serve_request() if serves else None,
            own_tokens=config.topology.own_tokens,
            comm=CommRequest(
                **config.comm.model_dump(),
                network=config.cluster.network.network if config.cluster.network else SLINGSHOT,
                device=device_of(config.cluster.arch),
            ),
            slots=arranged_slots(config),
        )

    def serve_request(self) -> ServeRequest:
        """The part of it that a serve job needs."""
        config, engine, program = self.config, self.config.engine, program_of(self.config)
        limits = engine.limits
        return ServeRequest(
            engine=engine.name,
            host=engine.host,
            port=engine.port,
            model=engine.served_name or config.model.name,
            api_key_env=engine.api_key.env if engine.api_key else None,
            api_key_file=engine.api_key.file if engine.api_key else None,
            limits=ServeLimits(
                context=config.memory.context,
                sequences=config.memory.batch,
                body_bytes=limits.body_kb * 1024,
                completion_tokens=limits.completion_tokens,
                prompts=limits.prompts,
                queue=limits.queue,
                step_tokens=limits.step_tokens,
                request_s=limits.request_s,
                connections=limits.connections,
                client_s=limits.client_s,
            ),
            ready_s=engine.ready_s,
            drain_s=engine.drain_s,
            health_s=engine.health_s,
            answer=engine.answer,
            dtype=engine.dtype,
            shard_dense=config.topology.dense == "sharded" and config.topology.tp > 1,
            command=None if engine.command is None else tuple(engine.command),
            args=dict(engine.args),
            env={**(program.env if program else {}), **engine.env},
            commands=tuple(map(tuple, node_commands(config, self.checkpoint, ranks_python(config)))),
            key_variable=program.key_variable if program else None,
        )

    def held_bytes(self, place: RankPlace) -> dict[str, int]:
        """What a rank's layers take, by item."""
        topology, layers = self.config.topology, layer_numbers(self.config)
        return self.config.model.sizes.held_bytes(
            layers, len(place.experts), expert_tp=topology.expert_tp, shared_tp=topology.shared_tp
        )

    @property
    def grace_s(self) -> float:
        """How long the ranks take to end by themselves when they are told to."""
        return self.config.engine.drain_s + DRAINED_S if self.config.job.kind == "serve" else 0.0

    @property
    def scratch(self) -> str | None:
        """The run's folder on the nodes' own disks, which the ranks remove when they end."""
        scratch = self.config.cluster.scratch
        return scratch.replace("{run_id}", self.run_id) if scratch else None

    def save(self) -> None:
        """Make the run's folder and write plan and request into it. Raises `InputError` if it cannot."""
        try:
            make_private(self.run_dir)
            (self.run_dir / EVENTS).mkdir(exist_ok=True)
        except (OSError, ValueError) as error:
            raise InputError(f"run.folder: {self.config.run.folder}: cannot be written: {error}") from None
        record = {
            "config": self.config.model_dump(mode="json"),
            "run_id": self.run_id,
            "checkpoint": self.checkpoint,
            "code_root": str(self.code_root) if self.code_root else None,
            "git_revision": self.git_revision,
            "command": [redact(word, secrets_of()) for word in self.command],
            "topology": [asdict(p) | {"experts": [p.experts.start, p.experts.stop]} for p in self.places],
            "planned_bytes": self.held_bytes(self.places[0]),
        }
        write_atomically(self.run_dir / PLAN, json.dumps(record, indent=2) + "\n")
        self.request().save(self.run_dir)

    @classmethod
    def load(cls, run_dir: Path, *, attempt: int, exclude: Sequence[str] = ()) -> "Plan":
        """The plan of a run, to be submitted once more, without the nodes in `exclude`.

        Raises
        ------
        InputError
            If the folder is not the user's alone: it says which code is to be run.
        """
        check_own(run_dir)
        record = read_plan(run_dir)
        root = Path(record["code_root"]) if record["code_root"] else None
        return cls(
            config=Config.model_validate(record["config"]),
            run_id=record["run_id"],
            run_dir=run_dir.absolute(),
            checkpoint=record["checkpoint"],
            code_root=root,
            git_revision=_revision(root),  # the ranks import the checkout as it is now
            command=tuple(record["command"]),
            attempt=attempt,
            exclude=tuple(exclude),
        )


def ranks_python(config: Config) -> str:
    """The interpreter of the ranks."""
    container = config.cluster.container
    return container.python if container else sys.executable


def read_plan(run_dir: Path) -> dict[str, Any]:
    """The record of a run's plan. Raises `InputError` if `run_dir` is not the folder of a run."""
    try:
        plan: dict[str, Any] = json.loads((run_dir / PLAN).read_text())
    except FileNotFoundError:
        raise InputError(f"{run_dir}: not the folder of a run, it has no {PLAN}") from None
    except OSError as error:
        raise InputError(f"{run_dir / PLAN}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{run_dir / PLAN}: damaged: {error}") from None
    missing = [key for key in _RECORD if not isinstance(plan, dict) or key not in plan]
    if missing or not isinstance(plan["topology"], list):
        raise InputError(f"{run_dir / PLAN}: damaged: not the record of a plan ({', '.join(missing)} missing)")
    return plan


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
    model = plan.config.model
    paths = {"run.folder": plan.config.run.folder, "model.checkpoint": model.checkpoint}
    paths["model.presharded"] = model.presharded
    paths["model.synthetic.folder"] = model.synthetic.folder if model.synthetic else None
    serves_key = plan.config.engine.api_key if plan.config.job.kind == "serve" else None
    paths["engine.api_key.file"] = serves_key.file if serves_key else None
    paths["engine.answer"] = answer = plan.config.engine.answer if plan.config.job.kind == "serve" else None
    problems = [
        f"{key}: {path}: {', '.join(unset)} is not set here; set it, or --set {key}=/a/path"
        for key, path in paths.items()
        if path and (unset := unresolved(path))
    ]
    if not problems and model.presharded is not None:
        problems += _preshard_problems(model.presharded, plan.config.job.kind)
    if not problems and answer is not None and not is_file(Path(answer)):
        problems.append(f"engine.answer: no file {answer}; a service leaves one as answer.json in its run's folder")
    problems += _key_problems(plan.config)
    if problems or model.synthetic is not None:
        return problems
    key = f"model.checkpoint: {plan.checkpoint}"
    needed = [Path(plan.checkpoint) / name for name in ("config.json", "model.safetensors.index.json")]
    return [f"{key}: no file {path}; expected a DeepSeek-V4 checkpoint" for path in needed if not is_file(path)]


def _key_problems(config: Config) -> list[str]:
    """Slurm hands on the variables of the shell that submits: one that is missing here is missing on the ranks."""
    key = config.engine.api_key if config.job.kind == "serve" else None
    if key is None:
        return []
    if key.env is not None:
        missing = not os.environ.get(key.env)
        where = f"engine.api_key.env: {key.env} is not set here; export it in the shell that submits"
        return [where] if missing else []
    file = Path(str(key.file))
    # A folder that is not here may still be on the nodes.
    return [f"engine.api_key.file: no file {file}"] if is_folder(file.parent) and not is_file(file) else []


def _preshard_problems(folder: str, kind: str) -> list[str]:
    manifest, key = Path(folder) / PRESHARD_MANIFEST, f"model.presharded: {folder}"
    if kind == "preshard" and is_file(manifest):
        return [f"{key}: {manifest} exists; a pre-sharded folder is not overwritten, remove it first"]
    if kind == "probe" and not is_file(manifest):
        return [f"{key}: no file {manifest}: not pre-sharded, or not to its end; submit with --set job.kind=preshard"]
    return []


def _checkpoint(config: Config) -> str:
    model = config.model
    if model.synthetic is None:
        return str(model.checkpoint)
    if model.synthetic.folder is None:
        return f"made on the ranks' devices, seed {config.run.seed}, skew {model.synthetic.skew:g}"
    # Made weights depend on writer, sizes and seed alone, so runs that agree in these share them.
    what = [FORMAT, model.shape.model_dump(), config.run.seed]
    what += [model.attention.model_dump()] if model.attention else []
    identity = json.dumps(what, sort_keys=True)
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
