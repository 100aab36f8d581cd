"""The gates as commands: JSON or a directory in, one JSON verdict out.

Each command reads its input, checks the shape of JSON documents against the schema shipped in
``gates/schemas``, asks the gate, and prints the verdict. Exit codes: 0 the gate passed, 1 it
failed, 2 the input is unusable, 130 stopped by Ctrl-C. Whatever the input, standard output holds
one valid JSON document and there is no traceback. No limit is decided here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, TypeVar

import gates
from gates import EvidenceError, FailureClass, Verdict
from gates.criteria import (
    ANSWER_LIMITS,
    LARGEST_GUESSED_SCALE,
    SCORE_THRESHOLD,
    VERBOSITY_THRESHOLD,
)

if TYPE_CHECKING:
    from conductor.probes.lm_eval import EvaluationResults, TaskResult
    from conductor.probes.servability import Target
    from gates.samples import TaskSamples

LARGEST_DOCUMENT_BYTES = 64 * 2**20
"""Largest JSON input that is read; the largest real summary, with every layer named, is under 1."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of the signal, as shells have it."""

LARGEST_SAMPLES_BYTES = 2 * 2**30
"""Largest samples document that is read: ten million questions with their answers' digests."""

NONINFERIORITY, THRESHOLD = "noninferiority", "threshold"

_Evidence = TypeVar("_Evidence")

_ERRORS_SHOWN = 3
_ERROR_CHARACTERS = 200

_EXIT_CODES = """
exit codes:
  0  the gate passed
  1  the gate failed; "failure_class" and "detail" say why
  2  the input is unusable; "detail" names the file, the field and what it must be
  130  stopped by Ctrl-C
"""


