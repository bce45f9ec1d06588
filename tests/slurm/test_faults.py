"""Everything breaks, on a lab of its own, several things at once: what is said is right, quick, and nothing is lost.

The runs go on beside each other, as many as the machine bears; each test looks at what became of one.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from launcher.lab import control
from launcher.lab.spec import LabSpec
from tests.checkout import importable
from tests.slurm import faulty
from tests.slurm.conftest import CONFIG, Lab
from tests.slurm.test_runs import process_of_rank
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="disks that break need root")

NODES = 10
AT_ONCE = 6
SECONDS = 30
"""By how much a verdict may come after Slurm's own: seconds, on a machine that runs everything at once."""

SPOILT, GOOD, BUSY, PORTS, DRAINED, PREEMPTED, FIRST, DEAD, OTHER, CUT = (f"nid{1001 + i:06d}" for i in range(NODES))


@dataclass
class Broken:
    """A run that broke: exit code and report of the launcher that waited for it, what `diagnose` says, and when."""

    code: int
    report: dict[str, Any]
    answer: dict[str, Any]
    errors: str
    run_dir: Path
    told: float
    """When the launcher ended, Unix seconds."""
    ended: float
    """When the job did, by Slurm's accounting."""
    broke: float | None = None
    """When this process broke it; None where a rank did."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def failure(self) -> dict[str, Any]:
        """Of the report."""
        found: dict[str, Any] = self.report["failure"]
        return found

    @property
    def delay(self) -> float:
        """Seconds from Slurm's end of the job to the verdict."""
        return self.told - self.ended


class Breaker:
    """Starts runs on a lab and breaks them."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        faulty.write(folder / "faulty")

    def start(
        self, name: str, *sets: str, nodes: int = 1, on: str = BUSY, env: str = "", disk: int | None = None
    ) -> "Run":
        """A launcher that submits a run of 2 ranks a node and waits for it."""
        runs = self.folder / "runs" if disk is None else self.lab.spec.disk(disk)
        ranks = 2 * nodes
        nodelist = f", nodelist: '{on}'" if on else ""
        overrides = [
            f"run={{name: {name}, folder: {runs}}}",
            f"model.synthetic.folder={self.folder / 'checkpoints' / name}",
            f"topology={{nodes: {nodes}, ranks_per_node: 2, tp: {ranks}, ep: {ranks}}}",
            "backend.impl=reference",
            "job.layers=[2]",
            "job.throughput={batch_sizes: [1, 2], warmup: 0, repeats: 1}",
            f"cluster.sbatch_args={{gpu-bind: none{nodelist}}}",
            "cluster.cpus_per_task=2",
            "cluster.mem_mb=40000",
            f"cluster.env.PYTHONPATH={self.folder / 'faulty'}",
            f"cluster.env.HOLD={self.hold(name)}",
            "limits={time_min: 10, rank_timeout_s: 60}",
            *(f"cluster.env.{pair}" for pair in env.split()),
            *sets,
        ]
        words = [word for override in overrides for word in ("--set", override)]
        command = [sys.executable, "-m", "launcher", "submit", str(CONFIG), "--wait", "--json", *words]
        process = subprocess.Popen(
            control.inside(self.lab.spec, command),
            cwd=self.folder,
            env=os.environ | importable(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        seen = runs if disk is None else Path(f"/proc/{self.login}/root{runs}")
        return Run(self, name, process, seen / name, runs / name)

    @property
    def login(self) -> int:
        """The first process of the login host: the lab's disks are mounted for it, and not for this process."""
        return int(control.inside(self.lab.spec, [])[2])

    def hold(self, name: str) -> Path:
        """The file for which a run waits once its first batch size is measured."""
        return self.folder / f"go-{name}"


