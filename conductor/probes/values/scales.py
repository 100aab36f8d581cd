"""Look at every scale of a quantized checkpoint: numbers that are none, negative or zero.

Scales are small beside the weights, and one bad one ruins a row, a layer or all that follows it.
So all of them are read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from conductor.probes.findings import Measurements
from conductor.probes.values.identity import holds_non_finite
from conductor.probes.values.tensor_files import StoredReader, TensorFiles, seen_as

if TYPE_CHECKING:
    from conductor.probes.pairs import Stored

_MINUS_ZERO = 0x80
_FIRST_NO_NUMBER = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7D}
"""Least byte, but for the sign, that is NaN in each type of signed bytes."""
_POWERS_OF_TWO = ("MXFP4", "MXFP8")
"""Precisions whose scales are exponents, also where their type says bytes only."""
_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(kw_only=True, slots=True)
class ScaleCounts:
    """What a scale tensor holds that it should not, and how many numbers it has in all."""

    total: int = 0
    non_finite: bool = False
    negative: int = 0
    zero: int = 0

    def add(self, dtype: str, stored: NDArray[np.uint8]) -> None:
        """Count the bytes of some of its elements."""
        if not stored.size:
            return
        self.non_finite = self.non_finite or holds_non_finite(dtype, stored)
        if dtype in _FIRST_NO_NUMBER:
            self.total += stored.size
            if stored.max() > _MINUS_ZERO:
                is_number = (stored & 0x7F) < _FIRST_NO_NUMBER[dtype]
                self.negative += int(np.count_nonzero((stored > _MINUS_ZERO) & is_number))
            if stored.min() == 0 or stored.max() >= _MINUS_ZERO:
                self.zero += int(np.count_nonzero((stored & 0x7F) == 0))
        elif dtype in _FLOATS:
            values = seen_as(dtype, stored)
            self.total += values.size
            if not values.min() > 0:
                self.negative += int(np.count_nonzero(values < 0))
                self.zero += int(np.count_nonzero(values == 0))
        else:
            # Powers of two in a byte have neither sign nor zero; absolute maxima may be indices.
            self.total += stored.size

    def remark(self, count: int) -> str:
        """Say how many of how many, where there is more than one."""
        return f" ({count} of {self.total})" if self.total > 1 else ""


def count_part(reader: StoredReader, stored: Stored, part: str) -> ScaleCounts:
    """Look at all elements that a matrix has of one part."""
    dtype = stored.parts[part].dtype
    is_exponent = dtype == "U8" and stored.layout.precision in _POWERS_OF_TWO
    counts = ScaleCounts()
    for chunk in reader.chunks(part):
        counts.add("F8_E8M0" if is_exponent else dtype, chunk)
    return counts


def count_tensor(files: TensorFiles, name: str) -> ScaleCounts:
    """Look at all elements of a tensor."""
    counts = ScaleCounts()
    for chunk in files.chunks(name):
        counts.add(files.weights.tensors[name].dtype, chunk)
    return counts


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertScale:
    """One scale of one expert, log2, with the log2 of its source's largest weight if it matters.

    ``place`` is what it is compared within: the projection of all experts of one layer.
    """

    place: str
    name: str
    scale: float
    weight: float | None


@dataclass(kw_only=True)
class ExpertScales:
    """Collects the scales of experts, to compare each with the others of its layer."""

    _by_place: dict[tuple[str, str], list[ExpertScale]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, group: str, scale: ExpertScale) -> None:
        """Note one scale of one expert."""
        self._by_place[group, scale.place].append(scale)

    def measure(self, measurements: Measurements) -> None:
        """Measure how far each scale is from the median of its place, in octaves.

        Scales of weights follow the largest weight, or its inverse: what the source explains is
        no distance.
        """
        for (group, _), scales in self._by_place.items():
            if len(scales) < _FEWEST:
                continue
            middle = float(np.median([each.scale for each in scales]))
            weights = [each.weight for each in scales if each.weight is not None]
            middle_weight = float(np.median(weights)) if weights else 0.0
            for each in scales:
                distance = each.scale - middle
                away = abs(distance)
                if each.weight is not None:
                    own = each.weight - middle_weight
                    away = min(abs(distance - own), abs(distance + own))
                ratio = f"{2**distance:.3g} times the median of {len(scales)} experts"
                measurements.add("expert_scale_octaves", group, each.name, away, ratio)


_FEWEST = 3
"""Scales from which one can be told to be the odd one out."""


def log2_of(values: NDArray[Any]) -> float | None:
    """Return the log2 of a lone positive number; ``None`` for anything else."""
    if values.size != 1:
        return None
    value = float(values.reshape(-1)[0])
    return math.log2(value) if 0 < value < math.inf else None
