"""Read YAML documents that people write, and check their shape before anything runs.

Every error names the file, the field and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from conductor.failure import Failure, unusable


def read_yaml(path: Path, *, schema: str, what: str) -> dict[str, Any]:
    """Read the YAML mapping in ``path`` and validate it against ``gates/schemas/<schema>.json``.

    Args:
        path: the file.
        schema: the schema's name without its suffix.
        what: the kind of document, for messages: ``suite``, ``configuration``.

    Raises:
        Failure: USER_CONFIG_ERROR when the file cannot be read, is not YAML, or has another shape.
    """
    document = read_mapping(path, where=f"{what} {path}")
    validate(document, schema=schema, where=f"{what} {path}")
    return document


def read_mapping(path: Path, *, where: str) -> dict[str, Any]:
    """Read the YAML mapping in ``path``, of whatever shape.

    Raises:
        Failure: USER_CONFIG_ERROR naming ``where`` when the file cannot be read, is not YAML, or
            holds something other than a mapping, or one with a name that stands twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.safe_load(text)
    except OSError as error:
        raise refuse(where, f"cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise refuse(where, f"is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise refuse(where, "must be a mapping of names to values")
    if twice := list(_said_twice(text)):
        raise refuse(where, "; ".join(twice))
    return document


def _said_twice(text: str) -> Iterator[str]:
    """Say which names stand twice in one mapping of YAML."""
    nodes, seen = [yaml.compose(text, Loader=yaml.SafeLoader)], set[int]()
    for node in nodes:
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            nodes += node.value
            continue
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in first:
                lines = f"lines {first[key.value]} and {line}"
                yield f"{key.value}: stands there twice ({lines}); leave one of the two"
            first.setdefault(key.value, line)
            nodes.append(value)


def validate(document: Mapping[str, Any], *, schema: str, where: str) -> None:
    """Check a document's shape against ``gates/schemas/<schema>.json``.

    Raises:
        Failure: USER_CONFIG_ERROR naming ``where`` and every field that is wrong.
    """
    import jsonschema_rs

    try:
        errors = list(jsonschema_rs.validator_for(read_schema(schema)).iter_errors(document))
    except (TypeError, ValueError, OverflowError) as error:
        raise refuse(where, f"holds a value that JSON cannot: {error}") from None
    if errors:
        problems = [
            f"{'.'.join(map(str, error.instance_path)) or 'the document'}: {error.message}"
            for error in errors
        ]
        raise refuse(where, "; ".join(problems))


def read_schema(name: str) -> dict[str, Any]:
    """Return ``gates/schemas/<name>.json``."""
    text = resources.files("gates").joinpath(f"schemas/{name}.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def refuse(where: str, problem: str) -> Failure:
    """Return the failure that says what is wrong with a document, to be raised."""
    return unusable(f"{where}: {problem}")
