"""GPTQ exports: integers packed along the columns of a linear, with a zero point for every group.

A linear [rows, columns] lies turned: ``qweight`` [columns · bits / 32, rows], ``scales`` and
``qzeros`` [groups, rows (· bits / 32)]. Numbers follow each other without gaps in 32-bit words, the
lowest bits first. ``g_idx`` names the group of every column, where they were quantized in another
order than they lie. The first version of the format stores zero points less one.

What no list says is quantized, loaders take from the tensors: a module with a ``qweight`` is.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from conductor.probes.formats.layout import (
    FLOAT_DTYPES,
    UNDECLARED,
    Fetch,
    Format,
    Layout,
    Parts,
    Scheme,
)
from conductor.probes.formats.patterns import match_patterns
from conductor.probes.safetensors_header import Tensor

if TYPE_CHECKING:
    from conductor.probes.formats.layout import Values
    from conductor.probes.formats.numerics import Stored

METHOD = "gptq"
FILE = "quantize_config.json"
BITS = (2, 3, 4, 8)

_VERSIONS: Mapping[str, int] = {"gptq": 1, "gptq_v2": 0}
"""What is to be added to the zero points of each ``checkpoint_format``."""

_WHOLE_ROW = -1
"""Group size that stands for one group per row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedIntegers(Layout):
    """Unsigned integers of ``bits`` bits, less a zero point, times a scale per group of columns.

    ``symmetric`` zero points are all in the middle. ``group`` is the declared columns per group.
    """

    bits: int
    symmetric: bool = False
    group: int | None = None
    precision: str = field(init=False)
    part_names = frozenset({"qweight", "qzeros", "scales", "g_idx", "bias"})

    def __post_init__(self) -> None:
        """Name the precision after the bits."""
        object.__setattr__(self, "precision", f"INT{self.bits}")

    @property
    def packed(self) -> int:
        """Fewest numbers that fill whole words."""
        return 32 // math.gcd(32, self.bits)

    def words(self, numbers: int) -> int:
        """Return how many words hold so many numbers."""
        return math.ceil(numbers * self.bits / 32)

    def shape(self, parts: Parts) -> tuple[int, int] | None:
        """Return the shape of the linear; padding of the last words cannot be told apart."""
        weight, zeros, scales = (parts.get(name) for name in ("qweight", "qzeros", "scales"))
        if weight is None or weight.dtype != "I32" or len(weight.shape) != 2:
            return None
        shape = self.turned(weight.shape)
        groups = scales or zeros
        count = groups.shape[0] if groups and groups.shape else 0
        if scales and (scales.dtype not in FLOAT_DTYPES or scales.shape != (count, shape[0])):
            return None
        if zeros and (zeros.dtype, zeros.shape) != ("I32", (count, self.words(shape[0]))):
            return None
        return shape

    @abstractmethod
    def turned(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape of the linear from that of ``qweight``."""

    @abstractmethod
    def numbers(self, fetch: Fetch, rows: slice, columns: slice) -> Stored:
        """Return the integers of a block [rows, columns]."""

    @abstractmethod
    def zero_points(self, fetch: Fetch, rows: slice) -> Stored:
        """Return the zero points [groups, rows]."""

    def group_size(self, parts: Parts, shape: tuple[int, int]) -> int | None:
        """Return the columns per scale; of a single group what is declared."""
        groups = _groups(parts)
        if groups > 1:
            return columns_per_group(shape[1], groups)
        return self.group if self.group and self.group >= shape[1] else None

    def missing(self, parts: Parts, scheme: Scheme) -> tuple[str, ...]:
        """Return which of scales and zero points are absent."""
        return tuple(name for name in ("scales", "qzeros") if name not in parts)

    def scales(self, parts: Parts) -> tuple[str, ...]:
        """Return the scales, if they are there."""
        return ("scales",) if "scales" in parts else ()

    def read(self, parts: Parts, fetch: Fetch, rows: slice, columns: slice) -> Values:
        """Return a block of the dequantized matrix.

        Raises:
            ValueError: a column belongs to a group that has no scale, or a group has not as many
                columns as it has in order.
        """
        import numpy as np

        shape = self.turned(parts["qweight"].shape)
        rows, columns = (
            slice(*part.indices(size)[:2])
            for part, size in zip((rows, columns), shape, strict=True)
        )
        group = self._group_of(parts, fetch, shape[1])[columns]
        scales = fetch("scales", slice(None), rows)
        # All row by row: arrays that lie in different directions are combined slowly.
        values = self.numbers(fetch, rows, columns).astype(np.float32, order="C")
        values -= np.ascontiguousarray(self.zero_points(fetch, rows).T).take(group, axis=1)
        values *= np.ascontiguousarray(scales.T).take(group, axis=1)
        return values

    def _group_of(self, parts: Parts, fetch: Fetch, columns: int) -> Stored:
        import numpy as np

        groups = _groups(parts)
        in_order = np.arange(columns) // columns_per_group(columns, groups)
        if "g_idx" not in parts:
            return in_order
        found = fetch("g_idx")
        if found.size and not 0 <= found.min() <= found.max() < groups:
            raise ValueError(f"g_idx names a group beyond the {groups} that have scales")
        sizes = [np.bincount(each, minlength=groups) for each in (found, in_order)]
        if (sizes[0] != sizes[1]).any():
            group = int(np.flatnonzero(sizes[0] != sizes[1])[0])
            counts = f"{sizes[0][group]} columns, not {sizes[1][group]}"
            raise ValueError(f"g_idx gives group {group} {counts}")
        return found

    def nearest(self, values: Values, parts: Parts, largest: float | None) -> Values:
        """Return a block rounded to nearest: groups from its first column on."""
        import numpy as np

        columns = self.turned(parts["qweight"].shape)[1]
        width = columns_per_group(columns, _groups(parts))
        top = np.float32(2**self.bits - 1)
        rounded = np.empty_like(values)
        for first in range(0, values.shape[1], width):
            group = values[:, first : first + width]
            low = np.minimum(group.min(axis=1, keepdims=True), 0)
            high = np.maximum(group.max(axis=1, keepdims=True), 0)
            if self.symmetric:
                high = np.maximum(-low, high)
                low = -high
            scale = (high - low) / top
            scale[scale == 0] = 1
            zero = np.ceil(top / 2) if self.symmetric else np.rint(-low / scale)
            numbers = np.clip(np.rint(group / scale) + zero, 0, top)
            rounded[:, first : first + width] = (numbers - zero) * scale
        return rounded


def _groups(parts: Parts) -> int:
    scales = parts.get("scales") or parts.get("qzeros")
    return max(1, scales.shape[0]) if scales else 1


def columns_per_group(columns: int, groups: int) -> int:
    """Return the size of so many groups: a power of two where one fits, as all tools use."""
    power = 1 << max(0, math.ceil(math.log2(max(1, columns / groups))))
    return power if groups > 1 and math.ceil(columns / power) == groups else -(-columns // groups)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gptq(GroupedIntegers):
    """The layout of GPTQ.

    ``added`` is what zero points are stored less; ``reordered`` needs ``g_idx``.
    """

    added: int = 1
    reordered: bool = False
    step: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        """Read whole words: along the columns of weights, along the rows of zero points."""
        super().__post_init__()
        object.__setattr__(self, "step", (self.packed, self.packed))

    def shape(self, parts: Parts) -> tuple[int, int] | None:
        """Return the shape of the linear."""
        shape, order = super().shape(parts), parts.get("g_idx")
        if shape is None or (order and order.shape != (shape[1],)):
            return None
        return shape

    def missing(self, parts: Parts, scheme: Scheme) -> tuple[str, ...]:
        """Return the scales, zero points and order of columns that are absent."""
        order = ("g_idx",) if self.reordered and "g_idx" not in parts else ()
        return (*super().missing(parts, scheme), *order)

    def turned(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape of the linear from that of ``qweight``."""
        return stored[1], stored[0] * 32 // self.bits

    def numbers(self, fetch: Fetch, rows: slice, columns: slice) -> Stored:
        """Return the integers of a block [rows, columns]."""
        from conductor.probes.formats.numerics import unpack_words

        words = slice(self.words(columns.start), self.words(columns.stop))
        unpacked = unpack_words(fetch("qweight", words, rows).T, self.bits)
        return unpacked[:, : columns.stop - columns.start]

    def zero_points(self, fetch: Fetch, rows: slice) -> Stored:
        """Return the zero points [groups, rows]."""
        from conductor.probes.formats.numerics import unpack_words

        words = slice(self.words(rows.start), self.words(rows.stop))
        stored = unpack_words(fetch("qzeros", slice(None), words), self.bits)
        zeros: Stored = (stored[:, : rows.stop - rows.start] + self.added) & (2**self.bits - 1)
        return zeros


LAYOUTS = tuple(Gptq(bits=bits) for bits in BITS)
"""The layouts of a checkpoint that does not declare itself."""


def read(
    stated: Mapping[str, Any], beside: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Format:
    """Return the format that ``quantization_config`` and ``quantize_config.json`` declare."""
    facts = {**beside, **stated}
    version = str(facts.get("checkpoint_format") or facts.get("format") or METHOD)
    bits = facts.get("bits")
    method = facts.get("quant_method", METHOD)
    seen = f"{version}, {bits} bits"
    packed = facts.get("is_marlin_format") or facts.get("pack_dtype", "int32") != "int32"
    is_read = method == METHOD and version in _VERSIONS and type(bits) is int and bits in BITS
    if packed or not is_read:
        kernel = ", packed for one kernel" if packed else ""
        return unknown(f"{method} {seen}{kernel}")
    named = _Named(facts, tensors)
    overrides, problem = _overrides(facts.get("dynamic"), tensors)

    def declared(module: str) -> Scheme:
        override = overrides(module) if module in named else None
        return UNDECLARED if override is None else _scheme({**facts, **override})

    layouts = tuple(
        Gptq(
            bits=each,
            symmetric=facts.get("sym") is True,
            group=_scheme(facts).group_size,
            added=_VERSIONS[version],
            reordered=facts.get("desc_act") is True,
        )
        for each in BITS
    )
    return Format(
        name=f"GPTQ ({seen})",
        layouts=layouts,
        declared=declared,
        problems=(*differences(stated, beside, FILE), *((problem,) if problem else ())),
    )


def unknown(what: str) -> Format:
    """Return the format of a checkpoint whose packing is not one read here."""
    return Format(
        name=f"unknown ({what})", layouts=LAYOUTS, declared=lambda _: UNDECLARED, known=False
    )


def differences(stated: Mapping[str, Any], beside: Mapping[str, Any], file: str) -> tuple[str, ...]:
    """Say where the file beside ``config.json`` has other values for the same keys."""
    shared = ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "lm_head", "zero_point")
    return tuple(
        f"{file} and config.json declare different {key}: {beside[key]!r} and {stated[key]!r}"
        for key in shared
        if key in stated and key in beside and stated[key] != beside[key]
    )


def _scheme(facts: Mapping[str, Any]) -> Scheme:
    group = facts.get("group_size")
    size = group if type(group) is int and group != _WHOLE_ROW else None
    return Scheme(precision=f"INT{facts.get('bits')}", group_size=size)


class _Named:
    """The modules that are quantized: by the list of them, and without one by their tensors."""

    def __init__(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._names = _flat(facts.get("modules_in_block_to_quantize"))
        self._head = facts.get("lm_head") is True
        self._tensors = tensors

    def __contains__(self, module: str) -> bool:
        if module.rpartition(".")[2] == "lm_head":
            return self._head
        if not self._names:
            return f"{module}.qweight" in self._tensors
        return any(name in module for name in self._names)


def _flat(value: Any) -> list[str]:
    """Return the names of a list of names, or of lists of names."""
    lists = value if isinstance(value, list) else []
    each = (name for entry in lists for name in (entry if isinstance(entry, list) else [entry]))
    return [name for name in each if isinstance(name, str)]


def _overrides(
    dynamic: Any, tensors: Mapping[str, Tensor]
) -> tuple[Callable[[str], Mapping[str, Any] | None], str]:
    """Return what ``dynamic`` changes for a module, ``None`` for one it excludes; and a problem.

    Its keys are regular expressions matched from the start of a name, the first that matches
    counts; ``-:`` before one excludes.
    """
    rules = dynamic if isinstance(dynamic, Mapping) else {}
    patterns = [str(rule) for rule in rules]
    bare = {rule: rule.removeprefix("-:").removeprefix("+:") for rule in patterns}
    named, problem = match_patterns(list(bare.values()), tensors)

    def override(module: str) -> Mapping[str, Any] | None:
        for rule in patterns:
            if module in named.get(bare[rule], ()):
                changes = rules[rule]
                excludes = rule.startswith("-:") or changes is False
                kept = changes if isinstance(changes, Mapping) else {}
                return None if excludes else kept
        return {}

    return override, problem
