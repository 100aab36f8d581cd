"""What a quantized linear looks like on disk, and what a format's configuration declares.

A checkpoint format is a table of layouts (how tensors lie) and a reading of its configuration
(what each module is said to be). The two are kept apart because exporters get them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from conductor.probes.safetensors_header import Tensor

UNQUANTIZED = "unquantized"
FLOAT_DTYPES = ("BF16", "F16", "F32")

Parts = Mapping[str, Tensor]
"""The tensors of one module by the last part of their name: ``weight``, ``weight_scale``, ..."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a linear of shape [rows, columns] is stored in one precision.

    One stored element of ``weight`` holds ``pack`` (rows, columns) of the linear's elements. With
    a ``group`` the scales are [rows, columns / group]; without, their shape is free (one for the
    tensor, a row, a group or a block). ``needs`` are further tensors it cannot be read without.
    """

    precision: str
    dtype: str
    weight: str = "weight"
    pack: tuple[int, int] = (1, 1)
    scale_dtypes: tuple[str, ...] = FLOAT_DTYPES
    group: int | None = None
    needs: tuple[str, ...] = ()

    def holds(self, parts: Parts, shape: tuple[int, int]) -> bool:
        """Tell whether these tensors are a linear of ``shape`` in this layout."""
        weight, scale = parts.get(self.weight), parts.get("weight_scale")
        if weight is None or scale is None:
            return False
        rows, columns = shape
        stored = (math.ceil(rows / self.pack[0]), math.ceil(columns / self.pack[1]))
        scales = (rows, math.ceil(columns / self.group)) if self.group else scale.shape
        return (
            (weight.dtype, weight.shape) == (self.dtype, stored)
            and scale.dtype in self.scale_dtypes
            and scale.shape == scales
            and all(name in parts for name in self.needs)
        )


@dataclass(frozen=True, kw_only=True)
class Format:
    """One checkpoint format as a checkpoint uses it.

    ``declared`` maps a module's name to the precision that the configuration gives its weight,
    or to ``UNQUANTIZED``. ``problems`` are contradictions within the configuration.
    """

    name: str
    layouts: tuple[Layout, ...]
    declared: Callable[[str], str]
    problems: tuple[str, ...] = ()


def measure(layouts: tuple[Layout, ...], parts: Parts, source: Tensor) -> str | None:
    """Return the precision that a linear of the source has in ``parts``.

    ``UNQUANTIZED`` when it is as wide as it was, ``None`` when the tensors are no layout known.
    """
    rows, columns = source.shape
    for layout in layouts:
        if layout.holds(parts, (rows, columns)):
            return layout.precision
    weight = parts.get("weight")
    if weight and weight.shape == source.shape and weight.dtype in (*FLOAT_DTYPES, source.dtype):
        return UNQUANTIZED
    return None


def describe(parts: Parts) -> str:
    """Return tensors as text: ``weight U8 [256, 128], weight_scale ...``."""
    return ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in sorted(parts.items()))
