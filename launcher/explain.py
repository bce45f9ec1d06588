"""One line for each of pydantic's errors: the file, the key, what was found, what would be right."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from jobs.redact import HIDDEN, is_secret, redact
from launcher.schema import Config

OVERRIDE = "--set"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True)
class Sources:
    """Where each key of a configuration was written."""

    run_file: Path
    files: Mapping[str, Path]
    """The files that sections of their own came from: cluster, model."""
    overridden: frozenset[str]
    """Keys given with `--set`."""

    def where(self, key: str) -> str:
        """The place of a dotted key, to begin an error with."""
        if any(o == key or key.startswith(f"{o}.") or o.startswith(f"{key}.") for o in self.overridden):
            return f"{OVERRIDE} {key}"
        section, _, rest = key.partition(".")
        if section in self.files:
            return f"{self.files[section]}: {rest}" if rest else str(self.files[section])
        return f"{self.run_file}: {key}"


def explain(errors: Sequence[Any], document: Any, sources: Sources) -> str:
    """One line for each key of `document` that pydantic found fault with."""
    faults: dict[str, list[str]] = {}
    for error in errors:
        location = _keys_of(error, document)
        faults.setdefault(sources.where(".".join(location)), []).append(_fault(error, location))
    # A union reports one fault for each of its branches: either would do.
    return "\n".join(f"{where}: {'; or '.join(found)}" for where, found in faults.items())


def _keys_of(error: Any, document: Any) -> list[str]:
    """The location of an error as the user wrote it: pydantic's names of a union's branches are left out."""
    keys: list[str] = []
    node = document
    for part in error["loc"]:
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int)
        if inside:
            node = node[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        keys.append(str(part))
    return keys


def _fault(error: Any, location: list[str]) -> str:
    message = f"{error['msg'][0].lower()}{error['msg'][1:]}"
    if error["type"] == "extra_forbidden":
        known = sorted(_keys_at(location[:-1]))
        return f"unknown key{did_you_mean(location[-1], known)} (there are: {', '.join(known)})"
    if error["type"] == "missing":
        return f"missing, expected {_form(location)}"
    if error["type"] == "string_pattern_mismatch":
        # A control character cannot be seen in a message.
        message = f"must match {error['ctx']['pattern']}"
    found = HIDDEN if is_secret(location[-1]) else redact(repr(error["input"]))
    if error["type"] == "model_type":
        return f"{found} is wrong: expected {_form(location)}"
    if error["type"] == "value_error":
        return message.removeprefix("value error, ")
    return f"{found} is wrong: {message}"


def _section_at(location: Sequence[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = Config
    for part in location:
        field = section.model_fields.get(part)
        inner = [t for t in _alternatives(field.annotation) if _is_section(t)] if field else []
        if not inner:
            return None
        section = inner[0]
    return section


def _keys_at(location: Sequence[str]) -> list[str]:
    section = _section_at(location)
    return list(section.model_fields) if section else []


def _alternatives(annotation: Any) -> Sequence[Any]:
    return getattr(annotation, "__args__", None) or (annotation,)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _form(location: Sequence[str]) -> str:
    section = _section_at(location[:-1])
    annotation = section.model_fields[location[-1]].annotation if section else None
    if _is_section(annotation):
        return f"a section with {', '.join(_keys_at(location))}"
    choices = [repr(choice) for choice in get_args(annotation) if isinstance(choice, str)]
    return " or ".join(choices) or getattr(annotation, "__name__", None) or str(annotation)
