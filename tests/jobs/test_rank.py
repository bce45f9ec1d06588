"""What a rank does on its own: events, signals, the request."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jobs import budget, environment, stages
from jobs.events import UNWRITABLE, EventLog
from jobs.place import Place
from jobs.rank import PORTS, Rank, join, port_block
from jobs.request import ProbeRequest
from launcher.events import read_events
from launcher.fit import plan_memory
from tests.checkout import ROOT
from tests.launcher.plans import fixed_plan
from tests.waiting import PATIENCE_S, until

REQUEST = fixed_plan("tiny").request()


def lines(run_dir: Path, rank: int = 0) -> list[dict[str, object]]:
    text = (run_dir / "events" / f"rank-{rank:05d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_request_survives_its_file(tmp_path: Path) -> None:
    REQUEST.save(tmp_path)
    assert ProbeRequest.load(tmp_path) == REQUEST


def fail_after_some_work(log: EventLog) -> None:
    with log.stage("weights") as data:
        data["done"] = 3
        raise OSError("disk gone")


def test_a_stage_that_fails_writes_what_it_had_and_why(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk gone"):
        fail_after_some_work(EventLog(tmp_path, 0))
    begin, failed = lines(tmp_path)
    assert (begin["stage"], begin["event"], failed["event"]) == ("weights", "begin", "failed")
    assert failed["data"] == {"done": 3}
    error = failed["error"]
    assert isinstance(error, dict)
    assert (error["text"], error["type"]) == ("disk gone", "OSError")
    assert "fail_after_some_work" in error["traceback"]


def test_numbers_that_json_has_not_are_written_as_null(tmp_path: Path) -> None:
    EventLog(tmp_path, 0).write("x", error_of={"a": [float("nan"), 1.5, float("inf")]})
    assert lines(tmp_path)[0]["data"] == {"error_of": {"a": [None, 1.5, None]}}


WAITING = """
import sys, threading
import numpy  # as submitit does before the job: its threads must not swallow the signal
from pathlib import Path
from jobs.events import EventLog
from jobs.rank import PORTS, Rank, join, port_block
from jobs.rank import leave_on_signal
folder = Path(sys.argv[1])
log = EventLog(folder, 0)
leave_on_signal(log, (folder / "cleaned").touch)
with log.stage("throughput"):
    threading.Event().wait(60)
"""


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGTERM, "cancelled (SIGTERM)"), (signal.SIGUSR2, "time limit is near (SIGUSR2)")]
)
def test_a_signal_writes_a_last_event_and_ends_the_rank_at_once(
    number: signal.Signals, word: str, tmp_path: Path
) -> None:
    environ = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    rank = subprocess.Popen([sys.executable, "-c", WAITING, str(tmp_path)], cwd=ROOT, env=environ)
    until(lambda: list(tmp_path.glob("events/*")) and lines(tmp_path))
    rank.send_signal(number)
    assert rank.wait(timeout=30) == 128 + number
    last = lines(tmp_path)[-1]
    assert (last["stage"], last["event"]) == ("throughput", "failed")
    error = last["error"]
    assert isinstance(error, dict)
    assert (error["type"], error["text"]) == ("Signal", word)
    assert "in wait" in error["traceback"], "where the main thread was"
    assert (tmp_path / "cleaned").exists()


LEAVING = """
import sys
from pathlib import Path
from jobs import communication
from jobs.events import EventLog
folder = Path(sys.argv[1])
log = EventLog(folder, 0)
log.write("started")
if len(sys.argv) > 2:
    log._file = -1  # what a file that takes nothing more does
communication.leave(log, str(folder / "scratch"), "all_reduce waits")
"""


@pytest.mark.parametrize(("unwritable", "code"), [([], 1), (["unwritable"], UNWRITABLE)])
def test_a_rank_in_a_collective_that_does_not_end_leaves_even_if_it_cannot_say_so(
    unwritable: list[str], code: int, tmp_path: Path
) -> None:
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LEAVING, str(tmp_path), *unwritable], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert not (tmp_path / "scratch").exists()
    assert ("all_reduce waits" in done.stderr) == bool(unwritable), "the log has what the run's folder does not take"
    assert [line["event"] for line in lines(tmp_path)] == ["started", *(["failed"] if not unwritable else [])]


DRAINING = """
import sys, threading, time
from pathlib import Path
from jobs.events import EventLog
from jobs.rank import leave_on_signal
from jobs.serving import Ending
folder, log, ending, told = Path(sys.argv[1]), EventLog(Path(sys.argv[1]), 0), Ending(), threading.Event()
leave_on_signal(log, (folder / "cleaned").touch, ending.grace)

def drain(why):
    (folder / "why").write_text(why)
    told.set()
    return float(sys.argv[2])

ending.by(drain)
with log.stage("serving"):
    while not told.is_set():
        time.sleep(0.02)
    time.sleep(0.5)
