"""Formats: what their configuration declares, how their tensors are told, read and rounded."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import encoders
import numpy as np
import pytest
from encoders import Stored, encode

from conductor.environments.builder import Environments
from conductor.probes.formats import compressed_tensors, find_format, modelopt, patterns
from conductor.probes.formats.layout import (
    PLAIN,
    UNDECLARED,
    Format,
    Layout,
    Parts,
    Scheme,
)
from conductor.probes.formats.numerics import E2M1, E4M3, e2m1_pairs, e4m3_values, e8m0_values
from conductor.probes.safetensors_header import Tensor

ROWS, COLUMNS = 256, 384
SHAPE = (ROWS, COLUMNS)
WEIGHT = np.random.default_rng(7).standard_normal(SHAPE).astype(np.float32) * 0.02
SMOOTHING = np.exp(np.random.default_rng(8).normal(0, 0.3, COLUMNS)).astype(np.float32)
GROUPS = np.random.default_rng(9).permutation(COLUMNS) // 128
LAYOUTS = {"modelopt": modelopt.LAYOUTS, "ct": compressed_tensors.LAYOUTS}


def tensor(dtype: str, shape: tuple[int, ...]) -> Tensor:
    size = math.prod(shape) * np.dtype(encoders.NUMPY_TYPES[dtype]).itemsize
    return Tensor(dtype, shape, (0, size))


def headers(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    return {part: tensor(dtype, array.shape) for part, (dtype, array) in stored.items()}


def fetcher(stored: Mapping[str, Stored]) -> Callable[..., Any]:
    """Return stored elements as a reader of files would."""

    def fetch(part: str, rows: slice = slice(None), columns: slice = slice(None)) -> Any:
        dtype, array = stored[part]
        if dtype in ("BF16", "F16", "F32", "F64"):
            array = encoders.floats((dtype, array))
        return array[rows, columns] if array.ndim == 2 else array

    return fetch


def layout_of(name: str, parts: Parts, precision: str, shape: tuple[int, int] = SHAPE) -> Layout:
    layouts = LAYOUTS[name.partition("-")[0]]
    form = Format(name=name, layouts=layouts, declared=lambda _: UNDECLARED)
    layout = form.layout(parts, shape, Scheme(precision=precision))
    assert layout is not None
    return layout


def decibels(signal: Any, other: Any) -> float:
    noise = float(((signal - other).astype(np.float64) ** 2).sum())
    return 10 * math.log10(float((signal.astype(np.float64) ** 2).sum()) / noise)


# layout, options, precision, columns per scale, SQNR in dB of normally distributed weights.
ENCODED: tuple[tuple[str, dict[str, Any], str, int | None, tuple[float, float]], ...] = (
    ("modelopt-nvfp4", {}, "NVFP4", 16, (20, 21)),
    ("modelopt-nvfp4", {"smoothing": SMOOTHING}, "NVFP4", 16, (19, 21)),
    ("modelopt-nvfp4", {"group": 32}, "NVFP4", 32, (19, 20.5)),
    ("modelopt-mxfp4", {}, "MXFP4", 32, (18, 19.5)),
    ("modelopt-mxfp8", {}, "MXFP8", 32, (30.5, 32.5)),
    ("modelopt-fp8", {}, "FP8", None, (31, 32)),
    ("modelopt-fp8", {"granularity": "channel"}, "FP8", None, (31, 32)),
    ("modelopt-fp8", {"granularity": "block"}, "FP8", None, (31, 32)),
    ("modelopt-int8", {}, "INT8", None, (42, 44)),
    ("modelopt-int8", {"smoothing": SMOOTHING}, "INT8", None, (34, 44)),
    ("modelopt-int4", {}, "INT4", 128, (18, 19.5)),
    ("modelopt-int4", {"smoothing": SMOOTHING}, "INT4", 128, (10, 19)),
    ("modelopt-int4", {"group": 64, "activations": True}, "INT4", 64, (19, 20.5)),
    ("ct-nvfp4", {}, "NVFP4", 16, (20, 21)),
    ("ct-mxfp4", {}, "MXFP4", 32, (18, 19.5)),
    ("ct-mxfp8", {}, "MXFP8", 32, (30.5, 32.5)),
    ("ct-fp8", {}, "FP8", None, (31, 32)),
    ("ct-fp8", {"granularity": "tensor", "static": True}, "FP8", None, (31, 32)),
    ("ct-fp8", {"granularity": "block"}, "FP8", None, (31, 32)),
    ("ct-fp8", {"granularity": "block", "block": (64, 32)}, "FP8", None, (31, 32)),
    ("ct-int8", {}, "INT8", None, (42, 44)),
    ("ct-int8", {"granularity": "tensor"}, "INT8", None, (38, 42)),
    ("ct-int8", {"granularity": "group"}, "INT8", 128, (43, 45.5)),
    ("ct-int8", {"symmetric": False}, "INT8", None, (42, 44)),
    ("ct-packed", {}, "INT4", 128, (18.5, 20)),
    ("ct-packed", {"group": 32}, "INT4", 32, (20, 21.5)),
    ("ct-packed", {"granularity": "channel"}, "INT4", None, (17, 19)),
    ("ct-packed", {"symmetric": False}, "INT4", 128, (19, 20.5)),
    ("ct-packed", {"granularity": "channel", "symmetric": False}, "INT4", None, (17, 19.5)),
    ("ct-packed", {"groups": GROUPS}, "INT4", 128, (18.5, 20)),
    ("ct-packed", {"groups": GROUPS, "symmetric": False}, "INT4", 128, (19, 20.5)),
    ("ct-packed", {"bits": 8}, "INT8", 128, (43, 45.5)),
    ("ct-packed", {"bits": 8, "granularity": "channel"}, "INT8", None, (42, 44)),
    ("ct-packed", {"bits": 8, "symmetric": False}, "INT8", 128, (43, 46)),
    ("ct-packed", {"bits": 3}, "INT3", 128, (12, 14)),
    ("ct-packed", {"bits": 3, "symmetric": False}, "INT3", 128, (12, 14)),
    ("ct-packed", {"bits": 6}, "INT6", 128, (31, 33)),
)


def _label(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(
            f"{key}={'array' if isinstance(v, np.ndarray) else v}" for key, v in value.items()
        )
    return str(value)


encoded = pytest.mark.parametrize(
    ("name", "options", "precision", "group", "expected"), ENCODED, ids=_label
)


@encoded
def test_encoded_weights_are_told_read_and_rounded(
    name: str,
    options: dict[str, Any],
    precision: str,
    group: int | None,
    expected: tuple[float, float],
) -> None:
    stored = encode(name, WEIGHT, **options)
    parts = headers(stored)
    layout = layout_of(name, parts, precision)
    assert layout.precision == precision
    assert layout.shape(parts) == SHAPE
    assert layout.group_size(parts, SHAPE) == group
    assert layout.missing(parts, Scheme(precision=precision)) == ()
    assert parts.keys() <= layout.part_names
    assert not layout.holds(parts, (ROWS + 2, COLUMNS))
    assert not layout.holds(parts, (ROWS, COLUMNS + 128))
    read = layout.read(parts, fetcher(stored), slice(0, ROWS), slice(0, COLUMNS))
    assert read.dtype == np.float32
    assert read.shape == SHAPE
    low, high = expected
    assert low <= decibels(WEIGHT, read) <= high
    factors = SMOOTHING if "smoothing" in options else np.float32(1)
    values = WEIGHT / factors
    nearest = layout.nearest(values, parts, float(np.abs(values).max())) * factors
    assert nearest.dtype == np.float32
    assert decibels(WEIGHT, nearest) == pytest.approx(decibels(WEIGHT, read), abs=0.6)


@encoded
def test_a_block_is_the_same_part_of_the_matrix(
    name: str, options: dict[str, Any], precision: str, group: int | None, expected: Any
) -> None:
    stored = encode(name, WEIGHT, **options)
    parts = headers(stored)
    layout = layout_of(name, parts, precision)
    whole = layout.read(parts, fetcher(stored), slice(0, ROWS), slice(0, COLUMNS))
    for rows in (slice(0, 128), slice(128, 256), slice(128, 131)):
        for columns in (slice(0, 128), slice(128, 384), slice(256, 384), slice(128, 190)):
            block = layout.read(parts, fetcher(stored), rows, columns)
            assert np.array_equal(block, whole[rows, columns])


@encoded
def test_a_layout_is_told_with_a_scale_missing(
    name: str, options: dict[str, Any], precision: str, group: int | None, expected: Any
) -> None:
    stored = encode(name, WEIGHT, **options)
    parts = headers(stored)
    del parts["weight_scale"]
    layout = layout_of(name, parts, precision)
    assert layout.precision == precision
    assert "weight_scale" in layout.missing(parts, Scheme(precision=precision))


MISSING = (
    ("modelopt-nvfp4", "NVFP4", "weight_scale_2"),
    ("modelopt-nvfp4", "NVFP4", "input_scale"),
    ("modelopt-fp8", "FP8", "input_scale"),
    ("modelopt-int8", "INT8", "input_scale"),
    ("ct-nvfp4", "NVFP4", "weight_global_scale"),
    ("ct-nvfp4", "NVFP4", "input_global_scale"),
)


@pytest.mark.parametrize(("name", "precision", "part"), MISSING)
def test_a_companion_that_the_scheme_needs_is_missed(name: str, precision: str, part: str) -> None:
    parts = headers(encode(name, WEIGHT))
    layout = layout_of(name, parts, precision)
    static = Scheme(precision=precision, static=True)
    assert layout.missing(parts, static) == ()
    del parts[part]
    assert layout.missing(parts, static) == (part,)
    without_inputs = layout.missing(parts, Scheme(precision=precision))
    assert without_inputs == (() if part.startswith("input") else (part,))


def test_packed_numbers_need_their_shape() -> None:
    parts = headers(encode("ct-packed", WEIGHT))
    layout = layout_of("ct-packed", parts, "INT4")
    assert layout.missing(parts, Scheme(precision="INT4")) == ()
    del parts["weight_shape"]
    assert layout.missing(parts, Scheme(precision="INT4")) == ("weight_shape",)


def test_the_scale_that_weights_are_narrowed_with_is_one_of_theirs() -> None:
    stored = encode("modelopt-int4", WEIGHT, activations=True)
    parts = headers(stored)
    layout = layout_of("modelopt-int4", parts, "INT4")
    static, plain = (Scheme(precision="INT4", static=each) for each in (True, False))
    assert layout.missing(parts, static) == ()
    assert layout.scales(parts) == ("weight_scale", "weight_scale_2")
    assert not layout.holds({**parts, "weight_scale_2": tensor("F32", (2,))}, SHAPE)
    del parts["weight_scale_2"]
    assert layout.missing(parts, static) == ("weight_scale_2",)
    assert layout.missing(parts, plain) == ()
    assert layout.scales(parts) == ("weight_scale",)


# layout, its options, precision, part, the header it gets instead.
UNLIKE = (
    ("modelopt-nvfp4", "NVFP4", "weight", ("I8", (256, 192))),
    ("modelopt-nvfp4", "NVFP4", "weight", ("U8", (256, 191))),
    ("modelopt-nvfp4", "NVFP4", "weight_scale", ("F32", (256, 24))),
    ("modelopt-nvfp4", "NVFP4", "weight_scale", ("F8_E4M3", (255, 24))),
    ("modelopt-nvfp4", "NVFP4", "weight_scale", ("F8_E4M3", (256, 385))),
    ("modelopt-nvfp4", "NVFP4", "weight_scale", ("F8_E4M3", (128, 24))),
    ("modelopt-mxfp4", "MXFP4", "weight_scale", ("F8_E4M3", (256, 12))),
    ("modelopt-fp8", "FP8", "weight", ("F8_E5M2", (256, 384))),
    ("modelopt-fp8", "FP8", "weight_scale", ("I32", ())),
    ("modelopt-fp8", "FP8", "weight_scale", ("F32", (255,))),
    ("modelopt-fp8", "FP8", "weight_scale", ("F32", (2, 2, 3, 1))),
    ("modelopt-int8", "INT8", "weight", ("U8", (256, 384))),
    ("modelopt-int4", "INT4", "weight", ("U8", (127, 384))),
    ("modelopt-int4", "INT4", "weight_scale", ("F32", (256, 0))),
    ("ct-packed", "INT4", "weight_packed", ("I32", (256, 47))),
    ("ct-packed", "INT4", "weight_packed", ("I64", (256, 48))),
    ("ct-packed", "INT4", "weight_scale", ("I8", (256, 3))),
    ("ct-packed", "INT4", "weight_zero_point", ("I32", (256, 3))),
    ("ct-packed", "INT4", "weight_g_idx", ("I32", (383,))),
    ("modelopt-nvfp4", "NVFP4", "weight_scale_2", ("F32", (2,))),
    ("modelopt-nvfp4", "NVFP4", "pre_quant_scale", ("BF16", (256,))),
)


@pytest.mark.parametrize(("name", "precision", "part", "header"), UNLIKE)
def test_other_tensors_are_not_held(
    name: str, precision: str, part: str, header: tuple[str, tuple[int, ...]]
) -> None:
    parts = headers(encode(name, WEIGHT))
    layout = layout_of(name, parts, precision)
    parts[part] = tensor(*header)
    assert not layout.holds(parts, SHAPE)


def test_padding_within_a_word_belongs_to_nobody() -> None:
    weight = WEIGHT[:, :300]
    stored = encode("ct-packed", weight, granularity="channel")
    parts = headers(stored)
    layout = layout_of("ct-packed", parts, "INT4", weight.shape)
    read = layout.read(parts, fetcher(stored), slice(0, ROWS), slice(0, 300))
    assert read.shape == weight.shape
    assert decibels(weight, read) > 17


@pytest.mark.parametrize("start", ["", "weight_quantizer._"], ids=["renamed", "as it was"])
def test_a_low_rank_part_is_added_before_the_smoothing(start: str) -> None:
    stored = encode("modelopt-nvfp4", WEIGHT, smoothing=SMOOTHING)
    parts = headers(stored)
    whole = (slice(0, ROWS), slice(0, COLUMNS))
    layout = layout_of("modelopt-nvfp4", parts, "NVFP4")
    without = layout.read(parts, fetcher(stored), *whole)
    left, right = WEIGHT[:, :4], WEIGHT[:4]
    first, second = f"{start}svdquant_lora_b", f"{start}svdquant_lora_a"
    stored |= {first: encoders.f32(left), second: encoders.f32(right)}
    parts = headers(stored)
    with_part = layout.read(parts, fetcher(stored), *whole)
    factors = encoders.floats(stored["pre_quant_scale"])
    np.testing.assert_allclose(with_part, without + left @ right * factors, atol=1e-6)
    assert parts.keys() <= layout.part_names
    assert layout.missing(parts, Scheme(precision="NVFP4")) == ()
    assert not layout.holds({**parts, second: tensor("F32", (5, COLUMNS))}, SHAPE)
    del parts[first]
    assert layout.missing(parts, Scheme(precision="NVFP4")) == (first,)


def test_few_bits_in_bytes_are_told_by_the_declaration_alone() -> None:
    scales = np.abs(WEIGHT).max(axis=1, keepdims=True) / 7
    numbers = np.rint(WEIGHT / scales).astype(np.int8)
    stored = {"weight": ("I8", numbers), "weight_scale": encoders.f32(scales)}
    parts = headers(stored)
    four, eight = (layout_of("ct-int8", parts, f"INT{bits}") for bits in (4, 8))
    assert (four.precision, eight.precision) == ("INT4", "INT8")
    read = four.read(parts, fetcher(stored), slice(0, ROWS), slice(0, COLUMNS))
    np.testing.assert_allclose(read, numbers * scales, rtol=1e-6)
    nearest = four.nearest(WEIGHT, parts, None)
    assert decibels(WEIGHT, nearest) == pytest.approx(decibels(WEIGHT, read), abs=0.6)
    assert decibels(WEIGHT, eight.nearest(WEIGHT, parts, None)) > 40
    more_bits = stored | {"weight": ("I8", numbers * 2)}
    read = four.read(parts, fetcher(more_bits), slice(0, ROWS), slice(0, COLUMNS))
    assert np.array_equal(np.isnan(read), (numbers < -4) | (numbers > 3))


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv"])
def test_of_layouts_that_hold_undeclared_tensors_the_one_that_lacks_least_counts(
    tmp_path: Path, scale: str
) -> None:
    parts = headers(encode("ct-fp8", WEIGHT, granularity="block"))
    parts[scale] = parts.pop("weight_scale")
    undeclared = find_format(tmp_path, {}, {})
    layout = undeclared.layout(parts, SHAPE)
    assert layout is not None
    assert (layout.precision, layout.missing(parts, UNDECLARED)) == ("FP8", ())
    del parts[scale]
    without = undeclared.layout(parts, SHAPE)
    assert without is not None
    assert without.missing(parts, UNDECLARED)


@pytest.mark.parametrize(
    ("name", "precision", "part", "value"),
    [
        ("ct-packed", "INT4", "weight_g_idx", ("I32", np.full(COLUMNS, 9, np.int32))),
        ("modelopt-nvfp4", "NVFP4", "weight_scale", ("F8_E4M3", np.full((256, 24), 0x7F, "u1"))),
        ("modelopt-mxfp4", "MXFP4", "weight_scale", ("U8", np.full((256, 12), 0xFF, "u1"))),
        ("modelopt-nvfp4", "NVFP4", "weight_scale_2", encoders.f32(np.inf)),
        ("ct-nvfp4", "NVFP4", "weight_global_scale", encoders.f32([0.0])),
    ],
    ids=["no such group", "E4M3 NaN", "E8M0 NaN", "infinity", "divided by 0"],
)
def test_a_broken_scale_gives_no_numbers(
    name: str, precision: str, part: str, value: Stored
) -> None:
    stored = encode(name, WEIGHT) | {part: value}
    parts = headers(stored)
    layout = layout_of(name, parts, precision)
    read = layout.read(parts, fetcher(stored), slice(0, ROWS), slice(0, COLUMNS))
    assert not np.isfinite(read[read != 0]).any()


def test_zeros_are_rounded_to_zeros() -> None:
    zeros = np.zeros(SHAPE, np.float32)
    for name, options, precision, _, _ in ENCODED:
        parts = headers(encode(name, WEIGHT, **options))
        layout = layout_of(name, parts, precision)
        assert not layout.nearest(zeros, parts, 0.0).any(), name


def test_plain_weights_are_as_they_are() -> None:
    stored = {"weight": encoders.bf16(WEIGHT)}
    parts = headers(stored)
    assert PLAIN.shape(parts) == SHAPE
    block = PLAIN.read(parts, fetcher(stored), slice(1, 3), slice(0, 5))
    assert np.array_equal(block, encoders.floats(stored["weight"])[1:3, :5])


def test_number_tables_agree_with_the_definitions() -> None:
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(e4m3_values(), encoders.e4m3_numbers(codes), equal_nan=True)
    assert np.array_equal(np.abs(e2m1_pairs()[:8, 0]), encoders.E2M1)
    assert e8m0_values()[[0, 127, 254]].tolist() == [2.0**-127, 1.0, 2.0**127]
    assert np.isnan(e8m0_values()[255])


@pytest.mark.parametrize(
    ("rounding", "grid", "largest"),
    [(E4M3, encoders.E4M3, 448), (E2M1, encoders.E2M1, 6)],
    ids=["E4M3", "E2M1"],
)
def test_rounding_is_to_nearest_even(rounding: Any, grid: Any, largest: float) -> None:
    middles = (grid[1:] + grid[:-1]) / 2
    random = np.random.default_rng(3).standard_normal(100_000) * largest / 3
    values = np.concatenate([grid, middles, random, [largest * 4], -middles]).astype(np.float32)
    codes = encoders.nearest_codes(values, grid, 0)
    assert np.array_equal(np.abs(rounding.round(values)), grid[codes].astype(np.float32))
    assert np.isnan(rounding.round(np.array([np.nan], np.float32)))


MODELOPT_DECLARED: tuple[tuple[str, dict[str, Any], str, Scheme], ...] = (
    (
        "nvfp4",
        {"quant_algo": "NVFP4"},
        "a.b",
        Scheme(precision="NVFP4", group_size=16, activations="NVFP4", static=True),
    ),
    (
        "weights only",
        {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "a",
        Scheme(precision="NVFP4", group_size=16),
    ),
    (
        "inputs scaled as they come",
        {"quant_algo": "W4A8_MXFP4_FP8"},
        "a",
        Scheme(precision="MXFP4", group_size=32, activations="FP8"),
    ),
    (
        "groups of 32 unless said",
        {"quant_algo": "W4A8_NVFP4_FP8"},
        "a",
        Scheme(precision="NVFP4", group_size=32, activations="FP8", static=True),
    ),
    ("lower case", {"quant_algo": "fp8_pb_wo"}, "a", Scheme(precision="FP8")),
    (
        "group size",
        {"quant_algo": "W4A16_AWQ", "group_size": 64},
        "a",
        Scheme(precision="INT4", group_size=64),
    ),
    ("not known", {"quant_algo": "W2A2"}, "a", Scheme(precision="W2A2")),
    ("exact", {"quant_algo": "FP8", "ignore": ["lm_head"]}, "lm_head", UNDECLARED),
    ("within", {"quant_algo": "FP8", "ignore": ["mlp.gate"]}, "l.0.mlp.gate", UNDECLARED),
    ("parent", {"quant_algo": "FP8", "ignore": ["l.0"]}, "l.0.mlp.gate", UNDECLARED),
    ("prefix glob", {"quant_algo": "FP8", "ignore": ["l.1*"]}, "l.10.mlp", UNDECLARED),
    ("inner glob", {"quant_algo": "FP8", "ignore": ["l.*.gate"]}, "l.10.gate", UNDECLARED),
    ("any glob", {"quant_algo": "FP8", "ignore": ["*gate*"]}, "l.1.gate.up", UNDECLARED),
    ("one letter", {"quant_algo": "FP8", "ignore": ["l.?.gate"]}, "l.1.gate", UNDECLARED),
    ("set of letters", {"quant_algo": "FP8", "ignore": ["l.[01].gate"]}, "l.1.gate", UNDECLARED),
    ("nested", {"quantization": {"quant_algo": "FP8", "exclude_modules": ["a"]}}, "a", UNDECLARED),
    ("nothing", {"quant_algo": None}, "a", UNDECLARED),
    (
        "mixed",
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"a": {"quant_algo": "W4A16_AWQ", "group_size": 32}},
        },
        "a",
        Scheme(precision="INT4", group_size=32),
    ),
    (
        "mixed, group size 0",
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"a": {"quant_algo": "MXFP8", "group_size": 0}},
        },
        "a.experts",
        Scheme(precision="MXFP8", group_size=32, activations="MXFP8"),
    ),
    (
        "mixed, not listed",
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "FP8"}}},
        "ab",
        UNDECLARED,
    ),
)


@pytest.mark.parametrize(
    ("stated", "module", "scheme"),
    [row[1:] for row in MODELOPT_DECLARED],
    ids=[row[0] for row in MODELOPT_DECLARED],
)
def test_modelopt_declares(stated: dict[str, Any], module: str, scheme: Scheme) -> None:
    assert modelopt.read(stated, {}, {}).declared(module) == scheme
    assert modelopt.read({}, stated, {}).declared(module) == scheme


@pytest.mark.parametrize(
    ("pattern", "module"),
    [("model.layers.1", "model.layers.10.mlp"), ("gate", "l.0.gate_proj"), ("l.?", "l.10")],
)
def test_modelopt_does_not_exclude(pattern: str, module: str) -> None:
    declared = modelopt.read({"quant_algo": "FP8", "ignore": [pattern]}, {}, {}).declared
    assert declared(module).precision == "FP8"


def group_of(bits: int, size: int, size_of_inputs: int) -> dict[str, Any]:
    return {
        "weights": {"num_bits": bits, "group_size": size},
        "input_activations": {"num_bits": bits, "group_size": size_of_inputs},
    }


AGREED = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["a", "b*"]}
FP8_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
MODELOPT_PAIRS: tuple[tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]], ...] = (
    ("alike", {"ignore": ["b*", "a"]}, {}, ()),
    ("group size unsaid", {"ignore": ["a", "b*"], "group_size": None}, {}, ()),
    ("algorithm", {"quant_algo": "FP8"}, {}, ("quant_algo",)),
    ("group size", {"group_size": 32}, {}, ("group_size",)),
    ("exclude list", {"exclude_modules": ["a"]}, {}, ("b*",)),
    ("cache alike", {"kv_cache_scheme": FP8_CACHE}, {"kv_cache_quant_algo": "FP8"}, ()),
    ("cache", {"kv_cache_scheme": FP8_CACHE}, {"kv_cache_quant_algo": "NVFP4"}, ("NVFP4",)),
    ("cache unsaid", {}, {"kv_cache_quant_algo": "FP8"}, ("kv cache",)),
    ("described", {"config_groups": {"group_0": group_of(4, 16, 16)}}, {}, ()),
    ("bits", {"config_groups": {"group_0": group_of(8, 16, 16)}}, {}, ("num_bits 8 of weights",)),
    (
        "group size of inputs",
        {"config_groups": {"group_0": group_of(4, 16, 32)}},
        {},
        ("group_0: group_size 16 of weights, and 32 of inputs",),
    ),
    (
        "layers",
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "FP8"}}},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "NVFP4"}}},
        ("a FP8", "a NVFP4"),
    ),
)


@pytest.mark.parametrize(
    ("here", "there", "named"),
    [row[1:] for row in MODELOPT_PAIRS],
    ids=[row[0] for row in MODELOPT_PAIRS],
)
def test_modelopt_configurations_contradict_each_other(
    here: dict[str, Any], there: dict[str, Any], named: tuple[str, ...]
) -> None:
    both = [{**AGREED, **here}, {"quantization": {**AGREED, **there}}]
    if "ignore" in here:
        del both[0]["exclude_modules"]
    problems = "; ".join(modelopt.read(*both, {}).problems)
    assert bool(problems) == bool(named)
    for text in named:
        assert text in problems


@pytest.mark.parametrize(
    ("here", "there", "size"),
    [
        ({"quant_algo": "NVFP4"}, {"quant_algo": "NVFP4", "group_size": 32}, 32),
        ({"quant_algo": "NVFP4", "group_size": 32}, {"quant_algo": "NVFP4"}, 32),
        ({"quant_algo": "NVFP4"}, {"quant_algo": "NVFP4"}, 16),
        ({"quant_algo": "NVFP4"}, {"quant_algo": "MXFP4", "group_size": 32}, 16),
    ],
    ids=["beside", "in config.json", "unsaid", "of another algorithm"],
)
def test_modelopt_states_a_group_size_in_either_file(
    here: dict[str, Any], there: dict[str, Any], size: int
) -> None:
    assert modelopt.read(here, {"quantization": there}, {}).declared("a").group_size == size


def ct(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {f"group_{n}": group for n, group in enumerate(groups)},
        **more,
    }


def group(
    bits: int, kind: str, size: int | None = None, targets: Any = ("Linear",), **more: Any
) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "group_size": size, **more.pop("weights", {})}
    return {"targets": list(targets), "weights": weights, **more}


def inputs(bits: int, kind: str, dynamic: Any, size: int | None = None) -> dict[str, Any]:
    numbers = {"num_bits": bits, "type": kind, "dynamic": dynamic, "group_size": size}
    return {"input_activations": numbers}


INT4, FP8 = group(4, "int", 128), group(8, "float")
CT_DECLARED: tuple[tuple[str, dict[str, Any], str, Scheme], ...] = (
    ("int4", ct(INT4), "l.a", Scheme(precision="INT4", group_size=128)),
    ("channel", ct(group(4, "int", -1)), "l.a", Scheme(precision="INT4")),
    (
        "fp8 dynamic",
        ct(group(8, "float", **inputs(8, "float", True))),
        "l.a",
        Scheme(precision="FP8", activations="FP8"),
    ),
    (
        "fp8 static",
        ct(group(8, "float", **inputs(8, "float", False))),
        "l.a",
        Scheme(precision="FP8", activations="FP8", static=True),
    ),
    (
        "nvfp4",
        ct(group(4, "float", 16, **inputs(4, "float", "local", 16))),
        "l.a",
        Scheme(precision="NVFP4", group_size=16, activations="NVFP4", static=True),
    ),
    ("mxfp4", ct(group(4, "float", 32)), "l.a", Scheme(precision="MXFP4", group_size=32)),
    (
        "mxfp8",
        ct(group(8, "float", 32, weights={"scale_dtype": "torch.uint8"})),
        "l.a",
        Scheme(precision="MXFP8", group_size=32),
    ),
    ("ignored", ct(INT4, ignore=["l.a"]), "l.a", UNDECLARED),
    ("ignored in part only", ct(FP8, ignore=["l"]), "l.a", Scheme(precision="FP8")),
    ("pattern", ct(INT4, ignore=["re:.*b$"]), "l.b", UNDECLARED),
    ("pattern from the start", ct(FP8, ignore=["re:a"]), "l.a", Scheme(precision="FP8")),
    ("class", ct(INT4, ignore=["Linear"]), "l.a", UNDECLARED),
    (
        "name before class",
        ct(INT4, group(8, "float", None, ["l.a"])),
        "l.a",
        Scheme(precision="FP8"),
    ),
    (
        "pattern before class",
        ct(INT4, group(8, "float", None, ["re:.*a"])),
        "l.a",
        Scheme(precision="FP8"),
    ),
    (
        "name before pattern",
        ct(group(8, "int", None, ["re:.*a"]), group(8, "float", None, ["l.a"])),
        "l.a",
        Scheme(precision="FP8"),
    ),
    ("not a target", ct(group(8, "float", None, ["l.b"])), "l.a", UNDECLARED),
    ("activations only", ct({"targets": ["Linear"], "weights": None}), "l.a", UNDECLARED),
    ("fused experts", ct(FP8, ignore=["re:.*gate_up_proj"]), "l.experts.gate_up_proj", UNDECLARED),
)
CT_TENSORS = {
    name: tensor("BF16", (2, 2))
    for name in ("l.a.weight", "l.b.weight_packed", "l.experts.gate_up_proj")
}


@pytest.mark.parametrize(
    ("stated", "module", "scheme"),
    [row[1:] for row in CT_DECLARED],
    ids=[row[0] for row in CT_DECLARED],
)
def test_compressed_tensors_declares(stated: dict[str, Any], module: str, scheme: Scheme) -> None:
    found = compressed_tensors.read({**stated, "format": "naive-quantized"}, {}, CT_TENSORS)
    assert found.declared(module) == scheme
    assert found.known
    assert found.problems == ()


ONE_SCALE, ROW_SCALES, BLOCK_SCALES = (
    Tensor(dtype="F32", shape=shape, offsets=(0, 4)) for shape in ((1,), (256, 1), (2, 2))
)
CT_CONTRADICTIONS: tuple[tuple[str, dict[str, Any], Tensor, str], ...] = (
    ("no regular expression", ct(INT4, ignore=["re:("]), ONE_SCALE, "'(' is no regular expression"),
    (
        "floats in a way for integers",
        ct(FP8, format="int-quantized"),
        ONE_SCALE,
        "format 'int-quantized' for weights in FP8",
    ),
    ("dense", ct(FP8, format="dense"), ONE_SCALE, "format 'dense' for weights in FP8"),
    (
        "dense group",
        ct({**FP8, "format": "dense"}, format="mixed-precision"),
        ONE_SCALE,
        "format 'dense' for weights in FP8",
    ),
    (
        "whole unlike its groups",
        ct({**FP8, "format": "float-quantized"}),
        ONE_SCALE,
        "format 'pack-quantized', and of its groups float-quantized",
    ),
    (
        "cache without scales",
        ct(FP8, kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": False}),
        ONE_SCALE,
        "there is no k_scale or v_scale",
    ),
    ("way of another precision", ct(FP8), ONE_SCALE, "format 'pack-quantized' for weights in FP8"),
    *(
        (
            f"{strategy} for {list(scale.shape)}",
            ct(group(8, "float", weights={"strategy": strategy, "block_structure": block})),
            scale,
            f"strategy '{strategy}'{said}: a.weight_scale {list(scale.shape)}",
        )
        for strategy, block, scale, said in (
            ("tensor", None, ROW_SCALES, ""),
            ("channel", None, ONE_SCALE, ""),
            ("channel", None, BLOCK_SCALES, ""),
            ("block", [128, 64], BLOCK_SCALES, " with blocks of [128, 64]"),
        )
    ),
    (
        "zero points missing",
        ct(group(8, "int", weights={"symmetric": False})),
        ROW_SCALES,
        "a.weight_z",
    ),
)


@pytest.mark.parametrize(
    ("stated", "scale", "problem"),
    [pytest.param(*row, id=name) for name, *row in CT_CONTRADICTIONS],
)
def test_compressed_tensors_contradict_themselves(
    stated: dict[str, Any], scale: Tensor, problem: str
) -> None:
    weight = Tensor(dtype="F8_E4M3", shape=(256, 256), offsets=(0, 65536))
    tensors = {"a.weight": weight, "a.weight_scale": scale}
    assert any(problem in each for each in compressed_tensors.read(stated, {}, tensors).problems)


@pytest.mark.parametrize(
    ("stated", "part"),
    [
        pytest.param({"format": "float-quantized"}, "a.k_scale", id="static"),
        pytest.param({"format": "mixed-precision"}, "a.v_scale", id="mixture"),
        pytest.param({"format": "float-quantized", "dynamic": True}, "a.b", id="dynamic"),
    ],
)
def test_a_cache_that_is_as_declared_is_no_contradiction(stated: dict[str, Any], part: str) -> None:
    scheme = {"num_bits": 8, "type": "float", "dynamic": stated.get("dynamic", False)}
    groups = ct({**FP8, "format": "float-quantized"}, kv_cache_scheme=scheme)
    tensors = {part: tensor("F32", (1,))}
    assert compressed_tensors.read(groups | stated, {}, tensors).problems == ()


def test_integers_of_few_bits_may_be_stored_in_bytes() -> None:
    found = compressed_tensors.read(ct(INT4, format="int-quantized"), {}, {})
    assert found.problems == ()
    assert found.declared("a") == Scheme(precision="INT4", group_size=128)


def test_sparse_weights_are_not_known() -> None:
    for more in ({"sparsity_config": {"format": "sparse-24-bitmask"}}, {"format": "marlin-24"}):
        found = compressed_tensors.read(ct(FP8, **more), {}, {})
        assert not found.known
        assert "24" in found.name
    assert compressed_tensors.read(ct(FP8, sparsity_config={"format": "dense"}), {}, {}).known


def test_rotated_weights_are_transformed() -> None:
    assert not compressed_tensors.read(ct(FP8, transform_config={}), {}, {}).transformed
    rotated = ct(FP8, transform_config={"config_groups": {"R1": {"type": "hadamard"}}})
    assert compressed_tensors.read(rotated, {}, {}).transformed


def test_the_cache_is_declared_and_explained() -> None:
    found = compressed_tensors.read(
        ct(FP8, kv_cache_scheme={"num_bits": 8, "type": "float"}), {}, {}
    )
    assert found.kv_cache == "FP8"
    assert found.explains("k_scale")
    assert found.explains("weight_scale")
    assert not found.explains("weight_scale_inv")


def test_a_pattern_that_takes_for_ever_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "TIMEOUT_S", 0.5)
    module = "a" * 60
    found = compressed_tensors.read(
        ct(FP8, ignore=["re:(a+)+$", "re:A"]), {}, {f"{module}b.weight": CT_TENSORS["l.a.weight"]}
    )
    assert "(a+)+$" in found.problems[0]


MODULES = [
    f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"
    for layer in range(61)
    for expert in range(384)
    for name in ("gate", "up", "down")
]
EXCLUDED = (
    "lm_head",
    "model.embed_tokens",
    *(f"model.layers.{layer}.self_attn*" for layer in range(61)),
    *(f"model.layers.{layer}.mlp.gate" for layer in range(61)),
)


@pytest.mark.parametrize("module", [modelopt, compressed_tensors], ids=lambda m: m.METHOD)
def test_declaring_seventy_thousand_modules_is_quick(module: Any) -> None:
    stated = {"quant_algo": "NVFP4", "ignore": list(EXCLUDED), **ct(FP8)}
    declared = module.read(stated, {}, {}).declared
    start = time.process_time()
    assert all(declared(name).precision != "unquantized" for name in MODULES)
    # Ten times what it takes on an idle machine: this must not become seconds.
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("config", "files", "name", "known"),
    [
        ({}, {}, "none", True),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
            {},
            "ModelOpt FP8",
            True,
        ),
        ({"quantization_config": {"quant_algo": "FP8"}}, {}, "ModelOpt FP8", True),
        (
            {},
            {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}},
            "ModelOpt FP8",
            True,
        ),
        (
            {"text_config": {"quantization_config": ct(FP8)}},
            {},
            "compressed-tensors pack-quantized",
            True,
        ),
        ({"quantization_config": {"quant_method": "hqq"}}, {}, "unknown (hqq)", False),
        ({"quantization_config": {"bits": 4}}, {}, "unknown (without a quant_method)", False),
        (
            {"quantization_config": {"quant_method": 4}},
            {},
            "unknown (without a quant_method)",
            False,
        ),
    ],
    ids=["none", "modelopt", "no method", "file only", "text part", "hqq", "bits only", "number"],
)
def test_the_format_is_found(
    tmp_path: Path, config: dict[str, Any], files: dict[str, Any], name: str, known: bool
) -> None:
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    found = find_format(tmp_path, config, {})
    assert (found.name, found.known) == (name, known)


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        (ct(INT4), "config.json says compressed-tensors, and there is hf_quant_config.json"),
        ({"quant_method": "fp8"}, "config.json says fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, ""),
        ({"quant_method": "modelopt_fp4", "quant_algo": "FP8"}, ""),
    ],
    ids=["compressed-tensors", "fp8", "modelopt", "modelopt_fp4"],
)
def test_a_file_of_another_method_is_a_contradiction(
    tmp_path: Path, stated: dict[str, Any], named: str
) -> None:
    assert not find_format(tmp_path, {"quantization_config": stated}, {}).problems
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    found = find_format(tmp_path, {"quantization_config": stated}, {})
    assert found.known
    assert bool(found.problems) == bool(named)
    assert named in " ".join(found.problems)


LIBRARIES = Path(__file__).with_name("library_dequantization.py")


@pytest.mark.tools
def test_reading_agrees_with_the_libraries(tmp_path: Path) -> None:
    """Compare with what compressed-tensors and ModelOpt make of tensors they quantized."""
    subprocess.run(
        [str(Environments().interpreter("quantize")), str(LIBRARIES), str(tmp_path)],
        check=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    cases = json.loads((tmp_path / "cases.json").read_text())
    assert len(cases) >= 16
    for case in cases:
        with np.load(tmp_path / case["file"]) as arrays:
            stored = {part: (dtype, arrays[part]) for part, dtype in case["parts"].items()}
            expected = arrays["expected"]
        parts = headers(stored)
        layout = layout_of(case["library"], parts, case["precision"], expected.shape)
        assert layout.precision == case["precision"], case["name"]
        rows, columns = (slice(0, size) for size in expected.shape)
        read = layout.read(parts, fetcher(stored), rows, columns)
        np.testing.assert_allclose(read, expected, rtol=1e-6, atol=1e-12, err_msg=case["name"])
