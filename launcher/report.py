"""A run folder becomes a report: report.json for programs, report.md for people, a table for the terminal."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.errors import InputError
from launcher.events import Event, read_events
from launcher.files import write_atomically
from launcher.outcome import Outcome, judge
from launcher.plan import PLAN
from launcher.units import size

SCHEMA = "moe-ep/probe-report"
SCHEMA_VERSION = 1
LOG_LINES = 20


def build(run_dir: Path) -> dict[str, Any]:
    """The report of a run as far as it has come, whatever its state.

    Raises
    ------
    InputError
        If `run_dir` is not the folder of a run.
    """
    plan = _read_plan(run_dir)
    events = read_events(run_dir)
    world = len(plan["topology"])
    outcome = judge(events, world)
    stages = {rank: _stages_of(events, rank) for rank in range(world)}
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "run": {
            "name": plan["config"]["run"]["name"],
            "id": plan["run_id"],
            "state": outcome.state,
            "started": _iso(events[0].time) if events else None,
            "last_event": _iso(events[-1].time) if events else None,
            "seed": plan["config"]["run"]["seed"],
            "command": plan["command"],
            "git_revision": plan["git_revision"],
            "checkpoint": plan["checkpoint"],
        },
        "failure": _failure(run_dir, outcome, plan, events),
        "selector": _selector(stages),
        "parity": _first_data(stages, "parity"),
        "memory": [{"rank": r, **s["memory"]["data"]} for r, s in stages.items() if "memory" in s],
        "throughput": (_first_data(stages, "throughput") or {}).get("sweep") or _partial_sweep(events),
        "ranks": [_rank(events, stages[rank], place) for rank, place in enumerate(plan["topology"])],
        "planned_bytes": plan["planned_bytes"],
        "config": plan["config"],
    }


def write(run_dir: Path) -> dict[str, Any]:
    """Build the report and write report.json and report.md into the run folder. Errors as `build`."""
    report = build(run_dir)
    write_atomically(run_dir / "report.json", json.dumps(report, indent=2) + "\n")
    write_atomically(run_dir / "report.md", markdown(report))
    return report


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(section, what, result) rows: selector, parity, memory per rank, throughput, and the failure if any."""
    rows = _device_rows(report)
    selector = report["selector"]
    if selector:
        rows += [
            (
                "selector",
                f"{selector['arch']}/{selector['quant']} {c['impl']}",
                f"{c['verdict']}: {c['reason']}",
            )
            for c in selector["candidates"]
        ]
    parity = report["parity"]
    if parity:
        rows += [
            (
                "parity",
                f"layer {number} ({line['routing']} routing)",
                f"{line['relative_error']:.2e} {_sign(line['relative_error'], parity['tolerance'])}",
            )
            for number, line in parity["layers"].items()
        ]
    rows += [
        (
            "memory",
            f"rank {line['rank']}",
            f"{size(line['measured_total'])} held, {size(line['planned_total'])} planned; "
            f"process {size(line['process_resident'])}",
        )
        for line in report["memory"]
    ]
    rows += [
        (
            "throughput",
            f"batch {line['batch_size']}",
            f"{line['tokens_per_s']:,.1f} tokens/s; {line['us_per_layer']:,.0f} µs per layer "
            f"({line['us_per_layer_min']:,.0f}…{line['us_per_layer_max']:,.0f})",
        )
        for line in report["throughput"]
    ]
    failure = report["failure"]
    if failure:
        where = f"rank {failure['rank']}, stage {failure['stage']}"
        rows.append(("failure", where, f"{failure['error_type']}: {failure['error']}"))
    return rows


