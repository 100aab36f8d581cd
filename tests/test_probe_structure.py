"""What stands for what in two checkpoints: renamed, fused, split, lost, quantized, declared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors_files import (
    CONFIG,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    Tensors,
    ct_config,
    dense,
    mixture,
    mlp,
    modelopt_config,
    quantize,
    write_checkpoint,
)

from conductor.probes.checkpoint import ProbeError, probe_headers
from conductor.probes.contents import Contents, Matrices, expert_parts
from conductor.probes.findings import Findings, Measurements
from conductor.probes.formats import find_format
from conductor.probes.formats.layout import PLAIN
from conductor.probes.intent import examine
from conductor.probes.matching import common_name, match_modules
from conductor.probes.modules import Names
from conductor.probes.pairs import Counterparts, Pair
from conductor.probes.safetensors_header import Tensor, read_whole
from gates import RECIPES, FailureClass, evaluate_checkpoint

DENSE, MIXTURE, FUSED = dense(), mixture(), mixture(fused=True)
NVFP4, FP8 = modelopt_config("NVFP4"), ct_config(8, "float")
BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "self_attn", "router"]}


def renamed(tensors: Tensors, *changes: tuple[str, str]) -> Tensors:
    for old, new in changes:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def without(tensors: Tensors, *parts: str) -> Tensors:
    return {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def block_fp8(tensors: Tensors) -> Tensors:
    """Return the tensors of a source that is quantized in 2-D blocks."""
    stored: Tensors = {}
    for name, (dtype, shape) in tensors.items():
        if "_proj" in name and len(shape) == 2:
            scales = (-(-shape[0] // 128), -(-shape[1] // 128))
            stored[name] = ("F8_E4M3", shape)
            stored[name.replace(".weight", ".weight_scale_inv")] = ("F32", scales)
        else:
            stored[name] = (dtype, shape)
    return stored


def gpt_oss(*, quantized: bool) -> Tensors:
    """Return a decoder with fused experts that have biases, in MXFP4 or in BF16."""
    tensors = without(DENSE, ".mlp.")
    for layer in range(LAYERS):
        parent = f"model.layers.{layer}.mlp"
        tensors[f"{parent}.router.weight"] = ("BF16", (EXPERTS, HIDDEN))
        tensors[f"{parent}.router.bias"] = ("BF16", (EXPERTS,))
        for name, rows, columns in (
            ("gate_up_proj", 2 * INTERMEDIATE, HIDDEN),
            ("down_proj", HIDDEN, INTERMEDIATE),
        ):
            fused = f"{parent}.experts.{name}"
            tensors[f"{fused}_bias"] = ("BF16", (EXPERTS, rows))
            if quantized:
                tensors[f"{fused}_blocks"] = ("U8", (EXPERTS, rows, columns // 32, 16))
                tensors[f"{fused}_scales"] = ("U8", (EXPERTS, rows, columns // 32))
            else:
                tensors[fused] = ("BF16", (EXPERTS, columns, rows))
    return tensors


def gpt_oss_apart(layout: str, *, bias: bool = True) -> Tensors:
    """Return what an exporter makes of it that stores experts apart."""
    tensors = without(gpt_oss(quantized=False), ".experts.")
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            linears = mlp(f"model.layers.{layer}.mlp.experts.{expert}")
            if bias:
                linears |= {
                    name.replace(".weight", ".bias"): ("BF16", shape[:1])
                    for name, (_, shape) in linears.items()
                }
            tensors |= linears
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("bias")}
    return quantize(weights, layout) | biases


def vision_tower(prefix: str) -> Tensors:
    return {
        f"{prefix}patch_embed.proj.weight": ("BF16", (64, 3, 2, 14, 14)),
        f"{prefix}blocks.0.norm1.weight": ("BF16", (64,)),
        f"{prefix}blocks.0.attn.qkv.weight": ("BF16", (192, 64)),
        f"{prefix}blocks.0.attn.qkv.bias": ("BF16", (192,)),
        f"{prefix}blocks.0.mlp.fc1.weight": ("BF16", (128, 64)),
        f"{prefix}merger.mlp.0.weight": ("BF16", (64, 64)),
    }


def resized(tensors: Tensors, sizes: Mapping[int, int]) -> Tensors:
    return {
        name: (dtype, tuple(sizes.get(size, size) for size in shape))
        for name, (dtype, shape) in tensors.items()
    }


def int4(tensors: Tensors, group: int | None) -> Tensors:
    """Return an export to 4-bit integers with 32-bit scales for groups or whole rows."""
    packed = quantize(tensors, "ct-int4")
    for name, (_, shape) in tensors.items():
        if "_proj" in name:
            rows, columns = shape
            module, groups = name.removesuffix(".weight"), columns // group if group else 1
            packed[f"{module}.weight_scale"] = ("F32", (rows, groups))
            del packed[f"{module}.weight_zero_point"]
            if group:
                packed[f"{module}.weight_zero_point"] = ("I32", (rows // 8, groups))
    return packed


def granite() -> Tensors:
    """Return the mixture with all experts of a layer in one tensor, as Granite has them."""
    tensors = without(renamed(MIXTURE, (".mlp.gate.", ".mlp.router.layer.")), ".experts.")
    for layer in range(LAYERS):
        parent = f"model.layers.{layer}.mlp"
        shape = (EXPERTS, 2 * INTERMEDIATE, HIDDEN)
        tensors[f"{parent}.input_linear.weight"] = ("BF16", shape)
        tensors[f"{parent}.output_linear.weight"] = ("BF16", (EXPERTS, HIDDEN, INTERMEDIATE))
    return renamed(tensors, (".mlp.", ".block_sparse_moe."))


def granite_apart(layout: str) -> Tensors:
    """Return what exporters make of it."""
    names = (".mlp.gate.", ".mlp.router.layer."), (".mlp.", ".block_sparse_moe.")
    return renamed(quantize(MIXTURE, layout), *names)


def torch_attention(prefix: str) -> Tensors:
    """Return torch's own attention, whose output projection alone is a module."""
    return {
        f"{prefix}.in_proj_weight": ("BF16", (192, 64)),
        f"{prefix}.out_proj.weight": ("BF16", (64, 64)),
    }


def masks(layers: int = LAYERS) -> Tensors:
    """Return the causal masks that old files store."""
    return {
        f"model.layers.{layer}.self_attn.{part}": tensor
        for layer in range(layers)
        for part, tensor in {
            "bias": ("BOOL", (1, 1, 2048, 2048)),
            "masked_bias": ("F32", ()),
        }.items()
    }


