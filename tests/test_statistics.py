"""Paired statistics against independent implementations, enumeration and simulation."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import numpy as np
import pytest
from scipy import optimize, special, stats

from gates import statistics
from gates.statistics import (
    Method,
    at_least,
    compare_binary,
    compare_means,
    compare_ratio,
    compare_sequence,
    questions_needed,
    sequence_path,
)

ALPHA = 0.05


def likelihood_score(lost: int, gained: int, questions: int, drop: float) -> float:
    """Tango's statistic, with the restricted likelihood maximised by search, not by formula."""

    def unlikeliness(gain: float) -> float:
        rest = 1 - 2 * gain - drop
        terms = ((lost, gain + drop), (gained, gain), (questions - lost - gained, rest))
        return -sum(count * math.log(max(chance, 1e-300)) for count, chance in terms if count)

    low, high = max(0.0, -drop), (1 - drop) / 2
    best = optimize.minimize_scalar(
        unlikeliness, bounds=(low, high), method="bounded", options={"xatol": 1e-13}
    )
    gain = min((low, high, best.x), key=unlikeliness)
    variance = questions * (2 * gain + drop - drop**2)
    return (lost - gained - questions * drop) / math.sqrt(variance)


COUNTS = [
    (12, 3, 44, 0.1),
    (2, 9, 60, -0.05),
    (0, 4, 50, 0.02),
    (7, 0, 90, 0.3),
    (40, 35, 900, 0.01),
]


@pytest.mark.parametrize(("lost", "gained", "questions", "drop"), COUNTS)
def test_score_is_that_of_the_maximised_likelihood(
    lost: int, gained: int, questions: int, drop: float
) -> None:
    ours = float(statistics._score(lost, gained, questions, drop))
    assert ours == pytest.approx(likelihood_score(lost, gained, questions, drop), abs=1e-4)


@pytest.mark.parametrize(
    ("lost", "gained", "questions"), [(220, 190, 3000), (350, 90, 1000), (30, 400, 700)]
)
def test_score_bounds_solve_the_score_equation(lost: int, gained: int, questions: int) -> None:
    found = compare_binary(lost=lost, gained=gained, questions=questions, margin=0.01)
    assert found.method is Method.SCORE
    normal = stats.norm.ppf(0.95)
    for bound, quantile in ((found.upper, -normal), (found.lower, normal)):
        root = optimize.brentq(
            lambda drop, at=quantile: likelihood_score(lost, gained, questions, drop) - at,
            -0.9,
            0.9,
        )
        assert bound == pytest.approx(root, abs=1e-4)


def test_score_interval_is_the_published_one() -> None:
    """Fagerland, Lydersen and Laake 2014 (Stat. Med. 33:2850): 1 and 7 of 21, -0.517 to -0.026."""
    normal = stats.norm.ppf(0.975)
    bounds = [
        optimize.brentq(
            lambda drop, at=at: float(statistics._score(1, 7, 21, drop)) - at, -0.9, 0.9
        )
        for at in (normal, -normal)
    ]
    assert bounds == pytest.approx([-0.517, -0.026], abs=6e-4)


def enumerated_tail(lost: int, gained: int, questions: int, drop: float) -> float:
    """The exact test by the trinomial probabilities of every single outcome."""
    observed = float(statistics._score(lost, gained, questions, drop)) + 1e-9
    limits = statistics.BERGER_BOOS / 2
    rarer = gained if drop >= 0 else lost
    bounds = stats.binomtest(rarer, questions).proportion_ci(1 - 2 * limits, method="exact")
    low, high = (min(bound, (1 - abs(drop)) / 2) for bound in bounds)
    inside = [
        (losses, gains)
        for gains in range(questions + 1)
        for losses in range(questions + 1 - gains)
        if float(statistics._score(losses, gains, questions, drop)) <= observed
    ]
    most = 0.0
    for gain in np.linspace(low, high, 150) + max(0.0, -drop):
        rest = max(1 - 2 * gain - drop, 0.0)
        counts = [(losses, gains, questions - losses - gains) for losses, gains in inside]
        masses = stats.multinomial.pmf(counts, questions, [gain + drop, gain, rest])
        most = max(most, float(masses.sum()))
    return min(1.0, most + statistics.BERGER_BOOS)


