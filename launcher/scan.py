"""Reading a log for what the rules know, in bounded memory: a log may be larger than that, and one line of it too."""

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from jobs.redact import redact
from launcher.rules import Rule, Rules, load

_CHUNK = 1 << 20
_LONGEST = 64 * 1024
"""A longer line is looked at in pieces."""
_OVERLAP = 1024
"""So much of a piece is looked at again with the next, so that nothing is missed where it was cut."""
_SHOWN = 400
_GENERAL = (
    *("success", "error", "fatal", "critical", "exception", "interrupt", "failed", "cannot", "could not", "unable"),
    *("timeout", "segmentation", "core dumped", "terminate called"),
)
"""What lines hold that end a process, or say why."""
_LAST_LINES = 200
"""An exception that a log goes on after for longer than so many lines was survived."""

_RANK = re.compile(r"^\[(?:default)?(\d+)\]:|\[rank ?(\d+)\]|^(\d+): |\btasks? (\d+)\b")
_HOST = re.compile(
    r"slurmstepd-([\w.-]+): |srun: error: ([\w.-]+): tasks? |[Nn]ode failure on ([\w.-]+)|\bnode ([\w.-]+) is "
)
_TASKS = re.compile(r"srun: error: ([\w.-]+): tasks? (\[?\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]?):")
_MOST_TASKS = 4096
_TIME = re.compile(r"\b(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)|[IWEF](\d{4} \d\d:\d\d:\d\d)|(?<!\d)(\d\d:\d\d:\d\d)(?!\d)")
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]: ?|\d+: ?)?[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b(?:: .*)?$")


@dataclass(frozen=True)
class Line:
    """A line that says something: where it stands, and what it tells of rank, host and time."""

    text: str
    file: str = ""
    number: int = 0
    rank: int | None = None
    host: str = ""
    time: str = ""


@dataclass
class Findings:
    """What was found in one log, or in several."""

    matches: list[tuple[Rule, Line]] = field(default_factory=list)
    """The first of each rule and file."""
    error: Line | None = None
    """The earliest that looks like an error."""
    failure: Line | None = None
    """The first that says that a process ended badly, and that nothing after it contradicts."""
    hosts: dict[int, str] = field(default_factory=dict)
    """Of ranks, as srun names them."""
    exception: Line | None = None
    """The first that a Python process ended with, or may have."""
    succeeded: bool = False
    lines: int = 0

    def add(self, other: "Findings") -> None:
        """What another log says too."""
        self.matches += other.matches
        self.error = self.error or other.error
        self.failure = self.failure or other.failure
        self.exception = self.exception or other.exception
        self.hosts = other.hosts | self.hosts
        self.lines += other.lines


@dataclass(frozen=True)
class _Marks:
    rules: Rules

    @cached_property
    def words(self) -> tuple[bytes, ...]:
        return tuple(sorted({word.encode() for word in self.by_word} | {word.encode() for word in _GENERAL}))

    @cached_property
    def by_word(self) -> dict[str, list[tuple[Rule, "re.Pattern[str]"]]]:
        found: dict[str, list[tuple[Rule, re.Pattern[str]]]] = {}
        for rule in self.rules.rules:
            for word in rule.words:
                found.setdefault(word, []).append((rule, re.compile(rule.pattern)))
        return found

    @cached_property
    def success(self) -> "re.Pattern[str]":
        return re.compile("|".join(self.rules.success))

    @cached_property
    def failure(self) -> "re.Pattern[str]":
        return re.compile("|".join(self.rules.failure))

    @cached_property
    def errors(self) -> list["re.Pattern[str]"]:
        return [re.compile(pattern) for pattern in self.rules.errors]


class Scanner:
    """Looks at the lines of one log, one after another."""

    def __init__(self, rules: Rules, file: str = "", rank: int | None = None) -> None:
        self._marks, self._file, self._rank = _Marks(rules), file, rank
        self._found: dict[str, tuple[Rule, Line]] = {}
        self._error: Line | None = None
        self._failure: Line | None = None
        self._hosts: dict[int, str] = {}
        self._first: Line | None = None
        self._exception: Line | None = None
        self._succeeded = False
        self.number = 0

    def says_nothing(self, lowered: bytes) -> bool:
        """Of text in lower case, whether no line of it can matter."""
        return not any(word in lowered for word in self._marks.words)

    def look(self, text: str) -> None:
        """At the line `number`."""
        lowered = text.lower()
        if self._marks.success.search(text):
            self._survived(line_of(text).rank)
            return
        for word, rules in self._marks.by_word.items():
            if word in lowered:
                for rule, pattern in rules:
                    if rule.name not in self._found and (match := pattern.search(text)):
                        self._found[rule.name] = rule, self._line(text, match[0])
        self._hosts |= _hosts(text)
        if _EXCEPTION.match(text):
            self._exception = self._line(text)
            self._first = self._first or self._exception
        if self._failure is None and (match := self._marks.failure.search(text)):
            self._failure = self._line(text, match[0])
        found = (pattern.search(text) for pattern in self._marks.errors)
        if self._error is None and (match := next(filter(None, found), None)):
            self._error = self._line(text, match[0])

    def _survived(self, rank: int | None) -> None:
        """A process ended well, so what it said before was none of its end; `rank` if the log is of several."""

        def gone(line: Line | None) -> bool:
            return line is None or rank is None or line.rank == rank

        self._found = {name: (rule, line) for name, (rule, line) in self._found.items() if not gone(line)}
        self._error = None if gone(self._error) else self._error
        self._failure = None if gone(self._failure) else self._failure
        self._first = None if gone(self._first) else self._first
        self._exception = None if gone(self._exception) else self._exception
        self._succeeded = True

    def findings(self) -> Findings:
        """What was found until here."""
        last = self._exception if self._exception and self.number - self._exception.number <= _LAST_LINES else None
        found = list(self._found.values())
        failure = self._failure or last
        return Findings(found, self._error, failure, self._hosts, self._first, self._succeeded, self.number)

    def _line(self, text: str, about: str = "") -> Line:
        line = replace(line_of(text, about), file=self._file, number=self.number)
        # Slurm writes of a whole step into the log of rank 0, which is also the batch script's.
        own = line.rank is None and not text.startswith(("slurmstepd", "srun: "))
        return replace(line, rank=self._rank) if own else line


def _hosts(text: str) -> dict[int, str]:
    """Ranks and their host, from srun's line about tasks that ended: `srun: error: nid1: tasks 2-3,5: Killed`."""
    found = _TASKS.search(text)
    hosts: dict[int, str] = {}
    if not found:
        return hosts
    for part in found[2].strip("[]").split(","):
        first, _, last = part.partition("-")
        hosts |= dict.fromkeys(range(int(first), min(int(last or first), int(first) + _MOST_TASKS) + 1), found[1])
    return hosts


def line_of(text: str, about: str = "") -> Line:
    """A line with what it tells itself; of a long one is shown what stands around `about`."""
    rank, host, time = _RANK.search(text), _HOST.search(text), _TIME.search(text)
    return Line(
        _around(text.strip(), about),
        rank=int(next(filter(None, rank.groups()))) if rank else None,
        host=next(filter(None, host.groups())) if host else "",
        time=next(filter(None, time.groups())) if time else "",
    )


def _around(text: str, about: str) -> str:
    if len(text) <= _SHOWN:
        return text
    text = redact(text)  # before it is cut: what is left of a secret might not look like one
    at = text.find(about)
    return text[at - _SHOWN // 4 :][:_SHOWN] if at > _SHOWN // 2 else text[:_SHOWN]


def scan_lines(lines: Iterable[str], rules: Rules | None = None, file: str = "", rank: int | None = None) -> Findings:
    """What lines say."""
    scanner = Scanner(rules or load(), file, rank)
    for text in lines:
        scanner.number += 1
        scanner.look(text)
    return scanner.findings()


def scan_file(path: Path, rank: int | None = None, rules: Rules | None = None) -> Findings:
    """What a log says, whatever bytes it holds. Raises `OSError` if it cannot be read."""
    scanner = Scanner(rules or load(), str(path), rank)
    with path.open("rb") as raw:
        utf16 = raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        raw.seek(0)
        file = codecs.EncodedFile(raw, "utf-8", "utf-16", "replace") if utf16 else raw
        for block, lines in _blocks(file):
            before = scanner.number
            if not scanner.says_nothing(block.lower()):
                for index, line in _lines(block):
                    scanner.number = before + index
                    if not scanner.says_nothing(line.lower()):
                        scanner.look(line.decode(errors="replace"))
            scanner.number = before + lines
    return scanner.findings()


def _blocks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Whole lines, about a chunk of them at a time, and how many; an endless line comes in pieces that overlap."""
    rest = b""
    while chunk := file.read(_CHUNK):
        text = rest + chunk
        whole = text.rfind(b"\n") + 1
        if whole:
            yield text[:whole], text.count(b"\n", 0, whole)
            rest = text[whole:]
        elif len(text) > _CHUNK:
            yield text, 0
            rest = text[-_OVERLAP:]
        else:
            rest = text
    if rest:
        yield rest, 1


def _lines(block: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines of a block, or parts of long ones, with the line's number in it.

    A carriage return ends a line as a terminal shows it (progress bars), but an editor does not count it as one.
    """
    for number, line in enumerate(block.split(b"\n"), start=1):
        for part in line.split(b"\r"):
            for first in range(0, len(part), _LONGEST):
                yield number, part[max(0, first - _OVERLAP) : first + _LONGEST]
