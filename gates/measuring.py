"""One task measured: its margin, and its drop with an interval.

The margin is the threshold times the task's scale or, where it is relative, times the baseline's
observed score, which is then taken as fixed. Which statistic compares follows from the metric:

* right or wrong, one answer a question, no clusters: the paired difference of two proportions;
* any other mean over questions, and means over repeats: paired differences, by cluster if any;
* perplexities: the change of the log-likelihood per word, byte or document, against a relative
  margin only, because they have no full score;
* anything else was refused before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gates.criteria import ALPHA, CONFIDENCE, IMPLAUSIBLE_GAIN
from gates.evidence import EvidenceError, join
from gates.pairing import Anomaly, Kind, Pair, kind_of, pair
from gates.samples import TaskSamples
from gates.verdict import FailureClass

if TYPE_CHECKING:
    from gates.statistics import Comparison

SURE = f"{100 * CONFIDENCE:g} %"
"""The confidence of a bound, in words."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How far a score may fall, and what the caller declared of the tasks."""

    threshold: float
    relative: bool
    sequential: bool
    scales: Mapping[str, float]
    directions: Mapping[str, bool]
    sizes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The margin of one task.

    ``margin`` is in the units that are compared (fractions of the scale, nats), ``unit`` the task's
    own units that the threshold is a fraction of, ``plausible`` those that a gain is. ``in_task``
    turns the first into the second.
    """

    threshold: float
    margin: float
    unit: float
    plausible: float
    in_task: Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A matched task and its comparison."""

    pair: Pair
    limit: Limit
    comparison: Comparison
    sequential: bool


def measure(
    task: str,
    baseline: Mapping[str, TaskSamples],
    candidate: Mapping[str, TaskSamples],
    rule: Rule,
) -> Measured | Anomaly:
    """Match, compare and believe one task, or say why it cannot be.

    Raises:
        EvidenceError: the metric cannot be compared under this rule.
    """
    _refuse(task, kind_of(task, baseline[task]), rule)
    matched = pair(
        task,
        baseline[task],
        candidate[task],
        scale=rule.scales.get(task),
        higher_is_better=rule.directions.get(task),
        size=rule.sizes.get(task),
    )
    if isinstance(matched, Anomaly):
        return matched
    limit = _limit(matched, rule)
    if isinstance(limit, Anomaly):
        return limit
    comparison = _compare(matched, limit.margin, sequential=rule.sequential)
    if limit.in_task(comparison.upper) < -IMPLAUSIBLE_GAIN * limit.plausible:
        return _implausible_gain(matched, limit, comparison)
    return Measured(pair=matched, limit=limit, comparison=comparison, sequential=rule.sequential)


def _limit(matched: Pair, rule: Rule) -> Limit | Anomaly:
    """Return the margin; a relative one takes the baseline's observed score as fixed."""
    baseline = abs(matched.scores[0])
    if matched.kind is not Kind.MEAN:
        return _limit_of_perplexity(matched, baseline, rule)
    full = matched.full or 1.0
    if rule.relative and baseline == 0.0:
        return Anomaly(
            failure_class=FailureClass.IMPLAUSIBLE_SCORE,
            detail=f"{matched.task}: baseline score is 0, so a relative drop is undefined; compare "
            "absolutely",
        )
    return Limit(
        threshold=rule.threshold,
        margin=rule.threshold * (baseline / full if rule.relative else 1.0),
        unit=baseline if rule.relative else full,
        plausible=full,
        in_task=lambda drop: drop * full,
    )


def _refuse(task: str, kind: Kind, rule: Rule) -> None:
    """Refuse what this rule cannot ask of a metric."""
    if kind is Kind.MEAN:
        return
    if not rule.relative:
        raise EvidenceError(
            join("tasks", task),
            f"a {kind} has no full score that a drop could be a fraction of; give --relative, "
            "which allows it to grow by that fraction",
        )
    if rule.sequential:
        raise EvidenceError(
            join("tasks", task),
            "log-likelihoods have no bound, so their comparison is not valid at any stop; evaluate "
            "this task whole, without --until-decided",
        )


def _limit_of_perplexity(matched: Pair, baseline: float, rule: Rule) -> Limit:
    bits = matched.kind is Kind.BITS
    log_two = math.log(2)
    return Limit(
        threshold=rule.threshold,
        margin=rule.threshold * baseline * log_two if bits else math.log1p(rule.threshold),
        unit=baseline,
        plausible=baseline,
        in_task=(lambda drop: drop / log_two) if bits else (lambda drop: _grown(baseline, drop)),
    )


def _grown(perplexity: float, nats: float) -> float:
    """Return by how much a perplexity grows with its logarithm."""
    try:
        return perplexity * math.expm1(nats)
    except OverflowError:
        return math.inf


def _compare(matched: Pair, margin: float, *, sequential: bool) -> Comparison:
    from gates import statistics

    losses = statistics.floats(matched.losses)
    labels = statistics.labels(matched.clusters) if matched.clusters else None
    if matched.kind is not Kind.MEAN:
        weights = statistics.floats(matched.baseline.weights or [1.0] * matched.questions)
        return statistics.compare_ratio(losses, weights, margin, alpha=ALPHA)
    if sequential and matched.baseline.clusters:
        # Named clusters count from the start: none of them may have a second question as yet.
        labels = statistics.labels(matched.baseline.clusters)
        return statistics.compare_looks(
            losses, margin, clusters=labels, size=matched.size, alpha=ALPHA
        )
    if sequential:
        return statistics.compare_sequence(losses, margin, alpha=ALPHA)
    if matched.is_binary and labels is None:
        return statistics.compare_binary(
            lost=matched.lost,
            gained=matched.gained,
            questions=matched.questions,
            margin=margin,
            alpha=ALPHA,
        )
    return statistics.compare_means(losses, margin, clusters=labels, alpha=ALPHA)


def _implausible_gain(matched: Pair, limit: Limit, comparison: Comparison) -> Anomaly:
    gain, least = (-limit.in_task(drop) for drop in (comparison.estimate, comparison.upper))
    return Anomaly(
        failure_class=FailureClass.IMPLAUSIBLE_SCORE,
        detail=f"{matched.task}: candidate exceeds baseline by {gain:.3g}, by {least:.3g} at least "
        f"with {SURE} confidence, which rounding weights does not explain",
    )
