"""A run folder becomes a report: report.json for programs, report.md for people, a table for the terminal."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.events import Event, read_events
from launcher.files import write_atomically
from launcher.outcome import Outcome, judge, last_attempt
from launcher.plan import read_plan
from launcher.runs import submissions
from launcher.units import size

SCHEMA = "moe-ep/probe-report"
SCHEMA_VERSION = 1
LOG_LINES = 20
_WEIGHTS = ("bytes_read", "bytes_written", "load_seconds", "read_from", "folder")


def build(run_dir: Path, state: str | None = None) -> dict[str, Any]:
    """The report of a run as far as it has come; `state` is what `status` says of it, if it was asked.

    Raises
    ------
    InputError
        If `run_dir` is not the folder of a run.
    """
    plan = read_plan(run_dir)
    everything = read_events(run_dir)
    events = last_attempt(everything)
    world = len(plan["topology"])
    outcome = judge(events, world)
    stages = {rank: _stages_of(events, rank) for rank in range(world)}
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "run": {
            "name": plan["config"]["run"]["name"],
            "id": plan["run_id"],
            "state": state or outcome.state,
            "attempt": events[-1].attempt if events else 0,
            "started": _iso(events[0].time) if events else None,
            "last_event": _iso(events[-1].time) if events else None,
            "seed": plan["config"]["run"]["seed"],
            "command": plan["command"],
            "git_revision": plan["git_revision"],
            "checkpoint": plan["checkpoint"],
        },
        "submissions": [asdict(s) for s in submissions(run_dir)],
        "failure": _failure(run_dir, outcome, plan, events),
        "selector": _selector(stages),
        "tune": next(iter(_results(stages, "tune", "table").values()), None),
        "parity": next(iter(_results(stages, "parity", "layers").values()), None),
        "memory": [{"rank": r, **data} for r, data in _results(stages, "memory", "measured_total").items()],
        "throughput": _sweep(everything),
        "ranks": [_rank(events, stages[rank], place) for rank, place in enumerate(plan["topology"])],
        "planned_bytes": plan["planned_bytes"],
        "config": plan["config"],
    }


def write(run_dir: Path, state: str | None = None) -> dict[str, Any]:
    """Build the report and write report.json and report.md into the run folder. Errors as `build`."""
    report = build(run_dir, state)
    try:
        write_atomically(run_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
        write_atomically(run_dir / "report.md", markdown(report))
    except OSError as error:  # somebody else's run, or a full disk: it can still be shown
        report["not_written"] = str(error)
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
        if selector.get("launch"):
            rows.append(("selector", "launch configurations", selector["launch"]["table"]))
    if report["tune"]:
        rows.append(("tune", "table", f"{report['tune']['table']}: {report['tune']['source']}"))
        rows += [
            ("tune", f"up to {line['rows']:g} rows an expert" if line["rows"] < 1e6 else "more", line["config"])
            for line in report["tune"]["regimes"]
        ]
    parity = report["parity"]
    if parity:
        rows += [
            (
                "parity",
                f"layer {number} ({line['routing']} routing)",
                _against(line["relative_error"], parity["tolerance"]),
            )
            for number, line in parity["layers"].items()
        ]
    rows += [
        (
            "memory",
            f"rank {line['rank']}",
            f"{size(line['measured_total'])} held, {size(line['planned_total'])} planned"
            f" ({line['measured_total'] / line['planned_total'] - 1:+.1%}); process {size(line['process_resident'])}",
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
        where = [] if failure["rank"] is None else [f"rank {failure['rank']}"]
        where.append(f"stage {failure['stage']}")
        rows.append(("failure", ", ".join(where), f"{failure['error_type']}: {failure['error']}"))
    return rows


def _device_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each kind of device with the number of ranks on it, and whether kernels were interpreted there."""
    kinds: dict[str, int] = {}
    for rank in report["ranks"]:
        found = rank["environment"]
        if "device_name" in found:
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
        text += f" in stage {failure['stage']}"
        if failure["rank"] is not None:
            text += f", first at rank {failure['rank']}{on}"
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
        *(
            f"- attempt {s['attempt']}: job {s['job_id']}, git revision {s['git_revision']}"
            for s in report["submissions"]
        ),
        f"- planned at git revision {run['git_revision']}, seed {run['seed']}, checkpoint `{run['checkpoint']}`",
        f"- started {run['started']}, last event {run['last_event']}",
        *(f"- {name} {version}" for name, version in _versions(report).items()),
        "- the configuration as resolved stands in report.json under `config`",
    ]
    return "\n".join(lines) + "\n"


def _stages_of(events: Sequence[Event], rank: int) -> dict[str, dict[str, Any]]:
    """What a rank reached: by stage its state, seconds and results."""
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


def _results(stages: dict[int, dict[str, Any]], name: str, key: str) -> dict[int, dict[str, Any]]:
    """By rank, a stage's results; a rank that did not come as far as `key` has none."""
    found = {rank: by_name.get(name, {}).get("data", {}) for rank, by_name in stages.items()}
    return {rank: data for rank, data in found.items() if data.get(key) is not None}


def _selector(stages: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    records = _results(stages, "selector", "candidates")
    if not records:
        return None
    chosen = {str(rank): record["selected"] for rank, record in records.items()}
    return {**next(iter(records.values())), "by_rank": chosen}


def _sweep(events: Sequence[Event]) -> list[dict[str, Any]]:
    """The batch sizes that were measured, in whichever attempt; every rank has the same."""
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
        "environment": {k: v for k, v in environment.items() if k != "hosts"},
        "weights": {k: v for k, v in stages.get("weights", {}).get("data", {}).items() if k in _WEIGHTS},
        "stages": {name: {"state": s["state"], "seconds": s["seconds"]} for name, s in stages.items()},
    }


def _failure(run_dir: Path, outcome: Outcome, plan: dict[str, Any], events: Sequence[Event]) -> dict[str, Any] | None:
    if outcome.failure is None:
        return None
    rank = outcome.failure.rank
    host = next((e.data["host"] for e in events if e.rank == rank and e.event == "started"), None)
    logs = [] if rank is None else (run_dir / "submitit").glob(f"*_{rank}_log.err")
    log = max(logs, key=lambda p: p.stat().st_mtime, default=None)
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
        if "packages" in environment:
            versions = {"python": environment["python"], **environment["packages"]}
            versions |= {k: environment[k] for k in ("hip", "cuda")}
            return {name: version for name, version in versions.items() if version}
    return {}


def _against(error: float | None, tolerance: float) -> str:
    if error is None:
        return "NOT A NUMBER"
    return f"{error:.2e} {'≤' if error <= tolerance else 'ABOVE'} {tolerance:g}"


def _markdown_table(heads: Sequence[str], rows: list[list[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(heads), line(["---"] * len(heads)), *(line(row) for row in rows), ""] if rows else []


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
