"""Expectations against what came: met, not met, and what is said then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conductor.smoke.expectations import Came, parse_expectation

SCHEMAS = Path(__file__).parent.parent / "gates" / "schemas"
DOCUMENT = (
    '{"decision": "ACCEPT", "score": 0.5, "ok": true, "tasks": [{"n": 5}, {"n": 7}], "t": {}}'
)


@pytest.fixture
def came(tmp_path: Path) -> Came:
    (tmp_path / "a.txt").write_text("first file")
    (tmp_path / "b.txt").write_text("second file")
    (tmp_path / "c.json").write_text(DOCUMENT)
    return Came(exit_code=3, stdout=DOCUMENT, stderr="a warning", places={"tmp": tmp_path})


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        pytest.param({"exit_code": 3}, None, id="exit"),
        pytest.param({"exit_code": 0}, "exit code was expected to be 0; it is: 3", id="exit-other"),
        pytest.param({"stdout_contains": "ACCEPT"}, None, id="stdout"),
        pytest.param({"stdout_contains": "warning"}, 'contain "warning"; it is', id="stdout-not"),
        pytest.param({"stderr_contains": "warning"}, None, id="stderr"),
        pytest.param({"stderr_contains": "ACCEPT"}, "it is: a warning", id="stderr-not"),
        pytest.param({"output_matches": "^a warning$"}, None, id="regex-on-a-line"),
        pytest.param({"output_matches": "^warning"}, "output was expected", id="regex-not"),
        pytest.param({"json_path": "decision", "equals": "ACCEPT"}, None, id="equals"),
        pytest.param({"json_path": "decision", "equals": "NO"}, "it is: ACCEPT", id="equals-not"),
        pytest.param({"json_path": "ok", "equals": 1}, "it is: true", id="true-is-not-1"),
        pytest.param({"json_path": "none", "equals": 1}, "nothing is there", id="no-such-path"),
        pytest.param({"json_path": "score", "at_least": 0.5}, None, id="at-least-at"),
        pytest.param({"json_path": "score", "at_least": 0.51}, "it is: 0.5", id="at-least-under"),
        pytest.param({"json_path": "ok", "at_least": 0}, "it is: true", id="at-least-true"),
        pytest.param({"json_path": "tasks.1.n", "equals": 7}, None, id="list"),
        pytest.param({"json_path": "tasks.2.n", "equals": 7}, "nothing is there", id="list-end"),
        pytest.param({"json_path": "tasks.*.n", "at_least": 5}, None, id="every"),
        pytest.param({"json_path": "tasks.*.n", "at_least": 6}, "it is: 5", id="every-but-one"),
        pytest.param({"json_path": "t.*", "at_least": 0}, "nothing is there", id="every-of-none"),
        pytest.param({"json_path": "decision", "matches": "^ACC"}, None, id="json-matches"),
        pytest.param({"json_shape": "status.json"}, "have the shape", id="another-shape"),
        pytest.param({"file": "{tmp}/a.txt", "contains": "first"}, None, id="file"),
        pytest.param({"file": "{tmp}/*.txt", "contains": "first"}, None, id="one-of-the-files"),
        pytest.param({"file": "{tmp}/*.txt", "contains": "third"}, "it is: second", id="none"),
        pytest.param({"file": "{tmp}/d*", "contains": "first"}, "no such file", id="no-file"),
        pytest.param({"file": "{run}/a", "contains": "first"}, "no such file", id="no-run"),
        pytest.param({"file": "{tmp}/a.txt", "matches": "^first f"}, None, id="file-matches"),
        pytest.param(
            {"file": "{tmp}/c.json", "json_path": "score", "equals": 0.5}, None, id="file-json"
        ),
        pytest.param(
            {"file": "{tmp}/a.txt", "json_path": "score", "equals": 0.5},
            "no JSON was there; what came: first file",
            id="file-no-json",
        ),
    ],
)
def test_expectations(came: Came, entry: dict[str, Any], problem: str | None) -> None:
    found = parse_expectation(entry, SCHEMAS).problem(came)
    assert (found is None) if problem is None else problem in (found or "")


def test_what_came_is_shown_by_its_end(came: Came) -> None:
    long = Came(exit_code=0, stdout="x" * 5000 + " the end", stderr="", places={})
    problem = parse_expectation({"stdout_contains": "hello"}, SCHEMAS).problem(long)
    assert problem
    assert problem.endswith("the end")
    assert len(problem) < 600


def test_nothing_came_is_said(came: Came) -> None:
    nothing = Came(exit_code=0, stdout="", stderr="", places={})
    problem = parse_expectation({"stdout_contains": "hello"}, SCHEMAS).problem(nothing)
    assert problem == 'stdout was expected to contain "hello"; it is: (nothing)'


@pytest.mark.parametrize(
    ("new", "old", "covers"),
    [
        pytest.param({"stdout_contains": "abc"}, {"stdout_contains": "abc"}, True, id="same"),
        pytest.param({"stdout_contains": "abcd"}, {"stdout_contains": "abc"}, True, id="longer"),
        pytest.param({"stdout_contains": "ab"}, {"stdout_contains": "abc"}, False, id="shorter"),
        pytest.param({"stderr_contains": "abc"}, {"stdout_contains": "abc"}, False, id="stream"),
        pytest.param({"output_matches": "abcd"}, {"output_matches": "abc"}, False, id="regex"),
        pytest.param(
            {"json_path": "a", "at_least": 2}, {"json_path": "a", "at_least": 1}, True, id="more"
        ),
        pytest.param(
            {"json_path": "a", "at_least": 1}, {"json_path": "a", "at_least": 2}, False, id="less"
        ),
        pytest.param(
            {"json_path": "b", "at_least": 2}, {"json_path": "a", "at_least": 2}, False, id="path"
        ),
        pytest.param(
            {"json_path": "a", "equals": True}, {"json_path": "a", "equals": 1}, False, id="type"
        ),
        pytest.param(
            {"file": "{tmp}/*", "contains": "abc"},
            {"file": "{tmp}/a", "contains": "abc"},
            False,
            id="any-file",
        ),
    ],
)
def test_what_covers_what(new: dict[str, Any], old: dict[str, Any], covers: bool) -> None:
    assert parse_expectation(new, SCHEMAS).covers(parse_expectation(old, SCHEMAS)) is covers