@pytest.mark.parametrize(
    ("lost", "gained", "questions", "drop"),
    [(0, 0, 20, 0.1), (1, 2, 20, 0.1), (0, 3, 25, 0.05), (6, 1, 15, -0.2), (2, 2, 12, 0.0)],
)
def test_exact_test_is_the_sum_over_all_outcomes(
    lost: int, gained: int, questions: int, drop: float
) -> None:
    expected = enumerated_tail(lost, gained, questions, drop)
    assert at_least(lost, gained, questions, drop) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    ("questions", "margin"), [(30, 0.1), (60, 0.05), (30, -0.1), (70, 0.02), (60, 0.2)]
)
def test_exact_test_keeps_its_size_whatever_the_nuisance(questions: int, margin: float) -> None:
    rejected = np.zeros((questions + 1, questions + 1), dtype=bool)
    for gained in range(questions + 1):
        for lost in range(questions + 1 - gained):
            if at_least(lost, gained, questions, margin) > ALPHA:
                break
            rejected[lost, gained] = True
    lost, gained = np.nonzero(rejected)
    counts = np.stack([lost, gained, questions - lost - gained], axis=1)
    for gain in np.linspace(max(0.0, -margin), 0.39, 40):
        chances = [gain + margin, gain, 1 - 2 * gain - margin]
        assert stats.multinomial.pmf(counts, questions, chances).sum() <= ALPHA


@pytest.mark.parametrize(
    ("margin", "fewest"),
    [
        pytest.param(0.01, 299, id="one-point"),
        pytest.param(0.05, 59, id="five-points"),
        pytest.param(0.2, 14, id="twenty-points"),
        pytest.param(0.001, 2997, id="a-tenth-of-a-point"),
    ],
)
def test_full_agreement_passes_from_the_exact_number_of_questions_on(
    margin: float, fewest: int
) -> None:
    assert compare_binary(lost=0, gained=0, questions=fewest, margin=margin).upper < margin
    assert compare_binary(lost=0, gained=0, questions=fewest - 1, margin=margin).upper > margin
    assert questions_needed(margin, variance=0.0) == fewest


@pytest.mark.parametrize("margin", [0.001, 0.01, 0.05, 0.2])
@pytest.mark.parametrize(
    ("lost", "gained", "questions"),
    [
        *[(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 10), (10, 0, 10), (0, 10, 10), (5, 5, 10)],
        *[(0, 0, 298), (0, 0, 299), (3, 0, 700), (12, 1, 300), (25, 25, 1000), (90, 110, 1500)],
        *[(101, 100, 2000), (500, 500, 1000), (30, 60, 12000), (2000, 1800, 12000)],
    ],
)
def test_bounds_and_p_values_agree(lost: int, gained: int, questions: int, margin: float) -> None:
    found = compare_binary(lost=lost, gained=gained, questions=questions, margin=margin)
    assert found.lower < found.upper
    assert found.lower <= found.estimate <= found.upper
    assert (found.upper < margin) == (found.p_within <= ALPHA)
    assert (found.lower > margin) == (found.p_worse <= ALPHA)
    assert found.p_within == at_least(lost, gained, questions, margin)
    assert found.p_worse == at_least(gained, lost, questions, -margin)
    mirrored = compare_binary(lost=gained, gained=lost, questions=questions, margin=-margin)
    assert (mirrored.p_within, mirrored.p_worse) == (found.p_worse, found.p_within)


