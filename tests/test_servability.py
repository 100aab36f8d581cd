"""Whether an engine would load a checkpoint: what was tried, refused, and how lists are read."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from conductor.environments.builder import Environments
from conductor.probes.findings import Findings
from conductor.probes.formats import patterns
from conductor.probes.machine import probe_machine
from conductor.probes.servability import (
    QuantizedLinear,
    Target,
    exclusions,
    lint,
    lint_everywhere,
    loaders,
)
from conductor.probes.servability.exclusions import (
    ExpressionError,
    SplitError,
    match_expressions,
    unit_of,
)
from conductor.probes.servability.loaders import Answer
from conductor.probes.servability.treatments import describe_scheme

VLLM_CPU: dict[str, Any] = {"engine": "vllm", "version": "0.32.0", "device": "cpu"}
VLLM_CUDA: dict[str, Any] = {"engine": "vllm", "version": "0.32.0", "device": "cuda"}
TRANSFORMERS: dict[str, Any] = {"engine": "transformers", "version": "5.14.1", "device": "cpu"}
HOPPER = (9, 0)

DECODER = {
    "self_attn.q_proj": ("attention.qkv", (256, 256)),
    "self_attn.k_proj": ("attention.qkv", (128, 256)),
    "self_attn.v_proj": ("attention.qkv", (128, 256)),
    "self_attn.o_proj": ("attention.output", (256, 256)),
    "mlp.gate_proj": ("mlp", (1408, 256)),
    "mlp.up_proj": ("mlp", (1408, 256)),
    "mlp.down_proj": ("mlp", (256, 1408)),
}


def decoder(
    precision: str,
    group_size: int | None = None,
    *,
    layers: int = 2,
    prefix: str = "model.layers",
    intermediate: int = 1408,
    otherwise: Mapping[str, str] = {},
) -> Iterator[QuantizedLinear]:
    """Yield the linears of a small dense model; ``otherwise`` gives modules another precision."""
    for layer in range(layers):
        for name, (kind, shape) in DECODER.items():
            module = f"{prefix}.{layer}.{name}"
            here = otherwise.get(module, precision)
            size = tuple(intermediate if each == 1408 else each for each in shape)
            group = group_size if here == precision else None
            yield QuantizedLinear(module, kind, here, (size[0], size[1]), group)
    head = otherwise.get("lm_head", "unquantized")
    yield QuantizedLinear("lm_head", "lm_head", head, (1000, 256), None)


def experts(precision: str, *, layers: int = 1, count: int = 4) -> Iterator[QuantizedLinear]:
    for layer in range(layers):
        for number in range(count):
            for name, shape in (("gate", (512, 256)), ("up", (512, 256)), ("down", (256, 512))):
                module = f"model.layers.{layer}.mlp.experts.{number}.{name}_proj"
                yield QuantizedLinear(module, "experts", precision, shape, None)
        yield QuantizedLinear(
            f"model.layers.{layer}.mlp.gate", "router", "unquantized", (4, 256), None
        )


def config(quantization: Mapping[str, Any] | None, **more: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        **more,
    }
    return document if quantization is None else {**document, "quantization_config": quantization}


def compressed(scheme: str, **more: Any) -> dict[str, Any]:
    weights, inputs, layout = SCHEMES[scheme]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **more,
    }


def quantity(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "num_bits": bits,
        "strategy": strategy,
        "group_size": None,
        "symmetric": True,
        "dynamic": False,
        **more,
    }


TOKENS = quantity("float", 8, "token", dynamic=True)
INT_TOKENS = quantity("int", 8, "token", dynamic=True)
FOUR = quantity("float", 4, "tensor_group", group_size=16)
SCHEMES: dict[str, tuple[Any, Any, str]] = {
    "INT8 dynamic": (quantity("int", 8, "channel"), INT_TOKENS, "int-quantized"),
    "INT8 static": (quantity("int", 8, "channel"), quantity("int", 8, "tensor"), "int-quantized"),
    "FP8 dynamic": (quantity("float", 8, "channel"), TOKENS, "float-quantized"),
    "FP8 static": (
        quantity("float", 8, "tensor"),
        quantity("float", 8, "tensor"),
        "float-quantized",
    ),
    "FP8 block": (
        quantity("float", 8, "block", block_structure=[128, 128]),
        quantity("float", 8, "group", group_size=128, dynamic=True),
        "float-quantized",
    ),
    "FP8 weight-only": (quantity("float", 8, "channel"), None, "float-quantized"),
    "INT4 weight-only": (quantity("int", 4, "group", group_size=128), None, "pack-quantized"),
    "INT4 weight-only asymmetric": (
        quantity("int", 4, "group", group_size=128, symmetric=False),
        None,
        "pack-quantized",
    ),
    "INT3 weight-only": (quantity("int", 3, "group", group_size=128), None, "pack-quantized"),
    "NVFP4": (FOUR, FOUR, "nvfp4-pack-quantized"),
    "NVFP4 weight-only": (FOUR, None, "nvfp4-pack-quantized"),
    "MXFP4": (
        quantity("float", 4, "group", group_size=32),
        quantity("float", 4, "group", group_size=32, dynamic=True),
        "mxfp4-pack-quantized",
    ),
    "MXFP8": (
        quantity("float", 8, "group", group_size=32),
        quantity("float", 8, "group", group_size=32, dynamic=True),
        "mxfp8-quantized",
    ),
    "INT4 with activation ordering by group": (
        quantity("int", 4, "group", group_size=128, actorder="group"),
        None,
        "pack-quantized",
    ),
    "int 4 by tensor weight-only": (quantity("int", 4, "tensor"), None, "pack-quantized"),
}


def modelopt(algorithm: str, *ignore: str, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": ["lm_head", *ignore],
        **more,
    }


def ask(
    document: Mapping[str, Any],
    linears: Iterator[QuantizedLinear] | list[QuantizedLinear],
    target: Mapping[str, Any],
    *,
    capability: tuple[int, int] | None = HOPPER,
    ranks: int = 1,
    checkpoint: Path = Path("/nowhere"),
) -> tuple[list[str], list[str]]:
    """Return reasons that fail, and notes."""
    findings = Findings()
    asked = Target(**target, capability=capability, tensor_parallel=ranks)
    lint(checkpoint, document, linears, asked, findings)
    return findings.names("not_loadable"), findings.names("servability_unknown")


GROUPS = {"NVFP4": 16, "INT4": 128, "MXFP4": 32, "INT3": 128}


def of_scheme(scheme: str) -> list[QuantizedLinear]:
    precision = scheme.partition(" ")[0]
    return list(decoder(precision, GROUPS.get(precision)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_are_named_as_the_table_does(scheme: str) -> None:
    assert describe_scheme(*SCHEMES[scheme]) == scheme


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        *((VLLM_CPU, name) for name in ("INT8 dynamic", "INT8 static", "FP8 dynamic")),
        *((VLLM_CPU, name) for name in ("INT4 weight-only", "INT4 weight-only asymmetric")),
        *((TRANSFORMERS, name) for name in ("INT8 dynamic", "FP8 dynamic", "INT4 weight-only")),
        *((TRANSFORMERS, name) for name in ("NVFP4", "NVFP4 weight-only")),
        *((VLLM_CUDA, name) for name in ("NVFP4", "MXFP4", "FP8 static", "FP8 block", "MXFP8")),
    ],
)
def test_what_loads_is_not_refused(target: Mapping[str, Any], scheme: str) -> None:
    assert ask(config(compressed(scheme)), of_scheme(scheme), target) == ([], [])


@pytest.mark.parametrize(
    ("target", "quantization", "precision", "words"),
    [
        pytest.param(VLLM_CPU, compressed("NVFP4"), "NVFP4", "no kernel", id="nvfp4-on-cpu"),
        pytest.param(
            VLLM_CPU, compressed("NVFP4 weight-only"), "NVFP4", "no kernel", id="nvfp4a16"
        ),
        pytest.param(VLLM_CPU, compressed("MXFP4"), "MXFP4", "no kernel", id="mxfp4-on-cpu"),
        pytest.param(VLLM_CPU, compressed("FP8 static"), "FP8", "one scale", id="static-on-cpu"),
        pytest.param(VLLM_CPU, modelopt("FP8"), "FP8", "one scale", id="modelopt-fp8-on-cpu"),
        pytest.param(VLLM_CPU, modelopt("NVFP4"), "NVFP4", "no kernel", id="modelopt-nvfp4-on-cpu"),
        pytest.param(
            VLLM_CUDA, modelopt("W8A8_SQ_PER_CHANNEL"), "INT8", "takes FP8,", id="modelopt-int8"
        ),
        pytest.param(VLLM_CUDA, modelopt("W4A16_AWQ"), "INT4", "takes FP8,", id="modelopt-awq"),
        pytest.param(
            VLLM_CUDA, {"quant_method": "bitsandbytes"}, "NF4", "no loader", id="bitsandbytes"
        ),
        pytest.param(TRANSFORMERS, modelopt("FP8"), "FP8", "garbage", id="modelopt-transformers"),
        pytest.param(TRANSFORMERS, modelopt("NVFP4"), "NVFP4", "garbage", id="nvfp4-transformers"),
        pytest.param(
            VLLM_CUDA,
            {"quant_method": "gptq", "bits": 3, "sym": True},
            "INT3",
            "4 and 8",
            id="gptq3",
        ),
        pytest.param(
            VLLM_CUDA,
            {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": True, "group_size": 128},
            "INT4",
            "activation ordering",
            id="gptq-ordered",
        ),
        pytest.param(VLLM_CUDA, None, "NVFP4", "no quantization_config", id="undeclared"),
    ],
)
def test_what_is_refused_says_where_and_why(
    target: Mapping[str, Any], quantization: dict[str, Any] | None, precision: str, words: str
) -> None:
    fails, _ = ask(config(quantization), decoder(precision, GROUPS.get(precision)), target)
    assert len(fails) == 1
    assert fails[0].startswith("{engine} {version} on {device}: ".format(**target))
    assert words in fails[0]


def test_a_reason_is_named_once_with_the_first_module_and_the_count() -> None:
    (fails,), _ = ask(config(compressed("NVFP4")), of_scheme("NVFP4"), VLLM_CPU)
    assert fails == (
        "vllm 0.32.0 on cpu: model.layers.0.self_attn.q_proj is NVFP4 "
        "(compressed-tensors nvfp4-pack-quantized): no kernel for it (and 13 more)"
    )


@pytest.mark.parametrize(
    ("target", "quantization", "precision", "words"),
    [
        pytest.param(
            {**VLLM_CPU, "version": "0.33.0"}, modelopt("FP8"), "FP8", "no table", id="version"
        ),
        pytest.param(
            {**VLLM_CPU, "device": "tpu"}, modelopt("FP8"), "FP8", "no table", id="device"
        ),
        pytest.param(VLLM_CPU, compressed("FP8 block"), "FP8", "AMX", id="fp8-block-on-cpu"),
        pytest.param(VLLM_CUDA, {"quant_method": "quark"}, "FP8", "nobody has tried", id="quark"),
        pytest.param(VLLM_CUDA, compressed("INT3 weight-only"), "INT3", "Humming", id="three-bits"),
        pytest.param(
            TRANSFORMERS, {"quant_method": "gptq", "bits": 4}, "INT4", "gptqmodel", id="package"
        ),
    ],
)
def test_unknown_is_a_note_and_no_failure(
    target: Mapping[str, Any], quantization: dict[str, Any], precision: str, words: str
) -> None:
    fails, notes = ask(config(quantization), decoder(precision, GROUPS.get(precision)), target)
    assert not fails
    assert len(notes) == 1
    assert words in notes[0]


@pytest.mark.parametrize(
    ("capability", "fails", "notes"),
    [((7, 0), 1, 0), ((7, 5), 0, 0), ((9, 0), 0, 0), ((10, 0), 0, 1), (None, 0, 1)],
    ids=str,
)
def test_compute_capability(capability: tuple[int, int] | None, fails: int, notes: int) -> None:
    scheme = "INT8 dynamic"
    found = ask(config(compressed(scheme)), of_scheme(scheme), VLLM_CUDA, capability=capability)
    assert (len(found[0]), len(found[1])) == (fails, notes)


@pytest.mark.parametrize(
    ("quantization", "precision", "group", "intermediate", "ranks", "reason"),
    [
        pytest.param(
            compressed("INT4 weight-only"),
            *("INT4", 128, 1408, 8),
            "8 ranks: model.layers.0.mlp.down_proj has 1408 columns, 176 per rank, which is no "
            "multiple of the group of 128 (and 1 more)",
            id="group-cut-by-ranks",
        ),
        pytest.param(compressed("INT4 weight-only"), "INT4", 128, 1408, 1, None, id="one-rank"),
        pytest.param(compressed("INT4 weight-only"), "INT4", 128, 1024, 2, None, id="fits"),
        pytest.param(
            compressed("INT4 weight-only"), "INT4", None, 1408, 8, None, id="group-is-the-row"
        ),
        pytest.param(
            modelopt("NVFP4"),
            "NVFP4",
            16,
            1416,
            1,
            "which is no multiple of 16",
            id="nvfp4-columns",
        ),
        pytest.param(modelopt("NVFP4"), "NVFP4", 16, 1408, 4, None, id="nvfp4-fits"),
        pytest.param(modelopt("FP8"), "FP8", None, 1404, 8, "do not divide", id="uneven"),
        pytest.param(
            compressed("FP8 block"), "FP8", None, 1408, 2, "cuts its blocks of 128", id="block"
        ),
        pytest.param(compressed("FP8 block"), "FP8", None, 1000, 1, "which cuts", id="block-seam"),
        pytest.param(compressed("FP8 block"), "FP8", None, 1024, 1, None, id="block-fits"),
    ],
)
def test_dimensions(
    quantization: dict[str, Any],
    precision: str,
    group: int | None,
    intermediate: int,
    ranks: int,
    reason: str | None,
) -> None:
    document = config(quantization, num_key_value_heads=8)
    linears = decoder(precision, group, intermediate=intermediate)
    fails, notes = ask(document, linears, VLLM_CUDA, ranks=ranks)
    assert not notes
    if reason is None:
        assert not fails
    else:
        assert any(reason in each for each in fails), fails


def test_rows_count_for_the_fused_matrix_on_a_cpu() -> None:
    linears = decoder("INT4", 128, intermediate=1424)
    fails, _ = ask(config(compressed("INT4 weight-only")), linears, VLLM_CPU)
    # Two of 1424 rows are 89 tiles of 32; 1424 columns are no whole number of groups or tiles.
    assert all("down_proj" in each for each in fails)
    assert len(fails) == 2


@pytest.mark.parametrize(
    ("heads", "shared", "ranks", "words"),
    [
        (8, 4, 8, None),
        (8, 4, 2, None),
        (8, 4, 3, "8 attention heads"),
        (12, 4, 6, "4 key-value heads"),
        (12, 1, 6, None),
    ],
)
def test_heads(heads: int, shared: int, ranks: int, words: str | None) -> None:
    document = config(None, num_attention_heads=heads, num_key_value_heads=shared)
    linears = decoder("unquantized", intermediate=1440)
    fails = [each for each in ask(document, linears, VLLM_CUDA, ranks=ranks)[0] if "heads" in each]
    assert bool(fails) is (words is not None)
    assert words is None or words in fails[0]


def test_key_value_heads_are_repeated_on_many_ranks() -> None:
    linears = list(decoder("FP8", intermediate=2048))
    document = config(compressed("FP8 block"), num_key_value_heads=1)
    assert ask(document, linears, VLLM_CUDA, ranks=2) == ([], [])


@pytest.mark.parametrize(
    ("quantization", "otherwise", "words"),
    [
        pytest.param(
            modelopt("NVFP4", "model.layers.1"),
            {},
            ["'model.layers.1'", "taken for unquantized", "(and 6 more)"],
            id="modelopt-part-of-a-name",
        ),
        pytest.param(
            modelopt("NVFP4", "*self_attn*"),
            {},
            ["'*self_attn*'", "(and 7 more)"],
            id="modelopt-glob",
        ),
        pytest.param(
            modelopt("NVFP4", "model.layers.0.self_attn.q_proj"),
            {},
            ["names not all of that"],
            id="modelopt-split",
        ),
        pytest.param(
            modelopt("NVFP4"),
            {"model.layers.0.mlp.down_proj": "unquantized"},
            ["down_proj is unquantized on disk", "taken for NVFP4"],
            id="left-out-and-not-excluded",
        ),
        pytest.param(
            modelopt("NVFP4"),
            {"model.layers.0.mlp.up_proj": "unquantized"},
            ["fused with", "NVFP4 and unquantized"],
            id="fused-and-different",
        ),
        pytest.param(
            modelopt("NVFP4"), {"lm_head": "NVFP4"}, ["lm_head is NVFP4", "'lm_head'"], id="lm_head"
        ),
        pytest.param(
            compressed("NVFP4", ignore=["re:.*down_proj", "lm_head"]),
            {},
            ["'re:.*down_proj'"],
            id="compressed-tensors-expression",
        ),
        pytest.param(
            compressed("NVFP4", ignore=["lm_head", "model.layers.0.mlp.gate_proj"]),
            {},
            ["names not all of that"],
            id="compressed-tensors-split",
        ),
        pytest.param(
            compressed("NVFP4", ignore=[]),
            {"lm_head": "NVFP4"},
            ["lm_head is NVFP4 on disk, and taken for unquantized"],
            id="compressed-tensors-head-is-no-linear",
        ),
        pytest.param(
            {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
            {"lm_head": "NVFP4"},
            ["lm_head"],
            id="fp8-head",
        ),
        pytest.param(
            modelopt(
                "MIXED_PRECISION",
                quantized_layers={"model.layers.0.mlp.gate_proj": {"quant_algo": "NVFP4"}},
            ),
            {},
            ["taken for unquantized"],
            id="mixed-and-not-listed",
        ),
    ],
)
def test_lists_that_do_not_fit_the_tensors(
    quantization: dict[str, Any], otherwise: dict[str, str], words: list[str]
) -> None:
    linears = decoder("NVFP4", 16, otherwise=otherwise)
    fails, _ = ask(config(quantization), linears, VLLM_CUDA)
    for word in words:
        assert any(word in each for each in fails), fails


@pytest.mark.parametrize(
    "quantization",
    [
        modelopt("NVFP4", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        modelopt("NVFP4", "*.down_proj"),
        compressed("NVFP4", ignore=["re:.*down_proj$", "lm_head"]),
        {
            "quantization": modelopt("NVFP4", "*down_proj"),
            "quant_method": "modelopt",
        },
    ],
    ids=["exact", "glob", "expression", "nested"],
)
def test_lists_that_fit_the_tensors(quantization: dict[str, Any]) -> None:
    plain = dict.fromkeys(
        ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"), "unquantized"
    )
    linears = decoder("NVFP4", 16, otherwise=plain)
    assert ask(config(quantization), linears, VLLM_CUDA) == ([], [])


def test_a_pattern_for_layer_1_takes_in_layer_10() -> None:
    plain = {f"model.layers.1.{name}": "unquantized" for name in DECODER}
    linears = decoder("NVFP4", 16, layers=11, otherwise=plain)
    (fails,), _ = ask(config(modelopt("NVFP4", "model.layers.1")), linears, VLLM_CUDA)
    assert "model.layers.10.self_attn.q_proj is NVFP4 on disk" in fails


def test_awq_and_gptq_go_by_the_tensors_where_nothing_is_listed() -> None:
    plain = {"model.layers.0.mlp.down_proj": "unquantized"}
    for method in (
        {"quant_method": "awq", "bits": 4, "zero_point": True},
        {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False, "group_size": 128},
    ):
        linears = decoder("INT4", 128, otherwise=plain)
        assert ask(config(method), linears, VLLM_CUDA) == ([], [])


@pytest.mark.parametrize(
    ("rules", "fails"),
    [
        ({"-:.*down_proj": {}}, True),
        ({"+:.*down_proj": {"bits": 4}, "-:.*down_proj": {}}, False),
        ({"-:down_proj": {}}, False),
    ],
    ids=["excluded", "first-rule-decides", "matches-from-the-start"],
)
def test_gptq_rules(rules: dict[str, Any], fails: bool) -> None:
    method = {"quant_method": "gptq", "bits": 4, "sym": True, "group_size": 128, "dynamic": rules}
    found, _ = ask(config(method), decoder("INT4", 128), VLLM_CUDA)
    assert bool(found) is fails


@pytest.mark.parametrize("group", [16, 256])
def test_group_sizes_of_gptq_are_a_closed_list(group: int) -> None:
    method = {"quant_method": "gptq", "bits": 4, "sym": True, "group_size": group}
    linears = decoder("INT4", group, intermediate=1024)
    fails, _ = ask(config(method), linears, VLLM_CUDA)
    assert any(f"groups of {group}" in each for each in fails)


@pytest.mark.parametrize("prefix", ["module.model.layers", "_orig_mod.model.layers"])
def test_prefixes_of_wrappers(prefix: str) -> None:
    linears = decoder("unquantized", prefix=prefix)
    fails, _ = ask(config(None), linears, VLLM_CUDA)
    assert len(fails) == 1
    assert "no loader takes off (and 13 more)" in fails[0]


def test_names_that_the_engine_changes_are_unknown() -> None:
    linears = decoder("NVFP4", 16, prefix="model.language_model.layers")
    fails, notes = ask(config(modelopt("NVFP4")), linears, VLLM_CUDA)
    assert not fails
    assert "what the engine calls it is not known" in notes[0]


@pytest.mark.parametrize(
    ("linear", "more"),
    [
        (
            QuantizedLinear(
                "model.layers.0.self_attn.indexer.weights_proj",
                *("attention.qkv", "unquantized", (64, 256), None),
            ),
            {},
        ),
        (
            QuantizedLinear("lm_head", "lm_head", "unquantized", (1000, 256), None),
            {"tie_word_embeddings": True},
        ),
    ],
    ids=["own-projection", "tied-head"],
)
def test_what_an_architecture_leaves_alone_need_not_be_listed(
    linear: QuantizedLinear, more: dict[str, Any]
) -> None:
    linears = [*(each for each in decoder("NVFP4", 16) if each.module != "lm_head"), linear]
    quantization = {**modelopt("NVFP4"), "ignore": []}
    assert ask(config(quantization, **more), linears, VLLM_CUDA) == ([], [])


def test_experts_of_a_layer_are_one_module() -> None:
    document = config(modelopt("FP8", "model.layers.0.mlp.experts.2.up_proj"))
    (fails,), _ = ask(document, experts("FP8"), VLLM_CUDA)
    assert "as all of experts" in fails
    assert "(and 11 more)" in fails
    assert ask(config(modelopt("FP8")), experts("FP8"), VLLM_CUDA) == ([], [])


def test_quantized_experts_on_a_cpu_are_unknown() -> None:
    fails, notes = ask(config(compressed("FP8 dynamic")), experts("FP8"), VLLM_CPU)
    assert not fails
    assert "AMX" in notes[0]


def test_architectures() -> None:
    assert {"LlamaForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"} <= (
        loaders.architectures("vllm", "0.32.0")
    )
    document = config(None, architectures=["MadeUpForCausalLM"])
    fails, notes = ask(document, decoder("unquantized"), VLLM_CUDA)
    assert not fails
    assert "MadeUpForCausalLM" in notes[0]


def test_modelopts_own_file_declares_as_well(tmp_path: Path) -> None:
    own = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(own))
    linears = decoder("NVFP4", 16)
    assert ask(config(None), linears, VLLM_CUDA, checkpoint=tmp_path) == ([], [])


def test_everywhere_nothing_fails() -> None:
    findings = Findings()
    lint_everywhere(Path("/nowhere"), config(modelopt("NVFP4")), of_scheme("NVFP4"), findings)
    assert findings.count("not_loadable") == 0
    assert any("transformers" in each for each in findings.names("not_loadable_elsewhere"))


@pytest.mark.parametrize(
    "quantization",
    [
        {},
        {"quant_method": None},
        {"quant_method": ["fp8"]},
        {"quant_method": "modelopt", "ignore": "lm_head", "quant_algo": 4},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": [1]},
        {"quant_method": "compressed-tensors", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": 1}}},
        {"quant_method": "compressed-tensors", "config_groups": {"a": None}, "ignore": [1, None]},
        {"quant_method": "compressed-tensors", "ignore": ["re:("]},
        {"quant_method": "fp8", "weight_block_size": ["a", {}]},
        {"quant_method": "fp8", "weight_block_size": [0, 0]},
        {"quant_method": "gptq", "dynamic": {"-:(": {}}},
        {"quant_method": "gptq", "dynamic": 4, "bits": "four"},
        {"quant_method": "awq", "modules_to_not_convert": [""]},
    ],
    ids=str,
)
@pytest.mark.parametrize("target", [VLLM_CPU, VLLM_CUDA, TRANSFORMERS], ids=str)
def test_any_configuration_is_answered(
    target: Mapping[str, Any], quantization: dict[str, Any]
) -> None:
    document = config(quantization, num_attention_heads="8", text_config=[1])
    fails, notes = ask(document, decoder("NVFP4", 16), target, ranks=2)
    assert fails or notes


def test_an_expression_that_takes_for_ever_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "TIMEOUT_S", 1.0)
    with pytest.raises(ExpressionError, match="cannot be matched"):
        match_expressions(["(a+)+$"], ["a" * 60 + "b"])


def test_a_large_model_is_answered_in_seconds() -> None:
    linears = [*decoder("NVFP4", 16, layers=61), *experts("NVFP4", layers=61, count=384)]
    assert len(linears) > 70_000
    gates = [f"model.layers.{number}.mlp.gate" for number in range(61)]
    document = config(modelopt("NVFP4", "*.gate", *gates))
    started = time.monotonic()
    ask(document, linears, VLLM_CUDA, ranks=8)
    assert time.monotonic() - started < 5


def test_every_row_has_a_source_and_a_reason() -> None:
    for row in loaders.TABLE:
        assert row.source
        assert bool(row.because) is (row.answer is not Answer.LOADS), row
        assert row.method in loaders.METHODS[row.engine, row.version] | {loaders.MIXED_METHOD}


PATTERNS = (
    "model.layers.1",
    "model.layers.1.mlp.down_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn*",
    "*.self_attn.*",
    "*v_proj",
    "*q_proj",
    "mlp",
    "model.layers.1.mlp.experts.3.up_proj",
    "experts",
    "re:.*self_attn.*",
    "re:.*q_proj$",
    "re:mlp",
    "lm_head",
    "",
)
MODULES = (
    *("model.layers.1.self_attn.q_proj", "model.layers.10.self_attn.q_proj"),
    *("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"),
    *("model.layers.11.mlp.down_proj", "model.layers.1.mlp.experts.3.up_proj", "lm_head"),
)
ASK_VLLM = """
import json, sys
patterns, units = json.load(sys.stdin)
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8Config
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

