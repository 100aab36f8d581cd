"""Formats that pack linears in their own way: told from headers, read, and held against libraries.

What a library itself reads in its exports lies in ``data/formats``, with the scripts that made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import NUMPY_TYPES, Array, Stored, floats
from encoders_packed import encode

from conductor.probes.formats import METHODS, find_format
from conductor.probes.formats.layout import UNDECLARED, Fetch, Format, Parts, Scheme
from conductor.probes.safetensors_header import Tensor

LIBRARIES = Path(__file__).parent / "data" / "formats"

FIXTURES = sorted(str(path.relative_to(LIBRARIES)) for path in LIBRARIES.glob("*/*.safetensors"))

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
BLOCK_FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP4 = NF4 | {"bnb_4bit_quant_type": "fp4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}

MODULE = "model.layers.0.mlp.experts.3.down_proj"

FIXTURE = "model.layers.1.self_attn.q_proj"
"""The module that the fixtures are cut from."""


def declared_by(
    stated: Mapping[str, Any], parts: Mapping[str, Tensor] | None = None, module: str = MODULE
) -> Format:
    """Return the format of a checkpoint that states this and holds these parts of one module."""
    tensors = {f"{module}.{name}": tensor for name, tensor in (parts or {}).items()}
    return find_format(Path("/nonexistent"), {"quantization_config": stated}, tensors)


def weights(rows: int, columns: int) -> Array:
    """Return weights as trained ones are: normal, with columns that are larger."""
    random = np.random.default_rng(rows * 10_000 + columns)
    values = random.normal(scale=0.02, size=(rows, columns)) * random.gamma(4, 0.25, size=columns)
    return values.astype(np.float32)


def stored_2d(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return blocks [rows, columns / 32, 16] as [rows, columns / 2], as they are handed over."""
    if "blocks" not in stored:
        return dict(stored)
    dtype, blocks = stored["blocks"]
    return {**stored, "blocks": (dtype, blocks.reshape(blocks.shape[0], -1))}


def headers(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    return {
        part: Tensor(dtype, array.shape, (0, array.nbytes))
        for part, (dtype, array) in stored.items()
    }


def fetcher(stored: Mapping[str, Stored]) -> Fetch:
    """Return ``fetch`` over tensors in memory."""

    def fetch(part: str, rows: slice = slice(None), columns: slice = slice(None)) -> Array:
        dtype, array = stored[part]
        values = floats((dtype, array)) if dtype in ("BF16", "F16", "F32") else array
        return values[rows, columns] if array.ndim == 2 else values

    return fetch


def ratio_db(reference: Array, values: Array) -> float:
    noise = np.square(reference.astype(np.float64) - values).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / noise))


def read_fixture(name: str) -> tuple[Format, dict[str, Stored], dict[str, Stored]]:
    """Return the format, the packed parts and what is beside them of a library's export."""
    content = (LIBRARIES / name).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    tensors: dict[str, Stored] = {}
    for part, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(data[begin:end], NUMPY_TYPES[entry["dtype"]])
        tensors[part] = (entry["dtype"], array.reshape(entry["shape"]))
    beside = {part: tensors.pop(part) for part in ("source", "dequantized") if part in tensors}
    stated = json.loads((LIBRARIES / name).with_suffix(".json").read_text())
    return declared_by(stated, headers(tensors), FIXTURE), tensors, beside


