"""Pictures as text: SVG and PNG that a page can hold in itself."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_ACCENT = (78, 121, 167)


@dataclass(frozen=True)
class Point:
    """A measurement with the ends of its spread, and what its floor allows (None: not known)."""

    x: float
    y: float
    low: float
    high: float
    bound: float | None


def log_chart(points: Sequence[Point], x_name: str, y_name: str) -> Markup:
    """Points over evenly spaced x, logarithmic in y, each with its spread; the bounds as a dashed line."""
    width, height, left, right, top, bottom = 720, 320, 110, 20, 48, 60
    values = [v for p in points for v in (p.low, p.high, p.bound) if v]
    if not values:
        return Markup("")
    lowest, highest = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    highest = max(highest, lowest + 1)
    step = (width - left - right) / len(points)

    def at_x(i: int) -> float:
        return round(left + (i + 0.5) * step, 1)

    def at_y(value: float) -> float:
        part = (math.log10(max(value, 10**lowest)) - lowest) / (highest - lowest)
        return round(height - bottom - part * (height - top - bottom), 1)

    out = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{y_name} over {x_name}">']
    for power in range(lowest, highest + 1, max(1, (highest - lowest) // 6)):
        y = at_y(10.0**power)
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{_power(power)}</text>')
    for i, point in enumerate(points):
        out.append(f'<text x="{at_x(i)}" y="{height - bottom + 24}" text-anchor="middle">{point.x:g}</text>')
    out.append(f'<text x="{width - right}" y="{height - 8}" text-anchor="end">{x_name}</text>')
    out.append(f'<text x="4" y="22">{y_name}</text>')
    bounds = [(at_x(i), at_y(p.bound)) for i, p in enumerate(points) if p.bound]
    if bounds:
        out.append(f'<polyline class="floor" points="{_path(bounds)}"/>')
    drawn = [(i, p) for i, p in enumerate(points) if p.y > 0]
    out.append(f'<polyline class="curve" points="{_path([(at_x(i), at_y(p.y)) for i, p in drawn])}"/>')
    for i, p in drawn:
        x = at_x(i)
        out.append(f'<line class="spread" x1="{x}" x2="{x}" y1="{at_y(p.low)}" y2="{at_y(p.high)}"/>')
        out.append(f'<circle class="dot" cx="{x}" cy="{at_y(p.y)}" r="4"><title>{p.x:g}: {p.y:,.4g}</title></circle>')
    return Markup("".join([*out, "</svg>"]))


def sparkline(values: Sequence[float | None], low: float | None = None, high: float | None = None) -> Markup:
    """Values in order, gaps where there is none; the band from `low` to `high` is what is allowed."""
    width, height, pad = 160, 36, 4
    known = [v for v in values if v is not None]
    if not known:
        return Markup("")
    edges = [*known, *(v for v in (low, high) if v is not None)]
    bottom, top = min(edges), max(edges)
    reach = (top - bottom) or abs(top) or 1.0

    def place(i: int, value: float) -> tuple[float, float]:
        x = pad + i * (width - 2 * pad) / max(1, len(values) - 1)
        return round(x, 1), round(height - pad - (value - bottom) / reach * (height - 2 * pad), 1)

    out = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="trend">']
    if low is not None or high is not None:
        y1 = place(0, top if high is None else high)[1]
        y2 = place(0, bottom if low is None else low)[1]
        out.append(f'<rect class="band" x="0" y="{y1}" width="{width}" height="{max(1.0, y2 - y1):.1f}"/>')
    runs: list[list[tuple[float, float]]] = [[]]
    for i, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(place(i, value))
    out += [f'<polyline class="curve" points="{_path(run)}"/>' for run in runs if len(run) > 1]
    x, y = place(max(i for i, v in enumerate(values) if v is not None), known[-1])
    out.append(f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>')
    return Markup("".join([*out, "</svg>"]))


def strip(values: Sequence[int], largest: int) -> str:
    """A PNG of one row of pixels as a data URI: the more of `largest` a value is, the less transparent it is."""
    alphas = (round(255 * value / largest) if largest else 0 for value in values)
    row = b"\0" + b"".join(bytes((*_ACCENT, alpha)) for alpha in alphas)
    head = struct.pack(">IIBBBBB", len(values), 1, 8, 6, 0, 0, 0)
    chunks = (b"IHDR", head), (b"IDAT", zlib.compress(row, 9)), (b"IEND", b"")
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _power(power: int) -> str:
    return f"{10.0**power:,g}" if -4 < power < 7 else f"1e{power}"
