"""The checkpoint probe, on clean exports, on exports with one fault, and on broken files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors_files import (
    CONFIG,
    Tensors,
    attention,
    ct_config,
    dense,
    mixture,
    modelopt_config,
    quantize,
    write_checkpoint,
    write_file,
)

from conductor.probes.checkpoint import ProbeError, probe_checkpoint, probe_headers
from conductor.probes.formats import compressed_tensors, modelopt, patterns
from conductor.probes.modules import kind_of
from conductor.probes.safetensors_header import INDEX_FILE, Tensor
from gates import RECIPES, FailureClass, evaluate_checkpoint

DENSE, MIXTURE, FUSED = dense(), mixture(), mixture(fused=True)
NVFP4 = modelopt_config("NVFP4")
ATTENTION_GLOBS = [f"model.layers.{n}.self_attn*" for n in range(2)]
ROUTERS = [f"model.layers.{n}.mlp.gate" for n in range(2)]


def split_experts(layout: str) -> Tensors:
    """Return the fused mixture's export by an exporter that stores experts apart."""
    fused = quantize(FUSED, "modelopt-nvfp4", only="no such module")
    apart = {n: t for n, t in mixture().items() if ".experts." in n}
    kept = {n: t for n, t in fused.items() if ".experts." not in n}
    return quantize(kept | apart, layout)


def mixtral(tensors: Tensors) -> Tensors:
    """Return the tensors under the names of Mixtral's experts."""
    for short, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        tensors = {n.replace(f".{name}.", f".{short}."): t for n, t in tensors.items()}
    return tensors


@dataclass(frozen=True)
class Export:
    recipe: str
    bucket_count: int
    left_alone: int
    tensors: Tensors
    quantization: dict[str, Any] | None
    source: Tensors = field(default_factory=dense)
    config: dict[str, Any] = field(default_factory=dict)
    shards: int = 1


CLEAN = {
    "modelopt-nvfp4": Export("nvfp4", 14, 2, quantize(DENSE, "modelopt-nvfp4"), NVFP4),
    "modelopt-nvfp4-mlp-only": Export(
        "nvfp4_mlp_only",
        6,
        10,
        quantize(DENSE, "modelopt-nvfp4", only=".mlp."),
        modelopt_config("NVFP4", *ATTENTION_GLOBS),
    ),
    "modelopt-fp8": Export("fp8", 14, 2, quantize(DENSE, "modelopt-fp8"), modelopt_config("FP8")),
    "modelopt-int8": Export(
        "int8", 14, 2, quantize(DENSE, "modelopt-int8"), modelopt_config("W8A8_SQ_PER_CHANNEL")
    ),
    "modelopt-int4": Export(
        "int4_awq", 14, 2, quantize(DENSE, "modelopt-int4"), modelopt_config("W4A16_AWQ")
    ),
    "modelopt-mixed": Export(
        "nvfp4_mlp_only",
        6,
        10,
        quantize(DENSE, "modelopt-nvfp4", only=".mlp."),
        modelopt_config(
            "MIXED_PRECISION",
            quantized_layers={
                n.removesuffix(".weight"): {"quant_algo": "NVFP4"} for n in DENSE if ".mlp." in n
            },
        ),
    ),
    "ct-int8": Export("int8", 14, 2, quantize(DENSE, "ct-int8"), ct_config(8, "int")),
    "ct-fp8": Export("fp8", 14, 2, quantize(DENSE, "ct-fp8"), ct_config(8, "float")),
    "ct-int4": Export("w4a16", 14, 2, quantize(DENSE, "ct-int4"), ct_config(4, "int", 128)),
    "ct-nvfp4": Export("nvfp4", 14, 2, quantize(DENSE, "ct-nvfp4"), ct_config(4, "float", 16)),
    "ct-ignored-by-pattern": Export(
        "nvfp4_mlp_only",
        6,
        10,
        quantize(DENSE, "ct-nvfp4", only=".mlp."),
        ct_config(4, "float", 16, "re:.*self_attn.*"),
    ),
    "sharded": Export("nvfp4", 14, 2, quantize(DENSE, "modelopt-nvfp4"), NVFP4, shards=3),
    "experts-apart": Export(
        "nvfp4_experts_only",
        24,
        12,
        quantize(MIXTURE, "modelopt-nvfp4", only=".experts."),
        modelopt_config("NVFP4", *ROUTERS, *ATTENTION_GLOBS),
        source=MIXTURE,
    ),
    "experts-fused": Export("nvfp4", 32, 4, quantize(FUSED, "modelopt-nvfp4"), NVFP4, source=FUSED),
    "experts-fused-then-apart": Export(
        "nvfp4", 32, 4, split_experts("modelopt-nvfp4"), NVFP4, source=FUSED
    ),
    "experts-renamed": Export(
        "fp8", 32, 4, quantize(MIXTURE, "ct-fp8"), ct_config(8, "float"), source=mixtral(MIXTURE)
    ),
    "tied-head-not-stored": Export(
        "fp8",
        14,
        1,
        quantize({n: t for n, t in DENSE.items() if n != "lm_head.weight"}, "ct-fp8"),
        ct_config(8, "float"),
        config={"tie_word_embeddings": True},
    ),
}


def write_pair(directory: Path, export: Export) -> tuple[Path, Path]:
    config = CONFIG | export.config
    source = write_checkpoint(directory / "source", export.source, config)
    if export.quantization is not None:
        config = config | {"quantization_config": export.quantization}
    candidate = write_checkpoint(
        directory / "candidate", export.tensors, config, shards=export.shards
    )
    return candidate, source


def found(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["kind"]: finding for finding in summary["findings"]}


def probe(directory: Path, export: Export) -> dict[str, Any]:
    return probe_headers(*write_pair(directory, export), RECIPES[export.recipe])


