"""Good exports of the small models, each as its quantizer writes it.

``EXPORTS`` is the table of clean checkpoints: every row passes the gate under its recipe, and every
fault of the corpus is one minimal change to one of them. Tensors come from the encoders, which know
the formats; names, configuration and files are those that the exporters write.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from encoders import E2M1, bf16, e4m3_numbers, encode, f32, floats
from encoders_packed import encode as encode_packed
from models_on_disk import EXPERTS, MLP, OUTPUT, QKV, SOURCES, STORE, Checkpoint, Raw, random

EVERYTHING = (QKV, OUTPUT, MLP, EXPERTS)

Encode = Callable[[str, np.ndarray], dict[str, Raw]]
"""Module and weight [rows, columns] to the parts that are stored for it."""


@dataclass(frozen=True)
class Export:
    """A clean export: what it is made from, under which recipe, its format in words, and how."""

    source: str
    recipe: str
    format: str
    make: Callable[[Checkpoint], Checkpoint]


def amax(module: str) -> float:
    """Return the largest input that calibration saw: near 4, one layer more, another less."""
    return float(4.0 * np.exp(0.5 * random(f"{module}.amax", 1, spread=1.0)[0]))


def encoder(layout: str, **options: Any) -> Encode:
    """Return how a linear is stored in a layout, with the input scale of its own calibration."""
    levels = {"input_scale": 448.0, "input_global_scale": 448.0 * 6}
    if "nvfp4" in layout:
        levels["input_scale"] *= 6
    elif "int8" in layout:
        levels["input_scale"] = 127.0

    def encode_linear(module: str, weight: np.ndarray) -> dict[str, Raw]:
        parts = encode(layout, weight, **options)
        for part in parts.keys() & levels:
            dtype, array = parts[part]
            scale = amax(module) / levels[part]
            scale = np.full(array.shape, 1 / scale if "global" in part else scale, np.float32)
            parts[part] = bf16(scale) if dtype == "BF16" else f32(scale)
        return parts

    return encode_linear


def resaved(source: Checkpoint) -> Checkpoint:
    """Return the checkpoint as current libraries write its configuration and files."""
    made = source.copy()
    for part in (made.config, made.config.get("text_config", {})):
        if "rope_theta" in part:
            scaling = part.pop("rope_scaling", None) or {"rope_type": "default"}
            part["rope_parameters"] = {"rope_theta": part.pop("rope_theta"), **scaling}
        if "torch_dtype" in part:
            part["dtype"] = part.pop("torch_dtype")
    made.config["transformers_version"] = "5.14.1"
    made.files["generation_config.json"]["transformers_version"] = "5.14.1"
    tokenizer_config = made.files["tokenizer_config.json"]
    made.files["chat_template.jinja"] = tokenizer_config.pop("chat_template")
    tokenizer_config.pop("added_tokens_decoder")
    tokenizer_config |= {
        "backend": "tokenizers",
        "is_local": True,
        "tokenizer_class": "TokenizersBackend",
    }
    made.files.pop("special_tokens_map.json")
    made.files["tokenizer.json"]["truncation"] = {
        "direction": "Right",
        "max_length": 4096,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    return made


def quantize(made: Checkpoint, kinds: Iterable[str], encode_linear: Encode) -> list[str]:
    """Replace the linears of these kinds by their parts, and return the modules that were."""
    modules = [module for module, kind in made.linears.items() if kind in kinds]
    for module in modules:
        weight = floats(made.tensors.pop(f"{module}.weight"))
        for part, raw in encode_linear(module, weight).items():
            made.tensors[f"{module}.{part}"] = raw
    return modules


def left(made: Checkpoint, quantized: Iterable[str]) -> list[str]:
    """Return the linears that are not among the quantized ones, embeddings left out."""
    plain = {
        name.removesuffix(".weight")
        for name, (_, array) in made.tensors.items()
        if name.endswith(".weight") and array.ndim == 2 and "embed" not in name
    }
    return sorted(plain - set(quantized))


def fused_experts(made: Checkpoint) -> list[str]:
    """Return the tensors of fused experts."""
    return [n for n, (_, array) in made.tensors.items() if array.ndim == 3 and ".experts." in n]


def modelopt(
    source: Checkpoint,
    *,
    algorithm: str,
    encode_linear: Encode,
    kinds: Iterable[str] = EVERYTHING,
    groups: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    kv_cache: str | None = None,
) -> Checkpoint:
    """Return what ModelOpt's exporter writes; the configuration stands in two files.

    ``groups`` are the further entries of ``hf_quant_config.json``; ``weights`` and ``inputs`` those
    of the mirror in ``config.json``, for the algorithms of which the exporter writes one.
    """
    made = resaved(source)
    fused = fused_experts(made) if EXPERTS in kinds else []
    quantized = quantize(made, kinds, encode_linear)
    excluded = _collapsed([*left(made, quantized), *_embeddings(made)])
    for name in fused:
        _encode_fused(made, name, encode_linear)
    if kv_cache:
        _add_cache_scales(made, lambda projection: projection)
    producer = {"name": "modelopt", "version": "0.47.0"}
    mirror: dict[str, Any] = {"ignore": excluded, "quant_algo": algorithm, "producer": producer}
    if weights:
        group: dict[str, Any] = {"weights": dict(weights), "targets": ["Linear"]}
        if inputs:
            group["input_activations"] = dict(inputs)
        mirror["config_groups"] = {"group_0": group}
    if kv_cache:
        mirror["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    made.config["quantization_config"] = {**mirror, "quant_method": "modelopt"}
    made.files["hf_quant_config.json"] = {
        "producer": producer,
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": kv_cache,
            **(groups or {}),
            "exclude_modules": list(excluded),
        },
    }
    return made


def _embeddings(made: Checkpoint) -> list[str]:
    return [n.removesuffix(".weight") for n in made.tensors if n.endswith("embed_tokens.weight")]


def _collapsed(modules: Iterable[str]) -> list[str]:
    """Write modules the way ModelOpt does: a part that is left whole becomes one pattern."""
    listed = set(modules)
    patterns = set()
    for module in listed:
        for part in ("model.visual", "model.layers.2", ".self_attn"):
            head, found, _ = module.partition(part)
            whole = part != ".self_attn" or f"{head}{part}.o_proj" in listed
            if found and whole:
                patterns.add(f"{head}{part}*")
                break
        else:
            patterns.add(module)
    return sorted(patterns)


def _encode_fused(made: Checkpoint, name: str, encode_linear: Encode) -> None:
    """Encode fused experts in place, turned as they are; what scales a whole tensor is shared."""
    experts = floats(made.tensors.pop(name)).transpose(0, 2, 1)
    count, rows, columns = experts.shape
    parts = encode_linear(name, experts.reshape(count * rows, columns))
    for part, (dtype, array) in parts.items():
        if array.ndim == 2:
            array = np.ascontiguousarray(array.reshape(count, rows, -1).transpose(0, 2, 1))
        made.tensors[name if part == "weight" else f"{name}_{part}"] = (dtype, array)


def _add_cache_scales(made: Checkpoint, owner: Callable[[str], str]) -> None:
    for module in made.linears:
        leaf = module.rpartition(".")[2]
        if leaf in ("k_proj", "v_proj"):
            scale = f32(np.array(amax(module) / 448))
            made.tensors[f"{owner(module)}.{leaf[0]}_scale"] = scale


def _arguments(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    """Return quantization arguments as llm-compressor writes them, every field in its place."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": bits,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": kind,
        "zp_dtype": None,
        **more,
    }


