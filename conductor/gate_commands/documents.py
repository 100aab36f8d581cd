"""Read what a gate command was given: JSON of a known shape, and directories through a probe.

Whatever is wrong with an input is one ``InputError`` that names it; nothing is guessed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, TypeVar

import gates
from gates import EvidenceError

if TYPE_CHECKING:
    from conductor.probes.lm_eval import EvaluationResults
    from gates.samples import TaskSamples


LARGEST_DOCUMENT_BYTES = 64 * 2**20
"""Largest JSON input that is read; the largest real summary, with every layer named, is under 1."""

LARGEST_SAMPLES_BYTES = 2 * 2**30
"""Largest samples document that is read: ten million questions with their answers' digests."""

_Evidence = TypeVar("_Evidence")

_ERRORS_SHOWN = 3

_ERROR_CHARACTERS = 200


class InputError(Exception):
    """An input that no gate can use: which one, and what is wrong with it."""

    def __init__(self, source: str, problem: str) -> None:
        """Keep the file, directory or option, and the problem with its remedy."""
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem


def probed(probe: Callable[[], _Evidence]) -> _Evidence:
    """Run a probe; a directory without usable evidence is unusable input."""
    from conductor.probes.reading import ProbeError

    try:
        return probe()
    except ProbeError as error:
        raise InputError(str(error.path), f"{error.problem}; {error.remedy}") from None


def evaluation_results(path: Path, clusters: Mapping[str, str] | None = None) -> EvaluationResults:
    """Read a directory of lm-eval results."""
    from conductor.probes.lm_eval import probe_results

    return probed(lambda: probe_results(path, clusters=clusters))


def holds_samples(document: object) -> bool:
    """Tell a samples document from bare scores, of which none is a mapping."""
    return isinstance(document, dict) and isinstance(document.get("tasks"), dict)


def parsed_samples(path: Path, document: object) -> Mapping[str, TaskSamples]:
    """Return the tasks of a samples document."""
    from gates.samples import parse_samples

    try:
        return parse_samples(document, "")
    except EvidenceError as error:
        raise InputError(str(path), str(error)) from None


def stated_option(text: str | None, name: str) -> Mapping[str, Any]:
    """Read an option that holds a JSON document of the schema of its name."""
    if text is None:
        return {}
    document = _parse_json(text, f"--{name}")
    check_shape(document, name, f"--{name}")
    return dict(document)


def read_document(
    path: Path, schema: str | None = None, overrides: Mapping[str, object] | None = None
) -> Any:
    """Read a JSON file; ``overrides`` that are not ``None`` replace fields.

    With a ``schema`` its shape is checked. Without one it may be a samples document, which the
    gates check: those are larger than any other, and then read by a parser that is faster.
    """
    from conductor.probes.reading import read_bytes

    largest = LARGEST_DOCUMENT_BYTES if schema else LARGEST_SAMPLES_BYTES
    content = probed(lambda: read_bytes(path, "give a JSON file", largest=largest))
    if len(content) > LARGEST_DOCUMENT_BYTES:
        return _parse_large(content, str(path))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(str(path), f"is not UTF-8 text (byte {error.start})") from None
    document = _parse_json(text, str(path))
    if isinstance(document, dict):
        document.update({k: v for k, v in (overrides or {}).items() if v is not None})
    if schema:
        check_shape(document, schema, str(path))
    return document


def _parse_large(content: bytes, source: str) -> Any:
    """Parse a samples document of millions of questions; of a key given twice the last counts."""
    import msgspec

    from conductor.probes.reading import without_collector

    try:
        with without_collector():
            document = msgspec.json.decode(content)
    except (ValueError, RecursionError) as error:
        raise InputError(source, f"is not usable JSON ({error})") from None
    if not holds_samples(document):
        raise InputError(source, f"is larger than {LARGEST_DOCUMENT_BYTES} bytes of bare scores")
    return document


def _parse_json(text: str, source: str) -> Any:
    """Parse strict JSON: no NaN, no infinity, no key given twice."""
    try:
        return json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            object_pairs_hook=_distinct_keys,
        )
    except RecursionError:
        raise InputError(source, "is nested too deeply to be a document of ours") from None
    except ValueError as error:
        problem = "is empty" if not text.strip() else f"is not usable JSON ({error})"
        raise InputError(source, problem) from None


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON number; leave the field out or give a finite number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} is given twice")
    return document


def check_shape(document: object, schema: str, source: str) -> None:
    """Check a document against its schema in ``gates/schemas``."""
    import jsonschema_rs

    schema_path = Path(gates.__file__).with_name("schemas") / f"{schema}.json"
    validator = jsonschema_rs.validator_for(schema_path.read_text(encoding="utf-8"))
    try:
        errors = list(validator.iter_errors(document))
    except (ValueError, RecursionError) as error:
        raise InputError(source, f"holds a value that cannot be read ({error})") from None
    if errors:
        shown = "; ".join(_shape_error(error) for error in errors[:_ERRORS_SHOWN])
        more = len(errors) - _ERRORS_SHOWN
        raise InputError(source, shown + (f"; and {more} more" if more > 0 else ""))


def _shape_error(error: Any) -> str:
    place = ".".join(map(str, error.instance_path)) or "the document"
    message = error.message
    if len(message) > _ERROR_CHARACTERS:
        # The end says what was required; the start repeats the value that was given.
        message = f"…{message[-_ERROR_CHARACTERS:]}"
    return f"{place}: {message}"
