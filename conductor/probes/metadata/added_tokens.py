"""Hold what a candidate alone says of added tokens against ``tokenizer.json``.

Loaders add what these files name to the tokenizer, so that a new entry makes a text another token.
What both checkpoints say is compared with each other, and ``tokenizer.json`` as well, elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conductor.probes.metadata.differences import MISSING, differs, mapping, read_document
from conductor.probes.metadata.special_tokens import (
    TOKENIZER,
    Documents,
    described,
    listed_tokens,
)
from conductor.probes.metadata.tokenization import FAST, id_in
from conductor.probes.reading import ProbeError

_ADDED = "added_tokens.json"


def added_token_diffs(
    source: Path, candidate: Path, before: Documents, after: Documents
) -> Iterator[str]:
    """Yield one sentence per added token that only the candidate has, or has otherwise."""
    yield from _listed_diffs(source, before, after)
    yield from _decoder_diffs(candidate, before, after)
    if (candidate / _ADDED).exists() and not (source / _ADDED).exists():
        yield from _file_diffs(candidate)


def _listed_diffs(source: Path, before: Documents, after: Documents) -> Iterator[str]:
    listed, own = listed_tokens(after), listed_tokens(before)
    new = [text for text in listed if text not in own]
    tokenizer = _tokenizer(source) if new else None
    if tokenizer is not None:
        known = {entry.get("content") for entry in _added(tokenizer)}
        yield from (differs(listed[text], MISSING, text) for text in new if text not in known)


def _decoder_diffs(candidate: Path, before: Documents, after: Documents) -> Iterator[str]:
    field = "added_tokens_decoder"
    stated = mapping(after[TOKENIZER].get(field))
    is_new = stated and not before[TOKENIZER].get(field)
    tokenizer = _tokenizer(candidate) if is_new else None
    if tokenizer is None:
        return
    added = {str(entry.get("id")): entry for entry in _added(tokenizer)}
    for number, entry in stated.items():
        own, kept = described(added.get(number)), described(entry)
        if own != kept:
            yield f"{differs(f'{TOKENIZER} {field} {number}', MISSING, kept)}, unlike {FAST}"


def _file_diffs(candidate: Path) -> Iterator[str]:
    tokenizer = _tokenizer(candidate)
    if tokenizer is None:
        return
    try:
        tokens = read_document(candidate / _ADDED)
    except ProbeError as error:
        yield f"{_ADDED}: {error.problem} in the candidate"
        return
    for text, number in tokens.items():
        if id_in(tokenizer, text) != number:
            yield f"{differs(f'{_ADDED} {text!r}', MISSING, number)}, unlike {FAST}"


def _tokenizer(directory: Path) -> Mapping[str, Any] | None:
    """Return ``tokenizer.json``, or nothing where there is none to hold anything against."""
    try:
        return read_document(directory / FAST)
    except ProbeError:
        return None


def _added(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    entries = tokenizer.get("added_tokens")
    return [mapping(entry) for entry in entries] if isinstance(entries, list) else []