class InputError(Exception):
    """An input that no gate can use: which one, and what is wrong with it."""

    def __init__(self, source: str, problem: str) -> None:
        """Keep the file, directory or option, and the problem with its remedy."""
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints become a JSON verdict like every other."""

    def error(self, message: str) -> Never:
        raise InputError("arguments", f"{message}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        if not _print(self.format_help().rstrip()):
            raise SystemExit(2)


def ptq_main(argv: Sequence[str] | None = None) -> int:
    """Ask the gate on a quantized checkpoint."""
    parser = _parser(
        "gate_ptq",
        "Prove what is inside a quantized checkpoint, from its files alone: whole files, nothing\n"
        "of the source lost, exactly the layers quantized that the recipe means, the size that\n"
        "follows, sound scales and weights, the source's metadata, and what engines make of it.",
        "gate_ptq --checkpoint out/model-fp8 --source models/model --recipe fp8",
    )
    parser.add_argument("--summary", type=Path, help="checkpoint summary (JSON)")
    parser.add_argument("--checkpoint", type=Path, help="directory of the quantized checkpoint")
    parser.add_argument("--source", type=Path, help="directory of the source checkpoint")
    parser.add_argument(
        "--recipe",
        help=f"one of {', '.join(gates.RECIPES)}; overrides the one in a summary",
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="read every byte: all blocks of quantized tensors, all bytes of those left alone; "
        "without it both are sampled (scales are always read whole)",
    )
    _add_target(parser)
    return _run("ptq", parser, _evaluate_checkpoint, argv)


def _add_target(parser: argparse.ArgumentParser) -> None:
    target = parser.add_argument_group(
        "servability",
        "Would this engine load it? Without --engine all engines that the tables know are asked,\n"
        "and their answers are notes. docs/reference/servability.md has the tables.",
    )
    target.add_argument("--engine", help="vllm or transformers; what it would not load, fails")
    target.add_argument("--engine-version", help="default: the newest version in the tables")
    target.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda")
    target.add_argument(
        "--compute-capability", metavar="X.Y", help="of the CUDA device, such as 9.0 or 10.0"
    )
    target.add_argument(
        "--tensor-parallel", type=int, metavar="RANKS", help="ranks that share each matrix"
    )


def run_main(argv: Sequence[str] | None = None) -> int:
    """Ask the gate on one evaluation run."""
    parser = _parser(
        "gate_run",
        "Check one evaluation run: every task ended, every planned sample scored once, answers\n"
        "that a model gave to the questions, and scores that follow from them.",
        "gate_run --results out/baseline --server-log out/server.log",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run summary (JSON)")
    source.add_argument("--results", type=Path, help="directory of lm-eval results and samples")
    parser.add_argument(
        "--server-log", type=Path, help="log of the server that answered: failed requests, restarts"
    )
    parser.add_argument(
        "--limits",
        help='largest shares of answers of a kind, as JSON: {"truncated": 0.2}; kinds: '
        f"{', '.join(ANSWER_LIMITS)}",
    )
    return _run("run", parser, _evaluate_run, argv)


def compare_main(argv: Sequence[str] | None = None) -> int:
    """Ask the gate on candidate scores beside baseline scores."""
    parser = _parser(
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
    return _run("compare", parser, _evaluate_comparison, argv)


def verbosity_main(argv: Sequence[str] | None = None) -> int:
    """Ask the gate on candidate output lengths beside baseline output lengths."""
    parser = _parser(
        "gate_verbosity",
        "Hold the candidate's mean completion length against the baseline's, task by task. Where\n"
        "both sides tell the length of every answer, an interval of the change decides.",
        "gate_verbosity --baseline out/baseline --candidate out/candidate",
    )
    for side in ("baseline", "candidate"):
        parser.add_argument(
            f"--{side}",
            type=Path,
            required=True,
            help=f"{side}: a directory of NeMo Evaluator Launcher runs or of lm-eval results, "
            "or JSON: a samples document with lengths, or {task: [[mean tokens, samples], ...]}",
        )
    parser.add_argument(
        "--threshold",
        type=float,
        default=VERBOSITY_THRESHOLD,
        help="largest change in either direction, as a fraction (default %(default)s)",
    )
    parser.add_argument(
        "--glob", default="eval_*", help="launcher run directories to read (default %(default)s)"
    )
    parser.add_argument(
        "--exclude",
        default="",
        help="launcher run directories to leave out: those whose name holds these whole words, "
        "as _high does",
    )
    return _run("verbosity", parser, _evaluate_verbosity, argv)


def _parser(name: str, description: str, example: str) -> _Parser:
    return _Parser(
        prog=name,
        description=description,
        epilog=f"example:\n  {example}\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _run(
    gate: str,
    parser: _Parser,
    evaluate: Callable[[argparse.Namespace], Mapping[str, Any]],
    argv: Sequence[str] | None,
) -> int:
    """Parse, ask the gate and print; return the exit code."""
    try:
        document = dict(evaluate(parser.parse_args(argv)))
    except InputError as error:
        document = Verdict.refused(gate, EvidenceError(error.source, error.problem)).document()
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        # Names too long, links in a circle: probes and readers meet them wherever a path is used.
        problem = f"cannot be read ({error.strerror or error})"
        name = str(error.filename or "input")
        document = Verdict.refused(gate, EvidenceError(name, problem)).document()
    if not _print(json.dumps(document, indent=2, allow_nan=False)):
        return 2
    if document["pass"]:
        return 0
    return 2 if document["failure_class"] == FailureClass.USER_CONFIG_ERROR else 1


def _print(text: str) -> bool:
    """Print an answer; tell whether it was written, and on standard error why it was not.

    A reader may have left, as ``head`` does, and has then read enough: the exit code still answers.
    """
    if sys.stdout is None:
        problem = "it is closed"
    else:
        try:
            print(text, flush=True)
            return True
        except OSError as error:
            # What is still buffered would be tried once more when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return True
            problem = error.strerror or str(error)
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"the answer could not be written to standard output: {problem}", file=sys.stderr)
    return False


def _evaluate_checkpoint(args: argparse.Namespace) -> Mapping[str, Any]:
    if args.summary and (args.checkpoint or args.source or args.deep):
        raise InputError("arguments", "give either --summary or --checkpoint and --source")
    if args.summary:
        summary = _read_document(args.summary, "checkpoint_summary", {"recipe": args.recipe})
        return _sourced(gates.evaluate_checkpoint(summary), args.summary)
    if not (args.checkpoint and args.source and args.recipe):
        raise InputError("arguments", "give --summary, or --checkpoint with --source and --recipe")
    recipe = gates.RECIPES.get(args.recipe.lower())
    if recipe is None:
        raise InputError(
            "--recipe", f"unknown recipe {args.recipe!r}; known: {', '.join(gates.RECIPES)}"
        )
    from conductor.probes.checkpoint import probe_checkpoint

    target = _target(args)
    with _progress("reading tensors") as progress:
        summary = _probed(
            lambda: probe_checkpoint(
                args.checkpoint,
                args.source,
                recipe,
                deep=args.deep,
                target=target,
                progress=progress,
            )
        )
    return _sourced(gates.evaluate_checkpoint(summary), args.checkpoint)


def _target(args: argparse.Namespace) -> Target | None:
    """Return what is to load the checkpoint, where an engine is named."""
    from conductor.probes.servability import Target, loaders

    details = ("engine_version", "device", "compute_capability", "tensor_parallel")
    if args.engine is None:
        for name in details:
            if getattr(args, name) is not None:
                raise InputError(f"--{name.replace('_', '-')}", "is about an engine; give --engine")
        return None
    versions = [version for engine, version, _ in loaders.targets() if engine == args.engine]
    if not versions:
        known = ", ".join(dict.fromkeys(engine for engine, _, _ in loaders.targets()))
        raise InputError("--engine", f"no table knows {args.engine!r}; known: {known}")
    ranks = 1 if args.tensor_parallel is None else args.tensor_parallel
    if ranks < 1:
        raise InputError("--tensor-parallel", f"must be at least 1, got {ranks}")
    return Target(
        engine=args.engine,
        version=args.engine_version or versions[-1],
        device=args.device or "cuda",
        capability=_capability(args.compute_capability),
        tensor_parallel=ranks,
    )


def _capability(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, dot, minor = text.partition(".")
    if not (dot and major.isascii() and major.isdigit() and minor.isascii() and minor.isdigit()):
        raise InputError("--compute-capability", f"must be as 9.0, got {text!r}")
    return int(major[:3]), int(minor[:3])


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show bytes done of bytes to do on standard error, where a person may be reading it."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _evaluate_run(args: argparse.Namespace) -> Mapping[str, Any]:
    limits = dict(_stated(args.limits, "limits"))
    if args.run:
        summary = _read_document(args.run, "run_summary")
    else:
        summary = _evaluation_results(args.results).run_summary()
    if args.server_log:
        from conductor.probes.server_log import read_server_log

        summary["server"] = _probed(lambda: read_server_log(args.server_log))
    for entry in summary["tasks"].values() if limits else ():
        entry["limits"] = {**(entry.get("limits") or {}), **limits}
    return _sourced(gates.evaluate_run(summary), args.run or args.results)


def _evaluate_comparison(args: argparse.Namespace) -> Mapping[str, Any]:
    scales, stated = _stated_scales(args.scales), _stated_directions(args.directions)
    questions, clusters = _stated(args.questions, "questions"), _stated(args.clusters, "clusters")
    baseline, candidate = (_side(path, clusters) for path in (args.baseline, args.candidate))
    rule = _rule(args, baseline, candidate)
    for name, side in (("baseline", baseline), ("candidate", candidate)):
        verdict = _as_run(side, scales)
        if verdict is not None and not verdict.passed:
            detail = f"{name}: {verdict.detail}"
            return _sourced(replace(verdict, gate="compare", detail=detail), side.path)
    verdict = _as_conditions(baseline, candidate)
    if verdict is not None and not verdict.passed:
        return _sourced(replace(verdict, gate="compare"), args.baseline, args.candidate)
    directions = _known_directions((baseline, candidate), stated) if stated else {}
    if rule == NONINFERIORITY:
        if questions:
            raise InputError("--questions", "is about bare scores; samples tell it, leave it out")
        from conductor.probes.reading import without_collector

        with without_collector():
            verdict = gates.evaluate_noninferiority(
                baseline.samples,
                candidate.samples,
                threshold=args.threshold,
                relative=args.relative,
                scales=scales,
                directions=directions,
            )
        return _sourced(verdict, args.baseline, args.candidate)
    verdict = gates.evaluate_comparison(
        baseline.scores,
        candidate.scores,
        threshold=args.threshold,
        relative=args.relative,
        scales=_known_scales((baseline, candidate), stated, scales, relative=args.relative),
        directions=_known_directions((baseline, candidate), stated),
        questions={**candidate.questions, **baseline.questions, **questions},
    )
    return _sourced(verdict, args.baseline, args.candidate)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One side of a comparison: bare scores, a samples document, or the results of a directory."""

    path: Path
    bare: Any = None
    samples: Mapping[str, Any] | None = None
    results: EvaluationResults | None = None

    @cached_property
    def tasks(self) -> Mapping[str, TaskSamples]:
        """The tasks of a samples document."""
        return _parsed(self.path, self.samples)

    @cached_property
    def scores(self) -> Any:
        """Score of each task; bare ones may be of any type."""
        if self.results:
            return self.results.scores()
        if self.samples is None:
            return self.bare
        from gates.pairing import scores_of

        try:
            return scores_of(self.tasks)
        except EvidenceError as error:
            raise InputError(str(self.path), str(error)) from None

    @property
    def scales(self) -> dict[str, float]:
        """Full score of each task whose metric has a known one."""
        if self.results:
            return self.results.scales()
        tasks = self.tasks if self.samples else {}
        return {name: task.scale for name, task in tasks.items() if task.scale is not None}

    @property
    def directions(self) -> dict[str, bool]:
        """Whether a higher score is better, for each task whose results say so."""
        tasks: Mapping[str, TaskResult | TaskSamples] = {}
        if self.results:
            tasks = self.results.tasks
        elif self.samples:
            tasks = self.tasks
        return {
            name: task.higher_is_better
            for name, task in tasks.items()
            if task.higher_is_better is not None
        }

    @property
    def questions(self) -> dict[str, int]:
        """How many questions are behind the score of each task, where that is known."""
        if self.results:
            tasks = self.results.tasks.items()
            return {name: task.scored_samples for name, task in tasks if task.scored_samples}
        tasks_asked = self.tasks if self.samples else {}
        return {name: len(task.questions) for name, task in tasks_asked.items()}


