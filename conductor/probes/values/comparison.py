"""Hold blocks of a dequantized matrix against the source's: noise, gain, and what a format gives.

The signal-to-quantization-noise ratio of a matrix x stored as y is 10 log10(sum x^2 / sum (x-y)^2)
decibels. The norm is the same ratio with y the nearest values that the format has: what no scale
or packing mistake can lower and no calibration raises by much. Blocks are judged one by one, so
that a damaged part of a large matrix is not averaged away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from conductor.probes.formats.layout import PLAIN, Layout, Parts
from conductor.probes.values.identity import rounded

if TYPE_CHECKING:
    from conductor.probes.pairs import Stored

Values = NDArray[np.float32]
Factors = NDArray[np.float64]

BLOCK_ELEMENTS = 8192
BLOCKS_SAMPLED = 3
_NARROW = 128
_STACKED_ELEMENTS = 1 << 17

BLOCK_ALLOWANCE_DB = 3.0
"""How much more than a whole matrix one block of it may fall short: calibrated methods spend their
error where inputs are small, so that rows and columns differ."""

HOPELESS_DB = 1000.0
"""Shortfall of values that are no numbers."""

_TYPICAL_ROWS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A block of a matrix: where it lies, the source's values and the candidate's."""

    rows: slice
    columns: slice
    source: Values
    candidate: Values


Blocks = Callable[[], Iterable[Block]]
"""Gives the blocks of one matrix, each time anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """What the candidate's values should be: the source's times these factors."""

    of_columns: Factors | None = None
    of_rows: Factors | None = None

    def largest(self, blocks: Iterable[Block]) -> float:
        """Return the largest magnitude that is expected in these blocks."""
        return max(
            (float(np.abs(self.expected(each)).max(initial=0)) for each in blocks), default=0
        )

    def expected(self, block: Block) -> Values:
        """Return the values that the candidate's block should be near."""
        values = block.source
        if self.of_columns is not None:
            values = values * self.of_columns[block.columns].astype(np.float32)
        if self.of_rows is not None:
            values = values * self.of_rows[block.rows, None].astype(np.float32)
        return values


