"""What every rank runs. A probe: env → selector → weights → parity → memory → throughput → done; a tune or check job:
env → tune or check → done; a preshard job: env → selector → weights → done, where the weights are written for later
probes; a serve job: `jobs.serve`."""

import faulthandler
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import scratch
from jobs.arrivals import Arrivals
from jobs.events import UNWRITABLE, EventLog, RunFolderError
from jobs.rank import Rank, join, leave_on_signal
from jobs.redact import hide_in_logs
from jobs.request import ProbeRequest
from jobs.serving import Ending

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__

    from jobs.communication import Communication
    from jobs.place import Place
    from moe_ep.reading import Progress


def run(run_dir: str) -> None:
    """Probe as `request.json` in `run_dir` says; what comes of it goes to this rank's event file.

    Raises whatever ended the rank, after it has been written down. torch is imported once the first event
    is out, so that a rank which dies in that import is known by name. Where nothing can be written down any more, the
    rank ends with an exit code that says so.
    """
    hide_in_logs()
    faulthandler.enable()  # a rank that dies in a library leaves its stack in its log
    try:
        _run(Path(run_dir))
    except RunFolderError as error:
        print(f"run.folder: {run_dir}: {error}", file=sys.stderr, flush=True)
        os._exit(UNWRITABLE)


def _run(folder: Path) -> None:
    rank = Rank.current()
    rank.export()
    log = EventLog(folder, rank.rank, rank.attempt)
    log.write("started", pid=os.getpid(), host=rank.host, job_id=rank.job_id, world=rank.world)
    request = ProbeRequest.load(folder)

    def clean_up() -> None:
        if request.scratch and rank.local_rank == 0:
            scratch.remove(Path(request.scratch))

    ending = Ending()
    leave_on_signal(log, clean_up, ending.grace)
    try:
        if request.kind == "serve":
            _serve(request, folder, rank, log, ending)
        else:
            _probe(request, folder, rank, log)
    finally:
        clean_up()


def _serve(request: ProbeRequest, folder: Path, rank: Rank, log: EventLog, ending: Ending) -> None:
    assert request.serve is not None
    if request.scratch:
        try:
            scratch.make_private(Path(request.scratch))
        except (OSError, scratch.ScratchError) as error:
            log.write("failed", error={"type": type(error).__name__, "text": str(error)})
            raise
    if request.serve.engine != "embedded":  # a program of its own, which brings what it needs
        from jobs import external

        external.run(request, folder, rank, log, ending)
        return
    try:
        from jobs import serve
    except ModuleNotFoundError as error:
        text = f"{error.name} is not installed for {sys.executable}; pip install 'moe-ep[serve]'"
        log.write("failed", error={"type": type(error).__name__, "text": text})
        raise
    serve.run(request, folder, rank, log, ending)


