"""Compare what two checkpoints mean beside their weights: architecture, tokenizer, chat template.

Exporters rewrite these files, so they are compared by meaning: the same value under another name,
a template moved into its own file, or a list where one number stood are no differences.
What a file of the candidate means that cannot be read is nobody's guess: that is a difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from conductor.probes.metadata.added_tokens import added_token_diffs
from conductor.probes.metadata.chat_templates import Place, read_templates, template_diffs
from conductor.probes.metadata.differences import (
    MISSING,
    differs,
    mapping,
    read_document,
    same,
    same_bytes,
)
from conductor.probes.metadata.model_config import config_diffs
from conductor.probes.metadata.special_tokens import (
    CONFIG,
    GENERATION,
    TOKENIZER,
    TOKENS_MAP,
    Documents,
    special_token_diffs,
    token_texts,
)
from conductor.probes.metadata.tokenization import token_id, tokenizer_diffs
from conductor.probes.reading import ProbeError

_PROCESSOR = "processor_config.json"
_PREPROCESSOR = "preprocessor_config.json"
_VIDEO = "video_preprocessor_config.json"
_DOCUMENTS = (GENERATION, TOKENIZER, TOKENS_MAP, _PROCESSOR, _PREPROCESSOR, _VIDEO)

_PROCESSOR_MEANINGLESS = re.compile(
    r"_.*|auto_map|transformers_version|processor_class|chat_template|name_or_path|return_tensors"
    r"|(image_processor|feature_extractor|video_processor|tokenizer|processor)_(type|class)"
    r"|input_data_format|data_format|device|disable_grouping|return_metadata|size_divisor"
)
_PROCESSOR_ALIASES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""Limits of a picture's size that newer libraries write as parts of ``size``."""

_NESTED_PROCESSORS = {
    _PREPROCESSOR: ("image_processor", "feature_extractor", "audio_processor"),
    _VIDEO: ("video_processor",),
}
"""Where newer libraries put, in processor_config.json, what was a file of its own."""


def metadata_diffs(
    source: Path, candidate: Path, source_config: Mapping[str, Any], config: Mapping[str, Any]
) -> list[str]:
    """Return one sentence per difference that changes what the model is or how it is prompted.

    Raises:
        ProbeError: a file of the source that exists cannot be read.
    """
    before: dict[str, Mapping[str, Any]] = {CONFIG: source_config}
    after: dict[str, Mapping[str, Any]] = {CONFIG: config}
    unreadable = []
    for name in _DOCUMENTS:
        before[name] = _optional_document(source / name)
        try:
            after[name] = _optional_document(candidate / name)
        except ProbeError as error:
            unreadable.append(f"{name}: {error.problem} in the candidate")
            after[name] = before[name]
    return [
        *unreadable,
        *config_diffs(source_config, config),
        *special_token_diffs(before, after, partial(token_id, candidate)),
        *tokenizer_diffs(source, candidate),
        *added_token_diffs(source, candidate, before, after),
        *_template_diffs(source, candidate, before, after),
        *_processor_diffs(before, after),
        *_code_diffs(source, candidate, before, after),
    ]


def _optional_document(path: Path) -> Mapping[str, Any]:
    return read_document(path) if path.exists() else {}


def _template_diffs(
    source: Path,
    candidate: Path,
    before: Documents,
    after: Documents,
) -> list[str]:
    originals = read_templates(source, before[TOKENIZER])
    try:
        templates: list[Place] = read_templates(candidate, after[TOKENIZER])
    except ProbeError as error:
        return [f"{error.path.name}: {error.problem} in the candidate"]
    return list(template_diffs(originals, templates, token_texts(before), token_texts(after)))


def _processor_diffs(before: Documents, after: Documents) -> Iterator[str]:
    """Compare how pictures, videos and sound are prepared, as far as the source states it."""
    own, kept = _processors(before), _processors(after)
    for name, stated in own.items():
        if stated and not kept[name]:
            yield f"{name} is absent in the candidate"
        else:
            yield from _processor_field_diffs(name, stated, kept[name])


def _processors(documents: Documents) -> dict[str, dict[str, Any]]:
    """Return what is stated for each kind of input, under the name of its older file."""
    joint = dict(documents[_PROCESSOR])
    processors: dict[str, dict[str, Any]] = {}
    for name, nested in _NESTED_PROCESSORS.items():
        parts = [mapping(joint.pop(key, None)) for key in nested]
        moved = {field: value for part in parts for field, value in part.items()}
        processors[name] = _stated(documents[name] or moved)
    return processors | {_PROCESSOR: _stated(joint)}


def _stated(processor: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in processor.items()
        if value is not None and not _PROCESSOR_MEANINGLESS.fullmatch(name)
    }


def _processor_field_diffs(
    file: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[str]:
    for name, value in before.items():
        kept = after.get(name, MISSING)
        if kept is MISSING and name in _PROCESSOR_ALIASES:
            kept = mapping(after.get("size")).get(_PROCESSOR_ALIASES[name], MISSING)
        if isinstance(value, Mapping) and isinstance(kept, Mapping):
            # What the source leaves open, a newer library fills in.
            kept = {inner: kept.get(inner) for inner in value}
        if not same(value, kept) and not _is_side(value, kept):
            yield differs(f"{file} {name}", value, kept)


def _is_side(value: Any, kept: Any) -> bool:
    """Return whether a size in one number became one with named sides, or the other way round."""
    number, sides = (value, kept) if isinstance(kept, Mapping) else (kept, value)
    stated = [side for side in mapping(sides).values() if side is not None]
    return bool(stated) and all(same(number, side) for side in stated)


def _code_diffs(
    source: Path,
    candidate: Path,
    before: Documents,
    after: Documents,
) -> Iterator[str]:
    """Name code of the candidate that the source has not; it is read, and never loaded."""
    for name in before:
        one, other = before[name].get("auto_map"), after[name].get("auto_map")
        if other not in (None, one):
            field = f"{name} auto_map, which names code to load"
            yield differs(field, MISSING if one is None else one, other)
    for path in sorted(candidate.rglob("*.py")):
        original = source / path.relative_to(candidate)
        if not original.is_file():
            yield f"code that the source does not have: {path.relative_to(candidate)}"
        else:
            yield from _changed_code(original, path, path.relative_to(candidate))


def _changed_code(original: Path, path: Path, name: Path) -> Iterator[str]:
    try:
        if not same_bytes(original, path):
            yield f"code that differs from the source's: {name}"
    except ProbeError as error:
        yield f"code of the candidate: {name} {error.problem}"
