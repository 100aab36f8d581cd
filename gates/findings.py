"""Kinds of things that can be wrong with a checkpoint: which check each fails, and how to say it.

A probe reports facts under these names; the table says what a fact means for the verdict, and the
reference documentation is generated from it. A row without a failure class is worth knowing and no
reason to refuse.

Measures are for facts that only a limit makes good or bad: the probe counts tensors by the measured
value, rounded down, and the gate compares with the limit here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gates.criteria import (
    EXPERT_SCALE_OCTAVES,
    GAIN_ERROR_PERCENT,
    GAIN_SCATTER,
    SQNR_SHORTFALL_DB,
)
from gates.verdict import FailureClass

CHECKS = (
    "integrity",
    "completeness",
    "intent",
    "numbers",
    "metadata",
    "servability",
)
"""Parts of the examination of a checkpoint's files, beside the layer counts and the sizes."""


WHOLE = "checkpoint"
"""Group of what concerns a file or the checkpoint as a whole, and no kind of module."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of finding or measure.

    ``says`` completes "<count> ..." and names what the reader sees; ``remedy`` is the next step.
    """

    name: str
    check: str
    failure_class: FailureClass | None
    says: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Measure(Kind):
    """A kind that counts tensors whose measured value reaches ``limit``, in ``unit``."""

    limit: float
    unit: str


_SERVABLE = FailureClass.CHECKPOINT_NOT_SERVABLE
_COVERAGE = FailureClass.QUANT_COVERAGE_FAILURE
_COPY = "copy the checkpoint again and compare checksums; if it stays, export it again"
_EXPORT = "export the checkpoint again with a current version of the exporter"


def _rows(
    check: str, failure_class: FailureClass | None, *rows: tuple[str, str, str]
) -> tuple[Kind, ...]:
    return tuple(
        Kind(name=name, check=check, failure_class=failure_class, says=says, remedy=remedy)
        for name, says, remedy in rows
    )


