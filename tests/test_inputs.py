"""Inputs: every change of what a release depends on is seen, and makes void what it must."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plans_on_disk import CPU, CUDA, GPU, Ground

from conductor import inputs
from conductor.chain import STAGES, Stage
from conductor.config import DEFAULTS
from conductor.digests import Digests
from conductor.environments.builder import Environments
from conductor.inputs import (
    CHANGES_NO_RESULT,
    NEEDED_TO_LOOK,
    NEEDS,
    Change,
    Scalar,
    collect,
    differences,
)


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(root=tmp_path).lay_out()


def collected(ground: Ground) -> dict[str, Scalar]:
    config, plan, world = ground.plan()
    return collect(config, plan, world, Digests(None))


def first(changes: tuple[Change, ...]) -> dict[str, Stage | None]:
    """Return the first stage that each changed field makes void."""
    return {each.field: each.invalidates[0] if each.invalidates else None for each in changes}


def append(path: Path) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write("\n")


def ask(name: str, value: Any) -> Callable[[Ground], None]:
    return lambda ground: ground.options.update({name: value})


def machine(**fields: Any) -> Callable[[Ground], None]:
    def change(ground: Ground) -> None:
        ground.machine = replace(ground.machine, **fields)

    return change


def test_the_fields_are_scalars_and_survive_being_written(ground: Ground) -> None:
    found = collected(ground)
    assert json.loads(json.dumps(found)) == found
    assert all(type(value) in (str, int, float, bool, type(None)) for value in found.values())
    assert found["model.files.model.safetensors"] != found["model.files.config.json"]
    assert {"suite.files.sums.yaml", "suite.files.sums.jsonl", "environment.quantize"} <= {*found}
    assert not [name for name in found if name.startswith(CHANGES_NO_RESULT)]
    assert differences(found, collected(ground)) == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(
            lambda g: append(g.model / "model.safetensors"),
            {"model.files.model.safetensors": Stage.SETUP},
            id="weights",
        ),
        pytest.param(
            lambda g: append(g.model / "chat_template.jinja"),
            {"model.files.chat_template.jinja": Stage.SETUP},
            id="template",
        ),
        pytest.param(
            lambda g: (g.model / "tokenizer.json").unlink(),
            {"model.files.tokenizer.json": Stage.SETUP},
            id="tokenizer-gone",
        ),
        pytest.param(
            lambda g: append(g.model / "generation_config.json"),
            {"model.files.generation_config.json": Stage.SETUP},
            id="file-more",
        ),
        pytest.param(lambda g: append(g.model / "README.md"), {}, id="readme"),
        pytest.param(lambda g: append(g.calibration), {}, id="calibration-not-used"),
        pytest.param(
            ask("recipe", "fp8"),
            {"config.recipe": Stage.SETUP, "recipe.digest": Stage.SETUP},
            id="recipe",
        ),
        pytest.param(ask("seed", 1), {"config.seed": Stage.SETUP}, id="seed"),
        pytest.param(ask("engine.dtype", "float32"), {"config.engine.dtype": Stage.DEPLOY}, id="t"),
        pytest.param(
            ask("engine.arguments", ["--a", "--b"]),
            {"config.engine.arguments": Stage.DEPLOY},
            id="list",
        ),
        pytest.param(
            ask("engine.name", "transformers"),
            {
                "config.engine.name": Stage.DEPLOY,
                "engine.name": Stage.DEPLOY,
                "environment.reference": Stage.DEPLOY,
                "environment.serve-cpu": Stage.DEPLOY,
                "environment.evaluate": Stage.BASELINE_EVAL,
            },
            id="engine",
        ),
        pytest.param(
            lambda g: g.edit_suite({"canary_prompts": ["Three"]}),
            {"suite.canary": Stage.DEPLOY},
            id="canary",
        ),
        pytest.param(
            lambda g: g.edit_suite({"max_length": 65}),
            {"suite.definition": Stage.BASELINE_EVAL},
            id="max-length",
        ),
        pytest.param(
            lambda g: g.edit_suite({"generation": {"temperature": 0.5}}),
            {"suite.definition": Stage.BASELINE_EVAL},
            id="sampling",
        ),
        pytest.param(
            lambda g: g.edit_task("sums", {"fewshot": 1}),
            {"suite.definition": Stage.BASELINE_EVAL},
            id="shots",
        ),
        pytest.param(
            lambda g: g.edit_task("facts", {"reference": 0.8}),
            {"suite.reading": Stage.COMPARE},
            id="reference",
        ),
        pytest.param(
            lambda g: g.edit_suite({"name": "other", "description": "Other words."}),
            {},
            id="name",
        ),
        pytest.param(
            lambda g: append(g.tasks / "sums.jsonl"),
            {"suite.files.sums.jsonl": Stage.BASELINE_EVAL},
            id="data",
        ),
        pytest.param(
            lambda g: append(g.tasks / "functions.py"),
            {"suite.files.functions.py": Stage.BASELINE_EVAL},
            id="functions",
        ),
        pytest.param(ask("limit", 2), {"config.limit": Stage.BASELINE_EVAL}, id="limit"),
        pytest.param(
            ask("evaluation.concurrency", 2),
            {"config.evaluation.concurrency": Stage.BASELINE_EVAL},
            id="concurrency",
        ),
        pytest.param(ask("threshold", 0.02), {"config.threshold": Stage.COMPARE}, id="threshold"),
        pytest.param(
            ask("discordance", 0.02), {"config.discordance": Stage.CLOSEOUT}, id="only-told"
        ),
        pytest.param(machine(processor="Another"), {"accelerators": Stage.DEPLOY}, id="processor"),
        pytest.param(machine(memory_available_bytes=1), {}, id="memory"),
    ],
)
def test_a_change_is_seen_and_makes_void(
    ground: Ground, change: Callable[[Ground], object], expected: Mapping[str, Stage]
) -> None:
    before = collected(ground)
    change(ground)
    changes = differences(before, collected(ground))
    assert first(changes) == expected
    for each in changes:
        start = STAGES.index(each.invalidates[0])
        assert each.invalidates == STAGES[start:]
        assert each.was != each.now


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("overlap", "never"), ("fresh_baseline", True), ("workspace", "elsewhere")],
        *[("watchdog.evaluation_s", 1.0), ("retry.limit", 1), ("retry.first_wait_s", 1.0)],
        *[("engine.port", 8000), ("engine.health_timeout_s", 1.0)],
    ],
)
def test_what_changes_no_result_is_no_drift(ground: Ground, name: str, value: Any) -> None:
    before = collected(ground)
    ground.options[name] = value
    assert differences(before, collected(ground)) == ()
    # Nor where a record has it all the same.
    assert differences({**before, f"config.{name}": "then"}, before) == ()


def test_every_setting_is_needed_by_a_stage_or_known_to_be_harmless() -> None:
    """A new setting must be given a place in the table; these are told in the report only."""
    needed = tuple(name for stage in STAGES[:-1] for name in NEEDS[stage])
    told = {
        name
        for name in (f"config.{name}" for name in DEFAULTS)
        if not name.startswith(needed + CHANGES_NO_RESULT)
    }
    assert told == {"config.discordance", "config.smoke"}


@pytest.mark.parametrize("name", NEEDED_TO_LOOK)
@pytest.mark.parametrize("looks", [True, False])
def test_looking_depends_on_how_scores_are_judged(name: str, looks: bool) -> None:
    told = {"config.until_decided": looks}
    (change,) = differences({**told, name: "then"}, {**told, name: "now"})
    assert change.invalidates[0] is (Stage.CANDIDATE_EVAL if looks else Stage.COMPARE)


@pytest.mark.parametrize(
    ("recorded", "now", "expected"),
    [
        pytest.param({}, {}, {}, id="nothing"),
        pytest.param({"a": 1}, {"a": 1.0}, {}, id="whole-number"),
        pytest.param({"a": 1}, {"a": True}, {"a": Stage.CLOSEOUT}, id="one-and-true"),
        pytest.param({"a": None}, {}, {}, id="null-and-absent"),
        pytest.param({"day0.version": "1"}, {"day0.version": "2"}, {"day0.version": Stage.COMPARE}),
        pytest.param({}, {"config.threshold": DEFAULTS["threshold"]}, {}, id="new-setting"),
        pytest.param(
            {}, {"config.threshold": 0.5}, {"config.threshold": Stage.COMPARE}, id="new-and-set"
        ),
        pytest.param(
            {"config.former": 1}, {}, {"config.former": Stage.CLOSEOUT}, id="former-setting"
        ),
        pytest.param(
            {"device": "cpu", "config.limit": 1, "config.threshold": 1, "model.revision": "a"},
            {"device": "cuda", "config.limit": 2, "config.threshold": 2, "model.revision": "b"},
            {
                "device": Stage.SETUP,
                "model.revision": Stage.SETUP,
                "config.limit": Stage.BASELINE_EVAL,
                "config.threshold": Stage.COMPARE,
            },
            id="in-the-order-of-stages",
        ),
    ],
)
def test_differences(
    recorded: Mapping[str, Scalar], now: Mapping[str, Scalar], expected: Mapping[str, Stage]
) -> None:
    assert [*first(differences(recorded, now)).items()] == [*expected.items()]


def test_a_new_version_starts_no_tool() -> None:
    (change,) = differences({"day0.version": "0.1"}, {"day0.version": "0.2"})
    assert change == Change(
        field="day0.version", was="0.1", now="0.2", invalidates=(Stage.COMPARE, Stage.CLOSEOUT)
    )


@pytest.mark.parametrize("used", [True, False])
def test_calibration_text_counts_where_it_is_used(ground: Ground, used: bool) -> None:
    config, plan, world = ground.plan()
    path = str(ground.calibration) if used else None
    plan = replace(plan, quantize_request={**plan.quantize_request, "calibration": {"path": path}})
    before = collect(config, plan, world, Digests(None))
    append(ground.calibration)
    found = differences(before, collect(config, plan, world, Digests(None)))
    assert first(found) == ({"calibration.digest": Stage.SETUP} if used else {})


def test_a_recipe_file_counts_by_its_contents(ground: Ground) -> None:
    config, plan, world = ground.plan()
    file = ground.root / "recipe.yaml"
    file.write_text("a: 1", encoding="utf-8")
    plan = replace(plan, quantize_request={**plan.quantize_request, "recipe_file": str(file)})
    before = collect(config, plan, world, Digests(None))
    append(file)
    found = differences(before, collect(config, plan, world, Digests(None)))
    assert first(found) == {"recipe.digest": Stage.SETUP}


def test_a_lock_counts_where_its_environment_is_used(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = collected(ground)
    original = Environments.digest
    changed = {"serve-cpu", "serve-cuda"}
    monkeypatch.setattr(
        Environments,
        "digest",
        lambda self, name: "other" if name in changed else original(self, name),
    )
    assert first(differences(before, collected(ground))) == {"environment.serve-cpu": Stage.DEPLOY}


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        pytest.param(CPU, "A processor", id="processor"),
        pytest.param(CUDA, "An accelerator", id="accelerator"),
        pytest.param(
            replace(CUDA, accelerators=(GPU, replace(GPU, name="B"))), "An accelerator, B", id="two"
        ),
    ],
)
def test_accelerators(described: Any, expected: str) -> None:
    assert inputs.accelerators(described) == expected


@pytest.mark.parametrize(
    "named",
    [
        pytest.param({"dataset_kwargs": {"data_files": {"test": "../outside.jsonl"}}}, id="file"),
        pytest.param({"dataset_kwargs": {"data_files": ["{root}/outside.jsonl"]}}, id="absolute"),
        pytest.param({"dataset_kwargs": {"data_files": "../out*.jsonl"}}, id="pattern"),
        pytest.param({"dataset_path": "../outside.jsonl"}, id="path"),
        pytest.param({"include": "../outside.jsonl"}, id="include"),
    ],
)
def test_data_that_lie_elsewhere_count(ground: Ground, named: Mapping[str, Any]) -> None:
    outside = ground.root / "outside.jsonl"
    outside.write_text('{"question": 1}\n', encoding="utf-8")
    fields = json.loads(json.dumps(named).replace("{root}", str(ground.root)))
    ground.edit_task_file("sums", fields)
    before = collected(ground)
    append(outside)
    assert first(differences(before, collected(ground))) == {
        f"suite.files.{outside}": Stage.BASELINE_EVAL
    }


def test_by_products_of_the_suite_do_not_count(ground: Ground) -> None:
    before = collected(ground)
    (ground.tasks / "__pycache__").mkdir()
    append(ground.tasks / "__pycache__" / "functions.pyc")
    assert differences(before, collected(ground)) == ()


def test_a_linked_directory_of_the_suite_counts(ground: Ground) -> None:
    data = ground.root / "elsewhere"
    data.mkdir()
    append(data / "file.jsonl")
    (ground.tasks / "data").symlink_to(data)
    before = collected(ground)
    append(data / "file.jsonl")
    assert [*first(differences(before, collected(ground)))] == ["suite.files.data/file.jsonl"]


def test_a_suite_from_the_hub_has_no_files() -> None:
    from conductor.suites import load_suite

    assert inputs.suite_files(load_suite("standard"), Digests(None)) == {"suite.data": "hub"}


def test_times_and_places_of_files_do_not_count(ground: Ground, tmp_path: Path) -> None:
    before = collected(ground)
    for path in [*ground.model.iterdir(), *ground.tasks.iterdir()]:
        os.utime(path, (1, 1))
    assert differences(before, collected(ground)) == ()
    other = collected(Ground(root=tmp_path / "other").lay_out())
    assert {change.field for change in differences(before, other)} == {
        *("config.model", "config.suite", "config.calibration.data"),
    }