def _side(path: Path, clusters: Mapping[str, str]) -> _Side:
    if path.is_dir():
        results = _evaluation_results(path, clusters)
        for task in clusters.keys() - results.tasks.keys():
            raise InputError("--clusters", f"{task}: names a task that {path} has no results of")
        # A directory compared with itself is no replay, but a run beside itself.
        samples = _probed(lambda: results.samples(checkpoint=str(path.resolve())))
        return _Side(path=path, results=results, samples=samples if samples["tasks"] else None)
    if clusters:
        raise InputError("--clusters", f"is about directories, and {path} is none")
    document = _read_document(path)
    if _holds_samples(document):
        return _Side(path=path, samples=document)
    _check_shape(document, "scores", str(path))
    return _Side(path=path, bare=document)


def _parsed(path: Path, document: object) -> Mapping[str, TaskSamples]:
    from gates.samples import parse_samples

    try:
        return parse_samples(document, "")
    except EvidenceError as error:
        raise InputError(str(path), str(error)) from None


def _holds_samples(document: object) -> bool:
    """Tell a samples document from bare scores, of which none is a mapping."""
    return isinstance(document, dict) and isinstance(document.get("tasks"), dict)


def _rule(args: argparse.Namespace, baseline: _Side, candidate: _Side) -> str:
    """Return the rule asked for, or the best that the evidence of both sides allows."""
    without = [side for side in (baseline, candidate) if side.samples is None]
    if args.rule == NONINFERIORITY and without:
        raise InputError(
            str(without[0].path),
            "holds scores alone; --rule noninferiority needs what each question was scored: give "
            "a directory with logs of samples, or a samples document",
        )
    return args.rule or (THRESHOLD if without else NONINFERIORITY)


