"""Compare two ``config.json`` by what they make a loader compute.

Every field that the source states is compared, except those in ``MEANINGLESS``, so a field that
nobody here has heard of is compared as well. What the source leaves open, an exporter may fill in
with its library's defaults; only for ``NEUTRAL`` is it known what leaving it open means.
Names that libraries use for one thing stand in ``ALIASES``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from conductor.probes.formats import stated_in
from conductor.probes.metadata.differences import MISSING, differs, mapping, same, short

ALIASES = (
    ("hidden_size", "n_embd", "d_model"),
    ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    ("num_key_value_heads", "num_kv_heads"),
    ("num_experts", "num_local_experts", "n_routed_experts"),
    ("num_experts_per_tok", "experts_per_token", "moe_top_k", "moe_topk"),
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
    ("hidden_act", "activation_function", "hidden_activation", "activation"),
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    ("image_token_id", "image_token_index"),
    ("video_token_id", "video_token_index"),
    ("in_channels", "in_chans", "num_channels"),
)
"""Names of one field; a name that is gone may go on under another of its row."""

MEANINGLESS = re.compile(
    r"_.*|(torch_)?dtype|transformers_version|name_or_path|auto_map|use_cache|cache_implementation"
    r"|quantization_config|compression_config|attn_implementation|experts_implementation"
    r"|output_(attentions|hidden_states|router_logits|past)|return_dict|torchscript|problem_type"
    r"|(id2|)label(2id|)|num_labels|task_specific_params|finetuning_task|summary_.*|prefix"
    r"|.*dropout.*|.*_pdrop|layerdrop|initializer_.*|init_std|gradient_checkpointing|use_mamba_kernels"
    r"|.*aux_loss.*|seq_aux|z_loss_.*|router_z_loss.*|router_jitter_noise|pretraining_tp|ep_size"
    r"|architectures_info|pruned_heads|for_llm_compressor|unsloth_.*|use_bfloat16|ignore_index"
)
"""Fields that tools rewrite, that training alone uses, or that are compared by rules of their own:
the dtype, code to load, and how weights are stored."""

GENERIC_DEFAULTS: Mapping[str, Any] = {
    "tie_word_embeddings": True,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
}
"""Values that transformers leaves out when it writes a configuration, and assumes when it reads."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "sliding_window": (None, 0),
    "attention_chunk_size": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "n_shared_experts": (None, 0),
    "num_nextn_predict_layers": (None, 0),
    "q_lora_rank": (None,),
}
"""What a field means that a whole configuration does not state."""

_ONE_FIELD = (
    *(row for row in ALIASES if "rms_norm_eps" not in row),
    ("dtype", "torch_dtype"),
)
"""Names of one field that must not be stated twice with two values; some classes have two norms."""

_FACTORS = re.compile(r".*multiplier|logit_scale|logits_scaling|mup_.*")
_SOFTCAPS = re.compile(r".*softcap.*")
"""Fields that a candidate may add only where they change nothing, whatever they are called."""

TOKEN_FIELDS = ("eos_token_id", "bos_token_id", "pad_token_id")

_ROPE_FIELDS = (
    *("rope_scaling", "rope_parameters", "rope_theta", "rotary_emb_base", "global_rope_theta"),
    *("rope_local_base_freq", "local_rope_theta", "partial_rotary_factor", "rotary_pct"),
)
_ROPE_TYPES = {"su": "longrope", "mrope": "default", "axial": "default"}
"""Names of rotary embeddings that newer libraries spell otherwise; mrope shows by its sections."""

_ROPE_DEFAULTS: Mapping[str, Any] = {
    "rope_type": "default",
    "partial_rotary_factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "mrope_interleaved": False,
    "attention_factor": None,
}

_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_TIE = "tie_word_embeddings"

_OWN_DTYPE = ("awq", "gptq")
"""Quantization methods whose exporters choose between the 16-bit dtypes themselves: AutoAWQ writes
float16 whatever the source has, GPTQModel bfloat16."""

_DEEPEST = 6
_MOST_LAYERS = 10_000


