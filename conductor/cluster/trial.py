"""Try the nodes of a cluster with one small job for each set of resources that stages ask for.

The jobs are submitted as those of a release are, and tell what their node is like
(``conductor.cluster.probe``). That is held against what ``clusters.yaml`` says. Nothing is
left in the queue: a job that does not come to its end in time is cancelled.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conductor.cluster.check import Check, Site, failed, ok, warning
from conductor.cluster.description import GIB, Cluster, Resources
from conductor.compatibility import Device
from conductor.executors.local import Progress
from conductor.executors.slurm.commands import Queue, Refused, Unreachable
from conductor.executors.slurm.folders import JobFolder, Place
from conductor.executors.slurm.states import Means, has_ended, meaning
from conductor.executors.slurm.submission import NotSubmitted, submit

PROBE_MODULE = "conductor.cluster.probe"
POLL_S = 2.0
CLOCK_SLACK_S = 5.0
"""Difference of two clocks from which times of a node and of here no longer read together."""

MEMORY_SHARE = 0.95
"""Least part of a GPU's described memory that the driver must report; it keeps some for itself."""

ANSWER_LAG_S = 10.0
"""Time in which what a job wrote last is seen here, over shared storage."""

LOG_LINES = 3


@dataclass(kw_only=True)
class Trial:
    """One job that is tried: what it asks for, and what became of it; times in epoch seconds."""

    stages: str
    resources: Resources
    folder: JobFolder
    sent_at: float
    job_id: str = ""
    state: str = "submitted"
    answer: dict[str, Any] | None = None
    seen_at: float = 0.0
    problem: str | None = None
    ended_at: float | None = None

    @property
    def is_over(self) -> bool:
        """True when nothing more is to be expected of it."""
        return self.answer is not None or self.problem is not None


def try_nodes(
    site: Site,
    *,
    timeout_s: float,
    show: Progress,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Check]:
    """Submit the jobs, wait for them, and yield what their nodes are like.

    Args:
        site: the cluster; its workspace gets the files, which stay where a job did not answer.
        timeout_s: longest wait for all of them, time in the queue included.
        show: is told how many have answered, and what the others do.
        clock: UTC epoch seconds.
        sleep: waits seconds.
    """
    directory = site.workspace / "cluster-check" / secrets.token_hex(4)
    trials = []
    try:
        for stages, resources in site.distinct.items():
            place = _place(directory, stages)
            facts = {"cluster": site.cluster.name, "resources": resources.document()}
            folder = JobFolder.intend(place, {"task": "probe"}, facts, clock())
            trial = Trial(stages=stages, resources=resources, folder=folder, sent_at=clock())
            trials.append(trial)
            _submit(site, trial)
        _wait(site, trials, timeout_s=timeout_s, show=show, clock=clock, sleep=sleep)
    finally:
        _cancel(site, trials)
    for trial in trials:
        yield from _findings(site.cluster, trial)
    if all(trial.answer for trial in trials):
        shutil.rmtree(directory, ignore_errors=True)


def _place(directory: Path, stages: str) -> Place:
    stage = stages.partition(",")[0].replace(" ", "-")
    return Place(directory=directory / stage, run_dir=directory, stage=stage)


def _submit(site: Site, trial: Trial) -> None:
    try:
        trial.job_id = submit(
            trial.folder, site.cluster, trial.resources, PROBE_MODULE, site.environ
        )
    except NotSubmitted as refused:
        trial.problem = str(refused)


