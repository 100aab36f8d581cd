"""A smoke run reaches every stage: refused beforehand where it cannot, and told afterwards."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import run_day0
from evaluations import evaluation
from report_documents import accept

from conductor.chain import STAGES, Stage, State
from conductor.closeout import report_document
from conductor.compatibility import TABLE, Quantizer
from conductor.config import Config, load_config
from conductor.digests import Digests
from conductor.environments.builder import Environments
from conductor.failure import Failure
from conductor.journal import Journal
from conductor.models import resolve_model
from conductor.probes.machine import probe_machine
from conductor.quantizers import plan as plan_quantizer
from conductor.release_state import Plan, Release
from conductor.report import render_html, render_markdown, terminal_summary, validated
from conductor.report.smoke import missing, sentence
from conductor.smoke_run import ARTIFACTS, EVALUATIONS, check_reach, reached
from conductor.stages import calibration_of, choose_tools
from conductor.suites import load_suite
from conductor.tools import NothingStarts
from conductor.world import World
from gates import RECIPES, FailureClass

SMOKE = {"model": "demo", "recipe": "int4_awq", "smoke": True}


def config_of(**options: Any) -> Config:
    return load_config(None, SMOKE | options)


def quantize_request(config: Config) -> dict[str, Any]:
    return plan_quantizer(Quantizer.LLMCOMPRESSOR, config.recipe, calibration_of(config))


def without_samples(config: Config) -> Config:
    return replace(config, calibration=replace(config.calibration, samples=0))


@pytest.mark.parametrize(
    ("options", "change", "said"),
    [
        pytest.param({}, without_samples, "ptq: calibration.samples is 0", id="no-calibration"),
        pytest.param(
            {"limit": 8},
            lambda c: replace(c, limit=0),
            "baseline_eval: limit is 0",
            id="no-question",
        ),
        pytest.param(
            {"until_decided": True, "first_batch": 9, "max_samples": 8},
            None,
            "candidate_eval: first_batch is 9 and max_samples 8",
            id="nothing-after-the-first-look",
        ),
        pytest.param(
            {"until_decided": True, "first_batch": 4, "max_samples": 8},
            lambda c: replace(c, max_samples=0),
            "baseline_eval: max_samples is 0",
            id="no-sample",
        ),
    ],
)
def test_limits_by_which_a_stage_does_nothing_are_refused(
    options: Mapping[str, Any], change: Callable[[Config], Config] | None, said: str
) -> None:
    config = config_of(**options)
    config = change(config) if change else config
    with pytest.raises(Failure) as caught:
        check_reach(config, load_suite("demo"), quantize_request(config))
    assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="as-production"),
        pytest.param({"limit": 1, "calibration.samples": 1}, id="least"),
        pytest.param(
            {"until_decided": True, "first_batch": 8, "max_samples": 8}, id="one-look-by-limit"
        ),
        pytest.param({"until_decided": True}, id="all-samples"),
        pytest.param({"recipe": "int8"}, id="no-calibration-needed"),
    ],
)
def test_limits_that_reach_every_stage_pass(options: Mapping[str, Any]) -> None:
    config = config_of(**options)
    check_reach(config, load_suite("demo"), quantize_request(config))


def test_no_calibration_samples_matter_where_none_are_needed() -> None:
    config = without_samples(config_of(recipe="int8"))
    check_reach(config, load_suite("demo"), quantize_request(config))


@pytest.mark.parametrize("text", ["", "\n  \n"], ids=["empty", "blank"])
def test_calibration_data_without_a_line_are_refused(tmp_path: Path, text: str) -> None:
    data = tmp_path / "calibration.jsonl"
    data.write_text(text)
    config = config_of(**{"calibration.data": str(data)})
    with pytest.raises(Failure, match=r"ptq: calibration\.data: .* holds no text"):
        check_reach(config, load_suite("demo"), quantize_request(config))


def test_a_task_without_questions_is_refused() -> None:
    suite = load_suite("demo")
    (name, task), *_ = suite.tasks.items()
    config = config_of()
    with pytest.raises(Failure, match=rf"baseline_eval: tasks\.{name}\.samples .* is 0"):
        empty = replace(suite, tasks={**suite.tasks, name: replace(task, samples=0)})
        check_reach(config, empty, quantize_request(config))


def test_every_problem_is_told_at_once() -> None:
    config = replace(without_samples(config_of()), limit=0)
    with pytest.raises(Failure, match=r"ptq: .*; baseline_eval: "):
        check_reach(config, load_suite("demo"), quantize_request(config))


@pytest.mark.parametrize("smoke", [True, False])
def test_it_is_asked_before_anything_is_looked_for(smoke: bool) -> None:
    options = {"until_decided": True, "first_batch": 9, "max_samples": 8, "smoke": smoke}
    config, world = config_of(**options), world_here()
    if smoke:
        with pytest.raises(Failure, match="first_batch"):
            choose_tools(config, world)
    else:
        choose_tools(config, world)


def world_here() -> World:
    machine = probe_machine()
    environments = Environments(device=machine.device, variables={})
    return World(environments=environments, environ={}, machine=machine)


ANSWER = {"text": "4", "error": None}


def finished(tmp_path: Path, *, up_to: Stage = Stage.COMPARE, recipe: str = "int4_awq") -> Release:
    """Return a smoke run whose stages up to ``up_to`` are done, with all that they leave."""
    config = config_of(recipe=recipe, workspace=str(tmp_path), limit=8)
    journal = Journal.create(
        tmp_path / "runs" / "r",
        clock=lambda: datetime(2026, 1, 2, tzinfo=UTC),
        model="demo",
        recipe=recipe,
    )
    release = Release(
        config=config,
        journal=journal,
        world=world_here(),
        tools=NothingStarts(),
        digests=Digests(None),
    )
    for stage in STAGES[: STAGES.index(up_to) + 1]:
        journal.start(stage, inputs={})
        for pattern in ARTIFACTS[stage]:
            leave(journal.run_dir / pattern.replace("/**", "").replace("*", "all"), "{}")
        journal.finish(stage, State.DONE, outputs={}, detail="done")
    if Stage.DEPLOY in STAGES[: STAGES.index(up_to) + 1]:
        canary = {"prompts": [{"candidate": ANSWER}, {"candidate": {"error": "HTTP 500"}}]}
        leave(journal.run_dir / "stages/deploy/canary.json", json.dumps(canary))
    suite = load_suite("demo")
    release.resolved = Plan(
        model=resolve_model("demo"),
        recipe=RECIPES[recipe],
        suite=suite,
        row=TABLE[0],
        quantize_request=quantize_request(config),
    )
    release.calibration = {"samples": 4, "source": None, "max_length": 512, "tokens": 9}
    release.evaluations = {side: evaluation(suite, 8) for side in EVALUATIONS}
    return release


def leave(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_every_stage_did_is_counted(tmp_path: Path) -> None:
    found = reached(finished(tmp_path))
    assert found["missing"] == []
    assert (found["calibration_samples"], found["served_answers"]) == (4, 1)
    assert found["scored_samples"]["demo_addition"] == {"source": 8, "candidate": 8}
    assert len(found["scored_samples"]) == 6


def test_a_recipe_without_calibration_misses_none(tmp_path: Path) -> None:
    release = finished(tmp_path, recipe="int8")
    release.calibration = {"samples": 0}
    assert reached(release)["calibration_samples"] is None
    assert reached(release)["missing"] == []


def uncalibrated(release: Release) -> None:
    release.calibration = {"samples": 0}


def unserved(release: Release) -> None:
    leave(
        release.journal.run_dir / "stages/deploy/canary.json",
        json.dumps({"prompts": [{"candidate": {"error": "HTTP 500"}}]}),
    )


def torn_canary(release: Release) -> None:
    leave(release.journal.run_dir / "stages/deploy/canary.json", '{"prompts": [{')


def unscored(release: Release) -> None:
    release.evaluations["candidate"] = evaluation(release.plan.suite, 0)


def uncounted(release: Release) -> None:
    release.evaluations["source"] = evaluation(release.plan.suite, None)


def task_lost(release: Release) -> None:
    results = release.evaluations["candidate"].results
    tasks = {name: task for name, task in results.tasks.items() if name != "demo_facts"}
    release.evaluations["candidate"] = replace(
        release.evaluations["candidate"], results=replace(results, tasks=tasks)
    )


ALL_TASKS = ", ".join(load_suite("demo").tasks)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (uncalibrated, "ptq ran no calibration sample, and the recipe needs some"),
        (unserved, "deploy served no answer of the candidate"),
        (torn_canary, "deploy served no answer of the candidate"),
        (unscored, f"candidate_eval scored no sample of {ALL_TASKS}"),
        (uncounted, f"baseline_eval scored no sample of {ALL_TASKS}"),
        (task_lost, "candidate_eval scored no sample of demo_facts"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_stage_did_not_do_is_missing(
    tmp_path: Path, damage: Callable[[Release], None], said: str
) -> None:
    release = finished(tmp_path)
    damage(release)
    assert reached(release)["missing"] == [said]


@pytest.mark.parametrize(
    ("stage", "pattern"),
    [
        pytest.param(stage, pattern, id=f"{stage}-{pattern}")
        for stage, patterns in ARTIFACTS.items()
        for pattern in patterns
        if not pattern.endswith("canary.json") or pattern.startswith("verdicts")
    ],
)
def test_an_artifact_that_is_not_there_is_missing(
    tmp_path: Path, stage: Stage, pattern: str
) -> None:
    release = finished(tmp_path)
    for path in [*release.journal.run_dir.glob(pattern)]:
        path.unlink()
    assert reached(release)["missing"] == [f"{stage} left no {pattern}"]


@pytest.mark.parametrize("last", STAGES[:-2])
def test_stages_that_were_not_reached_are_missing(tmp_path: Path, last: Stage) -> None:
    release = finished(tmp_path, up_to=last)
    after = STAGES[STAGES.index(last) + 1 : -1]
    assert reached(release)["missing"] == [f"{stage} was not reached" for stage in after]


def test_a_setup_that_failed_leaves_everything_missing(tmp_path: Path) -> None:
    release = finished(tmp_path, up_to=Stage.SETUP)
    release.resolved, release.calibration, release.evaluations = None, None, {}
    found = reached(release)
    assert (found["scored_samples"], found["served_answers"]) == ({}, 0)
    assert "ptq was not reached" in found["missing"]


def test_a_smoke_run_is_no_ground_for_publishing(tmp_path: Path) -> None:
    document = report_document(finished(tmp_path))
    assert document["publish"] != "publish"
    assert "a smoke run: it asks less than production does" in document["deviations"]
    assert document["smoke"]["missing"] == []
    validated(document)


REACHED = {
    "calibration_samples": 4,
    "served_answers": 6,
    "scored_samples": {"a": {"source": 8, "candidate": 7}, "b": {"source": 9, "candidate": 9}},
    "missing": [],
}
LOGGED = {"status": "logged", "detail": ""}
NOT_LOGGED = {"status": "unavailable", "detail": "MLflow at x did not take the release"}


def smoke_document(changes: Mapping[str, Any], tracking: Mapping[str, Any]) -> dict[str, Any]:
    document = copy.deepcopy(accept())
    document["smoke"] = REACHED | changes
    document["tracking"] |= tracking
    return document


@pytest.mark.parametrize(
    ("changes", "tracking", "expected"),
    [
        pytest.param(
            {},
            LOGGED,
            "smoke: every stage was reached: 4 calibration samples, 6 served answers, 7 scored "
            "samples or more of each of 2 tasks, metrics logged",
            id="reached",
        ),
        pytest.param(
            {"calibration_samples": None, "served_answers": 1},
            LOGGED,
            "smoke: every stage was reached: no calibration needed, 1 served answer, 7 scored "
            "samples or more of each of 2 tasks, metrics logged",
            id="without-calibration",
        ),
        pytest.param(
            {"missing": ["deploy was not reached", "compare was not reached"]},
            LOGGED,
            "smoke: NOT reached: deploy was not reached; compare was not reached",
            id="stages-missing",
        ),
        pytest.param(
            {},
            NOT_LOGGED,
            "smoke: NOT reached: no metric was logged (MLflow at x did not take the release)",
            id="not-logged",
        ),
    ],
)
def test_one_line_says_what_was_reached_everywhere(
    changes: Mapping[str, Any], tracking: Mapping[str, Any], expected: str
) -> None:
    document = validated(smoke_document(changes, tracking))
    assert sentence(document) == expected
    assert expected in str(terminal_summary(document, plain=True)).splitlines()
    assert expected in render_html(document)
    assert expected in render_markdown(document)
    assert bool(missing(document)) == ("NOT" in expected)


@pytest.mark.parametrize("smoke", [pytest.param(None, id="null"), pytest.param(..., id="absent")])
def test_other_releases_say_nothing_of_it(smoke: Any) -> None:
    document = copy.deepcopy(accept())
    if smoke is None:
        document["smoke"] = None
    assert sentence(document) is None
    assert "smoke:" not in str(terminal_summary(document, plain=True))
    assert "smoke:" not in render_markdown(validated(document))


SMOKE_FILE = "model: demo\nrecipe: int8\nsmoke: true\ndry_run: true\noverlap: never\n"


@pytest.mark.parametrize(
    ("text", "exit_code", "said"),
    [
        pytest.param(
            "",
            0,
            "smoke: NOT reached: no metric was logged (a dry run is not logged)",
            id="all-but-tracking",
        ),
        pytest.param(
            "until_decided: true\nfirst_batch: 9\nmax_samples: 8\n",
            2,
            "candidate_eval: first_batch is 9 and max_samples 8",
            id="refused",
        ),
    ],
)
def test_the_command_says_what_a_smoke_run_reached(
    tmp_path: Path, workspace: Path, text: str, exit_code: int, said: str
) -> None:
    config = tmp_path / "smoke.yaml"
    config.write_text(SMOKE_FILE + text)
    done = run_day0("release", "--config", str(config), "--workspace", str(workspace))
    assert done.exit_code == exit_code, done.stderr
    assert said in done.stdout
    assert "a person has to decide" in done.stdout or exit_code
    assert ("ptq: started" in done.stderr) == (exit_code == 0)
