"""Compare the files that turn text into token ids and back.

``tokenizer.json`` is read in a process of its own, and only where its bytes differ: it may have
tens of megabytes, and a stranger wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from conductor.probes import guarded
from conductor.probes.metadata.differences import (
    LARGEST_BYTES,
    differs,
    mapping,
    read_document,
    same_bytes,
)
from conductor.probes.reading import COPY_AGAIN, ProbeError, read_bytes

TASK = Path(__file__).with_name("encoding.py")

FAST = "tokenizer.json"

TEXTS = (
    "",
    " ",
    "Hello, world! It's 7 o'clock; we'll see.",
    "THE QUICK brown fox\tjumped.  Twice.   Thrice.\n\n\n  Then\r\nnothing   \n",
    'def f(x: int) -> str:\n    return f"{x!r}"  # done\n\n\tif x != 0 && y >= 1:\n\t\tpass\n',
    '{"key": [1, 2.5e-3, null], "path": "C:\\\\tmp\\\\a.txt", "url": "https://a.example/b?c=d&e=f"}',
    "0 1 12 123 1234 12345 123456 3.14159 1,000,000 2026-01-02 0x1F",
    "你好\uff0c世界。日本語のテキスト、한국어 문장입니다。",
    "مرحبا بالعالم ١٢٣ שלום עולם नमस्ते दुनिया สวัสดีชาวโลก",
    "Привет, мир! Ελληνικά ñandú façade naïve Ärger İstanbul ﬁne ½ №",
    "e\u0301 versus \u00e9, a\u0308 versus \u00e4, \u1e9b\u0323",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈👍🏽 \u200b\u00a0\u3000\ufeff\u0000\u0007",
    "∑∫√≈ \\frac{a}{b} <b>bold</b> &amp; `code` ~~~ --- === ***",
    "Donaudampfschifffahrtsgesellschaftskapitän" * 12,
    "a" * 600 + " " * 200 + "\n" * 70,
)
"""Texts that every tokenizer must still turn into the same ids, and those into the same texts."""

_LARGEST_BYTES = 64 << 20
"""Largest file of an older tokenizer; the largest vocabularies have 10 MB."""

_OTHER_FILES = (
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "added_tokens.json"),
)
"""Files that older tokenizers are read from."""


def tokenizer_diffs(source: Path, candidate: Path) -> Iterator[str]:
    """Yield one sentence per difference between the tokenizers of two checkpoints.

    Raises:
        ProbeError: a file of the source cannot be read.
    """
    fast = (candidate / FAST).exists()
    patterns = {path.name for path in source.glob("*.tiktoken")}
    patterns |= {path.name for path in source.glob("tiktoken*.model")}
    for name in (FAST, *_OTHER_FILES, *sorted(patterns)):
        before, after = source / name, candidate / name
        if not before.exists():
            if (
                name == FAST
                and fast
                and not any((source / other).exists() for other in _OTHER_FILES)
            ):
                yield differs(name, "absent", "present")
        elif not after.exists():
            if not fast:
                yield f"{name} is absent in the candidate"
        else:
            yield from _file_diffs(name, before, after)


def token_id(directory: Path, text: str) -> int | None:
    """Return the id of a token in ``tokenizer.json``, or nothing where that cannot be told."""
    try:
        return id_in(read_document(directory / FAST), text)
    except ProbeError:
        return None


def id_in(document: Mapping[str, Any], text: str) -> int | None:
    """Return the id that a tokenizer gives to a token, or nothing where it is none."""
    added = document.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if mapping(entry).get("content") == text:
            return mapping(entry).get("id")
    number = mapping(mapping(document.get("model")).get("vocab")).get(text)
    return number if type(number) is int else None


def _file_diffs(name: str, before: Path, after: Path) -> Iterator[str]:
    try:
        if same_bytes(before, after):
            return
        content = b"" if name == FAST else read_bytes(after, COPY_AGAIN, largest=_LARGEST_BYTES)
    except ProbeError as error:
        if error.path == before:
            raise
        yield f"{name}: {error.problem} in the candidate"
        return
    if name == FAST:
        yield from _fast_diffs(before, after)
        return
    meaning = _MEANINGS.get(name)
    original = read_bytes(before, COPY_AGAIN, largest=_LARGEST_BYTES)
    if meaning is None or meaning(original) != meaning(content):
        sizes = (f"{len(content):,} bytes" for content in (original, content))
        yield differs(f"{name} (the contents differ)", *sizes)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content) if len(content) <= LARGEST_BYTES else content
    except (ValueError, RecursionError):
        return content


def _lines(content: bytes) -> list[bytes]:
    """Return the lines, less the first that names the version of its writer."""
    return [line for line in content.split(b"\n") if line and not line.startswith(b"#version")]


_MEANINGS: dict[str, Callable[[bytes], Any]] = {
    "vocab.json": _parsed,
    "added_tokens.json": _parsed,
    "merges.txt": _lines,
}
"""Files that libraries write anew with other spaces, and what they mean."""


def _fast_diffs(before: Path, after: Path) -> Iterator[str]:
    question = {"before": str(before), "after": str(after), "texts": TEXTS}
    outcome = guarded.run(TASK, question)
    for answer in outcome.answers:
        if answer != "done":
            field, one, other, count = answer
            more = f" ({count:,} differ)" if count > 1 else ""
            yield differs(f"{FAST} {field}{more}", one, other)
    if not outcome.answers or outcome.answers[-1] != "done":
        yield f"{FAST}: it differs from the source's and cannot be compared: {outcome.problem}"