def _wait(
    site: Site,
    trials: list[Trial],
    *,
    timeout_s: float,
    show: Progress,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> None:
    queue = Queue(site.slurm, poll_s=POLL_S)
    give_up_at = clock() + timeout_s
    while open_trials := [trial for trial in trials if not trial.is_over]:
        for trial in open_trials:
            _look(trial, queue, clock())
        told = "; ".join(f"{trial.stages}: {trial.state}" for trial in open_trials)
        if clock() >= give_up_at:
            for trial in (each for each in open_trials if not each.is_over):
                trial.problem = f"no answer within {timeout_s:g} s; it is {trial.state}"
            return
        show(len(trials) - len(open_trials), len(trials), told)
        sleep(POLL_S)


def _look(trial: Trial, queue: Queue, now: float) -> None:
    """Note what is known of a job: its answer, or why there will be none."""
    if outcome := trial.folder.read("outcome"):
        trial.answer, trial.seen_at = outcome["answer"], now
        return
    try:
        found = queue.find(trial.folder.name)
    except Unreachable as error:
        trial.state = f"unknown ({error})"
        return
    if not found.reachable:
        trial.state = f"unknown ({found.trouble})"
        return
    row = found.row
    if row:
        trial.state = row.state + (f" ({row.reason})" if row.reason not in ("", "None") else "")
        if meaning(row.state, row.reason) in (Means.HELD, Means.IMPOSSIBLE):
            trial.problem = f"it would wait for ever: {trial.state}"
    if row is None or has_ended(row.state):
        trial.ended_at = trial.ended_at or now
        if now - trial.ended_at >= ANSWER_LAG_S:
            trial.problem = f"it ended without an answer: {trial.state}; {_log(trial)}"


def _log(trial: Trial) -> str:
    """Return the end of what the job printed; without it, the workspace is no shared storage."""
    logs = sorted(trial.folder.path.glob("*.out"))
    if not logs:
        return f"it printed nothing into {trial.folder.path}; do nodes see the workspace there?"
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(lines[-LOG_LINES:]) or f"{logs[-1]} is empty"


def _cancel(site: Site, trials: list[Trial]) -> None:
    left = [trial.job_id for trial in trials if trial.job_id and trial.answer is None]
    if left:
        try:
            site.slurm.cancel(left)
        except (Unreachable, Refused) as error:
            for trial in (each for each in trials if each.job_id in left):
                trial.problem = f"{trial.problem}; cancel job {trial.job_id} yourself ({error})"


def _findings(cluster: Cluster, trial: Trial) -> Iterator[Check]:
    if trial.answer is None:
        remedy = f"look into {trial.folder.path}; the same would become of a release's job"
        yield failed(f"job ({trial.stages})", trial.problem or "no answer", remedy)
        return
    for check in judge(cluster, trial.resources, trial.answer, (trial.sent_at, trial.seen_at)):
        yield Check(
            name=f"{check.name} ({trial.stages})",
            grade=check.grade,
            observed=check.observed,
            remedy=check.remedy,
        )


def judge(
    cluster: Cluster,
    resources: Resources,
    answer: Mapping[str, Any],
    between: tuple[float, float],
) -> Iterator[Check]:
    """Hold what a node tells of itself against what the cluster is described as.

    Args:
        cluster: as described.
        resources: what the job asked for.
        answer: what ``probe.describe_node`` returned there.
        between: when the job was submitted, and its answer seen, by our clock.
    """
    yield ok("job", f"ran on {answer['host']}")
    yield _same_version(answer["day0_version"])
    if answer["writable"]:
        yield ok("shared workspace", "the node writes there, and it is seen here")
    else:
        yield failed("shared workspace", "the node cannot write there", "correct its mode or mount")
    yield from _devices(cluster, resources, answer["machine"])
    yield _clock(answer["at"], between)
    yield _memory(resources, answer["memory_limit_bytes"])
    yield _cores(resources, answer["cores_allowed"], answer["machine"]["cores"])
    if answer["munge"] is None:
        yield ok("munge", "credentials are made and read on the node")
    else:
        grade = failed if resources.nodes > 1 else warning
        yield grade("munge", answer["munge"], "start munged; a server over several nodes needs it")


def _same_version(theirs: str) -> Check:
    ours = version("day0")
    if theirs == ours:
        return ok("day0", ours)
    return failed("day0", f"{theirs} on the node, {ours} here", "install the same on both")


def _devices(cluster: Cluster, resources: Resources, machine: Mapping[str, Any]) -> Iterator[Check]:
    found = machine["accelerators"]
    if cluster.device is Device.CPU:
        yield ok("device", f"cpu: {machine['processor']}")
        return
    if not found:
        remedy = "ask for gpus, or say device: cpu; nvidia-smi must work inside a job"
        yield failed("device", "nvidia-smi lists no GPU", remedy)
        return
    observed = f"{len(found)} x {found[0]['name']}"
    if len(found) < resources.gpus:
        yield failed("device", f"{observed}; gpus: {resources.gpus}", "correct gpus")
    elif len(found) > resources.gpus:
        remedy = "set ConstrainDevices in cgroup.conf; CUDA_VISIBLE_DEVICES alone keeps jobs apart"
        yield warning("device", f"{observed}; gpus: {resources.gpus}", remedy)
    else:
        yield ok("device", observed)
    yield _accelerator(cluster, found[0])


def _accelerator(cluster: Cluster, found: Mapping[str, Any]) -> Check:
    """Hold a GPU against its description; without one, say the description."""
    memory_gib = round((found["memory_bytes"] or 0) / GIB, 1)
    capability = ".".join(map(str, found["compute_capability"] or ()))
    stated = {"name": found["name"], "memory_gib": memory_gib, "compute_capability": capability}
    remedy = f"accelerator: {json.dumps(stated)}"
    described = cluster.accelerator
    if described is None:
        return warning("accelerator", "is not described; nothing can be refused ahead", remedy)
    differs = [
        described.name != found["name"],
        (described.memory_bytes or 0) * MEMORY_SHARE > (found["memory_bytes"] or 0),
        described.compute_capability not in (None, tuple(found["compute_capability"] or ())),
    ]
    if any(differs):
        return failed("accelerator", f"is another than described in {cluster.file}", remedy)
    return ok("accelerator", f"{described.name}, as described")


def _clock(at: float, between: tuple[float, float]) -> Check:
    behind_s, ahead_s = between[0] - at, at - between[1]
    if max(behind_s, ahead_s) > CLOCK_SLACK_S:
        seconds, way = (behind_s, "behind") if behind_s > 0 else (ahead_s, "ahead")
        observed = f"the node's is at least {seconds:.0f} s {way}"
        return warning("clock", observed, "synchronize the clocks; munge refuses beyond 300 s")
    return ok("clock", f"nothing seen beyond {CLOCK_SLACK_S:g} s")


def _memory(resources: Resources, limit_bytes: int | None) -> Check:
    if limit_bytes is None:
        remedy = "set ConstrainRAMSpace in cgroup.conf; without it, Slurm notes no OUT_OF_MEMORY"
        return warning("memory", "the job's memory is not limited by a control group", remedy)
    observed = f"limited to {limit_bytes / GIB:.1f} GiB"
    if resources.memory_gib and limit_bytes < resources.memory_gib * GIB * MEMORY_SHARE:
        asked = f"{observed}; memory_gib: {resources.memory_gib:g}"
        return failed("memory", asked, "ask who runs the cluster")
    if resources.memory_gib is None:
        remedy = "this is Slurm's default; say memory_gib if a stage needs more"
        return warning("memory", observed, remedy)
    return ok("memory", observed)


def _cores(resources: Resources, allowed: int, there: int) -> Check:
    observed = f"{allowed} of {there} cores"
    if resources.cpus is None:
        return warning("cores", observed, "this is Slurm's default; say cpus if a stage needs more")
    if allowed < resources.cpus:
        return failed("cores", f"{observed}; cpus: {resources.cpus}", "ask who runs the cluster")
    return ok("cores", observed)
