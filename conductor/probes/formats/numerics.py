"""The small number formats that weights and scales are stored in, as arrays.

Element tables follow the OCP formats E4M3 (bias 7, no infinity, NaN at 0x7F and 0xFF), E2M1 and
E8M0 (2 to the byte less 127, NaN at 0xFF). Everything returned is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Stored = NDArray[Any]

E4M3_LARGEST = 448.0
E2M1_LARGEST = 6.0


@dataclass(frozen=True, kw_only=True)
class SmallFloat:
    """A floating-point format: bits of its mantissa, its smallest exponent, its largest number."""

    mantissa_bits: int
    smallest_exponent: int
    largest: float

    def round(self, values: Values) -> Values:
        """Return the nearest numbers of the format, ties to even; what is too large saturates.

        Adding and subtracting 1.5 x 2^(23 - mantissa bits) times a number's own power of two
        leaves the addition of 32-bit floats to round it where the format does.
        """
        clipped = np.clip(values, -self.largest, self.largest).astype(np.float32, copy=False)
        magnitude = np.maximum(np.abs(clipped), np.float32(2.0**self.smallest_exponent))
        powers = _powers(magnitude)
        powers *= np.float32(1.5 * 2 ** (23 - self.mantissa_bits))
        clipped += powers
        clipped -= powers
        return clipped


E4M3 = SmallFloat(mantissa_bits=3, smallest_exponent=-6, largest=E4M3_LARGEST)
E2M1 = SmallFloat(mantissa_bits=1, smallest_exponent=0, largest=E2M1_LARGEST)


@cache
def e4m3_values() -> Values:
    """Return the number of each of the 256 bytes."""
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3) & 0xF, codes & 7
    normal = (1 + mantissas / 8) * 2.0 ** (exponents - 7)
    magnitudes = np.where(exponents > 0, normal, mantissas / 8 * 2.0**-6)
    magnitudes[[0x7F, 0xFF]] = np.nan
    return _frozen(np.where(codes & 0x80, -magnitudes, magnitudes))


@cache
def e8m0_values() -> Values:
    """Return the power of two of each of the 256 bytes."""
    values = 2.0 ** (np.arange(256) - 127)
    values[0xFF] = np.nan
    return _frozen(values)


@cache
def e2m1_pairs() -> Values:
    """Return the two numbers of each of the 256 bytes, [256, 2], low nibble first."""
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([positive, -positive])
    codes = np.arange(256)
    return _frozen(np.stack([values[codes & 0xF], values[codes >> 4]], axis=1))


@cache
def signed_nibble_pairs() -> Values:
    """Return the two numbers in two's complement of each of the 256 bytes, low nibble first."""
    codes = np.arange(256)
    nibbles = np.stack([codes & 0xF, codes >> 4], axis=1)
    return _frozen(np.where(nibbles < 8, nibbles, nibbles - 16))


def power_of_two(values: Values) -> Values:
    """Return the largest power of two that each positive value reaches, 1 for 0."""
    powers = _powers(values)
    return np.where(powers == 0, np.float32(1), powers)


def _powers(values: Values) -> Values:
    """Return the exponent of each number alone, as the power of two it stands for."""
    return (values.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)


@cache
def offset_nibble_pairs() -> Values:
    """Return the two numbers, stored with 8 added, of each of the 256 bytes, low nibble first."""
    codes = np.arange(256)
    return _frozen(np.stack([codes & 0xF, codes >> 4], axis=1) - 8)


def look_up(table: Values, codes: Stored) -> Values:
    """Return the number of each byte."""
    return table.take(codes, mode="clip")


def unpack_columns(pairs: Values, stored: Stored) -> Values:
    """Return bytes [r, c] as the numbers [r, 2c] that a table of pairs gives them."""
    return _look_up_pairs(pairs, stored).view(np.float32)


def unpack_rows(pairs: Values, stored: Stored) -> Values:
    """Return bytes [r, c] as numbers [2r, c]: each byte holds two rows of a column."""
    rows, columns = stored.shape
    numbers = _look_up_pairs(pairs, stored).view(np.float32).reshape(rows, columns, 2)
    return numbers.transpose(0, 2, 1).reshape(2 * rows, columns)


def _look_up_pairs(pairs: Values, stored: Stored) -> Stored:
    """Return pairs as one element of 64 bits each, which are looked up in half the time."""
    return pairs.view(np.uint64).reshape(-1).take(stored, mode="clip")


def bytes_of(words: Stored) -> Stored:
    """Return 32-bit words [r, w] as bytes [r, 4w], the lowest first."""
    return np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)


def unpack_words(words: Stored, bits: int) -> Stored:
    """Return 32-bit words [r, w] as unsigned numbers of ``bits`` bits, uint8 [r, 32 w / bits].

    The numbers lie without gaps, the lowest bits first, and may span two words.
    """
    stored = bytes_of(words)
    if bits == 8:
        return stored
    rows = stored.shape[0]
    every = np.unpackbits(stored, axis=1, bitorder="little")
    count = every.shape[1] // bits
    weights = (1 << np.arange(bits)).astype(np.uint8)
    numbers = every[:, : count * bits].reshape(rows, count, bits) @ weights
    return numbers.astype(np.uint8)


def _frozen(values: NDArray[Any]) -> Values:
    """Return a table as float32 that nobody can change."""
    table = values.astype(np.float32)
    table.setflags(write=False)
    return table