def _as_run(side: _Side, scales: Mapping[str, float]) -> Verdict | None:
    """Ask the gate on a run, where there is one; a metric without a full score has no upper end."""
    if side.results is None:
        return None
    summary = side.results.run_summary()
    for name, entry in summary["tasks"].items():
        entry["scale"] = scales.get(name, entry.get("scale", sys.float_info.max))
    return gates.evaluate_run(summary)


def _as_conditions(baseline: _Side, candidate: _Side) -> Verdict | None:
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


def _known_directions(sides: tuple[_Side, _Side], stated: Mapping[str, bool]) -> dict[str, bool]:
    """Return which score is better, as both sides and the options say."""
    directions = {**sides[0].directions, **sides[1].directions}
    for task, higher in stated.items():
        if task not in {*sides[0].scores, *sides[1].scores}:
            raise InputError("--directions", f"{task}: names a task that has no score")
        if directions.get(task, higher) is not higher:
            raise InputError("--directions", f"{task}: the results say the opposite; leave it out")
    return directions | dict(stated)


def _known_scales(
    sides: tuple[_Side, _Side],
    stated: Mapping[str, bool],
    scales: Mapping[str, float],
    *,
    relative: bool,
) -> dict[str, float]:
    """Return full scores; refuse to guess that of a metric that may have none."""
    known = {**sides[0].scales, **sides[1].scales, **scales}
    directions = _known_directions(sides, stated)
    unknown = {
        *(task for task, higher in directions.items() if not higher),
        *(task for side in sides if side.results or side.samples for task in side.scores),
    }
    for task in sorted(unknown - known.keys()):
        scores = [side.scores.get(task) for side in sides]
        if not relative:
            problem = "has a metric without a known full score"
            raise InputError(f"tasks.{task}", f"{problem}; give --scales or --relative")
        if any(
            isinstance(score, (int, float)) and score > LARGEST_GUESSED_SCALE for score in scores
        ):
            problem = f"has a score above {LARGEST_GUESSED_SCALE:g} and no known full score"
            raise InputError(f"tasks.{task}", f"{problem}; give --scales")
    return known


