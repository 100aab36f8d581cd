"""What lm-evaluation-harness recorded of how it asked, as settings that two sides must share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SIDE_ARGUMENTS = frozenset(
    {
        *("model", "pretrained", "path", "base_url", "served_model_name", "tokenizer", "revision"),
        *("peft", "delta", "gguf_file", "subfolder"),
        *("api_key", "auth_token", "token", "header"),
    }
)
"""Model arguments that say where one side's model or tokenizer is, or that are secrets."""

_SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
_OF_CONFIG = ("limit", "batch_size", "max_batch_size", "gen_kwargs", "device")
_OF_RESULTS = (
    *("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn", "max_length"),
    *("tokenizer_pad_token", "tokenizer_eos_token", "tokenizer_bos_token", "eot_token_id"),
)
_SOFTWARE = ("lm_eval", "transformers")

ALWAYS_RECORDED = (
    *("harness.lm_eval", "model_type", "limit", "batch_size", "gen_kwargs", "chat_template_sha"),
    *(f"seeds.{name.removesuffix('_seed')}" for name in _SEEDS),
)
"""Settings that lm-eval writes down of every run, be they null."""


def settings_of(document: Mapping[str, Any]) -> dict[str, object]:
    """Return the settings of a results document by name; what it does not say is left out."""
    config = _config(document)
    named = {
        **{f"harness.{name}": (document, f"{name}_version") for name in _SOFTWARE},
        "model_type": (config, "model"),
        **{name: (config, name) for name in _OF_CONFIG},
        **{f"seeds.{name.removesuffix('_seed')}": (config, name) for name in _SEEDS},
        **{name: (document, name) for name in _OF_RESULTS},
    }
    settings = {name: source[key] for name, (source, key) in named.items() if key in source}
    for name, value in _arguments(config.get("model_args")).items():
        if name not in _SIDE_ARGUMENTS:
            settings[f"model_args.{name}"] = value
    return settings


def places_of(document: Mapping[str, Any]) -> dict[str, str]:
    """Return where the tokenizer, unless it is the model's own, and cached answers were read."""
    config = _config(document)
    arguments = _arguments(config.get("model_args"))
    tokenizer, cache = arguments.get("tokenizer"), config.get("use_cache")
    own = [arguments.get(name) for name in ("pretrained", "model", "path")]
    return {
        **({"tokenizer": tokenizer} if isinstance(tokenizer, str) and tokenizer not in own else {}),
        **({"cache": cache} if isinstance(cache, str) else {}),
    }


def _config(document: Mapping[str, Any]) -> Mapping[str, Any]:
    stated = document.get("config")
    return stated if isinstance(stated, Mapping) else {}


def _arguments(stated: object) -> Mapping[str, object]:
    """Return model arguments; the command line has them as ``name=value,name=value``."""
    if isinstance(stated, str):
        pairs = (entry.partition("=") for entry in stated.split(",") if entry.strip())
        return {name.strip(): value for name, _, value in pairs}
    return stated if isinstance(stated, Mapping) else {}


def is_sampled(generation: Mapping[str, Any]) -> bool:
    """Tell whether answers are drawn by lot: at a temperature above 0, or where it says so."""
    temperature = generation.get("temperature")
    if isinstance(temperature, (int, float)) and not isinstance(temperature, bool):
        return temperature > 0
    return generation.get("do_sample") is True
