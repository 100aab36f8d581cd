"""compressed-tensors exports: ``quantization_config`` with groups of targets and an ignore list.

A target names a module, begins with ``re:`` and is a regular expression, or is a class of modules.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

from conductor.probes.formats.layout import UNDECLARED, UNQUANTIZED, Format, Layout, Scheme
from conductor.probes.formats.patterns import match_patterns
from conductor.probes.formats.scaled import (
    E4M3_DTYPES,
    E8M0_DTYPES,
    FLOAT4,
    FLOAT8,
    INTEGER8,
    Scaled,
    integers_in_bytes,
    packed_integers,
)
from conductor.probes.safetensors_header import Tensor

METHOD = "compressed-tensors"

LINEAR_CLASS = "Linear"
"""The class name under which every linear module is a target."""

_UNPACKED = frozenset({"weight_zero_point", "input_zero_point"})
"""Parts that some versions write beside a weight that has no use for them."""

_integers = partial(Scaled, zero_point="weight_zero_point", column_groups="weight_g_idx")


def _packed(bits: int) -> Layout:
    return _integers(
        precision=f"INT{bits}",
        code=packed_integers(bits),
        weight="weight_packed",
        input_scale="input_scale",
        written_shape="weight_shape",
    )


def _in_bytes(bits: int) -> Layout:
    """Return the layout of a format whose name says INT8, of numbers with fewer bits."""
    return _integers(
        precision=f"INT{bits}",
        code=integers_in_bytes(bits),
        input_scale="input_scale",
        extra=_UNPACKED,
    )


LAYOUTS: tuple[Layout, ...] = (
    Scaled(
        precision="NVFP4",
        code=FLOAT4,
        weight="weight_packed",
        scale_dtypes=E4M3_DTYPES,
        grouped=True,
        whole="weight_global_scale",
        whole_divides=True,
        input_scale="input_global_scale",
    ),
    Scaled(
        precision="MXFP4",
        code=FLOAT4,
        weight="weight_packed",
        scale_dtypes=E8M0_DTYPES,
        grouped=True,
        input_scale="input_global_scale",
    ),
    *(_packed(bits) for bits in (4, 8, 2, 3, 5, 6, 7)),
    Scaled(
        precision="FP8",
        code=FLOAT8,
        input_scale="input_scale",
        step=(128, 128),
        extra=_UNPACKED,
    ),
    Scaled(precision="MXFP8", code=FLOAT8, scale_dtypes=E8M0_DTYPES, grouped=True),
    _integers(precision="INT8", code=INTEGER8, input_scale="input_scale", extra=_UNPACKED),
    *(_in_bytes(bits) for bits in (4, 2, 3, 5, 6, 7)),
)

_CACHE_PARTS = frozenset(
    f"{name}_{what}" for name in ("k", "v", "q") for what in ("scale", "zero_point")
)
"""Scales of the key-value cache, which lie beside the projections of an attention module."""

_CACHE_SCALES = (".k_scale", ".v_scale")

_MIXED = "mixed-precision"

FORMATS = frozenset(
    {
        "dense",
        "float-quantized",
        "int-quantized",
        _MIXED,
        "mxfp4-pack-quantized",
        "mxfp8-quantized",
        "naive-quantized",
        "nvfp4-pack-quantized",
        "pack-quantized",
    }
)
"""Ways to store weights whose tensors the layouts describe; the others compress sparse ones."""

_PRECISION_OF_WAY: Mapping[str, str] = {
    "dense": UNQUANTIZED,
    "float-quantized": "FP8",
    "int-quantized": "INT",
    "mxfp4-pack-quantized": "MXFP4",
    "mxfp8-quantized": "MXFP8",
    "nvfp4-pack-quantized": "NVFP4",
    "pack-quantized": "INT",
}
"""How the precisions begin that a way to store weights can hold."""

_UNCOMPRESSED = ("", "dense", "None")

_PATTERN = "re:"
"""How a name that is a regular expression begins."""

_PARTS = frozenset().union(*(layout.part_names for layout in LAYOUTS), _CACHE_PARTS)


def read(
    stated: Mapping[str, Any], beside: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Format:
    """Return the format that a ``quantization_config`` declares for the modules of ``tensors``."""
    groups = _groups(stated)
    ignored = _texts(stated.get("ignore"))
    targets = {target: _scheme(group) for target, group in _targets(groups)}
    patterns = [text.removeprefix(_PATTERN) for text in (*ignored, *targets) if _is_pattern(text)]
    found, problem = match_patterns(patterns, tensors, _PARTS)
    named = {f"{_PATTERN}{pattern}": modules for pattern, modules in found.items()}
    weights = {target: group.get("weights") for target, group in _targets(groups)}
    problems = [
        *([problem] if problem else []),
        *_misnamed(stated, groups),
        *_cache_without_scales(stated, tensors),
        *_otherwise_scaled(_declaration(ignored, weights, named), tensors),
    ]
    unknown = _unknown_ways(stated, groups)
    name = "compressed-tensors " + ", ".join(unknown or _ways(stated, groups))
    return Format(
        name=name,
        layouts=LAYOUTS,
        declared=_declaration(ignored, targets, named),
        problems=tuple(problems),
        known=not unknown,
        kv_cache=_kv_cache(stated),
        extra_parts=_CACHE_PARTS,
        transformed=_is_transformed(stated),
    )


def precisions(stated: Mapping[str, Any]) -> set[str]:
    """Return the precisions that a ``quantization_config`` gives to weights."""
    return {_scheme(group).precision for group in _groups(stated)} - {UNQUANTIZED}


def _targets(groups: list[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each target with its group; of several groups the first comes last, and counts."""
    for group in reversed(groups):
        for target in _texts(group["targets"]):
            yield target, group


