"""What each stage does: start its tools, read what they left on disk, ask its gate.

One function a stage. Each takes the release and returns the verdicts of its gates; a broken world
or an unusable request is a :class:`Failure`. No threshold lives here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gates
from conductor import compatibility, quantizers
from conductor.chain import Stage
from conductor.compatibility import Quantizer
from conductor.config import Config, Rule
from conductor.engines import EngineSession, Sides
from conductor.engines.opening import engine_version, longest_request, open_session
from conductor.evaluation import evaluate, harness_settings, merge
from conductor.executors.environ import worker_environ
from conductor.executors.local import Progress, Worker, run_worker
from conductor.failure import Failure
from conductor.files import write_json
from conductor.harnesses.lm_eval import MAY_DIFFER
from conductor.models import DEMO, Model, check_disk, resolve_model
from conductor.noise_floor import compare_runs
from conductor.planning import look_ahead
from conductor.preconditions import (
    check_environment,
    check_parallel,
    check_port,
    check_source,
    environments_needed,
)
from conductor.probes.checkpoint import ProbeError, probe_checkpoint
from conductor.probes.lm_eval import differing_questions
from conductor.probes.servability import Target
from conductor.release_state import Evaluation, Plan, Release, World
from conductor.rounds import (
    EVERYTHING,
    Asked,
    Batch,
    Limits,
    first_batch,
    next_batch,
    repeats_of,
)
from conductor.suites import Suite, check_perplexities, load_suite
from gates import FailureClass, Recipe, Verdict

DEMO_CALIBRATION = Path(__file__).parent / "demo" / "calibration.jsonl"
# A release keeps the candidate (smaller than the source), samples, logs and tracking beside it.
DISK_RESERVE_BYTES = 200 * 2**20

SEEN_AT_A_LOOK = ("questions", "drop", "drop_lower", "drop_upper", "outcome")

# The names under which verdicts are filed; one gate judges both evaluations.
RUN_GATES: Mapping[str, str] = {"source": "baseline_run", "candidate": "candidate_run"}
STAGE_GATES: Mapping[Stage, tuple[str, ...]] = {
    Stage.PTQ: ("ptq",),
    Stage.DEPLOY: ("canary",),
    Stage.BASELINE_EVAL: ("baseline_run", "external"),
    Stage.CANDIDATE_EVAL: ("candidate_run",),
    Stage.COMPARE: ("conditions", "compare", "verbosity"),
}


def run_setup(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Resolve model, recipe, suite, quantizer and engine; refuse early what cannot work."""
    config = release.config
    progress(0, 0, "resolving the request")
    suite = load_suite(config.suite)
    if config.rule is Rule.NONINFERIORITY:
        check_perplexities(suite, relative=config.relative, until_decided=config.until_decided)
    recipe = quantizers.find_recipe(config.recipe)
    row = compatibility.choose(
        recipe.bucket,
        release.world.machine.device,
        quantizers=quantizers.able(config.recipe),
        quantizer=config.quantizer,
        engine=config.engine.name,
    )
    quantize_request = quantizers.plan(row.quantizer, config.recipe, calibration_of(config))
    check_port(config)
    check_parallel(config, release.world.machine)
    for name in environments_needed(row):
        check_environment(release.world.environments, name)
    progress(0, 0, "finding the model")
    model = resolve_model(config.model)
    check_source(model)
    check_disk(config.workspace, 2 * model.weights_bytes + DISK_RESERVE_BYTES, "the workspace")
    release.resolved = Plan(
        model=model, recipe=recipe, suite=suite, row=row, quantize_request=quantize_request
    )
    if config.rule is Rule.NONINFERIORITY:
        release.outlook = look_ahead(
            suite,
            threshold=config.threshold,
            relative=config.relative,
            discordance=config.discordance,
            limit=config.max_samples or config.limit,
        )
    return {}


def calibration_of(config: Config) -> dict[str, Any]:
    """Return the calibration that was asked for; the demo model brings its own text."""
    calibration = config.calibration
    data = calibration.data
    if data is None and config.model == DEMO:
        data = str(DEMO_CALIBRATION)
    return {
        "data": data,
        "split": calibration.split,
        "text_column": calibration.text_column,
        "samples": calibration.samples,
        "max_length": calibration.max_length,
        "seed": config.seed,
    }


