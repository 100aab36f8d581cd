"""Two sides of a task, question by question: the same ones, or no comparison at all.

Questions are matched by key and never intersected: when 988 of 1,000 answers are lost, the twelve
that survived say nothing of the candidate. Whatever makes a difference of scores meaningless (other
questions, metrics, units, texts) is an anomaly of its task; what a task's metric cannot be asked at
all is refused with :class:`EvidenceError`, because it is known before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import islice
from operator import gt, lt, sub

from gates.evidence import EvidenceError, join, shown
from gates.samples import TaskSamples
from gates.scores import Scale, units_differ
from gates.verdict import FailureClass

_EXAMPLES = 3

_ROUNDING = 1e-10
"""Share of the scale by which the mean of repeats may exceed it for want of exact decimals."""


class Kind(StrEnum):
    """What a task's score is of its questions' scores. Every other aggregation is refused."""

    MEAN = "mean"
    PERPLEXITY = "perplexity"
    BITS = "bits_per_byte"


_KINDS = {
    "mean": Kind.MEAN,
    "perplexity": Kind.PERPLEXITY,
    "weighted_perplexity": Kind.PERPLEXITY,
    "bits_per_byte": Kind.BITS,
}

_WEIGHTED = ("weighted_perplexity", "bits_per_byte")

_MUST_AGREE = ("metric", "filter", "aggregation", "sampled", "clusters", "weights")
"""What both sides must have alike, where the scores of one question would else mean two things."""


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """Why the difference between two sides of a task is not one between two checkpoints."""

    failure_class: FailureClass
    detail: str


@dataclass(frozen=True)
class Pair:
    """Both sides of one task, with the same questions in the order that the baseline was asked.

    ``full`` is the full score of a mean, and nothing for perplexities. ``size`` counts the
    questions of the whole benchmark, where it is known.
    """

    task: str
    kind: Kind
    baseline: TaskSamples
    candidate: TaskSamples
    higher_is_better: bool
    full: float | None
    size: int | None

    @property
    def questions(self) -> int:
        """Return how many questions were asked."""
        return len(self.baseline.questions)

    @property
    def clusters(self) -> tuple[str, ...] | None:
        """Return the cluster of each question, unless every question stands on its own."""
        labels = self.baseline.clusters
        return labels if labels and self.cluster_count < len(labels) else None

    @cached_property
    def cluster_count(self) -> int:
        """Return how many clusters there are; as many as questions where none are named."""
        return len(set(self.baseline.clusters or self.baseline.questions))

    @cached_property
    def losses(self) -> list[float]:
        """Return how much worse the candidate did on each question.

        As a fraction of the full score for means, in nats for perplexities.
        """
        first, second = self._sides if self._counts_up else self._sides[::-1]
        full = self.full or 1.0
        losses = map(sub, first, second)
        return list(losses) if full == 1.0 else [loss / full for loss in losses]

    @cached_property
    def lost(self) -> int:
        """Return on how many questions the candidate did worse."""
        return sum(map(gt if self._counts_up else lt, *self._sides))

    @cached_property
    def gained(self) -> int:
        """Return on how many questions the candidate did better."""
        return sum(map(lt if self._counts_up else gt, *self._sides))

    @cached_property
    def is_binary(self) -> bool:
        """Tell whether every question has one answer a side, fully right or wrong."""
        return (
            self.kind is Kind.MEAN
            and self.baseline.repeats == self.candidate.repeats == 1
            and all(set(scores) <= {0.0, self.full} for scores in self._sides)
        )

    @property
    def _sides(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.baseline.scores, self.candidate.scores

    @property
    def _counts_up(self) -> bool:
        """Tell whether more is better in the scores of single questions."""
        return self.higher_is_better or self.kind is not Kind.MEAN

    @cached_property
    def scores(self) -> tuple[float, float]:
        """Return both sides' score of the whole task, in the metric's own units."""
        return _score(self.kind, self.baseline), _score(self.kind, self.candidate)

    @property
    def most_lost(self) -> float | None:
        """Return the share of the full score that the worst candidate loses, of a mean."""
        if self.full is None:
            return None
        share = self.scores[0] / self.full
        return share if self.higher_is_better else 1.0 - share


def scores_of(tasks: Mapping[str, TaskSamples]) -> dict[str, float]:
    """Return the score of each whole task of one side, in the metric's own units.

    Raises:
        EvidenceError: a task's score does not follow from those of its questions.
    """
    return {name: _score(kind_of(name, task), task) for name, task in tasks.items()}


def _score(kind: Kind, side: TaskSamples) -> float:
    total = math.fsum(side.scores)
    if kind is Kind.MEAN:
        return total / len(side.scores)
    nats = -total / (math.fsum(side.weights) if side.weights else len(side.scores))
    if kind is Kind.BITS:
        return nats / math.log(2)
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def pair(
    task: str,
    baseline: TaskSamples,
    candidate: TaskSamples,
    *,
    scale: float | None,
    higher_is_better: bool | None,
    size: int | None,
) -> Pair | Anomaly:
    """Match two sides of a task; ``scale``, direction and ``size`` are what the caller declared.

    Raises:
        EvidenceError: the metric has no treatment, no known full score or no one direction.
    """
    sides = baseline, candidate
    kind = kind_of(task, baseline)
    higher = _direction(task, kind, sides, higher_is_better)
    full = _full(task, sides, scale) if kind is Kind.MEAN else None
    asked = _size(task, sides, size)
    anomaly = mismatch(task, sides)
    if anomaly:
        return anomaly
    matched = Pair(
        task=task,
        kind=kind,
        baseline=baseline,
        candidate=candidate.ordered_as(baseline.questions),
        higher_is_better=higher,
        full=full,
        size=asked,
    )
    return _difference(matched) or _unbelievable(matched, declared=scale is not None) or matched


_Sides = tuple[TaskSamples, TaskSamples]


def kind_of(task: str, side: TaskSamples) -> Kind:
    """Return what the task's score is of its questions' scores.

    Raises:
        EvidenceError: it is nothing that has a treatment here.
    """
    kind = _KINDS.get(side.aggregation)
    if side.weights is None and side.aggregation in _WEIGHTED:
        raise EvidenceError(
            join("tasks", task),
            f"{side.aggregation} needs weights, the words or bytes of a question",
        )
    if kind is None:
        raise EvidenceError(
            join("tasks", task),
            f"its score is a {shown(side.aggregation)[1:-1]} over the whole benchmark and no mean "
            "over questions, so no interval of its drop is known; compare this run's scores with "
            "--rule threshold, or choose a metric that scores every question",
        )
    return kind


def _direction(task: str, kind: Kind, sides: _Sides, declared: bool | None) -> bool:
    """Return whether a higher score is better: as declared or recorded, by default yes."""
    stated = {declared, sides[0].higher_is_better, sides[1].higher_is_better} - {None}
    natural = kind is Kind.MEAN
    if len(stated) > 1:
        raise EvidenceError(
            join("tasks", task),
            "the samples of both sides and --directions do not agree whether a higher score is "
            "better; correct the one that is wrong",
        )
    if not natural and True in stated:
        raise EvidenceError(
            join("tasks", task), f"a lower {kind} is better, but the contrary is stated"
        )
    return natural if not stated else True in stated


def _full(task: str, sides: _Sides, declared: float | None) -> float:
    full = declared or sides[0].scale or sides[1].scale
    if full is None:
        raise EvidenceError(
            join("tasks", task), "has a metric without a known full score; give --scales"
        )
    return full


def _size(task: str, sides: _Sides, declared: int | None) -> int | None:
    known = [size for size in (declared, *(side.size for side in sides)) if size is not None]
    size = known[0] if known else None
    asked = len(sides[0].questions)
    if size is not None and size < asked:
        raise EvidenceError(join("sizes", task), f"is {size}, but {asked} questions were asked")
    return size


def mismatch(task: str, sides: _Sides) -> Anomaly | None:
    """Return what tells the questions of the sides apart, in number or name."""
    baseline, candidate = (side.questions for side in sides)
    if baseline == candidate:
        return None
    keys = set(baseline), set(candidate)
    alone = [
        f"{len(only)} on the {name}'s side only ({_examples(only, ordered)})"
        for name, only, ordered in (
            ("baseline", keys[0] - keys[1], baseline),
            ("candidate", keys[1] - keys[0], candidate),
        )
        if only
    ]
    if not alone:
        return None
    return Anomaly(
        failure_class=FailureClass.SAMPLE_ACCOUNTING_FAILED,
        detail=f"{task}: {len(baseline)} questions of the baseline and {len(candidate)} of the "
        f"candidate are not the same ones: {', '.join(alone)}; evaluate both sides whole, on the "
        "same questions",
    )


def _examples(keys: Collection[str], ordered: tuple[str, ...]) -> str:
    first = islice((key for key in ordered if key in keys), _EXAMPLES)
    return ", ".join(map(shown, first)) + (", ..." if len(keys) > _EXAMPLES else "")


def _difference(matched: Pair) -> Anomaly | None:
    """Return in what else both sides differ, besides their answers."""
    for name in _MUST_AGREE:
        values = [getattr(side, name) for side in (matched.baseline, matched.candidate)]
        if values[0] != values[1]:
            words = [shown(value) if value is not None else "absent" for value in values]
            what = f"{words[0]} and {words[1]}" if words[0] != words[1] else "not the same"
            return _differs(matched.task, f"{name} ({what})")
    choices = [side.choice_logprobs for side in (matched.baseline, matched.candidate)]
    if choices[0] and choices[1] and list(map(len, choices[0])) != list(map(len, choices[1])):
        return _differs(matched.task, "the number of choices of a question")
    return None


def _differs(task: str, what: str) -> Anomaly:
    return Anomaly(
        failure_class=FailureClass.CONDITIONS_DIFFER,
        detail=f"{task}: both sides differ in {what}",
    )


def _unbelievable(matched: Pair, *, declared: bool) -> Anomaly | None:
    """Return why the scores themselves are not to be believed, or nothing."""
    detail = _odd_perplexity(matched) if matched.full is None else _odd_mean(matched, declared)
    if not detail:
        return None
    return Anomaly(failure_class=FailureClass.IMPLAUSIBLE_SCORE, detail=f"{matched.task}: {detail}")


def _odd_perplexity(matched: Pair) -> str:
    for name, score in zip(("baseline", "candidate"), matched.scores, strict=True):
        if matched.kind is Kind.PERPLEXITY and not 1.0 <= score < math.inf:
            return f"{name} perplexity {score:g} is none; it must be finite and at least 1"
        if matched.kind is Kind.BITS and not 0.0 < score < math.inf:
            return f"{name} has {score:g} bits per byte; they must be finite and above 0"
    return ""


def _odd_mean(matched: Pair, declared: bool) -> str:
    full = matched.full or 0.0
    scales = matched.baseline.scale, matched.candidate.scale
    means = matched.scores
    tops = [max(side.scores) for side in (matched.baseline, matched.candidate)]
    if not declared and None not in scales and scales[0] != scales[1]:
        return (
            f"the baseline counts to {scales[0]:g} and the candidate to {scales[1]:g}; give both "
            "sides in one unit"
        )
    if min(tops) <= 1.0 and units_differ(*means, Scale(full=full, declared=True)):
        return (
            f"{means[0]:g} against {means[1]:g} looks like a percentage beside a fraction; give "
            "both sides in one unit and declare the scale"
        )
    limit = full * (1 + _ROUNDING)
    for name, side in (("baseline", matched.baseline), ("candidate", matched.candidate)):
        for extreme in (min(side.scores), max(side.scores)):
            if not 0.0 <= extreme <= limit:
                question = shown(side.questions[side.scores.index(extreme)])
                return (
                    f"{name} score {extreme:g} of question {question} is outside its scale of 0 to "
                    f"{full:g}"
                )
    return ""