def test_the_two_tests_agree_where_they_meet() -> None:
    limit = statistics.EXACT_UP_TO
    below = compare_binary(lost=limit // 2, gained=limit // 2, questions=4000, margin=0.01)
    above = compare_binary(lost=limit // 2 + 1, gained=limit // 2, questions=4000, margin=0.01)
    assert (below.method, above.method) == (Method.EXACT, Method.SCORE)
    assert below.upper == pytest.approx(above.upper, rel=0.06)


@pytest.mark.parametrize(
    ("lost", "gained", "questions", "margin"),
    [(1, 0, 0, 0.01), (2, 2, 3, 0.01), (-1, 0, 3, 0.01), (0, 0, 3, 1.0), (0, 0, 3, math.nan)],
)
def test_impossible_counts_are_refused(
    lost: int, gained: int, questions: int, margin: float
) -> None:
    with pytest.raises(ValueError, match=r"do not fit|between -1 and 1"):
        compare_binary(lost=lost, gained=gained, questions=questions, margin=margin)


def flips(
    rng: np.random.Generator, questions: int, lost: float, gained: float
) -> statistics.Floats:
    chances = [lost, gained, 1 - lost - gained]
    return rng.choice(np.array([1.0, -1.0, 0.0]), p=chances, size=questions)


def test_t_interval_is_scipy_s_where_nothing_is_skewed() -> None:
    half = np.random.default_rng(1).uniform(0, 0.1, 2000)
    values = 0.002 + np.concatenate([half, -half])
    found = compare_means(values, 0.01)
    assert found.method is Method.T
    low, high = stats.t.interval(0.9, len(values) - 1, values.mean(), stats.sem(values))
    assert (found.lower, found.upper) == pytest.approx((low, high), abs=1e-6)
    assert found.standard_error == pytest.approx(stats.sem(values))


def test_cluster_interval_is_statsmodels_cluster_robust() -> None:
    from statsmodels.regression.linear_model import OLS

    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(400), rng.integers(1, 12, 400))
    values = np.clip(rng.normal(0, 0.1, 400)[labels] + rng.normal(0, 0.2, len(labels)), -1, 1)
    robust = OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": labels, "use_correction": False}
    )
    found = compare_means(values, 0.01, clusters=labels)
    assert (found.method, found.units) == (Method.CLUSTER, 400)
    assert found.standard_error == pytest.approx(float(robust.bse[0]), rel=0.002)


@pytest.mark.parametrize(
    "differences",
    [
        pytest.param(np.zeros(10), id="ten-identical-answers"),
        pytest.param(np.zeros(298), id="one-short-of-enough"),
        pytest.param(np.full(12, -0.5), id="constant-gain"),
        pytest.param(np.full(40, 0.25), id="constant-loss"),
        pytest.param(np.ones(1), id="one-question"),
        pytest.param(np.r_[np.zeros(999), 1.0], id="one-loss"),
        pytest.param(np.r_[np.zeros(200), np.full(40, 0.25)], id="quarter-losses"),
        pytest.param(np.linspace(-0.3, 0.3, 500), id="graded"),
    ],
)
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("margin", [0.01, 0.1])
def test_no_interval_of_means_has_width_zero(
    differences: statistics.Floats, clustered: bool, margin: float
) -> None:
    labels = np.arange(len(differences)) // 3 if clustered else None
    found = compare_means(differences, margin, clusters=labels)
    assert found.lower < found.estimate < found.upper or found.units == 1
    assert (found.upper < margin) == (found.p_within <= ALPHA)
    assert (found.lower > margin) == (found.p_worse <= ALPHA)


def test_no_difference_in_means_is_as_strict_as_in_counts() -> None:
    for questions in (298, 299):
        counted = compare_binary(lost=0, gained=0, questions=questions, margin=0.01)
        mean = compare_means(np.zeros(questions), 0.01)
        assert mean.p_within == pytest.approx(counted.p_within)


def test_scale_is_only_a_unit() -> None:
    values = np.random.default_rng(3).normal(0, 0.1, 500)
    one, hundred = compare_means(values, 0.01), compare_means(100 * values, 1.0, largest=100.0)
    assert hundred.upper == pytest.approx(100 * one.upper)
    assert hundred.p_within == pytest.approx(one.p_within)
    one, hundred = compare_sequence(values, 0.01), compare_sequence(100 * values, 1, largest=100.0)
    assert hundred.upper == pytest.approx(100 * one.upper)


def test_clusters_of_one_are_no_clusters() -> None:
    values = flips(np.random.default_rng(4), 2000, 0.03, 0.02)
    alone, grouped = (
        compare_means(values, 0.01),
        compare_means(values, 0.01, clusters=np.arange(2000)),
    )
    assert grouped.upper == pytest.approx(alone.upper)


