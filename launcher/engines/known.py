"""What is known of an engine before it is started: what it cannot do with a config, what it is known to do wrong."""

from dataclasses import dataclass

from launcher.engines.program import Launch, Program
from launcher.engines.sglang import SGLANG
from launcher.engines.tokenspeed import TOKENSPEED
from launcher.engines.vllm import VLLM
from launcher.schema import Config

PROGRAMS = {program.name: program for program in (TOKENSPEED, VLLM, SGLANG)}


@dataclass(frozen=True)
class Limit:
    """Something known against an engine on a device."""

    text: str
    stops: bool
    """Whether a run would fail, or answer wrongly: then it is submitted with --force only."""


def launch_of(config: Config, checkpoint: str) -> Launch:
    """What a config asks of an engine."""
    topology, memory, engine = config.topology, config.memory, config.engine
    return Launch(
        model=checkpoint,
        served_name=engine.served_name or config.model.name,
        nodes=topology.nodes,
        ranks_per_node=topology.ranks_per_node,
        tp=topology.tp,
        ep=topology.ep,
        expert_tp=topology.expert_tp,
        context=memory.context,
        sequences=memory.batch,
        kv=memory.kv,
        arch=config.cluster.arch,
        host=engine.host,
        timeout_s=config.limits.rank_timeout_s,
    )


def program_of(config: Config) -> Program | None:
    """The program that a serve job starts; None for the embedded engine and for other jobs."""
    return PROGRAMS.get(config.engine.name) if config.job.kind == "serve" else None


def node_commands(config: Config, checkpoint: str, python: str) -> list[list[str]]:
    """The command of every node, [] where none is started."""
    program = program_of(config)
    if program is None:
        return []
    start = [word.replace("{python}", python) for word in config.engine.command or program.command]
    return program.commands(launch_of(config, checkpoint), start, config.engine.args)


def limits_of(config: Config) -> list[Limit]:
    """What is known against a config's engine, on its cluster's devices or where it listens; [] where nothing is."""
    program, arch, engine = program_of(config), config.cluster.arch, config.engine
    open_to_all = (
        [Limit(f"engine.host: {engine.host} without engine.api_key: whoever reaches the node may use it", stops=False)]
        if config.job.kind == "serve" and engine.public and engine.api_key is None
        else []
    )
    if program is None:
        return open_to_all
    said = Limit(f"{program.name}: its flags are those of {program.read}; other versions may have others", stops=False)
    return [*(_ON_GFX942[program.name](config) if arch == "gfx942" else []), *open_to_all, said]


def _tokenspeed(config: Config) -> list[Limit]:
    return [
        Limit(
            'tokenspeed: 0.1.1 and later refuse gfx942 when they start ("Detected unsupported AMD GPU architecture '
            "'gfx942'\"): the ranks' image needs tokenspeed of June 2026 (commit 4df7c879), whose mxfp4 experts "
            "become this project's by TS_SERVE_ENGINE_MODULE",
            stops=False,
        )
    ]


def _vllm(config: Config) -> list[Limit]:
    out = [
        Limit(
            "vllm: on gfx942 it computes DeepSeek-V4's mxfp4 experts with bf16 activations, by its backend "
            "triton_unfused: what it would take by itself first, AITER_MXFP4_BF16, is for gfx950",
            stops=False,
        )
    ]
    if config.topology.ep > 1:
        better = f"topology.ep=1 and expert_tp={config.topology.ranks}"
        out.append(
            Limit(
                f"topology.ep: {config.topology.ep}: vllm with expert parallelism on gfx942 is known to refuse mxfp4 "
                f"experts or to answer nonsense; use {better}, or another engine",
                stops=True,
            )
        )
    return out


def _sglang(config: Config) -> list[Limit]:
    return [
        Limit(
            "engine.name: sglang has no mxfp4 experts for DeepSeek-V4 on gfx942, only on gfx95x; use embedded, "
            "tokenspeed or vllm",
            stops=True,
        )
    ]


_ON_GFX942 = {"tokenspeed": _tokenspeed, "vllm": _vllm, "sglang": _sglang}
