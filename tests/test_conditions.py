from typing import Any

import pytest

from gates import evaluate_conditions

SETTINGS: dict[str, Any] = {"seed": 0, "concurrency": 16, "dtype": "auto", "url": "http://a"}


def test_equal_settings_pass_one_check_each() -> None:
    verdict = evaluate_conditions(SETTINGS, dict(SETTINGS))
    assert verdict.passed
    assert {check.subject for check in verdict.checks} == SETTINGS.keys()


def test_what_names_a_side_may_differ() -> None:
    other = {**SETTINGS, "url": "http://b"}
    assert not evaluate_conditions(SETTINGS, other).passed
    assert evaluate_conditions(SETTINGS, other, may_differ={"url"}).passed


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        pytest.param({"seed": 1}, "seed", id="value"),
        pytest.param({"seed": 0.0}, "seed", id="type"),
        pytest.param({"seed": False}, "seed", id="bool-is-no-number"),
        pytest.param({"dtype": None}, "dtype", id="null"),
        pytest.param({"shots": 5}, "shots", id="on-one-side-only"),
    ],
)
def test_a_difference_is_anomalous_and_named(changed: dict[str, Any], named: str) -> None:
    verdict = evaluate_conditions(SETTINGS, {**SETTINGS, **changed})
    assert verdict.failure_class == "CONDITIONS_DIFFER"
    assert verdict.decision == "ANOMALOUS"
    assert [check.subject for check in verdict.checks if not check.passed] == [named]
    assert named in verdict.detail


@pytest.mark.parametrize("bad", [None, [], "x", {1: 2}], ids=repr)
def test_what_is_no_mapping_does_not_pass(bad: object) -> None:
    verdict = evaluate_conditions(bad, SETTINGS)
    assert not verdict.passed
    assert verdict.failure_class == "USER_CONFIG_ERROR"


def test_nothing_to_compare_does_not_pass() -> None:
    assert not evaluate_conditions({}, {}).passed
    assert not evaluate_conditions(SETTINGS, SETTINGS, may_differ=SETTINGS).passed