@pytest.mark.parametrize("function", [compare_means, compare_sequence])
@pytest.mark.parametrize(
    "differences", [np.array([]), np.array([0.0, math.nan]), np.array([1.5, 0.0])]
)
def test_impossible_differences_are_refused(function: object, differences: object) -> None:
    with pytest.raises(ValueError, match="differences must be"):
        function(differences, 0.01)  # type: ignore[operator]


def rare_total_loss(rng: np.random.Generator) -> tuple[statistics.Floats, None]:
    return np.where(rng.random(1000) < 0.01, 1.0, 0.0), None


def rare_total_loss_in_noise(rng: np.random.Generator) -> tuple[statistics.Floats, None]:
    noise = rng.normal(0, 0.001, 500)
    return np.where(rng.random(500) < 0.01, 1.0, np.clip(noise, -1, 1)), None


def four_repeats(rng: np.random.Generator) -> tuple[statistics.Floats, None]:
    rates = rng.beta(0.6, 0.4, 800)
    return (rng.binomial(4, rates) - rng.binomial(4, rates * (1 - 0.01 / 0.6))) / 4, None


def unequal_clusters(
    rng: np.random.Generator,
) -> tuple[statistics.Floats, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    sizes = rng.geometric(0.1, 300)
    labels = np.repeat(np.arange(300), sizes)
    lost, gained = rng.beta(0.035 * 4, 0.965 * 4, 300), rng.beta(0.025 * 4, 0.975 * 4, 300)
    draws = rng.random((2, len(labels)))
    return (draws[0] < lost[labels]) - (draws[1] < gained[labels]) * 1.0, labels


@pytest.mark.parametrize(
    "draw", [rare_total_loss, rare_total_loss_in_noise, four_repeats, unequal_clusters]
)
def test_means_at_the_margin_rarely_pass_or_fail(draw: object) -> None:
    rng = np.random.default_rng(5)
    repetitions = 500
    found = [
        compare_means(values, 0.01, clusters=labels)
        for values, labels in (draw(rng) for _ in range(repetitions))  # type: ignore[operator]
    ]
    allowed = ALPHA + 2.5 * math.sqrt(ALPHA * (1 - ALPHA) / repetitions)
    assert np.mean([each.p_within <= ALPHA for each in found]) <= allowed
    assert np.mean([each.p_worse <= ALPHA for each in found]) <= allowed


@pytest.mark.parametrize(("clusters", "passes"), [(56, False), (298, False), (300, True)])
def test_a_cluster_that_was_not_seen_may_be_lost_as_a_whole(clusters: int, passes: bool) -> None:
    labels = np.repeat(np.arange(clusters), 250)
    by_turns = np.resize(np.r_[1.0, np.zeros(249), -1.0, np.zeros(249)], len(labels))
    found = compare_means(by_turns, 0.01, clusters=labels)
    assert (found.p_within <= ALPHA) is passes


def test_few_clusters_decide_nothing_at_one_point() -> None:
    labels = np.repeat(np.arange(9), 500)
    found = compare_means(np.zeros(4500), 0.01, clusters=labels)
    assert found.upper > 0.2
    assert found.p_within > ALPHA


def test_ratio_is_the_t_interval_of_equal_documents() -> None:
    half = np.random.default_rng(6).uniform(0, 30, 500)
    totals = np.concatenate([half, -half])
    found = compare_ratio(totals, np.full(1000, 50.0), 0.01)
    low, high = stats.t.interval(0.9, 999, 0.0, stats.sem(totals / 50))
    assert (found.method, found.estimate) == (Method.RATIO, pytest.approx(0.0, abs=1e-12))
    assert (found.lower, found.upper) == pytest.approx((low, high), rel=1e-3)


def test_ratio_weights_documents_by_their_words() -> None:
    rng = np.random.default_rng(7)
    weights = rng.integers(10, 1000, 200).astype(float)
    found = compare_ratio(0.004 * weights + rng.normal(0, 1, 200), weights, 0.01)
    assert found.estimate == pytest.approx(0.004, abs=5e-4)
    assert found.upper < 0.01


@pytest.mark.parametrize(
    ("totals", "passes"),
    [
        pytest.param(np.zeros(29), False, id="too-few"),
        pytest.param(np.zeros(30), False, id="identical-but-few"),
        pytest.param(np.zeros(299), True, id="identical"),
        pytest.param(np.full(299, 0.1), False, id="constant-and-large"),
    ],
)
def test_ratio_of_documents_without_spread(totals: statistics.Floats, passes: bool) -> None:
    found = compare_ratio(totals, np.ones(len(totals)), 0.01)
    assert (found.upper < 0.01) == (found.p_within <= ALPHA) == passes
    assert found.lower < found.upper


def test_ratio_refuses_what_does_not_match() -> None:
    with pytest.raises(ValueError, match="equally many"):
        compare_ratio(np.zeros(3), np.zeros(4), 0.01)


def looped_p_within(differences: list[float], margin: float) -> list[float]:
    """The bettor against "the drop is at least the margin", one answer at a time."""
    fixed, plugged = 1 - statistics.PLUG_IN_SHARE, statistics.PLUG_IN_SHARE
    squares = statistics.PRIOR_QUESTIONS * statistics.PRIOR_VARIANCE
    total, seen, best = 0.0, statistics.PRIOR_QUESTIONS, 1.0
    path = []
    ceiling = statistics.BET_CEILING / (1 - margin)
    for drop in differences:
        variance, mean = squares / seen, total / seen
        for gap in (margin, max(margin - mean, 0.0)):
            stake = min(gap / (variance + gap**2), ceiling)
            if gap == margin:
                bold = stake
            cautious = stake
        fixed *= 1 + bold * (margin - drop)
        plugged *= 1 + cautious * (margin - drop)
        best = max(best, fixed + plugged)
        path.append(1 / best)
        total, squares, seen = total + drop, squares + drop**2, seen + 1
    return path


def test_sequence_is_a_bettor_who_goes_from_answer_to_answer() -> None:
    differences = flips(np.random.default_rng(8), 1500, 0.02, 0.02)
    within, worse = sequence_path(differences, 0.01)
    assert within == pytest.approx(looped_p_within(differences.tolist(), 0.01))
    found = compare_sequence(differences, 0.01)
    assert (found.method, found.units) == (Method.BETTING, 1500)
    assert (found.p_within, found.p_worse) == (within[-1], worse[-1])
    assert all(later <= earlier for earlier, later in pairwise(within))


def test_sequence_never_looks_ahead() -> None:
    differences = flips(np.random.default_rng(9), 2000, 0.03, 0.02)
    whole, part = sequence_path(differences, 0.01), sequence_path(differences[:700], 0.01)
    for all_along, until_then in zip(whole, part, strict=True):
        assert all_along[:700] == pytest.approx(until_then)


def test_sequence_needs_few_questions_beyond_the_exact_number() -> None:
    within, _ = sequence_path(np.zeros(400), 0.01)
    assert 299 <= int(np.argmax(within <= ALPHA)) + 1 <= 360


@pytest.mark.parametrize(
    ("lost", "gained", "largest_of"),
    [
        pytest.param(0.035, 0.025, 0, id="flips-at-the-margin-pass"),
        pytest.param(0.01, 0.0, 0, id="losses-at-the-margin-pass"),
        pytest.param(0.035, 0.025, 1, id="flips-at-the-margin-fail"),
        pytest.param(0.01, 0.0, 1, id="losses-at-the-margin-fail"),
    ],
)
def test_sequence_may_be_watched_all_along(lost: float, gained: float, largest_of: int) -> None:
    rng = np.random.default_rng(10)
    repetitions = 500
    crossed = [
        sequence_path(flips(rng, 6000, lost, gained), 0.01)[largest_of][-1] <= ALPHA
        for _ in range(repetitions)
    ]
    assert np.mean(crossed) <= ALPHA + 2.5 * math.sqrt(ALPHA * (1 - ALPHA) / repetitions)


@pytest.mark.parametrize("likeness", [0.0, 1.0], ids=["alone", "alike"])
def test_clusters_may_be_watched_while_their_questions_come_in_at_any_time(
    likeness: float,
) -> None:
    rng = np.random.default_rng(11)
    repetitions = 150
    passed = failed = 0
    for _ in range(repetitions):
        labels = rng.permutation(np.repeat(np.arange(1500), 4))
        alike = rng.random(6000) < likeness
        differences = np.where(
            alike, flips(rng, 1500, 0.055, 0.045)[labels], flips(rng, 6000, 0.055, 0.045)
        )
        looks = [
            statistics.compare_looks(differences[:end], 0.01, clusters=labels[:end], size=6000)
            for end in (100, 200, 260, 512, 900, 1500, 3360, 6000)
        ]
        passed += min(look.p_within for look in looks) <= ALPHA
        failed += min(look.p_worse for look in looks) <= ALPHA
    allowed = repetitions * ALPHA + 2.5 * math.sqrt(repetitions * ALPHA)
    assert max(passed, failed) <= allowed


def test_only_looks_fixed_beforehand_count() -> None:
    labels = np.arange(700) // 2
    differences = np.where(np.arange(700) < 200, 0.0, -1.0)
    found = {
        end: statistics.compare_looks(differences[:end], 0.05, clusters=labels[:end], size=700)
        for end in (199, 200, 319, 320, 511, 699, 700)
    }
    assert found[199].p_within == found[199].p_worse == 1.0
    assert (found[199].lower, found[199].upper) == (-1.0, 1.0)
    assert found[200].p_within == found[319].p_within < 1.0
    assert found[320].p_within == found[511].p_within < found[319].p_within
    assert found[700].p_within < found[699].p_within


def test_looks_at_clusters_never_take_back_what_was_shown() -> None:
    rng = np.random.default_rng(14)
    differences, labels = flips(rng, 9000, 0.01, 0.01), rng.integers(0, 3000, 9000)
    looks = [
        statistics.compare_looks(differences[:end], 0.01, clusters=labels[:end])
        for end in range(300, 9001, 300)
    ]
    assert all(later.p_within <= earlier.p_within for earlier, later in pairwise(looks))
    assert looks[-1].p_within <= ALPHA < looks[0].p_within


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(
    ("lost", "gained"), [(0.0, 0.0), (0.02, 0.02), (0.05, 0.0), (0.0, 0.05), (0.5, 0.5)]
)
def test_bounds_of_the_sequence_agree_with_its_p_values(
    lost: float, gained: float, clustered: bool
) -> None:
    differences = flips(np.random.default_rng(12), 3000, lost, gained)
    labels = np.arange(3000) // 4
    found = (
        statistics.compare_looks(differences, 0.01, clusters=labels)
        if clustered
        else compare_sequence(differences, 0.01)
    )
    assert found.lower < found.estimate < found.upper
    assert (found.upper < 0.01) == (found.p_within <= ALPHA)
    assert (found.lower > 0.01) == (found.p_worse <= ALPHA)


def test_relative_change_covers_what_is_true() -> None:
    rng = np.random.default_rng(13)
    above = below = 0
    for _ in range(600):
        difficulty = rng.gamma(2.0, 100.0, 2000)
        baseline = rng.gamma(4.0, difficulty / 4)
        candidate = rng.gamma(4.0, difficulty / 4) * 1.05
        found = statistics.relative_change(baseline, candidate, alpha=ALPHA)
        above += found.lower > 0.05
        below += found.upper < 0.05
    assert max(above, below) <= 600 * ALPHA + 2.5 * math.sqrt(600 * ALPHA)


@pytest.mark.parametrize(
    ("baseline", "candidate", "estimate"),
    [
        pytest.param([100.0], [110.0], 0.1, id="one-question"),
        pytest.param([0.0, 0.0], [1.0, 2.0], math.nan, id="nothing-before"),
        pytest.param([1.0, 100.0], [100.0, 1.0], 0.0, id="too-varied"),
    ],
)
def test_relative_change_knows_what_it_cannot_bound(
    baseline: list[float], candidate: list[float], estimate: float
) -> None:
    found = statistics.relative_change(np.array(baseline), np.array(candidate), alpha=ALPHA)
    assert found.estimate == pytest.approx(estimate, nan_ok=True)
    assert (found.lower, found.upper) == (-math.inf, math.inf)


def test_relative_change_of_equal_sides_is_zero() -> None:
    lengths = np.array([3.0, 5.0, 9.0])
    found = statistics.relative_change(lengths, lengths)
    assert (found.estimate, found.lower, found.upper) == pytest.approx((0.0, 0.0, 0.0))


def test_mean_interval_is_scipy_s() -> None:
    values = np.random.default_rng(14).normal(3, 1, 40)
    found = statistics.mean_interval(values)
    expected = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert (found.lower, found.upper) == pytest.approx(expected)
    assert math.isinf(statistics.mean_interval(values[:1]).upper)
    with pytest.raises(ValueError, match="at least one"):
        statistics.mean_interval(values[:0])


@pytest.mark.parametrize(("count", "n"), [(0, 10), (10, 10), (3, 10), (470, 1000)])
def test_rate_interval_is_wilson_s(count: int, n: int) -> None:
    found = statistics.rate_interval(count, n)
    expected = stats.binomtest(count, n).proportion_ci(method="wilson")
    assert (found.lower, found.upper) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_rate_of_nothing_is_anything() -> None:
    found = statistics.rate_interval(0, 0)
    assert math.isnan(found.estimate)
    assert (found.lower, found.upper) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("given", "adjusted"),
    [
        pytest.param([], [], id="none"),
        pytest.param([0.04], [0.04], id="one"),
        pytest.param([0.01, 0.04, 0.03], [0.03, 0.06, 0.06], id="three"),
        pytest.param([0.5, 0.001, 0.6, 0.6], [1.0, 0.004, 1.0, 1.0], id="never-above-one"),
    ],
)
def test_holm_by_hand(given: list[float], adjusted: list[float]) -> None:
    assert statistics.holm(given) == pytest.approx(adjusted)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (3, 9), (6, 6), (120, 80)])
