"""From a run's YAML and `--set` to a checked `Config`."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.engine_schema import Engine
from launcher.engines.known import program_of
from launcher.engines.problems import program_problems
from launcher.errors import InputError
from launcher.explain import OVERRIDE, Sources, did_you_mean, explain
from launcher.schema import Config
from launcher.secrets import secret_problems
from launcher.yamlfile import parse, read_mapping
from moe_ep.cost import OWN_TOKENS, SAME_TOKENS
from moe_ep.shape import ACTIVATION_GROUP, FP8_BLOCK, MXFP4_BLOCK

_PATH_KEYS = (
    ("run", "folder"),
    ("model", "checkpoint"),
    ("model", "presharded"),
    ("model", "synthetic", "folder"),
    ("engine", "answer"),
    ("engine", "api_key", "file"),
)
_VARIABLE = r"\$\{?(\w+)\}?"


def load(path: Path, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Config:
    """Read a run's YAML with the cluster and model that it names (files beside it, or paths).

    `overrides` are `key=value` with dotted keys and YAML values; they win over every file. `$NAME` in a path
    (run.folder and those of the model) is taken from `environ`, and left where it is not set, which `unresolved`
    then shows.

    Raises
    ------
    InputError
        With one line for each mistake: file, key, value, and what would be right.
    """
    changes = [parse_override(text) for text in overrides]
    document = read_mapping(path)
    files: dict[str, Path] = {}
    for section in ("cluster", "model"):
        given = [value for key, value in changes if key == section]
        where = f"{OVERRIDE} {section}" if given else f"{path}: {section}"
        files[section] = _find(path, section, (given or [document.get(section)])[-1], where)
        document[section] = read_mapping(files[section])
    for key, value in changes:
        if key not in files:
            _assign(document, key, value)
    sources = Sources(path, files, frozenset(key for key, _ in changes))
    document = _expand(document, environ)
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        raise InputError(explain(error.errors(), document, sources)) from None
    problems = _contradictions(config, sources)
    if problems:
        raise InputError("\n".join(problems))
    return config


def unresolved(text: str) -> list[str]:
    """Names of environment variables that `load` found unset in a path."""
    return re.findall(_VARIABLE, text)


def layer_numbers(config: Config) -> list[int]:
    """The layers that the job loads."""
    if config.job.layers == "all":
        return list(range(config.model.sizes.layers))
    return list(config.job.layers)


def parity_layers(config: Config) -> list[int]:
    """The layers that are compared: as configured, else the first hash layer and the first other one."""
    if config.job.parity.layers is not None:
        return list(config.job.parity.layers)
    shape, layers = config.model.sizes, layer_numbers(config)
    kinds = {shape.is_hash_layer(layer): layer for layer in reversed(layers)}
    return sorted(kinds.values())


def parse_override(text: str) -> tuple[str, Any]:
    """The dotted key and the YAML value of a `key=value`. Raises `InputError` if it is none."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise InputError(f"{OVERRIDE} {text}: expected key=value, e.g. {OVERRIDE} topology.ep=8")
    return key, parse(value, where=f"{OVERRIDE} {text}")


def _find(run_file: Path, section: str, chosen: Any, where: str) -> Path:
    folder = run_file.parent / f"{section}s"
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    form = f"the name of a file in {folder} ({', '.join(names) or 'empty'}) or a path to a .yaml"
    if not isinstance(chosen, str):
        raise InputError(f"{where}: {chosen!r} is not {form}")
    # A path is meant from the run's file, as in other formats that include, or from where the user stands.
    names_file = chosen.endswith((".yaml", ".yml"))
    candidates = [run_file.parent / chosen, Path(chosen)] if names_file else [folder / f"{chosen}.yaml"]
    for path in candidates:
        with suppress(OSError, ValueError):  # a name too long for a file, or with a NUL
            if path.is_file():
                return path
    raise InputError(f"{where}: {chosen!r} is not {form}{did_you_mean(chosen, names)}")


def _assign(document: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = document
    for depth, parent in enumerate(parents, start=1):
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"{OVERRIDE} {key}: {'.'.join(parents[:depth])} is a value, it has no keys")
        node = child
    node[last] = value


def _expand(document: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    for *parents, last in _PATH_KEYS:
        node: Any = document
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(last), str):
            path = re.sub(_VARIABLE, lambda m: environ.get(m[1], m[0]), node[last])
            node[last] = path.replace("~", environ.get("HOME", "~"), 1) if path.startswith("~/") else path
    return document


