"""The answer of a gate: a verdict made of checks.

Invariants: a verdict passes only when it has checks, all of them hold, and it names no failure
class; so a gate that looked at nothing cannot pass. A verdict reads like the JSON document it
becomes (``verdict["pass"]``), and that document is always valid JSON, whatever was observed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from gates import evidence
from gates.evidence import EvidenceError, shown

_DEEPEST = 6


class Decision(StrEnum):
    """What to do with the candidate: one per release."""

    ACCEPT = "ACCEPT"
    REGRESSION = "REGRESSION"
    ANOMALOUS = "ANOMALOUS"
    INFEASIBLE = "INFEASIBLE"


class FailureClass(StrEnum):
    """Why something did not work. Closed: each member has one row in ``decide.TRIAGE``."""

    INFRA_TRANSIENT = "INFRA_TRANSIENT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    MODEL_UNSUPPORTED = "MODEL_UNSUPPORTED"
    QUANT_COVERAGE_FAILURE = "QUANT_COVERAGE_FAILURE"
    SIZE_NOT_REDUCED = "SIZE_NOT_REDUCED"
    CHECKPOINT_NOT_SERVABLE = "CHECKPOINT_NOT_SERVABLE"
    DEPLOYMENT_HEALTH_FAILED = "DEPLOYMENT_HEALTH_FAILED"
    EVAL_JUDGE_FAILED = "EVAL_JUDGE_FAILED"
    SAMPLE_ACCOUNTING_FAILED = "SAMPLE_ACCOUNTING_FAILED"
    EXTERNAL_BASELINE_MISMATCH = "EXTERNAL_BASELINE_MISMATCH"
    CONDITIONS_DIFFER = "CONDITIONS_DIFFER"
    IMPLAUSIBLE_SCORE = "IMPLAUSIBLE_SCORE"
    ANSWERS_REPLAYED = "ANSWERS_REPLAYED"
    ACCURACY_REGRESSION = "ACCURACY_REGRESSION"
    INSUFFICIENT_EVIDENCE = "INSUFFICIENT_EVIDENCE"
    VERBOSITY_EXCEEDED = "VERBOSITY_EXCEEDED"
    USER_CONFIG_ERROR = "USER_CONFIG_ERROR"
    SYSTEMIC = "SYSTEMIC"
    UNKNOWN = "UNKNOWN"


def plain(value: object, depth: int = 0) -> Any:
    """Return ``value`` as JSON can carry it; what JSON cannot carry becomes a short description."""
    match value:
        case None | bool() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case int() if abs(value) <= evidence.LARGEST_COUNT:
            return value
        case Mapping() if depth < _DEEPEST:
            return {str(key): plain(entry, depth + 1) for key, entry in value.items()}
        case list() | tuple() if depth < _DEEPEST:
            return [plain(entry, depth + 1) for entry in value]
        case _:
            return shown(value)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One obligation: what was looked at, what was seen, what was allowed."""

    subject: str
    observed: object
    limit: object
    passed: bool
    detail: str = ""

    def document(self) -> dict[str, Any]:
        """Return the JSON form, without the subject that it is filed under."""
        return {
            "passed": self.passed,
            "observed": plain(self.observed),
            "limit": plain(self.limit),
            "detail": self.detail,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict(Mapping[str, Any]):
    """A gate's answer. Equal to, and readable as, the document it becomes."""

    gate: str
    checks: tuple[Check, ...]
    failure_class: FailureClass | None
    detail: str
    decision: Decision | None = None
    notes: tuple[str, ...] = ()
    per_task: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    not_comparable: tuple[str, ...] = ()
    max_abs_delta: float | None = None
    findings: tuple[Mapping[str, object], ...] = ()

    @property
    def passed(self) -> bool:
        """Tell whether there are checks, all of them hold, and nothing failed."""
        return (
            bool(self.checks)
            and all(check.passed for check in self.checks)
            and self.failure_class is None
        )

    def document(self) -> dict[str, Any]:
        """Return the JSON form, described by ``schemas/verdict.json``."""
        return {
            "gate": self.gate,
            "pass": self.passed,
            "decision": self.decision,
            "failure_class": self.failure_class,
            "detail": self.detail,
            "checks": {check.subject: check.document() for check in self.checks},
            "notes": list(self.notes),
            "per_task": plain(self.per_task),
            "not_comparable": list(self.not_comparable),
            "max_abs_delta": self.max_abs_delta,
            "findings": plain(self.findings),
        }

    @classmethod
    def refused(cls, gate: str, error: EvidenceError) -> Self:
        """Return the verdict on evidence that could not be read: nothing was checked."""
        return cls(
            gate=gate,
            checks=(
                Check(
                    subject="evidence",
                    observed=error.problem,
                    limit="readable evidence",
                    passed=False,
                    detail=str(error),
                ),
            ),
            failure_class=FailureClass.USER_CONFIG_ERROR,
            detail=str(error),
        )

    def __getitem__(self, key: str) -> Any:
        """Return one field of the document."""
        return self.document()[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the document's keys."""
        return iter(self.document())

    def __len__(self) -> int:
        """Return the number of the document's keys."""
        return len(self.document())