AS_IT_WAS = Expectation()


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How far a matrix is from what it should be; decibels of the whole, and of its worst block.

    ``groups`` of weights that share a scale were looked at one by one. ``gain_scatter`` is how far
    their factors to the source lie apart, in terms of what rounding leaves: scales that belong to
    other weights scatter them, and leave the factor of the whole as it was. Rows that are smoothed
    scatter them too, but not ``gain_scatter_in_rows``.
    """

    sqnr_db: float
    norm_db: float
    worst_sqnr_db: float
    worst_norm_db: float
    gain: float
    correlation: float
    groups: int = 0
    damaged_groups: int = 0
    gain_scatter: float = 0.0
    gain_scatter_in_rows: float = 0.0
    finite: bool = True

    @property
    def shortfall_db(self) -> float:
        """How far the matrix, or by ``BLOCK_ALLOWANCE_DB`` more its worst block, falls short of
        what the format gives; at least 0.
        """
        if not self.finite:
            return HOPELESS_DB
        whole = _difference(self.norm_db, self.sqnr_db)
        return max(0.0, whole, self._worst_db - BLOCK_ALLOWANCE_DB)

    @property
    def worst_decides(self) -> bool:
        """Tell whether it is one block that falls short, and not the whole matrix."""
        return self._worst_db - BLOCK_ALLOWANCE_DB > _difference(self.norm_db, self.sqnr_db)

    @property
    def _worst_db(self) -> float:
        return _difference(self.worst_norm_db, self.worst_sqnr_db)

    def held_to(self, norm_db: float) -> Comparison:
        """Return the same with norms of at most ``norm_db``."""
        return replace(
            self,
            norm_db=min(self.norm_db, norm_db),
            worst_norm_db=min(self.worst_norm_db, norm_db),
        )

    @property
    def gain_error_percent(self) -> float:
        """How far the least-squares factor to the source is from 1; 0 where there is no signal."""
        return abs(self.gain - 1) * 100


def block_grid(
    shape: tuple[int, int],
    step: tuple[int, int],
    *,
    by_columns: bool,
    whole_rows: bool,
    deep: bool,
) -> list[tuple[slice, slice]]:
    """Return where the blocks to look at lie: all with ``deep``, else a few from first to last.

    Blocks are broad where rows lie together in the file, and narrow where columns do
    (``by_columns``); ``whole_rows`` where a row has one scale, which its largest number decides.
    """
    rows, columns = shape
    if by_columns:
        width = _multiple(min(columns, _NARROW), step[1])
    else:
        # A few whole rows are worth more than their bytes where one scale is for each; where all
        # blocks are read, whole rows are read once.
        most = _STACKED_ELEMENTS * 4 if deep else BLOCKS_SAMPLED * BLOCK_ELEMENTS * whole_rows
        fits = step[0] * columns <= most
        width = columns if fits else _multiple(BLOCK_ELEMENTS // step[0], step[1])
    height = _multiple(BLOCK_ELEMENTS // max(1, min(width, columns)), step[0])
    if deep or rows * columns <= BLOCKS_SAMPLED * BLOCK_ELEMENTS:
        return [
            (slice(row, min(row + height, rows)), slice(column, min(column + width, columns)))
            for row in range(0, rows, height)
            for column in range(0, columns, width)
        ]
    places = [index / (BLOCKS_SAMPLED - 1) for index in range(BLOCKS_SAMPLED)]
    # Rows go from first to last; columns in another order, so that a diagonal is not all there is.
    others = places[1::2] + places[::2]
    return [
        (_stretch(row, rows, height, step[0]), _stretch(column, columns, width, step[1]))
        for row, column in zip(places, others, strict=True)
    ]


def _multiple(size: int, step: int) -> int:
    return max(step, math.ceil(size / step) * step)


def _stretch(place: float, size: int, length: int, step: int) -> slice:
    """Return a stretch of about ``length`` that begins at a multiple of ``step``."""
    if length >= size:
        return slice(0, size)
    start = int(place * (size - length)) // step * step
    if place == 1.0:
        return slice(start, size)
    return slice(start, start + length)


def compare(
    blocks: Iterable[Block],
    stored: Stored,
    expectation: Expectation = AS_IT_WAS,
    *,
    largest: float | None = None,
) -> Comparison:
    """Compare blocks with what they should be.

    ``largest`` is the largest magnitude of the whole matrix expected, for scales per tensor.
    """
    totals = np.zeros(5)
    group = stored.layout.group_size(stored.parts, stored.shape)
    groups, damaged = 0, np.zeros(3)
    factors, in_rows = np.zeros(3), np.zeros(3)
    alike = 1
    worst: tuple[float, float, float] | None = None
    for together in _stacks(blocks, stored.layout.step[0]):
        x = np.concatenate([expectation.expected(block) for block in together])
        y = np.concatenate([block.candidate for block in together])
        n = nearest(stored.layout, stored.parts, x, largest)
        sums = _sums_of_rows(x, y, n)
        if not np.isfinite(sums).all():
            return HOPELESS
        if group and group <= x.shape[1]:
            alike = group
            groups += len(x) * (x.shape[1] // group)
            signals = _sums_of_groups(x, x, group)
            damaged += _damaged_groups(x, y, n, signals, group)
            products = _sums_of_groups(x, y, group)
            factors += _factors(signals, products)
            in_rows += _factors_in_rows(signals, products)
        else:
            alike = x.shape[1]
            factors += _factors(sums[0], sums[2])
        by_part = np.add.reduceat(sums, _parts_of(together), axis=1)
        totals += by_part.sum(axis=1)
        for signal, _, _, noise, least in by_part.T.tolist():
            sqnr, norm = _decibels(signal, noise), _decibels(signal, least)
            gap = _difference(norm, sqnr)
            if worst is None or gap > worst[0]:
                worst = (gap, sqnr, norm)
    signal, power, product, noise, least = (float(total) for total in totals)
    _, worst_sqnr, worst_norm = worst or (0.0, math.inf, math.inf)
    both = math.sqrt(signal * power)
    norm_db = _decibels(signal, least)
    own = _difference(
        _decibels(signal, max(0.0, least - damaged[2])),
        _decibels(signal, max(0.0, noise - damaged[1])),
    )
    is_rounded = own < _AS_ROUNDED_DB
    return Comparison(
        sqnr_db=_decibels(signal, noise),
        norm_db=norm_db,
        worst_sqnr_db=worst_sqnr,
        worst_norm_db=worst_norm,
        gain=product / signal if signal else 1.0,
        correlation=product / both if both else 0.0,
        groups=groups,
        damaged_groups=int(damaged[0]) if is_rounded else 0,
        gain_scatter=_scatter(factors, alike, norm_db),
        gain_scatter_in_rows=_scatter(in_rows, alike, norm_db),
    )


HOPELESS = Comparison(
    sqnr_db=-math.inf,
    norm_db=math.inf,
    worst_sqnr_db=-math.inf,
    worst_norm_db=math.inf,
    gain=1.0,
    correlation=0.0,
    finite=False,
)
"""Of values that are no numbers, or that cannot be worked out from what is stored."""


def nearest(layout: Layout, parts: Parts, values: Values, largest: float | None) -> Values:
    """Return values rounded to nearest in the layout; plain ones to the type they are stored in."""
    if layout is PLAIN:
        return rounded(values, parts["weight"].dtype)
    return layout.nearest(values, parts, largest)


def typical_norm_db(stored: Stored, column_count: int) -> float:
    """Return what the layout gives for weights that are normally distributed.

    A source that was rounded to the format's own numbers before has a norm without end, which an
    exporter that chooses other scales does not reach and need not.
    """
    generator = np.random.default_rng(0)
    x = generator.standard_normal((_TYPICAL_ROWS, column_count), dtype=np.float32)
    n = nearest(stored.layout, stored.parts, x, float(np.abs(x).max()))
    signal, *_, least = _sums_of_rows(x, x, n).sum(axis=1)
    return _decibels(float(signal), float(least))


def _stacks(blocks: Iterable[Block], step: int) -> Iterator[list[Block]]:
    """Yield blocks of one width together, as if they lay below each other: fewer, larger arrays."""
    stack: list[Block] = []
    size = 0
    for block in blocks:
        height, width = block.source.shape
        if stack and (size >= _STACKED_ELEMENTS or stack[-1].source.shape[1] != width):
            yield stack
            stack, size = [], 0
        stack.append(block)
        size += height * width
        if height % step:
            yield stack
            stack, size = [], 0
    if stack:
        yield stack


def _parts_of(blocks: Iterable[Block]) -> list[int]:
    """Return at which rows of a stack of blocks the parts begin that are judged one by one."""
    starts: list[int] = []
    first = 0
    for block in blocks:
        height, width = block.source.shape
        rows = max(1, BLOCK_ELEMENTS // max(1, width))
        starts += range(first, first + height, rows)
        first += height
    return starts


def _sums_of_rows(x: Values, y: Values, n: Values) -> NDArray[np.float64]:
    """Return for each row the sums of x x, y y, x y, (x-y)^2 and (x-n)^2, [5, rows].

    32-bit floats will do while neither they nor their squares leave the range of 32 bits.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        sums = _products(x, y, n)
        if sums[0].min(initial=math.inf) > _LEAST_SQUARES and np.isfinite(sums).all():
            return sums
        return _products(*(each.astype(np.float64) for each in (x, y, n)))