def _contradictions(config: Config, sources: Sources) -> list[str]:
    """What each key may say, but not together."""
    t, cluster, where = config.topology, config.cluster, sources.where
    out: list[str] = []
    layout = f"nodes {t.nodes} × ranks_per_node {t.ranks_per_node} = {t.ranks} ranks"
    if t.ranks % t.tp:
        out.append(f"{where('topology.tp')}: {t.tp} does not divide {layout}; use one of {_divisors(t.ranks)}")
    if t.ranks % t.ep:
        out.append(f"{where('topology.ep')}: {t.ep} does not divide {layout}; use one of {_divisors(t.ranks)}")
    elif t.ranks % t.tp == 0 and t.tp % t.ep and not t.own_tokens and not _over_all(config, t.ep):
        out.append(
            f"{where('topology.ep')}: {t.ep} does not divide tp {t.tp}: the ranks that combine experts must see "
            f"the same tokens, so an EP group lies in one TP group; use an ep of {_divisors(t.tp)}, or tp {t.ep}, "
            "or tp 1 where each rank has tokens of its own"
        )
    out += _expert_tp_problems(config, sources) + _comm_problems(config, sources)
    if cluster.devices_per_node and t.ranks_per_node > cluster.devices_per_node:
        out.append(
            f"{where('topology.ranks_per_node')}: {t.ranks_per_node} is more than the {cluster.devices_per_node} "
            f"devices of a node of {cluster.name}"
        )
    if cluster.scheduler == "local" and t.nodes > 1:
        out.append(f"{where('topology.nodes')}: {t.nodes}, but {cluster.name} runs on this machine alone; use 1")
    if cluster.time_limit_min and config.limits.time_min > cluster.time_limit_min:
        out.append(
            f"{where('limits.time_min')}: {config.limits.time_min} is more than {cluster.name}'s time_limit_min "
            f"{cluster.time_limit_min}"
        )
    if config.job.kind == "serve" and config.engine.name == "embedded":
        out += _embedded_problems(config, sources)
    out += program_problems(config, sources) + _made_problems(config, sources) + secret_problems(config, sources)
    if cluster.scheduler == "slurm" and config.limits.signal_s >= config.limits.time_min * 60:
        out.append(
            f"{where('limits.signal_s')}: {config.limits.signal_s} s before the end of limits.time_min "
            f"{config.limits.time_min} is before its beginning; use less than {config.limits.time_min * 60}"
        )
    return out + _layer_problems(config, sources)


def _made_problems(config: Config, sources: Sources) -> list[str]:
    """What weights that are nowhere on disk do not go with."""
    if config.model.made_skew is None:
        return []
    where, out = sources.where, list[str]()
    if config.job.kind == "preshard" or (config.job.kind == "serve" and program_of(config) is None):
        out.append(
            f"{where('model.synthetic.folder')}: missing: a {config.job.kind} job reads a checkpoint, and weights that "
            "ranks make on their devices are for probes; say where to write one"
        )
    if config.model.presharded is not None:
        out.append(f"{where('model.presharded')}: the ranks make their weights (model.synthetic); leave it out")
    return out


def _embedded_problems(config: Config, sources: Sources) -> list[str]:
    """What the engine in the ranks cannot do."""
    t, engine, where = config.topology, config.engine, sources.where
    out: list[str] = []
    if t.tp != t.ranks:
        out.append(
            f"{where('topology.tp')}: {t.tp}, but the embedded engine's {t.ranks} ranks all see the same tokens; "
            f"use tp {t.ranks}"
        )
    if config.job.layers != "all":
        out.append(f"{where('job.layers')}: {config.job.layers}: a service needs all layers; use all")
    if t.shared_expert == "sharded":
        out.append(f"{where('topology.shared_expert')}: sharded: the embedded engine holds it whole; use replicated")
    if config.model.presharded is not None:
        out.append(f"{where('model.presharded')}: the embedded engine reads the checkpoint; remove it")
    if config.placement.profile is not None:
        out.append(f"{where('placement.profile')}: the embedded engine holds the experts in order; remove it")
    if config.model.attention is None and config.model.synthetic is not None:
        out.append(
            f"{where('model.attention')}: missing: only experts would be made, and a service needs a whole model"
        )
    if t.dense == "sharded" and config.model.attention is not None and config.model.attention.o_groups % t.tp:
        out.append(
            f"{where('topology.dense')}: sharded: {config.model.attention.o_groups} groups of heads cannot be shared "
            f"out over tp {t.tp}; use replicated"
        )
    if config.memory.kv != "bf16":
        out.append(f"{where('memory.kv')}: {config.memory.kv}: the embedded engine's caches are bf16; use bf16")
    if engine.limits.step_tokens < config.memory.batch:
        out.append(
            f"{where('engine.limits.step_tokens')}: {engine.limits.step_tokens} is less than memory.batch "
            f"{config.memory.batch}: each sequence that is being answered reads one token a step"
        )
    given: dict[str, object] = {"command": engine.command, "args": engine.args, "env": engine.env}
    given |= {"health_s": engine.health_s != Engine().health_s, "allow_unknown_args": engine.allow_unknown_args}
    out += [
        f"{where(f'engine.{key}')}: of an engine that is a program of its own; engine.name is embedded"
        for key, value in given.items()
        if value
    ]
    if engine.limits.completion_tokens >= config.memory.context:
        out.append(
            f"{where('engine.limits.completion_tokens')}: {engine.limits.completion_tokens} leaves no token for a "
            f"prompt; memory.context is {config.memory.context}"
        )
    return out


