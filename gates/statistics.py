"""Paired statistics: what two runs over the same questions allow one to say about the drop.

A drop is how much worse the candidate is, as a fraction of the task's scale; positive is worse.
Every comparison answers two questions about the margin with one-sided p-values and bounds:

- `p_within` is small when the drop is shown to be below the margin (the task passes);
- `p_worse` is small when the drop is shown to be above the margin (the task fails).

Invariants: `upper < margin` exactly when `p_within <= alpha`, `lower > margin` exactly when
`p_worse <= alpha`, and no interval has width zero: agreement on ten questions proves nothing about
the rest. Where the usual approximation breaks its error rate, a slower or wider method replaces it;
`benchmarks/operating_characteristics.py` measures the error rates. Arrays in, numbers out: no file,
clock or random number is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy import special  # type: ignore[import-untyped]

from gates.criteria import FEWEST_LENGTHS

Floats = NDArray[np.float64]

BERGER_BOOS = 1e-4
"""Error spent on the confidence region of the nuisance parameter of the exact test (Berger and Boos
1994, JASA 89:1012). One part in 500 of a 5 % test costs no power that matters, and rules out
nuisance values that the answers contradict."""

EXACT_UP_TO = 400
"""Discordant questions up to which the exact test replaces Tango's. Exact sizes of Tango's nominal
5 % test, computed for 50 to 50,000 questions and margins of 0.2 to 20 points: up to 8.9 % with 5
expected discordant questions, 6.3 % with 10, 5.4 % with 40; from 400 on at most 5.1 %, and at the
levels of 12 tasks corrected by Holm 5.4 %, save where all differences go one way or every question
is discordant (5.4 %)."""

BET_CEILING = 0.93
"""Largest share of the wealth at stake in one bet: less would cost a candidate without any
difference more than the 52 questions that the sequence needs beyond the exact test's 299, more
would ruin the bettor at the first lost answer."""

PRIOR_QUESTIONS = 20.0
PRIOR_VARIANCE = 0.05
"""What a bettor believes before the first answer: the mean squared difference, and the questions
that belief is worth. Chosen, like the ceiling, by the median number of questions at 0 to 10 %
discordance."""

PLUG_IN_SHARE = 0.1
"""Part of the wealth given to a bettor who expects more of what was seen so far, for a candidate
that is neither lossless nor at the margin."""

WORSE_BY = (1.0, 3.0, 9.0)
"""Drops beyond the margin, in margins, that equal parts of the wealth bet on to show a failure."""

FIRST_LOOK = 200
LOOK_GROWTH = 1.6
LOOKS = 12
"""Looks at clustered answers that count: after the first so many questions, after each growth by
the factor, and at the whole benchmark. They are those of a release with the usual first batch, the
last of them at 22,000 questions; each one more would cost all of them power."""

MOST_QUESTIONS = 10**8
"""Questions beyond which a number needed is not worth naming."""

DIFFERING_UNITS = 30
"""Units that must carry the differences before a t interval is believed alone."""

FEWEST_DOCUMENTS = 30
"""Documents below which the variance of a ratio says too little for any bound."""

SCARCELY = 1e-9
"""Tolerance for ties between test statistics that differ by rounding alone."""


class Method(StrEnum):
    """How a comparison was made."""

    EXACT = "exact"
    SCORE = "score"
    T = "t"
    CLUSTER = "cluster"
    RATIO = "ratio"
    BETTING = "betting"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The drop of one task, with one-sided bounds and p-values against the margin."""

    estimate: float
    lower: float
    upper: float
    p_worse: float
    p_within: float
    method: Method
    units: int
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate between two bounds."""

    estimate: float
    lower: float
    upper: float


def compare_binary(
    *, lost: int, gained: int, questions: int, margin: float, alpha: float = 0.05
) -> Comparison:
    """Compare right-or-wrong answers to the same questions.

    `lost` counts right before and wrong now, `gained` the reverse. The test is Tango's score test
    (1998, Statistics in Medicine 17:891) or, up to `EXACT_UP_TO` discordant questions, the exact
    unconditional test ordered by Tango's statistic.

    Raises:
        ValueError: The counts do not fit in the questions, or the margin is not within -1 to 1.

    """
    if questions < 1 or lost < 0 or gained < 0 or lost + gained > questions:
        raise ValueError(f"{lost} lost and {gained} gained do not fit in {questions} questions")
    if not -1 < margin < 1:
        raise ValueError(f"margin must be between -1 and 1, got {margin}")
    return _compare_binary(int(lost), int(gained), int(questions), float(margin), float(alpha))


@lru_cache(maxsize=65536)
def _compare_binary(
    lost: int, gained: int, questions: int, margin: float, alpha: float
) -> Comparison:
    exact = lost + gained <= EXACT_UP_TO
    estimate = (lost - gained) / questions
    p_within = at_least(lost, gained, questions, margin)
    p_worse = at_least(gained, lost, questions, -margin)
    upper = _upper_bound(
        lambda limit: at_least(lost, gained, questions, limit), p_within, margin, estimate, alpha
    )
    lower = -_upper_bound(
        lambda limit: at_least(gained, lost, questions, limit), p_worse, -margin, -estimate, alpha
    )
    share = (lost + gained) / questions
    return Comparison(
        estimate=estimate,
        lower=lower,
        upper=upper,
        p_worse=p_worse,
        p_within=p_within,
        method=Method.EXACT if exact else Method.SCORE,
        units=questions,
        standard_error=math.sqrt(max(share - estimate**2, 0.0) / questions),
    )


@lru_cache(maxsize=1 << 18)
def at_least(lost: int, gained: int, questions: int, drop: float) -> float:
    """Return the p-value of "the drop is at least this" for right-or-wrong answers.

    By symmetry the p-value of "at most this" is that of swapped counts at the negative drop.
    """
    tail = _exact_tail if lost + gained <= EXACT_UP_TO else _score_tail
    return tail(lost, gained, questions, drop)


def _upper_bound(
    p_value: Callable[[float], float],
    p_margin: float,
    margin: float,
    estimate: float,
    alpha: float,
    ceiling: float = 1.0,
) -> float:
    """Return the limit at which the p-value of "the drop is at least this" crosses alpha.

    The search stays on the side of the margin that its p-value `p_margin` names, so that the bound
    and the p-value never disagree, not even where the p-value is not monotone.
    """
    if p_margin <= alpha:
        low, high = min(estimate, margin), margin
    else:
        low, high = max(estimate, margin), ceiling
    while high - low > 1e-7 + 1e-3 * abs(high - estimate):
        middle = (low + high) / 2
        if p_value(middle) <= alpha:
            high = middle
        else:
            low = middle
    return math.nextafter(high, -math.inf) if high == margin else high


def _score(lost: Any, gained: Any, questions: int, drop: float) -> Floats:
    """Return Tango's statistic of "the drop is this": negative where fewer answers were lost.

    The chance of a gain is restricted to its most likely value at this drop, the larger root of
    2n q² + b q - gained drop (1 - drop) = 0; the chance of a loss is that value plus the drop.
    """
    difference = np.asarray(lost - gained, dtype=float)
    linear = (2 * questions - difference) * drop - (lost + gained)
    square = linear**2 + 8 * questions * gained * drop * (1 - drop)
    root = np.sqrt(np.maximum(square, 0.0))
    gain = np.maximum((root - linear) / (4 * questions), max(0.0, -drop))
    variance = questions * (2 * gain + drop * (1 - drop))
    distance = difference - questions * drop
    statistic: Floats = distance / np.sqrt(np.maximum(variance, 1e-300))
    return statistic


def _score_tail(lost: int, gained: int, questions: int, drop: float) -> float:
    """Return the chance of as few losses under this drop, by the normal limit of the score."""
    return float(special.ndtr(_score(lost, gained, questions, drop)))


def _exact_tail(lost: int, gained: int, questions: int, drop: float) -> float:
    """Return the chance of as low a score under this drop, at the worst nuisance parameter.

    That is the chance of the rarer side: of a gain where the drop is positive, else of a loss. It
    is searched within its own confidence interval, from the count of that side alone, cut to what
    the drop allows. That interval holds at every drop, and a larger drop with the same rarer side
    has more losses or fewer gains, hence higher scores: the result is valid for all of them.
    """
    observed = float(_score(lost, gained, questions, drop)) + SCARCELY
    low, high = _rate_bounds(gained if drop >= 0 else lost, questions, BERGER_BOOS / 2)
    most_rare = (1 - abs(drop)) / 2
    rare = np.linspace(math.sqrt(min(low, most_rare)), math.sqrt(min(high, most_rare)), 40) ** 2
    chances = (rare + max(0.0, -drop))[:, None]
    gains = _likely_gains(questions, float(chances[0, 0]), float(chances[-1, 0]), deviations=6)
    most = _most_losses(observed, gains, questions, drop)
    sums = _sums(most, gains, questions, chances, chances + drop)
    return float(min(1.0, sums.max() + BERGER_BOOS))


def _rate_bounds(count: int, n: int, error: float) -> tuple[float, float]:
    """Return the bounds of Clopper and Pearson, each with this error."""
    low = float(special.betaincinv(count, n - count + 1, error)) if count else 0.0
    high = float(special.betaincinv(count + 1, n - count, 1 - error)) if count < n else 1.0
    return low, high


def _likely_gains(
    questions: int, low: float, high: float, *, deviations: float
) -> NDArray[np.int64]:
    """Return the numbers of gains that are not beyond so many deviations of these chances."""
    spread = deviations * math.sqrt(questions * high) + 12
    fewest = max(0, math.floor(questions * low - spread))
    return np.arange(fewest, min(questions, math.ceil(questions * high + spread)) + 1)


def _sums(
    most: NDArray[np.int64],
    gains: NDArray[np.int64],
    questions: int,
    gained: Floats,
    lost: Floats | float,
) -> Floats:
    """Return for each pair of chances (a column) how likely at most so many losses are.

    Numbers of gains outside `gains` count as such outcomes, to be on the safe side.
    """
    masses = _binomial_masses(gains, questions, gained)
    among_rest = np.clip(lost / np.maximum(1 - gained, 1e-300), 0.0, 1.0)
    tails = special.bdtr(np.maximum(most, 0), questions - gains, among_rest)
    inside = (masses * np.where(most < 0, 0.0, tails)).sum(axis=1)
    sums: Floats = inside + np.maximum(1 - masses.sum(axis=1), 0.0)
    return sums


def _most_losses(
    observed: float, gains: NDArray[np.int64], questions: int, drop: float
) -> NDArray[np.int64]:
    """Return for each number of gains the most losses whose score is not above the observed one."""
    low = np.full(gains.shape, -1)
    high = questions - gains
    while np.any(low < high):
        middle = (low + high + 1) // 2
        fits = _score(middle, gains, questions, drop) <= observed
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def _binomial_masses(counts: NDArray[np.int64], trials: int, chances: Floats) -> Floats:
    ways = special.gammaln(trials + 1) - special.gammaln(counts + 1)
    ways = ways - special.gammaln(trials - counts + 1)
    masses: Floats = np.exp(
        ways + special.xlogy(counts, chances) + special.xlog1py(trials - counts, -chances)
    )
    return masses


def compare_means(
    differences: Floats,
    margin: float,
    *,
    clusters: NDArray[np.int64] | None = None,
    largest: float = 1.0,
    alpha: float = 0.05,
) -> Comparison:
    """Compare scores that are not just right or wrong, or the means of repeats.

    `differences` holds the drop of each question, each within -largest to largest; `clusters` an
    integer label per question where questions come in groups, which are then the units. A t
    interval (cluster-robust for the ratio of cluster totals) is corrected for skewness (Hall 1992,
    JRSS-B 54:221) and widened to what a bounded score allows:

    - where few units carry the differences, to the exact binary bounds on the total of losses and
      gains, because a t interval has not seen the rare large loss;
    - always, to the share of total losses that may have escaped this many units. A cluster may be
      lost as a whole, however independent the questions of those seen look.

    Raises:
        ValueError: There is no difference, or one is larger than `largest`.

    """
    drops = _fractions(differences, largest)
    limit = margin / largest
    totals, sizes = _unit_totals(drops, clusters)
    estimate = float(drops.mean())
    residuals = totals - estimate * sizes
    parts = _t(estimate, residuals, float(sizes.sum()), limit, alpha)
    standard_error = parts[0].standard_error
    parts.append(_unseen(estimate, len(totals), limit, alpha))
    usual = _most_common(totals / sizes)
    departures = totals - usual * sizes
    if _carrying(departures) < DIFFERING_UNITS:
        parts.append(_floor(departures, sizes, usual, limit, alpha))
    return _widest(
        parts,
        method=Method.T if clusters is None else Method.CLUSTER,
        units=len(totals),
        estimate=estimate,
        standard_error=standard_error,
        scale=largest,
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One method's bounds and p-values; a comparison takes the widest of several."""

    lower: float
    upper: float
    p_worse: float
    p_within: float
    standard_error: float = 0.0


