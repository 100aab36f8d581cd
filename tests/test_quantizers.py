"""The quantizers: what we ask them for, what recipe files promise, and what they really export."""

from __future__ import annotations

import json
import re
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conductor import quantizers
from conductor.compatibility import Quantizer
from conductor.environments.builder import Environments
from conductor.failure import Failure
from conductor.probes.checkpoint import probe_checkpoint
from conductor.quantizers import llmcompressor, modelopt
from conductor.quantizers.recipe_files import PROBES, RecipeError, read_recipe_file
from gates import RECIPES, FailureClass, evaluate_checkpoint
from gates.criteria import MODULE_KINDS

REPOSITORY = Path(__file__).parent.parent
MODEL = REPOSITORY / "conductor" / "demo" / "model"
CALIBRATION = REPOSITORY / "conductor" / "demo" / "calibration.jsonl"
SETTINGS: dict[str, Any] = {
    "data": str(CALIBRATION),
    "split": "train",
    "text_column": "text",
    "samples": 16,
    "max_length": 128,
    "seed": 0,
}


MADE = list(modelopt.ROWS)
"""Recipes that both quantizers carry out."""


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_and_the_quantizers_that_are_able(name: str) -> None:
    assert quantizers.find_recipe(name) is RECIPES[name]
    able = {"mxfp4_experts_only": (Quantizer.LLMCOMPRESSOR,)}
    if name != "nf4":
        assert quantizers.able(name) == able.get(
            name, (Quantizer.MODELOPT, Quantizer.LLMCOMPRESSOR)
        )


def test_a_recipe_that_nothing_here_carries_out_is_refused() -> None:
    with pytest.raises(Failure, match="no quantizer here carries out recipe nf4") as caught:
        quantizers.able("nf4")
    assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR


def test_no_row_is_for_an_unknown_recipe() -> None:
    assert set(modelopt.ROWS) < set(llmcompressor.ROWS) < set(RECIPES)


@pytest.mark.parametrize(
    ("quantizer", "name", "expected"),
    [
        (Quantizer.MODELOPT, "nvfp4_omlp_only", {"scheme": "nvfp4_omlp_only"}),
        (Quantizer.MODELOPT, "w4a16", {"scheme": "int4_blockwise_weight_only"}),
        (Quantizer.LLMCOMPRESSOR, "int8", {"scheme": "W8A8", "targets": ["Linear"], "awq": False}),
        (Quantizer.LLMCOMPRESSOR, "int4_awq", {"scheme": "W4A16", "awq": True}),
        (
            Quantizer.LLMCOMPRESSOR,
            "nvfp4_experts_only",
            {"scheme": "NVFP4", "targets": [llmcompressor.TARGETS["experts"]]},
        ),
    ],
)
def test_plan(quantizer: Quantizer, name: str, expected: dict[str, Any]) -> None:
    plan = quantizers.plan(quantizer, name, SETTINGS)
    assert {key: plan[key] for key in expected} == expected
    assert plan["recipe_file"] is None
    assert plan["trust_remote_code"] is False


@pytest.mark.parametrize(
    ("recipe", "data", "expected"),
    [
        pytest.param("nvfp4", str(CALIBRATION), (str(CALIBRATION), None), id="file"),
        pytest.param("nvfp4", "org/name", (None, "org/name"), id="hub"),
        pytest.param("int8", str(CALIBRATION), (None, None), id="none-needed"),
        pytest.param("int8", None, (None, None), id="none-needed-none-given"),
    ],
)
def test_calibration_plan(recipe: str, data: str | None, expected: tuple[str, str]) -> None:
    plan = quantizers.plan(Quantizer.LLMCOMPRESSOR, recipe, {**SETTINGS, "data": data})
    calibration = plan["calibration"]
    assert (calibration["path"], calibration["dataset"]) == expected
    assert calibration["samples"] == 16
    assert calibration["seed"] == 0


