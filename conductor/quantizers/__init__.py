"""What to ask a quantizing worker for: from a recipe's name or file to the worker's request.

The adapters say what each quantizer calls a recipe; nothing heavy is imported and nothing runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conductor.compatibility import Quantizer
from conductor.failure import Failure
from conductor.quantizers import llmcompressor, modelopt
from conductor.quantizers.recipe_files import RecipeFile, read_recipe_file
from gates import RECIPES, FailureClass, Recipe

WORKERS: Mapping[Quantizer, str] = {
    Quantizer.MODELOPT: "quantize_modelopt.py",
    Quantizer.LLMCOMPRESSOR: "quantize_llmcompressor.py",
}
ADAPTERS = {Quantizer.MODELOPT: modelopt, Quantizer.LLMCOMPRESSOR: llmcompressor}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def find_recipe(name: str) -> Recipe:
    """Return the recipe of that name, or the one that the file of that name describes.

    Raises:
        Failure: USER_CONFIG_ERROR for an unknown name or an unusable file.
    """
    return RECIPES[name] if name in RECIPES else _read(name).recipe


def able(name: str) -> tuple[Quantizer, ...]:
    """Return the quantizers that can carry out a recipe; a recipe file is for one of them.

    Raises:
        Failure: USER_CONFIG_ERROR when none can: the recipe describes what another tool writes.
    """
    if name not in RECIPES:
        return (_read(name).quantizer,)
    quantizers = tuple(quantizer for quantizer, each in ADAPTERS.items() if name in each.ROWS)
    if not quantizers:
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"no quantizer here carries out recipe {name}; quantize with a tool that does and ask "
            "gate_ptq about the checkpoint, or choose another recipe",
        )
    return quantizers


def plan(quantizer: Quantizer, name: str, calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Return the worker's request, less what only the release knows (paths, device, seed).

    Args:
        quantizer: one of those that :func:`able` names for the recipe.
        name: a recipe's name or the path of a recipe file.
        calibration: data (a JSONL file, a Hub id or None), split, text_column, samples,
            max_length in tokens, seed. Data is dropped where the recipe needs none.

    Raises:
        Failure: USER_CONFIG_ERROR when the recipe needs data that is not there.
    """
    if name in RECIPES:
        adapter = ADAPTERS[quantizer]
        request, calibrated = adapter.plan(RECIPES[name]), adapter.ROWS[name].calibrated
    else:
        file = _read(name)
        request, calibrated = {"scheme": file.recipe.name}, file.calibrated
        request["recipe_file"] = str(file.path)
    return {
        "recipe_file": None,
        "trust_remote_code": False,
        **request,
        "calibration": _calibration(name, calibration, calibrated=calibrated),
    }


def _read(name: str) -> RecipeFile:
    if Path(name).suffix in (".yaml", ".yml"):
        return read_recipe_file(Path(name))
    raise Failure(
        FailureClass.USER_CONFIG_ERROR,
        f"there is no recipe {name!r}: give one of {', '.join(RECIPES)}, or the path of a ModelOpt "
        "or llm-compressor recipe that ends in .yaml",
    )


def _calibration(
    name: str, calibration: Mapping[str, Any], *, calibrated: bool
) -> dict[str, str | int | None]:
    chosen: dict[str, str | int | None] = {
        field: calibration[field]
        for field in ("split", "text_column", "samples", "max_length", "seed")
    }
    data = calibration["data"] if calibrated else None
    if calibrated and not data:
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"recipe {name} needs calibration text: give --calibration with a JSONL file or the id "
            "of a Hub data set",
        )
    path = Path(data).expanduser() if data else None
    if path is None:
        return {"path": None, "dataset": None, **chosen}
    if path.is_file():
        return {"path": str(path.resolve()), "dataset": None, **chosen}
    if path.suffix in (".json", ".jsonl") or not _HUB_ID.fullmatch(str(data)):
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"calibration.data: there is no file {data}; give a JSONL file with one object a line, "
            "or the id of a Hub data set",
        )
    return {"path": None, "dataset": data, **chosen}
