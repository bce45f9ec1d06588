"""What can be checked of a plan from where it would be submitted."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher import refusals, slurm
from launcher.engines.known import limits_of
from launcher.errors import InputError
from launcher.files import is_file, is_folder
from launcher.fit import plan_memory
from launcher.folders import problem_of_writing
from launcher.plan import Plan, problems_on_site
from launcher.render import sbatch_script
from launcher.runs import all_runs
from launcher.show_memory import describe
from launcher.units import GB, size

State = Literal["ok", "warning", "failed", "unknown"]
_GOES = re.compile(r"^(idle|mixed|allocated|completing|planned)\w*$")
_LITTLE = GB
_REPORTS = 20


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. failed: the run would not work; warning: it may not; unknown: nobody can say."""

    name: str
    state: State
    text: str


def login_checks(plan: Plan) -> list[Check]:
    """Files, memory, engine, run folder, container, partition, what sbatch itself says, and time."""
    groups: list[Callable[[Plan], Iterable[Check]]] = [_files, _memory, _engine, _run_folder]
    if plan.config.cluster.scheduler == "slurm":
        groups += [_container, _partition, _sbatch]
    return [check for group in (*groups, _time, _code) for check in group(plan)]


def _files(plan: Plan) -> Iterable[Check]:
    problems = problems_on_site(plan)
    yield from (Check("files", "failed", problem) for problem in problems)
    if not problems:
        made = plan.config.model.synthetic is not None
        yield Check("files", "ok", f"{plan.checkpoint}: {'made by the run' if made else 'config and index are there'}")


def _memory(plan: Plan) -> Iterable[Check]:
    try:
        verdict = plan_memory(plan.config, Path(plan.checkpoint)).job
    except InputError as error:
        yield Check("memory", "failed", str(error))
        return
    states: dict[str, State] = {"fits": "ok", "tight": "warning", "does not fit": "failed", "unknown": "unknown"}
    yield Check("memory", states[verdict.state], describe(verdict))


def _engine(plan: Plan) -> Iterable[Check]:
    """What is known of an engine of others on the cluster's devices."""
    yield from (Check("engine", "failed" if limit.stops else "warning", limit.text) for limit in limits_of(plan.config))


def _run_folder(plan: Plan) -> Iterable[Check]:
    folder = plan.run_dir
    while not (is_folder(folder) or is_file(folder)):
        folder = folder.parent
    problem = _problem_of_looking(plan.run_dir) or problem_of_writing(folder)
    free = shutil.disk_usage(folder).free
    text = f"{plan.config.run.folder}: {size(free)} free"
    if problem:
        yield Check("run.folder", "failed", f"{plan.config.run.folder}: {problem}")
    else:
        yield Check("run.folder", "ok" if free > _LITTLE else "warning", text)


def _problem_of_looking(folder: Path) -> str | None:
    """What keeps this user from looking at a folder; None also where there is none yet."""
    try:
        folder.exists()
    except OSError as error:
        return f"[Errno {error.errno}] {error.strerror}"
    return None


def _container(plan: Plan) -> Iterable[Check]:
    container = plan.config.cluster.container
    if container is None:
        return
    name = Path(os.path.expandvars(container.environment)).expanduser()
    paths = [Path(part) for part in os.environ.get("EDF_PATH", "").split(os.pathsep) if part] or [Path.home() / ".edf"]
    places = [name] if name.suffix == ".toml" or name.is_absolute() else [p / f"{name}.toml" for p in paths]
    if any(map(is_file, places)):
        yield Check("container", "ok", f"cluster.container.environment: {container.environment} is there")
    else:
        looked = ", ".join(map(str, places))
        yield Check("container", "failed", f"cluster.container.environment: {container.environment}: no file {looked}")


def _partition(plan: Plan) -> Iterable[Check]:
    cluster = plan.config.cluster
    try:
        found = slurm.partition(cluster.partition)
    except InputError as error:
        yield Check("partition", "unknown", str(error))
        return
    if not found:
        yield Check(
            "partition", "failed", f"cluster.partition: {cluster.partition or 'the default one'}: there is none"
        )
        return
    wrong = list(partition_problems(plan, found))
    yield from (Check("partition", "failed", text) for text in wrong)
    if not wrong:
        limits = f"MaxTime {found.get('MaxTime')}, MaxNodes {found.get('MaxNodes')}, {found.get('TotalNodes')} nodes"
        yield Check("partition", "ok", f"{found['PartitionName']}: {found.get('State')}, {limits}")
    yield node_check(slurm.nodes(found["PartitionName"]), plan)
    known = {node.name for node in slurm.nodes(None)}
    gone = [name for name in cluster.exclude if "[" not in name and name not in known]
    if gone:
        yield Check("exclude", "failed", f"cluster.exclude: {', '.join(gone)}: no such node")


