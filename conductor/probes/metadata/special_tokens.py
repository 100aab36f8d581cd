"""Compare special tokens and generation defaults, wherever a checkpoint states them.

Sources contradict themselves often, so each file of the candidate is held against the source's own.
What a file of the candidate states anew must agree with what the source states elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from conductor.probes.metadata.differences import MISSING, differs, mapping, same
from conductor.probes.metadata.model_config import TOKEN_FIELDS, text_part, token_ids

Documents = Mapping[str, Mapping[str, Any]]
"""The JSON objects of a checkpoint by file name; a file that does not exist is an empty one."""

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
TOKENS_MAP = "special_tokens_map.json"

_GENERATION_DEFAULTS: Mapping[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "early_stopping": False,
    "max_length": 20,
    "min_length": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
}
"""What transformers assumes where a generation configuration is silent."""

_GENERATION_MEANINGLESS = {
    *("transformers_version", "use_cache", "cache_implementation", "cache_config", "max_cache_len"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
    *("assistant_early_exit", "compile_config", "disable_compile", "low_memory", "is_assistant"),
    *("prefill_chunk_size", "continuous_batching_config"),
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")

_TOKENIZER_MEANINGLESS = {
    *("tokenizer_class", "padding_side", "truncation_side", "truncation", "padding", "max_length"),
    *("stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id", "backend"),
    *("is_local", "local_files_only", "name_or_path", "processor_class", "tokenizer_file"),
    *("special_tokens_map_file", "transformers_version", "sp_model_kwargs", "auto_map", "legacy"),
    *("use_default_system_prompt", "model_input_names", "chat_template", "use_fast", "from_slow"),
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "vocab_file"),
    *("model_specific_special_tokens", "_commit_hash", "init_inputs", "trust_remote_code"),
}
"""Fields that libraries write for themselves, that are settings of the last call, or that have
rules of their own."""

_TOKENIZER_DEFAULTS: Mapping[str, Any] = {"split_special_tokens": False}
"""What transformers assumes where a tokenizer's configuration is silent."""

_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


def special_token_diffs(
    source: Documents, candidate: Documents, token_id: Callable[[str], int | None]
) -> Iterator[str]:
    """Yield one sentence per special token or generation default that differs.

    ``token_id`` returns the id that a text has in the candidate's tokenizer, where that is known.
    """
    yield from _id_diffs(source, candidate)
    yield from _generation_diffs(source, candidate)
    if source[TOKENIZER] and not candidate[TOKENIZER]:
        yield f"{TOKENIZER} is absent in the candidate"
        return
    yield from _text_diffs(source, candidate)
    yield from _new_stop_diffs(source, candidate, token_id)
    yield from _tokenizer_field_diffs(source[TOKENIZER], candidate[TOKENIZER])
    yield from _added_token_diffs(source[TOKENIZER], candidate[TOKENIZER])


def token_texts(documents: Documents) -> dict[str, Any]:
    """Return the special tokens that a chat template may name, by their name."""
    texts: dict[str, Any] = {}
    for stated in _token_tables(documents):
        for name, value in stated.items():
            text = _token_text(value)
            if name.endswith("_token") and isinstance(text, str):
                texts.setdefault(name, text)
    return texts


def _id_diffs(source: Documents, candidate: Documents) -> Iterator[str]:
    for name in TOKEN_FIELDS:
        yield from _config_id_diffs(name, source, candidate)
        before, after = (token_ids(side[GENERATION].get(name)) for side in (source, candidate))
        if before and not candidate[GENERATION]:
            after = _config_ids(candidate, name)
        if before and before != after:
            yield differs(f"{GENERATION} {name}", before, after or MISSING)
        elif after and not before:
            yield from _agreement(GENERATION, name, after, _config_ids(source, name))


def _config_id_diffs(name: str, source: Documents, candidate: Documents) -> Iterator[str]:
    before, after = (_config_ids(side, name) for side in (source, candidate))
    # Where a source leaves it to the class of its language model, that class fills it in.
    added = token_ids(candidate[CONFIG].get(name))
    if before and before != after:
        yield differs(f"{CONFIG} {name}", before, after or MISSING)
    elif added and not before:
        yield from _agreement(CONFIG, name, added, token_ids(source[GENERATION].get(name)))


def _config_ids(documents: Documents, name: str) -> list[Any]:
    config = documents[CONFIG]
    return token_ids(config.get(name)) or token_ids(text_part(config).get(name))


def _agreement(file: str, name: str, after: list[Any], elsewhere: list[Any]) -> Iterator[str]:
    """Hold what the candidate alone states against what the source states in another file.

    A padding token that the source has not is what quantizers set for their calibration.
    """
    if name == "pad_token_id" or (not elsewhere and name == "bos_token_id"):
        return
    if not set(map(str, after)) <= set(map(str, elsewhere)):
        remark = f" (elsewhere {elsewhere})" if elsewhere else ""
        yield f"{file} {name}: absent in the source{remark}, {after} in the candidate"


