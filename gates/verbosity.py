"""Gate on output length: does the candidate answer as long as its baseline did?

Quantization can keep a score and double the tokens it costs, or cut answers short. The mean
completion length is compared per task, in both directions, and only between runs that answered
equally many samples: a truncated run covers other questions. What could not be compared is named
in the verdict and never absorbed by a task that could.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gates import evidence
from gates.criteria import SAMPLE_COUNT_TOLERANCE, SHORT_OUTPUT_TOKENS, VERBOSITY_THRESHOLD
from gates.evidence import EvidenceError, join, shown
from gates.scores import decimal
from gates.verdict import Check, FailureClass, Verdict

GATE = "verbosity"


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run of a task: mean completion tokens over its successful samples."""

    tokens: float
    samples: int


_Runs = dict[str, list[_Run]]


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """One task's row, with its change as a fraction where the two sides can be compared."""

    row: Mapping[str, object]
    delta: float | None = None
    within: bool = False


def evaluate_verbosity(
    baseline: object,
    candidate: object,
    threshold: float = VERBOSITY_THRESHOLD,
    dropped_tasks: Iterable[str] = (),
    collapsed_keys: Mapping[str, object] | None = None,
    found_artifacts: bool = False,
) -> Verdict:
    """Compare ``{task: [(mean completion tokens, successful samples), ...]}`` of two sides.

    ``threshold`` is the largest change as a fraction of the baseline's mean. ``dropped_tasks``
    names tasks that were left out while collecting, ``collapsed_keys`` those whose runs may belong
    to several tasks (this fails), and ``found_artifacts`` tells a dead evaluation from a wrong
    path when there is nothing to compare. Nothing is raised.
    """
    try:
        limit = evidence.fraction(threshold, "threshold")
        dropped = dropped_of(dropped_tasks)
        collapsed = evidence.mapping(collapsed_keys or {}, "collapsed_keys")
        sides = _side(baseline, "baseline"), _side(candidate, "candidate")
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    if not all(sides):
        return _nothing_measured(sides, found_artifacts)
    if collapsed:
        return _layout_unclear(collapsed)
    tasks = sorted({*sides[0], *sides[1]})
    comparisons = {
        task: _compare(sides[0].get(task, []), sides[1].get(task, []), limit) for task in tasks
    }
    return _verdict(comparisons, limit, dropped)


def _side(value: object, side: str) -> _Runs:
    return {
        task: [
            _run(row, f"{join(side, task)}[{i}]")
            for i, row in enumerate(evidence.sequence(rows, join(side, task)))
        ]
        for task, rows in evidence.mapping(value, side).items()
    }


def _run(row: object, path: str) -> _Run:
    entries = evidence.sequence(row, path)
    if len(entries) != 2:
        raise EvidenceError(path, f"must be [mean tokens, samples], got {shown(row)}")
    return _Run(
        tokens=evidence.number(
            entries[0], f"{path}[0]", minimum=0.0, maximum=float(evidence.LARGEST_COUNT)
        ),
        samples=evidence.count(entries[1], f"{path}[1]", minimum=1),
    )


def dropped_of(value: object) -> list[str]:
    """Read the names of tasks that were left out; a set is one, too.

    Raises:
        EvidenceError: it is no list of texts.
    """
    entries = sorted(value) if isinstance(value, (set, frozenset)) else value
    return sorted(
        evidence.text(task, f"dropped_tasks[{i}]")
        for i, task in enumerate(evidence.sequence(entries, "dropped_tasks"))
    )


def _nothing_measured(sides: tuple[_Runs, _Runs], found_artifacts: bool) -> Verdict:
    what = f"no usable metrics (baseline: {len(sides[0])} tasks, candidate: {len(sides[1])})"
    remedy = (
        "artifacts were found, but no run had successful samples: look at the evaluation"
        if found_artifacts
        else "check where --baseline, --candidate and --glob point"
    )
    return _failed(
        FailureClass.SAMPLE_ACCOUNTING_FAILED
        if found_artifacts
        else FailureClass.USER_CONFIG_ERROR,
        "metrics",
        observed=[len(side) for side in sides],
        limit="tasks on both sides",
        detail=f"{what}; {remedy}",
    )


def _layout_unclear(collapsed_keys: Mapping[str, object]) -> Verdict:
    return _failed(
        FailureClass.USER_CONFIG_ERROR,
        "layout",
        observed=collapsed_keys,
        limit={},
        detail=f"artifact layout not understood: {len(collapsed_keys)} task key(s) gather several "
        f"directories, whose means may be of unrelated tasks: {', '.join(sorted(collapsed_keys))}",
    )


def _failed(
    failure_class: FailureClass, subject: str, *, observed: object, limit: object, detail: str
) -> Verdict:
    check = Check(subject=subject, observed=observed, limit=limit, passed=False, detail=detail)
    return Verdict(gate=GATE, checks=(check,), failure_class=failure_class, detail=detail)


