"""ModelOpt exports: ``hf_quant_config.json``, mirrored in ``config.json``.

Both spell the same facts differently: ``exclude_modules`` under ``quantization`` in the one,
``ignore`` at the top of the other. Servers read ``config.json`` first.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from typing import Any

from conductor.probes.formats.layout import UNQUANTIZED, Format, Layout

METHOD = "modelopt"

LAYOUTS = (
    Layout(
        precision="NVFP4",
        dtype="U8",
        pack=(1, 2),
        scale_dtypes=("F8_E4M3",),
        group=16,
        needs=("weight_scale_2",),
    ),
    Layout(precision="MXFP4", dtype="U8", pack=(1, 2), scale_dtypes=("U8", "F8_E8M0"), group=32),
    Layout(precision="INT4", dtype="U8", pack=(2, 1)),
    Layout(precision="FP8", dtype="F8_E4M3"),
    Layout(precision="INT8", dtype="I8"),
)

PRECISION_OF_ALGORITHM: Mapping[str, str] = {
    "FP8": "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN": "FP8",
    "FP8_PB_WO": "FP8",
    "FP8_PB_REAL": "FP8",
    "NVFP4": "NVFP4",
    "NVFP4_AWQ": "NVFP4",
    "NVFP4_SVD": "NVFP4",
    "W4A16_NVFP4": "NVFP4",
    "W4A8_NVFP4_FP8": "NVFP4",
    "MXFP4": "MXFP4",
    "W4A8_MXFP4_FP8": "MXFP4",
    "W4A16_AWQ": "INT4",
    "W4A8_AWQ": "INT4",
    "W8A8_SQ_PER_CHANNEL": "INT8",
    "W8A16": "INT8",
}
"""Weight precision of each ``quant_algo`` that ModelOpt 0.47 writes."""

MIXED = "MIXED_PRECISION"


def read(in_config: Mapping[str, Any] | None, in_file: Mapping[str, Any] | None) -> Format:
    """Return the format that ``quantization_config`` and ``hf_quant_config.json`` declare.

    Either may be absent; a difference between them is a problem of the checkpoint.
    """
    spellings = []
    if in_config is not None:
        spellings.append((in_config, _texts(in_config.get("ignore"))))
    if in_file is not None:
        quantization = in_file.get("quantization")
        stated = quantization if isinstance(quantization, Mapping) else {}
        spellings.append((stated, _texts(stated.get("exclude_modules"))))
    facts = [
        (
            _algorithm(stated),
            sorted(excluded),
            _layers(stated.get("quantized_layers")),
        )
        for stated, excluded in spellings
    ]
    problems: tuple[str, ...] = ()
    if any(fact != facts[0] for fact in facts):
        problems = ("hf_quant_config.json and config.json declare different quantization",)
    algorithm, excluded, layers = facts[0]
    return Format(
        name=f"ModelOpt {algorithm}",
        layouts=LAYOUTS,
        declared=_declaration(algorithm, excluded, layers),
        problems=problems,
    )


def precisions(stated: Mapping[str, Any]) -> set[str]:
    """Return the precisions that one of the two configurations gives to weights."""
    algorithm = _algorithm(stated)
    named = _layers(stated.get("quantized_layers")).values()
    algorithms = set(named) if algorithm == MIXED else {algorithm}
    return {PRECISION_OF_ALGORITHM.get(each, each) for each in algorithms if each}


def _algorithm(stated: Mapping[str, Any]) -> str:
    return str(stated.get("quant_algo") or "").upper()


def _texts(value: Any) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _layers(value: Any) -> dict[str, str]:
    """Return the algorithm of each module that is listed by name."""
    listed = value if isinstance(value, Mapping) else {}
    return {name: _algorithm(entry) for name, entry in listed.items() if isinstance(entry, Mapping)}


def _declaration(
    algorithm: str, excluded: list[str], layers: Mapping[str, str]
) -> Callable[[str], str]:
    is_excluded = _matcher(excluded)

    def declared(module: str) -> str:
        named = layers.get(module, "") if algorithm == MIXED else algorithm
        if not named or is_excluded(module):
            return UNQUANTIZED
        return PRECISION_OF_ALGORITHM.get(named, named)

    return declared


def _matcher(patterns: list[str]) -> Callable[[str], bool]:
    """Return whether a module is excluded: exactly, by a run of whole components, or by a glob.

    Whole components, so that ``model.layers.1`` is not taken to exclude ``model.layers.10``.
    """
    plain = {pattern for pattern in patterns if not set(pattern) & set("*?[")}
    globs = [pattern for pattern in patterns if pattern not in plain]
    expressions = [fnmatch.translate(pattern) for pattern in globs]
    matches_glob = re.compile("|".join(expressions)).match if expressions else lambda _: None
    lengths = sorted({pattern.count(".") + 1 for pattern in plain})

    def matches(module: str) -> bool:
        components = module.split(".")
        return matches_glob(module) is not None or any(
            ".".join(components[start : start + length]) in plain
            for length in lengths
            for start in range(len(components) - length + 1)
        )

    return matches
