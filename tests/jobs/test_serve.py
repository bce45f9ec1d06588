"""How a rank comes to serve."""

from argparse import Namespace
from pathlib import Path
from typing import Any, cast

import pytest

from engine import core
from engine.api.service import Limits, Service
from engine.core import ClosedError, Engine, Output
from engine.group import Group
from engine.model import ServedModel
from engine.scheduler import Scheduler
from engine.sequence import Wish
from jobs import serve, stages
from jobs.events import EventLog, event_file
from jobs.rank import Rank
from jobs.serving import Ending
from tests.engine.parrot import Alone, Parrot


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Codes with which the process would have ended."""
    found: list[int] = []
    monkeypatch.setattr("os._exit", found.append)
    return found


def service_with(engine: Engine | None) -> Service:
    return Service("tiny", Limits(64, 40, 4, 2000, 30), engine=engine)


def late(service: Service, folder: Path) -> str:
    """What stands in the log once `ready_s` is over."""
    timer = serve._give_up(service, 0.01, EventLog(folder, 0))
    timer.join(10)
    return event_file(folder, 0).read_text()


def engine() -> Engine:
    return Engine(cast("ServedModel", Parrot()), cast("Group", Alone()), Scheduler(2, 16, 1))


def test_a_service_that_is_not_ready_in_time_is_ended(tmp_path: Path, exits: list[int]) -> None:
    assert "the service is warming and not ready after" in late(service_with(engine()), tmp_path)
    assert exits == [1]


def test_a_service_that_was_ready_in_time_is_not_ended_for_a_step_that_takes_long(
    tmp_path: Path, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_with(engine())
    assert service.engine is not None
    service.engine.open()
    monkeypatch.setattr(core, "STALLED_S", -1.0)
    assert service.phase == "stalled"
    assert late(service, tmp_path) == ""
    assert exits == []


def test_clients_are_told_before_a_rank_leaves_a_collective_that_does_not_end(
    tmp_path: Path, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_TOLD_S", 0)
    service, told = service_with(engine()), list[Output]()

    def listen(output: Output) -> None:
        told.append(output)

    assert service.engine is not None
    service.engine.submit(Wish((1, 2), 4), listen)
    serve._stuck(EventLog(tmp_path, 0), None, service, "combine: all_reduce waits for 9 s; not entered by rank 1 of 2")
    assert [(output.finish, output.error) for output in told] == [
        ("error", "the engine has broken: a rank does not answer")
    ]
    with pytest.raises(ClosedError):
        service.engine.submit(Wish((1,), 4), listen)
    assert "not entered by rank 1 of 2" in event_file(tmp_path, 0).read_text()
    assert exits == [1]


def test_ranks_that_have_loaded_wait_for_those_that_load_before_they_make_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    class Arrivals:
        def __init__(self, *_: Any) -> None: ...

        def tell(self, done: int, *, ended: bool = False) -> None:
            happened.append(f"told: {ended}")

        def wait(self, stall_s: float) -> None:
            happened.append("waited")

    selected = Namespace(selected="reference", as_dict=dict)
    monkeypatch.setattr(serve, "meet", lambda *_: (None, None))
    monkeypatch.setattr(stages, "select", lambda *_: selected)
    monkeypatch.setattr(stages, "open_checkpoint", lambda *_: None)
    monkeypatch.setattr(serve, "Arrivals", Arrivals)
    monkeypatch.setattr(serve, "_load", lambda *_: happened.append("loaded"))
    monkeypatch.setattr(serve, "Group", lambda _: happened.append("group"))
    monkeypatch.setattr(serve, "_follow", lambda *_: happened.append("follows"))
    monkeypatch.setattr(serve, "end", lambda _: None)
    request = Namespace(serve=Namespace(), rank_timeout_s=1, scratch=None)
    rank = Rank(1, 2, 1, 1, "here", 1, 0)
    serve.run(cast("Any", request), tmp_path, rank, EventLog(tmp_path, 1), Ending())
    assert happened == ["loaded", "told: True", "waited", "group", "follows"]
