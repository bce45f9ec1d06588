"""Reports of runs in every state, from nothing but the run's folder."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from jobs.events import EventLog
from launcher import report
from launcher.errors import InputError
from launcher.events import Tail, read_events
from launcher.plan import Plan
from launcher.report_text import headline, summary_rows
from tests.launcher.plans import fixed_plan
from tests.launcher.test_report_schema import valid

SWEEP = {
    "batch_size": 4,
    "layers": 4,
    "requested": 5,
    "completed": 5,
    "total_token_throughput": 10.5,
    "tokens_per_s_per_gpu": 5.25,
    "mean_latency_ms": 385.0,
    "median_latency_ms": 380.0,
    "p99_latency_ms": 396.0,
    "us_per_layer": 95000.0,
    "us_per_layer_min": 94000.0,
    "us_per_layer_max": 99000.0,
    "us_per_layer_mad": 1000.0,
    "combine_us": 1200.0,
    "floor_us_per_layer": 30.0,
}
LOAD: dict[str, Any] = {"tokens": 4, "by_layer": {"0": [1, 2, 1, 0, 4, 0, 0, 0, *[2] * 8], "3": [1] * 16}}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    plan = fixed_plan(
        "tiny", [f"run.folder={tmp_path}/runs", "topology.ranks_per_node=2", "topology.tp=2", "topology.ep=2"]
    )
    plan.run_dir.mkdir(parents=True)
    plan.save()
    return plan


def go(plan: Plan, rank: int, *, until: str) -> EventLog:
    """Events of a rank that begins stage `until` and is then gone."""
    log = EventLog(plan.run_dir, rank)
    log.write("started", pid=1, host=f"host{rank}", local_rank=rank, world=2)
    data: dict[str, dict[str, object]] = {
        "env": {
            "python": "3.11",
            "packages": {"torch": "2.13"},
            "hip": None,
            "cuda": None,
            "device_name": "CPU",
            "arch": "cpu",
            "env": {},
        },
        "selector": {
            "arch": "cpu",
            "quant": "mxfp4",
            "selected": "reference",
            "candidates": [{"impl": "reference", "verdict": "selected", "reason": "takes ep_size=2"}],
        },
        "weights": {"bytes_read": 10},
        "parity": {"tolerance": 0.02, "layers": {"0": {"relative_error": 3e-3, "routing": "hash"}}},
        "memory": {
            "planned": {"routed experts": 8, "routers": 2},
            "planned_total": 10,
            "measured_total": 11,
            "difference": 0.1,
            "process_resident": 10**8,
            "free": 10**9,
        },
        "throughput": {"sweep": [SWEEP]},
        "done": {},
    }
    for stage, values in data.items():
        if stage == until:
            log._stage = stage
            log.write("begin")
            return log
        with log.stage(stage) as found:
            if stage == "throughput":
                if rank == 0:
                    log.write("expert_load", **LOAD)
                log.write("progress", done=1, total=1, latest=SWEEP)
            found |= values
    return log


def fail(log: EventLog, stage: str, data: dict[str, object], error: str) -> None:
    """A stage that ends in a RuntimeError after it has put `data` down."""
    with suppress(RuntimeError), log.stage(stage) as found:
        found |= data
        raise RuntimeError(error)


def test_a_report_of_a_completed_run_holds_everything_to_repeat_it(plan: Plan) -> None:
    for rank in range(2):
        go(plan, rank, until="")
    result = report.write(plan.run_dir)
    assert (result["schema"], result["schema_version"]) == ("moe-ep/probe-report", 2)
    valid(json.loads((plan.run_dir / "report.json").read_text()))
    assert result["run"]["state"] == "completed"
    assert result["failure"] is None
    assert result["run"]["command"] == ["launcher", "submit", "configs/tiny.yaml"]
    assert result["run"]["git_revision"] == "0" * 40
    assert result["config"] == plan.config.model_dump(mode="json")
    assert [rank["host"] for rank in result["ranks"]] == ["host0", "host1"]
    assert [rank["experts"] for rank in result["ranks"]] == [[0, 8], [8, 16]]
    assert result["selector"]["selected"] == "reference"
    assert result["selector"]["by_rank"] == {"0": "reference", "1": "reference"}
    assert result["throughput"] == [SWEEP]
    load = result["expert_load"]
    assert load["by_rank"] == {"0": [8, 16], "3": [8, 8]}
    assert load["balance"] == {"0": 24 / 16 / 4, "3": 1.0}
    assert load["balancedness"] == (12 / 16 + 1) / 2
    assert json.loads((plan.run_dir / "report.json").read_text())["parity"]["layers"]["0"]["relative_error"] == 3e-3
    text = (plan.run_dir / "report.md").read_text()
    assert text.startswith("# tiny 20260101-000000-abcd: completed\n")
    for word in (
        "| layer 0 (hash routing) | 3.00e-03 ≤ 0.02 |",
        "10.5 tokens/s",
        "host1",
        "launcher submit",
        "| torch | 2.13 |",
    ):
        assert word in text


def test_a_run_without_any_event_has_a_report(plan: Plan) -> None:
    result = report.write(plan.run_dir)
    valid(result)
    assert result["run"]["state"] == "unfinished"
    assert result["throughput"] == result["memory"] == []


def test_a_killed_run_leaves_what_was_done_and_a_broken_last_line_does_no_harm(plan: Plan) -> None:
    for rank in range(2):
        log = go(plan, rank, until="throughput")
        log.write("progress", done=1, total=3, latest=SWEEP)
    with (plan.run_dir / "events" / "rank-00001.jsonl").open("a") as f:
        f.write('{"time": 17, "rank": 1, "sta')
    result = report.write(plan.run_dir)
    assert result["run"]["state"] == "unfinished"
    assert result["throughput"] == [SWEEP], "the batch sizes that were done"
    assert [line["rank"] for line in result["memory"]] == [0, 1]
    stage = result["ranks"][1]["stages"]["throughput"]
    assert (stage["state"], stage["seconds"]) == ("begun", None)
    assert stage["begun_s"] >= 0


def test_a_failure_names_rank_host_stage_and_shows_the_end_of_its_log(plan: Plan) -> None:
    go(plan, 0, until="weights")
    log = EventLog(plan.run_dir, 1)
    log.write("started", pid=1, host="host1", local_rank=1, world=2)
    fail(log, "weights", {"planned": 3}, "no tensor w1")
    logs = plan.run_dir / "submitit"
    logs.mkdir()
    (logs / "77_1_log.err").write_bytes(b"\xff not UTF-8\n" + b"\n".join(b"line %d" % i for i in range(100)))
    result = report.write(plan.run_dir)
    valid(result)
    failure = result["failure"]
    assert (failure["rank"], failure["host"], failure["stage"]) == (1, "host1", "weights")
    assert failure["error"] == "no tensor w1"
    assert "RuntimeError: no tensor w1" in failure["traceback"]
    assert failure["log_tail"] == [f"line {i}" for i in range(80, 100)]
    assert headline(result).endswith("failed in stage weights, first at rank 1 on host1")
    assert "RuntimeError: no tensor w1" in (plan.run_dir / "report.md").read_text()


def test_a_parity_above_tolerance_is_marked(plan: Plan) -> None:
    log = EventLog(plan.run_dir, 0)
    lines = {"0": {"relative_error": 0.5, "routing": "hash"}}
    fail(log, "parity", {"tolerance": 0.02, "layers": lines}, "above")
    rows = summary_rows(report.build(plan.run_dir))
    assert ("parity", "layer 0 (hash routing)", "5.00e-01 ABOVE 0.02") in rows


STAGES = ("env", "selector", "weights", "parity", "memory", "throughput", "done")


@pytest.mark.parametrize("how", ["begun", "raised", "signalled"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_report_can_be_made_whatever_stage_a_rank_ended_in_and_however(plan: Plan, stage: str, how: str) -> None:
    go(plan, 0, until=stage)
    log = go(plan, 1, until=stage)
    if how == "raised":
        fail(log, stage, {}, "")
    elif how == "signalled":
        log.write("failed", error={"type": "Signal", "text": "cancelled (SIGTERM)"})
    result = report.write(plan.run_dir)
    valid(result)
    assert result["run"]["state"] == ("unfinished" if how == "begun" else "failed")
    reached = STAGES.index(stage)
    assert (result["selector"] is not None) == (reached > STAGES.index("selector"))
    assert (result["parity"] is not None) == (reached > STAGES.index("parity"))
    assert len(result["memory"]) == (2 if reached > STAGES.index("memory") else 0)
    assert result["throughput"] == ([SWEEP] if reached > STAGES.index("throughput") else [])


def test_a_parity_that_is_no_number_is_said_and_the_json_stays_valid(plan: Plan) -> None:
    log = EventLog(plan.run_dir, 0)
    lines = {"0": {"relative_error": float("nan"), "routing": "hash"}}
    fail(log, "parity", {"tolerance": 0.02, "layers": lines}, "nan is above")
    rows = summary_rows(report.write(plan.run_dir))
    assert ("parity", "layer 0 (hash routing)", "NOT A NUMBER") in rows
    assert "NaN" not in (plan.run_dir / "report.json").read_text()


@pytest.mark.parametrize(("agreed", "said"), [(True, ""), (False, " (96 rounds did not agree on it)"), (None, "")])
def test_a_choice_that_rounds_did_not_agree_on_is_said(plan: Plan, agreed: bool | None, said: str) -> None:
    times = {"dispatch_us": 0.0, "combine_us": 80.0, "predicted_dispatch_us": 0.0, "predicted_combine_us": 90.0}
    strategy = {"strategy": "all_reduce", **times, "sent_bytes": 1, "predicted_bytes": 1.0}
    line = {"tokens": 4, "chosen": "all_reduce", "why": "", "over_best": 0.0, "strategies": [strategy]}
    log = EventLog(plan.run_dir, 0)
    with log.stage("comm") as data:
        data["measured"] = [line | ({} if agreed is None else {"rounds": 96, "agreed": agreed})]
    found = report.build(plan.run_dir)
    valid(found)
    expected = f"all_reduce* 80 (90) µs; the choice (*) is 0% above the best{said}"
    assert ("communication", "batch 4", expected) in summary_rows(found)


def test_after_a_requeue_the_report_is_of_the_last_attempt_but_keeps_what_was_measured(plan: Plan) -> None:
    for rank in range(2):
        go(plan, rank, until="done")
    log = EventLog(plan.run_dir, 0, attempt=1)
    log.write("started", pid=1, host="another", local_rank=0, world=2)
    fail(log, "env", {}, "no device")
    result = report.write(plan.run_dir)
    assert (result["run"]["attempt"], result["failure"]["host"]) == (1, "another")
    assert result["parity"] is None
    assert result["memory"] == []
    assert result["throughput"] == [SWEEP]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not the folder of a run, it has no plan\.json"):
        report.build(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "null", "not JSON", '{"topology": 4}'])
def test_a_damaged_plan_is_named(plan: Plan, text: str) -> None:
    (plan.run_dir / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json"):
        report.build(plan.run_dir)


def test_event_lines_that_are_none_do_no_harm(plan: Plan) -> None:
    go(plan, 0, until="weights")
    good: dict[str, object] = {"time": 1.0, "rank": 1, "stage": "env", "event": "begin", "data": {}}
    wrong: list[dict[str, object]] = [
        {"time": None},
        {"stage": []},
        {"attempt": "1"},
        {"data": None},
        {"data": []},
        {"more": 1},
        {"rank": "1"},
    ]
    with (plan.run_dir / "events" / "odd.jsonl").open("w") as f:
        f.writelines(json.dumps(good | change) + "\n" for change in wrong)
        f.write(json.dumps(good | {"rank": 99, "event": "failed"}) + "\n")
    (plan.run_dir / "events" / "folder.jsonl").mkdir()
    result = report.write(plan.run_dir)
    assert result["run"]["state"] == "unfinished", "rank 99 is none of this run's"


def test_a_clock_that_is_set_back_loses_nothing(plan: Plan) -> None:
    for rank in range(2):
        go(plan, rank, until="memory")
    file = plan.run_dir / "events" / "rank-00000.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    at = next(i for i, line in enumerate(lines) if (line["stage"], line["event"]) == ("parity", "end"))
    for line in lines[at:]:
        line["time"] -= 3600
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = report.write(plan.run_dir)
    assert result["parity"]["layers"]["0"]["relative_error"] == 3e-3
    stages = result["ranks"][0]["stages"]
    assert stages["parity"]["state"] == "done"
    assert 0 <= stages["parity"]["seconds"] < 600
    assert all(stage["begun_s"] >= 0 for rank in result["ranks"] for stage in rank["stages"].values())


def test_what_a_log_and_an_error_say_stays_what_it_is(plan: Plan) -> None:
    fail(EventLog(plan.run_dir, 0), "weights", {}, "no file bad\udcff ```` # no heading")
    logs = plan.run_dir / "submitit"
    logs.mkdir()
    (logs / "7_0_log.err").write_bytes(b"x" * 200_000 + b"\n```\n# no heading\n")
    result = report.write(plan.run_dir)
    assert sum(map(len, result["failure"]["log_tail"])) <= 64 * 1024, "a log may be larger than memory"
    assert result["failure"]["log_tail"][-2:] == ["```", "# no heading"]
    text = (plan.run_dir / "report.md").read_text()
    assert "\n`````\nRuntimeError: no file bad\\udcff ```` # no heading\n`````\n" in text
    assert "\n```\n# no heading\n````\n" in text, "what a fence of three would end is within one of four"
    assert "no file bad" in (plan.run_dir / "report.html").read_text()


def test_a_report_that_cannot_be_written_can_still_be_seen(plan: Plan) -> None:
    (plan.run_dir / "report.json").mkdir()
    result = report.write(plan.run_dir)
    assert "report.json" in result["not_written"]
    assert not list(plan.run_dir.glob(".report*"))


def test_the_tail_hands_out_each_line_once_and_waits_for_whole_ones(plan: Plan) -> None:
    tail = Tail(plan.run_dir)
    assert tail.new() == []
    log = EventLog(plan.run_dir, 0)
    log.write("started", pid=1, host="h")
    assert [e.event for e in tail.new()] == ["started"]
    file = plan.run_dir / "events" / "rank-00000.jsonl"
    with file.open("a") as f:
        f.write('{"time": 1, "rank": 0, "stage": "env",')
    assert tail.new() == []
    with file.open("a") as f:
        f.write(' "event": "begin"}\nnot JSON\n')
    assert [e.event for e in tail.new()] == ["begin"]
    (plan.run_dir / "events" / "rank-00001.jsonl").write_text(
        '{"time": 1, "rank": 1, "stage": "env", "event": "end"}\n'
    )
    said = [e.event for e in read_events(plan.run_dir)]
    assert said == ["end", "started", "begin"], "by time, but a rank's own in its order"
