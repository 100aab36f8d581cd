"""The jobs of a release, as its events and the folders of its tasks tell.

What has ended is told by events; how far the others are, also while nobody works on the release, by
what conductor and job wrote beside each other. Nobody asks Slurm here. A fact that was not written,
or is not of its kind, is None.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from conductor.chain import STAGES, Stage
from conductor.event_log import parse, read_log
from conductor.executors.slurm.folders import JOBS, JobFolder
from conductor.history import moment_of

STAGE_EVENTS = ("stage_started", "stage_continued", "stage_finished")
SECONDS_AN_HOUR = 3600
LARGEST_NUMBER = 1e12
"""Seconds, since 1970 too; a larger number was not measured by a clock."""


class Standing(StrEnum):
    """How far a job is: an ended one may have its outcome read yet, or not."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job; times are UTC, ``queued_s`` and ``ran_s`` are known once it ended.

    ``directory`` is its task's and ``folder`` its own, relative to the run; the latter is None once
    it ended. ``state`` is Slurm's word for how it ended, ``reason`` what keeps it in the queue, as
    last seen. ``gpus`` are those of each of its ``nodes``.
    """

    name: str
    stage: Stage
    directory: str
    folder: str | None = None
    standing: Standing = Standing.QUEUED
    job_id: str | None = None
    node: str | None = None
    state: str | None = None
    reason: str | None = None
    submitted_at: datetime | None = None
    started_at: datetime | None = None
    queued_s: float | None = None
    ran_s: float | None = None
    nodes: int | None = None
    gpus: int | None = None

    @property
    def gpu_hours(self) -> float | None:
        """What the job held, whether it used it or not."""
        if self.ran_s is None or self.nodes is None or self.gpus is None:
            return None
        return self.gpus * self.nodes * self.ran_s / SECONDS_AN_HOUR

    def so_far(self, now: datetime) -> Job:
        """Return the job with the seconds that it has waited, and run, up to now."""
        if self.standing is Standing.ENDED:
            return self
        queued_s = _between(self.submitted_at, self.started_at or now)
        return replace(self, queued_s=queued_s, ran_s=_between(self.started_at, now))


def read_jobs(run_dir: Path) -> list[Job]:
    """Return the jobs of a release, the first submitted first.

    Raises:
        OSError: the log of events cannot be read.
    """
    events = [parse(line) for line in read_log(run_dir).sound]
    jobs, over = jobs_of(events), _stages_over(events)
    for folder in job_folders(run_dir):
        intent = folder.read("intent") or {}
        name, directory = intent.get("name"), folder.path.parent.parent.relative_to(run_dir)
        if isinstance(name, str) and (stage := _stage_of(str(directory))):
            job = jobs.get(name) or Job(name=name, stage=stage, directory=str(directory))
            if job.standing is Standing.ENDED:  # maybe before anybody saw it start
                jobs[name] = replace(
                    job, node=job.node or _text(folder.read("claim") or {}, "node")
                )
            else:
                own = str(folder.path.relative_to(run_dir))
                jobs[name] = _look_into(folder, replace(job, folder=own))
    return [_unless_refused(job, over) for job in jobs.values()]


def _stages_over(events: Iterable[Mapping[str, Any]]) -> set[Any]:
    """Return the stages that came to an end, and were not begun again since."""
    last = {e.get("stage"): e["event"] for e in events if e["event"] in STAGE_EVENTS}
    return {stage for stage, event in last.items() if event == "stage_finished"}


def _unless_refused(job: Job, over: Collection[Any]) -> Job:
    """Return a job as it is; one without a number that its stage gave up never was in a queue."""
    if job.standing is Standing.QUEUED and job.job_id is None and job.stage in over:
        return replace(job, standing=Standing.ENDED)
    return job


def job_folders(run_dir: Path) -> list[JobFolder]:
    """Return the folders of all jobs that were intended, in the order of the stages."""
    return [
        JobFolder(path.parent)
        for stage in STAGES
        for path in sorted((run_dir / "stages" / stage).rglob(f"{JOBS}/*/intent.json"))
    ]


def jobs_of(events: Iterable[Mapping[str, Any]]) -> dict[str, Job]:
    """Return the jobs that events tell of, by name."""
    jobs: dict[str, Job] = {}
    for event in events:
        name, directory = event.get("name"), event.get("directory")
        if event["event"] in CHANGES and isinstance(name, str) and isinstance(directory, str):
            stage = _stage_of(directory)
            if stage is not None:
                job = jobs.get(name) or Job(name=name, stage=stage, directory=directory)
                jobs[name] = CHANGES[event["event"]](job, event)
    return jobs


def total_gpu_hours(jobs: Iterable[Job]) -> float | None:
    """Return what all jobs held together; None where it is not known of one of them."""
    return _sum(job.gpu_hours for job in jobs)


def total_queued_s(jobs: Iterable[Job]) -> float | None:
    """Return for how long jobs waited, all together; None where it is not known of one."""
    return _sum(job.queued_s for job in jobs)


def total_ran_s(jobs: Iterable[Job]) -> float | None:
    """Return for how long jobs ran, all together; None where it is not known of one."""
    return _sum(job.ran_s for job in jobs)


def _submitted(job: Job, event: Mapping[str, Any]) -> Job:
    return replace(job, submitted_at=job.submitted_at or moment_of(event.get("at")))


def _started(job: Job, event: Mapping[str, Any]) -> Job:
    return replace(
        job,
        standing=Standing.RUNNING,
        job_id=_text(event, "job_id"),
        node=_text(event, "node"),
        started_at=moment_of(event.get("at")),
        queued_s=_number(event, "queued_s"),
    )


def _ended(job: Job, event: Mapping[str, Any]) -> Job:
    return replace(
        job,
        standing=Standing.ENDED,
        job_id=_text(event, "job_id") or job.job_id,
        state=_text(event, "state"),
        queued_s=_number(event, "queued_s"),
        ran_s=_number(event, "ran_s"),
        nodes=_whole(event, "nodes"),
        gpus=_whole(event, "gpus"),
    )


CHANGES = {"job_submitted": _submitted, "job_started": _started, "job_ended": _ended}
"""The events that tell of a job, by what they make of what was known."""


def _look_into(folder: JobFolder, job: Job) -> Job:
    """Return a job that has not ended, as far as is known, with what its folder tells."""
    submitted, claim = folder.read("submitted") or {}, folder.read("claim") or {}
    seen, ended = folder.read("seen") or {}, folder.read("ended")
    job = replace(
        job,
        job_id=_text(claim, "job_id") or _text(submitted, "job_id") or job.job_id,
        submitted_at=_moment(submitted) or job.submitted_at,
        reason=_text(seen, "reason"),
    )
    if claim:
        started_at = _moment(claim) or job.started_at
        job = replace(
            job,
            standing=Standing.RUNNING,
            node=_text(claim, "node"),
            started_at=started_at,
            reason=None,
        )
    outcome = folder.read("outcome")
    if ended is None and outcome is None:
        return job
    return _over(job, folder, ended or {}, outcome or {})


def _over(job: Job, folder: JobFolder, ended: Mapping[str, Any], outcome: Mapping[str, Any]) -> Job:
    """Return a job whose end no event told, as its conductor did not live to see it.

    What Slurm was not asked in time, the stamps in its folder tell.
    """
    queued_s, ran_s = _number(ended, "queued_s"), _number(ended, "ran_s")
    asked = (folder.read("intent") or {}).get("resources")
    asked = asked if isinstance(asked, Mapping) else {}
    return replace(
        job,
        standing=Standing.ENDED,
        state=_text(ended, "state"),
        reason=None,
        queued_s=_between(job.submitted_at, job.started_at) if queued_s is None else queued_s,
        ran_s=_between(job.started_at, _moment(outcome)) if ran_s is None else ran_s,
        nodes=_whole(asked, "nodes"),
        gpus=_whole(asked, "gpus"),
    )


def _stage_of(directory: str) -> Stage | None:
    """Return the stage that a directory of a run belongs to; None where it is none of a stage."""
    parts = directory.split("/")
    if len(parts) < 2 or parts[0] != "stages" or parts[1] not in STAGES:
        return None
    return Stage(parts[1])


def _moment(document: Mapping[str, Any]) -> datetime | None:
    at = _number(document, "at")
    try:
        return None if at is None else datetime.fromtimestamp(at, UTC)
    except (OverflowError, ValueError, OSError):
        return None


def _between(start: datetime | None, end: datetime | None) -> float | None:
    if start is None or end is None:
        return None
    return round(max(0.0, (end - start).total_seconds()), 1)


def _text(document: Mapping[str, Any], name: str) -> str | None:
    value = document.get(name)
    return value if isinstance(value, str) else None


def _number(document: Mapping[str, Any], name: str) -> float | None:
    value = document.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < LARGEST_NUMBER else None


def _whole(document: Mapping[str, Any], name: str) -> int | None:
    value = document.get(name)
    return value if type(value) is int and value >= 0 else None


def _sum(values: Iterator[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return round(total, 6)
