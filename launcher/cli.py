"""The commands."""

import json
import shutil
import signal
import sys
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from launcher import config as configuration
from launcher import events, logs, report, runs, show, submit, watch
from launcher import plan as planning
from launcher.errors import InputError
from launcher.lab.cli import lab_app
from launcher.status import statuses
from launcher.submit import UnclearSubmissionError

FAILED, WRONG_INPUT = 1, 2

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
out = Console()
err = Console(stderr=True)

app.add_typer(lab_app, name="lab")


@app.callback()
def launcher() -> None:
    """Bring up mxfp4 experts with expert parallelism: on this machine, or on a Slurm cluster."""


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Run = Annotated[str, typer.Argument(help="A run: its folder, its id, or its name for the newest of that name.")]
Runs = Annotated[Path, typer.Option("--folder", help="Where runs are looked for.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the end of a Slurm job and report it.")]
Follow = Annotated[bool, typer.Option("--follow", help="Wait, and show what the ranks do meanwhile.")]
RUNS = Path("runs")


@app.command("submit")
def submit_command(
    config: Annotated[Path, typer.Argument(help="The run's YAML, e.g. configs/tiny.yaml.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. topology.ep=8.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be submitted; submit nothing.")] = False,
    wait: Wait = False,
    follow: Follow = False,
    as_json: AsJson = False,
) -> None:
    """Start a run. A local one is followed to its end and reported; a Slurm job is queued."""
    plan = planning.make_plan(
        configuration.load(config, override or ()), planning.new_run_id(datetime.now(UTC)), ["launcher", *sys.argv[1:]]
    )
    problems = planning.problems_on_site(plan)
    if dry_run:
        show.dry_run(plan, problems, out, as_json=as_json)
        return
    if problems:
        raise InputError("\n".join(f"{config}: {problem}" for problem in problems))
    try:
        plan.save()
        job = submit.submit(plan)
    except InputError:
        shutil.rmtree(plan.run_dir, ignore_errors=True)  # nothing was started, so there is nothing to keep
        raise
    _started(plan, job, wait=wait, follow=follow, as_json=as_json)


@app.command("resume")
def resume_command(
    run: Run, folder: Runs = RUNS, wait: Wait = False, follow: Follow = False, as_json: AsJson = False
) -> None:
    """Submit a run that has ended once more, as it was planned; batch sizes already measured are kept."""
    run_dir = runs.find_run(run, folder)
    (status,), problems = statuses([run_dir])
    if not status.ended or status.state == "completed":
        why = "; ".join((status.reason, *problems)) if status.state == "unknown" else ""
        raise InputError(f"{run_dir}: {status.state}{f' ({why})' if why else ''}: only a run that broke off is resumed")
    attempts = [event.attempt for event in events.read_events(run_dir)]
    attempts += [submission.attempt for submission in runs.submissions(run_dir)]
    plan = planning.Plan.load(run_dir, attempt=max(attempts) + 1)
    _started(plan, submit.submit(plan), wait=wait, follow=follow, as_json=as_json)


@app.command("status")
def status_command(
    run: Annotated[str | None, typer.Argument(help="A run (see logs); all of them without.")] = None,
    folder: Runs = RUNS,
    as_json: AsJson = False,
) -> None:
    """How runs are doing: one question to Slurm for all of them. Exit code 1 if the run that is named failed."""
    found, problems = statuses([runs.find_run(run, folder)] if run else runs.all_runs(folder))
    show.statuses(found, problems, out, as_json=as_json)
    if run and found[0].ended and found[0].state != "completed":
        raise typer.Exit(FAILED)


@app.command("logs")
def logs_command(
    run: Run,
    rank: Annotated[int | None, typer.Option("--rank", help="Whose; default: the first that failed, else 0.")] = None,
    folder: Runs = RUNS,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as it is written, until the run ends.")] = False,
) -> None:
    """Print the log of a rank of a run's last attempt."""
    run_dir = runs.find_run(run, folder)
    (status,), _ = statuses([run_dir])
    if not status.job_id:
        raise InputError(f"{run_dir}: was never submitted, there are no logs")
    ranks = len(planning.read_plan(run_dir)["topology"])
    chosen = rank if rank is not None else status.first_failing_rank or 0
    if not 0 <= chosen < ranks:
        raise InputError(f"--rank {rank}: the run has ranks 0 to {ranks - 1}")
    going_on = watch.until_ended(run_dir) if follow else lambda: False
    for text in logs.follow(logs.log_files(run_dir, chosen, status.job_id), going_on):
        sys.stdout.write(text)
        sys.stdout.flush()


@app.command("cancel")
def cancel_command(run: Run, folder: Runs = RUNS) -> None:
    """End a run. Its folder stays, and a report can be made of what was done."""
    run_dir = runs.find_run(run, folder)
    (status,), _ = statuses([run_dir])
    if status.ended:
        raise InputError(f"{run_dir}: has ended already: {status.state}")
    submit.cancel(run_dir)
    out.print(f"{status.name} {status.run_id}: told to end", markup=False, highlight=False, soft_wrap=True)


@app.command("report")
def report_command(run: Run, folder: Runs = RUNS, as_json: AsJson = False) -> None:
    """Build the report of a run, finished or not, and show it. Exit code 1 if the run failed."""
    _finish(runs.find_run(run, folder), as_json=as_json)


def _started(plan: planning.Plan, job: Any, *, wait: bool, follow: bool, as_json: bool) -> None:
    scheduler = plan.config.cluster.scheduler
    runs.record_submission(plan.run_dir, plan.attempt, scheduler, job.job_id)
    if scheduler == "slurm" and not (wait or follow):
        show.queued(plan, job.job_id, out, as_json=as_json)
        return
    progress = show.Progress(plan.config.topology.ranks, err, quiet=wait and not follow)
    try:
        with progress:
            if scheduler == "local":
                watch.Shepherd(job, plan.run_dir, plan.attempt, plan.config.topology.ranks).follow(progress.update)
            else:
                going_on = watch.until_ended(plan.run_dir, progress.status)
                watch.follow(plan.run_dir, plan.attempt, going_on, progress.update)
    except KeyboardInterrupt:
        if scheduler == "slurm":
            err.print(f"no longer following; the job goes on: launcher status {plan.run_dir}", soft_wrap=True)
            raise typer.Exit(FAILED) from None
        err.print("interrupted: the ranks were ended; the report holds what was done", soft_wrap=True)
    finally:
        # Whatever went wrong with showing it, what was measured is not lost.
        report.write(plan.run_dir)
    _finish(plan.run_dir, as_json=as_json)


def _finish(run_dir: Path, *, as_json: bool) -> None:
    """Write and show the report. Exit code 1 unless the run is completed, or may yet be."""
    (status,), problems = statuses([run_dir])
    result = report.write(run_dir, status.state)
    if as_json:
        out.print_json(json.dumps(result))
    else:
        show.summary(result, run_dir, out)
        for problem in problems:
            err.print(problem, markup=False, highlight=False, soft_wrap=True)
    if status.state not in ("completed", "pending", "running"):
        raise typer.Exit(FAILED)


def main() -> None:
    """Entry point: exit code 0 well, 1 the job failed, 2 the input is wrong."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what was started is ended first
        signal.signal(number, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × and − is no reason to fail
    try:
        app()
    except UnclearSubmissionError as error:
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(FAILED)
    except InputError as error:
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(WRONG_INPUT)


__all__ = ["app", "main"]
