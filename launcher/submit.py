"""The only module that starts anything: a plan becomes a job, by submitit."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import submitit

from jobs import probe
from launcher.errors import InputError
from launcher.plan import Plan
from launcher.render import environment, job_folder, python_command, slurm_parameters


def submit(plan: Plan) -> "submitit.Job[None]":
    """Start the plan's ranks: as processes here, or by Slurm. The run folder must hold the plan.

    Raises
    ------
    InputError
        If there is no Slurm here, or it refuses the request.
    """
    if plan.config.cluster.scheduler == "local":
        return _submit_local(plan)
    return _submit_slurm(plan)


def _submit_local(plan: Plan) -> "submitit.Job[None]":
    topology, cluster = plan.config.topology, plan.config.cluster
    executor = submitit.LocalExecutor(job_folder(plan), python=python_command(plan))
    executor.update_parameters(
        tasks_per_node=topology.ranks_per_node,
        gpus_per_node=topology.ranks_per_node if cluster.devices_per_node else 0,
        timeout_min=plan.config.limits.time_min,
    )
    extra = environment(plan)
    if plan.code_root is not None:
        extra["PYTHONPATH"] = os.pathsep.join(filter(None, (str(plan.code_root), os.environ.get("PYTHONPATH"))))
    with _environ(extra):
        return executor.submit(probe.run, str(plan.run_dir))


def _submit_slurm(plan: Plan) -> "submitit.Job[None]":
    try:
        executor = submitit.SlurmExecutor(job_folder(plan), python=python_command(plan))
    except RuntimeError:
        raise InputError(
            f"cluster: {plan.config.cluster.name}: no srun on PATH here; submit on its login node, "
            "or use --dry-run to see the script"
        ) from None
    parameters: dict[str, Any] = slurm_parameters(plan)
    executor.update_parameters(**parameters)
    try:
        return executor.submit(probe.run, str(plan.run_dir))
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        raise InputError(f"sbatch refused the request: {error}") from None


@contextmanager
def _environ(extra: Mapping[str, str]) -> Iterator[None]:
    """submitit's local executor hands its own environment on to the ranks."""
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
