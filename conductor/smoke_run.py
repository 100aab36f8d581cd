"""A smoke run goes through everything that production goes through, with fewer samples.

Before it starts, limits by which a stage would do nothing are refused; at its end it says what each
stage really did, and what of it is missing. What a smoke run came to is no ground for publishing.

Whether metrics were logged is told by the report's ``tracking``, which is known last and may change
with ``day0 sync``; ``conductor.report.smoke`` puts both together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conductor.chain import STAGES, Stage, State
from conductor.failure import Failure
from conductor.files import read_json
from gates import FailureClass

if TYPE_CHECKING:
    from conductor.config import Config
    from conductor.release_state import Release
    from conductor.suites import Suite

EVALUATIONS: Mapping[str, Stage] = {
    "source": Stage.BASELINE_EVAL,
    "candidate": Stage.CANDIDATE_EVAL,
}

ARTIFACTS: Mapping[Stage, tuple[str, ...]] = {
    Stage.SETUP: ("config.resolved.yaml", "env.json", "stages/setup/**/inputs.json"),
    Stage.PTQ: (
        *("checkpoint/config.json", "checkpoint/*.safetensors"),
        *("stages/ptq/**/checkpoint-summary.json", "verdicts/ptq.json"),
    ),
    Stage.DEPLOY: ("stages/deploy/**/canary.json", "verdicts/canary.json"),
    Stage.BASELINE_EVAL: (
        *("stages/baseline_eval/**/evaluation.json", "stages/baseline_eval/**/samples_*.jsonl"),
        "verdicts/baseline_run.json",
    ),
    Stage.CANDIDATE_EVAL: (
        *("stages/candidate_eval/**/evaluation.json", "stages/candidate_eval/**/samples_*.jsonl"),
        "verdicts/candidate_run.json",
    ),
    Stage.COMPARE: ("verdicts/conditions.json", "verdicts/compare.json"),
}
"""What each stage leaves whatever the model, the recipe and the suite, as patterns of paths."""


def check_reach(config: Config, suite: Suite, quantize_request: Mapping[str, Any]) -> None:
    """Refuse a smoke run of whose stages one would have nothing to do.

    Args:
        config: the configuration of a smoke run.
        suite: what it evaluates.
        quantize_request: what the quantizer will be asked, as ``quantizers.plan`` has it.

    Raises:
        Failure: USER_CONFIG_ERROR, which names every such stage and the setting.
    """
    if problems := [*_unreachable(config, suite, quantize_request["calibration"])]:
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"this smoke run cannot reach every stage: {'; '.join(problems)}",
        )


def _unreachable(config: Config, suite: Suite, calibration: Mapping[str, Any]) -> Iterator[str]:
    calibrates = _calibrates(calibration)
    limits = {
        "calibration.samples": (Stage.PTQ, config.calibration.samples if calibrates else None),
        "limit": (Stage.BASELINE_EVAL, config.limit),
        "max_samples": (Stage.BASELINE_EVAL, config.max_samples),
    }
    for key, (stage, most) in limits.items():
        if most is not None and most < 1:
            yield f"{stage}: {key} is {most}; give 1 or more"
    if calibration["path"] and _is_blank(Path(calibration["path"])):
        yield f"{Stage.PTQ}: calibration.data: {calibration['path']} holds no text; give one line"
    if config.until_decided and config.first_batch > (config.max_samples or config.first_batch):
        yield (
            f"{Stage.CANDIDATE_EVAL}: first_batch is {config.first_batch} and max_samples "
            f"{config.max_samples}, so that nothing is left after the first look; lower "
            "first_batch, or raise max_samples"
        )
    for task in suite.tasks.values():
        if task.samples is not None and task.samples < 1:
            yield (
                f"{Stage.BASELINE_EVAL}: tasks.{task.name}.samples of suite {suite.path} is "
                f"{task.samples}; take out the task, or give it questions"
            )


def _calibrates(calibration: Mapping[str, Any]) -> bool:
    """True when the recipe has text run through the model."""
    return bool(calibration["path"] or calibration["dataset"])


def _is_blank(path: Path) -> bool:
    with path.open("rb") as lines:
        return not any(line.strip() for line in lines)


def reached(release: Release) -> dict[str, Any]:
    """Return what the stages of a smoke run did, as a report has it (``smoke``).

    ``missing`` says what should have happened and did not, one sentence each.
    """
    states = release.journal.states
    scored = _scored_samples(release)
    calibrated, served = _calibration_samples(release), _served_answers(release)
    missing = [
        f"{stage} was not reached" for stage in STAGES[:-1] if states[stage] is State.PENDING
    ]
    if states[Stage.PTQ] is not State.PENDING and calibrated == 0:
        missing.append("ptq ran no calibration sample, and the recipe needs some")
    if states[Stage.DEPLOY] is not State.PENDING and not served:
        missing.append("deploy served no answer of the candidate")
    for side, stage in EVALUATIONS.items():
        unscored = [task for task, counts in scored.items() if not counts[side]]
        if unscored and states[stage] is not State.PENDING:
            missing.append(f"{stage} scored no sample of {', '.join(unscored)}")
    missing += _missing_artifacts(release.journal.run_dir, states)
    return {
        "calibration_samples": calibrated,
        "served_answers": served,
        "scored_samples": scored,
        "missing": missing,
    }


def _calibration_samples(release: Release) -> int | None:
    """Return how many samples the quantizer ran; None where the recipe needs none."""
    plan = release.resolved
    if plan is not None and not _calibrates(plan.quantize_request["calibration"]):
        return None
    return int((release.calibration or {}).get("samples", 0))


def _served_answers(release: Release) -> int:
    """Return how many prompts of the canary the candidate answered."""
    if release.journal.stages[Stage.DEPLOY].attempts == 0:
        return 0
    with suppress(OSError, ValueError, LookupError, TypeError):  # what is not whole served nothing
        evidence = read_json(release.journal.attempt_dir(Stage.DEPLOY) / "canary.json")
        return sum(each["candidate"]["error"] is None for each in evidence["prompts"])
    return 0


def _scored_samples(release: Release) -> dict[str, dict[str, int]]:
    """Return how many samples of each task were scored on each side."""
    if release.resolved is None:
        return {}
    found = {side: evaluation.results.tasks for side, evaluation in release.evaluations.items()}
    return {
        name: {
            side: (result.scored_samples or 0) if (result := found.get(side, {}).get(name)) else 0
            for side in EVALUATIONS
        }
        for name in release.resolved.suite.tasks
    }


def _missing_artifacts(run_dir: Path, states: Mapping[Stage, State]) -> Iterable[str]:
    for stage, patterns in ARTIFACTS.items():
        for pattern in patterns:
            if states[stage] is not State.PENDING and not any(run_dir.glob(pattern)):
                yield f"{stage} left no {pattern}"
