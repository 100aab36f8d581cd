"""Gate on accuracy: is the candidate within the threshold of its baseline, task by task?

Scores that cannot be believed are told apart from scores that are bad: a value outside its scale,
an unexplained gain, or two sides in different units end ANOMALOUS, because a decision on them
would be about the measurement and not about the model. Input that cannot be read gives no
decision at all.

This rule looks at scores alone, so it takes chance for the truth; every verdict says how often, as
far as that can be known. Where both sides have samples, ``gates.noninferiority`` decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from gates import evidence
from gates.criteria import (
    ASSUMED_DISCORDANCE,
    FRACTION_SUSPECTED_SCALE,
    IMPLAUSIBLE_GAIN,
    RISKY_DROP_MARGINS,
    SCORE_THRESHOLD,
)
from gates.evidence import EvidenceError, join, shown
from gates.scores import Scale, decimal, scale_of, units_differ
from gates.verdict import Check, Decision, FailureClass, Verdict

GATE = "compare"


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """How far a score may fall; a task without a direction counts upwards."""

    threshold: Decimal
    relative: bool
    scales: Mapping[str, float]
    higher_is_better: Mapping[str, bool]

    def limit(self, baseline: Decimal, scale: Scale) -> Decimal:
        """Return the largest drop allowed, in the task's own units."""
        return self.threshold * (abs(baseline) if self.relative else decimal(scale.full))


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """One task compared: its row, its check, and what makes it unbelievable, if anything."""

    task: str
    check: Check
    row: Mapping[str, object]
    anomaly: str = ""
    note: str = ""
    score: float = 0.0
    margin: float = 0.0
    """The baseline's score and the limit of the drop, as fractions of the scale."""


def evaluate_comparison(
    baseline: object,
    candidate: object,
    threshold: float = SCORE_THRESHOLD,
    relative: bool = False,
    scales: object = None,
    *,
    directions: object = None,
    questions: object = None,
) -> Verdict:
    """Compare two sets of scores ``{task: score}``.

    ``threshold`` is the largest drop as a fraction of each task's scale, or of the baseline score
    if ``relative``; a drop of exactly the threshold is within it. ``scales`` holds the full score
    of tasks (1.0, 100.0), ``directions`` is false for tasks whose lower score is better.
    ``questions`` ``{task: number asked}`` changes no decision; with it the verdict's notes say how
    often chance alone would give another one. The decision is ACCEPT, REGRESSION or ANOMALOUS, and
    ``None`` where the input was refused. Nothing is raised.
    """
    try:
        base, cand = (
            evidence.mapping(baseline, "baseline"),
            evidence.mapping(candidate, "candidate"),
        )
        if not base and not cand:
            raise EvidenceError("baseline", "holds no task, so there is nothing to compare")
        tasks = {*base, *cand}
        rule = _Rule(
            threshold=decimal(evidence.fraction(threshold, "threshold")),
            relative=evidence.boolean(relative, "relative"),
            scales=evidence.scales(scales, tasks),
            higher_is_better=directions_of(directions, tasks),
        )
        asked = _asked(questions, tasks)
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    one_sided = sorted(set(base) ^ set(cand))
    if one_sided:
        return task_sets_differ(one_sided)
    comparisons = [_compare(task, base[task], cand[task], rule) for task in sorted(tasks)]
    return _verdict(comparisons, rule, _risk(comparisons, rule, asked))


def _asked(value: object, tasks: set[str]) -> dict[str, int]:
    """Read ``{task: number of questions}``."""
    asked = {}
    for task, entry in evidence.mapping({} if value is None else value, "questions").items():
        path = join("questions", task)
        if task not in tasks:
            raise EvidenceError(path, "names a task that has no score; remove it or fix its name")
        asked[task] = evidence.count(entry, path, minimum=1)
    return asked


def directions_of(value: object, tasks: set[str]) -> dict[str, bool]:
    """Read ``{task: higher is better}``, all of them among ``tasks``.

    Raises:
        EvidenceError: a task is unknown, or its direction neither true nor false.
    """
    result = {}
    for task, entry in evidence.mapping(value or {}, "directions").items():
        path = join("directions", task)
        if task not in tasks:
            raise EvidenceError(path, "names a task that has no score; remove it or fix its name")
        result[task] = evidence.boolean(entry, path)
    return result


def task_sets_differ(one_sided: list[str]) -> Verdict:
    """Return the verdict on sides that were not asked the same tasks."""
    detail = f"task sets differ; on one side only: {one_sided}"
    check = Check(subject="task_sets", observed=one_sided, limit=[], passed=False, detail=detail)
    return Verdict(
        gate=GATE,
        checks=(check,),
        failure_class=FailureClass.SAMPLE_ACCOUNTING_FAILED,
        decision=Decision.ANOMALOUS,
        detail=detail,
    )


def _compare(task: str, baseline: object, candidate: object, rule: _Rule) -> _Comparison:
    """Compare one task's scores, or say why they cannot be compared."""
    try:
        base = evidence.number(baseline, join("baseline", task))
        cand = evidence.number(candidate, join("candidate", task))
    except EvidenceError as error:
        return _unreadable(task, baseline, candidate, str(error))
    scale = scale_of(task, (base, cand), rule.scales)
    loss = decimal(base) - decimal(cand)
    drop = loss if rule.higher_is_better.get(task, True) else -loss
    limit = rule.limit(decimal(base), scale)
    anomaly = _anomaly(task, (base, cand), drop, scale, rule)
    within = drop <= limit and not anomaly
    unit = abs(decimal(base)) if rule.relative else decimal(scale.full)
    drop_fraction = float(drop / unit) if unit else None
    return _Comparison(
        task=task,
        check=Check(
            subject=join("tasks", task),
            observed=drop_fraction,
            limit=float(rule.threshold),
            passed=within,
            detail=anomaly
            or f"{task}: {base:g} to {cand:g}, dropped {float(drop):g} of {float(limit):g} allowed",
        ),
        row={
            "baseline": base,
            "candidate": cand,
            "drop": float(drop),
            "drop_fraction": drop_fraction,
            "limit": float(limit),
            "scale": scale.full,
            "within_threshold": within,
        },
        anomaly=anomaly,
        note=_note(task, (base, cand), scale),
        score=base / scale.full,
        margin=float(limit) / scale.full,
    )


