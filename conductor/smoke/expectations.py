"""What must appear when a scenario has run: positive assertions, each about one thing.

The absence of an error is no assertion. A literal or a pattern that a failure would satisfy as well
is refused when it is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

SHOWN_CHARACTERS = 400
FOREIGN = (("a", "7", "-"), ("it failed", "Killed", "error"))
"""What satisfies all texts of a row says nothing: it holds of every text, or of every failure."""
EVERY = "*"
"""In a JSON path: each entry of a list or mapping, of which there must be one."""


class Unusable(Exception):
    """An expectation that cannot be used; says why."""


class Test(StrEnum):
    """How what came is held against what was expected."""

    EQUALS = "equals"
    AT_LEAST = "at_least"
    CONTAINS = "contains"
    MATCHES = "matches"
    SHAPE = "json_shape"


class Source(StrEnum):
    """What of a scenario is looked at."""

    EXIT_CODE = "exit code"
    STDOUT = "stdout"
    STDERR = "stderr"
    OUTPUT = "output"
    FILE = "file"


@dataclass(frozen=True, kw_only=True)
class Came:
    """What a scenario came to: its exit code, what it printed, and where its files lie."""

    exit_code: int
    stdout: str
    stderr: str
    places: Mapping[str, Path]

    @cached_property
    def output(self) -> str:
        """Both streams, one after the other."""
        return f"{self.stdout}\n{self.stderr}"


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """One thing that must appear.

    ``pattern`` is a file's, ``{place}/glob``; ``json_path`` a dotted path into a JSON document, or
    None where text is looked at.
    """

    source: Source
    test: Test
    wanted: Any
    pattern: str | None = None
    json_path: str | None = None

    @property
    def is_positive(self) -> bool:
        """Tell whether something must have appeared; an exit code alone proves nothing."""
        return self.source is not Source.EXIT_CODE

    @property
    def subject(self) -> str:
        """What is looked at, in words."""
        place = f"{self.source} {self.pattern}" if self.pattern else str(self.source)
        return f"{place}, JSON {self.json_path}" if self.json_path else place

    def covers(self, other: Expectation) -> bool:
        """Tell whether whatever meets this expectation meets ``other`` too."""
        mine = self.source, self.pattern, self.json_path, self.test
        if mine != (other.source, other.pattern, other.json_path, other.test):
            return False
        match self.test:
            case Test.CONTAINS:
                return str(other.wanted) in str(self.wanted)
            case Test.AT_LEAST:
                return bool(self.wanted >= other.wanted)
            case _:
                return _same(self.wanted, other.wanted)

    def problem(self, came: Came) -> str | None:
        """Return what is wrong in words, with what came instead; None when it is met."""
        if self.source is Source.EXIT_CODE:
            return self._told(came.exit_code, self._test(came.exit_code))
        if self.source is not Source.FILE:
            return self._read(getattr(came, self.source))
        paths = sorted(self._paths(came.places))
        if not paths:
            return f"{self.subject} was expected to {self._words()}; there is no such file"
        problems = [self._read_file(path) for path in paths]
        return None if None in problems else problems[-1]

    def _paths(self, places: Mapping[str, Path]) -> Iterator[Path]:
        assert self.pattern
        place, _, pattern = self.pattern.partition("/")
        base = places.get(place.strip("{}"))
        return (path for path in base.glob(pattern) if path.is_file()) if base else iter(())

    def _read_file(self, path: Path) -> str | None:
        try:
            return self._read(path.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            return f"{self.subject} was expected to {self._words()}; {path}: {error.strerror}"

    def _read(self, text: str) -> str | None:
        if self.json_path is None and self.test is not Test.SHAPE:
            return self._told(text, self._test(text))
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            return f"{self.subject}: no JSON was there; what came: {_shown(text)}"
        if self.json_path is None:
            return self._told(document, self._test(document))
        found = list(_look_up(document, self.json_path.split(".")))
        if not found:
            return f"{self.subject} was expected to {self._words()}; nothing is there"
        missed = [value for value in found if not self._test(value)]
        return self._told(missed[0], False) if missed else None

    def _test(self, value: Any) -> bool:
        match self.test:
            case Test.EQUALS:
                return _same(value, self.wanted)
            case Test.AT_LEAST:
                return _is_number(value) and bool(value >= self.wanted)
            case Test.CONTAINS:
                return self.wanted in _text(value)
            case Test.MATCHES:
                return compile_pattern(self.wanted).search(_text(value)) is not None
            case Test.SHAPE:
                return bool(_validator(self.wanted).is_valid(value))

    def _told(self, value: Any, met: bool) -> str | None:
        words = f"{self.subject} was expected to {self._words()}; it is: {_shown(value)}"
        return None if met else words

    def _words(self) -> str:
        return f"{WORDS[self.test]} {json.dumps(self.wanted, default=str, ensure_ascii=False)}"


WORDS: Mapping[Test, str] = {
    Test.EQUALS: "be",
    Test.AT_LEAST: "be at least",
    Test.CONTAINS: "contain",
    Test.MATCHES: "match",
    Test.SHAPE: "have the shape of",
}

FORMS: Mapping[str, tuple[Source, Test]] = {
    "exit_code": (Source.EXIT_CODE, Test.EQUALS),
    "stdout_contains": (Source.STDOUT, Test.CONTAINS),
    "stderr_contains": (Source.STDERR, Test.CONTAINS),
    "output_matches": (Source.OUTPUT, Test.MATCHES),
}
"""Expectations of one key."""

PLACES = ("tmp", "workspace", "run")
"""Where a scenario's files may appear; what lies in the repository was there before."""