_LEAST_SQUARES = 1e-20
"""Sum of squares under which single ones may be lost to the end of the range of 32-bit floats."""


def _products(x: Any, y: Any, n: Any) -> NDArray[np.float64]:
    noise, least = x - y, x - n
    pairs = ((x, x), (y, y), (x, y), (noise, noise), (least, least))
    return np.array([np.einsum("ij,ij->i", a, b) for a, b in pairs], dtype=np.float64)


def _matter(signals: Any) -> NDArray[np.bool_]:
    """Tell which groups or rows hold more than next to nothing."""
    matter: NDArray[np.bool_] = signals > signals.mean() * _NEGLIGIBLE
    return matter


def _factors(signals: Any, products: Any) -> Factors:
    """Return number, sum and sum of squares of the factors of weights that share a scale.

    Weights that are next to nothing tell no factor.
    """
    counted = _matter(signals)
    found = np.asarray(products[counted] / signals[counted], dtype=np.float64)
    return np.array([found.size, found.sum(), np.square(found).sum()])


def _factors_in_rows(signals: Values, products: Values) -> Factors:
    """Return the same of the distances of factors from the mean of their row."""
    counted = _matter(signals)
    found = np.divide(products, signals, out=np.zeros_like(signals), where=counted)
    numbers = np.count_nonzero(counted, axis=1)
    means = found.sum(axis=1) / np.maximum(numbers, 1)
    distances = np.where(counted, found - means[:, None], 0)
    free = int(np.maximum(numbers - 1, 0).sum())
    return np.array([free, 0.0, np.square(distances, dtype=np.float64).sum()])