VISION = DENSE | vision_tower("model.visual.")
VISION_NVFP4 = quantize(DENSE, "modelopt-nvfp4") | vision_tower("model.visual.")
MTP = DENSE | {"mtp.fc.weight": ("BF16", (256, 512)), **mlp("mtp.layers.0.mlp")}
MTP_NVFP4 = quantize(DENSE, "modelopt-nvfp4") | without(MTP, *DENSE)
NVFP4_BUT_VISION = modelopt_config("NVFP4", "model.visual*")
NVFP4_BUT_MTP = modelopt_config("NVFP4", "mtp*")


@dataclass(frozen=True)
class Case:
    """An export; ``quantized`` and ``left_alone`` are the layers counted where it is clean."""

    source: Tensors
    tensors: Tensors
    quantization: Mapping[str, Any] | None
    recipe: str = "nvfp4"
    quantized: int = 0
    left_alone: int = 0
    source_precision: str = "bf16"
    source_quantization: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: frozenset[str] = frozenset()


def write(directory: Path, case: Case) -> tuple[Path, Path]:
    config = {**CONFIG, **case.config}
    stated = [
        {**config, "quantization_config": part} if part is not None else config
        for part in (case.quantization, case.source_quantization)
    ]
    candidate = write_checkpoint(directory / "candidate", case.tensors, stated[0])
    return candidate, write_checkpoint(directory / "source", case.source, stated[1])


def probe(directory: Path, case: Case) -> dict[str, Any]:
    return probe_headers(*write(directory, case), RECIPES[case.recipe])


def kinds(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["kind"]: finding for finding in summary["findings"]}


LANGUAGE_MODEL = ("model.", "language_model.model.")
NESTED = ("model.", "model.language_model.")
MIXTRAL = (
    (".mlp.", ".block_sparse_moe."),
    (".gate_proj.", ".w1."),
    (".down_proj.", ".w2."),
    (".up_proj.", ".w3."),
)
GPT_OSS = {"model_type": "gpt_oss"}
POSITION_BIAS: Tensors = {
    "model.layers.0.self_attn.relative_attention_bias.weight": ("BF16", (32, 64))
}
OUTSIDE: Tensors = {"model.connector.modality_proj.weight": ("BF16", (2048, 2048))}

