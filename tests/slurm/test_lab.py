"""The lab is a Slurm cluster, looks like beverin, and leaves nothing behind."""

import os
import re
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from launcher.errors import InputError
from launcher.lab import control
from launcher.lab.spec import LabSpec, missing_packages
from tests.checkout import ROOT
from tests.slurm.conftest import Lab
from tests.waiting import PATIENCE_S, until

FIRST, SECOND = "nid001001", "nid001002"


def states(lab: Lab) -> dict[str, str]:
    return dict(line.split() for line in lab.ask("sinfo", "-h", "-N", "-o", "%N %t").splitlines())


def wait_until(lab: Lab, node: str, state: str) -> None:
    until(lambda: states(lab)[node].rstrip("*") == state, lambda: states(lab))


def test_its_nodes_look_like_beverins(lab: Lab) -> None:
    lines = lab.ask("sinfo", "-h", "-N", "-p", "mi300", "-o", "%N %P %c %m %G").splitlines()
    assert lines == [f"{node} mi300* 192 513700 gpu:mi300a:4" for node in (FIRST, SECOND)]
    assert lab.ask("sacctmgr", "-n", "-P", "list", "account", "lab", "format=account") == "lab"


def test_its_nodes_are_hosts_of_their_own_and_know_each_other(lab: Lab) -> None:
    script = "hostname; hostname -i; touch /dev/shm/$SLURM_PROCID; ls /dev/shm; getent hosts nid001001"
    said = lab.ask("srun", "-N2", "-n2", "-l", "sh", "-c", script).splitlines()
    for task, (node, address) in enumerate(((FIRST, "10.77.0.11"), (SECOND, "10.77.0.12"))):
        mine = [line.split(": ", 1)[1] for line in said if line.startswith(f"{task}:")]
        assert mine[0] == node
        assert mine[1] == address
        assert mine[2] == str(task), "/dev/shm is the host's own"
        assert mine[3].split() == ["10.77.0.11", FIRST]


def test_all_four_devices_are_visible_to_every_task_and_the_container_option_reaches_it(lab: Lab) -> None:
    command = ["srun", "-N1", "-n2", "--gpus-per-node=4", "--environment=moe-ep"]
    said = lab.ask(*command, "sh", "-c", "echo $ROCR_VISIBLE_DEVICES $LAB_ENVIRONMENT").splitlines()
    assert said == ["0,1,2,3 moe-ep"] * 2