def test_mcnemar_is_a_coin(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert statistics.mcnemar(lost, gained) == pytest.approx(expected)


def test_components_tell_questions_from_repeats() -> None:
    rng = np.random.default_rng(15)
    questions = rng.normal(0, 0.3, (4000, 1))
    between, within = statistics.components(questions + rng.normal(0, 0.5, (4000, 5)))
    assert (between, within) == (pytest.approx(0.09, rel=0.1), pytest.approx(0.25, rel=0.05))
    assert statistics.components(np.zeros((3, 1))) == (0.0, 0.0)
    assert statistics.components(np.ones((1, 1))) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("questions", "discordance", "drop"),
    [
        (320, 0.003, 0.0),
        (800, 0.01, 0.0),
        (1354, 0.02, 0.0),
        (9286, 0.15, 0.0),
        (3000, 0.02, 0.005),
    ],
)
def test_power_is_how_often_a_task_passes(questions: int, discordance: float, drop: float) -> None:
    rng = np.random.default_rng(16)
    lost, gained = (discordance + drop) / 2, (discordance - drop) / 2
    draws = rng.multinomial(questions, [lost, gained, 1 - lost - gained], 2000).tolist()
    passed = np.mean([at_least(a, b, questions, 0.01) <= ALPHA for a, b, _ in draws])
    claimed = statistics.power(questions, 0.01, discordance=discordance, drop=drop)
    assert claimed == pytest.approx(passed, abs=0.03)


