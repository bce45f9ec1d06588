"""What is wrong with a config whose engine is a program of its own."""

from collections.abc import Callable

from launcher.engine_schema import Engine
from launcher.engines.flags import has_flag, known_flags, releases
from launcher.engines.known import launch_of, program_of
from launcher.engines.program import Program
from launcher.explain import Sources, did_you_mean
from launcher.schema import Config

_EMBEDDED_ONLY = ("limits", "dtype")


def program_problems(config: Config, sources: Sources) -> list[str]:
    """Each names file, key and what would be right; [] where another engine, or no service, is asked for."""
    program, where, engine = program_of(config), sources.where, config.engine
    if program is None:
        return []
    out = [_at(where, text) for text in program.argument_problems(engine.args)]
    out += [_at(where, text) for text in _unknown_flags(program, engine)]
    layout = program.layout_problem(launch_of(config, ""))
    if layout is not None:
        out.append(_at(where, layout))
    if config.model.synthetic is not None:
        out.append(
            f"{where('model.synthetic')}: {program.name} reads a checkpoint that is there; give model.checkpoint"
        )
    if config.model.presharded is not None:
        out.append(f"{where('model.presharded')}: {program.name} reads the checkpoint; remove it")
    if engine.api_key is not None and program.key_variable is None:
        out.append(
            f"{where('engine.api_key')}: {program.name} takes its key on its command line, which everybody on its node "
            "can read; remove it, and keep engine.host 127.0.0.1 or put a proxy before the service"
        )
    default = Engine()
    out += [
        f"{where(f'engine.{key}')}: of the embedded engine; set {program.name}'s own flags in engine.args"
        for key in _EMBEDDED_ONLY
        if getattr(engine, key) != getattr(default, key)
    ]
    return out


def _unknown_flags(program: Program, engine: Engine) -> list[str]:
    if engine.allow_unknown_args:
        return []
    return [
        f"engine.args.{name}: {program.name} has no --{name} in what was read of it ({releases(program.name)})"
        f"{did_you_mean(name, sorted(known_flags(program.name)))}; engine.allow_unknown_args: true lets it pass"
        for name in engine.args
        if f"--{name}" not in program.keys and not has_flag(program.name, name)
    ]


def _at(where: Callable[[str], str], text: str) -> str:
    key, _, rest = text.partition(":")
    return f"{where(key)}:{rest}"
