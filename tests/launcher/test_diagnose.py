"""Lines of logs that are known, and lines that only look like it."""

import pytest

from launcher.diagnose import diagnose


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("NoBackendError: No MoE backend available for gfx94/mxfp4. Tried: …", "every backend refused"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0", "cgroup ran out of memory"),
        ("torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2 GiB", "does not fit the device"),
        ("DoesNotFitError: 205.5 GB would be held", "does not fit the device"),
        ("NCCL WARN Failed to initialize any NET plugin", "plug-in of RCCL"),
        ("RuntimeError: No HIP GPUs are available", "masked twice"),
        ("OSError: [Errno 116] Stale file handle: '/scratch/triton'", "shared file system"),
        ("slurmstepd: error: *** JOB 7 CANCELLED DUE TO TIME LIMIT ***", "time limit"),
        ("GivenUp: again, after it had run, pending for 12 s; node nid001002 is down*", "a node that the run was on"),
        ("slurmstepd: error: pyxis: couldn't start container", "cannot start the container"),
        ("mkdir: cannot create directory '/run/enroot': No space left on device", "cannot start the container"),
        ("OSError: [Errno 28] No space left on device: '/scratch/runs/x'", "a disk, or the quota on it, is full"),
    ],
)
def test_a_known_line_has_a_cause_and_a_fix(line: str, cause: str) -> None:
    found = diagnose(["Starting with JobEnvironment", line])
    assert found is not None
    assert cause in found.cause
    assert found.fix
    assert found.line == line


def test_what_names_its_own_cause_comes_before_what_may_follow_from_it() -> None:
    lines = ["Watchdog caught collective operation timeout", "OSError: [Errno 116] Stale file handle"]
    found = diagnose(lines)
    assert found is not None
    assert "shared file system" in found.cause


@pytest.mark.parametrize("line", ["", "rank_timeout_s: 1800", "no tensor w1", "memory: 3 GB free", "is down to 3 ms"])
def test_a_line_that_is_not_known_has_none(line: str) -> None:
    assert diagnose([line]) is None
