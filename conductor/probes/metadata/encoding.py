"""Compare two ``tokenizer.json`` by structure and by what they encode: a task of ``guarded``.

Reads ``{"before": path, "after": path, "texts": [...]}`` and writes one line per difference:
``[field, before, after, how many entries of the field differ]``. Last comes the line ``"done"``.
Truncation and padding are settings of the last call and are not compared; parts of the pipeline are
compared by what they do, and by their spelling only where neither side can be loaded.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

_PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_SWITCHES = {"byte_fallback": False, "ignore_merges": False, "dropout": None}
_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
_OLDER_SPACES = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}
_METASPACE = {
    "type": "Metaspace",
    "replacement": "\u2581",
    "prepend_scheme": "first",
    "split": False,
}
_TOKENS_TRIED = 1000
_SHOWN_CHARACTERS = 40


def structural(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield differences in the vocabulary, the merges and the added tokens."""
    one, other = _part(before.get("model")), _part(after.get("model"))
    yield from _entries("vocabulary", _vocabulary(one), _vocabulary(other))
    yield from _merges(_merge_list(one), _merge_list(other))
    for switch, default in _SWITCHES.items():
        if (one.get(switch) or default) != (other.get(switch) or default):
            yield [f"model {switch}", one.get(switch), other.get(switch), 1]
    yield from _entries("added token", _added(before), _added(after))


def _part(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _entries(
    field: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[list[Any]]:
    changed = [
        name for name in {**before, **after} if before.get(name, ...) != after.get(name, ...)
    ]
    if changed:
        name = changed[0]
        one, other = (
            "absent" if side.get(name) is None else side[name] for side in (before, after)
        )
        yield [f"{field} {name[:_SHOWN_CHARACTERS]!r}", one, other, len(changed)]


def _vocabulary(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ids by token; entries with a score are numbered by their place."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):
        return {
            str(entry[0]): [n, *entry[1:]] if isinstance(entry, list) else n
            for n, entry in enumerate(vocabulary)
            if isinstance(entry, list) and entry
        }
    return _part(vocabulary)


def _merge_list(model: Mapping[str, Any]) -> list[Any]:
    merges = model.get("merges")
    return [
        merge.split(" ") if isinstance(merge, str) else merge
        for merge in (merges if isinstance(merges, list) else [])
    ]


def _merges(before: list[Any], after: list[Any]) -> Iterator[list[Any]]:
    if before == after:
        return
    at = next(
        (n for n, (one, other) in enumerate(zip(before, after, strict=False)) if one != other),
        min(len(before), len(after)),
    )
    one, other = (merges[at] if at < len(merges) else "absent" for merges in (before, after))
    yield [f"merge {at}", one, other, max(len(before), len(after)) - at]


def _added(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return id and flags by text of the tokens beside the vocabulary."""
    entries = tokenizer.get("added_tokens")
    return {
        str(entry.get("content")): {
            "id": entry.get("id"),
            **{flag: bool(entry.get(flag)) for flag in _FLAGS},
        }
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, Mapping)
    }


def behavioural(
    before: Mapping[str, Any], after: Mapping[str, Any], paths: list[str], texts: list[str]
) -> Iterator[list[Any]]:
    """Yield differences in what the fixed texts and the special tokens become."""
    tried = [*texts, *list(_added(before))[:_TOKENS_TRIED]]
    one, one_problem = _behaviour(before, paths[0], tried)
    other, other_problem = _behaviour(after, paths[1], tried)
    if one is None or other is None:
        if one is not None:
            yield ["(whether it can be loaded)", "it can", other_problem, 1]
        elif other is None:
            for part in _PIPELINE:
                if before.get(part) != after.get(part):
                    yield [part, before.get(part), after.get(part), 1]
        else:
            # The source is beyond the library at hand: what it does cannot be told.
            yield ["(whether it can be loaded)", one_problem, "it can", 1]
        return
    for how, results in one.items():
        changed = [n for n in range(len(tried)) if results[n] != other[how][n]]
        if changed:
            n = changed[0]
            shown = tried[n][:_SHOWN_CHARACTERS]
            yield [f"{how} of {shown!r}", *_tail(results[n], other[how][n]), len(changed)]
            # Other ids decode to other texts: that says nothing more.
            return


def _tail(before: Any, after: Any) -> list[Any]:
    """Return both values from shortly before the first place where they differ."""
    at = next(
        (n for n, (one, other) in enumerate(zip(before, after, strict=False)) if one != other),
        min(len(before), len(after)),
    )
    start = max(0, at - 2)
    return [before[start : start + 8], after[start : start + 8]]


def _current(tokenizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tokenizer with an older spelling of SentencePiece's spaces in the newer one.

    transformers 5 writes ``_METASPACE`` where older files have ``_OLDER_SPACES``, whichever a model
    came with, so a text that begins with a space is read otherwise by whoever takes the file alone.
    """
    if tokenizer.get("normalizer") != _OLDER_SPACES or tokenizer.get("pre_tokenizer"):
        return tokenizer
    return {**tokenizer, "normalizer": None, "pre_tokenizer": _METASPACE}


def _behaviour(
    stated: Mapping[str, Any], path: str, texts: list[str]
) -> tuple[dict[str, list[Any]] | None, str]:
    from tokenizers import Tokenizer

    try:
        current = _current(stated)
        as_it_is = current is stated
        loaded = Tokenizer.from_file(path) if as_it_is else Tokenizer.from_str(json.dumps(current))
        loaded.no_truncation()
        loaded.no_padding()
        bare = [loaded.encode(text, add_special_tokens=False).ids for text in texts]
        whole = [loaded.encode(text).ids for text in texts]
        results: dict[str, list[Any]] = {
            "encoding": bare,
            "encoding with special tokens": whole,
            "decoding": [loaded.decode(ids, skip_special_tokens=False) for ids in whole],
            "decoding without special tokens": [loaded.decode(ids) for ids in whole],
        }
    except MemoryError:
        raise
    except BaseException as error:
        # A panic of the library is no Exception.
        return None, f"it cannot ({str(error)[:100]})"
    return results, ""


def main() -> None:
    """Compare the two files that standard input names."""
    question = json.load(sys.stdin)
    paths = [question["before"], question["after"]]
    before, after = map(_read, paths)
    if before != after:
        for difference in structural(before, after):
            sys.stdout.write(json.dumps(difference) + "\n")
        for difference in behavioural(before, after, paths, question["texts"]):
            sys.stdout.write(json.dumps(difference) + "\n")
    sys.stdout.write('"done"\n')


def _read(path: str) -> dict[str, Any]:
    tokenizer = _part(json.loads(Path(path).read_bytes()))
    return {k: v for k, v in tokenizer.items() if k not in ("truncation", "padding")}


if __name__ == "__main__":
    main()
