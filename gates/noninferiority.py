"""Gate on accuracy, question by question: is the drop shown to be within the margin?

A threshold on observed scores refuses lossless candidates and passes broken ones, because it takes
chance for the truth. Here every task has an interval of its drop, and each answer is shown with
95 % confidence or not given:

* a task passes when the upper bound of its drop is under the margin;
* it fails when the lower bound is above it, corrected by Holm over the tasks, because a suite of
  many tasks has many chances to fail one by accident;
* otherwise it is undecided, and the verdict says how many more questions would decide it.

ACCEPT needs every task to pass and no correction: a candidate that is too bad on any task passes
that one, and so all of them, in at most 5 % of all cases (intersection-union, Berger 1982).
Anything that makes the difference meaningless comes before all of this. Nothing is intersected,
inferred or left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gates import evidence
from gates.beside import beside, finite
from gates.compare import GATE, directions_of, task_sets_differ
from gates.criteria import ALPHA, SCORE_THRESHOLD
from gates.evidence import EvidenceError, join
from gates.measuring import SURE, Measured, Rule, measure
from gates.needed import Needed, advice, needed
from gates.pairing import Anomaly, Kind, Pair
from gates.replay import replayed
from gates.samples import parse_checkpoint, parse_samples
from gates.verdict import Check, Decision, FailureClass, Verdict


class TaskOutcome(StrEnum):
    """What the questions of one task show."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    UNDECIDED = "undecided"
    ANOMALOUS = "anomalous"


_GRAVEST_FIRST = (
    FailureClass.SAMPLE_ACCOUNTING_FAILED,
    FailureClass.CONDITIONS_DIFFER,
    FailureClass.ANSWERS_REPLAYED,
    FailureClass.IMPLAUSIBLE_SCORE,
)

_WITHIN = {TaskOutcome.PASS: True, TaskOutcome.FAIL: False}


@dataclass(frozen=True, kw_only=True)
class _Result:
    """One task's end: its row, its check, and what is wrong with it, if anything."""

    task: str
    outcome: TaskOutcome
    check: Check
    row: Mapping[str, object]
    failure_class: FailureClass | None = None


def evaluate_noninferiority(
    baseline: object,
    candidate: object,
    threshold: float = SCORE_THRESHOLD,
    relative: bool = False,
    scales: object = None,
    *,
    directions: object = None,
    sequential: bool = False,
    sizes: object = None,
) -> Verdict:
    """Compare two samples documents, described by ``schemas/samples.json``.

    ``threshold`` is the largest drop as a fraction of each task's scale, or of the baseline's
    score if ``relative``; perplexities need the latter. ``scales`` are full scores, ``directions``
    false for tasks whose lower score is better, ``sizes`` the questions of whole benchmarks: each
    ``{task: value}``, and each over what the documents say. ``sequential`` tells that the
    questions were asked in growing batches and that the caller may stop at any of them.

    The decision is ACCEPT, REGRESSION or ANOMALOUS, and ``None`` where the input was refused.
    Nothing is raised.
    """
    try:
        sides = parse_samples(baseline, "baseline"), parse_samples(candidate, "candidate")
        named = parse_checkpoint(baseline, "baseline"), parse_checkpoint(candidate, "candidate")
        tasks = {*sides[0], *sides[1]}
        if not tasks:
            raise EvidenceError("baseline.tasks", "holds no task, so there is nothing to compare")
        rule = Rule(
            threshold=_threshold(threshold),
            relative=evidence.boolean(relative, "relative"),
            sequential=evidence.boolean(sequential, "sequential"),
            scales=evidence.scales(scales, tasks),
            directions=directions_of(directions, tasks),
            sizes=_sizes(sizes, tasks),
        )
        one_sided = sorted(set(sides[0]) ^ set(sides[1]))
        if one_sided:
            return task_sets_differ(one_sided)
        measured = {task: measure(task, *sides, rule) for task in sorted(tasks)}
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    matched = [each for each in measured.values() if isinstance(each, Measured)]
    copies, notes = replayed(
        [each.pair for each in matched],
        whole_suite=len(matched) == len(tasks),
        checkpoint=named[0] if named[0] == named[1] else None,
    )
    adjusted = _adjusted(matched)
    results = [
        _anomalous(task, each)
        if isinstance(each, Anomaly)
        else _result(each, adjusted.get(task), copies.get(task))
        for task, each in measured.items()
    ]
    return _verdict(results, rule, [*notes, *(note for each in matched for note in _notes(each))])


def _threshold(value: object) -> float:
    threshold = evidence.fraction(value, "threshold")
    if threshold == 1.0:
        raise EvidenceError("threshold", "must be under 1: no drop is larger than the whole scale")
    return threshold