def _scatter(factors: Factors, alike: int, norm_db: float) -> float:
    """Return the standard deviation of factors in terms of what noise makes of it.

    Noise of relative size s leaves the factor of n weights s / sqrt(n) off; a scale that is stored
    in 16 bits, a little more.
    """
    count, total, squares = factors.tolist()
    if count < _FEWEST_FACTORS:
        return 0.0
    deviation = math.sqrt(max(0.0, squares / count - (total / count) ** 2))
    expected: float = 10 ** (-norm_db / 20) / math.sqrt(alike) + _ROUNDED_SCALE
    return deviation / expected


_ROUNDED_SCALE = 2.0**-8
"""Relative error of a scale that is rounded to BF16."""

_FEWEST_FACTORS = 8
"""Factors whose deviation says something."""


def _damaged_groups(x: Values, y: Values, n: Values, signal: Values, group: int) -> Factors:
    """Return how many groups of columns hold other values, their noise, and what rounding leaves.

    Most of such a group is noise, where rounding leaves little of it; next to nothing may become
    anything.
    """
    distance = x - y
    noise = _sums_of_groups(distance, distance, group)
    suspects = (noise > signal * _DAMAGED) & _matter(signal)
    if not suspects.any():
        return np.zeros(3)
    rounding = x - n
    least = _sums_of_groups(rounding, rounding, group)
    damaged = suspects & (least < signal * _SOUND)
    return np.array(
        [np.count_nonzero(damaged), noise[damaged].sum(), least[damaged].sum()], dtype=np.float64
    )


_AS_ROUNDED_DB = 1.0
"""Shortfall of all other groups up to which values are rounded to nearest, so that one group can
be told to be damaged. GPTQ makes up for the error of one column in others, by 2 dB and more; now
and then a small group takes it all and is none the worse."""

_DAMAGED = 0.5
_SOUND = 0.1
"""Share of a group's squares that its noise has: 3 and 10 dB."""

_NEGLIGIBLE = 0.01
"""Share of the mean group's squares under which a group does not matter."""


def _sums_of_groups(a: Values, b: Values, group: int) -> Values:
    """Return the sum of products in each whole group of columns, [rows, groups]."""
    rows, columns = a.shape
    count = columns // group
    shape = (rows, count, group)
    first, second = (each[:, : count * group].reshape(shape) for each in (a, b))
    sums: Values = np.einsum("rgc,rgc->rg", first, second)
    return sums


