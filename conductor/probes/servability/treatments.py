"""What a loader takes each module of a checkpoint for, going by the configuration alone.

Quantized, then by which scheme; or unquantized, then by which pattern. What the module really is on
disk is another question. Everything read here was written by others: it may be of any type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from conductor.probes.reading import read_object
from conductor.probes.servability import exclusions, loaders
from conductor.probes.servability.exclusions import Role, SplitError, Unit

MODELOPT_FILE = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"


class Taken(NamedTuple):
    """The scheme that a loader takes a unit for, or None and the pattern that excludes it."""

    scheme: str | None
    pattern: str | None = None


Treatment = Callable[[Unit, bool], Taken]
"""What a loader takes a unit for, given whether it is quantized on disk: some look.

It raises SplitError where a unit cannot be one thing.
"""


@dataclass(frozen=True, kw_only=True)
class Stated:
    """The quantization configuration of a checkpoint; empty where it has none."""

    fields: Mapping[str, Any]
    model_type: str

    @classmethod
    def of(cls, checkpoint: Path, config: Mapping[str, Any]) -> Stated:
        """Return what config.json says, also of a nested text part, or ModelOpt's own file.

        Raises:
            ProbeError: there is a file of ModelOpt's that cannot be read.
        """
        return cls(
            fields=_flat(_stated(checkpoint, config)), model_type=str(config.get("model_type"))
        )

    @property
    def method(self) -> str:
        """Quantization method in small letters, empty where there is none."""
        return str(self.fields.get("quant_method", "")).lower()

    @property
    def algorithm(self) -> str:
        """The algorithm of ModelOpt's."""
        return str(self.fields.get("quant_algo")).upper()

    @property
    def table_method(self) -> str:
        """The method as the table of loaders calls it."""
        mixed = self.method == "modelopt" and self.algorithm == MIXED
        return loaders.MIXED_METHOD if mixed else self.method

    @property
    def label(self) -> str:
        """Method and format in the checkpoint's own words."""
        layout = self.fields.get("format")
        return f"{self.table_method} {layout}" if isinstance(layout, str) else self.table_method

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of a block of scales."""
        weights = [group.get("weights") for group in _groups(self.fields)]
        found = [each.get("block_structure") for each in weights if is_map(each)]
        for block in (self.fields.get("weight_block_size"), *found):
            match block:
                case [int(rows), int(columns)] if rows > 0 and columns > 0:
                    return rows, columns
        return None


def treatment(stated: Stated, units: Sequence[Unit], *, fuses: bool) -> Treatment:
    """Return what a loader takes units for.

    Args:
        stated: the checkpoint's configuration.
        units: everything it will be asked about.
        fuses: whether the loader is one that fuses modules (vLLM's), or transformers'.

    Raises:
        ExpressionError: a regular expression in it cannot be used.
    """
    fields = stated.fields
    match stated.method:
        case "compressed-tensors":
            return _compressed_tensors(fields, units, fuses=fuses)
        case "modelopt":
            known = stated.algorithm in (*loaders.MODELOPT_ALGORITHMS, MIXED)
            return _modelopt(stated) if fuses and known else _as_stored(stated.algorithm)
        case "fp8":
            scheme = "block" if stated.block else str(fields.get("activation_scheme"))
            return _fp8(fields, scheme) if fuses else _as_stored(scheme)
        case "awq":
            return _awq(fields, fuses=fuses)
        case "gptq":
            return _gptq(fields, units)
        case "mxfp4" if stated.model_type == "gpt_oss":
            return _as_stored("gpt_oss")
        case _:
            return _as_stored(loaders.ANY)


def _as_stored(scheme: str) -> Treatment:
    """Return the treatment of a loader that goes by the tensors, or that is not known."""
    return lambda _, quantized: Taken(scheme if quantized else None)


def _modelopt(stated: Stated) -> Treatment:
    fields = stated.fields
    excluded = texts(fields.get("ignore", fields.get("exclude_modules")))
    layers = fields.get("quantized_layers")

    def treat(unit: Unit, _: bool) -> Taken:
        pattern = exclusions.excluded_by_modelopt(unit, excluded)
        if pattern is not None:
            return Taken(None, pattern)
        if stated.algorithm == MIXED:
            return Taken(_mixed_algorithm(unit, layers if is_map(layers) else {}))
        return Taken(stated.algorithm)

    return treat


def _mixed_algorithm(unit: Unit, layers: Mapping[str, Any]) -> str | None:
    """Return the algorithm that ``quantized_layers`` gives to a unit."""
    found = {name: layers[name] for name in (unit.name, *unit.shards) if name in layers}
    if not found and unit.role is Role.EXPERTS:
        parts = (name for name in layers if name.startswith(f"{unit.name}."))
        found = {name: layers[name] for name in list(parts)[:1]}
    algorithms = [str(each.get("quant_algo")).upper() for each in found.values() if is_map(each)]
    if len(set(algorithms)) > 1:
        raise SplitError(next(iter(found)))
    return algorithms[0] if algorithms else None


def _compressed_tensors(
    fields: Mapping[str, Any], units: Sequence[Unit], *, fuses: bool
) -> Treatment:
    ignore = texts(fields.get("ignore"))
    schemes = _schemes_by_target(fields)
    targets = list(schemes)
    names = [name for unit in units for name in (unit.name, *unit.shards)]
    expressions = [text[3:] for text in (*ignore, *targets) if text.startswith("re:")]
    matches = exclusions.match_expressions(expressions, names)
    # transformers keeps the modules' own class, and an exclusion may name that as well.
    class_name = None if fuses else "Linear"

    def treat(unit: Unit, _: bool) -> Taken:
        if class_name in ignore:
            return Taken(None, class_name)
        pattern = exclusions.ignored_by_compressed_tensors(unit, ignore, matches)
        if pattern is not None:
            return Taken(None, pattern)
        target = exclusions.targeted_by_compressed_tensors(
            unit, targets, matches, class_name=class_name
        )
        return Taken(None if target is None else schemes[target])

    return treat


def _schemes_by_target(fields: Mapping[str, Any]) -> dict[str, str]:
    schemes: dict[str, str] = {}
    for group in _groups(fields):
        scheme = describe_scheme(
            group.get("weights"),
            group.get("input_activations"),
            group.get("format") or fields.get("format"),
        )
        schemes |= dict.fromkeys(texts(group.get("targets")), scheme)
    return schemes


def describe_scheme(weights: Any, inputs: Any, layout: Any) -> str:
    """Name a scheme of compressed-tensors as the table of loaders does."""
    if not is_map(weights):
        return "no weights"
    bits, kind, strategy, group, order = (
        weights.get(key) for key in ("num_bits", "type", "strategy", "group_size", "actorder")
    )
    inputs = inputs if is_map(inputs) else None
    only = "" if inputs else " weight-only"
    match kind, bits, strategy, group:
        case _ if order in ("group", "dynamic"):
            return f"INT{bits} with activation ordering by {order}"
        case "float", 4, "tensor_group", 16:
            return f"NVFP4{only}"
        case "float", 4, "group", 32:
            return "MXFP4" if not inputs or inputs.get("num_bits") == 4 else "MXFP4 with FP8 inputs"
        case "float", 8, "group", 32:
            return "MXFP8"
        case "float", 8, "block", _ if inputs:
            return "FP8 block"
        case "float", 8, "tensor" | "channel" | "block", _:
            return f"FP8 {_timing(inputs)}"
        case "int", _, "group" | "channel", _ if not inputs and layout == "pack-quantized":
            return f"INT{bits} weight-only{'' if weights.get('symmetric') else ' asymmetric'}"
        case "int", 8, "tensor" | "channel", _ if inputs and inputs.get("num_bits") == 8:
            return f"INT8 {_timing(inputs)}"
        case _:
            return f"{kind} {bits} by {strategy}{only}"


def _timing(inputs: Mapping[str, Any] | None) -> str:
    if inputs is None:
        return "weight-only"
    return "dynamic" if inputs.get("dynamic") else "static"


def _fp8(fields: Mapping[str, Any], scheme: str) -> Treatment:
    excluded = texts(fields.get("ignored_layers")) or texts(fields.get("modules_to_not_convert"))

    def treat(unit: Unit, _: bool) -> Taken:
        if unit.role is Role.HEAD:
            return Taken(None)
        pattern = exclusions.excluded_exactly(unit, excluded)
        return Taken(None, pattern) if pattern is not None else Taken(scheme)

    return treat


def _awq(fields: Mapping[str, Any], *, fuses: bool) -> Treatment:
    scheme = f"INT{fields.get('bits', fields.get('w_bit'))}"
    excluded = texts(fields.get("modules_to_not_convert"))
    if not fuses or not excluded:
        # Without a list, vLLM goes by the types of the tensors.
        return _as_stored(scheme)

    def treat(unit: Unit, _: bool) -> Taken:
        if unit.role is Role.HEAD and fields.get("lm_head") is not True:
            return Taken(None)
        pattern = exclusions.excluded_by_part(unit, excluded)
        return Taken(None, pattern) if pattern is not None else Taken(scheme)

    return treat


def _gptq(fields: Mapping[str, Any], units: Sequence[Unit]) -> Treatment:
    asymmetric = " asymmetric" if fields.get("sym") is False else ""
    ordered = fields.get("desc_act") is True and fields.get("group_size") != -1
    order = " with activation ordering" if ordered else ""
    scheme = f"INT{fields.get('bits')}{asymmetric}{order}"
    dynamic = fields.get("dynamic")
    rules = list(dynamic) if is_map(dynamic) else []
    expressions = [rule.removeprefix("-:").removeprefix("+:") for rule in rules]
    matches = exclusions.match_expressions(expressions, [unit.name for unit in units])

    def treat(unit: Unit, quantized: bool) -> Taken:
        if unit.role is Role.HEAD and fields.get("lm_head") is not True:
            return Taken(None)
        pattern = exclusions.excluded_by_rules(unit, rules, matches)
        if pattern is not None:
            return Taken(None, pattern)
        # Where no rule decides, vLLM goes by the types of the tensors.
        return Taken(scheme if quantized else None)

    return treat


def _stated(checkpoint: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    for part in (config, config.get("text_config")):
        stated = part.get("quantization_config") if is_map(part) else None
        if is_map(stated):
            missing = stated.get("quant_algo") == MIXED and "quantized_layers" not in stated
            return {**stated, **_modelopt_file(checkpoint)} if missing else stated
    return _modelopt_file(checkpoint)


def _modelopt_file(checkpoint: Path) -> Mapping[str, Any]:
    path = checkpoint / MODELOPT_FILE
    if not path.exists():
        return {}
    return {"quant_method": "modelopt", **_flat(read_object(path, "export the checkpoint again"))}


def _flat(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration in which ModelOpt's nested part stands beside the rest."""
    inner = stated.get("quantization")
    return {**stated, **inner} if is_map(inner) else stated


def _groups(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = fields.get("config_groups")
    return [group for group in groups.values() if is_map(group)] if is_map(groups) else []


def number(config: Mapping[str, Any], name: str) -> int | None:
    """Return a positive whole number of the text part of a configuration."""
    for part in (config.get("text_config"), config):
        value = part.get(name) if is_map(part) else None
        if type(value) is int and value > 0:
            return value
    return None


def texts(value: Any) -> list[str]:
    """Return the texts of a list; nothing where it is none."""
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def is_map(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Tell whether a value of a document is a mapping."""
    return isinstance(value, Mapping)
