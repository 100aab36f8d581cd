"""Gate on one evaluation run: may its scores be compared at all?

A harness can end with exit code 0 after losing samples, after a judge refused every request, or
without a score. Every task must have ended well, scored every sample it was given, reported no
error, and have a score on its scale. Where the raw samples were audited, they must be exactly those
planned, answered by a model rather than by a failing server or a cache, and add up to the score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gates.audit import Audit, FilterAudit, RepeatAudit, ServerFacts, parse_limits
from gates.criteria import (
    ANSWER_LIMITS,
    FEWEST_ALIKE,
    IDENTICAL_ANSWERS_ABOVE_TARGETS,
    RECOMPUTED_SCORE_TOLERANCE,
    SERVER_ERROR_RATE,
)
from gates.evidence import ErrorKind, EvidenceError, Status, TaskRun, field, join, mapping
from gates.verdict import Check, FailureClass, Verdict

GATE = "run"

_MOST_ACTIONABLE_FIRST = (
    FailureClass.EVAL_JUDGE_FAILED,
    FailureClass.ANSWERS_REPLAYED,
    FailureClass.SAMPLE_ACCOUNTING_FAILED,
    FailureClass.IMPLAUSIBLE_SCORE,
    FailureClass.INFRA_TRANSIENT,
    FailureClass.UNKNOWN,
)

_UNDECLARED_SCALE = 100.0

_STDERR_TOLERANCE = 0.05
"""Relative difference that is noted: dividing by n and by n - 1 differ by 2 % at 30 questions."""

_Finding = tuple[Check, FailureClass]
"""A check, and the class of its failure if it fails."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One task: how it ended and, where somebody looked, what its samples came to."""

    run: TaskRun
    audit: Audit | None
    limits: Mapping[str, float]

    @classmethod
    def parse(cls, value: object, path: str) -> _Task:
        document = mapping(value, path)
        audit = document.get("audit")
        limits = document.get("limits")
        return cls(
            run=TaskRun.parse(document, path),
            audit=None if audit is None else Audit.parse(audit, join(path, "audit")),
            limits={
                **ANSWER_LIMITS,
                **({} if limits is None else parse_limits(limits, join(path, "limits"))),
            },
        )


def evaluate_run(summary: object) -> Verdict:
    """Check a run summary ``{"tasks": {name: {...}}}``, described by ``schemas/run_summary.json``.

    A summary that cannot be read, or holds no task, fails with ``USER_CONFIG_ERROR``; a count or
    score that is missing or odd, and samples that are not as planned, fail with
    ``SAMPLE_ACCOUNTING_FAILED``; answers that did not come from the questions with
    ``ANSWERS_REPLAYED``; a score that is not that of its samples with ``IMPLAUSIBLE_SCORE``; a
    server that failed or started again with ``INFRA_TRANSIENT``. Nothing is raised.
    """
    try:
        document = mapping(summary, "")
        tasks = _tasks(document)
        stated = document.get("server")
        server = None if stated is None else ServerFacts.parse(stated, "server")
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    findings = {name: list(_findings(name, task)) for name, task in sorted(tasks.items())}
    served = list(_server(server)) if server else []
    all_findings = [*(each for found in findings.values() for each in found), *served]
    failed = [each for each in all_findings if not each[0].passed]
    classes = [failure_class for _, failure_class in failed]
    return Verdict(
        gate=GATE,
        checks=tuple(check for check, _ in all_findings),
        failure_class=min(classes, key=_MOST_ACTIONABLE_FIRST.index, default=None),
        detail="; ".join(check.detail for check, _ in failed) or f"all {len(tasks)} task(s) valid",
        notes=(*_notes(tasks), *(_server_notes(server) if server else ())),
        per_task={name: _outcome(found) for name, found in findings.items()},
    )


def _tasks(document: Mapping[str, object]) -> dict[str, _Task]:
    entries = mapping(field(document, "tasks", ""), "tasks")
    if not entries:
        raise EvidenceError("tasks", "must name at least one task; the run has no tasks")
    return {name: _Task.parse(entry, join("tasks", name)) for name, entry in entries.items()}


def _outcome(findings: list[_Finding]) -> Mapping[str, object]:
    reasons = [check.detail for check, _ in findings if not check.passed]
    return {"ok": not reasons, "reasons": reasons}


def _findings(name: str, task: _Task) -> Iterator[_Finding]:
    """Check one task; samples and score of a task that has not ended say nothing yet."""
    path = join("tasks", name)
    yield _status(path, task.run)
    yield _errors(path, task.run)
    if task.run.unfinished:
        return
    yield _samples(path, task.run)
    yield _score(path, task.run, task.audit)
    if task.audit:
        for answer_filter, counted in task.audit.filters.items():
            yield _items(f"{path}.filters.{answer_filter}", counted)
        yield from _answers(f"{path}.answers", task.audit, task.limits)
        yield _identical(f"{path}.answers.identical", task.audit, task.limits["identical"])
        if task.audit.repeats and task.audit.repeats.repeats > 1:
            yield _repeats(f"{path}.repeats", task.audit.repeats, task.run)
        if task.run.score is not None and task.audit.recomputed_score is not None:
            yield _recomputed(f"{path}.recomputed_score", task.run.score, task.audit)


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


