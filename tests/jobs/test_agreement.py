"""Ranks that were started with different configurations are found before they do anything together."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jobs import environment
from jobs.agreement import DisagreementError, agree, configuration
from jobs.code import code_hash
from tests.launcher.plans import fixed_plan

NOBODY: dict[int, float | None] = {}
SAME = {"request": "4711", "package torch": "2.11.0", "variable NCCL_PROTO": "^LL128"}


def outcomes(
    configurations: list[Mapping[str, str]], timeout_s: float = 10, late: Mapping[int, float | None] = NOBODY
) -> list[Any]:
    """By rank, the hash or the error. late: by rank, after how many seconds it comes; None for never. Rank 0 holds the
    store, as in a job: when an error makes it leave, that is gone."""
    world, place, port, going_on = len(configurations), Event(), [0], []
    if late.get(0, 0) is None:
        raise ValueError("rank 0 holds the store")

    def rank(number: int) -> Any:
        if number == 0:
            options: dict[str, Any] = {"is_master": True}
        else:
            place.wait()
            options = {"is_master": False, "timeout": timedelta(seconds=20)}
        store = dist.TCPStore("127.0.0.1", port[0], wait_for_workers=False, **options)  # type: ignore[attr-defined]
        port[0] = store.port
        place.set()
        after = late.get(number, 0.0)
        if after is None:
            return None
        time.sleep(after)
        try:
            found = agree(store, number, world, configurations[number], timeout_s)
        except (DisagreementError, TimeoutError) as error:
            return type(error), str(error)
        going_on.append(store)
        return found

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank, range(world)))


def test_ranks_that_agree_share_a_hash() -> None:
    found = outcomes([SAME, SAME, dict(reversed(SAME.items()))])
    assert len(set(found)) == 1
    assert isinstance(found[0], str)


def test_who_differs_is_named_on_every_rank_with_what_and_both_values() -> None:
    old = {**SAME, "package torch": "2.9.1"}
    unset = {name: value for name, value in SAME.items() if name != "variable NCCL_PROTO"}
    found = outcomes([SAME, old, SAME, old, unset])
    text = (
        "the ranks were started with different configurations; ranks 1, 3: package torch: 2.9.1 against 2.11.0 on rank "
        "0; rank 4: variable NCCL_PROTO: not set against ^LL128 on rank 0"
    )
    assert found == [(DisagreementError, text)] * 5


@pytest.mark.parametrize("late", [{2: None}, {0: 0.4, 2: None}, {1: 0.4, 2: None}])
def test_a_rank_that_tells_nothing_is_named_by_all_whoever_came_first(late: dict[int, float | None]) -> None:
    """Rank 1's own time, had it begun with rank 0's, would be over before rank 0 has decided."""
    found = outcomes([SAME, SAME, SAME], timeout_s=0.5, late=late)
    text = "not within 0.5 s: rank 2 telling its configuration; see the log"
    assert found == [(TimeoutError, text), (TimeoutError, text), None]


def test_a_slow_rank_reads_the_verdict_before_the_store_goes_with_rank_0() -> None:
    other = {**SAME, "package torch": "2.9.1"}
    found = outcomes([SAME, other, SAME], late={1: 0.3})
    assert [kind for kind, _ in found] == [DisagreementError] * 3
    assert len({text for _, text in found}) == 1


def test_request_code_packages_and_variables_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_plan("tiny").request().save(tmp_path)
    described = environment.describe(torch.device("cpu"))
    before = configuration(tmp_path, described)
    monkeypatch.setenv("NCCL_PROTO", "Simple")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "hsn0")
    fixed_plan("tiny", ["run.seed=1"]).request().save(tmp_path)
    after = configuration(tmp_path, described)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {
        "request",
        "variable NCCL_PROTO",
    }
    assert before["package torch"] == torch.__version__
    assert before["code"] == code_hash()