def compressed(
    source: Checkpoint,
    *,
    layout: str,
    encode_linear: Encode,
    weights: Mapping[str, Any],
    inputs: Mapping[str, Any] | None = None,
    kinds: Iterable[str] = EVERYTHING,
    targets: Iterable[str] = ("Linear",),
    kv_cache: bool = False,
) -> Checkpoint:
    """Return what llm-compressor writes: fused experts apart, what it left alone listed by name."""
    made = resaved(source)
    if EXPERTS in kinds:
        made = taken_apart(made)
    quantized = quantize(made, kinds, encode_linear)
    if kv_cache:
        _add_cache_scales(made, lambda projection: projection.rpartition(".")[0])
    group = {
        "format": layout,
        "input_activations": dict(inputs) if inputs else None,
        "output_activations": None,
        "targets": list(targets),
        "weights": dict(weights),
    }
    made.config["quantization_config"] = {
        "config_groups": {"group_0": group},
        "format": layout,
        "global_compression_ratio": None,
        "ignore": left(made, quantized),
        "kv_cache_scheme": _arguments(8, "float", "tensor") if kv_cache else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.18.0",
    }
    made.files["recipe.yaml"] = "default_stage:\n  default_modifiers: {}\n"
    return made


def taken_apart(source: Checkpoint) -> Checkpoint:
    """Return the model with a linear for each fused expert and projection, gate before up."""
    made = source.copy()
    for name in fused_experts(made):
        parent, _, leaf = name.rpartition(".")
        projections = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        dtype, fused = made.tensors.pop(name)
        turned = fused if made.rows_first else fused.transpose(0, 2, 1)
        for number, expert in enumerate(turned):
            parts = np.split(expert, len(projections))
            for projection, rows in zip(projections, parts, strict=True):
                module = f"{parent}.{number}.{projection}"
                made.tensors[f"{module}.weight"] = (dtype, np.ascontiguousarray(rows))
                made.linears[module] = EXPERTS
    return made


