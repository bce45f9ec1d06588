"""`python -m launcher.engines.read_flags WHEEL_OR_FOLDER`: the flags of an engine, read in its package's sources.

Nothing of the package is run. Prints an entry of flags.yaml, which takes its place when an engine's version changes.
"""

import argparse
import ast
import re
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

SOURCES = {
    "vllm": r"vllm/(engine/arg_utils|entrypoints/common/cli_args)\.py",
    "sglang": r"sglang/srt/(server_args|arg_groups/fields/\w+)\.py",
    "tokenspeed": r"tokenspeed/(runtime/utils/server_args|cli/_argsplit)\.py",
}
"""By engine, the files that say its flags."""

_INDENT = " " * 4
_FLAG = re.compile(r"--[a-z][a-z0-9-]*")


def flags_of(source: str) -> set[str]:
    """The flags that a module declares, without their dashes.

    Literal ones of `add_argument`, fields of dataclasses that become flags (vLLM's `…FrontendArgs`, SGLang's annotated
    by `A[…]`), and the names in tokenspeed's sets `_…_FLAGS`, `_GATEWAY_…`.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            found |= _literals(node)
        elif isinstance(node, ast.ClassDef):
            found |= _fields(node)
        elif isinstance(node, ast.Assign) and re.match(r"_(\w+_)?(FLAGS|GATEWAY_\w+)$", ast.unparse(node.targets[0])):
            found |= _literals(node.value)
    return {flag.removeprefix("--") for flag in found}


def _literals(node: ast.AST) -> set[str]:
    texts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str))
    return {text for text in texts if _FLAG.fullmatch(text)}


def _fields(section: ast.ClassDef) -> set[str]:
    found: set[str] = set()
    for field in section.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        kind = field.annotation
        annotated = isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "A"
        if annotated:
            calls = (part for part in ast.walk(kind) if isinstance(part, ast.Call))
            options = {key.arg: key.value for call in calls for key in call.keywords}
            if "no_cli" not in options:
                own = options.get("cli_name")
                found |= _literals(own) if own is not None else {_flag(field.target.id)}
                found |= _literals(options["aliases"]) if "aliases" in options else set()
        elif section.name.endswith("FrontendArgs"):
            found.add(_flag(field.target.id))
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def modules(package: Path) -> Iterator[tuple[str, str]]:
    """Path within the package, and text, of every module of a wheel or of a folder."""
    if package.is_dir():
        for path in sorted(package.rglob("*.py")):
            yield path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")
        return
    with zipfile.ZipFile(package) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(".py"):
                yield name, wheel.read(name).decode("utf-8")


def read(package: Path) -> tuple[str, list[str]]:
    """Which engine it is, and its flags in order. Raises `ValueError` if it is none of `SOURCES`."""
    found: dict[str, set[str]] = {}
    for name, text in modules(package):
        for engine, pattern in SOURCES.items():
            if re.search(rf"(^|/){pattern}$", name):
                found.setdefault(engine, set()).update(flags_of(text))
    if len(found) != 1:
        raise ValueError(f"the sources of {', '.join(found) or 'no engine'}; expected one of {[*SOURCES]}")
    ((engine, flags),) = found.items()
    return engine, sorted(flags)


def main(package: Path) -> None:
    """Print an entry of flags.yaml."""
    try:
        engine, flags = read(package)
    except (OSError, ValueError, SyntaxError, zipfile.BadZipFile) as error:
        sys.exit(f"{package}: {error}")
    print(f"- engine: {engine}\n  release: {package.name}\n  read: {datetime.now(UTC):%Y-%m-%d}\n  flags: >-")
    print(
        textwrap.fill(" ".join(flags), 118, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="a wheel, or the folder of an unpacked one or of a checkout")
    main(parser.parse_args().package)