@pytest.mark.parametrize("export", CLEAN.values(), ids=CLEAN.keys())
def test_clean_export(tmp_path: Path, export: Export) -> None:
    summary = probe(tmp_path, export)
    counts = {kind: n for kind, n in summary["layer_precision_counts"].items() if n}
    bucket = RECIPES[export.recipe].bucket
    assert counts == {bucket: export.bucket_count, "BF16_or_excluded": export.left_alone}
    assert found(summary).keys() <= {"not_stored"}
    assert summary["source_precision"] == "bf16"
    low, high = summary["expected_bytes"]
    assert low <= summary["output_bytes"] <= high
    verdict = evaluate_checkpoint(summary)
    assert verdict.passed, verdict.detail
    assert json.loads(json.dumps(summary)) == summary


def test_sizes_are_tensor_bytes(tmp_path: Path) -> None:
    summary = probe(tmp_path, CLEAN["ct-fp8"])
    linears = sum(s[0] * s[1] for n, (_, s) in DENSE.items() if "_proj" in n)
    rows = sum(s[0] for n, (_, s) in DENSE.items() if "_proj" in n)
    others = 2 * (2 * 512 * 256 + 3 * 256)
    assert summary["source_bytes"] == 2 * linears + others
    assert summary["output_bytes"] == linears + 2 * rows + others


def test_size_range_of_grouped_integers(tmp_path: Path) -> None:
    """16-bit scales in groups of 128 are the least; 32-bit ones and zero points the most."""
    summary = probe(tmp_path, CLEAN["ct-int4"])
    shapes = [s for n, (_, s) in DENSE.items() if "_proj" in n]
    elements = sum(rows * columns for rows, columns in shapes)
    beside = sum(4 * rows + 4 * columns + 64 for rows, columns in shapes)
    others = 2 * (2 * 512 * 256 + 3 * 256)
    assert summary["expected_bytes"] == [
        math.floor(0.99 * (elements * (4 + 16 / 128) / 8 + others)),
        math.ceil(1.01 * (elements * (4 + 36 / 128) / 8 + beside + others)),
    ]


