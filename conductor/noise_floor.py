"""How far the source differs from itself: two runs of it, compared question by question.

What two runs of one model differ in is not quantization, so a difference between source and
candidate says something only beyond it. Engines that repeat themselves bit by bit are normal where
nothing is sampled, and no anomaly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import ne
from typing import Any

from conductor.failure import Failure
from gates.evidence import EvidenceError
from gates.pairing import Anomaly, Pair, pair
from gates.samples import TaskSamples, parse_samples


def compare_runs(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare two samples documents of the same model; return {task: how far they differ}.

    ``lost`` and ``gained`` count questions right in one run only, and are None where a score is
    more than right or wrong. ``discordance`` is the share scored differently, ``changed`` the share
    of answers that are not bit-identical, ``logprob_shift`` the mean change in nats; the latter two
    are None where the harness does not tell. A task whose metric has no questions is left out.

    Raises:
        Failure: the two runs did not answer the same questions.
    """
    runs = parse_samples(first, "first run"), parse_samples(second, "second run")
    rows = {}
    for task, samples in runs[0].items():
        matched = _match(task, samples, runs[1].get(task))
        if matched is not None:
            rows[task] = _row(matched)
    return rows


def _match(task: str, first: TaskSamples, second: TaskSamples | None) -> Pair | None:
    if second is None:
        return None
    try:
        matched = pair(task, first, second, scale=None, higher_is_better=None, size=None)
    except EvidenceError:
        return None  # the accuracy gate says what is wrong with this metric
    if isinstance(matched, Anomaly):
        raise Failure(matched.failure_class, f"two runs of the source: {matched.detail}")
    return matched


def _row(matched: Pair) -> dict[str, Any]:
    first, second = matched.baseline, matched.candidate
    return {
        "questions": matched.questions,
        "lost": matched.lost if matched.is_binary else None,
        "gained": matched.gained if matched.is_binary else None,
        "discordance": (matched.lost + matched.gained) / matched.questions,
        "changed": (
            sum(map(ne, first.answers, second.answers)) / matched.questions
            if first.answers and second.answers
            else None
        ),
        "logprob_shift": _shift(first, second),
    }


def _shift(first: TaskSamples, second: TaskSamples) -> float | None:
    if not first.choice_logprobs or not second.choice_logprobs:
        return None
    shifts = [
        after - before
        for sides in zip(first.choice_logprobs, second.choice_logprobs, strict=True)
        for before, after in zip(*sides, strict=True)
    ]
    return math.fsum(shifts) / len(shifts) if shifts else None


def say_noise_floor(noise: Mapping[str, Mapping[str, Any]]) -> str:
    """Say in one sentence how far two runs of the source differ."""
    differing = [
        f"{row['discordance']:.1%} of {task}" for task, row in noise.items() if row["discordance"]
    ]
    if differing:
        return f"two runs of the source score differently on {', '.join(differing)}"
    if any(row["changed"] for row in noise.values()):
        return "two runs of the source differ in their answers and not in any score"
    return "the source is repeatable: two runs of it gave the same answers"
