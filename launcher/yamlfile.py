"""Reading YAML as people mean it: 1e-6 is a number, and a key that stands twice is a mistake."""

import re
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 by PyYAML, but for numbers like 1e-6 and keys that stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # what << brings may be there
        keys = [self.construct_object(key, deep=True) for key in written]
        for key_node, key in zip(written, keys, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(text: str, *, where: str) -> Any:
    """The value of a YAML text. Raises `InputError` naming `where`, line and column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # PyYAML lets some of these out
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises `InputError` if it cannot be read or holds something else."""
    try:
        value = parse(path.read_text(encoding="utf-8"), where=str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected keys and values, found {type(value).__name__}")
    return value