def test_two_labs_stand_side_by_side_and_the_end_of_one_leaves_nothing(lab: Lab) -> None:
    folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
    folder.rmdir()
    command = [sys.executable, "-m", "launcher", "lab", "run", "--dir", str(folder), "--nodes", "1", "--"]
    done = subprocess.run(
        [*command, "srun", "-n1", "sh", "-c", "hostname; exit 3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 3, "the command's exit code is the lab's"
    assert done.stdout.split() == [FIRST], done.stderr
    assert states(lab) == {FIRST: "idle", SECOND: "idle"}, "the other lab has not noticed"
    assert not folder.exists()
    assert not Path(f"{folder}.lock").exists()
    left = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    assert str(folder) not in left
    assert Path("/etc/hosts").read_text().count("nid00") == 0, "the machine's own files are untouched"


def python_for(as_user: list[str]) -> list[str] | None:
    """A Python that another user may run, with this environment's packages; None if there is none."""
    packages = sysconfig.get_path("purelib")
    for python in (sys.executable, "/usr/bin/python3"):
        command = [*as_user, "env", "HOME=/tmp", f"PYTHONPATH={ROOT}:{packages}", python]
        if (
            subprocess.run([*command, "-c", "import typer, pydantic_core"], capture_output=True, cwd="/").returncode
            == 0
        ):
            return command
    return None


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests of this file show it")
def test_an_ordinary_user_can_have_one() -> None:
    as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    python = python_for(as_user)
    if python is None or subprocess.run([*as_user, "unshare", "--user", "true"], capture_output=True).returncode:
        pytest.skip("no Python that another user may run, or no user namespaces for one")
    folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
    folder.chmod(0o777)
    command = [*python, "-m", "launcher", "lab", "run", "--dir", f"{folder}/lab", "--nodes", "1", "--"]
    done = subprocess.run(
        [*command, "srun", "-n1", "sh", "-c", "hostname; id -u"],
        cwd="/tmp",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.stdout.split() == [FIRST, "65534"], done.stderr
    assert list(folder.iterdir()) == []
    folder.rmdir()


def test_a_node_can_be_killed_and_started_again(lab: Lab) -> None:
    link = ("srun", "-N2", "-l", "ip", "-o", "link", "show", "eth0")
    addresses = sorted(re.findall(r"link/ether (\S+)", lab.ask(*link)))
    assert len(set(addresses)) == 2
    control.node(lab.spec.root, "kill", SECOND)
    wait_until(lab, SECOND, "down")
    assert states(lab)[FIRST] == "idle"
    control.node(lab.spec.root, "start", SECOND)
    wait_until(lab, SECOND, "idle")
    assert sorted(re.findall(r"link/ether (\S+)", lab.ask(*link))) == addresses, "its peers know where it is"


def test_slurmd_can_be_stopped_while_its_tasks_go_on(lab: Lab, tmp_path: Path) -> None:
    marker = tmp_path / "done"
    lab.ask("sbatch", "-w", SECOND, "-o", "/dev/null", f"--wrap=sleep 4; touch {marker}")
    until(lambda: "R" in lab.ask("squeue", "-h", "-o", "%t"))
    control.node(lab.spec.root, "stop", SECOND)
    until(marker.exists, lambda: "for the task to go on without slurmd")
    assert control.status(lab.spec.root)[SECOND], "the host is up"
    control.node(lab.spec.root, "start", SECOND)
    wait_until(lab, SECOND, "idle")


def test_a_client_that_says_nothing_does_not_end_the_lab(lab: Lab) -> None:
    for words in (b"", b"nonsense\n", b"{}\n"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(lab.spec.control_socket))
            client.sendall(words)
    assert set(control.status(lab.spec.root)) >= {"slurmctld", "slurmdbd", "mariadbd", "munged", FIRST, SECOND}


@pytest.mark.nightly  # every day test_faults cuts one off
def test_a_node_can_be_cut_from_the_network_and_mended(lab: Lab) -> None:
    control.node(lab.spec.root, "cut", SECOND)
    wait_until(lab, SECOND, "down")
    control.node(lab.spec.root, "mend", SECOND)
    wait_until(lab, SECOND, "idle")


def test_what_cannot_be_is_said(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nid9: no such node; there are nid001001, nid001002"):
        control.node(lab.spec.root, "kill", "nid9")
    with pytest.raises(InputError, match="explode: expected one of kill, stop, start, cut, mend, spoil, heal"):
        control.node(lab.spec.root, "explode", FIRST)
    with pytest.raises(InputError, match="a lab runs here already"):
        control.up(lab.spec)
    with pytest.raises(InputError, match="there is no lab; start one with"):
        control.status(tmp_path)
    with pytest.raises(InputError, match="too long for the Unix sockets"):
        control.up(LabSpec(str(tmp_path / ("x" * 100))))
    (tmp_path / "mine").write_text("precious")
    short = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
    (short / "mine").write_text("precious")
    with pytest.raises(InputError, match="not empty and not a lab's"):
        control.up(LabSpec(str(short)))
    assert (short / "mine").read_text() == "precious"
    (short / "mine").unlink()
    short.rmdir()
    Path(f"{short}.lock").unlink()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda command, path=None: None if command in ("slurmdbd", "munged") else "/x")
    assert {"slurmdbd", "munge"} <= set(missing_packages())
