"""Ask Slurm through its commands: what is queued, what has ended, and whether it answers.

Invariants:

* Every command runs under a timeout.
* Silence is never taken for the answer that there is no job. A controller that is down, one that
  says no, missing accounting and a missing command are told apart without reading their words.
* What is printed is parsed strictly: a line without its fields is an error, not a line less.
* One ``squeue`` serves everybody who waits, and one ``sacct`` all jobs that it no longer shows.
"""

from __future__ import annotations

import math
import os
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from conductor.executors.slurm.states import FINISHED, has_ended, state_name
from conductor.failure import Failure
from gates import FailureClass

Runner = Callable[..., "subprocess.CompletedProcess[str]"]

HISTORY_DAYS = 30
"""How far back accounting is asked: a release may be resumed weeks after its jobs ended."""

_FIELD, _RECORD = "\x1f", "\x1e"
"""Between fields, and after the last one: jobs of the same user may have any name, lines too."""

_QUEUE_FIELDS = (
    *("JobID", "State", "Reason", "NodeList", "SubmitTime", "StartTime", "EndTime", "RestartCnt"),
    *("exit_code", "Name"),
)
_HISTORY_FIELDS = (
    *("JobIDRaw", "State", "Reason", "NodeList", "Submit", "Start", "End", "ExitCode", "JobName"),
)
_HISTORY_STATES = (*FINISHED, "PENDING", "RUNNING", "SUSPENDED", "REQUEUED", "RESIZING")

_NO_TIME = {"N/A", "Unknown", "None"}
_NO_NODES = {"", "None assigned"}

# They would change what is listed, and how: SQUEUE_PARTITION hides jobs.
_OWN_DEFAULTS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_")
_LISTING = {"TZ": "UTC", "SLURM_TIME_FORMAT": "%Y-%m-%dT%H:%M:%S"}
_SCRIPT = "#!/bin/sh\n"
"""What every command may read: sbatch takes it where no file is named, the others read nothing."""
_LONGEST_SHOWN = 200


class Unreachable(Exception):
    """Slurm did not answer in time, or could not be reached: nothing is known, wait."""


class NotInstalled(Unreachable):
    """The command is not on PATH: waiting will hardly help."""


class Refused(Exception):
    """Slurm answered and said no; the message is what it said."""