@pytest.mark.parametrize("discordance", [0.0, 0.003, 0.01, 0.05, 0.15])
def test_questions_needed_have_the_power_asked_for(discordance: float) -> None:
    needed = questions_needed(0.01, variance=discordance)
    assert needed is not None
    assert needed == 299 or 0.79 < statistics.power(needed, 0.01, discordance=discordance) < 0.88
    assert statistics.power(298, 0.01, discordance=discordance) == 0.0


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        pytest.param({"margin": 0.01, "variance": 0.05, "drop": 0.01}, None, id="at-the-margin"),
        pytest.param({"margin": 0.01, "variance": 0.05, "drop": 0.0099999}, None, id="too-near"),
        pytest.param({"margin": 0.01, "variance": 0.0, "drop": 0.0}, 299, id="no-variance"),
        pytest.param({"margin": 1.0, "variance": 0.0, "largest": 100.0}, 299, id="percent"),
        pytest.param({"margin": 0.01, "variance": 4.0, "largest": 0.0101}, 247303, id="unbounded"),
    ],
)
def test_questions_needed_in_special_cases(arguments: dict[str, float], needed: int | None) -> None:
    found = questions_needed(**arguments)
    assert found == needed if needed is None else found == pytest.approx(needed, abs=1)


def test_questions_needed_show_a_failure_too() -> None:
    needed = questions_needed(0.01, variance=0.05, drop=0.03)
    assert needed is not None
    rng = np.random.default_rng(17)
    draws = rng.multinomial(needed, [0.04, 0.01, 0.95], 3000).tolist()
    failed = np.mean([at_least(gained, lost, needed, -0.01) <= ALPHA for lost, gained, _ in draws])
    assert failed == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("questions", [30, 300, 1000])
