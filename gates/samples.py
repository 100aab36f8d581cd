"""Question-level evidence: what each question of a task was scored, on one side.

A samples document says which questions were asked, in which order, and what each scored; clusters,
lengths, digests of the answers and log-likelihoods of choices stand beside where they are known.
Invariants:

* Every list has one entry per question, every question stands once, and every number is finite.
* The checks run over whole lists at C speed, because a document may hold a million questions; the
  first bad entry is looked for only where there is one.
* A field that is not known is refused: a misspelt ``clusters`` would narrow every interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from typing import Any, Self, TypeVar

from gates import evidence
from gates.evidence import EvidenceError, field, join, mapping, sequence, shown, text

LOGLIKELIHOOD = "loglikelihood"
"""Kind of answers that are log-likelihoods of given texts."""

ANSWER_KINDS = (LOGLIKELIHOOD, "text")

_LARGEST = float(evidence.LARGEST_COUNT)
"""Largest magnitude of a score, weight, length or log-likelihood: sums of them stay finite."""

_NUMBERS = {int, float}

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class TaskSamples:
    """One task of one side; every tuple has one entry per question, in the order asked.

    ``scores`` are means over ``repeats`` answers, which ``per_repeat`` holds one by one where there
    was more than one. For perplexities they are summed log-likelihoods in nats, and ``weights`` the
    words, bytes or documents that they are divided by. ``lengths`` are completion tokens,
    ``choice_logprobs`` nats. ``size`` counts the questions of the whole benchmark.
    """

    metric: str
    filter: str
    aggregation: str
    higher_is_better: bool | None
    scale: float | None
    sampled: bool
    size: int | None
    questions: tuple[str, ...]
    scores: tuple[float, ...]
    repeats: int
    per_repeat: tuple[tuple[float, ...], ...] | None
    clusters: tuple[str, ...] | None
    weights: tuple[float, ...] | None
    lengths: tuple[float, ...] | None
    answers: tuple[str, ...] | None
    answer_kind: str | None
    mean_answer_characters: float | None
    choice_logprobs: tuple[tuple[float, ...], ...] | None

    def ordered_as(self, questions: tuple[str, ...]) -> Self:
        """Return the same samples in the order of ``questions``, which must be the same ones."""
        if self.questions == questions:
            return self
        place = {question: index for index, question in enumerate(self.questions)}
        order = [place[question] for question in questions]
        lists = {name: getattr(self, name) for name in _PER_QUESTION}
        moved: dict[str, Any] = {
            name: tuple(map(values.__getitem__, order))
            for name, values in lists.items()
            if values is not None
        }
        return replace(self, **moved)


_PER_QUESTION = (
    *("questions", "scores", "per_repeat", "clusters", "weights", "lengths", "answers"),
    "choice_logprobs",
)

_KNOWN = {each.name for each in fields(TaskSamples)} - {"repeats", "per_repeat"}


def parse_samples(document: object, path: str) -> dict[str, TaskSamples]:
    """Read a samples document ``{"tasks": {name: {...}}}``, described by ``schemas/samples.json``.

    ``path`` names the document in errors; it may be empty.

    Raises:
        EvidenceError: a field is absent, unknown, of another type or length than it must be.
    """
    place = join(path, "tasks")
    tasks = mapping(field(mapping(document, path), "tasks", path), place)
    return {name: _task(entry, join(place, name)) for name, entry in tasks.items()}


def parse_checkpoint(document: object, path: str) -> str | None:
    """Read which checkpoint a samples document is about, where it says so.

    Raises:
        EvidenceError: the document is no mapping, or the field no text.
    """
    return _optional(mapping(document, path), "checkpoint", path, text)


def _task(value: object, path: str) -> TaskSamples:
    entry = mapping(value, path)
    for key in entry:
        if key not in _KNOWN:
            raise EvidenceError(join(path, key), f"is unknown; known: {', '.join(sorted(_KNOWN))}")
    questions = _questions(field(entry, "questions", path), join(path, "questions"))
    scores, per_repeat = _scores(field(entry, "scores", path), join(path, "scores"))
    task = TaskSamples(
        metric=text(field(entry, "metric", path), join(path, "metric")),
        filter=_optional(entry, "filter", path, text) or "none",
        aggregation=_optional(entry, "aggregation", path, text) or "mean",
        higher_is_better=_optional(entry, "higher_is_better", path, evidence.boolean),
        scale=_optional(entry, "scale", path, evidence.positive),
        sampled=_optional(entry, "sampled", path, evidence.boolean) or False,
        size=_optional(entry, "size", path, evidence.count),
        questions=questions,
        scores=scores,
        repeats=len(per_repeat[0]) if per_repeat else 1,
        per_repeat=per_repeat,
        clusters=_optional(entry, "clusters", path, _texts),
        weights=_optional(entry, "weights", path, _weights),
        lengths=_optional(entry, "lengths", path, _lengths),
        answers=_optional(entry, "answers", path, _texts),
        answer_kind=_optional(entry, "answer_kind", path, _answer_kind),
        mean_answer_characters=_optional(entry, "mean_answer_characters", path, _not_negative),
        choice_logprobs=_optional(entry, "choice_logprobs", path, _choices),
    )
    _refuse_other_lengths(task, path)
    if task.size is not None and task.size < len(questions):
        raise EvidenceError(
            join(path, "size"), f"is {task.size}, but {len(questions)} questions were asked"
        )
    return task


def _optional(
    entry: Mapping[str, object], key: str, path: str, parse: Callable[[object, str], _Value]
) -> _Value | None:
    value = entry.get(key)
    return None if value is None else parse(value, join(path, key))


def _refuse_other_lengths(task: TaskSamples, path: str) -> None:
    expected = len(task.questions)
    for name in _PER_QUESTION:
        values = getattr(task, name)
        if values is not None and len(values) != expected:
            key = "scores" if name == "per_repeat" else name
            raise EvidenceError(
                join(path, key),
                f"must have one entry for each of the {expected} questions, got {len(values)}",
            )


def _questions(value: object, path: str) -> tuple[str, ...]:
    keys = _texts(value, path)
    if not keys:
        raise EvidenceError(path, "holds no question, so there is nothing to compare")
    if len(set(keys)) < len(keys):
        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            if first.setdefault(key, index) != index:
                raise EvidenceError(
                    f"{path}[{index}]",
                    f"is the same question as entry {first[key]} ({shown(key)}); name each once "
                    "and list its repeats in scores",
                )
    return keys


def _scores(
    value: object, path: str
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...] | None]:
    """Return the mean score of each question and, where there were repeats, the single ones."""
    entries = sequence(value, path)
    if not any(isinstance(entry, (list, tuple)) for entry in islice(entries, 1)):
        return _numbers(entries, path, truth_values=True), None
    rows = _rows(entries, path, truth_values=True)
    repeats = len(rows[0])
    for index, row in enumerate(rows):
        if len(row) != repeats or not row:
            raise EvidenceError(
                f"{path}[{index}]",
                f"must hold one score for each of {max(repeats, 1)} answers, got {len(row)}",
            )
    return tuple(sum(row) / repeats for row in rows), rows if repeats > 1 else None


def _rows(value: object, path: str, *, truth_values: bool = False) -> tuple[tuple[float, ...], ...]:
    """Read a list of lists of numbers."""
    entries = sequence(value, path)
    if set(map(type, entries)) <= {list, tuple}:
        rows: list[Sequence[Any]] = entries  # type: ignore[assignment]
        if _are_numbers(list(chain.from_iterable(rows)), truth_values=truth_values):
            return tuple(map(tuple, rows))
    return tuple(
        _numbers(row, f"{path}[{index}]", truth_values=truth_values)
        for index, row in enumerate(entries)
    )


def _choices(value: object, path: str) -> tuple[tuple[float, ...], ...]:
    rows = _rows(value, path)
    if () in rows:
        raise EvidenceError(f"{path}[{rows.index(())}]", "holds no choice")
    return rows


def _numbers(
    value: object, path: str, *, minimum: float = -_LARGEST, truth_values: bool = False
) -> tuple[float, ...]:
    """Read a list of finite numbers; lm-eval writes right and wrong as true and false."""
    entries = sequence(value, path)
    if _are_numbers(entries, minimum=minimum, truth_values=truth_values):
        return tuple(map(float, entries))  # type: ignore[arg-type]
    return tuple(
        evidence.number(
            float(entry) if truth_values and isinstance(entry, bool) else entry,
            f"{path}[{index}]",
            minimum=minimum,
            maximum=_LARGEST,
        )
        for index, entry in enumerate(entries)
    )


def _are_numbers(
    entries: list[Any], *, minimum: float = -_LARGEST, truth_values: bool = False
) -> bool:
    """Tell whether all of them are finite numbers from ``minimum`` on."""
    if not set(map(type, entries)) <= (_NUMBERS | {bool} if truth_values else _NUMBERS):
        return False
    # A NaN anywhere makes the sum one, and min and max would pass over it. A whole number that is
    # too large for a float is larger than any that is allowed, so it is compared before the sum.
    return not entries or (
        minimum <= min(entries) and max(entries) <= _LARGEST and math.isfinite(sum(entries))
    )


def _texts(value: object, path: str) -> tuple[str, ...]:
    entries = sequence(value, path)
    if set(map(type, entries)) <= {str}:
        return tuple(entries)  # type: ignore[arg-type]
    return tuple(text(entry, f"{path}[{index}]") for index, entry in enumerate(entries))


def _weights(value: object, path: str) -> tuple[float, ...]:
    weights = _numbers(value, path, minimum=0.0)
    if weights and min(weights) == 0.0:
        raise EvidenceError(f"{path}[{weights.index(0.0)}]", "must be greater than 0, got 0")
    return weights


def _lengths(value: object, path: str) -> tuple[float, ...]:
    return _numbers(value, path, minimum=0.0)


def _not_negative(value: object, path: str) -> float:
    return evidence.number(value, path, minimum=0.0)


def _answer_kind(value: object, path: str) -> str:
    kind = text(value, path)
    if kind not in ANSWER_KINDS:
        raise EvidenceError(path, f"must be one of {', '.join(ANSWER_KINDS)}; got {shown(kind)}")
    return kind