def _widest(
    parts: Sequence[_Part],
    *,
    method: Method,
    units: int,
    estimate: float,
    standard_error: float,
    bound: float = 1.0,
    scale: float = 1.0,
) -> Comparison:
    return Comparison(
        estimate=estimate * scale,
        lower=max(min(part.lower for part in parts), -bound) * scale,
        upper=min(max(part.upper for part in parts), bound) * scale,
        p_worse=max(part.p_worse for part in parts),
        p_within=max(part.p_within for part in parts),
        method=method,
        units=units,
        standard_error=standard_error * scale,
    )


def _unit_totals(values: Floats, clusters: NDArray[np.int64] | None) -> tuple[Floats, Floats]:
    """Return the total and the number of questions of each unit, in order of first appearance."""
    if clusters is None:
        return values, np.ones(len(values))
    _, first, labels = np.unique(clusters, return_index=True, return_inverse=True)
    order = np.argsort(first)
    totals = np.bincount(labels, weights=values)[order].astype(np.float64)
    return totals, np.bincount(labels)[order].astype(np.float64)


def _most_common(values: Floats) -> float:
    """Return the most common value; zero where it is as common as any."""
    found, counts = np.unique(np.round(values, 9), return_counts=True)
    zero = counts[found == 0]
    return 0.0 if zero.size and zero[0] == counts.max() else float(found[np.argmax(counts)])


