"""Gate on the baseline itself: is its score where the world says that it should be?

Baseline and candidate can agree and both be wrong: a broken prompt or a wrong chat template lowers
both. So the baseline is held against references that the suite cites, such as a model card.

A new model often has no published score, and inventing one would prove nothing. A release without
any reference leaves this gate out; asked all the same, the gate refuses, because a pass would be
one by a check made of nothing. Tasks without a reference beside others are externally unverified.

A score over a part of the benchmark is points off by chance alone. There a mismatch needs the
interval of the score, and not just the score, to lie outside the tolerance; a score that is outside
while its interval is not has verified nothing, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gates import evidence
from gates.criteria import ALPHA, CONFIDENCE, EXTERNAL_TOLERANCE
from gates.evidence import EvidenceError, join
from gates.scores import Scale, decimal, scale_of
from gates.verdict import Check, Decision, FailureClass, Verdict

GATE = "external"


class Status(StrEnum):
    """What a task's reference says of the baseline."""

    VERIFIED = "verified"
    FAILED = "failed"
    UNVERIFIED = "externally unverified"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A published score, where it stands, and how it was measured otherwise than here."""

    score: float
    source: str | None
    protocol: str | None


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One task's score; ``interval`` is known where only a part of the benchmark was asked."""

    name: str
    score: float
    reference: Reference | None
    scale: Scale
    tolerance: float
    interval: tuple[float, float] | None
    """Two-sided, in the task's units."""

    @property
    def allowed(self) -> tuple[float, float]:
        """Return the scores that fit the reference."""
        cited = decimal(self.reference.score if self.reference else self.score)
        distance = decimal(self.tolerance) * decimal(self.scale.full)
        return float(cited - distance), float(cited + distance)

    @property
    def status(self) -> Status:
        """Tell whether the baseline is where its reference is, all of its interval included."""
        low, high = self.allowed
        if self.reference is None:
            return Status.UNVERIFIED
        least, most = self.interval or (self.score, self.score)
        if low <= least and most <= high:
            return Status.VERIFIED
        return Status.FAILED if most < low or least > high else Status.UNVERIFIED


