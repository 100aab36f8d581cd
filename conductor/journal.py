"""The memory of a release: a run directory with an append-only event log and a current manifest.

Every transition is appended to ``events.jsonl`` before ``manifest.json`` is replaced, so the
manifest never claims more than the events can prove. Both are on disk before the next stage starts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from conductor.chain import STAGES, Stage, State
from conductor.files import write_json

MANIFEST_VERSION = 2

Clock = Callable[[], datetime]


def name_run(model: str, recipe: str, started: datetime, suffix: str) -> str:
    """Name a run by what and when it was: ``demo-int8-20260102-030405-1f2e``."""
    words = f"{Path(model).name or model}-{Path(recipe).stem}".lower()
    slug = re.sub(r"[^a-z0-9.]+", "-", words).strip("-.")[:60]
    return f"{slug}-{started:%Y%m%d-%H%M%S}-{suffix}"


def timestamp(moment: datetime) -> str:
    """Render a UTC moment as ISO 8601 with milliseconds."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(kw_only=True)
class StageRecord:
    """What the journal knows of one stage; times are UTC."""

    state: State = State.PENDING
    attempts: int = 0
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def seconds(self) -> float | None:
        """Wall time from the first start to the end, in seconds; None while unfinished."""
        if self.started_at is None or self.finished_at is None:
            return None
        return (self.finished_at - self.started_at).total_seconds()


@dataclass(kw_only=True)
class Journal:
    """Record the transitions of one release under ``run_dir``."""

    run_dir: Path
    clock: Clock
    model: str
    recipe: str
    started_at: datetime
    stages: dict[Stage, StageRecord] = field(
        default_factory=lambda: {stage: StageRecord() for stage in STAGES}
    )
    outcome: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, run_dir: Path, *, clock: Clock, model: str, recipe: str) -> Journal:
        """Make the run directory and write its first event.

        Raises:
            OSError: the directory exists already or cannot be written.
        """
        run_dir.mkdir(parents=True)
        (run_dir / "verdicts").mkdir()
        journal = cls(run_dir=run_dir, clock=clock, model=model, recipe=recipe, started_at=clock())
        journal.record("release_started", model=model, recipe=recipe, pid=os.getpid())
        return journal

    @property
    def run_id(self) -> str:
        """The name of the run, which is the name of its directory."""
        return self.run_dir.name

    @property
    def states(self) -> Mapping[Stage, State]:
        """The state of every stage, as the chain wants it."""
        return {stage: record.state for stage, record in self.stages.items()}

    def attempt_dir(self, stage: Stage) -> Path:
        """Return the directory of the stage's current attempt, made if need be.

        The first attempt owns ``stages/<stage>``; a retry gets ``stages/<stage>/attempt-N``, so
        that no file of an earlier attempt can be taken for a result of this one.
        """
        directory = self.run_dir / "stages" / stage
        attempt = self.stages[stage].attempts
        if attempt > 1:
            directory /= f"attempt-{attempt}"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def log_of(self, stage: Stage) -> Path | None:
        """Return the log of the stage's latest attempt: its worker's, else a server's, or None."""
        if self.stages[stage].attempts == 0:
            return None
        logs = sorted(self.attempt_dir(stage).rglob("*.log"), reverse=True)
        return next((log for log in logs if log.name == "stdout.log"), next(iter(logs), None))

    def start(self, stage: Stage) -> None:
        """Record that an attempt at ``stage`` begins."""
        record = self.stages[stage]
        record.state = State.RUNNING
        record.attempts += 1
        record.started_at = record.started_at or self.clock()
        self.record("stage_started", stage=stage, attempt=record.attempts)

    def finish(self, stage: Stage, state: State, **facts: Any) -> None:
        """Record how the latest attempt at ``stage`` ended; it counts even if the disk is full."""
        record = self.stages[stage]
        record.state = state
        record.finished_at = self.clock()
        self.record("stage_finished", stage=stage, state=state, attempt=record.attempts, **facts)

    def close(self, **outcome: Any) -> None:
        """Record the decision (or that there is none) and end the journal."""
        self.outcome = outcome
        self.record("release_finished", **outcome)

    def record(self, event: str, **facts: Any) -> None:
        """Append one event, then replace the manifest.

        Raises:
            OSError: the disk is full or gone.
        """
        line = json.dumps({"at": timestamp(self.clock()), "event": event, **facts}, default=str)
        with (self.run_dir / "events.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        write_json(self.run_dir / "manifest.json", self.manifest())

    def manifest(self) -> dict[str, Any]:
        """The current state as a JSON document (schema ``manifest.json``)."""
        return {
            "version": MANIFEST_VERSION,
            "run_id": self.run_id,
            "model": self.model,
            "recipe": self.recipe,
            "started_at": timestamp(self.started_at),
            "stages": {
                stage: {
                    "state": record.state,
                    "attempts": record.attempts,
                    "started_at": record.started_at and timestamp(record.started_at),
                    "finished_at": record.finished_at and timestamp(record.finished_at),
                }
                for stage, record in self.stages.items()
            },
            **self.outcome,
        }
