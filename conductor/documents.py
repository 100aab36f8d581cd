"""Read YAML documents that people write, and check their shape before anything runs.

Every error names the file, the field and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from conductor.failure import Failure
from gates import FailureClass


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
            holds something other than a mapping.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refuse(where, f"cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise refuse(where, f"is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise refuse(where, "must be a mapping of names to values")
    return document


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
    return Failure(FailureClass.USER_CONFIG_ERROR, f"{where}: {problem}")
