"""From a log of samples to what the gates read: the audit of a run, and its questions one by one.

Counts and lists only; which of them may be how large is for the gates to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from typing import Any

from conductor.probes.sample_log import PERPLEXITIES, Column, Plan, Rows, SampleLog

_EXAMPLES = 5
_DIGEST_BYTES = 16


def audit(
    log: SampleLog, *, sampled: bool, context_overflow: int | None, task_hash: str | None
) -> dict[str, Any]:
    """Return what a run summary says about the samples of one task.

    ``task_hash`` is that of the results; it says whether the log still has the rows it was of.
    """
    counts = log.answers
    hashes = (task_hash, log.task_hash)
    return {
        "filters": {name: _filter(rows, log) for name, rows in sorted(log.rows.items())},
        "plan": _plan_source(log.reading.plan),
        "answers": {
            "asked": counts.asked,
            "null": counts.null,
            "empty": counts.empty,
            "truncated": counts.truncated,
            "refused": counts.refused,
            "non_finite": counts.non_finite,
            **_sameness(log),
        },
        "recomputed_score": log.recomputed(),
        "recomputed_stderr": log.standard_error(),
        "rows_as_written": None if None in hashes else task_hash == log.task_hash,
        "repeats": _repeats(log, sampled=sampled),
        "context_overflow": context_overflow,
    }


def _plan_source(plan: Plan) -> str:
    """Say where it is known from which documents were to be asked."""
    if plan.documents is None:
        return "log"
    return "count" if isinstance(plan.documents, range) else "file"


def _filter(rows: Rows, log: SampleLog) -> dict[str, Any]:
    planned = sum(map(len, log.plans.values())) + log.unnamed
    scored = sum(map(len, rows.seen.values()))
    return {
        "planned": planned,
        "scored": scored,
        "missing": planned - scored,
        "duplicated": rows.duplicated.total(),
        "unplanned": rows.unplanned.total(),
        "examples": list(islice(_examples(rows, log), _EXAMPLES)),
    }


def _examples(rows: Rows, log: SampleLog) -> Iterator[str]:
    """Name documents that are not as planned, some of each kind."""
    missing = (
        f"doc {document} missing" + (f" in repeat {repeat}" if repeat else "")
        for repeat, plan in log.plans.items()
        for document in plan
        if document not in rows.seen.get(repeat, ())
    )
    kinds = (
        missing,
        (f"doc {document} scored {n + 1} times" for document, n in rows.duplicated.items()),
        (f"doc {document} not planned" for document in rows.unplanned),
    )
    for kind in kinds:
        yield from islice(kind, 2)


def _sameness(log: SampleLog) -> dict[str, int]:
    """Count the most common answer, and the most common target, over different prompts.

    Answers that are empty or unusable are counted elsewhere, and are left out here.
    """
    column = next(iter(log.columns.values()), Column())
    answers: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    prompts = set()
    for document, prompt, answer, target in zip(
        column.documents, column.prompts, column.digests, column.targets, strict=True
    ):
        if prompt in prompts or document in log.unusable or answer in log.empty_digests:
            continue
        prompts.add(prompt)
        answers[answer] += 1
        targets[target] += 1
    del targets[""]
    return {
        "identical": max(answers.values(), default=0),
        "identical_targets": max(targets.values(), default=0),
        "distinct_prompts": len(prompts),
    }


def _repeats(log: SampleLog, *, sampled: bool) -> dict[str, Any] | None:
    """Compare several answers to the same questions, of several rows or of one."""
    first, *others = log.columns.values() or [Column()]
    if not others:
        counts = log.answers
        if counts.repeats == 1:
            return None
        return {
            "count": counts.repeats,
            "questions": counts.repeated,
            "identical_questions": counts.identical,
            "sampled": sampled,
        }
    answers = [dict(zip(each.documents, each.digests, strict=True)) for each in others]
    asked = [
        [digest, *(each[document] for each in answers if document in each)]
        for document, digest in zip(first.documents, first.digests, strict=True)
    ]
    repeated = [digests for digests in asked if len(digests) > 1]
    return {
        "count": len(log.columns),
        "questions": len(repeated),
        "identical_questions": sum(len(set(digests)) == 1 for digests in repeated),
        "sampled": sampled,
    }


def samples(log: SampleLog) -> dict[str, Any] | None:
    """Return the questions of one task with their scores, or nothing where none is usable.

    Raises:
        ValueError: some questions have more answers than others.
    """
    columns = list(log.columns.values())
    places = [_usable(column, log) for column in columns]
    if not columns or not places[0]:
        return None
    first, order = columns[0], list(places[0].values())
    if any(each.keys() != places[0].keys() for each in places):
        counts = ", ".join(str(len(each)) for each in places)
        raise ValueError(f"its repeats have {counts} questions, and not all of them the same")
    rows = [[at[document] for document in places[0]] for at in places]
    document: dict[str, Any] = {
        "questions": [first.keys[at] for at in order],
        "scores": _per_question([c.scores for c in columns], rows),
        "answers": _joined([c.digests for c in columns], rows),
        "answer_kind": "loglikelihood" if log.reading.likelihood else "text",
    }
    if log.reading.aggregation in PERPLEXITIES:
        document["weights"] = [first.weights[at] for at in order]
    if first.clusters:
        document["clusters"] = [first.clusters[at] for at in order]
    if first.choices and all(first.choices) and not log.reading.divided:
        document["choice_logprobs"] = [list(first.choices[at]) for at in order]
    lengths = [_means([c.lengths for c in columns], row) for row in zip(*rows, strict=True)]
    if None not in lengths:
        document["lengths"] = lengths
    if not log.reading.likelihood and log.answers.asked:
        document["mean_answer_characters"] = log.answers.characters / log.answers.asked
    return document


def _usable(column: Column, log: SampleLog) -> dict[Any, int]:
    """Return where each usable question of a column stands, by document."""
    return {
        document: at for at, document in enumerate(column.documents) if document not in log.unusable
    }


def _per_question(columns: list[Any], rows: list[list[int]]) -> list[Any]:
    """Return one value per question, or a list of them where there were repeats."""
    lists = [[column[at] for at in row] for column, row in zip(columns, rows, strict=True)]
    return lists[0] if len(lists) == 1 else [list(each) for each in zip(*lists, strict=True)]


def _joined(columns: list[list[str]], rows: list[list[int]]) -> list[str]:
    """Return one digest per question over the answers of all repeats."""
    digests = _per_question(columns, rows)
    if len(columns) == 1:
        return digests
    return [
        blake2b("".join(each).encode(), digest_size=_DIGEST_BYTES).hexdigest() for each in digests
    ]


def _means(columns: list[list[float | None]], row: tuple[int, ...]) -> float | None:
    values = [column[at] for column, at in zip(columns, row, strict=True)]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