CLEAN = {
    "prefix-added": Case(
        DENSE, renamed(quantize(DENSE, "modelopt-nvfp4"), LANGUAGE_MODEL), NVFP4, "nvfp4", 14, 2
    ),
    "prefix-dropped": Case(
        renamed(DENSE, NESTED), quantize(DENSE, "modelopt-nvfp4"), NVFP4, "nvfp4", 14, 2
    ),
    "prefix-in-another-order": Case(
        renamed(DENSE, LANGUAGE_MODEL),
        renamed(quantize(DENSE, "ct-fp8"), NESTED),
        FP8,
        "fp8",
        14,
        2,
    ),
    "prefix-of-the-head-too": Case(
        DENSE,
        renamed(quantize(DENSE, "modelopt-nvfp4"), LANGUAGE_MODEL, ("lm_", "language_model.lm_")),
        modelopt_config("NVFP4", "language_model.lm_head"),
        "nvfp4",
        14,
        2,
    ),
    "vision-tower": Case(VISION, VISION_NVFP4, NVFP4_BUT_VISION, "nvfp4", 14, 5),
    "vision-tower-under-another-prefix": Case(
        VISION,
        quantize(DENSE, "modelopt-nvfp4") | vision_tower("visual."),
        NVFP4_BUT_VISION,
        "nvfp4",
        14,
        5,
    ),
    "vision-tower-excluded-without-its-prefix": Case(
        DENSE | vision_tower("model.vision_tower."),
        quantize(DENSE, "modelopt-nvfp4") | vision_tower("model.vision_tower."),
        modelopt_config("NVFP4", "vision_tower*"),
        "nvfp4",
        14,
        5,
    ),
    "vision-tower-renamed": Case(
        VISION,
        renamed(quantize(DENSE, "modelopt-nvfp4"), NESTED) | vision_tower("vision_tower."),
        modelopt_config("NVFP4", "vision_tower*"),
        "nvfp4",
        14,
        5,
    ),
    "mtp-kept": Case(MTP, MTP_NVFP4, NVFP4_BUT_MTP, "nvfp4", 14, 6),
    "mixtral-to-common-names": Case(
        renamed(MIXTURE, *MIXTRAL), quantize(MIXTURE, "ct-fp8"), FP8, "fp8", 32, 4
    ),
    "common-names-to-mixtral": Case(
        MIXTURE, renamed(quantize(MIXTURE, "ct-fp8"), *MIXTRAL), FP8, "fp8", 32, 4
    ),
    "experts-fused": Case(MIXTURE, quantize(FUSED, "modelopt-nvfp4"), NVFP4, "nvfp4", 32, 4),
    "experts-fused-from-mixtral": Case(
        renamed(MIXTURE, *MIXTRAL), quantize(FUSED, "modelopt-nvfp4"), NVFP4, "nvfp4", 32, 4
    ),
    "experts-apart": Case(FUSED, quantize(MIXTURE, "modelopt-nvfp4"), NVFP4, "nvfp4", 32, 4),
    "block-fp8-source": Case(
        block_fp8(DENSE),
        quantize(DENSE, "modelopt-nvfp4"),
        NVFP4,
        "nvfp4",
        14,
        2,
        source_precision="fp8",
        source_quantization=BLOCK_FP8,
    ),
    "block-fp8-source-left-in-part": Case(
        block_fp8(MIXTURE),
        quantize(MIXTURE, "modelopt-nvfp4", only=".experts."),
        modelopt_config("NVFP4", "*self_attn*", "*.gate"),
        "nvfp4_experts_only",
        24,
        12,
        source_precision="fp8",
        source_quantization=BLOCK_FP8,
    ),
    "block-fp8-source-kept-as-it-is": Case(
        block_fp8(DENSE),
        block_fp8(DENSE),
        BLOCK_FP8,
        "fp8",
        14,
        2,
        source_precision="fp8",
        source_quantization=BLOCK_FP8,
        notes=frozenset({"quantized_in_source"}),
    ),
    "gpt-oss-to-fused-nvfp4": Case(
        gpt_oss(quantized=True),
        quantize(without(gpt_oss(quantized=False), "_bias"), "modelopt-nvfp4", only=".experts.")
        | {n: t for n, t in gpt_oss(quantized=False).items() if n.endswith("_bias")},
        modelopt_config("NVFP4", "*self_attn*", "*.router"),
        "nvfp4_experts_only",
        24,
        12,
        source_precision="mxfp4",
        source_quantization=MXFP4,
        config=GPT_OSS,
    ),
    "gpt-oss-to-fp8-apart": Case(
        gpt_oss(quantized=True),
        gpt_oss_apart("ct-fp8"),
        FP8,
        "fp8",
        32,
        4,
        source_precision="mxfp4",
        source_quantization=MXFP4,
        config=GPT_OSS,
    ),
    "gpt-oss-left-as-it-is": Case(
        gpt_oss(quantized=True),
        gpt_oss(quantized=True),
        MXFP4,
        "mxfp4_experts_only",
        24,
        12,
        source_precision="mxfp4",
        source_quantization=MXFP4,
        config=GPT_OSS,
        notes=frozenset({"quantized_in_source"}),
    ),
    "gpt-oss-made-from-bf16": Case(
        gpt_oss(quantized=False),
        gpt_oss(quantized=True),
        MXFP4,
        "mxfp4_experts_only",
        24,
        12,
        config=GPT_OSS,
    ),
    "nvfp4-source": Case(
        quantize(DENSE, "modelopt-nvfp4"),
        quantize(DENSE, "ct-fp8"),
        FP8,
        "fp8",
        14,
        2,
        source_precision="nvfp4",
        source_quantization=NVFP4,
    ),
    "packed-integer-source": Case(
        quantize(DENSE, "ct-int4"),
        quantize(DENSE, "ct-fp8"),
        FP8,
        "fp8",
        14,
        2,
        source_precision="int4",
        source_quantization=ct_config(4, "int", 128),
    ),
    "tied-head-stored": Case(
        without(DENSE, "lm_head"),
        quantize(DENSE, "modelopt-nvfp4"),
        NVFP4,
        "nvfp4",
        14,
        2,
        config={"tie_word_embeddings": True},
    ),
    "tied-embeddings-not-stored": Case(
        DENSE,
        without(quantize(DENSE, "modelopt-nvfp4"), "embed_tokens"),
        NVFP4,
        "nvfp4",
        14,
        1,
        config={"tie_word_embeddings": True},
        notes=frozenset({"not_stored"}),
    ),
    "computed-tables-not-stored": Case(
        DENSE | {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (16,))},
        quantize(DENSE, "modelopt-nvfp4"),
        NVFP4,
        "nvfp4",
        14,
        2,
        notes=frozenset({"not_stored"}),
    ),
    "cache-scales": Case(
        DENSE,
        quantize(DENSE, "modelopt-nvfp4")
        | {f"model.layers.{n}.self_attn.k_proj.k_scale": ("F32", ()) for n in range(2)}
        | {f"model.layers.{n}.self_attn.v_proj.v_scale": ("F32", ()) for n in range(2)},
        modelopt_config("NVFP4", kv_cache_scheme={"num_bits": 8, "type": "float"}),
        "nvfp4",
        14,
        2,
    ),
    "causal-masks-not-stored": Case(
        DENSE | masks(),
        quantize(DENSE, "modelopt-nvfp4"),
        NVFP4,
        "nvfp4",
        14,
        2,
        notes=frozenset({"not_stored"}),
    ),
    "causal-masks-stored": Case(
        DENSE | masks(), quantize(DENSE, "modelopt-nvfp4") | masks(), NVFP4, "nvfp4", 14, 2
    ),
    "finer-groups": Case(
        DENSE,
        int4(DENSE, 32),
        ct_config(4, "int", 32),
        "w4a16",
        14,
        2,
        notes=frozenset({"finer_group_size"}),
    ),
    "whole-rows-that-groups-do-not-divide": Case(
        resized(DENSE, {HIDDEN: 2080, INTERMEDIATE: 2080}),
        int4(resized(DENSE, {HIDDEN: 2080, INTERMEDIATE: 2080}), None),
        ct_config(4, "int"),
        "w4a16",
        14,
        2,
    ),
    "head-declared-by-another-name": Case(
        renamed(DENSE, ("lm_head", "embed_out")),
        renamed(quantize(DENSE, "ct-fp8"), ("lm_head", "embed_out")),
        FP8,
        "fp8",
        14,
        2,
    ),
    "linear-of-another-class": Case(
        DENSE | torch_attention("vision_tower.head.attention"),
        quantize(DENSE, "ct-fp8") | torch_attention("vision_tower.head.attention"),
        FP8,
        "fp8",
        14,
        3,
        notes=frozenset({"declared_by_class"}),
    ),
    "granite-experts-apart": Case(granite(), granite_apart("ct-fp8"), FP8, "fp8", 32, 4),
    "position-bias": Case(
        DENSE | POSITION_BIAS, quantize(DENSE, "ct-fp8") | POSITION_BIAS, FP8, "fp8", 14, 3
    ),
    "linear-outside-the-layers-quantized": Case(
        DENSE | OUTSIDE,
        quantize(DENSE, "ct-fp8") | quantize(OUTSIDE, "ct-fp8"),
        FP8,
        "fp8",
        15,
        2,
        notes=frozenset({"unclassified", "quantized_outside"}),
    ),
    "linear-outside-the-layers-left": Case(
        DENSE | OUTSIDE,
        quantize(DENSE, "ct-fp8") | OUTSIDE,
        FP8,
        "fp8",
        14,
        3,
        notes=frozenset({"unclassified"}),
    ),
    "router-by-another-name": Case(
        DENSE | {"model.layers.0.altup.modality_router.weight": ("BF16", (4, 256))},
        quantize(DENSE, "ct-fp8")
        | {"model.layers.0.altup.modality_router.weight": ("BF16", (4, 256))},
        FP8,
        "fp8",
        14,
        3,
    ),
    "something-beside": Case(
        DENSE,
        quantize(DENSE, "modelopt-nvfp4") | {"model.calibration_state": ("F32", (3,))},
        NVFP4,
        "nvfp4",
        14,
        2,
        notes=frozenset({"added"}),
    ),
}


