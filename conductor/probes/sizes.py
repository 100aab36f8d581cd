"""Predict a candidate's size from its source and recipe, and measure the bits of its weights.

Predictions count the source's weights, not its bytes, so they hold for sources that are quantized
themselves. Invariant: a candidate that follows the recipe lies in the range, whatever its exporter
makes of what the recipe leaves alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

from conductor.probes.completeness import is_computed
from conductor.probes.contents import Contents, Form, Matrix
from conductor.probes.matching import Case, Match
from conductor.probes.modules import Names
from gates.criteria import (
    BYTES_PER_COLUMN,
    BYTES_PER_MATRIX,
    BYTES_PER_ROW,
    MODULE_KINDS,
    SCALE_WIDENING,
    SIZE_TOLERANCE,
    STORED_AGAIN,
    Recipe,
)

EXPANDED_BYTES = 2
"""Bytes of a weight of a quantized source that an exporter writes in 16 bits."""

Range = tuple[float, float]
"""The least and the most bytes."""


class Census:
    """How many modules of a source there are of each case; a few dozen rows for any model."""

    def __init__(self, matches: list[Match]) -> None:
        """Count every module of the source once."""
        self.rows: Counter[Case] = Counter()
        seen = ""
        for match in matches:
            # Matches of one module follow each other; a tied head is no module of the source.
            if match.source == seen or match.is_tied_head:
                continue
            seen = match.source
            self.rows[match.case] += 1

    def precision(self) -> str | None:
        """Name the precision that most weights of the decoder layers are in."""
        weights: Counter[str] = Counter()
        for case, count in self.rows.items():
            if case.matrix is not None and case.traits.kind in MODULE_KINDS:
                weights[case.matrix.precision] += count * case.matrix.weights
        return max(weights, key=lambda name: weights[name]) or None if weights else None

    def weights_by_kind(self) -> Counter[str]:
        """Count the weights of each kind of module, however they are stored."""
        weights: Counter[str] = Counter()
        for case, count in self.rows.items():
            weights[case.traits.kind] += count * _logical_weights(case.matrix, case.before)
        return weights

    def expected_bytes(
        self,
        recipe: Recipe,
        *,
        tied: bool,
        quantized_beside: Collection[Case] = (),
        finest_group: int | None = None,
    ) -> list[int]:
        """Return the least and the most bytes that the recipe can make of this source.

        Matrices that the recipe means take its ``weight_bits``, at most widened by
        ``SCALE_WIDENING`` and what a matrix stores beside its weights. Everything else stays,
        within ``STORED_AGAIN``, or is expanded to 16 bits. The scales of a quantized source may
        go; a model with tied embeddings may store its head or not. ``quantized_beside`` need no
        more than they take, and ``finest_group`` may make for more scales than the recipe's groups.
        """
        widening = SCALE_WIDENING.get(recipe.bucket, 1.0)
        if recipe.group_size and finest_group:
            widening *= max(recipe.group_size / finest_group, 1.0)
        low = high = 0.0
        has_head = any(case.traits.kind == "lm_head" for case in self.rows)
        for case, count in self.rows.items():
            kind = case.traits.kind
            least, most = _expected(case, recipe, widening)
            if case in quantized_beside and case.after is not None:
                least = min(least, case.after.size_bytes)
            low += 0.0 if tied and kind == "lm_head" else count * least
            high += count * most
            if tied and not has_head and kind == "embeddings":
                high += count * most
        return [
            max(1, math.floor(low * (1 - SIZE_TOLERANCE))),
            max(1, math.ceil(high * (1 + SIZE_TOLERANCE))),
        ]


def _logical_weights(matrix: Matrix | None, form: Form) -> int:
    if matrix is None:
        return sum(
            math.prod(tensor.shape)
            for part, tensor in form.parts.items()
            if not is_computed(part, tensor)
        )
    bias = form.parts.get("bias")
    return matrix.weights + (math.prod(bias.shape) if bias is not None else 0)


def _expected(case: Case, recipe: Recipe, widening: float) -> Range:
    matrix, form = case.matrix, case.before
    meant = matrix is not None and recipe.means(case.traits.kind)
    least = most = 0.0
    for part, tensor in form.parts.items():
        if is_computed(part, tensor) and (case.after is None or part not in case.after.parts):
            continue
        is_own = part == "weight" if matrix is None or matrix.is_plain else part != "bias"
        if matrix is None or not is_own or (matrix.is_plain and not meant):
            part_least, part_most = STORED_AGAIN.get(tensor.dtype, (1.0, 1.0))
            least += tensor.size_bytes * part_least
            most += tensor.size_bytes * part_most
    if matrix is not None and meant:
        matrix_least, matrix_most = _quantized(matrix, recipe, widening)
        return least + matrix_least, most + matrix_most
    if matrix is not None and not matrix.is_plain:
        stored = {name: t.size_bytes for name, t in form.parts.items() if name != "bias"}
        least += max(stored.values())
        most += max(sum(stored.values()), matrix.weights * EXPANDED_BYTES)
    return least, most


def _quantized(matrix: Matrix, recipe: Recipe, widening: float) -> Range:
    """Return the bytes of a matrix that the recipe means; whole rows are the least of scales.

    Rows are left whole where the recipe's groups do not divide them.
    """
    scale_bits = recipe.weight_bits - recipe.bits
    least_bits, most_bits = recipe.weight_bits, recipe.bits + scale_bits * widening
    if recipe.group_size and matrix.columns % recipe.group_size:
        least_bits = recipe.bits
    beside = matrix.rows * BYTES_PER_ROW + matrix.projections * (
        matrix.columns * BYTES_PER_COLUMN + BYTES_PER_MATRIX
    )
    return (
        matrix.weights * least_bits / 8,
        matrix.weights * most_bits / 8 + max(matrix.experts, 1) * beside,
    )


def _computed_bytes(form: Form) -> int:
    return sum(t.size_bytes for part, t in form.parts.items() if is_computed(part, t))


def bits_per_weight(
    census: Census, candidate: Contents, names: Names, matches: list[Match]
) -> dict[str, float]:
    """Return the bits that the candidate stores for each weight, overall and by module kind.

    Weights are those that the source has, however either side stores them.
    """
    weights = census.weights_by_kind()
    kinds = {match.candidate: match.case.traits.kind for match in matches}
    sizes = {form: form.size_bytes - _computed_bytes(form) for form in candidate.distinct_forms}
    stored: Counter[str] = Counter()
    for module, form in candidate.forms.items():
        stored[kinds.get(module) or names.traits(module).kind] += sizes[form]
    overall = stored.total() * 8 / max(weights.total(), 1)
    return {
        "overall": round(overall, 3),
        **{
            kind: round(stored[kind] * 8 / count, 3)
            for kind, count in sorted(weights.items())
            if count
        },
    }
