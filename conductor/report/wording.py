"""Say the values of a release document in words: numbers with their units, intervals, facts.

Invariants:
- The same value gives the same words: no locale, no clock.
- A number and the limit beside it never look alike when they differ.
- ``printable`` leaves no character that would steer a terminal or reorder text.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

Document = Mapping[str, Any]

NO_DECISION = "NO DECISION"
PUBLISH_WORDS = {
    "publish": "publish",
    "do-not-publish": "do not publish",
    "needs-human": "a person has to decide",
}
SMALLEST_P = 1e-4
"""p-values below it are shown as below it."""


def headline(document: Document) -> str:
    """Return the decision in the words that head a report."""
    return document["decision"] or NO_DECISION


def split_reason(reason: str) -> tuple[str, str]:
    """Split a reason into its sentence, the first line, and the evidence after it."""
    sentence, _, evidence = reason.strip().partition("\n")
    return sentence, evidence.strip("\n")


def first_clause(detail: str) -> str:
    """Return what a gate says first: the sum of it, before any particulars."""
    return detail.partition("; ")[0]


def say(value: Any) -> str:
    """Say a JSON value in words that fit a table cell."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {say(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(say, value)) or "none"
    return str(value)


def fact(value: Any) -> str:
    """Say a fact that a release may not have reached; counts get thousands separators."""
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else say(value)


def size(size_bytes: int | None) -> str:
    """Say a size in MiB and in bytes."""
    if size_bytes is None:
        return fact(None)
    return f"{size_bytes / 2**20:,.2f} MiB ({size_bytes:,} bytes)"


def known_duration(seconds: float | None) -> str:
    """Say a duration, or that it is not known."""
    return fact(None) if seconds is None else duration(seconds)


def duration(seconds: float | None) -> str:
    """Say a duration in its two largest units; nothing when there is none."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count(number: int | None) -> str:
    """Say a count with thousands separators."""
    return "none" if number is None else f"{number:,}"


def counted(number: int, noun: str) -> str:
    """Say how many there are of a thing whose plural ends in s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(names: Iterable[str]) -> str:
    """Join names with commas."""
    return ", ".join(names)


def decimals(scale: float | None, limit: float | None, *near: float | None) -> int:
    """Choose decimals: 4 for a scale of 1, 2 for 100; more where a number and its limit look alike.

    Args:
        scale: the full score, in whose units all numbers are.
        limit: the limit that the numbers are read against.
        near: the numbers read against it.
    """
    digits = max(0, 4 - round(math.log10(scale or 1)))
    if limit is None:
        return digits
    numbers = [number for number in near if number is not None and number != limit]
    alike = any(round(number, digits) == round(limit, digits) for number in numbers)
    return digits + 4 if alike else digits


def fixed(number: float | None, digits: int, *, sign: str = "") -> str:
    """Say a number with so many decimals; ``sign="+"`` shows the sign of a gain as well."""
    return "none" if number is None else f"{number:{sign}z.{digits}f}"


def with_error(score: float | None, stderr: float | None, digits: int) -> str:
    """Say a score with its standard error, if it has one."""
    if score is None or stderr is None:
        return fixed(score, digits)
    return f"{fixed(score, digits)} ± {fixed(stderr, digits)}"


def bounds(lower: float | None, upper: float | None, digits: int) -> str:
    """Say the bounds of a drop; a side that the evidence leaves open is unbounded."""
    if lower is None and upper is None:
        return "none"
    ends = (lower, upper)
    return "..".join("unbounded" if end is None else fixed(end, digits, sign="+") for end in ends)


def whole_percent(fraction: float) -> str:
    """Say a chosen fraction, such as a confidence, in whole percent."""
    return f"{100 * fraction:.0f} %"


def percent(fraction: float | None, *, sign: str = "") -> str:
    """Say a fraction in percent."""
    return "none" if fraction is None else f"{100 * fraction:{sign}z.2f} %"


def rate(interval: Document | None) -> str:
    """Say a share ``{rate, lower, upper}`` in percent, with its interval."""
    if interval is None or interval["rate"] is None:
        return "none"
    return f"{percent(interval['rate'])} {_percents(interval['lower'], interval['upper'])}"


def change(lengths: Document) -> str:
    """Say the relative change of a mean length with its interval."""
    if lengths["change"] is None:
        return "none"
    ends = _percents(lengths["change_lower"], lengths["change_upper"], sign="+")
    return f"{percent(lengths['change'], sign='+')} {ends}"


def mean(interval: Document | None) -> str:
    """Say a mean ``{mean, lower, upper}`` with its interval."""
    if interval is None or interval["mean"] is None:
        return "none"
    if None in (interval["lower"], interval["upper"]):
        return f"{interval['mean']:.3g}"
    return f"{interval['mean']:.3g} ({interval['lower']:.3g}..{interval['upper']:.3g})"


def quantiles(values: Iterable[float] | None) -> str:
    """Say quantiles of a length in tokens."""
    return "none" if values is None else " / ".join(f"{value:,.4g}" for value in values)


def p_value(p: float | None) -> str:
    """Say a p-value."""
    if p is None:
        return "none"
    return f"below {SMALLEST_P:g}" if p < SMALLEST_P else f"{p:.2g}"


def _percents(lower: float | None, upper: float | None, *, sign: str = "") -> str:
    if None in (lower, upper):
        return "(no interval)"
    ends = [f"{100 * end:{sign}z.2f}" for end in (lower, upper) if end is not None]
    return f"({'..'.join(ends)})"


def printable(value: Any) -> Any:
    """Replace characters that would steer a terminal or reorder text, at any depth."""
    if isinstance(value, str):
        return "".join("\N{REPLACEMENT CHARACTER}" if _steers(char) else char for char in value)
    if isinstance(value, Mapping):
        return {printable(name): printable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    return value


def _steers(char: str) -> bool:
    """Tell control, format and surrogate characters; line breaks and tabs are harmless."""
    return char not in "\n\t" and unicodedata.category(char) in {"Cc", "Cf", "Cs"}
