"""What a suite can tell before anything is asked: figures, unknown sizes, warnings."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conductor.cli import app
from conductor.planning import Outlook, look_ahead
from conductor.suites import load_suite
from gates.criteria import ASSUMED_DISCORDANCE


def outlook(tmp_path: Path, tasks: str, **options: float | bool | None) -> Outlook:
    path = tmp_path / "suite.yaml"
    path.write_text(f"name: mine\ntasks:\n{tasks}")
    return look_ahead(load_suite(str(path)), **{"threshold": 0.01, **options})  # type: ignore[arg-type]


TASK = "  t: {{metric: acc, kind: multiple_choice, samples: {samples}{more}}}\n"


def task(samples: int, more: str = "") -> str:
    return TASK.format(samples=samples, more=more)


@pytest.mark.parametrize(
    ("discordance", "expected"),
    [pytest.param(0.02, 1237, id="two"), pytest.param(0.10, 6183, id="ten")],
)
def test_questions_needed_are_near_the_rule_of_thumb(
    tmp_path: Path, discordance: float, expected: int
) -> None:
    (row,) = outlook(tmp_path, task(100_000), discordance=discordance).tasks
    assert row.needed == pytest.approx(expected, rel=0.1)
    assert row.power == pytest.approx(1.0)


def test_power_at_the_number_needed_is_the_usual_one(tmp_path: Path) -> None:
    (row,) = outlook(tmp_path, task(1000), discordance=0.05).tasks
    assert row.needed is not None
    (enough,) = outlook(tmp_path, task(row.needed), discordance=0.05).tasks
    assert enough.power == pytest.approx(0.8, abs=0.02)
    assert row.power is not None
    assert row.power < 0.5
    assert row.cannot_decide
    assert row.detectable_drop is not None
    assert row.detectable_drop > row.margin


@pytest.mark.parametrize(
    ("more", "asked", "expected"),
    [
        pytest.param(", discordance: 0.01", 0.2, 0.2, id="the-one-asked-for"),
        pytest.param(", discordance: 0.01", None, 0.01, id="the-suite's"),
        pytest.param("", None, ASSUMED_DISCORDANCE, id="the-usual-one"),
        pytest.param(", discordance: 0", None, 0.0, id="none"),
    ],
)
def test_which_discordance_is_assumed(
    tmp_path: Path, more: str, asked: float | None, expected: float
) -> None:
    (row,) = outlook(tmp_path, task(500, more), discordance=asked).tasks
    assert row.discordance == expected


def test_a_size_that_nobody_stated_is_not_guessed(tmp_path: Path) -> None:
    found = outlook(tmp_path, "  t: {metric: acc, kind: multiple_choice}\n", limit=100)
    (row,) = found.tasks
    assert (row.questions, row.power, row.detectable_drop) == (None, None, None)
    assert row.needed is not None
    assert found.power is None
    assert found.warning is None
    assert any("not known" in warning and "samples" in warning for warning in found.warnings)


def test_the_power_of_a_suite_is_that_of_all_tasks_together(tmp_path: Path) -> None:
    two = task(3000) + task(3000).replace("  t:", "  u:")
    found = outlook(tmp_path, two, discordance=0.02)
    powers = [row.power for row in found.tasks]
    assert powers[0] is not None
    assert found.power == pytest.approx(powers[0] ** 2)
    assert found.warnings == ()


def test_warnings_tell_a_small_benchmark_from_a_low_limit(tmp_path: Path) -> None:
    tasks = task(100) + task(10_000).replace("  t:", "  large:")
    found = outlook(tmp_path, tasks, discordance=0.02, limit=50)
    small, low, suite = found.warnings
    assert "the benchmark has too few" in small
    assert "t (100 of" in small
    assert "large" not in small
    assert "--limit" in low
    assert "large (50 of" in low
    assert suite == found.warning


@pytest.mark.parametrize("threshold", [0.0, 0.03, 0.5, 0.999])
@pytest.mark.parametrize("size", [100, 1000])
def test_no_threshold_breaks_the_figures(tmp_path: Path, threshold: float, size: int) -> None:
    (row,) = outlook(tmp_path, task(size, ", discordance: 0.002"), threshold=threshold).tasks
    assert row.power is not None
    assert 0.0 <= row.power <= 1.0
    assert (row.needed is None) == (threshold == 0)


def test_a_perplexity_has_no_figures(tmp_path: Path) -> None:
    two = task(3000) + "  u: {metric: word_perplexity, kind: loglikelihood, samples: 100}\n"
    found = outlook(tmp_path, two, discordance=0.02)
    assert [row.task for row in found.tasks] == ["t"]
    assert (found.power, found.warning) == (None, None)
    assert any("perplexity" in warning and ": u" in warning for warning in found.warnings)


def test_the_remedy_fits_what_is_missing(tmp_path: Path) -> None:
    few = outlook(tmp_path, task(9000), discordance=0.02, limit=40).warning
    small = outlook(tmp_path, task(90), discordance=0.02).warning
    assert few is not None and "ask more questions" in few and "widen" not in few
    assert small is not None and "widen --threshold" in small


def test_a_margin_of_nothing_is_called_that(tmp_path: Path) -> None:
    found = outlook(tmp_path, task(9000), threshold=0.0)
    assert any("no number of questions" in warning for warning in found.warnings)
    assert not any("too few questions" in warning for warning in found.warnings)


def test_a_relative_margin_is_a_share_of_the_published_score(tmp_path: Path) -> None:
    (row,) = outlook(tmp_path, task(100, ", reference: 0.5"), relative=True).tasks
    assert row.margin == 0.005
    (none,) = outlook(tmp_path, task(100, ", reference: 0"), relative=True).tasks
    assert (none.margin, none.needed) == (0.0, None)
    assert none.cannot_decide


def test_the_command_prints_figures_and_ends_with_0() -> None:
    shown = CliRunner().invoke(app, ["plan", "demo", "--discordance", "0.05"])
    assert shown.exit_code == 0
    assert "demo_addition" in shown.output
    assert "warning" in shown.output
    found = CliRunner().invoke(app, ["plan", "--suite", "standard", "--limit", "300", "--json"])
    assert found.exit_code == 0
    document = json.loads(found.output[found.output.index("{") :])
    assert {row["questions"] for row in document["tasks"]} == {300}
    assert document["power"] < 0.8
    assert document["warnings"]
