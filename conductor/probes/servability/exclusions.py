"""How loaders decide which modules are quantized, each in its own reading of the same patterns.

An exporter writes a list; every loader matches it in another way, against the names of the modules
that it makes itself: q, k and v are one module there, and so are all experts of a layer. A module
that is packed on disk and excluded here, or the other way round, does not load. The functions
follow vLLM 0.32.0 line by line, oddities included; a test asks that version itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from conductor.probes.formats.patterns import match_patterns

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Modules that vLLM makes out of several, by the last part of the name."""

_CLASSES = {
    "qkv_proj": "QKVParallelLinear",
    "gate_up_proj": "MergedColumnParallelLinear",
    "o_proj": "RowParallelLinear",
    "down_proj": "RowParallelLinear",
    "lm_head": "ParallelLMHead",
}
_EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Matches = Callable[[str, str], bool]
"""Whether a pattern without its ``re:`` matches from the start of a name."""


class Role(StrEnum):
    """What a loader makes of a module."""

    LINEAR = "linear"
    EXPERTS = "experts"
    HEAD = "head"


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One module as a loader makes it.

    ``name`` is the loader's, ``shards`` the names of the modules fused into it (none for one that
    stands for itself); for experts the projections of the first expert.
    """

    name: str
    role: Role = Role.LINEAR
    shards: tuple[str, ...] = ()

    @property
    def class_name(self) -> str:
        """Return the name of the class that vLLM makes it of, for targets that name classes."""
        if self.role is Role.EXPERTS:
            return "RoutedExperts"
        return _CLASSES.get(self.name.rpartition(".")[2], "ColumnParallelLinear")


def unit_of(module: str, *, fuses: bool) -> Unit:
    """Return the unit that a module of a checkpoint ends up in.

    Args:
        module: its name in the checkpoint.
        fuses: whether the engine makes one module of q, k and v, and of all experts of a layer.
    """
    if not fuses:
        return Unit(name=module, role=Role.HEAD if module == "lm_head" else Role.LINEAR)
    parent, found, rest = module.partition(".experts.")
    if found:
        number, _, projection = rest.partition(".")
        names = _EXPERT_NAMES.get(projection if number.isdigit() else "", _EXPERT_PROJECTIONS)
        shards = tuple(f"{parent}.experts.0.{name}" for name in names)
        return Unit(name=f"{parent}.experts", role=Role.EXPERTS, shards=shards)
    parent, _, projection = module.rpartition(".")
    fused = _FUSED_INTO.get(projection)
    if fused:
        shards = tuple(f"{parent}.{name}" for name in FUSED[fused])
        return Unit(name=f"{parent}.{fused}", shards=shards)
    return Unit(name=module, role=Role.HEAD if projection == "lm_head" else Role.LINEAR)


_FUSED_INTO = {shard: fused for fused, shards in FUSED.items() for shard in shards}
_EXPERT_NAMES = dict.fromkeys(("w1", "w2", "w3"), ("w1", "w3", "w2"))


class SplitError(Exception):
    """A pattern names some of the modules that the loader makes one of, and not the others."""

    def __init__(self, pattern: str) -> None:
        """Keep the pattern."""
        super().__init__(pattern)
        self.pattern = pattern


def excluded_by_modelopt(unit: Unit, patterns: Sequence[str]) -> str | None:
    """Return the pattern by which vLLM's ModelOpt loader leaves a unit unquantized.

    Raises:
        SplitError: it names a part of a fused unit.
    """
    found = excluded_exactly(unit, patterns)
    if found is not None:
        return found
    part = next((pattern for pattern in patterns if pattern in unit.name), None)
    if part is not None:
        return part
    return next((pattern for pattern in patterns if fnmatchcase(unit.name, pattern)), None)


def excluded_exactly(unit: Unit, patterns: Sequence[str]) -> str | None:
    """Return the pattern by which vLLM's FP8 loader leaves a unit unquantized: a name in full."""
    if unit.role is Role.EXPERTS:
        return next((p for p in patterns if "experts" in p and unit.name in p), None)
    return _skipped(unit, patterns, lambda pattern, name: pattern == name)