def without(tensors: Tensors, *parts: str) -> Tensors:
    return {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


Q_PROJ = "model.layers.0.self_attn.q_proj"
CLEAN_NVFP4, CLEAN_FP8 = CLEAN["modelopt-nvfp4"], CLEAN["ct-fp8"]

WRONG = {
    "one-layer-left": (
        Export(
            "nvfp4",
            0,
            0,
            without(CLEAN_NVFP4.tensors, Q_PROJ) | {f"{Q_PROJ}.weight": ("BF16", (256, 256))},
            modelopt_config("NVFP4", Q_PROJ),
        ),
        "left_unquantized",
        1,
        Q_PROJ,
    ),
    "left-and-still-declared": (
        Export(
            "nvfp4",
            0,
            0,
            without(CLEAN_NVFP4.tensors, Q_PROJ) | {f"{Q_PROJ}.weight": ("BF16", (256, 256))},
            NVFP4,
        ),
        "left_unquantized",
        1,
        Q_PROJ,
    ),
    "head-quantized": (
        Export(
            "fp8",
            0,
            0,
            without(CLEAN_FP8.tensors, "lm_head")
            | {
                "lm_head.weight": ("F8_E4M3", (512, 256)),
                "lm_head.weight_scale": ("BF16", (512, 1)),
            },
            {**ct_config(8, "float"), "ignore": []},
        ),
        "not_intended",
        1,
        "lm_head (is FP8, and the recipe leaves lm_head alone)",
    ),
    "head-declared-and-not-quantized": (
        Export("fp8", 0, 0, CLEAN_FP8.tensors, {**ct_config(8, "float"), "ignore": []}),
        "declared_not_so",
        1,
        "lm_head (is unquantized, declared FP8)",
    ),
    "attention-quantized-by-mlp-recipe": (
        Export("nvfp4_mlp_only", 0, 0, CLEAN_NVFP4.tensors, NVFP4),
        "not_intended",
        8,
        "recipe leaves attention",
    ),
    "wrong-precision": (
        Export("fp8", 0, 0, CLEAN["ct-int8"].tensors, ct_config(8, "int")),
        "wrong_precision",
        14,
        "is INT8, and the recipe means FP8",
    ),
    "declared-otherwise": (
        Export("nvfp4", 0, 0, CLEAN_NVFP4.tensors, modelopt_config("FP8")),
        "declared_otherwise",
        14,
        "is NVFP4, declared FP8",
    ),
    "exclude-too-wide": (
        Export("nvfp4", 0, 0, CLEAN_NVFP4.tensors, modelopt_config("NVFP4", "*mlp*")),
        "not_declared",
        6,
        "is NVFP4, declared unquantized",
    ),
    "exclude-by-component": (
        Export("nvfp4", 0, 0, CLEAN_NVFP4.tensors, modelopt_config("NVFP4", "layers.1")),
        "not_declared",
        7,
        "model.layers.1.",
    ),
    "nothing-declared": (
        Export("fp8", 0, 0, CLEAN_FP8.tensors, None),
        "not_declared",
        14,
        "is FP8, declared unquantized",
    ),
    "scale-missing": (
        Export("nvfp4", 0, 0, without(CLEAN_NVFP4.tensors, f"{Q_PROJ}.weight_scale_2"), NVFP4),
        "missing_companion",
        1,
        "without weight_scale_2",
    ),
    "scale-of-another-group-size": (
        Export(
            "nvfp4",
            0,
            0,
            CLEAN_NVFP4.tensors | {f"{Q_PROJ}.weight_scale": ("F8_E4M3", (256, 8))},
            NVFP4,
        ),
        "wrong_group_size",
        1,
        "in groups of 32, declared 16",
    ),
    "mxfp4-for-nvfp4": (
        Export("nvfp4", 0, 0, quantize(DENSE, "ct-mxfp4"), ct_config(4, "float", 32)),
        "wrong_precision",
        14,
        "is MXFP4, and the recipe means NVFP4",
    ),
}


@pytest.mark.parametrize(("export", "kind", "count", "named"), WRONG.values(), ids=WRONG.keys())
def test_wrong_layers_are_counted_and_named(
    tmp_path: Path, export: Export, kind: str, count: int, named: str
) -> None:
    summary = probe(tmp_path, export)
    counts = summary["layer_precision_counts"]
    is_left = kind == "left_unquantized"
    assert counts["unexpected_unquantized"] == (count if is_left else 0)
    assert counts["declaration_mismatch"] == (0 if is_left else count)
    assert sum(counts.values()) == 16
    finding = found(summary)[kind]
    assert finding["count"] == sum(finding["groups"].values()) == count
    assert any(named in name for name in finding["names"])
    assert found(summary).keys() <= {kind, "mixed_group"}
    verdict = evaluate_checkpoint(summary)
    assert verdict.failure_class is FailureClass.QUANT_COVERAGE_FAILURE


@pytest.mark.parametrize(
    ("recipe", "quantization"),
    [("nvfp4_experts_only", modelopt_config(None)), ("nvfp4_experts_only", None)],
    ids=["declared", "undeclared"],
)
def test_recipe_that_means_nothing_here(
    tmp_path: Path, recipe: str, quantization: dict[str, Any] | None
) -> None:
    summary = probe(tmp_path, Export(recipe, 0, 0, DENSE, quantization))
    counts = {kind: n for kind, n in summary["layer_precision_counts"].items() if n}
    assert counts == {"BF16_or_excluded": 16}
    assert evaluate_checkpoint(summary).failure_class is FailureClass.MODEL_UNSUPPORTED


def test_unknown_method_covers_nothing(tmp_path: Path) -> None:
    tensors = without(DENSE, "_proj") | {
        n.replace(".weight", f".{part}"): ("I32", (1, 1))
        for n in DENSE
        if "_proj" in n
        for part in ("qweight", "qzeros", "scales")
    }
    summary = probe(tmp_path, Export("int4_awq", 0, 0, tensors, {"quant_method": "quark"}))
    assert summary["layer_precision_counts"]["INT4"] == 0
    assert summary["layer_precision_counts"]["declaration_mismatch"] == 14
    (finding,) = summary["findings"]
    assert (finding["kind"], finding["count"]) == ("unknown_format", 1)
    assert finding["names"] == [
        "unknown (quark): 14 layer(s) such as model.layers.0.self_attn.q_proj "
        "(qweight I32 [1, 1], qzeros I32 [1, 1], scales I32 [1, 1])"
    ]
    assert evaluate_checkpoint(summary).failure_class is FailureClass.MODEL_UNSUPPORTED


def test_names_are_cut_at_twenty(tmp_path: Path) -> None:
    fused = Export("nvfp4", 0, 0, mixture(), NVFP4, source=MIXTURE)
    finding = found(probe(tmp_path, fused))["left_unquantized"]
    assert (finding["count"], len(finding["names"])) == (32, 20)


NEW_LAYERS: Tensors = {
    f"model.layers.{n}.token_shift.receptance_proj.weight": ("BF16", (256, 256)) for n in range(2)
}
KNOWN_AND_LEFT_ALONE: Tensors = {
    "model.layers.0.mlp.gate.weight": ("BF16", (4, 256)),
    "model.layers.0.self_attn.q_norm.weight": ("BF16", (8, 32)),
    "model.layers.0.linear_attn.in_proj_a.weight": ("BF16", (8, 256)),
    "model.layers.0.linear_attn.conv1d.weight": ("BF16", (256, 4)),
    "model.layers.2.eh_proj.weight": ("BF16", (256, 512)),
    "model.visual.blocks.0.odd.weight": ("BF16", (256, 256)),
    "model.project_in.weight": ("BF16", (256, 256)),
}


def test_layers_of_an_unknown_kind_that_were_missed(tmp_path: Path) -> None:
    tensors = CLEAN_NVFP4.tensors | NEW_LAYERS
    summary = probe(tmp_path, Export("nvfp4", 0, 0, tensors, NVFP4, source=DENSE | NEW_LAYERS))
    assert summary["layer_precision_counts"]["unexpected_unquantized"] == 2
    assert found(summary)["left_unquantized"]["names"] == [
        f"model.layers.{n}.token_shift.receptance_proj "
        "(is unquantized, declared NVFP4, of no kind known)"
        for n in range(2)
    ]
    assert evaluate_checkpoint(summary).failure_class is FailureClass.QUANT_COVERAGE_FAILURE


def test_layers_of_an_unknown_kind_that_were_quantized(tmp_path: Path) -> None:
    source = DENSE | NEW_LAYERS
    export = Export("nvfp4", 16, 2, quantize(source, "modelopt-nvfp4"), NVFP4, source=source)
    summary = probe(tmp_path, export)
    assert summary["layer_precision_counts"]["NVFP4"] == 16
    assert evaluate_checkpoint(summary).passed


def test_layers_of_an_unknown_kind_beside_a_recipe_for_some_kinds(tmp_path: Path) -> None:
    clean = CLEAN["modelopt-nvfp4-mlp-only"]
    tensors, source = clean.tensors | NEW_LAYERS, DENSE | NEW_LAYERS
    export = Export(clean.recipe, 6, 12, tensors, clean.quantization, source=source)
    summary = probe(tmp_path, export)
    assert summary["layer_precision_counts"]["BF16_or_excluded"] == 12
    assert evaluate_checkpoint(summary).passed


@pytest.mark.parametrize("name", KNOWN_AND_LEFT_ALONE)
def test_matrices_that_every_recipe_leaves_alone(tmp_path: Path, name: str) -> None:
    extra = {name: KNOWN_AND_LEFT_ALONE[name]}
    tensors, source = CLEAN_NVFP4.tensors | extra, DENSE | extra
    summary = probe(tmp_path, Export("nvfp4", 14, 3, tensors, NVFP4, source=source))
    assert summary["layer_precision_counts"]["BF16_or_excluded"] == 3
    assert evaluate_checkpoint(summary).passed


LOST: dict[str, tuple[Tensors, str, str, str]] = {
    "linear": (without(CLEAN_NVFP4.tensors, Q_PROJ), "lost", f"{Q_PROJ}.weight", "attention.qkv"),
    "norm": (without(CLEAN_NVFP4.tensors, "model.norm"), "lost", "model.norm.weight", "other"),
    "head": (without(CLEAN_NVFP4.tensors, "lm_head"), "lost", "lm_head.weight", "lm_head"),
    "norm-of-another-shape": (
        CLEAN_NVFP4.tensors | {"model.norm.weight": ("BF16", (255,))},
        "reshaped",
        "model.norm.weight ([256] is now [255])",
        "other",
    ),
    "norm-of-another-type": (
        CLEAN_NVFP4.tensors | {"model.norm.weight": ("I8", (256,))},
        "reshaped",
        "model.norm.weight (BF16 is now I8)",
        "other",
    ),
}


@pytest.mark.parametrize(("tensors", "kind", "named", "group"), LOST.values(), ids=LOST.keys())
def test_lost_tensor(tmp_path: Path, tensors: Tensors, kind: str, named: str, group: str) -> None:
    summary = probe(tmp_path, Export("nvfp4", 0, 0, tensors, NVFP4))
    (finding,) = summary["findings"]
    assert (finding["kind"], finding["names"]) == (kind, [named])
    assert finding["groups"] == {group: 1}
    assert evaluate_checkpoint(summary).failure_class is FailureClass.QUANT_COVERAGE_FAILURE


def test_one_lost_expert_of_a_fused_source(tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.experts.3.up_proj"
    tensors = without(split_experts("modelopt-nvfp4"), lost)
    summary = probe(tmp_path, Export("nvfp4", 0, 0, tensors, NVFP4, source=FUSED))
    assert summary["layer_precision_counts"]["NVFP4"] == 31
    assert found(summary)["lost"]["names"] == [lost]


def test_pickled_weights_beside_safetensors(tmp_path: Path) -> None:
    candidate, source = write_pair(tmp_path, CLEAN_FP8)
    (candidate / "sub").mkdir()
    for name in ("pytorch_model.bin", "sub/x.pt"):
        (candidate / name).write_bytes(b"\x80\x04never opened")
    summary = probe_headers(candidate, source, RECIPES["fp8"])
    assert found(summary)["pickled"]["names"] == ["pytorch_model.bin", "sub/x.pt"]
    assert evaluate_checkpoint(summary).failure_class is FailureClass.CHECKPOINT_NOT_SERVABLE


def test_pickled_weights_that_the_source_has_too(tmp_path: Path) -> None:
    candidate, source = write_pair(tmp_path, CLEAN_FP8)
    for directory in (candidate, source):
        (directory / "pytorch_model.bin").write_bytes(b"\x80\x04never opened")
    summary = probe_headers(candidate, source, RECIPES["fp8"])
    assert found(summary).keys() == {"pickled_in_source"}
    assert evaluate_checkpoint(summary).passed


def test_both_configurations_must_agree(tmp_path: Path) -> None:
    candidate, source = write_pair(tmp_path, CLEAN_NVFP4)
    file = candidate / "hf_quant_config.json"
    for excluded, contradictions in (["lm_head"], 0), (["lm_head", "*mlp*"], 1):
        quantization = {"quant_algo": "NVFP4", "exclude_modules": excluded}
        file.write_text(json.dumps({"quantization": quantization}))
        summary = probe_headers(candidate, source, RECIPES["nvfp4"])
        assert ("contradiction" in found(summary)) == bool(contradictions)
        assert evaluate_checkpoint(summary).passed != bool(contradictions)


def test_only_the_separate_configuration(tmp_path: Path) -> None:
    candidate, source = write_pair(tmp_path, Export("nvfp4", 0, 0, CLEAN_NVFP4.tensors, None))
    quantization = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}
    (candidate / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    summary = probe_headers(candidate, source, RECIPES["nvfp4"])
    assert summary["layer_precision_counts"]["NVFP4"] == 14


def test_source_in_eight_bits_may_lose_its_scales(tmp_path: Path) -> None:
    source = {n: ("F8_E4M3" if "_proj" in n else d, s) for n, (d, s) in DENSE.items()}
    source |= {
        n.replace(".weight", ".weight_scale_inv"): ("F32", (1, 1)) for n in DENSE if "_proj" in n
    }
    summary = probe(tmp_path, Export("nvfp4", 0, 0, CLEAN_NVFP4.tensors, NVFP4, source=source))
    assert summary["source_precision"] == "fp8"
    assert evaluate_checkpoint(summary).passed


def test_layers_past_the_last_predict_further_tokens(tmp_path: Path) -> None:
    extra = attention(2)
    config = modelopt_config("NVFP4", "model.layers.2.*")
    summary = probe(
        tmp_path,
        Export("nvfp4", 0, 0, CLEAN_NVFP4.tensors | extra, config, source=DENSE | extra),
    )
    assert evaluate_checkpoint(summary).passed
    assert summary["layer_precision_counts"]["NVFP4"] == 14
    assert summary["layer_precision_counts"]["BF16_or_excluded"] == 6


EXCLUDES = [
    ("model.layers.1", "model.layers.1.mlp.up_proj", True),
    ("model.layers.1", "model.layers.10.mlp.up_proj", False),
    ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
    ("model.layers.0.mlp*", "model.layers.0.mlp.up_proj", True),
    ("lm_head", "lm_head", True),
    ("lm_head*", "model.lm_head", False),
]


@pytest.mark.parametrize(("pattern", "module", "excluded"), EXCLUDES)
def test_modelopt_exclusion(pattern: str, module: str, excluded: bool) -> None:
    declared = modelopt.read({"quant_algo": "FP8", "ignore": [pattern]}, {}, {}).declared(module)
    assert declared.precision == ("unquantized" if excluded else "FP8")


IGNORES = [
    ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", True),
    ("model.layers.1", "model.layers.1.mlp.up_proj", False),
    ("re:.*up_proj", "model.layers.1.mlp.up_proj", True),
    ("re:up_proj", "model.layers.1.mlp.up_proj", False),
    ("re:(", "model.layers.1.mlp.up_proj", False),
    ("Linear", "model.layers.1.mlp.up_proj", True),
    ("Embedding", "model.layers.1.mlp.up_proj", False),
]


def tensors_of(*modules: str) -> dict[str, Tensor]:
    return {f"{module}.weight": Tensor("I8", (1, 1), (0, 1)) for module in modules}


@pytest.mark.parametrize(("pattern", "module", "ignored"), IGNORES)
def test_compressed_tensors_ignore(pattern: str, module: str, ignored: bool) -> None:
    config = ct_config(8, "int", None, pattern)
    declared = compressed_tensors.read(config, {}, tensors_of(module)).declared(module)
    assert declared.precision == ("unquantized" if ignored else "INT8")


def test_compressed_tensors_groups_by_target() -> None:
    config = ct_config(8, "float")
    config["config_groups"]["group_1"] = {
        "targets": ["re:.*mlp.*"],
        "weights": {"num_bits": 4, "type": "float", "group_size": 16},
    }
    config["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*"]
    modules = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "other")
    declared = compressed_tensors.read(config, {}, tensors_of(*modules)).declared
    assert [declared(name).precision for name in modules] == ["FP8", "NVFP4", "unquantized"]


def test_a_pattern_that_never_ends_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "TIMEOUT_S", 0.5)
    endless = "re:(.*.*.*.*.*.*.*.*.*.*)*x$"
    config = ct_config(8, "float", None, "re:!.*", endless)
    summary = probe(tmp_path, Export("fp8", 0, 0, CLEAN_FP8.tensors, config))
    (problem,) = found(summary)["contradiction"]["names"]
    assert f"pattern {endless.removeprefix('re:')!r} cannot be matched" in problem
    assert not evaluate_checkpoint(summary).passed


