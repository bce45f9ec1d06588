"""Which rank failed first, from what the ranks said."""

from typing import Any

import pytest

from launcher.events import LAUNCHER, Event
from launcher.outcome import judge

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:33222"


def started(rank: int, time: float = 0.0) -> Event:
    return Event(time, rank, "start", "started", data={"pid": rank, "host": "n"})


def failed(time: float, rank: int, error: str, kind: str = "RuntimeError", stage: str = "weights") -> Event:
    return Event(time, rank, stage, "failed", error={"text": error, "type": kind, "traceback": "…"})


def done(time: float, rank: int) -> Event:
    return Event(time, rank, "done", "end")


def noted(time: float, event: str, **data: Any) -> Event:
    return Event(time, LAUNCHER, "watch", event, data=data)


def begun(time: float, rank: int, stage: str) -> Event:
    return Event(time, rank, stage, "begin")


def test_a_run_is_completed_when_every_rank_is_done() -> None:
    assert judge([done(1, 0), done(1, 1)], 2).state == "completed"
    assert judge([done(1, 0), begun(1, 1, "done")], 2).state == "unfinished"


@pytest.mark.parametrize(
    "complaint",
    [
        GLOO,
        "[c10d] The client socket has timed out after 60000ms: socketTimeout",
        "NCCL error: remote process exited or there was a network error",
        "Broken pipe",
        "[transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation to complete",
        "ranks 3 of 4 have not arrived; there are 0 on n",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE)",
    ],
)
def test_an_error_of_its_own_comes_before_earlier_complaints_about_peers(complaint: str) -> None:
    events = [failed(1, 0, complaint), failed(2, 3, "no tensor x", "CheckpointError"), failed(3, 1, complaint)]
    failure = judge(events, 4).failure
    assert failure is not None
    assert (failure.rank, failure.stage, failure.error_type) == (3, "weights", "CheckpointError")


def test_of_several_errors_the_earliest_counts() -> None:
    failure = judge([failed(1, 2, "first"), failed(2, 0, "second")], 4).failure
    assert failure is not None
    assert failure.error == "first"


def test_a_rank_that_vanished_is_the_cause_of_its_peers_complaints() -> None:
    events = [
        started(0),
        started(1),
        begun(1, 1, "throughput"),
        failed(2, 0, GLOO),
        noted(3, "vanished", rank=1, pid=1),
    ]
    failure = judge(events, 2).failure
    assert failure is not None
    assert (failure.rank, failure.stage, failure.error_type) == (1, "throughput", "Vanished")


def test_without_a_watcher_the_one_silent_rank_is_the_cause() -> None:
    events = [started(0), started(1), begun(1, 1, "parity"), failed(2, 0, GLOO)]
    failure = judge(events, 2).failure
    assert failure is not None
    assert (failure.rank, failure.stage, failure.error_type) == (1, "parity", "Vanished")


def test_ranks_that_have_not_failed_yet_are_not_blamed_while_the_job_runs() -> None:
    failure = judge([started(r) for r in range(4)] + [failed(2, 0, GLOO)], 4).failure
    assert failure is not None
    assert (failure.rank, failure.error) == (0, GLOO)


def test_a_rank_that_never_reached_its_first_line_is_named_when_the_job_has_ended() -> None:
    events = [started(0), noted(5, "ended")]
    failure = judge(events, 2).failure
    assert failure is not None
    assert (failure.rank, failure.error_type) == (0, "Vanished"), "rank 0 neither finished nor failed"
    failure = judge([done(1, 0), noted(5, "ended")], 2).failure
    assert failure is not None
    assert (failure.rank, failure.error_type) == (1, "NeverStarted")


def test_ranks_that_were_stopped_are_not_the_cause() -> None:
    events = [
        failed(1, 0, "", "KeyboardInterrupt"),
        failed(1, 1, "cancelled (SIGTERM)", "Signal"),
        failed(2, 2, "CUDA error"),
    ]
    failure = judge(events, 3).failure
    assert failure is not None
    assert failure.rank == 2


TIMED_OUT = "[transport/tcp/unbound_buffer.cc:81] Timed out waiting 12000ms for recv operation to complete"


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (
            "CollectiveTimeoutError",
            "model.layers.7.mlp.experts combine: all_reduce (number 15) waits for 108 s; not entered by rank 2 of 4: "
            "rank 2 last entered model.layers.6.mlp.experts combine: all_reduce (number 14)",
        ),
        ("TimeoutError", "for 60 s no byte has arrived at rank 2 (at 17 bytes); see their logs and storage"),
        ("TimeoutError", "not within 12 s: rank 2 telling its configuration; see the log"),
    ],
)
def test_the_rank_that_others_name_hangs_not_the_one_that_names_it_nor_those_stopped_with_it(
    kind: str, complaint: str
) -> None:
    events = [started(rank) for rank in range(4)]
    events += [failed(8, 0, complaint, kind), *(failed(9, rank, "SIGTERM", "Signal") for rank in (1, 2, 3))]
    failure = judge(events, 4).failure
    assert failure is not None
    assert (failure.rank, failure.error_type) == (2, "Hung")
    own = [*events, failed(8.5, 2, "no byte for 60 s", "StalledError")]
    failure = judge(own, 4).failure
    assert failure is not None
    assert (failure.rank, failure.error_type) == (2, "StalledError"), "its own error says more"


