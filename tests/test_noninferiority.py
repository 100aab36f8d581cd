"""The comparison of samples: what passes, fails, is undecided, or is no evidence at all."""

from __future__ import annotations

import copy
import importlib.resources
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gates
from gates import evaluate_noninferiority, evaluate_output_lengths
from gates.evidence import EvidenceError, shown
from gates.samples import parse_samples

NAN, INF, HUGE = math.nan, math.inf, 10**400

Document = dict[str, Any]


def schema(name: str) -> Any:
    text = importlib.resources.files(gates).joinpath(f"schemas/{name}.json").read_text("utf-8")
    return jsonschema_rs.validator_for(text)


VERDICT, SAMPLES = schema("verdict"), schema("samples")


def task(scores: list[Any], **fields: Any) -> Document:
    return {
        "metric": "acc",
        "scale": 1.0,
        "higher_is_better": True,
        "questions": [f"{n}:doc:prompt" for n in range(len(scores))],
        "scores": scores,
        **fields,
    }


def document(**tasks: Document) -> Document:
    return {"tasks": tasks}


def sides(
    questions: int, *, lost: int = 0, gained: int = 0, **fields: Any
) -> tuple[Document, Document]:
    """Two sides of a task ``t`` that answer half of the rest right."""
    same = [n % 2 for n in range(questions - lost - gained)]
    return (
        document(t=task([1] * lost + [0] * gained + same, **fields)),
        document(t=task([0] * lost + [1] * gained + same, **fields)),
    )


def assert_document(verdict: gates.Verdict) -> None:
    """Require a verdict of plain values: the validator knows none of numpy's."""
    VERDICT.validate(verdict.document())
    json.dumps(verdict.document(), allow_nan=False)


def judged(*documents: Document, **options: Any) -> gates.Verdict:
    verdict = evaluate_noninferiority(*documents, **options)
    assert_document(verdict)
    return verdict


def changed(value: Document, **fields: Any) -> Document:
    return document(t=value["tasks"]["t"] | fields)


@pytest.mark.parametrize(
    ("counts", "options", "ends"),
    [
        pytest.param((299, 0, 0), {}, "ACCEPT", id="no-difference-enough"),
        pytest.param((298, 0, 0), {}, "INSUFFICIENT_EVIDENCE", id="no-difference-too-few"),
        pytest.param((10, 0, 0), {}, "INSUFFICIENT_EVIDENCE", id="ten-identical-answers"),
        pytest.param((1, 0, 0), {}, "INSUFFICIENT_EVIDENCE", id="one-question"),
        pytest.param((6000, 100, 100), {}, "ACCEPT", id="lossless"),
        pytest.param((6000, 150, 100), {}, "INSUFFICIENT_EVIDENCE", id="near-the-margin"),
        pytest.param((6000, 300, 100), {}, "ACCURACY_REGRESSION", id="worse"),
        pytest.param((100, 3, 0), {}, "INSUFFICIENT_EVIDENCE", id="three-of-a-hundred"),
        pytest.param((100, 20, 0), {}, "ACCURACY_REGRESSION", id="twenty-of-a-hundred"),
        pytest.param((100, 3, 0), {"threshold": 0.1}, "ACCEPT", id="wider-margin"),
        pytest.param((6000, 0, 200), {}, "ACCEPT", id="better"),
        pytest.param((6000, 0, 600), {}, "IMPLAUSIBLE_SCORE", id="better-than-can-be"),
        pytest.param((20, 0, 3), {}, "INSUFFICIENT_EVIDENCE", id="large-gain-by-chance"),
        pytest.param((1000, 0, 0), {"threshold": 0}, "INSUFFICIENT_EVIDENCE", id="no-margin"),
        pytest.param((4000, 20, 20), {"sequential": True}, "ACCEPT", id="sequence-lossless"),
        pytest.param((50, 0, 0), {"sequential": True}, "INSUFFICIENT_EVIDENCE", id="sequence-few"),
    ],
)
def test_decisions(counts: tuple[int, int, int], options: dict[str, Any], ends: str) -> None:
    questions, lost, gained = counts
    documents = sides(questions, lost=lost, gained=gained)
    if options.get("sequential"):
        documents = shuffled(documents)
    verdict = judged(*documents, **options)
    if ends == "ACCEPT":
        assert (verdict.decision, verdict.failure_class, verdict.passed) == (ends, None, True)
        return
    assert verdict.failure_class == ends
    assert verdict.decision == ("REGRESSION" if ends == "ACCURACY_REGRESSION" else "ANOMALOUS")
    assert not verdict.passed


def shuffled(documents: tuple[Document, Document]) -> tuple[Document, Document]:
    """Return the questions in a random order, as a growing batch asks them."""
    order = list(range(len(documents[0]["tasks"]["t"]["scores"])))
    random.Random(7).shuffle(order)
    first, second = (
        changed(each, scores=[each["tasks"]["t"]["scores"][n] for n in order]) for each in documents
    )
    return first, second