KINDS = {
    "model.layers.3.self_attn.q_proj": "attention.qkv",
    "model.layers.3.self_attn.kv_a_proj_with_mqa": "attention.qkv",
    "model.layers.3.self_attn.o_proj": "attention.output",
    "transformer.h.0.attn.c_proj": "attention.output",
    "gpt_neox.layers.0.attention.dense": "attention.output",
    "model.decoder.layers.0.self_attn.out_proj": "attention.output",
    "model.layers.3.linear_attn.out_proj": "attention.qkv",
    "model.layers.3.linear_attn.in_proj_ba": "small",
    "model.layers.3.linear_attn.conv1d": "small",
    "backbone.layers.3.mixer.conv1d": "small",
    "model.layers.3.self_attn.q_norm": "norm",
    "model.layers.3.input_layernorm": "norm",
    "model.layers.3.token_shift.w_receptance": "unknown",
    "model.layers.3.per_layer_projection": "unknown",
    "model.layers.9.eh_proj": "mtp",
    "model.project_in": "other",
    "model.layers.3.mlp.gate_proj": "mlp",
    "transformer.h.0.mlp.c_proj": "mlp",
    "model.layers.3.mlp.shared_experts.up_proj": "mlp",
    "backbone.layers.3.mixer.up_proj": "mlp",
    "backbone.layers.3.mixer.o_proj": "attention.output",
    "model.layers.3.mlp.experts.17.w2": "experts",
    "model.layers.3.block_sparse_moe.experts.0.w1": "experts",
    "model.layers.3.feed_forward.experts.gate_up_proj": "experts",
    "model.layers.3.mlp.gate": "router",
    "model.layers.3.mlp.shared_expert_gate": "router",
    "model.layers.3.feed_forward.router": "router",
    "model.layers.3.altup.modality_router": "router",
    "model.layers.3.block_sparse_moe.router.layer": "router",
    "model.layers.3.block_sparse_moe.input_linear": "experts",
    "model.layers.3.shared_mlp.input_linear": "mlp",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias": "embeddings",
    "shared": "embeddings",
    "embed_out": "lm_head",
    "lm_head": "lm_head",
    "model.embed_tokens": "embeddings",
    "transformer.wte": "embeddings",
    "model.visual.blocks.0.attn.qkv": "vision",
    "vision_tower.encoder.layers.0.self_attn.q_proj": "vision",
    "audio_tower.layers.9.fc1": "audio",
    "model.embed_audio.embedding_projection": "audio",
    "mtp.layers.0.mlp.up_proj": "mtp",
    "model.layers.8.mlp.up_proj": "mtp",
    "model.norm": "other",
}


