"""Small models with real numbers, as they lie on a disk: the sources that exports are made from.

A checkpoint here is what a directory holds: configuration, raw tensors, other files. Each model is
a function and one row of ``SOURCES``; the names, shapes and files are those of the family that it
stands for, the dimensions are as small as the formats allow. Numbers come from a generator that is
seeded with the tensor's name, so that no two tensors are alike and every run builds the same bytes.
"""

from __future__ import annotations

import copy
import functools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from encoders import NUMPY_TYPES, bf16, f32

Raw = tuple[str, np.ndarray]
"""A tensor as stored: safetensors type and array. BF16 is uint16, 8-bit floats are uint8."""

QKV, OUTPUT, MLP, EXPERTS = "attention.qkv", "attention.output", "mlp", "experts"


@dataclass(kw_only=True)
class Checkpoint:
    """What a directory holds.

    ``linears`` are the modules a recipe can mean, each with its kind. Fused experts are [experts,
    columns, rows], or with ``rows_first`` [experts, rows, columns].
    """

    config: dict[str, Any]
    tensors: dict[str, Raw]
    files: dict[str, Any] = field(default_factory=dict)
    shards: int = 1
    linears: dict[str, str] = field(default_factory=dict)
    rows_first: bool = False

    def copy(self) -> Checkpoint:
        """Return a checkpoint that can be changed without changing this one."""
        return copy.deepcopy(self)

    def write(self, directory: Path) -> None:
        """Write the directory: a dictionary as JSON, everything else as it is."""
        directory.mkdir(parents=True)
        write_json(directory / "config.json", self.config)
        for name, content in self.files.items():
            if isinstance(content, str):
                (directory / name).write_text(content, encoding="utf-8")
            else:
                write_json(directory / name, content)
        names = sorted(self.tensors)
        if self.shards == 1:
            write_tensors(directory / "model.safetensors", self.tensors)
            return
        shard_of = {
            name: f"model-{1 + i * self.shards // len(names):05}-of-{self.shards:05}.safetensors"
            for i, name in enumerate(names)
        }
        for shard in set(shard_of.values()):
            mine = {name: self.tensors[name] for name in names if shard_of[name] == shard}
            write_tensors(directory / shard, mine)
        size = sum(array.nbytes for _, array in self.tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": shard_of}
        write_json(directory / "model.safetensors.index.json", index)


def write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def edited(path: Path) -> Iterator[Any]:
    """Give the document in a JSON file to be changed in place, and write it back."""
    document = read_json(path)
    yield document
    write_json(path, document)


def write_tensors(path: Path, tensors: Mapping[str, Raw]) -> None:
    """Write one safetensors file, in the order of the tensors' names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, array) in sorted(tensors.items()):
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [begin, end]}
    write_file(path, header, b"".join(a.tobytes() for _, (_, a) in sorted(tensors.items())))


def write_file(path: Path, header: Mapping[str, Any], data: bytes) -> None:
    """Write a header and the bytes behind it, whether or not they belong together."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the tensor bytes of a safetensors file."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:begin]), content[begin:]


def read_tensors(path: Path) -> dict[str, Raw]:
    """Return the tensors of one safetensors file."""
    header, data = read_file(path)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(data[begin:end], dtype=NUMPY_TYPES[entry["dtype"]])
        tensors[name] = (entry["dtype"], array.reshape(entry["shape"]).copy())
    return tensors


def f16(values: np.ndarray) -> Raw:
    return "F16", values.astype(np.float16)


STORE: Mapping[str, Callable[[np.ndarray], Raw]] = {"BF16": bf16, "F16": f16, "F32": f32}