def _carrying(departures: Floats) -> float:
    """Return how many equal departures would carry the same total: few large ones count alone."""
    squares = float((departures**2).sum())
    return float(np.abs(departures).sum()) ** 2 / squares if squares else 0.0


def _unseen(estimate: float, units: int, margin: float, alpha: float) -> _Part:
    """Bound the mean by the share of whole losses, or gains, that these units may have missed.

    If a share x of units is lost entirely, all of n miss it with the chance (1 - x)^n, and the
    drop is then higher than seen by x (1 - estimate). With nothing lost this is the exact bound.
    """
    escaped = unseen_share(units, alpha)

    def chance(limit: float, seen: float) -> float:
        return min(1.0, (1 - limit) / (1 - seen)) ** units if seen < 1 else 1.0

    return _Part(
        lower=estimate - max(1 + estimate, 0.0) * escaped,
        upper=estimate + max(1 - estimate, 0.0) * escaped,
        p_worse=chance(-margin, -estimate),
        p_within=chance(margin, estimate),
    )


def unseen_share(units: int, alpha: float) -> float:
    """Return the share of units that this many, drawn by lot, all miss with the chance `alpha`."""
    return float(1 - alpha ** (1 / units))


def _floor(departures: Floats, sizes: Floats, usual: float, margin: float, alpha: float) -> _Part:
    """Bound the mean by the exact binary bounds on the totals of losses and gains.

    Departures are counted from the usual difference, in units of the largest cluster. A fraction of
    a loss has less variance than a loss with that chance, and totals are rounded to the worse side.
    """
    span = (1 + abs(usual)) * float(sizes.max())
    units = len(sizes)
    shrink = float(sizes.sum()) / (span * units)
    limit = (margin - usual) * shrink
    losses = float(departures[departures > 0].sum()) / span
    gains = -float(departures[departures < 0].sum()) / span
    within = _rounded(losses, gains, units, limit, alpha)
    worse = _rounded(gains, losses, units, -limit, alpha)
    return _Part(
        lower=usual - worse.upper / shrink,
        upper=usual + within.upper / shrink,
        p_worse=worse.p_within,
        p_within=within.p_within,
    )