def parse_expectation(entry: object, directory: Path) -> Expectation:
    """Read one entry of ``expect``; the paths of schemas are relative to ``directory``.

    Raises:
        Unusable: it is no expectation, or one that would always be met.
    """
    if not isinstance(entry, Mapping) or not entry:
        raise Unusable("must be a table that says what appears")
    for key, (source, test) in FORMS.items():
        if key in entry:
            _only({key}, entry)
            return Expectation(
                source=source, test=test, wanted=_wanted(test, entry[key], key, source)
            )
    pattern, path = entry.get("file"), entry.get("json_path")
    tests = [test for test in Test if test in entry]
    _only({"file", "json_path", *Test}, entry)
    if pattern is not None:
        _check_file(pattern)
    if len(tests) != 1:
        raise Unusable(f"must hold one of {', '.join([*FORMS, *Test])}, and holds {sorted(entry)}")
    (test,) = tests
    on_text = test in (Test.CONTAINS, Test.MATCHES)
    if path is None and not (test is Test.SHAPE or (on_text and pattern)):
        raise Unusable(f"{test}: needs json_path beside it, or file where text is looked for")
    if path is not None and (test is Test.SHAPE or not isinstance(path, str) or not path):
        raise Unusable("json_path: must be a dotted path, and stands beside no json_shape")
    wanted = (
        _schema(directory, entry[test])
        if test is Test.SHAPE
        else _wanted(test, entry[test], test, None)
    )
    source = Source.FILE if pattern else Source.STDOUT
    return Expectation(source=source, test=test, wanted=wanted, pattern=pattern, json_path=path)


def _only(known: set[str], entry: Mapping[str, Any]) -> None:
    if unknown := sorted(set(entry) - known):
        raise Unusable(f"{', '.join(unknown)}: not known here, beside {', '.join(sorted(entry))}")


def _wanted(test: Test, value: Any, key: str, source: Source | None) -> Any:
    """Return what is wanted; refuse what is met by everything."""
    if source is Source.EXIT_CODE and (type(value) is not int or not 0 <= value <= 255):
        raise Unusable(f"{key}: must be a whole number from 0 to 255")
    if test is Test.AT_LEAST and not (_is_number(value) and math.isfinite(value)):
        raise Unusable(f"{key}: must be a finite number")
    if test not in (Test.CONTAINS, Test.MATCHES):
        return value
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f"{key}: must be a text that is not empty")
    try:
        pattern = compile_pattern(value if test is Test.MATCHES else re.escape(value))
    except re.error as error:
        raise Unusable(f"{key}: is no regular expression: {error}") from None
    if pattern.search(""):
        raise Unusable(f"{key}: {value!r} matches the empty text, so it asserts nothing")
    if any(all(pattern.search(text) for text in texts) for texts in FOREIGN):
        raise Unusable(f"{key}: {value!r} matches any text, so it asserts nothing; say more")
    return value


def _check_file(pattern: Any) -> None:
    place = pattern.partition("/") if isinstance(pattern, str) else ("", "", "")
    if place[0].strip("{}") not in PLACES or not place[2] or ".." in place[2].split("/"):
        known = ", ".join(f"{{{each}}}/..." for each in PLACES)
        raise Unusable(f"file: must be a pattern below one of {known}: {pattern!r}")


def _schema(directory: Path, name: Any) -> Path:
    """Return the path of a schema that refuses something."""
    if not isinstance(name, str) or not name:
        raise Unusable("json_shape: must be the path of a JSON Schema")
    path = (directory / name).resolve()
    try:
        validator = _validator(path)
    except (OSError, ValueError) as error:
        raise Unusable(f"json_shape: {path} cannot be used as a JSON Schema: {error}") from None
    if any(map(validator.is_valid, (None, {}, [], ""))):
        raise Unusable(f"json_shape: {path} allows an empty document, so it asserts nothing")
    return path


def _validator(path: Path) -> Any:
    import jsonschema_rs

    def beside(address: str) -> Any:
        name = address.rpartition("/")[2]
        return json.loads(path.with_name(name).read_text(encoding="utf-8"))

    return jsonschema_rs.validator_for(beside(path.name), retriever=beside)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return a regular expression in which ^ and $ are the ends of lines."""
    return re.compile(pattern, re.MULTILINE)


def _look_up(value: Any, steps: list[str]) -> Iterator[Any]:
    if not steps:
        yield value
        return
    step, *rest = steps
    entries: list[Any] = []
    if isinstance(value, Mapping):
        entries = list(value.values()) if step == EVERY else [value[step]] if step in value else []
    elif isinstance(value, list):
        in_range = step.isdecimal() and int(step) < len(value)
        entries = value if step == EVERY else [value[int(step)]] if in_range else []
    for entry in entries:
        yield from _look_up(entry, rest)


def _same(one: Any, other: Any) -> bool:
    """Tell whether two values are the same JSON: true is not 1, and 1 is 1.0."""
    if _is_number(one) and _is_number(other):
        return bool(one == other)
    return type(one) is type(other) and one == other


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _shown(value: Any) -> str:
    """Return what came; of a long text its end, where programs say what went wrong."""
    text = value.strip() if isinstance(value, str) else json.dumps(value)
    if not text:
        return "(nothing)"
    return text if len(text) <= SHOWN_CHARACTERS else f"... {text[-SHOWN_CHARACTERS:]}"
