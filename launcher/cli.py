"""The command line: what can be said to `launcher`. What it does then stands in `commands`."""

import json
import os
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from launcher.errors import InputError, UnclearSubmissionError
from launcher.lab.cli import lab_app

FAILED, WRONG_INPUT = 1, 2
RUNS = Path("runs")

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(lab_app, name="lab")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Run = Annotated[str, typer.Argument(help="A run: its folder, its id, or its name for the newest of that name.")]
Runs = Annotated[Path, typer.Option("--folder", help="Where runs are looked for.")]
ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML, e.g. configs/tiny.yaml.")]
Override = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. topology.ep=8.")
]
Force = Annotated[bool, typer.Option("--force", help="Submit though its memory is planned not to fit.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the end of a Slurm job and report it.")]
Follow = Annotated[bool, typer.Option("--follow", help="Wait, and show what the ranks do meanwhile.")]


@app.callback()
def launcher() -> None:
    """Bring up mxfp4 experts with expert parallelism: on this machine, or on a Slurm cluster."""


@app.command("plan")
def plan(config: ConfigFile, override: Override = None, as_json: AsJson = False) -> None:
    """Show what each rank and node would hold, whether it fits, and what would. Exit code 1 if the job does not fit."""
    from launcher import commands

    sys.exit(commands.plan(config, override or (), as_json=as_json))