@pytest.mark.parametrize("case", CLEAN.values(), ids=CLEAN.keys())
def test_clean_export(tmp_path: Path, case: Case) -> None:
    summary = probe(tmp_path, case)
    assert kinds(summary).keys() == case.notes, summary["findings"]
    counts = {kind: n for kind, n in summary["layer_precision_counts"].items() if n}
    bucket = RECIPES[case.recipe].bucket
    assert counts == {bucket: case.quantized, "BF16_or_excluded": case.left_alone}
    assert summary["source_precision"] == case.source_precision
    low, high = summary["expected_bytes"]
    assert low <= summary["output_bytes"] <= high
    assert json.loads(json.dumps(summary)) == summary


Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
CLEAN_NVFP4 = quantize(DENSE, "modelopt-nvfp4")
CLEAN_INT4 = quantize(DENSE, "ct-int4")
INT4 = ct_config(4, "int", 128)
EXPERT = "model.layers.1.mlp.experts.2"
WIDE = resized(DENSE, {HIDDEN: 512, INTERMEDIATE: 1024})


def fp8_linear(module: str, rows: int = 256, columns: int = 256) -> Tensors:
    return {
        f"{module}.weight": ("F8_E4M3", (rows, columns)),
        f"{module}.weight_scale": ("F32", ()),
        f"{module}.input_scale": ("F32", ()),
    }


def nvfp4_linear(module: str) -> Tensors:
    packed = quantize({"a_proj.weight": ("BF16", (256, 256))}, "modelopt-nvfp4")
    return renamed(packed, ("a_proj", module))


def mixed(*fp8: str) -> dict[str, Any]:
    layers = {
        name.removesuffix(".weight"): {"quant_algo": "NVFP4"} for name in DENSE if "_proj" in name
    }
    return modelopt_config(
        "MIXED_PRECISION", quantized_layers=layers | {name: {"quant_algo": "FP8"} for name in fp8}
    )


