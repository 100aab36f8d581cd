"""The stages of a release, their order, and which comes next: pure, no thresholds.

A stage starts only when every stage before it is done; a failed stage ends the chain, and only
``closeout`` runs after it, because a decision is owed however the release ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Stage(StrEnum):
    """The stages, in the order in which they run."""

    SETUP = "setup"
    PTQ = "ptq"
    DEPLOY = "deploy"
    BASELINE_EVAL = "baseline_eval"
    CANDIDATE_EVAL = "candidate_eval"
    COMPARE = "compare"
    CLOSEOUT = "closeout"


class State(StrEnum):
    """What is known of a stage."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


STAGES: tuple[Stage, ...] = tuple(Stage)


def next_stage(states: Mapping[Stage, State]) -> Stage | None:
    """Return the stage to run now, or None when the release is over.

    A stage that was interrupted while RUNNING is run again.
    """
    if states.get(Stage.CLOSEOUT, State.PENDING) in {State.DONE, State.FAILED}:
        return None
    for stage in STAGES:
        match states.get(stage, State.PENDING):
            case State.PENDING | State.RUNNING:
                return stage
            case State.FAILED:
                return Stage.CLOSEOUT
            case State.DONE:
                continue
    return None
