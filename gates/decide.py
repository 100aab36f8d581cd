"""From verdicts to one decision, and from a failure class to what to do about it.

The triage table is the only place that says what a failure class means for a release; the
conductor reads it while it runs, ``decide`` reads it at the end. ACCEPT needs every required gate
to be there and to pass: a verdict that is missing is never a good one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from gates.verdict import Decision, FailureClass, Verdict

REQUIRED_GATES = (
    "ptq",
    "canary",
    "baseline_run",
    "candidate_run",
    "conditions",
    "compare",
    "verbosity",
    "external",
)
"""Gates whose verdicts an ACCEPT needs, by the name the release files them under. A suite without
a generation task has no completion length to compare, so its release leaves out ``verbosity``;
one without references leaves out ``external``."""


class Action(StrEnum):
    """What the conductor does about a failure."""

    RETRY_ONCE = "retry once"
    WAIT_AND_RETRY = "wait and retry"
    STOP_INFEASIBLE = "stop: INFEASIBLE"
    STOP_ANOMALOUS = "stop: ANOMALOUS"
    STOP_REGRESSION = "stop: REGRESSION"
    ABORT_SYSTEMIC = "abort: SYSTEMIC"
    REFUSE_INPUT = "refuse the input"


@dataclass(frozen=True, kw_only=True)
class Triage:
    """What to do about a failure class.

    ``action`` comes first; if it is a retry, it happens ``retries`` times with ``wait_s`` seconds
    before each, and ``after_retries`` is what a failure that persists comes to. Otherwise the two
    are the same. ``next_action`` tells a person what to do.
    """

    action: Action
    after_retries: Action
    next_action: str
    retries: int = 0
    wait_s: float = 0.0


def _stop(action: Action, next_action: str) -> Triage:
    return Triage(action=action, after_retries=action, next_action=next_action)


def _retry(after_retries: Action, next_action: str) -> Triage:
    return Triage(
        action=Action.RETRY_ONCE, after_retries=after_retries, next_action=next_action, retries=1
    )


TRIAGE: Mapping[FailureClass, Triage] = MappingProxyType(
    {
        FailureClass.INFRA_TRANSIENT: _retry(
            Action.ABORT_SYSTEMIC,
            "Repair the machine or service named in the reason, then start the release again.",
        ),
        FailureClass.OUT_OF_MEMORY: _retry(
            Action.ABORT_SYSTEMIC,
            "Free memory on the host or device named in the reason, or ask for less of it, then "
            "start the release again.",
        ),
        FailureClass.MODEL_UNSUPPORTED: _stop(
            Action.STOP_INFEASIBLE,
            "Choose a recipe that means modules this model has, or add support for the model.",
        ),
        FailureClass.QUANT_COVERAGE_FAILURE: _stop(
            Action.STOP_INFEASIBLE,
            "Correct the recipe or the exporter so that exactly the layers meant are quantized.",
        ),
        FailureClass.SIZE_NOT_REDUCED: _stop(
            Action.STOP_INFEASIBLE,
            "Choose a recipe narrower than the source, or declare the source's precision.",
        ),
        FailureClass.CHECKPOINT_NOT_SERVABLE: _stop(
            Action.STOP_INFEASIBLE,
            "Serve the checkpoint on an engine and device that support its format, or change the "
            "recipe.",
        ),
        FailureClass.DEPLOYMENT_HEALTH_FAILED: _retry(
            Action.STOP_INFEASIBLE,
            "Read the server's log; raise the health timeout, free memory, or change the engine.",
        ),
        FailureClass.EVAL_JUDGE_FAILED: Triage(
            action=Action.WAIT_AND_RETRY,
            after_retries=Action.STOP_ANOMALOUS,
            next_action="Check the judge endpoint's credentials and rate limit, then start the "
            "release again.",
            retries=2,
            wait_s=60.0,
        ),
        FailureClass.SAMPLE_ACCOUNTING_FAILED: _retry(
            Action.STOP_ANOMALOUS,
            "Find out why samples or scores are missing before trusting any of them.",
        ),
        FailureClass.EXTERNAL_BASELINE_MISMATCH: _stop(
            Action.STOP_ANOMALOUS,
            "Check the suite's prompts, shots and reference score: the baseline is not where it "
            "should be.",
        ),
        FailureClass.CONDITIONS_DIFFER: _stop(
            Action.STOP_ANOMALOUS,
            "Evaluate both sides again under one set of settings.",
        ),
        FailureClass.IMPLAUSIBLE_SCORE: _stop(
            Action.STOP_ANOMALOUS,
            "Check that both sides were measured alike and that every scale is declared.",
        ),
        FailureClass.ANSWERS_REPLAYED: _stop(
            Action.STOP_ANOMALOUS,
            "Empty the caches between harness and model, check that each side asked its own "
            "checkpoint, and evaluate again.",
        ),
        FailureClass.ACCURACY_REGRESSION: _stop(
            Action.STOP_REGRESSION,
            "Do not publish; try a recipe that leaves more of the model alone.",
        ),
        FailureClass.INSUFFICIENT_EVIDENCE: _stop(
            Action.STOP_ANOMALOUS,
            "Take a suite with as many more questions as the reason says, or settle on a wider "
            "margin before any further score is seen; day0 plan shows beforehand what decides.",
        ),
        FailureClass.VERBOSITY_EXCEEDED: _stop(
            Action.STOP_REGRESSION,
            "Do not publish; read answers of both sides to see what made them longer or shorter.",
        ),
        FailureClass.USER_CONFIG_ERROR: _stop(
            Action.REFUSE_INPUT,
            "Correct the request or the file named in the reason and start again.",
        ),
        FailureClass.SYSTEMIC: _stop(
            Action.ABORT_SYSTEMIC,
            "Repair the machine or service, or correct the settings, named in the reason, then "
            "start the release again.",
        ),
        FailureClass.UNKNOWN: _stop(
            Action.STOP_ANOMALOUS,
            "Read the reasons and the logs: something happened that no rule covers.",
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class StageFailure:
    """A stage that failed without a verdict, such as a worker that crashed for good."""

    stage: str
    failure_class: FailureClass
    message: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a release. ``decision`` is ``None`` where nothing was decided."""

    decision: Decision | None
    failure_class: FailureClass | None
    reasons: tuple[str, ...]
    next_action: str
    exit_code: int

    @property
    def publish(self) -> str:
        """Return what to do with the checkpoint: publish, do-not-publish or needs-human."""
        match self.decision:
            case Decision.ACCEPT:
                return "publish"
            case Decision.REGRESSION | Decision.INFEASIBLE:
                return "do-not-publish"
            case Decision.ANOMALOUS | None:
                return "needs-human"