CASES = [
    # layout of the encoder, its options, shape, configuration, precision, group, least dB
    ("awq", {}, (64, 256), AWQ, "INT4", 128, 17),
    ("awq", {"group": 32}, (8, 96), AWQ | {"group_size": 32}, "INT4", 32, 18),
    ("awq", {"group": -1}, (64, 256), AWQ | {"group_size": -1}, "INT4", None, 16),
    ("gptq", {}, (64, 256), GPTQ, "INT4", 128, 16),
    ("gptq", {"group": 64}, (64, 128), GPTQ | {"group_size": 64}, "INT4", 64, 17),
    ("gptq", {"group": 128}, (64, 128), GPTQ, "INT4", 128, 16),
    ("gptq", {"group": 128}, (64, 192), GPTQ, "INT4", 128, 16),
    ("gptq", {"group": -1}, (64, 256), GPTQ | {"group_size": -1}, "INT4", None, 15),
    ("gptq", {"symmetric": False}, (64, 256), GPTQ | {"sym": False}, "INT4", 128, 17),
    ("gptq", {"reordered": True}, (64, 256), GPTQ | {"desc_act": True}, "INT4", 128, 16),
    (
        "gptq",
        {"version": 2, "symmetric": False},
        (64, 256),
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        "INT4",
        128,
        17,
    ),
    ("gptq", {"bits": 8}, (64, 256), GPTQ | {"bits": 8}, "INT8", 128, 40),
    ("gptq", {"bits": 3}, (64, 256), GPTQ | {"bits": 3}, "INT3", 128, 9),
    (
        "gptq",
        {"bits": 2, "group": 32},
        (64, 256),
        GPTQ | {"bits": 2, "group_size": 32},
        "INT2",
        32,
        3,
    ),
    ("fp8-block", {}, (256, 384), BLOCK_FP8, "FP8", None, 29),
    ("fp8-block", {}, (300, 200), BLOCK_FP8, "FP8", None, 29),
    ("fp8-block", {"scales": "BF16"}, (130, 129), BLOCK_FP8, "FP8", None, 29),
    ("fp8-block", {"scales": "F8_E8M0"}, (256, 256), BLOCK_FP8, "FP8", None, 29),
    (
        "fp8-block",
        {"block": (64, 32)},
        (96, 80),
        BLOCK_FP8 | {"weight_block_size": [64, 32]},
        "FP8",
        None,
        29,
    ),
    ("fp8", {}, (64, 48), FP8, "FP8", None, 29),
    (
        "fp8",
        {"granularity": "channel"},
        (64, 48),
        FP8 | {"quant_method": "fbgemm_fp8"},
        "FP8",
        None,
        29,
    ),
    ("gpt-oss-mxfp4", {}, (64, 96), MXFP4, "MXFP4", 32, 16),
    ("bnb-nf4", {}, (64, 128), NF4, "NF4", 64, 17),
    ("bnb-nf4", {"nested": True}, (300, 128), NF4, "NF4", 64, 17),
    ("bnb-nf4", {"storage": "BF16"}, (64, 128), NF4, "NF4", 64, 17),
    ("bnb-nf4", {}, (27, 43), NF4, "NF4", 64, 17),
    ("bnb-fp4", {}, (64, 128), FP4, "FP4", 64, 16),
    ("bnb-int8", {}, (64, 96), INT8, "INT8", None, 35),
]


def name_of(case: tuple[Any, ...]) -> str:
    layout, options, shape = case[:3]
    return "-".join([layout, *(f"{k}={v}" for k, v in options.items()), f"{shape[0]}x{shape[1]}"])


