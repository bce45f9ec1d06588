"""What logs say: known faults with evidence and fix, unknown ones with the earliest error, healthy ones nothing."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from launcher import rules, slurm
from launcher.diagnose import Answer, diagnose_log, diagnose_run
from launcher.plan import Plan
from launcher.rules import Rule, load
from launcher.runs import record_submission
from launcher.scan import scan_lines
from launcher.schema import Config
from launcher.status import RunStatus
from tests.checkout import importable
from tests.launcher.plans import fixed_plan
from tests.launcher.probes import write_probe

RULES = load().rules


def log(tmp_path: Path, *lines: str, name: str = "rank.log") -> Path:
    path = tmp_path / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_an_example_of_a_rule_in_a_log_that_failed_is_diagnosed_as_that(rule: Rule, tmp_path: Path) -> None:
    for example in rule.examples:
        answer = diagnose_log(
            log(tmp_path, "Starting with JobEnvironment", example, "srun: error: nid1: task 0: Terminated")
        )
        assert answer.diagnosis is not None, example
        assert answer.diagnosis.rule == rule.name, example
        assert (answer.diagnosis.evidence.number, answer.diagnosis.line) == (2, example)
        assert answer.diagnosis.fix


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_speaks_of_keys_that_a_config_has_and_names_them_in_its_fix(rule: Rule) -> None:
    for key in rule.keys:
        section: type[BaseModel] = Config
        for part in key.split("."):
            annotation = section.model_fields[part].annotation
            inner = [t for t in (getattr(annotation, "__args__", None) or (annotation,)) if isinstance(t, type)]
            section = next((t for t in inner if issubclass(t, BaseModel)), section)
        assert key in rule.fix or key.rpartition(".")[2] in rule.fix, f"{rule.name}: {key}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": ["nothing of it"]}, "do not find the example"),
        ({"healthy": ["disk gone"]}, "finds the healthy line"),
        ({"words": ["Disk"]}, "should match pattern"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattrn": "x"}, "Extra inputs"),
        ({"cause": ""}, "at least 1 character"),
    ],
)
def test_a_rule_that_is_not_as_it_should_be_is_refused(change: dict[str, object], message: str) -> None:
    good = {"name": "x", "words": ["disk"], "pattern": "disk gone", "cause": "c", "fix": "f", "keys": []}
    good |= {"examples": ["the disk gone"]}
    Rule.model_validate(good)
    with pytest.raises(ValidationError, match=message):
        Rule.model_validate(good | change)
    with pytest.raises(ValidationError):
        rules.parse("success: []\nfailure: []\nerrors: []\nrules: 4\n")


HEALTHY = """\
submitit INFO (2026-11-23 04:22:31,120) - Starting with JobEnvironment(job_id=7, hostname=nid001001, local_rank=0(2))
[W1123 05:00:43.622976837 socket.cpp:207] [c10d] The hostname of the client socket cannot be retrieved. err=-3
srun: cluster configuration lacks support for cpu binding
nid001001:1:1 [0] NCCL INFO NET/OFI Selected provider is cxi, fabric is cxi
nid001001:1:1 [0] NCCL INFO NET/Plugin: Failed to find ncclCollNetPlugin_v8 symbol.
nid001001:1:1 [0] NCCL INFO Bootstrap : Using hsn0:172.28.1.7<0>
nid001001:1:1 [0] NCCL WARN Call to connect returned Connection refused, retrying
WARNING 11-23 04:22:40 [api.py:12] Address already in use, trying port 8001
WARNING 11-23 04:22:40 [custom.py:9] Failed to import from vllm._C: ModuleNotFoundError("No module named 'vllm._C'")
Traceback (most recent call last):
  File "x.py", line 1, in <module>
    import flash_attn