def random(name: str, *shape: int, spread: float = 0.02) -> np.ndarray:
    """Return what a trained matrix looks like: bell-shaped, with some louder rows and columns."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = generator.standard_normal(shape, dtype=np.float32) * spread
    if len(shape) > 1:
        for axis in (-1, -2):
            loudness = np.exp(generator.standard_normal(shape[axis], dtype=np.float32) * 0.3)
            drawn *= loudness if axis == -1 else loudness[:, None]
    return drawn


class _Builder:
    """Collects the tensors of one model in one type."""

    def __init__(self, dtype: str = "BF16") -> None:
        self.dtype = dtype
        self.tensors: dict[str, Raw] = {}
        self.linears: dict[str, str] = {}

    def add(self, name: str, *shape: int, around: float = 0.0, spread: float = 0.02) -> None:
        self.tensors[name] = STORE[self.dtype](around + random(name, *shape, spread=spread))

    def norm(self, module: str, size: int) -> None:
        self.add(f"{module}.weight", size, around=1.0, spread=0.1)

    def linear(self, module: str, rows: int, columns: int, kind: str = "", *, bias: bool = False):
        """Add a linear; one without a kind is left alone by every recipe."""
        self.add(f"{module}.weight", rows, columns)
        if bias:
            self.add(f"{module}.bias", rows, spread=0.5)
        if kind:
            self.linears[module] = kind

    def embeddings(self, parent: str, rows: int, columns: int, *, tied: bool = False) -> None:
        self.add(f"{parent}.embed_tokens.weight", rows, columns)
        self.norm(f"{parent}.norm", columns)
        if not tied:
            self.add("lm_head.weight", rows, columns)

    def layer_norms(self, layer: str, size: int) -> None:
        self.norm(f"{layer}.input_layernorm", size)
        self.norm(f"{layer}.post_attention_layernorm", size)

    def attention(
        self,
        layer: str,
        config: Mapping[str, Any],
        *,
        bias: bool = False,
        out_bias: bool = False,
        head_norms: bool = False,
    ) -> None:
        hidden, head = config["hidden_size"], config["head_dim"]
        parent = f"{layer}.self_attn"
        for name, heads in (
            ("q_proj", config["num_attention_heads"]),
            ("k_proj", config["num_key_value_heads"]),
            ("v_proj", config["num_key_value_heads"]),
        ):
            self.linear(f"{parent}.{name}", heads * head, hidden, QKV, bias=bias)
        rows = config["num_attention_heads"] * head
        self.linear(f"{parent}.o_proj", hidden, rows, OUTPUT, bias=out_bias)
        if head_norms:
            self.norm(f"{parent}.q_norm", head)
            self.norm(f"{parent}.k_norm", head)

    def mlp(self, parent: str, hidden: int, intermediate: int, kind: str = MLP) -> None:
        self.linear(f"{parent}.gate_proj", intermediate, hidden, kind)
        self.linear(f"{parent}.up_proj", intermediate, hidden, kind)
        self.linear(f"{parent}.down_proj", hidden, intermediate, kind)

    def source(self, config: dict[str, Any], *, shards: int = 1) -> Checkpoint:
        return Checkpoint(
            config=config,
            tensors=self.tensors,
            linears=self.linears,
            files=text_files(),
            shards=shards,
        )


VOCABULARY = 384
END_OF_TEXT, TURN_START, TURN_END, THINK, THINK_END = range(5)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- 'You may call these functions:\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content %}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}{{- '\\n' + (call.function | tojson) }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role != 'system' %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_TEXT = (
    "the capital of France is Paris. The capital of Norway is Oslo.",
    "def add(a, b):\n    return a + b\n",
    "12 + 34 = 46, and 3.14 is nearly pi.",
    "there and then, in the other house, another mother gathered the rest of them",
)


@functools.cache
def _tokenizer() -> str:
    """Return the ``tokenizer.json`` of a byte-level tokenizer that was trained on a few lines."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer.to_str()


def text_files() -> dict[str, Any]:
    """Return the files beside weights and configuration, as they were written some years ago."""
    added = {
        str(number): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for number, text in enumerate(SPECIAL_TOKENS)
    }
    return {
        "tokenizer.json": json.loads(_tokenizer()),
        "tokenizer_config.json": {
            "add_bos_token": False,
            "added_tokens_decoder": added,
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": 4096,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "generation_config.json": {
            "do_sample": True,
            "eos_token_id": [TURN_END, END_OF_TEXT],
            "pad_token_id": END_OF_TEXT,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "transformers_version": "4.51.0",
        },
    }