@app.command("scale")
def scale(
    config: ConfigFile,
    override: Override = None,
    ranks: Annotated[
        list[int] | None, typer.Option("--ranks", min=1, help="Numbers of ranks; 4 to 2048 in powers of 2.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, help="Tokens of each rank; 1, 64, 512, 4096.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it into this file; takes matplotlib.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict a layer's communication and time by strategy for few and many ranks, by the cost model alone."""
    from launcher import config as configs
    from launcher import scale as scales

    loaded = configs.load(config, override or ())
    sys.exit(scales.scale(loaded, ranks or scales.RANKS, tokens or scales.TOKENS, as_json=as_json, plot=plot))


@app.command("submit")
def submit(
    config: ConfigFile,
    override: Override = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be submitted; submit nothing.")] = False,
    force: Force = False,
    wait: Wait = False,
    follow: Follow = False,
    as_json: AsJson = False,
) -> None:
    """Start a run. A local one is followed to its end and reported; a Slurm job is queued."""
    from launcher import commands

    how = {"dry_run": dry_run, "force": force, "wait": wait, "follow": follow}
    sys.exit(commands.start(config, override or (), **how, as_json=as_json))


@app.command("resume")
def resume(
    run: Run,
    folder: Runs = RUNS,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="NODE", help="Leave a node out, beside cluster.exclude.")
    ] = None,
    force: Force = False,
    wait: Wait = False,
    follow: Follow = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run that has ended once more, as it was planned; batch sizes already measured are kept."""
    from launcher import commands

    sys.exit(commands.resume(run, folder, exclude or (), force=force, wait=wait, follow=follow, as_json=as_json))


@app.command("diagnose")
def diagnose(
    target: Annotated[str, typer.Argument(metavar="RUN|LOGFILE", help="A run (see logs), or any log.")],
    folder: Runs = RUNS,
    as_json: AsJson = False,
) -> None:
    """What is behind a failure: cause, evidence, and fix by the config's keys. Exit code 1 if there is a failure."""
    from launcher import commands

    sys.exit(commands.diagnose(target, folder, as_json=as_json))


@app.command("doctor")
def doctor(
    config: ConfigFile,
    override: Override = None,
    job: Annotated[
        bool, typer.Option("--job/--no-job", help="Also look at the nodes themselves, by a job of a minute.")
    ] = True,
    pending: Annotated[
        int, typer.Option("--pending", min=1, metavar="SECONDS", help="For how long that job may wait to start.")
    ] = 600,
    as_json: AsJson = False,
) -> None:
    """What can be known before a night is spent: files, partition, time, nodes. Exit code 1 if something is wrong."""
    from launcher import doctor as doctors

    sys.exit(doctors.doctor(config, override or (), job=job, pending_s=pending, as_json=as_json))


@app.command("status")
def status(
    run: Annotated[str | None, typer.Argument(help="A run (see logs); all of them without.")] = None,
    folder: Runs = RUNS,
    as_json: AsJson = False,
) -> None:
    """How runs are doing: one question to Slurm for all of them. Exit code 1 if the run that is named failed."""
    from launcher import commands

    sys.exit(commands.status(run, folder, as_json=as_json))


@app.command("logs")
def logs(
    run: Run,
    rank: Annotated[int | None, typer.Option("--rank", help="Whose; default: the first that failed, else 0.")] = None,
    folder: Runs = RUNS,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as it is written, until the run ends.")] = False,
) -> None:
    """Print the log of a rank of the last job that was submitted for a run (a requeued job goes on in the same log)."""
    from launcher import commands

    sys.exit(commands.print_logs(run, folder, rank, follow=follow))


@app.command("url")
def url(run: Run, folder: Runs = RUNS, as_json: AsJson = False) -> None:
    """Where a service listens. Exit code 1 while it is not ready, and after its end."""
    from launcher import service

    sys.exit(service.url(run, folder, as_json=as_json))


@app.command("bench")
def bench(
    run: Run,
    folder: Runs = RUNS,
    rate: Annotated[
        float, typer.Option("--request-rate", min=1e-6, help="Requests a second, arriving at random; inf: all at once.")
    ] = 1.0,
    count: Annotated[int, typer.Option("--num-prompts", min=1, help="How many requests.")] = 100,
    input_len: Annotated[int, typer.Option("--input-len", min=1, help="Tokens of a prompt, random ones.")] = 128,
    output_len: Annotated[int, typer.Option("--output-len", min=1, help="Tokens of an answer.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Of arrivals and prompts.")] = 0,
    burstiness: Annotated[
        float, typer.Option("--burstiness", min=1e-3, help="1 is a Poisson process; less comes in bursts.")
    ] = 1.0,
    goodput: Annotated[
        list[str] | None,
        typer.Option("--goodput", metavar="NAME:MS", help="A limit (ttft, tpot, e2el) that a good request keeps."),
    ] = None,
    address: Annotated[
        str | None, typer.Option("--url", help="Another way to it, e.g. the end of a tunnel: http://127.0.0.1:8000.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a service requests at random times and report latency and throughput. Exit code 1 if one failed."""
    from launcher import service

    code = service.bench(
        *(run, folder),
        rate=rate,
        count=count,
        input_len=input_len,
        output_len=output_len,
        seed=seed,
        burstiness=burstiness,
        goodput=goodput or (),
        address=address,
        as_json=as_json,
    )
    sys.exit(code)


@app.command("cancel")
def cancel(run: Run, folder: Runs = RUNS, as_json: AsJson = False) -> None:
    """End a run. Its folder stays, and a report can be made of what was done."""
    from launcher import commands

    sys.exit(commands.cancel(run, folder, as_json=as_json))


@app.command("report")
def report(run: Run, folder: Runs = RUNS, as_json: AsJson = False) -> None:
    """Build the report of a run, finished or not, and show it. Exit code 1 if the run failed."""
    from launcher import commands

    sys.exit(commands.make_report(run, folder, as_json=as_json))


@app.command("compare")
def compare(
    named: Annotated[
        list[str],
        typer.Argument(
            metavar="[BASELINE]... RUN",
            help="Runs (see logs) or report.json files, oldest first; the last is judged by those before it. "
            "Alone it is judged by the earlier runs of its name.",
        ),
    ],
    folder: Runs = RUNS,
    history: Annotated[
        Path | None, typer.Option("--history", help="Take the runs that nightlies have kept here as the baseline too.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write the gates as JUnit XML into this file.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of compare, in percent.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a run by earlier ones. Exit code 0 passed, 1 regressed or failed, 2 no verdict or wrong input."""
    from launcher import verdicts

    sys.exit(verdicts.compare_runs(named, folder, history, junit, override or (), as_json=as_json))


History = Annotated[Path, typer.Option("--history", help="The folder that the nights are kept in; made if need be.")]


@app.command("nightly")
def nightly(
    configs: Annotated[list[Path], typer.Argument(help="The runs' YAMLs.")],
    history: History,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of every config.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Begin none; only go on with a night that was broken off.")
    ] = False,
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="How many runs may be submitted at once.")] = 4,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write the gates as JUnit XML into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Submit all configs, wait, judge each by its history. Exit code 1 if one failed or regressed; started again
    after it was killed, it goes on where it was."""
    from launcher import nightly as nights

    code = nights.nightly(
        configs, history, override or (), parallel=parallel, resume=resume, junit_file=junit, as_json=as_json
    )
    sys.exit(code)


@app.command("accept")
def accept(
    run_id: Annotated[str, typer.Argument(help="The id of a valid run of a nightly.")],
    history: History,
    as_json: AsJson = False,
) -> None:
    """Let a config's baseline begin anew with a run, e.g. after a change that is slower and wanted."""
    from launcher.history import History as Store

    Store(history).accept(run_id)
    print(json.dumps({"accepted": run_id}) if as_json else f"{run_id}: the baseline begins with it")


def main() -> None:
    """Entry point: exit code 0 well, 1 the job failed, 2 the input is wrong."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what was started is ended first
        signal.signal(number, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × and − is no reason to fail
    try:
        app()
    except (InputError, UnclearSubmissionError) as error:
        print(error, file=sys.stderr)
        sys.exit(WRONG_INPUT if isinstance(error, InputError) else FAILED)
    except PermissionError as error:  # of whatever file a user has named
        if error.filename is None:
            raise
        print(f"{os.fsdecode(error.filename)}: {error.strerror}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