WRONG: dict[str, tuple[Case, str, int, str, str]] = {
    "vision-tower-lost": (
        Case(VISION, CLEAN_NVFP4, NVFP4_BUT_VISION),
        "lost",
        6,
        "model.visual.patch_embed.proj.weight",
        "vision",
    ),
    "vision-bias-lost": (
        Case(VISION, without(VISION_NVFP4, "qkv.bias"), NVFP4_BUT_VISION),
        "lost",
        1,
        "model.visual.blocks.0.attn.qkv.bias",
        "vision",
    ),
    "vision-tower-quantized": (
        Case(
            VISION,
            VISION_NVFP4 | fp8_linear("model.visual.blocks.0.mlp.fc1", 128, 64),
            NVFP4_BUT_VISION,
        ),
        "not_intended",
        1,
        "model.visual.blocks.0.mlp.fc1 (is FP8, and the recipe leaves vision alone)",
        "vision",
    ),
    "vision-tower-declared": (
        Case(VISION, VISION_NVFP4, NVFP4),
        "declared_not_so",
        3,
        "model.visual.blocks.0.attn.qkv (is unquantized, declared NVFP4)",
        "vision",
    ),
    "mtp-lost": (
        Case(MTP, CLEAN_NVFP4, NVFP4_BUT_MTP),
        "lost",
        4,
        "mtp.layers.0.mlp.gate_proj.weight",
        "mtp",
    ),
    "expert-lost": (
        Case(MIXTURE, without(quantize(MIXTURE, "modelopt-nvfp4"), EXPERT), NVFP4),
        "lost",
        3,
        f"{EXPERT}.gate_proj.weight",
        "experts",
    ),
    "expert-lost-where-names-differ": (
        Case(
            renamed(MIXTURE, *MIXTRAL),
            without(quantize(MIXTURE, "modelopt-nvfp4"), EXPERT),
            NVFP4,
        ),
        "lost",
        3,
        "model.layers.1.block_sparse_moe.experts.2.w2.weight",
        "experts",
    ),
    "expert-of-a-fused-source-lost": (
        Case(FUSED, without(quantize(MIXTURE, "modelopt-nvfp4"), EXPERT), NVFP4),
        "lost",
        3,
        f"{EXPERT}.down_proj",
        "experts",
    ),
    "all-experts-of-a-layer-lost": (
        Case(FUSED, without(quantize(FUSED, "modelopt-nvfp4"), "1.mlp.experts"), NVFP4),
        "lost",
        2,
        "model.layers.1.mlp.experts.gate_up_proj",
        "experts",
    ),
    "last-experts-of-a-fused-tensor-lost": (
        Case(
            FUSED,
            quantize(FUSED, "modelopt-nvfp4")
            | {"model.layers.0.mlp.experts.down_proj": ("U8", (EXPERTS - 1, 192, 256))},
            NVFP4,
        ),
        "unknown_layout",
        4,
        "model.layers.0.mlp.experts.down_proj (stored in no known layout",
        "experts",
    ),
    "expert-biases-lost": (
        Case(
            gpt_oss(quantized=True),
            gpt_oss_apart("ct-fp8", bias=False),
            FP8,
            "fp8",
            source_quantization=MXFP4,
            config=GPT_OSS,
        ),
        "lost",
        24,
        "model.layers.0.mlp.experts.gate_up_proj_bias",
        "experts",
    ),
    "ambiguous-name": (
        Case(
            DENSE,
            renamed(CLEAN_NVFP4, LANGUAGE_MODEL)
            | {"model.language_model.norm.weight": ("BF16", (256,))},
            NVFP4,
        ),
        "lost",
        1,
        "model.norm.weight",
        "other",
    ),
    "linear-of-another-shape": (
        Case(
            VISION,
            VISION_NVFP4 | {"model.visual.merger.mlp.0.weight": ("BF16", (64, 32))},
            NVFP4_BUT_VISION,
        ),
        "reshaped",
        1,
        "model.visual.merger.mlp.0 ([64, 64] is now [64, 32])",
        "vision",
    ),
    "no-layout": (
        Case(DENSE, CLEAN_NVFP4 | {f"{Q_PROJ}.weight": ("U8", (256, 96))}, NVFP4),
        "unknown_layout",
        1,
        f"{Q_PROJ} (stored in no known layout: input_scale F32 []",
        "attention.qkv",
    ),
    "weight-lost-beside-its-scales": (
        Case(DENSE, {n: t for n, t in CLEAN_NVFP4.items() if n != f"{Q_PROJ}.weight"}, NVFP4),
        "lost",
        1,
        f"{Q_PROJ} (the weight; there are input_scale, weight_scale, weight_scale_2)",
        "attention.qkv",
    ),
    "fused-weight-lost-beside-its-scales": (
        Case(
            FUSED,
            {
                name: tensor
                for name, tensor in quantize(FUSED, "modelopt-nvfp4").items()
                if name != "model.layers.0.mlp.experts.down_proj"
            },
            NVFP4,
        ),
        "lost",
        4,
        "model.layers.0.mlp.experts.down_proj (the weight; there are input_scale, weight_scale",
        "experts",
    ),
    "tied-head-quantized": (
        Case(
            without(DENSE, "lm_head"),
            CLEAN_NVFP4 | fp8_linear("lm_head", 512),
            NVFP4,
            config={"tie_word_embeddings": True},
        ),
        "not_intended",
        1,
        "lm_head (is FP8, and the recipe leaves lm_head alone)",
        "lm_head",
    ),
    "router-quantized": (
        Case(
            MIXTURE,
            quantize(MIXTURE, "modelopt-nvfp4") | fp8_linear("model.layers.0.mlp.gate", EXPERTS),
            NVFP4,
        ),
        "not_intended",
        1,
        "model.layers.0.mlp.gate (is FP8, and the recipe leaves router alone)",
        "router",
    ),
    "fused-experts-left": (
        Case(FUSED, quantize(FUSED, "modelopt-nvfp4", only="self_attn"), NVFP4),
        "left_unquantized",
        24,
        "model.layers.0.mlp.experts.gate_up_proj (is unquantized, declared NVFP4)",
        "experts",
    ),
    "experts-apart-left": (
        Case(FUSED, quantize(MIXTURE, "modelopt-nvfp4", only="self_attn"), NVFP4),
        "left_unquantized",
        24,
        "model.layers.0.mlp.experts.0.gate_proj (is unquantized, declared NVFP4)",
        "experts",
    ),
    "left-in-the-precision-of-the-source": (
        Case(
            block_fp8(DENSE),
            without(CLEAN_NVFP4, Q_PROJ)
            | {n: t for n, t in block_fp8(DENSE).items() if Q_PROJ in n},
            NVFP4,
            source_quantization=BLOCK_FP8,
        ),
        "left_unquantized",
        1,
        f"{Q_PROJ} (is FP8, as in the source)",
        "attention.qkv",
    ),
    "kept-quantized-and-not-declared": (
        Case(
            block_fp8(MIXTURE),
            quantize({n: t for n, t in MIXTURE.items() if "experts" in n}, "modelopt-nvfp4")
            | {n: t for n, t in block_fp8(MIXTURE).items() if ".experts." not in n},
            modelopt_config("NVFP4", "*self_attn*", "*.gate"),
            "nvfp4_experts_only",
            source_quantization=BLOCK_FP8,
        ),
        "not_declared",
        8,
        f"{Q_PROJ} (is FP8, declared unquantized)",
        "attention.qkv",
    ),
    "coarser-groups": (
        Case(WIDE, int4(WIDE, 256), ct_config(4, "int", 256), "w4a16"),
        "wrong_group_size",
        14,
        f"{Q_PROJ} (in groups of 256, and the recipe means 128)",
        "attention.qkv",
    ),
    "whole-rows-that-groups-divide": (
        Case(DENSE, int4(DENSE, None), ct_config(4, "int"), "w4a16"),
        "wrong_group_size",
        14,
        f"{Q_PROJ} (without groups, and the recipe means 128)",
        "attention.qkv",
    ),
    "finer-groups-than-declared": (
        Case(DENSE, int4(DENSE, 64), INT4, "w4a16"),
        "wrong_group_size",
        14,
        f"{Q_PROJ} (in groups of 64, declared 128)",
        "attention.qkv",
    ),
    "finer-groups-in-one-of-a-group": (
        Case(
            DENSE,
            int4(DENSE, 128) | {n: t for n, t in int4(DENSE, 64).items() if Q_PROJ in n},
            {
                **ct_config(4, "int", 128),
                "config_groups": {
                    "group_0": ct_config(4, "int", 128)["config_groups"]["group_0"],
                    "group_1": {
                        **ct_config(4, "int", 64)["config_groups"]["group_0"],
                        "targets": [Q_PROJ],
                    },
                },
            },
            "w4a16",
        ),
        "mixed_group",
        1,
        "q, k and v (q_proj INT4 in groups of 64; k_proj, v_proj INT4)",
        "attention.qkv",
    ),
    "head-of-another-name-declared": (
        Case(
            renamed(DENSE, ("lm_head", "embed_out")),
            renamed(quantize(DENSE, "ct-fp8"), ("lm_head", "embed_out")),
            {**FP8, "ignore": []},
            "fp8",
        ),
        "declared_not_so",
        1,
        "embed_out (is unquantized, declared FP8)",
        "lm_head",
    ),
    "vision-tower-declared-by-class": (
        Case(VISION, quantize(DENSE, "ct-fp8") | vision_tower("model.visual."), FP8, "fp8"),
        "declared_not_so",
        3,
        "model.visual.blocks.0.attn.qkv (is unquantized, declared FP8)",
        "vision",
    ),
    "bias-that-is-no-mask-lost": (
        Case(
            DENSE | {"model.layers.0.self_attn.bias": ("BF16", (1, 1, 64, 32))},
            CLEAN_NVFP4,
            NVFP4,
        ),
        "lost",
        1,
        "model.layers.0.self_attn.bias",
        "other",
    ),
    "granite-expert-lost": (
        Case(
            granite(),
            without(granite_apart("ct-fp8"), ".1.block_sparse_moe.experts.2."),
            FP8,
            "fp8",
        ),
        "lost",
        3,
        "model.layers.1.block_sparse_moe.experts.2.up_proj",
        "experts",
    ),
    "granite-experts-left": (
        Case(granite(), quantize(granite(), "ct-fp8"), FP8, "fp8"),
        "left_unquantized",
        24,
        "model.layers.0.block_sparse_moe.input_linear (is unquantized, declared FP8)",
        "experts",
    ),
    "position-bias-quantized": (
        Case(
            DENSE | POSITION_BIAS,
            CLEAN_NVFP4 | fp8_linear(next(iter(POSITION_BIAS)).removesuffix(".weight"), 32, 64),
            NVFP4,
        ),
        "not_intended",
        1,
        "relative_attention_bias (is FP8, and the recipe leaves embeddings alone)",
        "embeddings",
    ),
    "linear-outside-the-layers-not-as-declared": (
        Case(
            DENSE | OUTSIDE,
            CLEAN_NVFP4 | fp8_linear("model.connector.modality_proj", 2048, 2048),
            NVFP4,
        ),
        "declared_otherwise",
        1,
        "model.connector.modality_proj (is FP8, declared NVFP4)",
        "other",
    ),
    "linear-of-an-unknown-list-quantized": (
        Case(
            DENSE | {"model.stack.0.odd.weight": ("BF16", (256, 256))},
            CLEAN_NVFP4 | nvfp4_linear("model.stack.0.odd"),
            NVFP4,
        ),
        "not_intended",
        1,
        "model.stack.0.odd (is NVFP4, and the recipe leaves other alone)",
        "other",
    ),
    "audio-tower-quantized": (
        Case(
            DENSE | {"audio_tower.layers.0.fc1.weight": ("BF16", (256, 256))},
            CLEAN_NVFP4 | nvfp4_linear("audio_tower.layers.0.fc1"),
            NVFP4,
        ),
        "not_intended",
        1,
        "audio_tower.layers.0.fc1 (is NVFP4, and the recipe leaves audio alone)",
        "audio",
    ),
    "group-declared-otherwise": (
        Case(DENSE, CLEAN_INT4, ct_config(4, "int", 64), "w4a16"),
        "wrong_group_size",
        14,
        f"{Q_PROJ} (in groups of 128, declared 64)",
        "attention.qkv",
    ),
    "input-scale-missing": (
        Case(DENSE, without(CLEAN_NVFP4, f"{DOWN_PROJ}.input_scale"), NVFP4),
        "missing_companion",
        1,
        f"{DOWN_PROJ} (without input_scale)",
        "mlp",
    ),
    "group-of-two-precisions": (
        Case(
            DENSE,
            without(CLEAN_NVFP4, Q_PROJ) | fp8_linear(Q_PROJ),
            mixed(Q_PROJ),
        ),
        "mixed_group",
        1,
        "model.layers.0.self_attn: q, k and v (q_proj FP8; k_proj, v_proj NVFP4)",
        "attention.qkv",
    ),
    "gate-apart-from-up": (
        Case(
            DENSE,
            without(CLEAN_NVFP4, "layers.0.mlp.up_proj")
            | {"model.layers.0.mlp.up_proj.weight": ("BF16", (INTERMEDIATE, HIDDEN))},
            NVFP4,
        ),
        "mixed_group",
        1,
        "model.layers.0.mlp: gate and up (gate_proj NVFP4; up_proj unquantized)",
        "mlp",
    ),
    "one-expert-apart": (
        Case(
            MIXTURE,
            without(quantize(MIXTURE, "modelopt-nvfp4"), f"{EXPERT}.down_proj")
            | {f"{EXPERT}.down_proj.weight": ("BF16", (HIDDEN, INTERMEDIATE))},
            NVFP4,
        ),
        "mixed_group",
        1,
        "model.layers.1.mlp.experts: experts (0.gate_proj, 0.up_proj, 0.down_proj, 1.gate_proj "
        "NVFP4; 2.down_proj unquantized)",
        "experts",
    ),
    "latent-attention-of-two-precisions": (
        Case(
            DENSE
            | {
                "model.layers.0.self_attn.q_a_proj.weight": ("BF16", (256, 256)),
                "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": ("BF16", (128, 256)),
            },
            CLEAN_NVFP4
            | nvfp4_linear("model.layers.0.self_attn.q_a_proj")
            | {"model.layers.0.self_attn.kv_a_proj_with_mqa.weight": ("BF16", (128, 256))},
            NVFP4,
        ),
        "mixed_group",
        1,
        "model.layers.0.self_attn: q_a and kv_a (q_a_proj NVFP4; kv_a_proj_with_mqa unquantized)",
        "attention.qkv",
    ),
}


