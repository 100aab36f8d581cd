"""What stands beside accuracy: how the answers changed, whatever the scores say.

Two checkpoints can score alike and still answer differently. None of this decides; each figure has
an interval with 95 % confidence, two-sided where nothing else is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gates.criteria import ALPHA
from gates.pairing import Pair
from gates.samples import TaskSamples

if TYPE_CHECKING:
    from gates.statistics import Interval

_QUANTILES = (0.1, 0.5, 0.9)


def beside(pair: Pair) -> dict[str, object]:
    """Return flips, changed answers, lengths and log-likelihoods of a matched task, as JSON.

    Rates are shares of the questions. Lengths are completion tokens, their change a fraction of the
    baseline's mean with one-sided bounds. ``kl`` is the divergence of the candidate's choices from
    the baseline's, ``logprob_shift`` the mean change over all choices, both in nats. What the
    samples do not hold is ``None``.
    """
    from gates import statistics

    changed = _changed(pair)
    return {
        "agreement": _rate(pair.questions - pair.lost - pair.gained, pair.questions),
        "changed_answers": None if changed is None else _rate(changed, pair.questions),
        "lost": _rate(pair.lost, pair.questions),
        "gained": _rate(pair.gained, pair.questions),
        "mcnemar_p": statistics.mcnemar(pair.lost, pair.gained) if pair.is_binary else None,
        "length": _length(pair),
        **_choices(pair),
    }


def _changed(pair: Pair) -> int | None:
    """Return how many questions got another answer, or choice, where answers were kept."""
    baseline, candidate = _answers(pair.baseline), _answers(pair.candidate)
    if baseline is None or candidate is None:
        return None
    return sum(one != other for one, other in zip(baseline, candidate, strict=True))


def _answers(side: TaskSamples) -> Sequence[object] | None:
    """Return the answer to each question: the most likely choice where there are several."""
    choices = side.choice_logprobs
    if choices is None or max(map(len, choices)) < 2:
        return side.answers
    return [each.index(max(each)) for each in choices]


def _rate(count: int, questions: int) -> dict[str, object]:
    from gates import statistics

    interval = statistics.rate_interval(count, questions, alpha=ALPHA)
    return {
        "rate": finite(interval.estimate),
        "lower": finite(interval.lower),
        "upper": finite(interval.upper),
    }


def _length(pair: Pair) -> dict[str, object] | None:
    from gates import statistics

    baseline, candidate = pair.baseline.lengths, pair.candidate.lengths
    if baseline is None or candidate is None:
        return None
    change = statistics.length_change(
        statistics.floats(baseline),
        statistics.floats(candidate),
        clusters=statistics.labels(pair.clusters) if pair.clusters else None,
        alpha=ALPHA,
    )
    return {
        "baseline_mean": math.fsum(baseline) / pair.questions,
        "candidate_mean": math.fsum(candidate) / pair.questions,
        "baseline_quantiles": statistics.quantiles(baseline, _QUANTILES),
        "candidate_quantiles": statistics.quantiles(candidate, _QUANTILES),
        "change": finite(change.estimate),
        "change_lower": finite(change.lower),
        "change_upper": finite(change.upper),
    }


def _choices(pair: Pair) -> dict[str, object]:
    from gates import statistics

    baseline, candidate = pair.baseline.choice_logprobs, pair.candidate.choice_logprobs
    if baseline is None or candidate is None:
        return {"kl": None, "logprob_shift": None}
    divergences, shifts = statistics.choice_changes(baseline, candidate)
    labels = statistics.labels(pair.clusters) if pair.clusters else None
    return {
        "kl": _mean(statistics.mean_interval(divergences, clusters=labels, alpha=ALPHA)),
        "logprob_shift": _mean(statistics.mean_interval(shifts, clusters=labels, alpha=ALPHA)),
    }


def _mean(interval: Interval) -> dict[str, object]:
    return {
        "mean": finite(interval.estimate),
        "lower": finite(interval.lower),
        "upper": finite(interval.upper),
    }


def finite(value: float) -> float | None:
    """Return a number as JSON can carry it, also numpy's; a bound that is none becomes nothing."""
    return float(value) if math.isfinite(value) else None
