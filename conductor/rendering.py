"""The templates of this package: what every document that is made from one has in common.

A name that a template uses and nobody gave is an error, never an empty place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def templates(finalize: Callable[[Any], Any] | None = None) -> Environment:
    """Return the templates; HTML escapes every value by itself, any other form by ``finalize``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=PackageLoader("conductor"),
        autoescape=select_autoescape(["html.j2"]),
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