def _over_all(config: Config, size: int) -> bool:
    """Whether it is all ranks, of an engine that brings its data-parallel groups' tokens together for the experts."""
    return program_of(config) is not None and size == config.topology.ranks


def _expert_tp_problems(config: Config, sources: Sources) -> list[str]:
    t, shape, where = config.topology, config.model.sizes, sources.where
    out: list[str] = []
    if t.expert_tp > 1 and t.ep > 1:
        out.append(
            f"{where('topology.expert_tp')}: {t.expert_tp} beside ep {t.ep}: experts are either spread over ranks (ep) "
            "or each cut into slices of I (expert_tp), not both, as the engines have it; set one of them to 1"
        )
    elif t.tp % t.expert_tp and not _over_all(config, t.expert_tp):
        out.append(
            f"{where('topology.expert_tp')}: {t.expert_tp} does not divide tp {t.tp}: the ranks that add up slices of "
            f"an expert must see the same tokens; use one of {_divisors(t.tp)}"
        )
    elif shape.intermediate % (MXFP4_BLOCK * t.expert_tp):
        out.append(
            f"{where('topology.expert_tp')}: {t.expert_tp} slices of I = {shape.intermediate} are not whole mxfp4 "
            f"blocks of {MXFP4_BLOCK}"
        )
    elif (
        config.backend.activation_dtype == "fp8"
        and t.expert_tp > 1
        and shape.intermediate % (ACTIVATION_GROUP * t.expert_tp)
    ):
        out.append(
            f"{where('backend.activation_dtype')}: fp8, but {t.expert_tp} slices of I = {shape.intermediate} are not "
            f"multiples of {ACTIVATION_GROUP} activations, which share a scale; use bf16, or another topology.expert_tp"
        )
    shared = shape.shared_experts * shape.intermediate
    if shared % (FP8_BLOCK * t.shared_tp) and t.shared_tp > 1:
        out.append(
            f"{where('topology.shared_expert')}: {t.shared_tp} slices of the shared expert's {shared} rows are not "
            f"whole fp8 blocks of {FP8_BLOCK}; use replicated"
        )
    arch, activations = config.cluster.arch, config.backend.activation_dtype
    if config.job.kind == "tune" and activations == "fp8" and arch != "gfx942":
        out.append(
            f"{where('backend.activation_dtype')}: fp8, but on {arch} there is nothing to tune: only gfx942 multiplies "
            "activations as fp8; use bf16"
        )
    if config.job.kind == "preshard" and config.model.presharded is None:
        out.append(f"{where('model.presharded')}: missing; it is the folder that a preshard job writes")
    return out


def _comm_problems(config: Config, sources: Sources) -> list[str]:
    t, comm, where = config.topology, config.comm, sources.where
    out: list[str] = []
    possible = OWN_TOKENS if t.own_tokens else SAME_TOKENS
    if comm.strategy not in ("auto", *possible):
        whose = "tokens of its own (tp 1)" if t.own_tokens else f"the tokens of its TP group (tp {t.tp})"
        out.append(
            f"{where('comm.strategy')}: {comm.strategy} is not for a rank that has {whose}; "
            f"use auto, {' or '.join(possible)}"
        )
    if t.own_tokens and t.shared_expert == "sharded" and comm.strategy != "all_gather":
        out.append(
            f"{where('topology.shared_expert')}: sharded, but only all_gather brings every token to all slices; "
            "use replicated, or comm.strategy all_gather"
        )
    if config.placement.profile is not None and t.ep == 1:
        out.append(f"{where('placement.profile')}: ep is 1, every rank holds all experts; leave it out")
    if config.placement.profile is not None and config.model.presharded is not None:
        out.append(
            f"{where('placement.profile')}: pre-sharded files hold the experts in order; leave out model.presharded"
        )
    return out


def _layer_problems(config: Config, sources: Sources) -> list[str]:
    shape, where = config.model.sizes, sources.where
    out: list[str] = []
    if config.topology.ep > shape.experts:
        out.append(f"{where('topology.ep')}: {config.topology.ep} is more than the {shape.experts} experts of a layer")
    loaded, compared = layer_numbers(config), parity_layers(config)
    if not loaded or sorted(set(loaded)) != loaded or not set(loaded) <= set(shape.all_layers):
        out.append(f"{where('job.layers')}: {loaded} is not 'all' or a rising list from 0..{shape.all_layers[-1]}")
    if not set(compared) <= set(loaded):
        out.append(f"{where('job.parity.layers')}: {compared} are not all among the loaded layers {loaded}")
    return out


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
