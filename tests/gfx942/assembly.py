"""The assembly text that Triton's AMD backend emits, as instructions, labels and resources."""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

_OPERAND = re.compile(r"(?:[^,\[\]()|]|\[[^\]]*\]|\([^)]*\)|\|[^|]*\|)+")
_LABEL = re.compile(r"([.\w$]+):$")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]+)"')
_ENDS = (".section", ".Lfunc_end")


@dataclass(frozen=True)
class Instruction:
    """`v_add_f32_dpp v1, v2, v3 row_shr:8 bound_ctrl:1`: opcode, operands and modifiers apart.

    A modifier without a value maps to "". `source` is the kernel's file and line, empty if unknown.
    """

    opcode: str
    operands: tuple[str, ...]
    modifiers: dict[str, str]
    text: str
    source: str = ""

    @property
    def base(self) -> str:
        """The opcode without its encoding: v_add_f32_dpp → v_add_f32."""
        return re.sub(r"_(e32|e64|sdwa|dpp)$", "", self.opcode) if self.opcode.startswith("v_") else self.opcode


@dataclass(frozen=True)
class Program:
    """A kernel. `labels` gives the index of the instruction that a label stands before.

    `directives` are the integers of `.amdhsa_…`, `metadata` is the kernel's entry of `amdhsa.kernels`; both are
    empty for a fragment.
    """

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    directives: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def parse_instruction(text: str, source: str = "") -> Instruction:
    """One line of assembly without its comment."""
    opcode, _, rest = text.partition(" ")
    parts = [part.strip() for part in _OPERAND.findall(rest)]
    modifiers: dict[str, str] = {}
    if parts:
        # Modifiers follow the last operand after spaces. Brackets and quotes in them hold no space.
        last, *tail = parts[-1].split()
        parts[-1] = last
        for word in tail:
            name, _, value = word.partition(":")
            modifiers[name] = value
    return Instruction(opcode, tuple(parts), modifiers, text, source)


def parse(text: str) -> Program:
    """The kernel in a file of assembly. Raises `ValueError` if there is none."""
    name = re.search(r"\.amdhsa_kernel\s+(\S+)", text)
    if name is None:
        raise ValueError("no .amdhsa_kernel directive: this is not the assembly of a gfx942 kernel")
    start = text.index(f"\n{name[1]}:")
    instructions, labels = _body(text[start:].splitlines()[1:])
    metadata = re.search(r"\.amdgpu_metadata\n(.*?)\n\.\.\.\n", text, re.S)
    kernels = yaml.safe_load(metadata[1])["amdhsa.kernels"] if metadata else []
    return Program(
        name[1],
        instructions,
        labels,
        {key: int(value) for key, value in re.findall(r"\.amdhsa_(\w+)\s+(\d+)\s", text)},
        next((k for k in kernels if k[".name"] == name[1]), {}),
    )


def parse_fragment(text: str, name: str = "fragment") -> Program:
    """Bare instructions and labels, one a line."""
    instructions, labels = _body(text.splitlines())
    return Program(name, instructions, labels)


def _body(lines: list[str]) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    files: dict[str, str] = {}
    source = ""
    for line in lines:
        code = line.split(";")[0].split("//")[0].strip()
        if code.startswith(_ENDS):
            break
        if label := _LABEL.match(code):
            labels[label[1]] = len(instructions)
        elif file := _FILE.match(code):
            files[file[1]] = file[2]
        elif loc := _LOC.match(code):
            source = f"{files.get(loc[1], '?')}:{loc[2]}" if loc[2] != "0" else ""
        elif code and not code.startswith("."):
            instructions.append(parse_instruction(re.sub(r"\s+", " ", code), source))
    return tuple(instructions), labels