def partition_problems(plan: Plan, found: dict[str, str]) -> Iterable[str]:
    """Where a plan asks for more than a partition gives, by Slurm's own keys of it."""
    cluster, topology, limits = plan.config.cluster, plan.config.topology, plan.config.limits
    name = found.get("PartitionName", "")
    if found.get("State", "UP") != "UP":
        yield f"cluster.partition: {name} is {found['State']}"
    most = minutes(found.get("MaxTime", "UNLIMITED"))
    if most is not None and limits.time_min > most:
        yield f"limits.time_min: {limits.time_min} is more than the {most:g} minutes of {name} (MaxTime)"
    for key in ("MaxNodes", "TotalNodes"):
        if found.get(key, "").isdigit() and topology.nodes > int(found[key]):
            yield f"topology.nodes: {topology.nodes} is more than the {found[key]} of {name} ({key})"
    memory = found.get("MaxMemPerNode", "")
    if cluster.mem_mb and memory.isdigit() and cluster.mem_mb > int(memory):
        yield f"cluster.mem_mb: {cluster.mem_mb} is more than the {memory} of {name} (MaxMemPerNode)"
    for key, value, allowed in (
        ("cluster.account", cluster.account, found.get("AllowAccounts", "ALL")),
        ("cluster.qos", cluster.qos, found.get("AllowQos", "ALL")),
    ):
        if value and allowed != "ALL" and value not in allowed.split(","):
            yield f"{key}: {value} is not among those that {name} takes: {allowed}"


def node_check(nodes: list[slurm.Node], plan: Plan) -> Check:
    """Whether enough nodes are up and large enough."""
    cluster, topology = plan.config.cluster, plan.config.topology
    cpus = (cluster.cpus_per_task or 1) * topology.ranks_per_node
    up = [n for n in nodes if _GOES.match(n.state) and n.name not in cluster.exclude]
    fit = [
        n
        for n in up
        if n.cpus >= cpus
        and n.memory_mb >= (cluster.mem_mb or 0)
        and (not cluster.devices_per_node or gpus(n.gres) >= topology.ranks_per_node)
    ]
    idle = sum(n.state.startswith("idle") for n in fit)
    text = f"{len(nodes)} in the partition, {len(up)} up, {len(fit)} large enough, {idle} of them idle"
    if len(fit) >= topology.nodes:
        return Check("nodes", "ok", f"{text}; {topology.nodes} are asked for")
    need = f"topology.nodes: {topology.nodes} are asked for"
    if len(up) >= topology.nodes:
        per = f"{cpus} cores, {cluster.mem_mb or 0} MB, {topology.ranks_per_node} devices"
        need += f" with {per} each (topology.ranks_per_node, cluster.cpus_per_task, cluster.mem_mb)"
    return Check("nodes", "failed", f"{text}; {need}")


def gpus(gres: str) -> int:
    """Number of GPUs in Slurm's `gpu:mi300a:4(S:0-3),tmpfs:1`."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres))


def minutes(limit: str) -> float | None:
    """Minutes of Slurm's [D-]HH:MM:SS; None for no limit."""
    if limit in ("UNLIMITED", "INFINITE", "NONE", ""):
        return None
    days, _, clock = limit.rpartition("-")
    hours, mins, seconds = (int(part) for part in clock.split(":"))
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def _sbatch(plan: Plan) -> Iterable[Check]:
    taken, said = slurm.test_only(sbatch_script(plan))
    if taken:
        start = re.search(r"to start at (\S+)", said)
        yield Check("sbatch --test-only", "ok", f"would start at {start[1]}" if start else said)
    else:
        yield Check("sbatch --test-only", "failed", refusals.explain(said, plan.config))


def _time(plan: Plan) -> Iterable[Check]:
    """The load against the limit: at the rate of earlier runs of the same checkpoint, if there are any."""
    held = sum(plan.held_bytes(plan.places[0]).values())
    limit = plan.config.limits.time_min * 60 - plan.config.limits.signal_s
    rate = measured_rate(plan)
    if rate is None:
        needed = held / max(1.0, 0.5 * limit)
        text = f"a rank reads {size(held)}; no earlier run tells at what rate, to load in half the time it takes "
        yield Check("time", "unknown", f"{text}{size(needed)}/s a rank")
        return
    seconds = held / rate
    state: State = "failed" if seconds > limit else "warning" if seconds > 0.5 * limit else "ok"
    about = f"a rank reads {size(held)}, {seconds:,.0f} s at {size(rate)}/s as in the last run"
    yield Check("time", state, f"{about}; limits.time_min={plan.config.limits.time_min}")


def measured_rate(plan: Plan) -> float | None:
    """Bytes/s of the slowest rank of the newest run below run.folder that loaded the same checkpoint."""
    for run in reversed(all_runs(Path(plan.config.run.folder))[-_REPORTS:]):
        with suppress(OSError, ValueError, KeyError, TypeError):
            report = json.loads((run / "report.json").read_text())
            if report["run"]["checkpoint"] != plan.checkpoint:
                continue
            rates = [
                weights["bytes_read"] / weights["load_seconds"]
                for rank in report["ranks"]
                if (weights := rank["weights"]).get("load_seconds") and weights["bytes_read"]
            ]
            if rates:
                return float(min(rates))
    return None


def _code(plan: Plan) -> Iterable[Check]:
    if plan.code_root is None:
        yield Check("code", "ok", "the ranks import the installed package")
    elif plan.git_revision is None:
        yield Check("code", "unknown", f"{plan.code_root}: not a git checkout, a run cannot say which code it was")
    elif plan.git_revision.endswith("-dirty"):
        yield Check("code", "warning", f"{plan.code_root}: {plan.git_revision}: files differ from the commit")
    else:
        yield Check("code", "ok", f"{plan.code_root}: {plan.git_revision}")