class Unreadable(Failure):
    """A command of Slurm printed something else than it was asked for."""

    def __init__(self, command: str, problem: str) -> None:
        """Name the command and what it printed."""
        super().__init__(
            FailureClass.SYSTEMIC,
            f"{command} printed {problem}; compare `{command} --version` with the versions of "
            "Slurm that day0 knows (22.05 to 25.05)",
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One job as squeue or sacct shows it; times are UTC epoch seconds.

    A job that never got a node has no ``started_at``, and one that has not ended no ``ended_at``
    and no ``exit_code`` (``status:signal``): what Slurm expects is not kept. ``cancelled_by`` is a
    user id; only accounting has it, and not any more once the controller was started again.
    """

    job_id: str
    name: str
    state: str
    reason: str
    nodes: str
    submitted_at: float | None
    started_at: float | None
    ended_at: float | None
    restarts: int
    exit_code: str | None
    cancelled_by: str | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where a job is, as of ``asked_at`` on the queue's clock.

    ``reachable`` without ``row``: Slurm has no such job, neither queued nor, where it is
    ``accounted``, ended. Not ``reachable``: ``row`` is what was last seen, and ``trouble`` says
    what Slurm's command said.
    """

    row: Row | None
    asked_at: float
    reachable: bool
    accounted: bool
    trouble: str = ""


class Slurm:
    """The commands of Slurm, each under a timeout.

    Every method raises ``Unreachable`` where Slurm does not answer, ``NotInstalled`` where the
    command is missing, and ``Refused`` where Slurm said no.
    """

    def __init__(
        self, *, timeout_s: float, environ: Mapping[str, str], run: Runner = subprocess.run
    ) -> None:
        """Keep how commands are run, less the environment's own defaults for listings."""
        self._timeout_s = timeout_s
        self._environ = {
            name: value for name, value in environ.items() if not name.startswith(_OWN_DEFAULTS)
        }
        self._run = run

    def queue(self) -> list[Row]:
        """Return all of this user's jobs that squeue shows, in every state.

        Ended jobs are among them until the controller forgets them (``MinJobAge``).

        Raises:
            Unreadable: a line does not have its fields.
        """
        columns = ",".join(f"{field}:{_FIELD}" for field in _QUEUE_FIELDS[:-1])
        asked = f"--Format={columns},{_QUEUE_FIELDS[-1]}:{_RECORD}"
        command = ["squeue", "--noheader", "--all", "--me", "--states=all", asked]
        *records, rest = self._answered(command, **_LISTING).stdout.split(f"{_RECORD}\n")
        if rest.strip():
            raise Unreadable("squeue", f"a line without its end: {_shown(rest)}")
        return [_queued(_fields("squeue", record, _QUEUE_FIELDS)) for record in records]

    def history(self, names: Collection[str]) -> list[Row]:
        """Return what accounting has of this user's jobs with these names, newest last.

        A job that was requeued has a row for each time; ``restarts`` counts those before. It
        takes 1 to 4 s until accounting knows of a change.

        Raises:
            Unreachable: there is no accounting, or it did not answer.
            Unreadable: a line does not have its fields.
        """
        # Without states, sacct leaves out a job that was cancelled before it could have run.
        command = [
            *("sacct", "--noheader", "--allocations", "--duplicates", "--parsable2"),
            *(f"--delimiter={_FIELD}", f"--user={os.getuid()}", f"--name={','.join(names)}"),
            *(f"--starttime=now-{HISTORY_DAYS}days", "--endtime=now"),
            f"--state={','.join(_HISTORY_STATES)}",
            f"--format={','.join(_HISTORY_FIELDS)}",
        ]
        done = self._carry_out(command, **_LISTING)
        if done.returncode:
            raise Unreachable(_said(done) or f"sacct ended with exit status {done.returncode}")
        lines = done.stdout.splitlines()
        rows = [_recorded(_fields("sacct", line, _HISTORY_FIELDS)) for line in lines]
        return list(_numbered(sorted(rows, key=lambda row: row.submitted_at or 0.0)))

    def cancel(self, job_ids: Collection[str]) -> None:
        """Cancel jobs; one that has ended, or is unknown, is no error."""
        if job_ids:
            self._answered(["scancel", *job_ids])

    def answers(self) -> bool:
        """Tell whether a controller answers.

        Raises:
            NotInstalled: there is no scontrol.
        """
        try:
            return self._carry_out(["scontrol", "ping"]).returncode == 0
        except NotInstalled:
            raise
        except Unreachable:
            return False

    def test_only(self, script_options: Sequence[str]) -> str:
        """Return what sbatch says of a job that it does not submit.

        Args:
            script_options: options of sbatch; the path of a script may come last.
        """
        return _said(self._answered(["sbatch", "--test-only", *script_options]))

    def _answered(self, command: Sequence[str], **environ: str) -> subprocess.CompletedProcess[str]:
        """Carry out a command of the controller; its exit code does not say why it failed."""
        done = self._carry_out(command, **environ)
        if done.returncode:
            said = _said(done) or f"{command[0]} ended with exit status {done.returncode}"
            raise Refused(said) if self.answers() else Unreachable(said)
        return done

    def _carry_out(
        self, command: Sequence[str], **environ: str
    ) -> subprocess.CompletedProcess[str]:
        try:
            return self._run(
                [*command],
                env=self._environ | environ,
                input=_SCRIPT,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=self._timeout_s,
                check=False,
            )
        except FileNotFoundError as error:
            raise NotInstalled(
                f"{command[0]} is not on PATH: run day0 where Slurm's commands are, such as a "
                "login node, or load the module that brings them"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise Unreachable(
                f"{command[0]} did not answer within {self._timeout_s:g} s"
            ) from error
        except OSError as error:
            raise Unreachable(f"{command[0]} could not be run: {error}") from error


class Queue:
    """What is known of this user's jobs; one for a process, to be asked from any thread.

    ``calls`` counts the times that squeue was asked.
    """

    def __init__(
        self, slurm: Slurm, *, poll_s: float, ticks: Callable[[], float] = time.monotonic
    ) -> None:
        """Know nothing yet; ``poll_s`` lies at least between two looks that nobody forced."""
        self.calls = 0
        self._slurm, self._poll_s, self._ticks = slurm, poll_s, ticks
        self._looking, self._wanting = threading.Lock(), threading.Lock()
        self._wanted: set[str] = set()
        self._looked_for: set[str] = set()
        self._looked_at = -math.inf
        self._rows: dict[str, Row] = {}
        self._ended: dict[str, Row] = {}
        self._trouble = ""
        self._reachable, self._accounted = False, True

    def find(self, name: str, *, fresh: bool = False) -> Found:
        """Return where the job of this name is.

        A job that was seen to have ended is remembered. Of several jobs with one name, the one
        that has not ended counts, then the newest.

        Args:
            name: of the job; the name of only one.
            fresh: look at the queue after this call, however short ago somebody has.

        Raises:
            Unreadable: squeue or sacct printed something else than it was asked for.
        """
        asked_at = self._ticks()
        with self._wanting:
            self._wanted.add(name)
        with self._looking:
            if name not in self._ended and self._is_old(name, asked_at, fresh=fresh):
                self._look()
            return Found(
                row=self._ended.get(name) or self._rows.get(name),
                asked_at=self._looked_at,
                reachable=self._reachable or name in self._ended,
                accounted=self._accounted,
                trouble=self._trouble,
            )

    def _is_old(self, name: str, asked_at: float, *, fresh: bool) -> bool:
        """Tell whether the last look is none for whoever asked for ``name`` at ``asked_at``."""
        if fresh:
            return self._looked_at < asked_at
        known = name in self._looked_for or name in self._rows
        return not known or asked_at - self._looked_at >= self._poll_s

    def _look(self) -> None:
        self._looked_at = self._ticks()
        with self._wanting:
            self._looked_for = self._wanted - self._ended.keys()
        self.calls += 1
        self._reachable, self._trouble = False, ""
        try:
            self._rows = _by_name(self._slurm.queue())
            self._reachable = True
        except (Unreachable, Refused) as error:
            self._trouble = str(error)
            return
        self._remember(self._rows)
        if gone := self._looked_for - self._rows.keys():
            self._look_back(sorted(gone))

    def _look_back(self, names: Collection[str]) -> None:
        try:
            self._remember(_by_name(self._slurm.history(names)))
            self._accounted = True
        except Unreachable as error:
            self._accounted, self._trouble = False, str(error)

    def _remember(self, rows: Mapping[str, Row]) -> None:
        """Keep what has ended; accounting that says otherwise of a job out of the queue lags."""
        self._ended |= {
            name: row
            for name, row in rows.items()
            if name in self._looked_for and has_ended(row.state)
        }


def _by_name(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the row that counts for each name, see ``Queue.find``."""
    ordered = sorted(rows, key=lambda row: (not has_ended(row.state), row.submitted_at or 0.0))
    return {row.name: row for row in ordered}


def _fields(command: str, line: str, names: Sequence[str]) -> dict[str, str]:
    """Return the fields of a line by name; the last may hold anything."""
    values = line.split(_FIELD, len(names) - 1)
    if len(values) != len(names):
        raise Unreadable(
            command, f"a line with {len(values)} fields instead of {len(names)}: {_shown(line)}"
        )
    return dict(zip(names, values, strict=True))


def _queued(fields: Mapping[str, str]) -> Row:
    ended, nodes = has_ended(fields["State"]), fields["NodeList"]
    status = _count("squeue", fields["exit_code"])
    return Row(
        job_id=fields["JobID"],
        name=fields["Name"],
        state=fields["State"],
        reason=fields["Reason"],
        nodes=nodes,
        submitted_at=_time("squeue", fields["SubmitTime"]),
        started_at=_time("squeue", fields["StartTime"]) if nodes else None,
        ended_at=_time("squeue", fields["EndTime"]) if ended else None,
        restarts=_count("squeue", fields["RestartCnt"]),
        exit_code=f"{status >> 8}:{status & 0x7F}" if ended else None,
        cancelled_by=None,
    )


def _recorded(fields: Mapping[str, str]) -> Row:
    nodes = "" if fields["NodeList"] in _NO_NODES else fields["NodeList"]
    ended_at = _time("sacct", fields["End"])
    return Row(
        job_id=fields["JobIDRaw"],
        name=fields["JobName"],
        state=state_name(fields["State"]),
        reason=fields["Reason"],
        nodes=nodes,
        submitted_at=_time("sacct", fields["Submit"]),
        started_at=_time("sacct", fields["Start"]) if nodes else None,
        ended_at=ended_at,
        restarts=0,
        exit_code=None if ended_at is None else fields["ExitCode"],
        cancelled_by=fields["State"].partition(" by ")[2] or None,
    )


def _numbered(rows: Iterable[Row]) -> Iterable[Row]:
    seen: defaultdict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        yield replace(row, restarts=seen[row.name, row.job_id])
        seen[row.name, row.job_id] += 1


def _time(command: str, text: str) -> float | None:
    if text in _NO_TIME:
        return None
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise Unreadable(command, f"no time: {_shown(text)}") from error


def _count(command: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise Unreadable(command, f"no number: {_shown(text)}")
    return int(text)


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command said, errors first."""
    return "\n".join(text.strip() for text in (done.stderr, done.stdout) if text.strip())


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}...")