@pytest.mark.parametrize(
    ("case", "kind", "count", "named", "group"), WRONG.values(), ids=WRONG.keys()
)
def test_fault(tmp_path: Path, case: Case, kind: str, count: int, named: str, group: str) -> None:
    summary = probe(tmp_path, case)
    finding = kinds(summary)[kind]
    assert (finding["count"], finding["groups"].get(group, 0) > 0) == (count, True), finding
    assert any(named in name for name in finding["names"]), finding
    assert evaluate_checkpoint(summary).failure_class is FailureClass.QUANT_COVERAGE_FAILURE


NOTES: dict[str, tuple[Case, str, str]] = {
    "weight-only-where-inputs-are-meant": (
        Case(DENSE, CLEAN_NVFP4, modelopt_config("W4A16_NVFP4")),
        "other_activations",
        f"{Q_PROJ} (inputs in 16 bits, and the recipe means NVFP4)",
    ),
    "matrix-of-no-kind": (
        Case(
            DENSE | {"model.layers.0.odd.weight": ("BF16", (256, 256))},
            CLEAN_NVFP4 | nvfp4_linear("model.layers.0.odd"),
            NVFP4,
        ),
        "unclassified",
        "model.layers.0.odd",
    ),
}


@pytest.mark.parametrize(("case", "kind", "named"), NOTES.values(), ids=NOTES.keys())
def test_note(tmp_path: Path, case: Case, kind: str, named: str) -> None:
    summary = probe(tmp_path, case)
    assert named in kinds(summary)[kind]["names"]


