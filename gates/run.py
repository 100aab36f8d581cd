"""Gate on one evaluation run: may its scores be compared at all?

A harness can end with exit code 0 after losing samples, after a judge refused every request, or
without a score. Every task must have ended well, scored every sample it was given, reported no
error, and have a score on its scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gates.evidence import ErrorKind, EvidenceError, Status, TaskRun, field, join, mapping
from gates.verdict import Check, FailureClass, Verdict

GATE = "run"

_MOST_ACTIONABLE_FIRST = (
    FailureClass.EVAL_JUDGE_FAILED,
    FailureClass.SAMPLE_ACCOUNTING_FAILED,
    FailureClass.INFRA_TRANSIENT,
    FailureClass.UNKNOWN,
)

_UNDECLARED_SCALE = 100.0

_Finding = tuple[Check, FailureClass]
"""A check, and the class of its failure if it fails."""


def evaluate_run(summary: object) -> Verdict:
    """Check a run summary ``{"tasks": {name: {...}}}``.

    A summary that cannot be read, or holds no task, fails with ``USER_CONFIG_ERROR``; a count or
    score that is missing or odd fails with ``SAMPLE_ACCOUNTING_FAILED``. Nothing is raised.
    """
    try:
        tasks = _tasks(summary)
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    findings = {name: list(_findings(name, task)) for name, task in sorted(tasks.items())}
    failed = [f for found in findings.values() for f in found if not f[0].passed]
    classes = [failure_class for _, failure_class in failed]
    return Verdict(
        gate=GATE,
        checks=tuple(check for found in findings.values() for check, _ in found),
        failure_class=min(classes, key=_MOST_ACTIONABLE_FIRST.index, default=None),
        detail="; ".join(check.detail for check, _ in failed) or f"all {len(tasks)} task(s) valid",
        notes=tuple(
            f"{name}: no scale declared, so the score was only held to 0 to {_UNDECLARED_SCALE:g}"
            for name, task in sorted(tasks.items())
            if task.scale is None
        ),
        per_task={name: _outcome(found) for name, found in findings.items()},
    )


def _tasks(summary: object) -> dict[str, TaskRun]:
    entries = mapping(field(mapping(summary, ""), "tasks", ""), "tasks")
    if not entries:
        raise EvidenceError("tasks", "must name at least one task; the run has no tasks")
    return {name: TaskRun.parse(entry, join("tasks", name)) for name, entry in entries.items()}


def _outcome(findings: list[_Finding]) -> Mapping[str, object]:
    reasons = [check.detail for check, _ in findings if not check.passed]
    return {"ok": not reasons, "reasons": reasons}


def _findings(name: str, task: TaskRun) -> Iterator[_Finding]:
    """Check one task; samples and score of a task that has not ended say nothing yet."""
    path = join("tasks", name)
    yield _status(path, task)
    yield _errors(path, task)
    if not task.unfinished:
        yield _samples(path, task)
        yield _score(path, task)


def _status(path: str, task: TaskRun) -> _Finding:
    passed = task.status == Status.SUCCESS
    check = Check(
        subject=f"{path}.status",
        observed=task.status,
        limit=Status.SUCCESS,
        passed=passed,
        detail=""
        if passed
        else f"{path}.status: {task.status!r}, "
        + ("the task has not ended" if task.unfinished else "must be SUCCESS"),
    )
    return check, FailureClass.INFRA_TRANSIENT if task.unfinished else FailureClass.UNKNOWN


def _errors(path: str, task: TaskRun) -> _Finding:
    """Require that the harness reported no error; a judge's or a door's refusal ranks first."""
    refused = [error for error in task.errors if error.kind is not ErrorKind.OTHER]
    first = next(iter(refused or task.errors), None)
    check = Check(
        subject=f"{path}.errors",
        observed=len(task.errors),
        limit=0,
        passed=first is None,
        detail=""
        if first is None
        else f"{path}.errors: {len(task.errors)} reported, first of kind {first.kind}: "
        f"{first.message}",
    )
    return check, FailureClass.EVAL_JUDGE_FAILED if refused else FailureClass.UNKNOWN


def _samples(path: str, task: TaskRun) -> _Finding:
    faults = [
        str(task.faults[key])
        for key in ("expected_samples", "scored_samples")
        if key in task.faults
    ]
    if not faults and task.scored_samples != task.expected_samples:
        faults = [f"{path}.scored_samples: {task.scored_samples} of {task.expected_samples} scored"]
    check = Check(
        subject=f"{path}.samples",
        observed=task.scored_samples,
        limit=task.expected_samples,
        passed=not faults,
        detail="; ".join(faults),
    )
    return check, FailureClass.SAMPLE_ACCOUNTING_FAILED


def _score(path: str, task: TaskRun) -> _Finding:
    scale = task.scale or _UNDECLARED_SCALE
    detail = ""
    if task.score is None:
        detail = str(task.faults["score"])
    elif not 0.0 <= task.score <= scale:
        detail = f"{path}.score: {task.score:g} is outside its scale of 0 to {scale:g}"
    check = Check(
        subject=f"{path}.score",
        observed=task.score,
        limit=[0.0, scale],
        passed=not detail,
        detail=detail,
    )
    return check, FailureClass.SAMPLE_ACCOUNTING_FAILED
