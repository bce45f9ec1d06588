"""`python -m launcher.local RUN_DIR`: the process that looks after a planned run on this machine for a nightly."""

import sys
from pathlib import Path

from launcher import report, watch
from launcher.commands import submit_recorded
from launcher.plan import Plan


def main(run_dir: Path) -> None:
    """Start the ranks, follow them to their end, and write the report."""
    plan = Plan.load(run_dir, attempt=0)
    job = submit_recorded(plan)
    try:
        watch.Shepherd(job, run_dir, plan.attempt, plan.config.topology.ranks).follow(lambda _: None)
    finally:
        report.write(run_dir)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
