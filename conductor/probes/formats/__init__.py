"""Checkpoint formats: one module each, chosen by what the checkpoint's configuration says.

To add a format, write a module with ``read(stated, beside, tensors) -> Format`` and give it a row
in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from conductor.probes.formats import (
    awq,
    bitsandbytes,
    block_fp8,
    compressed_tensors,
    gpt_oss,
    gptq,
    modelopt,
)
from conductor.probes.formats.layout import UNDECLARED, Format, Layout
from conductor.probes.reading import read_object
from conductor.probes.safetensors_header import Tensor

MODELOPT_FILE = "hf_quant_config.json"

Read = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Tensor]], Format]
"""From what ``config.json`` states (its ``quantization_config``, empty where it has none), what the
method's own file beside it states (empty where there is none), and the checkpoint's tensors."""


class Method(NamedTuple):
    """One quantization method: how its configuration is read, and its own file, if any."""

    read: Read
    layouts: tuple[Layout, ...]
    file: str | None = None


METHODS: Mapping[str, Method] = {
    "modelopt": Method(modelopt.read, modelopt.LAYOUTS, MODELOPT_FILE),
    "modelopt_fp4": Method(modelopt.read, modelopt.LAYOUTS, MODELOPT_FILE),
    "modelopt_mxfp8": Method(modelopt.read, modelopt.LAYOUTS, MODELOPT_FILE),
    "modelopt_mixed": Method(modelopt.read, modelopt.LAYOUTS, MODELOPT_FILE),
    "compressed-tensors": Method(compressed_tensors.read, compressed_tensors.LAYOUTS),
    "awq": Method(awq.read, awq.LAYOUTS, awq.FILE),
    "gptq": Method(gptq.read, gptq.LAYOUTS, gptq.FILE),
    "fp8": Method(block_fp8.read, block_fp8.LAYOUTS),
    "fbgemm_fp8": Method(block_fp8.read, block_fp8.LAYOUTS),
    "mxfp4": Method(gpt_oss.read, gpt_oss.LAYOUTS),
    "bitsandbytes": Method(bitsandbytes.read, bitsandbytes.LAYOUTS),
}
"""Readers by the ``quant_method`` of ``quantization_config``."""

ALL_LAYOUTS: tuple[Layout, ...] = tuple(
    dict.fromkeys(layout for method in METHODS.values() for layout in method.layouts)
)
"""Layouts of all formats, for a checkpoint that does not say which is its own."""

_PLACES = (None, "text_config", "llm_config", "language_config")
"""Parts of ``config.json`` that may hold the quantization of a model with several parts."""

_KEYS = ("quantization_config", "compression_config")

_EXPORT = "export the checkpoint again"


def find_format(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Format:
    """Return the format of a checkpoint from its configuration.

    ``tensors`` are its tensors, which its patterns are matched against. A checkpoint that declares
    nothing is unquantized by its own account, whatever its tensors are. Of a method that is not
    known, nothing is known.

    Raises:
        ProbeError: a file that states the quantization exists and cannot be read.
    """
    stated = stated_in(config)
    files = _files(directory)
    name = _method(stated, files)
    if name is None:
        return Format(name="none", layouts=ALL_LAYOUTS, declared=lambda _: UNDECLARED)
    if name not in METHODS:
        return Format(
            name=f"unknown ({name})",
            layouts=ALL_LAYOUTS,
            declared=lambda _: UNDECLARED,
            known=False,
        )
    method = METHODS[name]
    beside = read_object(directory / method.file, _EXPORT) if method.file in files else {}
    found = method.read(stated or {}, beside, tensors)
    if MODELOPT_FILE in files and method.file != MODELOPT_FILE:
        leftover = f"config.json says {name}, and there is {MODELOPT_FILE}, which is ModelOpt's"
        return replace(found, problems=(*found.problems, leftover))
    return found


def stated_in(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the ``quantization_config`` of a configuration or of its text part."""
    for place in _PLACES:
        part = config if place is None else config.get(place)
        if not isinstance(part, Mapping):
            continue
        for key in _KEYS:
            stated = part.get(key)
            if isinstance(stated, Mapping):
                return stated
    return None


def _files(directory: Path) -> list[str]:
    names = dict.fromkeys(method.file for method in METHODS.values() if method.file)
    return [name for name in names if (directory / name).exists()]


def _method(stated: Mapping[str, Any] | None, files: Iterable[str]) -> str | None:
    """Return the method's name: as stated, or of the file that lies beside the configuration."""
    if stated is not None:
        method = stated.get("quant_method")
        if isinstance(method, str) and method:
            return method
        if "quant_algo" in stated:
            return modelopt.METHOD
    owners = {method.file: name for name, method in METHODS.items()}
    name = next((owners[file] for file in files), None)
    if name is None and stated is not None:
        return "without a quant_method"
    return name