@pytest.mark.parametrize(("module", "kind"), KINDS.items(), ids=KINDS.keys())
def test_kind_of_module(module: str, kind: str) -> None:
    assert kind_of(module, 8) == kind


def _rewrite_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        document = json.loads((directory / name).read_text())
        change(document)
        (directory / name).write_text(json.dumps(document))

    return apply


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)


def _header(entries: dict[str, Any], data_bytes: int = 8) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        header = json.dumps(entries).encode()
        content = len(header).to_bytes(8, "little") + header + bytes(data_bytes)
        (directory / "model.safetensors").write_bytes(content)

    return apply


def _only_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _entry(begin: int, end: int, shape: Any = (4,), dtype: str = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / "model.safetensors").write_bytes(content)


NO_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-weights": (lambda d: (d / "model.safetensors").unlink(), "holds no safetensors weights"),
    "pickled-only": (_only_pickle, "pickled weights only (pytorch_model.bin)"),
    "no-tensors": (_header({}, 0), "holds no weights"),
}


@pytest.mark.parametrize(("break_it", "problem"), NO_WEIGHTS.values(), ids=NO_WEIGHTS.keys())
def test_directory_without_weights(
    tmp_path: Path, break_it: Callable[[Path], object], problem: str
) -> None:
    candidate, source = write_pair(tmp_path, CLEAN_FP8)
    break_it(candidate)
    summary = probe_checkpoint(candidate, source, RECIPES["fp8"])
    assert problem in found(summary)["no_weights"]["names"][0]
    assert evaluate_checkpoint(summary).failure_class is FailureClass.CHECKPOINT_NOT_SERVABLE
    (candidate / "config.json").unlink()
    with pytest.raises(ProbeError, match=re.escape(problem)):
        probe_checkpoint(candidate, source, RECIPES["fp8"])