def _score(path: str, task: TaskRun, audit: Audit | None) -> _Finding:
    """Require a score on its scale; where the samples have another, the score is to blame."""
    score, detail = task.score, ""
    low, high = 0.0, task.scale or _UNDECLARED_SCALE
    if score is None:
        detail = str(task.faults["score"])
    elif not low <= score <= high and not _unbounded(task, audit):
        detail = f"{path}.score: {score:g} is outside its scale of 0 to {high:g}"
    check = Check(
        subject=f"{path}.score",
        observed=score,
        limit="that of its samples" if _unbounded(task, audit) else [low, high],
        passed=not detail,
        detail=detail,
    )
    other_score = score is not None and audit is not None and not _adds_up(score, audit)
    return check, (
        FailureClass.IMPLAUSIBLE_SCORE if other_score else FailureClass.SAMPLE_ACCOUNTING_FAILED
    )


def _unbounded(task: TaskRun, audit: Audit | None) -> bool:
    """Tell whether a score without a declared scale is known from its samples instead."""
    known = audit is not None and audit.recomputed_score is not None
    return task.scale is None and task.score is not None and known


def _adds_up(score: float, audit: Audit) -> bool:
    """Tell whether a score is that of its samples, as far as it was worked out."""
    tolerance = RECOMPUTED_SCORE_TOLERANCE
    found = audit.recomputed_score
    return found is None or math.isclose(score, found, rel_tol=tolerance, abs_tol=tolerance**2)


def _recomputed(path: str, score: float, audit: Audit) -> _Finding:
    passed = _adds_up(score, audit)
    check = Check(
        subject=path,
        observed=audit.recomputed_score,
        limit=score,
        passed=passed,
        detail=""
        if passed
        else f"{path}: the samples come to {audit.recomputed_score:.6g}, "
        f"but the reported score is {score:.6g}",
    )
    return check, FailureClass.IMPLAUSIBLE_SCORE


def _other_stderr(task: TaskRun, audit: Audit) -> bool:
    """Tell whether a standard error is none that follows from the samples, by whatever formula."""
    found = audit.recomputed_stderr
    if found is None or task.stderr is None:
        return False
    return not math.isclose(task.stderr, found, rel_tol=_STDERR_TOLERANCE, abs_tol=1e-12)


def _items(path: str, counted: FilterAudit) -> _Finding:
    """Require each planned item exactly once, and no other."""
    amiss = {
        name: getattr(counted, name)
        for name in ("missing", "duplicated", "unplanned")
        if getattr(counted, name)
    }
    if not amiss and counted.scored != counted.planned:
        amiss = {"scored": counted.scored}
    found = ", ".join(f"{number} {name}" for name, number in amiss.items())
    named = f" ({', '.join(counted.examples)})" if counted.examples else ""
    check = Check(
        subject=path,
        observed={
            name: getattr(counted, name)
            for name in ("scored", "missing", "duplicated", "unplanned")
        },
        limit={"scored": counted.planned, "missing": 0, "duplicated": 0, "unplanned": 0},
        passed=not amiss,
        detail=f"{path}: of {counted.planned} planned items, {found}{named}" if amiss else "",
    )
    return check, FailureClass.SAMPLE_ACCOUNTING_FAILED


_KINDS = {
    "null": "are null or no text",
    "empty": "are empty",
    "non_finite": "have a log-probability that is no finite number",
    "truncated": "were cut off by the length limit",
    "refused": "were refused by a content filter",
}


def _answers(path: str, audit: Audit, limits: Mapping[str, float]) -> Iterator[_Finding]:
    """Hold the share of each kind of unusable answer to its limit."""
    asked = audit.answers.asked
    for kind, words in _KINDS.items():
        number = getattr(audit.answers, kind)
        if number is not None:
            yield _rate(f"{path}.{kind}", number, asked, limits[kind], f"answers {words}")
    if audit.context_overflow is not None:
        limit = limits["context_overflow"]
        words = "prompts were cut to fit the model's context"
        yield _rate(f"{path}.context_overflow", audit.context_overflow, asked, limit, words)


def _rate(path: str, number: int, total: int, limit: float, words: str) -> _Finding:
    share = number / total if total else float(number > 0)
    passed = share <= limit
    check = Check(
        subject=path,
        observed={"count": number, "of": total, "share": share},
        limit=limit,
        passed=passed,
        detail=""
        if passed
        else f"{path}: {number} of {total} {words} ({share:.1%}, at most {limit:.1%} allowed)",
    )
    return check, FailureClass.SAMPLE_ACCOUNTING_FAILED


