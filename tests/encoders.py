"""Quantize weights for tests, written from the formats' definitions and from nothing of ours.

``encode`` rounds to nearest with real scales and returns tensors as they are stored: a safetensors
type and an array of the raw elements (bytes of 8-bit floats as uint8, BF16 as uint16).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Stored = tuple[str, Array]

NUMPY_TYPES: Mapping[str, str] = {
    "BOOL": "u1",
    "U8": "u1",
    "I8": "i1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "F8_E8M0": "u1",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "I32": "<i4",
    "F32": "<f4",
    "I64": "<i8",
    "F64": "<f8",
}
"""Type of the raw elements of each safetensors type."""


def write_file(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a safetensors file with the tensors' bytes."""
    header, position, blocks = {}, 0, []
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array, dtype=NUMPY_TYPES[dtype]).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + len(raw)],
        }
        position += len(raw)
        blocks.append(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.writelines(blocks)


def bf16(values: Array) -> Stored:
    """Return float32 as BF16, rounded to nearest, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return "BF16", rounded.astype(np.uint16)


def floats(stored: Stored) -> Array:
    """Return a floating-point tensor as float32."""
    dtype, array = stored
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def f32(values: Any) -> Stored:
    return "F32", np.asarray(values, np.float32)


def encode(layout: str, weight: Array, **options: Any) -> dict[str, Stored]:
    """Return the parts of a linear [rows, columns] in one of ``LAYOUTS``.

    Options, each with the default that the layout's usual exporter has:

    - ``granularity``: ``tensor``, ``channel``, ``group`` or ``block``, for integers and FP8
    - ``group``: columns per scale; ``block``: (rows, columns) per scale
    - ``symmetric``: ``False`` adds zero points (compressed-tensors integers)
    - ``bits``: of ``ct-packed``
    - ``groups``: the group of each column, out of order (``ct-packed``)
    - ``smoothing``: factor of each column that inputs are multiplied with (ModelOpt)
    - ``static``: adds the scale of the inputs
    """
    return LAYOUTS[layout](np.asarray(weight, np.float32), **options)


def _floats_of(exponent_bits: int, mantissa_bits: int, bias: int) -> Array:
    """Return the numbers that the non-negative codes of a small float stand for, in order."""
    numbers = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        power = max(exponent, 1) - bias
        numbers.append(math.ldexp(fraction + (exponent > 0), power))
    return np.array(numbers)


E2M1 = _floats_of(2, 1, 1)
E4M3 = _floats_of(4, 3, 7)[:-1]
"""Without the last code, which is no number."""


def nearest_codes(values: Array, grid: Array, sign_bit: int) -> Array:
    """Return codes of the nearest numbers of a grid, ties to the even code, with a sign bit."""
    magnitudes = np.abs(np.asarray(values, np.float64))
    middles = (grid[1:] + grid[:-1]) / 2
    below = np.searchsorted(middles, magnitudes, side="left")
    above = np.searchsorted(middles, magnitudes, side="right")
    codes = np.where(below % 2 == 0, below, above)
    return (codes | np.where(np.signbit(values), sign_bit, 0)).astype(np.uint8)


def e4m3_codes(values: Array) -> Array:
    return nearest_codes(values, E4M3, 0x80)


def e4m3_numbers(codes: Array) -> Array:
    numbers = np.append(E4M3, np.nan)[codes & 0x7F]
    return np.where(codes & 0x80, -numbers, numbers)


def pack_nibbles(codes: Array) -> Array:
    """Pack neighbours of a row into one byte, the first in the low nibble."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8)


def pack_words(numbers: Array, bits: int) -> Array:
    """Pack unsigned numbers of a row into 32-bit words without gaps, the lowest bits first."""
    words = math.ceil(numbers.shape[1] * bits / 32)
    packed = np.zeros((numbers.shape[0], words), np.uint64)
    for column in range(numbers.shape[1]):
        word, offset = divmod(column * bits, 32)
        shifted = numbers[:, column].astype(np.uint64) << np.uint64(offset)
        packed[:, word] |= shifted & np.uint64(0xFFFFFFFF)
        if offset + bits > 32:
            packed[:, word + 1] |= shifted >> np.uint64(32)
    return packed.astype(np.uint32).view(np.int32)


def _parts(weight: Array, rows: int, columns: int) -> Iterable[tuple[slice, slice]]:
    for top in range(0, weight.shape[0], rows):
        for left in range(0, weight.shape[1], columns):
            yield slice(top, top + rows), slice(left, left + columns)


def _cells(weight: Array, granularity: str, group: int, block: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of a scale."""
    rows, columns = weight.shape
    return {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, group),
        "block": block,
    }[granularity]


def _largest(weight: Array, cells: tuple[int, int]) -> Array:
    found = [np.abs(weight[part]).max() for part in _parts(weight, *cells)]
    return np.array(found).reshape(math.ceil(weight.shape[0] / cells[0]), -1)


def _everywhere(scales: Array, weight: Array, cells: tuple[int, int]) -> Array:
    spread = np.empty(weight.shape)
    for part, scale in zip(_parts(weight, *cells), scales.reshape(-1), strict=True):
        spread[part] = scale
    return spread


def _scales(largest: Array, most: float) -> Array:
    scales = largest / most
    return np.where(scales == 0, 1.0, scales)


def _nvfp4(
    weight: Array, names: tuple[str, str, str], *, divides: bool, group: int = 16
) -> dict[str, Stored]:
    cells = (1, group)
    largest = _largest(weight, cells)
    whole = np.float32(largest.max() / (6 * 448) or 1.0)
    codes = e4m3_codes(np.maximum(largest / 6 / whole, 2.0**-9))
    scales = _everywhere(e4m3_numbers(codes) * whole, weight, cells)
    packed = pack_nibbles(nearest_codes(weight / scales, E2M1, 8))
    stored_whole = f32([1 / whole]) if divides else f32(whole)
    return dict(
        zip(names, (("U8", packed), ("F8_E4M3", codes), stored_whole), strict=True),
    )


def _power_of_two_codes(largest: Array, most_exponent: int) -> Array:
    safe = np.where(largest == 0, 1.0, largest)
    exponents = np.frexp(safe)[1] - 1 - most_exponent
    return (exponents + 127).astype(np.uint8)


def _mxfp4(weight: Array, name: str) -> dict[str, Stored]:
    codes = _power_of_two_codes(_largest(weight, (1, 32)), 2)
    scales = _everywhere(2.0 ** (codes.astype(int) - 127), weight, (1, 32))
    packed = pack_nibbles(nearest_codes(weight / scales, E2M1, 8))
    return {name: ("U8", packed), "weight_scale": ("U8", codes)}


def _mxfp8(weight: Array) -> dict[str, Stored]:
    codes = _power_of_two_codes(_largest(weight, (1, 32)), 8)
    scales = _everywhere(2.0 ** (codes.astype(int) - 127), weight, (1, 32))
    return {"weight": ("F8_E4M3", e4m3_codes(weight / scales)), "weight_scale": ("U8", codes)}


def _fp8(weight: Array, granularity: str, block: tuple[int, int]) -> tuple[Array, Array]:
    cells = _cells(weight, granularity, 128, block)
    scales = _scales(_largest(weight, cells), 448)
    return e4m3_codes(weight / _everywhere(scales, weight, cells)), scales


def _input_scale(static: bool, value: float = 0.01) -> dict[str, Stored]:
    return {"input_scale": f32(value)} if static else {}


def _smoothed(weight: Array, smoothing: Array | None) -> tuple[Array, dict[str, Stored]]:
    if smoothing is None:
        return weight, {}
    stored = bf16(np.asarray(smoothing))
    return weight / floats(stored), {"pre_quant_scale": stored}


def modelopt_nvfp4(
    weight: Array, *, static: bool = True, smoothing: Array | None = None, group: int = 16
) -> dict[str, Stored]:
    weight, smooth = _smoothed(weight, smoothing)
    names = ("weight", "weight_scale", "weight_scale_2")
    return _nvfp4(weight, names, divides=False, group=group) | _input_scale(static) | smooth


def modelopt_mxfp4(weight: Array) -> dict[str, Stored]:
    return _mxfp4(weight, "weight")


def modelopt_fp8(
    weight: Array,
    *,
    granularity: str = "tensor",
    block: tuple[int, int] = (128, 128),
    static: bool | None = None,
) -> dict[str, Stored]:
    codes, scales = _fp8(weight, granularity, block)
    shaped = {
        "tensor": scales[0, 0],
        "channel": scales.reshape(-1),
        "block": scales[:, None, :, None],
    }[granularity]
    is_static = granularity == "tensor" if static is None else static
    return {"weight": ("F8_E4M3", codes), "weight_scale": f32(shaped)} | _input_scale(is_static)


def modelopt_int8(
    weight: Array, *, static: bool = True, smoothing: Array | None = None
) -> dict[str, Stored]:
    weight, smooth = _smoothed(weight, smoothing)
    scales = _scales(_largest(weight, (1, weight.shape[1])), 127)
    numbers = np.clip(np.rint(weight / scales), -128, 127)
    stored = {"weight": ("I8", numbers.astype(np.int8)), "weight_scale": f32(scales[:, 0])}
    return stored | _input_scale(static) | smooth


def modelopt_int4(
    weight: Array,
    *,
    group: int = 128,
    smoothing: Array | None = None,
    activations: bool = False,
) -> dict[str, Stored]:
    """Return INT4 AWQ; ``activations`` adds what W4A8 has for FP8 inputs."""
    weight, smooth = _smoothed(weight, smoothing)
    scales = _scales(_largest(weight, (1, group)), 7)
    numbers = np.clip(np.rint(weight / _everywhere(scales, weight, (1, group))), -8, 7)
    nibbles = numbers.astype(int) & 0xF
    packed = (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)
    stored = {"weight": ("U8", packed), "weight_scale": f32(scales)} | smooth
    if activations:
        stored |= {"weight_scale_2": f32(np.abs(weight).max() / 448)} | _input_scale(True)
    return stored


def ct_nvfp4(weight: Array, *, static: bool = True, group: int = 16) -> dict[str, Stored]:
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    extra = {"input_global_scale": f32([100.0])} if static else {}
    return _nvfp4(weight, names, divides=True, group=group) | extra


def ct_mxfp4(weight: Array) -> dict[str, Stored]:
    return _mxfp4(weight, "weight_packed")


def ct_fp8(
    weight: Array,
    *,
    granularity: str = "channel",
    block: tuple[int, int] = (128, 128),
    static: bool = False,
) -> dict[str, Stored]:
    codes, scales = _fp8(weight, granularity, block)
    stored = bf16(scales.reshape(-1) if granularity == "tensor" else scales)
    extra = {"input_scale": bf16(np.array([0.01]))} if static else {}
    return {"weight": ("F8_E4M3", codes), "weight_scale": stored} | extra


def _integers(
    weight: Array, bits: int, cells: tuple[int, int], *, symmetric: bool
) -> tuple[Array, Array, Array]:
    """Return signed numbers, scales (as BF16 has them) and zero points."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        scales = floats(bf16(_scales(_largest(weight, cells), highest + 0.5)))
        zeros = np.zeros_like(scales)
    else:
        parts = [weight[part] for part in _parts(weight, *cells)]
        low = np.array([min(part.min(), 0) for part in parts]).reshape(scale_shape(weight, cells))
        high = np.array([max(part.max(), 0) for part in parts]).reshape(low.shape)
        scales = floats(bf16(_scales(high - low, highest - lowest)))
        zeros = np.clip(np.rint(lowest - low / scales), lowest, highest)
    spread = _everywhere(scales, weight, cells)
    numbers = np.rint(weight / spread) + _everywhere(zeros, weight, cells)
    return np.clip(numbers, lowest, highest).astype(np.int8), scales, zeros.astype(np.int8)


def scale_shape(weight: Array, cells: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(weight.shape[0] / cells[0]), math.ceil(weight.shape[1] / cells[1])


def ct_int8(
    weight: Array,
    *,
    granularity: str = "channel",
    group: int = 128,
    symmetric: bool = True,
    static: bool = False,
) -> dict[str, Stored]:
    cells = _cells(weight, granularity, group, (128, 128))
    numbers, scales, zeros = _integers(weight, 8, cells, symmetric=symmetric)
    tensor = granularity == "tensor"
    stored = {
        "weight": ("I8", numbers),
        "weight_scale": bf16(scales.reshape(-1) if tensor else scales),
    }
    if not symmetric:
        stored["weight_zero_point"] = ("I8", zeros.reshape(-1) if tensor else zeros)
    if static:
        stored["input_scale"] = bf16(np.array([0.01]))
    return stored


def ct_packed(
    weight: Array,
    *,
    bits: int = 4,
    granularity: str = "group",
    group: int = 128,
    symmetric: bool = True,
    groups: Array | None = None,
) -> dict[str, Stored]:
    order = np.arange(weight.shape[1]) if groups is None else np.argsort(groups, kind="stable")
    cells = _cells(weight, granularity, group, (128, 128))
    numbers, scales, zeros = _integers(weight[:, order], bits, cells, symmetric=symmetric)
    numbers = numbers[:, np.argsort(order)].astype(int) + 2 ** (bits - 1)
    stored = {
        "weight_packed": ("I32", pack_words(numbers, bits)),
        "weight_scale": bf16(scales),
        "weight_shape": ("I64", np.array(weight.shape)),
    }
    if not symmetric:
        packed = pack_words(zeros.T.astype(int) + 2 ** (bits - 1), bits).T
        stored["weight_zero_point"] = ("I32", packed)
    if groups is not None:
        stored["weight_g_idx"] = ("I32", np.asarray(groups, np.int32))
    return stored


LAYOUTS: Mapping[str, Callable[..., dict[str, Stored]]] = {
    "modelopt-nvfp4": modelopt_nvfp4,
    "modelopt-mxfp4": modelopt_mxfp4,
    "modelopt-mxfp8": _mxfp8,
    "modelopt-fp8": modelopt_fp8,
    "modelopt-int8": modelopt_int8,
    "modelopt-int4": modelopt_int4,
    "ct-nvfp4": ct_nvfp4,
    "ct-mxfp4": ct_mxfp4,
    "ct-mxfp8": _mxfp8,
    "ct-fp8": ct_fp8,
    "ct-int8": ct_int8,
    "ct-packed": ct_packed,
}
