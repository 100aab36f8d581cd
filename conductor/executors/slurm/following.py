"""Bring a task to its end by jobs: submit, wait, continue, and never the same thing twice.

What was submitted is found again under its name, whoever submitted it, and whatever Slurm says, the
outcome that the job wrote is the truth. A controller that is down is waited for; a job that ended
without an outcome is judged by the table of :mod:`conductor.executors.slurm.states`.

A conductor that is interrupted leaves its jobs where they are: they go on, and are found again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_fixed

from conductor.cluster.description import Cluster, Resources
from conductor.executors.local import Note, Progress
from conductor.executors.processes import remove_records, remove_unfinished
from conductor.executors.slurm.commands import (
    Found,
    Queue,
    Refused,
    Row,
    Slurm,
    Unreachable,
)
from conductor.executors.slurm.folders import JobFolder, Place
from conductor.executors.slurm.slots import JobSlots
from conductor.executors.slurm.states import ENDINGS, Means, has_ended, meaning
from conductor.executors.slurm.submission import NotSubmitted, in_one_line, submit
from conductor.failure import Failure, Stalled, Stopped
from gates import FailureClass

LOOK_S = 1.0
"""Seconds between two looks at a job's own files, which cost nobody anything."""

SETTLE_POLLS = 6
"""Polls for which accounting, and the caches of shared storage, may lag behind a job: a minute."""

HELD_POLLS = 2
"""Polls for which a job must be held, or impossible, before that is believed."""

LOCK_SLACK_S = 15.0
COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "srun", "flock", "timeout")

ENDED = frozenset(
    {
        *(Means.COMPLETED, Means.FAILED, Means.TIMEOUT, Means.OUT_OF_MEMORY),
        *(Means.NODE_LOST, Means.PREEMPTED, Means.CANCELLED),
    }
)
FILES_IN_TIME = ("submitted", "claim", "outcome")
COMPLETED, CANCELLED, LOST, REFUSED = "COMPLETED", "CANCELLED", "LOST", "REFUSED"
"""What ``ended.json`` says of a job with an outcome, of one that we cancelled, of one that Slurm
knows nothing of any more, and of one that it would not have; the last two are words of our own."""

Slots = Callable[[Callable[[], None]], AbstractContextManager[None]]
"""Yields a context in which one job may be submitted and run; while it is waited for, what it is
given is called, and raises to give up."""


