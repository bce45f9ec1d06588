"""Following logs that are still written."""

from pathlib import Path

import pytest

from launcher.errors import InputError
from launcher.logs import follow, log_files


def test_a_log_is_followed_to_its_end_whatever_bytes_it_holds(tmp_path: Path) -> None:
    out, err = log_files(tmp_path, rank=3, job_id="7")
    assert (out.name, err.name) == ("7_3_log.out", "7_3_log.err")
    out.parent.mkdir()
    rounds = 0

    def goes_on() -> bool:
        nonlocal rounds
        rounds += 1
        if rounds == 2:  # it appears while it is waited for
            out.write_bytes(b"one\xff\n")
        if rounds == 4:  # written just before the end is seen
            with out.open("ab") as f:
                f.write(b"two\n")
            err.write_bytes(b"trouble\n")
        return rounds < 4

    assert list(follow([out, err], goes_on)) == ["one\ufffd\n", "two\n", "trouble\n"]


def test_a_rank_that_has_not_started_has_no_log(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no log yet"):
        list(follow(log_files(tmp_path, 0, "7"), lambda: False))