@dataclass
class Run:
    """One of them."""

    breaker: Breaker
    name: str
    process: "subprocess.Popen[str]"
    runs: Path
    runs_there: Path

    @property
    def folder(self) -> Path:
        """The run's."""
        (found,) = self.runs.iterdir()
        return found

    @property
    def folder_there(self) -> Path:
        """The same as the lab's hosts see it."""
        return self.runs_there / self.folder.name

    def measured(self) -> "Run":
        """Once the first batch size is."""
        self.until(lambda: any('"latest"' in file.read_text() for file in self.runs.glob("*/events/rank-00000.jsonl")))
        return self

    def until(self, what: Callable[[], bool]) -> None:
        def met() -> bool:
            assert self.process.poll() is None, self.process.communicate()
            return what()

        until(met, lambda: f"for run {self.name}")

    @property
    def job_id(self) -> str:
        found: str = json.loads((self.folder / "submissions.json").read_text())[-1]["job_id"]
        return found

    def go(self) -> "Run":
        """It need not wait any more."""
        self.breaker.hold(self.name).touch()
        return self

    def broken(self, broke: float | None = None, **extra: Any) -> Broken:
        """What became of it."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        told = time.time()
        assert out, err
        said = self.breaker.lab.launcher("diagnose", str(self.folder_there), "--json", cwd=self.breaker.folder)
        assert said.stdout, said.stderr
        ended = self._ended()
        answer = json.loads(said.stdout)
        return Broken(self.process.returncode, json.loads(out), answer, err, self.folder, told, ended, broke, extra)

    def _ended(self) -> float:
        """Accounting comes back some time after a controller that was killed."""

        def end() -> str:
            ends = self.breaker.lab.ask("sacct", "-n", "-P", "-X", "-D", "-o", "End", "-j", self.job_id).splitlines()
            return ends[-1] if ends and ends[-1] != "Unknown" else ""

        found = until(end, lambda: f"for the end of job {self.job_id}, run {self.name}")
        return datetime.fromisoformat(found).timestamp()


def raises(b: Breaker) -> Broken:
    return b.start("raises", env="FAULT=raise FAULT_RANK=1").go().broken()


def is_killed(b: Breaker) -> Broken:
    run = b.start("killed").measured()
    os.kill(process_of_rank(b.lab, run.job_id, 1), signal.SIGKILL)
    return run.broken(time.time())


def hangs(b: Breaker) -> Broken:
    return b.start("hangs", "limits.rank_timeout_s=12", env="FAULT=hang FAULT_RANK=1").go().broken()


def takes_too_much_memory(b: Breaker) -> Broken:
    return b.start("memory", "cluster.mem_mb=1500", env="FAULT=memory FAULT_RANK=1").go().broken()


def takes_too_much_for_torch(b: Breaker) -> Broken:
    return b.start("torch", env="FAULT=torch FAULT_RANK=1").go().broken()


def runs_out_of_time(b: Breaker) -> Broken:
    return b.start("time", "limits={time_min: 3, signal_s: 10, rank_timeout_s: 60}").broken()


def finds_its_ports_taken(b: Breaker) -> Broken:
    out = b.folder / "hog.out"
    wrap = f"--wrap=python3 {b.folder}/faulty/hog.py"
    hog = b.lab.ask("sbatch", "--parsable", "-w", PORTS, "--mem=200", "-o", str(out), wrap)
    until(lambda: out.exists() and "held" in out.read_text())
    try:
        return b.start("ports", on=PORTS).broken()
    finally:
        b.lab.ask("scancel", hog)


def meets_a_bad_node(b: Breaker) -> Broken:
    control.node(b.lab.spec.root, "spoil", SPOILT)
    container = f"cluster.container={{environment: moe-ep, python: {sys.executable}}}"
    two = f"cluster.exclude=[{', '.join(set(b.lab.spec.node_names) - {SPOILT, GOOD})}]"
    return b.start("spoilt", container, two, "limits.bad_node_retries=1", on="").go().broken()


def fills_its_disk(b: Breaker) -> Broken:
    run = b.start("full", disk=0).measured()
    control.disk(b.lab.spec.root, "fill", 0)
    return run.go().broken(time.time())


def loses_its_disk(b: Breaker) -> Broken:
    run = b.start("readonly", disk=1).measured()
    control.disk(b.lab.spec.root, "fail", 1)
    return run.go().broken(time.time())


def loses_a_node(b: Breaker) -> Broken:
    run = b.start("dead", "cluster.sbatch_args.no-requeue=true", nodes=2, on=f"{FIRST},{DEAD}").measured()
    control.node(b.lab.spec.root, "kill", DEAD)
    broke = time.time()
    return run.broken(broke, seen=down_since(b.lab, DEAD))


def is_cut_off(b: Breaker) -> Broken:
    run = b.start("cut", "cluster.sbatch_args.no-requeue=true", nodes=2, on=f"{OTHER},{CUT}").measured()
    control.node(b.lab.spec.root, "cut", CUT)
    broke = time.time()
    return run.broken(broke, seen=down_since(b.lab, CUT))


def down_since(lab: Lab, node: str) -> float:
    """When Slurm saw that a node is gone; waits for it."""

    def since() -> str:
        state, begun = lab.ask("sinfo", "-h", "-N", "-p", lab.spec.partition, "-n", node, "-o", "%t|%H").split("|")
        return begun if state.startswith("down") else ""

    return datetime.fromisoformat(until(since)).timestamp()


def is_preempted(b: Breaker) -> Broken:
    run = b.start("preempted", on=PREEMPTED).measured()
    urgent = ["sbatch", "-p", b.lab.spec.urgent, "-w", PREEMPTED, "--mem=500000", "-o", "/dev/null", "--wrap=sleep 1"]
    b.lab.ask(*urgent)
    told = (run.folder / "events" / "rank-00000.jsonl").read_text().splitlines()
    return run.broken(before=json.loads(next(line for line in reversed(told) if '"latest"' in line)))


def pends_for_ever(b: Breaker) -> Broken:
    b.lab.ask("scontrol", "update", f"NodeName={DRAINED}", "State=DRAIN", "Reason=bad HBM")
    try:
        return b.start("pending", "limits.pending_s=3", on=DRAINED).broken()
    finally:
        b.lab.ask("scontrol", "update", f"NodeName={DRAINED}", "State=RESUME")


SCENARIOS = (
    *(meets_a_bad_node, loses_a_node, hangs, is_cut_off, runs_out_of_time, is_preempted, finds_its_ports_taken),
    *(fills_its_disk, loses_its_disk, takes_too_much_memory, is_killed, raises, takes_too_much_for_torch),
    pends_for_ever,
)


@pytest.fixture(scope="module")
def breaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Breaker]:
    folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
    folder.rmdir()
    spec = LabSpec(str(folder), nodes=NODES, disks=2)
    control.up(spec)
    try:
        yield Breaker(Lab(spec), tmp_path_factory.mktemp("faults"))
    finally:
        control.down(folder)


@pytest.fixture(scope="module")
def broken(breaker: Breaker) -> Iterator[Callable[[Callable[[Breaker], Broken]], Broken]]:
    """What became of a scenario; all of them are under way from the first question on."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures: dict[object, Future[Broken]] = {scenario: pool.submit(scenario, breaker) for scenario in SCENARIOS}
        yield lambda scenario: futures[scenario].result(timeout=2 * PATIENCE_S)
    times = [_times(future.result()) for future in futures.values() if future.exception() is None]
    (breaker.folder / "times.json").write_text(json.dumps(times, indent=2))  # of which docs/faults.md has a table