def _rounded(losses: float, gains: float, units: int, margin: float, alpha: float) -> Comparison:
    lost = min(math.ceil(losses - SCARCELY), units)
    gained = min(math.floor(gains + SCARCELY), units - lost)
    return compare_binary(lost=lost, gained=gained, questions=units, margin=margin, alpha=alpha)


def _t(
    estimate: float, residuals: Floats, questions: float, margin: float, alpha: float
) -> list[_Part]:
    """Return t bounds of a ratio, plain and with Hall's cubic correction for skewness.

    With the distance u in standard deviations, u + g u²/3 + g² u³/27 + g / 6n is nearly normal;
    g is the skewness. The transformation is monotone, so bounds and p-values agree. A skewness
    estimated from heavy tails can also narrow an interval that was right, hence both. The degrees
    of freedom are those of a variance estimate with the kurtosis seen: 2n / (kurtosis - 1), which
    is n for normal residuals.
    """
    units = len(residuals)
    if units < 2:
        return [_Part(lower=-1.0, upper=1.0, p_worse=1.0, p_within=1.0)]
    deviation = math.sqrt(float((residuals**2).sum()) / (units - 1))
    if deviation <= SCARCELY * questions / units:
        return [_point(estimate, margin)]
    scaled = residuals / deviation
    skewness, kurtosis = float((scaled**3).mean()), float((scaled**4).mean())
    freedom = min(units - 1.0, max(1.0, 2 * units / max(kurtosis - 1, 1.0)))
    per_question = deviation * units / questions
    quantile = float(special.stdtrit(freedom, alpha)) / math.sqrt(units)
    reached = (estimate - margin) / per_question
    parts = []
    for lean in (0.0, skewness):
        bent = _bend(reached, lean, units) * math.sqrt(units)
        parts.append(
            _Part(
                lower=estimate - per_question * _unbend(-quantile, lean, units),
                upper=estimate - per_question * _unbend(quantile, lean, units),
                p_worse=float(special.stdtr(freedom, -bent)),
                p_within=float(special.stdtr(freedom, bent)),
                standard_error=per_question / math.sqrt(units),
            )
        )
    return parts


def _bend(distance: float, skewness: float, units: int) -> float:
    cubic = distance + skewness * distance**2 / 3 + skewness**2 * distance**3 / 27
    return cubic + skewness / (6 * units)


def _unbend(target: float, skewness: float, units: int) -> float:
    """Return the distance that `_bend` takes to this target."""
    if abs(skewness) < 1e-6:
        return target
    cube = 1 + skewness * (target - skewness / (6 * units))
    return 3 / skewness * (float(np.cbrt(cube)) - 1)


def _point(estimate: float, margin: float) -> _Part:
    """Return the bounds of a sample without spread; only ever used beside wider ones."""
    return _Part(
        lower=estimate,
        upper=estimate,
        p_worse=0.0 if estimate > margin else 1.0,
        p_within=0.0 if estimate < margin else 1.0,
    )


