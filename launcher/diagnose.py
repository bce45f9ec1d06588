"""What is known to be behind a line of a log: cause and fix."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """A line that matches has this cause, and this is what to do."""

    pattern: "re.Pattern[str]"
    cause: str
    fix: str


@dataclass(frozen=True)
class Diagnosis:
    """The line that was known, with its cause and fix."""

    line: str
    cause: str
    fix: str


def _rule(pattern: str, cause: str, fix: str) -> Rule:
    return Rule(re.compile(pattern, re.IGNORECASE), cause, fix)


# From what names its own cause to what may be the consequence of something else.
RULES = (
    _rule(
        r"No MoE backend available for \S+/mxfp4",
        "every backend refused the layer",
        "the reasons in the selector's table say what to change",
    ),
    _rule(
        r"oom[_-]kill|OUT_OF_MEMORY|out of memory \(",
        "the host's cgroup ran out of memory, which an APU shares with its device",
        "raise cluster.mem_mb, or hold less on a rank: a larger topology.ep",
    ),
    _rule(
        r"HIP out of memory|CUDA out of memory|OutOfMemoryError|HSA_STATUS_ERROR_OUT_OF_RESOURCES|DoesNotFitError",
        "the rank's share does not fit the device's memory",
        "more ranks and a larger topology.ep, or fewer job.layers or a smaller batch",
    ),
    _rule(
        r"Failed to initialize any NET plugin|network AWS Libfabric not found|Could not find: ofi",
        "the libfabric plug-in of RCCL is not on the library path",
        "the container needs the aws-ofi hook (the annotations of its EDF), on one node too",
    ),
    _rule(
        r"Couldn't open a fabric access domain|valid default rgroup and vni",
        "the process has no access to the fabric (no CXI VNI)",
        "ranks must be started by an srun step",
    ),
    _rule(
        r"No HIP GPUs are available|invalid device ordinal|Duplicate GPU detected",
        "the devices were masked twice",
        "gpu-bind: none in cluster.sbatch_args, and ROCR_VISIBLE_DEVICES in cluster.unset",
    ),
    _rule(
        r"Errno 116|Stale file handle",
        "Triton's cache lies on a shared file system",
        "set cluster.scratch and cluster.env.TRITON_CACHE_DIR to a node-local folder",
    ),
    _rule(
        r"(Errno|os error) (28|122)\b|Disk quota exceeded",
        "a disk, or the quota on it, is full",
        "make room where the line or the log says; run.folder and cluster.scratch can lie elsewhere",
    ),
    _rule(
        r"EADDRINUSE|Address already in use|errno: 98",
        "another process has the port",
        "launcher resume: each attempt looks for a free port again",
    ),
    _rule(
        r"DUE TO TIME LIMIT|^TIMEOUT$|time limit is near",
        "the job's time limit was shorter than what it had to do",
        "raise limits.time_min; launcher resume keeps what was measured",
    ),
    _rule(
        r"node \S+ is (down|drain|fail)",
        "a node that the run was on is gone, and Slurm put the job back into the queue",
        "put the node into cluster.exclude until it is back, then launcher resume",
    ),
    _rule(
        r"NODE_FAIL|node fail|lost node|killed from outside",
        "a process was killed from outside: a lost node, SIGKILL, or the host's memory killer",
        "look at the node (scontrol show node, dmesg); cluster.exclude keeps a bad one out; then launcher resume",
    ),
    _rule(
        r"pyxis: .*(couldn't start|start failed)|task_init\(\) failed|cannot find name for user ID|"
        r"failed to create user namespace|No space left",
        "the node cannot start the container",
        "put the node into cluster.exclude and launcher resume",
    ),
    _rule(
        r"Watchdog caught collective operation timeout",
        "a collective waited for a rank that did not come: this rank is likely the victim",
        "look at the logs of the other ranks for an earlier error",
    ),
)


def diagnose(lines: Iterable[str]) -> Diagnosis | None:
    """The first rule, in their order, that any of the lines matches; None if nothing is known."""
    lines = list(lines)
    for rule in RULES:
        for line in lines:
            if rule.pattern.search(line):
                return Diagnosis(line.strip(), rule.cause, rule.fix)
    return None
