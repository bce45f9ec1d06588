"""The flags that an engine is known to have, which are data: flags.yaml."""

from functools import cache
from importlib.resources import files

import yaml


@cache
def _entries() -> list[dict[str, str]]:
    found: list[dict[str, str]] = yaml.safe_load((files("launcher.engines") / "flags.yaml").read_text(encoding="utf-8"))
    return found


def known_flags(engine: str) -> frozenset[str]:
    """Names without dashes, of every version that was read."""
    return frozenset(flag for entry in _entries() if entry["engine"] == engine for flag in entry["flags"].split())


def releases(engine: str) -> str:
    """The versions that were read."""
    return "; ".join(entry["release"] for entry in _entries() if entry["engine"] == engine)


def has_flag(engine: str, name: str) -> bool:
    """Whether an engine takes `--name`; `--no-name` of all that it has, since switches can be turned off so."""
    known = known_flags(engine)
    return name in known or name.removeprefix("no-") in known