def config_diffs(source: Mapping[str, Any], candidate: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence per field whose meaning differs."""
    before, after = _with_one_tie(source), _with_one_tie(candidate)
    yield from _part_diffs(before, _beside(after, before), "config.json ", 0)
    yield from _dtype_diffs(source, candidate)


def token_ids(value: Any) -> list[Any]:
    """Return token ids as a sorted list: one id and a list of one mean the same."""
    values = value if isinstance(value, list) else [value]
    known = [entry for entry in values if type(entry) is int]
    return sorted(known) if len(known) == len(values) else [v for v in values if v is not None]


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the nested configuration of the language model, empty where there is none."""
    return next((mapping(config[name]) for name in _TEXT_PARTS if mapping(config.get(name))), {})


def _with_one_tie(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration that says once whether the head is the embeddings.

    What the whole model says counts; its language model's own word does where it says nothing.
    """
    texts = {name: dict(config[name]) for name in _TEXT_PARTS if mapping(config.get(name))}
    nested = [text.pop(_TIE, None) for text in texts.values()]
    tie = next((value for value in (config.get(_TIE), *nested) if value is not None), None)
    return {**config, **texts} | ({} if tie is None else {_TIE: tie})


def _beside(candidate: Mapping[str, Any], source: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the candidate with its language model's fields where the source has them."""
    return candidate if text_part(source) else {**text_part(candidate), **candidate}


def _part_diffs(
    source: Mapping[str, Any], candidate: Mapping[str, Any], prefix: str, depth: int
) -> Iterator[str]:
    before, after = _spelled_out(source), _spelled_out(candidate)
    for name, value in before.items():
        if value is None or MEANINGLESS.fullmatch(name) or name in (*_ROPE_FIELDS, *TOKEN_FIELDS):
            continue
        kept = _under_any_name(after, name)
        if isinstance(value, Mapping) and isinstance(kept, Mapping) and depth < _DEEPEST:
            yield from _part_diffs(value, kept, f"{prefix}{name}.", depth + 1)
        elif not _same_field(name, value, kept, nested=depth > 0):
            yield differs(f"{prefix}{name}", before=value, after=kept)
    yield from _added_diffs(before, after, prefix)
    yield from _twice_stated(before, after, prefix)
    if depth > 0:
        yield from _nested_token_diffs(source, candidate, prefix)
    yield from _rope_diffs(source, candidate, prefix)


def _added_diffs(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Name fields that the candidate alone states, and that are not what a silent source means."""
    if not _is_whole(before):
        return
    for name in dict.fromkeys((*NEUTRAL, *after)):
        if _under_any_name(before, name) in (MISSING, None):
            neutral = NEUTRAL.get(name) or _neutral(name, after)
            if neutral and not any(same(after.get(name), value) for value in neutral):
                yield differs(f"{prefix}{name}", MISSING, after[name])


def _neutral(name: str, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the values with which a field changes nothing, none where that is not known."""
    if name == "query_pre_attn_scalar":
        # Attention is divided by the root of it, and without it by that of a head's size.
        return (None, _head_size(config))
    if _SOFTCAPS.fullmatch(name):
        return (None, 0)
    return (None, 1.0, False) if _FACTORS.fullmatch(name) else ()


def _head_size(config: Mapping[str, Any]) -> Any:
    size, width, heads = (
        _under_any_name(config, name) for name in ("head_dim", "hidden_size", "num_attention_heads")
    )
    if type(size) is int or type(width) is not int or type(heads) is not int or heads < 1:
        return size
    return width // heads


def _twice_stated(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str
) -> Iterator[str]:
    """Name fields that the candidate adds under another name, with another value."""
    for row in _ONE_FIELD:
        stated = [name for name in row if after.get(name) is not None]
        for name in stated:
            others = [each for each in stated if not same(_bare(after[each]), _bare(after[name]))]
            if others and before.get(name) is None:
                yield (
                    f"{prefix}{name}: {short(after[name])} in the candidate, "
                    f"which has {short(after[others[0]])} as {others[0]}"
                )


def _bare(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _spelled_out(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with what some fields imply for others written down."""
    stated = dict(config)
    if stated.get("use_sliding_window") is False:
        stated["sliding_window"] = None
    layers = stated.get("num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
        return stated
    for pattern, usual in (
        ("full_attention_interval", "linear_attention"),
        ("sliding_window_pattern", "sliding_attention"),
    ):
        every = stated.get(pattern)
        if type(every) is int and every > 0:
            del stated[pattern]
            stated.setdefault(
                "layer_types",
                [usual if n % every else "full_attention" for n in range(1, layers + 1)],
            )
    return stated


def _under_any_name(config: Mapping[str, Any], name: str) -> Any:
    if name in config:
        return config[name]
    others = next((row for row in ALIASES if name in row), ())
    return next((config[other] for other in others if other in config), MISSING)


def _same_field(name: str, before: Any, after: Any, *, nested: bool) -> bool:
    if same(before, after):
        return True
    if after is MISSING:
        return same(before, GENERIC_DEFAULTS.get(name, MISSING))
    if nested and name == "model_type" and isinstance(before, str) and isinstance(after, str):
        # Libraries name the parts of a model more precisely than its publisher did.
        return after.startswith(before) or before.startswith(after)
    return False


def _is_whole(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration states its fields, or leaves most to its class."""
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    return all(_under_any_name(config, name) is not MISSING for name in needed)


def _nested_token_diffs(
    source: Mapping[str, Any], candidate: Mapping[str, Any], prefix: str
) -> Iterator[str]:
    """Compare the ids that both state: what only one states, its class fills in or leaves out."""
    for name in TOKEN_FIELDS:
        before, after = token_ids(source.get(name)), token_ids(candidate.get(name))
        if before and after and before != after:
            yield differs(f"{prefix}{name}", before, after)


def _dtype_diffs(source: Mapping[str, Any], candidate: Mapping[str, Any]) -> Iterator[str]:
    """Compare the dtype of the model and of its parts; a part that is silent has the model's.

    Weights in 32 bits may be written in 16; the formats for quantized weights take no others.
    AWQ and GPTQ compute in a 16-bit type of their own.
    """
    is_own = mapping(stated_in(candidate)).get("quant_method") in _OWN_DTYPE
    parts = [name for name in source if name.endswith("_config") and mapping(source[name])]
    for part in ("", *parts):
        before, after = _dtype(source, part), _dtype(candidate, part)
        may_change = before == "float32" or (is_own and _has_16_bits(before))
        if before is None or before == after or (may_change and _has_16_bits(after)):
            continue
        if not part or before != _dtype(source, ""):
            field = f"{part}.dtype" if part else "dtype"
            yield differs(f"config.json {field}", before, MISSING if after is None else after)


def _has_16_bits(dtype: Any) -> bool:
    return dtype in ("bfloat16", "float16")


def _dtype(config: Mapping[str, Any], part: str) -> Any:
    inner = mapping(config.get(part)) if part else config
    for stated in (inner, config, text_part(config)):
        for name in ("dtype", "torch_dtype"):
            if isinstance(stated.get(name), str):
                return stated[name].removeprefix("torch.")
            if stated.get(name) is not None:
                return stated[name]
    return None


def _rope_diffs(
    source: Mapping[str, Any], candidate: Mapping[str, Any], prefix: str
) -> Iterator[str]:
    before, after = _rope(source), _rope(candidate)
    for layers, settings in before.items():
        other = after.get(layers, after.get("", after.get("full_attention", {})))
        where = f"{prefix}rope {layers}.".replace(" .", " ")
        names = sorted(settings.keys() | other.keys())
        if not same(settings["rope_type"], other.get("rope_type", "default")):
            # Each type has settings of its own, and none of the other's.
            names = ["rope_theta", "rope_type"]
        for name in names:
            value, kept = (part.get(name, _ROPE_DEFAULTS.get(name)) for part in (settings, other))
            if not same(value, kept) and not _is_filled_in(name, value, kept, source, settings):
                yield differs(
                    f"{where}{name}",
                    MISSING if value is None else value,
                    MISSING if kept is None else kept,
                )


def _is_filled_in(
    name: str, value: Any, kept: Any, source: Mapping[str, Any], settings: Mapping[str, Any]
) -> bool:
    """Return whether a library wrote down what the source leaves to it."""
    if name in settings and name != "rope_type":
        return False
    if name == "rope_theta":
        return True
    if not any(field in source for field in _ROPE_FIELDS):
        return name != "rope_type"
    if name == "original_max_position_embeddings":
        lengths = (source.get(name), source.get("max_position_embeddings"))
        return any(same(kept, length) for length in lengths)
    return value is None and kept is None


def _rope(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return rotary embedding settings by type of layer, in one spelling.

    Older files have ``rope_theta`` beside ``rope_scaling``, newer ones ``rope_parameters``, which
    may hold one object per type of layer. The name "" stands for all types of layers.
    """
    stated: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        stated.update(mapping(config.get(name)))
    layered = {layers: dict(part) for layers, part in stated.items() if isinstance(part, Mapping)}
    ropes = layered or {"": stated}
    local = _first(config, "rope_local_base_freq", "local_rope_theta")
    if local is not None:
        ropes.setdefault("sliding_attention", {}).setdefault("rope_theta", local)
    for layers, settings in ropes.items():
        kind = settings.pop("type", None)
        kind = settings.get("rope_type", kind)
        settings["rope_type"] = _ROPE_TYPES.get(kind, kind) if isinstance(kind, str) else "default"
        partial = _first(config, "partial_rotary_factor", "rotary_pct")
        if partial is not None:
            settings.setdefault("partial_rotary_factor", partial)
        if layers == "sliding_attention":
            continue
        base = _first(config, "rope_theta", "rotary_emb_base", "global_rope_theta")
        if base is not None and not same(settings.setdefault("rope_theta", base), base):
            settings["rope_theta beside rope_parameters"] = base
    return ropes


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)
