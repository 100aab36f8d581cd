"""Quantize a checkpoint with NVIDIA ModelOpt and export it as a unified Hugging Face checkpoint."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import quantizing
from protocol import Progress, WorkerFailure, run

PACKAGE = "nvidia-modelopt"
PRESETS = "configs/ptq/presets/model"


def build_config(request: dict[str, Any]) -> dict[str, Any]:
    """Return ModelOpt's quantization settings: from the user's file, or its preset of that name."""
    import yaml
    from modelopt.recipe import load_config, load_recipe
    from modelopt.torch.quantization.config import QuantizeConfig

    recipe_file = request["recipe_file"]
    if not recipe_file:
        preset = load_config(f"{PRESETS}/{request['scheme']}", schema_type=QuantizeConfig)
        return dict(preset.model_dump())
    try:
        if "quantize" in yaml.safe_load(Path(recipe_file).read_text(encoding="utf-8")):
            return dict(load_recipe(Path(recipe_file)).quantize.model_dump())
        return dict(load_config(Path(recipe_file), schema_type=QuantizeConfig).model_dump())
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise WorkerFailure(
            "USER_CONFIG_ERROR",
            f"ModelOpt cannot read the recipe {recipe_file} ({quantizing.first_line(error)}); "
            "correct the file",
        ) from error


def count_quantized(model: Any) -> int:
    """Return how many weight quantizers are enabled."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    return sum(
        "weight_quantizer" in name and module.is_enabled
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
    )


def quantize(model: Any, config: dict[str, Any], calibration: quantizing.Calibration) -> None:
    """Insert quantizers and calibrate them, one sample at a time."""
    import torch
    from modelopt.torch import quantization
    from modelopt.torch.quantization import model_quant

    # A recipe that matches no layer is exported as it is: the gate shows what was not covered.
    os.environ[model_quant._SKIP_WEIGHT_QUANT_CHECK_ENV] = "1"

    def run_samples(module: Any) -> None:
        for index in range(len(calibration.samples)):
            ids = torch.tensor([calibration.take(index)], device=module.device)
            with torch.inference_mode():
                module(ids, use_cache=False)

    quantization.quantize(model, config, run_samples if calibration.samples else None)


def main(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Load, calibrate, and export."""
    started = time.monotonic()
    progress(0, 0, "loading")
    device = quantizing.choose_device(request)
    quantizing.set_seed(request["seed"])
    from modelopt.torch.export import export_hf_checkpoint

    config = build_config(request)
    placement = {"device_map": "auto"} if device == "cuda" else {}
    model = quantizing.load_model(request, **placement).eval()
    calibration = quantizing.load_calibration(request, progress)
    progress(0, 0, "quantizing")
    with quantizing.quantizer_failures("ModelOpt"):
        quantize(model, config, calibration)
    matched = count_quantized(model)
    progress(0, 0, "exporting")

    def save(directory: Path) -> None:
        export_hf_checkpoint(model, export_dir=directory)

    with quantizing.quantizer_failures("ModelOpt"):
        checkpoint = quantizing.export(request, save)
    return quantizing.describe(
        request,
        checkpoint=checkpoint,
        package=PACKAGE,
        matched=matched,
        calibration=calibration,
        started=started,
    )


if __name__ == "__main__":
    run(main)