ModuleNotFoundError: No module named 'flash_attn'
INFO continuing without flash_attn
Loading safetensors checkpoint shards:  98% Completed | 63/64 [18:02<00:15, 15.9s/it]
INFO errors: 0, failed: 0, timeout: 600 s, oom_kill_disable 0, memory: 3 GB free
INFO relative error 3.3e-03 is below the tolerance 2e-02
INFO killed 0 stale workers; pending: 3 requests; node nid001002 is downloading
INFO limits.time_min is 60; the time limit is 1:00:00
"""


def test_healthy_logs_are_not_called_faulty(tmp_path: Path) -> None:
    going_on = HEALTHY + "INFO tokens/s 123\n" * 300
    for text in (HEALTHY + "submitit INFO (2026-11-23 04:30:00,000) - Job completed successfully\n", going_on):
        path = tmp_path / "healthy.log"
        path.write_text(text)
        answer = diagnose_log(path)
        assert (answer.verdict, answer.diagnosis, answer.error) == ("healthy", None, None)


def test_what_was_survived_is_no_fault(tmp_path: Path) -> None:
    path = log(
        tmp_path, "torch.OutOfMemoryError: HIP out of memory. Tried", "retrying with half", "Job completed successfully"
    )
    assert diagnose_log(path).verdict == "healthy"
    path = log(tmp_path, "[rank1]: torch.OutOfMemoryError: HIP out of memory", "[rank0]: Job completed successfully")
    answer = diagnose_log(path)
    assert answer.verdict == "failed", "it was another rank that ended well"


def test_an_unknown_failure_says_so_and_shows_the_earliest_error(tmp_path: Path) -> None:
    path = log(
        tmp_path,
        "Starting with JobEnvironment",
        "Traceback (most recent call last):",
        '  File "x.py", line 3, in f',
        "ValueError: a quark is missing",
        "srun: error: nid001002: task 5: Exited with exit code 1",
        "srun: error: nid001001: task 0: Killed",
    )
    answer = diagnose_log(path)
    assert (answer.verdict, answer.diagnosis) == ("failed", None), "that the others were killed is no cause"
    assert answer.error is not None
    assert (answer.error.text, answer.error.number) == ("ValueError: a quark is missing", 4)


def test_the_cause_comes_before_what_may_follow_from_it_and_evidence_has_its_place(tmp_path: Path) -> None:
    path = log(
        tmp_path,
        "[rank0]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE)",
        "2026-11-23T04:00:01 [rank3]: OSError: [Errno 116] Stale file handle: '/scratch/triton/x'",
        "slurmstepd-nid001002: error: *** STEP 7.0 ON nid001002 CANCELLED AT 2026-11-23T04:00:09 ***",
        "srun: error: nid001002: tasks 2-3: Killed",
    )
    answer = diagnose_log(path)
    assert answer.diagnosis is not None
    found = answer.diagnosis.evidence
    assert (answer.diagnosis.rule, found.number, found.rank, found.time) == ("stale cache", 2, 3, "2026-11-23T04:00:01")
    assert [other.rule for other in answer.others] == ["killed", "collective timed out"]
    assert scan_lines(path.read_text().splitlines()).hosts == {2: "nid001002", 3: "nid001002"}


def test_logs_need_not_be_utf_8_nor_have_lines(tmp_path: Path) -> None:
    path = tmp_path / "odd.log"
    fault = b"HIP out of memory \xff\xfe"
    path.write_bytes(b"\x00\x80\xff" * 1000 + b"\r 10%\r 20%\rtorch.OutOfMemoryError: " + fault + b"\r 30%\nnext\n")
    answer = diagnose_log(path)
    assert answer.diagnosis is not None
    assert (answer.diagnosis.rule, answer.diagnosis.evidence.number) == ("memory of a rank", 1)
    path.write_bytes(b"x" * 3_000_000 + b" torch.OutOfMemoryError: " + fault + b"y" * 3_000_000)
    answer = diagnose_log(path)
    assert answer.diagnosis is not None, "within a line without an end"
    assert len(answer.diagnosis.line) <= 400
    path.write_bytes(b"")
    assert diagnose_log(path).verdict == "healthy"


@pytest.mark.parametrize("filler", [b"", b"\n" + b"throughput 123 tokens/s, running 4 requests" * 20])
def test_a_huge_log_takes_little_memory_whether_it_has_lines_or_not(tmp_path: Path, filler: bytes) -> None:
    path = tmp_path / "huge.log"
    with path.open("wb") as file:
        file.seek(60_000_000)  # holes read as one line of zeros
        file.write(filler * 20_000)
        file.write(b"\nOSError: [Errno 116] Stale file handle\n")
    load()
    tracemalloc.start()
    try:
        answer = diagnose_log(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer.diagnosis is not None
    found = answer.diagnosis.evidence
    assert (answer.diagnosis.rule, found.number) == ("stale cache", 2 + (20_000 if filler else 0))
    assert peak < 12_000_000, "of 60 MB and more"


def test_of_a_long_line_is_shown_what_says_it_and_no_rest_of_a_secret(tmp_path: Path) -> None:
    secret = "MY_API_KEY=" + "s3cr3t" * 30
    path = log(tmp_path, "x" * 5000 + f" {secret} torch.OutOfMemoryError: HIP out of memory " + "y" * 5000)
    with path.open("a") as file:
        file.write("srun: error: nid1: task 0: Terminated\n")
    answer = diagnose_log(path)
    assert answer.diagnosis is not None
    assert "HIP out of memory" in answer.diagnosis.line
    assert len(answer.diagnosis.line) <= 400
    assert "s3cr3t" not in answer.diagnosis.line


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_log_in_utf_16_is_read_as_that(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "rank.log"
    path.write_bytes(("\ufeffstarting\ntorch.OutOfMemoryError: HIP out of memory\n" * 3).encode(encoding))
    answer = diagnose_log(path)
    assert answer.diagnosis is not None
    assert (answer.diagnosis.rule, answer.diagnosis.evidence.number) == ("memory of a rank", 2)


def test_a_log_that_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "diagnose", str(tmp_path / "nonesuch")]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | importable(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "nonesuch: no such run" in done.stderr


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    plan = fixed_plan("v4pro-2node", [f"run.folder={tmp_path}/runs"])
    plan.save()
    record_submission(plan.run_dir, 0, "slurm", "7")
    (plan.run_dir / "submitit").mkdir()
    return plan


def asked(plan: Plan, state: str, reason: str = "") -> Answer:
    return diagnose_run(plan.run_dir, RunStatus(str(plan.run_dir), "v4pro-2node", plan.run_id, "7", state, reason))


def test_a_run_that_completed_is_healthy_whatever_its_logs_say(plan: Plan) -> None:
    write_probe(plan)
    log(plan.run_dir / "submitit", "torch.OutOfMemoryError: HIP out of memory", name="7_0_log.err")
    assert asked(plan, "completed").verdict == "healthy"


def test_what_a_rank_said_of_itself_comes_before_what_logs_say(plan: Plan) -> None:
    write_probe(plan, failing=5)
    log(plan.run_dir / "submitit", "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0", name="7_0_log.err")
    answer = asked(plan, "failed")
    assert answer.diagnosis is not None
    found = answer.diagnosis.evidence
    assert (answer.diagnosis.rule, found.rank, found.host) == ("damaged checkpoint", 5, "nid000002")
    assert found.file.endswith("events/rank-00005.jsonl")
    assert '"failed"' in Path(found.file).read_text().splitlines()[found.number - 1]
    assert found.time.startswith("2025-12-29T")


def test_of_ranks_that_said_nothing_the_logs_decide(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "fullest_task", lambda job_id: 6 if job_id == "7" else None)
    write_probe(plan)
    for file in (plan.run_dir / "events").iterdir():  # they break off in the middle
        file.write_text("".join(line for line in file.open() if '"done"' not in line))
    first = log(
        plan.run_dir / "submitit",
        "",
        "slurmstepd-nid2: error: StepId=7.0 exceeded memory limit (9 > 5)",
        name="7_0_log.err",
    )
    log(plan.run_dir / "submitit", "srun: error: nid2: task 6: Killed", name="7_6_log.err")
    answer = asked(plan, "failed")
    assert answer.diagnosis is not None
    found = answer.diagnosis.evidence
    assert (answer.diagnosis.rule, found.file, found.number) == ("host out of memory", str(first), 2)
    assert (found.rank, found.host) == (6, "nid2"), "Slurm's accounting knows who took most"


@pytest.mark.parametrize(
    ("state", "reason", "verdict", "rule"),
    [
        ("pending", "Resources", "unfinished", None),
        ("pending", "QOSMaxJobsPerUserLimit", "failed", "cannot start"),
        ("pending", "PartitionTimeLimit", "failed", "cannot start"),
        ("running", "", "unfinished", None),
        ("unknown", "squeue: no answer within 30 s", "unfinished", None),
    ],
)
def test_a_run_that_has_not_ended(plan: Plan, state: str, reason: str, verdict: str, rule: str | None) -> None:
    answer = asked(plan, state, reason)
    assert (answer.verdict, answer.diagnosis.rule if answer.diagnosis else None) == (verdict, rule)
    assert reason in answer.why


def test_an_end_that_nobody_explains_is_shown_as_it_is(plan: Plan) -> None:
    for rank in range(8):
        line = {"time": time.time(), "rank": rank, "attempt": 0, "stage": "env", "event": "failed", "data": {}}
        error = {"type": "ValueError", "text": f"odd {rank}", "traceback": ""}
        (plan.run_dir / "events" / f"rank-{rank:05d}.jsonl").write_text(json.dumps(line | {"error": error}) + "\n")
    survived = "WARNING Address already in use, trying port 8001"
    log(plan.run_dir / "submitit", survived, "srun: error: nid1: task 3: Killed", name="7_0_log.err")
    answer = asked(plan, "failed")
    assert (answer.diagnosis, answer.why) == (None, "failed: ValueError: odd 0")
    assert answer.error is not None
    assert (answer.error.text, answer.error.rank, answer.error.number) == ("ValueError: odd 0", 0, 1)
    assert answer.error.file.endswith("rank-00000.jsonl")


def test_secrets_in_a_log_are_not_shown(tmp_path: Path) -> None:
    path = log(tmp_path, "x", "OSError: [Errno 116] Stale file handle HF_TOKEN=hf_abcdefghijklmnopqrstuvwx")
    answer = diagnose_log(path)
    assert answer.diagnosis is not None
    assert answer.diagnosis.line == "OSError: [Errno 116] Stale file handle HF_TOKEN=[redacted]"
