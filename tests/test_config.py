from pathlib import Path
from typing import Any

import pytest

from conductor.compatibility import Engine, Quantizer
from conductor.config import DEFAULTS, load_config
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1])
def test_bad_options_are_refused_before_anything_runs(value: float) -> None:
    with pytest.raises(Failure, match=r"command line: .*"):
        load_config(None, {"model": "demo", "recipe": "int8", "threshold": value})