_KINDS = (
    *_rows(
        "integrity",
        _SERVABLE,
        ("no_weights", "checkpoint without weights that can be read", _EXPORT),
        ("unusable_file", "file(s) of the checkpoint that are absent or cannot be read", _COPY),
        ("unusable_header", "file(s) whose header cannot be read", _COPY),
        (
            "unusable_tensor",
            "tensor(s) without a usable dtype, shape and place in the file",
            _EXPORT,
        ),
        ("truncated", "tensor(s) that reach beyond the end of their file", _COPY),
        ("overlapping", "tensor(s) that overlap another in their file", _EXPORT),
        ("hole", "place(s) in a file that belong to no tensor", _EXPORT),
        ("duplicate_name", "tensor name(s) that occur more than once", _EXPORT),
        ("missing_shard", "shard(s) that the index names and that do not exist", _COPY),
        ("missing_index", "index of several shards that does not exist", _COPY),
        (
            "two_sets",
            "set(s) of weights beside those of the index, which some loaders read instead",
            "remove the one that is left over",
        ),
        (
            "not_in_shard",
            "tensor(s) that the index names and that are not in the shard it names",
            _EXPORT,
        ),
        (
            "not_in_index",
            "tensor(s) of a shard that the index does not name",
            "write the index again from the shards",
        ),
        (
            "pickled",
            "pickled weight file(s), which can run code when loaded",
            "delete them, or convert them on a machine you can afford to lose",
        ),
        ("dangling_link", "link(s) that lead nowhere", "copy the files that the links stand for"),
    ),
    *_rows(
        "integrity",
        None,
        ("stray_file", "safetensors file(s) that the index does not name", ""),
        ("pickled_in_source", "pickled weight file(s) that the source has as well", ""),
        ("wrong_total_size", "index whose total_size is not the size of its tensors", ""),
    ),
    *_rows(
        "completeness",
        _COVERAGE,
        ("lost", "tensor(s) of the source lost", _EXPORT),
        ("reshaped", "tensor(s) of the source in another shape or type", _EXPORT),
        (
            "altered",
            "tensor(s) that the recipe leaves alone with other values than the source's",
            "export again from this source; --deep compares every byte",
        ),
    ),
    *_rows(
        "completeness",
        FailureClass.SIZE_NOT_REDUCED,
        (
            "left_beside",
            "original weight(s) left beside the quantized ones",
            "export again; loaders read either, and nobody knows which",
        ),
    ),
    *_rows(
        "completeness",
        None,
        ("added", "tensor(s) that the source does not have and the format does not explain", ""),
        ("not_stored", "tensor(s) left out that a loader makes from others", ""),
        ("smoothed", "tensor(s) rescaled, and the layer that follows rescaled in return", ""),
        (
            "rounded_again",
            "norm(s) to whose numbers one was added and taken away again, rounded each time",
            "",
        ),
    ),
    *_rows(
        "intent",
        FailureClass.MODEL_UNSUPPORTED,
        (
            "unknown_format",
            "quantization format(s) that this gate cannot read",
            "check the checkpoint with the exporter's own tools, or add the format",
        ),
    ),
    *_rows(
        "intent",
        _COVERAGE,
        ("left_unquantized", "layer(s) that the recipe means and that are unquantized", ""),
        ("not_intended", "layer(s) quantized that the recipe leaves alone", ""),
        ("declared_not_so", "layer(s) declared quantized that are not", ""),
        ("not_declared", "layer(s) quantized that the configuration declares unquantized", ""),
        ("declared_otherwise", "layer(s) in another precision than declared", ""),
        ("wrong_precision", "layer(s) in another precision than the recipe means", ""),
        ("wrong_group_size", "layer(s) in another group size than declared or meant", ""),
        ("unknown_layout", "layer(s) stored in no layout of the format", ""),
        (
            "mixed_group",
            "group(s) that engines fuse into one matrix, in different precisions",
            "quantize all members of the group, or none",
        ),
        ("contradiction", "contradiction(s) within the quantization configuration", ""),
    ),
    *_rows(
        "intent",
        None,
        ("unclassified", "matrices of a kind that no rule knows", ""),
        (
            "quantized_outside",
            "layer(s) quantized outside the decoder layers, of which the recipe says nothing",
            "",
        ),
        (
            "quantized_in_source",
            "layer(s) quantized alike in the source: held against no unquantized weights",
            "",
        ),
        ("finer_group_size", "layer(s) in finer groups than the recipe means", ""),
        (
            "declared_by_class",
            "layer(s) unquantized and declared as linears are, which are of a class of their own",
            "",
        ),
        ("other_activations", "layer(s) whose activations are declared otherwise than meant", ""),
    ),
    *_rows(
        "numbers",
        _COVERAGE,
        ("missing_companion", "layer(s) without a tensor that their precision needs", _EXPORT),
        ("non_finite_scale", "scale tensor(s) that hold NaN or infinity", "calibrate again"),
        ("zero_scale", "scale tensor(s) that hold 0 where the source does not", "calibrate again"),
        ("negative_scale", "scale tensor(s) that hold negative numbers", _EXPORT),
        ("non_finite_weight", "weight tensor(s) that hold NaN or infinity", _EXPORT),
        ("zero_weight", "weight tensor(s) that are zero throughout", _EXPORT),
        ("constant_weight", "weight tensor(s) that hold one value throughout", _EXPORT),
        (
            "damaged_group",
            "layer(s) with groups of weights that hold other values than the source's",
            "export again; --deep looks at every group",
        ),
        (
            "not_decodable",
            "layer(s) whose tensors contradict each other, so that no values can be told",
            _EXPORT,
        ),
        (
            "implausible_scale",
            "input scale(s) that no activations lead to",
            "calibrate again",
        ),
        (
            "neutral_input_scale",
            "input scale(s) of exactly 1 beside calibrated ones",
            "calibrate with text that reaches these layers",
        ),
    ),
    *_rows(
        "numbers",
        None,
        ("all_input_scales_neutral", "input scale(s), all of them exactly 1", ""),
        ("zero_in_source", "weight tensor(s) that are zero in the source as well", ""),
        ("not_measured", "layer(s) whose values could not be held against the source", ""),
        (
            "in_halves",
            "expert projection(s) that hold a half of the rows, which the source interleaves: "
            "right where a loader joins the halves as they are",
            "",
        ),
    ),
    *_rows(
        "servability",
        _SERVABLE,
        ("not_loadable", "reason(s) why the engine would not load it", ""),
    ),
    *_rows(
        "servability",
        None,
        ("servability_unknown", "question(s) about the engine that no table answers", ""),
        (
            "not_loadable_elsewhere",
            "reason(s) why an engine that nobody asked for would not load it",
            "",
        ),
    ),
)

_MEASURES = (
    Measure(
        name="sqnr_shortfall_db",
        check="numbers",
        failure_class=_COVERAGE,
        says="layer(s) far from the source's values",
        remedy="compare scales and packing order with the format; export again",
        limit=SQNR_SHORTFALL_DB,
        unit="dB under what the format gives for the same weights",
    ),
    Measure(
        name="gain_error_percent",
        check="numbers",
        failure_class=_COVERAGE,
        says="layer(s) whose values are the source's times a factor",
        remedy="a scale is inverted, swapped or not applied; export again",
        limit=GAIN_ERROR_PERCENT,
        unit="% off",
    ),
    Measure(
        name="gain_scatter",
        check="numbers",
        failure_class=_COVERAGE,
        says="layer(s) whose scales belong to other weights",
        remedy="scales are swapped, shifted or another layer's; export again",
        limit=GAIN_SCATTER,
        unit="times what rounding leaves",
    ),
    Measure(
        name="expert_scale_octaves",
        check="numbers",
        failure_class=_COVERAGE,
        says="expert scale(s) far from those of the other experts of their layer",
        remedy="calibrate with text that reaches every expert",
        limit=EXPERT_SCALE_OCTAVES,
        unit="octaves from the median",
    ),
)

KINDS: Mapping[str, Kind] = MappingProxyType({kind.name: kind for kind in _KINDS})
MEASURES: Mapping[str, Measure] = MappingProxyType({measure.name: measure for measure in _MEASURES})