def _times(found: Broken) -> dict[str, Any]:
    """Seconds from the fault to Slurm's end of the job, and from there to the verdict."""
    seen = found.extra.get("seen", found.ended)
    slurm = None if found.broke is None else round(seen - found.broke, 1)
    return {"run": found.run_dir.parent.name, "slurm_s": slurm, "verdict_s": round(found.told - seen, 1)}


Ask = Callable[[Callable[[Breaker], Broken]], Broken]


def well_told(found: Broken, state: str, *, late: float = SECONDS) -> None:
    """Exit code 1, the state, seconds after Slurm's own, and what was measured before is there."""
    assert (found.code, found.report["run"]["state"]) == (1, state), found.report["failure"]
    assert found.delay < late
    assert [line["batch_size"] for line in found.report["throughput"]][:1] == [1], "measured before it broke"
    assert found.report["parity"] is not None
    assert found.answer["verdict"] == "failed"


def evidence(found: Broken) -> dict[str, Any]:
    line: dict[str, Any] = found.answer["diagnosis"]["evidence"]
    return line


def test_a_rank_that_raises_is_named_with_what_it_raised(broken: Ask) -> None:
    found = broken(raises)
    well_told(found, "failed")
    assert (found.failure["rank"], found.failure["stage"]) == (1, "throughput")
    assert (found.failure["error_type"], found.failure["error"]) == ("RuntimeError", "the sky has fallen")
    assert found.failure["host"].startswith("nid0010")
    assert found.answer["diagnosis"] is None, "no rule knows it"
    assert (found.answer["error"]["text"], found.answer["error"]["rank"]) == ("RuntimeError: the sky has fallen", 1)


