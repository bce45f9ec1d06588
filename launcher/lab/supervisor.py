"""The process that owns a lab: PID 1 of its namespaces, parent of every daemon; with its end all of it ends.

python -m launcher.lab.supervisor FOLDER UID GID
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files as resources
from pathlib import Path
from typing import IO, Any

from launcher.lab import conf
from launcher.lab.spec import LOGIN, LabSpec
from launcher.processes import children, die_with_parent, reap
from launcher.slurm import is_slurms

READY = "ready"
_DAEMON_S, _IDLE_S, _POLL_S = 60.0, 60.0, 0.05
_BRIDGE = "br0"
_DISK_MB = 24


class Supervisor:
    """Brings a lab up in its namespaces, answers requests, and takes it down."""

    def __init__(self, spec: LabSpec, uid: int, gid: int) -> None:
        self.spec = spec
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        # An ordinary user is root in the lab's user namespace, which networks need. Slurm's daemons as such a root
        # fail at setgroups, so they run one namespace further in, as the user again.
        self._as_user = ["unshare", "--user", f"--map-user={uid}", f"--map-group={gid}", "--"] if uid else []
        self._env = {k: v for k, v in os.environ.items() if not is_slurms(k)} | {
            "SLURM_CONF": str(spec.root / "etc/slurm.conf"),
            "MYSQL_UNIX_PORT": str(spec.root / "run/db.sock"),
        }

    def up(self) -> None:
        """Everything, in the order in which it depends on each other; returns when all nodes are idle."""
        self._write_files()
        for index in range(self.spec.disks):
            self._make_disk(index)
        self._network()
        self._start_munge()
        self._start_accounting()
        self._start_controller()
        for node in self.spec.node_names:
            self.start_node(node)
        self._wait("idle nodes", self._all_idle, _IDLE_S)

    def serve(self) -> None:
        """Answer requests, one JSON line each, until one says stop."""
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(self.spec.control_socket))
            server.listen()
            server.settimeout(0.5)
            (self.spec.root / "run" / READY).touch()
            while True:
                reap({d.pid for d in self.daemons.values() if d.poll() is None})
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                connection.settimeout(5)
                with (
                    contextlib.suppress(OSError, ValueError, KeyError),
                    connection,
                    connection.makefile("rw") as stream,
                ):
                    request = json.loads(stream.readline())
                    if request["do"] == "end":
                        return
                    stream.write(json.dumps(self._answer(request)) + "\n")

    def down(self) -> None:
        """End the daemons in an order that loses no accounting; what is left goes with the PID namespace."""
        nodes = [name for name in self.spec.node_names if name in self.daemons]
        for name in nodes:
            self.daemons[name].kill()
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            daemon = self.daemons.get(name)
            if daemon and daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()

    def start_node(self, node: str) -> None:
        """A host of its own: network, host name, mounts and processes; then slurmd on it."""
        spec, index = self.spec, self.spec.node_names.index(node)
        (spec.root / "spool" / node).mkdir(parents=True, exist_ok=True)
        host = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        init = [sys.executable, "-m", "launcher.lab.node", node, spec.address(node), "--"]
        daemon = self._start(node, [*host, *init, *self._as_user, "slurmd", "-D", "-N", node], plain=True)
        self._wait(f"{node}'s namespaces", lambda: bool(children(daemon.pid)), _DAEMON_S)
        inside = children(daemon.pid)
        link = f"v{index}"
        subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)  # of the node's last life
        peer = ["peer", "name", "eth0", "address", spec.hardware_address(node), "netns", str(inside[0])]
        self._run("ip", "link", "add", link, "type", "veth", *peer)
        self._run("ip", "link", "set", link, "master", _BRIDGE, "up")

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "status":
            return {"ok": {name: d.poll() is None for name, d in self.daemons.items()}}
        try:
            if "disk" in request:
                return {"ok": self._disk_fault(request["do"], int(request["disk"]))}
            if "node" in request:
                return {"ok": self._fault(request["do"], request["node"])}
            return {"ok": self._controller_fault(request["do"])}
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            return {"error": str(error)}

    def _fault(self, what: str, node: str) -> str:
        daemon = self.daemons[node]
        if what == "kill":
            daemon.kill()
            daemon.wait(20)
        elif what == "start" and daemon.poll() is not None:
            self.start_node(node)
        elif what in ("stop", "start"):  # of slurmd alone: the host and its tasks live on
            os.kill(children(daemon.pid)[0], signal.SIGTERM if what == "stop" else signal.SIGUSR1)
        elif what == "spoil":
            (self.spec.spoilt / node).touch()
        elif what == "heal":
            (self.spec.spoilt / node).unlink(missing_ok=True)
        else:
            state = "down" if what == "cut" else "up"
            self._run("ip", "link", "set", f"v{self.spec.node_names.index(node)}", state)
        return f"{node}: {what}"

    def _controller_fault(self, what: str) -> str:
        daemon = self.daemons["slurmctld"]
        if what == "kill":
            daemon.kill()
            daemon.wait(20)
        elif daemon.poll() is not None:
            self._start_controller()
        return f"slurmctld: {what}"

    def _disk_fault(self, what: str, index: int) -> str:
        folder = self.spec.disk(index)
        filler = folder / "filler"
        if what == "fill":
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        elif what == "free":
            filler.unlink(missing_ok=True)
        else:  # the kernel takes it for damaged, and lets nobody write to it any more
            device = self._run("findmnt", "-no", "SOURCE", str(folder)).strip()
            (Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error").write_text("launcher lab")
        return f"{folder}: {what}"

    def _make_disk(self, index: int) -> None:
        folder, image = self.spec.disk(index), self.spec.root / f"disk{index}.img"
        folder.mkdir()
        with image.open("wb") as file:
            file.truncate(_DISK_MB * 2**20)
        self._run("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", str(image))
        self._run("mount", "-o", "loop,errors=remount-ro", str(image), str(folder))

    def _start_controller(self) -> None:
        self._start("slurmctld", ["slurmctld", "-D"])
        self._wait("slurmctld", lambda: "UP" in self._ask("scontrol", "ping"), _DAEMON_S)

    def _write_files(self) -> None:
        root = self.spec.root
        for folder in ("etc", "munge", "state", "log", "run", "dev", "spool", "db"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in conf.files(self.spec).items():
            (root / "etc" / name).write_text(text)
        self.spec.spoilt.mkdir()
        (root / "etc/slurmdbd.conf").chmod(0o600)
        (root / "munge/munge.key").write_bytes(os.urandom(128))
        (root / "munge/munge.key").chmod(0o400)
        for i in range(self.spec.devices):  # Slurm wants a character device; any will do
            (root / f"dev/gpu{i}").symlink_to("/dev/null")
        source = resources("launcher.lab") / "environment.c"
        self._run("gcc", "-shared", "-fPIC", "-o", str(root / "run/environment.so"), str(source))

    def _network(self) -> None:
        self._run("mount", "--bind", str(self.spec.root / "etc/hosts"), "/etc/hosts")
        self._run("hostname", LOGIN)
        self._run("ip", "link", "set", "lo", "up")
        self._run("ip", "link", "add", _BRIDGE, "type", "bridge")
        self._run("ip", "addr", "add", f"{self.spec.address(LOGIN)}/24", "dev", _BRIDGE)
        self._run("ip", "link", "set", _BRIDGE, "up")

    def _start_munge(self) -> None:
        run, munge = self.spec.root / "run", self.spec.root / "munge"
        self._start(
            "munged",
            [
                *("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={munge}/munge.key"),
                *(f"--socket={run}/munge.sock", f"--pid-file={munge}/munged.pid"),
                *(f"--log-file={munge}/munged.log", f"--seed-file={munge}/seed"),
            ],
        )
        self._wait("munge", (run / "munge.sock").exists, _DAEMON_S)

    def _start_accounting(self) -> None:
        root, user = self.spec.root, self.spec.user
        common = ["--no-defaults", f"--datadir={root}/db/data", f"--user={user}", "--innodb-log-file-size=8M"]
        self._run(
            *("mariadb-install-db", *common, "--auth-root-authentication-method=normal", "--skip-test-db"),
            as_user=True,
        )
        self._start(
            "mariadbd",
            [
                *("mariadbd", *common, "--skip-networking", f"--socket={root}/run/db.sock", f"--tmpdir={root}/db"),
                *(f"--pid-file={root}/run/mariadbd.pid", "--innodb-buffer-pool-size=32M", "--skip-log-bin"),
                *("--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0", "--performance-schema=OFF"),
                *("--innodb-use-native-aio=0", "--innodb-lock-wait-timeout=900"),
            ],
        )
        sql = (
            "CREATE DATABASE IF NOT EXISTS slurm_acct; "
            "GRANT ALL ON slurm_acct.* TO 'slurm'@'localhost' IDENTIFIED BY 'slurm';"
        )
        client = ["mariadb", "--no-defaults", f"--socket={root}/run/db.sock", "-u", "root", "-e", sql]
        self._wait("MariaDB", lambda: self._succeeds(*client), _DAEMON_S)
        self._start("slurmdbd", ["slurmdbd", "-D"])
        self._wait("slurmdbd", lambda: self._succeeds("sacctmgr", "-n", "list", "cluster"), _DAEMON_S)
        account = self.spec.account
        for words in (
            ("cluster", "lab"),
            ("account", account, "Description=lab", "Organization=lab"),
            ("user", user, f"account={account}"),
        ):
            self._run("sacctmgr", "-i", "add", *words, as_user=True)

    def _all_idle(self) -> bool:
        states = self._ask("sinfo", "-h", "-N", "-p", self.spec.partition, "-o", "%t").split()
        return len(states) == self.spec.nodes and set(states) == {"idle"}

    def _start(self, name: str, command: list[str], *, plain: bool = False) -> "subprocess.Popen[bytes]":
        with self._log(name) as log:
            self.daemons[name] = subprocess.Popen(
                command if plain else [*self._as_user, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return self.daemons[name]

    def _log(self, name: str) -> IO[bytes]:
        return (self.spec.root / "log" / f"{name}.out").open("ab")

    def _run(self, *command: str, as_user: bool = False) -> str:
        done = subprocess.run(
            [*(self._as_user if as_user else ()), *command], env=self._env, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def _ask(self, *command: str) -> str:
        """What a client of Slurm says, "" where it fails."""
        return subprocess.run(
            [*self._as_user, *command], env=self._env, capture_output=True, text=True, timeout=60
        ).stdout

    def _succeeds(self, *command: str) -> bool:
        return (
            subprocess.run([*self._as_user, *command], env=self._env, capture_output=True, timeout=60).returncode == 0
        )

    def _wait(self, what: str, true: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            ended = [n for n, d in self.daemons.items() if d.poll() is not None and n not in self.spec.node_names]
            if ended:
                raise RuntimeError(f"{ended[0]} ended, see {self.spec.folder}/log/{ended[0]}.out")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not there after {seconds:.0f} s, see {self.spec.folder}/log")
            time.sleep(_POLL_S)


def main(folder: str, uid: str, gid: str) -> None:
    """Run a lab until it is told to stop, by a request or SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    supervisor = Supervisor(LabSpec.load(Path(folder)), int(uid), int(gid))
    try:
        supervisor.up()
        supervisor.serve()
    finally:
        supervisor.down()


if __name__ == "__main__":
    main(*sys.argv[1:])
