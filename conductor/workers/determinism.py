"""Ask torch for deterministic algorithms where the release does, and note where it has none.

Like ``protocol``, a sibling that runs inside a stage environment; it needs torch only when asked.
"""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

ASKED = os.environ.get("DAY0_DETERMINISTIC") == "1"

# What torch warns of when it is told not to fail.
WITHOUT = re.compile(r"(\S+) does not have a deterministic implementation")

_exceptions: set[str] = set()


def use_deterministic_algorithms() -> None:
    """Have torch use deterministic algorithms, if the release asks for them.

    An operation without one is carried out all the same and noted: a release that says what it
    could not pin is worth more than none.
    """
    if not ASKED:
        return
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    warnings.filterwarnings("always", message=f".*{WITHOUT.pattern}")
    show = warnings.showwarning

    def note_and_show(message: Warning | str, *details: Any, **more: Any) -> None:
        if found := WITHOUT.search(str(message)):
            _exceptions.add(found[1])
        show(message, *details, **more)

    warnings.showwarning = note_and_show


def exceptions() -> dict[str, list[str]]:
    """Return for a worker's result what torch carried out otherwise; nothing unless asked."""
    return {"not_deterministic": sorted(_exceptions)} if ASKED else {}