def _sizes(value: object, tasks: set[str]) -> dict[str, int]:
    sizes = evidence.counts({} if value is None else value, "sizes")
    for task in sizes.keys() - tasks:
        raise EvidenceError(join("sizes", task), "names a task that was not asked; remove it")
    return sizes


def _adjusted(measured: list[Measured]) -> dict[str, float]:
    """Return Holm's p-values of a drop above the margin, where any p-value is small at all."""
    from gates import statistics

    values = [each.comparison.p_worse for each in measured]
    if not any(value <= ALPHA for value in values):
        return {}
    names = [each.pair.task for each in measured]
    return dict(zip(names, statistics.holm(values), strict=True))


def _result(measured: Measured, adjusted: float | None, copy: Anomaly | None) -> _Result:
    """Turn a comparison into the task's outcome and row."""
    comparison, matched, limit = measured.comparison, measured.pair, measured.limit
    outcome = TaskOutcome.UNDECIDED
    if copy:
        outcome = TaskOutcome.ANOMALOUS
    elif comparison.p_within <= ALPHA:
        outcome = TaskOutcome.PASS
    elif adjusted is not None and adjusted <= ALPHA:
        outcome = TaskOutcome.FAIL
    need = None
    if outcome is TaskOutcome.UNDECIDED:
        need = needed(matched, comparison, limit.margin, sequential=measured.sequential)
    return _Result(
        task=matched.task,
        outcome=outcome,
        check=Check(
            subject=join("tasks", matched.task),
            observed=finite(limit.in_task(comparison.upper) / limit.unit),
            limit=limit.threshold,
            passed=outcome is TaskOutcome.PASS,
            detail=copy.detail if copy else _sentence(measured, outcome, need),
        ),
        row=_row(measured, outcome, adjusted, need),
        failure_class=copy.failure_class if copy else None,
    )


def _row(
    measured: Measured, outcome: TaskOutcome, adjusted: float | None, need: Needed | None
) -> dict[str, object]:
    comparison, matched, limit = measured.comparison, measured.pair, measured.limit
    drop = limit.in_task(comparison.estimate)
    binary = matched.is_binary
    return {
        "baseline": matched.scores[0],
        "candidate": matched.scores[1],
        "drop": finite(drop),
        "drop_fraction": finite(drop / limit.unit),
        "limit": limit.threshold * limit.unit,
        "scale": matched.full,
        "within_threshold": _WITHIN.get(outcome),
        "outcome": outcome,
        "drop_lower": finite(limit.in_task(comparison.lower)),
        "drop_upper": finite(limit.in_task(comparison.upper)),
        "method": comparison.method,
        "questions": matched.questions,
        "repeats": max(matched.baseline.repeats, matched.candidate.repeats),
        "clusters": matched.cluster_count if matched.clusters else None,
        "lost": matched.lost if binary else None,
        "gained": matched.gained if binary else None,
        "p_within": finite(comparison.p_within),
        "p_worse": finite(comparison.p_worse),
        "p_worse_adjusted": adjusted,
        "needed": need.document() if need else None,
        "beside": beside(matched),
    }


_ROW = (
    *("baseline", "candidate", "drop", "drop_fraction", "limit", "scale", "within_threshold"),
    *("outcome", "drop_lower", "drop_upper", "method", "questions", "repeats", "clusters", "lost"),
    *("gained", "p_within", "p_worse", "p_worse_adjusted", "needed", "beside"),
)


def _anomalous(task: str, anomaly: Anomaly) -> _Result:
    """Return the end of a task whose sides cannot be compared."""
    return _Result(
        task=task,
        outcome=TaskOutcome.ANOMALOUS,
        check=Check(
            subject=join("tasks", task),
            observed=anomaly.failure_class,
            limit="comparable sides",
            passed=False,
            detail=anomaly.detail,
        ),
        row=dict.fromkeys(_ROW) | {"outcome": TaskOutcome.ANOMALOUS, "within_threshold": False},
        failure_class=anomaly.failure_class,
    )


_SAID = {
    TaskOutcome.PASS: "passed",
    TaskOutcome.FAIL: "failed",
    TaskOutcome.UNDECIDED: "undecided",
}


