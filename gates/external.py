"""Gate on the baseline itself: is its score where the world says that it should be?

Baseline and candidate can agree and both be wrong: a broken prompt or a wrong chat template lowers
both. So the baseline is held against references that the suite cites, such as a model card.

A new model often has no published score, and inventing one would prove nothing. A release without
any reference leaves this gate out; asked all the same, the gate refuses, because a pass would be
one by a check made of nothing. Tasks without a reference beside others are named in the notes.
"""

from __future__ import annotations

from collections.abc import Mapping

from gates import evidence
from gates.criteria import EXTERNAL_TOLERANCE
from gates.evidence import EvidenceError, join
from gates.scores import decimal, scale_of
from gates.verdict import Check, Decision, FailureClass, Verdict

GATE = "external"


def evaluate_external(
    scores: object,
    references: object,
    tolerance: float = EXTERNAL_TOLERANCE,
    scales: object = None,
) -> Verdict:
    """Hold baseline ``scores`` ``{task: score}`` against ``references`` ``{task: score}``.

    ``tolerance`` is the largest distance as a fraction of the task's scale, in either direction;
    a distance of exactly the tolerance is within it. Input that cannot be read, or holds no
    reference, fails with ``USER_CONFIG_ERROR``. Nothing is raised.
    """
    try:
        measured = {
            task: evidence.number(score, join("scores", task))
            for task, score in evidence.mapping(scores, "scores").items()
        }
        if not measured:
            raise EvidenceError("scores", "holds no task, so there is nothing to verify")
        limit = evidence.fraction(tolerance, "tolerance")
        full_scores = evidence.scales(scales, measured)
        cited = _references(references, measured)
        if not cited:
            raise EvidenceError("references", "no reference was given: leave this gate out")
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    checks = [
        _check(task, measured[task], reference, limit, full_scores)
        for task, reference in sorted(cited.items())
    ]
    failed = [check.detail for check in checks if not check.passed]
    return Verdict(
        gate=GATE,
        checks=tuple(checks),
        failure_class=FailureClass.EXTERNAL_BASELINE_MISMATCH if failed else None,
        decision=Decision.ANOMALOUS if failed else None,
        detail="; ".join(failed) or f"{len(checks)} task(s) within {limit:g} of their references",
        notes=_notes(measured, cited, full_scores),
    )


def _references(value: object, measured: Mapping[str, float]) -> dict[str, float]:
    result = {}
    for task, entry in evidence.mapping({} if value is None else value, "references").items():
        path = join("references", task)
        if task not in measured:
            raise EvidenceError(path, "names a task that has no score; remove it or fix its name")
        result[task] = evidence.number(entry, path, minimum=0.0)
    return result


def _check(
    task: str, score: float, reference: float, tolerance: float, scales: Mapping[str, float]
) -> Check:
    scale = scale_of(task, (score, reference), scales)
    distance = abs(decimal(score) - decimal(reference))
    allowed = decimal(tolerance) * decimal(scale.full)
    return Check(
        subject=join("tasks", task),
        observed=score,
        limit=[float(decimal(reference) - allowed), float(decimal(reference) + allowed)],
        passed=distance <= allowed,
        detail=f"{task}: baseline {score:g}, reference {reference:g}, "
        f"{float(distance):g} apart with {float(allowed):g} allowed",
    )


def _notes(
    measured: Mapping[str, float], cited: Mapping[str, float], scales: Mapping[str, float]
) -> tuple[str, ...]:
    unverified = sorted(set(measured) - set(cited))
    inferred = sorted(set(cited) - set(scales))
    return tuple(
        [f"{task}: externally unverified" for task in unverified]
        + [f"{task}: scale inferred from score and reference" for task in inferred]
    )