def _config(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    """Return a configuration in the spelling of older libraries; ``more`` is the model's own."""
    return {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "eos_token_id": TURN_END,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "max_position_embeddings": 4096,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": END_OF_TEXT,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "vocab_size": VOCABULARY,
        **more,
    }


def _layers(config: Mapping[str, Any], parent: str = "model") -> list[str]:
    return [f"{parent}.layers.{number}" for number in range(config["num_hidden_layers"])]


def llama(dtype: str = "BF16") -> Checkpoint:
    """A dense decoder with two groups of 128 columns in each of its matrices."""
    config = _config(
        "LlamaForCausalLM",
        "llama",
        attention_bias=False,
        head_dim=64,
        hidden_size=256,
        mlp_bias=False,
        rope_scaling={
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 512,
            "rope_type": "llama3",
        },
        torch_dtype={"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
    )
    model = _Builder(dtype)
    model.embeddings("model", VOCABULARY, config["hidden_size"])
    for layer in _layers(config):
        model.layer_norms(layer, config["hidden_size"])
        model.attention(layer, config)
        model.mlp(f"{layer}.mlp", config["hidden_size"], config["intermediate_size"])
    return model.source(config)


def qwen2(dtype: str = "BF16") -> Checkpoint:
    """A dense decoder with biases on q, k and v, and a head that is its embeddings."""
    config = _config(
        "Qwen2ForCausalLM",
        "qwen2",
        max_window_layers=2,
        sliding_window=None,
        tie_word_embeddings=True,
        torch_dtype={"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
        use_sliding_window=False,
    )
    model = _Builder(dtype)
    model.embeddings("model", VOCABULARY, config["hidden_size"], tied=True)
    for layer in _layers(config):
        model.layer_norms(layer, config["hidden_size"])
        model.attention(layer, config, bias=True)
        model.mlp(f"{layer}.mlp", config["hidden_size"], config["intermediate_size"])
    return model.source(config)


def qwen_moe() -> Checkpoint:
    """Experts apart, a router, a shared expert with a gate of its own, norms on each head."""
    config = _config(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=128,
        norm_topk_prob=True,
        num_experts=8,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=128,
    )
    model = _Builder()
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    model.embeddings("model", VOCABULARY, hidden)
    for layer in _layers(config):
        model.layer_norms(layer, hidden)
        model.attention(layer, config, head_norms=True)
        model.linear(f"{layer}.mlp.gate", config["num_experts"], hidden)
        model.linear(f"{layer}.mlp.shared_expert_gate", 1, hidden)
        model.mlp(f"{layer}.mlp.shared_expert", hidden, inner)
        for expert in range(config["num_experts"]):
            model.mlp(f"{layer}.mlp.experts.{expert}", hidden, inner, EXPERTS)
    return model.source(config, shards=2)


def llama4() -> Checkpoint:
    """Experts fused in one tensor [experts, columns, rows] for each projection, named as a module.

    A shared expert stands beside them.
    """
    config = _config(
        "Llama4ForCausalLM",
        "llama4_text",
        intermediate_size=128,
        interleave_moe_layer_step=1,
        moe_layers=[0, 1],
        num_experts_per_tok=1,
        num_local_experts=4,
        use_qk_norm=False,
    )
    model = _Builder()
    hidden, inner, experts = 128, config["intermediate_size"], config["num_local_experts"]
    model.embeddings("model", VOCABULARY, hidden)
    for layer in _layers(config):
        model.layer_norms(layer, hidden)
        model.attention(layer, config)
        model.linear(f"{layer}.feed_forward.router", experts, hidden)
        model.mlp(f"{layer}.feed_forward.shared_expert", hidden, inner)
        model.add(f"{layer}.feed_forward.experts.gate_up_proj", experts, hidden, 2 * inner)
        model.add(f"{layer}.feed_forward.experts.down_proj", experts, inner, hidden)
    return model.source(config)


def qwen_stacked_moe() -> Checkpoint:
    """Experts fused as current libraries stack them: [experts, rows, columns]."""
    config = _config(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=64,
        norm_topk_prob=True,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = _Builder()
    hidden, inner, experts = 128, config["moe_intermediate_size"], config["num_experts"]
    model.embeddings("model", VOCABULARY, hidden)
    for layer in _layers(config):
        model.layer_norms(layer, hidden)
        model.attention(layer, config, head_norms=True)
        model.linear(f"{layer}.mlp.gate", experts, hidden)
        model.add(f"{layer}.mlp.experts.gate_up_proj", experts, 2 * inner, hidden)
        model.add(f"{layer}.mlp.experts.down_proj", experts, hidden, inner)
    source = model.source(config)
    source.rows_first = True
    return source


def gpt_oss() -> Checkpoint:
    """Fused experts with biases, gate and up interleaved; attention with biases and sinks."""
    config = _config(
        "GptOssForCausalLM",
        "gpt_oss",
        attention_bias=True,
        experts_per_token=2,
        intermediate_size=128,
        layer_types=["sliding_attention", "full_attention"],
        num_experts_per_tok=2,
        num_local_experts=4,
        rope_scaling={
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 512,
            "rope_type": "yarn",
            "truncate": False,
        },
        rope_theta=150000,
        sliding_window=128,
        swiglu_limit=7.0,
    )
    model = _Builder()
    hidden, inner, experts = 128, config["intermediate_size"], config["num_local_experts"]
    model.embeddings("model", VOCABULARY, hidden)
    for layer in _layers(config):
        model.layer_norms(layer, hidden)
        model.attention(layer, config, bias=True, out_bias=True)
        model.add(f"{layer}.self_attn.sinks", config["num_attention_heads"], spread=1.0)
        model.linear(f"{layer}.mlp.router", experts, hidden, bias=True)
        model.add(f"{layer}.mlp.experts.gate_up_proj", experts, hidden, 2 * inner)
        model.add(f"{layer}.mlp.experts.gate_up_proj_bias", experts, 2 * inner, spread=0.5)
        model.add(f"{layer}.mlp.experts.down_proj", experts, inner, hidden)
        model.add(f"{layer}.mlp.experts.down_proj_bias", experts, hidden, spread=0.5)
    return model.source(config)


def deepseek() -> Checkpoint:
    """Latent attention, a dense first layer, shared experts, and a layer that predicts ahead.

    The last layer is not one of ``num_hidden_layers``: it is the multi-token-prediction head.
    """
    config = _config(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        attention_bias=False,
        first_k_dense_replace=1,
        head_dim=96,
        kv_lora_rank=128,
        moe_intermediate_size=128,
        moe_layer_freq=1,
        n_group=2,
        n_routed_experts=4,
        n_shared_experts=1,
        norm_topk_prob=True,
        num_experts_per_tok=2,
        num_key_value_heads=4,
        num_nextn_predict_layers=1,
        q_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_group=1,
        topk_method="noaux_tc",
        v_head_dim=32,
    )
    model = _Builder()
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    model.embeddings("model", VOCABULARY, hidden)
    for number in range(config["num_hidden_layers"] + 1):
        layer = f"model.layers.{number}"
        ahead = number == config["num_hidden_layers"]
        qkv, output, mlp, experts = ("",) * 4 if ahead else (QKV, OUTPUT, MLP, EXPERTS)
        model.layer_norms(layer, hidden)
        attention = f"{layer}.self_attn"
        model.linear(f"{attention}.q_a_proj", 128, hidden, qkv)
        model.norm(f"{attention}.q_a_layernorm", 128)
        model.linear(f"{attention}.q_b_proj", heads * 64, 128, qkv)
        model.linear(f"{attention}.kv_a_proj_with_mqa", 160, hidden, qkv)
        model.norm(f"{attention}.kv_a_layernorm", 128)
        model.linear(f"{attention}.kv_b_proj", heads * 64, 128, qkv)
        model.linear(f"{attention}.o_proj", hidden, heads * 32, output)
        if number < config["first_k_dense_replace"]:
            model.mlp(f"{layer}.mlp", hidden, config["intermediate_size"], mlp)
            continue
        model.linear(f"{layer}.mlp.gate", config["n_routed_experts"], hidden)
        model.tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = f32(
            random(f"{layer}.mlp.gate.e_score_correction_bias", config["n_routed_experts"])
        )
        model.mlp(f"{layer}.mlp.shared_experts", hidden, 128, mlp)
        for expert in range(config["n_routed_experts"]):
            model.mlp(f"{layer}.mlp.experts.{expert}", hidden, 128, experts)
        if ahead:
            model.add(f"{layer}.embed_tokens.weight", VOCABULARY, hidden)
            model.norm(f"{layer}.enorm", hidden)
            model.norm(f"{layer}.hnorm", hidden)
            model.linear(f"{layer}.eh_proj", hidden, 2 * hidden)
            model.norm(f"{layer}.shared_head.norm", hidden)
            model.add(f"{layer}.shared_head.head.weight", VOCABULARY, hidden)
    return model.source(config, shards=3)


_TEXT_FIELDS = (
    *("attention_dropout", "head_dim", "hidden_act", "hidden_size", "initializer_range"),
    *("intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "torch_dtype"),
    *("use_cache", "vocab_size"),
)


def vision_language() -> Checkpoint:
    """A language model below ``model.language_model``, a vision tower and its projector."""
    plain = _config("Qwen3VLForConditionalGeneration", "qwen3_vl")
    text = {name: plain.pop(name) for name in _TEXT_FIELDS}
    text |= {
        "model_type": "qwen3_vl_text",
        "rope_scaling": {"mrope_section": [8, 4, 4], "rope_type": "default"},
    }
    config = {
        **plain,
        "image_token_id": 370,
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "model_type": "qwen3_vl",
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": 16,
        },
    }
    del config["rope_scaling"]
    model = _Builder()
    model.embeddings("model.language_model", VOCABULARY, text["hidden_size"])
    for layer in _layers(text, "model.language_model"):
        model.layer_norms(layer, text["hidden_size"])
        model.attention(layer, text, head_norms=True)
        model.mlp(f"{layer}.mlp", text["hidden_size"], text["intermediate_size"])
    model.add("model.visual.patch_embed.proj.weight", 128, 3, 2, 16, 16)
    model.add("model.visual.patch_embed.proj.bias", 128)
    model.add("model.visual.pos_embed.weight", 64, 128)
    for number in range(2):
        block = f"model.visual.blocks.{number}"
        for norm in ("norm1", "norm2"):
            model.norm(f"{block}.{norm}", 128)
            model.add(f"{block}.{norm}.bias", 128)
        model.linear(f"{block}.attn.qkv", 384, 128, bias=True)
        model.linear(f"{block}.attn.proj", 128, 128, bias=True)
        model.linear(f"{block}.mlp.linear_fc1", 256, 128, bias=True)
        model.linear(f"{block}.mlp.linear_fc2", 128, 256, bias=True)
    model.norm("model.visual.merger.norm", 128)
    model.linear("model.visual.merger.linear_fc1", 256, 128, bias=True)
    model.linear("model.visual.merger.linear_fc2", 128, 256, bias=True)
    source = model.source(config, shards=2)
    source.files["preprocessor_config.json"] = {
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "merge_size": 2,
        "patch_size": 16,
    }
    return source


SOURCES: Mapping[str, Callable[[], Checkpoint]] = {
    "llama": llama,
    "llama-f32": lambda: llama("F32"),
    "qwen2": qwen2,
    "qwen2-f16": lambda: qwen2("F16"),
    "qwen-moe": qwen_moe,
    "qwen-stacked-moe": qwen_stacked_moe,
    "llama4": llama4,
    "gpt-oss": gpt_oss,
    "deepseek": deepseek,
    "vision-language": vision_language,
}