def _misnamed(stated: Mapping[str, Any], groups: list[Mapping[str, Any]]) -> Iterator[str]:
    """Say where weights are called stored in a way that cannot hold their precision.

    The whole is named as its groups are, or as a mixture.
    """
    ways, whole = _ways(stated, groups), str(stated.get("format"))
    if whole not in (*ways, _MIXED, "None"):
        shown = ", ".join(ways)
        yield f"config.json quantization_config: format {whole!r}, and of its groups {shown}"
    for group in groups:
        way = str(group.get("format") or stated.get("format"))
        precision = _scheme(group).precision
        if precision != UNQUANTIZED and not precision.startswith(_PRECISION_OF_WAY.get(way, "")):
            yield f"config.json quantization_config: format {way!r} for weights in {precision}"


def _cache_without_scales(
    stated: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    """Say that scales of the key-value cache are declared stored, and none is."""
    scheme = stated.get("kv_cache_scheme")
    is_static = isinstance(scheme, Mapping) and scheme.get("dynamic") in (False, None)
    if is_static and not any(name.endswith(_CACHE_SCALES) for name in tensors):
        yield (
            "config.json quantization_config declares a kv_cache_scheme that is not dynamic, "
            "and there is no k_scale or v_scale"
        )


def _otherwise_scaled(weights_of: Callable[[str], Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Say where scales or zero points are not there as declared, with the first such module."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, scale in tensors.items():
        module, _, part = name.rpartition(".")
        weights = weights_of(module) if part == "weight_scale" else None
        if not isinstance(weights, Mapping):
            continue
        weight = tensors.get(f"{module}.weight") or tensors.get(f"{module}.weight_packed")
        strategy, block = weights.get("strategy"), weights.get("block_structure")
        if weight and not _fits(strategy, block, scale, weight):
            blocks = f" with blocks of {block}" if strategy == "block" else ""
            found[f"strategy {strategy!r}{blocks}"].append(f"{name} {list(scale.shape)}")
        symmetric, zero_point = weights.get("symmetric"), f"{module}.weight_zero_point"
        if symmetric is True and zero_point in tensors:
            found["symmetric weights, and there are zero points"].append(zero_point)
        if symmetric is False and zero_point not in tensors:
            found["weights that are not symmetric, and there is no"].append(zero_point)
    return [
        f"config.json quantization_config declares {what}: {names[0]}"
        + (f" and {len(names) - 1} more" if names[1:] else "")
        for what, names in found.items()
    ]


def _fits(strategy: object, block: object, scale: Tensor, weight: Tensor) -> bool:
    """Tell whether there are scales as a strategy has them; groups are told by their size."""
    if len(weight.shape) != 2:
        return True
    rows, columns = weight.shape
    count = math.prod(scale.shape)
    match strategy, block:
        case "tensor", _:
            return count == 1
        case "channel", _:
            return count == rows
        case "block", [int(height), int(width)] if min(height, width) > 0:
            return scale.shape == (math.ceil(rows / height), math.ceil(columns / width))
    return True


def _declaration(
    ignored: list[str],
    targets: Mapping[str, Any],
    named: Mapping[str, Collection[str]],
) -> Callable[[str], Any]:
    """Return what a module is declared to be: names go before patterns, patterns before classes."""
    left_alone = set(ignored).union(*(named.get(text, ()) for text in ignored))
    schemes = {
        module: targets[pattern]
        for pattern in sorted(filter(_is_pattern, targets), reverse=True)
        for module in named.get(pattern, ())
    } | dict(targets)
    every = UNDECLARED if LINEAR_CLASS in left_alone else targets.get(LINEAR_CLASS, UNDECLARED)

    def declared(module: str) -> Scheme:
        return UNDECLARED if module in left_alone else schemes.get(module, every)

    return declared


def _groups(stated: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = stated.get("config_groups")
    entries = groups.values() if isinstance(groups, Mapping) else ()
    return [{"targets": None, **group} for group in entries if isinstance(group, Mapping)]


def _ways(stated: Mapping[str, Any], groups: list[Mapping[str, Any]]) -> list[str]:
    """Return how weights are stored, each way once."""
    found = [group["format"] for group in groups if isinstance(group.get("format"), str)]
    return sorted(set(found) or {str(stated.get("format"))})


def _unknown_ways(stated: Mapping[str, Any], groups: list[Mapping[str, Any]]) -> list[str]:
    """Return ways to store weights that no layout describes, as of sparse weights."""
    sparsity = stated.get("sparsity_config")
    sparse = str(sparsity.get("format") or "") if isinstance(sparsity, Mapping) else ""
    unknown = [way for way in _ways(stated, groups) if "-" in way and way not in FORMATS]
    return [*unknown, *([sparse] if sparse not in _UNCOMPRESSED else [])]


def _is_transformed(stated: Mapping[str, Any]) -> bool:
    transforms = stated.get("transform_config")
    return isinstance(transforms, Mapping) and bool(transforms.get("config_groups"))


def _kv_cache(stated: Mapping[str, Any]) -> str | None:
    scheme = stated.get("kv_cache_scheme")
    return _precision(scheme) if isinstance(scheme, Mapping) else None


def _scheme(group: Mapping[str, Any]) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations")
    precision = _precision(weights)
    if precision == UNQUANTIZED or not isinstance(weights, Mapping):
        return UNDECLARED
    size = weights.get("group_size")
    dynamic = inputs.get("dynamic") if isinstance(inputs, Mapping) else True
    return Scheme(
        precision=precision,
        group_size=size if type(size) is int and size > 0 else None,
        activations=_precision(inputs) if isinstance(inputs, Mapping) else None,
        # NVFP4 inputs are scaled as they come, and by one scale for all that is stored: "local".
        static=dynamic in (False, None, "local"),
    )


def _precision(numbers: Any) -> str:
    """Name the precision of weights or inputs; one without a name of its own keeps its numbers."""
    if not isinstance(numbers, Mapping):
        return UNQUANTIZED
    bits, kind, group = (numbers.get(key) for key in ("num_bits", "type", "group_size"))
    if kind != "float":
        return f"INT{bits}"
    power_of_two = group == 32 and (bits == 4 or numbers.get("scale_dtype") == "torch.uint8")
    if power_of_two:
        return f"MXFP{bits}"
    if bits == 4:
        return "NVFP4" if group == 16 else f"FP4 in groups of {group}"
    return f"FP{bits}"


def _texts(value: Any) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _is_pattern(text: str) -> bool:
    return text.startswith(_PATTERN)
