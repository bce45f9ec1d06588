"""The lines of a run on the terminal, as JSON, and as a plot."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_ep.bench.runs import Line

COLUMNS = (
    *("shape", "tokens", "routing", "kernel", "hit", "routes", "floor"),
    *("eager", "graph", "GB/s", "TFLOP/s", "ratio", "error"),
)
_PANELS_A_ROW = 4  # of a plot


def heading() -> str:
    """Names of the columns; times in µs."""
    return " ".join(f"{name:>14}" for name in COLUMNS)


def row(line: Line) -> str:
    """A line of the table."""
    if line.failure:
        return f"{line.shape:>14} {line.tokens:>14} {line.routing:>14} {line.kernel:>14} failed: {line.failure:.90}"
    times = ((line.floor, ".1f"), (line.eager, ".1f"), (line.graph, ".1f"))
    rates = ((line.gb_per_s, ".0f"), (line.tflop_per_s, ".0f"), (line.ratio, ".2f"), (line.error, ".1e"))
    numbers = ((line.hit, ".1f"), (line.routes, ".1f"), *times, *rates)
    shown = ("-" if value is None else format(value, form) for value, form in numbers)
    return " ".join(f"{cell!s:>14}" for cell in (line.shape, line.tokens, line.routing, line.kernel, *shown))


def save(path: Path, header: dict[str, Any], lines: Sequence[Line]) -> None:
    """All lines so far, atomically: a run that is killed leaves what it has measured."""
    document = {**header, "lines": [line.as_dict() for line in lines]}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[Line]]:
    """What `save` wrote."""
    document = json.loads(path.read_text())
    lines = [Line(**{key: value for key, value in line.items() if key != "ratio"}) for line in document.pop("lines")]
    return document, lines


def plot(path: Path, header: dict[str, Any], lines: Sequence[Line]) -> None:
    """Ratio to the floor over tokens, a panel for each shape and routing, a curve for each kernel."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((line.shape, line.routing) for line in lines if not line.failure))
    columns = min(len(panels), _PANELS_A_ROW)
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 4 * rows), sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (shape, routing) in zip(axes.flat, panels, strict=False):
        mine = [line for line in lines if (line.shape, line.routing) == (shape, routing) and not line.failure]
        for kernel in dict.fromkeys(line.kernel for line in mine):
            points = sorted((line.tokens, line.ratio or math.nan) for line in mine if line.kernel == kernel)
            axis.plot(*zip(*points, strict=True), marker="o", label=kernel)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{shape}, {routing}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3, which="both")
    for row in axes:
        row[0].set_ylabel("time / floor")
    axes[0][0].legend()
    figure.suptitle(f"{header['device']}, torch {header['torch']}, triton {header['triton']}, {header['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
