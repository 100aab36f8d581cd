"""Say what differs between a field of the source and the same field of the candidate."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from conductor.probes.reading import COPY_AGAIN, ProbeError, open_regular, parse_object, read_bytes

MISSING: Any = object()
"""A field that is not stated; ``null`` is a value."""


LARGEST_BYTES = 16 << 20
"""Largest JSON document parsed here: the largest configurations of tokenizers have 2 MB, and an
object may take thirty times its text in memory."""

_SHOWN_CHARACTERS = 80
_CHUNK_BYTES = 1 << 20


def differs(field: str, before: Any, after: Any) -> str:
    """Return the sentence for a field with another value."""
    return f"{field}: {short(before)} in the source, {short(after)} in the candidate"


def short(value: Any) -> str:
    """Return a value as JSON, cut to a length that fits into a sentence."""
    if value is MISSING:
        return "absent"
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError):
        return "a value that cannot be shown"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def same(before: Any, after: Any) -> bool:
    """Return whether two JSON values mean the same: 1 is 1.0, and is not true."""
    if isinstance(before, bool) or isinstance(after, bool):
        return before is after
    if isinstance(before, float) and isinstance(after, float) and math.isnan(before):
        return math.isnan(after)
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(same, before, after))
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return before.keys() == after.keys() and all(same(before[k], after[k]) for k in before)
    return bool(before == after)


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a JSON object, or an empty one where something else stands."""
    return value if isinstance(value, Mapping) else {}


def read_document(path: Path) -> dict[str, Any]:
    """Return the JSON object in a metadata file.

    Raises:
        ProbeError: it cannot be read, is larger than any such file, or holds something else.
    """
    return parse_object(read_bytes(path, COPY_AGAIN, largest=LARGEST_BYTES), path, COPY_AGAIN)


def same_bytes(before: Path, after: Path) -> bool:
    """Return whether two files hold the same bytes.

    Raises:
        ProbeError: one of them cannot be read.
    """
    with open_regular(before, COPY_AGAIN) as one, open_regular(after, COPY_AGAIN) as other:
        while True:
            chunk, copy = _read_chunk(one, before), _read_chunk(other, after)
            if chunk != copy:
                return False
            if not chunk:
                return True


def _read_chunk(stream: BinaryIO, path: Path) -> bytes:
    try:
        return stream.read(_CHUNK_BYTES)
    except OSError as error:
        raise ProbeError(path, f"cannot be read ({error.strerror})", COPY_AGAIN) from None