def test_a_killed_rank_is_named_as_one_that_was_killed(broken: Ask) -> None:
    found = broken(is_killed)
    well_told(found, "failed")
    assert (found.failure["rank"], found.failure["error_type"]) == (1, "Vanished")
    assert found.answer["diagnosis"]["rule"] == "killed"
    assert "cluster.exclude" in found.answer["diagnosis"]["fix"]


def test_a_hanging_rank_is_named_not_the_one_that_waited_and_where_it_hangs(broken: Ask) -> None:
    found = broken(hangs)
    well_told(found, "failed")
    assert (found.failure["rank"], found.failure["error_type"]) == (1, "Hung")
    assert "in fault\n    threading.Event().wait()" in found.failure["traceback"]
    assert found.answer["diagnosis"]["rule"] == "hang"
    assert "limits.rank_timeout_s" in found.answer["diagnosis"]["fix"]


def test_a_rank_that_takes_more_memory_than_was_asked_for(broken: Ask) -> None:
    found = broken(takes_too_much_memory)
    well_told(found, "failed")
    assert found.failure["rank"] == 1
    assert found.answer["diagnosis"]["rule"] == "host out of memory"
    assert "exceeded memory limit" in evidence(found)["text"]
    assert (evidence(found)["rank"], evidence(found)["number"] > 0) == (1, True)
    assert "raise cluster.mem_mb" in found.answer["diagnosis"]["fix"]


def test_a_rank_for_which_torch_finds_no_memory(broken: Ask) -> None:
    found = broken(takes_too_much_for_torch)
    well_told(found, "failed")
    assert (found.failure["rank"], found.failure["stage"]) == (1, "throughput")
    assert found.answer["diagnosis"]["rule"] == "memory of a rank"
    assert "topology.ep" in found.answer["diagnosis"]["fix"]


def test_ranks_are_told_before_the_time_is_over(broken: Ask) -> None:
    found = broken(runs_out_of_time)
    well_told(found, "timeout")
    assert found.failure["rank"] is None, "it is nobody's fault"
    assert found.answer["diagnosis"]["rule"] == "time limit"
    assert "raise limits.time_min" in found.answer["diagnosis"]["fix"]


def test_ports_that_are_all_taken_are_said_with_the_node(broken: Ask) -> None:
    found = broken(finds_its_ports_taken)
    assert (found.code, found.report["run"]["state"]) == (1, "failed")
    assert found.delay < SECONDS
    assert (found.failure["rank"], found.failure["host"]) == (0, PORTS)
    assert "are all in use" in found.failure["error"]
    assert found.answer["diagnosis"]["rule"] == "ports taken"


def test_a_bad_node_is_left_out_and_the_run_submitted_again(broken: Ask) -> None:
    found = broken(meets_a_bad_node)
    assert (found.code, found.report["run"]["state"]) == (0, "completed"), found.errors
    assert f"submitted again without {SPOILT}" in found.errors
    assert [s["exclude"] for s in found.report["submissions"]] == [[], [SPOILT]]
    assert [rank["host"] for rank in found.report["ranks"]] == [GOOD] * 2
    assert found.answer["verdict"] == "healthy"


@pytest.mark.parametrize(
    ("scenario", "error"), [(fills_its_disk, "No space left on device"), (loses_its_disk, "Read-only file system")]
)
def test_a_shared_folder_that_takes_nothing_more(
    broken: Ask, scenario: Callable[[Breaker], Broken], error: str
) -> None:
    found = broken(scenario)
    well_told(found, "failed")
    assert "not_written" in found.report, "the report is shown though it cannot be kept"
    assert found.answer["diagnosis"]["rule"] == "run folder not writable"
    assert error in evidence(found)["text"]
    assert "run.folder" in found.answer["diagnosis"]["fix"]


