"""What happened in a release, as a fold over its events: pure.

The state of a release is nothing but its events, applied in order. Whoever reads them again comes
to the same state as the conductor that wrote them, so a manifest can be thrown away and rebuilt.
Invariants:

* An event is applied whole or, if a field is wrong, not at all (:class:`EventError`). Events with
  unknown names change nothing: a later version may have written them.
* Durations are differences of ``elapsed_s``, monotonic seconds within one session (one conductor's
  time with the journal). ``at`` is a stamp for people and decides nothing.
* A number of attempts never decreases, so that no attempt is given the directory of another.
* Every event carries the digest of the one before it (:func:`chained`), so that none can be
  changed, dropped or put in between without the ``head`` of the chain becoming another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from conductor.chain import STAGES, Stage, State
from gates import Decision

VERSION = 2

Scalar = str | int | float | bool | None
Event = Mapping[str, Any]

LONGEST_SESSION_S = 1e9
"""About 30 years; a larger number of seconds was not measured by a clock."""

MOST_ATTEMPTS = 100_000


class EventError(ValueError):
    """An event that cannot be applied; the message names the field."""


def timestamp(moment: datetime) -> str:
    """Render a UTC moment as ISO 8601 with milliseconds."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment_of(stamp: object) -> datetime | None:
    """Return the UTC moment that ``timestamp`` rendered; None of anything else."""
    if not isinstance(stamp, str):
        return None
    try:
        return datetime.fromisoformat(stamp).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