def _note(task: str, scores: tuple[float, float], scale: Scale) -> str:
    """Say what a reader should know of the scale, or nothing."""
    if not scale.declared:
        return f"{task}: scale {scale.full:g} inferred from the scores"
    if scale.full >= FRACTION_SUSPECTED_SCALE and max(scores) <= 1.0:
        return (
            f"{task}: both scores are at most 1 on a scale of {scale.full:g}: are they fractions? "
            "If so, declare a scale of 1"
        )
    return ""


def _unreadable(task: str, baseline: object, candidate: object, problem: str) -> _Comparison:
    check = Check(
        subject=join("tasks", task),
        observed=shown(candidate),
        limit="two finite numbers",
        passed=False,
        detail=problem,
    )
    row = {
        "baseline": baseline,
        "candidate": candidate,
        "drop": None,
        "drop_fraction": None,
        "limit": None,
        "scale": None,
        "within_threshold": False,
    }
    return _Comparison(task=task, check=check, row=row, anomaly=problem)


def _anomaly(
    task: str, scores: tuple[float, float], drop: Decimal, scale: Scale, rule: _Rule
) -> str:
    """Return why the pair of scores is not to be believed, or nothing."""
    baseline, candidate = scores
    if units_differ(baseline, candidate, scale):
        return (
            f"{task}: {baseline:g} against {candidate:g} looks like a percentage beside a "
            "fraction; give both sides in one unit and declare the scale"
        )
    for side, score in zip(("baseline", "candidate"), scores, strict=True):
        if not 0.0 <= score <= scale.full:
            return f"{task}: {side} score {score:g} is outside its scale of 0 to {scale.full:g}"
    if -drop > decimal(IMPLAUSIBLE_GAIN) * decimal(scale.full):
        gain = float(-drop)
        return (
            f"{task}: candidate exceeds baseline by {gain:g} on a scale of {scale.full:g}, "
            "which rounding weights does not explain"
        )
    if rule.relative and baseline == 0:
        return f"{task}: baseline score is 0, so a relative drop is undefined; compare absolutely"
    return ""


def _risk(comparisons: list[_Comparison], rule: _Rule, asked: Mapping[str, int]) -> str:
    """Say how often this rule is wrong, as far as the numbers of questions tell."""
    rule_is = "the threshold rule takes the observed drop for the true one"
    risks = [
        _task_risk(each, rule, asked[each.task])
        for each in comparisons
        if each.task in asked and rule.higher_is_better.get(each.task, True) and not each.anomaly
    ]
    if not risks:
        return (
            f"{rule_is}, and how often chance decides is unknown without the numbers of questions; "
            "give those, or the samples of both sides"
        )
    named = "; ".join(
        f"{task}, {questions:,} questions: {100 * refused:.0f} % and {100 * accepted:.0f} %"
        for task, questions, refused, accepted in risks
    )
    some_refused = 1 - math.prod(1 - refused for _, _, refused, _ in risks)
    return (
        f"{rule_is}. Where both sides differ in at most {100 * ASSUMED_DISCORDANCE:g} % of the "
        "answers, it refuses a lossless candidate, and passes one that is "
        f"{RISKY_DROP_MARGINS:g} margins worse, this often: {named}. At least one "
        f"of these tasks refuses a lossless candidate in {100 * some_refused:.0f} % of all cases"
    )


def _task_risk(
    comparison: _Comparison, rule: _Rule, questions: int
) -> tuple[str, int, float, float]:
    """Return task, questions, and how often a lossless and a bad candidate end the wrong way."""
    from gates import statistics

    score, margin = comparison.score, comparison.margin
    discordance = min(ASSUMED_DISCORDANCE, 2 * score * (1 - score))
    refused = statistics.false_refusal_risk(questions, margin, score=score, discordance=discordance)
    accepted = statistics.false_accept_risk(
        questions,
        margin,
        score=score,
        drop=min(RISKY_DROP_MARGINS * margin, score),
        discordance=discordance,
    )
    return comparison.task, questions, refused, accepted


def _verdict(comparisons: list[_Comparison], rule: _Rule, risk: str) -> Verdict:
    """Turn compared tasks into a verdict: unbelievable before bad before good."""
    anomalies = [c.anomaly for c in comparisons if c.anomaly]
    regressed = [c.check.detail for c in comparisons if not c.check.passed]
    failure_class = None
    decision = Decision.ACCEPT
    detail = f"all {len(comparisons)} task(s) within threshold {rule.threshold}"
    if anomalies:
        failure_class, decision = FailureClass.IMPLAUSIBLE_SCORE, Decision.ANOMALOUS
        detail = "; ".join(anomalies)
    elif regressed:
        failure_class, decision = FailureClass.ACCURACY_REGRESSION, Decision.REGRESSION
        detail = f"beyond threshold {rule.threshold}: " + "; ".join(regressed)
    return Verdict(
        gate=GATE,
        checks=tuple(c.check for c in comparisons),
        failure_class=failure_class,
        decision=decision,
        detail=detail,
        notes=(*(c.note for c in comparisons if c.note), risk),
        per_task={c.task: c.row for c in comparisons},
    )
