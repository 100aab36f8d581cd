"""Match regular expressions that somebody else wrote against the names of modules.

Matching one can take for ever, so it is done in a process of its own that is given a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from conductor.probes import guarded

TASK = Path(__file__).with_name("pattern_matching.py")

TIMEOUT_S = 10.0
"""Time for matching all patterns; seventy thousand modules take 0.03 s a pattern or less."""

_SHOWN_CHARACTERS = 80


def modules_of(tensors: Iterable[str], parts: Collection[str] = ()) -> list[str]:
    """Return the modules that tensors belong to.

    Fused experts are tensors that are modules as well, so a name is taken as it is, too, unless
    it ends in one of the ``parts`` that modules are known to have.
    """
    modules = set()
    for name in tensors:
        module, _, part = name.rpartition(".")
        modules.add(module)
        if part not in parts:
            modules.add(name)
    return sorted(modules)


def match_patterns(
    patterns: Iterable[str], tensors: Iterable[str], parts: Collection[str] = ()
) -> tuple[Mapping[str, frozenset[str]], str]:
    """Return the modules of ``tensors`` that each pattern names from their start.

    The second value is the problem where time ran out, or where one is no regular expression; such
    a pattern names nothing, and nor do those that come after the time.
    """
    asked = tuple(sorted(set(patterns)))
    if not asked:
        return {}, ""
    return _match(asked, tuple(modules_of(tensors, parts)))


@lru_cache(maxsize=8)
def _match(
    asked: tuple[str, ...], modules: tuple[str, ...]
) -> tuple[Mapping[str, frozenset[str]], str]:
    """Ask once: several readings of one configuration match the same patterns."""
    outcome = guarded.run(TASK, [asked, modules], timeout_s=TIMEOUT_S)
    found = dict(zip(asked, outcome.answers, strict=False))
    named = {
        pattern: frozenset(modules[index] for index in indexes or ())
        for pattern, indexes in found.items()
    }
    wrong = [pattern for pattern, indexes in found.items() if indexes is None]
    if len(named) < len(asked):
        problem = f"pattern {_shown(asked[len(named)])} cannot be matched: {outcome.problem}"
    elif wrong:
        problem = f"pattern {_shown(wrong[0])} is no regular expression, and loaders fail on it"
    else:
        return named, ""
    return named, f"config.json quantization_config: {problem}"


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= _SHOWN_CHARACTERS else f"{pattern[:_SHOWN_CHARACTERS]}…")
