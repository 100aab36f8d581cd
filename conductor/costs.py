"""What a release cost: how long its jobs waited and ran, and the GPU hours that were held for it.

Held is what counts, used or not. On this machine those are the accelerators that a stage was free
to use, for as long as it was worked on; of a job, what it was given, for as long as it ran. A
figure that is not known is None, as it is without accelerators; nothing held is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conductor.ahead import devices
from conductor.chain import Stage
from conductor.cluster.files import SUBMITTED
from conductor.config import Config
from conductor.jobs import (
    SECONDS_AN_HOUR,
    Job,
    total_gpu_hours,
    total_queued_s,
    total_ran_s,
)
from conductor.world import World

Cost = Mapping[str, Any]


def stage_cost(
    stage: Stage, seconds: float | None, jobs: Sequence[Job] | None, config: Config, world: World
) -> dict[str, Any]:
    """Return what a stage cost, as its row of a report has it (``queued_s``, ``jobs``, ...).

    Args:
        stage: which stage.
        seconds: for how long it was worked on.
        jobs: all jobs of the release; None where they cannot be told.
        config: how the release was asked for.
        world: where it ran.
    """
    of_stage = [job for job in jobs or () if job.stage is stage]
    known = jobs is not None
    return {
        "queued_s": total_queued_s(of_stage) if of_stage else None,
        "ran_s": total_ran_s(of_stage) if of_stage else None,
        "gpu_hours": _gpu_hours(stage, seconds, of_stage, config, world) if known else None,
        "jobs": [_job(job) for job in of_stage],
    }


def total_cost(stages: Sequence[Cost]) -> float | None:
    """Return the GPU hours of all stages; None where they are not known of one with tools."""
    hours = [each["gpu_hours"] for each in stages if each["name"] in SUBMITTED]
    return None if None in hours else round(sum(hours), 6)


def _gpu_hours(
    stage: Stage, seconds: float | None, jobs: Sequence[Job], config: Config, world: World
) -> float | None:
    if stage not in SUBMITTED:
        return None
    if jobs or world.cluster is not None:
        return total_gpu_hours(jobs)
    if not world.machine.accelerators:
        return None
    held = len(devices(world)) if stage is Stage.PTQ else config.engine.tensor_parallel_size
    return round(held * (seconds or 0.0) / SECONDS_AN_HOUR, 6)


def _job(job: Job) -> dict[str, Any]:
    return {
        "name": job.name,
        "job_id": job.job_id,
        "node": job.node,
        "state": job.state,
        "queued_s": job.queued_s,
        "ran_s": job.ran_s,
        "nodes": job.nodes,
        "gpus": job.gpus,
    }
