"""Gate on a served checkpoint: does it answer like a model at all?

Loading proves little: a server can drop the scales of a quantized checkpoint, report healthy, and
answer noise. So candidate and source answer the same prompts, greedily and with the same token
limit, and the candidate may not break where the source does not. The texts need not be equal, and
a candidate that is merely worse must pass: how much worse is for the evaluation to say. Where not
even the source can be served, the settings or the machine failed, and not the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Self

from gates.criteria import CANARY_LOGPROB_CEILING, CANARY_LOGPROB_FLOOR, CANARY_REPEAT_TOKENS
from gates.evidence import (
    EvidenceError,
    field,
    join,
    mapping,
    member,
    number,
    sequence,
    shown,
    text,
)
from gates.verdict import Check, FailureClass, Verdict

GATE = "canary"


class Health(StrEnum):
    """How the server's start ended."""

    OK = "ok"
    DIED = "died"
    KILLED = "killed"
    TIMEOUT = "timeout"
    PORT_TAKEN = "port_taken"


_UNHEALTHY: Mapping[Health, FailureClass] = MappingProxyType(
    {
        # A server that ends by itself while loading has refused the checkpoint ...
        Health.DIED: FailureClass.CHECKPOINT_NOT_SERVABLE,
        # ... one that was killed or is not ready in time may be fine on another try ...
        Health.KILLED: FailureClass.DEPLOYMENT_HEALTH_FAILED,
        Health.TIMEOUT: FailureClass.DEPLOYMENT_HEALTH_FAILED,
        # ... and one that lost its port has not been tried.
        Health.PORT_TAKEN: FailureClass.INFRA_TRANSIENT,
    }
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server answered to one prompt; log-probabilities in nats, NaN where none is finite."""

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None
    error: str | None

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """Read an answer; null text is no text, and odd log-probabilities are kept."""
        document = mapping(value, path)
        tokens = sequence(field(document, "tokens", path), join(path, "tokens"))
        logprobs = sequence(field(document, "logprobs", path), join(path, "logprobs"))
        return cls(
            text=_text_or_null(document, "text", path) or "",
            tokens=tuple(_token(token, f"{path}.tokens[{i}]") for i, token in enumerate(tokens)),
            logprobs=tuple(_logprob(p, f"{path}.logprobs[{i}]") for i, p in enumerate(logprobs)),
            finish_reason=_text_or_null(document, "finish_reason", path),
            error=_text_or_null(document, "error", path),
        )

    @property
    def stopped(self) -> bool:
        """Tell whether the answer ended by itself."""
        return self.error is None and self.finish_reason == "stop"


def _text_or_null(document: Mapping[str, object], key: str, path: str) -> str | None:
    value = field(document, key, path)
    return None if value is None else text(value, join(path, key))


def _token(value: object, path: str) -> str:
    """Return a token's text; ids beyond the vocabulary have none."""
    return "" if value is None else text(value, path)


def _logprob(value: object, path: str) -> float:
    """Return a log-probability; a null or a number that is not finite is the finding itself."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return math.nan
    return number(value, path)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt with both answers."""

    prompt: str
    candidate: Answer
    source: Answer

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """Read ``{"prompt", "candidate", "source"}``."""
        document = mapping(value, path)
        return cls(
            prompt=text(field(document, "prompt", path), join(path, "prompt")),
            candidate=Answer.parse(field(document, "candidate", path), join(path, "candidate")),
            source=Answer.parse(field(document, "source", path), join(path, "source")),
        )


@dataclass(frozen=True, kw_only=True)
class CanaryEvidence:
    """A server's start and its first answers.

    ``source_health`` is how the source's server started with the same settings, if that was said.
    """

    served_name: str
    expected_name: str
    health: Health
    health_detail: str
    source_health: Health | None
    source_health_detail: str
    prompts: tuple[Prompt, ...]

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read the evidence; servers that are healthy must have been asked something."""
        document = mapping(value, "")
        text(field(document, "engine", ""), "engine")
        health = member(Health, field(document, "health", ""), "health")
        prompts = sequence(field(document, "prompts", ""), "prompts")
        source, detail = document.get("source_health"), document.get("source_health_detail")
        source_health = None if source is None else member(Health, source, "source_health")
        if {health, source_health} <= {Health.OK, None} and not prompts:
            raise EvidenceError("prompts", "must hold at least one prompt with its two answers")
        return cls(
            served_name=_text_or_null(document, "served_name", "") or "",
            expected_name=text(field(document, "expected_name", ""), "expected_name"),
            health=health,
            health_detail=_text_or_null(document, "health_detail", "") or "",
            source_health=source_health,
            source_health_detail="" if detail is None else text(detail, "source_health_detail"),
            prompts=tuple(Prompt.parse(p, f"prompts[{i}]") for i, p in enumerate(prompts)),
        )


def evaluate_canary(document: object) -> Verdict:
    """Check a server's start and its answers beside the source's.

    A source that cannot be served with the same settings fails with ``SYSTEMIC``, whatever became
    of the candidate. A server that refused the checkpoint, or answers that are broken, fail with
    ``CHECKPOINT_NOT_SERVABLE``; one that was killed, was not ready in time, or is not the one
    expected, with ``DEPLOYMENT_HEALTH_FAILED``; a lost port with ``INFRA_TRANSIENT``; a source
    that is itself broken on every prompt fails with ``UNKNOWN``, since nothing can be compared.
    Evidence that cannot be read fails with ``USER_CONFIG_ERROR``. Nothing is raised.
    """
    try:
        evidence = CanaryEvidence.parse(document)
    except EvidenceError as error:
        return Verdict.refused(GATE, error)
    checks = [*_source_health(evidence), _health(evidence)]
    failure_class = _UNHEALTHY.get(evidence.health, FailureClass.DEPLOYMENT_HEALTH_FAILED)
    if evidence.source_health not in (Health.OK, None):
        failure_class = FailureClass.SYSTEMIC
    if all(check.passed for check in checks):
        checks.append(_name(evidence))
    if all(check.passed for check in checks):
        checks.append(_source(evidence.prompts))
        failure_class = FailureClass.UNKNOWN
    if all(check.passed for check in checks):
        checks += [_answer(i, prompt) for i, prompt in enumerate(evidence.prompts)]
        checks.append(_stops(evidence.prompts))
        failure_class = FailureClass.CHECKPOINT_NOT_SERVABLE
    failed = [check.detail for check in checks if not check.passed]
    return Verdict(
        gate=GATE,
        checks=tuple(checks),
        failure_class=failure_class if failed else None,
        detail="; ".join(failed) or f"{len(evidence.prompts)} prompt(s) answered",
    )


def _source_health(evidence: CanaryEvidence) -> Iterator[Check]:
    """Require that the source can be served with these settings, where somebody tried."""
    if evidence.source_health is None:
        return
    passed = evidence.source_health is Health.OK
    also = "not even the source can" if evidence.health is not Health.OK else "the source cannot"
    reason = evidence.source_health_detail or "its server gave no reason"
    yield Check(
        subject="source_health",
        observed=evidence.source_health,
        limit=Health.OK,
        passed=passed,
        detail=evidence.source_health_detail
        if passed
        else f"{also} be served with these settings: {evidence.source_health}: {reason}",
    )


def _health(evidence: CanaryEvidence) -> Check:
    passed = evidence.health is Health.OK
    return Check(
        subject="health",
        observed=evidence.health,
        limit=Health.OK,
        passed=passed,
        detail=evidence.health_detail
        if passed
        else f"the server is not healthy ({evidence.health}): "
        + (evidence.health_detail or "it gave no reason"),
    )


def _name(evidence: CanaryEvidence) -> Check:
    passed = evidence.served_name == evidence.expected_name
    return Check(
        subject="served_name",
        observed=evidence.served_name,
        limit=evidence.expected_name,
        passed=passed,
        detail=""
        if passed
        else f"the server serves {shown(evidence.served_name)} and not "
        f"{shown(evidence.expected_name)}: another server answers on this port",
    )


def _source(prompts: tuple[Prompt, ...]) -> Check:
    """Require a source that answers at least one prompt soundly."""
    sound = [prompt for prompt in prompts if not any(_faults(prompt.source))]
    first = next(_faults(prompts[0].source), "")
    return Check(
        subject="source",
        observed=len(sound),
        limit=1,
        passed=bool(sound),
        detail=f"{len(sound)} of {len(prompts)} prompt(s) answered soundly by the source"
        if sound
        else f"the source itself is broken on every prompt ({first}), so nothing can be compared",
    )


def _answer(index: int, prompt: Prompt) -> Check:
    """Require that the candidate has no fault that the source has not on the same prompt."""
    excused = set(_faults(prompt.source))
    faults = [fault for fault in _faults(prompt.candidate) if fault not in excused]
    path = f"prompts[{index}].candidate"
    reason = f" ({prompt.candidate.error})" if prompt.candidate.error else ""
    return Check(
        subject=path,
        observed=faults,
        limit=[],
        passed=not faults,
        detail=f"{path}: {', '.join(faults)}{reason}" if faults else "",
    )


def _stops(prompts: tuple[Prompt, ...]) -> Check:
    """Require that the candidate stops somewhere, if the source does.

    One answer that runs into the token limit is not a defect; never stopping is.
    """
    stopping = [prompt for prompt in prompts if prompt.source.stopped]
    stopped = sum(prompt.candidate.stopped for prompt in stopping)
    passed = bool(stopped) or not stopping
    tally = f"stops on {stopped} of the {len(stopping)} prompt(s) where the source stops"
    return Check(
        subject="stops",
        observed=stopped,
        limit=min(1, len(stopping)),
        passed=passed,
        detail=f"the candidate {tally}",
    )


def _faults(answer: Answer) -> Iterator[str]:
    """Name what is broken about one answer, whatever the prompt."""
    if answer.error is not None:
        yield "the request failed"
        return
    if answer.finish_reason is None:
        yield "no finish reason"
    if not answer.text.strip():
        yield "empty"
    if len(answer.tokens) != len(answer.logprobs) or (answer.text and not answer.tokens):
        yield "tokens or log-probabilities are missing"
    if len(answer.tokens) >= CANARY_REPEAT_TOKENS and len(set(answer.tokens)) == 1:
        yield "one token repeated"
    yield from _logprob_faults(answer.logprobs)


def _logprob_faults(logprobs: tuple[float, ...]) -> Iterator[str]:
    if not logprobs:
        return
    if any(math.isnan(logprob) for logprob in logprobs):
        yield "log-probabilities that are not finite"
    elif max(logprobs) > CANARY_LOGPROB_CEILING:
        yield "log-probabilities above 0"
    elif sum(logprobs) / len(logprobs) < CANARY_LOGPROB_FLOOR:
        yield f"mean log-probability under {CANARY_LOGPROB_FLOOR:g}"
