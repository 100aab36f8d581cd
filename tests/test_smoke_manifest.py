"""Manifests of scenarios: what is read, and what is refused because it would assert nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conductor.failure import Failure
from conductor.smoke.manifest import (
    CANDIDATE,
    MANIFEST,
    Scenario,
    join_manifests,
    parse_manifest,
    read_manifest,
)

ROOT = Path(__file__).parent.parent
GOOD: dict[str, Any] = {
    "name": "a",
    "owners": ["x"],
    "command": ["echo", "hello"],
    "expect": [{"stdout_contains": "hello"}],
    "timeout_s": 5,
}


def toml(*scenarios: dict[str, Any]) -> str:
    """Render scenarios; inline tables of JSON are TOML once their colons are equals signs."""
    return "\n".join(
        "[[scenario]]\n" + "\n".join(f"{key} = {_value(value)}" for key, value in each.items())
        for each in scenarios
    )


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value) if not isinstance(value, float) else repr(value)


def parse(*scenarios: dict[str, Any], directory: Path = ROOT) -> tuple[Scenario, ...]:
    return parse_manifest(toml(*scenarios), where="m.toml", directory=directory)


def test_a_scenario_is_read() -> None:
    (scenario,) = parse(GOOD)
    assert (scenario.name, scenario.owners, scenario.timeout_s) == ("a", ("x",), 5.0)
    assert (scenario.needs, scenario.after, scenario.quick) == ((), (), False)
    assert not scenario.uses_run


@pytest.mark.parametrize("path", [ROOT / MANIFEST, CANDIDATE], ids=["repository", "candidate"])
def test_our_own_manifests_are_read(path: Path) -> None:
    scenarios = read_manifest(path)
    assert scenarios
    assert all(any(each.is_positive for each in scenario.expect) for scenario in scenarios)


def test_the_candidate_is_tried_on_a_run() -> None:
    assert all(each.uses_run and "candidate" in each.owners for each in read_manifest(CANDIDATE))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"name": None}, "name: missing", id="no-name"),
        pytest.param({"name": "A b"}, "name: must be", id="odd-name"),
        pytest.param({"name": "../x"}, "name: must be", id="path"),
        pytest.param({"owners": []}, "owners: must name", id="no-owner"),
        pytest.param({"owners": ["a/b"]}, "owners: must name", id="odd-owner"),
        pytest.param({"owners": "x"}, "owners: must be a list", id="owner-text"),
        pytest.param({"command": "echo hello"}, "command: must be a list", id="shell"),
        pytest.param({"command": []}, "command: must name", id="no-command"),
        pytest.param({"command": ["{home}"]}, "{home} is not known", id="placeholder"),
        pytest.param({"command": ["x{day0}"]}, "give it alone", id="day0-inside"),
        pytest.param({"expect": []}, "nothing positive", id="no-expectation"),
        pytest.param({"expect": [{"exit_code": 0}]}, "nothing positive", id="exit-code-alone"),
        pytest.param({"expect": "hello"}, "must be a list", id="expect-text"),
        pytest.param({"timeout_s": 0}, "timeout_s: must be", id="timeout-0"),
        pytest.param({"timeout_s": -1}, "timeout_s: must be", id="timeout-negative"),
        pytest.param({"timeout_s": True}, "timeout_s: must be", id="timeout-true"),
        pytest.param({"timeout_s": float("inf")}, "timeout_s: must be", id="timeout-infinite"),
        pytest.param({"timeout_s": "5"}, "timeout_s: must be", id="timeout-text"),
        pytest.param({"shell": True}, "shell: not known", id="unknown-key"),
        pytest.param({"quick": 1}, "quick: must be", id="quick-1"),
        pytest.param({"after": ["a"]}, "stands above", id="after-itself"),
        pytest.param({"after": ["z"]}, "stands above", id="after-unknown"),
        pytest.param({"needs": ["tpu"]}, "'tpu' is not known", id="unknown-need"),
        pytest.param({"needs": ["gpu:8"]}, "takes nothing", id="gpu-with-number"),
        pytest.param({"needs": ["engine:sglang"]}, "engine:sglang is not known", id="engine"),
        pytest.param({"needs": ["dtype:int3"]}, "dtype:int3 is not known", id="dtype"),
        pytest.param({"needs": ["environment:x"]}, "environment:x is not known", id="environment"),
        pytest.param({"needs": ["endpoint:"]}, "must name an environment variable", id="endpoint"),
    ],
)
def test_scenarios_that_are_refused(change: dict[str, Any], words: str) -> None:
    entry = {key: value for key, value in (GOOD | change).items() if value is not None}
    with pytest.raises(Failure) as refused:
        parse(entry)
    assert words in refused.value.message
    assert refused.value.message.startswith("m.toml: scenario ")


@pytest.mark.parametrize(
    ("expectation", "words"),
    [
        pytest.param({}, "must be a table", id="empty"),
        pytest.param({"stdout": "x"}, "not known here", id="unknown-key"),
        pytest.param({"stdout_contains": ""}, "not empty", id="empty-literal"),
        pytest.param({"stdout_contains": "  \n"}, "not empty", id="blank-literal"),
        pytest.param({"stdout_contains": "e"}, "matches any text", id="a-letter"),
        pytest.param({"stdout_contains": 3}, "must be a text", id="number"),
        pytest.param({"stdout_contains": "x", "stderr_contains": "y"}, "not known", id="two"),
        pytest.param({"output_matches": ""}, "not empty", id="empty-regex"),
        pytest.param({"output_matches": "x*"}, "empty text", id="matches-nothing"),
        pytest.param({"output_matches": "hello|"}, "empty text", id="or-nothing"),
        pytest.param({"output_matches": "^"}, "empty text", id="begin"),
        pytest.param({"output_matches": "."}, "any text", id="dot"),
        pytest.param({"output_matches": ".+"}, "any text", id="dots"),
        pytest.param({"output_matches": r"\S"}, "any text", id="not-blank"),
        pytest.param({"output_matches": r"\w+"}, "any text", id="word"),
        pytest.param({"output_matches": "(?s)[^x]"}, "any text", id="any-but-one"),
        pytest.param({"output_matches": "^(?!.*Traceback).+$"}, "any text", id="absence"),
        pytest.param({"output_matches": "("}, "no regular expression", id="broken"),
        pytest.param({"json_path": "a"}, "must hold one of", id="path-alone"),
        pytest.param({"equals": 1}, "needs json_path", id="equals-alone"),
        pytest.param({"json_path": "a", "equals": 1, "at_least": 1}, "must hold one", id="both"),
        pytest.param({"json_path": "", "equals": 1}, "dotted path", id="empty-path"),
        pytest.param({"json_path": "a", "at_least": True}, "finite number", id="at-least-true"),
        pytest.param({"json_path": "a", "at_least": float("-inf")}, "finite", id="at-least-all"),
        pytest.param({"json_path": "a", "matches": ".*"}, "empty text", id="json-any"),
        pytest.param({"json_shape": "no.json"}, "cannot be used", id="no-schema"),
        pytest.param({"json_shape": "any.json"}, "allows an empty", id="any-schema"),
        pytest.param({"json_shape": "object.json"}, "allows an empty", id="object-schema"),
        pytest.param({"json_shape": 3}, "must be the path", id="schema-number"),
        pytest.param({"file": "{tmp}/x"}, "must hold one of", id="file-alone"),
        pytest.param({"file": "/etc/passwd", "contains": "root"}, "below one of", id="anywhere"),
        pytest.param({"file": "{repo}/README.md", "contains": "day0"}, "below one", id="repo"),
        pytest.param({"file": "{tmp}/../x", "contains": "day0"}, "below one of", id="above"),
        pytest.param({"file": "{tmp}/x", "contains": ""}, "not empty", id="file-empty-literal"),
        pytest.param({"file": "{tmp}/x", "equals": 1}, "needs json_path", id="file-equals"),
        pytest.param({"exit_code": 256}, "from 0 to 255", id="exit-256"),
        pytest.param({"exit_code": True}, "from 0 to 255", id="exit-true"),
    ],
)
def test_expectations_that_are_refused(
    tmp_path: Path, expectation: dict[str, Any], words: str
) -> None:
    (tmp_path / "any.json").write_text("{}")
    (tmp_path / "object.json").write_text('{"type": "object"}')
    positive = {"stdout_contains": "hello"}
    with pytest.raises(Failure) as refused:
        parse(GOOD | {"expect": [positive, expectation]}, directory=tmp_path)
    assert words in refused.value.message
    assert "expect, number 2" in refused.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", "at least one", id="empty"),
        pytest.param("scenario = 3", "at least one", id="number"),
        pytest.param("scenario = [3]", "must be a table", id="list-of-numbers"),
        pytest.param("[[scenario]", "not valid TOML", id="broken"),
        pytest.param("x = 1\n" + toml(GOOD), "x: not known", id="unknown-key"),
        pytest.param(toml(GOOD, GOOD), "another scenario has it", id="twice"),
    ],
)
def test_manifests_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(Failure, match=words):
        parse_manifest(text, where="m.toml", directory=ROOT)


def test_a_manifest_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"none\.toml: cannot be read"):
        read_manifest(tmp_path / "none.toml")


def test_a_name_is_used_once_in_all_manifests() -> None:
    with pytest.raises(Failure, match="a: there twice"):
        join_manifests(parse(GOOD), parse(GOOD))


def test_a_definition_changes_with_the_scenario() -> None:
    digests = {parse(GOOD | change)[0].definition for change in ({}, {"timeout_s": 6}, {})}
    assert len(digests) == 2