def test_a_node_that_dies_is_named_with_its_ranks(broken: Ask) -> None:
    found = broken(loses_a_node)
    well_told(found, "node failed")
    assert (found.failure["rank"], found.failure["host"]) == (2, DEAD)
    assert f"node {DEAD} is down" in found.failure["error"]
    assert "ranks 2, 3 ran on it" in found.failure["error"]
    assert found.told - found.extra["seen"] < SECONDS
    assert found.answer["diagnosis"]["rule"] == "node lost"


def test_a_node_that_is_cut_off_likewise(broken: Ask) -> None:
    found = broken(is_cut_off)
    well_told(found, "node failed")
    assert (found.failure["rank"], found.failure["host"]) == (2, CUT)
    assert f"node {CUT} is down" in found.failure["error"]
    assert found.told - found.extra["seen"] < SECONDS
    assert "cluster.exclude" in found.answer["diagnosis"]["fix"]


def test_a_preempted_run_goes_on_after_the_last_finished_stage(broken: Ask) -> None:
    found = broken(is_preempted)
    assert (found.code, found.report["run"]["state"], found.report["run"]["attempt"]) == (0, "completed", 1)
    assert found.report["parity"]["kept_from"] == 0
    assert [line["batch_size"] for line in found.report["throughput"]] == [1, 2]
    assert found.report["throughput"][0] == found.extra["before"]["data"]["latest"], "measured before it was pushed out"
    batch = [json.loads(line) for line in (found.run_dir / "events" / "batch.jsonl").read_text().splitlines()]
    told = [(line["event"], line["attempt"]) for line in batch]
    assert (told[0], told[-1]) == (("preempted", 0), ("ended", 1)), (
        "between them the end of the first, if Slurm was first"
    )


def test_a_job_that_cannot_start_is_given_up(broken: Ask) -> None:
    found = broken(pends_for_ever)
    assert (found.code, found.report["run"]["state"]) == (1, "cancelled")
    assert "pending for" in found.failure["error"]
    assert "ReqNodeNotAvail" in found.failure["error"]
    assert found.answer["diagnosis"]["rule"] == "cannot start"


@pytest.mark.parametrize(
    ("override", "slurms", "key"),
    [
        ("cluster.account=nonesuch", "Invalid account", "cluster.account=nonesuch"),
        ("cluster.partition=nonesuch", "invalid partition", "cluster.partition=nonesuch"),
        ("limits.time_min=721", "Requested time limit is invalid", "limits.time_min=721"),
        ("cluster.sbatch_args={gres: 'tpu:1'}", "Invalid generic resource", "cluster.sbatch_args={'gres': 'tpu:1'}"),
    ],
)
def test_what_slurm_refuses_names_the_key(breaker: Breaker, override: str, slurms: str, key: str) -> None:
    sets = ["--set", "cluster.time_limit_min=800", "--set", override, "--set", "run.name=refused"]
    done = breaker.lab.launcher("submit", str(CONFIG), *sets, cwd=breaker.folder)
    assert done.returncode == 2
    assert slurms in done.stderr
    assert key in done.stderr
    assert not list((breaker.folder / "runs").glob("refused/*"))


def test_a_controller_that_restarts_loses_nothing(breaker: Breaker, broken: Ask) -> None:
    for scenario in SCENARIOS:  # they need a Slurm that answers
        broken(scenario)
    run = breaker.start("controller").measured()
    control.controller(breaker.lab.spec.root, "kill")
    try:
        said = breaker.lab.launcher("status", "controller", "--json", cwd=breaker.folder)
    finally:
        control.controller(breaker.lab.spec.root, "start")
    (status,) = json.loads(said.stdout)["runs"]
    assert status["state"] in ("running", "pending", "unknown"), "a Slurm that does not answer is no end"
    assert "squeue: slurm_load_jobs error: Unable to contact slurm controller" in said.stdout
    found = run.go().broken()
    assert (found.code, found.report["run"]["state"], found.report["run"]["attempt"]) == (0, "completed", 0)