CLUSTERED = [f"c{n // 100}" for n in range(2000)]


@pytest.mark.parametrize(
    ("documents", "options", "words"),
    [
        pytest.param(
            sides(2000, lost=20, gained=5, clusters=["a"] * 2000),
            {},
            "about 596,000 more questions, in further clusters, for 80 % power",
            id="one-cluster",
        ),
        pytest.param(
            sides(2000, lost=20, gained=20, clusters=CLUSTERED),
            {},
            "more questions, in further clusters, for 80 % power",
            id="few-clusters",
        ),
        pytest.param(
            sides(10), {"sequential": True}, "about 588 more questions for", id="stopping-anywhere"
        ),
        pytest.param(
            sides(200, lost=1, sampled=True, size=200),
            {},
            "has 0 more; ask each question twice to learn",
            id="one-sampled-answer",
        ),
    ],
)
def test_advice_is_what_would_help(
    documents: tuple[Document, Document], options: dict[str, Any], words: str
) -> None:
    assert words in judged(*documents, **options).detail


@pytest.mark.parametrize("higher", [True, False])
def test_a_baseline_that_can_lose_nothing_is_noted(higher: bool) -> None:
    worst = document(t=task([0 if higher else 1] * 400, higher_is_better=higher))
    assert "a pass shows nothing" in judged(worst, worst).notes[0]
    best = document(t=task([1 if higher else 0] * 400, higher_is_better=higher))
    assert judged(best, best).notes == ()


def test_peeking_at_clusters_counts_them_before_one_comes_back() -> None:
    labels = [f"c{n}" for n in range(199)]
    row = judged(*sides(199, clusters=labels), sequential=True).per_task["t"]
    assert (row["method"], row["p_within"]) == ("cluster", 1.0)


def flipped(value: Document, scale: float = 1.0) -> Document:
    """Return the scores as errors, of which fewer are better."""
    scores = [scale - score * scale for score in value["tasks"]["t"]["scores"]]
    return changed(value, scores=scores, higher_is_better=False, scale=scale)


def in_percent(value: Document) -> Document:
    scores = [score * 100 for score in value["tasks"]["t"]["scores"]]
    return changed(value, scores=scores, scale=100)


def as_one_repeat(value: Document) -> Document:
    return changed(value, scores=[[score] for score in value["tasks"]["t"]["scores"]])


def as_truth(value: Document) -> Document:
    return changed(value, scores=[score == 1 for score in value["tasks"]["t"]["scores"]])


@pytest.mark.parametrize("form", [flipped, in_percent, as_one_repeat, as_truth])
@pytest.mark.parametrize("lost", [0, 5, 40])
def test_the_form_of_scores_changes_no_answer(
    form: Callable[[Document], Document], lost: int
) -> None:
    plain = sides(500, lost=lost, gained=5)
    expected, other = judged(*plain), judged(*map(form, plain))
    assert (other.decision, other.failure_class) == (expected.decision, expected.failure_class)
    rows = expected.per_task["t"], other.per_task["t"]
    for name in ("drop_fraction", "lost", "gained", "p_within", "p_worse", "method", "outcome"):
        assert rows[0][name] == pytest.approx(rows[1][name]), name


def test_the_order_of_questions_does_not_matter() -> None:
    baseline, candidate = sides(400, lost=9, gained=4)
    entry = candidate["tasks"]["t"]
    turned = changed(candidate, questions=entry["questions"][::-1], scores=entry["scores"][::-1])
    assert judged(baseline, turned).document() == judged(baseline, candidate).document()


def without_questions(value: Document, kept: slice) -> Document:
    entry = value["tasks"]["t"]
    return changed(value, questions=entry["questions"][kept], scores=entry["scores"][kept])


SAME = sides(1000)[0]


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        pytest.param(
            without_questions(SAME, slice(12)), "988 on the baseline's side only", id="12-survive"
        ),
        pytest.param(
            without_questions(SAME, slice(999)),
            "1 on the baseline's side only ('999:doc:prompt')",
            id="one-lost",
        ),
        pytest.param(
            changed(SAME, questions=[f"{n}:doc:other" for n in range(1000)]),
            "1000 on the candidate's side only ('0:doc:other', '1:doc:other', '2:doc:other', ...)",
            id="other-prompts",
        ),
        pytest.param(document(u=SAME["tasks"]["t"]), "['t', 'u']", id="no-common-task"),
        pytest.param(
            document(t=SAME["tasks"]["t"], u=SAME["tasks"]["t"]), "['u']", id="one-sided-task"
        ),
        pytest.param({"tasks": {}}, "['t']", id="no-task"),
    ],
)
def test_what_is_not_on_both_sides_is_never_left_out(candidate: Document, words: str) -> None:
    for pair in ((SAME, candidate), (candidate, SAME)):
        verdict = judged(*pair)
        assert verdict.decision == "ANOMALOUS"
        assert verdict.failure_class == "SAMPLE_ACCOUNTING_FAILED"
    assert words in judged(SAME, candidate).detail