def compare_ratio(
    totals: Floats, weights: Floats, margin: float, *, alpha: float = 0.05
) -> Comparison:
    """Compare log-perplexities: the total drop over the total weight.

    `totals` holds per document how much the log-likelihood fell, in nats; `weights` its words or
    bytes. Log-likelihoods have no bound, so fewer than `FEWEST_DOCUMENTS` documents bound nothing.

    Documents without any spread are bounded as if a whole nat were the largest possible drop.

    Raises:
        ValueError: Totals and weights are not equally many, or the weights have no positive sum.

    """
    totals, weights = np.asarray(totals, dtype=float), np.asarray(weights, dtype=float)
    if totals.shape != weights.shape or not totals.size or not weights.sum() > 0:
        raise ValueError("totals and weights must be equally many, with a positive total weight")
    questions = float(weights.sum())
    estimate = float(totals.sum()) / questions
    residuals = totals - estimate * weights
    units = len(totals)
    parts = _t(estimate, residuals, questions, margin, alpha)
    standard_error = parts[0].standard_error
    if units < FEWEST_DOCUMENTS:
        parts = [_Part(lower=-math.inf, upper=math.inf, p_worse=1.0, p_within=1.0)]
    elif standard_error == 0:
        parts.append(_unseen(estimate, units, margin, alpha))
    return _widest(
        parts,
        method=Method.RATIO,
        units=units,
        estimate=estimate,
        standard_error=standard_error,
        bound=math.inf,
    )


def compare_sequence(
    differences: Floats,
    margin: float,
    *,
    alpha: float = 0.05,
    largest: float = 1.0,
) -> Comparison:
    """Compare answers that come in one after the other, valid whenever one stops to look.

    `differences` holds the drop of each question in the order asked. A bettor stakes a part of the
    wealth against each hypothesis before each answer; under the hypothesis the wealth exceeds 1/p
    at any time with a chance of at most p (Ville), so 1 / (largest wealth so far) is a p-value
    under continuous peeking (Waudby-Smith and Ramdas 2024, JRSS-B 86:1). Bets are tuned to a
    lossless candidate. The answers must be independent of each other; `compare_looks` is for
    clusters.

    Raises:
        ValueError: There is no difference, or one is larger than `largest`.

    """
    limit = margin / largest
    losses, gains = _bettors(differences, largest)
    estimate = float(losses.drops.mean())

    def within(at: float) -> float:
        return float(losses.p_values(at, **_bets_within(limit, decides=at <= limit))[-1])

    def worse(at: float) -> float:
        return float(gains.p_values(at, **_bets_worse(limit))[-1])

    p_within, p_worse = within(limit), worse(-limit)
    return Comparison(
        estimate=estimate * largest,
        lower=-_upper_bound(worse, p_worse, -limit, -estimate, alpha) * largest,
        upper=_upper_bound(within, p_within, limit, estimate, alpha) * largest,
        p_worse=p_worse,
        p_within=p_within,
        method=Method.BETTING,
        units=len(losses.drops),
    )


def sequence_path(
    differences: Floats, margin: float, *, largest: float = 1.0
) -> tuple[Floats, Floats]:
    """Return `p_within` and `p_worse` of `compare_sequence` after each question."""
    limit = margin / largest
    losses, gains = _bettors(differences, largest)
    return (
        losses.p_values(limit, **_bets_within(limit, decides=True)),
        gains.p_values(-limit, **_bets_worse(limit)),
    )


class _Bets(TypedDict):
    gaps: dict[float, float]
    plug_in: float


def _bets_within(margin: float, *, decides: bool) -> _Bets:
    """Return the bets against a drop; beyond the margin they serve the bound and decide nothing."""
    share = PLUG_IN_SHARE if decides else 0.5
    return {"gaps": {margin: 1 - share}, "plug_in": share}


def _bets_worse(margin: float) -> _Bets:
    share = 1 / (1 + len(WORSE_BY))
    return {"gaps": {times * margin: share for times in WORSE_BY}, "plug_in": share}


def _bettors(differences: Floats, largest: float) -> tuple[_Bettor, _Bettor]:
    """Return who bets that little is lost, and who bets that more is."""
    drops = _fractions(differences, largest)
    return _Bettor.over(drops), _Bettor.over(-drops)


def _fractions(differences: Floats, largest: float) -> Floats:
    drops = np.asarray(differences, dtype=float) / largest
    if drops.size == 0 or not np.all(np.abs(drops) <= 1 + SCARCELY):
        raise ValueError("differences must be finite, at least one, and none above the largest")
    return drops