def _device_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each kind of device with the number of ranks on it, and whether kernels were interpreted there."""
    kinds: dict[str, int] = {}
    for rank in report["ranks"]:
        found = rank["environment"]
        if found:
            name = f"{found['device_name']} ({found['arch']})"
            if found["env"].get("TRITON_INTERPRET") == "1":
                name += "; Triton's interpreter: its times tell nothing about a GPU's"
            kinds[name] = kinds.get(name, 0) + 1
    return [("device", f"{count} rank{'s'[: count != 1]}", name) for name, count in kinds.items()]


def headline(report: dict[str, Any]) -> str:
    """The verdict in one line."""
    run, failure = report["run"], report["failure"]
    text = f"{run['name']} {run['id']}: {run['state']}"
    if failure:
        on = f" on {failure['host']}" if failure["host"] else ""
        text += f" in stage {failure['stage']}, first at rank {failure['rank']}{on}"
    return text


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    run = report["run"]
    lines = [f"# {headline(report)}", ""]
    failure = report["failure"]
    if failure:
        lines += ["```", f"{failure['error_type']}: {failure['error']}", "```", ""]
        if failure["log"]:
            lines += [f"Last lines of {failure['log']}:", "", "```", *failure["log_tail"], "```", ""]
    lines += _markdown_table(("", "", ""), [list(row) for row in summary_rows(report)])
    throughput = report["throughput"]
    if throughput:
        lines += [
            f"Tokens/s: through the {throughput[0]['layers']} loaded MoE layers alone (router, experts, combine, "
            f"shared expert), median of {throughput[0]['repeats']} passes, slowest rank of each.",
            "",
        ]
    lines += ["## Ranks", ""]
    heads = ("rank", "host", "device", "EP group", "experts", "stages, s")
    lines += _markdown_table(heads, [_rank_row(r) for r in report["ranks"]])
    lines += ["## To repeat it", "", "```", shlex.join(run["command"]), "```", ""]
    lines += [
        f"- git revision {run['git_revision']}, seed {run['seed']}, checkpoint `{run['checkpoint']}`",
        f"- started {run['started']}, last event {run['last_event']}",
        *(f"- {name} {version}" for name, version in _versions(report).items()),
        "- the configuration as resolved stands in report.json under `config`",
    ]
    return "\n".join(lines) + "\n"


def _read_plan(run_dir: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = json.loads((run_dir / PLAN).read_text())
    except FileNotFoundError:
        raise InputError(f"{run_dir}: not the folder of a run, it has no {PLAN}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{run_dir / PLAN}: {error}") from None
    return plan


def _stages_of(events: Sequence[Event], rank: int) -> dict[str, dict[str, Any]]:
    """What a rank reached: by stage its state, seconds and data (of its last attempt)."""
    stages: dict[str, dict[str, Any]] = {}
    for e in events:
        if e.rank != rank:
            continue
        if e.event == "begin":
            stages[e.stage] = {"state": "begun", "seconds": None, "begun": e.time, "data": {}}
        elif e.event in ("end", "failed"):
            begun = stages.get(e.stage, {}).get("begun", e.time)
            state = "done" if e.event == "end" else "failed"
            stages[e.stage] = {
                "state": state,
                "seconds": round(e.time - begun, 3),
                "begun": begun,
                "data": e.data,
            }
    return stages


def _first_data(stages: dict[int, dict[str, Any]], name: str) -> dict[str, Any] | None:
    """A stage's data where all ranks report the same: the lowest rank's that has it."""
    for by_name in stages.values():
        data = by_name.get(name, {}).get("data")
        if data:
            return dict(data)
    return None


def _selector(stages: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    records = {r: s["selector"]["data"] for r, s in stages.items() if s.get("selector", {}).get("data")}
    if not records:
        return None
    chosen = {str(rank): record.get("selected") for rank, record in records.items()}
    first = dict(next(iter(records.values())))
    return {k: first[k] for k in ("arch", "quant", "candidates", "selected")} | {"by_rank": chosen}


def _partial_sweep(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Batch sizes that were done before a run ended in the middle of the sweep; every rank has the same."""
    sweep = {
        e.data["latest"]["batch_size"]: e.data["latest"]
        for e in events
        if e.stage == "throughput" and e.event == "progress"
    }
    return list(sweep.values())


def _rank(events: Sequence[Event], stages: dict[str, Any], place: dict[str, Any]) -> dict[str, Any]:
    started = next((e.data for e in reversed(events) if e.rank == place["rank"] and e.event == "started"), {})
    environment = stages.get("env", {}).get("data", {})
    return {
        **place,
        "host": started.get("host"),
        "pid": started.get("pid"),
        "environment": {k: v for k, v in environment.items() if k not in ("error", "error_type", "traceback", "hosts")},
        "weights": {k: v for k, v in stages.get("weights", {}).get("data", {}).items() if k == "bytes_read"},
        "stages": {name: {"state": s["state"], "seconds": s["seconds"]} for name, s in stages.items()},
    }


def _failure(run_dir: Path, outcome: Outcome, plan: dict[str, Any], events: Sequence[Event]) -> dict[str, Any] | None:
    if outcome.failure is None:
        return None
    rank = outcome.failure.rank
    host = next((e.data["host"] for e in events if e.rank == rank and e.event == "started"), None)
    log = max((run_dir / "submitit").glob(f"*_{rank}_log.err"), key=lambda p: p.stat().st_mtime, default=None)
    tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log else []
    failure = asdict(outcome.failure)
    if log is None and failure["error_type"] == "NeverStarted":
        failure["error"] += " (there is no log: its interpreter did not start; see what submitit printed)"
    return {**failure, "host": host, "log": str(log) if log else None, "log_tail": tail}


def _rank_row(rank: dict[str, Any]) -> list[str]:
    stages = ", ".join(f"{n} {s['seconds'] if s['seconds'] is not None else '…'}" for n, s in rank["stages"].items())
    experts = f"{rank['experts'][0]}–{rank['experts'][1] - 1}"
    device = rank["environment"].get("device_name", "")
    return [str(rank["rank"]), rank["host"] or "", device, str(rank["ep_group"]), experts, stages]


def _versions(report: dict[str, Any]) -> dict[str, str]:
    for rank in report["ranks"]:
        environment = rank["environment"]
        if environment:
            versions = {"python": environment["python"], **environment["packages"]}
            versions |= {k: environment[k] for k in ("hip", "cuda")}
            return {name: version for name, version in versions.items() if version}
    return {}


def _sign(error: float, tolerance: float) -> str:
    return f"≤ {tolerance:g}" if error <= tolerance else f"ABOVE {tolerance:g}"


def _markdown_table(heads: Sequence[str], rows: list[list[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(heads), line(["---"] * len(heads)), *(line(row) for row in rows), ""] if rows else []


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
