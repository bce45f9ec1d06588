"""The commands."""

import json
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from launcher import config as configuration
from launcher import plan as planning
from launcher import report, show, submit, watch
from launcher.errors import InputError

OK, FAILED, WRONG_INPUT = 0, 1, 2

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@app.callback()
def launcher() -> None:
    """Bring up mxfp4 experts with expert parallelism: on this machine, or on a Slurm cluster."""


@app.command("submit")
def submit_command(
    config: Annotated[Path, typer.Argument(help="The run's YAML, e.g. configs/tiny.yaml.")],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. topology.ep=8."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be submitted; submit nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a run. A local one is followed to its end and reported; a Slurm job is queued."""
    plan = planning.make_plan(
        configuration.load(config, override or ()),
        planning.new_run_id(datetime.now(UTC)),
        ["launcher", *sys.argv[1:]],
    )
    problems = planning.problems_on_site(plan)
    if dry_run:
        show.dry_run(plan, problems, out, as_json=as_json)
        return
    if problems:
        raise InputError("\n".join(f"{config}: {problem}" for problem in problems))
    plan.run_dir.mkdir(parents=True)
    plan.save()
    try:
        job = submit.submit(plan)
    except InputError:
        shutil.rmtree(plan.run_dir)  # nothing was started, so there is nothing to keep
        raise
    if plan.config.cluster.scheduler == "slurm":
        show.queued(plan, job.job_id, out, as_json=as_json)
        return
    _follow(job, plan, as_json=as_json)


@app.command("report")
def report_command(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder, runs/NAME/ID.")], as_json: AsJson = False
) -> None:
    """Build the report of a run, finished or not, and show it. Exit code 1 if the run failed."""
    _finish(run_dir, as_json=as_json)


def _follow(job: Any, plan: planning.Plan, *, as_json: bool) -> None:
    progress = show.Progress(plan.config.topology.ranks, err)
    try:
        with progress:
            watch.follow(job, plan.run_dir, progress.update)
    except KeyboardInterrupt:
        job.cancel()
        err.print("interrupted; the report holds what was done")
    _finish(plan.run_dir, as_json=as_json)


def _finish(run_dir: Path, *, as_json: bool) -> None:
    result = report.write(run_dir)
    if as_json:
        out.print_json(json.dumps(result))
    else:
        show.summary(result, run_dir, out)
    if result["run"]["state"] == "failed":
        raise typer.Exit(FAILED)


def main() -> None:
    """Entry point: exit code 0 well, 1 the job failed, 2 the input is wrong."""
    try:
        app()
    except InputError as error:
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(WRONG_INPUT)


__all__ = ["OK", "app", "main"]
