"""Compare chat templates by what they make of conversations.

A template may stand in several files, and exporters move it. What is compared is what each place in
the candidate gives, with the source's template of that place or else the one that its loaders take.
Templates are rendered only where their texts differ, and never in this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conductor.probes import guarded
from conductor.probes.metadata.differences import mapping, read_document
from conductor.probes.reading import COPY_AGAIN, read_text

TASK = Path(__file__).with_name("rendering.py")
TIMEOUT_S = 20.0
MEMORY_BYTES = 1 << 30

DEFAULT = "default"


class Place(NamedTuple):
    """A template's name, where it stands, and its text."""

    name: str
    file: str
    text: str


def read_templates(directory: Path, tokenizer_config: Mapping[str, Any]) -> list[Place]:
    """Return the templates of a checkpoint, those that loaders prefer first.

    Raises:
        ProbeError: a file that exists cannot be read.
    """
    places = []
    single = directory / "chat_template.jinja"
    if single.exists():
        places.append(Place(DEFAULT, single.name, read_text(single, COPY_AGAIN)))
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        file = f"{path.parent.name}/{path.name}"
        places.append(Place(path.stem, file, read_text(path, COPY_AGAIN)))
    processor = directory / "chat_template.json"
    if processor.exists():
        stated = read_document(processor).get("chat_template")
        places.extend(_stated(processor.name, stated))
    places.extend(_stated("tokenizer_config.json", tokenizer_config.get("chat_template")))
    return places


def _stated(file: str, value: Any) -> Iterator[Place]:
    """Yield what a ``chat_template`` states: one text, or texts by name."""
    if isinstance(value, str):
        yield Place(DEFAULT, file, value)
    elif isinstance(value, Mapping):
        yield from (
            Place(name, file, text) for name, text in value.items() if isinstance(text, str)
        )
    elif isinstance(value, list):
        for entry in map(mapping, value):
            if isinstance(entry.get("template"), str):
                yield Place(str(entry.get("name")), file, entry["template"])


def template_diffs(
    before: list[Place],
    after: list[Place],
    tokens_before: Mapping[str, Any],
    tokens_after: Mapping[str, Any],
) -> Iterator[str]:
    """Yield one sentence per template that is lost, new, or makes other text of a conversation.

    The tokens are the special tokens that a template may name, by their name.
    """
    new_tokens = tokens_after.keys() - tokens_before.keys()
    pairs: dict[tuple[str, str], list[Place]] = {}
    for place in after:
        original = _counterpart(place, before)
        if original is None:
            yield f"{_named(place)}: absent in the source, {place.text[:40]!r} in the candidate"
        elif original.text != place.text or any(name in place.text for name in new_tokens):
            pairs.setdefault((original.text, place.text), []).append(place)
    kept = {place.name for place in after}
    for place in before:
        if place.name not in kept:
            kept.add(place.name)
            yield f"{_named(place)} of the source: absent in the candidate"
    if not pairs:
        return
    outcome = guarded.run(
        TASK,
        {
            "pairs": [
                {"before": [one, tokens_before], "after": [other, tokens_after]}
                for one, other in pairs
            ]
        },
        timeout_s=TIMEOUT_S,
        memory_bytes=MEMORY_BYTES,
    )
    for places, answer in zip(pairs.values(), outcome.answers, strict=False):
        if answer is not None:
            yield f"{_named(places[0])} {_told_apart(answer)}"
    for places in list(pairs.values())[len(outcome.answers) :]:
        yield (
            f"{_named(places[0])}: its text differs from the source's, and what it makes of a "
            f"conversation cannot be told: {outcome.problem}"
        )


def _counterpart(place: Place, before: list[Place]) -> Place | None:
    same_name = [other for other in before if other.name == place.name]
    return next(
        (other for other in same_name if other.file == place.file),
        same_name[0] if same_name else None,
    )


def _named(place: Place) -> str:
    return f"{place.file} chat template {place.name!r}"


def _told_apart(answer: Mapping[str, Any]) -> str:
    one, other = ("nothing (it fails)" if text is None else repr(text) for text in answer["texts"])
    if answer["conversation"] is None:
        return (
            f"differs, and neither side renders a conversation: "
            f"{one} in the source, {other} in the candidate"
        )
    return (
        f"renders the conversation {answer['conversation']!r} differently: "
        f"{one} in the source, {other} in the candidate"
    )
