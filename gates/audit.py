"""What the samples behind a run summary came to: items planned and scored, and kinds of answers.

Counted from raw samples by a probe. A count that nobody could make is ``None``: unknown is neither
zero nor good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

from gates.criteria import ANSWER_LIMITS
from gates.evidence import (
    EvidenceError,
    boolean,
    count,
    counts,
    field,
    fraction,
    join,
    mapping,
    number,
    sequence,
    shown,
    text,
)

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class FilterAudit:
    """Items (document and repeat) of one answer filter; ``examples`` name some that are amiss."""

    planned: int
    scored: int
    missing: int
    duplicated: int
    unplanned: int
    examples: tuple[str, ...]

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """Read the counts, all of which must be there."""
        document = mapping(value, path)
        named = ("planned", "scored", "missing", "duplicated", "unplanned")
        examples = sequence(document.get("examples", []), join(path, "examples"))
        return cls(
            **{name: count(field(document, name, path), join(path, name)) for name in named},
            examples=tuple(text(each, f"{path}.examples[{i}]") for i, each in enumerate(examples)),
        )


@dataclass(frozen=True, kw_only=True)
class AnswerAudit:
    """Answers by what is wrong with them, and how alike they are.

    ``identical`` counts different prompts that share the most common answer, and
    ``identical_targets`` those that share the most common target, of ``distinct_prompts``.
    """

    asked: int
    null: int
    empty: int
    truncated: int | None
    refused: int | None
    non_finite: int
    identical: int
    identical_targets: int
    distinct_prompts: int

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """Read the counts; only ``truncated`` and ``refused`` may be unknown."""
        document = mapping(value, path)
        named = ("asked", "null", "empty", "non_finite")
        alike = ("identical", "identical_targets", "distinct_prompts")
        return cls(
            **{
                name: count(field(document, name, path), join(path, name))
                for name in (*named, *alike)
            },
            truncated=_known(document, "truncated", path, count),
            refused=_known(document, "refused", path, count),
        )


@dataclass(frozen=True, kw_only=True)
class RepeatAudit:
    """How often each question was answered, and how many have the same answer every time.

    ``questions`` is how many were answered that often, ``None`` where that is all of the task's.
    """

    repeats: int
    identical_questions: int
    sampled: bool
    questions: int | None

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """Read ``{"count", "identical_questions", "sampled"}``."""
        document = mapping(value, path)
        return cls(
            repeats=count(field(document, "count", path), join(path, "count"), minimum=1),
            identical_questions=count(
                field(document, "identical_questions", path), join(path, "identical_questions")
            ),
            sampled=boolean(field(document, "sampled", path), join(path, "sampled")),
            questions=_known(document, "questions", path, count),
        )


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The samples of one task. ``plan`` says where it is known from what was to be asked.

    ``rows_as_written`` tells whether the rows are those that the harness hashed.
    """

    filters: Mapping[str, FilterAudit]
    answers: AnswerAudit
    recomputed_score: float | None
    recomputed_stderr: float | None
    rows_as_written: bool | None
    repeats: RepeatAudit | None
    context_overflow: int | None
    plan: str | None

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """Read what a probe found in the samples of one task."""
        document = mapping(value, path)
        place = join(path, "filters")
        filters = mapping(field(document, "filters", path), place)
        return cls(
            filters={name: FilterAudit.parse(e, join(place, name)) for name, e in filters.items()},
            answers=AnswerAudit.parse(field(document, "answers", path), join(path, "answers")),
            recomputed_score=_known(document, "recomputed_score", path, number),
            recomputed_stderr=_known(document, "recomputed_stderr", path, number),
            rows_as_written=_known(document, "rows_as_written", path, boolean),
            repeats=_known(document, "repeats", path, RepeatAudit.parse),
            context_overflow=_known(document, "context_overflow", path, count),
            plan=_known(document, "plan", path, text),
        )


def parse_limits(value: object, path: str) -> dict[str, float]:
    """Read limits of answer rates that replace the usual ones."""
    limits = {}
    for name, entry in mapping(value, path).items():
        if name not in ANSWER_LIMITS:
            known = ", ".join(ANSWER_LIMITS)
            raise EvidenceError(join(path, name), f"is not a known rate; known: {known}")
        limits[name] = fraction(entry, join(path, name))
    return limits


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What a server logged: answered requests by status code, and how often it started."""

    status_codes: Mapping[str, int]
    starts: int | None

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """Read ``{"status_codes": {"200": n}, "starts": n}``."""
        document = mapping(value, path)
        codes = counts(field(document, "status_codes", path), join(path, "status_codes"))
        for code in codes:
            if len(code) != 3 or not (code.isascii() and code.isdigit()):
                raise EvidenceError(
                    join(path, "status_codes"),
                    f"must be filed under status codes, got {shown(code)}",
                )
        return cls(status_codes=codes, starts=_known(document, "starts", path, count))


def _known(
    document: Mapping[str, object], key: str, path: str, read: Callable[[object, str], _Value]
) -> _Value | None:
    """Read a field that may be absent or null."""
    value = document.get(key)
    return None if value is None else read(value, join(path, key))
