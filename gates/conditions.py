"""Gate on the conditions of a comparison: were both sides asked the same, in the same way?

Engine noise is as large as 8-bit quantization noise, so a score difference means something only
when every setting that can move a score is equal on both sides. Settings are compared field by
field; only those that name where a side is may differ.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from gates import evidence
from gates.evidence import EvidenceError, join, shown
from gates.verdict import Check, Decision, FailureClass, Verdict

GATE = "conditions"

_ABSENT = object()

_VALUES_SHOWN = 3
"""Differences that are told with both values; the checks have those of all."""

_VALUE_CHARACTERS = 30
"""Longest value that is told: a digest, which is longer, says nothing to a reader."""

_DEEPEST = 64
"""Levels of lists and mappings within a setting; real configurations have under ten."""


def evaluate_conditions(
    baseline: object, candidate: object, may_differ: Collection[str] = ()
) -> Verdict:
    """Compare two resolved configurations ``{setting: value}``; a setting on one side only differs.

    Settings that differ fail with ``CONDITIONS_DIFFER`` and are named; configurations that cannot
    be read, or hold nothing to compare, fail with ``USER_CONFIG_ERROR``. Nothing is raised.
    """
    try:
        sides = evidence.mapping(baseline, "baseline"), evidence.mapping(candidate, "candidate")
        fields = sorted({*sides[0], *sides[1]} - set(may_differ))
        if not fields:
            raise EvidenceError("baseline", "holds no setting that could be compared")
        for name, settings in zip(("baseline", "candidate"), sides, strict=True):
            _refuse_deep(settings, name)
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    checks = [_check(name, *(side.get(name, _ABSENT) for side in sides)) for name in fields]
    different = [check for check in checks if not check.passed]
    return Verdict(
        gate=GATE,
        checks=tuple(checks),
        failure_class=FailureClass.CONDITIONS_DIFFER if different else None,
        decision=Decision.ANOMALOUS if different else None,
        detail=(
            f"the two sides differ in {_named(different)}"
            if different
            else f"all {len(checks)} settings equal on both sides"
        ),
    )


def _named(different: list[Check]) -> str:
    """Name what differs, with the values where they are few and short."""
    few = len(different) <= _VALUES_SHOWN
    return ", ".join(
        f"{check.subject} ({check.limit} for the baseline, {check.observed} for the candidate)"
        if few and max(len(str(check.limit)), len(str(check.observed))) <= _VALUE_CHARACTERS
        else check.subject
        for check in different
    )


def _refuse_deep(settings: Mapping[str, object], side: str) -> None:
    """Refuse settings that comparing could not get to the end of: nested too deep, or cyclic."""
    for name, value in settings.items():
        level = [value]
        for _ in range(_DEEPEST):
            inner = {id(entry): entry for each in level for entry in _entries(each)}
            level = list(inner.values())
        if level:
            raise EvidenceError(
                join(side, name), f"is nested more than {_DEEPEST} deep, or holds itself"
            )


def _entries(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _check(name: str, baseline: object, candidate: object) -> Check:
    # Compared with their types, so that True is not 1 and 1 is not 1.0.
    same = baseline == candidate and type(baseline) is type(candidate)
    words = ["absent" if side is _ABSENT else shown(side) for side in (baseline, candidate)]
    return Check(
        subject=name,
        observed=words[1],
        limit=words[0],
        passed=same,
        detail="" if same else f"{name}: {words[0]} for the baseline, {words[1]} for the candidate",
    )
