from pathlib import Path
from typing import Any

import pytest

from conductor.compatibility import Engine, Quantizer
from conductor.config import DEFAULTS, Rule, load_config
from conductor.failure import Failure


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "release.yaml"
    path.write_text(text)
    return path


def test_command_line_overrides_the_file_which_overrides_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: ./m\nrecipe: fp8\nthreshold: 0.02\nengine: {name: vllm, port: 8123}\n",
    )
    config = load_config(path, {"recipe": "int8", "threshold": None})
    assert (config.model, config.recipe, config.threshold) == ("./m", "int8", 0.02)
    assert (config.engine.name, config.engine.port) == (Engine.VLLM, 8123)
    assert config.origins["recipe"] == ("int8", "command line")
    assert config.origins["threshold"] == (0.02, str(path))
    assert config.origins["seed"] == (0, "default")


@pytest.mark.parametrize(("model", "suite"), [("demo", "demo"), ("org/name", "standard")])
def test_the_default_suite_fits_the_model(model: str, suite: str) -> None:
    assert load_config(None, {"model": model, "recipe": "int8"}).suite == suite


def test_every_value_has_an_origin() -> None:
    config = load_config(None, {"model": "demo", "recipe": "int8", "quantizer": "modelopt"})
    assert config.quantizer is Quantizer.MODELOPT
    assert config.document().keys() == DEFAULTS.keys()


REFUSED: list[Any] = [
    pytest.param("model: demo\nrecipe: int8\nthreshhold: 1\n", "threshhold", id="unknown-key"),
    pytest.param("threshold: .nan\n", "threshold", id="nan"),
    pytest.param("threshold: 2\n", "threshold", id="threshold-above-1"),
    pytest.param("limit: 0\n", "limit", id="limit-0"),
    pytest.param("engine: vllm\n", "engine", id="scalar-for-mapping"),
    pytest.param("engine: {port: 99999}\n", "engine.port", id="port-out-of-range"),
    pytest.param("- model\n", "must be a mapping", id="list"),
    pytest.param("model: [unclosed\n", "not valid YAML", id="not-yaml"),
    pytest.param("recipe: int8\n", "no model given", id="no-model"),
    pytest.param("model: demo\n", "no recipe given", id="no-recipe"),
    pytest.param("", "must be a mapping", id="empty"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(Failure) as caught:
        load_config(path, {})
    assert caught.value.failure_class == "USER_CONFIG_ERROR"
    assert words in caught.value.message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"absent\.yaml.*check the path"):
        load_config(tmp_path / "absent.yaml", {})


def test_settings_of_the_comparison(tmp_path: Path) -> None:
    text = "until_decided: true\nmax_samples: 500\nmax_repeats: 3\nnoise_floor: true\n"
    given = {"model": "demo", "recipe": "int8"}
    config = load_config(write(tmp_path, text), given)
    assert (config.until_decided, config.first_batch, config.max_samples) == (True, 200, 500)
    assert (config.max_repeats, config.noise_floor, config.discordance) == (3, True, None)
    assert (config.rule, load_config(None, given).until_decided) == (Rule.NONINFERIORITY, False)
    assert load_config(None, {**given, "rule": Rule.THRESHOLD}).rule is Rule.THRESHOLD


CONTRADICTIONS: list[Any] = [
    pytest.param({"until_decided": True, "limit": 5}, "max_samples instead", id="limit-and-rounds"),
    pytest.param(
        {"until_decided": True, "rule": Rule.THRESHOLD}, "no ground to stop", id="bare-and-rounds"
    ),
    pytest.param({"max_samples": 5}, "max_samples needs", id="most-without-rounds"),
    pytest.param({"first_batch": 50}, "first_batch needs", id="first-of-no-rounds"),
    pytest.param({"max_repeats": 2}, "max_repeats needs", id="repeats-without-rounds"),
    pytest.param({"threshold": 1.0}, "threshold must be under 1", id="threshold-is-the-scale"),
    pytest.param({"rule": "guess"}, "rule", id="no-such-rule"),
    pytest.param({"first_batch": 0}, "first_batch", id="empty-batch"),
    pytest.param({"discordance": 1.5}, "discordance", id="discordance-above-1"),
]


@pytest.mark.parametrize(("options", "words"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(Failure) as caught:
        load_config(None, {"model": "demo", "recipe": "int8", **options})
    assert words in caught.value.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1])
def test_bad_options_are_refused_before_anything_runs(value: float) -> None:
    with pytest.raises(Failure, match=r"command line: .*"):
        load_config(None, {"model": "demo", "recipe": "int8", "threshold": value})
