"""Gate on output length, question by question: is the change shown to be within the limit?

Means over samples hide how much of a change is chance. Where the length of every answer is known on
both sides, the relative change of the mean has an interval: a task passes when both its one-sided
bounds are within the limit (two one-sided tests, Schuirmann 1987, which need no correction), and
fails when a bound, at a confidence corrected for the number of tasks (Bonferroni), is beyond it.
Lengths vary little until one answer runs on, so no bound is nearer than the share of questions that
may have escaped, each with the longest answer seen on one side and none on the other.
Otherwise more questions are needed, and the verdict says how many. Questions must be the same on
both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from gates import evidence
from gates.beside import finite
from gates.criteria import (
    ALPHA,
    CONFIDENCE,
    FEWEST_LENGTHS,
    POWER,
    VERBOSITY_THRESHOLD,
)
from gates.evidence import EvidenceError, join
from gates.pairing import Anomaly, mismatch
from gates.samples import TaskSamples, parse_samples
from gates.verbosity import GATE, dropped_of, left_out, short_output_warning
from gates.verdict import Check, FailureClass, Verdict

_CERTAIN = NormalDist().inv_cdf(CONFIDENCE)

_MOST_UNITS = 1e12
"""Questions, or clusters, beyond which a number needed is not worth naming."""


@dataclass(frozen=True, kw_only=True)
class _Change:
    """One task's change of the mean length, a fraction, with one-sided bounds."""

    questions: int
    units: int
    tokens: tuple[float, float]
    estimate: float
    lower: float
    upper: float
    surely: tuple[float, float]
    """The bounds at the confidence of a failure."""
    error: float
    """The standard error that the answers seen show; infinite where they are too few."""
    longest: float
    """The longest answer of either side, in means of the baseline."""


@dataclass(frozen=True, kw_only=True)
class _Result:
    """One task's row, and its check where it could be compared."""

    row: Mapping[str, object]
    check: Check | None = None
    failure_class: FailureClass | None = None
    change: float | None = None


def evaluate_output_lengths(
    baseline: object,
    candidate: object,
    threshold: float = VERBOSITY_THRESHOLD,
    *,
    dropped_tasks: object = (),
) -> Verdict:
    """Compare the ``lengths`` of two samples documents, described by ``schemas/samples.json``.

    ``threshold`` is the largest change of the mean as a fraction of the baseline's, in either
    direction; ``dropped_tasks`` names generation tasks whose lengths nobody counted. A task with
    lengths on one side only is named as not comparable. A task that no interval decides fails with
    ``INSUFFICIENT_EVIDENCE``. Nothing is raised.
    """
    try:
        limit = evidence.fraction(threshold, "threshold")
        dropped = dropped_of(dropped_tasks)
        sides = parse_samples(baseline, "baseline"), parse_samples(candidate, "candidate")
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    counted = [{name for name, task in side.items() if task.lengths} for side in sides]
    both = len(counted[0] & counted[1])
    results = {
        task: _result(task, sides[0].get(task), sides[1].get(task), limit, tasks=both)
        for task in sorted(counted[0] | counted[1])
    }
    return _verdict(results, limit, dropped)


def _result(
    task: str,
    baseline: TaskSamples | None,
    candidate: TaskSamples | None,
    limit: float,
    *,
    tasks: int,
) -> _Result:
    """Compare one task's lengths, as one of ``tasks`` that may fail."""
    if not (baseline and candidate and baseline.lengths and candidate.lengths):
        return _not_comparable("lengths are known on one side only")
    anomaly = mismatch(task, (baseline, candidate))
    if anomaly:
        return _unmatched(task, anomaly)
    if not any(baseline.lengths):
        return _not_comparable("the baseline mean is zero, so a relative change is undefined")
    change = _change(baseline, candidate.ordered_as(baseline.questions), tasks)
    if not math.isfinite(change.estimate):
        return _not_comparable("the baseline mean is nearly zero")
    failure_class: FailureClass | None = FailureClass.INSUFFICIENT_EVIDENCE
    within = None
    if -limit <= change.lower and change.upper <= limit:
        failure_class, within = None, True
    elif change.surely[0] > limit or change.surely[1] < -limit:
        failure_class, within = FailureClass.VERBOSITY_EXCEEDED, False
    more = _more(change, limit) if within is None else None
    return _Result(
        row={
            "status": "compared",
            "sample_counts": [change.questions],
            "baseline_tokens": round(change.tokens[0], 1),
            "candidate_tokens": round(change.tokens[1], 1),
            "delta": round(change.estimate, 4),
            "delta_lower": finite(change.lower),
            "delta_upper": finite(change.upper),
            "within_threshold": within,
            "more_questions": more,
            **short_output_warning(*change.tokens),
        },
        check=Check(
            subject=join("tasks", task),
            observed=[finite(change.lower), finite(change.upper)],
            limit=[-limit, limit],
            passed=within is True,
            detail=_sentence(task, change, limit, within, more),
        ),
        failure_class=failure_class,
        change=change.estimate,
    )