@pytest.fixture(params=CASES, ids=name_of)
def case(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    layout, options, shape, stated, precision, group, least_db = request.param
    weight = weights(*shape)
    stored = stored_2d(encode(layout, weight, **options))
    return weight, stored, declared_by(stated, headers(stored)), precision, group, least_db


def test_what_is_encoded_is_recognized_as_declared(case: tuple[Any, ...]) -> None:
    weight, stored, found, precision, group, _ = case
    parts, scheme = headers(stored), found.declared(MODULE)
    layout = found.layout(parts, weight.shape, scheme)
    assert found.known
    assert layout is not None
    assert (scheme.precision, layout.precision) == (precision, precision)
    assert layout.shape(parts) in (weight.shape, None)
    assert layout.group_size(parts, weight.shape) == group
    assert scheme.group_size in (group, None)
    assert layout.missing(parts, scheme) == ()
    assert layout.scales(parts)
    assert all(found.explains(part) for part in parts)


def test_what_is_encoded_is_read_whole_and_in_blocks(case: tuple[Any, ...]) -> None:
    weight, stored, found, _, _, least_db = case
    parts, fetch = headers(stored), fetcher(stored)
    layout = found.layout(parts, weight.shape, found.declared(MODULE))
    assert layout is not None
    whole = layout.read(parts, fetch, slice(None), slice(None))
    assert whole.dtype == np.float32
    assert whole.shape == weight.shape
    assert ratio_db(weight, whole) > least_db
    rows, columns = layout.step
    for block in (
        (slice(rows, 3 * rows), slice(None)),
        (slice(0, rows), slice(columns, 2 * columns)),
        (slice(rows, weight.shape[0]), slice(0, columns)),
        (slice(rows, weight.shape[0]), slice(columns, weight.shape[1])),
    ):
        if all(
            part.start is None or part.start < n
            for part, n in zip(block, weight.shape, strict=True)
        ):
            bounded = tuple(
                slice(part.start or 0, min(part.stop or n, n))
                for part, n in zip(block, weight.shape, strict=True)
            )
            np.testing.assert_array_equal(layout.read(parts, fetch, *bounded), whole[bounded])


def test_nearest_is_as_good_as_the_encoder(case: tuple[Any, ...]) -> None:
    weight, stored, found, *_ = case
    parts = headers(stored)
    layout = found.layout(parts, weight.shape, found.declared(MODULE))
    assert layout is not None
    encoded = ratio_db(weight, layout.read(parts, fetcher(stored), slice(None), slice(None)))
    kept = weight.copy()
    nearest = layout.nearest(weight, parts, float(np.abs(weight).max()))
    assert abs(ratio_db(weight, nearest) - encoded) < 0.7
    np.testing.assert_array_equal(weight, kept)
    assert np.isfinite(layout.nearest(np.zeros_like(weight), parts, 0.0)).all()


@pytest.mark.parametrize("name", FIXTURES)
def test_libraries_read_the_same(name: str) -> None:
    """F16 and BF16 results of a library are ours, rounded once."""
    found, stored, beside = read_fixture(name)
    dtype, expected = beside["dequantized"]
    if name.endswith("mxfp4-experts.safetensors"):
        experts = [
            stored_2d({part: (dtype, array[expert]) for part, (dtype, array) in stored.items()})
            for expert in range(3)
        ]
        expected = expected.transpose(0, 2, 1)
    else:
        experts, expected = [stored], expected[None]
    assert found.known
    scheme = found.declared(MODULE if len(experts) > 1 else FIXTURE)
    for parts, reference in zip(experts, expected, strict=True):
        layout = found.layout(headers(parts), reference.shape, scheme)
        assert layout is not None
        assert layout.precision == scheme.precision
        assert layout.missing(headers(parts), scheme) == ()
        ours = layout.read(headers(parts), fetcher(parts), slice(None), slice(None))
        theirs = floats((dtype, reference))
        if dtype == "F16":
            np.testing.assert_array_equal(ours.astype(np.float16), reference)
        elif dtype == "BF16":
            np.testing.assert_allclose(ours, theirs, rtol=2**-8)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=2e-7, atol=1e-9)
        if "source" in beside:
            source = floats(beside["source"])
            nearest = layout.nearest(source, headers(parts), float(np.abs(source).max()))
            assert ratio_db(source, ours) > ratio_db(source, nearest) - 3


BAD_HEADERS = [
    ("awq", AWQ, "qweight", ("I32", (256, 9))),
    ("awq", AWQ, "qweight", ("I32", (255, 8))),
    ("awq", AWQ, "qweight", ("F32", (256, 8))),
    ("awq", AWQ, "qzeros", ("I32", (1, 8))),
    ("awq", AWQ, "scales", ("F16", (2, 63))),
    ("awq", AWQ, "scales", ("I32", (2, 64))),
    ("gptq", GPTQ, "qweight", ("I32", (33, 64))),
    ("gptq", GPTQ, "qweight", ("U8", (32, 64))),
    ("gptq", GPTQ, "qzeros", ("I32", (2, 16))),
    ("gptq", GPTQ, "scales", ("F16", (64, 2))),
    ("gptq", GPTQ, "g_idx", ("I32", (64,))),
    ("fp8-block", BLOCK_FP8, "weight", ("F8_E5M2", (64, 256))),
    ("fp8-block", BLOCK_FP8, "weight_scale_inv", ("F32", (2, 1))),
    ("fp8-block", BLOCK_FP8, "weight_scale_inv", ("F32", (64, 1))),
    ("fp8-block", BLOCK_FP8, "weight_scale_inv", ("I32", (1, 2))),
    ("fp8", FP8, "weight_scale", ("F32", (2,))),
    ("gpt-oss-mxfp4", MXFP4, "blocks", ("U8", (64, 256))),
    ("gpt-oss-mxfp4", MXFP4, "scales", ("F32", (64, 8))),
    ("bnb-nf4", NF4, "weight", ("U8", (8191, 1))),
    ("bnb-nf4", NF4, "weight", ("U8", (64, 128))),
    ("bnb-nf4", NF4, "weight", ("F16", (4096, 1))),
    ("bnb-int8", INT8, "weight", ("I8", (256, 64))),
    ("bnb-int8", INT8, "SCB", ("F32", (256,))),
]


