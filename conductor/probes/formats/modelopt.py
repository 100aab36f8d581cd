"""ModelOpt exports: ``hf_quant_config.json``, mirrored in ``config.json``.

Both spell the same facts differently: ``exclude_modules`` under ``quantization`` in the one,
``ignore`` at the top of the other. Servers read ``config.json`` first.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec

from conductor.probes.formats.layout import UNDECLARED, UNQUANTIZED, Format, Layout, Scheme
from conductor.probes.formats.scaled import (
    E4M3_DTYPES,
    E8M0_DTYPES,
    FLOAT4,
    FLOAT8,
    INTEGER8,
    ROW_NIBBLES,
    Scaled,
)
from conductor.probes.safetensors_header import Tensor

METHOD = "modelopt"

_layout = partial(
    Scaled,
    input_scale="input_scale",
    column_scale="pre_quant_scale",
)

_LOW_RANK = tuple(
    (f"{start}svdquant_lora_b", f"{start}svdquant_lora_a") for start in ("", "weight_quantizer._")
)
"""Names of SVDQuant's two factors: where the export renames them, and where it does not."""

LAYOUTS: tuple[Layout, ...] = (
    _layout(
        precision="NVFP4",
        code=FLOAT4,
        scale_dtypes=E4M3_DTYPES,
        grouped=True,
        whole="weight_scale_2",
        low_rank=_LOW_RANK,
    ),
    _layout(precision="MXFP4", code=FLOAT4, scale_dtypes=E8M0_DTYPES, grouped=True),
    _layout(precision="INT4", code=ROW_NIBBLES, narrowing="weight_scale_2"),
    _layout(precision="FP8", code=FLOAT8, step=(128, 128)),
    _layout(precision="MXFP8", code=FLOAT8, scale_dtypes=E8M0_DTYPES, grouped=True),
    _layout(precision="INT8", code=INTEGER8),
)

_CACHE_PARTS = frozenset({"k_scale", "v_scale", "k_bias", "v_bias", "q_scale"})
"""Scales of the key-value cache, which ModelOpt writes beside the weights of ``k_proj``,
``v_proj``."""


def _static(precision: str, activations: str, group_size: int | None = None) -> Scheme:
    return Scheme(precision=precision, activations=activations, static=True, group_size=group_size)


SCHEMES: Mapping[str, Scheme] = {
    "FP8": _static("FP8", "FP8"),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(precision="FP8", activations="FP8"),
    "FP8_PB_WO": Scheme(precision="FP8"),
    "FP8_PB_REAL": Scheme(precision="FP8", activations="FP8"),
    "NVFP4": _static("NVFP4", "NVFP4", 16),
    "NVFP4_AWQ": _static("NVFP4", "NVFP4", 16),
    "NVFP4_SVD": _static("NVFP4", "NVFP4", 16),
    "W4A16_NVFP4": Scheme(precision="NVFP4", group_size=16),
    "W4A8_NVFP4_FP8": _static("NVFP4", "FP8", 32),
    "MXFP4": Scheme(precision="MXFP4", activations="MXFP4", group_size=32),
    "W4A8_MXFP4_FP8": Scheme(precision="MXFP4", activations="FP8", group_size=32),
    "MXFP8": Scheme(precision="MXFP8", activations="MXFP8", group_size=32),
    "W4A16_AWQ": Scheme(precision="INT4", group_size=128),
    "W4A8_AWQ": _static("INT4", "FP8", 128),
    "W8A8_SQ_PER_CHANNEL": _static("INT8", "INT8"),
    "W8A16": Scheme(precision="INT8"),
}
"""What each ``quant_algo`` that ModelOpt 0.47 writes stands for.

Its presets for MXFP4 with FP8 inputs scale those as they come, and store no scale of them.
"""

MIXED = "MIXED_PRECISION"

_PRECISIONS = {scheme.precision for scheme in SCHEMES.values()} | {UNQUANTIZED}


