"""The stages of a release, their order, and which comes next: pure, no thresholds.

A stage starts only when every stage before it is done; a failed stage ends the chain, and only
``closeout`` runs after it, because a decision is owed however the release ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The stretch of the chain that was asked for, both ends included; None leaves an end open.

    From ``first`` on everything is done again; without it, a release goes on where it is.
    """

    first: Stage | None = None
    last: Stage | None = None


EVERY_STEP = Steps()


def next_stage(states: Mapping[Stage, State], last: Stage | None = None) -> Stage | None:
    """Return the stage to run now, or None when there is nothing left to do up to ``last``.

    A stage that was interrupted while RUNNING is run again. A failure up to ``last`` leads to
    closeout, wherever ``last`` is.
    """
    if states.get(Stage.CLOSEOUT, State.PENDING) in {State.DONE, State.FAILED}:
        return None
    for stage in STAGES[: STAGES.index(last or Stage.CLOSEOUT) + 1]:
        match states.get(stage, State.PENDING):
            case State.PENDING | State.RUNNING:
                return stage
            case State.FAILED:
                return Stage.CLOSEOUT
            case State.DONE:
                continue
    return None


def check_steps(from_step: str | None, to_step: str | None, only_step: str | None) -> Steps:
    """Return the stretch that ``--from-step``, ``--to-step`` and ``--only-step`` ask for.

    Raises:
        ValueError: a name is not a stage's, or the options contradict each other.
    """
    if only_step is not None and (from_step is not None or to_step is not None):
        raise ValueError(
            "--only-step already says where to begin and to end; leave out --from-step and "
            "--to-step, or give those two instead"
        )
    if only_step is not None:
        only = _stage("--only-step", only_step)
        return Steps(first=only, last=only)
    first = None if from_step is None else _stage("--from-step", from_step)
    last = None if to_step is None else _stage("--to-step", to_step)
    if first and last and STAGES.index(first) > STAGES.index(last):
        raise ValueError(
            f"--from-step {first} comes after --to-step {last}; the order is {', '.join(STAGES)}"
        )
    return Steps(first=first, last=last)


def _stage(option: str, name: str) -> Stage:
    if name not in STAGES:
        raise ValueError(f"{option}: {name!r} is not a stage; choose from {', '.join(STAGES)}")
    return Stage(name)
