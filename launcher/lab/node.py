"""PID 1 of a node: takes the host's name and address, runs slurmd, and collects what it leaves.

python -m launcher.lab.node NAME ADDRESS -- slurmd …
"""

import os
import signal
import subprocess
import sys
import time

_LINK_S = 10.0


def main(name: str, address: str, slurmd: list[str]) -> int:
    """Returns slurmd's exit code; the node's namespaces and all in them end with this process."""
    subprocess.run(["hostname", name], check=True)
    # Shared memory of its own: on a real cluster no other node's ranks would see it.
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    deadline = time.monotonic() + _LINK_S
    while not _has_link("eth0"):
        if time.monotonic() > deadline:
            print(f"{name}: no eth0 within {_LINK_S} s", file=sys.stderr)
            return 1
        time.sleep(0.01)
    subprocess.run(["ip", "addr", "add", f"{address}/24", "dev", "eth0"], check=True)
    subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)
    daemon = subprocess.Popen(slurmd)
    signal.signal(signal.SIGTERM, lambda *_: daemon.terminate())
    while True:
        pid, status = os.wait()
        if pid == daemon.pid:
            return os.waitstatus_to_exitcode(status)


def _has_link(name: str) -> bool:
    return subprocess.run(["ip", "link", "show", name], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    separator = sys.argv.index("--")
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[separator + 1 :]))