@pytest.mark.parametrize(
    ("fields", "failure_class", "words"),
    [
        ({"metric": "acc_norm"}, "CONDITIONS_DIFFER", "metric ('acc' and 'acc_norm')"),
        ({"filter": "strict"}, "CONDITIONS_DIFFER", "filter ('none' and 'strict')"),
        ({"aggregation": "perplexity"}, "CONDITIONS_DIFFER", "aggregation"),
        ({"sampled": True}, "CONDITIONS_DIFFER", "sampled (false and true)"),
        ({"clusters": ["a"] * 1000}, "CONDITIONS_DIFFER", "clusters (absent and a list"),
        ({"scale": 100}, "IMPLAUSIBLE_SCORE", "counts to 1 and the candidate to 100"),
        ({"scores": [1.5] * 1000}, "IMPLAUSIBLE_SCORE", "outside its scale of 0 to 1"),
        ({"scores": [-1] + [1] * 999}, "IMPLAUSIBLE_SCORE", "question '0:doc:prompt'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sides_that_cannot_be_compared(fields: Document, failure_class: str, words: str) -> None:
    verdict = judged(SAME, changed(SAME, **fields))
    assert (verdict.decision, verdict.failure_class) == ("ANOMALOUS", failure_class)
    assert words in verdict.detail
    assert verdict.per_task["t"]["outcome"] == "anomalous"


@pytest.mark.parametrize("scales", [{"t": 100}, {"t": 1}], ids=["percent", "fraction"])
def test_a_fraction_beside_a_percentage_is_not_compared(scales: Document) -> None:
    percent = document(t=task([100] * 57 + [0] * 43, scale=None))
    fraction = document(t=task([1] * 57 + [0] * 43, scale=None))
    for pair in ((percent, fraction), (fraction, percent)):
        verdict = judged(*pair, scales=scales)
        assert verdict.failure_class == "IMPLAUSIBLE_SCORE"


def nats(count: int, value: float = -30.0, **fields: Any) -> Document:
    """Log-likelihoods of documents that vary, in nats."""
    spread = random.Random(3)
    scores = [value + spread.gauss(0, 4) for _ in range(count)]
    default = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "scale": None}
    entry = task(scores, weights=[10.0 + n % 5 for n in range(count)])
    return document(t=entry | default | {"higher_is_better": False} | fields)


def shifted(value: Document, by: float, spread: float = 0.05) -> Document:
    noise = random.Random(4)
    scores = [score + by + noise.gauss(0, spread) for score in value["tasks"]["t"]["scores"]]
    return changed(value, scores=scores)


@pytest.mark.parametrize("aggregation", ["weighted_perplexity", "bits_per_byte", "perplexity"])
@pytest.mark.parametrize(
    ("count", "by", "ends"),
    [
        (200, -0.01, None),
        (200, -1.0, "ACCURACY_REGRESSION"),
        (29, -0.01, "INSUFFICIENT_EVIDENCE"),
        (200, 4.0, "IMPLAUSIBLE_SCORE"),
    ],
    ids=["kept", "worse", "few-documents", "much-better"],
)
def test_perplexities_are_compared_by_their_logarithm(
    aggregation: str, count: int, by: float, ends: str | None
) -> None:
    baseline = nats(count, aggregation=aggregation)
    verdict = judged(baseline, shifted(baseline, by), relative=True)
    assert verdict.failure_class == ends
    if ends in (None, "ACCURACY_REGRESSION"):
        row = verdict.per_task["t"]
        assert row["method"] == "ratio"
        assert row["drop"] == pytest.approx(row["candidate"] - row["baseline"])
        assert row["limit"] == pytest.approx(0.01 * row["baseline"])


def test_bits_per_byte_are_bits() -> None:
    baseline = document(
        t=task([-math.log(2) * 8] * 40, aggregation="bits_per_byte", weights=[8] * 40)
        | {"scale": None, "higher_is_better": False}
    )
    assert judged(baseline, shifted(baseline, 0.0), relative=True).per_task["t"][
        "baseline"
    ] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        pytest.param({"scale": None}, {}, "tasks.t: has a metric without a known full", id="scale"),
        pytest.param({"aggregation": "f1"}, {}, "--rule threshold", id="corpus-f1"),
        pytest.param({"aggregation": "bleu"}, {}, "--rule threshold", id="bleu"),
        pytest.param(
            {"aggregation": "perplexity"}, {"relative": True}, "the contrary", id="upwards"
        ),
        pytest.param(
            {"aggregation": "perplexity", "higher_is_better": None},
            {},
            "give --relative",
            id="perplexity-absolute",
        ),
        pytest.param(
            {"aggregation": "perplexity", "higher_is_better": None},
            {"relative": True, "sequential": True},
            "without --until-decided",
            id="perplexity-in-sequence",
        ),
        pytest.param(
            {"aggregation": "bits_per_byte", "higher_is_better": None},
            {"relative": True},
            "needs weights",
            id="no-weights",
        ),
        pytest.param({}, {"directions": {"t": False}}, "do not agree", id="direction"),
        pytest.param({}, {"directions": {"u": False}}, "directions.u", id="direction-no-task"),
        pytest.param({}, {"scales": {"u": 1}}, "scales.u", id="scale-no-task"),
        pytest.param({}, {"sizes": {"u": 1}}, "sizes.u", id="size-no-task"),
        pytest.param({}, {"sizes": {"t": 10}}, "sizes.t: is 10, but 1000", id="size-too-small"),
        pytest.param({}, {"threshold": 1}, "threshold: must be under 1", id="threshold-1"),
        pytest.param({}, {"threshold": NAN}, "threshold", id="threshold-nan"),
        pytest.param({}, {"relative": 1}, "relative", id="relative-number"),
        pytest.param({}, {"sequential": "no"}, "sequential", id="sequential-text"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    fields: Document, options: dict[str, Any], words: str
) -> None:
    verdict = judged(changed(SAME, **fields), changed(SAME, **fields), **options)
    assert (verdict.decision, verdict.failure_class) == (None, "USER_CONFIG_ERROR")
    assert words in verdict.detail


def test_sides_that_disagree_on_the_direction_are_refused() -> None:
    verdict = judged(SAME, changed(SAME, higher_is_better=False))
    assert verdict.failure_class == "USER_CONFIG_ERROR"


def test_relative_margins_take_the_baseline_as_fixed() -> None:
    documents = sides(2000, lost=10, gained=10)
    row = judged(*documents, relative=True, threshold=0.02).per_task["t"]
    assert row["limit"] == pytest.approx(0.02 * row["baseline"])
    nothing = document(t=task([0] * 500))
    assert judged(nothing, nothing, relative=True).failure_class == "IMPLAUSIBLE_SCORE"


def test_many_tasks_do_not_fail_one_by_accident() -> None:
    """A drop that one task alone would fail on is no failure among twenty."""
    one = sides(1000, lost=36, gained=12)
    assert judged(*one).failure_class == "ACCURACY_REGRESSION"
    others = {f"u{n}": SAME["tasks"]["t"] for n in range(19)}
    many = [document(t=side["tasks"]["t"], **others) for side in one]
    verdict = judged(*many)
    row = verdict.per_task["t"]
    assert verdict.failure_class == "INSUFFICIENT_EVIDENCE"
    assert row["p_worse"] <= 0.05 < row["p_worse_adjusted"]
    assert verdict.detail.startswith(
        "19 pass, 1 undecided (t) of 20 task(s) at a margin of 1 point; "
    )


def test_a_failure_is_a_regression_though_others_are_undecided() -> None:
    bad, open_one = sides(1000, lost=100), sides(100, lost=2)
    pair = [document(a=bad[n]["tasks"]["t"], b=open_one[n]["tasks"]["t"]) for n in (0, 1)]
    verdict = judged(*pair)
    assert verdict.decision == "REGRESSION"
    assert "a: failed" in verdict.detail and "b: undecided" in verdict.detail


def test_an_anomaly_comes_before_a_failure() -> None:
    bad = sides(1000, lost=100)
    pair = [
        document(a=bad[0]["tasks"]["t"], b=SAME["tasks"]["t"]),
        document(a=bad[1]["tasks"]["t"], b=without_questions(SAME, slice(5))["tasks"]["t"]),
    ]
    assert judged(*pair).failure_class == "SAMPLE_ACCOUNTING_FAILED"


def test_repeats_are_averaged_and_may_differ_in_number() -> None:
    baseline, candidate = sides(800, lost=4, gained=4)
    scores = [[score] * 4 for score in baseline["tasks"]["t"]["scores"]]
    verdict = judged(changed(baseline, scores=scores), candidate)
    assert verdict.passed
    assert verdict.per_task["t"]["method"] == "t"
    assert "4 answer(s) to each question of the baseline, 1 of" in verdict.notes[0]


def test_clusters_widen_the_interval() -> None:
    documents = sides(2000, lost=40, gained=40)
    labels = [f"story {n // 20}" for n in range(2000)]
    alone = judged(*documents).per_task["t"]
    verdict = judged(*(changed(each, clusters=labels) for each in documents))
    row = verdict.per_task["t"]
    assert (row["clusters"], row["method"]) == (100, "cluster")
    assert row["drop_upper"] > alone["drop_upper"]
    single = judged(*(changed(each, clusters=[str(n) for n in range(2000)]) for each in documents))
    assert single.per_task["t"]["clusters"] is None
    assert judged(*(changed(each, clusters=["one"] * 2000) for each in documents)).decision != (
        "ACCEPT"
    )


@pytest.mark.parametrize(
    ("size", "too_small", "words"),
    [
        (None, False, "would need about 2,4"),
        (50_000, False, "the benchmark has 49,"),
        (400, True, "the benchmark has 0 more: it is too small for this margin"),
    ],
    ids=["unknown", "large", "all-asked"],
)
def test_undecided_tasks_say_what_would_decide_them(
    size: int | None, too_small: bool, words: str
) -> None:
    documents = sides(400, lost=10, gained=8)
    verdict = judged(*documents, sizes={"t": size} if size else None)
    needed = verdict.per_task["t"]["needed"]
    assert needed["benchmark_too_small"] is too_small
    assert 2000 < needed["more_questions_if_lossless"] < 3000
    assert needed["more_questions_at_observed"] > needed["more_questions_if_lossless"]
    assert words in verdict.detail


def test_repeats_can_stand_in_for_questions() -> None:
    spread = random.Random(5)
    chances = [spread.random() for _ in range(600)]
    pair = [
        document(
            t=task(
                [[int(spread.random() < chance) for _ in range(4)] for chance in chances],
                sampled=True,
                size=600,
            )
        )
        for _ in range(2)
    ]
    needed = judged(*pair, threshold=0.02).per_task["t"]["needed"]
    assert needed["benchmark_too_small"] is False
    assert 0 < needed["more_repeats"] <= 60


def test_more_questions_would_decide() -> None:
    """The number that an undecided task is given decides about four lossless candidates in five."""
    need = judged(*sides(400, lost=20, gained=20)).per_task["t"]["needed"]
    total = 400 + need["more_questions_if_lossless"]
    chances = random.Random(11)
    passed = 0
    for _ in range(200):
        lost = sum(chances.random() < 0.05 for _ in range(total))
        gained = sum(chances.random() < 0.05 for _ in range(total))
        passed += judged(*sides(total, lost=lost, gained=gained)).passed
    assert 0.7 < passed / 200 < 0.95


def answered(
    questions: int, kind: str, *, differing: int = 0, characters: float | None = None
) -> tuple[Document, Document]:
    first, second = sides(questions)
    digests = [f"digest {n}" for n in range(questions)]
    fields = {"answer_kind": kind, "mean_answer_characters": characters}
    other = [f"other {n}" for n in range(differing)] + digests[differing:]
    return changed(first, answers=digests, **fields), changed(second, answers=other, **fields)


@pytest.mark.parametrize(
    ("pair", "replayed"),
    [
        pytest.param(answered(10, "loglikelihood"), True, id="loglikelihood"),
        pytest.param(answered(9, "loglikelihood"), False, id="loglikelihood-few"),
        pytest.param(answered(500, "loglikelihood", differing=1), True, id="one-differs"),
        pytest.param(answered(500, "loglikelihood", differing=50), True, id="a-tenth-differs"),
        pytest.param(answered(500, "loglikelihood", differing=51), False, id="more-differ"),
        pytest.param(answered(30, "text", characters=200), True, id="long-texts"),
        pytest.param(answered(29, "text", characters=200), False, id="long-texts-few"),
        pytest.param(answered(30, "text", characters=199), False, id="short-texts"),
        pytest.param(answered(1000, "text", characters=3), False, id="letters"),
        pytest.param(answered(1000, "text"), False, id="length-unknown"),
    ],
)
def test_replayed_answers(pair: tuple[Document, Document], replayed: bool) -> None:
    verdict = judged(*pair)
    assert (verdict.failure_class == "ANSWERS_REPLAYED") is replayed
    named = [side | {"checkpoint": "sha256:1"} for side in pair]
    again = judged(*named)
    assert again.failure_class != "ANSWERS_REPLAYED"
    assert "checkpoint sha256:1" in again.notes[0]


def test_a_suite_of_short_answers_without_any_difference_is_a_replay() -> None:
    few, many = answered(400, "text", characters=1), answered(600, "text", characters=1)
    pair = [document(a=few[n]["tasks"]["t"], b=many[n]["tasks"]["t"]) for n in (0, 1)]
    verdict = judged(*pair)
    assert verdict.failure_class == "ANSWERS_REPLAYED"
    pair[1]["tasks"]["b"] = answered(600, "text", differing=1)[1]["tasks"]["t"]
    verdict = judged(*pair)
    assert verdict.passed
    assert verdict.notes[0].startswith("a: all 400 answers are the same on both sides")


def test_log_likelihoods_alone_show_a_replay() -> None:
    texts = nats(20)
    assert judged(texts, texts, relative=True).failure_class == "ANSWERS_REPLAYED"
    first = changed(sides(300)[0], choice_logprobs=[[-1.0, -2.0]] * 300)
    assert judged(first, first).failure_class == "ANSWERS_REPLAYED"


def test_what_stands_beside_accuracy() -> None:
    first, second = sides(1000, lost=6, gained=4)
    rows = [[-1.0, -2.0, -3.0]] * 1000
    moved = [[-1.1, -2.1, -3.1]] * 999 + [[-3.0, -2.0, -1.0]]
    lengths = [100 + n % 7 for n in range(1000)]
    pair = (
        changed(first, choice_logprobs=rows, lengths=lengths, answers=["a"] * 1000),
        changed(
            second,
            choice_logprobs=moved,
            lengths=[length * 1.02 for length in lengths],
            answers=["a"] * 980 + ["b"] * 20,
        ),
    )
    beside = judged(*pair).per_task["t"]["beside"]
    assert beside["agreement"]["rate"] == 0.99
    assert beside["lost"]["rate"] == 0.006
    assert beside["gained"]["lower"] < 0.004 < beside["gained"]["upper"]
    assert beside["changed_answers"]["rate"] == 0.001  # of the choices, not of their digests
    assert beside["mcnemar_p"] == pytest.approx(0.7539, abs=1e-4)
    assert beside["length"]["change"] == pytest.approx(0.02)
    assert beside["length"]["baseline_quantiles"] == [100, 103, 106]
    softmax = [math.exp(-n) / sum(math.exp(-m) for m in (1, 2, 3)) for n in (1, 2, 3)]
    divergence = sum(p * math.log(p / q) for p, q in zip(softmax, softmax[::-1], strict=True))
    assert beside["kl"]["mean"] == pytest.approx(divergence / 1000)
    assert beside["logprob_shift"]["mean"] == pytest.approx(-0.0999)
    assert judged(first, second).per_task["t"]["beside"]["kl"] is None


def test_other_numbers_of_choices_are_other_questions() -> None:
    first, second = sides(10)
    verdict = judged(
        changed(first, choice_logprobs=[[-1.0]] * 10),
        changed(second, choice_logprobs=[[-1.0, -2.0]] * 10),
    )
    assert verdict.failure_class == "CONDITIONS_DIFFER"


@given(
    counts=st.tuples(st.integers(1, 60), st.integers(0, 30), st.integers(0, 30)),
    threshold=st.sampled_from([0.01, 0.05, 0.2]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_swapping_the_sides_flips_the_sign(counts: tuple[int, int, int], threshold: float) -> None:
    same, lost, gained = counts
    pair = sides(same + lost + gained, lost=lost, gained=gained)
    there = judged(*pair, threshold=threshold).per_task["t"]
    back = judged(*pair[::-1], threshold=threshold).per_task["t"]
    if "anomalous" in (there["outcome"], back["outcome"]):
        return
    assert there["drop"] == pytest.approx(-back["drop"])
    assert (there["lost"], there["gained"]) == (back["gained"], back["lost"])
    assert {there["outcome"], back["outcome"]} != {"fail"}


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_other_questions_are_never_accepted(data: st.DataObject) -> None:
    keys = st.lists(st.integers(0, 400), min_size=1, max_size=400, unique=True)
    drawn = data.draw(keys), data.draw(keys)
    pair = [
        document(t=task([1] * len(side)) | {"questions": [str(key) for key in side]})
        for side in drawn
    ]
    verdict = judged(*pair, threshold=0.5)
    if set(drawn[0]) != set(drawn[1]):
        assert verdict.failure_class == "SAMPLE_ACCOUNTING_FAILED"


FULL = task(
    [[1, 0], [0, 0], [1, 1]],
    filter="none",
    aggregation="mean",
    sampled=True,
    size=10,
    clusters=["a", "a", "b"],
    weights=[1, 2, 3],
    lengths=[10, 20.5, 30],
    answers=["x", "y", "z"],
    answer_kind="text",
    mean_answer_characters=12.5,
    choice_logprobs=[[-1.0, -2.0]] * 3,
)


def test_a_whole_document_is_read() -> None:
    whole = document(t=FULL) | {"checkpoint": "sha256:1"}
    SAMPLES.validate(whole)
    read = parse_samples(whole, "")["t"]
    assert (read.scores, read.repeats) == ((0.5, 0.0, 1.0), 2)
    assert read.per_repeat == ((1, 0), (0, 0), (1, 1))
    assert judged(whole, copy.deepcopy(whole)).failure_class == "INSUFFICIENT_EVIDENCE"


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        pytest.param({"questions": []}, "questions", id="no-question"),
        pytest.param({"questions": ["a", "b", "a"]}, "questions[2]", id="question-twice"),
        pytest.param({"questions": ["a", "b", 3]}, "questions[2]", id="question-number"),
        pytest.param({"questions": "abc"}, "questions", id="questions-text"),
        pytest.param({"scores": [1, 1]}, "scores", id="score-missing"),
        pytest.param({"scores": [1, 1, 1, 1]}, "scores", id="score-too-many"),
        pytest.param({"scores": [1, NAN, 1]}, "scores[1]", id="score-nan"),
        pytest.param({"scores": [1, 1, INF]}, "scores[2]", id="score-infinite"),
        pytest.param({"scores": [1, HUGE, 1]}, "scores[1]", id="score-400-digits"),
        pytest.param({"scores": [1, "1", 1]}, "scores[1]", id="score-text"),
        pytest.param({"scores": [1, None, 1]}, "scores[1]", id="score-null"),
        pytest.param({"scores": [1, [1], 1]}, "scores[1]", id="score-sometimes-a-list"),
        pytest.param({"scores": [[1], [1, 0], [1]]}, "scores[1]", id="repeats-unequal"),
        pytest.param({"scores": [[1], 1, [1]]}, "scores[1]", id="repeats-sometimes"),
        pytest.param({"scores": [[], [], []]}, "scores[0]", id="no-repeat"),
        pytest.param({"scores": [[1], [NAN], [1]]}, "scores[1][0]", id="repeat-nan"),
        pytest.param({"scores": [[[1]], [[1]], [[1]]]}, "scores[0][0]", id="repeats-nested"),
        pytest.param({"clusters": ["a", "b"]}, "clusters", id="cluster-missing"),
        pytest.param({"clusters": [1, 2, 3]}, "clusters[0]", id="cluster-numbers"),
        pytest.param({"weights": [1, 0, 1]}, "weights[1]", id="weight-zero"),
        pytest.param({"weights": [1, True, 1]}, "weights[1]", id="weight-true"),
        pytest.param({"lengths": [1, -1, 1]}, "lengths[1]", id="length-negative"),
        pytest.param({"answers": ["a", "b", None]}, "answers[2]", id="answer-null"),
        pytest.param({"answer_kind": "speech"}, "answer_kind", id="answer-kind"),
        pytest.param({"choice_logprobs": [[-1], [], [-1]]}, "choice_logprobs[1]", id="no-choice"),
        pytest.param({"choice_logprobs": [-1, -1, -1]}, "choice_logprobs[0]", id="choices-flat"),
        pytest.param({"scale": 0}, "scale", id="scale-zero"),
        pytest.param({"scale": True}, "scale", id="scale-true"),
        pytest.param({"size": 2}, "size", id="size-too-small"),
        pytest.param({"size": 3.5}, "size", id="size-half"),
        pytest.param({"metric": None}, "metric", id="metric-null"),
        pytest.param({"higher_is_better": 1}, "higher_is_better", id="direction-number"),
        pytest.param({"sampled": "yes"}, "sampled", id="sampled-text"),
        pytest.param({"cluster": ["a", "b", "c"]}, "cluster", id="misspelt"),
    ],
)
def test_a_field_that_cannot_be_read_is_named(fields: Document, path: str) -> None:
    bad = document(t=FULL | fields)
    with pytest.raises(EvidenceError) as error:
        parse_samples(bad, "side")
    assert error.value.path == f"side.tasks.t.{path}"
    good = document(t=FULL)
    for pair, name in (((bad, good), "baseline"), ((good, bad), "candidate")):
        verdict = judged(*pair)
        assert (verdict.decision, verdict.failure_class) == (None, "USER_CONFIG_ERROR")
        assert verdict.detail.startswith(f"{name}.tasks.t.{path}: ")


@pytest.mark.parametrize("name", ["metric", "questions", "scores"])
def test_a_field_that_must_be_there(name: str) -> None:
    entry = {key: value for key, value in FULL.items() if key != name}
    with pytest.raises(EvidenceError, match=f"tasks.t.{name}: is missing"):
        parse_samples(document(t=entry), "")
    assert list(SAMPLES.iter_errors(document(t=entry)))


ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(HUGE),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(value=ANY_VALUE)
def test_a_hostile_document_never_passes_and_never_raises(value: object) -> None:
    for pair in ((value, document(t=FULL)), (document(t=FULL), value), (value, value)):
        for verdict in (evaluate_noninferiority(*pair), evaluate_output_lengths(*pair)):
            assert not verdict.passed
            assert_document(verdict)


@given(data=st.data())
@settings(deadline=None)
def test_a_document_with_one_hostile_field_never_raises(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FULL)))
    value = data.draw(ANY_VALUE | st.lists(ANY_VALUE, min_size=3, max_size=3))
    bad = document(t=FULL | {name: value})
    options = {"relative": data.draw(st.booleans()), "sequential": data.draw(st.booleans())}
    for pair in ((bad, document(t=FULL)), (bad, bad)):
        judged(*pair, **options)
        evaluate_output_lengths(*pair)


