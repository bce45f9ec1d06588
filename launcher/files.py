"""Files: whether one is there, and writing them so that a reader, or a crash, never sees half of one."""

import os
from pathlib import Path
from typing import Never


def is_file(path: Path) -> bool:
    """Whether there is a file that this user may look at. Unlike `Path.is_file` it never raises."""
    try:
        return path.is_file()
    except OSError:  # a folder without permission, a name that is too long
        return False


def is_folder(path: Path) -> bool:
    """Likewise of a folder."""
    try:
        return path.is_dir()
    except OSError:
        return False


def write_atomically(path: Path, text: str) -> None:
    """Write beside `path`, then rename over it. What UTF-8 lacks (half a surrogate, of an odd file name) is escaped."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def no_number(text: str) -> Never:
    """For `json.loads(parse_constant=)`: NaN and Infinity, which Python takes, are not JSON. Raises `ValueError`."""
    raise ValueError(f"{text} is not JSON")