def _identical(path: str, audit: Audit, floor: float) -> _Finding:
    """Refuse one answer to most of the questions, unless most have one target."""
    answers = audit.answers
    prompts = max(answers.distinct_prompts, 1)
    share = answers.identical / prompts
    expected = answers.identical_targets / prompts
    limit = min(1.0, max(floor, expected + IDENTICAL_ANSWERS_ABOVE_TARGETS))
    passed = share <= limit or answers.distinct_prompts < FEWEST_ALIKE
    check = Check(
        subject=path,
        observed={"count": answers.identical, "of": answers.distinct_prompts, "share": share},
        limit=limit,
        passed=passed,
        detail=""
        if passed
        else f"{path}: {answers.identical} of {answers.distinct_prompts} different prompts got "
        f"the same answer ({share:.1%}, at most {limit:.1%} allowed)",
    )
    return check, FailureClass.ANSWERS_REPLAYED


def _repeats(path: str, repeats: RepeatAudit, task: TaskRun) -> _Finding:
    """Require that draws differ somewhere; without sampling, equal answers are as they should."""
    questions = task.expected_samples if repeats.questions is None else repeats.questions
    replayed = (
        repeats.sampled
        and questions is not None
        and repeats.identical_questions >= max(questions, FEWEST_ALIKE)
    )
    check = Check(
        subject=path,
        observed={"count": repeats.repeats, "identical_questions": repeats.identical_questions},
        limit=f"under {questions} identical questions" if repeats.sampled else "any",
        passed=not replayed,
        detail=f"{path}: {repeats.repeats} sampled answers are bit-identical on all "
        f"{repeats.identical_questions} questions, so they were not drawn afresh"
        if replayed
        else "",
    )
    return check, FailureClass.ANSWERS_REPLAYED


def _server(server: ServerFacts) -> Iterator[_Finding]:
    """Hold the server to few failed requests and one start."""
    total = sum(server.status_codes.values())
    failed = _failed_requests(server)
    check, _ = _rate(
        "server.errors", sum(failed.values()), total, SERVER_ERROR_RATE, "requests failed"
    )
    yield check, FailureClass.INFRA_TRANSIENT
    if server.starts is not None:
        passed = server.starts <= 1
        yield (
            Check(
                subject="server.starts",
                observed=server.starts,
                limit=1,
                passed=passed,
                detail=""
                if passed
                else f"server.starts: the server started {server.starts} times during one run",
            ),
            FailureClass.INFRA_TRANSIENT,
        )


def _failed_requests(server: ServerFacts) -> dict[str, int]:
    """Return what harnesses ask again; where nothing was answered, all that was asked."""
    answered = any(number and code.startswith("2") for code, number in server.status_codes.items())
    return {
        code: number
        for code, number in server.status_codes.items()
        if number and (code.startswith("5") or code == "429" or not answered)
    }


def _server_notes(server: ServerFacts) -> Iterator[str]:
    others = {
        code: number
        for code, number in server.status_codes.items()
        if number and not code.startswith("2")
    }
    if others:
        counts = ", ".join(f"{number} with {code}" for code, number in sorted(others.items()))
        yield f"server: of {sum(server.status_codes.values())} requests, some ended badly: {counts}"
    if not any(server.status_codes.values()):
        yield "server: the log has no request, so nobody knows whether any failed"


def _notes(tasks: Mapping[str, _Task]) -> Iterator[str]:
    """Say what nobody could count, one line for all tasks."""
    for name, task in sorted(tasks.items()):
        if task.run.scale is None and not _unbounded(task.run, task.audit):
            yield (
                f"{name}: no scale declared, so the score was only held to 0 to "
                f"{_UNDECLARED_SCALE:g}"
            )
    audits = {name: task.audit for name, task in sorted(tasks.items()) if task.audit}
    unknown = {
        "not known whether answers were cut off or refused, for the log has no finish_reasons": [
            name
            for name, audit in audits.items()
            if audit.answers.truncated is None or audit.answers.refused is None
        ],
        "not known whether prompts were cut to fit the context": [
            name for name, audit in audits.items() if audit.context_overflow is None
        ],
        "score not worked out from the samples, for its metric is no mean or perplexity": [
            name for name, audit in audits.items() if audit.recomputed_score is None
        ],
        "which documents were to be asked is known from the log alone": [
            name for name, audit in audits.items() if audit.plan == "log"
        ],
        "rows were taken out, added or changed after the harness hashed them; nothing else tells "
        "what they were": [
            name for name, audit in audits.items() if audit.rows_as_written is False
        ],
        "the reported standard error is not that of the samples; no gate reads it": [
            name for name, audit in audits.items() if _other_stderr(tasks[name].run, audit)
        ],
    }
    for words, names in unknown.items():
        if names:
            everything = len(names) == len(tasks) and len(names) > 1
            yield f"{'all tasks' if everything else ', '.join(names)}: {words}"