@pytest.mark.parametrize("value", [0, "x", [], {}, None, NAN, {"t": NAN}, {"t": HUGE}], ids=shown)
@pytest.mark.parametrize("option", ["scales", "directions", "sizes", "threshold"])
def test_hostile_options_never_raise(option: str, value: object) -> None:
    judged(SAME, SAME, **{option: value})


def lengthened(
    questions: int, by: float, *, spread: float = 0.0, tasks: int = 1
) -> tuple[Document, Document]:
    noise = random.Random(9)
    before = [200 + noise.gauss(0, 40) for _ in range(questions)]
    after = [length * (1 + by + noise.gauss(0, spread)) for length in before]
    return (
        document(**{f"t{n}": task([1] * questions, lengths=before) for n in range(tasks)}),
        document(**{f"t{n}": task([1] * questions, lengths=after) for n in range(tasks)}),
    )


def lengths_of(
    before: list[float], after: list[float] | None = None, **fields: Any
) -> tuple[Document, Document]:
    return (
        document(t=task([1] * len(before), lengths=before, **fields)),
        document(t=task([1] * len(before), lengths=after or before, **fields)),
    )


@pytest.mark.parametrize(
    ("pair", "failure_class", "words"),
    [
        pytest.param(lengthened(200, 0.0), None, "within 0.05", id="same"),
        pytest.param(lengthened(400, 0.03, spread=0.1), None, "within", id="within"),
        pytest.param(lengthened(400, -0.03, spread=0.1), None, "within", id="within-shorter"),
        pytest.param(lengthened(200, 0.2, spread=0.1), "VERBOSITY_EXCEEDED", "+2", id="longer"),
        pytest.param(lengthened(200, -0.2, spread=0.1), "VERBOSITY_EXCEEDED", "-1", id="shorter"),
        pytest.param(
            lengthened(200, 0.05, spread=0.3), "INSUFFICIENT_EVIDENCE", "undecided", id="at"
        ),
        pytest.param(
            lengthened(60, 0.0, spread=0.25), "INSUFFICIENT_EVIDENCE", "more questions", id="noisy"
        ),
        pytest.param(lengthened(29, 0.0), "INSUFFICIENT_EVIDENCE", "more questions", id="few"),
        pytest.param(lengths_of([1] * 58), "INSUFFICIENT_EVIDENCE", "about 1 more", id="short"),
        pytest.param(lengths_of([1] * 59), None, "within", id="short-enough"),
        pytest.param(
            lengths_of([100] * 2000, [105] * 2000), "INSUFFICIENT_EVIDENCE", "+5.00 %", id="limit"
        ),
        pytest.param(
            lengths_of([50] * 299 + [2000], [50] * 299 + [2000]),
            "INSUFFICIENT_EVIDENCE",
            "more questions",
            id="one-ran-on",
        ),
        pytest.param(
            lengths_of([100] * 300, clusters=["a"] * 300),
            "INSUFFICIENT_EVIDENCE",
            "1 clusters); if the length is unchanged, about 17,222 more questions in further",
            id="one-cluster",
        ),
        pytest.param(
            (document(t=task([1])), document(t=task([1]))),
            "SAMPLE_ACCOUNTING_FAILED",
            "no task had lengths on both sides",
            id="no-lengths",
        ),
        pytest.param(
            (lengthened(100, 0)[0], lengthened(99, 0)[1]),
            "SAMPLE_ACCOUNTING_FAILED",
            "1 on the baseline's side only",
            id="other-questions",
        ),
    ],
)
def test_lengths_are_decided_by_an_interval(
    pair: tuple[Document, Document], failure_class: str | None, words: str
) -> None:
    verdict = evaluate_output_lengths(*pair)
    assert_document(verdict)
    assert verdict.failure_class == failure_class
    assert verdict.passed is (failure_class is None)
    assert words in verdict.detail


