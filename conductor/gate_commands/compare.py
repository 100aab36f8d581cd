"""``gate_compare``: two sides, first each as a run, then how they were asked, then the scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gates
from conductor.gate_commands.command import make_parser, run_gate, sourced
from conductor.gate_commands.documents import InputError, stated_option
from conductor.gate_commands.sides import Side, read_side
from gates import Verdict
from gates.criteria import LARGEST_GUESSED_SCALE, SCORE_THRESHOLD

NONINFERIORITY, THRESHOLD = "noninferiority", "threshold"


def compare_main(argv: Sequence[str] | None = None) -> int:
    """Ask the gate on candidate scores beside baseline scores."""
    parser = make_parser(
        "gate_compare",
        "Hold a candidate against its baseline, task by task. Where both sides tell what every\n"
        "question was scored, a task passes when its drop is shown to be within the margin;\n"
        "where scores are all there is, when the observed drop is. Directories must hold sound\n"
        "runs that were made alike. Scores in files count upwards unless --directions says\n"
        "otherwise.",
        "gate_compare --baseline out/baseline --candidate out/candidate --threshold 0.02",
    )
    for side in ("baseline", "candidate"):
        parser.add_argument(
            f"--{side}",
            type=Path,
            required=True,
            help=f"{side}: a directory of lm-eval results, or JSON: a samples document "
            '({"tasks": {task: {"questions", "scores", ...}}}) or bare scores ({task: score})',
        )
    parser.add_argument(
        "--rule",
        choices=(NONINFERIORITY, THRESHOLD),
        help="noninferiority: an interval of the drop decides, and says how many questions more "
        "would; threshold: the observed drop alone, chance included (default: noninferiority "
        "where both sides have samples)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=SCORE_THRESHOLD,
        help="largest drop, as a fraction of the task's scale (default %(default)s)",
    )
    parser.add_argument(
        "--relative", action="store_true", help="take the drop as a fraction of the baseline score"
    )
    parser.add_argument("--scales", help="full score per task, as JSON: {task: 1.0}")
    parser.add_argument(
        "--directions",
        help='which score of a task is better, as JSON: {task: "higher" or "lower"}; '
        "a task in score files counts upwards unless it is given",
    )
    parser.add_argument(
        "--questions",
        help="questions behind bare scores, as JSON: {task: 1319}; then the verdict says how "
        "often the threshold rule is wrong",
    )
    parser.add_argument(
        "--clusters",
        help="field of the documents in directories by which questions belong together, as "
        'JSON: {task: "passage_id"}',
    )
    return run_gate("compare", parser, _evaluate_comparison, argv)


def _evaluate_comparison(args: argparse.Namespace) -> Mapping[str, Any]:
    options = _Options(
        scales=stated_option(args.scales, "scales"),
        directions={
            task: value == "higher"
            for task, value in stated_option(args.directions, "directions").items()
        },
        questions=stated_option(args.questions, "questions"),
        threshold=args.threshold,
        relative=args.relative,
    )
    clusters = stated_option(args.clusters, "clusters")
    sides = read_side(args.baseline, clusters), read_side(args.candidate, clusters)
    rule = _rule(args.rule, sides)
    _refuse_other_scales(sides, options.scales)
    runs = [_as_run(side, options.scales) for side in sides]
    for name, side, verdict in zip(("baseline", "candidate"), sides, runs, strict=True):
        if verdict is not None and not verdict.passed:
            detail = f"{name}: {verdict.detail}"
            return sourced(replace(verdict, gate="compare", detail=detail), side.path)
    verdict = _as_conditions(*sides)
    if verdict is not None and not verdict.passed:
        return sourced(replace(verdict, gate="compare"), args.baseline, args.candidate)
    _refuse_upside_down(sides[0])
    verdict = (
        _as_questions(sides, options) if rule == NONINFERIORITY else _as_scores(sides, options)
    )
    notes = (*verdict.notes, *_notes_of_runs(runs), *_untold(*sides))
    return sourced(replace(verdict, notes=notes), args.baseline, args.candidate)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What the command line says of the tasks, and of the margin."""

    scales: Mapping[str, float]
    directions: Mapping[str, bool]
    questions: Mapping[str, int]
    threshold: float
    relative: bool


def _as_questions(sides: tuple[Side, Side], options: _Options) -> Verdict:
    """Ask the gate that decides question by question."""
    if options.questions:
        raise InputError("--questions", "is about bare scores; samples tell it, leave it out")
    from conductor.probes.reading import without_collector

    stated = options.directions
    with without_collector():
        return gates.evaluate_noninferiority(
            sides[0].samples,
            sides[1].samples,
            threshold=options.threshold,
            relative=options.relative,
            scales=options.scales,
            directions=_known_directions(sides, stated) if stated else {},
        )


def _as_scores(sides: tuple[Side, Side], options: _Options) -> Verdict:
    """Ask the gate that holds scores to the threshold."""
    baseline, candidate = sides
    return gates.evaluate_comparison(
        baseline.scores,
        candidate.scores,
        threshold=options.threshold,
        relative=options.relative,
        scales=_known_scales(sides, options),
        directions=_known_directions(sides, options.directions),
        questions={**candidate.questions, **baseline.questions, **options.questions},
    )


