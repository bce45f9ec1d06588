"""Ranks wait for one that is slow to load, and not for one that stands still."""

import threading
import time

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__

from jobs.arrivals import Arrivals


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)


def test_a_rank_that_is_slow_is_waited_for_longer_than_one_that_stands_still(store: TCPStore) -> None:
    slow, fast = Arrivals(store, 0, 2), Arrivals(store, 1, 2)

    def load() -> None:
        for done in range(1, 9):
            time.sleep(0.25)
            slow.tell(done)
        slow.tell(9, ended=True)

    loading = threading.Thread(target=load)
    loading.start()
    fast.tell(9, ended=True)
    started = time.monotonic()
    fast.wait(stall_s=1.0)
    assert time.monotonic() - started > 1.5
    loading.join()


def test_a_rank_that_stands_still_is_named_with_how_far_it_came(store: TCPStore) -> None:
    slow, fast = Arrivals(store, 0, 2), Arrivals(store, 1, 2)
    slow.tell(123)
    fast.tell(0, ended=True)
    with pytest.raises(TimeoutError, match=r"no byte has arrived at rank 0 \(at 123 bytes\)"):
        fast.wait(stall_s=0.5)