UNUSABLE_CONFIG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-config": (lambda d: (d / "config.json").unlink(), "config.json (does not exist)"),
    "config-broken": (lambda d: (d / "config.json").write_text("{"), "is not valid JSON"),
    "config-a-list": (lambda d: (d / "config.json").write_text("[]"), "holds a JSON list"),
    "config-too-deep": (
        lambda d: (d / "config.json").write_text("[" * 100_000),
        "is not valid JSON",
    ),
    "config-not-text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{"), "is not UTF-8"),
}


@pytest.mark.parametrize(
    ("break_it", "problem"), UNUSABLE_CONFIG.values(), ids=UNUSABLE_CONFIG.keys()
)
def test_unusable_configuration(
    tmp_path: Path, break_it: Callable[[Path], object], problem: str
) -> None:
    candidate, source = write_pair(tmp_path, CLEAN_FP8)
    break_it(candidate)
    summary = probe_checkpoint(candidate, source, RECIPES["fp8"])
    assert problem in found(summary)["unusable_file"]["names"][0]
    assert evaluate_checkpoint(summary).failure_class is FailureClass.CHECKPOINT_NOT_SERVABLE
    break_it(source)
    with pytest.raises(ProbeError, match=r"config\.json"):
        probe_checkpoint(candidate, source, RECIPES["fp8"])


NOT_WHOLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "truncated"),
    "empty-file": (_bytes(b""), "unusable_header"),
    "header-of-2-to-63": (_bytes((1 << 63).to_bytes(8, "little")), "unusable_header"),
    "header-not-json": (_bytes((2).to_bytes(8, "little") + b"{]"), "unusable_header"),
    "offset-past-end": (_header({"a": _entry(8, 16)}), "truncated"),
    "negative-offset": (_header({"a": _entry(-8, 0)}), "unusable_tensor"),
    "overlap": (_header({"a": _entry(0, 8), "b": _entry(0, 8)}), "overlapping"),
    "hole": (_header({"a": _entry(0, 8), "b": _entry(16, 24)}, 24), "hole"),
    "trailing-bytes": (_header({"a": _entry(0, 8)}, 9), "hole"),
    "shape-against-size": (_header({"a": _entry(0, 8, [5])}), "unusable_tensor"),
    "shape-not-whole": (_header({"a": _entry(0, 8, [4.0])}), "unusable_tensor"),
    "shape-boolean": (_header({"a": _entry(0, 8, [True])}), "unusable_tensor"),
    "unknown-type": (_header({"a": _entry(0, 8, [4], "F7")}), "unusable_tensor"),
    "entry-a-list": (_header({"a": []}), "unusable_tensor"),
}


@pytest.mark.parametrize(("break_it", "kind"), NOT_WHOLE.values(), ids=NOT_WHOLE.keys())
def test_what_is_not_whole_fails_and_the_rest_is_examined(
    tmp_path: Path, break_it: Callable[[Path], object], kind: str
) -> None:
    candidate, source = write_pair(tmp_path, CLEAN_FP8)
    break_it(candidate)
    summary = probe_headers(candidate, source, RECIPES["fp8"])
    assert kind in found(summary)
    assert summary["examined"] == ["integrity", "completeness", "intent"]
    assert not evaluate_checkpoint(summary).passed


@pytest.mark.parametrize(("break_it", "kind"), NOT_WHOLE.values(), ids=NOT_WHOLE.keys())
def test_a_source_must_be_whole(
    tmp_path: Path, break_it: Callable[[Path], object], kind: str
) -> None:
    candidate, source = write_pair(tmp_path, CLEAN_FP8)
    break_it(source)
    with pytest.raises(ProbeError) as caught:
        probe_headers(candidate, source, RECIPES["fp8"])
    assert caught.value.path == source


def test_a_broken_tensor_is_said_once(tmp_path: Path) -> None:
    candidate, source = write_pair(tmp_path, CLEAN["sharded"])
    shards = json.loads((candidate / INDEX_FILE).read_text())["weight_map"]
    weight = f"{Q_PROJ}.weight"
    path = candidate / shards[weight]
    length = int.from_bytes(path.read_bytes()[:8], "little")
    entries = json.loads(path.read_bytes()[8 : 8 + length])
    last = max(entries, key=lambda name: entries[name]["data_offsets"][1])
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)
    summary = probe_headers(candidate, source, RECIPES["nvfp4"])
    (finding,) = summary["findings"]
    assert (finding["kind"], finding["count"]) == ("truncated", 1)
    assert last in finding["names"][0]


