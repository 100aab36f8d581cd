"""What each stage does: start its tools, read what they left on disk, ask its gate.

One function a stage. Each takes the release and returns the verdicts of its gates; a broken world
or an unusable request is a :class:`Failure`. No threshold lives here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gates
from conductor import compatibility, quantizers
from conductor.chain import Stage
from conductor.compatibility import Quantizer
from conductor.config import Config
from conductor.engines import EngineSession, Sides
from conductor.engines.opening import engine_version, longest_request, open_session
from conductor.executors.environ import worker_environ
from conductor.executors.local import Progress, Worker, run_worker
from conductor.failure import Failure
from conductor.files import write_json
from conductor.harnesses.lm_eval import (
    HARNESS_ENVIRON,
    MAY_DIFFER,
    HarnessSettings,
    evaluation_request,
    metric_choices,
)
from conductor.models import DEMO, Model, check_disk, resolve_model
from conductor.preconditions import (
    check_environment,
    check_parallel,
    check_port,
    check_source,
    environments_needed,
)
from conductor.probes.checkpoint import ProbeError, probe_checkpoint
from conductor.probes.lm_eval import EvaluationResults, probe_results
from conductor.probes.servability import Target
from conductor.release_state import Evaluation, Plan, Release, World
from conductor.suites import Suite, load_suite
from gates import FailureClass, Recipe, Verdict

DEMO_CALIBRATION = Path(__file__).parent / "demo" / "calibration.jsonl"
# A release keeps the candidate (smaller than the source), samples, logs and tracking beside it.
DISK_RESERVE_BYTES = 200 * 2**20

# The names under which verdicts are filed; one gate judges both evaluations.
RUN_GATES: Mapping[str, str] = {"source": "baseline_run", "candidate": "candidate_run"}
STAGE_GATES: Mapping[Stage, tuple[str, ...]] = {
    Stage.PTQ: ("ptq",),
    Stage.DEPLOY: ("canary",),
    Stage.BASELINE_EVAL: ("baseline_run",),
    Stage.CANDIDATE_EVAL: ("candidate_run",),
    Stage.COMPARE: ("conditions", "external", "compare", "verbosity"),
}


def run_setup(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Resolve model, recipe, suite, quantizer and engine; refuse early what cannot work."""
    config = release.config
    progress(0, 0, "resolving the request")
    suite = load_suite(config.suite)
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
    """Evaluate the source and ask gate_run."""
    return _run_evaluation(release, Stage.BASELINE_EVAL, "source", progress)