def _stated_scales(text: str | None) -> dict[str, float]:
    return dict(_stated(text, "scales"))


def _stated_directions(text: str | None) -> dict[str, bool]:
    return {task: value == "higher" for task, value in _stated(text, "directions").items()}


def _stated(text: str | None, name: str) -> Mapping[str, Any]:
    """Read an option that holds a JSON document of the schema of its name."""
    if text is None:
        return {}
    document = _parse_json(text, f"--{name}")
    _check_shape(document, name, f"--{name}")
    return dict(document)


def _evaluate_verbosity(args: argparse.Namespace) -> Mapping[str, Any]:
    found: dict[str, dict[str, Any]] = {"baseline": {}, "candidate": {}}
    baseline, candidate = (
        _lengths(path, args, found[side])
        for side, path in (("baseline", args.baseline), ("candidate", args.candidate))
    )
    dropped = sorted(_left_out(found) - {*baseline.means, *candidate.means})
    if baseline.whole and candidate.whole:
        verdict = gates.evaluate_output_lengths(
            baseline.samples, candidate.samples, args.threshold, dropped_tasks=dropped
        )
    else:
        verdict = gates.evaluate_verbosity(
            baseline.means,
            candidate.means,
            threshold=args.threshold,
            dropped_tasks=dropped,
            collapsed_keys={
                f"{side}:{key}": directories
                for side, diagnostics in found.items()
                for key, directories in diagnostics.get("collapsed_keys", {}).items()
            },
            found_artifacts=any(d.get("found_metrics_files") for d in found.values()),
        )
    document = _sourced(verdict, args.baseline, args.candidate)
    partial = sorted({t for d in found.values() for t in d.get("partially_excluded_tasks", ())})
    if partial:
        document["partially_excluded_tasks"] = partial
        document["detail"] += f"; {len(partial)} task(s) had SOME runs excluded: {partial}"
    return {**document, "harvest_diagnostics": found}


@dataclass(frozen=True, kw_only=True)
class _Lengths:
    """One side's answers in length: ``{task: [(mean tokens, samples)]}``, and the samples document.

    ``whole`` tells whether the document has the lengths behind every mean.
    """

    means: Mapping[str, Any]
    samples: Mapping[str, Any] | None = None

    @property
    def whole(self) -> bool:
        """Tell whether intervals can be made of all of it."""
        tasks = self.samples["tasks"] if self.samples else {}
        counted = {name for name, task in tasks.items() if task.get("lengths")}
        return bool(counted) and counted >= self.means.keys()