@pytest.mark.parametrize(
    ("layout", "stated", "part", "header"),
    BAD_HEADERS,
    ids=[f"{row[0]}-{row[2]}-{row[3][0]}-{row[3][1]}" for row in BAD_HEADERS],
)
def test_other_headers_are_no_such_linear(
    layout: str, stated: Mapping[str, Any], part: str, header: tuple[str, tuple[int, ...]]
) -> None:
    parts = headers(stored_2d(encode(layout, weights(64, 256))))
    found = declared_by(stated, parts)
    scheme = found.declared(MODULE)
    assert found.layout(parts, (64, 256), scheme) is not None
    changed = {**parts, part: Tensor(*header, (0, 0))}
    assert found.layout(changed, (64, 256), scheme) is None


MISSING = [
    ("awq", {}, AWQ, "scales"),
    ("awq", {}, AWQ, "qzeros"),
    ("gptq", {}, GPTQ, "scales"),
    ("gptq", {}, GPTQ, "qzeros"),
    ("gptq", {"reordered": True}, GPTQ | {"desc_act": True}, "g_idx"),
    ("fp8-block", {}, BLOCK_FP8, "weight_scale_inv"),
    ("fp8", {}, FP8, "weight_scale"),
    ("fp8", {"static": True}, FP8 | {"activation_scheme": "static"}, "input_scale"),
    ("gpt-oss-mxfp4", {}, MXFP4, "scales"),
    ("bnb-nf4", {}, NF4, "weight.absmax"),
    ("bnb-nf4", {}, NF4, "weight.quant_map"),
    ("bnb-nf4", {}, NF4, "weight.quant_state.bitsandbytes__nf4"),
    ("bnb-nf4", {"nested": True}, NF4, "weight.nested_absmax"),
    ("bnb-nf4", {"nested": True}, NF4, "weight.nested_quant_map"),
    ("bnb-int8", {}, INT8, "SCB"),
]


@pytest.mark.parametrize(
    ("layout", "options", "stated", "part"), MISSING, ids=[f"{r[0]}-{r[3]}" for r in MISSING]
)
def test_a_missing_part_is_named(
    layout: str, options: Mapping[str, Any], stated: Mapping[str, Any], part: str
) -> None:
    parts = headers(stored_2d(encode(layout, weights(64, 256), **options)))
    found = declared_by(stated, parts)
    scheme = found.declared(MODULE)
    del parts[part]
    holding = found.layout(parts, (64, 256), scheme)
    assert holding is not None
    assert holding.precision == scheme.precision
    assert holding.missing(parts, scheme) == (part,)


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ([128, 128], ""),
        ([64, 128], "weight_block_size [64, 128]: "),
        ([128, 256], f"{MODULE}.weight_scale_inv [2, 3] of [256, 384]"),
    ],
    ids=str,
)
def test_a_block_that_the_scales_do_not_have_is_a_contradiction(
    block: list[int], problem: str
) -> None:
    parts = headers(encode("fp8-block", weights(256, 384)))
    found = declared_by(BLOCK_FP8 | {"weight_block_size": block}, parts)
    assert bool(found.problems) == bool(problem)
    assert problem in " ".join(found.problems)
    assert declared_by(BLOCK_FP8 | {"weight_block_size": block}).problems == ()


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_scales_that_are_not_nested_as_declared_are_a_contradiction(
    nested: bool, declared: bool
) -> None:
    parts = headers(encode("bnb-nf4", weights(64, 256), nested=nested))
    problems = declared_by(NF4 | {"bnb_4bit_use_double_quant": declared}, parts).problems
    assert bool(problems) == (nested != declared)
    assert all("bnb_4bit_use_double_quant" in problem for problem in problems)