def read(
    stated: Mapping[str, Any], beside: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Format:
    """Return the format that ``quantization_config`` and ``hf_quant_config.json`` declare.

    Either may be empty; a difference between them is a problem of the checkpoint. A group size
    that only the second states is that of the first.
    """
    spellings = [_facts(each) for each in (stated, beside) if each]
    facts = spellings[0]
    if facts.group_size is None and facts.algorithm == spellings[-1].algorithm:
        facts = replace(facts, scheme=spellings[-1].scheme)
    schemes = [facts.scheme, *facts.layers.values()]
    strange = {each.precision for each in schemes} - _PRECISIONS
    return Format(
        name=f"ModelOpt {', '.join(sorted(strange)) or facts.algorithm}",
        known=not strange,
        layouts=LAYOUTS,
        declared=_declaration(facts),
        problems=(*_differences(*spellings), *_misdescribed(stated, facts)),
        kv_cache=facts.kv_cache,
        extra_parts=_CACHE_PARTS,
    )


def precisions(stated: Mapping[str, Any]) -> set[str]:
    """Return the precisions that one of the two configurations gives to weights."""
    facts = _facts(stated)
    schemes = facts.layers.values() if facts.algorithm == MIXED else [facts.scheme]
    return {scheme.precision for scheme in schemes} - {UNQUANTIZED, ""}


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What one of the two configurations says, in the words of neither."""

    algorithm: str
    scheme: Scheme
    group_size: int | None
    excluded: tuple[str, ...]
    layers: Mapping[str, Scheme]
    kv_cache: str | None


def _facts(stated: Mapping[str, Any]) -> _Facts:
    inner = stated.get("quantization")
    if isinstance(inner, Mapping):
        stated = inner
    algorithm = _algorithm(stated)
    group_size = _group_size(stated)
    listed = stated.get("quantized_layers")
    layers = listed if isinstance(listed, Mapping) else {}
    excluded = stated.get("exclude_modules", stated.get("ignore"))
    return _Facts(
        algorithm=algorithm,
        scheme=_scheme(algorithm, group_size),
        group_size=group_size,
        excluded=tuple(sorted(set(_texts(excluded)))),
        layers={
            name: _scheme(_algorithm(entry), _positive(entry.get("group_size")))
            for name, entry in layers.items()
            if isinstance(entry, Mapping)
        },
        kv_cache=_kv_cache(stated),
    )


def _scheme(algorithm: str, group_size: int | None) -> Scheme:
    """Return what an algorithm stands for; one that is not known stands for itself."""
    if not algorithm or algorithm == MIXED:
        return UNDECLARED
    scheme = SCHEMES.get(algorithm, Scheme(precision=algorithm))
    return scheme if group_size is None else msgspec.structs.replace(scheme, group_size=group_size)


def _algorithm(stated: Mapping[str, Any]) -> str:
    return str(stated.get("quant_algo") or "").upper()


def _group_size(stated: Mapping[str, Any]) -> int | None:
    """Return the columns per scale, which ``config.json`` states with each group of targets."""
    groups = stated.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    return _positive(stated.get("group_size")) or _size(_part(first, "weights"))


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _kv_cache(stated: Mapping[str, Any]) -> str | None:
    """Return the precision of the key-value cache, spelled in either manner."""
    value = stated.get("kv_cache_quant_algo") or stated.get("kv_cache_scheme")
    if isinstance(value, Mapping):
        kind = "FP" if value.get("type") == "float" else "INT"
        return f"{kind}{value.get('num_bits')}"
    return str(value).upper() if value else None


def _texts(value: Any) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _differences(*spellings: _Facts) -> tuple[str, ...]:
    """Say where ``config.json`` and ``hf_quant_config.json`` contradict each other.

    A group size that only one of them states is no contradiction: ``config.json`` has no place
    for that of most algorithms.
    """
    if len(spellings) < 2:
        return ()
    first, second = spellings
    rows: list[tuple[str, Any, Any]] = [
        ("quant_algo", first.algorithm, second.algorithm),
        ("the kv cache's algorithm", first.kv_cache, second.kv_cache),
        ("quantized_layers", *_unlike(first.layers.items(), second.layers.items())),
        ("excluded modules", *_unlike(first.excluded, second.excluded)),
    ]
    if None not in (first.group_size, second.group_size):
        rows.append(("group_size", first.group_size, second.group_size))
    return tuple(
        f"config.json says {here or 'nothing'}, {there or 'nothing'} says hf_quant_config.json: "
        f"{what}"
        for what, here, there in rows
        if here != there
    )


def _misdescribed(stated: Mapping[str, Any], facts: _Facts) -> Iterator[str]:
    """Say where the groups of ``config.json`` have numbers that ``quant_algo`` does not stand for.

    Of weights alone: the bits of inputs that ModelOpt 0.47 writes with AWQ are not those it uses.
    """
    groups = stated.get("config_groups")
    if not isinstance(groups, Mapping) or facts.algorithm not in SCHEMES:
        return
    bits = int(facts.scheme.precision[-1])
    for name, group in groups.items():
        weights, inputs = (_part(group, key) for key in ("weights", "input_activations"))
        declared, sizes = weights.get("num_bits"), [_size(part) for part in (weights, inputs)]
        where = f"config.json quantization_config {name}: "
        if type(declared) is int and declared != bits:
            yield f"{where}num_bits {declared} of weights, and quant_algo {facts.algorithm}"
        if None not in sizes and sizes[0] != sizes[1]:
            yield f"{where}group_size {sizes[0]} of weights, and {sizes[1]} of inputs"


def _part(group: Any, name: str) -> Mapping[str, Any]:
    part = group.get(name) if isinstance(group, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _size(part: Mapping[str, Any]) -> int | None:
    return _positive(part.get("group_size"))


def _unlike(here: Iterable[Any], there: Iterable[Any]) -> tuple[str, str]:
    """Return the first few entries that only one side has, as text."""
    first, second = list(here), list(there)
    sides = ([e for e in first if e not in second], [e for e in second if e not in first])
    shown = (", ".join(map(_show, side[:3])) + (", ..." if side[3:] else "") for side in sides)
    one, other = shown
    return one, other


def _show(entry: Any) -> str:
    return entry if isinstance(entry, str) else f"{entry[0]} {entry[1].precision}"


def _declaration(facts: _Facts) -> Callable[[str], Scheme]:
    is_excluded = _matcher(facts.excluded)

    def uniform(module: str) -> Scheme:
        return UNDECLARED if is_excluded(module) else facts.scheme

    def mixed(module: str) -> Scheme:
        scheme = _of_ancestor(facts.layers, module)
        return UNDECLARED if scheme is None or is_excluded(module) else scheme

    return mixed if facts.algorithm == MIXED else uniform


def _of_ancestor(layers: Mapping[str, Scheme], module: str) -> Scheme | None:
    """Return the scheme listed for a module, or for one that holds it, as for fused experts."""
    while module:
        if module in layers:
            return layers[module]
        module = module.rpartition(".")[0]
    return None


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Return whether a module is excluded: exactly, by a run of whole components, or by a glob.

    Whole components, so that ``model.layers.1`` is not taken to exclude ``model.layers.10``.
    There may be a hundred patterns and a hundred thousand modules, so that patterns are looked up
    by how they begin: a name by its first component, a glob by what stands before its wildcard.
    """
    globs = [pattern for pattern in patterns if set(pattern) & set("*?[")]
    names = {pattern.strip(".") for pattern in patterns} - set(globs)
    ends = {name.rpartition(".")[2] for name in names}
    lengths: dict[str, set[int]] = defaultdict(set)
    for name in names:
        lengths[name.partition(".")[0]].add(name.count(".") + 1)
    by_prefix: dict[str, list[str]] = defaultdict(list)
    for glob in globs:
        by_prefix[re.split(r"[*?[]", glob, maxsplit=1)[0]].append(glob)
    tests = {prefix: [_test(glob) for glob in found] for prefix, found in by_prefix.items()}
    sizes = sorted({len(prefix) for prefix in tests})

    def named(components: list[str]) -> bool:
        return any(
            ".".join(components[start : start + length]) in names
            for start, component in enumerate(components)
            if component in lengths
            for length in lengths[component]
        )

    def matches(module: str) -> bool:
        for size in sizes:
            for literal, expression in tests.get(module[:size], ()):
                if literal in module and expression(module):
                    return True
        components = module.split(".")
        return not ends.isdisjoint(components) and named(components)

    return matches


def _test(glob: str) -> tuple[str, Callable[[str], Any]]:
    """Return the longest text that a module needs to have in it, and the whole test."""
    literals = re.split(r"\*|\?|\[.*", glob)
    return max(literals, key=len), re.compile(fnmatch.translate(glob)).match
