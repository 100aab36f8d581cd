"""Small checkpoints for tests: safetensors headers over zero bytes, written tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conductor.probes.safetensors_header import DTYPE_BITS, INDEX_FILE

Tensors = dict[str, tuple[str, tuple[int, ...]]]

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY, LAYERS, EXPERTS = 256, 384, 128, 512, 2, 4

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "eos_token_id": 0,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_file(path: Path, tensors: Tensors) -> None:
    entries, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        offsets = [position, position + size]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += size
    header = json.dumps(entries).encode()
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + position)


def write_checkpoint(
    directory: Path, tensors: Tensors, config: Mapping[str, Any] = CONFIG, *, shards: int = 1
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_file(directory / "model.safetensors", tensors)
        return directory
    names = list(tensors)
    shard_of = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for shard in set(shard_of.values()):
        write_file(directory / shard, {n: t for n, t in tensors.items() if shard_of[n] == shard})
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": shard_of}))
    return directory


def attention(layer: int) -> Tensors:
    rows = {"q_proj": HIDDEN, "k_proj": KEY_VALUE, "v_proj": KEY_VALUE, "o_proj": HIDDEN}
    return {
        f"model.layers.{layer}.self_attn.{name}.weight": ("BF16", (size, HIDDEN))
        for name, size in rows.items()
    }


def mlp(parent: str) -> Tensors:
    return {
        f"{parent}.gate_proj.weight": ("BF16", (INTERMEDIATE, HIDDEN)),
        f"{parent}.up_proj.weight": ("BF16", (INTERMEDIATE, HIDDEN)),
        f"{parent}.down_proj.weight": ("BF16", (HIDDEN, INTERMEDIATE)),
    }


def dense() -> Tensors:
    """Return a dense decoder: 7 linears in each layer, a head and an embedding."""
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (VOCABULARY, HIDDEN))}
    for layer in range(LAYERS):
        tensors |= attention(layer) | mlp(f"model.layers.{layer}.mlp")
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = ("BF16", (HIDDEN,))
    return tensors | {
        "model.norm.weight": ("BF16", (HIDDEN,)),
        "lm_head.weight": ("BF16", (VOCABULARY, HIDDEN)),
    }


def mixture(*, fused: bool = False) -> Tensors:
    """Return a decoder whose layers hold experts, apart or fused, and a router."""
    tensors = {name: t for name, t in dense().items() if ".mlp." not in name}
    for layer in range(LAYERS):
        parent = f"model.layers.{layer}.mlp"
        tensors[f"{parent}.gate.weight"] = ("BF16", (EXPERTS, HIDDEN))
        if fused:
            shape = (EXPERTS, HIDDEN, 2 * INTERMEDIATE)
            tensors[f"{parent}.experts.gate_up_proj"] = ("BF16", shape)
            tensors[f"{parent}.experts.down_proj"] = ("BF16", (EXPERTS, INTERMEDIATE, HIDDEN))
        else:
            for expert in range(EXPERTS):
                tensors |= mlp(f"{parent}.experts.{expert}")
    return tensors


def is_linear(name: str) -> bool:
    """Tell a linear of a decoder layer; routers, norms and embeddings are none."""
    return "_proj" in name


def quantize(tensors: Tensors, layout: str, *, only: str = "_proj") -> Tensors:
    """Return the tensors of an export in which linears whose name holds ``only`` are packed."""
    exported: Tensors = {}
    for name, (dtype, shape) in tensors.items():
        if not is_linear(name) or only not in name:
            exported[name] = (dtype, shape)
        elif len(shape) == 3:
            exported |= _fused(name, shape)
        else:
            module = name.removesuffix(".weight")
            parts = _PACK[layout](*shape)
            exported |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return exported


def _fused(name: str, shape: tuple[int, ...]) -> Tensors:
    experts, columns, rows = shape
    return {
        name: ("U8", (experts, columns // 2, rows)),
        f"{name}_weight_scale": ("F8_E4M3", (experts, columns // 16, rows)),
        f"{name}_weight_scale_2": ("F32", ()),
        f"{name}_input_scale": ("F32", ()),
    }


_PACK = {
    "modelopt-nvfp4": lambda o, i: {
        "weight": ("U8", (o, i // 2)),
        "weight_scale": ("F8_E4M3", (o, i // 16)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    },
    "modelopt-fp8": lambda o, i: {
        "weight": ("F8_E4M3", (o, i)),
        "weight_scale": ("F32", ()),
        "input_scale": ("F32", ()),
    },
    "modelopt-int8": lambda o, i: {
        "weight": ("I8", (o, i)),
        "weight_scale": ("F32", (o,)),
        "input_scale": ("F32", ()),
        "pre_quant_scale": ("BF16", (i,)),
    },
    "modelopt-int4": lambda o, i: {
        "weight": ("U8", (o // 2, i)),
        "weight_scale": ("F32", (o, i // 128)),
        "pre_quant_scale": ("BF16", (i,)),
    },
    "ct-int8": lambda o, i: {"weight": ("I8", (o, i)), "weight_scale": ("BF16", (o, 1))},
    "ct-fp8": lambda o, i: {"weight": ("F8_E4M3", (o, i)), "weight_scale": ("BF16", (o, 1))},
    "ct-int4": lambda o, i: {
        "weight_packed": ("I32", (o, i // 8)),
        "weight_scale": ("BF16", (o, i // 128)),
        "weight_zero_point": ("I32", (o // 8, i // 128)),
        "weight_shape": ("I64", (2,)),
    },
    "ct-nvfp4": lambda o, i: {
        "weight_packed": ("U8", (o, i // 2)),
        "weight_scale": ("F8_E4M3", (o, i // 16)),
        "weight_global_scale": ("F32", (1,)),
    },
    "ct-mxfp4": lambda o, i: {
        "weight_packed": ("U8", (o, i // 2)),
        "weight_scale": ("U8", (o, i // 32)),
    },
}


def modelopt_config(algorithm: str | None, *ignore: str, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": ["lm_head", *ignore],
        **more,
    }


def ct_config(bits: int, kind: str, group: int | None = None, *ignore: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "group_size": group}
    quantized_inputs = {**weights, "dynamic": True}
    inputs = None if (bits, kind) == (4, "int") else quantized_inputs
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "any",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head", *ignore],
    }