def evaluate_external(
    scores: object,
    references: object,
    tolerance: float = EXTERNAL_TOLERANCE,
    scales: object = None,
    *,
    asked: object = None,
) -> Verdict:
    """Hold baseline ``scores`` ``{task: score}`` against ``references``.

    A reference is a score, or ``{"score", "source", "protocol"}`` with texts that say where it was
    published and how its protocol differs. ``tolerance`` is the largest distance as a fraction of
    the task's scale, in either direction; a distance of exactly the tolerance is within it.
    ``asked`` is ``{task: (questions asked, questions in the benchmark)}``, for tasks where that is
    known. Input that cannot be read, or holds no reference, fails with ``USER_CONFIG_ERROR``.
    Nothing is raised.
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
        parts = _parts(asked, measured)
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    tasks = []
    for name, score in sorted(measured.items()):
        reference = cited.get(name)
        scale = scale_of(name, (score, reference.score if reference else score), full_scores)
        tasks.append(
            _Task(
                name=name,
                score=score,
                reference=reference,
                scale=scale,
                tolerance=limit,
                interval=_interval(score, scale, parts.get(name)),
            )
        )
    return _verdict(tasks, limit)


def _references(value: object, measured: Mapping[str, float]) -> dict[str, Reference]:
    result = {}
    for task, entry in evidence.mapping({} if value is None else value, "references").items():
        path = join("references", task)
        if task not in measured:
            raise EvidenceError(path, "names a task that has no score; remove it or fix its name")
        result[task] = _reference(entry, path)
    return result


def _reference(value: object, path: str) -> Reference:
    if not isinstance(value, Mapping):
        score = evidence.number(value, path, minimum=0.0)
        return Reference(score=score, source=None, protocol=None)
    entry = evidence.mapping(value, path)
    source, protocol = (
        None if entry.get(key) is None else evidence.text(entry[key], join(path, key))
        for key in ("source", "protocol")
    )
    return Reference(
        score=evidence.number(
            evidence.field(entry, "score", path), join(path, "score"), minimum=0.0
        ),
        source=source,
        protocol=protocol,
    )


def _parts(value: object, measured: Mapping[str, float]) -> dict[str, int]:
    """Return how many questions were asked, of tasks that were not asked all."""
    parts = {}
    for task, entry in evidence.mapping({} if value is None else value, "asked").items():
        path = join("asked", task)
        numbers = evidence.sequence(entry, path)
        if task not in measured:
            raise EvidenceError(path, "names a task that has no score; remove it or fix its name")
        if len(numbers) != 2:
            raise EvidenceError(path, "must be [questions asked, questions in the benchmark]")
        asked, size = (
            evidence.count(number, f"{path}[{i}]", minimum=1) for i, number in enumerate(numbers)
        )
        if asked > size:
            raise EvidenceError(path, f"{asked} questions were asked of a benchmark of {size}")
        if asked < size:
            parts[task] = asked
    return parts


def _interval(score: float, scale: Scale, questions: int | None) -> tuple[float, float] | None:
    """Return the interval of a score over a part of the benchmark.

    It is that of a rate: scores between right and wrong vary less than scores that are either.
    """
    if questions is None or not 0.0 <= score <= scale.full:
        return None
    from gates import statistics

    right = round(score / scale.full * questions)
    interval = statistics.rate_interval(right, questions, alpha=ALPHA)
    return interval.lower * scale.full, interval.upper * scale.full


def _verdict(tasks: list[_Task], limit: float) -> Verdict:
    checks = [_check(task) for task in tasks if task.reference]
    failed = [check.detail for check in checks if not check.passed]
    return Verdict(
        gate=GATE,
        checks=tuple(checks),
        failure_class=FailureClass.EXTERNAL_BASELINE_MISMATCH if failed else None,
        decision=Decision.ANOMALOUS if failed else None,
        detail="; ".join(failed) or _summary(tasks, limit),
        notes=_notes(tasks),
        per_task={task.name: _row(task) for task in tasks},
    )


def _summary(tasks: list[_Task], limit: float) -> str:
    verified = sum(task.status is Status.VERIFIED for task in tasks)
    untold = sum(task.reference is not None for task in tasks) - verified
    more = f"; {untold} asked too few questions to tell" if untold else ""
    return f"{verified} task(s) within {limit:g} of their references{more}"


def _check(task: _Task) -> Check:
    reference = task.reference.score if task.reference else task.score
    distance = abs(decimal(task.score) - decimal(reference))
    allowed = decimal(task.tolerance) * decimal(task.scale.full)
    detail = (
        f"{task.name}: baseline {task.score:g}, reference {reference:g}, "
        f"{float(distance):g} apart with {float(allowed):g} allowed"
    )
    if task.interval:
        detail += (
            f" ({100 * CONFIDENCE:g} % interval {task.interval[0]:.4g} to {task.interval[1]:.4g})"
        )
    return Check(
        subject=join("tasks", task.name),
        observed=task.score,
        limit=list(task.allowed),
        passed=task.status is not Status.FAILED,
        detail=detail,
    )


def _row(task: _Task) -> dict[str, object]:
    reference = task.reference
    return {
        "published": reference and reference.score,
        "source": reference and reference.source,
        "protocol": reference and reference.protocol,
        "measured": task.score,
        "difference": float(decimal(task.score) - decimal(reference.score)) if reference else None,
        "status": task.status,
    }


def _notes(tasks: list[_Task]) -> tuple[str, ...]:
    few = " (too few questions to tell)"
    return tuple(
        [
            f"{task.name}: {Status.UNVERIFIED}{few if task.reference else ''}"
            for task in tasks
            if task.status is Status.UNVERIFIED
        ]
        + [
            f"{task.name}: scale inferred from score and reference"
            for task in tasks
            if task.reference and not task.scale.declared
        ]
    )