def test_detectable_drop_is_told_from_zero_four_times_in_five(questions: int) -> None:
    discordance = 0.05
    drop = statistics.detectable_drop(questions, discordance=discordance)
    share = max(discordance, drop)
    chances = [(share + drop) / 2, (share - drop) / 2, 1 - share]
    draws = np.random.default_rng(18).multinomial(questions, chances, 1500).tolist()
    told = np.mean([at_least(gained, lost, questions, 0.0) <= ALPHA for lost, gained, _ in draws])
    assert told == pytest.approx(0.8, abs=0.06)
    assert statistics.detectable_drop(3, discordance=discordance) == 1.0


@pytest.mark.parametrize(
    ("questions", "discordance", "drop", "refused", "accepted"),
    [(300, 0.08, 0.03, 0.27, 0.11), (10**6, 0.08, 0.03, 0.0, 0.0), (300, 0.0, 0.0, 0.0, 1.0)],
)
def test_risks_of_a_plain_threshold(
    questions: int, discordance: float, drop: float, refused: float, accepted: float
) -> None:
    refusal = statistics.false_refusal_risk(questions, 0.01, score=0.7, discordance=discordance)
    accept = statistics.false_accept_risk(
        questions, 0.01, score=0.7, discordance=discordance, drop=drop
    )
    assert (refusal, accept) == pytest.approx((refused, accepted), abs=0.01)