@dataclass(frozen=True, kw_only=True)
class _Bettor:
    """Drops of questions in order, and mean square and mean of those before each."""

    drops: Floats
    squares: Floats
    means: Floats

    @classmethod
    def over(cls, drops: Floats) -> _Bettor:
        """Collect, for every question, what the questions before it showed."""
        seen = np.arange(len(drops)) + PRIOR_QUESTIONS
        squares = np.cumsum(drops**2) - drops**2 + PRIOR_QUESTIONS * PRIOR_VARIANCE
        return cls(drops=drops, squares=squares / seen, means=(np.cumsum(drops) - drops) / seen)

    def p_values(self, limit: float, *, gaps: Mapping[float, float], plug_in: float) -> Floats:
        """Return after each question the p-value of "the drop is at least `limit`".

        `gaps` maps how far below the limit a bettor expects the drop to the bettor's part of the
        wealth; `plug_in` is the part of the one who expects the mean so far. A stake never exceeds
        what the largest possible loss leaves.
        """
        returns = limit - self.drops
        expected = np.maximum(limit - self.means, 0.0)
        bets = [(np.full(1, max(gap, 0.0)), part) for gap, part in gaps.items()]
        wealth = np.zeros(len(returns))
        for gap, part in [*bets, (expected, plug_in)]:
            stakes = gap / (self.squares + gap**2)
            stakes = np.minimum(stakes, BET_CEILING / (1 - limit))
            log_wealth = np.cumsum(np.log1p(stakes * returns))
            wealth += part * np.exp(np.minimum(log_wealth, 600.0))
        p_values: Floats = 1 / np.maximum.accumulate(np.maximum(wealth, 1.0))
        return p_values


def compare_looks(
    differences: Floats,
    margin: float,
    *,
    clusters: NDArray[np.int64],
    size: int | None = None,
    alpha: float = 0.05,
) -> Comparison:
    """Compare clustered answers that come in one after the other, valid whenever one stops to look.

    A cluster's questions come in at any time, and what is known of it says something of the rest,
    so nobody can bet on them. Instead only the looks of `_looks` count, whatever looks were taken;
    each spends an equal part of alpha (Bonferroni).

    Raises:
        ValueError: There is no difference, or one is larger than 1.

    """
    looks = [
        compare_means(differences[:end], margin, clusters=clusters[:end], alpha=alpha / LOOKS)
        for end in _looks(len(differences), size)
    ]
    return replace(
        compare_means(differences, margin, clusters=clusters, alpha=alpha),
        lower=max((look.lower for look in looks), default=-1.0),
        upper=min((look.upper for look in looks), default=1.0),
        p_worse=min(1.0, LOOKS * min((look.p_worse for look in looks), default=1.0)),
        p_within=min(1.0, LOOKS * min((look.p_within for look in looks), default=1.0)),
    )


def _looks(asked: int, size: int | None) -> list[int]:
    """Return the numbers of questions, up to `asked`, that count as looks: at most `LOOKS`."""
    looks = list(
        accumulate(
            range(LOOKS - 2), lambda end, _: math.ceil(end * LOOK_GROWTH), initial=FIRST_LOOK
        )
    )
    return [end for end in looks if end <= asked] + ([asked] if asked == size else [])


def relative_change(
    baseline: Floats,
    candidate: Floats,
    *,
    clusters: NDArray[np.int64] | None = None,
    alpha: float = 0.05,
) -> Interval:
    """Bound the candidate's mean over the baseline's, less 1, of values paired by question.

    Both bounds are one-sided, each with confidence 1 - alpha: the wider of Fieller's with t
    quantiles and of those corrected for skewness, cluster-robust where clusters are given. They are
    infinite where the baseline's mean cannot be told from zero.

    Raises:
        ValueError: The two sides are not equally many, or empty.

    """
    baseline, candidate = np.asarray(baseline, dtype=float), np.asarray(candidate, dtype=float)
    if baseline.shape != candidate.shape or not baseline.size:
        raise ValueError("baseline and candidate must be equally many, and at least one")
    before, _ = _unit_totals(baseline, clusters)
    after, _ = _unit_totals(candidate, clusters)
    units, x, y = len(before), float(before.mean()), float(after.mean())
    if units < 2 or x <= 0:
        estimate = y / x - 1 if x > 0 else math.nan
        return Interval(estimate=estimate, lower=-math.inf, upper=math.inf)
    (vx, cov), (_, vy) = np.cov(before, after) / units
    square = float(special.stdtrit(units - 1, 1 - alpha)) ** 2
    a, b, c = x * x - square * vx, x * y - square * cov, y * y - square * vy
    if a <= 0:
        return Interval(estimate=y / x - 1, lower=-math.inf, upper=math.inf)
    root = math.sqrt(max(b * b - a * c, 0.0))
    estimate, residuals = y / x - 1, (after - y / x * before) / x
    parts = _t(estimate, residuals, float(units), 0.0, alpha)
    return Interval(
        estimate=estimate,
        lower=min((b - root) / a - 1, *(part.lower for part in parts)),
        upper=max((b + root) / a - 1, *(part.upper for part in parts)),
    )