_ENDS: Mapping[Action, tuple[Decision | None, int]] = MappingProxyType(
    {
        Action.REFUSE_INPUT: (None, 2),
        Action.ABORT_SYSTEMIC: (None, 5),
        Action.STOP_INFEASIBLE: (Decision.INFEASIBLE, 4),
        Action.STOP_ANOMALOUS: (Decision.ANOMALOUS, 3),
        Action.STOP_REGRESSION: (Decision.REGRESSION, 1),
    }
)
"""Decision and exit code of each way to end, the one that overrides the others first: evidence
that cannot be trusted (ANOMALOUS) leaves no ground for REGRESSION."""

_OVERRIDING_FIRST = tuple(_ENDS)


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Something that stands against an ACCEPT, and the way to end that it calls for."""

    failure_class: FailureClass
    end: Action
    reason: str


def decide(
    verdicts: Mapping[str, Verdict],
    failures: Iterable[StageFailure] = (),
    required: tuple[str, ...] = REQUIRED_GATES,
) -> Outcome:
    """Return the decision on all verdicts, filed by gate name, and on stages that failed.

    Every retry is taken to have been used up. Each verdict counts, required or not; one that
    neither passed nor names its failure class counts as ``UNKNOWN``. A gate that decided for
    itself, as the accuracy gate does, is taken at its word.
    """
    problems = [
        _problem(failure.failure_class, f"{failure.stage}: {failure.message}")
        for failure in failures
    ]
    problems += [_objection(gate, v) for gate, v in verdicts.items() if not _favourable(v)]
    if not problems:
        problems = _not_measured(verdicts, required)
    if problems:
        return _stopped(problems)
    return Outcome(
        decision=Decision.ACCEPT,
        failure_class=None,
        reasons=(f"all {len(verdicts)} gates passed: {', '.join(verdicts)}",),
        next_action="Publish the checkpoint.",
        exit_code=0,
    )


def _favourable(verdict: Verdict) -> bool:
    return verdict.passed and verdict.decision in (None, Decision.ACCEPT)


def _problem(failure_class: FailureClass, reason: str) -> _Problem:
    end = TRIAGE[failure_class].after_retries
    return _Problem(failure_class=failure_class, end=end, reason=reason)


def _objection(gate: str, verdict: Verdict) -> _Problem:
    problem = _problem(verdict.failure_class or FailureClass.UNKNOWN, f"{gate}: {verdict.detail}")
    own_end = next(
        (end for end, (decision, _) in _ENDS.items() if decision and decision == verdict.decision),
        problem.end,
    )
    return replace(problem, end=own_end)


def _not_measured(verdicts: Mapping[str, Verdict], required: tuple[str, ...]) -> list[_Problem]:
    """Return what is missing for an ACCEPT."""
    if not required:
        return [_problem(FailureClass.UNKNOWN, "no gate was required, so nothing was shown")]
    return [
        _problem(FailureClass.UNKNOWN, f"{gate}: the gate gave no verdict")
        for gate in required
        if gate not in verdicts
    ]


def _stopped(problems: list[_Problem]) -> Outcome:
    gravest = min(problems, key=lambda problem: _OVERRIDING_FIRST.index(problem.end))
    decision, exit_code = _ENDS[gravest.end]
    return Outcome(
        decision=decision,
        failure_class=gravest.failure_class,
        reasons=tuple(problem.reason for problem in problems),
        next_action=TRIAGE[gravest.failure_class].next_action,
        exit_code=exit_code,
    )
