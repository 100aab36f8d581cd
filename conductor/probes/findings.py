"""Collect what a probe comes across, in bounded memory: counts, groups and the first names.

A checkpoint may have a hundred thousand layers with one fault; a person reads twenty names and the
count. What a finding means is not decided here: ``gates.findings`` has the table.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from gates.findings import KINDS, MEASURES, WHOLE

NAMES_SHOWN = 20


class Findings:
    """Findings by kind, each with its count, its count by module kind and its first names."""

    def __init__(self) -> None:
        """Start with nothing found."""
        self._groups: dict[str, Counter[str]] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, kind: str, name: str, group: str = WHOLE, *, count: int = 1) -> None:
        """Note one thing: ``kind`` is a row of ``gates.findings``, ``group`` a module kind.

        Names are text that others wrote; what cannot be printed of it is escaped.
        """
        if kind not in KINDS:
            raise ValueError(f"no such kind of finding: {kind}")
        self._groups.setdefault(kind, Counter())[group] += count
        names = self._names.setdefault(kind, [])
        if len(names) < NAMES_SHOWN:
            names.append(printable(name))

    def extend(self, kind: str, names: Iterable[str], group: str = WHOLE) -> None:
        """Note several things of one kind."""
        for name in names:
            self.add(kind, name, group)

    def count(self, kind: str) -> int:
        """Return how many things of a kind were found."""
        return sum(self._groups.get(kind, Counter()).values())

    def names(self, kind: str) -> list[str]:
        """Return the first names of a kind."""
        return list(self._names.get(kind, ()))

    def document(self) -> list[dict[str, Any]]:
        """Return the ``findings`` of a checkpoint summary, in the order of the table."""
        return [
            {
                "kind": kind,
                "count": self.count(kind),
                "groups": dict(self._groups[kind]),
                "names": self._names[kind],
            }
            for kind in KINDS
            if kind in self._groups
        ]


class Measurements:
    """Measured values by measure and module kind: a histogram and the worst few of each."""

    def __init__(self) -> None:
        """Start with nothing measured."""
        self._histograms: dict[tuple[str, str], Counter[int]] = {}
        self._worst: dict[tuple[str, str], list[tuple[float, str, str]]] = {}

    def add(self, measure: str, group: str, name: str, value: float, detail: str = "") -> None:
        """Note one tensor's value (larger is worse); ``detail`` says it in full."""
        if measure not in MEASURES:
            raise ValueError(f"no such measure: {measure}")
        key = (measure, group)
        self._histograms.setdefault(key, Counter())[_whole(value)] += 1
        worst = self._worst.setdefault(key, [])
        entry = (value, printable(name), detail)
        if len(worst) < NAMES_SHOWN:
            heapq.heappush(worst, entry)
        elif value > worst[0][0]:
            heapq.heapreplace(worst, entry)

    def document(self) -> list[dict[str, Any]]:
        """Return the ``measurements`` of a checkpoint summary."""
        return [
            {
                "measure": measure,
                "group": group,
                "histogram": {str(value): n for value, n in sorted(histogram.items())},
                "worst": [
                    {"name": name, "value": round(value, 3), "detail": detail}
                    for value, name, detail in sorted(self._worst[measure, group], reverse=True)
                ],
            }
            for (measure, group), histogram in sorted(self._histograms.items())
        ]


def printable(text: str) -> str:
    """Return text with control characters and other unprintable ones as Python escapes them."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


_LARGEST = 1_000_000


def _whole(value: float) -> int:
    """Round down, and keep what is no number or beyond reason at the far end."""
    return math.floor(max(0.0, value)) if value < _LARGEST else _LARGEST
