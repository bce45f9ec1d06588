"""The machine's own memory. Needs no torch."""

from pathlib import Path


def available() -> int:
    """MemAvailable of the host in bytes. Raises `OSError` where the kernel does not tell it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo: no MemAvailable")
