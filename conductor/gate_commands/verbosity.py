"""``gate_verbosity``: the lengths of both sides' answers, from whichever form holds them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gates
from conductor.gate_commands.command import make_parser, run_gate, sourced
from conductor.gate_commands.documents import (
    check_shape,
    evaluation_results,
    holds_samples,
    parsed_samples,
    probed,
    read_document,
)
from gates.criteria import VERBOSITY_THRESHOLD


def verbosity_main(argv: Sequence[str] | None = None) -> int:
    """Ask the gate on candidate output lengths beside baseline output lengths."""
    parser = make_parser(
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
    return run_gate("verbosity", parser, _evaluate_verbosity, argv)


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
    document = sourced(verdict, args.baseline, args.candidate)
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
        document = read_document(path)
        if holds_samples(document):
            return _Lengths(means=_mean_lengths(path, document), samples=document)
        check_shape(document, "token_counts", str(path))
        return _Lengths(means=document)
    if next(path.rglob("results_*.json"), None):
        results = evaluation_results(path)
        samples = probed(results.samples)
        return _Lengths(means=results.completion_tokens, samples=samples)
    from conductor.probes.nel import harvest

    return _Lengths(means=probed(lambda: harvest(str(path), args.glob, args.exclude, diagnostics)))


def _mean_lengths(path: Path, document: Mapping[str, Any]) -> dict[str, list[tuple[float, int]]]:
    """Return the mean length and the number of answers of each task that has lengths."""
    return {
        name: [(math.fsum(task.lengths) / len(task.lengths), len(task.lengths))]
        for name, task in parsed_samples(path, document).items()
        if task.lengths
    }
