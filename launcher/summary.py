"""What a night leaves: summary.json for programs, junit.xml for CI, the index page for people."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.compare import Comparison, worst
from launcher.errors import InputError
from launcher.files import write_atomically
from launcher.history import History, Record
from launcher.index import index_page
from launcher.junit import Case, junit
from launcher.night import Entry, Night
from launcher.verdicts import cases

SCHEMA = "moe-ep/nightly-summary"
SCHEMA_VERSION = 1


def finish(night: Night, store: History, junit_file: Path | None) -> dict[str, Any]:
    """Write summary.json, junit.xml and the index page, then that the night has ended; returns the summary.

    Raises `InputError` if `junit_file` cannot be written; the night has ended nevertheless.
    """
    value = summary_of(night)
    text = junit([case for entry in night.entries for case in _cases(entry)], f"nightly {night.night}")
    write_atomically(night.folder / "summary.json", json.dumps(value, indent=2, allow_nan=False) + "\n")
    write_atomically(night.folder / "junit.xml", text)
    _write_index(store, value)
    night.finished = True
    night.save()
    if junit_file:
        try:
            write_atomically(junit_file, text)
        except OSError as error:
            raise InputError(f"--junit {junit_file}: {error}") from None
    return value


def _write_index(store: History, value: dict[str, Any]) -> None:
    """Anew as long as another nightly has added to the history meanwhile: the last to write has seen everything."""
    shown: list[Record] | None = None
    while shown != (found := store.records()):
        shown = found
        write_atomically(store.folder / "index.html", index_page(store.folder, shown, value))


def summary_of(night: Night) -> dict[str, Any]:
    """What programs read of a night."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "night": night.night,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": worst([entry.verdict for entry in night.entries]),
        "configs": [
            {
                "config": entry.config,
                "name": entry.name,
                "verdict": entry.verdict,
                "state": entry.state,
                "reasons": entry.reasons,
                "run_dir": entry.run_dir or None,
                "run_id": Path(entry.run_dir).name or None,
                "report": entry.page or None,
                "comparison": entry.comparison,
            }
            for entry in night.entries
        ],
    }


def _cases(entry: Entry) -> list[Case]:
    if entry.comparison is None:
        return [Case(entry.name, "validity", "failed", "\n".join(entry.reasons))]
    return cases(Comparison.from_dict(entry.comparison))


def show(summary: dict[str, Any], night: Night, store: History, out: Console) -> None:
    """The night as a table, and where its files are."""
    table = Table(title=f"night {night.night}: {summary['verdict']}", title_justify="left", title_style="bold")
    for head in ("config", "run", "state", "verdict", "why"):
        table.add_column(head, overflow="fold")  # ids and paths must be whole, in a narrow log too
    for line in summary["configs"]:
        cells = (line["name"], line["run_id"] or "", line["state"], line["verdict"], "\n".join(line["reasons"]))
        table.add_row(*map(Text, cells))
    out.print(table)
    out.print(f"index: {store.folder / 'index.html'}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"summary: {night.folder / 'summary.json'}", markup=False, highlight=False, soft_wrap=True)
