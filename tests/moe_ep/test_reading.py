"""Byte ranges: each wanted byte is read once, into its place, whatever the disk does."""

import errno
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ep.headers import CheckpointError, FileStamp, TensorInfo
from moe_ep.ranges import GAP_SHARE, MOST_PARTS, READ_BYTES, Piece, plan_reads
from moe_ep.reading import Progress, StalledError, aligned_memory, buffer_bytes, fetch
from moe_ep.targets import copy_into, into_columns
from moe_ep.tensors import TensorSpec
from tests.waiting import PATIENCE_S

SIZE = 300_000
CONTENT = bytes(os.urandom(SIZE))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(CONTENT)
    return path


def stamps(*files: Path) -> dict[Path, FileStamp]:
    found = {}
    for path in files:
        with path.open("rb") as f:
            found[path] = FileStamp.of(f.fileno())
    return found


def pieces_of(file: Path, ranges: Sequence[tuple[int, int]]) -> list[Piece]:
    return [Piece(f"t{a}", file, a, b - a, memoryview(bytearray(b - a))) for a, b in ranges]


def content(piece: Piece) -> bytes:
    assert isinstance(piece.target, memoryview)
    return bytes(piece.target)


RANGES = st.lists(st.integers(0, SIZE), max_size=40, unique=True).map(
    lambda cuts: [(a, b) for a, b in pairwise(sorted(cuts))]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranges=RANGES,
    every=st.integers(1, 3),
    read_bytes=st.sampled_from([4096, 10_000, 1 << 20]),
    direct=st.booleans(),
)
def test_every_wanted_byte_arrives_in_its_place_and_hardly_another_is_read(
    ranges: list[tuple[int, int]], every: int, read_bytes: int, direct: bool, file: Path
) -> None:
    pieces = pieces_of(file, ranges[::every])
    reads = plan_reads(pieces, read_bytes=read_bytes)
    wanted = sum(piece.nbytes for piece in pieces)
    assert sum(read.wanted for read in reads) == wanted
    assert all(read.nbytes - read.wanted <= GAP_SHARE * read.nbytes for read in reads)
    assert all(r.offset // read_bytes == (r.offset + r.nbytes - 1) // read_bytes for r in reads), "within a block"
    assert all(2 * len(read.pieces) <= MOST_PARTS for read in reads)
    assert all(a.offset + a.nbytes <= b.offset for a, b in pairwise(reads))
    got = fetch(reads, stamps(file), threads=3, direct=direct)
    assert [content(p) for p in pieces] == [CONTENT[p.offset : p.end] for p in pieces]
    assert direct or got == sum(read.nbytes for read in reads) <= wanted / (1 - GAP_SHARE)


def test_neighbours_become_one_read_and_a_large_tensor_several(file: Path) -> None:
    neighbours = plan_reads(pieces_of(file, [(10, 20), (20, 500), (500, 501)]))
    assert [(read.offset, read.nbytes, len(read.pieces)) for read in neighbours] == [(10, 491, 3)]
    large = plan_reads(pieces_of(file, [(1000, 11_000)]), read_bytes=4096)
    assert [(read.offset, read.nbytes) for read in large] == [(1000, 3096), (4096, 4096), (8192, 2808)]


def test_a_read_is_of_one_file_and_each_file_is_read_in_order(file: Path) -> None:
    other = file.with_name("y.safetensors")
    other.write_bytes(CONTENT[::-1])
    pieces = pieces_of(file, [(0, 50), (100, 200)]) + pieces_of(other, [(50, 60), (0, 50), (60, 70)])
    reads = plan_reads(reversed(pieces))
    assert [(read.file, read.offset, len(read.pieces)) for read in reads] == [
        (file, 0, 1),
        (file, 100, 1),
        (other, 0, 3),
    ]
    fetch(reads, stamps(file, other))
    assert [content(p) for p in pieces] == [
        (CONTENT if p.file == file else CONTENT[::-1])[p.offset : p.end] for p in pieces
    ]


def test_bytes_that_two_tensors_want_are_an_error_that_names_both(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: t5 and t0 want the same bytes"):
        plan_reads(pieces_of(file, [(0, 6), (5, 9)]))


def test_a_sink_gets_every_byte_with_its_place_in_the_tensor(file: Path) -> None:
    got = bytearray(200_000)

    def sink(at: int, data: memoryview) -> None:
        got[at : at + len(data)] = data

    piece = Piece("t", file, 77, 200_000, sink)
    fetch(plan_reads([piece], read_bytes=30_000), stamps(file))
    assert bytes(got) == CONTENT[77 : 77 + 200_000]


def test_a_device_s_tensor_is_copied_to_from_bounded_memory(file: Path) -> None:
    target, taken = torch.zeros(100, 250, dtype=torch.float32), []

    def allocate(nbytes: int) -> memoryview:
        taken.append(nbytes)
        return aligned_memory(nbytes)

    piece = Piece("t", file, 12, target.nbytes, copy_into(target))
    fetch(plan_reads([piece], read_bytes=8192), stamps(file), threads=2, allocate=allocate)
    assert target.numpy().tobytes() == CONTENT[12 : 12 + target.nbytes]
    assert taken == [READ_BYTES, READ_BYTES]
    assert sum(taken) == buffer_bytes(2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 60),
    part=st.integers(0, 59),
    read_bytes=st.integers(1, 300),
)
def test_columns_of_a_matrix_arrive_however_its_rows_are_cut(
    rows: int, width: int, part: int, read_bytes: int, file: Path
) -> None:
    first, columns = part % width, max(1, (width - part % width) // 2)
    target = torch.zeros(rows, columns, dtype=torch.uint8)
    info = TensorInfo("w2", file, TensorSpec("I8", (rows, width)), 5, rows * width)
    fetch(plan_reads([into_columns(info, target, first)], read_bytes=read_bytes), stamps(file), threads=2)
    matrix = torch.frombuffer(bytearray(CONTENT[5 : 5 + rows * width]), dtype=torch.uint8).view(rows, width)
    assert torch.equal(target, matrix[:, first : first + columns])


def test_a_file_that_changed_since_its_header_was_read_is_refused(file: Path) -> None:
    reads, known = plan_reads(pieces_of(file, [(0, 100)])), stamps(file)
    with file.open("ab") as f:
        f.write(b"more")
    with pytest.raises(CheckpointError, match=r"has changed since its header was read \(300000 bytes then, 300004 now"):
        fetch(reads, known)


def test_a_file_that_is_written_to_while_it_is_read_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.preadv

    def meanwhile(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = original(descriptor, buffers, offset)
        with file.open("r+b") as f:
            f.write(b"x")
        os.utime(file, ns=(1, 1))
        return count

    monkeypatch.setattr(os, "preadv", meanwhile)
    with pytest.raises(CheckpointError, match="has changed since its header was read"):
        fetch(plan_reads(pieces_of(file, [(0, 100)])), stamps(file))


def test_a_file_that_shrinks_while_it_is_read_is_named_with_the_tensor_that_is_lost(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.preadv

    def cut(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(file, 150)
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: truncated, t100 ends past the end"):
        fetch(plan_reads(pieces_of(file, [(0, 100), (100, 200)])), stamps(file))


def test_a_disk_that_fails_in_the_middle_is_named_with_file_and_tensor_and_nothing_more_is_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = os.preadv, []

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if offset >= 100_000:
            raise OSError(5, "Input/output error")
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    reads = plan_reads(pieces_of(file, [(a, a + 10_000) for a in range(0, SIZE, 10_000)]), read_bytes=10_000)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: reading t100000 failed: .*Input/output error"):
        fetch(reads, stamps(file), threads=1)
    assert len(calls) < len(reads)


def test_reads_that_come_back_short_are_taken_up_where_they_ended(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: original(fd, [buffers[0][:7]], offset))
    pieces = pieces_of(file, [(0, 10), (10, 13), (13, 40), (50, 90)])
    fetch(plan_reads(pieces), stamps(file))
    assert [content(p) for p in pieces] == [CONTENT[p.offset : p.end] for p in pieces]


def test_a_storage_that_stands_still_is_an_error_that_names_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = threading.Event()

    def hang(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        hanging.wait(30)
        return 0

    monkeypatch.setattr(os, "preadv", hang)
    started = time.monotonic()
    try:
        with pytest.raises(StalledError, match=r"no byte has arrived for .* s; waiting for .*x\.safetensors"):
            fetch(plan_reads(pieces_of(file, [(0, 100)])), stamps(file), stall_s=0.2)
        assert time.monotonic() - started < 10
    finally:
        hanging.set()


def test_a_file_system_that_does_not_take_o_direct_is_named_with_what_to_do() -> None:
    file = Path("/proc/version")  # opening it so is refused by the kernel itself
    with pytest.raises(CheckpointError, match=r"/proc/version: its file system does not take O_DIRECT .*direct: false"):
        fetch(plan_reads(pieces_of(file, [(0, 10)])), stamps(file), direct=True)


def test_a_file_system_that_takes_o_direct_in_larger_blocks_only_is_named_too(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refused)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its file system does not take O_DIRECT"):
        fetch(plan_reads(pieces_of(file, [(0, 10)])), stamps(file), direct=True)
    with pytest.raises(CheckpointError, match=r"reading t0 failed: .*Invalid argument"):
        fetch(plan_reads(pieces_of(file, [(0, 10)])), stamps(file))


def test_a_folder_in_memory_is_read_with_o_direct_or_refused_with_what_to_do() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as memory:  # tmpfs takes it from Linux 6.6 on
        memory.write(CONTENT)
        memory.flush()
        pieces = pieces_of(Path(memory.name), [(5, 100_000)])
        refused = ""
        try:
            fetch(plan_reads(pieces), stamps(Path(memory.name)), direct=True)
        except CheckpointError as error:
            refused = str(error)
        assert "does not take O_DIRECT" in refused or content(pieces[0]) == CONTENT[5:100_000]


HANGING = """
import os, sys, time
from pathlib import Path
from moe_ep.headers import FileStamp
from moe_ep.ranges import Piece, plan_reads
from moe_ep.reading import fetch
file = Path(sys.argv[1])
with file.open("rb") as opened:
    stamps = {file: FileStamp.of(opened.fileno())}
os.preadv = lambda *_: time.sleep(600)
fetch(plan_reads([Piece("t", file, 0, 100, memoryview(bytearray(100)))]), stamps, stall_s=0.2)
"""


def test_a_process_whose_read_hangs_ends_all_the_same(file: Path) -> None:
    command = [sys.executable, "-c", HANGING, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1
    assert "StalledError: no byte has arrived" in done.stderr


def test_progress_ends_with_all_bytes_and_says_rate_and_time_left(file: Path) -> None:
    told: list[Progress] = []
    fetch(plan_reads(pieces_of(file, [(0, SIZE)])), stamps(file), on_progress=told.append)
    assert (told[-1].done, told[-1].total, told[-1].left_s) == (SIZE, SIZE, 0)
    assert told[-1].rate > 0
    assert Progress(done=25, total=100, seconds=5.0) == Progress(25, 100, 5.0)
    assert (Progress(25, 100, 5.0).rate, Progress(25, 100, 5.0).left_s, Progress(0, 100, 5.0).left_s) == (5, 15, None)