@pytest.mark.parametrize(
    ("recipe", "data", "message"),
    [
        pytest.param("nvfp4", None, "needs calibration text", id="needed"),
        pytest.param("nvfp4", "", "needs calibration text", id="empty"),
        pytest.param("nvfp4", "/nowhere/x.jsonl", "no file", id="missing-file"),
        pytest.param("nvfp4", "x.jsonl", "no file", id="missing-file-here"),
        pytest.param("nvfp4", "not an id", "no file", id="malformed-id"),
        pytest.param("nvfp4", "../../etc", "no file", id="path-like"),
        pytest.param("nvpf4", None, "there is no recipe 'nvpf4'", id="unknown-recipe"),
        pytest.param("", None, "there is no recipe", id="empty-recipe"),
        pytest.param("missing.yaml", None, "cannot be read", id="missing-recipe"),
    ],
)
def test_plan_refuses(recipe: str, data: str | None, message: str) -> None:
    with pytest.raises(Failure, match=message) as caught:
        quantizers.plan(Quantizer.LLMCOMPRESSOR, recipe, {**SETTINGS, "data": data})
    assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("model.layers.10.self_attn.q_proj", "attention.qkv"),
        ("model.layers.1.self_attn.qkv_proj", "attention.qkv"),
        ("model.layers.1.self_attn.o_proj", "attention.output"),
        ("model.layers.1.mlp.gate_proj", "mlp"),
        ("model.layers.1.mlp.shared_expert.down_proj", "mlp"),
        ("model.layers.1.feed_forward.up_proj", "mlp"),
        ("model.layers.1.mlp.experts.12.down_proj", "experts"),
        ("model.layers.1.block_sparse_moe.experts.0.w2", "experts"),
        ("model.layers.1.mlp.gate", None),
        ("model.layers.1.mlp.shared_expert_gate", None),
        ("model.layers.1.block_sparse_moe.gate", None),
        ("model.embed_tokens", None),
        ("lm_head", None),
    ],
)
def test_targets_tell_kinds_apart(module: str, kind: str | None) -> None:
    found = [
        name
        for name, pattern in llmcompressor.TARGETS.items()
        if re.match(pattern.removeprefix("re:"), module)
    ]
    assert found == ([kind] if kind else [])


@pytest.mark.parametrize(
    ("module", "ignored"),
    [
        ("lm_head", True),
        ("language_model.lm_head", True),
        ("model.layers.1.mlp.gate", True),
        ("model.layers.1.mlp.shared_expert_gate", True),
        ("model.visual.blocks.0.attn.qkv", True),
        ("model.vision_tower.layers.0.mlp.fc1", True),
        ("mtp.layers.0.mlp.up_proj", True),
        ("model.mtp.layers.0.mlp.up_proj", True),
        *((name, False) for name in PROBES.values()),
        ("model.layers.1.mlp.gate_proj", False),
        ("model.layers.1.mlp.experts.3.gate_proj", False),
    ],
)
def test_ignore_leaves_the_rest_alone(module: str, ignored: bool) -> None:
    matches = (re.match(each.removeprefix("re:"), module) for each in llmcompressor.IGNORE)
    assert any(matches) is ignored


MODELOPT_MLP = """
imports:
  base: configs/ptq/units/base_disable_all
  rest: configs/ptq/units/default_disabled_quantizers
  nvfp4: configs/numerics/nvfp4
  kv: configs/ptq/units/kv_fp8
metadata: {recipe_type: ptq, description: mine}
quantize:
  algorithm: max
  quant_cfg:
    - $import: base
    - {quantizer_name: '*mlp*weight_quantizer', cfg: {$import: nvfp4}}
    - {quantizer_name: '*mlp*input_quantizer', cfg: {$import: nvfp4}}
    - $import: kv
    - $import: rest
"""
MODELOPT_PLAIN = """
algorithm: max
quant_cfg:
  - {quantizer_name: '*', enable: false}
  - {quantizer_name: '*weight_quantizer', cfg: {num_bits: 4, block_sizes: {-1: 64, type: static}}}
  - {quantizer_name: '*o_proj*', enable: false}
"""
LLMCOMPRESSOR_PLAIN = """
default_stage:
  default_modifiers:
    QuantizationModifier:
      targets: [Linear]
      scheme: FP8_DYNAMIC
      ignore: [lm_head, 're:.*self_attn.*']
"""
LLMCOMPRESSOR_GROUPS = """
quantization_stage:
  quantization_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: Linear
          weights: {num_bits: 4, type: int, strategy: group, group_size: 32}
"""


