"""The committed tables of what the compiler makes and what it costs, and their comparison with what it makes now."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table

from tests.gfx942.configurations import SHAPES, WORKLOADS, configurations, costs

HERE = Path(__file__).parent
Rows = dict[str, dict[str, Any]]


def compiled_rows() -> Rows:
    """A row of resources for each kernel and configuration."""
    return {key: _flat(asdict(value)) for shape in SHAPES for key, value in configurations(shape).items()}


def cost_rows() -> Rows:
    """A row of counts for each kernel of each workload."""
    rows: Rows = {}
    for workload in WORKLOADS:
        for key, value in costs(workload).items():
            bounds = {f"{name} µs": round(seconds * 1e6, 2) for name, seconds in value.bounds.items()}
            rows[f"{workload.name}: {key}"] = {
                "valu/weight": round(value.valu_per_weight, 2),
                **{name: getattr(value, name) for name in ("valu", "mfma", "lds", "vmem", "scalar", "bytes")},
                **bounds,
            }
    return rows


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Counts of several kinds as one cell: 16 B ×6."""
    return {
        name: " ".join(f"{k}×{n}" for k, n in value.items()) if isinstance(value, dict) else value
        for name, value in values.items()
    }


TABLES: dict[str, tuple[Path, Callable[[], Rows]]] = {
    "compiled": (HERE / "compiled.json", compiled_rows),
    "cost": (HERE / "cost.json", cost_rows),
}


def committed(name: str) -> tuple[str, Rows]:
    """(Triton's version, rows) of a committed table."""
    saved = json.loads(TABLES[name][0].read_text())
    return saved["triton"], saved["rows"]


def write(name: str, rows: Rows) -> Path:
    """Save a table to be committed."""
    path = TABLES[name][0]
    path.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    return path


def show(rows: Rows, before: Rows, console: Console) -> None:
    """Print the rows; where a committed value differs it stands before an arrow."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table("kernel, block sizes/warps/stages", *columns)
    for key, row in rows.items():
        old = before.get(key, {})
        table.add_row(f"{'' if old else 'new: '}{key}", *(_cell(row.get(c, ""), old.get(c)) for c in columns))
    for key in before.keys() - rows.keys():
        table.add_row(f"gone: {key}")
    console.print(table)


def _cell(value: Any, old: Any) -> str:
    return str(value) if old is None or old == value else f"[bold]{old} → {value}[/bold]"
