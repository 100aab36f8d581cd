"""The numbers of a checkpoint: scales, and weights held against the source's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import Array, Stored, bf16, encode, f32, floats, write_file

from conductor.probes.findings import Findings, Measurements
from conductor.probes.formats import ALL_LAYOUTS
from conductor.probes.formats.layout import PLAIN, UNDECLARED
from conductor.probes.modules import kind_of
from conductor.probes.pairs import Kept, Pair
from conductor.probes.pairs import Stored as StoredMatrix
from conductor.probes.reading import ProbeError
from conductor.probes.safetensors_header import Weights, read_whole
from conductor.probes.values import identity, numbers
from conductor.probes.values.tensor_files import StoredReader, TensorFiles
from gates.criteria import EXPERT_SCALE_OCTAVES, GAIN_ERROR_PERCENT, SQNR_SHORTFALL_DB

HIDDEN, INNER, EXPERTS = 256, 384, 6
LAYER = "model.layers.0"
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
Q, UP, DOWN = (f"{LAYER}.{name}" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))
NORMS = (f"{LAYER}.input_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight")
Tensors = dict[str, Stored]
LIMITS = {
    "sqnr_shortfall_db": SQNR_SHORTFALL_DB,
    "gain_error_percent": GAIN_ERROR_PERCENT,
    "expert_scale_octaves": EXPERT_SCALE_OCTAVES,
}


def source_tensors(*, experts: bool = False) -> Tensors:
    generator = np.random.default_rng(7)
    linears = dict(LINEARS)
    if experts:
        linears |= {
            f"mlp.experts.{i}.{name}": LINEARS[f"mlp.{name}"]
            for i in range(EXPERTS)
            for name in ("gate_proj", "up_proj", "down_proj")
        }
    tensors = {
        f"{LAYER}.{name}.weight": bf16(generator.normal(0, 0.02, shape))
        for name, shape in linears.items()
    }
    tensors |= {name: bf16(1 + 0.1 * generator.normal(size=HIDDEN)) for name in NORMS}
    tensors["model.embed_tokens.weight"] = bf16(generator.normal(size=(512, HIDDEN)))
    return tensors


def quantized(source: Tensors, layout: str = "modelopt-nvfp4", **options: Any) -> Tensors:
    made: Tensors = {}
    for name, stored in source.items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            parts = encode(layout, floats(stored), **options)
            made |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        else:
            made[name] = stored
    return made


class Scan:
    """What a scan of two sets of tensors found."""

    def __init__(
        self,
        directory: Path,
        source: Tensors,
        candidate: Tensors,
        *,
        deep: bool = False,
        transformed: bool = False,
        pair: Callable[[Weights, Weights], tuple[list[Pair], list[Kept]]] | None = None,
    ) -> None:
        for name, tensors in (("source", source), ("candidate", candidate)):
            (directory / name).mkdir(parents=True, exist_ok=True)
            write_file(directory / name / "model.safetensors", tensors)
        self.source, self.candidate = (read_whole(directory / n) for n in ("source", "candidate"))
        self.findings, self.measurements = Findings(), Measurements()
        self.progress: list[tuple[int, int]] = []
        pairs, kept = (pair or paired)(self.source, self.candidate)
        self.summary = numbers.scan(
            self.candidate,
            self.source,
            pairs,
            kept,
            self.findings,
            self.measurements,
            deep=deep,
            progress=lambda done, total: self.progress.append((done, total)),
            transformed=transformed,
        )

    @property
    def found(self) -> dict[str, list[str]]:
        return {entry["kind"]: entry["names"] for entry in self.findings.document()}

    def over(self, measure: str) -> dict[str, str]:
        """Return the names beyond the limit of a measure, each with its detail."""
        return {
            worst["name"]: worst["detail"]
            for entry in self.measurements.document()
            for worst in entry["worst"]
            if entry["measure"] == measure and worst["value"] >= LIMITS[measure]
        }

    @property
    def clean(self) -> bool:
        notes = {
            "all_input_scales_neutral",
            "in_halves",
            "rounded_again",
            "smoothed",
            "zero_in_source",
        }
        return not self.found.keys() - notes and not any(map(self.over, LIMITS))


def paired(source: Weights, candidate: Weights) -> tuple[list[Pair], list[Kept]]:
    pairs, kept = [], []
    for name, tensor in source.tensors.items():
        module = name.removesuffix(".weight")
        if name in candidate.tensors and candidate.tensors[name].dtype in ("BF16", "F16", "F32"):
            kept.append(Kept(kind=kind_of(module), source_name=name, candidate_name=name))
        else:
            shape = (tensor.shape[0], tensor.shape[1])
            both = [stored(weights, module, shape) for weights in (source, candidate)]
            pairs.append(
                Pair(kind=kind_of(module), source=both[0], candidate=both[1], scheme=UNDECLARED)
            )
    return pairs, kept


def stored(weights: Weights, module: str, shape: tuple[int, int]) -> StoredMatrix:
    names = {
        name.removeprefix(f"{module}."): name
        for name in weights.tensors
        if name.startswith(f"{module}.") and not name.endswith(".bias")
    }
    parts = {part: weights.tensors[name] for part, name in names.items()}
    layout = next(each for each in (PLAIN, *ALL_LAYOUTS) if each.holds(parts, shape))
    return StoredMatrix(module=module, layout=layout, parts=parts, tensors=names, shape=shape)


def put(tensors: Tensors, name: str, index: Any, value: Any) -> None:
    dtype, array = tensors[name]
    changed = array.copy()
    changed[index] = value
    tensors[name] = (dtype, changed)


@pytest.mark.parametrize("deep", [False, True], ids=["sampled", "deep"])
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        pytest.param("modelopt-nvfp4", {}, id="modelopt-nvfp4"),
        pytest.param("modelopt-fp8", {}, id="modelopt-fp8"),
        pytest.param("modelopt-int8", {}, id="modelopt-int8"),
        pytest.param("modelopt-int4", {}, id="modelopt-int4"),
        pytest.param("ct-nvfp4", {}, id="ct-nvfp4"),
        pytest.param("ct-mxfp4", {}, id="ct-mxfp4"),
        pytest.param("ct-int8", {}, id="ct-int8"),
        pytest.param("ct-packed", {"bits": 4, "group": 128}, id="ct-packed"),
        pytest.param("modelopt-nvfp4", {"smoothing": np.geomspace(0.5, 8, 256)}, id="smoothed"),
    ],
)
def test_a_good_checkpoint_has_nothing_but_notes(
    layout: str, options: dict[str, Any], deep: bool, tmp_path: Path
) -> None:
    source = source_tensors()
    if "smoothing" in options:
        source = {name: s for name, s in source.items() if "down_proj" not in name}
    scan = Scan(tmp_path, source, quantized(source, layout, **options), deep=deep)
    assert scan.clean, (scan.found, scan.measurements.document())
    assert scan.summary["deep"] is deep
    assert scan.summary["kinds"]["mlp"]["sqnr_db"] > 15
    assert (
        abs(scan.summary["kinds"]["mlp"]["norm_db"] - scan.summary["kinds"]["mlp"]["sqnr_db"]) < 1
    )
    assert scan.progress[-1] == (scan.candidate.size_bytes, scan.candidate.size_bytes)
    assert scan.progress == sorted(scan.progress)


NAN, INFINITE = np.float32("nan"), np.float32("inf")
SCALE_FAULTS = [
    pytest.param("weight_scale", (3, 5), 0x7F, "non_finite_scale", id="e4m3-nan"),
    pytest.param("weight_scale", (255, 15), 0xFF, "non_finite_scale", id="e4m3-negative-nan"),
    pytest.param("weight_scale", (7, 0), 0xB8, "negative_scale", id="e4m3-negative"),
    pytest.param("weight_scale", (7, 0), 0x00, "zero_scale", id="e4m3-zero"),
    pytest.param("weight_scale", (7, 0), 0x80, "zero_scale", id="e4m3-minus-zero"),
    pytest.param("weight_scale_2", (), NAN, "non_finite_scale", id="global-nan"),
    pytest.param("weight_scale_2", (), INFINITE, "non_finite_scale", id="global-infinite"),
    pytest.param("weight_scale_2", (), -0.001, "negative_scale", id="global-negative"),
    pytest.param("input_scale", (), 0.0, "zero_scale", id="input-zero"),
    pytest.param("input_scale", (), -0.5, "negative_scale", id="input-negative"),
    pytest.param("input_scale", (), NAN, "non_finite_scale", id="input-nan"),
    pytest.param("input_scale", (), 1.0, "neutral_input_scale", id="input-neutral"),
]


@pytest.mark.parametrize(("part", "index", "value", "kind"), SCALE_FAULTS)
def test_one_bad_scale_is_named(
    part: str, index: tuple[int, ...], value: float, kind: str, tmp_path: Path
) -> None:
    source = source_tensors()
    candidate = quantized(source)
    put(candidate, f"{Q}.{part}", index, value)
    names = Scan(tmp_path, source, candidate).found[kind]
    assert [name.partition(" ")[0] for name in names] == [f"{Q}.{part}"]


def test_input_scales_that_are_all_neutral_are_a_note(tmp_path: Path) -> None:
    source = source_tensors()
    candidate = quantized(source)
    for name in candidate:
        if name.endswith("input_scale"):
            candidate[name] = f32(1.0)
    scan = Scan(tmp_path, source, candidate)
    assert len(scan.found["all_input_scales_neutral"]) == len(LINEARS)
    assert scan.clean


def test_scales_of_nothing_may_be_zero(tmp_path: Path) -> None:
    source = source_tensors()
    put(source, f"{Q}.weight", (slice(4, 6), slice(0, 16)), 0)
    candidate = quantized(source)
    put(candidate, f"{Q}.weight_scale", (slice(4, 6), 0), 0)
    assert Scan(tmp_path, source, candidate).clean


def test_a_bad_cache_scale_is_named(tmp_path: Path) -> None:
    source = source_tensors()
    candidate = quantized(source) | {f"{LAYER}.self_attn.k_scale": f32(NAN)}
    assert Scan(tmp_path, source, candidate).found == {
        "non_finite_scale": [f"{LAYER}.self_attn.k_scale"]
    }


def test_a_nan_in_e8m0_scales_is_named(tmp_path: Path) -> None:
    source = source_tensors()
    candidate = quantized(source, "ct-mxfp4")
    put(candidate, f"{Q}.weight_scale", (9, 3), 0xFF)
    found = Scan(tmp_path, source, candidate).found
    assert found.get("non_finite_scale") == [f"{Q}.weight_scale"]


def zero_whole(candidate: Tensors, source: Tensors) -> None:
    put(candidate, f"{Q}.weight", ..., 0)


def fill_whole(candidate: Tensors, source: Tensors) -> None:
    put(candidate, f"{Q}.weight", ..., 0x55)


def zero_both(candidate: Tensors, source: Tensors) -> None:
    zero_whole(candidate, source)
    put(source, f"{Q}.weight", ..., 0)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        pytest.param(zero_whole, "zero_weight", id="zero"),
        pytest.param(fill_whole, "constant_weight", id="constant"),
        pytest.param(zero_both, "zero_in_source", id="zero-in-source"),
    ],
)
def test_a_hollow_weight_is_named(
    change: Callable[[Tensors, Tensors], None], kind: str, tmp_path: Path
) -> None:
    source = source_tensors()
    candidate = quantized(source)
    change(candidate, source)
    assert Scan(tmp_path, source, candidate).found == {kind: [Q]}


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_any_nan_byte_in_fp8_weights_is_found(byte: int, tmp_path: Path) -> None:
    source = source_tensors()
    candidate = quantized(source, "modelopt-fp8")
    put(candidate, f"{DOWN}.weight", (101, 77), byte)
    assert Scan(tmp_path, source, candidate).found == {"non_finite_weight": [f"{DOWN}.weight"]}


@pytest.mark.parametrize(
    ("bits", "in_source", "kind"),
    [
        pytest.param(0x7F80, False, "non_finite_weight", id="infinity"),
        pytest.param(0xFF80, False, "non_finite_weight", id="minus-infinity"),
        pytest.param(0x7FC0, False, "non_finite_weight", id="nan"),
        pytest.param(0x7FC0, True, None, id="in-the-source-too"),
        pytest.param(0x7F7F, True, None, id="largest"),
    ],
)
def test_kept_tensors_must_be_numbers(
    bits: int, in_source: bool, kind: str | None, tmp_path: Path
) -> None:
    source = source_tensors()
    name = "model.embed_tokens.weight"
    candidate = quantized(source)
    put(candidate, name, (300, 17), bits)
    if in_source:
        put(source, name, (300, 17), bits)
    assert Scan(tmp_path, source, candidate).found == ({kind: [name]} if kind else {})


def inverted(tensors: Tensors, name: str) -> None:
    tensors[name] = f32(1 / tensors[name][1])


def nibbles_swapped(tensors: Tensors, name: str) -> None:
    dtype, array = tensors[name]
    tensors[name] = (dtype, ((array >> 4) | (array << 4)).astype(np.uint8))


def rolled(tensors: Tensors, name: str) -> None:
    dtype, array = tensors[name]
    tensors[name] = (dtype, np.roll(array, 1, axis=0))


def doubled(tensors: Tensors, name: str) -> None:
    tensors[name] = f32(2 * tensors[name][1])


@pytest.mark.parametrize(
    ("change", "part", "says"),
    [
        pytest.param(inverted, "weight_scale_2", "stored as its inverse", id="inverted"),
        pytest.param(nibbles_swapped, "weight", "packing order is wrong", id="nibbles"),
        pytest.param(rolled, "weight", "nothing to do with the source's", id="rows-moved"),
        pytest.param(doubled, "weight_scale_2", "2 times the source's", id="doubled"),
    ],
)
def test_values_far_from_the_source_are_named_with_the_mistake(
    change: Callable[[Tensors, str], None], part: str, says: str, tmp_path: Path
) -> None:
    source = source_tensors()
    candidate = quantized(source)
    change(candidate, f"{Q}.{part}")
    over = Scan(tmp_path, source, candidate).over("sqnr_shortfall_db")
    assert list(over) == [Q]
    assert says in over[Q]


def test_parts_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    source = source_tensors()
    groups = np.arange(HIDDEN) // 128
    candidate = quantized({f"{Q}.weight": source[f"{Q}.weight"]}, "ct-packed", groups=groups)
    put(candidate, f"{Q}.weight_g_idx", 5, 77)
    scan = Scan(tmp_path, {f"{Q}.weight": source[f"{Q}.weight"]}, candidate)
    assert list(scan.over("sqnr_shortfall_db")) == [Q]


@pytest.mark.parametrize(
    ("factor", "fails"),
    [(1.0, False), (1.045, False), (1.06, True), (0.9, True)],
    ids=["exact", "inside", "outside", "under"],
)
def test_a_gain_is_held_to_its_limit(factor: float, fails: bool, tmp_path: Path) -> None:
    source = source_tensors()
    candidate = quantized(source)
    scale = f"{Q}.weight_scale_2"
    candidate[scale] = f32(candidate[scale][1] * np.float32(factor))
    assert list(Scan(tmp_path, source, candidate).over("gain_error_percent")) == [Q] * fails


def swapped_scales(tensors: Tensors) -> None:
    one, other = (f"{LAYER}.mlp.experts.{i}.up_proj.weight_scale" for i in (1, 2))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def test_swapped_scales_of_two_experts_name_both(tmp_path: Path) -> None:
    source = source_tensors(experts=True)
    candidate = quantized(source)
    swapped_scales(candidate)
    scan = Scan(tmp_path, source, candidate)
    assert scan.over("sqnr_shortfall_db").keys() == {
        f"{LAYER}.mlp.experts.{i}.up_proj" for i in (1, 2)
    }


@pytest.mark.parametrize(
    ("octaves", "fails"), [(7.9, False), (8.1, True)], ids=["inside", "outside"]
)
def test_the_scale_of_an_expert_that_no_token_reached_is_named(
    octaves: float, fails: bool, tmp_path: Path
) -> None:
    source = source_tensors(experts=True)
    candidate = quantized(source)
    name = f"{LAYER}.mlp.experts.3.down_proj.input_scale"
    candidate[name] = f32(candidate[name][1] * np.float32(2**-octaves))
    assert list(Scan(tmp_path, source, candidate).over("expert_scale_octaves")) == [name] * fails


def test_weight_scales_of_uneven_experts_are_no_fault(tmp_path: Path) -> None:
    source = source_tensors(experts=True)
    name = f"{LAYER}.mlp.experts.3.down_proj.weight"
    source[name] = bf16(floats(source[name]) * np.float32(2.0**-12))
    assert Scan(tmp_path, source, quantized(source)).clean


def rescale_columns(tensors: Tensors, name: str, factors: Array) -> None:
    tensors[name] = bf16(floats(tensors[name]) * factors)


def rescale_rows(tensors: Tensors, name: str, factors: Array) -> None:
    tensors[name] = bf16(floats(tensors[name]) * factors[:, None])


def factors(count: int) -> Array:
    return np.exp(np.random.default_rng(1).normal(0, 0.7, count)).astype(np.float32)


READERS = ("mlp.gate_proj", "mlp.up_proj")


WEAK = 0.03
"""Power that leaves factors of which 4-bit noise hides each, and not all together."""


def smooth_norm(tensors: Tensors, *, offset: float = 0.0, power: float = 1.0) -> None:
    scale = factors(HIDDEN) ** power
    tensors[NORMS[1]] = bf16((floats(tensors[NORMS[1]]) + offset) / scale - offset)
    for name in READERS:
        rescale_columns(tensors, f"{LAYER}.{name}.weight", scale)


def smooth_couple(tensors: Tensors) -> None:
    scale = factors(INNER)
    rescale_rows(tensors, f"{UP}.weight", 1 / scale)
    rescale_columns(tensors, f"{DOWN}.weight", scale)


def smooth_all(tensors: Tensors) -> None:
    smooth_norm(tensors)
    smooth_couple(tensors)


@pytest.mark.parametrize("deep", [False, True], ids=["sampled", "deep"])
@pytest.mark.parametrize(
    ("smooth", "named"),
    [
        pytest.param(smooth_norm, {NORMS[1]}, id="norm"),
        pytest.param(lambda t: smooth_norm(t, offset=1.0), {NORMS[1]}, id="norm-less-one"),
        pytest.param(lambda t: smooth_norm(t, power=WEAK), {NORMS[1]}, id="weakly"),
        pytest.param(smooth_couple, {UP}, id="up-down"),
        pytest.param(smooth_all, {NORMS[1], UP}, id="both"),
    ],
)
def test_smoothing_is_explained(
    smooth: Callable[[Tensors], None], named: set[str], deep: bool, tmp_path: Path
) -> None:
    source = source_tensors()
    smoothed = dict(source)
    smooth(smoothed)
    scan = Scan(tmp_path, source, quantized(smoothed, "ct-packed", bits=4, group=128), deep=deep)
    assert scan.clean, (scan.found, [scan.over(measure) for measure in LIMITS])
    assert set(scan.found["smoothed"]) == named


def norm_alone(tensors: Tensors) -> None:
    tensors[NORMS[1]] = bf16(floats(tensors[NORMS[1]]) / factors(HIDDEN))


def one_reader_left_out(tensors: Tensors, *, power: float = 1.0) -> None:
    before = tensors[f"{LAYER}.mlp.gate_proj.weight"]
    smooth_norm(tensors, power=power)
    tensors[f"{LAYER}.mlp.gate_proj.weight"] = before


def one_reader_left_out_weakly(tensors: Tensors) -> None:
    one_reader_left_out(tensors, power=WEAK)


def one_number_of_a_norm(tensors: Tensors) -> None:
    put(tensors, NORMS[1], 9, tensors[NORMS[1]][1][9] ^ 0x40)


@pytest.mark.parametrize(
    "change",
    [norm_alone, one_reader_left_out, one_reader_left_out_weakly, one_number_of_a_norm],
)
def test_a_norm_that_changed_with_nothing_in_return_is_altered(
    change: Callable[[Tensors], None], tmp_path: Path
) -> None:
    source = source_tensors()
    changed = dict(source)
    change(changed)
    found = Scan(tmp_path, source, quantized(changed)).found
    (name,) = found["altered"]
    assert name.startswith(NORMS[1])
    assert "is not rescaled in return" in name


def rounded_again(tensors: Tensors, name: str) -> None:
    tensors[name] = bf16(floats(bf16(floats(tensors[name]) + 1)) - 1)


@pytest.mark.parametrize("layer", [LAYER, "model"], ids=["of-a-layer", "last"])
@pytest.mark.parametrize("flipped", [0, 1, 0x40], ids=["as-it-is", "last-bit", "other-bit"])
def test_a_norm_that_is_one_less_may_be_rounded_once_more(
    layer: str, flipped: int, tmp_path: Path
) -> None:
    source = source_tensors()
    name = f"{layer}.input_layernorm.weight" if layer == LAYER else f"{layer}.norm.weight"
    source[name] = bf16(np.random.default_rng(4).normal(0, 0.1, HIDDEN))
    changed = dict(source)
    rounded_again(changed, name)
    assert (changed[name][1] != source[name][1]).any()
    put(changed, name, 9, changed[name][1][9] ^ flipped)
    scan = Scan(tmp_path, source, quantized(changed))
    assert scan.clean == (not flipped)
    assert list(scan.found) == ["altered" if flipped else "rounded_again"]
    assert [each.partition(" ")[0] for each in next(iter(scan.found.values()))] == [name]


@pytest.mark.parametrize("power", [1.0, 0.1], ids=["strongly", "weakly"])
@pytest.mark.parametrize(
    ("off", "altered"), [(0.0, False), (0.03, False), (0.1, True), (-1.0, True)]
)
def test_a_bias_follows_its_rows_as_near_as_their_noise_lets_it(
    power: float, off: float, altered: bool, tmp_path: Path
) -> None:
    source = source_tensors()
    bias = f"{UP}.bias"
    source[bias] = bf16(np.random.default_rng(4).normal(0, 0.1, INNER))
    smoothed = dict(source)
    scale = factors(INNER) ** power
    rescale_rows(smoothed, f"{UP}.weight", 1 / scale)
    rescale_columns(smoothed, f"{DOWN}.weight", scale)
    values = floats(source[bias]) / scale
    values[17] *= 1 + off
    smoothed[bias] = bf16(values)
    candidate = quantized(smoothed, "ct-packed", bits=4, group=128)
    scan = Scan(tmp_path, source, candidate)
    assert scan.found == (
        {"smoothed": [UP], "altered": [bias]} if altered else {"smoothed": [UP, bias]}
    )


def test_a_bias_that_changed_beside_rows_that_did_not_is_altered(tmp_path: Path) -> None:
    source = source_tensors()
    bias = f"{UP}.bias"
    source[bias] = bf16(np.random.default_rng(4).normal(0, 0.1, INNER))
    candidate = quantized(source)
    put(candidate, bias, 17, candidate[bias][1][17] ^ 1)
    scan = Scan(tmp_path, source, candidate)
    assert scan.found == {"altered": [bias]}


OPT = "model.decoder.layers.0"
OPT_READERS = {
    "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "final_layer_norm": ("fc1",),
}


@pytest.mark.parametrize("norm", OPT_READERS)
@pytest.mark.parametrize("left_out", [False, True], ids=["all", "one-reader-left-out"])
def test_norms_of_opt_are_read_by_name(norm: str, left_out: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(7)
    source = {
        f"{OPT}.{name}.weight": bf16(generator.normal(0, 0.02, (HIDDEN, HIDDEN)))
        for readers in OPT_READERS.values()
        for name in (*readers, "encoder_attn.q_proj")
    }
    source |= {f"{OPT}.{each}.weight": bf16(1 + generator.random(HIDDEN)) for each in OPT_READERS}
    changed = dict(source)
    name = f"{OPT}.{norm}.weight"
    changed[name] = bf16(floats(source[name]) / factors(HIDDEN))
    for reader in OPT_READERS[norm][left_out:]:
        rescale_columns(changed, f"{OPT}.{reader}.weight", factors(HIDDEN))
    found = Scan(tmp_path, source, quantized(changed)).found
    if left_out:
        assert "is not rescaled in return" in found["altered"][0]
    else:
        assert found == {"smoothed": [name]}


FUSED = f"{LAYER}.mlp.experts.gate_up_proj"


def fused_and_apart(source: Weights, candidate: Weights) -> tuple[list[Pair], list[Kept]]:
    """Pair experts whose gate and up lie in one tensor, row by row, with those stored apart."""
    fused = source.tensors[FUSED]
    experts, rows, columns = fused.shape
    size, shape = fused.size_bytes // experts, (rows // 2, columns)
    pairs = []
    for expert in range(experts):
        begin = fused.offsets[0] + expert * size
        part = type(fused)(dtype=fused.dtype, shape=shape, offsets=(begin, begin + size))
        for place, name in enumerate(("gate_proj", "up_proj")):
            matrix = StoredMatrix(
                module=FUSED,
                layout=PLAIN,
                parts={"weight": part},
                tensors={"weight": FUSED},
                shape=shape,
                expert=expert,
                first_row=place,
                row_step=2,
            )
            module = f"{LAYER}.mlp.experts.{expert}.{name}"
            apart = stored(candidate, module, shape)
            pairs.append(Pair(kind="experts", source=matrix, candidate=apart, scheme=UNDECLARED))
    return pairs, []


@pytest.mark.parametrize("deep", [False, True], ids=["sampled", "deep"])
@pytest.mark.parametrize(
    ("in_halves", "kind", "count"),
    [
        pytest.param((), None, 0, id="row-by-row"),
        pytest.param((0, 1), "in_halves", 4, id="in-halves"),
        pytest.param((1,), "not_decodable", 2, id="one-expert-in-halves"),
    ],
)
def test_interleaved_experts_may_lie_apart_in_halves_all_of_them(
    in_halves: tuple[int, ...], kind: str | None, count: int, deep: bool, tmp_path: Path
) -> None:
    fused = floats(bf16(np.random.default_rng(7).normal(0, 0.02, (2, 2 * INNER, HIDDEN))))
    apart: Tensors = {}
    for expert, values in enumerate(fused):
        gate, up = (
            (values[:INNER], values[INNER:]) if expert in in_halves else (values[::2], values[1::2])
        )
        prefix = f"{LAYER}.mlp.experts.{expert}"
        apart |= {f"{prefix}.gate_proj.weight": bf16(gate), f"{prefix}.up_proj.weight": bf16(up)}
    scan = Scan(tmp_path, {FUSED: bf16(fused)}, quantized(apart), deep=deep, pair=fused_and_apart)
    assert {each: len(names) for each, names in scan.found.items()} == (
        {kind: count} if kind else {}
    )
    assert not scan.over("sqnr_shortfall_db")


def test_interleaved_experts_that_hold_other_halves_are_far(tmp_path: Path) -> None:
    fused = floats(bf16(np.random.default_rng(7).normal(0, 0.02, (1, 2 * INNER, HIDDEN))))
    prefix = f"{LAYER}.mlp.experts.0"
    apart = {
        f"{prefix}.gate_proj.weight": bf16(fused[0, INNER:]),
        f"{prefix}.up_proj.weight": bf16(fused[0, :INNER]),
    }
    scan = Scan(tmp_path, {FUSED: bf16(fused)}, quantized(apart), pair=fused_and_apart)
    assert len(scan.over("sqnr_shortfall_db")) == 2


@pytest.mark.parametrize("deep", [False, True], ids=["sampled", "deep"])
@pytest.mark.parametrize(
    ("row", "noise", "strength", "found"),
    [
        pytest.param(0, 0.0, 1.0, (True, True), id="first-row"),
        pytest.param(100, 0.0, 1.0, (False, True), id="in-no-sample"),
        pytest.param(0, 0.0, 0.05, (False, False), id="negligible"),
        pytest.param(0, 0.12, 1.0, (False, False), id="calibrated"),
    ],
)
@pytest.mark.parametrize(
    ("layout", "options", "part", "damage"),
    [
        pytest.param("modelopt-nvfp4", {}, "weight", slice(8, 16), id="nvfp4"),
        pytest.param(
            "ct-packed", {"bits": 4, "group": 32}, "weight_packed", slice(4, 8), id="int4"
        ),
    ],
)
def test_a_damaged_group_is_found_where_all_else_is_as_rounded(
    layout: str,
    options: dict[str, Any],
    part: str,
    damage: slice,
    row: int,
    noise: float,
    strength: float,
    found: tuple[bool, bool],
    deep: bool,
    tmp_path: Path,
) -> None:
    generator = np.random.default_rng(7)
    shape = (1024, HIDDEN)
    values = generator.normal(0, 0.02, shape)
    values[row, 16:64] *= strength
    source = {f"{Q}.weight": bf16(values)}
    shifted = {f"{Q}.weight": bf16(values + noise * generator.normal(0, 0.02, shape))}
    candidate = quantized(shifted, layout, **options)
    words = candidate[f"{Q}.{part}"][1]
    put(candidate, f"{Q}.{part}", (row, damage), words[row + 500, damage])
    scan = Scan(tmp_path, source, candidate, deep=deep)
    assert not scan.over("sqnr_shortfall_db")
    names = scan.found.get("damaged_group", [])
    assert [name.partition(" ")[0] for name in names] == [Q] * found[deep]
    assert all("(1 of " in name for name in names)


@pytest.mark.parametrize(
    ("name", "rescale"),
    [
        pytest.param(UP, lambda t: rescale_rows(t, f"{UP}.weight", factors(INNER)), id="rows"),
        pytest.param(
            DOWN, lambda t: rescale_columns(t, f"{DOWN}.weight", factors(INNER)), id="columns"
        ),
    ],
)
def test_one_side_rescaled_alone_is_far_from_the_source(
    name: str, rescale: Callable[[Tensors], None], tmp_path: Path
) -> None:
    source = source_tensors()
    changed = dict(source)
    rescale(changed)
    scan = Scan(tmp_path, source, quantized(changed))
    assert list(scan.over("sqnr_shortfall_db")) == [name]


def test_rotated_values_are_not_measured(tmp_path: Path) -> None:
    source = source_tensors()
    changed = dict(source)
    rescale_columns(changed, f"{UP}.weight", factors(HIDDEN))
    scan = Scan(tmp_path, source, quantized(changed), transformed=True)
    assert scan.found.keys() == {"not_measured"}
    assert not scan.measurements.document()


def large_embedding(source: Tensors) -> tuple[str, tuple[int, int]]:
    name = "model.embed_tokens.weight"
    source[name] = bf16(np.random.default_rng(3).normal(size=(1024, HIDDEN)))
    return name, (777, 31)


@pytest.mark.parametrize(("deep", "found"), [(False, False), (True, True)])
def test_only_deep_finds_one_byte_in_the_midst_of_a_large_tensor(
    deep: bool, found: bool, tmp_path: Path
) -> None:
    source = source_tensors()
    name, place = large_embedding(source)
    candidate = quantized(source)
    put(candidate, name, place, candidate[name][1][place] ^ 1)
    assert Scan(tmp_path, source, candidate, deep=deep).found == (
        {"altered": [name]} if found else {}
    )


@pytest.mark.parametrize("place", [(0, 0), (1023, HIDDEN - 1)], ids=["first", "last"])
def test_a_sample_looks_at_both_ends(place: tuple[int, int], tmp_path: Path) -> None:
    source = source_tensors()
    name, _ = large_embedding(source)
    candidate = quantized(source)
    put(candidate, name, place, candidate[name][1][place] ^ 1)
    assert Scan(tmp_path, source, candidate).found == {"altered": [name]}


@pytest.mark.parametrize(
    ("dtype", "array", "altered"),
    [
        pytest.param("F32", lambda v: v, False, id="f32"),
        pytest.param("F16", lambda v: v.astype(np.float16), False, id="f16"),
        pytest.param("F32", lambda v: v * np.float32(1.001), True, id="f32-changed"),
    ],
)
def test_a_kept_tensor_may_be_written_in_another_type(
    dtype: str, array: Callable[[Array], Array], altered: bool, tmp_path: Path
) -> None:
    source = source_tensors()
    candidate = quantized(source)
    name = "model.embed_tokens.weight"
    candidate[name] = (dtype, array(floats(source[name])))
    assert Scan(tmp_path, source, candidate).found == ({"altered": [name]} if altered else {})


def test_f32_rounds_to_bf16_with_ties_to_even() -> None:
    values = np.array([1.00390625, 1.01171875, -3.3, 1e-40, np.inf, np.nan], np.float32)
    expected = floats(bf16(values[:4]))
    rounded = identity.rounded(values, "BF16")
    assert rounded[:4].tolist() == expected.tolist()
    assert rounded[4] == np.inf and np.isnan(rounded[5])


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        pytest.param("modelopt-nvfp4", (1, 16), id="one-group"),
        pytest.param("modelopt-nvfp4", (3, 48), id="few-rows"),
        pytest.param("ct-int8", (5, 7), id="odd"),
        pytest.param("modelopt-fp8", (1, 1), id="one-number"),
        pytest.param("ct-int8", (1001, 333), id="odd-and-large"),
    ],
)
@pytest.mark.parametrize("deep", [False, True], ids=["sampled", "deep"])
def test_small_and_odd_shapes(
    layout: str, shape: tuple[int, int], deep: bool, tmp_path: Path
) -> None:
    weight = bf16(np.random.default_rng(5).normal(size=shape))
    source = {f"{Q}.weight": weight}
    scan = Scan(tmp_path, source, quantized(source, layout), deep=deep)
    assert not scan.over("sqnr_shortfall_db")
    assert scan.summary["kinds"]["attention.qkv"]["tensors"] == 1


def test_a_source_on_the_grid_has_no_shortfall(tmp_path: Path) -> None:
    values = np.tile(np.array([0.5, -1, 6, 3], np.float32), (HIDDEN, HIDDEN // 4))
    source = {f"{Q}.weight": bf16(values)}
    scan = Scan(tmp_path, source, quantized(source))
    assert scan.clean
    assert scan.summary["kinds"]["attention.qkv"]["sqnr_db"] > 100


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_what_is_said_does_not_depend_on_threads(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_tensors(experts=True)
    changed = dict(source)
    smooth_all(changed)
    candidate = quantized(changed)
    for expert in range(EXPERTS):
        put(candidate, f"{LAYER}.mlp.experts.{expert}.up_proj.weight_scale", (1, 1), 0x7F)
        doubled(candidate, f"{LAYER}.mlp.experts.{expert}.gate_proj.weight_scale_2")

    def said(name: str, count: int) -> Mapping[str, Any]:
        monkeypatch.setattr(numbers.os, "cpu_count", lambda: count)
        scan = Scan(tmp_path / name, source, candidate)
        return {
            "findings": scan.findings.document(),
            "measurements": scan.measurements.document(),
            "summary": scan.summary,
        }

    assert said("some", threads) == said("one", 1)


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    source = source_tensors()
    scan = Scan(tmp_path, source, quantized(source))
    path = tmp_path / "candidate" / "model.safetensors"
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)
    files = TensorFiles(scan.candidate)
    with pytest.raises(ProbeError, match=r"model\.safetensors: ends within tensor"):
        for name in scan.candidate.tensors:
            list(files.chunks(name))


@pytest.mark.parametrize("turned", [False, True], ids=["as-it-lies", "turned"])
def test_one_expert_of_a_fused_tensor_is_read(turned: bool, tmp_path: Path) -> None:
    values = np.arange(3 * 4 * 6, dtype=np.float32).reshape(3, 4, 6)
    (tmp_path / "a").mkdir()
    write_file(tmp_path / "a" / "model.safetensors", {"experts.down_proj": f32(values)})
    weights = read_whole(tmp_path / "a")
    tensor = weights.tensors["experts.down_proj"]
    begin = tensor.offsets[0] + 4 * 6 * 4
    shape = (6, 4) if turned else (4, 6)
    part = type(tensor)(dtype="F32", shape=shape, offsets=(begin, begin + 4 * 6 * 4))
    matrix = StoredMatrix(
        module="experts.down_proj",
        layout=PLAIN,
        parts={"weight": part},
        tensors={"weight": "experts.down_proj"},
        shape=shape,
        expert=1,
        turned=turned,
    )
    expected = values[1].T if turned else values[1]
    read = StoredReader(TensorFiles(weights), matrix)
    assert np.array_equal(read("weight"), expected)
    assert np.array_equal(read("weight", slice(1, 3), slice(2, 4)), expected[1:3, 2:4])
