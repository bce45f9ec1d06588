"""Secrets in a configuration: they would stand in scripts, plans, reports and command lines, so they are refused."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.redact import is_secret, redact
from launcher.explain import Sources
from launcher.schema import Config

_KEY = re.compile(r"(?:^|-)key(?:-\w)?$")
"""Flags that take a key itself; those that name its file end otherwise."""

_EXPORT = "export it in the shell that submits: Slurm hands it on to the ranks"


def secret_problems(config: Config, sources: Sources) -> list[str]:
    """Where a value is a secret by its key's name or by its own form, and what to do. Shows no value."""
    out = []
    for keys, value in _texts(config.model_dump(mode="json")):
        way = _named(keys) or (_EXPORT if redact(value) != value else None)
        if way is not None:
            where = sources.where(".".join(keys))
            out.append(f"{where}: a secret does not belong here: scripts and reports show it; {way}")
    return out


def _named(keys: tuple[str, ...]) -> str | None:
    """What to do instead, where the last key is the name of a secret."""
    section, name = keys[:2], keys[-1]
    if section in (("cluster", "env"), ("engine", "env")):
        return _EXPORT if is_secret(name) else None
    if section != ("engine", "args") or not (_KEY.search(name) or is_secret(name.replace("-", "_"))):
        return None
    seen = "everybody on the node can read a command line"
    if name == "hf-token":
        return f"{seen}; export HF_TOKEN in the shell that submits: Slurm hands it on to the engine"
    return (
        f"{seen}; leave it out, or give the engine a file that only you can read, by a flag of its own that takes one"
    )


def _texts(node: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text and number, with its keys; those of a list have the list's."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _texts(value, (*keys, str(key)))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value, keys)
    elif isinstance(node, str) or (isinstance(node, int | float) and not isinstance(node, bool)):
        yield keys, str(node)
