"""Lists of modules that are left alone, as the loaders of Hugging Face formats read them.

A name stands for every module that has it as a run of whole components: ``lm_head``,
``model.layers.0.self_attn``, ``mlp.gate``. Loaders differ in whether a name may end within a
component; here it may not, so that ``gate`` is no part of ``gate_proj`` and ``model.layers.1`` none
of ``model.layers.10``. A ``*`` stands for any text.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from typing import Any


def excluder(listed: Any) -> Callable[[str], bool]:
    """Return whether a module is named in a list; what is no list names nothing."""
    texts = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    plain = {name.removesuffix(".weight") for name in texts if "*" not in name}
    globs = [name for name in texts if "*" in name]
    expressions = [fnmatch.translate(form) for name in globs for form in (name, f"{name}.*")]
    matches_glob = re.compile("|".join(expressions)).match if expressions else lambda _: None
    lengths = sorted({name.count(".") + 1 for name in plain})

    def excludes(module: str) -> bool:
        components = module.split(".")
        return matches_glob(module) is not None or any(
            ".".join(components[start : start + length]) in plain
            for length in lengths
            for start in range(len(components) - length + 1)
        )

    return excludes