def test_a_checkpoint_that_declares_nothing_lacks_no_scale_that_it_stores() -> None:
    parts = headers(encode("bnb-int8", weights(64, 96)))
    holding = find_format(Path("/nonexistent"), {}, {}).layout(parts, (64, 96))
    assert holding is not None
    assert holding.missing(parts, UNDECLARED) == ()


def _state(text: str) -> Stored:
    return "U8", np.frombuffer(text.encode(), np.uint8)


def _facts(**facts: Any) -> Stored:
    shared = {"shape": [64, 256], "blocksize": 64, "quant_type": "nf4"}
    return _state(json.dumps(shared | facts))


ORDER = np.arange(256, dtype=np.int32) // 128
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
UNREADABLE = [
    ("gptq", {}, GPTQ, {"g_idx": ("I32", np.full(256, 2, np.int32))}, "g_idx"),
    ("gptq", {}, GPTQ, {"g_idx": ("I32", np.full(256, -1, np.int32))}, "g_idx"),
    ("gptq", {}, GPTQ, {"g_idx": ("I32", ORDER * 0)}, "group 0 256 columns, not 128"),
    ("gptq", {}, GPTQ | {"desc_act": True}, {"g_idx": ("I32", ORDER // 2)}, "256 columns, not 128"),
    ("awq", {}, AWQ | {"zero_point": False}, {}, "not all in the middle"),
    ("bnb-nf4", {}, NF4, {NF4_STATE: _state("[")}, "JSON"),
    ("bnb-nf4", {}, NF4, {NF4_STATE: _state("[1]")}, "JSON"),
    ("bnb-nf4", {}, NF4, {NF4_STATE: _state('{"shape": [64, 256]}')}, "JSON"),
    ("bnb-nf4", {}, NF4, {NF4_STATE: _facts(quant_type="fp4")}, "quant_type fp4"),
    ("bnb-nf4", {}, NF4, {NF4_STATE: _facts(nested_offset=0.5)}, "scales are quantized"),
    ("bnb-nf4", {"nested": True}, NF4, {NF4_STATE: _facts()}, "scales are not quantized"),
    (
        "bnb-nf4",
        {},
        NF4,
        {"weight.quant_map": ("F32", np.linspace(-1, 1, 16, dtype=np.float32))},
        "numbers of NF4",
    ),
    ("bnb-nf4", {}, NF4, {NF4_STATE: _facts(shape=[64, 1])}, "shape"),
    ("bnb-nf4", {}, NF4, {NF4_STATE: _facts(blocksize=0)}, "shape"),
    ("bnb-nf4", {}, NF4, {NF4_STATE: _facts(blocksize=32)}, "blocks"),
    ("bnb-nf4", {}, NF4, {NF4_STATE: _state('{"shape": [1e999, 1], "blocksize": 1}')}, "JSON"),
    ("bnb-nf4", {}, NF4, {"weight.quant_map": ("F32", np.zeros(8, np.float32))}, "quant_map"),
    (
        "bnb-nf4",
        {"nested": True},
        NF4,
        {"weight.nested_absmax": ("F32", np.zeros(0, np.float32))},
        "nested_absmax",
    ),
    ("bnb-int8", {}, INT8, {"weight_format": ("U8", np.array(2, np.uint8))}, "weight_format"),
]


@pytest.mark.parametrize(("layout", "options", "stated", "changed", "says"), UNREADABLE)
def test_what_cannot_be_read_says_why(
    layout: str,
    options: Mapping[str, Any],
    stated: Mapping[str, Any],
    changed: Mapping[str, Stored],
    says: str,
) -> None:
    stored = {**encode(layout, weights(64, 256), **options), **changed}
    parts = headers(stored)
    found = declared_by(stated, parts)
    holding = found.layout(parts, (64, 256), found.declared(MODULE))
    assert holding is not None
    with pytest.raises(ValueError, match=says):
        holding.read(parts, fetcher(stored), slice(None), slice(None))


INT4_128, INT4_64 = (
    Scheme(precision="INT4", group_size=128),
    Scheme(precision="INT4", group_size=64),
)
ATTENTION, HEAD = "model.layers.10.self_attn.q_proj", "lm_head"
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"

DECLARED = [
    ("awq-by-its-tensors", AWQ, MODULE, INT4_128),
    ("awq-without-such-tensors", AWQ, ATTENTION, UNDECLARED),
    ("awq-listed", AWQ | {"modules_to_not_convert": ["mlp"]}, MODULE, UNDECLARED),
    ("awq-substring", AWQ | {"modules_to_not_convert": ["own_pro"]}, MODULE, UNDECLARED),
    ("awq-not-listed", AWQ | {"modules_to_not_convert": ["mlp"]}, ATTENTION, INT4_128),
    ("awq-head", AWQ | {"modules_to_not_convert": ["visual"]}, HEAD, UNDECLARED),
    ("gptq-by-its-tensors", GPTQ, MODULE, INT4_128),
    ("gptq-without-such-tensors", GPTQ, ATTENTION, UNDECLARED),
    ("gptq-whole-rows", GPTQ | {"group_size": -1}, MODULE, Scheme(precision="INT4")),
    ("gptq-listed", GPTQ | {"modules_in_block_to_quantize": [["q_proj"]]}, ATTENTION, INT4_128),
    ("gptq-not-listed", GPTQ | {"modules_in_block_to_quantize": ["q_proj"]}, MODULE, UNDECLARED),
    ("gptq-head", GPTQ | {"lm_head": False}, HEAD, UNDECLARED),
    ("gptq-head-meant", GPTQ | {"lm_head": True}, HEAD, INT4_128),
    ("gptq-rule-excludes", GPTQ | {"dynamic": {r"-:.*\.mlp\.": {}}}, MODULE, UNDECLARED),
    (
        "gptq-rule-changes",
        GPTQ | {"dynamic": {r"+:.*\.0\.mlp": {"group_size": 64}}},
        MODULE,
        INT4_64,
    ),
    (
        "gptq-first-rule-counts",
        GPTQ | {"dynamic": {r".*down": {"bits": 8}, r"-:.*mlp": {}}},
        MODULE,
        Scheme(precision="INT8", group_size=128),
    ),
    ("fp8", FP8, ATTENTION, Scheme(precision="FP8", activations="FP8")),
    ("fp8-head", FP8, HEAD, UNDECLARED),
    (
        "fp8-static",
        FP8 | {"activation_scheme": "static"},
        MODULE,
        Scheme(precision="FP8", activations="FP8", static=True),
    ),
    (
        "fp8-list-of-whole-names",
        FP8 | {"ignored_layers": ["model.layers.1", "q"]},
        ATTENTION,
        Scheme(precision="FP8", activations="FP8"),
    ),
    ("fp8-listed", BLOCK_FP8 | {"modules_to_not_convert": ["self_attn"]}, ATTENTION, UNDECLARED),
    ("mxfp4-experts", MXFP4, EXPERTS, Scheme(precision="MXFP4", group_size=32)),
    ("mxfp4-attention", MXFP4, ATTENTION, UNDECLARED),
    ("mxfp4-router", MXFP4, "model.layers.1.mlp.router", UNDECLARED),
    (
        "mxfp4-listed",
        MXFP4 | {"modules_to_not_convert": ["model.layers.*.experts"]},
        EXPERTS,
        UNDECLARED,
    ),
    ("nf4", NF4, ATTENTION, Scheme(precision="NF4")),
    ("nf4-head-by-default", NF4, HEAD, UNDECLARED),
    (
        "nf4-head-not-listed",
        NF4 | {"llm_int8_skip_modules": ["vision"]},
        HEAD,
        Scheme(precision="NF4"),
    ),
    ("nf4-listed", NF4 | {"llm_int8_skip_modules": ["self_attn"]}, ATTENTION, UNDECLARED),
    (
        "fp4-by-default",
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        MODULE,
        Scheme(precision="FP4"),
    ),
    ("int8", INT8, MODULE, Scheme(precision="INT8", activations="INT8")),
]


@pytest.mark.parametrize(
    ("stated", "module", "scheme"), [row[1:] for row in DECLARED], ids=[row[0] for row in DECLARED]
)
def test_what_is_declared(stated: Mapping[str, Any], module: str, scheme: Scheme) -> None:
    packed = headers(encode("gptq", weights(32, 64)))
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in packed.items()}
    tensors |= {f"{other}.weight": packed["scales"] for other in (ATTENTION, HEAD, EXPERTS)}
    if stated.get("lm_head"):
        tensors |= {f"{HEAD}.{part}": tensor for part, tensor in packed.items()}
    found = find_format(Path("/nonexistent"), {"quantization_config": stated}, tensors)
    assert found.known
    assert found.declared(module) == scheme


UNKNOWN = {
    "awq-gemv": AWQ | {"version": "gemv"},
    "awq-8-bits": AWQ | {"bits": 8},
    "awq-list-for-bits": AWQ | {"bits": [4]},
    "gptq-marlin": GPTQ | {"checkpoint_format": "marlin"},
    "gptq-marlin-flag": GPTQ | {"is_marlin_format": True},
    "gptq-planes": GPTQ | {"checkpoint_format": "gptq_p"},
    "gptq-5-bits": GPTQ | {"bits": 5},
    "gptq-no-bits": {"quant_method": "gptq"},
    "gptq-list-for-version": GPTQ | {"checkpoint_format": ["gptq"]},
    "gptq-other-words": GPTQ | {"pack_dtype": "int64"},
    "fp8-block-of-three": BLOCK_FP8 | {"weight_block_size": [1, 2, 3]},
    "fp8-block-of-nothing": BLOCK_FP8 | {"weight_block_size": [0, 128]},
    "fp8-block-of-text": BLOCK_FP8 | {"weight_block_size": "128"},
    "bitsandbytes-neither": {"quant_method": "bitsandbytes"},
}


@pytest.mark.parametrize("stated", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_read_is_unknown(stated: Mapping[str, Any]) -> None:
    found = declared_by(stated)
    assert not found.known
    assert found.name.startswith("unknown (")
    assert found.declared(MODULE) == UNDECLARED


HOSTILE = (None, True, 7, -1, 1e308, "x", [], [7, None], {}, {".*": 1}, {".*": {"bits": None}})


@pytest.mark.parametrize(
    "method",
    [
        name
        for name, row in METHODS.items()
        if row.read.__module__.rpartition(".")[2]
        in ("awq", "gptq", "block_fp8", "gpt_oss", "bitsandbytes")
    ],
)
@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_any_configuration_gives_a_format(method: str, value: Any) -> None:
    good = AWQ | GPTQ | BLOCK_FP8 | NF4 | {"quant_method": method}
    keys = (*good, "modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules", "dynamic")
    for key in (*keys, "modules_in_block_to_quantize", "checkpoint_format", "format", "lm_head"):
        if key != "quant_method":
            found = declared_by({**good, key: value})
            assert isinstance(found.declared(MODULE), Scheme)


@pytest.mark.parametrize(
    ("file", "content", "precision"),
    [
        (
            "quant_config.json",
            {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
            INT4_64,
        ),
        ("quantize_config.json", GPTQ, INT4_128),
    ],
    ids=["awq", "gptq"],
)
def test_a_file_of_its_own_declares_too(
    tmp_path: Path, file: str, content: Mapping[str, Any], precision: Scheme
) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    tensors = {f"{MODULE}.qweight": Tensor("I32", (8, 8), (0, 256))}
    found = find_format(tmp_path, {}, tensors)
    assert found.known
    assert found.declared(MODULE) == precision
    stated = {**GPTQ, "quant_method": found.name.split()[0].lower(), "group_size": 32}
    other = find_format(tmp_path, {"quantization_config": stated}, tensors)
    assert "group_size" in " ".join(other.problems)


def test_parts_of_one_4_bit_table_are_not_of_the_other() -> None:
    parts: Parts = headers(encode("bnb-fp4", weights(64, 256)))
    assert declared_by(NF4).layout(parts, (64, 256), Scheme(precision="NF4")).precision == "FP4"