def modelopt(name, pattern):
    config = ModelOptFp8Config("FP8", True, None, [pattern])
    config.packed_modules_mapping = FUSED
    return config.is_layer_excluded(name)

asked = {
    "modelopt": modelopt,
    "exact": lambda name, pattern: is_layer_skipped(name, [pattern], FUSED),
    "part": lambda name, pattern: is_layer_skipped(name, [pattern], FUSED, match_mode="substring"),
    "compressed": lambda name, pattern: should_ignore_layer(name, [pattern], FUSED),
}
answers = {}
for way, function in asked.items():
    for pattern in patterns:
        for name in units:
            try:
                answer = bool(function(name, pattern))
            except ValueError:
                answer = "split"
            answers[f"{way} {pattern} {name}"] = answer
print(json.dumps([answers, sorted(ModelRegistry.get_supported_archs()), QUANTIZATION_METHODS]))
"""


@pytest.mark.tools
def test_vllm_reads_patterns_and_knows_names_as_we_say() -> None:
    units = {unit.name: unit for unit in (unit_of(module, fuses=True) for module in MODULES)}
    device = probe_machine().device
    interpreter = Environments(device=device).interpreter(f"serve-{device}")
    done = subprocess.run(
        [str(interpreter), "-c", ASK_VLLM],
        input=json.dumps([PATTERNS, list(units)]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, registered, methods = json.loads(done.stdout.splitlines()[-1])
    expressions = [pattern[3:] for pattern in PATTERNS if pattern.startswith("re:")]
    names = [name for unit in units.values() for name in (unit.name, *unit.shards)]
    matches = match_expressions(expressions, names)
    ours = {
        "modelopt": lambda unit, pattern: exclusions.excluded_by_modelopt(unit, [pattern]),
        "exact": lambda unit, pattern: exclusions.excluded_exactly(unit, [pattern]),
        "part": lambda unit, pattern: exclusions.excluded_by_part(unit, [pattern]),
        "compressed": lambda unit, pattern: exclusions.ignored_by_compressed_tensors(
            unit, [pattern], matches
        ),
    }
    differing = []
    for key, answer in theirs.items():
        way, _, rest = key.partition(" ")
        pattern, _, name = rest.rpartition(" ")
        if way == "compressed" and name.endswith(".experts"):
            # The loader asks about the first expert's projections, never about the whole.
            continue
        try:
            mine: object = ours[way](units[name], pattern) is not None
        except SplitError:
            mine = "split"
        if mine != answer:
            differing.append((key, answer, mine))
    assert not differing
    assert set(registered) <= loaders.architectures("vllm", "0.32.0") | {"TransformersForCausalLM"}
    assert set(methods) <= loaders.METHODS["vllm", "0.32.0"]