def without_bound(still_wanted: Callable[[], None]) -> AbstractContextManager[None]:
    """Let any number of jobs be there."""
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How a conductor talks to a cluster; many releases may share one."""

    cluster: Cluster
    slurm: Slurm
    queue: Queue
    environ: Mapping[str, str]
    slots: Slots = without_bound
    clock: Callable[[], float] = time.time
    ticks: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def connect(
    cluster: Cluster, environ: Mapping[str, str], max_jobs: int | None = None
) -> Connection:
    """Return a connection to ``cluster``; nothing is asked yet.

    ``max_jobs`` bounds the jobs at a time besides what the cluster says of itself.

    Raises:
        Failure: SYSTEMIC when this machine has no Slurm to submit with.
    """
    path = environ.get("PATH")
    if missing := [each for each in COMMANDS if shutil.which(each, path=path) is None]:
        raise Failure(
            FailureClass.SYSTEMIC,
            f"executor: slurm needs {', '.join(missing)} on PATH, which this machine does not "
            "have; start the release on a login node of the cluster",
        )
    conf = environ.get("SLURM_CONF")
    if conf and not Path(conf).is_file():
        raise Failure(
            FailureClass.SYSTEMIC,
            f"SLURM_CONF: {conf} is no file, and every command of Slurm would wait for it; correct "
            "the variable, or unset it",
        )
    bounds = [each for each in (max_jobs, cluster.max_jobs) if each is not None]
    slurm = Slurm(timeout_s=cluster.command_timeout_s, environ=environ)
    return Connection(
        cluster=cluster,
        slurm=slurm,
        queue=Queue(slurm, poll_s=cluster.poll_s),
        environ=environ,
        slots=JobSlots(min(bounds)).one if bounds else without_bound,
    )


@dataclass(frozen=True, kw_only=True)
class Errand:
    """One task to be brought to its end.

    ``module`` is run on the node with the path of the job's folder. A task that ``goes_on`` is
    continued after its walltime where it was. ``noted`` tells how many notes of the job of a name
    have been passed on to ``note``. ``still_wanted`` is called all the time, and raises to have the
    job cancelled.
    """

    place: Place
    task: Mapping[str, Any]
    resources: Resources
    goes_on: bool
    module: str
    note: Note
    noted: Callable[[str], int]
    progress: Progress
    still_wanted: Callable[[], None]


def carry_out(errand: Errand, connection: Connection) -> dict[str, Any]:
    """Return the outcome of a task, submitting jobs for it until there is one.

    Raises:
        Failure: the task failed, a job ended without an outcome, or Slurm will not have it.
        Stopped: the job was cancelled by somebody, or is held; the release can be resumed.
    """

    def wait_for_slot() -> None:
        errand.still_wanted()
        errand.progress(0, 0, "waiting: as many jobs are there as there may be")

    with connection.slots(wait_for_slot):
        job = _left_behind(errand, connection)
        while True:
            job = job or _intend(errand, connection)
            ended = job.bring_to_its_end()
            remove_unfinished(errand.place.directory)
            remove_records(errand.place.directory)
            outcome = job.folder.read("outcome")
            if outcome is not None:
                return _accept(outcome, errand, connection.cluster)
            job.judge(ended)
            job = None


def _left_behind(errand: Errand, connection: Connection) -> _Job | None:
    """Return the job that somebody submitted, or was about to; None where a new one is to be made.

    One that ended badly has been told of and is over, and so is one that was about something else.
    """
    intended = [each for each in JobFolder.all_of(errand.place.directory) if each.is_intended]
    if not intended:
        return None
    job = _Job(folder=intended[-1], errand=errand, connection=connection, is_new=False)
    if not job.folder.is_for(errand.task):
        job.supersede()
        return None
    is_good = (job.folder.read("outcome") or {}).get("status") == "ok"
    return job if is_good or job.folder.read("ended") is None else None


def _intend(errand: Errand, connection: Connection) -> _Job:
    facts = {
        "cluster": connection.cluster.name,
        "stage": errand.place.stage,
        "resources": errand.resources.document(),
    }
    folder = JobFolder.intend(errand.place, errand.task, facts, connection.clock())
    return _Job(folder=folder, errand=errand, connection=connection, is_new=True)


def _accept(outcome: Mapping[str, Any], errand: Errand, cluster: Cluster) -> dict[str, Any]:
    """Return an outcome that is ok.

    Raises:
        Failure: it is not.
    """
    if outcome["status"] == "ok":
        return dict(outcome)
    said = outcome["message"]
    if outcome.get("stalled"):
        raise Stalled(said)
    failure_class, memory = FailureClass(outcome["failure_class"]), errand.resources.memory_gib
    if failure_class is FailureClass.OUT_OF_MEMORY and memory is not None:
        # A job sees the process that was killed, and not what the job had asked for.
        first, *rest = said.split("\n")
        remedy = f"raise memory_gib of {errand.place.stage} in {cluster.file} if that is too little"
        said = "\n".join([f"{first}; its job had {memory:g} GiB, {remedy}", *rest])
    raise Failure(failure_class, said)


@dataclass(kw_only=True)
class _Job:
    """One job, from its intent to its end."""

    folder: JobFolder
    errand: Errand
    connection: Connection
    is_new: bool
    start_is_noted: bool = False
    refusals: int = 0
    seen: Mapping[str, str] = field(default_factory=dict)

    def bring_to_its_end(self) -> dict[str, Any]:
        """Submit the job if nobody has, wait for its end, and return what ``ended.json`` says."""
        ended = self.folder.read("ended")
        if ended is not None:
            return ended
        try:
            row = None if self.is_new else self._find()
            if row is None and not self._has_left_traces():
                row = self._submit()
            elif row is None:
                return self._end(None, LOST)
            return self._wait(row)
        except KeyboardInterrupt as stop:
            if isinstance(stop, Stopped):
                raise
            raise Stopped(
                f"stopped on request; {self._words()} goes on without us: `day0 resume` finds it "
                "again, `day0 stop` cancels it"
            ) from None
        except Failure:
            raise
        except Exception:
            self.abandon()
            raise

    @property
    def _settle_s(self) -> float:
        return SETTLE_POLLS * self.connection.cluster.poll_s

    def _has_left_traces(self) -> bool:
        """True when Slurm had the job, as far as its folder tells."""
        return any(self.folder.read(name) for name in FILES_IN_TIME)

    @cached_property
    def _continued(self) -> int:
        """How many jobs of the task ran into their walltime before this one was submitted."""
        folders = JobFolder.all_of(self.errand.place.directory)
        ends = [each.read("ended") for each in folders if each.path != self.folder.path]
        return [_means(each) for each in ends if each].count(Means.TIMEOUT)

    def _show(self, done: int, total: int, doing: str) -> None:
        """Show how far the task is, and how often it was continued."""
        if self.errand.goes_on and self._continued:
            limit = self.connection.cluster.continuations
            doing = f"continued after its walltime, {self._continued} of {limit}: {doing}"
        self.errand.progress(done, total, doing)

    def _words(self) -> str:
        number = self.folder.job_id
        return f"job {number} ({self.folder.name})" if number else f"job {self.folder.name}"

    # Finding and submitting

    def _find(self) -> Row | None:
        """Look for the job until it is found, or known to be nowhere."""
        self._wait_for_submission()
        settled_at = self.connection.ticks() + self._settle_s
        while True:
            found = self.connection.queue.find(self.folder.name, fresh=True)
            if found.row or self.folder.read("outcome"):
                return found.row
            if found.reachable and self.connection.ticks() >= settled_at:
                return None
            self._wait_for(found)

    def _wait_for_submission(self) -> None:
        """Wait for an ``sbatch`` that outlived its conductor."""
        timeout_s = self.connection.cluster.command_timeout_s + LOCK_SLACK_S
        with self.folder.nobody_submits(timeout_s, self._pause) as alone:
            if not alone:
                raise Failure(
                    FailureClass.SYSTEMIC,
                    f"{self.folder.lock}: a submission holds it for longer than sbatch may take; "
                    "see with `fuser` who, end it, then resume",
                )

    def _wait_for(self, found: Found) -> None:
        what = "accounting to catch up" if found.reachable else "Slurm's controller, which is down"
        self._show(0, 0, f"waiting for {what}")
        self._pause(LOOK_S if found.reachable else self.connection.cluster.poll_s)

    def _submit(self) -> Row | None:
        """Submit the job; return its row where Slurm had it all the same."""
        self._show(0, 0, "submitting")
        self.errand.note(
            "job_submitted",
            name=self.folder.name,
            directory=self.errand.place.directory,
            stage=self.errand.place.stage,
            resources=self.errand.resources.document(),
        )
        tries = Retrying(
            retry=retry_if_exception_type((Unreachable, Refused)),
            stop=self._is_refused_for_good,
            wait=wait_fixed(self.connection.cluster.poll_s),
            sleep=self._pause,
            reraise=True,
        )
        try:
            return tries(self._submit_once)
        except Refused as no:
            raise self._refused(str(no)) from None

    def _is_refused_for_good(self, state: RetryCallState) -> bool:
        """Count refusals: a controller that was just started refuses what its nodes could do."""
        error = state.outcome and state.outcome.exception()
        self.refusals += isinstance(error, Refused)
        return self.refusals >= SETTLE_POLLS

    def _submit_once(self) -> Row | None:
        connection = self.connection
        self.errand.still_wanted()
        try:
            job_id = submit(
                self.folder,
                connection.cluster,
                self.errand.resources,
                self.errand.module,
                connection.environ,
            )
        except NotSubmitted as refusal:
            return self._after(str(refusal))
        self._note_number(job_id)
        return None

    def _note_number(self, job_id: str) -> None:
        self.folder.write("submitted", {"job_id": job_id, "at": self.connection.clock()})

    def _after(self, refusal: str) -> Row | None:
        """Find out what a submission without a number came to.

        Raises:
            Unreachable: it is to be tried again.
            Refused: Slurm will not have such a job, now at least.
        """
        row = self.connection.queue.find(self.folder.name, fresh=True).row
        if row and meaning(row.state, row.reason) is Means.IMPOSSIBLE:
            self._show(0, 0, f"waiting to submit: {in_one_line(refusal)}")
            raise Refused(refusal)
        if row:
            self._note_number(row.job_id)
            return row
        if not self.connection.slurm.answers():
            self._show(0, 0, "waiting for Slurm's controller, which is down")
            raise Unreachable(refusal)
        scripts = sorted(self.folder.path.glob(".submission_file_*.sh"))
        self._show(0, 0, f"waiting to submit: {in_one_line(refusal)}")
        self.connection.slurm.test_only([str(each) for each in scripts[-1:]])
        raise Unreachable(refusal)

    def _refused(self, said: str) -> Failure:
        """Write down that there is no such job; return what to raise."""
        cluster = self.connection.cluster
        self._end(None, REFUSED)
        return Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"Slurm refuses the job of {self.errand.place.stage}: {in_one_line(said)}; correct the "
            f"resources of cluster {cluster.name} in {cluster.file} (`day0 cluster check` tries "
            "them), then resume",
        )

    # Waiting

    def _wait(self, row: Row | None) -> dict[str, Any]:
        """Wait until the job has an outcome, or Slurm says that it ended without one."""
        trouble: tuple[Means, float] | None = None
        gone_since: float | None = None
        while True:
            self.errand.still_wanted()
            if self.folder.read("outcome") is not None:
                return self._end(self.connection.queue.find(self.folder.name).row, COMPLETED)
            found = self.connection.queue.find(self.folder.name)
            row = found.row or row
            now = self.connection.ticks()
            means = meaning(row.state, row.reason) if row else Means.WAITING
            self._tell(found, row, means)
            if means in (Means.HELD, Means.IMPOSSIBLE):
                trouble = trouble if trouble and trouble[0] is means else (means, now)
                if row and now - trouble[1] >= HELD_POLLS * self.connection.cluster.poll_s:
                    self._refuse(row, means)
            else:
                trouble = None
            over = found.reachable and (found.row is None or means in ENDED)
            gone_since = (gone_since or now) if over else None
            if gone_since is not None and now - gone_since >= self._settle_s:
                return self._end(row, row.state if row and means in ENDED else LOST)
            self._pause(LOOK_S)

    def _tell(self, found: Found, row: Row | None, means: Means) -> None:
        """Show how far the job is, and record when it began to run."""
        if row and (seen := {"state": row.state, "reason": row.reason}) != self.seen:
            self.seen = seen
            self.folder.write("seen", seen)
        claim = self.folder.read("claim")
        if claim is not None and not self.start_is_noted:
            self.start_is_noted = True
            self.errand.note(
                "job_started",
                name=self.folder.name,
                directory=self.errand.place.directory,
                job_id=claim["job_id"],
                node=claim["node"],
                queued_s=self._times(row, is_over=False)[0],
            )
        if not found.reachable:
            self._show(0, 0, "Slurm's controller is down; waiting for it, or for the job")
        elif means is Means.RUNNING:
            told = self.folder.read("progress") or {"done": 0, "total": 0, "doing": "starting"}
            self._show(told["done"], told["total"], told["doing"])
        elif row is None or means in (Means.WAITING, Means.HELD, Means.IMPOSSIBLE):
            why = f" ({row.reason})" if row and row.reason not in ("", "None") else ""
            self._show(0, 0, f"queued{why}")

    def _refuse(self, row: Row, means: Means) -> None:
        """End the waiting for a job that does not start by itself."""
        words = ENDINGS[means].words
        said = f"{self._words()} of {self.errand.place.stage}: {row.reason}"
        if means is Means.HELD:
            raise Stopped(f"{said}; {words} (scontrol release {row.job_id})")
        self.abandon()
        raise Failure(
            ENDINGS[means].failure_class or FailureClass.USER_CONFIG_ERROR,
            f"{said}; {words}; the job was cancelled, and its resources are in "
            f"{self.connection.cluster.file}",
        )

    # Ends

    def _end(self, row: Row | None, state: str) -> dict[str, Any]:
        """Write down how the job ended, and pass on what it noted."""
        outcome = self.folder.read("outcome")
        name = self.folder.name
        for fact in (outcome or {}).get("notes", [])[self.errand.noted(name) :]:
            self.errand.note(fact["event"], **fact["facts"], job=name)
        queued_s, ran_s = self._times(row, is_over=True)
        resources = self.errand.resources
        self.errand.note(
            "job_ended",
            name=self.folder.name,
            directory=self.errand.place.directory,
            job_id=self.folder.job_id or (row and row.job_id),
            state=state,
            queued_s=queued_s,
            ran_s=ran_s,
            nodes=resources.nodes,
            gpus=resources.gpus,
        )
        ended = {
            "state": state,
            "reason": row.reason if row else "",
            "exit_code": row.exit_code if row else None,
            "by": row and (row.cancelled_by or self._canceller(row)),
            "queued_s": queued_s,
            "ran_s": ran_s,
            "at": self.connection.clock(),
        }
        self.folder.write("ended", ended)
        return ended

    def _canceller(self, row: Row) -> str | None:
        """Return who cancelled the job, which accounting alone knows."""
        if meaning(row.state, row.reason) is not Means.CANCELLED:
            return None
        with suppress(Unreachable):
            for past in self.connection.slurm.history([row.name]):
                if past.job_id == row.job_id and past.cancelled_by is not None:
                    return past.cancelled_by
        return None

    def _times(self, row: Row | None, *, is_over: bool) -> tuple[float | None, float | None]:
        """Return the seconds for which the job was queued, and for which it has run.

        By the controller's clock where it tells, else by the stamps in the folder.
        """
        stamps = [(self.folder.read(name) or {}).get("at") for name in FILES_IN_TIME]
        submitted, started, ended = stamps
        if row:
            submitted = row.submitted_at or submitted
            started, ended = row.started_at or started, row.ended_at or ended
        if started is None:
            if not is_over:
                return None, None
            end = ended or self.connection.clock()
            return 0.0 if submitted is None else _seconds(submitted, end), 0.0
        queued_s = None if submitted is None else _seconds(submitted, started)
        return queued_s, _seconds(started, ended) if ended else None

    def judge(self, ended: Mapping[str, Any]) -> None:
        """Say what follows from a job that ended without an outcome; return to have another one.

        Raises:
            Failure: that is a failure of the attempt.
            Stopped: somebody cancelled it.
        """
        means = _means(ended)
        ending = ENDINGS[means]
        stage, cluster = self.errand.place.stage, self.connection.cluster
        words = ""
        if means is Means.TIMEOUT and not self.errand.goes_on:
            words = "its work cannot be continued where it was; "
        elif means is Means.TIMEOUT:
            if self._continued < cluster.continuations:
                return
            words = f"it was continued {cluster.continuations} times, as often as allowed; "
        said = f"{self._words()} of {stage} ended with {ended['state']}: {words}{ending.words}"
        if means is Means.CANCELLED:
            by = f" by user id {ended['by']}" if ended["by"] else ""
            raise Stopped(f"{said.replace('ended with CANCELLED', f'was cancelled{by}')}")
        log = next(iter(sorted(self.folder.path.glob("*.out"))), self.folder.path)
        raise Failure(ending.failure_class or FailureClass.UNKNOWN, f"{said}; its log is {log}")

    def abandon(self) -> None:
        """Cancel the job, where there is one, and write down that it is over."""
        if self.folder.read("ended") is not None:
            return
        row = self.connection.queue.find(self.folder.name, fresh=True).row
        number = self.folder.job_id or (row and row.job_id)
        try:
            if number:
                self.connection.slurm.cancel([number])
        except Unreachable:
            self.errand.note("job_left", name=self.folder.name, job_id=number)
        self._end(row, CANCELLED)

    def supersede(self) -> None:
        """Cancel the job and wait for its end, so that another may work in its directory."""
        if self.folder.read("ended") is None:
            self._wait_for_submission()
        self.abandon()
        while True:
            found = self.connection.queue.find(self.folder.name)
            if found.reachable:
                if found.row is None or has_ended(found.row.state):
                    return
                with suppress(Unreachable):
                    self.connection.slurm.cancel([found.row.job_id])
            self._show(0, 0, f"waiting for the end of {self._words()}")
            self._pause(self.connection.cluster.poll_s)

    def _pause(self, seconds: float) -> None:
        self.errand.still_wanted()
        self.connection.sleep(seconds)


def _seconds(start: float, end: float) -> float:
    return round(max(0.0, end - start), 1)


def _means(ended: Mapping[str, Any]) -> Means:
    return (
        Means.FAILED
        if ended["state"] in (LOST, REFUSED)
        else meaning(ended["state"], ended["reason"])
    )
