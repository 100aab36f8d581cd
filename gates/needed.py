"""How much more evidence would decide a task that is undecided, or that none can.

The numbers are for ``POWER``, from the variance that was observed: a plan, not a promise.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from operator import sub
from typing import TYPE_CHECKING

from gates.criteria import ALPHA, MOST_REPEATS, POWER
from gates.evidence import LARGEST_COUNT
from gates.pairing import Kind, Pair

if TYPE_CHECKING:
    from gates.statistics import Comparison

_NO_LARGEST = 1 + 1e-6
"""Largest difference of log-likelihoods, in margins. They have no bound that questions could have
missed, so the count that a single large loss may hide behind does not apply to them."""


_SEQUENCE_COST = 2.0
"""Questions that a comparison which may stop at any look needs, in those of one look: 1.3 to 2.6
measured at 0 to 15 % discordance, and 2.1 for the looks at clusters."""


_SMALLEST_MARGIN = 1e-6
"""Margin under which more questions than any benchmark has are needed, whatever was observed."""


@dataclass(frozen=True, kw_only=True)
class Needed:
    """What would decide a task. Questions are counted beyond those asked; ``None``: no number does.

    ``more_repeats`` are further answers to each question of a sampled task, where those would do.
    """

    more_questions_if_lossless: int | None
    more_questions_at_observed: int | None
    more_repeats: int | None
    benchmark_too_small: bool

    def document(self) -> dict[str, object]:
        """Return the JSON form."""
        return asdict(self)


def needed(pair: Pair, comparison: Comparison, margin: float, *, sequential: bool) -> Needed:
    """Return what would decide ``pair`` at ``margin``, which is in the units of ``comparison``."""
    cost = _SEQUENCE_COST if sequential else 1.0
    variance = _variance(pair, comparison)
    lossless = _total(pair, margin, variance, cost)
    observed = _total(pair, margin, variance, cost, drop=comparison.estimate)
    too_small = pair.size is not None and (lossless is None or lossless > pair.size)
    repeats = _more_repeats(pair, margin, variance, cost)
    return Needed(
        more_questions_if_lossless=_beyond(lossless, pair.questions),
        more_questions_at_observed=_beyond(observed, pair.questions),
        more_repeats=repeats,
        benchmark_too_small=too_small and repeats is None and not _is_untold(pair),
    )


def advice(pair: Pair, need: Needed) -> str:
    """Say in one sentence what to do about an undecided task."""
    lossless, observed = need.more_questions_if_lossless, need.more_questions_at_observed
    if lossless is None:
        return "no number of questions shows a candidate to be within so small a margin"
    if lossless == 0 and observed is None:
        return "the observed drop is at the margin, where no number of questions decides"
    if lossless == 0:
        more = f"about {observed:,}" if observed else "a few"
        said = (
            "a lossless candidate would usually pass with these questions; at the observed drop "
            f"{more} more would decide"
        )
    else:
        said = (
            f"a lossless candidate would need about {lossless:,} more questions"
            f"{', in further clusters,' if pair.clusters else ''} for {100 * POWER:g} % power"
        )
    if pair.size is not None:
        said += f", the benchmark has {pair.size - pair.questions:,} more"
    if need.benchmark_too_small:
        said += ": it is too small for this margin"
    if need.more_repeats:
        said += f"; {need.more_repeats} more answers to each question would do as well"
    if _is_untold(pair) and pair.size is not None and lossless > pair.size - pair.questions:
        said += "; ask each question twice to learn how many answers to each would do"
    return said


def _variance(pair: Pair, comparison: Comparison) -> float:
    """Return the variance of one question's drop, with what clusters add to it."""
    if comparison.standard_error is not None:
        return comparison.standard_error**2 * pair.questions
    squares = sum(loss * loss for loss in pair.losses) / pair.questions
    return squares - comparison.estimate**2


def _total(
    pair: Pair, margin: float, variance: float, cost: float, drop: float = 0.0
) -> int | None:
    """Return how many questions decide at this true drop; ``cost`` is that of stopping anywhere."""
    from gates import statistics

    if margin < _SMALLEST_MARGIN:
        return None
    bounded = pair.kind is Kind.MEAN
    total = statistics.questions_needed(
        margin,
        variance=variance,
        drop=drop,
        alpha=ALPHA,
        power=POWER,
        largest=1.0 if bounded else margin * _NO_LARGEST,
    )
    if total is None or total > LARGEST_COUNT:
        return None
    total = math.ceil(cost * total)
    if not bounded:
        return max(total, statistics.FEWEST_DOCUMENTS)
    if pair.clusters:
        clusters = max(statistics.DIFFERING_UNITS, statistics.fewest_units(margin, ALPHA))
        return max(total, math.ceil(cost * clusters * pair.questions / pair.cluster_count))
    return total


def _beyond(total: int | None, asked: int) -> int | None:
    return None if total is None else max(total - asked, 0)


def _repeats(pair: Pair) -> int:
    return min(pair.baseline.repeats, pair.candidate.repeats)


def _is_untold(pair: Pair) -> bool:
    """Tell whether more answers to each question might do, but nothing shows how many."""
    return pair.baseline.sampled and _repeats(pair) < 2


def _more_repeats(pair: Pair, margin: float, variance: float, cost: float) -> int | None:
    """Return how many more answers to each question of the benchmark would do, if any number does.

    Repeats shrink only the variance within questions; what clusters add is taken to stay.
    """
    from gates import statistics

    baseline, candidate = pair.baseline.per_repeat, pair.candidate.per_repeat
    if not pair.baseline.sampled or baseline is None or candidate is None:
        return None
    repeats = _repeats(pair)
    full = pair.full or 1.0
    drops = [
        loss / full
        for first, second in zip(baseline, candidate, strict=True)
        for loss in map(sub, first, second)
    ]
    between, within = statistics.components(statistics.floats(drops).reshape(-1, repeats))
    alone = between + within / repeats
    design = variance / alone if alone else 1.0
    questions = pair.size or pair.questions
    for more in range(1, MOST_REPEATS - repeats + 1):
        total = _total(pair, margin, design * (between + within / (repeats + more)), cost)
        if total is not None and total <= questions:
            return more
    return None
