"""Numbers as people read them."""

import math

GB = 10**9


def size(count: float) -> str:
    """Bytes in the decimal unit that suits them."""
    for unit, factor in (("GB", GB), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count:.4g} B"


def figure(value: float | None) -> str:
    """Four digits that count, without an exponent where people read it without; a dash for what was not measured."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e15:
        return f"{value:.3g}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"
