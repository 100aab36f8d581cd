"""Arithmetic on scores: the units they are in, and differences that are exact.

Scores arrive as floats that were written in decimal, so they are subtracted in decimal: 0.70 to
0.69 is a drop of 0.01 and not of 0.010000000000000009, and 70 to 69 gets the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from gates.criteria import LARGEST_GUESSED_SCALE, UNIT_MIXUP_RATIOS


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The full score of a task, and whether somebody said so."""

    full: float
    declared: bool


def scale_of(task: str, scores: tuple[float, ...], declared: Mapping[str, float]) -> Scale:
    """Return the declared scale, or guess it: 1 if every score fits in 0 to 1, else 100."""
    if task in declared:
        return Scale(full=declared[task], declared=True)
    fits = all(0.0 <= score <= 1.0 for score in scores)
    return Scale(full=1.0 if fits else LARGEST_GUESSED_SCALE, declared=False)


def units_differ(first: float, second: float, scale: Scale) -> bool:
    """Tell whether two scores of one task look like a fraction beside a percentage.

    Zero is zero in both units. Without a declared scale any score up to 1 beside one above 1 could
    be either, so the pair is not read at all; with one, only a ratio around 100 gives it away.
    """
    small, large = sorted((first, second))
    if not 0.0 < small <= 1.0 < large:
        return False
    low, high = UNIT_MIXUP_RATIOS
    return not scale.declared or low <= large / small <= high


def decimal(value: float) -> Decimal:
    """Return the decimal number that a float was written as."""
    return Decimal(repr(value))