def run_candidate_eval(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Evaluate the candidate and ask gate_run."""
    return _run_evaluation(release, Stage.CANDIDATE_EVAL, "candidate", progress)


def _run_evaluation(
    release: Release, stage: Stage, side: str, progress: Progress
) -> dict[str, Verdict]:
    stage_dir = release.journal.attempt_dir(stage)
    evaluation = evaluate(
        _session(release),
        side,
        release.plan.suite,
        harness_settings(release.config, release.plan.suite, release.plan.model),
        stage_dir,
        release.world,
        progress,
    )
    write_json(stage_dir / "run-summary.json", evaluation.summary)
    release.evaluations[side] = evaluation
    return {RUN_GATES[side]: gates.evaluate_run(evaluation.summary)}


def harness_settings(config: Config, suite: Suite, model: Model) -> HarnessSettings:
    """Return how the harness asks, for either side."""
    return HarnessSettings(
        seed=config.seed,
        limit=config.limit,
        concurrency=config.concurrency,
        request_timeout_s=config.request_timeout_s,
        max_length=longest_request(suite, model),
    )


def evaluate(
    session: EngineSession,
    side: str,
    suite: Suite,
    settings: HarnessSettings,
    stage_dir: Path,
    world: World,
    progress: Progress,
) -> Evaluation:
    """Evaluate one side on ``suite`` with lm-eval; return its settings, results and summary."""
    backend = session.backend(side, stage_dir, progress)
    results_dir = stage_dir / "results"
    request = evaluation_request(suite, settings, backend, output_dir=results_dir)
    environ = {
        **worker_environ(world.environ, offline=suite.is_local),
        **HARNESS_ENVIRON,
        **session.secrets(side),
    }
    environment = "reference" if backend["backend"] == "in_process" else "evaluate"
    with TemporaryDirectory(dir=stage_dir, prefix="datasets-cache-") as cache:
        if suite.is_local:
            # The datasets cache recognizes local files by their times, not by their content.
            environ["HF_DATASETS_CACHE"] = cache
        run_worker(
            Worker(script="evaluate.py", interpreter=world.environments.interpreter(environment)),
            stage_dir,
            request,
            environ=environ,
            progress=progress,
            still_useful=lambda: session.check(side),
        )
    try:
        results = probe_results(results_dir, choices=metric_choices(suite))
    except ProbeError as error:
        raise Failure(FailureClass.SAMPLE_ACCOUNTING_FAILED, str(error)) from None
    _check_directions(suite, results)
    return Evaluation(
        conditions={
            **request,
            **{f"engine.{name}": value for name, value in session.settings(side).items()},
            **_observed_conditions(results),
        },
        results=results,
        summary=planned_summary(suite, settings.limit, results),
    )


def _check_directions(suite: Suite, results: EvaluationResults) -> None:
    """Refuse a suite that calls better what the harness calls worse."""
    for name, result in results.tasks.items():
        task = suite.tasks.get(name)
        if task and result.higher_is_better not in (None, task.higher_is_better):
            raise Failure(
                FailureClass.USER_CONFIG_ERROR,
                f"suite {suite.path}: tasks.{name}.higher_is_better is {task.higher_is_better}, "
                f"but lm-eval says {result.higher_is_better} of {result.metric}; correct it",
            )


def _observed_conditions(results: EvaluationResults) -> dict[str, Any]:
    """Return what the harness recorded of how it asked, which may differ from what it was told."""
    return {
        **{f"harness.{name}": version for name, version in results.versions.items()},
        **{f"tasks.{name}.version": task.version for name, task in results.tasks.items()},
        **{f"tasks.{name}.shots": task.fewshot for name, task in results.tasks.items()},
    }


def planned_summary(suite: Suite, limit: int | None, results: EvaluationResults) -> dict[str, Any]:
    """Return the run summary against what the suite planned.

    A task that left no result is listed as failed. Where the suite says how many documents a task
    has, that number must have been scored; otherwise it is the number that the harness set out to.
    """
    found = results.run_summary()["tasks"]
    lost = {"status": "FAILED", "errors": ["no result was written"]}
    tasks = {}
    for task in suite.tasks.values():
        entry = {**found.get(task.name, lost), "scale": task.scale}
        if task.samples is not None:
            entry["expected_samples"] = min(task.samples, limit or task.samples)
        tasks[task.name] = entry
    return {"tasks": tasks}


def run_compare(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Compare conditions, the baseline with its references, scores, and lengths of answers."""
    suite = release.plan.suite
    progress(0, 0, "comparing")
    sides = release.evaluations["source"], release.evaluations["candidate"]
    baseline, candidate = (side.results for side in sides)
    scales = {task.name: task.scale for task in suite.tasks.values()}
    verdicts = {
        "conditions": gates.evaluate_conditions(
            sides[0].conditions, sides[1].conditions, may_differ=MAY_DIFFER
        ),
        "compare": gates.evaluate_comparison(
            baseline.scores(),
            candidate.scores(),
            threshold=release.config.threshold,
            relative=release.config.relative,
            scales=scales,
            directions={task.name: task.higher_is_better for task in suite.tasks.values()},
        ),
    }
    if suite.references and release.config.limit is None:
        # References are about whole benchmarks: a few documents are points off by chance alone.
        verdicts["external"] = gates.evaluate_external(
            baseline.scores(), suite.references, scales=scales
        )
    if suite.generation_tasks:
        verdicts["verbosity"] = gates.evaluate_verbosity(
            baseline.completion_tokens,
            candidate.completion_tokens,
            dropped_tasks=unmeasured_lengths(suite, release.evaluations.values()),
            found_artifacts=True,
        )
    return verdicts


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