BROKEN_INDEX: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard-absent": (lambda d: (d / "model-1.safetensors").unlink(), "missing_shard"),
    "tensor-absent": (
        _rewrite_json(INDEX_FILE, lambda i: i["weight_map"].update(extra="model-0.safetensors")),
        "not_in_shard",
    ),
    "file-beside-it": (
        lambda d: write_file(d / "model.safetensors", CLEAN["sharded"].tensors),
        "two_sets",
    ),
    "absent": (lambda d: (d / INDEX_FILE).unlink(), "missing_index"),
}


@pytest.mark.parametrize(("break_it", "kind"), BROKEN_INDEX.values(), ids=BROKEN_INDEX.keys())
def test_broken_index(tmp_path: Path, break_it: Callable[[Path], object], kind: str) -> None:
    candidate, source = write_pair(tmp_path, CLEAN["sharded"])
    break_it(candidate)
    summary = probe_headers(candidate, source, RECIPES["nvfp4"])
    assert found(summary).keys() == {kind}
    assert evaluate_checkpoint(summary).failure_class is FailureClass.CHECKPOINT_NOT_SERVABLE


UNUSABLE_INDEX: dict[str, Callable[[dict[str, Any]], None]] = {
    "no-map": lambda index: index.clear(),
    "outside-the-directory": lambda index: index["weight_map"].update(x="../model.safetensors"),
}


@pytest.mark.parametrize("change", UNUSABLE_INDEX.values(), ids=UNUSABLE_INDEX.keys())
def test_unusable_index(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    candidate, source = write_pair(tmp_path, CLEAN["sharded"])
    _rewrite_json(INDEX_FILE, change)(candidate)
    summary = probe_headers(candidate, source, RECIPES["nvfp4"])
    assert found(summary).keys() == {"unusable_file"}
    assert evaluate_checkpoint(summary).failure_class is FailureClass.CHECKPOINT_NOT_SERVABLE


def test_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    candidate, source = write_pair(tmp_path, CLEAN["sharded"])
    before = probe_headers(candidate, source, RECIPES["nvfp4"])
    _rewrite_json(INDEX_FILE, lambda i: i["weight_map"].pop("model.norm.weight"))(candidate)
    summary = probe_headers(candidate, source, RECIPES["nvfp4"])
    assert "not_in_index" in found(summary)
    assert summary["output_bytes"] in (before["output_bytes"], before["output_bytes"] - 512)
    assert not evaluate_checkpoint(summary).passed


def test_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="is no directory"):
        probe_headers(tmp_path / "none", tmp_path / "none", RECIPES["fp8"])


TOKENIZER = {
    "truncation": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
    "added_tokens": [{"id": 0, "content": "a", "special": True}],
    "decoder": {"type": "ByteLevel"},
}
TEMPLATE = "{{ messages }}\n"


TOKENIZER_CONFIG = {
    "chat_template": TEMPLATE,
    "eos_token": {"content": "<end>", "special": True},
    "bos_token": None,
    "pad_token": "<pad>",
}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def write_companions(directory: Path) -> None:
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (directory / "modeling.py").write_text("class Model: ...")


def _config(**changes: Any) -> Callable[[Path], None]:
    return _rewrite_json("config.json", lambda config: config.update(changes))


def _without_config(name: str) -> Callable[[Path], None]:
    return _rewrite_json("config.json", lambda config: config.pop(name))


def _move_template(directory: Path, text: str = TEMPLATE) -> None:
    _rewrite_json("tokenizer_config.json", lambda t: t.pop("chat_template"))(directory)
    (directory / "chat_template.jinja").write_text(text)


def _modern_rope(directory: Path) -> None:
    _without_config("rope_theta")(directory)
    _config(rope_parameters={"rope_theta": 10000, "rope_type": "default"})(directory)


SAME: dict[str, Callable[[Path], object]] = {
    "untouched": lambda _: None,
    "library-version": _config(transformers_version="9.9", use_cache=False),
    "type-renamed": _config(dtype="bfloat16", torch_dtype="bfloat16"),
    "one-token-as-list": _config(eos_token_id=[0]),
    "rope-in-the-newer-spelling": _modern_rope,
    "default-filled-in": _config(head_dim=32, rms_norm_eps=1e-6, sliding_window=None),
    "template-in-its-own-file": _move_template,
    "token-without-its-properties": _rewrite_json(
        "tokenizer_config.json", lambda t: t.update(eos_token="<end>", bos_token="<start>")
    ),
    "tokenizer-truncates": _rewrite_json(
        "tokenizer.json", lambda t: t.update(truncation={"max_length": 64})
    ),
    "merges-as-pairs": _rewrite_json(
        "tokenizer.json", lambda t: t["model"].update(merges=[["a", "b"]])
    ),
    "no-generation-config": lambda d: (d / "generation_config.json").unlink(),
}

CHANGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "architecture": (_config(architectures=["Other"]), "config.json architectures"),
    "layers": (_config(num_hidden_layers=3), "config.json num_hidden_layers: 2 in the source, 3"),
    "vocabulary": (_config(vocab_size=513), "config.json vocab_size"),
    "field-gone": (_without_config("hidden_size"), "config.json hidden_size: 256 in the source"),
    "positions": (_config(max_position_embeddings=128), "config.json max_position_embeddings"),
    "rope": (_config(rope_theta=500000.0), "config.json rope"),
    "rope-scaling": (_config(rope_scaling={"type": "linear", "factor": 2}), "config.json rope"),
    "tied": (_config(tie_word_embeddings=True), "config.json tie_word_embeddings"),
    "stop-token": (_config(eos_token_id=1), "config.json eos_token_id"),
    "generation-stop-token": (
        _rewrite_json("generation_config.json", lambda g: g.update(eos_token_id=[0, 1])),
        "eos_token_id: [0] in the source, [0, 1]",
    ),
    "template-newline": (
        lambda d: _move_template(d, TEMPLATE + "\n"),
        "'default' renders the conversation",
    ),
    "template-gone": (
        _rewrite_json("tokenizer_config.json", lambda t: t.pop("chat_template")),
        "'default' of the source: absent in the candidate",
    ),
    "tokenizer-token-gone": (
        _rewrite_json("tokenizer_config.json", lambda t: t.pop("eos_token")),
        """tokenizer_config.json eos_token: "<end>" in the source, absent in the candidate""",
    ),
    "tokenizer-token-changed": (
        _rewrite_json("tokenizer_config.json", lambda t: t.update(pad_token="<other>")),
        "tokenizer_config.json pad_token",
    ),
    "code-named": (
        _config(auto_map={"AutoModel": "modeling_x.Model"}),
        """config.json auto_map, which names code to load: absent in the source, {"AutoModel": """,
    ),
    "tokenizer-code-named": (
        _rewrite_json("tokenizer_config.json", lambda t: t.update(auto_map={"AutoTokenizer": "x"})),
        "tokenizer_config.json auto_map",
    ),
    "code-added": (
        lambda d: _write(d / "sub" / "modeling_x.py", "raise SystemExit"),
        "code that the source does not have: sub/modeling_x.py",
    ),
    "code-changed": (
        lambda d: _write(d / "modeling.py", "raise SystemExit"),
        "code that differs from the source's: modeling.py",
    ),
    "tokenizer-gone": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is absent"),
    "vocabulary-entry": (
        _rewrite_json("tokenizer.json", lambda t: t["model"]["vocab"].update(c=2)),
        "tokenizer.json vocabulary 'c'",
    ),
    "special-token": (
        _rewrite_json("tokenizer.json", lambda t: t["added_tokens"][0].update(special=False)),
        "tokenizer.json added token 'a'",
    ),
    "decoder": (
        _rewrite_json("tokenizer.json", lambda t: t.update(decoder=None)),
        "tokenizer.json decoder",
    ),
}


def diffs_after(directory: Path, change: Callable[[Path], object]) -> list[str]:
    candidate, source = write_pair(directory, CLEAN_FP8)
    write_companions(source)
    write_companions(candidate)
    change(candidate)
    diffs: list[str] = probe_checkpoint(candidate, source, RECIPES["fp8"])["metadata_diffs"]
    return diffs


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_metadata_that_means_the_same(tmp_path: Path, change: Callable[[Path], object]) -> None:
    assert diffs_after(tmp_path, change) == []


@pytest.mark.parametrize(("change", "named"), CHANGED.values(), ids=CHANGED.keys())
def test_metadata_that_means_something_else(
    tmp_path: Path, change: Callable[[Path], object], named: str
) -> None:
    diffs = diffs_after(tmp_path, change)
    assert [diff for diff in diffs if named in diff], diffs


def test_tokenizer_configuration_that_is_gone(tmp_path: Path) -> None:
    diffs = diffs_after(tmp_path, lambda d: (d / "tokenizer_config.json").unlink())
    assert "tokenizer_config.json is absent in the candidate" in diffs


def test_a_checkpoint_is_not_its_own_source(tmp_path: Path) -> None:
    _, source = write_pair(tmp_path, CLEAN_FP8)
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(ProbeError, match="is the source itself"):
        probe_headers(link, source, RECIPES["fp8"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    candidate, source = write_pair(tmp_path, CLEAN_FP8)
    write_companions(source)
    write_companions(candidate)
    (candidate / name).unlink()
    os.mkfifo(candidate / name)
    try:
        summary = probe_checkpoint(candidate, source, RECIPES["fp8"])
    except ProbeError as error:
        assert "is not a regular file" in str(error)
    else:
        assert not evaluate_checkpoint(summary).passed
        assert "is not a regular file" in json.dumps(summary)


ODD_VALUES: list[Any] = [None, True, 10**400, "text", [], [[]], [{}], {}, {"a": {"b": []}}]


@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "quantization_config"),
        ("config.json", "text_config"),
        ("config.json", "rope_scaling"),
        ("config.json", "eos_token_id"),
        ("config.json", "architectures"),
        ("generation_config.json", "eos_token_id"),
        ("tokenizer_config.json", "chat_template"),
        ("tokenizer.json", "model"),
        ("tokenizer.json", "added_tokens"),
    ],
)
def test_odd_values_do_not_pass_or_crash(
    tmp_path: Path, file: str, key: str, value: object
) -> None:
    """Whatever stands in a field: no traceback, and no layer covered that is not declared so."""
    candidate, source = write_pair(tmp_path, CLEAN_FP8)
    for directory in (source, candidate):
        write_companions(directory)
        if directory == candidate or key != "quantization_config":
            _rewrite_json(file, lambda document: document.update({key: value}))(directory)
    summary = probe_checkpoint(candidate, source, RECIPES["fp8"])
    covered = summary["layer_precision_counts"]["FP8"]
    assert covered == (0 if key == "quantization_config" else 14)


def test_nested_configuration_is_compared(tmp_path: Path) -> None:
    export = Export("fp8", 0, 0, CLEAN_FP8.tensors, None, config={"text_config": {"n_layer": 2}})
    candidate, source = write_pair(tmp_path, export)
    _config(text_config={"num_hidden_layers": 3})(candidate)
    (diff,) = probe_checkpoint(candidate, source, RECIPES["fp8"])["metadata_diffs"]
    assert diff.startswith("config.json text_config.")
    assert diff.endswith(": 2 in the source, 3 in the candidate")