@dataclass(kw_only=True)
class StageRecord:
    """What is known of one stage; times are UTC.

    ``started_at`` is the first attempt's, ``finished_at`` the latest's. ``seconds`` is the time
    worked on it in all attempts, up to the latest event; None where none was counted.
    ``interruptions`` counts how often an attempt was cut off and went on. ``inputs`` are what the
    attempt worked from by dotted field, ``outputs`` its files as ``{path: {sha256, bytes}}``,
    relative to the run directory; None where they were not recorded. ``failures`` counts how often
    it failed since it was last in order, ``gate`` names the one that said no, if one did, and
    ``troubles`` say in a sentence each what became of attempts that did not end well.
    """

    state: State = State.PENDING
    attempts: int = 0
    interruptions: int = 0
    started_at: datetime | None = None
    finished_at: datetime | None = None
    seconds: float | None = None
    inputs: dict[str, Scalar] | None = None
    outputs: dict[str, dict[str, Any]] | None = None
    failure_class: str | None = None
    failures: int = 0
    gate: str | None = None
    detail: str = ""
    troubles: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The record as a JSON mapping."""
        return {
            "state": self.state,
            "attempts": self.attempts,
            "interruptions": self.interruptions,
            "started_at": self.started_at and timestamp(self.started_at),
            "finished_at": self.finished_at and timestamp(self.finished_at),
            "seconds": self.seconds,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "failure_class": self.failure_class,
            "failures": self.failures,
            "gate": self.gate,
            "detail": self.detail,
            "troubles": self.troubles,
        }


@dataclass(kw_only=True)
class History:
    """The state of a release.

    ``outcome`` holds ``decision`` and ``exit_code`` once there is one, and the digest of the
    ``report`` where it was recorded. ``sessions`` counts the conductors that worked on it,
    ``worked_s`` their seconds. ``changes`` are the differences that a person accepted, ``unknown``
    says in sentences what could not be established.
    ``elapsed_s`` and ``at_work`` belong to the session of the latest event: its clock, and the
    stages whose attempts go on in it. ``events`` counts them all, and ``head`` is the digest of the
    latest.
    """

    run_id: str = ""
    model: str = ""
    recipe: str = ""
    started_at: datetime | None = None
    stages: dict[Stage, StageRecord] = field(
        default_factory=lambda: {stage: StageRecord() for stage in STAGES}
    )
    outcome: dict[str, Any] = field(default_factory=dict)
    sessions: int = 0
    worked_s: float = 0.0
    changes: list[dict[str, Any]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    begun: bool = False
    elapsed_s: float = 0.0
    at_work: set[Stage] = field(default_factory=set)
    events: int = 0
    head: str | None = None

    @property
    def states(self) -> dict[Stage, State]:
        """The state of every stage, as the chain wants it."""
        return {stage: record.state for stage, record in self.stages.items()}

    def document(self) -> dict[str, Any]:
        """The state as a JSON document (schema ``manifest.json``)."""
        return {
            "version": VERSION,
            "run_id": self.run_id,
            "model": self.model,
            "recipe": self.recipe,
            "started_at": self.started_at and timestamp(self.started_at),
            "sessions": self.sessions,
            "worked_s": self.worked_s,
            "stages": {stage: record.document() for stage, record in self.stages.items()},
            "changes": self.changes,
            "unknown": self.unknown,
            "events": self.events,
            "head": self.head,
            **self.outcome,
        }


def render(event: Event) -> bytes:
    """Return ``event`` as the line that it is in the log, without the newline."""
    return json.dumps(event, allow_nan=False).encode()


def line_digest(line: bytes) -> str:
    """Return the SHA-256 of a line of the log in hexadecimal."""
    return hashlib.sha256(line).hexdigest()


def chained(history: History, event: Event) -> dict[str, Any]:
    """Return ``event`` as the next link of the chain: with the digest of the line before it."""
    return {**event, "previous": history.head}


def replay(events: Iterable[Event]) -> History:
    """Return the state that ``events`` lead to.

    Raises:
        EventError: an event cannot be applied.
    """
    history = History()
    for event in events:
        apply(history, event)
    return history


def apply(history: History, event: Event) -> None:
    """Change ``history`` by one event.

    Raises:
        EventError: a field of a known event is missing or wrong; ``history`` is then unchanged.
    """
    name, elapsed_s, head = _text(event, "event"), _elapsed(event), line_digest(render(event))
    before = frozenset(history.at_work)
    if name in HANDLERS:
        HANDLERS[name](history, event)
    if elapsed_s is not None:
        _count(history, elapsed_s, before, opens=name in SESSION_EVENTS)
    history.events += 1
    history.head = head


def _count(history: History, elapsed_s: float, before: frozenset[Stage], *, opens: bool) -> None:
    """Add the time since the previous event of the same session.

    A smaller ``elapsed_s`` than the last means another session, even where it did not say so.
    """
    if opens:
        history.worked_s = round(history.worked_s + elapsed_s, 3)
    elif elapsed_s < history.elapsed_s:
        history.at_work -= before
    else:
        step = elapsed_s - history.elapsed_s
        history.worked_s = round(history.worked_s + step, 3)
        for stage in before:
            record = history.stages[stage]
            record.seconds = round((record.seconds or 0.0) + step, 3)
    history.elapsed_s = elapsed_s


def _release_started(history: History, event: Event) -> None:
    if history.begun:
        raise EventError("event: the release started before")
    model, recipe = _text(event, "model"), _text(event, "recipe")
    run_id = _text(event, "run_id") if "run_id" in event else ""
    history.run_id, history.model, history.recipe = run_id, model, recipe
    history.started_at = moment_of(event.get("at"))
    history.begun = True
    history.sessions += 1


def _release_resumed(history: History, event: Event) -> None:
    history.sessions += 1
    history.at_work.clear()


def _stage_started(history: History, event: Event) -> None:
    stage, attempt, inputs = _stage(event), _attempt(event), _inputs(event)
    record = history.stages[stage]
    record.state = State.RUNNING
    record.attempts = max(record.attempts, attempt)
    record.started_at = record.started_at or moment_of(event.get("at"))
    record.finished_at = None
    record.inputs, record.outputs = inputs, None
    record.failure_class, record.gate, record.detail = None, None, ""
    history.at_work.add(stage)


def _stage_continued(history: History, event: Event) -> None:
    stage, attempt = _stage(event), _attempt(event)
    record = history.stages[stage]
    record.state = State.RUNNING
    record.attempts = max(record.attempts, attempt)
    record.interruptions += 1
    record.troubles.append(f"attempt {attempt} was cut short and went on")
    record.finished_at = None
    history.at_work.add(stage)


def _stage_finished(history: History, event: Event) -> None:
    stage, attempt, state = _stage(event), _attempt(event), _state(event)
    if state not in {State.DONE, State.FAILED}:
        raise EventError(f"state: a stage does not finish {state}")
    detail, outputs = _text(event, "detail"), _outputs(event)
    failure_class, gate = _text_or_none(event, "failure_class"), _text_or_none(event, "gate")
    record = history.stages[stage]
    record.state = state
    record.attempts = max(record.attempts, attempt)
    record.finished_at = moment_of(event.get("at"))
    record.outputs = outputs
    record.failure_class, record.gate, record.detail = failure_class, gate, detail
    record.failures = record.failures + 1 if state is State.FAILED else 0
    if state is State.FAILED:
        first_line = detail.partition("\n")[0]
        record.troubles.append(f"attempt {attempt} failed ({failure_class}): {first_line}")
    history.at_work.discard(stage)


def _stage_invalidated(history: History, event: Event) -> None:
    stage, reason = _stage(event), _text(event, "reason")
    record = history.stages[stage]
    record.troubles.append(f"attempt {record.attempts} was taken back: {reason}")
    _back_to_pending(history, stage, reason)


def _back_to_pending(history: History, stage: Stage, reason: str) -> None:
    record = history.stages[stage]
    record.state = State.PENDING
    record.finished_at = None
    record.inputs = record.outputs = record.gate = None
    record.failures = 0
    record.failure_class, record.detail = None, reason
    history.at_work.discard(stage)


def _drift_accepted(history: History, event: Event) -> None:
    changes = event.get("changes")
    if not isinstance(changes, list) or not all(_is_change(each) for each in changes):
        raise EventError("changes: must be a list of field, was, now and invalidates")
    history.changes += changes


def _release_reopened(history: History, event: Event) -> None:
    reason = _text(event, "reason")
    for stage, record in history.stages.items():
        if record.state is State.FAILED or stage is Stage.CLOSEOUT:
            _back_to_pending(history, stage, reason)
    history.outcome = {}


def _release_finished(history: History, event: Event) -> None:
    history.outcome = _outcome(event)


def _state_established(history: History, event: Event) -> None:
    """Take over what was found on disk; stages that it does not name stay as they are."""
    found = event.get("stages")
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise EventError("stages: must be a mapping of stages to mappings")
    stages = {_stage({"stage": name}): _established(each) for name, each in found.items()}
    unknown = event.get("unknown", [])
    if not isinstance(unknown, list) or not all(isinstance(each, str) for each in unknown):
        raise EventError("unknown: must be a list of sentences")
    named = {name: _text(event, name) for name in ("run_id", "model", "recipe") if name in event}
    outcome = _outcome(event) if "decision" in event else None
    for stage, there in stages.items():
        before = history.stages[stage]
        there.attempts = max(there.attempts, before.attempts)
        there.interruptions, there.troubles = before.interruptions, before.troubles
        there.started_at, there.seconds = before.started_at, before.seconds
        history.stages[stage] = there
        history.at_work.discard(stage)
    history.unknown += unknown
    history.run_id = named.get("run_id", history.run_id)
    history.model = named.get("model", history.model)
    history.recipe = named.get("recipe", history.recipe)
    history.started_at = moment_of(event.get("started_at")) or history.started_at
    history.outcome = history.outcome if outcome is None else outcome
    history.begun = True


def _established(facts: Event) -> StageRecord:
    """Return the record of a stage as it was found; with it goes what was not recorded so far."""
    return StageRecord(
        state=_state(facts),
        attempts=_attempts(facts),
        inputs=_inputs(facts),
        outputs=_outputs(facts),
        failure_class=_text_or_none(facts, "failure_class"),
        gate=_text_or_none(facts, "gate"),
        detail=_text_or_none(facts, "detail") or "",
    )


HANDLERS: Mapping[str, Callable[[History, Event], None]] = {
    "release_started": _release_started,
    "release_resumed": _release_resumed,
    "stage_started": _stage_started,
    "stage_continued": _stage_continued,
    "stage_finished": _stage_finished,
    "stage_invalidated": _stage_invalidated,
    "drift_accepted": _drift_accepted,
    "release_reopened": _release_reopened,
    "release_finished": _release_finished,
    "state_established": _state_established,
}
"""The events that change the state; all others are kept for people and tools."""

SESSION_EVENTS = frozenset({"release_started", "release_resumed"})


def _text(event: Event, name: str) -> str:
    value = event.get(name)
    if not isinstance(value, str):
        raise EventError(f"{name}: must be a text, is {_short(value)}")
    return value


def _text_or_none(event: Event, name: str) -> str | None:
    return None if event.get(name) is None else _text(event, name)


def _count_of(event: Event, name: str, least: int) -> int:
    value = event.get(name)
    if type(value) is not int or not least <= value <= MOST_ATTEMPTS:
        raise EventError(
            f"{name}: must be a whole number from {least} to {MOST_ATTEMPTS:,}, is {_short(value)}"
        )
    return value


def _attempt(event: Event) -> int:
    return _count_of(event, "attempt", least=1)


def _attempts(event: Event) -> int:
    return _count_of(event, "attempts", least=0)


def _stage(event: Event) -> Stage:
    name = _text(event, "stage")
    if name not in STAGES:
        raise EventError(f"stage: {_short(name)} is not a stage; they are {', '.join(STAGES)}")
    return Stage(name)


def _state(event: Event) -> State:
    name = _text(event, "state")
    if name not in tuple(State):
        raise EventError(f"state: {_short(name)} is not a state; they are {', '.join(State)}")
    return State(name)


def _mapping(event: Event, name: str) -> dict[str, Any] | None:
    value = event.get(name)
    if value is not None and not isinstance(value, dict):
        raise EventError(f"{name}: must be a mapping or null, is {_short(value)}")
    return value


def _inputs(event: Event) -> dict[str, Scalar] | None:
    inputs = _mapping(event, "inputs")
    if not all(isinstance(value, Scalar) for value in (inputs or {}).values()):
        raise EventError("inputs: must be a mapping of fields to texts, numbers, booleans or nulls")
    return inputs


def _outputs(event: Event) -> dict[str, dict[str, Any]] | None:
    outputs = _mapping(event, "outputs")
    return outputs and {path: _file_facts(path, facts) for path, facts in outputs.items()}


def _file_facts(path: str, facts: object) -> dict[str, Any]:
    place = PurePosixPath(path)
    if place.is_absolute() or ".." in place.parts or "\0" in path:
        raise EventError(f"outputs.{path[:200]}: must be a path below the run directory")
    if isinstance(facts, dict):
        sha256, size = facts.get("sha256"), facts.get("bytes")
        if isinstance(sha256, str) and type(size) is int and size >= 0:
            return {"sha256": sha256, "bytes": size}
    raise EventError(f"outputs.{path[:200]}: must be a mapping with sha256 and bytes")


def _is_change(value: object) -> bool:
    """Tell whether this says of a field what it was and is, and which stages that makes void."""
    if not isinstance(value, dict) or not {"was", "now"} <= value.keys():
        return False
    stages = value.get("invalidates")
    names = [value.get("field"), *stages] if isinstance(stages, list) else [None]
    return all(isinstance(each, str) for each in names)


def _outcome(event: Event) -> dict[str, Any]:
    decision, report = (_text_or_none(event, name) for name in ("decision", "report"))
    if decision not in (None, *Decision):
        raise EventError(f"decision: {_short(decision)} is none; they are {', '.join(Decision)}")
    outcome = {"decision": decision, "exit_code": _count_of(event, "exit_code", least=0)}
    return outcome if report is None else outcome | {"report": report}


def _elapsed(event: Event) -> float | None:
    """Return the session's seconds; None of an event that was written without."""
    value = event.get("elapsed_s")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= LONGEST_SESSION_S:
        raise EventError(f"elapsed_s: must be a number of seconds, is {_short(value)}")
    return float(value)


def _short(value: object) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
