"""compressed-tensors exports: ``quantization_config`` with groups of targets and an ignore list."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from conductor.probes.formats.layout import UNQUANTIZED, Format, Layout

METHOD = "compressed-tensors"

LINEAR_CLASS = "Linear"
"""The class name under which every linear module is a target."""

LAYOUTS = (
    Layout(
        precision="NVFP4",
        weight="weight_packed",
        dtype="U8",
        pack=(1, 2),
        scale_dtypes=("F8_E4M3",),
        group=16,
        needs=("weight_global_scale",),
    ),
    Layout(
        precision="MXFP4",
        weight="weight_packed",
        dtype="U8",
        pack=(1, 2),
        scale_dtypes=("U8", "F8_E8M0"),
        group=32,
    ),
    Layout(precision="INT4", weight="weight_packed", dtype="I32", pack=(1, 8)),
    Layout(precision="INT8", weight="weight_packed", dtype="I32", pack=(1, 4)),
    Layout(precision="FP8", dtype="F8_E4M3"),
    Layout(precision="INT8", dtype="I8"),
)

_FOUR_BIT_FLOATS = {"16": "NVFP4", "32": "MXFP4"}
"""Four-bit floating point formats by their group size."""


def read(config: Mapping[str, Any]) -> Format:
    """Return the format that a ``quantization_config`` declares."""
    schemes = [
        (_matcher(group.get("targets")), _precision(group.get("weights")))
        for group in _groups(config)
    ]
    ignored = _matcher(config.get("ignore"))

    def declared(module: str) -> str:
        if ignored(module):
            return UNQUANTIZED
        return next((precision for matches, precision in schemes if matches(module)), UNQUANTIZED)

    return Format(
        name=f"compressed-tensors {config.get('format')}", layouts=LAYOUTS, declared=declared
    )


def precisions(config: Mapping[str, Any]) -> set[str]:
    """Return the precisions that a ``quantization_config`` gives to weights."""
    return {_precision(group.get("weights")) for group in _groups(config)} - {UNQUANTIZED}


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups")
    entries = groups.values() if isinstance(groups, Mapping) else ()
    return [group for group in entries if isinstance(group, Mapping)]


def _precision(weights: Any) -> str:
    """Name the precision of a group's weights; one without a name of its own keeps its numbers."""
    if not isinstance(weights, Mapping):
        return UNQUANTIZED
    bits, kind, group = (weights.get(key) for key in ("num_bits", "type", "group_size"))
    if (bits, kind) == (4, "float"):
        return _FOUR_BIT_FLOATS.get(str(group), f"FP4 in groups of {group}")
    return f"{'FP' if kind == 'float' else 'INT'}{bits}"


def _matcher(patterns: Any) -> Callable[[str], bool]:
    """Return whether a linear module is named: exactly, by its class, or by a ``re:`` pattern.

    A pattern that is no regular expression names nothing, as it would in the loader.
    """
    texts: Iterable[str] = (
        [entry for entry in patterns if isinstance(entry, str)]
        if isinstance(patterns, list)
        else []
    )
    exact = {text for text in texts if not text.startswith("re:")}
    expressions = [text.removeprefix("re:") for text in texts if text.startswith("re:")]
    compiled = [re.compile(expression) for expression in expressions if _is_pattern(expression)]

    def matches(module: str) -> bool:
        return (
            LINEAR_CLASS in exact
            or module in exact
            or any(expression.match(module) for expression in compiled)
        )

    return matches


def _is_pattern(expression: str) -> bool:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError):
        return False
    return True