"""


@pytest.mark.parametrize(("grace", "code", "last"), [(30, 0, "end"), (0.01, 128 + signal.SIGUSR2, "failed")])
def test_a_service_that_is_told_of_the_time_limit_ends_by_itself_if_it_is_quick(
    grace: float, code: int, last: str, tmp_path: Path
) -> None:
    rank = subprocess.Popen([sys.executable, "-c", DRAINING, str(tmp_path), str(grace)], cwd=ROOT)
    until(lambda: list(tmp_path.glob("events/*")) and lines(tmp_path))
    rank.send_signal(signal.SIGUSR2)
    assert rank.wait(timeout=PATIENCE_S) == code
    assert lines(tmp_path)[-1]["event"] == last
    assert (tmp_path / "why").read_text() == "time limit is near (SIGUSR2)"


def test_an_attempt_after_a_torn_line_begins_a_new_one(tmp_path: Path) -> None:
    EventLog(tmp_path, 0).write("started")
    file = tmp_path / "events" / "rank-00000.jsonl"
    file.write_text(file.read_text() + '{"time": 17, "ra')
    EventLog(tmp_path, 0, attempt=1).write("started")
    assert [e.attempt for e in read_events(tmp_path)] == [0, 1]


ALONE = Rank(rank=0, world=1, local_rank=0, nodes=1, host="h", job_id=4711, attempt=0)


def test_jobs_of_a_day_have_port_blocks_of_their_own_below_the_ephemeral_ones() -> None:
    blocks = [port_block(job_id) for job_id in range(1000, 1700)]
    assert len({port for block in blocks for port in block}) == 700 * PORTS
    assert all(block.start >= 20000 and block.stop <= 32768 for block in map(port_block, range(0, 10**6, 997)))


def test_a_port_that_is_taken_costs_a_retry_not_the_job(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", port_block(4711).start))
        taken.listen()
        join(ALONE, tmp_path, torch.device("cpu"), timeout_s=30)
        dist.destroy_process_group()
    address = json.loads((tmp_path / "rendezvous" / "0.json").read_text())
    assert address == {"hosts": ["127.0.0.1"], "port": port_block(4711).start + 1}


def test_ranks_that_do_not_arrive_are_named(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"ranks 1, 2 of 3 have not arrived; there are 0 on h"):
        join(replace(ALONE, world=3, job_id=4712), tmp_path, torch.device("cpu"), timeout_s=1)
    with pytest.raises(TimeoutError, match="rank 0 has not arrived"):
        join(replace(ALONE, rank=1, world=3, attempt=1), tmp_path, torch.device("cpu"), timeout_s=1)


def test_a_rank_describes_where_it_runs(device: torch.device) -> None:
    found = environment.describe(device)
    assert found["arch"] == environment.device_arch(device)
    assert found["packages"]["torch"] == torch.__version__
    assert found["memory_free"] > 0
    json.dumps(found)


def test_a_device_that_is_not_there_is_named_with_what_masks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "9")
    local_rank = torch.cuda.device_count()
    with pytest.raises(environment.WrongDeviceError, match=rf"needs device {local_rank}, .*ROCR_VISIBLE_DEVICES"):
        environment.pick_device(local_rank, "gfx942")
    assert environment.pick_device(7, "cpu") == torch.device("cpu")


PLACE = Place(rank=1, world=4, group_rank=1, group_size=4, replica=0, group=None, device=torch.device("cpu"))


def test_a_share_that_does_not_fit_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    # The report that began this project: V4-Pro on one node at ep=4 wants 205.5 GB a rank.
    pro = fixed_plan("repro-1node-ep4").request()
    monkeypatch.setattr(budget, "free_memory", lambda device: 4 * 118 * 10**9)
    with pytest.raises(
        budget.DoesNotFitError,
        match=r"GB would be held \(205\.5 GB of routed experts, .* 96 of 384 at ep=4\), but 118",
    ):
        budget.check_fits(pro, PLACE)


def test_what_fits_is_planned_item_by_item() -> None:
    planned = budget.check_fits(REQUEST, PLACE)
    assert planned == REQUEST.shape.held_bytes(REQUEST.layers, 4)
    assert planned["routed experts"] == 4 * 4 * REQUEST.shape.expert_bytes


@pytest.mark.parametrize("changes", [(), ("job.kind=preshard", "model.presharded=/x"), ("model.presharded=/x",)])
def test_a_rank_plans_for_itself_what_the_launcher_planned_for_it(
    changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: 10**15)
    plan = fixed_plan("v4pro-2node", changes)
    request, place = plan.request(), replace(PLACE, world=8, group_size=8, device=torch.device("cuda"))
    items = {item.name: item.job for item in plan_memory(plan.config).ranks[1].items}
    work = budget.planned_work(request, place, "triton_kernel")
    assert budget.check_fits(request, place, "triton_kernel")["routed experts"] == items["routed experts"]
    assert max(count for part, count in work.items() if part != budget.READING) == items["workspace"]


@pytest.mark.parametrize("error", [3e-2, float("nan"), float("inf")])
def test_a_parity_beyond_tolerance_or_not_a_number_fails(error: float) -> None:
    with pytest.raises(stages.ParityError, match="layer 2: relative error"):
        stages.check_parity(REQUEST, {0: 1e-3, 2: error})
    stages.check_parity(REQUEST, {0: 1e-3, 2: 2e-2})


def test_tokens_are_the_same_on_the_ranks_of_a_group_and_differ_between_groups() -> None:
    x, ids = stages.tokens(REQUEST, PLACE, 5, salt=2)
    same, same_ids = stages.tokens(REQUEST, replace(PLACE, rank=3, group_rank=3), 5, salt=2)
    other, _ = stages.tokens(REQUEST, replace(PLACE, replica=1), 5, salt=2)
    assert torch.equal(x, same)
    assert torch.equal(ids, same_ids)
    assert not torch.equal(x, other)


def test_the_selection_is_recorded_for_the_arch_of_the_cluster() -> None:
    record = stages.select(replace(REQUEST, arch="gfx942"), PLACE)
    assert record.arch == "gfx94"
    assert record.selected == "gluon_kernel"
