"""compressed-tensors exports: ``quantization_config`` with groups of targets and an ignore list.

Its patterns are regular expressions that somebody else wrote, and matching one can take for ever.
So they are matched in a process of their own that is given a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
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

_SHOWN_CHARACTERS = 80

_FOUR_BIT_FLOATS = {"16": "NVFP4", "32": "MXFP4"}
"""Four-bit floating point formats by their group size."""


PATTERNS_TIMEOUT_S = 20.0
"""Time for matching all patterns; a hundred thousand modules take under a second per pattern."""

_MATCH_PATTERNS = """
import json, re, sys
patterns, modules = json.load(sys.stdin)
for pattern in patterns:
    try:
        matches = re.compile(pattern).match
    except (re.error, OverflowError, RecursionError):
        matches = lambda module: None
    print(json.dumps([module for module in modules if matches(module)]), flush=True)
"""
"""A pattern that is no regular expression names nothing, as it would in the loader."""


def read(config: Mapping[str, Any], tensors: Collection[str]) -> Format:
    """Return the format that a ``quantization_config`` declares for the modules of ``tensors``."""
    groups = _groups(config)
    lists = [config.get("ignore"), *(group.get("targets") for group in groups)]
    patterns = sorted({text for texts in lists for text in _texts(texts) if _is_pattern(text)})
    named, problem = _match(patterns, tensors)
    ignored, *targets = (_matcher(texts, named) for texts in lists)
    schemes = [
        (target, _precision(group.get("weights")))
        for target, group in zip(targets, groups, strict=True)
    ]

    def declared(module: str) -> str:
        if ignored(module):
            return UNQUANTIZED
        return next((precision for matches, precision in schemes if matches(module)), UNQUANTIZED)

    return Format(
        name=f"compressed-tensors {config.get('format')}",
        layouts=LAYOUTS,
        declared=declared,
        problems=(problem,) if problem else (),
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


def _texts(value: Any) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _is_pattern(text: str) -> bool:
    return text.startswith("re:")


def _match(
    patterns: list[str], tensors: Collection[str]
) -> tuple[Mapping[str, Collection[str]], str]:
    """Return the modules that each pattern names, and the problem where one cannot be told.

    Fused experts are tensors that are modules as well, so both kinds of name are tried.
    """
    if not patterns:
        return {}, ""
    modules = sorted({*tensors, *(name.rpartition(".")[0] for name in tensors)})
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _MATCH_PATTERNS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
    with process:
        question = json.dumps([[text.removeprefix("re:") for text in patterns], modules])
        try:
            answer, _ = process.communicate(question, timeout=PATTERNS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            answer, _ = process.communicate()
    named = {
        pattern: set(json.loads(line))
        for pattern, line in zip(patterns, answer.splitlines(), strict=False)
    }
    if len(named) == len(patterns):
        return named, ""
    pattern = patterns[len(named)]
    shown = pattern if len(pattern) <= _SHOWN_CHARACTERS else f"{pattern[:_SHOWN_CHARACTERS]}…"
    return named, (
        f"config.json quantization_config: pattern {shown!r} cannot be matched "
        f"within {PATTERNS_TIMEOUT_S:g} s"
    )


def _matcher(texts: Any, named: Mapping[str, Collection[str]]) -> Callable[[str], bool]:
    """Return whether a linear module is named: exactly, by its class, or by a ``re:`` pattern."""
    exact = {text for text in _texts(texts) if not _is_pattern(text)}
    matched = {module for text in _texts(texts) for module in named.get(text, ())}

    def matches(module: str) -> bool:
        return LINEAR_CLASS in exact or module in exact or module in matched

    return matches