def _generation_diffs(source: Documents, candidate: Documents) -> Iterator[str]:
    before, after = (_generation(side) for side in (source, candidate))
    for name in sorted(before.keys() | after.keys()):
        if name in _GENERATION_MEANINGLESS or name in TOKEN_FIELDS or name.startswith("_"):
            continue
        values = [side.get(name) for side in (before, after)]
        one, other = (
            _GENERATION_DEFAULTS.get(name) if value is None else value for value in values
        )
        if not same(one, other) and not (name == "do_sample" and _may_sample(before, other)):
            yield differs(
                f"{GENERATION} {name}", *(MISSING if value is None else value for value in values)
            )


def _generation(documents: Documents) -> dict[str, Any]:
    """Return generation defaults; older checkpoints state them in the model's configuration."""
    older = {k: v for k, v in documents[CONFIG].items() if k in (*_GENERATION_DEFAULTS, "min_p")}
    return {**older, **documents[GENERATION]}


def _may_sample(source: Mapping[str, Any], after: Any) -> bool:
    """Return whether a candidate that is to sample says no more than the source.

    Libraries refuse to write that a model is not to, beside settings of how. GPTQModel writes that
    it is to whatever the source says; engines that serve go by the temperature, which is compared.
    """
    is_unsaid = source.get("do_sample") is None
    return after is True and (is_unsaid or any(source.get(n) is not None for n in _SAMPLING))


def _text_diffs(source: Documents, candidate: Documents) -> Iterator[str]:
    before, after = token_texts(source), token_texts(candidate)
    for file in (TOKENIZER, TOKENS_MAP):
        own, kept = (_named_tokens(side[file]) for side in (source, candidate))
        for name in sorted(own.keys() | kept.keys()):
            if name in kept:
                expected = own.get(name, before.get(name))
                if expected is not None and expected != kept[name]:
                    yield differs(f"{file} {name}", own.get(name, MISSING), kept[name])
            elif after.get(name) not in (own[name], before.get(name)):
                yield differs(f"{file} {name}", own[name], MISSING)


def _new_stop_diffs(
    source: Documents, candidate: Documents, token_id: Callable[[str], int | None]
) -> Iterator[str]:
    """Hold a stop token that only the candidate names against the ids at which the source stops."""
    text = token_texts(candidate).get("eos_token")
    if text is None or "eos_token" in token_texts(source):
        return
    generation = token_ids(source[GENERATION].get("eos_token_id"))
    if token_id(text) not in (*generation, *_config_ids(source, "eos_token_id")):
        yield differs(f"{TOKENIZER} eos_token", MISSING, text)


def _token_tables(documents: Documents) -> Iterator[Mapping[str, Any]]:
    """Yield the objects that name special tokens, those that loaders prefer first."""
    config = documents[TOKENIZER]
    yield config
    yield mapping(config.get("extra_special_tokens"))
    yield mapping(config.get("model_specific_special_tokens"))
    yield documents[TOKENS_MAP]


def _named_tokens(stated: Mapping[str, Any]) -> dict[str, Any]:
    texts = {k: _token_text(value) for k, value in stated.items() if k.endswith("_token")}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _token_text(value: Any) -> Any:
    """Return a token's text, which may stand in an object with its other properties."""
    return value.get("content") if isinstance(value, Mapping) else value


def _tokenizer_field_diffs(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Compare what both state: libraries leave out what newer tokenizers state themselves."""
    before, after = ({**_TOKENIZER_DEFAULTS, **side} for side in (before, after))
    for name in sorted(before.keys() & after.keys() - _TOKENIZER_MEANINGLESS):
        one, other = before[name], after[name]
        token = name.endswith("_token") and not isinstance(one, bool)
        if not token and None not in (one, other) and not same(one, other):
            yield differs(f"{TOKENIZER} {name}", one, other)


def listed_tokens(documents: Documents) -> dict[str, str]:
    """Return the special tokens without a name of their own, each with the file that lists it."""
    listed: dict[str, str] = {}
    for file in (TOKENIZER, TOKENS_MAP):
        for field in ("additional_special_tokens", "extra_special_tokens"):
            entries = documents[file].get(field)
            entries = list(entries.values()) if isinstance(entries, Mapping) else entries
            for text in map(_token_text, entries if isinstance(entries, list) else []):
                if isinstance(text, str):
                    listed.setdefault(text, f"{file} {field}")
    return listed


def _added_token_diffs(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    one, other = (mapping(side.get("added_tokens_decoder")) for side in (before, after))
    if not one or not other:
        return
    for number in one.keys() | other.keys():
        entries = [described(side.get(number)) for side in (one, other)]
        if entries[0] != entries[1]:
            yield differs(f"{TOKENIZER} added_tokens_decoder {number}", *entries)


def described(entry: Any) -> Any:
    """Return what an added token is, without what a library leaves out."""
    if not isinstance(entry, Mapping):
        return MISSING
    return {
        "content": entry.get("content"),
        **{flag: bool(entry.get(flag)) for flag in _FLAGS},
    }
