"""Matrices of small numbers times scales: the layout that most formats are a row of.

A stored element holds one or more numbers; a number times the scale of its place is the weight.
Scales lie as [rows, columns] of the matrix divided by how much one scale is for: one in all, one a
row, one a group of columns, or one a 2-D block. How much that is follows from the shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from conductor.probes.formats.layout import (
    FLOAT_DTYPES,
    Fetch,
    Layout,
    Parts,
    Scheme,
)
from conductor.probes.safetensors_header import Tensor

if TYPE_CHECKING:
    from conductor.probes.formats.layout import Values

E8M0_DTYPES = ("U8", "F8_E8M0")
E4M3_DTYPES = ("F8_E4M3",)

Shape = tuple[int, int]
"""Rows and columns: of a matrix, of its scales, or of what one scale is for."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """How numbers are stored: ``numbers`` (rows, columns) of them in ``elements`` (rows, columns).

    ``unpack`` gives the numbers of stored elements, ``round`` the nearest numbers there are, both
    float32. ``lowest`` and ``largest`` are the ends that exporters make weights fit in between.
    """

    dtype: str
    unpack: Callable[[Any], Values]
    round: Callable[[Values], Values]
    largest: float
    lowest: float
    numbers: Shape = (1, 1)
    elements: Shape = (1, 1)

    def stored(self, shape: Shape) -> Shape:
        """Return the shape in which a matrix is stored."""
        rows, columns = (
            math.ceil(size * elements / numbers)
            for size, elements, numbers in zip(shape, self.elements, self.numbers, strict=True)
        )
        return rows, columns

    def matrix(self, stored: tuple[int, ...]) -> Shape:
        """Return the shape of the matrix that is stored in this shape, but for padding."""
        rows, columns = (
            size * numbers // elements
            for size, elements, numbers in zip(stored, self.elements, self.numbers, strict=True)
        )
        return rows, columns


def _float8(stored: Any) -> Values:
    from conductor.probes.formats.numerics import e4m3_values, look_up

    return look_up(e4m3_values(), stored)


def _float4(stored: Any) -> Values:
    from conductor.probes.formats.numerics import e2m1_pairs, unpack_columns

    return unpack_columns(e2m1_pairs(), stored)


def _nibbles_of_rows(stored: Any) -> Values:
    from conductor.probes.formats.numerics import signed_nibble_pairs, unpack_rows

    return unpack_rows(signed_nibble_pairs(), stored)


def _integers(stored: Any) -> Values:
    import numpy as np

    numbers: Values = stored.astype(np.float32)
    return numbers


def _round_float8(values: Values) -> Values:
    from conductor.probes.formats.numerics import E4M3

    return E4M3.round(values)


def _round_float4(values: Values) -> Values:
    from conductor.probes.formats.numerics import E2M1

    return E2M1.round(values)


def _round_integers(bits: int) -> Callable[[Values], Values]:
    def nearest(values: Values) -> Values:
        import numpy as np

        return np.clip(np.rint(values), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    return nearest


def integers_in_bytes(bits: int) -> Code:
    """Return integers of which each has a byte of its own; what has more bits is no number."""
    lowest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def unpack(stored: Any) -> Values:
        import numpy as np

        numbers = _integers(stored)
        return np.where((numbers < lowest) | (numbers > largest), np.float32(np.nan), numbers)

    return Code(
        dtype="I8", unpack=unpack, round=_round_integers(bits), largest=largest, lowest=lowest
    )


def packed_integers(bits: int) -> Code:
    """Return integers without gaps in 32-bit words along the columns, stored without a sign."""

    def unpack(stored: Any) -> Values:
        import numpy as np

        from conductor.probes.formats import numerics

        if bits == 4:
            nibbles = numerics.bytes_of(stored)
            return numerics.unpack_columns(numerics.offset_nibble_pairs(), nibbles)
        return numerics.unpack_words(stored, bits).astype(np.float32) - np.float32(2 ** (bits - 1))

    return Code(
        dtype="I32",
        unpack=unpack,
        round=_round_integers(bits),
        largest=2 ** (bits - 1) - 1,
        lowest=-(2 ** (bits - 1)),
        numbers=(1, 32),
        elements=(1, bits),
    )


FLOAT8 = Code(dtype="F8_E4M3", unpack=_float8, round=_round_float8, largest=448, lowest=-448)
FLOAT4 = Code(dtype="U8", unpack=_float4, round=_round_float4, largest=6, lowest=-6, numbers=(1, 2))
INTEGER8 = Code(dtype="I8", unpack=_integers, round=_round_integers(8), largest=127, lowest=-128)
ROW_NIBBLES = Code(
    dtype="U8",
    unpack=_nibbles_of_rows,
    round=_round_integers(4),
    largest=7,
    lowest=-7,
    numbers=(2, 1),
)
"""Two rows of a column in one byte, the upper row in the low nibble."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaled(Layout):
    """One row of the table: a code for the numbers, and which parts scale them.

    ``whole`` is the part that scales the matrix as a whole beside ``scale``, by multiplication or,
    ``whole_divides``, by division. Where ``grouped``, the scales are those of groups of columns.
    A ``zero_point`` is subtracted from the numbers before they are scaled; ``column_groups`` names
    the group of each column where they do not lie in order. ``column_scale`` is the factor that
    inputs are multiplied with first, so that the weight is what is stored times it; ``low_rank``
    are the names that two parts may have whose product is added to what is stored. ``input_scale``
    is for inputs; ``narrowing``, where inputs are scaled, for weights in the precision of those,
    which changes no weight. ``written_shape`` holds the shape of the matrix.
    """

    precision: str
    code: Code
    weight: str = "weight"
    scale: str = "weight_scale"
    scale_dtypes: tuple[str, ...] = FLOAT_DTYPES
    grouped: bool = False
    whole: str | None = None
    whole_divides: bool = False
    zero_point: str | None = None
    column_groups: str | None = None
    column_scale: str | None = None
    low_rank: tuple[tuple[str, str], ...] = ()
    input_scale: str | None = None
    narrowing: str | None = None
    written_shape: str | None = None
    step: Shape = (2, 128)
    extra: frozenset[str] = frozenset()
    part_names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Collect the names of all parts there may be."""
        names = (self.weight, self.scale, self.whole, self.zero_point, self.column_groups)
        beside = (self.column_scale, self.input_scale, self.narrowing, self.written_shape)
        known = (name for name in (*names, *beside) if name)
        object.__setattr__(self, "part_names", self.extra.union({"bias"}, known, *self.low_rank))

    def shape(self, parts: Parts) -> Shape | None:
        """Return the shape that the stored weight has; padding cannot be told apart."""
        weight = parts.get(self.weight)
        if weight is None or weight.dtype != self.code.dtype or len(weight.shape) != 2:
            return None
        shape = self.code.matrix(weight.shape)
        return shape if self._scales_fit(parts, shape) else None

    def holds(self, parts: Parts, shape: Shape) -> bool:
        """Tell whether these tensors are a linear of ``shape``, also with scales missing."""
        weight = parts.get(self.weight)
        return (
            weight is not None
            and weight.dtype == self.code.dtype
            and weight.shape == self.code.stored(shape)
            and self._scales_fit(parts, shape)
        )

    def _scales_fit(self, parts: Parts, shape: Shape) -> bool:
        """Tell whether what is there beside the weight has a shape that can be read."""
        scale = parts.get(self.scale)
        reach = _reach(scale, shape) if scale else shape
        if reach is None or (scale and scale.dtype not in self.scale_dtypes):
            return False
        sizes = (
            *((self.whole, 1), (self.narrowing, 1)),
            *((self.column_scale, shape[1]), (self.column_groups, shape[1])),
        )
        found = ((parts[name], size) for name, size in sizes if name and name in parts)
        return (
            (not self.grouped or scale is None or reach[0] == 1)
            and all(math.prod(tensor.shape) == size for tensor, size in found)
            and (scale is None or self._zero_points_fit(parts, reach, shape))
            and self._low_rank_fits(parts, shape)
        )

    def _zero_points_fit(self, parts: Parts, reach: Shape, shape: Shape) -> bool:
        zeros = parts.get(self.zero_point or "")
        if zeros is None:
            return True
        rows, columns = (math.ceil(size / n) for size, n in zip(shape, reach, strict=True))
        if zeros.dtype == "I32":
            rows = math.ceil(rows * self.code.elements[1] / 32)
        return zeros.dtype in ("I8", "I32") and _grid_shape(zeros) == (rows, columns)

    def _factors(self, parts: Parts) -> tuple[str, ...]:
        """Return the names of the two parts whose product is added, where one of them is there."""
        return next((pair for pair in self.low_rank if any(name in parts for name in pair)), ())

    def _low_rank_fits(self, parts: Parts, shape: Shape) -> bool:
        factors = [parts[name] for name in self._factors(parts) if name in parts]
        if len(factors) < 2:
            return True
        (rows, rank), (other, columns) = ((*tensor.shape, 0, 0)[:2] for tensor in factors)
        return (rows, columns) == shape and rank == other

    def group_size(self, parts: Parts, shape: Shape) -> int | None:
        """Return the columns per scale where each row has its own groups."""
        scale = parts.get(self.scale)
        rows, columns = _reach(scale, shape) or shape if scale else shape
        return columns if rows == 1 and columns < shape[1] else None

    def missing(self, parts: Parts, scheme: Scheme) -> tuple[str, ...]:
        """Return the parts that are absent; scales for the inputs where the scheme stores them."""
        needed = [self.scale, self.whole, self.written_shape, *self._factors(parts)]
        if scheme.static:
            needed += [self.input_scale, self.narrowing]
        return tuple(name for name in needed if name and name not in parts)

    def scales(self, parts: Parts) -> tuple[str, ...]:
        """Return the scales of the weight that are there."""
        names = (self.scale, self.whole, self.narrowing, self.column_scale)
        return tuple(name for name in names if name and name in parts)

    def input_scales(self, parts: Parts) -> tuple[str, ...]:
        """Return the scale of the inputs, if it is there."""
        return (self.input_scale,) if self.input_scale and self.input_scale in parts else ()

    def read(self, parts: Parts, fetch: Fetch, rows: slice, columns: slice) -> Values:
        """Return a block of the dequantized matrix, as the source had it."""
        import numpy as np

        shape = self.code.matrix(parts[self.weight].shape)
        rows, columns = _within(rows, shape[0]), _within(columns, shape[1])
        stored = (
            slice(part.start // numbers * elements, math.ceil(part.stop / numbers) * elements)
            for part, elements, numbers in zip(
                (rows, columns), self.code.elements, self.code.numbers, strict=True
            )
        )
        values = self.code.unpack(fetch(self.weight, *stored))
        values = values[: rows.stop - rows.start, : columns.stop - columns.start]
        # Scales may hold anything: what is no number is found out by what comes of it.
        with np.errstate(all="ignore"):
            return self._dequantized(values, parts, fetch, rows, columns)

    def _dequantized(
        self, values: Values, parts: Parts, fetch: Fetch, rows: slice, columns: slice
    ) -> Values:
        """Return numbers of a block as the weights they stand for."""
        shape = self.code.matrix(parts[self.weight].shape)
        reach = _reach(parts[self.scale], shape) or shape
        groups = self._column_groups(parts, fetch, columns)
        every = slice(0, shape[1])
        cells = (_cells(rows, reach[0]), _cells(columns if groups is None else every, reach[1]))
        if self.zero_point and self.zero_point in parts:
            zeros = self._zero_points(parts, fetch, cells)
            values = values - _spread(zeros, reach, rows, columns, groups)
        scales = _numbers(parts[self.scale], _grid(self.scale, parts, fetch, cells))
        values = _times(values, scales, reach, rows, columns, groups)
        if self.whole and self.whole in parts:
            whole = fetch(self.whole).reshape(())
            values = values / whole if self.whole_divides else values * whole
        if factors := self._factors(parts):
            left, right = (fetch(name) for name in factors)
            values = values + left[rows] @ right[:, columns]
        if self.column_scale and self.column_scale in parts:
            values = values * fetch(self.column_scale).reshape(-1)[columns]
        return values

    def _column_groups(self, parts: Parts, fetch: Fetch, columns: slice) -> Any:
        """Return the group of each column, or ``None`` where the groups lie in order."""
        if not self.column_groups or self.column_groups not in parts:
            return None
        groups = fetch(self.column_groups).reshape(-1)
        return groups[columns] if groups.min() >= 0 else None

    def _zero_points(self, parts: Parts, fetch: Fetch, cells: tuple[slice, slice]) -> Values:
        """Return the zero points of a part of the scales."""
        import numpy as np

        from conductor.probes.formats.numerics import unpack_words

        assert self.zero_point is not None
        if parts[self.zero_point].dtype != "I32":
            return _integers(_grid(self.zero_point, parts, fetch, cells))
        rows, columns = cells
        bits = self.code.elements[1]
        words = slice(rows.start // 32 * bits, math.ceil(rows.stop / 32) * bits)
        stored = _grid(self.zero_point, parts, fetch, (words, columns))
        first = rows.start % 32
        numbers = unpack_words(stored.T, bits)[:, first : first + rows.stop - rows.start]
        return _integers(numbers.T) + np.float32(self.code.lowest)

    def nearest(self, values: Values, parts: Parts, largest: float | None) -> Values:
        """Return a block of the source rounded to nearest, with scales from its extremes."""
        import numpy as np

        shape = self.code.matrix(parts[self.weight].shape)
        scale = parts.get(self.scale)
        reach = (_reach(scale, shape) if scale else None) or shape
        rows, columns = slice(0, values.shape[0]), slice(0, values.shape[1])

        def spread(numbers: Any) -> Any:
            return _spread(numbers, reach, rows, columns, None)

        if self.zero_point and self.zero_point in parts:
            low: Values = np.minimum(_extremes(values, reach, np.minimum), np.float32(0))
            high: Values = np.maximum(_extremes(values, reach, np.maximum), np.float32(0))
            span = np.float32(self.code.largest - self.code.lowest)
            steps = _not_zero((high - low) / span)
            zeros = self.code.round(np.float32(self.code.lowest) - low / steps)
            numbers = self.code.round(values / spread(steps) + spread(zeros))
            asymmetric: Values = (numbers - spread(zeros)) * spread(steps)
            return asymmetric
        most = _extremes(np.abs(values), reach, np.maximum)
        if largest is not None and most.size == 1 and reach == shape:
            most = np.full_like(most, largest)
        factor: Values = spread(self._scales_for(most, scale, largest))
        return self.code.round(values / factor) * factor

    def _scales_for(self, most: Values, scale: Tensor | None, largest: float | None) -> Values:
        """Return the scales that the format defines for numbers up to ``most`` each."""
        import numpy as np

        from conductor.probes.formats.numerics import E4M3, power_of_two

        if scale is not None and scale.dtype in E8M0_DTYPES:
            exponent = math.frexp(self.code.largest)[1] - 1
            return power_of_two(most) * np.float32(2.0**-exponent)
        scales = most / np.float32((self.code.largest - self.code.lowest) / 2)
        if self.scale_dtypes != E4M3_DTYPES:
            return _not_zero(scales)
        top = float(most.max()) if largest is None else largest
        whole = np.float32(top / self.code.largest / E4M3.largest or 1.0)
        return np.maximum(E4M3.round(scales / whole), np.float32(2.0**-9)) * whole


def _within(part: slice, size: int) -> slice:
    """Return a slice with both ends given; an end given may lie within padding."""
    stop = size if part.stop is None else part.stop
    return slice(part.start or 0, stop)


def _grid_shape(tensor: Tensor) -> Shape | None:
    """Return the rows and columns of scales, also where they are written with dimensions of 1."""
    shape = tensor.shape
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) < 2:
        return math.prod(shape), 1
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        return shape[0], shape[2]
    if len(shape) == 3 and shape[2] == 1:
        return shape[0], shape[1]
    return None


def _cells(part: slice, reach: int) -> slice:
    """Return the scales that a stretch of rows or columns has."""
    return slice(part.start // reach, math.ceil(part.stop / reach))


def _grid(name: str, parts: Parts, fetch: Fetch, cells: tuple[slice, slice]) -> Any:
    """Return a part of the stored scales as [rows, columns]."""
    if len(parts[name].shape) == 2:
        return fetch(name, *cells)
    return fetch(name).reshape(_grid_shape(parts[name]))[cells]


def _reach(scale: Tensor, shape: Shape) -> Shape | None:
    """Return the rows and columns that one scale is for, ``None`` where the shapes do not fit."""
    grid = _grid_shape(scale)
    if grid is None:
        return None
    rows, columns = (_share(size, n) for size, n in zip(shape, grid, strict=True))
    return None if rows is None or columns is None else (rows, columns)


_BLOCKS = (128, 64, 32, 16, 256, 512, 1024)
"""Usual sizes of groups and blocks, for sizes that none divides."""


def _share(size: int, count: int) -> int | None:
    """Return into what ``count`` scales divide ``size``, the last of which may be smaller."""
    if not 1 <= count <= size:
        return None
    exact = size // count
    if size % count == 0 and (count == 1 or exact & (exact - 1) == 0):
        return exact
    usual = (block for block in _BLOCKS if math.ceil(size / block) == count)
    return next(usual, exact if size % count == 0 else None)


def _numbers(scale: Tensor, stored: Any) -> Values:
    """Return stored scales as float32."""
    from conductor.probes.formats.numerics import e4m3_values, e8m0_values, look_up

    if scale.dtype in E4M3_DTYPES:
        return look_up(e4m3_values(), stored)
    numbers: Values = look_up(e8m0_values(), stored) if scale.dtype in E8M0_DTYPES else stored
    return numbers


def _times(
    values: Values, grid: Values, reach: Shape, rows: slice, columns: slice, groups: Any
) -> Values:
    """Return the values of a block times their scales; whole groups go without spreading those."""
    size = reach[1]
    whole = columns.start % size == 0 and values.shape[1] == grid.shape[1] * size
    product: Values
    if groups is not None or reach[0] != 1 or not whole:
        product = values * _spread(grid, reach, rows, columns, groups)
    else:
        product = values.reshape(values.shape[0], -1, size) * grid[:, :, None]
    return product.reshape(values.shape)


def _spread(grid: Any, reach: Shape, rows: slice, columns: slice, groups: Any) -> Any:
    """Return what the scales of a block say for each of its elements, as far as they differ."""
    import numpy as np

    if grid.shape[0] > 1 and reach[0] > 1:
        first = rows.start % reach[0]
        grid = np.repeat(grid, reach[0], axis=0)[first : first + rows.stop - rows.start]
    if groups is not None:
        known = groups < grid.shape[1]
        return np.where(known, grid[:, np.where(known, groups, 0)], np.float32(np.nan))
    if grid.shape[1] > 1 and reach[1] > 1:
        first = columns.start % reach[1]
        grid = np.repeat(grid, reach[1], axis=1)[:, first : first + columns.stop - columns.start]
    return grid


def _extremes(values: Values, reach: Shape, which: Any) -> Values:
    """Return the largest or smallest value of each part that has a scale of its own."""
    import numpy as np

    rows, columns = values.shape
    extremes = values
    if reach[0] == 1 and columns % reach[1] == 0:
        extremes = which.reduce(values.reshape(rows, -1, reach[1]), axis=2)
    else:
        for axis in (0, 1):
            starts = np.arange(0, values.shape[axis], reach[axis])
            extremes = which.reduceat(extremes, starts, axis=axis)
    return extremes


def _not_zero(scales: Values) -> Values:
    import numpy as np

    return np.where(scales == 0, np.float32(1), scales)
