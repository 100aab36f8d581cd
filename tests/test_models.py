import json
from pathlib import Path

import pytest
from safetensors_files import write_file

from conductor.failure import Failure
from conductor.models import resolve_model


def checkpoint(directory: Path, *files: str, config: object = None) -> str:
    directory.mkdir(exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    for name in files:
        (directory / name).write_bytes(b"12345678")
    return str(directory)


def test_a_local_checkpoint_is_found(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "text_config": {"max_position_embeddings": 9}}
    path = checkpoint(tmp_path / "m", config=config)
    write_file(tmp_path / "m" / "model.safetensors", {"w": ("BF16", (2,))})
    model = resolve_model(path)
    assert (model.architecture, model.revision, model.max_positions, model.quantized) == (
        "LlamaForCausalLM",
        None,
        9,
        None,
    )


@pytest.mark.parametrize("architectures", [None, [], [{"a": 1}], "Llama", [7]], ids=repr)
def test_an_architecture_that_is_no_name_is_unknown(tmp_path: Path, architectures: object) -> None:
    path = checkpoint(tmp_path / "m", config={"architectures": architectures})
    write_file(tmp_path / "m" / "model.safetensors", {"w": ("BF16", (2,))})
    assert resolve_model(path).architecture == "unknown"


def test_truncated_weights_are_refused_before_anything_runs(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m", config={})
    weights = tmp_path / "m" / "model.safetensors"
    write_file(weights, {"w": ("BF16", (2,))})
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(Failure, match=r"model\.safetensors") as caught:
        resolve_model(path)
    assert caught.value.failure_class == "USER_CONFIG_ERROR"


def test_the_demo_model_comes_with_the_package() -> None:
    model = resolve_model("demo")
    assert model.architecture == "LlamaForCausalLM"
    assert model.weights_bytes < 8_000_000


@pytest.mark.parametrize(
    ("files", "config", "words"),
    [
        pytest.param([], None, "config.json", id="empty"),
        pytest.param([], {}, "no *.safetensors", id="no-weights"),
        pytest.param(["pytorch_model.bin"], {}, "pickled", id="pickled"),
        pytest.param(["model.safetensors"], [1], "not a mapping", id="config-is-a-list"),
    ],
)
def test_unusable_directories_are_refused(
    tmp_path: Path, files: list[str], config: object, words: str
) -> None:
    with pytest.raises(Failure) as caught:
        resolve_model(checkpoint(tmp_path / "m", *files, config=config))
    assert caught.value.failure_class == "USER_CONFIG_ERROR"
    assert words in caught.value.message


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m", "model.safetensors")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(Failure, match="cannot be read"):
        resolve_model(path)


@pytest.mark.parametrize("name", ["no such model", "./nowhere", "a/b/c", "demoo"])
def test_what_is_no_model_is_refused_with_the_forms(name: str) -> None:
    with pytest.raises(Failure, match="Hugging Face id"):
        resolve_model(name)


def test_an_unreachable_hub_is_the_worlds_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Failure) as caught:
        resolve_model("org/name@main")
    assert caught.value.failure_class == "SYSTEMIC"
