"""The smoke gate: what counts as having been seen to work."""

from __future__ import annotations

from typing import Any

import pytest

from gates import FailureClass, evaluate_smoke


def ended(outcome: str, *problems: str) -> dict[str, Any]:
    return {"outcome": outcome, "problems": list(problems)}


PASSED, FAILED, SKIPPED = ended("passed"), ended("failed", "no text"), ended("skipped", "no GPU")


@pytest.mark.parametrize(
    ("results", "options", "passes"),
    [
        pytest.param({}, {}, False, id="nothing-ran"),
        pytest.param({"a": PASSED}, {}, True, id="one-passed"),
        pytest.param({"a": PASSED, "b": PASSED}, {}, True, id="all-passed"),
        pytest.param({"a": PASSED, "b": FAILED}, {}, False, id="one-failed"),
        pytest.param({"a": SKIPPED}, {}, False, id="only-skips"),
        pytest.param({"a": PASSED, "b": SKIPPED}, {}, True, id="one-skipped"),
        pytest.param({"a": PASSED, "b": SKIPPED}, {"strict": True}, False, id="strict"),
        pytest.param({"a": PASSED}, {"strict": True}, True, id="strict-and-passed"),
        pytest.param({"a": PASSED}, {"required": ["a"]}, True, id="required-passed"),
        pytest.param({"a": PASSED}, {"required": ["a", "b"]}, False, id="required-not-run"),
        pytest.param({"a": PASSED, "b": SKIPPED}, {"required": ["b"]}, False, id="own-skipped"),
        pytest.param({"a": FAILED, "b": PASSED}, {"required": ["b"]}, False, id="other-failed"),
        pytest.param({"a": PASSED}, {"required": []}, False, id="nothing-required"),
    ],
)
def test_what_passes(results: Any, options: dict[str, Any], passes: bool) -> None:
    verdict = evaluate_smoke(results, **options)
    assert verdict.passed is passes
    assert verdict["detail"]


def test_every_failure_is_told_and_every_skip_is_noted() -> None:
    verdict = evaluate_smoke({"a": FAILED, "b": SKIPPED, "c": FAILED})
    assert verdict["detail"] == "a failed: no text; c failed: no text; no scenario passed"
    assert verdict["notes"] == ["b was skipped"]


@pytest.mark.parametrize(
    ("results", "path"),
    [
        pytest.param(None, "scenarios", id="nothing"),
        pytest.param([], "scenarios", id="list"),
        pytest.param({"a": None}, "scenarios.a", id="no-result"),
        pytest.param({"a": {"problems": []}}, "scenarios.a.outcome", id="no-outcome"),
        pytest.param({"a": ended("PASSED")}, "scenarios.a.outcome", id="odd-outcome"),
        pytest.param({"a": ended(True)}, "scenarios.a.outcome", id="true"),  # type: ignore[arg-type]
        pytest.param({"a": {"outcome": "passed"}}, "scenarios.a.problems", id="no-problems"),
        pytest.param(
            {"a": {"outcome": "passed", "problems": [1]}}, "scenarios.a.problems", id="odd-problems"
        ),
    ],
)
def test_unreadable_results_are_refused(results: Any, path: str) -> None:
    verdict = evaluate_smoke(results)
    assert verdict.failure_class is FailureClass.USER_CONFIG_ERROR
    assert str(verdict["detail"]).startswith(path)
