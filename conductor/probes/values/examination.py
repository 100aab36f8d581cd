"""Examine the values of one matrix or one kept tensor, and say what was seen.

Everything here runs in threads, for one tensor at a time and without changing anything shared, so
that outcomes do not depend on who comes first. What belongs together across tensors (a norm and
its readers, the experts of a layer) is put together from the outcomes, in ``numbers``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from conductor.probes.formats.layout import PLAIN, UNDECLARED
from conductor.probes.pairs import Kept, Pair, Stored
from conductor.probes.safetensors_header import Tensor
from conductor.probes.values import comparison, identity, scales, smoothing
from conductor.probes.values.comparison import AS_IT_WAS, Block, Comparison, Expectation, Values
from conductor.probes.values.smoothing import Couple, Factors, NormChange, Norms, couple_of
from conductor.probes.values.tensor_files import StoredReader, TensorFiles
from gates.criteria import (
    GAIN_ERROR_PERCENT,
    GAIN_SCATTER,
    INPUT_SCALES,
    SQNR_SHORTFALL_DB,
)

_WORTH_A_SECOND_LOOK = 0.5
"""Share of a limit from which what else could explain a distance is worth its time."""

_SURE = 18
"""By how much an explanation must lower the squared distance, in mean squares of what is left.

Of what changed values by d among noise s, as it was and as it should be are sum(d^2) apart, told
from each other at half of that: three times what noise does to it where sum(d^2) is 36 s^2.
A change of the last bit of one number explains less, and fits either way.
"""

_COLUMNS_FOR_GAINS = 512
"""Columns from which the factor of a row is told: rounding to 4 bits leaves it 0.5 % off."""

_LARGEST_GROUP = 1024
_WEIGHT_SHAPE = "weight_shape"

_ROWS_IN_A_WORD = 32
"""Most rows that are packed together; a layout steps further only where blocks of scales are."""

_RELATED = 0.5
"""Correlation from which values are those of the same rows, smoothed or not; others have none."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What was seen of one tensor.

    ``found`` are findings as (kind, name); ``votes`` tell for a changed norm whether this reader
    was rescaled in return; ``couple`` is set where the linear before or after may explain it.
    ``in_halves`` tells of rows that the source interleaves whether they lie apart by halves.
    """

    name: str
    group: str
    size_bytes: int
    found: list[tuple[str, str]] = field(default_factory=list)
    compared: Comparison | None = None
    remark: str = ""
    votes: list[tuple[str, bool]] = field(default_factory=list)
    pair: Pair | None = None
    couple: Couple | None = None
    altered: bool = False
    vector: Kept | None = None
    in_halves: bool | None = None
    input_scales: list[tuple[str, bool]] = field(default_factory=list)
    expert_scales: list[scales.ExpertScale] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class CoupleOutcome:
    """Two linears explained by each other: their comparisons, and the factors of the rows."""

    first: Comparison
    second: Comparison
    gains: Factors
    columns: int
    votes: list[tuple[str, bool]]

    @property
    def is_rescaled(self) -> bool:
        """Tell whether the factors are more than noise makes of rows that are as they were."""
        return float(np.mean((self.gains - 1) ** 2)) > (2 * self._gain_noise) ** 2

    @property
    def gain_tolerance(self) -> float:
        """How far a bias may be from the factor of its row: six sigma, and a rounding of BF16."""
        return 6 * self._gain_noise + 2.0**-8

    @property
    def _gain_noise(self) -> float:
        """Noise of relative size s leaves a least-squares factor of n numbers s / sqrt(n) off."""
        noise: float = 10 ** (-self.first.sqnr_db / 20)
        return noise / math.sqrt(self.columns)


class Examiner:
    """Looks at tensors of a candidate beside those of its source."""

    def __init__(
        self, source: TensorFiles, candidate: TensorFiles, *, deep: bool, transformed: bool
    ) -> None:
        """Take both checkpoints; ``transformed`` values cannot be held against the source's."""
        self._source, self._candidate = source, candidate
        self._norms = Norms(source, candidate)
        self._deep, self._transformed = deep, transformed

    def examine_pair(self, pair: Pair) -> Outcome:
        """Look at a quantized linear: its scales, its weights, and both against the source."""
        stored = pair.candidate
        name = named(stored)
        outcome = Outcome(name=name, group=pair.kind, size_bytes=_size_bytes(stored), pair=pair)
        holds_zero = self._examine_scales(pair, outcome)
        self._examine_input_scales(stored, outcome)
        self._examine_weight_bytes(stored, outcome)
        self._examine_weight_shape(stored, outcome)
        if stored.layout.missing(stored.parts, UNDECLARED):
            return outcome
        try:
            self._examine_values(pair, outcome, holds_zero)
        except ValueError as error:
            outcome.found.append(("not_decodable", f"{name} ({error})"))
        except KeyError as error:
            outcome.found.append(("not_measured", f"{name} ({error})"))
        return outcome

    def _examine_scales(self, pair: Pair, outcome: Outcome) -> tuple[str, ...]:
        """Look at every scale of the weight; return the parts that hold zeros."""
        stored = pair.candidate
        reader = StoredReader(self._candidate, stored)
        holding_zero = []
        for part in stored.layout.scales(stored.parts):
            counts = scales.count_part(reader, stored, part)
            name = named(stored, part)
            if counts.non_finite:
                outcome.found.append(("non_finite_scale", name))
            if counts.negative:
                outcome.found.append(("negative_scale", name + counts.remark(counts.negative)))
            if counts.zero:
                holding_zero.append(part)
        return tuple(holding_zero)

    def _examine_input_scales(self, stored: Stored, outcome: Outcome) -> None:
        reader = StoredReader(self._candidate, stored)
        for part in stored.layout.input_scales(stored.parts):
            counts = scales.count_part(reader, stored, part)
            name = named(stored, part)
            outcome.found += flaws(name, counts)
            values = reader(part)
            if not _is_plausible(values):
                outcome.found.append(("implausible_scale", f"{name} ({values.reshape(-1)[0]:g})"))
            outcome.input_scales.append((name, bool(values.size and (values == 1.0).all())))
            self._note_expert_scale(stored, part, None, outcome)

    def _examine_weight_bytes(self, stored: Stored, outcome: Outcome) -> None:
        """Look at every byte of 8-bit floating-point weights for the ones that are no number."""
        beside = {*stored.layout.scales(stored.parts), *stored.layout.input_scales(stored.parts)}
        for part, tensor in stored.parts.items():
            if part in beside or tensor.dtype not in ("F8_E4M3", "F8_E5M2"):
                continue
            reader = StoredReader(self._candidate, stored)
            if any(identity.holds_non_finite(tensor.dtype, each) for each in reader.chunks(part)):
                outcome.found.append(("non_finite_weight", named(stored, part)))

    def _examine_weight_shape(self, stored: Stored, outcome: Outcome) -> None:
        """Hold the shape that is stored beside packed weights against what they hold."""
        if _WEIGHT_SHAPE not in stored.parts:
            return
        shape = StoredReader(self._candidate, stored)(_WEIGHT_SHAPE).reshape(-1).tolist()
        if shape != list(stored.shape):
            said = f"says {shape}, and the source has {list(stored.shape)}"
            outcome.found.append(("not_decodable", f"{named(stored, _WEIGHT_SHAPE)} ({said})"))

    def _examine_values(self, pair: Pair, outcome: Outcome, holds_zero: tuple[str, ...]) -> None:
        if self._transformed:
            outcome.found.append(("not_measured", f"{outcome.name} (rotated)"))
            return
        sample = list(self._blocks(pair, deep=False))
        if pair.source.row_step > 1:
            pair, sample = self._find_rows(pair, sample, outcome)
        self._note_weight_scales(pair, sample, outcome)
        hollow = self._hollow(pair, sample)
        if hollow:
            outcome.found.append((hollow, outcome.name))
            if hollow == "zero_weight":
                outcome.found += [("zero_scale", named(pair.candidate, p)) for p in holds_zero]
            return
        if holds_zero:
            self._examine_zero_scales(pair, holds_zero, outcome)
        self._compare(pair, sample, outcome)

    def _find_rows(
        self, pair: Pair, sample: list[Block], outcome: Outcome
    ) -> tuple[Pair, list[Block]]:
        """Return what a projection stored apart holds of rows that the source interleaves.

        The rows of the projection, or a half of all rows as they lie: a loader that joins the
        halves gets the source's order back.
        """
        if comparison.correlation(sample) > _RELATED:
            outcome.in_halves = False
            return pair, sample
        first_row = pair.source.first_row * pair.source.shape[0]
        half = replace(pair, source=replace(pair.source, first_row=first_row, row_step=1))
        of_half = list(self._blocks(half, deep=False))
        if comparison.correlation(of_half) <= _RELATED:
            return pair, sample
        outcome.in_halves, outcome.pair = True, half
        return half, of_half

    def _compare(self, pair: Pair, sample: list[Block], outcome: Outcome) -> None:
        """Compare with the source, or with the source smoothed as the norm before it was."""
        stored = pair.candidate
        expectation, change = AS_IT_WAS, self._change(pair)
        couple = couple_of(stored.module, stored.expert)
        explained = False
        if change is not None:
            rows = stored.shape[0] if couple is not None and couple.first else None
            expectation, explained = _choose(sample, change, rows)
        compared = self._measure(pair, sample, expectation)
        if couple is not None and couple.first:
            # Its rows may be smoothed by less than their noise, and what follows in return.
            compared = replace(compared, gain_scatter=compared.gain_scatter_in_rows)
        suspicious = is_suspicious(compared)
        outcome.compared = compared
        if change is not None and not is_far(compared):
            outcome.votes.append((change.name, explained))
        if suspicious or (couple is not None and self._is_bias_altered(pair)):
            outcome.couple = couple
        if suspicious:
            scales_alone = list(self._lone_scales(stored))
            outcome.remark = comparison.diagnose(sample, compared, scales_alone)

    def _is_bias_altered(self, pair: Pair) -> bool:
        """Tell whether the bias beside rows that may be rescaled has other values."""
        names = zip(
            *map(smoothing.biases_before, (pair.source.module, pair.candidate.module)),
            strict=False,
        )
        for source_name, name in names:
            was = self._source.weights.tensors.get(source_name)
            is_now = self._candidate.weights.tensors.get(name)
            if was and is_now and was.shape == is_now.shape:
                return identity.comparable(was.dtype, is_now.dtype) and identity.differs(
                    self._source, source_name, self._candidate, name, deep=True
                )
        return False

    def _change(self, pair: Pair) -> NormChange | None:
        stored = pair.candidate
        return self._norms.changed_for(pair.source.module, stored.module, stored.shape[1])

    def _measure(self, pair: Pair, sample: list[Block], expectation: Expectation) -> Comparison:
        """Compare the sample or everything, looking closer where it does not fit at first."""
        stored = pair.candidate
        lone = any(True for _ in self._lone_scales(stored))
        largest = expectation.largest(sample)
        if self._deep and lone:
            largest = expectation.largest(self._source_blocks(pair))
        blocks = self._blocks(pair, deep=True) if self._deep else sample
        compared = comparison.compare(blocks, stored, expectation, largest=largest)
        if not is_suspicious(compared) or not compared.finite:
            return compared
        typical = comparison.typical_norm_db(stored, stored.shape[1])
        compared = compared.held_to(typical)
        if is_suspicious(compared) and lone and not self._deep:
            largest = expectation.largest(self._source_blocks(pair))
            compared = comparison.compare(sample, stored, expectation, largest=largest)
            compared = compared.held_to(typical)
        return compared

    def examine_couple(self, first: Pair, second: Pair) -> CoupleOutcome | None:
        """Tell whether rows of one linear were divided by what columns of the next were multiplied
        with; ``None`` where they were not, or something else is wrong as well.
        """
        change = self._change(first)
        narrow = list(self._columns(first))
        expectation, explained = AS_IT_WAS, False
        if change is not None:
            expectation, explained = _choose(narrow, change, first.candidate.shape[0])
        gains = comparison.row_gains(narrow, first.candidate.shape[0], expectation)
        if not (np.isfinite(gains).all() and (gains > 0).all()):
            return None
        sample = list(self._blocks(second, deep=False))
        for factors in smoothing.column_factors(gains, first.candidate, second.candidate):
            compared = self._measure(second, sample, Expectation(of_columns=factors))
            if is_suspicious(compared):
                continue
            rescaled = replace(expectation, of_rows=gains)
            own = self._measure(first, list(self._blocks(first, deep=False)), rescaled)
            if is_suspicious(own):
                return None
            votes = [(change.name, explained)] if change is not None else []
            columns = narrow[0].source.shape[1]
            outcome = CoupleOutcome(
                first=own, second=compared, gains=gains, columns=columns, votes=votes
            )
            return outcome if outcome.is_rescaled else None
        return None

    def examine_kept(self, kept: Kept) -> Outcome:
        """Look at a tensor that was to be left alone."""
        was = self._source.weights.tensors[kept.source_name]
        is_now = self._candidate.weights.tensors[kept.candidate_name]
        outcome = Outcome(name=kept.candidate_name, group=kept.kind, size_bytes=is_now.size_bytes)
        if identity.any_non_finite(
            self._candidate, kept.candidate_name
        ) and not identity.any_non_finite(self._source, kept.source_name):
            outcome.found.append(("non_finite_weight", kept.candidate_name))
            return outcome
        if math.prod(was.shape) != math.prod(is_now.shape):
            return outcome
        if self._transformed or not identity.comparable(was.dtype, is_now.dtype):
            reason = "rotated" if self._transformed else f"{was.dtype} is now {is_now.dtype}"
            outcome.found.append(("not_measured", f"{kept.candidate_name} ({reason})"))
            return outcome
        outcome.altered = identity.differs(
            self._source, kept.source_name, self._candidate, kept.candidate_name, deep=self._deep
        )
        if len(is_now.shape) == 1 and outcome.altered:
            self._explain_vector(kept, outcome)
        if len(is_now.shape) == 2 and was.shape == is_now.shape:
            self._explain_matrix(kept, was, is_now, outcome)
        return outcome

    def _explain_vector(self, kept: Kept, outcome: Outcome) -> None:
        """Tell a norm that was rounded once more from what only its readers may explain."""
        names = (self._source, kept.source_name, self._candidate, kept.candidate_name)
        if identity.is_rounded_again(*names):
            outcome.altered = False
            outcome.found.append(("rounded_again", kept.candidate_name))
        else:
            outcome.vector = kept

    def _explain_matrix(self, kept: Kept, was: Tensor, is_now: Tensor, outcome: Outcome) -> None:
        """Tell whether a matrix that is kept was smoothed, or should have been and was not."""
        pair = _as_pair(kept, was, is_now)
        if pair is None:
            return
        change = self._change(pair)
        if not outcome.altered:
            if change is not None:
                outcome.votes.append((change.name, False))
            return
        couple = couple_of(pair.candidate.module, None)
        if change is None and couple is None:
            return
        self._compare(pair, list(self._blocks(pair, deep=False)), outcome)
        outcome.pair, outcome.compared, outcome.couple = pair, None, couple
        if any(explained for _, explained in outcome.votes):
            outcome.altered, outcome.couple = False, None

    def _blocks(self, pair: Pair, *, deep: bool) -> Iterator[Block]:
        grid = self._grid(pair, deep=deep)
        return self._read(pair, grid if deep else [*grid, *self._extremes(pair, grid)])

    def _extremes(
        self, pair: Pair, grid: list[tuple[slice, slice]]
    ) -> Iterator[tuple[slice, slice]]:
        """Yield blocks at the largest and the smallest scale, which a sample may miss."""
        stored = pair.candidate
        rows, columns = stored.shape
        seen = sum((r.stop - r.start) * (c.stop - c.start) for r, c in grid)
        if seen >= rows * columns:
            return
        height, step = self._steps(pair)
        width = max(1, comparison.BLOCK_ELEMENTS // height // step) * step
        if stored.layout.group_size(stored.parts, stored.shape) is None:
            # The largest number of a whole row decides its one scale.
            width = columns
            if height * width > comparison.BLOCKS_SAMPLED * comparison.BLOCK_ELEMENTS:
                return
        reader = StoredReader(self._candidate, stored)
        for part in stored.layout.scales(stored.parts):
            tensor = stored.parts[part]
            # E4M3 ends at 448: what is too large there is as large as the largest good ones.
            if rows == 1 or tensor.shape[:1] != (rows,) or tensor.dtype == "F8_E4M3":
                continue
            # Bytes of exponents are in the order of their values.
            values = reader(part).reshape(rows, -1)
            for place in {int(values.argmax()), int(values.argmin())}:
                row, group = divmod(place, values.shape[1])
                top = row // height * height
                left = group * (columns // values.shape[1]) // step * step
                yield (
                    slice(top, min(top + height, rows)),
                    slice(left, min(left + width, columns)),
                )

    def _steps(self, pair: Pair) -> tuple[int, int]:
        """Return what rows and columns of a block must be multiples of."""
        stored, source = pair.candidate, pair.source
        group = stored.layout.group_size(stored.parts, stored.shape)
        rows, columns = (
            math.lcm(ours, theirs)
            for ours, theirs in zip(stored.layout.step, source.layout.step, strict=True)
        )
        if not _has_blocks_of_scales(stored) and not _has_blocks_of_scales(source):
            rows = min(rows, _ROWS_IN_A_WORD)
        if group and group <= _LARGEST_GROUP:
            columns = math.lcm(columns, group)
        return rows, columns

    def _source_blocks(self, pair: Pair) -> Iterator[Block]:
        """Yield all blocks of the source, as if the candidate were the same."""
        fetch = StoredReader(self._source, pair.source)
        factors = self._column_scale(pair.candidate)
        for rows, columns in self._grid(pair, deep=True):
            x = _values(pair.source, fetch, rows, columns)
            if factors is not None:
                x = x / factors[columns]
            yield Block(rows=rows, columns=columns, source=x, candidate=x)

    def _column_scale(self, stored: Stored) -> Values | None:
        if _COLUMN_SCALE not in stored.layout.scales(stored.parts):
            return None
        factors: Values = StoredReader(self._candidate, stored)(_COLUMN_SCALE).reshape(-1)
        return factors

    def _grid(self, pair: Pair, *, deep: bool) -> list[tuple[slice, slice]]:
        stored, source = pair.candidate, pair.source
        return comparison.block_grid(
            stored.shape,
            self._steps(pair),
            by_columns=_lies_by_columns(stored) or _lies_by_columns(source),
            whole_rows=stored.layout.group_size(stored.parts, stored.shape) is None,
            deep=deep,
        )

    def _columns(self, pair: Pair) -> Iterator[Block]:
        """Yield blocks of all rows and the first columns."""
        stored = pair.candidate
        step = math.lcm(stored.layout.step[1], pair.source.layout.step[1])
        width = min(stored.shape[1], math.ceil(_COLUMNS_FOR_GAINS / step) * step)
        height = math.lcm(stored.layout.step[0], pair.source.layout.step[0], 128)
        grid = [
            (slice(row, min(row + height, stored.shape[0])), slice(0, width))
            for row in range(0, stored.shape[0], height)
        ]
        return self._read(pair, grid)

    def _read(self, pair: Pair, grid: Iterable[tuple[slice, slice]]) -> Iterator[Block]:
        stored, source = pair.candidate, pair.source
        fetch = StoredReader(self._candidate, stored)
        fetch_source = StoredReader(self._source, source)
        factors = self._column_scale(stored)
        for rows, columns in grid:
            x = _values(source, fetch_source, rows, columns)
            y = _values(stored, fetch, rows, columns)
            if factors is not None:
                x, y = x / factors[columns], y / factors[columns]
            yield Block(rows=rows, columns=columns, source=x, candidate=y)

    def _hollow(self, pair: Pair, sample: list[Block]) -> str | None:
        """Return the kind of finding for a matrix that is zero or constant throughout."""
        if all(not block.candidate.any() for block in sample):
            blocks = self._blocks(pair, deep=True)
            is_zero = source_zero = True
            for block in blocks:
                is_zero = is_zero and not block.candidate.any()
                source_zero = source_zero and not block.source.any()
            if is_zero:
                return "zero_in_source" if source_zero else "zero_weight"
        elif self._is_constant(pair.candidate) and not _constant(b.source for b in sample):
            return "constant_weight"
        return None

    def _is_constant(self, stored: Stored) -> bool:
        """Tell whether all bytes of the weight are the same."""
        part = max(stored.parts, key=lambda name: stored.parts[name].size_bytes)
        reader = StoredReader(self._candidate, stored)
        shape = stored.parts[part].shape
        if len(shape) != 2 or shape[0] < 2:
            return _constant([reader.raw(part)])
        ends = (slice(0, 1), slice(shape[0] - 1, shape[0]), slice(0, shape[0]))
        return all(_constant([reader.raw(part, rows)]) for rows in ends)

    def _examine_zero_scales(self, pair: Pair, parts: tuple[str, ...], outcome: Outcome) -> None:
        """Tell scales of 0 where the source has nothing from those that lost something."""
        stored = pair.candidate
        group = stored.layout.group_size(stored.parts, stored.shape) or 1
        largest = AS_IT_WAS.largest(self._source_blocks(pair))
        lost = 0
        for block in self._blocks(pair, deep=True):
            nearest = comparison.nearest(stored.layout, stored.parts, block.source, largest)
            starts = np.arange(0, block.source.shape[1], group)
            is_empty = ~np.logical_or.reduceat(block.candidate != 0, starts, axis=1)
            was_empty = ~np.logical_or.reduceat(nearest != 0, starts, axis=1)
            lost += int(np.count_nonzero(is_empty & ~was_empty))
        if lost:
            outcome.found += [("zero_scale", named(stored, part)) for part in parts]

    def _lone_scales(self, stored: Stored) -> Iterator[float]:
        """Yield the scales that there is one of for the whole matrix."""
        reader = StoredReader(self._candidate, stored)
        for part in stored.layout.scales(stored.parts):
            tensor = stored.parts[part]
            if math.prod(tensor.shape) == 1 and tensor.dtype in identity.FLOATS:
                yield float(reader(part).reshape(()))

    def _note_weight_scales(self, pair: Pair, sample: list[Block], outcome: Outcome) -> None:
        stored = pair.candidate
        for part in stored.layout.scales(stored.parts):
            if math.prod(stored.parts[part].shape) == 1:
                largest = AS_IT_WAS.largest(sample)
                weight = math.log2(largest) if 0 < largest < math.inf else 0.0
                self._note_expert_scale(stored, part, weight, outcome)

    def _note_expert_scale(
        self, stored: Stored, part: str, weight: float | None, outcome: Outcome
    ) -> None:
        """Note the lone scale of an expert, to be compared with the other experts'."""
        place = expert_place(stored)
        if place is None or stored.parts[part].dtype not in identity.FLOATS:
            return
        value = scales.log2_of(StoredReader(self._candidate, stored)(part))
        if value is not None:
            outcome.expert_scales.append(
                scales.ExpertScale(
                    place=f"{place}.{part}", name=named(stored, part), scale=value, weight=weight
                )
            )


_COLUMN_SCALE = "pre_quant_scale"
"""Factors that inputs are multiplied with first, kept beside a smoothed weight."""


def named(stored: Stored, part: str | None = None) -> str:
    """Return the name of a matrix, or of a tensor of it; with the expert if it is one of many."""
    name = stored.module if part is None else stored.tensors[part]
    return name if stored.expert is None else f"{name} (expert {stored.expert})"


def _is_plausible(values: np.ndarray) -> bool:
    """Tell whether activations may lead to these input scales; 0 and NaN are judged elsewhere."""
    sound = np.isfinite(values) & (values != 0)
    sizes = np.abs(values[sound].astype(np.float64))
    return bool(((sizes > INPUT_SCALES[0]) & (sizes < INPUT_SCALES[1])).all())


def flaws(name: str, counts: scales.ScaleCounts) -> Iterator[tuple[str, str]]:
    """Yield the findings about a scale for which zero is never right."""
    if counts.non_finite:
        yield "non_finite_scale", name
    if counts.negative:
        yield "negative_scale", name + counts.remark(counts.negative)
    if counts.zero:
        yield "zero_scale", name + counts.remark(counts.zero)


def expert_place(stored: Stored) -> str | None:
    """Return what the same projection of all experts of a layer is called, without a number."""
    before, found, after = stored.module.rpartition(".experts.")
    if not found:
        return None
    number, _, rest = after.partition(".")
    if number.isdecimal():
        return f"{before}.experts.{rest}"
    return None if stored.expert is None else f"{stored.module}[{stored.first_row}]"


def is_far(compared: Comparison, share: float = 1.0) -> bool:
    """Tell whether a matrix is further from what is expected than a share of the limits."""
    return (
        compared.shortfall_db > SQNR_SHORTFALL_DB * share
        or compared.gain_error_percent > GAIN_ERROR_PERCENT * share
        or compared.gain_scatter > GAIN_SCATTER * share
    )


def is_suspicious(compared: Comparison) -> bool:
    """Tell whether a matrix is far enough from what is expected to look closer."""
    return is_far(compared, _WORTH_A_SECOND_LOOK)


def _choose(blocks: list[Block], change: NormChange, rows: int | None) -> tuple[Expectation, bool]:
    """Return what explains a reader of a changed norm, and whether the change does.

    With ``rows``, each row may have a factor of its own. Only columns that the change concerns
    are looked at.
    """

    def error(expectation: Expectation) -> float:
        if rows is not None:
            gains = comparison.row_gains(blocks, rows, expectation)
            expectation = replace(expectation, of_rows=gains)
        errors = comparison.column_errors(blocks, expectation, concerned.size)
        return float(errors[concerned].sum())

    concerned = change.factors[0] != 1
    count = sum(len(b.candidate) * np.count_nonzero(concerned[b.columns]) for b in blocks)
    explanations = [Expectation(of_columns=factors) for factors in change.factors]
    left = [error(each) for each in explanations]
    least = min(left)
    if count and least * (1 + _SURE / count) < error(AS_IT_WAS):
        return explanations[left.index(least)], True
    return AS_IT_WAS, False


def _as_pair(kept: Kept, was: Tensor, is_now: Tensor) -> Pair | None:
    """Return a kept weight matrix as a pair; ``None`` for what is no plain linear."""
    suffix = ".weight"
    if not (kept.candidate_name.endswith(suffix) and kept.source_name.endswith(suffix)):
        return None
    if PLAIN.shape({"weight": was}) is None or PLAIN.shape({"weight": is_now}) is None:
        return None
    stored = (
        Stored(
            module=name.removesuffix(suffix),
            layout=PLAIN,
            parts={"weight": tensor},
            tensors={"weight": name},
            shape=(tensor.shape[0], tensor.shape[1]),
            expert=None,
            turned=False,
        )
        for name, tensor in ((kept.source_name, was), (kept.candidate_name, is_now))
    )
    return Pair(kind=kept.kind, source=next(stored), candidate=next(stored), scheme=UNDECLARED)


def _values(stored: Stored, fetch: StoredReader, rows: slice, columns: slice) -> Values:
    """Return a block of the dequantized matrix."""
    # Scales may hold anything: what is no number is found out by what comes of it.
    with np.errstate(all="ignore"):
        return stored.layout.read(stored.parts, fetch, rows, columns)


def _has_blocks_of_scales(stored: Stored) -> bool:
    """Tell whether one scale is for several rows and not for all of them."""
    if stored.layout.group_size(stored.parts, stored.shape) is not None:
        return False
    shapes = (stored.parts[part].shape for part in stored.layout.scales(stored.parts))
    return any(len(shape) > 1 and shape[0] > 1 and math.prod(shape[1:]) > 1 for shape in shapes)


def _lies_by_columns(stored: Stored) -> bool:
    """Tell whether columns lie together in the file, as those of AWQ and GPTQ do."""
    return stored.turned != ("qweight" in stored.parts)


def _size_bytes(stored: Stored) -> int:
    return sum(tensor.size_bytes for tensor in stored.parts.values())


def _constant(values: Iterable[np.ndarray]) -> bool:
    """Tell whether arrays hold one value throughout."""
    ends = [(each.min(), each.max()) for each in values if each.size]
    return bool(ends) and min(low for low, _ in ends) == max(high for _, high in ends)