@pytest.mark.parametrize(
    ("text", "quantizer", "bucket", "quantizes", "weight_bits", "calibrated"),
    [
        pytest.param(
            MODELOPT_MLP, "modelopt", "NVFP4", ("mlp", "experts"), 4.5, True, id="modelopt-recipe"
        ),
        pytest.param(
            MODELOPT_PLAIN,
            "modelopt",
            "INT4",
            ("attention.qkv", "mlp", "experts"),
            4.25,
            True,
            id="modelopt-config",
        ),
        pytest.param(
            LLMCOMPRESSOR_PLAIN,
            "llmcompressor",
            "FP8",
            ("mlp", "experts"),
            8.0,
            False,
            id="llmcompressor-scheme",
        ),
        pytest.param(
            LLMCOMPRESSOR_GROUPS,
            "llmcompressor",
            "INT4",
            MODULE_KINDS,
            4.5,
            True,
            id="llmcompressor-groups",
        ),
    ],
)
def test_recipe_file(
    tmp_path: Path,
    text: str,
    quantizer: str,
    bucket: str,
    quantizes: tuple[str, ...],
    weight_bits: float,
    calibrated: bool,
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    file = read_recipe_file(path)
    assert file.quantizer == quantizer
    assert file.calibrated is calibrated
    assert file.recipe.name == "mine"
    assert (file.recipe.bucket, file.recipe.quantizes) == (bucket, quantizes)
    assert file.recipe.weight_bits == weight_bits
    plan = quantizers.plan(Quantizer(quantizer), str(path), SETTINGS)
    assert plan["recipe_file"] == str(path)
    assert quantizers.able(str(path)) == (quantizer,)
    assert quantizers.find_recipe(str(path)) == file.recipe


def stage(modifier: str) -> str:
    return f"a_stage: {{b_modifiers: {modifier}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "is neither", id="empty"),
        pytest.param("[1, 2]", "is neither", id="list"),
        pytest.param("a: [", "is not YAML", id="not-yaml"),
        pytest.param("name: nvfp4", "is neither", id="other-document"),
        pytest.param(
            "QuantizationModifier: {scheme: FP8}", "no key that ends in `_stage`", id="no-stage"
        ),
        pytest.param("metadata: {recipe_type: auto_quantize}", "has no list", id="other-type"),
        pytest.param("quantize: [1]", "has no list", id="quantize-list"),
        pytest.param("quant_cfg: {'*': {enable: false}}", "has no list", id="old-mapping"),
        pytest.param("quant_cfg: [1]", "has no list", id="entry-number"),
        pytest.param("quant_cfg: []", "quantizes no", id="no-entries"),
        pytest.param("quant_cfg: [{enable: true}]", "quant_cfg.0: has no", id="no-name"),
        pytest.param("quant_cfg: [{$import: mine}]", "quant_cfg.0: imports 'mine'", id="import"),
        pytest.param("quant_cfg: [{$import: [a]}]", "quant_cfg.0", id="import-list"),
        pytest.param(
            "quant_cfg: [{quantizer_name: '*', cfg: {num_bits: 3}}]",
            "quant_cfg.0.cfg: num_bits 3",
            id="three-bits",
        ),
        pytest.param(
            "quant_cfg: [{quantizer_name: '*', cfg: [1]}]", "must be one mapping", id="cfg-list"
        ),
        pytest.param(
            "quant_cfg:\n- {quantizer_name: '*weight_quantizer', cfg: {num_bits: 8}}\n"
            "- {quantizer_name: '*mlp*', cfg: {num_bits: e4m3}}",
            "mixes formats",
            id="modelopt-mixed",
        ),
        pytest.param(stage("{QuantizationModifier: [1]}"), "must be a mapping", id="modifier-list"),
        pytest.param(stage("[1]"), "quantizes no", id="modifiers-list"),
        pytest.param(stage("{SparseGPTModifier: {sparsity: 0.5}}"), "quantizes no", id="pruning"),
        pytest.param(
            stage("{QuantizationModifier: {scheme: W2A16}}"), "cannot be gated", id="two-bits"
        ),
        pytest.param(stage("{QuantizationModifier: {scheme: 8}}"), "malformed", id="scheme-number"),
        pytest.param(
            stage("{QuantizationModifier: {scheme: FP8, targets: {a: b}}}"),
            "targets: must be",
            id="targets-mapping",
        ),
        pytest.param(
            stage("{QuantizationModifier: {scheme: FP8, targets: 're:['}}"),
            "no regular expression",
            id="bad-expression",
        ),
        pytest.param(
            stage("{QuantizationModifier: {config_groups: {g: {targets: Linear}}}}"),
            "has no mapping `weights`",
            id="no-weights",
        ),
        pytest.param(
            stage(
                "{QuantizationModifier: {scheme: {FP8: 're:.*mlp.*', W8A8: 're:.*self_attn.*'}}}"
            ),
            "mixes formats",
            id="llmcompressor-mixed",
        ),
    ],
)
def test_recipe_file_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        read_recipe_file(path)
    assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR
    assert str(path) in str(caught.value)


