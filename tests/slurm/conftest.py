"""One lab for all tests of this folder: a real slurmctld, slurmdbd, MariaDB and a slurmd on each of two hosts; and
another for those that break it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.lab import control
from launcher.lab.spec import LabSpec, missing_packages
from tests.checkout import ROOT, importable
from tests.waiting import PATIENCE_S

CONFIG = ROOT / "configs" / "lab-2node.yaml"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = missing_packages()
    for item in items if missing else ():
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"no Slurm here; a lab needs: {' '.join(missing)}"))


@dataclass(frozen=True)
class Lab:
    """A running lab and a folder to work in."""

    spec: LabSpec

    def run(self, *command: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
        """A command on the login host."""
        env = os.environ | importable() | {"COLUMNS": "200"}
        env.pop("TRITON_INTERPRET", None)  # the cluster file says what the ranks need
        inside = control.inside(self.spec, command)
        return subprocess.run(inside, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_S)

    def launcher(self, *args: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
        """The launcher on the login host."""
        return self.run(sys.executable, "-m", "launcher", *args, cwd=cwd)

    def ask(self, *command: str) -> str:
        """What a Slurm command prints."""
        done = self.run(*command, cwd=self.spec.root)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    # A short path: the sockets in it are bound to 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
    folder.rmdir()
    spec = LabSpec(str(folder))
    control.up(spec)
    try:
        yield Lab(spec)
    finally:
        control.down(folder)