def length_change(
    baseline: Floats,
    candidate: Floats,
    *,
    clusters: NDArray[np.int64] | None = None,
    alpha: float = 0.05,
) -> Interval:
    """Bound `relative_change` of the lengths of answers, which vary little until one runs on.

    No bound is nearer than the share of questions, or clusters, that may have escaped this many,
    each with the longest answer seen on one side and none on the other. Fewer than `FEWEST_LENGTHS`
    bound nothing.
    """
    seen = relative_change(baseline, candidate, clusters=clusters, alpha=alpha)
    units = len(baseline) if clusters is None else len(np.unique(clusters))
    if units < FEWEST_LENGTHS:
        return Interval(estimate=seen.estimate, lower=-math.inf, upper=math.inf)
    longest = float(max(baseline.max(), candidate.max()) / baseline.mean())
    escaped = unseen_share(units, alpha) * longest
    return Interval(
        estimate=seen.estimate,
        lower=min(seen.lower, seen.estimate - escaped),
        upper=max(seen.upper, seen.estimate + escaped),
    )


def mean_interval(
    values: Floats, *, clusters: NDArray[np.int64] | None = None, alpha: float = 0.05
) -> Interval:
    """Return the mean with its two-sided 1 - alpha interval (t, cluster-robust).

    Raises:
        ValueError: There is no value.

    """
    values = np.asarray(values, dtype=float)
    if not values.size:
        raise ValueError("a mean needs at least one value")
    totals, sizes = _unit_totals(values, clusters)
    estimate, units = float(values.mean()), len(totals)
    if units < 2:
        return Interval(estimate=estimate, lower=-math.inf, upper=math.inf)
    squares = float(((totals - estimate * sizes) ** 2).sum())
    error = math.sqrt(squares * units / (units - 1)) / float(sizes.sum())
    reach = float(special.stdtrit(units - 1, 1 - alpha / 2)) * error
    return Interval(estimate=estimate, lower=estimate - reach, upper=estimate + reach)


