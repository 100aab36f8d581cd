"""Tell whether tensors that were to be left alone still are what the source has.

Tensors of one type are compared byte by byte; one that was written in another floating-point type
must hold the source's numbers, rounded to nearest even. Small tensors are compared whole, large
ones in pieces spread from first to last byte, all of them where asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from conductor.probes.safetensors_header import DTYPE_BITS
from conductor.probes.values.tensor_files import CHUNK_BYTES, Bytes, TensorFiles, seen_as

SMALL_BYTES = 64 << 10
"""Tensors up to this size are compared whole."""

PIECE_BYTES = 4096
PIECES = 8

FLOATS = ("BF16", "F16", "F32", "F64")

_FIRST_NON_FINITE = {
    "F64": ("u8", 0x7FF0 << 48),
    "F32": ("u4", 0x7F80 << 16),
    "F16": ("u2", 0x7C00),
    "BF16": ("u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
}
"""Unsigned type of the same width, and the least bits that are no number, for each type.

Ordered as integers the bits of floating-point numbers are ordered like the numbers, infinity and
NaN last: the largest of them tells, once for each sign, faster than a look at each.
"""

Values = NDArray[np.float32]


def holds_non_finite(dtype: str, stored: Bytes) -> bool:
    """Tell whether bytes of a tensor hold NaN or infinity; types without either do not."""
    if not stored.size:
        return False
    if dtype == "F8_E8M0":
        return bool(stored.max() == 0xFF)
    if dtype not in _FIRST_NON_FINITE:
        return False
    name, first = _FIRST_NON_FINITE[dtype]
    bits = stored.view(f"<{name}")
    sign = 1 << (bits.dtype.itemsize * 8 - 1)
    positive = bits.view(f"<i{bits.dtype.itemsize}")
    return bool(int(positive.max()) >= first or int(bits.max()) >= sign + first)


def any_non_finite(files: TensorFiles, name: str) -> bool:
    """Tell whether a tensor holds NaN or infinity anywhere."""
    dtype = files.weights.tensors[name].dtype
    if dtype not in _FIRST_NON_FINITE and dtype != "F8_E8M0":
        return False
    return any(holds_non_finite(dtype, chunk) for chunk in files.chunks(name))


def comparable(source_dtype: str, dtype: str) -> bool:
    """Tell whether tensors of these types can be held against each other."""
    return source_dtype == dtype or (source_dtype in FLOATS and dtype in FLOATS)


def differs(
    source: TensorFiles, source_name: str, candidate: TensorFiles, name: str, *, deep: bool
) -> bool:
    """Tell whether a tensor has other values than the source's, in as many elements and a type
    that can be compared.
    """
    was, is_now = source.weights.tensors[source_name], candidate.weights.tensors[name]
    was_width, width = DTYPE_BITS[was.dtype], DTYPE_BITS[is_now.dtype]
    count = is_now.size_bytes * 8 // width
    for begin, end in _pieces(count, max(width, was_width), deep=deep):
        theirs = source.read(source_name, begin * was_width // 8, -(-end * was_width // 8))
        ours = candidate.read(name, begin * width // 8, -(-end * width // 8))
        if was.dtype == is_now.dtype:
            if not np.array_equal(theirs, ours):
                return True
        elif not _same_values(
            seen_as(was.dtype, theirs), seen_as(is_now.dtype, ours), is_now.dtype
        ):
            return True
    return False


def is_rounded_again(
    source: TensorFiles, source_name: str, candidate: TensorFiles, name: str
) -> bool:
    """Tell whether a norm is the source's but for adding one and taking it away.

    Some models multiply with one more than what they store. An exporter that computes with the sum
    rounds it to the type, and what it stores once more.
    """
    was, is_now = source.weights.tensors[source_name], candidate.weights.tensors[name]
    if not name.endswith("norm.weight") or {was.dtype, is_now.dtype} - set(FLOATS):
        return False
    dtype = is_now.dtype
    raised = rounded(rounded(source.elements(source_name), dtype) + 1, dtype)
    return np.array_equal(rounded(raised - 1, dtype), candidate.elements(name))


def _pieces(count: int, width: int, *, deep: bool) -> Iterator[tuple[int, int]]:
    """Yield ranges of elements to compare, in order."""
    if deep or count * width // 8 <= SMALL_BYTES:
        step = CHUNK_BYTES * 8 // width
        for begin in range(0, count, step):
            yield begin, min(begin + step, count)
        return
    length = PIECE_BYTES * 8 // width
    for index in range(PIECES):
        begin = (count - length) * index // (PIECES - 1) // 8 * 8
        yield begin, count if index == PIECES - 1 else begin + length


def _same_values(theirs: Values, ours: Values, dtype: str) -> bool:
    expected = rounded(theirs.astype(np.float32, copy=False), dtype)
    return bool(np.array_equal(expected, ours.astype(np.float32, copy=False), equal_nan=True))


def rounded(values: Values, dtype: str) -> Values:
    """Return 32-bit floats rounded to the nearest numbers of a type, ties to even."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype != "BF16":
        return values
    bits = values.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    nearest &= np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), nearest.view(np.float32), values)
