"""Evidence: what was measured, parsed once from JSON-like mappings into frozen types.

Summaries, score files and token counts come from other programs, so nothing in them is trusted.
Invariants:

* A value that a gate reads later is complete, of one type, and finite; everything else is refused
  here, with the dotted path of the field (``tasks.gsm8k.score``).
* Absent is not a default. A field is optional only where its type says so.
* Refusing never renders the refused value in full: it may be an integer of four hundred digits or
  a list nested a thousand deep.

The one exception is a run summary: a count or score that is missing or odd is itself a finding
about the run, so it is kept as a fault beside the good fields for the gate to check.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Self, TypeVar

LARGEST_COUNT = 2**63 - 1
"""Largest count or size accepted: what a signed 64-bit field on disk or in JSON can carry."""

_SHOWN_CHARACTERS = 80

_Member = TypeVar("_Member", bound=StrEnum)
_Value = TypeVar("_Value")


class EvidenceError(ValueError):
    """A field that cannot be used, named by its dotted path."""

    def __init__(self, path: str, problem: str) -> None:
        """Keep where the value stands and what is wrong with it; ``path`` may be empty."""
        super().__init__(f"{path}: {problem}" if path else problem)
        self.path = path
        self.problem = problem


def shown(value: object) -> str:
    """Describe any value in a few words, whatever its size or depth."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() if abs(value) > LARGEST_COUNT:
            return f"an integer of about {int(value.bit_length() * math.log10(2)) + 1} digits"
        case float() if math.isnan(value):
            return "NaN"
        case float() if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        case int() | float():
            return repr(value)
        case str():
            whole = len(value) <= _SHOWN_CHARACTERS
            return repr(value if whole else value[:_SHOWN_CHARACTERS] + "…")
        case Mapping():
            return f"a mapping of {len(value)} entries"
        case list() | tuple():
            return f"a list of {len(value)} entries"
        case _:
            return f"a {type(value).__name__}"


def join(path: str, key: str) -> str:
    """Append one key to a dotted path."""
    return f"{path}.{key}" if path else key


