"""Compare what two checkpoints mean beside their weights: architecture, tokenizer, chat template.

Exporters rewrite these files, so they are compared by meaning: the same value under another name,
a template moved into its own file, or a list where one number stood are no differences.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conductor.probes.reading import read_bytes, read_object, read_text

_ARCHITECTURE_FIELDS = (
    ("architectures",),
    ("model_type",),
    ("hidden_size", "n_embd", "d_model"),
    ("intermediate_size", "n_inner", "ffn_dim"),
    ("moe_intermediate_size",),
    ("num_hidden_layers", "n_layer", "num_layers"),
    ("num_attention_heads", "n_head"),
    ("num_key_value_heads",),
    ("head_dim",),
    ("num_experts", "num_local_experts", "n_routed_experts"),
    ("num_experts_per_tok",),
    ("vocab_size",),
    ("max_position_embeddings", "n_positions"),
    ("sliding_window",),
    ("hidden_act", "activation_function"),
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    ("tie_word_embeddings",),
)
"""Fields that decide what the weights compute, each with the names it goes by."""

_TOKEN_FIELDS = ("eos_token_id", "bos_token_id", "pad_token_id")

_SPECIAL_TOKENS = ("eos_token", "bos_token", "pad_token")

_LIBRARY_DEFAULTS: Mapping[str, Any] = {"tie_word_embeddings": True}
"""Values that an exporter may leave out because loaders assume them."""

_REMEDY = "copy or export the checkpoint again"
_MISSING = object()


def metadata_diffs(
    source: Path, candidate: Path, source_config: Mapping[str, Any], config: Mapping[str, Any]
) -> list[str]:
    """Return one sentence per difference that changes what the model is or how it is prompted.

    Raises:
        ProbeError: a file that exists cannot be read.
    """
    return [
        *_config_diffs(source_config, config, ""),
        *_stop_token_diffs(source, candidate, source_config, config),
        *_tokenizer_diffs(source, candidate),
        *_special_token_diffs(source, candidate),
        *_template_diffs(source, candidate),
        *_code_diffs(source, candidate),
    ]


def _differs(field: str, before: Any, after: Any) -> str:
    return f"{field}: {_short(before)} in the source, {_short(after)} in the candidate"


def _short(value: Any) -> str:
    if value is _MISSING:
        return "absent"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _config_diffs(
    source: Mapping[str, Any], candidate: Mapping[str, Any], prefix: str
) -> Iterator[str]:
    """Compare the fields that the source states; what it leaves open, an exporter may fill in."""
    for names in _ARCHITECTURE_FIELDS:
        before, after = _named(source, names), _named(candidate, names)
        if before in (_MISSING, None) or before == after:
            continue
        if after is not _MISSING or _LIBRARY_DEFAULTS.get(names[0], _MISSING) != before:
            yield _differs(f"config.json {prefix}{names[0]}", before, after)
    for name in _TOKEN_FIELDS:
        before, after = _token_ids(source.get(name)), _token_ids(candidate.get(name))
        if before and before != after:
            yield _differs(f"config.json {prefix}{name}", before, after)
    before_rope, after_rope = _rope(source), _rope(candidate)
    if before_rope and before_rope != after_rope:
        yield _differs(f"config.json {prefix}rope", before_rope, after_rope)
    for name, part in source.items():
        if name.endswith("_config") and name != "quantization_config" and isinstance(part, Mapping):
            other = candidate.get(name)
            yield from _config_diffs(
                part, other if isinstance(other, Mapping) else {}, f"{prefix}{name}."
            )


def _named(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if name in config), _MISSING)


def _token_ids(value: Any) -> list[int]:
    """Return token ids as a sorted list: one id and a list of one mean the same."""
    values = value if isinstance(value, list) else [value]
    return sorted(entry for entry in values if type(entry) is int)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary embedding settings in one spelling.

    Older files have ``rope_theta`` beside ``rope_scaling``, newer ones ``rope_parameters``.
    """
    settings: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = config.get(name)
        if isinstance(part, Mapping):
            settings.update(part)
    if "rope_theta" in config:
        settings.setdefault("rope_theta", config["rope_theta"])
    kind = settings.pop("type", None)
    settings.setdefault("rope_type", kind or "default")
    if isinstance(settings.get("rope_theta"), (int, float)):
        settings["rope_theta"] = float(settings["rope_theta"])
    return {} if settings == {"rope_type": "default"} else settings