def rate_interval(count: int, n: int, *, alpha: float = 0.05) -> Interval:
    """Return a rate with its two-sided 1 - alpha interval (Wilson 1927); 0 to 1 where n is 0."""
    if n == 0:
        return Interval(estimate=math.nan, lower=0.0, upper=1.0)
    rate = count / n
    square = float(special.ndtri(1 - alpha / 2)) ** 2
    middle = (count + square / 2) / (n + square)
    reach = math.sqrt(square * (n * rate * (1 - rate) + square / 4)) / (n + square)
    return Interval(
        estimate=rate,
        lower=max(0.0, middle - reach) if count else 0.0,
        upper=min(1.0, middle + reach) if count < n else 1.0,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number (Holm 1979), in the order given."""
    if not p_values:
        return []
    from statsmodels.stats.multitest import (  # type: ignore[import-untyped]
        multipletests,
    )

    return [float(value) for value in multipletests(list(p_values), method="holm")[1]]


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided exact p-value of "losses and gains are equally likely"."""
    fewer, discordant = min(lost, gained), lost + gained
    return float(min(1.0, 2 * special.bdtr(fewer, discordant, 0.5))) if discordant else 1.0


def components(per_repeat: Floats) -> tuple[float, float]:
    """Return the variance of the drop between questions and between repeats of one question.

    `per_repeat` holds the drops, one row per question and one column per repeat. One repeat tells
    the two apart no more than one question does; what cannot be told is zero within.
    """
    per_repeat = np.asarray(per_repeat, dtype=float)
    questions, repeats = per_repeat.shape
    total = float(per_repeat.mean(axis=1).var(ddof=1)) if questions > 1 else 0.0
    if repeats < 2:
        return total, 0.0
    within = float(per_repeat.var(axis=1, ddof=1).mean())
    return max(total - within / repeats, 0.0), within


def power(
    questions: int, margin: float, *, discordance: float, drop: float = 0.0, alpha: float = 0.05
) -> float:
    """Return the chance that a right-or-wrong task of this size passes.

    `discordance` is the share of questions right on one side only, `drop` the true drop.
    """
    if questions < fewest_units(margin, alpha):
        return 0.0
    share = min(1.0, max(discordance, abs(drop)))
    return _chance(
        questions, margin, lost=(share + drop) / 2, gained=(share - drop) / 2, alpha=alpha
    )


def fewest_units(margin: float, alpha: float) -> int:
    """Return how many questions, or clusters, pass when not one answer differs."""
    if margin <= 0:
        return 1
    return math.ceil(math.log(alpha - BERGER_BOOS) / math.log1p(-margin))


def _chance(questions: int, margin: float, *, lost: float, gained: float, alpha: float) -> float:
    """Return the chance that Tango's test rejects "the drop is at least the margin".

    `lost` and `gained` are the chances of one question. From a discordance that decides anything
    on, the exact test rejects the same outcomes.
    """
    gains = _likely_gains(questions, gained, gained, deviations=8)
    most = _most_losses(float(special.ndtri(alpha)), gains, questions, margin)
    return min(1.0, float(_sums(most, gains, questions, np.full((1, 1), gained), lost)[0]))


def detectable_drop(
    questions: int, *, discordance: float, alpha: float = 0.05, power: float = 0.8
) -> float:
    """Return the smallest drop that a right-or-wrong task of this size tells from zero.

    As a fraction of the scale; 1 where nothing smaller can be told. At least as many losses must be
    seen as the exact test wants where nothing is gained.
    """
    square = float(special.ndtri(1 - alpha) + special.ndtri(power)) ** 2
    usual = math.sqrt(square * discordance / (questions + square))
    losses = 1
    while at_least(0, losses, questions, 0.0) > alpha:
        losses += 1
        if losses > questions:
            return 1.0
    rare = float(special.bdtri(losses - 1, questions, 1 - power))
    return max(rare, usual if usual < discordance else square / (questions + square))


def questions_needed(
    margin: float,
    *,
    variance: float,
    drop: float = 0.0,
    alpha: float = 0.05,
    power: float = 0.8,
    largest: float = 1.0,
) -> int | None:
    """Return how many questions decide at this true drop: a pass below the margin, a fail above.

    `variance` is that of one question's drop; counts are those of a right-or-wrong task with this
    variance, or by the normal limit where none can have as much. Never fewer than a candidate
    without any difference needs to pass. None where no number up to `MOST_QUESTIONS` is enough: the
    drop is too near the margin.
    """
    limit, true = margin / largest, drop / largest
    fewest = fewest_units(limit, alpha) if true < limit else 1
    share = max(variance / largest**2 + true**2, abs(true))
    if share >= 1:
        square = float(special.ndtri(1 - alpha) + special.ndtri(power)) ** 2 * variance
        return _up_to_most(max(fewest, square / max((margin - drop) ** 2, 1e-300)))
    lost, gained = (share + true) / 2, (share - true) / 2

    def enough(questions: int) -> bool:
        if true > limit:
            return _chance(questions, -limit, lost=gained, gained=lost, alpha=alpha) >= power
        return _chance(questions, limit, lost=lost, gained=gained, alpha=alpha) >= power

    low, high = 0, fewest
    while high <= MOST_QUESTIONS and not enough(high):
        low, high = high, 2 * high
    if _up_to_most(high) is None:
        return None
    while low and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _up_to_most(questions: float) -> int | None:
    return math.ceil(questions) if questions <= MOST_QUESTIONS else None


def false_refusal_risk(
    questions: int, threshold: float, *, score: float, discordance: float | None = None
) -> float:
    """Return the chance that a lossless candidate's observed drop exceeds a plain threshold.

    Without a known discordance the two sides are taken as independent at this score.
    """
    variance = _bare_variance(score, discordance)
    if variance == 0:
        return 0.0
    return float(special.ndtr(-threshold * math.sqrt(questions / variance)))


def false_accept_risk(
    questions: int,
    threshold: float,
    *,
    score: float,
    drop: float,
    discordance: float | None = None,
) -> float:
    """Return the chance that a candidate with this true drop stays within a plain threshold."""
    variance = max(_bare_variance(score, discordance), abs(drop)) - drop**2
    if variance <= 0:
        return 1.0 if drop <= threshold else 0.0
    return float(special.ndtr((threshold - drop) * math.sqrt(questions / variance)))


def _bare_variance(score: float, discordance: float | None) -> float:
    return 2 * score * (1 - score) if discordance is None else discordance


def floats(values: Sequence[float]) -> Floats:
    """Return numbers as an array."""
    return np.asarray(values, dtype=np.float64)


def labels(names: Sequence[str]) -> NDArray[np.int64]:
    """Return a whole number for each name, equal for equal names."""
    codes = {name: code for code, name in enumerate(dict.fromkeys(names))}
    return np.fromiter(map(codes.__getitem__, names), dtype=np.int64, count=len(names))


def quantiles(values: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Return the values below which the given shares of all values lie."""
    return [float(value) for value in np.quantile(floats(values), shares)]


def choice_changes(
    baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]
) -> tuple[Floats, Floats]:
    """Return per question how far the candidate's choices moved, from log-likelihoods in nats.

    The first is the Kullback-Leibler divergence of the candidate's distribution over the choices
    from the baseline's, each the softmax of its log-likelihoods; the second the mean change of a
    log-likelihood. Both sides have the same number of choices for each question, at least one.
    """
    sizes = np.fromiter(map(len, baseline), dtype=np.int64, count=len(baseline))
    starts = np.cumsum(sizes) - sizes
    before, after = (
        np.fromiter(chain.from_iterable(side), dtype=np.float64, count=int(sizes.sum()))
        for side in (baseline, candidate)
    )

    def log_shares(values: Floats) -> Floats:
        shifted = values - np.repeat(np.maximum.reduceat(values, starts), sizes)
        totals: Floats = np.log(np.add.reduceat(np.exp(shifted), starts))
        shares: Floats = shifted - np.repeat(totals, sizes)
        return shares

    p, q = log_shares(before), log_shares(after)
    divergences = np.maximum(np.add.reduceat(np.exp(p) * (p - q), starts), 0.0)
    return divergences, np.add.reduceat(after - before, starts) / sizes