def test_bare_scores_are_taken_as_independent_without_a_discordance() -> None:
    known = statistics.false_refusal_risk(300, 0.01, score=0.7, discordance=2 * 0.7 * 0.3)
    assert statistics.false_refusal_risk(300, 0.01, score=0.7) == known


def test_a_million_questions_take_no_time() -> None:
    differences = flips(np.random.default_rng(19), 10**6, 0.026, 0.025)
    lost, gained = int((differences > 0).sum()), int((differences < 0).sum())
    started = time.perf_counter()
    counted = compare_binary(lost=lost, gained=gained, questions=10**6, margin=0.01)
    mean = compare_means(differences, 0.01)
    assert time.perf_counter() - started < 2
    assert mean.upper == pytest.approx(counted.upper, abs=1e-5)


def test_names_become_numbers_and_values_quantiles() -> None:
    assert statistics.labels(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]
    assert statistics.quantiles([1, 2, 3, 4, 5], [0.0, 0.5, 1.0]) == [1.0, 3.0, 5.0]


def test_choice_changes_are_scipy_s_divergences() -> None:
    baseline, candidate = [[-1.0, -2.0, -800.0], [-3.0, -3.0]], [[-2.0, -1.5, -801.0], [-3.0, -3.0]]
    divergences, shifts = statistics.choice_changes(baseline, candidate)
    expected = [
        stats.entropy(special.softmax(before), special.softmax(after))
        for before, after in zip(baseline, candidate, strict=True)
    ]
    assert divergences == pytest.approx(expected, abs=1e-12)
    assert shifts == pytest.approx([(-1.0 + 0.5 - 1.0) / 3, 0.0])