def _stop_token_diffs(
    source: Path,
    candidate: Path,
    source_config: Mapping[str, Any],
    candidate_config: Mapping[str, Any],
) -> Iterator[str]:
    """Compare the tokens at which generation stops, wherever each side states them."""
    before = _stop_tokens(source, source_config)
    after = _stop_tokens(candidate, candidate_config)
    if before and before != after:
        yield _differs("generation eos_token_id", before, after)


def _stop_tokens(directory: Path, config: Mapping[str, Any]) -> list[int]:
    generation = _optional_object(directory / "generation_config.json")
    return _token_ids(generation.get("eos_token_id")) or _token_ids(config.get("eos_token_id"))


def _tokenizer_diffs(source: Path, candidate: Path) -> Iterator[str]:
    for name in ("tokenizer.json", "tokenizer.model"):
        before, after = source / name, candidate / name
        if not before.exists():
            continue
        if not after.exists():
            if name == "tokenizer.json" or not (candidate / "tokenizer.json").exists():
                yield f"{name} is absent in the candidate"
        elif read_bytes(before, _REMEDY) != read_bytes(after, _REMEDY):
            if name == "tokenizer.model":
                yield f"{name} differs"
            else:
                yield from _fast_tokenizer_diffs(before, after)


def _fast_tokenizer_diffs(source: Path, candidate: Path) -> Iterator[str]:
    """Compare what turns text into ids; padding and truncation are settings of the last call."""
    before, after = (_encoding(read_object(path, _REMEDY)) for path in (source, candidate))
    for part in sorted(before.keys() | after.keys()):
        if before.get(part) != after.get(part):
            yield f"tokenizer.json {part} differs"


def _encoding(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    model = tokenizer.get("model")
    stated = model if isinstance(model, Mapping) else {}
    merges = stated.get("merges")
    added = tokenizer.get("added_tokens")
    return {
        "vocabulary": stated.get("vocab"),
        "merges": [
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
            for merge in (merges if isinstance(merges, list) else [])
            if isinstance(merge, (str, list))
        ],
        "added tokens": sorted(
            json.dumps([entry.get("id"), entry.get("content"), entry.get("special")])
            for entry in (added if isinstance(added, list) else [])
            if isinstance(entry, Mapping)
        ),
        **{
            part: tokenizer.get(part)
            for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        },
    }


def _special_token_diffs(source: Path, candidate: Path) -> Iterator[str]:
    """Compare the special tokens that the source's tokenizer configuration states."""
    name = "tokenizer_config.json"
    before = _optional_object(source / name)
    if before and not (candidate / name).exists():
        yield f"{name} is absent in the candidate"
        return
    after = _optional_object(candidate / name)
    for field in _SPECIAL_TOKENS:
        stated, kept = _token_text(before.get(field)), _token_text(after.get(field))
        if stated is not None and stated != kept:
            yield _differs(f"{name} {field}", stated, kept)


def _token_text(value: Any) -> Any:
    """Return a token's text, which may stand in an object with its other properties."""
    return value.get("content") if isinstance(value, Mapping) else value


def _code_diffs(source: Path, candidate: Path) -> Iterator[str]:
    """Name code of the candidate that the source has not; it is read, and never loaded."""
    for name in ("config.json", "tokenizer_config.json"):
        before, after = (
            _optional_object(directory / name).get("auto_map") for directory in (source, candidate)
        )
        if after not in (None, before):
            yield _differs(f"{name} auto_map, which names code to load", before, after)
    for path in sorted(candidate.rglob("*.py")):
        original = source / path.relative_to(candidate)
        if not original.is_file():
            yield f"code that the source does not have: {path.relative_to(candidate)}"
        elif read_bytes(original, _REMEDY) != read_bytes(path, _REMEDY):
            yield f"code that differs from the source's: {path.relative_to(candidate)}"


def _template_diffs(source: Path, candidate: Path) -> Iterator[str]:
    before, after = _templates(source), _templates(candidate)
    for name, template in before.items():
        if name not in after:
            yield f"chat template {name!r} is absent in the candidate"
        elif after[name] != template:
            yield f"chat template {name!r} differs"


def _templates(directory: Path) -> dict[str, str]:
    """Return chat templates by name; a file of its own wins, as it does in loaders."""
    stated = _optional_object(directory / "tokenizer_config.json").get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(stated, str):
        templates["default"] = stated
    elif isinstance(stated, list):
        for entry in stated:
            if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
                templates[str(entry.get("name"))] = entry["template"]
    file = directory / "chat_template.jinja"
    if file.exists():
        templates["default"] = read_text(file, _REMEDY)
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[extra.stem] = read_text(extra, _REMEDY)
    return templates


def _optional_object(path: Path) -> Mapping[str, Any]:
    return read_object(path, _REMEDY) if path.exists() else {}