def _sentence(measured: Measured, outcome: TaskOutcome, need: Needed | None) -> str:
    """Say what was found: the drop, its bound, and what they rest on."""
    comparison, matched, limit = measured.comparison, measured.pair, measured.limit
    drop, lower, upper = (
        100 * limit.in_task(value) / (limit.unit if matched.full is None else matched.full)
        for value in (comparison.estimate, comparison.lower, comparison.upper)
    )
    allowed = 100 * limit.threshold * limit.unit / (matched.full or limit.unit)
    unit = "points" if matched.full else "%"
    bound = (
        f"at least {lower:.2f} with {SURE} confidence, {allowed:.2f} allowed"
        if outcome is TaskOutcome.FAIL
        else f"{SURE} bound {_told_apart(upper, allowed)} allowed"
    )
    change = f"{'gain' if drop < 0 else 'drop'} {abs(drop):.2f} {unit}"
    said = f"{matched.task}: {_SAID[outcome]}: {change}, {bound} ({_basis(matched)})"
    if need is None:
        return said
    if comparison.method == "betting":
        said += (
            f"; the evidence for a pass is {1 / comparison.p_within:.1f} of the {1 / ALPHA:.0f} "
            "that decide"
        )
    return f"{said}; {advice(matched, need)}"


def _told_apart(upper: float, allowed: float) -> str:
    """Write both with as many digits as it takes to see which is larger."""
    if not math.isfinite(upper):
        return f"unknown, {allowed:.2f}"
    for digits in (2, 4, 6):
        words = f"{upper:.{digits}f}", f"{allowed:.{digits}f}"
        if words[0] != words[1]:
            break
    return " of ".join(words)


def _basis(matched: Pair) -> str:
    parts = [f"{matched.questions:,} questions"]
    if matched.clusters:
        parts.append(f"{matched.cluster_count:,} clusters")
    if matched.kind is Kind.MEAN:
        parts += [f"{matched.lost:,} lost", f"{matched.gained:,} gained"]
    return ", ".join(parts)


def _notes(measured: Measured) -> list[str]:
    matched = measured.pair
    repeats = matched.baseline.repeats, matched.candidate.repeats
    notes = []
    if repeats[0] != repeats[1]:
        notes.append(
            f"{matched.task}: {repeats[0]} answer(s) to each question of the baseline, "
            f"{repeats[1]} of the candidate; their means are compared"
        )
    if matched.most_lost is not None and matched.most_lost <= measured.limit.margin:
        notes.append(
            f"{matched.task}: the baseline scores {matched.scores[0]:g}, so no candidate can lose "
            "more than the margin and a pass shows nothing; check the evaluation, or take another "
            "benchmark"
        )
    return notes


def _verdict(results: list[_Result], rule: Rule, notes: list[str]) -> Verdict:
    """Turn tasks into a verdict: unbelievable before bad before undecided before good."""
    tasks = {
        outcome: [result.task for result in results if result.outcome is outcome]
        for outcome in TaskOutcome
    }
    failure_class: FailureClass | None = None
    decision = Decision.ACCEPT
    if tasks[TaskOutcome.ANOMALOUS]:
        classes = {result.failure_class for result in results}
        failure_class = next(each for each in _GRAVEST_FIRST if each in classes)
        decision = Decision.ANOMALOUS
    elif tasks[TaskOutcome.FAIL]:
        failure_class, decision = FailureClass.ACCURACY_REGRESSION, Decision.REGRESSION
    elif tasks[TaskOutcome.UNDECIDED]:
        failure_class, decision = FailureClass.INSUFFICIENT_EVIDENCE, Decision.ANOMALOUS
    percent = f"{100 * rule.threshold:g}"
    margin = f"{percent} {'%' if rule.relative else 'point' if percent == '1' else 'points'}"
    counted = ", ".join(_counted(outcome, names) for outcome, names in tasks.items() if names)
    open_ones = [result for result in results if not result.check.passed]
    open_ones.sort(key=lambda result: _SAID_FIRST.index(result.outcome))
    return Verdict(
        gate=GATE,
        checks=tuple(result.check for result in results),
        failure_class=failure_class,
        decision=decision,
        detail="; ".join(
            [
                f"{counted} of {len(results)} task(s) at a margin of {margin}",
                *(result.check.detail for result in open_ones),
            ]
        ),
        notes=tuple(notes),
        per_task={result.task: result.row for result in results},
    )


def _counted(outcome: TaskOutcome, tasks: list[str]) -> str:
    """Say how many tasks ended so, and which, unless they passed."""
    if outcome is TaskOutcome.PASS:
        return f"{len(tasks)} {outcome}"
    more = ", ..." if len(tasks) > _TASKS_NAMED else ""
    return f"{len(tasks)} {outcome} ({', '.join(tasks[:_TASKS_NAMED])}{more})"


_TASKS_NAMED = 5

_SAID_FIRST = (TaskOutcome.ANOMALOUS, TaskOutcome.FAIL, TaskOutcome.UNDECIDED)
