"""Numbers as people read them."""

GB = 10**9


def size(count: float) -> str:
    """Bytes in the decimal unit that suits them."""
    for unit, factor in (("GB", GB), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count:.4g} B"
