"""Quantize a checkpoint with llm-compressor and export it in compressed-tensors layout."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import quantizing
from protocol import Progress, WorkerFailure, run

PACKAGE = "llmcompressor"


def build_recipe(request: dict[str, Any]) -> Any:
    """Return llm-compressor's recipe: from the user's file, or from scheme, targets and ignore."""
    from llmcompressor.recipe import Recipe

    if request["recipe_file"]:
        try:
            return Recipe.create_instance(request["recipe_file"])
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise WorkerFailure(
                "USER_CONFIG_ERROR",
                f"llm-compressor cannot read the recipe {request['recipe_file']} "
                f"({quantizing.first_line(error)}); correct the file",
            ) from error
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    rounding = QuantizationModifier(
        targets=request["targets"], scheme=request["scheme"], ignore=request["ignore"]
    )
    return Recipe.from_modifiers([AWQModifier(), rounding] if request["awq"] else [rounding])


def calibration_loader(calibration: quantizing.Calibration) -> Any:
    """Return a loader of single samples; None without data."""
    import torch

    class Samples(torch.utils.data.Dataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return len(calibration.samples)

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = torch.tensor([calibration.take(index)])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return torch.utils.data.DataLoader(Samples(), batch_size=None) if calibration.samples else None


def keep_memory_unpinned() -> None:
    """Let AWQ run without an accelerator.

    llm-compressor 0.13 pins cached activations for faster copies to the accelerator, and torch
    refuses to where there is none.
    """
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda self, *arguments, **options: None


def count_quantized(model: Any) -> int:
    """Return how many layers have a scheme for their weights."""
    schemes = (getattr(module, "quantization_scheme", None) for module in model.modules())
    return sum(scheme is not None and scheme.weights is not None for scheme in schemes)


def main(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Load, calibrate where the recipe needs it, and export."""
    started = time.monotonic()
    progress(0, 0, "loading")
    device = quantizing.choose_device(request)
    quantizing.set_seed(request["seed"])
    from llmcompressor import oneshot

    recipe = build_recipe(request)
    # The library moves layers to an accelerator by itself, and splits fused experts into linear
    # layers. Its own loader for mixtures of experts would do the latter with less memory, but
    # needs torchvision.
    model = quantizing.load_model(request)
    calibration = quantizing.load_calibration(request, progress)
    if device == "cpu":
        keep_memory_unpinned()
    progress(0, 0, "quantizing")
    with quantizing.quantizer_failures("llm-compressor"):
        oneshot(
            model=model,
            recipe=recipe,
            dataset=calibration_loader(calibration),
        )
    matched = count_quantized(model)
    progress(0, 0, "exporting")

    def save(directory: Path) -> None:
        model.save_pretrained(directory, save_compressed=True)

    with quantizing.quantizer_failures("llm-compressor"):
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
