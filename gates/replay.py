"""Answers that come from a cache: the same on both sides although two checkpoints were asked.

Rounding weights changes the last bits of every log-likelihood and, within a few sentences, a word.
Where both sides return the same bits almost throughout, a cache between harness and model answered
one of them, or one server answered both. Short texts are the exception: a good candidate gives the
same letter to every question of a task, so they count only when a whole suite differs nowhere.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import eq

from gates.criteria import (
    REPLAYED_LOGLIKELIHOODS,
    REPLAYED_SHARE,
    REPLAYED_SUITE,
    REPLAYED_TEXT_CHARACTERS,
    REPLAYED_TEXTS,
)
from gates.pairing import Anomaly, Kind, Pair
from gates.samples import LOGLIKELIHOOD
from gates.verdict import FailureClass


def replayed(
    pairs: Collection[Pair], *, whole_suite: bool, checkpoint: str | None
) -> tuple[dict[str, Anomaly], list[str]]:
    """Return the tasks whose answers were replayed, and what to note of the others.

    ``whole_suite`` tells whether ``pairs`` are all tasks; ``checkpoint`` is the one that both sides
    name, if they name the same: then equal answers are what a repeated run should give.
    """
    identical = {pair.task: _identical(pair) for pair in pairs}
    same = [pair for pair in pairs if identical[pair.task] == pair.questions]
    if checkpoint is not None:
        note = f"both sides name the checkpoint {checkpoint}: this compares it with itself"
        if same:
            note += f"; identical answers: {', '.join(pair.task for pair in same)}"
        return {}, [note]
    questions = sum(pair.questions for pair in same)
    suite = (
        whole_suite and len(same) == len(pairs) and len(same) > 1 and questions >= REPLAYED_SUITE
    )
    found = {
        pair.task: _anomaly(pair, identical[pair.task])
        for pair in pairs
        if (suite and pair in same)
        or (identical[pair.task] >= REPLAYED_SHARE * pair.questions and _telling(pair))
    }
    notes = [
        f"{pair.task}: all {pair.questions} answers are the same on both sides, as short answers "
        "of a good candidate may be"
        for pair in same
        if pair.task not in found
    ]
    return found, notes


def _identical(pair: Pair) -> int:
    """Return how many questions got the same bits on both sides, as far as they were kept."""
    baseline, candidate = pair.baseline, pair.candidate
    if pair.kind is not Kind.MEAN:
        return sum(map(eq, baseline.scores, candidate.scores))
    for first, second in (
        (baseline.answers, candidate.answers),
        (baseline.choice_logprobs, candidate.choice_logprobs),
    ):
        if first is not None and second is not None:
            return sum(map(eq, first, second))
    return 0


def _telling(pair: Pair) -> bool:
    """Tell whether answers that agree in almost all of this task show that they were replayed."""
    side = pair.baseline
    if pair.kind is not Kind.MEAN or side.choice_logprobs or side.answer_kind == LOGLIKELIHOOD:
        return pair.questions >= REPLAYED_LOGLIKELIHOODS
    characters = side.mean_answer_characters or 0.0
    return pair.questions >= REPLAYED_TEXTS and characters >= REPLAYED_TEXT_CHARACTERS


def _anomaly(pair: Pair, identical: int) -> Anomaly:
    return Anomaly(
        failure_class=FailureClass.ANSWERS_REPLAYED,
        detail=f"{pair.task}: {identical} of {pair.questions} answers are bit-identical on both "
        "sides, which two checkpoints do not give: a cache or the same server answered both",
    )
