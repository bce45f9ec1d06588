"""What the launcher's commands cost as whole processes, beside what nobody can avoid, in one run on a lab.

    python -m launcher lab run -- python benchmarks/command_line.py

Prints the median of several runs of each: an empty Python, `launcher --help`, raw sbatch of the same script, `launcher
submit` to Slurm, and `launcher status` of 1000 runs that are all still open.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jobs.events import EventLog
from launcher.config import load
from launcher.plan import Plan, make_plan
from launcher.runs import record_submission

CONFIG = Path(__file__).parents[1] / "configs" / "lab-2node.yaml"
REPEATS, RUNS, RANKS_EVENTS = 7, 1000, 12
LAUNCHER = [sys.executable, "-m", "launcher"]


def main() -> None:
    """Print the table."""
    if "= lab\n" not in subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True).stdout:
        sys.exit("this queues jobs, so it runs in a lab only: python -m launcher lab run -- python " + __file__)
    folder = Path(tempfile.mkdtemp(prefix="cost-"))
    held = ["--set", "cluster.sbatch_args={hold: true}", "--set", f"run.folder={folder}/runs"]
    submit = [*LAUNCHER, "submit", str(CONFIG), *held]
    try:
        print(f"{'empty python':<28} {median([sys.executable, '-c', 'pass']):6.3f} s")
        print(f"{'launcher --help':<28} {median([*LAUNCHER, '--help']):6.3f} s")
        subprocess.run(submit, check=True, capture_output=True)
        (script,) = folder.glob("runs/*/*/submitit/*_submission.sh")
        raw, ours = median(["sbatch", str(script)]), median(submit)
        print(f"{'sbatch':<28} {raw:6.3f} s")
        print(f"{'launcher submit':<28} {ours:6.3f} s, {ours - raw:.3f} s on top of sbatch")
        make_runs(folder / "many")
        status = median([*LAUNCHER, "status", "--folder", str(folder / "many")])
        print(f"{f'launcher status, {RUNS} runs':<28} {status:6.3f} s")
    finally:
        shutil.rmtree(folder)  # the lab's jobs are held, and end with it


def median(command: list[str]) -> float:
    """Median wall seconds of a process, after one run that is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def make_runs(folder: Path) -> None:
    """Runs in the middle of loading, four ranks each, whose jobs Slurm does not know."""
    config = load(CONFIG, [f"run.folder={folder}"])
    for i in range(RUNS):
        plan: Plan = make_plan(config, f"run-{i:04d}")
        plan.save()
        record_submission(plan.run_dir, 0, "slurm", str(10_000 + i))
        for rank in range(config.topology.ranks):
            log = EventLog(plan.run_dir, rank)
            log.write("started", pid=1, host="nid001001", local_rank=rank, world=4)
            for done in range(RANKS_EVENTS):
                log.write("progress", done=done, total=RANKS_EVENTS)


if __name__ == "__main__":
    main()
