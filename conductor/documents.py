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
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refuse(
            f"{what} {path}", f"cannot be read ({error.strerror}); check the path"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _refuse(
            f"{what} {path}", f"is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(document, dict):
        raise _refuse(f"{what} {path}", "must be a mapping of names to values")
    validate(document, schema=schema, where=f"{what} {path}")
    return document


def validate(document: Mapping[str, Any], *, schema: str, where: str) -> None:
    """Check a document's shape against ``gates/schemas/<schema>.json``.

    Raises:
        Failure: USER_CONFIG_ERROR naming ``where`` and every field that is wrong.
    """
    import jsonschema_rs

    text = resources.files("gates").joinpath(f"schemas/{schema}.json").read_text("utf-8")
    try:
        errors = list(jsonschema_rs.validator_for(json.loads(text)).iter_errors(document))
    except (TypeError, ValueError, OverflowError) as error:
        raise _refuse(where, f"holds a value that JSON cannot: {error}") from None
    if errors:
        problems = [
            f"{'.'.join(map(str, error.instance_path)) or 'the document'}: {error.message}"
            for error in errors
        ]
        raise _refuse(where, "; ".join(problems))


def _refuse(where: str, problem: str) -> Failure:
    return Failure(FailureClass.USER_CONFIG_ERROR, f"{where}: {problem}")
