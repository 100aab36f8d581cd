"""What a quantized linear looks like on disk, and what a format's configuration declares.

A checkpoint format is a table of layouts (how tensors lie) and a reading of its configuration
(what each module is said to be). The two are kept apart because exporters get them apart.

A layout is told from headers alone. It holds tensors whose companions are absent too, and names
what is missing, so that a dropped scale is reported as that and not as an unknown layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from conductor.probes.safetensors_header import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

UNQUANTIZED = "unquantized"
FLOAT_DTYPES = ("BF16", "F16", "F32")

Parts = Mapping[str, Tensor]
"""The tensors of one module by what follows the module in their name: ``weight``,
``weight_scale``, ``weight.absmax``, ..."""

ALL = slice(None)


class Fetch(Protocol):
    """Read stored elements of one part.

    A 2-D part gives the rows and columns asked for, counted in stored elements. Any other part
    comes whole, as it is shaped. BF16, F16, F32 and F64 arrive as float32; F8_* and U8 as uint8;
    other integers as they are.
    """

    def __call__(self, part: str, rows: slice = ALL, columns: slice = ALL) -> NDArray[Any]:
        """Return the elements."""
        ...


class Scheme(msgspec.Struct, frozen=True, kw_only=True):
    """What a configuration declares for one module.

    ``group_size`` counts columns per scale, where the configuration says or the precision fixes
    it. ``activations`` is the precision of the inputs, ``None`` where they are left in 16 bits;
    ``static`` tells that their scale is stored.
    """

    precision: str
    group_size: int | None = None
    activations: str | None = None
    static: bool = False


UNDECLARED = Scheme(precision=UNQUANTIZED)


class Layout(ABC):
    """One way to store a linear of shape [rows, columns].

    Layouts know nothing of fused experts: what they get is one matrix, turned to [rows, columns].
    A block that is read must start and end at multiples of ``step``, or at the matrix's end.
    ``part_names`` are all parts that this layout may have.
    """

    precision: str
    step: tuple[int, int] = (1, 1)
    part_names: frozenset[str] = frozenset()

    def holds(self, parts: Parts, shape: tuple[int, int]) -> bool:
        """Tell whether these tensors are a linear of ``shape`` in this layout."""
        return self.shape(parts) == shape

    @abstractmethod
    def shape(self, parts: Parts) -> tuple[int, int] | None:
        """Return the shape of the linear, or ``None`` where it is not stored in this layout."""

    def group_size(self, parts: Parts, shape: tuple[int, int]) -> int | None:
        """Return the columns per scale; ``None`` for a scale per tensor, row or 2-D block.

        A single group that is as long as a row is a scale per row.
        """
        return None

    def missing(self, parts: Parts, scheme: Scheme) -> tuple[str, ...]:
        """Return the parts that the declared scheme needs and that are absent."""
        return ()

    def scales(self, parts: Parts) -> tuple[str, ...]:
        """Return the parts that scale the weight."""
        return ()

    def input_scales(self, parts: Parts) -> tuple[str, ...]:
        """Return the parts that scale the inputs."""
        return ()

    @abstractmethod
    def read(self, parts: Parts, fetch: Fetch, rows: slice, columns: slice) -> Values:
        """Return a block of the dequantized matrix, as the source had it."""

    @abstractmethod
    def nearest(self, values: Values, parts: Parts, largest: float | None) -> Values:
        """Return a block of the source rounded to nearest in this layout.

        Scales follow from ``values``, as fine as in ``parts``. ``largest`` is the largest
        magnitude of the whole matrix, for scales per tensor; ``None``: that of ``values``.
        """


class _Plain(Layout):
    """A linear in floating point, as it was."""

    precision = UNQUANTIZED
    part_names = frozenset({"weight", "bias"})

    def shape(self, parts: Parts) -> tuple[int, int] | None:
        weight = parts.get("weight")
        if weight is None or weight.dtype not in FLOAT_DTYPES or len(weight.shape) != 2:
            return None
        return weight.shape[0], weight.shape[1]

    def read(self, parts: Parts, fetch: Fetch, rows: slice, columns: slice) -> Values:
        return fetch("weight", rows, columns)

    def nearest(self, values: Values, parts: Parts, largest: float | None) -> Values:
        return values


PLAIN: Layout = _Plain()


@dataclass(frozen=True, kw_only=True)
class Format:
    """One checkpoint format as a checkpoint uses it.

    ``declared`` maps a module's name to what the configuration gives it. ``problems`` are
    contradictions within the configuration. A format that is not ``known`` proves nothing.
    ``kv_cache`` is the declared precision of the key-value cache; ``extra_parts`` are the parts
    beside a linear's own that the format explains, such as cache scales. ``transformed`` weights
    are rotated, so that their values cannot be held against the source's.
    """

    name: str
    layouts: tuple[Layout, ...]
    declared: Callable[[str], Scheme]
    problems: tuple[str, ...] = ()
    known: bool = True
    kv_cache: str | None = None
    extra_parts: frozenset[str] = frozenset()
    transformed: bool = False

    def layout(
        self, parts: Parts, shape: tuple[int, int], scheme: Scheme = UNDECLARED
    ) -> Layout | None:
        """Return the layout in which a linear of ``shape`` is stored, ``None`` where it is none.

        Where several hold it, as with a scale missing, the declared precision tells, and then
        which of them lacks least.
        """
        found = [each for each in (*self.layouts, PLAIN) if each.holds(parts, shape)]
        declared = [each for each in found if each.precision == scheme.precision]
        return min(
            declared or found, key=lambda each: len(each.missing(parts, scheme)), default=None
        )

    def explains(self, part: str) -> bool:
        """Tell whether the format gives a module a part of this name, beside its weight."""
        return part in self.extra_parts or any(part in each.part_names for each in self.layouts)


def describe(parts: Parts) -> str:
    """Return tensors as text: ``weight U8 [256, 128], weight_scale ...``."""
    return ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in sorted(parts.items()))
