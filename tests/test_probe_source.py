"""What a source is before anything is done to it: whole, and quantized or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors_files import CONFIG, ct_config, dense, modelopt_config, write_checkpoint

from conductor.probes.safetensors_header import INDEX_FILE
from conductor.probes.source import ProbeError, check_weights, quantized_format


def checkpoint(directory: Path, quantization: object = None, shards: int = 1) -> Path:
    config = CONFIG if quantization is None else CONFIG | {"quantization_config": quantization}
    return write_checkpoint(directory / "model", dense(), config, shards=shards)


@pytest.mark.parametrize("shards", [1, 3])
def test_whole_weights(tmp_path: Path, shards: int) -> None:
    check_weights(checkpoint(tmp_path, shards=shards))


def _cut(directory: Path) -> None:
    path = directory / "model-1.safetensors"
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)


def _overlapping(directory: Path) -> None:
    entry = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (directory / "model-1.safetensors").write_bytes(content)


def _without_weights(directory: Path) -> None:
    for path in (*directory.glob("*.safetensors"), directory / INDEX_FILE):
        path.unlink()


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda d: (d / "model-1.safetensors").unlink(), "do not exist: model-1"),
        (_cut, "beyond the end of their file: model-1"),
        (_overlapping, "overlaps"),
        (_without_weights, "holds no safetensors weights"),
        (lambda d: (d / INDEX_FILE).write_text('{"weight_map": {}}'), "weight_map"),
    ],
    ids=["shard-absent", "truncated", "overlapping", "none", "empty-index"],
)
def test_weights_that_are_not_whole(
    tmp_path: Path, break_it: Callable[[Path], object], problem: str
) -> None:
    directory = checkpoint(tmp_path, shards=3)
    break_it(directory)
    with pytest.raises(ProbeError, match=problem) as caught:
        check_weights(directory)
    assert caught.value.remedy


@pytest.mark.parametrize("ask", [check_weights, quantized_format])
def test_a_directory_that_is_none(tmp_path: Path, ask: Callable[[Path], object]) -> None:
    with pytest.raises(ProbeError, match="is no directory"):
        ask(tmp_path / "absent")


LAYERS = {"a": {"quant_algo": "NVFP4"}, "b": {"quant_algo": "NVFP4"}}
TWO_GROUPS = ct_config(8, "float")
TWO_GROUPS["config_groups"]["group_1"] = {"targets": [], "weights": {"num_bits": 4, "type": "int"}}


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        pytest.param(None, None, id="unquantized"),
        pytest.param(modelopt_config("FP8"), ("modelopt", "FP8"), id="modelopt-fp8"),
        pytest.param(modelopt_config("NVFP4"), ("modelopt", "NVFP4"), id="modelopt-nvfp4"),
        pytest.param(modelopt_config("W4A16_AWQ"), ("modelopt", "INT4"), id="modelopt-int4"),
        pytest.param(modelopt_config("NEW"), ("modelopt", "unknown"), id="modelopt-new"),
        pytest.param(modelopt_config(None), ("modelopt", "unknown"), id="modelopt-cache-only"),
        pytest.param({"quant_algo": "FP8"}, ("modelopt", "FP8"), id="modelopt-unnamed"),
        pytest.param(
            modelopt_config("NVFP4", quant_method="modelopt_fp4"),
            ("modelopt", "NVFP4"),
            id="modelopt-variant",
        ),
        pytest.param(
            modelopt_config("MIXED_PRECISION", quantized_layers=LAYERS),
            ("modelopt", "NVFP4"),
            id="modelopt-by-layer",
        ),
        pytest.param(
            modelopt_config(
                "MIXED_PRECISION", quantized_layers=LAYERS | {"c": {"quant_algo": "FP8"}}
            ),
            ("modelopt", "unknown"),
            id="modelopt-mixed",
        ),
        pytest.param(ct_config(8, "int"), ("compressed-tensors", "INT8"), id="ct-int8"),
        pytest.param(ct_config(8, "float"), ("compressed-tensors", "FP8"), id="ct-fp8"),
        pytest.param(ct_config(4, "int", 128), ("compressed-tensors", "INT4"), id="ct-int4"),
        pytest.param(ct_config(4, "float", 16), ("compressed-tensors", "NVFP4"), id="ct-nvfp4"),
        pytest.param(ct_config(4, "float", 32), ("compressed-tensors", "MXFP4"), id="ct-mxfp4"),
        pytest.param(ct_config(3, "int"), ("compressed-tensors", "unknown"), id="ct-odd"),
        pytest.param(TWO_GROUPS, ("compressed-tensors", "unknown"), id="ct-mixed"),
        pytest.param({"quant_method": "fp8"}, ("fp8", "FP8"), id="fp8"),
        pytest.param({"quant_method": "mxfp4"}, ("mxfp4", "MXFP4"), id="mxfp4"),
        pytest.param({"quant_method": "awq", "bits": 4}, ("awq", "INT4"), id="awq"),
        pytest.param({"quant_method": "gptq", "bits": 3}, ("gptq", "unknown"), id="gptq-3"),
        pytest.param({"quant_method": "New-1"}, ("New-1", "unknown"), id="other-as-written"),
        pytest.param({"load_in_4bit": True}, ("unknown", "unknown"), id="no-method"),
    ],
)
def test_quantized_format(
    tmp_path: Path, quantization: object, expected: tuple[str, str] | None
) -> None:
    assert quantized_format(checkpoint(tmp_path, quantization)) == expected


def test_quantized_format_of_the_text_part(tmp_path: Path) -> None:
    config = CONFIG | {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    directory = write_checkpoint(tmp_path / "model", dense(), config)
    assert quantized_format(directory) == ("fp8", "FP8")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"quantization": {"quant_algo": "FP8"}}, ("modelopt", "FP8")),
        ({"quantization": None}, ("modelopt", "unknown")),
        ({}, ("modelopt", "unknown")),
    ],
    ids=["fp8", "null", "empty"],
)
def test_quantized_format_in_a_file_of_its_own(
    tmp_path: Path, document: dict[str, Any], expected: tuple[str, str]
) -> None:
    directory = checkpoint(tmp_path)
    (directory / "hf_quant_config.json").write_text(json.dumps(document))
    assert quantized_format(directory) == expected


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda d: (d / "config.json").unlink(), "does not exist"),
        (lambda d: (d / "config.json").write_text("["), "is not valid JSON"),
        (lambda d: (d / "hf_quant_config.json").write_text("[]"), "holds a JSON list"),
        (
            lambda d: (d / "config.json").write_text('{"quantization_config": ["fp8"]}'),
            "quantization_config must be an object",
        ),
    ],
    ids=["no-config", "broken", "file-a-list", "config-a-list"],
)
def test_quantized_format_that_cannot_be_read(
    tmp_path: Path, break_it: Callable[[Path], object], problem: str
) -> None:
    directory = checkpoint(tmp_path)
    break_it(directory)
    with pytest.raises(ProbeError, match=problem):
        quantized_format(directory)