def test_smaller_groups_where_columns_are_too_few(tmp_path: Path) -> None:
    """An MLP of 96 columns has groups of 32: 96 is not a multiple of 128."""
    narrow = {
        name: (dtype, tuple(96 if size == INTERMEDIATE else size for size in shape))
        for name, (dtype, shape) in DENSE.items()
    }
    tensors = quantize(narrow, "ct-int4") | {
        f"model.layers.{layer}.mlp.down_proj.{part}": tensor
        for layer in range(LAYERS)
        for part, tensor in {
            "weight_scale": ("BF16", (HIDDEN, 3)),
            "weight_zero_point": ("I32", (HIDDEN // 8, 3)),
        }.items()
    }
    summary = probe(tmp_path, Case(narrow, tensors, INT4, "w4a16"))
    assert kinds(summary) == {}
    assert summary["layer_precision_counts"]["INT4"] == 14


BROKEN = {
    "weight": (CLEAN_NVFP4, DENSE, f"{Q_PROJ}.weight"),
    "scale": (CLEAN_NVFP4, DENSE, f"{Q_PROJ}.weight_scale"),
    "norm": (CLEAN_NVFP4, DENSE, "model.norm.weight"),
    "fused": (quantize(FUSED, "modelopt-nvfp4"), FUSED, "model.layers.0.mlp.experts.down_proj"),
    "scale-of-fused": (
        quantize(FUSED, "modelopt-nvfp4"),
        FUSED,
        "model.layers.0.mlp.experts.down_proj_weight_scale",
    ),
}


@pytest.mark.parametrize(("tensors", "source", "name"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_wrong_with_a_broken_tensor_is_said_once(
    tmp_path: Path, tensors: Tensors, source: Tensors, name: str
) -> None:
    """The tensor comes last in its file and misses a byte."""
    moved = {**{n: t for n, t in tensors.items() if n != name}, name: tensors[name]}
    candidate, original = write(tmp_path, Case(source, moved, NVFP4))
    path = candidate / "model.safetensors"
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)
    summary = probe_headers(candidate, original, RECIPES["nvfp4"])
    (finding,) = summary["findings"]
    assert finding["kind"] == "truncated"
    assert name in finding["names"][0]


UNREADABLE: dict[str, Callable[[str], Tensors]] = {
    "bitsandbytes": lambda module: {
        f"{module}.weight": ("U8", (32768, 1)),
        f"{module}.weight.absmax": ("U8", (1024,)),
        f"{module}.weight.quant_map": ("F32", (16,)),
        f"{module}.weight.quant_state.bitsandbytes__nf4": ("U8", (100,)),
    },
    "words-of-no-format": lambda module: {f"{module}.weight": ("I32", (256, 32))},
}


@pytest.mark.parametrize(
    "stated", [None, {"quant_method": "bitsandbytes", "load_in_4bit": True}], ids=["", "declared"]
)
@pytest.mark.parametrize("make", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_source_that_hides_its_shapes(
    tmp_path: Path, make: Callable[[str], Tensors], stated: Mapping[str, Any] | None
) -> None:
    source = without(DENSE, Q_PROJ) | make(Q_PROJ)
    with pytest.raises(ProbeError, match="own weights are packed") as caught:
        probe(tmp_path, Case(source, CLEAN_NVFP4, NVFP4, source_quantization=stated))
    assert caught.value.remedy == "give the checkpoint that it was quantized from"


def test_bits_per_weight(tmp_path: Path) -> None:
    summary = probe(tmp_path, CLEAN["block-fp8-source"])
    bits = summary["bits_per_weight"]
    assert bits["embeddings"] == bits["lm_head"] == 16.0
    assert bits["mlp"] == pytest.approx(4.5, abs=0.01)
    weights = sum(
        (shape[0] * shape[1] if len(shape) == 2 else shape[0]) for _, shape in DENSE.values()
    )
    assert bits["overall"] == round(summary["output_bytes"] * 8 / weights, 3)


@pytest.mark.parametrize("head", [True, False], ids=["", "head-lost"])
def test_least_size_where_a_layer_is_quantized_that_is_not_meant(
    tmp_path: Path, head: bool
) -> None:
    """What is stored smaller explains a small checkpoint; what is lost, no less than before."""
    tower: Tensors = {"model.visual.merger.mlp.0.weight": ("BF16", (2048, 2048))}
    tensors = CLEAN_NVFP4 | fp8_linear("model.visual.merger.mlp.0", 2048, 2048)
    case = Case(DENSE | tower, tensors if head else without(tensors, "lm_head"), NVFP4)
    summary = probe(tmp_path, case)
    assert kinds(summary)["not_intended"]["count"] == 1
    assert (summary["expected_bytes"][0] <= summary["output_bytes"]) is head


def test_bits_per_weight_of_what_is_no_matrix(tmp_path: Path) -> None:
    """Masks that loaders compute are no weights, whether they are stored or not."""
    small: Tensors = {
        "model.layers.0.self_attn.sinks": ("BF16", (4,)),
        "model.layers.0.mamba.A_log": ("BF16", (8, 4)),
    }
    case = Case(DENSE | small | masks(), CLEAN_NVFP4 | small | masks(1), NVFP4)
    bits = probe(tmp_path, case)["bits_per_weight"]
    assert "unknown" not in bits
    assert bits["other"] == 16.0


def test_unprintable_characters_of_names_are_escaped() -> None:
    findings, measurements = Findings(), Measurements()
    findings.add("lost", "lm_head.\x00backbone é\u202e")
    measurements.add("sqnr_shortfall_db", "mlp", "a\nb", 9.0)
    assert findings.names("lost") == ["lm_head.\\x00backbone é\\u202e"]
    assert measurements.document()[0]["worst"][0]["name"] == "a\\nb"


COMMON_NAMES = [
    ("model.layers.0.mlp.gate", "layers.0.mlp.gate"),
    ("language_model.model.layers.0.mlp.gate", "layers.0.mlp.gate"),
    ("model.language_model.layers.0.mlp.gate", "layers.0.mlp.gate"),
    ("model.layers.0.block_sparse_moe.gate", "layers.0.mlp.gate"),
    ("model.layers.0.block_sparse_moe.experts.7.w2", "layers.0.mlp.experts.7.down_proj"),
    ("model.layers.0.feed_forward.w2", "layers.0.feed_forward.w2"),
    ("model.layers.0.block_sparse_moe.input_linear", "layers.0.mlp.experts.gate_up_proj"),
    ("model.layers.0.shared_mlp.input_linear", "layers.0.shared_mlp.input_linear"),
    ("lm_head", "lm_head"),
    ("language_model.lm_head", "lm_head"),
    ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
    ("model.vision_tower.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
]


@pytest.mark.parametrize(("module", "common"), COMMON_NAMES)
def test_common_name(module: str, common: str) -> None:
    assert common_name(module) == common


def counterparts(directory: Path, case: Case) -> Counterparts:
    candidate, source = write(directory, case)
    before, after = read_whole(source), read_whole(candidate)
    config = {**CONFIG, **case.config}
    stated = json.loads((candidate / "config.json").read_text())
    source_stated = json.loads((source / "config.json").read_text())
    theirs = find_format(source, source_stated, before.tensors)
    ours = find_format(candidate, stated, after.tensors)
    contents = Contents(before.tensors), Contents(after.tensors)
    names = Names(config)
    matrices = Matrices(source, contents[0], config, theirs.layouts)
    matches = match_modules(*contents, names, matrices, tied=False)
    intent = examine(matches, contents[1], ours, RECIPES[case.recipe], Findings())
    return Counterparts(
        source=contents[0],
        candidate=contents[1],
        matches=matches,
        layers=intent.layers,
        interleaved=matrices.interleaved,
    )


def pairs_of(directory: Path, case: Case, module: str) -> list[Pair]:
    found = counterparts(directory, case).pairs({})
    return [pair for pair in found if pair.candidate.module.startswith(module)]


def test_pairs_of_plain_linears(tmp_path: Path) -> None:
    (pair,) = pairs_of(tmp_path, Case(DENSE, CLEAN_NVFP4, NVFP4), Q_PROJ)
    assert pair.kind == "attention.qkv"
    assert (pair.source.layout, pair.candidate.layout.precision) == (PLAIN, "NVFP4")
    assert pair.candidate.tensors["weight_scale"] == f"{Q_PROJ}.weight_scale"
    assert pair.candidate.parts["weight"].shape == (256, 128)
    assert pair.source.shape == pair.candidate.shape == (256, 256)


def test_pairs_of_fused_experts_are_turned(tmp_path: Path) -> None:
    case = Case(FUSED, quantize(FUSED, "modelopt-nvfp4"), NVFP4)
    module = "model.layers.0.mlp.experts.gate_up_proj"
    pairs = pairs_of(tmp_path, case, module)
    assert [pair.candidate.expert for pair in pairs] == list(range(EXPERTS))
    last = pairs[-1]
    assert last.source.turned and last.candidate.turned
    assert last.candidate.shape == (2 * INTERMEDIATE, HIDDEN)
    assert last.candidate.tensors["weight_scale"] == f"{module}_weight_scale"
    assert {part: tensor.shape for part, tensor in last.candidate.parts.items()} == {
        "weight": (768, 128),
        "weight_scale": (768, 16),
        "weight_scale_2": (),
        "input_scale": (),
    }


@pytest.mark.parametrize(
    ("config", "place"), [({}, (384, 1)), (GPT_OSS, (1, 2))], ids=["halves", "in-turn"]
)
def test_pairs_of_a_fused_source_and_experts_apart(
    tmp_path: Path, config: Mapping[str, Any], place: tuple[int, int]
) -> None:
    case = Case(FUSED, quantize(MIXTURE, "modelopt-nvfp4"), NVFP4, config=config)
    (pair,) = pairs_of(tmp_path, case, f"{EXPERT}.up_proj")
    assert pair.source.tensors == {"weight": "model.layers.1.mlp.experts.gate_up_proj"}
    assert (pair.source.expert, pair.source.turned) == (2, True)
    assert (pair.source.first_row, pair.source.row_step) == place
    assert pair.source.parts["weight"].shape == pair.source.shape == (INTERMEDIATE, HIDDEN)
    assert pair.candidate.expert is None


def test_pairs_of_experts_apart_and_a_fused_candidate(tmp_path: Path) -> None:
    case = Case(MIXTURE, quantize(FUSED, "modelopt-nvfp4"), NVFP4)
    found = pairs_of(tmp_path, case, "model.layers.1.mlp.experts")
    (pair,) = [pair for pair in found if pair.source.module == f"{EXPERT}.up_proj"]
    assert (pair.candidate.expert, pair.candidate.turned) == (2, True)
    assert (pair.candidate.first_row, pair.candidate.row_step) == (INTERMEDIATE, 1)
    assert pair.candidate.parts["weight_scale"].shape == (INTERMEDIATE, HIDDEN // 16)


def test_pairs_of_gpt_oss(tmp_path: Path) -> None:
    (pair,) = pairs_of(
        tmp_path,
        CLEAN["gpt-oss-to-fp8-apart"],
        "model.layers.0.mlp.experts.3.gate_proj",
    )
    assert pair.source.layout.precision == "MXFP4"
    assert (pair.source.turned, pair.source.first_row, pair.source.row_step) == (False, 0, 2)
    assert pair.source.parts["blocks"].shape == (INTERMEDIATE, HIDDEN // 2)
    assert pair.source.parts["scales"].shape == (INTERMEDIATE, HIDDEN // 32)


def test_kept_tensors(tmp_path: Path) -> None:
    found = counterparts(tmp_path, CLEAN["vision-tower-under-another-prefix"]).kept({})
    kept = {each.source_name: (each.candidate_name, each.kind) for each in found}
    others = {name for name in VISION if "_proj.weight" not in name}
    assert kept.keys() == others
    name = "blocks.0.attn.qkv.bias"
    assert kept[f"model.visual.{name}"] == (f"visual.{name}", "vision")


def test_kept_includes_biases_of_quantized_linears(tmp_path: Path) -> None:
    bias: Tensors = {f"{Q_PROJ}.bias": ("BF16", (256,))}
    found = counterparts(tmp_path, Case(DENSE | bias, CLEAN_NVFP4 | bias, NVFP4)).kept({})
    assert f"{Q_PROJ}.bias" in {each.source_name for each in found}


def test_kept_and_pairs_share_no_tensor(tmp_path: Path) -> None:
    found = counterparts(tmp_path, CLEAN["gpt-oss-left-as-it-is"])
    paired = {name for pair in found.pairs({}) for name in pair.candidate.tensors.values()}
    kept = {each.candidate_name for each in found.kept({})}
    assert {name for name in paired & kept if not name.endswith("_bias")} == set()
    assert paired | kept == set(gpt_oss(quantized=True))


def test_expert_parts_know_their_place() -> None:
    stacked = {
        "weight": Tensor("BF16", (4, 8, 6), (100, 100 + 4 * 8 * 6 * 2)),
        "scale": Tensor("F32", (4,), (0, 16)),
        "shared": Tensor("F32", (), (0, 4)),
    }
    parts = expert_parts(stacked, 4, 2, turned=True)
    assert parts["weight"] == Tensor("BF16", (6, 8), (100 + 2 * 96, 100 + 3 * 96))
    assert parts["scale"] == Tensor("F32", (), (8, 12))
    assert parts["shared"] == stacked["shared"]


def test_names_of_tensors_however_they_are_dotted() -> None:
    names = [
        "x.experts.gate_up_proj",
        "x.experts.gate_up_proj_weight_scale",
        "x.experts.gate_up_proj.input_scale",
        "x.experts.down_proj_blocks",
        "x.experts.down_proj_scales",
        "x.experts.0.gate_proj.weight",
        "x.q_proj.weight",
        "x.q_proj.weight.absmax",
        "x.q_proj.weight.quant_state.bitsandbytes__nf4",
        "sinks",
    ]
    contents = Contents({name: Tensor("U8", (1, 1, 1), (0, 1)) for name in names})
    stored = {
        contents.tensor_name(module, part): module
        for module, parts in contents.parts.items()
        for part in parts
    }
    assert stored.keys() == set(names)
    assert {contents.owner(name) == module for name, module in stored.items()} == {True}
    assert contents.parts["x.experts.gate_up_proj"].keys() == {
        "weight",
        "weight_scale",
        "input_scale",
    }


def test_headers_need_no_numpy() -> None:
    code = "import conductor.probes.checkpoint, sys; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