def test_recipe_file_that_is_binary(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RecipeError, match="is not YAML"):
        read_recipe_file(path)


# One process for many requests: importing the libraries costs more than quantizing a tiny model.
DRIVER = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
import protocol
worker = importlib.import_module(sys.argv[2])
outcomes = {}
for name, request in json.load(open(sys.argv[3])).items():
    steps = []
    try:
        outcomes[name] = worker.main(request, lambda done, total, doing: steps.append(doing))
        outcomes[name]["steps"] = steps
    except protocol.WorkerFailure as failure:
        outcomes[name] = {"failure_class": failure.failure_class, "message": failure.message}
json.dump(outcomes, open(sys.argv[4], "w"))
"""
MAKE_EXPERTS = """
import sys, torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=384, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
    moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
    mlp_only_layers=[0], eos_token_id=0, pad_token_id=1, bos_token_id=None,
)
Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
"""
WORKERS = REPOSITORY / "conductor" / "workers"
# (tensor suffix, dtype in the safetensors header) of a quantized layer.
LAYOUT: Mapping[Quantizer, Mapping[str, tuple[str, str]]] = {
    Quantizer.MODELOPT: {
        "NVFP4": ("weight", "U8"),
        "FP8": ("weight", "F8_E4M3"),
        "INT8": ("weight", "I8"),
        "INT4": ("weight", "U8"),
        "MXFP4": ("weight", "U8"),
    },
    Quantizer.LLMCOMPRESSOR: {
        "NVFP4": ("weight_packed", "U8"),
        "FP8": ("weight", "F8_E4M3"),
        "INT8": ("weight", "I8"),
        "INT4": ("weight_packed", "I32"),
        "MXFP4": ("weight_packed", "U8"),
    },
}


def run_in_quantize(*arguments: str) -> None:
    done = subprocess.run(
        [str(Environments().interpreter("quantize")), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def experts_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of experts whose first layer is dense, with the demo's tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "experts"
    run_in_quantize("-c", MAKE_EXPERTS, str(directory))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_bytes((MODEL / name).read_bytes())
    return directory


def requests_for(quantizer: Quantizer, experts_model: Path, directory: Path) -> dict[str, Any]:
    """Return every request of the tests below, by name."""

    def request(recipe: str, **changes: Any) -> dict[str, Any]:
        return {
            **quantizers.plan(quantizer, recipe, SETTINGS),
            "model_path": str(MODEL),
            "device": "cpu",
            "seed": 0,
            **changes,
        }

    text = {"path": str(CALIBRATION), "dataset": None, **{k: SETTINGS[k] for k in SETTINGS}}
    for name, config in (("pickled", None), ("unknown", {"model_type": "nothing-known"})):
        (directory / name).mkdir()
        if config is None:
            (directory / name / "config.json").write_text((MODEL / "config.json").read_text())
            (directory / name / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        else:
            (directory / name / "config.json").write_text(json.dumps(config))
            (directory / name / "model.safetensors").write_bytes(b"")
    (directory / "mine.yaml").write_text(
        MODELOPT_MLP if quantizer is Quantizer.MODELOPT else LLMCOMPRESSOR_PLAIN
    )
    (directory / "broken.yaml").write_text(
        "a_stage: {b_modifiers: {NoSuchModifier: {}}}\nquantize: {}"
    )
    (directory / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    requests = {name: request(name) for name in MADE}
    requests |= {
        "moe-experts": request("nvfp4_experts_only", model_path=str(experts_model)),
        "moe-mlp": request("nvfp4_mlp_only", model_path=str(experts_model)),
        "file": request(str(directory / "mine.yaml")),
        "broken-file": request("nvfp4", recipe_file=str(directory / "broken.yaml")),
        "pickled": request("int8", model_path=str(directory / "pickled")),
        "unknown": request("int8", model_path=str(directory / "unknown")),
        "no-text": request("nvfp4", calibration={**text, "text_column": "prompt"}),
        "bad-text": request("nvfp4", calibration={**text, "path": str(directory / "bad.jsonl")}),
    }
    return {
        name: {**each, "output_dir": str(directory / "out" / name)}
        for name, each in requests.items()
    }


@pytest.fixture(scope="module", params=list(Quantizer), ids=str)
def outcomes(
    request: pytest.FixtureRequest, experts_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Quantizer, dict[str, Any], Path]:
    """Every outcome of one quantizer, from one process."""
    quantizer: Quantizer = request.param
    directory = tmp_path_factory.mktemp(str(quantizer))
    (directory / "requests.json").write_text(
        json.dumps(requests_for(quantizer, experts_model, directory))
    )
    run_in_quantize(
        *("-c", DRIVER, str(WORKERS), Path(quantizers.WORKERS[quantizer]).stem),
        *(str(directory / "requests.json"), str(directory / "outcomes.json")),
    )
    return quantizer, json.loads((directory / "outcomes.json").read_text()), directory


def read_headers(checkpoint: Path) -> dict[str, str]:
    """Return {tensor: dtype} of all weight files."""
    dtypes = {}
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        dtypes |= {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return dtypes


def kind_of(module: str) -> str | None:
    return next(
        (
            kind
            for kind, pattern in llmcompressor.TARGETS.items()
            if re.match(pattern.removeprefix("re:"), module)
        ),
        None,
    )


def assert_layers(checkpoint: Path, source: Path, quantizes: Any, layout: tuple[str, str]) -> int:
    """Check each linear layer of the source against what the recipe means; return how many are."""
    dtypes = read_headers(checkpoint)
    suffix, dtype = layout
    quantized = 0
    for tensor in read_headers(source):
        module, _, last = tensor.rpartition(".")
        assert last == "weight"
        if kind_of(module) in quantizes:
            quantized += 1
            assert dtypes[f"{module}.{suffix}"] == dtype, module
            assert f"{module}.weight_scale" in dtypes
        else:
            assert dtypes[tensor] == "BF16", module
    return quantized


Outcomes = tuple[Quantizer, dict[str, Any], Path]


@pytest.mark.tools
@pytest.mark.parametrize("name", MADE)
def test_exported_layers(outcomes: Outcomes, name: str) -> None:
    quantizer, results, directory = outcomes
    result, recipe = results[name], RECIPES[name]
    assert "message" not in result, result
    layout = LAYOUT[quantizer][recipe.bucket]
    quantized = assert_layers(Path(result["checkpoint"]), MODEL, recipe.quantizes, layout)
    assert result["matched"] == quantized
    assert (quantized == 0) is (name == "nvfp4_experts_only")
    assert Path(result["checkpoint"]) == directory / "out" / name


@pytest.mark.tools
@pytest.mark.parametrize("held_against", MADE)
@pytest.mark.parametrize("name", MADE)
def test_the_gate_knows_every_export(outcomes: Outcomes, name: str, held_against: str) -> None:
    """An export passes for its own recipe, and for one that means the same of the checkpoint."""
    recipe, other = RECIPES[name], RECIPES[held_against]
    summary = probe_checkpoint(Path(outcomes[1][name]["checkpoint"]), MODEL, other)
    verdict = evaluate_checkpoint(summary)
    dense = [set(each.quantizes) - {"experts"} for each in (recipe, other)]
    same = (recipe.bucket, dense[0]) == (other.bucket, dense[1])
    assert verdict.passed is (same and bool(dense[0])), verdict.detail
    if name == held_against == "nvfp4_experts_only":
        assert verdict.failure_class == "MODEL_UNSUPPORTED"


@pytest.mark.tools
@pytest.mark.parametrize("name", MADE)
def test_recorded_calibration(outcomes: Outcomes, name: str) -> None:
    quantizer, results, _ = outcomes
    recorded = results[name]["calibration"]
    if quantizers.ADAPTERS[quantizer].ROWS[name].calibrated:
        assert recorded["source"] == str(CALIBRATION)
        assert recorded["samples"] == SETTINGS["samples"]
        assert 0 < recorded["tokens"] <= SETTINGS["samples"] * SETTINGS["max_length"]
        assert "calibrating 16/16" in results[name]["steps"]
    else:
        assert (recorded["source"], recorded["samples"], recorded["tokens"]) == (None, 0, 0)
    assert results[name]["steps"][0] == "loading"
    assert results[name]["steps"][-1] == "exporting"
    assert results[name]["versions"]["torch"].startswith("2.13.0")


@pytest.mark.tools
@pytest.mark.parametrize("name", MADE)
def test_rest_of_the_checkpoint_is_the_source_s(outcomes: Outcomes, name: str) -> None:
    checkpoint = Path(outcomes[1][name]["checkpoint"])
    for path in MODEL.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (checkpoint / path.name).read_bytes() == path.read_bytes(), path.name
    declared = json.loads((checkpoint / "config.json").read_text()).get("quantization_config")
    assert (declared is None) is (name == "nvfp4_experts_only")


@pytest.mark.tools
@pytest.mark.parametrize(
    ("name", "quantizes"), [("moe-experts", ("experts",)), ("moe-mlp", ("mlp", "experts"))]
)
def test_mixture_of_experts(
    outcomes: Outcomes, experts_model: Path, name: str, quantizes: tuple[str, ...]
) -> None:
    quantizer, results, _ = outcomes
    assert "message" not in results[name], results[name]
    checkpoint = Path(results[name]["checkpoint"])
    layout = LAYOUT[quantizer]["NVFP4"]
    assert assert_layers(checkpoint, experts_model, quantizes, layout) >= 12
    # The source has no generation settings, so none may be invented.
    assert (checkpoint / "generation_config.json").exists() is (
        experts_model / "generation_config.json"
    ).exists()


@pytest.mark.tools
def test_recipe_file_exports_what_it_promises(outcomes: Outcomes) -> None:
    quantizer, results, directory = outcomes
    recipe = read_recipe_file(directory / "mine.yaml").recipe
    assert "message" not in results["file"], results["file"]
    layout = LAYOUT[quantizer][recipe.bucket]
    checkpoint = Path(results["file"]["checkpoint"])
    assert results["file"]["matched"] == assert_layers(checkpoint, MODEL, recipe.quantizes, layout)


@pytest.mark.tools
@pytest.mark.parametrize(
    ("name", "failure_class", "message"),
    [
        ("pickled", "USER_CONFIG_ERROR", "pickled weights are never loaded"),
        ("unknown", "MODEL_UNSUPPORTED", "does not know the model"),
        ("no-text", "USER_CONFIG_ERROR", "'prompt' must be text"),
        ("bad-text", "USER_CONFIG_ERROR", "cannot read calibration data"),
        ("broken-file", "USER_CONFIG_ERROR", "cannot read the recipe"),
    ],
)
def test_failures_are_classified(
    outcomes: Outcomes, name: str, failure_class: str, message: str
) -> None:
    _, results, directory = outcomes
    assert results[name]["failure_class"] == failure_class
    assert message in results[name]["message"]
    assert not (directory / "out" / name).exists()


@pytest.mark.tools
def test_nothing_half_made_is_left(outcomes: Outcomes) -> None:
    assert list((outcomes[2] / "out").glob(".*")) == []


@pytest.mark.tools
def test_recipes_that_modelopt_ships_are_read_or_refused() -> None:
    home = Environments().interpreter("quantize").parent.parent
    shipped = sorted(home.glob("lib/python*/site-packages/modelopt_recipes/general/ptq/*.yaml"))
    assert shipped
    read = {}
    for path in shipped:
        try:
            read[path.stem] = read_recipe_file(path).recipe
        except RecipeError:
            continue
    assert len(read) > len(shipped) / 2
    assert read["nvfp4_experts_only-kv_fp8"].quantizes == ("experts",)
    assert read["nvfp4_mlp_only-kv_fp8"].quantizes == ("mlp", "experts")
    assert read["fp8_default-kv_fp8"].bucket == "FP8"
    assert read["nvfp4_default-kv_fp8"].quantizes == MODULE_KINDS