def _probe(request: ProbeRequest, folder: Path, rank: Rank, log: EventLog) -> None:
    with log.stage("env") as data:
        if request.scratch:
            scratch.make_private(Path(request.scratch))
        from jobs import budget, communication, earlier, environment, stages, throughput
        from jobs.allocations import Allocations
        from moe_ep.bench.clock import measure_rates
        from moe_ep.selector import NoBackendError

        store, where = meet(request, folder, rank, data)
        device = where.device
        rates = measure_rates(device)  # while there is memory for it
        environment.forget_peak(device)
        data["rates"] = {"copy_bytes_per_s": rates.copy, "matmul_flop_per_s": rates.matmul}

    code = data["code"]
    kept = earlier.finished(folder, rank.rank, rank.attempt, code)
    if request.kind == "tune":
        with log.stage("tune") as data:
            from jobs import tuning

            data |= tuning.run(request, where, folder, lambda line: log.write("progress", **line))
        end(log)
        return

    if request.kind == "check":
        with log.stage("check") as data:
            from jobs import checking

            data |= checking.run(request, where, lambda line: log.write("progress", **line))
            checking.refuse(data["checks"])
        end(log)
        return

    with log.stage("selector") as data:
        record = stages.select(request, where)
        data |= record.as_dict()
        comm = communication.Communication(request, where, store, log)
        where = comm.where
        data["comm"] = comm.record()
        if record.selected is None:
            raise NoBackendError(record)

    if request.kind == "probe" and "throughput" in kept:  # all that was asked for is measured
        for name in ("weights", "parity", "memory", "comm", "throughput"):
            if name in kept:
                with log.stage(name) as data:
                    data |= kept[name]
        end(log, comm)
        return

    with log.stage("weights") as data:
        planned = data["planned"] = budget.check_fits(request, where, record.selected)
        watch = Allocations(device)
        arrivals = Arrivals(store, rank.rank, rank.world)
        before = environment.allocated(device)
        loading = tell(log, arrivals)
        exchange = stages.exchange(request, where, arrivals)
        if request.kind == "preshard":
            checkpoint = stages.open_checkpoint(request, where)
            data |= stages.preshard(request, where, checkpoint, exchange, loading)
        else:
            weights = stages.open_weights(request, where)
            combine = comm.strategy(request.comm.strategy)
            with watch.during("loading"):
                layers, loaded = stages.load(request, where, weights, combine, exchange, loading)
            for layer in layers.values():
                layer.cut = comm.cut
            held = watch.now
            data |= loaded
        arrivals.tell(0, ended=True)
        arrivals.wait(request.rank_timeout_s)
        grown = None if before is None else (environment.allocated(device) or 0) - before

    if request.kind == "preshard":
        if rank.rank == 0:
            stages.finish_preshard(request, where, checkpoint)
        end(log, comm)
        return

    with log.stage("parity") as data:
        data |= {"tokens": request.parity_tokens, "tolerance": request.parity_tolerance, "layers": {}}
        data |= kept.get("parity", {})
        for number in request.parity_layers if "parity" not in kept else ():
            with watch.during("parity"):
                error = stages.parity(request, where, weights, layers[number], number)
            data["layers"][number] = {
                "relative_error": error,
                "routing": "hash" if request.shape.is_hash_layer(number) else "top-k",
            }
        stages.check_parity(request, {n: line["relative_error"] for n, line in data["layers"].items()})

    with log.stage("memory") as data:
        with watch.during("largest pass"):
            stages.largest_pass(request, where, layers)
        most = {budget.READING: loaded["buffer_bytes"], **{part: n - held for part, n in watch.most.items()}}
        work = budget.planned_work(request, where, record.selected)
        data |= budget.memory(where, layers, planned, grown, work, most)

    if where.group_size > 1:
        with log.stage("comm") as data:
            data["measured"] = [comm.line(layers, batch) for batch in request.batch_sizes]

    with log.stage("throughput") as data:
        load = throughput.expert_load(request, where, layers, max(request.batch_sizes))
        if rank.rank == 0:
            log.write("expert_load", **load)
            throughput.write_profile(folder, load)
        data["sweep"] = []
        measured = throughput.measured_before(folder, rank.attempt, code)
        for i, batch in enumerate(request.batch_sizes, start=1):
            line = measured.get(batch) or throughput.sweep_one(request, where, layers, batch, rates)
            data["sweep"].append(line)
            log.write("progress", done=i, total=len(request.batch_sizes), latest=data["sweep"][-1])
        data["device_peak"] = watch.device_peak and max(watch.device_peak, environment.peak(device) or 0)

    end(log, comm)


def meet(request: ProbeRequest, folder: Path, rank: Rank, data: dict[str, Any]) -> "tuple[TCPStore, Place]":
    """Pick the rank's device and meet the others; `data` gets what the rank runs on, and where all run."""
    from jobs import agreement, environment, place

    device = environment.pick_device(rank.local_rank, request.arch)
    data |= environment.describe(device)
    store = join(rank, folder, device, request.rank_timeout_s)
    mine = agreement.configuration(folder, data)
    data["configuration"] = agreement.agree(store, rank.rank, rank.world, mine, request.rank_timeout_s)
    data["hosts"] = _check_hosts(request, rank)
    return store, place.place(request, rank.rank, device)


def tell(log: EventLog, arrivals: Arrivals) -> Callable[["Progress"], None]:
    """Bytes, rate and time left, to those who watch and to the ranks that wait."""

    def told(progress: "Progress") -> None:
        arrivals.tell(progress.done)
        log.write(
            "progress",
            done=progress.done,
            total=progress.total,
            unit="bytes",
            rate=progress.rate,
            left_s=progress.left_s,
        )

    return told


def end(log: EventLog, comm: "Communication | None" = None) -> None:
    """All ranks are done."""
    import torch.distributed as dist

    with log.stage("done"):
        dist.barrier()
        if comm is not None:
            comm.close()
        dist.destroy_process_group()


def _check_hosts(request: ProbeRequest, rank: Rank) -> list[str]:
    """The hosts of all ranks, by rank, which must lie as planned: each node a block of consecutive ranks.

    A step that silently ran on fewer nodes, or that dealt the ranks out one by one, is an error.
    """
    import torch.distributed as dist

    hosts: list[str] = [""] * rank.world
    dist.all_gather_object(hosts, rank.host)
    size = request.ranks_per_node
    blocks = [set(hosts[first : first + size]) for first in range(0, rank.world, size)]
    as_planned = rank.world == request.world and all(len(block) == 1 for block in blocks)
    if not as_planned or len(set.union(*blocks)) != request.nodes:
        raise RuntimeError(
            f"{rank.world} ranks run on {len(set(hosts))} hosts ({', '.join(hosts)}), "
            f"expected {request.world} ranks on {request.nodes}, {size} in a row on each"
        )
    return hosts
