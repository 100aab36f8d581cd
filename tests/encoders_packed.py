"""Quantize weights for tests into AWQ, GPTQ, FP8, MXFP4 and bitsandbytes.

Like ``encoders``: from the formats' definitions and from nothing of ours, rounded to nearest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from encoders import E2M1, Array, Stored, bf16, e4m3_codes, f32, nearest_codes, pack_words

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours lies in each place of a word, the lowest bits first."""

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The numbers that the QLoRA paper (arXiv 2305.14314, appendix E) lists."""

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def encode(layout: str, weight: Array, **options: Any) -> dict[str, Stored]:
    """Return the parts of a linear [rows, columns] in one of ``LAYOUTS``.

    Options, each with the default that the layout's usual exporter has:

    - ``group``: columns per scale, -1 for whole rows; ``block``: (rows, columns) per scale
    - ``bits``, ``symmetric``, ``reordered`` and ``version`` of ``gptq``
    - ``granularity``: ``tensor`` or ``channel``; ``static`` adds the scale of the inputs (``fp8``)
    - ``scales``: the type of the scales, ``F32``, ``BF16`` or ``F8_E8M0`` (``fp8-block``)
    - ``nested``: quantizes the scales as well; ``storage``: type of the bytes (bitsandbytes)
    """
    return LAYOUTS[layout](np.asarray(weight, np.float32), **options)


def _integers(
    weight: Array, groups: Array, bits: int, symmetric: bool
) -> tuple[Array, Array, Array]:
    """Return numbers [rows, columns], zero points and scales [rows, groups], scales as F16."""
    top = 2**bits - 1
    count = int(groups.max()) + 1
    scales = np.zeros((weight.shape[0], count), np.float16)
    zeros = np.zeros((weight.shape[0], count), np.int64)
    numbers = np.zeros(weight.shape, np.int64)
    for group in range(count):
        members = weight[:, groups == group].astype(np.float64)
        low = np.minimum(members.min(axis=1), 0)
        high = np.maximum(members.max(axis=1), 0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        step = np.where(high > low, (high - low) / top, 1.0)
        scales[:, group] = step
        zeros[:, group] = (top + 1) // 2 if symmetric else np.rint(-low / step)
        scale = scales[:, group].astype(np.float64)[:, None]
        offset = zeros[:, group][:, None]
        numbers[:, groups == group] = np.clip(np.rint(members / scale) + offset, 0, top)
    return numbers, zeros, scales


def awq(weight: Array, *, group: int = 128) -> dict[str, Stored]:
    columns = weight.shape[1]
    groups = np.arange(columns) // (columns if group == -1 else group)
    numbers, zeros, scales = _integers(weight, groups, 4, symmetric=False)

    def packed(turned: Array) -> Stored:
        ordered = turned.reshape(turned.shape[0], -1, 8)[:, :, AWQ_PLACES]
        return "I32", pack_words(ordered.reshape(turned.shape), 4)

    return {
        "qweight": packed(numbers.T),
        "qzeros": packed(zeros.T),
        "scales": ("F16", np.ascontiguousarray(scales.T)),
    }


def gptq(
    weight: Array,
    *,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    reordered: bool = False,
    version: int = 1,
) -> dict[str, Stored]:
    columns = weight.shape[1]
    groups = np.arange(columns) // (columns if group == -1 else group)
    if reordered:
        groups = np.random.default_rng(7).permutation(groups)
    numbers, zeros, scales = _integers(weight, groups, bits, symmetric)
    stored_zeros = (zeros - (version == 1)) % 2**bits
    return {
        "qweight": ("I32", np.ascontiguousarray(pack_words(numbers, bits).T)),
        "qzeros": ("I32", pack_words(np.ascontiguousarray(stored_zeros.T), bits)),
        "scales": ("F16", np.ascontiguousarray(scales.T)),
        "g_idx": ("I32", groups.astype(np.int32)),
    }


def _tiled(weight: Array, block: tuple[int, int]) -> tuple[Array, Array]:
    """Return the largest magnitude of each block, and the block (row, column) of each element."""
    rows, columns = weight.shape
    grid = np.zeros((math.ceil(rows / block[0]), math.ceil(columns / block[1])))
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            part = weight[
                row * block[0] : (row + 1) * block[0],
                column * block[1] : (column + 1) * block[1],
            ]
            grid[row, column] = np.abs(part).max()
    places = np.ix_(np.arange(rows) // block[0], np.arange(columns) // block[1])
    return grid, places


def fp8_block(
    weight: Array, *, block: tuple[int, int] = (128, 128), scales: str = "F32"
) -> dict[str, Stored]:
    largest, places = _tiled(weight, block)
    steps = np.where(largest > 0, largest / 448, 1.0)
    if scales == "F8_E8M0":
        exponents = np.ceil(np.log2(steps))
        stored = (scales, (exponents + 127).astype(np.uint8))
        steps = 2.0**exponents
    else:
        stored = bf16(steps) if scales == "BF16" else f32(steps)
        if scales == "BF16":
            steps = (stored[1].astype(np.uint32) << 16).view(np.float32)
    return {
        "weight": ("F8_E4M3", e4m3_codes(weight / steps[places])),
        "weight_scale_inv": stored,
    }


def fp8(weight: Array, *, granularity: str = "tensor", static: bool = False) -> dict[str, Stored]:
    axis = 1 if granularity == "channel" else None
    steps = np.abs(weight).max(axis=axis, keepdims=axis is not None) / 448
    parts = {"weight": ("F8_E4M3", e4m3_codes(weight / steps)), "weight_scale": f32(steps)}
    return {**parts, "input_scale": f32(0.01)} if static else parts


def gpt_oss_mxfp4(weight: Array) -> dict[str, Stored]:
    """Return blocks [rows, columns / 32, 16] and scales [rows, columns / 32] of one expert."""
    blocks = weight.reshape(weight.shape[0], -1, 32).astype(np.float64)
    largest = np.abs(blocks).max(axis=2)
    exponents = np.floor(np.log2(np.where(largest > 0, largest, 1.0))) - 2
    scaled = np.clip(blocks / 2.0 ** exponents[:, :, None], -6, 6)
    codes = nearest_codes(scaled, E2M1, 8)
    return {
        "blocks": ("U8", (codes[:, :, 0::2] | (codes[:, :, 1::2] << 4)).astype(np.uint8)),
        "scales": ("U8", (exponents + 127).astype(np.uint8)),
    }


def _nested(scales: Array) -> tuple[dict[str, Stored], Array, float]:
    """Return scales as bytes, with blocks of 256; what they stand for then; and their offset."""
    offset = float(np.float32(scales.mean()))
    table = np.linspace(-1, 1, 256, dtype=np.float32)
    left = scales - offset
    count = math.ceil(scales.size / 256)
    whole = np.array([np.abs(left[256 * n :][:256]).max() for n in range(count)], np.float32)
    spread = np.repeat(whole, 256)[: scales.size]
    codes = np.abs(left[:, None] / spread[:, None] - table).argmin(axis=1).astype(np.uint8)
    parts = {
        "weight.absmax": ("U8", codes),
        "weight.nested_absmax": f32(whole),
        "weight.nested_quant_map": f32(table),
    }
    return parts, table[codes] * spread + offset, offset


def _four_bit(
    weight: Array, name: str, table: Array, *, nested: bool = False, storage: str = "U8"
) -> dict[str, Stored]:
    flat = weight.reshape(-1).astype(np.float64)
    blocks = np.append(flat, np.zeros(-flat.size % 64)).reshape(-1, 64)
    scales = np.abs(blocks).max(axis=1)
    parts: dict[str, Stored] = {"weight.absmax": f32(scales)}
    facts: dict[str, Any] = {
        "quant_type": name,
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    if nested:
        parts, scales, offset = _nested(scales)
        facts |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    scaled = blocks / np.where(scales > 0, scales, 1)[:, None]
    codes = np.abs(scaled[:, :, None] - table).argmin(axis=2).reshape(-1)[: flat.size]
    codes = np.append(codes, np.zeros(codes.size % 2, codes.dtype)).astype(np.uint8)
    stored = (codes[0::2] << 4) | codes[1::2]
    if storage == "BF16":
        stored = stored.view(np.uint16)
    text = json.dumps(facts).encode()
    return {
        "weight": (storage, stored.reshape(-1, 1)),
        **parts,
        "weight.quant_map": f32(table),
        f"weight.quant_state.bitsandbytes__{name}": ("U8", np.frombuffer(text, np.uint8)),
    }


def bnb_nf4(weight: Array, **options: Any) -> dict[str, Stored]:
    return _four_bit(weight, "nf4", np.array(NF4), **options)


def bnb_fp4(weight: Array, **options: Any) -> dict[str, Stored]:
    half = np.array(_FP4_TWELFTHS) / 12
    return _four_bit(weight, "fp4", np.append(half, -half), **options)


def bnb_int8(weight: Array) -> dict[str, Stored]:
    largest = np.abs(weight).max(axis=1)
    numbers = np.rint(weight * (127 / np.where(largest > 0, largest, 1))[:, None])
    return {
        "weight": ("I8", numbers.astype(np.int8)),
        "SCB": f32(largest),
        "weight_format": ("U8", np.array(0, np.uint8)),
    }


LAYOUTS: Mapping[str, Callable[..., dict[str, Stored]]] = {
    "awq": awq,
    "gptq": gptq,
    "fp8-block": fp8_block,
    "fp8": fp8,
    "gpt-oss-mxfp4": gpt_oss_mxfp4,
    "bnb-nf4": bnb_nf4,
    "bnb-fp4": bnb_fp4,
    "bnb-int8": bnb_int8,
}