def run_ptq(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Quantize the source, read the export from disk, and ask gate_ptq."""
    plan = release.plan
    stage_dir = release.journal.attempt_dir(Stage.PTQ)
    result = quantize(
        plan.row.quantizer,
        plan.quantize_request,
        plan.model,
        release.checkpoint,
        release.config.seed,
        stage_dir,
        release.world,
        progress,
    )
    release.calibration = result["calibration"]
    summary = read_checkpoint(
        release.checkpoint, plan.model, plan.recipe, progress, target=_target(release)
    )
    write_json(stage_dir / "checkpoint-summary.json", summary)
    release.checkpoint_summary = summary
    return {"ptq": judge_checkpoint(summary, plan.recipe)}


def quantize(
    quantizer: Quantizer,
    planned: Mapping[str, Any],
    model: Model,
    checkpoint: Path,
    seed: int,
    stage_dir: Path,
    world: World,
    progress: Progress,
) -> dict[str, Any]:
    """Let ``quantizer`` write ``checkpoint`` as ``quantizers.plan`` has it; return its result."""
    shutil.rmtree(checkpoint, ignore_errors=True)
    request = {
        **planned,
        "model_path": str(model.path),
        "output_dir": str(checkpoint),
        "device": world.machine.device,
        "seed": seed,
    }
    return run_worker(
        Worker(
            script=quantizers.WORKERS[quantizer],
            interpreter=world.environments.interpreter("quantize"),
        ),
        stage_dir,
        request,
        environ=worker_environ(world.environ, offline=request["calibration"]["dataset"] is None),
        progress=progress,
    )


def _target(release: Release) -> Target | None:
    """Return what is to load the candidate; without a known version no table can answer."""
    row, world = release.plan.row, release.world
    version = engine_version(row.engine, row.device, world.environments)
    if version is None:
        return None
    capabilities = [each.compute_capability for each in world.machine.accelerators]
    return Target(
        engine=row.engine,
        version=version,
        device=row.device,
        capability=min((each for each in capabilities if each), default=None),
        tensor_parallel=release.config.engine.tensor_parallel_size,
    )


def read_checkpoint(
    checkpoint: Path,
    model: Model,
    recipe: Recipe,
    progress: Progress,
    *,
    target: Target | None = None,
) -> dict[str, Any]:
    """Return the checkpoint summary; an export that cannot be read has not covered anything."""
    doing = "reading the checkpoint"
    progress(0, 0, doing)
    try:
        return probe_checkpoint(
            checkpoint,
            model.path,
            recipe,
            target=target,
            progress=lambda done, total: progress(done, total, doing),
        )
    except ProbeError as error:
        raise Failure(FailureClass.QUANT_COVERAGE_FAILURE, str(error)) from None


def judge_checkpoint(summary: Mapping[str, Any], recipe: Recipe) -> Verdict:
    """Ask gate_ptq; a recipe from a file joins the table."""
    return gates.evaluate_checkpoint(summary, recipes={**gates.RECIPES, recipe.name: recipe})


def run_deploy(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Serve or load the candidate as exported, and compare a few answers with the source's."""
    stage_dir = release.journal.attempt_dir(Stage.DEPLOY)
    suite = release.plan.suite
    evidence = _session(release).answer_canary(suite.canary_prompts, stage_dir, progress)
    write_json(stage_dir / "canary.json", evidence)
    return {"canary": gates.evaluate_canary(evidence)}


def _session(release: Release) -> EngineSession:
    if release.session is None:
        plan = release.plan
        release.session = open_session(
            plan.row.engine,
            Sides(source=plan.model.path, candidate=release.checkpoint),
            release.config,
            longest_request(plan.suite, plan.model),
            release.world,
        )
    return release.session


def run_baseline_eval(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Evaluate the source, ask gate_run, and hold its scores against published ones."""
    stage_dir = release.journal.attempt_dir(Stage.BASELINE_EVAL)
    batch = _first_batch(release)
    release.batches["source"] = []
    _ask(release, "source", batch, _round_dir(release, stage_dir, 1, "source"), progress)
    verdicts = {RUN_GATES["source"]: _judge_run(release, "source", stage_dir / "run-summary.json")}
    if release.plan.suite.references:
        verdicts["external"] = _judge_references(release)
    if release.config.noise_floor and all(verdict.passed for verdict in verdicts.values()):
        release.noise_floor = _measure_noise(release, batch, stage_dir / "noise-floor", progress)
    return verdicts


def run_candidate_eval(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Evaluate the candidate and ask gate_run; with ``until_decided``, both sides in rounds."""
    stage_dir = release.journal.attempt_dir(Stage.CANDIDATE_EVAL)
    batch: Batch | None = _first_batch(release)
    release.batches["candidate"] = []
    del release.batches["source"][1:]  # an earlier attempt may have gone on
    _put_together(release, "source")
    release.path = []
    number = 1
    sides = ["candidate"]
    verdicts: dict[str, Verdict] = {}
    while batch is not None:
        for side in sides:
            where = _round_dir(release, stage_dir, number, side)
            _ask(release, side, batch, where, progress)
            summary = "run-summary.json" if side == "candidate" else f"run-summary-{side}.json"
            verdicts[RUN_GATES[side]] = _judge_run(release, side, stage_dir / summary)
        if not release.config.until_decided or not all(v.passed for v in verdicts.values()):
            break
        batch = _look(release, number, batch)
        number += 1
        # Where only one server has room, the side that is up goes first.
        sides = ["source", "candidate"] if sides[-1] == "source" else ["candidate", "source"]
    if len(release.batches["source"]) > 1 and release.plan.suite.references:
        verdicts["external"] = _judge_references(release)
    return verdicts


def _first_batch(release: Release) -> Batch:
    """Return what both sides are asked first: all, unless the release looks in between."""
    if not release.config.until_decided:
        return EVERYTHING
    sizes = {task.name: task.samples for task in release.plan.suite.tasks.values()}
    return first_batch(sizes, _limits(release.config))


def _limits(config: Config) -> Limits:
    return Limits(first_batch=config.first_batch, max_samples=config.max_samples)


def _round_dir(release: Release, stage_dir: Path, number: int, side: str) -> Path:
    if release.config.until_decided:
        return stage_dir / f"round-{number}" / side
    return stage_dir


def _ask(release: Release, side: str, batch: Batch, where: Path, progress: Progress) -> None:
    """Ask one side a batch, tasks that sample repeatedly; put it to what was asked before."""
    first = _evaluate(release, side, batch, where, progress)
    sampled = [name for name, task in first.samples["tasks"].items() if task["sampled"]]
    again = repeats_of(batch, sampled, release.config.max_repeats)
    release.batches[side].append([first])
    for repeat in again:
        place = where.with_name(f"{where.name}-repeat-{repeat.repeat}")
        release.batches[side][-1].append(_evaluate(release, side, repeat, place, progress))
    _put_together(release, side)


def _put_together(release: Release, side: str) -> None:
    parts = [part for asked in release.batches[side] for part in asked]
    release.evaluations[side] = merge(parts, release.plan.suite)


def _evaluate(
    release: Release, side: str, batch: Batch, where: Path, progress: Progress
) -> Evaluation:
    plan = release.plan
    return evaluate(
        _session(release),
        side,
        plan.suite,
        harness_settings(release.config, plan.suite, plan.model),
        where,
        release.world,
        progress,
        batch,
    )


def _judge_run(release: Release, side: str, path: Path) -> Verdict:
    summary = release.evaluations[side].summary
    write_json(path, summary)
    return gates.evaluate_run(summary)


def _judge_references(release: Release) -> Verdict:
    """Hold the source against its published scores, before anything is compared with it."""
    suite, results = release.plan.suite, release.evaluations["source"].results
    return gates.evaluate_external(
        results.scores(),
        suite.references,
        scales={task.name: task.scale for task in suite.tasks.values()},
        asked=release.evaluations["source"].asked,
    )


def _measure_noise(
    release: Release, batch: Batch, where: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Ask the source once more, under a seed of its own, and compare it with itself."""
    fresh = Batch(questions=batch.questions, repeat=release.config.max_repeats)
    again = _evaluate(release, "source", fresh, where, progress)
    verdict = gates.evaluate_run(again.summary)
    if verdict.failure_class is not None:
        raise Failure(verdict.failure_class, f"second run of the source: {verdict.detail}")
    first_answers = release.batches["source"][0][0]
    return compare_runs(first_answers.samples, again.samples)


def _look(release: Release, number: int, batch: Batch) -> Batch | None:
    """Look at what was answered so far, keep what was seen, and say what to ask next.

    What ``batch`` did not ask shows nothing new and is not kept again.
    """
    rows = judge_scores(release).per_task
    release.path += [
        {"round": number, "task": task, **{name: row.get(name) for name in SEEN_AT_A_LOOK}}
        for task, row in rows.items()
        if row.get("questions") and task in (batch.questions or rows)
    ]
    samples = release.evaluations["source"].samples["tasks"]
    wanted = _wanted_for_lengths(release)
    asked = {
        task: Asked(
            questions=len(samples[task]["questions"]),
            size=samples[task]["size"],
            outcome=str(row["outcome"]),
            wanted=wanted.get(task, 0),
        )
        for task, row in rows.items()
        if row.get("questions")
    }
    return next_batch(asked, _limits(release.config)) if len(asked) == len(rows) else None


def _wanted_for_lengths(release: Release) -> dict[str, int]:
    """Return how many more questions the length of answers is to be judged on, by task."""
    if not release.plan.suite.generation_tasks:
        return {}
    verdict = judge_lengths(release)
    if verdict.failure_class is not FailureClass.INSUFFICIENT_EVIDENCE:
        return {}
    return {
        task: more
        for task, row in verdict.per_task.items()
        if isinstance(more := row.get("more_questions"), int)
    }


def run_compare(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Compare conditions, scores, and lengths of answers."""
    progress(0, 0, "comparing")
    verdicts = {"conditions": _judge_conditions(release), "compare": judge_scores(release)}
    if release.plan.suite.generation_tasks:
        verdicts["verbosity"] = judge_lengths(release)
    return verdicts


def _judge_conditions(release: Release) -> Verdict:
    """Compare how both sides were asked; of questions that differ, say how many and which first."""
    source, candidate = (release.evaluations[side] for side in ("source", "candidate"))
    verdict = gates.evaluate_conditions(
        source.conditions, candidate.conditions, may_differ=MAY_DIFFER
    )
    if verdict.passed:
        return verdict
    differing = differing_questions(source.results, candidate.results)
    return replace(verdict, detail="; ".join([verdict.detail, *differing.values()]))


def judge_lengths(release: Release) -> Verdict:
    """Compare the lengths of both sides' answers: by intervals, or by means for bare scores."""
    source, candidate = (release.evaluations[side] for side in ("source", "candidate"))
    unmeasured = unmeasured_lengths(release.plan.suite, release.evaluations.values())
    if release.config.rule is Rule.THRESHOLD:
        return gates.evaluate_verbosity(
            source.results.completion_tokens,
            candidate.results.completion_tokens,
            dropped_tasks=unmeasured,
            found_artifacts=True,
        )
    return gates.evaluate_output_lengths(
        source.samples, candidate.samples, dropped_tasks=unmeasured
    )


def judge_scores(release: Release) -> Verdict:
    """Compare both sides by the configured rule, over everything that was asked so far."""
    config, suite = release.config, release.plan.suite
    source, candidate = (release.evaluations[side] for side in ("source", "candidate"))
    scales = {task.name: task.scale for task in suite.tasks.values()}
    directions = {task.name: task.higher_is_better for task in suite.tasks.values()}
    if config.rule is Rule.THRESHOLD:
        return gates.evaluate_comparison(
            source.results.scores(),
            candidate.results.scores(),
            threshold=config.threshold,
            relative=config.relative,
            scales=scales,
            directions=directions,
        )
    return gates.evaluate_noninferiority(
        {**source.samples, "checkpoint": str(release.plan.model.path)},
        {**candidate.samples, "checkpoint": str(release.checkpoint)},
        threshold=config.threshold,
        relative=config.relative,
        scales=scales,
        directions=directions,
        sequential=config.until_decided,
    )


def unmeasured_lengths(suite: Suite, evaluations: Iterable[Evaluation]) -> list[str]:
    """Name the generation tasks whose completion lengths some side does not have."""
    measured = [side.results.completion_tokens for side in evaluations]
    return [task for task in suite.generation_tasks if not all(task in side for side in measured)]


StageFunction = Callable[[Release, Progress], dict[str, Verdict]]

STAGE_FUNCTIONS: Mapping[Stage, StageFunction] = {
    Stage.SETUP: run_setup,
    Stage.PTQ: run_ptq,
    Stage.DEPLOY: run_deploy,
    Stage.BASELINE_EVAL: run_baseline_eval,
    Stage.CANDIDATE_EVAL: run_candidate_eval,
    Stage.COMPARE: run_compare,
}
