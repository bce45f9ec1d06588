"""PID 1 of a node: takes the host's name and address, runs slurmd, and collects what it leaves.

python -m launcher.lab.node NAME ADDRESS -- slurmd …
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

_LINK_S = 10.0


def main(name: str, address: str, slurmd: list[str]) -> int:
    """The node's namespaces and all in them end with this process. SIGTERM ends slurmd, SIGUSR1 starts another.

    Returns 1 if the host gets no network.
    """
    subprocess.run(["hostname", name], check=True)
    # Shared memory and a disk of its own: on a real cluster no other node's ranks would see them.
    for folder in ("/dev/shm", "/var/tmp"):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    deadline = time.monotonic() + _LINK_S
    while not _has_link("eth0"):
        if time.monotonic() > deadline:
            print(f"{name}: no eth0 within {_LINK_S} s", file=sys.stderr)
            return 1
        time.sleep(0.01)
    subprocess.run(["ip", "addr", "add", f"{address}/24", "dev", "eth0"], check=True)
    subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)
    daemons = [subprocess.Popen(slurmd)]
    signal.signal(signal.SIGTERM, lambda *_: daemons[-1].terminate())
    signal.signal(signal.SIGUSR1, lambda *_: daemons.append(subprocess.Popen(slurmd)))
    while True:  # the host lives on without slurmd, as a real one does, and so do its tasks
        with contextlib.suppress(ChildProcessError):
            os.wait()
        time.sleep(0.05)


def _has_link(name: str) -> bool:
    return subprocess.run(["ip", "link", "show", name], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    separator = sys.argv.index("--")
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[separator + 1 :]))