def _compare(baseline: list[_Run], candidate: list[_Run], limit: float) -> _Comparison:
    """Compare one task's mean lengths over the runs of the largest size both sides have."""
    if not baseline or not candidate:
        return _not_comparable("present on one side only")
    size = _largest_shared_size(baseline, candidate)
    if size is None:
        counts = [sorted({run.samples for run in runs}) for runs in (baseline, candidate)]
        return _not_comparable(
            f"no sample count within {SAMPLE_COUNT_TOLERANCE:.0%} on both sides "
            f"(baseline {counts[0]}, candidate {counts[1]})"
        )
    base = [run for run in baseline if _same_size(run.samples, size)]
    cand = [run for run in candidate if _same_size(run.samples, size)]
    base_mean, cand_mean = _mean_tokens(base), _mean_tokens(cand)
    if base_mean == 0:
        return _not_comparable("the baseline mean is zero, so a relative change is undefined")
    change = decimal(cand_mean) - decimal(base_mean)
    delta = round(float(change / decimal(base_mean)), 4)
    within = abs(change) <= decimal(limit) * decimal(base_mean)
    used = sorted({run.samples for run in base + cand})
    row: dict[str, object] = {
        "status": "compared",
        "sample_counts": used,
        "baseline_tokens": round(base_mean, 1),
        "candidate_tokens": round(cand_mean, 1),
        "delta": delta,
        "within_threshold": within,
        "runs": [len(base), len(cand)],
        "dropped_mismatched_runs": len(baseline) + len(candidate) - len(base) - len(cand),
    }
    largest = max(run.samples for run in baseline + candidate)
    if used[-1] < largest:
        row["truncated_comparison"] = (
            f"compared at n={used}; one side also has a run at n={largest}"
        )
    row |= short_output_warning(base_mean, cand_mean)
    return _Comparison(row=row, delta=delta, within=within)


def short_output_warning(*means: float) -> dict[str, str]:
    """Return what a task's row says of answers so short that a few tokens are a large share."""
    if min(means) >= SHORT_OUTPUT_TOKENS:
        return {}
    warning = f"a mean is under {SHORT_OUTPUT_TOKENS} tokens, where a few tokens are a large share"
    return {"short_output_warning": warning}


def _mean_tokens(runs: list[_Run]) -> float:
    return math.fsum(run.tokens for run in runs) / len(runs)


def _not_comparable(reason: str) -> _Comparison:
    return _Comparison(row={"status": "not_comparable", "reason": reason})


def _same_size(samples: int, size: int) -> bool:
    return abs(decimal(samples) - size) <= decimal(SAMPLE_COUNT_TOLERANCE) * size


def _largest_shared_size(baseline: list[_Run], candidate: list[_Run]) -> int | None:
    """Return the largest run size that both sides have, within the tolerance."""
    sizes = sorted({run.samples for run in baseline + candidate}, reverse=True)
    for size in sizes:
        if all(any(_same_size(r.samples, size) for r in runs) for runs in (baseline, candidate)):
            return size
    return None


def _verdict(comparisons: Mapping[str, _Comparison], limit: float, dropped: list[str]) -> Verdict:
    compared = {task: c for task, c in comparisons.items() if c.delta is not None}
    unmeasured = tuple(task for task in comparisons if task not in compared)
    exceeded = [task for task, comparison in compared.items() if not comparison.within]
    failure_class = None
    detail = f"all {len(compared)} comparable task(s) within threshold {limit}"
    if not compared:
        failure_class = FailureClass.SAMPLE_ACCOUNTING_FAILED
        detail = "no task had comparable runs on both sides"
    elif exceeded:
        failure_class = FailureClass.VERBOSITY_EXCEEDED
        detail = f"output length changed by more than {limit}: {exceeded}"
    return Verdict(
        gate=GATE,
        checks=tuple(_check(task, comparison, limit) for task, comparison in compared.items()),
        failure_class=failure_class,
        detail=detail + left_out(unmeasured, dropped),
        notes=tuple(f"{task}: {comparisons[task].row['reason']}" for task in unmeasured),
        per_task={task: comparison.row for task, comparison in comparisons.items()},
        not_comparable=unmeasured,
        max_abs_delta=max(
            (abs(c.delta) for c in comparisons.values() if c.delta is not None), default=None
        ),
    )


def left_out(unmeasured: Sequence[str], dropped: Sequence[str]) -> str:
    """Return what to add to a verdict's detail on tasks that were not compared."""
    said = ""
    if unmeasured:
        said += f"; {len(unmeasured)} task(s) NOT MEASURED: {list(unmeasured)}"
    if dropped:
        said += f"; {len(dropped)} task(s) DROPPED BEFORE COMPARISON: {list(dropped)}"
    return said


def _check(task: str, comparison: _Comparison, limit: float) -> Check:
    row = comparison.row
    return Check(
        subject=join("tasks", task),
        observed=comparison.delta,
        limit=limit,
        passed=comparison.within,
        detail=f"{task}: {row['baseline_tokens']} to {row['candidate_tokens']} tokens",
    )