def excluded_by_part(unit: Unit, patterns: Sequence[str]) -> str | None:
    """Return the pattern by which vLLM's AWQ loader leaves a unit unquantized: part of a name."""
    if unit.role is Role.EXPERTS:
        return next((pattern for pattern in patterns if pattern in unit.name), None)
    return _skipped(unit, patterns, lambda pattern, name: pattern in name)


def _skipped(unit: Unit, patterns: Sequence[str], matches: Matches) -> str | None:
    whole = next((pattern for pattern in patterns if matches(pattern, unit.name)), None)
    if whole is not None or not unit.shards:
        return whole
    return _unanimous(
        [next((p for p in patterns if matches(p, shard)), None) for shard in unit.shards]
    )


def _unanimous(found: Sequence[str | None]) -> str | None:
    named = [pattern for pattern in found if pattern is not None]
    if named and len(named) < len(found):
        raise SplitError(named[0])
    return named[0] if named else None


def excluded_by_rules(unit: Unit, rules: Iterable[str], matches: Matches) -> str | None:
    """Return the rule of GPTQ's ``dynamic`` by which a unit is left unquantized.

    The first rule that matches decides; only ``-:`` excludes.
    """
    for rule in rules:
        if matches(rule.removeprefix("-:").removeprefix("+:"), unit.name):
            return rule if rule.startswith("-:") else None
    return None


def ignored_by_compressed_tensors(
    unit: Unit, patterns: Sequence[str], matches: Matches
) -> str | None:
    """Return the pattern by which a compressed-tensors ``ignore`` list names a unit.

    Raises:
        SplitError: it names a part of a fused unit.
    """

    def named(name: str) -> str | None:
        return next((p for p in patterns if _equal_or_matching(p, name, matches)), None)

    if unit.role is Role.EXPERTS:
        return _unanimous([named(shard) for shard in unit.shards])
    whole = named(unit.name)
    if whole is not None or not unit.shards:
        return whole
    return _unanimous([named(shard) for shard in unit.shards])


def targeted_by_compressed_tensors(
    unit: Unit, targets: Sequence[str], matches: Matches, *, class_name: str | None = None
) -> str | None:
    """Return the target that a unit belongs to: by name, by the names fused in it, or by class."""

    def named(name: str) -> str | None:
        return next((t for t in targets if _equal_or_matching(t, name, matches)), None)

    names = unit.shards if unit.role is Role.EXPERTS else (unit.name,)
    found = next(filter(None, map(named, names)), None)
    if found is None and unit.shards:
        shards = [named(shard) for shard in unit.shards]
        found = shards[0] if all(shards) else None
    if found is not None:
        return found
    if unit.role is Role.EXPERTS and "Linear" in targets:
        return "Linear"
    lowered = (class_name or unit.class_name).lower()
    return next((t for t in targets if not _is_expression(t) and t.lower() in lowered), None)


def _equal_or_matching(pattern: str, name: str, matches: Matches) -> bool:
    return matches(pattern[3:], name) if _is_expression(pattern) else pattern == name


def _is_expression(pattern: str) -> bool:
    return pattern.startswith("re:")


class ExpressionError(Exception):
    """A regular expression of a configuration that cannot be used."""


def match_expressions(expressions: Iterable[str], names: Iterable[str]) -> Matches:
    """Return which of the expressions match which of the names, from the start.

    Raises:
        ExpressionError: one is no regular expression, or takes too long.
    """
    asked = sorted(set(expressions))
    for expression in asked:
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError):
            raise ExpressionError(f"{expression[:80]!r} is no regular expression") from None
    named, problem = match_patterns(asked, names)
    if problem:
        raise ExpressionError(problem)
    return lambda expression, name: name in named[expression]
