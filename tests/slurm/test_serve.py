"""A service over two nodes of a real Slurm: reached by its URL, started again after a death, ended with a verdict."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.checkout import CONFIGS
from tests.slurm.conftest import Lab
from tests.slurm.test_runs import process_of_rank, run_of, status
from tests.waiting import until

NAME = "serve-lab"
CONFIG = CONFIGS / f"{NAME}.yaml"
KEY = "only for those who know it"


def progress(lab: Lab, cwd: Path) -> str:
    (found,) = status(lab, cwd, NAME)
    assert found["state"] in ("pending", "running"), found
    return str(found["progress"])


def attempt_of(cwd: Path) -> int:
    """Of the service that can be reached; −1 while there is none."""
    endpoint = run_of(cwd, NAME) / "endpoint.json"
    return int(json.loads(endpoint.read_text())["attempt"]) if endpoint.exists() else -1


def ask(lab: Lab, cwd: Path, url: str, *args: str) -> dict[str, Any]:
    code = "import sys, urllib.request as u; r = u.Request(sys.argv[1], *[a.encode() for a in sys.argv[3:]]); "
    code += "r.add_header('Authorization', 'Bearer ' + sys.argv[2]); print(u.urlopen(r, timeout=60).read().decode())"
    done = lab.run(sys.executable, "-c", code, url, KEY, *args, cwd=cwd)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_service_lives_through_one_death_and_its_next_is_the_verdict(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_EP_API_KEY", KEY)
    done = lab.launcher("submit", str(CONFIG), "--set", "engine.restarts=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    until(lambda: progress(lab, tmp_path).startswith("ready"))
    url = lab.launcher("url", NAME, cwd=tmp_path).stdout.strip()
    assert url.startswith("http://nid")
    body = json.dumps({"model": "tiny-chat", "prompt": "Once", "max_tokens": 4, "temperature": 0, "ignore_eos": True})
    first = ask(lab, tmp_path, f"{url}/v1/completions", body)
    assert first["usage"]["completion_tokens"] == 4
    job_id = status(lab, tmp_path, NAME)[0]["job_id"]

    os.kill(process_of_rank(lab, job_id, 1), signal.SIGKILL)
    until(lambda: attempt_of(tmp_path) == 1)
    until(lambda: progress(lab, tmp_path).startswith("ready"))
    assert status(lab, tmp_path, NAME)[0]["job_id"] == job_id
    assert ask(lab, tmp_path, f"{url}/v1/completions", body)["choices"] == first["choices"]
    bench = lab.launcher("bench", NAME, "--num-prompts=4", "--input-len=8", "--output-len=3", "--json", cwd=tmp_path)
    assert json.loads(bench.stdout)["completed"] == 4

    killed = time.monotonic()
    os.kill(process_of_rank(lab, job_id, 2), signal.SIGKILL)
    until(lambda: status(lab, tmp_path)[0]["state"] == "failed")
    assert time.monotonic() - killed < 60
    (found,) = status(lab, tmp_path)
    assert (found["first_failing_rank"], found["reason"].split(":")[0]) == (2, "Vanished")
    ended = lab.launcher("url", NAME, cwd=tmp_path)
    assert (ended.returncode, "failed" in ended.stderr) == (1, True)
    files = [file for file in run_of(tmp_path, NAME).rglob("*") if file.is_file()]
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


@pytest.mark.nightly
def test_a_service_that_is_cancelled_finishes_its_answers(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_EP_API_KEY", KEY)
    assert lab.launcher("submit", str(CONFIG), cwd=tmp_path).returncode == 0
    until(lambda: progress(lab, tmp_path).startswith("ready"))
    assert lab.launcher("cancel", NAME, cwd=tmp_path).returncode == 0
    until(lambda: status(lab, tmp_path)[0]["state"] == "completed")


ASKING = """
import json, sys, urllib.error, urllib.request
url, key, body = sys.argv[1:]
asked = urllib.request.Request(url, body.encode(), {"Authorization": "Bearer " + key})
while True:
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            print(json.loads(answer.read())["usage"]["completion_tokens"], flush=True)
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code} {json.loads(error.read())['error']['message']}")
    except OSError as error:
        sys.exit(f"gone: {error}")
"""


@pytest.mark.nightly  # Slurm's own time limit takes minutes
def test_a_service_is_drained_before_slurm_ends_its_time(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_EP_API_KEY", KEY)
    limits = ("--set=limits.time_min=3", "--set=limits.signal_s=60", "--set=engine.drain_s=20")
    assert lab.launcher("submit", str(CONFIG), *limits, cwd=tmp_path).returncode == 0
    until(lambda: progress(lab, tmp_path).startswith("ready"))
    url = lab.launcher("url", NAME, cwd=tmp_path).stdout.strip()
    body = json.dumps({"model": "tiny-chat", "prompt": "Once", "max_tokens": 20, "ignore_eos": True})
    asking = lab.run(sys.executable, "-c", ASKING, f"{url}/v1/completions", KEY, body, cwd=tmp_path)
    answers = asking.stdout.split()
    assert len(answers) > 1
    assert set(answers) == {"20"}, "what had begun was finished"
    assert asking.stderr.startswith(("503 ", "gone: ")), asking.stderr
    until(lambda: status(lab, tmp_path)[0]["state"] not in ("running", "pending"))
    (found,) = status(lab, tmp_path)
    assert found["state"] == "completed", found
    assert lab.ask("sacct", "-n", "-X", "-j", found["job_id"], "-o", "State").split() == ["COMPLETED"]
    events = (run_of(tmp_path, NAME) / "events" / "rank-00000.jsonl").read_text().splitlines()
    begun = [e["stage"] for e in map(json.loads, events) if e["event"] == "begin"]
    assert begun[-2:] == ["draining", "done"]