def mapping(value: object, path: str) -> Mapping[str, object]:
    """Return ``value`` if it is a mapping with text keys."""
    if not isinstance(value, Mapping):
        raise EvidenceError(path, f"must be a mapping, got {shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise EvidenceError(path, f"must have text keys, got {shown(key)}")
    return value


def sequence(value: object, path: str) -> list[object]:
    """Return the entries of a list or tuple."""
    if not isinstance(value, (list, tuple)):
        raise EvidenceError(path, f"must be a list, got {shown(value)}")
    return list(value)


def field(document: Mapping[str, object], key: str, path: str) -> object:
    """Return a required field."""
    if key not in document:
        raise EvidenceError(join(path, key), "is missing")
    return document[key]


def text(value: object, path: str) -> str:
    """Return ``value`` if it is text."""
    if not isinstance(value, str):
        raise EvidenceError(path, f"must be text, got {shown(value)}")
    return str(value)


def boolean(value: object, path: str) -> bool:
    """Return ``value`` if it is true or false, and nothing that merely counts as either."""
    if not isinstance(value, bool):
        raise EvidenceError(path, f"must be true or false, got {shown(value)}")
    return value


def number(
    value: object, path: str, *, minimum: float = -math.inf, maximum: float = math.inf
) -> float:
    """Return a finite number from ``minimum`` to ``maximum`` as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise EvidenceError(path, f"must be a finite number, got {shown(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise EvidenceError(path, f"must be a finite number, got {shown(value)}")
    if result < minimum:
        raise EvidenceError(path, f"must be at least {minimum:g}, got {shown(value)}")
    if result > maximum:
        raise EvidenceError(path, f"must be at most {maximum:g}, got {shown(value)}")
    return result


def count(value: object, path: str, *, minimum: int = 0) -> int:
    """Return a whole number of at least ``minimum``; ``100.0`` is whole, ``true`` is no number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise EvidenceError(path, f"must be a whole number, got {shown(value)}")
    if not minimum <= value <= LARGEST_COUNT:
        raise EvidenceError(
            path, f"must be a whole number of at least {minimum}, got {shown(value)}"
        )
    return int(value)


def counts(value: object, path: str) -> dict[str, int]:
    """Return whole numbers by name."""
    return {name: count(entry, join(path, name)) for name, entry in mapping(value, path).items()}


def positive(value: object, path: str) -> float:
    """Return a finite number greater than 0."""
    result = number(value, path)
    if result <= 0:
        raise EvidenceError(path, f"must be greater than 0, got {shown(value)}")
    return result


def fraction(value: object, path: str) -> float:
    """Return a limit given as a fraction from 0 to 1."""
    result = number(value, path, minimum=0.0)
    if result > 1.0:
        raise EvidenceError(
            path, f"must be a fraction from 0 to 1 (0.01 means one percent), got {shown(value)}"
        )
    return result


def member(vocabulary: type[_Member], value: object, path: str) -> _Member:
    """Return the member of a closed vocabulary."""
    try:
        return vocabulary(text(value, path))
    except ValueError as error:
        if isinstance(error, EvidenceError):
            raise
        known = ", ".join(vocabulary)
        raise EvidenceError(path, f"must be one of {known}; got {shown(value)}") from None


def scales(value: object, tasks: Iterable[str]) -> dict[str, float]:
    """Return the declared full score of each task named, all of them among ``tasks``.

    ``None`` and an empty list mean that nothing was declared, as an empty mapping does.
    """
    if value is None or value == []:
        return {}
    declared = mapping(value, "scales")
    known = set(tasks)
    result = {}
    for task, entry in declared.items():
        path = join("scales", task)
        if task not in known:
            raise EvidenceError(path, "names a task that has no score; remove it or fix its name")
        result[task] = positive(entry, path)
    return result


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The things behind one count of a checkpoint summary; ``names`` may be cut short.

    ``groups`` counts them by module kind.
    """

    kind: str
    count: int
    names: tuple[str, ...]
    groups: Mapping[str, int]

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """Read ``{"kind", "count", "names"}`` and, where there is one, ``"groups"``."""
        document = mapping(value, path)
        names = sequence(field(document, "names", path), join(path, "names"))
        return cls(
            kind=text(field(document, "kind", path), join(path, "kind")),
            count=count(field(document, "count", path), join(path, "count"), minimum=len(names)),
            names=tuple(text(name, f"{path}.names[{i}]") for i, name in enumerate(names)),
            groups=counts(document.get("groups", {}), join(path, "groups")),
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One tensor's value of a measure, and the value in words."""

    name: str
    value: float
    detail: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How many tensors of a module kind have which value of a measure, and the largest ones.

    ``histogram`` counts tensors by their value rounded down to a whole number.
    """

    measure: str
    group: str
    histogram: Mapping[int, int]
    worst: tuple[Measured, ...]

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """Read ``{"measure", "group", "histogram", "worst"}``."""
        document = mapping(value, path)
        place = join(path, "histogram")
        histogram = {}
        for key, entry in mapping(field(document, "histogram", path), place).items():
            if not key.isascii() or not key.isdigit():
                raise EvidenceError(join(place, key), "must be filed under a whole number")
            histogram[int(key[:_SHOWN_CHARACTERS])] = count(entry, join(place, key))
        worst = sequence(field(document, "worst", path), join(path, "worst"))
        return cls(
            measure=text(field(document, "measure", path), join(path, "measure")),
            group=text(field(document, "group", path), join(path, "group")),
            histogram=histogram,
            worst=tuple(_measured(entry, f"{path}.worst[{i}]") for i, entry in enumerate(worst)),
        )

    def at_least(self, limit: float) -> int:
        """Return how many tensors have a value of ``limit``, a whole number, or more."""
        return sum(tensors for value, tensors in self.histogram.items() if value >= limit)


def _measured(value: object, path: str) -> Measured:
    document = mapping(value, path)
    return Measured(
        name=text(field(document, "name", path), join(path, "name")),
        value=number(field(document, "value", path), join(path, "value")),
        detail=text(document.get("detail", ""), join(path, "detail")),
    )


class Bucket(StrEnum):
    """Precisions that quantized layers are counted under."""

    NVFP4 = "NVFP4"
    MXFP4 = "MXFP4"
    FP8 = "FP8"
    INT8 = "INT8"
    INT4 = "INT4"
    NF4 = "NF4"


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """How many layers of a checkpoint are in which precision, and how many are wrong."""

    quantized: Mapping[Bucket, int]
    bf16_or_excluded: int
    unexpected_unquantized: int
    declaration_mismatch: int

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """Read the counts; a precision that is not named holds no layer.

        The two counts of wrong layers must be there: leaving them out would say that nobody
        looked.
        """
        document = mapping(value, path)
        wrong = ("unexpected_unquantized", "declaration_mismatch")
        known = {*Bucket, "BF16_or_excluded", *wrong}
        for key in document:
            if key not in known:
                raise EvidenceError(
                    join(path, key), f"is not a known count; known: {', '.join(sorted(known))}"
                )
        unquantized, mismatch = (
            count(field(document, key, path), join(path, key)) for key in wrong
        )
        return cls(
            quantized={b: count(document.get(b, 0), join(path, b)) for b in Bucket},
            bf16_or_excluded=count(
                document.get("BF16_or_excluded", 0), join(path, "BF16_or_excluded")
            ),
            unexpected_unquantized=unquantized,
            declaration_mismatch=mismatch,
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointEvidence:
    """What a quantized checkpoint is made of, beside its source. Sizes in bytes.

    ``examined`` names the checks that were made of its files; none in a summary of counts alone.
    ``bits_per_weight`` and ``sqnr_db`` (the median, and what the format gives for the same weights)
    are by module kind.
    """

    source_bytes: int
    output_bytes: int
    recipe: str
    layers: LayerCounts
    metadata_diffs: tuple[str, ...]
    source_precision: str | None
    accept_size_growth: bool
    findings: Mapping[str, Finding]
    expected_bytes: tuple[int, int] | None
    examined: tuple[str, ...]
    measurements: tuple[Measurement, ...]
    bits_per_weight: Mapping[str, float]
    sqnr_db: Mapping[str, tuple[float, float]]

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read a checkpoint summary."""
        document = mapping(value, "")
        diffs = sequence(field(document, "metadata_diffs", ""), "metadata_diffs")
        findings: dict[str, Finding] = {}
        for path, entry in _entries(document, "findings"):
            finding = Finding.parse(entry, path)
            if finding.kind in findings:
                raise EvidenceError(join(path, "kind"), f"{finding.kind!r} was given before")
            findings[finding.kind] = finding
        bits = mapping(document.get("bits_per_weight", {}), "bits_per_weight")
        # A checkpoint of which nothing is whole has a finding to say so, and no bytes to count.
        least = 0 if findings else 1
        return cls(
            source_bytes=count(field(document, "source_bytes", ""), "source_bytes", minimum=1),
            output_bytes=count(field(document, "output_bytes", ""), "output_bytes", minimum=least),
            recipe=text(field(document, "recipe", ""), "recipe").strip(),
            layers=LayerCounts.parse(
                field(document, "layer_precision_counts", ""), "layer_precision_counts"
            ),
            metadata_diffs=tuple(text(d, f"metadata_diffs[{i}]") for i, d in enumerate(diffs)),
            source_precision=_optional(document, "source_precision", "", _precision),
            accept_size_growth=boolean(
                document.get("accept_size_growth", False), "accept_size_growth"
            ),
            findings=findings,
            expected_bytes=_optional(document, "expected_bytes", "", _size_range),
            examined=tuple(text(e, path) for path, e in _entries(document, "examined")),
            measurements=tuple(
                Measurement.parse(e, path) for path, e in _entries(document, "measurements")
            ),
            bits_per_weight={
                kind: number(value, f"bits_per_weight.{kind}") for kind, value in bits.items()
            },
            sqnr_db=_sqnr(document.get("numbers", {}), "numbers"),
        )


def _entries(document: Mapping[str, object], key: str) -> list[tuple[str, object]]:
    """Return the entries of a list that may be absent, each with its path."""
    return [(f"{key}[{i}]", entry) for i, entry in enumerate(sequence(document.get(key, []), key))]


def _sqnr(value: object, path: str) -> dict[str, tuple[float, float]]:
    """Read the medians by module kind; a kind whose values are exact has none."""
    kinds = mapping(mapping(value, path).get("kinds", {}), join(path, "kinds"))
    medians = {}
    for kind, entry in kinds.items():
        place = f"{path}.kinds.{kind}"
        stated = mapping(entry, place)
        pair = [stated.get(key) for key in ("sqnr_db", "norm_db")]
        if None not in pair:
            measured, expected = (number(each, place) for each in pair)
            medians[kind] = (measured, expected)
    return medians


def _precision(value: object, path: str) -> str | None:
    return text(value, path).strip().lower() or None


def _size_range(value: object, path: str) -> tuple[int, int]:
    """Read ``[low, high]`` in bytes."""
    entries = sequence(value, path)
    if len(entries) != 2:
        raise EvidenceError(path, f"must be [low, high], got {shown(value)}")
    low, high = (count(entry, f"{path}[{i}]", minimum=1) for i, entry in enumerate(entries))
    if low > high:
        raise EvidenceError(path, f"low end {low} is above high end {high}")
    return low, high


class Status(StrEnum):
    """Where an evaluation task stands; other words are reported as they are and do not pass."""

    SUCCESS = "SUCCESS"
    RUNNING = "RUNNING"
    PENDING = "PENDING"
    TIMEOUT = "TIMEOUT"
    RESUMING = "RESUMING"
    FAILED = "FAILED"
    KILLED = "KILLED"


UNFINISHED = frozenset({Status.RUNNING, Status.PENDING, Status.TIMEOUT, Status.RESUMING})
"""Standings that may still change: a launcher resumes a task that ran out of its time."""


class ErrorKind(StrEnum):
    """What an error that a harness reported is about."""

    JUDGE = "judge"
    AUTHORIZATION = "authorization"
    RATE_LIMIT = "rate_limit"
    OTHER = "other"


def _http(codes: str) -> str:
    """Return a pattern for status codes where the words around them say that they are such.

    A bare number may as well be a line, a size or a sample: "line 403", "429 MiB free".
    """
    named = (
        r"(?:(?:http|error|status|response)[ _-]?){0,2}"
        r"(?:http(?:/[\d.]+)?|http[ _-]?(?:status[ _-]?)?error|status|code)"
    )
    before = rf"(?:{named}[\"']?[\s:=(]{{1,3}}|error[ (]{{1,2}})"
    return rf"{before}(?:{codes})|(?:{codes}) client error"


_ERROR_PROSE = {
    ErrorKind.RATE_LIMIT: (
        r"rate[ _-]?limit(?:ed|s|ing|error)?|too many requests|insufficient[ _]quota"
        r"|(?<!disk )quota (?:\w+ ){0,2}exceeded|exceed(?:s|ed) (?:\w+ ){0,3}(?<!disk )quota|"
    )
    + _http("429"),
    ErrorKind.AUTHORIZATION: (
        r"unauthori[sz]ed|not authori[sz]ed|authori[sz]ation|authentication(?:error)?|forbidden"
        r"|(?:invalid|incorrect|missing|expired|no) api[ _-]?key"
        r"|api[ _-]?key (?:\w+ ){0,2}(?:invalid|missing|expired|valid|set)|"
    )
    + _http("401|403"),
    ErrorKind.JUDGE: r"judge",
}
"""Whole words and phrases by which an error without a kind is told; first match wins."""


@dataclass(frozen=True, kw_only=True)
class RunError:
    """One error that a harness reported for a task."""

    kind: ErrorKind
    message: str

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """Read prose, or ``{"kind", "message"}`` where the harness knows what went wrong."""
        if isinstance(value, str):
            return cls(kind=_kind_of(value), message=value)
        if not isinstance(value, Mapping):
            raise EvidenceError(path, f'must be text or {{"kind", "message"}}, got {shown(value)}')
        document = mapping(value, path)
        return cls(
            kind=member(ErrorKind, field(document, "kind", path), join(path, "kind")),
            message=text(field(document, "message", path), join(path, "message")),
        )


def _kind_of(prose: str) -> ErrorKind:
    """Classify prose by whole words, so that "author" is not "auth" and 1401 is not 401."""
    for kind, pattern in _ERROR_PROSE.items():
        if re.search(rf"(?<!\w)(?:{pattern})(?!\w)", prose, re.IGNORECASE):
            return kind
    return ErrorKind.OTHER


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One task of an evaluation run; a field that is unusable is ``None`` and has its fault."""

    status: str
    expected_samples: int | None
    scored_samples: int | None
    score: float | None
    stderr: float | None
    scale: float | None
    errors: tuple[RunError, ...]
    faults: Mapping[str, EvidenceError]

    @property
    def unfinished(self) -> bool:
        """Tell whether the task may still change."""
        return self.status in UNFINISHED

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """Read one task; counts and score that cannot be used become faults."""
        document = mapping(value, path)
        errors = sequence(field(document, "errors", path), join(path, "errors"))
        faults: dict[str, EvidenceError] = {}
        return cls(
            status=text(field(document, "status", path), join(path, "status")),
            expected_samples=_kept(document, "expected_samples", path, _at_least_one, faults),
            scored_samples=_kept(document, "scored_samples", path, count, faults),
            score=_kept(document, "score", path, number, faults),
            stderr=_optional(document, "stderr", path, _not_negative),
            scale=_optional(document, "scale", path, positive),
            errors=tuple(RunError.parse(e, f"{path}.errors[{i}]") for i, e in enumerate(errors)),
            faults=faults,
        )


def _kept(
    document: Mapping[str, object],
    key: str,
    path: str,
    read: Callable[[object, str], _Value],
    faults: dict[str, EvidenceError],
) -> _Value | None:
    """Read a field, or keep what is wrong with it."""
    try:
        return read(field(document, key, path), join(path, key))
    except EvidenceError as error:
        faults[key] = error
        return None


def _optional(
    document: Mapping[str, object], key: str, path: str, read: Callable[[object, str], _Value]
) -> _Value | None:
    """Read a field that may be absent or null."""
    value = document.get(key)
    return None if value is None else read(value, join(path, key))


def _at_least_one(value: object, path: str) -> int:
    return count(value, path, minimum=1)


def _not_negative(value: object, path: str) -> float:
    return number(value, path, minimum=0.0)
