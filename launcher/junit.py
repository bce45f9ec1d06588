"""Verdicts as JUnit XML, which CI systems show: one case per config and gate."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Case:
    """One gate of one config. A case without a verdict is skipped: it neither passes nor fails."""

    config: str
    gate: str
    outcome: Literal["passed", "failed", "skipped"]
    text: str


def junit(cases: Sequence[Case], name: str) -> str:
    """The text of a JUnit file with one suite per config."""
    configs = list(dict.fromkeys(case.config for case in cases))
    root = ET.Element("testsuites", {"name": _plain(name), **_counts(cases)})
    for config in configs:
        mine = [case for case in cases if case.config == config]
        suite = ET.SubElement(root, "testsuite", {"name": _plain(config), **_counts(mine)})
        for case in mine:
            element = ET.SubElement(suite, "testcase", classname=_plain(config), name=case.gate)
            if case.outcome != "passed":
                tag = "failure" if case.outcome == "failed" else "skipped"
                first = _plain(next(iter(case.text.splitlines()), case.outcome))
                ET.SubElement(element, tag, message=first).text = _plain(case.text)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _counts(cases: Sequence[Case]) -> dict[str, str]:
    return {
        "tests": str(len(cases)),
        "failures": str(sum(case.outcome == "failed" for case in cases)),
        "skipped": str(sum(case.outcome == "skipped" for case in cases)),
        "errors": "0",
    }


def _plain(text: str) -> str:
    """XML 1.0 has no control characters but these three, and logs have all."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", text)