def with_method(
    source: Checkpoint,
    *,
    encode_linear: Encode,
    quantization: Mapping[str, Any],
    file: str = "",
    keep_files: bool = True,
) -> Checkpoint:
    """Return what the libraries write that state a ``quant_method`` and little more.

    ``file`` is the name under which they write the same once more; with ``keep_files`` the other
    files are the source's.
    """
    made = source.copy() if keep_files else resaved(source)
    quantize(made, EVERYTHING, encode_linear)
    made.config["quantization_config"] = dict(quantization)
    if file:
        made.files[file] = {k: v for k, v in quantization.items() if k != "quant_method"}
    return made


def smoothed(source: Checkpoint) -> Checkpoint:
    """Return the model with its activations' scales moved into the weights, as AWQ does.

    A norm's channels are divided by what the columns that read them are multiplied with, and so
    are the rows of ``up_proj`` by the columns of ``down_proj``; the model computes the same.
    """
    made = source.copy()
    for layer in [n.removesuffix(".input_layernorm.weight") for n in made.tensors]:
        if f"{layer}.input_layernorm.weight" not in made.tensors:
            continue
        attention = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
        mlp = [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"]
        _smooth(made, f"{layer}.input_layernorm", attention)
        _smooth(made, f"{layer}.post_attention_layernorm", mlp)
        _smooth(made, f"{layer}.mlp.up_proj", [f"{layer}.mlp.down_proj"])
    return made


def _smooth(made: Checkpoint, before: str, after: Iterable[str]) -> None:
    dtype, stored = made.tensors[f"{before}.weight"]
    scale = np.exp(random(f"{before}.smoothing", stored.shape[0], spread=0.5))
    weight = floats((dtype, stored))
    divided = weight / (scale[:, None] if weight.ndim == 2 else scale)
    made.tensors[f"{before}.weight"] = STORE[dtype](divided)
    for module in after:
        weight = floats(made.tensors[f"{module}.weight"])
        made.tensors[f"{module}.weight"] = STORE[dtype](weight * scale)


FP4_GROUP = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
FP8_TENSOR = {"dynamic": False, "num_bits": 8, "type": "float"}

modelopt_nvfp4 = functools.partial(
    modelopt,
    algorithm="NVFP4",
    encode_linear=encoder("modelopt-nvfp4"),
    groups={"group_size": 16},
    weights=FP4_GROUP,
    inputs=FP4_GROUP,
)
modelopt_fp8 = functools.partial(
    modelopt,
    algorithm="FP8",
    encode_linear=encoder("modelopt-fp8"),
    weights=FP8_TENSOR,
    inputs=FP8_TENSOR,
)


def modelopt_mixed(source: Checkpoint) -> Checkpoint:
    """Return an export whose layers are listed one by one, attention with 16-bit inputs."""
    made = modelopt_nvfp4(source)
    listed = {}
    for module, kind in made.linears.items():
        weight_only = kind in (QKV, OUTPUT)
        if weight_only:
            del made.tensors[f"{module}.input_scale"]
        algorithm = "W4A16_NVFP4" if weight_only else "NVFP4"
        listed[module] = {"quant_algo": algorithm, "group_size": 16}
    quantization = made.files["hf_quant_config.json"]["quantization"]
    quantization |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": listed}
    del quantization["group_size"]
    mirror = made.config["quantization_config"]
    mirror |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": listed}
    del mirror["config_groups"]
    return made


def with_smoothing(layout: str) -> Encode:
    """Return how linears are stored whose smoothing factors no layer before could take."""
    plain = encoder(layout)

    def encode_linear(module: str, weight: np.ndarray) -> dict[str, Raw]:
        if not module.endswith(("o_proj", "down_proj")):
            return plain(module, weight)
        factors = np.exp(random(f"{module}.smoothing", weight.shape[1], spread=0.5))
        return encoder(layout, smoothing=factors)(module, weight)

    return encode_linear


def renamed(made: Checkpoint) -> Checkpoint:
    """Return a vision-language model under the names that older libraries give its parts."""

    def name(old: str) -> str:
        moved = old.replace("model.language_model.", "language_model.model.")
        return moved.replace("model.visual.", "visual.")

    made.tensors = {name(old): raw for old, raw in made.tensors.items()}
    quantization = made.config["quantization_config"]
    quantization["ignore"] = [name(module) for module in quantization["ignore"]]
    return made


TOKEN_INPUTS = functools.partial(_arguments, strategy="token", dynamic=True, observer=None)
STATIC_INPUTS = functools.partial(_arguments, strategy="tensor", observer="static_minmax")

compressed_fp8 = functools.partial(
    compressed,
    layout="float-quantized",
    encode_linear=encoder("ct-fp8"),
    weights=_arguments(8, "float", "channel"),
    inputs=TOKEN_INPUTS(8, "float"),
)
compressed_int8 = functools.partial(
    compressed,
    layout="int-quantized",
    encode_linear=encoder("ct-int8"),
    weights=_arguments(8, "int", "channel"),
    inputs=TOKEN_INPUTS(8, "int"),
)
compressed_int4 = functools.partial(
    compressed,
    layout="pack-quantized",
    encode_linear=encoder("ct-packed"),
    weights=_arguments(4, "int", "group", group_size=128),
)
_NVFP4_ARGUMENTS = _arguments(
    4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"
)
_MXFP4_ARGUMENTS = _arguments(4, "float", "group", group_size=32, scale_dtype="torch.uint8")

BLOCK_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def block_fp8(source: Checkpoint) -> Checkpoint:
    """Return blocks of 128 by 128 with one scale each, in the manner of DeepSeek."""
    quantized = source.linears
    listed = {"modules_to_not_convert": left(source, quantized)}
    return with_method(source, encode_linear=packed("fp8-block"), quantization=BLOCK_FP8 | listed)


def from_block_fp8(source: Checkpoint) -> Checkpoint:
    """Return a source of FP8 blocks in BF16, as an exporter expands it before it quantizes."""
    made = source.copy()
    del made.config["quantization_config"]
    for module in made.linears:
        _, scales = made.tensors.pop(f"{module}.weight_scale_inv")
        _, codes = made.tensors[f"{module}.weight"]
        spread = scales.repeat(128, axis=0).repeat(128, axis=1)
        expanded = e4m3_numbers(codes) * spread[: codes.shape[0], : codes.shape[1]]
        made.tensors[f"{module}.weight"] = bf16(expanded)
    return made


def from_mxfp4(source: Checkpoint) -> Checkpoint:
    """Return a source whose experts are in MXFP4 in BF16, as an exporter expands it first."""
    made = source.copy()
    del made.config["quantization_config"]
    numbers = np.concatenate([E2M1, -E2M1])
    for name in [name for name in made.tensors if name.endswith("_blocks")]:
        _, blocks = made.tensors.pop(name)
        _, scales = made.tensors.pop(name.replace("_blocks", "_scales"))
        pairs = np.stack([numbers[blocks & 0xF], numbers[blocks >> 4]], axis=-1)
        expanded = pairs.reshape(*scales.shape, 32) * np.exp2(scales[..., None] - 127.0)
        turned = expanded.reshape(*scales.shape[:2], -1).transpose(0, 2, 1)
        made.tensors[name.removesuffix("_blocks")] = bf16(np.ascontiguousarray(turned))
    return made


def packed(layout: str, **options: Any) -> Encode:
    """Return how a linear is stored in one of the layouts that have no input scales."""
    return lambda module, weight: encode_packed(layout, weight, **options)


AWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
GPTQ = {
    "bits": 4,
    "checkpoint_format": "gptq",
    "damp_percent": 0.01,
    "desc_act": False,
    "group_size": 128,
    "lm_head": False,
    "quant_method": "gptq",
    "sym": True,
    "true_sequential": True,
}
BITSANDBYTES = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
BITSANDBYTES_INT8 = BITSANDBYTES | {
    "_load_in_4bit": False,
    "_load_in_8bit": True,
    "load_in_4bit": False,
    "load_in_8bit": True,
}


def gpt_oss_mxfp4(source: Checkpoint) -> Checkpoint:
    """Return fused experts as blocks and scales, everything else as it is."""
    made = source.copy()
    for name in fused_experts(made):
        experts = floats(made.tensors.pop(name)).transpose(0, 2, 1)
        encoded = [encode_packed("gpt-oss-mxfp4", expert) for expert in experts]
        for part, (dtype, _) in encoded[0].items():
            stacked = np.stack([each[part][1] for each in encoded])
            made.tensors[f"{name}_{part}"] = (dtype, stacked)
    made.config["quantization_config"] = {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }
    return made


EXPORTS: Mapping[str, Export] = {
    "llama-modelopt-nvfp4": Export("llama", "nvfp4", "ModelOpt NVFP4", modelopt_nvfp4),
    "llama-modelopt-nvfp4-mlp": Export(
        "llama",
        "nvfp4_mlp_only",
        "ModelOpt NVFP4, attention left",
        functools.partial(modelopt_nvfp4, kinds=(MLP, EXPERTS)),
    ),
    "llama-modelopt-nvfp4-omlp": Export(
        "llama",
        "nvfp4_omlp_only",
        "ModelOpt NVFP4, q, k and v left",
        functools.partial(modelopt_nvfp4, kinds=(OUTPUT, MLP, EXPERTS)),
    ),
    "llama-modelopt-mixed": Export(
        "llama", "nvfp4", "ModelOpt MIXED_PRECISION, layers listed", modelopt_mixed
    ),
    "llama-modelopt-w4a16-nvfp4": Export(
        "llama",
        "w4a16_nvfp4",
        "ModelOpt W4A16_NVFP4",
        functools.partial(
            modelopt_nvfp4,
            algorithm="W4A16_NVFP4",
            encode_linear=encoder("modelopt-nvfp4", static=False),
            inputs=None,
        ),
    ),
    "llama-modelopt-fp8": Export(
        "llama",
        "fp8",
        "ModelOpt FP8 with an FP8 cache",
        functools.partial(modelopt_fp8, kv_cache="FP8"),
    ),
    "llama-modelopt-fp8-channel": Export(
        "llama",
        "fp8",
        "ModelOpt FP8, a scale a row",
        functools.partial(
            modelopt,
            algorithm="FP8_PER_CHANNEL_PER_TOKEN",
            encode_linear=encoder("modelopt-fp8", granularity="channel"),
        ),
    ),
    "llama-modelopt-fp8-block": Export(
        "llama",
        "fp8",
        "ModelOpt FP8, a scale a block",
        functools.partial(
            modelopt,
            algorithm="fp8_pb_wo",
            encode_linear=encoder("modelopt-fp8", granularity="block"),
        ),
    ),
    "llama-modelopt-int8": Export(
        "llama",
        "int8",
        "ModelOpt INT8",
        functools.partial(
            modelopt, algorithm="W8A8_SQ_PER_CHANNEL", encode_linear=encoder("modelopt-int8")
        ),
    ),
    "llama-modelopt-int4-awq": Export(
        "llama",
        "int4_awq",
        "ModelOpt INT4 AWQ",
        functools.partial(
            modelopt,
            algorithm="W4A16_AWQ",
            encode_linear=with_smoothing("modelopt-int4"),
            groups={"group_size": 128, "has_zero_point": False, "pre_quant_scale": True},
        ),
    ),
    "tied-modelopt-fp8": Export(
        "qwen2", "fp8", "ModelOpt FP8, head tied to the embeddings", modelopt_fp8
    ),
    "moe-modelopt-nvfp4": Export(
        "qwen-moe", "nvfp4", "ModelOpt NVFP4, experts apart", modelopt_nvfp4
    ),
    "moe-modelopt-nvfp4-experts": Export(
        "qwen-moe",
        "nvfp4_experts_only",
        "ModelOpt NVFP4, experts only",
        functools.partial(modelopt_nvfp4, kinds=(EXPERTS,)),
    ),
    "fused-moe-modelopt-nvfp4": Export(
        "llama4", "nvfp4", "ModelOpt NVFP4, experts fused", modelopt_nvfp4
    ),
    "deepseek-modelopt-nvfp4": Export(
        "deepseek", "nvfp4", "ModelOpt NVFP4, latent attention, MTP head left", modelopt_nvfp4
    ),
    "fp8-source-modelopt-nvfp4": Export(
        "deepseek-block-fp8",
        "nvfp4",
        "ModelOpt NVFP4 of a source in FP8 blocks",
        lambda source: modelopt_nvfp4(from_block_fp8(source)),
    ),
    "vision-modelopt-nvfp4": Export(
        "vision-language", "nvfp4", "ModelOpt NVFP4, vision tower left", modelopt_nvfp4
    ),
    "llama-compressed-int8": Export("llama", "int8", "compressed-tensors INT8", compressed_int8),
    "f32-compressed-int8": Export(
        "llama-f32", "int8", "compressed-tensors INT8 of a 32-bit source", compressed_int8
    ),
    "llama-compressed-fp8-dynamic": Export(
        "llama", "fp8", "compressed-tensors FP8, a scale a row", compressed_fp8
    ),
    "llama-compressed-fp8-static": Export(
        "llama",
        "fp8",
        "compressed-tensors FP8, a scale a tensor, static inputs",
        functools.partial(
            compressed_fp8,
            encode_linear=encoder("ct-fp8", granularity="tensor", static=True),
            weights=_arguments(8, "float", "tensor"),
            inputs=STATIC_INPUTS(8, "float"),
            kv_cache=True,
        ),
    ),
    "llama-compressed-fp8-block": Export(
        "llama",
        "fp8",
        "compressed-tensors FP8, a scale a block",
        functools.partial(
            compressed_fp8,
            encode_linear=encoder("ct-fp8", granularity="block"),
            weights=_arguments(8, "float", "block", block_structure=[128, 128]),
            inputs=_arguments(8, "float", "group", dynamic=True, group_size=128, observer=None),
        ),
    ),
    "llama-compressed-w4a16": Export(
        "llama", "w4a16", "compressed-tensors INT4, packed", compressed_int4
    ),
    "llama-compressed-w4a16-zero-points": Export(
        "llama",
        "w4a16",
        "compressed-tensors INT4, packed, with zero points",
        functools.partial(
            compressed_int4,
            encode_linear=encoder("ct-packed", symmetric=False),
            weights=_arguments(
                4, "int", "group", group_size=128, symmetric=False, zp_dtype="torch.int8"
            ),
        ),
    ),
    "llama-compressed-nvfp4": Export(
        "llama",
        "nvfp4",
        "compressed-tensors NVFP4",
        functools.partial(
            compressed,
            layout="nvfp4-pack-quantized",
            encode_linear=encoder("ct-nvfp4"),
            weights=_NVFP4_ARGUMENTS,
            inputs=_NVFP4_ARGUMENTS | {"dynamic": "local", "observer": "static_minmax"},
        ),
    ),
    "moe-compressed-nvfp4a16": Export(
        "qwen-moe",
        "w4a16_nvfp4",
        "compressed-tensors NVFP4, 16-bit inputs, experts apart",
        functools.partial(
            compressed,
            layout="nvfp4-pack-quantized",
            encode_linear=encoder("ct-nvfp4", static=False),
            weights=_NVFP4_ARGUMENTS,
        ),
    ),
    "llama-compressed-mxfp4": Export(
        "llama",
        "mxfp4",
        "compressed-tensors MXFP4",
        functools.partial(
            compressed,
            layout="mxfp4-pack-quantized",
            encode_linear=encoder("ct-mxfp4"),
            weights=_MXFP4_ARGUMENTS,
            inputs=_MXFP4_ARGUMENTS | {"dynamic": True, "observer": None},
        ),
    ),
    "moe-compressed-w4a16": Export(
        "qwen-moe", "w4a16", "compressed-tensors INT4, experts apart", compressed_int4
    ),
    "fused-moe-compressed-fp8": Export(
        "llama4", "fp8", "compressed-tensors FP8, fused experts taken apart", compressed_fp8
    ),
    "stacked-moe-modelopt-nvfp4": Export(
        "qwen-stacked-moe",
        "nvfp4",
        "ModelOpt NVFP4, stacked experts taken apart",
        lambda source: modelopt_nvfp4(taken_apart(source)),
    ),
    "vision-compressed-fp8": Export(
        "vision-language", "fp8", "compressed-tensors FP8, vision tower left", compressed_fp8
    ),
    "renamed-compressed-fp8": Export(
        "vision-language",
        "fp8",
        "compressed-tensors FP8, parts of the model under other names",
        lambda source: renamed(compressed_fp8(source)),
    ),
    "moe-awq": Export(
        "qwen-moe",
        "int4_awq",
        "AWQ, experts apart, routers listed",
        functools.partial(
            with_method,
            encode_linear=packed("awq"),
            quantization=AWQ | {"modules_to_not_convert": ["mlp.gate", "shared_expert_gate"]},
        ),
    ),
    "llama-modelopt-nvfp4-awq": Export(
        "llama",
        "nvfp4",
        "ModelOpt NVFP4 with smoothing factors",
        functools.partial(
            modelopt_nvfp4,
            algorithm="NVFP4_AWQ",
            encode_linear=with_smoothing("modelopt-nvfp4"),
            groups={"group_size": 16, "has_zero_point": False, "pre_quant_scale": True},
        ),
    ),
    "tied-awq": Export(
        "qwen2",
        "int4_awq",
        "AWQ",
        functools.partial(with_method, encode_linear=packed("awq"), quantization=AWQ),
    ),
    "smoothed-awq": Export(
        "qwen2-f16",
        "w4a16",
        "AWQ, scales moved into norms and up_proj",
        lambda source: with_method(smoothed(source), encode_linear=packed("awq"), quantization=AWQ),
    ),
    "tied-gptq": Export(
        "qwen2-f16",
        "w4a16",
        "GPTQ",
        functools.partial(
            with_method,
            encode_linear=packed("gptq"),
            quantization=GPTQ,
            file="quantize_config.json",
        ),
    ),
    "llama-gptq-reordered": Export(
        "llama",
        "w4a16",
        "GPTQ version 2, columns reordered, zero points",
        functools.partial(
            with_method,
            encode_linear=packed("gptq", reordered=True, symmetric=False, version=2),
            quantization=GPTQ | {"checkpoint_format": "gptq_v2", "desc_act": True, "sym": False},
        ),
    ),
    "llama-block-fp8": Export("llama", "fp8", "FP8 blocks with inverse scales", block_fp8),
    "deepseek-block-fp8": Export(
        "deepseek", "fp8", "FP8 blocks with inverse scales, MTP head left", block_fp8
    ),
    "gpt-oss-mxfp4": Export(
        "gpt-oss", "mxfp4_experts_only", "gpt-oss MXFP4, experts fused", gpt_oss_mxfp4
    ),
    "mxfp4-source-modelopt-nvfp4": Export(
        "gpt-oss-mxfp4",
        "nvfp4",
        "ModelOpt NVFP4 of a source in MXFP4",
        lambda source: modelopt_nvfp4(from_mxfp4(source)),
    ),
    "tied-nf4": Export(
        "qwen2",
        "nf4",
        "bitsandbytes NF4",
        functools.partial(with_method, encode_linear=packed("bnb-nf4"), quantization=BITSANDBYTES),
    ),
    "tied-nf4-nested": Export(
        "qwen2",
        "nf4",
        "bitsandbytes NF4, scales quantized too",
        functools.partial(
            with_method,
            encode_linear=packed("bnb-nf4", nested=True),
            quantization=BITSANDBYTES | {"bnb_4bit_use_double_quant": True},
        ),
    ),
    "tied-llm-int8": Export(
        "qwen2-f16",
        "int8",
        "bitsandbytes INT8",
        functools.partial(
            with_method, encode_linear=packed("bnb-int8"), quantization=BITSANDBYTES_INT8
        ),
    ),
}


@functools.cache
def checkpoint(name: str) -> Checkpoint:
    """Return a source or an export by name; a source may itself be an export."""
    if name in SOURCES:
        return SOURCES[name]()
    export = EXPORTS[name]
    return export.make(checkpoint(export.source))
