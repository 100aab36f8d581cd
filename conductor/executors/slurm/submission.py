"""Hand one job to Slurm, through submitit: its script, its resources, and nothing twice.

``sbatch`` runs under ``flock`` on a file of the job's folder and under a time limit, both as
processes of their own: a conductor that is killed in between leaves a submission that ends by
itself, and whoever goes on waits for the lock before looking whether the job exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conductor.cluster.description import Cluster, Resources
from conductor.executors.slurm.folders import JobFolder

KILL_AFTER_S = 5
SBATCH_ERRORS = "sbatch.err"
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
"""Variables of Slurm that say where it is; the others belong to a job that we may be in."""


class NotSubmitted(Exception):
    """``sbatch`` gave no number: Slurm refused, was not reached, or died over it."""


def submit(
    folder: JobFolder,
    cluster: Cluster,
    resources: Resources,
    module: str,
    environ: Mapping[str, str],
) -> str:
    """Submit the job of ``folder`` and return the number that Slurm gave it.

    Args:
        folder: where the job is described, and where it works.
        cluster: whose interpreter runs our code there.
        resources: what the job asks for.
        module: what runs on the node, as ``python -m module FOLDER``.
        environ: our variables; those of a job that we ourselves are in stay behind.

    Raises:
        NotSubmitted: there is no number; whether there is a job must be asked under its name.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from conductor.executors.slurm.submitit_executor import Executor

    errors = folder.path / SBATCH_ERRORS
    errors.unlink(missing_ok=True)
    executor = Executor(folder.path, before=_guards(folder, cluster, environ))
    executor.update_parameters(**parameters(folder.name, resources))
    try:
        job_id = executor.send([str(cluster.python), "-m", module, str(folder.path)])
    except (FailedJobError, FailedSubmissionError) as error:
        silence = f"sbatch gave neither a number nor a reason in {cluster.command_timeout_s:g} s"
        raise NotSubmitted(_said(errors) or str(error) or silence) from None
    for link in folder.path.glob(".submission_file_*.sh"):
        link.unlink()  # it points to the script by a path that will not hold elsewhere
    return job_id


def _guards(folder: JobFolder, cluster: Cluster, environ: Mapping[str, str]) -> list[str]:
    """Return what is put before ``sbatch``: lock, time limit, and a clean environment."""
    inherited = [name for name in environ if name.startswith("SLURM_") and name not in KEPT]
    unset = [part for name in inherited for part in ("-u", name)]
    return [
        # submitit would print what sbatch complains of.
        *("sh", "-c", 'exec "$@" 2> "$0"', str(folder.path / SBATCH_ERRORS)),
        *("flock", str(folder.lock)),
        *("timeout", f"--kill-after={KILL_AFTER_S}", str(cluster.command_timeout_s)),
        *("env", *unset),
    ]


def _said(errors: Path) -> str:
    try:
        return in_one_line(errors.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""


def in_one_line(said: str) -> str:
    """Return what Slurm said, often over several lines, in one."""
    return "; ".join(line.strip() for line in said.splitlines())


def parameters(name: str, resources: Resources) -> dict[str, Any]:
    """Return what submitit is told of a job that asks for ``resources``.

    The job is one process on its first node, without ``srun``, so that Slurm's word for how it
    ended is the true one; and it is never requeued, because attempts are made by us.
    """
    options: dict[str, Any] = {"no-requeue": True}
    if resources.memory_gib is not None:
        options["mem"] = f"{round(resources.memory_gib * 1024)}M"
    if resources.container_image:
        options["container-image"] = resources.container_image
    if resources.container_mounts:
        options["container-mounts"] = ",".join(resources.container_mounts)
    stated = {
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "cpus_per_task": resources.cpus,
        # Slurm takes GPUs of a type under gres, and then not besides without one.
        "gpus_per_node": None if "gres" in resources.extra else resources.gpus or None,
        "time": resources.time_minutes,
    }
    return {
        **{option: value for option, value in stated.items() if value is not None},
        "job_name": name,
        "nodes": resources.nodes,
        "ntasks_per_node": 1,
        "setup": [*(f"module load {each}" for each in resources.modules), *resources.setup],
        "additional_parameters": {**options, **resources.extra},
        "stderr_to_stdout": True,
        "use_srun": False,
        "wckey": None,
    }
