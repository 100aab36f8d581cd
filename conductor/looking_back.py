"""What an earlier part of a release left, held against what is there now.

Nothing is decided here, and nothing but a disorder of its last moments is put right: the conductor
takes back what does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conductor.chain import Stage, State
from conductor.config import Config
from conductor.digests import Digests
from conductor.executors.processes import end_leftovers
from conductor.failure import Failure
from conductor.history import History
from conductor.inputs import Change, Scalar, collect, differences, flatten
from conductor.journal import Clock, Journal, read_history
from conductor.release_state import Plan
from conductor.repair import attempt_dir, read_object
from conductor.report import read_report, report_digest
from conductor.run_lock import hold
from conductor.stages import INPUTS, choose_tools, find_source
from conductor.world import World
from gates import FailureClass


def look_back(
    run_dir: Path, history: History, then: Config, now: Config, world: World, digests: Digests
) -> tuple[Plan, Mapping[str, Scalar], Sequence[Change]]:
    """Resolve a request anew, and compare what it depends on with what was recorded then.

    Of a release that did not get through setup, or was made by a day0 that recorded nothing, the
    configuration is compared alone.

    Raises:
        Failure: the request cannot work any more.
        OSError: a file that the release depends on cannot be read.
    """
    recorded = _recorded_inputs(run_dir, history) or flatten(
        {name: value for name, (value, _) in then.origins.items()}, "config."
    )
    revision = recorded.get("model.revision")
    commit = None if revision is None else str(revision)
    plan = find_source(choose_tools(now, world), now, revision=commit)
    inputs = collect(now, plan, world, digests)
    comparable = inputs
    if "day0.version" not in recorded:
        comparable = {name: value for name, value in inputs.items() if name in recorded}
    return plan, inputs, differences(recorded, comparable)


def _recorded_inputs(run_dir: Path, history: History) -> dict[str, Scalar]:
    """Return what the latest setup that got so far recorded, with the changes accepted since."""
    setup = history.stages[Stage.SETUP]
    for attempt in range(max(setup.attempts, 1), 0, -1):
        recorded = read_object(attempt_dir(run_dir, Stage.SETUP, attempt) / INPUTS)
        if recorded and setup.state is not State.DONE:
            recorded |= {change["field"]: change["now"] for change in history.changes}
        if recorded or setup.state is State.DONE:
            return recorded
    return {}


def damaged_outputs(
    run_dir: Path, history: History, digests: Digests
) -> dict[Stage, Sequence[str]]:
    """Say of each stage that is done which of its recorded files are not what they were."""
    found = {
        stage: digests.verify(run_dir, record.outputs or {})
        for stage, record in history.stages.items()
        if record.state is State.DONE
    }
    return {stage: problems for stage, problems in found.items() if problems}


def finished_report(run_dir: Path, clock: Clock) -> dict[str, Any] | None:
    """Return the report of a release that came to a decision, if it is still the whole report.

    What a death in its last moments left behind is put in order.

    Raises:
        Failure: somebody works on the release, or its journal is damaged.
    """
    document = whole_report(run_dir, read_history(run_dir))
    if document is None:
        return None
    try:
        with hold(run_dir):
            end_leftovers(run_dir)
            Journal.open(run_dir, clock=clock)
    except Failure as failure:
        # A decision can be told from a disk that is full or read-only.
        if failure.failure_class is not FailureClass.SYSTEMIC:
            raise
    return document


def whole_report(run_dir: Path, history: History) -> dict[str, Any] | None:
    """Return the report of the decision in ``history``, if it is what was written then."""
    outcome = history.outcome
    document = read_report(run_dir) if outcome.get("decision") else None
    if document is None or document["decision"] != outcome["decision"]:
        return None
    # A release that was taken over from its files has the report's own word only.
    return document if outcome.get("report") in (None, report_digest(document)) else None


def say_drift(changes: Sequence[Change], journal: Journal) -> str:
    """Say what changed since the release began, field by field, and what to do about it."""
    lines = [f"release {journal.run_id} cannot go on unseen: what it depends on has changed"]
    for change in changes:
        again = ", ".join(change.invalidates) or "no stage (its gates judge again)"
        lines.append(f"  {change.field}: {change.was!r} then, {change.now!r} now; repeats: {again}")
    lines.append(
        "restore it, start a new release, or accept the change with --accept-drift: the stages "
        "named run again, and the report says so"
    )
    return "\n".join(lines)