def _change(baseline: TaskSamples, candidate: TaskSamples, tasks: int) -> _Change:
    from gates import statistics

    before, after = (statistics.floats(side.lengths or ()) for side in (baseline, candidate))
    labels = statistics.labels(baseline.clusters) if baseline.clusters else None
    units = len(set(baseline.clusters or baseline.questions))
    longest = float(max(before.max(), after.max()) / before.mean())
    change = statistics.relative_change(before, after, clusters=labels, alpha=ALPHA)
    bounded, surely = (
        statistics.length_change(before, after, clusters=labels, alpha=alpha)
        for alpha in (ALPHA, ALPHA / tasks)
    )
    return _Change(
        questions=len(baseline.questions),
        units=units,
        tokens=(float(before.mean()), float(after.mean())),
        estimate=float(change.estimate),
        lower=bounded.lower,
        upper=bounded.upper,
        surely=(surely.lower, surely.upper),
        error=float(change.upper - change.lower) / 2 / _CERTAIN,
        longest=longest,
    )


def _more(change: _Change, limit: float) -> int | None:
    """Return how many more questions would show an unchanged length to be within the limit.

    The error shrinks with the root of the number of questions; both bounds have to hold, so each
    gets half of the chance to miss. Further clusters are taken to be as large as those seen.
    """
    share = limit / change.longest
    if share == 0.0:
        return None  # no interval has the width 0
    widths = (_CERTAIN + NormalDist().inv_cdf((1 + POWER) / 2)) * change.error / limit
    units = max(
        FEWEST_LENGTHS,
        change.units * widths * widths if change.units > 1 else 0.0,
        math.log(ALPHA) / math.log1p(-share) if share < 1 else 0.0,
    )
    if units > _MOST_UNITS:
        return None
    return max(math.ceil((units / change.units - 1) * change.questions), 0)


def _sentence(
    task: str, change: _Change, limit: float, within: bool | None, more: int | None
) -> str:
    said = {True: "within the limit", False: "beyond the limit", None: "undecided"}[within]
    bounds = f"{100 * change.lower:+.2f} to {100 * change.upper:+.2f} %"
    bounds += f" with {100 * CONFIDENCE:g} % confidence each"
    if not math.isfinite(change.upper - change.lower):
        bounds = "too few to bound it"
    asked = f"{change.questions:,} questions"
    if change.units < change.questions:
        asked += f", {change.units:,} clusters"
    text = (
        f"{task}: {said}: {change.tokens[0]:.1f} to {change.tokens[1]:.1f} tokens, "
        f"{100 * change.estimate:+.2f} % ({bounds}, {100 * limit:g} % allowed, {asked})"
    )
    if within is not None:
        return text
    if more is None:
        return f"{text}; no number of questions would show it to be within the limit"
    if not more:
        return f"{text}; the change is too close to the limit for these questions"
    where = " in further clusters" if change.units < change.questions else ""
    return f"{text}; if the length is unchanged, about {more:,} more questions{where} would show it"


def _not_comparable(reason: str) -> _Result:
    return _Result(row={"status": "not_comparable", "reason": reason})


def _unmatched(task: str, anomaly: Anomaly) -> _Result:
    check = Check(
        subject=join("tasks", task),
        observed="other questions",
        limit="the same questions",
        passed=False,
        detail=anomaly.detail,
    )
    row = {"status": "anomalous", "reason": anomaly.detail, "within_threshold": None}
    return _Result(row=row, check=check, failure_class=anomaly.failure_class)


_GRAVEST_FIRST = (
    FailureClass.SAMPLE_ACCOUNTING_FAILED,
    FailureClass.VERBOSITY_EXCEEDED,
    FailureClass.INSUFFICIENT_EVIDENCE,
)


def _verdict(results: Mapping[str, _Result], limit: float, dropped: list[str]) -> Verdict:
    checks = tuple(result.check for result in results.values() if result.check)
    unmeasured = tuple(task for task, result in results.items() if not result.check)
    classes = {result.failure_class for result in results.values()}
    failure_class = next((each for each in _GRAVEST_FIRST if each in classes), None)
    failed = [check.detail for check in checks if not check.passed]
    detail = "; ".join(failed) or f"all {len(checks)} comparable task(s) within {limit:g}"
    if not checks:
        failure_class = FailureClass.SAMPLE_ACCOUNTING_FAILED
        detail = "no task had lengths on both sides"
    return Verdict(
        gate=GATE,
        checks=checks,
        failure_class=failure_class,
        detail=detail + left_out(unmeasured, dropped),
        notes=tuple(f"{task}: {results[task].row['reason']}" for task in unmeasured),
        per_task={task: result.row for task, result in results.items()},
        not_comparable=unmeasured,
        max_abs_delta=max(
            (abs(result.change) for result in results.values() if result.change is not None),
            default=None,
        ),
    )
