"""End the conductor of a release and cancel its jobs, so that nothing of it goes on.

A conductor that is interrupted leaves its jobs where they are. Here it is ended first, then, with
the lock of the run in hand, whatever Slurm still has of it is cancelled. Invariants:

* Only the very process that holds the run is signalled, and only jobs whose names this run wrote
  down before they were submitted are cancelled.
* A job is written down as cancelled once Slurm no longer has it, so that a resumed release submits
  another one only then.
* What Slurm could not be asked about is named, and never taken for ended.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from conductor.evidence.seal import reseal
from conductor.executors.processes import send, this_host
from conductor.executors.slurm.commands import Refused, Row, Slurm, Unreachable
from conductor.executors.slurm.folders import JobFolder
from conductor.executors.slurm.states import has_ended
from conductor.failure import Failure, unusable
from conductor.jobs import job_folders
from conductor.journal import Clock, Journal
from conductor.run_lock import Holder, Taken, hold, holder
from conductor.run_status import resume_command
from gates import FailureClass

GRACES_S = (0.0, 60.0, 30.0)
"""Seconds that the run is waited for: before any signal, after the first, after the second.

A conductor gives its servers ten seconds to end, and as many to be killed.
"""
COMMAND_TIMEOUT_S = 60.0
SUBMISSION_S = 75.0
"""Longer than a submission may take that somebody else has under way."""
GONE_S = 120.0
"""Seconds for jobs to be gone after they were cancelled; Slurm itself kills after 30."""
LOOK_S = 2.0
BY = "day0 stop"

Wait = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Halted:
    """What was ended: the process, and the jobs by their number, with their names."""

    run_dir: Path
    conductor: Holder | None
    jobs: Mapping[str, str]

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        who = self.conductor
        return {
            "run": str(self.run_dir),
            "conductor": who and {"pid": who.pid, "host": who.host, "since": who.since},
            "jobs": [{"job_id": number, "name": name} for number, name in self.jobs.items()],
            "resume": resume_command(self.run_dir),
        }

    @property
    def words(self) -> str:
        """What was ended, in one line."""
        if self.conductor is None and not self.jobs:
            return f"nothing to stop: nobody works on {self.run_dir}, and none of its jobs is alive"
        ended = [f"ended process {self.conductor.pid}"] if self.conductor else []
        if self.jobs:
            ended.append(f"cancelled {_listed(self.jobs)}")
        return f"{' and '.join(ended)}; resume with: {resume_command(self.run_dir)}"


def stop_run(
    run_dir: Path,
    *,
    slurm: Slurm,
    clock: Clock,
    sleep: Wait = time.sleep,
    graces_s: Sequence[float] = GRACES_S,
) -> Halted:
    """End whoever works on a release and cancel its jobs; return what that was.

    Args:
        run_dir: the directory of the release.
        slurm: asked only where the release has jobs that may be alive.
        clock: stamps what is recorded.
        sleep: waits between two looks at the queue.
        graces_s: as :data:`GRACES_S`.

    Raises:
        Failure: USER_CONFIG_ERROR when somebody works on it who cannot be ended from here; SYSTEMIC
            when that process does not end, or jobs may still run.
        OSError: the run directory cannot be read or written.
    """
    with _taken_over(run_dir, graces_s) as conductor:
        jobs = _cancel_jobs(run_dir, slurm=slurm, clock=clock, sleep=sleep)
    return Halted(run_dir=run_dir, conductor=conductor, jobs=jobs)


@contextmanager
def _taken_over(run_dir: Path, graces_s: Sequence[float]) -> Iterator[Holder | None]:
    """Hold the run, after ending the conductor that does; yield who that was."""
    ended: Holder | None = None
    with ExitStack() as stack:
        for grace_s in graces_s[:-1]:
            try:
                stack.enter_context(hold(run_dir, wait_s=grace_s))
                break
            except Taken as taken:
                ended = _interrupt(run_dir, taken)
        else:
            try:
                stack.enter_context(hold(run_dir, wait_s=graces_s[-1]))
            except Taken as taken:
                raise _does_not_end(taken) from None
        yield ended


def _interrupt(run_dir: Path, taken: Taken) -> Holder | None:
    """Ask the process that holds the run to end; a second time, it ends at once.

    Raises:
        Failure: it is not to be ended from here.
    """
    who = taken.who
    if who is None:  # about to say who it is, or about to end
        return None
    if who.host != this_host():
        raise unusable(
            f"{run_dir}: process {who.pid} works on it on host {who.host}, and can be ended only "
            f"there; log in to {who.host} and give the same command"
        )
    others = [each.name for each in run_dir.parent.iterdir() if each != run_dir and _has(each, who)]
    # One that works on a fleet may have a single release in progress, and others to come.
    fleets = run_dir.parent.parent.glob("fleets/*")
    others += [f"fleet {each.name}" for each in fleets if _has(each, who)]
    if others:
        raise unusable(
            f"{run_dir}: process {who.pid} works on it and on {len(others)} more ({others[0]}, "
            f"...: {who.command}); end it for all of them with: kill -INT {who.pid}, then give the "
            "same command for the jobs of this one"
        )
    send(who.pid, who.start_ticks, signal.SIGINT)
    return who


def _has(run_dir: Path, who: Holder) -> bool:
    also = holder(run_dir)
    return also is not None and (also.pid, also.host) == (who.pid, who.host)


def _does_not_end(taken: Taken) -> Failure:
    if taken.who is None:
        return taken
    return Failure(
        FailureClass.SYSTEMIC,
        f"process {taken.who.pid} was interrupted twice and does not end; end it with: kill -KILL "
        f"{taken.who.pid}, then give the same command again for its jobs",
    )


def _cancel_jobs(run_dir: Path, *, slurm: Slurm, clock: Clock, sleep: Wait) -> dict[str, str]:
    """Cancel the jobs of a run that are alive, wait until they are gone, and record it.

    Returns:
        Their names by number.
    """
    folders = {each.name: each for each in job_folders(run_dir) if not _is_over(each)}
    for folder in folders.values():
        _let_submission_end(folder, sleep)
    if not folders:
        return {}
    try:
        alive = _alive(slurm, folders)
        if not alive:
            return {}
        journal = Journal.open(run_dir, clock=clock)
        slurm.cancel([row.job_id for row in alive])
        left = _wait_until_gone(slurm, folders, sleep)
    except Unreachable as error:
        maybe = {each.job_id or each.name: each.name for each in folders.values()}
        raise Failure(
            FailureClass.SYSTEMIC,
            f"Slurm does not answer ({error}), and of {run_dir} {_listed(maybe)} may still run; "
            "give the same command again when `squeue` answers",
        ) from None
    except Refused as no:
        raise Failure(
            FailureClass.SYSTEMIC,
            f"Slurm refuses to cancel jobs of {run_dir} ({no}); see with `squeue --me` which of "
            "them go on, and cancel those with `scancel`",
        ) from None
    there = {row.job_id for row in left}
    gone = [row for row in alive if row.job_id not in there]
    _record(journal, folders, gone)
    if left:
        raise Failure(
            FailureClass.SYSTEMIC,
            f"{_listed({row.job_id: row.name for row in left})} of {run_dir} was cancelled "
            f"{GONE_S:.0f} s ago and is still there; ask the administrators of the cluster, and "
            "resume once `squeue` no longer shows it",
        )
    return {row.job_id: row.name for row in gone}


def _is_over(folder: JobFolder) -> bool:
    return folder.read("outcome") is not None or folder.read("ended") is not None


def _let_submission_end(folder: JobFolder, sleep: Wait) -> None:
    """Wait for a submission that its conductor did not outlive: the job may be about to appear."""
    with folder.nobody_submits(SUBMISSION_S, sleep) as alone:
        if not alone:
            raise Failure(
                FailureClass.SYSTEMIC,
                f"{folder.lock}: a submission has held it for {SUBMISSION_S:.0f} s; end what "
                f"`fuser -v {folder.lock}` names, then give the same command again",
            )


def _alive(slurm: Slurm, folders: Mapping[str, JobFolder]) -> list[Row]:
    """Return what the queue shows of these jobs, less what has ended."""
    return [row for row in slurm.queue() if row.name in folders and not has_ended(row.state)]


def _wait_until_gone(slurm: Slurm, folders: Mapping[str, JobFolder], sleep: Wait) -> list[Row]:
    """Return the jobs that are there after all the time that they have."""
    for _ in range(round(GONE_S / LOOK_S)):
        left = _alive(slurm, folders)
        if not left:
            return []
        sleep(LOOK_S)
    return _alive(slurm, folders)


def _record(journal: Journal, folders: Mapping[str, JobFolder], gone: Sequence[Row]) -> None:
    """Write down of each job that it was cancelled, beside it and in the journal."""
    if not gone:
        return
    now = journal.clock()
    ended = {"state": "CANCELLED", "reason": None, "exit_code": None, "by": BY}
    for row in gone:
        folder, times = folders[row.name], _times(row, now)
        folder.write("ended", {**ended, **times, "at": now.timestamp()})
        asked = (folder.read("intent") or {}).get("resources") or {}
        journal.record(
            "job_ended",
            name=row.name,
            directory=folder.path.parent.parent,
            job_id=row.job_id,
            state="CANCELLED",
            **times,
            nodes=asked.get("nodes"),
            gpus=asked.get("gpus"),
        )
    journal.record("jobs_cancelled", job_ids=[row.job_id for row in gone], by=BY)
    places = [str(folders[row.name].path.relative_to(journal.run_dir)) for row in gone]
    reseal(journal.run_dir, places, clock=journal.clock)


def _times(row: Row, now: datetime) -> dict[str, float | None]:
    """Return for how long a job waited and ran, by the controller's clock up to its end."""
    until = now.timestamp()
    if row.submitted_at is None:
        return {"queued_s": None, "ran_s": None}
    if row.started_at is None:
        return {"queued_s": round(max(0.0, until - row.submitted_at), 1), "ran_s": 0.0}
    return {
        "queued_s": round(max(0.0, row.started_at - row.submitted_at), 1),
        "ran_s": round(max(0.0, until - row.started_at), 1),
    }


def _listed(jobs: Mapping[str, str]) -> str:
    return f"job{'s' if len(jobs) > 1 else ''} {', '.join(jobs)}"