def _dot(a: Factors, b: Factors) -> float:
    """Return the sum of products, without BLAS and its threads."""
    return float(np.einsum("i,i->", a, b))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _difference(norm_db: float, sqnr_db: float) -> float:
    """Return norm less ratio; 0 where both are without end, ``HOPELESS_DB`` where one is."""
    if norm_db == sqnr_db or sqnr_db == math.inf:
        return 0.0
    return min(norm_db - sqnr_db, HOPELESS_DB)


def row_gains(blocks: Iterable[Block], rows: int, expectation: Expectation) -> Factors:
    """Return the least-squares factor from what is expected to what is there, for each row."""
    products, signals = np.zeros(rows), np.zeros(rows)
    for block in blocks:
        x = expectation.expected(block).astype(np.float64)
        y = block.candidate.astype(np.float64)
        products[block.rows] += np.einsum("ij,ij->i", x, y)
        signals[block.rows] += np.einsum("ij,ij->i", x, x)
    gains = np.ones(rows)
    np.divide(products, signals, out=gains, where=signals > 0)
    return gains


def column_errors(blocks: Iterable[Block], expectation: Expectation, columns: int) -> Factors:
    """Return the squared distance from what is expected, for each column."""
    errors = np.zeros(columns)
    for block in blocks:
        difference = expectation.expected(block).astype(np.float64) - block.candidate
        errors[block.columns] += np.einsum("ij,ij->j", difference, difference)
    return errors


def diagnose(blocks: Iterable[Block], comparison: Comparison, scales: Iterable[float]) -> str:
    """Say in a few words what mistake explains the distance, or nothing.

    ``scales`` are the values of the matrix's scales that there is one of.
    """
    if not comparison.finite:
        return "values are NaN or infinite"
    gain = comparison.gain
    if comparison.correlation > _ALIKE and gain > 0:
        return _explain_gain(gain, scales)
    found = list(blocks)
    if correlation(found, _pairs_swapped) > _ALIKE:
        return "the two values in each byte are swapped: the packing order is wrong"
    if abs(comparison.correlation) < _UNRELATED:
        return "values have nothing to do with the source's: another layer's, or another order"
    if comparison.correlation < -_ALIKE:
        return "values have the opposite sign"
    return ""


_ALIKE = 0.9
_UNRELATED = 0.1
_NEAR = 0.03


def _explain_gain(gain: float, scales: Iterable[float]) -> str:
    if abs(gain - 1) < _NEAR:
        return ""
    exponent = round(math.log2(gain))
    is_power = bool(exponent) and _is_near(gain, 2.0**exponent)
    factor = f"values are {2.0**exponent if is_power else gain:.3g} times the source's"
    positive = [scale for scale in scales if 0 < scale < math.inf]
    if any(_is_near(gain, power) for scale in positive for power in (scale**2, scale**-2)):
        return f"{factor}: a scale is stored as its inverse"
    if any(_is_near(gain, power) for scale in positive for power in (scale, 1 / scale)):
        return f"{factor}: a scale is applied twice or not at all"
    if is_power:
        return f"{factor}: an exponent is off, in the scales or in how they are read"
    return f"{factor}: a scale is wrong"


def _is_near(gain: float, other: float) -> bool:
    return abs(gain - other) < _NEAR * other


def correlation(
    blocks: Iterable[Block], change: Callable[[Values], Values | None] = np.asarray
) -> float:
    """Return the correlation of what both sides hold, the candidate's changed."""
    sums = np.zeros(3)
    for block in blocks:
        y = change(block.candidate)
        if y is None:
            return 0.0
        x = np.ravel(block.source).astype(np.float64)
        y64 = np.ravel(y).astype(np.float64)
        sums += (_dot(x, x), _dot(y64, y64), _dot(x, y64))
    both = math.sqrt(sums[0] * sums[1])
    return float(sums[2] / both) if both else 0.0


def _pairs_swapped(values: Values) -> Values | None:
    rows, columns = values.shape
    if columns % 2:
        return None
    return values.reshape(rows, columns // 2, 2)[:, :, ::-1].reshape(rows, columns)
