"""Gate on a set of smoke scenarios: did what must work appear to work, on this code, here?

Absent is not good: a set without scenarios, a scenario that was asked for and not run, and a set of
which every scenario was skipped do not pass.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from gates.evidence import EvidenceError, field, join, mapping, shown
from gates.verdict import Check, Verdict

GATE = "smoke"


class Outcome(StrEnum):
    """How a scenario ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


def evaluate_smoke(
    results: object, *, strict: bool = False, required: Collection[str] | None = None
) -> Verdict:
    """Check the outcomes of scenarios ``{name: {"outcome", "problems"}}``.

    Every scenario that was run must have passed, and at least one of those that are required. A
    failed gate names no failure class: those tell of a release what to do about it, and this gate
    is asked about the code.

    Args:
        results: by name: ``outcome``, and ``problems``, sentences on what was amiss.
        strict: whether a scenario that was skipped fails.
        required: names that must be there; all that are there when None.
    """
    try:
        found = _parse(results)
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    wanted = set(found) if required is None else set(required)
    allowed = {Outcome.PASSED} if strict else {Outcome.PASSED, Outcome.SKIPPED}
    checks = [
        _scenario(name, outcome, problems, allowed) for name, (outcome, problems) in found.items()
    ]
    checks += [_never_run(name) for name in sorted(wanted - set(found))]
    checks.append(_some_passed([name for name in found if name in wanted], found))
    failed = [check.detail for check in checks if not check.passed]
    skipped = [name for name, (outcome, _) in found.items() if outcome is Outcome.SKIPPED]
    return Verdict(
        gate=GATE,
        checks=tuple(checks),
        failure_class=None,
        detail="; ".join(failed) or f"{len(found) - len(skipped)} scenario(s) passed",
        notes=tuple(f"{name} was skipped" for name in skipped),
    )


_Results = dict[str, tuple[Outcome, list[str]]]


def _parse(results: object) -> _Results:
    found: _Results = {}
    for name, value in mapping(results, "scenarios").items():
        path = join("scenarios", name)
        entry = mapping(value, path)
        outcome, problems = field(entry, "outcome", path), field(entry, "problems", path)
        if outcome not in list(Outcome):
            known = ", ".join(Outcome)
            raise EvidenceError(join(path, "outcome"), f"must be one of {known}: {shown(outcome)}")
        if not isinstance(problems, list) or not all(isinstance(each, str) for each in problems):
            raise EvidenceError(join(path, "problems"), "must be a list of texts")
        found[name] = Outcome(str(outcome)), problems
    return found


def _scenario(
    name: str, outcome: Outcome, problems: list[str], allowed: Collection[Outcome]
) -> Check:
    passed = outcome in allowed
    return Check(
        subject=join("scenarios", name),
        observed=outcome,
        limit=sorted(allowed),
        passed=passed,
        detail="" if passed else ": ".join([f"{name} {outcome}", *problems[:1]]),
    )


def _never_run(name: str) -> Check:
    return Check(
        subject=join("scenarios", name),
        observed=None,
        limit=[Outcome.PASSED],
        passed=False,
        detail=f"{name} was not run",
    )


def _some_passed(names: list[str], found: _Results) -> Check:
    passed = sum(found[name][0] is Outcome.PASSED for name in names)
    return Check(
        subject="passed",
        observed=passed,
        limit="at least 1",
        passed=passed > 0,
        detail="" if passed else "no scenario passed" if names else "there was nothing to run",
    )
