"""The memory of a release: a run directory with an append-only event log and a current manifest.

Every transition is appended to ``events.jsonl`` before ``manifest.json`` is replaced, so the
manifest never claims more than the events can prove, and whoever reads the events again comes to
the state that the journal had. Both are on disk before the next stage starts.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from threading import RLock
from types import MappingProxyType
from typing import Any

from conductor.chain import Stage, State
from conductor.digests import Digests
from conductor.event_log import NAME, EventLog
from conductor.failure import Failure
from conductor.files import sync_directory, write_json, write_text
from conductor.history import VERSION, History, Scalar, StageRecord, apply, chained
from conductor.history import timestamp as timestamp
from conductor.redaction import redact_document
from conductor.repair import MANIFEST, attempt_dir, keep_up, look
from gates import FailureClass

Clock = Callable[[], datetime]
Ticks = Callable[[], float]


def name_run(
    model: str, recipe: str, started: datetime, suffix: str, chosen: str | None = None
) -> str:
    """Name a run by what and when it was: ``demo-int8-20260102-030405-1f2e``.

    A ``chosen`` name stands in place of model and recipe.
    """
    words = chosen or f"{Path(model).name or model}-{Path(recipe).stem}"
    slug = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-.")[:60]
    return f"{slug}-{started:%Y%m%d-%H%M%S}-{suffix}"


def read_history(run_dir: Path) -> History:
    """Return the state of a run without writing anything, also while a conductor works on it.

    Damaged lines of the log are passed over and told in ``unknown``.

    Raises:
        Failure: USER_CONFIG_ERROR when it is no run directory, or a newer day0 wrote it.
    """
    found = look(run_dir, digests=None, at=datetime.now(UTC))
    found.history.unknown += [
        f"{NAME}: line {damaged.number} is no event ({damaged.problem}); day0 repair sets it aside"
        for damaged in found.log.damaged
    ]
    return found.history


@dataclass(kw_only=True)
class Journal:
    """Record the transitions of one release under ``run_dir``; whoever does holds the run's lock.

    ``clock`` stamps events, ``ticks`` (monotonic seconds) measures between them.
    """

    run_dir: Path
    clock: Clock
    ticks: Ticks
    history: History
    log: EventLog
    opened: float
    _lock: RLock = field(default_factory=RLock, repr=False)

    @classmethod
    def create(
        cls,
        run_dir: Path,
        *,
        clock: Clock,
        model: str,
        recipe: str,
        files: Mapping[str, str] = MappingProxyType({}),
        ticks: Ticks = time.monotonic,
    ) -> Journal:
        """Make the run directory, with ``files`` and its first event in it; it appears whole.

        Raises:
            OSError: the directory exists already or cannot be written.
        """
        if run_dir.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(run_dir))
        unfinished = run_dir.with_name(f".{run_dir.name}.new")
        journal = cls(
            run_dir=unfinished,
            clock=clock,
            ticks=ticks,
            history=History(),
            log=EventLog(run_dir=unfinished),
            opened=ticks(),
        )
        try:
            (unfinished / "verdicts").mkdir(parents=True)
            for name, text in files.items():
                write_text(unfinished / name, text)
            journal.record(
                "release_started",
                version=VERSION,
                run_id=run_dir.name,
                model=model,
                recipe=recipe,
                **_conductor(),
            )
            unfinished.rename(run_dir)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync_directory(run_dir.parent)
        journal.run_dir, journal.log = run_dir, EventLog(run_dir=run_dir)
        return journal

    @classmethod
    def open(cls, run_dir: Path, *, clock: Clock, ticks: Ticks = time.monotonic) -> Journal:
        """Take up the journal of a release where it was left; record nothing yet.

        A last line that was cut off is dropped, a manifest that is missing, damaged or behind is
        written again, and a run of version 1 or without events is upgraded from its files.

        Raises:
            Failure: USER_CONFIG_ERROR when it is no run directory, a newer day0 wrote it, or lines
                of its log are damaged; SYSTEMIC when it cannot be written.
        """
        opened = ticks()
        found = look(run_dir, digests=Digests(None), at=clock())
        if found.log.damaged:
            first, count = found.log.damaged[0], len(found.log.damaged)
            raise Failure(
                FailureClass.USER_CONFIG_ERROR,
                f"{run_dir / NAME}: line {first.number} is no event ({first.problem})"
                + (f", and {count - 1} more are not" if count > 1 else "")
                + f"; day0 repair {run_dir} sets them aside and says what that leaves unknown",
            )
        try:
            log = keep_up(run_dir, found)
        except OSError as error:
            raise Failure(
                FailureClass.SYSTEMIC,
                f"{run_dir}: cannot be written ({error.strerror}); free some space or make the "
                "directory writable, then resume",
            ) from None
        return cls(
            run_dir=run_dir,
            clock=clock,
            ticks=ticks,
            history=found.history,
            log=log,
            opened=opened,
        )

    @property
    def run_id(self) -> str:
        """The name that the run was given when it began."""
        return self.history.run_id

    @property
    def model(self) -> str:
        """The model as it was asked for."""
        return self.history.model

    @property
    def recipe(self) -> str:
        """The recipe as it was asked for."""
        return self.history.recipe

    @property
    def started_at(self) -> datetime:
        """When the release began."""
        assert self.history.started_at is not None
        return self.history.started_at

    @property
    def outcome(self) -> Mapping[str, Any]:
        """Decision and exit code; empty before closeout."""
        return self.history.outcome

    @property
    def stages(self) -> Mapping[Stage, StageRecord]:
        """What is known of every stage."""
        return self.history.stages

    @property
    def states(self) -> Mapping[Stage, State]:
        """The state of every stage, as the chain wants it."""
        return self.history.states

    def worked_s(self) -> float:
        """Return how many seconds conductors have worked on the release, up to now."""
        return self.history.worked_s + max(0.0, self._elapsed_s() - self.history.elapsed_s)

    def stage_dir(self, stage: Stage) -> Path:
        """Return the directory of all attempts at ``stage``."""
        return self.run_dir / "stages" / stage

    def attempt_dir(self, stage: Stage) -> Path:
        """Return the directory of the stage's current attempt, made if need be.

        The first attempt owns ``stages/<stage>``; a retry gets ``stages/<stage>/attempt-N``, so
        that no file of an earlier attempt can be taken for a result of this one.
        """
        directory = attempt_dir(self.run_dir, stage, self.stages[stage].attempts)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def log_of(self, stage: Stage) -> Path | None:
        """Return the log of the stage's latest attempt: its worker's, else a server's, or None."""
        if self.stages[stage].attempts == 0:
            return None
        logs = sorted(self.attempt_dir(stage).rglob("*.log"), reverse=True)
        return next((log for log in logs if log.name == "stdout.log"), next(iter(logs), None))

    def resume(self) -> None:
        """Record that another conductor goes on with the release."""
        self.record("release_resumed", **_conductor())

    def start(self, stage: Stage, inputs: Mapping[str, Scalar] | None = None) -> None:
        """Record that a new attempt at ``stage`` begins, and what it works from.

        Raises:
            ValueError: the stage is done; it has to be invalidated first.
        """
        with self._lock:
            record = self.stages[stage]
            if record.state is State.DONE:
                raise ValueError(f"{stage} is done; invalidate it before it is started again")
            self.record("stage_started", stage=stage, attempt=record.attempts + 1, inputs=inputs)

    def go_on(self, stage: Stage) -> None:
        """Record that the attempt at ``stage`` that was cut off goes on in its directory.

        Raises:
            ValueError: no attempt was cut off.
        """
        with self._lock:
            record = self.stages[stage]
            if record.state is not State.RUNNING:
                raise ValueError(f"{stage} is {record.state}; only a running stage goes on")
            self.record("stage_continued", stage=stage, attempt=record.attempts)

    def finish(
        self,
        stage: Stage,
        state: State,
        *,
        outputs: Mapping[str, Mapping[str, Any]] | None = None,
        detail: str = "",
        failure_class: FailureClass | None = None,
        gate: str | None = None,
    ) -> None:
        """Record how the latest attempt at ``stage`` ended; it counts even if the disk is full.

        ``gate`` names the one that said no.
        """
        self.record(
            "stage_finished",
            stage=stage,
            attempt=self.stages[stage].attempts,
            state=state,
            detail=detail,
            failure_class=failure_class,
            gate=gate,
            outputs=outputs,
        )

    def invalidate(self, stage: Stage, reason: str) -> None:
        """Record that ``stage`` has to run again, from the beginning."""
        self.record("stage_invalidated", stage=stage, reason=reason)

    def reopen(self, reason: str) -> None:
        """Record that a release that failed is to be tried again: failed stages, and closeout."""
        self.record("release_reopened", reason=reason)

    def close(self, *, decision: str | None, exit_code: int, report: str | None = None) -> None:
        """Record the decision (or that there is none), with the digest of the report on it."""
        self.record("release_finished", decision=decision, exit_code=exit_code, report=report)

    def record(self, event: str, **facts: Any) -> None:
        """Append one event, then replace the manifest; threads may record at the same time.

        Paths below the run directory are written relative to it, and secrets not at all.

        Raises:
            OSError: the disk is full or gone. The event counts all the same, and is written before
                the next one.
            ValueError: a fact is not what the event's field takes; nothing was recorded.
        """
        with self._lock:
            transition = {
                "at": timestamp(self.clock()),
                "event": event,
                "elapsed_s": self._elapsed_s(),
                **redact_document(self._plain(facts)),
            }
            document = chained(self.history, transition)
            apply(self.history, document)
            self.log.append(document)
            write_json(self.run_dir / MANIFEST, self.history.document())

    def _elapsed_s(self) -> float:
        return round(max(0.0, self.ticks() - self.opened), 3)

    def _plain(self, value: Any) -> Any:
        """Return ``value`` as JSON carries it, so that the state is what a reader will see."""
        match value:
            case Path():
                inside = value.is_relative_to(self.run_dir)
                return str(value.relative_to(self.run_dir) if inside else value)
            case Mapping():
                return {str(name): self._plain(each) for name, each in value.items()}
            case list() | tuple():
                return [self._plain(each) for each in value]
            case str():
                return str(value)
            case None | bool() | int():
                return value
            case float() if abs(value) < float("inf"):
                return value
            case _:
                return str(value)


def _conductor() -> dict[str, Any]:
    return {"day0_version": version("day0"), "pid": os.getpid()}