def _rule(asked: str | None, sides: tuple[Side, Side]) -> str:
    """Return the rule asked for, or the best that the evidence of both sides allows."""
    without = [side for side in sides if side.samples is None]
    if asked == NONINFERIORITY and without:
        raise InputError(
            str(without[0].path),
            "holds scores alone; --rule noninferiority needs what each question was scored: give "
            "a directory with logs of samples, or a samples document",
        )
    return asked or (THRESHOLD if without else NONINFERIORITY)


def _as_run(side: Side, scales: Mapping[str, float]) -> Verdict | None:
    """Ask the gate on a run, where there is one; a metric without a full score has no upper end."""
    if side.results is None:
        return None
    summary = side.results.run_summary()
    for name, entry in summary["tasks"].items():
        entry["scale"] = scales.get(name, entry.get("scale", sys.float_info.max))
    return gates.evaluate_run(summary)


def _notes_of_runs(runs: Sequence[Verdict | None]) -> Iterator[str]:
    """Return what nobody counted of the runs; what holds for both, once."""
    baseline, candidate = (verdict.notes if verdict else () for verdict in runs)
    for note in dict.fromkeys([*baseline, *candidate]):
        sides = [
            name
            for name, notes in (("baseline", baseline), ("candidate", candidate))
            if note in notes
        ]
        yield f"{' and '.join(sides)}: {note}"


def _as_conditions(baseline: Side, candidate: Side) -> Verdict | None:
    """Ask the gate on conditions, where both sides tell them.

    A task on one side only has no condition to share; comparing its scores refuses it.
    """
    first, second = baseline.results, candidate.results
    if first is None or second is None:
        return None
    alone = tuple(f"tasks.{name}." for name in first.tasks.keys() ^ second.tasks.keys())
    verdict = gates.evaluate_conditions(
        *(
            {name: value for name, value in side.conditions().items() if not name.startswith(alone)}
            for side in (first, second)
        )
    )
    if verdict.passed:
        return verdict
    from conductor.probes.lm_eval import differing_questions

    differing = differing_questions(first, second)
    return replace(verdict, detail="; ".join([verdict.detail, *differing.values()]))


def _refuse_upside_down(side: Side) -> None:
    """Refuse a known metric that counts the wrong way round: the worse score would win."""
    for task in side.results.upside_down() if side.results else ():
        metric = "is the opposite of how this metric counts; correct the task's metric_list"
        raise InputError(f"tasks.{task}.higher_is_better", f"{metric} and evaluate again")


def _untold(baseline: Side, candidate: Side) -> Iterator[str]:
    """Say which conditions could not be compared, because neither side tells them."""
    if baseline.results is None or candidate.results is None:
        return
    unrecorded = [n for n in baseline.results.unrecorded() if n in candidate.results.unrecorded()]
    if unrecorded:
        yield f"not recorded on either side, so not compared: {', '.join(unrecorded)}"
    first, second = baseline.results.places, candidate.results.places
    if first.get("tokenizer") != second.get("tokenizer"):
        names = [side.get("tokenizer", "the model's own") for side in (first, second)]
        yield (
            f"model_args.tokenizer: {names[0]} for the baseline, {names[1]} for the candidate; "
            "nothing in the results tells whether they are the same"
        )
    if first.get("cache") is not None and first.get("cache") == second.get("cache"):
        yield (
            f"config.use_cache: both sides read answers from {first['cache']}, which files them "
            "by prompt and not by model; use one cache for each side, or none"
        )


def _known_directions(sides: tuple[Side, Side], stated: Mapping[str, bool]) -> dict[str, bool]:
    """Return which score is better, as both sides and the options say."""
    directions = {**sides[0].directions, **sides[1].directions}
    for task, higher in stated.items():
        if task not in {*sides[0].scores, *sides[1].scores}:
            raise InputError("--directions", f"{task}: names a task that has no score")
        if directions.get(task, higher) is not higher:
            raise InputError("--directions", f"{task}: the results say the opposite; leave it out")
    return directions | dict(stated)


def _refuse_other_scales(sides: tuple[Side, Side], stated: Mapping[str, float]) -> None:
    """Refuse a full score that is not the one a side declares: the margin would be another."""
    for side in sides:
        for task, scale in side.scales.items():
            if stated.get(task, scale) != scale:
                problem = f"{task}: {side.path} has scores up to {scale:g}; leave it out"
                raise InputError("--scales", problem)


def _known_scales(sides: tuple[Side, Side], options: _Options) -> dict[str, float]:
    """Return full scores; refuse to guess that of a metric that may have none."""
    known = {**sides[0].scales, **sides[1].scales, **options.scales}
    directions = _known_directions(sides, options.directions)
    unknown = {
        *(task for task, higher in directions.items() if not higher),
        *(task for side in sides if side.results or side.samples for task in side.scores),
    }
    for task in sorted(unknown - known.keys()):
        scores = [side.scores.get(task) for side in sides]
        if not options.relative:
            problem = "has a metric without a known full score"
            raise InputError(f"tasks.{task}", f"{problem}; give --scales or --relative")
        if any(
            isinstance(score, (int, float)) and score > LARGEST_GUESSED_SCALE for score in scores
        ):
            problem = f"has a score above {LARGEST_GUESSED_SCALE:g} and no known full score"
            raise InputError(f"tasks.{task}", f"{problem}; give --scales")
    return known