def test_of_ranks_that_wait_for_each_other_in_a_chain_the_one_that_waits_for_nobody_hangs() -> None:
    events = [failed(8, 0, "waits for 9 s; not entered by ranks 1, 3 of 4: rank 1 …", "CollectiveTimeoutError")]
    events += [failed(8, 1, "waits for 9 s; not entered by rank 3 of 4: rank 3 …", "CollectiveTimeoutError")]
    events += [failed(9, rank, "SIGTERM", "Signal") for rank in (2, 3)]
    failure = judge(events, 4).failure
    assert failure is not None
    assert (failure.rank, failure.error_type) == (3, "Hung")


def test_a_rank_for_which_others_waited_in_vain_hangs_and_has_left_its_stack() -> None:
    events = [started(0), started(1), begun(5, 1, "throughput"), failed(65, 0, TIMED_OUT)]
    error = {"type": "Signal", "text": "cancelled (SIGTERM)", "traceback": "in fault"}
    events.append(Event(66, 1, "throughput", "failed", error=error))
    failure = judge(events, 2).failure
    assert failure is not None
    assert (failure.rank, failure.stage, failure.error_type, failure.traceback) == (1, "throughput", "Hung", "in fault")
    assert failure.error == "no sign of life for 60 s; rank 0 waited for it in vain"


def test_a_hanging_rank_that_could_not_even_be_told_to_stop_is_known_at_the_end() -> None:
    events = [started(0), started(1), begun(5, 1, "weights"), failed(65, 0, TIMED_OUT)]
    for seen in ([*events, noted(70, "ended")], events):  # on this machine alone there is no batch script's end
        failure = judge(seen, 2).failure
        assert failure is not None
        assert (failure.rank, failure.error_type) == (1, "Hung")


def test_of_ranks_that_said_nothing_the_one_that_a_collective_misses_hangs() -> None:
    error = {
        "type": "CollectiveTimeoutError",
        "text": "layer 0 combine: all_reduce (number 3) waits for 5 s; not entered by rank 2 of 3: rank 2 last none",
    }
    events = [started(0), started(1), started(2), Event(65, 0, "throughput", "failed", error=error), noted(70, "ended")]
    failure = judge(events, 3).failure
    assert failure is not None
    assert (failure.rank, failure.error_type) == (2, "Hung")


def test_a_lost_node_is_the_cause_of_what_its_peers_say_but_not_of_an_error_of_their_own() -> None:
    started_on = [Event(0, r, "start", "started", data={"host": f"nid{r // 2}"}) for r in range(4)]
    note = noted(9, "node down", node="nid1", state="down", why="Not responding", since="…")
    failure = judge([*started_on, begun(1, 2, "parity"), failed(8, 0, TIMED_OUT), note], 4).failure
    assert failure is not None
    assert (failure.rank, failure.stage, failure.error_type) == (2, "parity", "NodeFailed")
    assert failure.error == "node nid1 is down: Not responding; ranks 2, 3 ran on it"
    failure = judge([*started_on, failed(8, 0, "no tensor x", "CheckpointError"), note], 4).failure
    assert failure is not None
    assert failure.error_type == "CheckpointError"


def test_a_preempted_run_is_no_ranks_fault() -> None:
    events = [started(0), failed(2, 0, "cancelled (SIGTERM)", "Signal"), noted(3, "preempted")]
    failure = judge(events, 1).failure
    assert failure is not None
    assert (failure.rank, failure.error_type) == (None, "Preempted")


def test_only_the_last_attempt_of_a_requeued_job_counts() -> None:
    events = [failed(1, 0, "node failure"), Event(9, 0, "done", "end", attempt=1)]
    assert judge(events, 1).state == "completed"


def test_a_run_that_was_interrupted_is_no_ranks_fault() -> None:
    events = [begun(1, 0, "weights"), failed(2, 0, "", "KeyboardInterrupt"), noted(3, "interrupted"), noted(4, "ended")]
    failure = judge(events, 2).failure
    assert failure is not None
    assert (failure.rank, failure.stage, failure.error_type) == (None, "weights", "Interrupted")


def test_a_run_without_events_is_unfinished() -> None:
    assert judge([], 4).state == "unfinished"