def _left_out(found: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the tasks that collecting came across on either side and could not use."""
    return {
        task
        for diagnostics in found.values()
        for task in (
            *diagnostics.get("excluded_tasks", ()),
            *(entry.split(":", 1)[0] for entry in diagnostics.get("metrics_without_tokens", ())),
        )
    }


def _lengths(path: Path, args: argparse.Namespace, diagnostics: dict[str, Any]) -> _Lengths:
    """Read one side's lengths from whichever of the forms ``path`` has."""
    if not path.is_dir():
        document = _read_document(path)
        if _holds_samples(document):
            return _Lengths(means=_mean_lengths(path, document), samples=document)
        _check_shape(document, "token_counts", str(path))
        return _Lengths(means=document)
    if next(path.rglob("results_*.json"), None):
        results = _evaluation_results(path)
        samples = _probed(results.samples)
        return _Lengths(means=results.completion_tokens, samples=samples)
    from conductor.probes.nel import harvest

    return _Lengths(means=_probed(lambda: harvest(str(path), args.glob, args.exclude, diagnostics)))


def _mean_lengths(path: Path, document: Mapping[str, Any]) -> dict[str, list[tuple[float, int]]]:
    """Return the mean length and the number of answers of each task that has lengths."""
    return {
        name: [(math.fsum(task.lengths) / len(task.lengths), len(task.lengths))]
        for name, task in _parsed(path, document).items()
        if task.lengths
    }


def _evaluation_results(path: Path, clusters: Mapping[str, str] | None = None) -> EvaluationResults:
    from conductor.probes.lm_eval import probe_results

    return _probed(lambda: probe_results(path, clusters=clusters))


def _probed(probe: Callable[[], _Evidence]) -> _Evidence:
    """Run a probe; a directory without usable evidence is unusable input."""
    from conductor.probes.reading import ProbeError

    try:
        return probe()
    except ProbeError as error:
        raise InputError(str(error.path), f"{error.problem}; {error.remedy}") from None


def _sourced(verdict: Verdict, *sources: Path) -> dict[str, Any]:
    """Return the verdict's document; where the input was refused, name the files it came from."""
    document = verdict.document()
    if verdict.failure_class is FailureClass.USER_CONFIG_ERROR:
        document["detail"] = f"{', '.join(map(str, sources))}: {document['detail']}"
    return document


def _read_document(
    path: Path, schema: str | None = None, overrides: Mapping[str, object] | None = None
) -> Any:
    """Read a JSON file; ``overrides`` that are not ``None`` replace fields.

    With a ``schema`` its shape is checked. Without one it may be a samples document, which the
    gates check: those are larger than any other, and then read by a parser that is faster.
    """
    from conductor.probes.reading import read_bytes

    largest = LARGEST_DOCUMENT_BYTES if schema else LARGEST_SAMPLES_BYTES
    content = _probed(lambda: read_bytes(path, "give a JSON file", largest=largest))
    if len(content) > LARGEST_DOCUMENT_BYTES:
        return _parse_large(content, str(path))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(str(path), f"is not UTF-8 text (byte {error.start})") from None
    document = _parse_json(text, str(path))
    if isinstance(document, dict):
        document.update({k: v for k, v in (overrides or {}).items() if v is not None})
    if schema:
        _check_shape(document, schema, str(path))
    return document


def _parse_large(content: bytes, source: str) -> Any:
    """Parse a samples document of millions of questions; of a key given twice the last counts."""
    import msgspec

    from conductor.probes.reading import without_collector

    try:
        with without_collector():
            document = msgspec.json.decode(content)
    except (ValueError, RecursionError) as error:
        raise InputError(source, f"is not usable JSON ({error})") from None
    if not _holds_samples(document):
        raise InputError(source, f"is larger than {LARGEST_DOCUMENT_BYTES} bytes of bare scores")
    return document


def _parse_json(text: str, source: str) -> Any:
    """Parse strict JSON: no NaN, no infinity, no key given twice."""
    try:
        return json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            object_pairs_hook=_distinct_keys,
        )
    except RecursionError:
        raise InputError(source, "is nested too deeply to be a document of ours") from None
    except ValueError as error:
        problem = "is empty" if not text.strip() else f"is not usable JSON ({error})"
        raise InputError(source, problem) from None


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON number; leave the field out or give a finite number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} is given twice")
    return document


def _check_shape(document: object, schema: str, source: str) -> None:
    """Check a document against its schema in ``gates/schemas``."""
    import jsonschema_rs

    schema_path = Path(gates.__file__).with_name("schemas") / f"{schema}.json"
    validator = jsonschema_rs.validator_for(schema_path.read_text(encoding="utf-8"))
    try:
        errors = list(validator.iter_errors(document))
    except (ValueError, RecursionError) as error:
        raise InputError(source, f"holds a value that cannot be read ({error})") from None
    if errors:
        shown = "; ".join(_shape_error(error) for error in errors[:_ERRORS_SHOWN])
        more = len(errors) - _ERRORS_SHOWN
        raise InputError(source, shown + (f"; and {more} more" if more > 0 else ""))


def _shape_error(error: Any) -> str:
    place = ".".join(map(str, error.instance_path)) or "the document"
    message = error.message
    if len(message) > _ERROR_CHARACTERS:
        # The end says what was required; the start repeats the value that was given.
        message = f"…{message[-_ERROR_CHARACTERS:]}"
    return f"{place}: {message}"