@pytest.mark.parametrize("limit", [0.0, 5e-324, 1.0])
def test_any_limit_of_lengths_is_judged(limit: float) -> None:
    verdict = evaluate_output_lengths(*lengthened(100, 0.1, spread=0.1), threshold=limit)
    assert_document(verdict)
    assert verdict.passed is (limit == 1.0)


def test_skewed_lengths_at_the_limit_seldom_fail() -> None:
    drawn = random.Random(21)
    failed = 0
    for _ in range(300):
        before = [drawn.lognormvariate(5, 0.7) for _ in range(60)]
        after = [0.95 * length * drawn.lognormvariate(-0.32, 0.8) for length in before]
        verdict = evaluate_output_lengths(*lengths_of(before, after))
        failed += verdict.failure_class == "VERBOSITY_EXCEEDED"
    assert failed <= 300 * 0.05 + 2.5 * math.sqrt(300 * 0.05)


def test_lengths_on_one_side_only_are_named() -> None:
    first, second = lengthened(100, 0.0, tasks=2)
    del second["tasks"]["t1"]["lengths"]
    verdict = evaluate_output_lengths(first, second, dropped_tasks={"gone"})
    assert verdict.passed
    assert verdict.not_comparable == ("t1",)
    assert "NOT MEASURED: ['t1']" in verdict.detail
    assert "DROPPED BEFORE COMPARISON: ['gone']" in verdict.detail


def test_a_failure_in_length_allows_for_the_number_of_tasks() -> None:
    alone = lengthened(400, 0.07, spread=0.21)
    assert evaluate_output_lengths(*alone).failure_class == "VERBOSITY_EXCEEDED"
    many = lengthened(400, 0.07, spread=0.21, tasks=40)
    assert evaluate_output_lengths(*many).failure_class == "INSUFFICIENT_EVIDENCE"


def test_the_example_of_the_page_is_read() -> None:
    page = Path(__file__).parent.parent / "docs" / "comparing.md"
    example = page.read_text(encoding="utf-8").partition("```json\n")[2].partition("```")[0]
    SAMPLES.validate(json.loads(example))
    assert judged(json.loads(example), json.loads(example)).per_task["gsm8k"]["clusters"] == 2
