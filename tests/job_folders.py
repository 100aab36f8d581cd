"""Jobs of a release as conductor and node write them down, for tests that need no cluster."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conductor.cluster.description import SUBMITTED, Cluster, Resources
from conductor.compatibility import Device
from conductor.executors.slurm.commands import Row
from conductor.executors.slurm.folders import JobFolder
from conductor.probes.machine import Accelerator

T0 = datetime(2026, 3, 14, 10, 0, tzinfo=UTC).timestamp()
"""When the first job of a test was submitted."""

H100 = Accelerator(
    name="NVIDIA H100", memory_bytes=80 * 2**30, driver="", compute_capability=(9, 0)
)


def resources(**others: Any) -> Resources:
    """Return resources of one node with one GPU; ``others`` say what is otherwise."""
    return Resources(
        **{
            "partition": "gpu",
            "account": None,
            "qos": None,
            "constraint": None,
            "nodes": 1,
            "gpus": 1,
            "cpus": 8,
            "memory_gib": None,
            "time_minutes": 60,
            "container_image": None,
            "container_mounts": (),
            "modules": (),
            "setup": (),
            "extra": {},
        }
        | others
    )


def cluster(directory: Path = Path("/shared"), *, asked: Any = None, **others: Any) -> Cluster:
    """Return a cluster whose stages all ask for ``asked``; ``others`` say what is otherwise."""
    return Cluster(
        **{
            "name": "hall",
            "file": directory / "clusters.yaml",
            "device": Device.CUDA,
            "accelerator": H100,
            "python": directory / "bin" / "python",
            "environments": directory / "environments",
            "interpreters": {},
            "resources": dict.fromkeys(SUBMITTED, asked or resources()),
            "max_jobs": None,
            "continuations": 3,
            "poll_s": 10.0,
            "command_timeout_s": 60.0,
        }
        | others
    )


def name_of(directory: str, number: int = 1) -> str:
    """Return the name of a job."""
    return f"day0-run-{directory.split('/')[1]}-{number}-0a1b2c3d"


def job_folder(
    run_dir: Path, directory: str = "stages/ptq", number: int = 1, **files: Mapping[str, Any]
) -> JobFolder:
    """Make the folder of a job that is intended; ``files`` are written beside its intent."""
    path = run_dir / directory / "jobs" / str(number)
    path.mkdir(parents=True)
    intent = {
        "name": name_of(directory, number),
        "token": "0a1b2c3d",
        "task_sha256": "0" * 64,
        "cluster": "hall",
        "resources": resources().document(),
        "at": T0,
    }
    for name, document in {"task": {"task": "worker"}, "intent": intent, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return JobFolder(path)


def submitted(number: str = "17") -> dict[str, Any]:
    """Return what is written once Slurm gave the job a number."""
    return {"job_id": number, "at": T0}


def claimed(number: str = "17", *, after_s: float = 180.0) -> dict[str, Any]:
    """Return what a job writes first."""
    return {"job_id": number, "node": "n1", "at": T0 + after_s, "restarts": 0}


def row(folder: JobFolder, number: str = "17", state: str = "RUNNING", **others: Any) -> Row:
    """Return a job as the queue shows it."""
    return Row(
        **{
            "job_id": number,
            "name": folder.name,
            "state": state,
            "reason": "None",
            "nodes": "n1",
            "submitted_at": T0,
            "started_at": T0 + 180.0,
            "ended_at": None,
            "restarts": 0,
            "exit_code": None,
            "cancelled_by": None,
        }
        | others
    )


def job_ended(
    directory: str = "stages/ptq", number: int = 1, **others: Any
) -> tuple[str, dict[str, Any]]:
    """Return the event that a job has ended, as name and facts."""
    return "job_ended", {
        "name": name_of(directory, number),
        "directory": directory,
        "job_id": "17",
        "state": "COMPLETED",
        "queued_s": 180.0,
        "ran_s": 720.0,
        "nodes": 2,
        "gpus": 4,
    } | others
