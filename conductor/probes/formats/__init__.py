"""Checkpoint formats: one module each, chosen by what the checkpoint's configuration says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from conductor.probes.formats import compressed_tensors, modelopt
from conductor.probes.formats.layout import UNQUANTIZED, Format
from conductor.probes.reading import read_object

MODELOPT_FILE = "hf_quant_config.json"

_ALL_LAYOUTS = (*compressed_tensors.LAYOUTS, *modelopt.LAYOUTS)


def find_format(directory: Path, config: Mapping[str, Any], tensors: Collection[str]) -> Format:
    """Return the format of a checkpoint from its configuration.

    ``tensors`` are the names of its tensors, which its patterns are matched against.
    A checkpoint that declares nothing is unquantized by its own account, whatever its tensors
    are. A method that is not known declares itself, so that no layer of it can be as declared.

    Raises:
        ProbeError: ``hf_quant_config.json`` exists and cannot be read.
    """
    declared = config.get("quantization_config")
    stated = declared if isinstance(declared, Mapping) else None
    method = str(stated.get("quant_method")) if stated is not None else ""
    file = directory / MODELOPT_FILE
    if file.exists() and method in ("", modelopt.METHOD):
        return modelopt.read(stated, read_object(file, "export the checkpoint again"))
    if stated is None:
        return Format(name="none", layouts=_ALL_LAYOUTS, declared=lambda _: UNQUANTIZED)
    if method == modelopt.METHOD:
        return modelopt.read(stated, None)
    if method == compressed_tensors.METHOD:
        return compressed_tensors.read(stated, tensors)
    return Format(
        name=f"unknown ({method})",
        layouts=_ALL_LAYOUTS,
        declared=lambda _: method,
        problems=(f"quantization method {method!r} is not one this probe can read",),
    )
