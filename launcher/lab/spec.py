"""What a lab is: its folder, its nodes, and how fast Slurm gives up on things."""

import json
import os
import pwd
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launcher.errors import InputError
from launcher.files import write_atomically

SUBNET = "10.77.0"  # exists in the lab's own network namespaces only, so every lab may have it
LOGIN = "login"
FAULTS = ("kill", "stop", "start", "cut", "mend", "spoil", "heal")
DISK_FAULTS = ("fill", "free", "fail")
CONTROLLER_FAULTS = ("kill", "start")
SOCKET_PATH_LIMIT = 107  # bytes of sockaddr_un

_PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "slurmdbd": "slurmdbd",
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "gcc": "gcc",
}
_FILES = {  # below /usr
    "include/slurm/spank.h": "libslurm-dev",
    "lib/*/slurm-wlm/accounting_storage_mysql.so": "slurm-wlm-mysql-plugin",
}


def user_name() -> str:
    """Who asks."""
    return pwd.getpwuid(os.getuid()).pw_name


@dataclass(frozen=True)
class LabSpec:
    """A lab whose nodes look like beverin's. Times are seconds; Slurm's own defaults are far longer.

    urgent: a partition of the same nodes whose jobs push others' out, which are told `grace` seconds before and put
    back into the queue. disks: small file systems of their own that all hosts share, `disk0`, …; root alone can
    have them.
    """

    folder: str
    nodes: int = 2
    devices: int = 4
    device_type: str = "mi300a"
    partition: str = "mi300"
    urgent: str = "urgent"
    disks: int = 0
    cpus: int = 192
    sockets: int = 4
    memory_mb: int = 513700
    account: str = "lab"
    user: str = field(default_factory=user_name)
    """Who runs the daemons and the jobs: inside the lab's user namespace an ordinary user looks like root."""
    kill_wait: int = 5
    node_timeout: int = 5
    requeue_delay: int = 5
    grace: int = 5
    memory_poll: int = 1

    @property
    def root(self) -> Path:
        """The folder as a path."""
        return Path(self.folder)

    @property
    def node_names(self) -> list[str]:
        """nid001001, nid001002, …"""
        return [f"nid{1001 + i:06d}" for i in range(self.nodes)]

    def address(self, node: str) -> str:
        """IP address of a node, or of the login host."""
        return f"{SUBNET}.1" if node == LOGIN else f"{SUBNET}.{11 + self.node_names.index(node)}"

    def hardware_address(self, node: str) -> str:
        """Ethernet address of a node, which like a real one's outlives a boot: else its peers look for the old one."""
        return f"02:00:00:00:00:{11 + self.node_names.index(node):02x}"

    @property
    def spoilt(self) -> Path:
        """Folder with a file for each node on which no container starts."""
        return self.root / "run" / "spoilt"

    def disk(self, index: int) -> Path:
        """Where a disk is mounted."""
        return self.root / f"disk{index}"

    @property
    def control_socket(self) -> Path:
        """Where the supervisor listens."""
        return self.root / "run" / "lab.sock"

    def save(self) -> None:
        """Write it into its folder."""
        write_atomically(self.root / "lab.json", json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "LabSpec":
        """Read it back. Raises `InputError` if there is no lab in `folder`."""
        try:
            return cls(**json.loads((folder / "lab.json").read_text()))
        except FileNotFoundError:
            raise InputError(f"{folder}: there is no lab; start one with: launcher lab up --dir {folder}") from None


def default_folder() -> Path:
    """One place a user, short enough for Unix sockets."""
    return Path("/tmp") / f"moe-ep-lab-{user_name()}"


def missing_packages() -> list[str]:
    """Debian packages that a lab needs and this machine lacks."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    commands = {package for command, package in _PACKAGES.items() if not shutil.which(command, path=path)}
    return sorted(commands | {package for file, package in _FILES.items() if not any(Path("/usr").glob(file))})


def check(spec: LabSpec) -> None:
    """Raise `InputError` if the lab cannot be brought up here; says what to do."""
    missing = missing_packages()
    if missing:
        raise InputError(
            "a lab needs packages that are not here: apt-get install --no-install-recommends " + " ".join(missing)
        )
    if not 1 <= spec.nodes <= 64:
        raise InputError(f"--nodes {spec.nodes}: expected 1 to 64")
    if len(os.fsencode(spec.root / "run" / "munge.sock")) > SOCKET_PATH_LIMIT:
        raise InputError(f"--dir {spec.folder}: too long for the Unix sockets in it; use a shorter path")
