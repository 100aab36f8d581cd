"""What each stage does: start its tools, read what they left on disk, ask its gate.

One function a stage. Each takes the release and returns the verdicts of its gates; a broken world
or an unusable request is a :class:`Failure`. No threshold lives here.

Each may be called again over what it left: what a tool came to its end with is read and not made
again, so that a release that was stopped goes on, and one that is resumed knows what it knew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gates
from conductor import compatibility, quantizers, remembered
from conductor.ahead import beside_the_server
from conductor.chain import Stage
from conductor.compatibility import Quantizer, Row
from conductor.config import Config, Rule
from conductor.engines.opening import engine_version
from conductor.evaluation import Inquiry, evaluate, harness_settings, merge
from conductor.evidence.environment import record_environment
from conductor.evidence.gate_inputs import Judged, ask, file_inputs, remark
from conductor.executors.environ import worker_environ
from conductor.executors.local import Progress, Worker, kept_result
from conductor.executors.slurm.folders import JobFolder
from conductor.failure import Failure
from conductor.files import read_json, write_json
from conductor.harnesses.lm_eval import MAY_DIFFER
from conductor.inputs import collect
from conductor.models import DEMO, Model, check_disk, resolve_model
from conductor.noise_floor import compare_runs
from conductor.planning import look_ahead
from conductor.preconditions import (
    check_environment,
    check_parallel,
    check_port,
    check_python,
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
from conductor.smoke_run import check_reach
from conductor.stage_files import forget_requests
from conductor.suites import Suite, check_perplexities, load_suite
from conductor.tools import Tools
from gates import FailureClass, Recipe, Verdict

DEMO_CALIBRATION = Path(__file__).parent / "demo" / "calibration.jsonl"
# A release keeps the candidate (smaller than the source), samples, logs and tracking beside it.
DISK_RESERVE_BYTES = 200 * 2**20

INPUTS = "inputs.json"
"""What the release depends on, field by field, in the directory of its setup."""

SEEN_AT_A_LOOK = ("questions", "drop", "drop_lower", "drop_upper", "outcome")

# The names under which verdicts are filed; one gate judges both evaluations.
RUN_GATES: Mapping[str, str] = {"source": "baseline_run", "candidate": "candidate_run"}


def run_setup(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Resolve model, recipe, suite, quantizer and engine; refuse early what cannot work."""
    config, world = release.config, release.world
    if release.resolved is None:
        progress(0, 0, "resolving the request")
        choice = choose_tools(config, world)
        _record_and_check_machine(release, choice.row)
        progress(0, 0, "finding the model")
        release.resolved = find_source(choice, config, revision=None)
    else:
        _record_and_check_machine(release, release.resolved.row)
    size = release.resolved.model.weights_bytes
    check_disk(config.workspace, 2 * size + DISK_RESERVE_BYTES, "the workspace")
    progress(0, 0, "taking digests of what the release depends on")
    inputs = collect(config, release.resolved, world, release.digests)
    write_json(release.journal.attempt_dir(Stage.SETUP) / INPUTS, inputs)
    release.inputs = inputs
    look_around(release)
    return {}


def _record_and_check_machine(release: Release, row: Row) -> None:
    """Write down what the release is about to run on and with, even where that will not do."""
    config, world = release.config, release.world
    names = environments_needed(row)
    record_environment(release.journal.run_dir, world, names, dry_run=config.dry_run)
    check_machine(config, row, world)


def look_around(release: Release) -> None:
    """Say what the suite can tell, where scores are judged by intervals."""
    config = release.config
    if config.rule is Rule.NONINFERIORITY:
        release.outlook = look_ahead(
            release.plan.suite,
            threshold=config.threshold,
            relative=config.relative,
            discordance=config.discordance,
            limit=config.max_samples or config.limit,
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is evaluated, and which tools do the work; no model was looked for yet."""

    suite: Suite
    recipe: Recipe
    row: Row
    quantize_request: Mapping[str, Any]


def choose_tools(config: Config, world: World) -> Choice:
    """Find suite and recipe, and the quantizer and engine that fit them on this machine.

    Raises:
        Failure: USER_CONFIG_ERROR or CHECKPOINT_NOT_SERVABLE for what cannot work.
    """
    suite = load_suite(config.suite)
    if config.rule is Rule.NONINFERIORITY:
        check_perplexities(suite, relative=config.relative, until_decided=config.until_decided)
    recipe = quantizers.find_recipe(config.recipe)
    row = compatibility.choose(
        recipe.bucket,
        world.machine.device,
        quantizers=quantizers.able(config.recipe),
        quantizer=config.quantizer,
        engine=config.engine.name,
    )
    quantize_request = quantizers.plan(row.quantizer, config.recipe, calibration_of(config))
    if config.smoke:
        check_reach(config, suite, quantize_request)
    return Choice(suite=suite, recipe=recipe, row=row, quantize_request=quantize_request)


def check_machine(config: Config, row: Row, world: World) -> None:
    """Refuse what this machine, or the cluster, is not ready for.

    Raises:
        Failure: a port in use, too few devices, or an environment that is not built.
    """
    if world.cluster is None:
        check_port(config)  # on a cluster it would be one of a node
    else:
        check_python(world.cluster)
    check_parallel(config, world)
    for name in environments_needed(row):
        check_environment(world, name)


def find_source(
    choice: Choice,
    config: Config,
    *,
    revision: str | None,
    find: Callable[[str, str | None], Model] = resolve_model,
) -> Plan:
    """Return the plan with its source, downloaded if need be.

    ``revision`` is the commit that an earlier part of the release had; ``find`` may be
    ``look_up_model``, which downloads nothing.

    Raises:
        Failure: the model is none, or cannot be had.
    """
    model = find(config.model, revision)
    check_source(model)
    return Plan(
        model=model,
        recipe=choice.recipe,
        suite=choice.suite,
        row=choice.row,
        quantize_request=choice.quantize_request,
    )


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
        release.config,
        stage_dir,
        release.world if release.ahead is None else beside_the_server(release.world),
        release.tools,
        progress,
    )
    release.calibration = result["calibration"]
    path = stage_dir / "checkpoint-summary.json"
    if release.replaying:
        summary = read_json(path)
    else:
        target = _target(release)
        summary = read_checkpoint(
            release.checkpoint, plan.model, plan.recipe, progress, target=target
        )
        write_json(path, summary)
    release.checkpoint_summary = summary
    return {"ptq": file_inputs(release.journal.run_dir, ask_checkpoint(summary, plan.recipe))}


def quantize_request(
    planned: Mapping[str, Any], model: Model, checkpoint: Path, seed: int, world: World
) -> dict[str, Any]:
    """Complete what ``quantizers.plan`` planned by what only the release knows."""
    return {
        **planned,
        "model_path": str(model.path),
        "output_dir": str(checkpoint),
        "device": world.machine.device,
        "seed": seed,
    }


def quantize(
    quantizer: Quantizer,
    planned: Mapping[str, Any],
    model: Model,
    checkpoint: Path,
    config: Config,
    stage_dir: Path,
    world: World,
    tools: Tools,
    progress: Progress,
) -> dict[str, Any]:
    """Let ``quantizer`` write ``checkpoint`` as ``quantizers.plan`` has it; return its result."""
    request = quantize_request(planned, model, checkpoint, config.seed, world)
    if (kept := kept_result(stage_dir, request)) and JobFolder.are_over(stage_dir):
        return kept
    return tools.run_worker(
        Worker(
            script=quantizers.WORKERS[quantizer],
            interpreter=world.environments.interpreter("quantize"),
        ),
        stage_dir,
        request,
        environ=worker_environ(world.environ, offline=request["calibration"]["dataset"] is None),
        progress=progress,
        stall_s=config.watchdog.quantize_s,
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


def ask_checkpoint(summary: Mapping[str, Any], recipe: Recipe) -> Judged:
    """Ask gate_ptq; a recipe from a file joins the table."""
    return ask(
        "ptq",
        gates.evaluate_checkpoint,
        summary=summary,
        recipes={**gates.RECIPES, recipe.name: recipe},
    )


def run_deploy(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Serve or load the candidate as exported, and compare a few answers with the source's."""
    stage_dir = release.journal.attempt_dir(Stage.DEPLOY)
    path = stage_dir / "canary.json"
    if release.replaying:
        return {"canary": _judge_canary(release, read_json(path))}
    engine = release.open_engine()
    if release.ahead is not None and not engine.holds_both:
        release.ahead.wait(progress)
    prompts = release.plan.suite.canary_prompts
    evidence = engine.answer_canary(
        prompts, stage_dir, progress, remembered.recall_canary(release, stage_dir)
    )
    write_json(path, evidence)
    verdict = _judge_canary(release, evidence)
    if verdict.passed:
        remembered.keep_canary(release, evidence, stage_dir)
    return {"canary": verdict}


def _judge_canary(release: Release, evidence: Mapping[str, Any]) -> Verdict:
    asked = ask("canary", gates.evaluate_canary, document=evidence)
    return file_inputs(release.journal.run_dir, asked)


def run_baseline_eval(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Evaluate the source, ask gate_run, and hold its scores against published ones."""
    stage_dir = release.journal.attempt_dir(Stage.BASELINE_EVAL)
    batch = first_batch_of(release.config, release.plan.suite)
    if release.ahead is not None:
        release.ahead.wait(progress)
        if problem := release.ahead.problem:
            if isinstance(problem, KeyboardInterrupt):
                raise problem  # somebody cancelled its job, or holds it
            what = str(problem).partition("\n")[0]  # the log's last lines follow
            release.remarks.append(f"evaluating the source ahead: {what}")
        release.ahead = None
    with _asking(release, Stage.BASELINE_EVAL):
        release.batches["source"] = []
        _ask(release, "source", batch, _round_dir(release, stage_dir, 1, "source"), progress)
        verdicts = {
            RUN_GATES["source"]: _judge_run(release, "source", stage_dir / "run-summary.json")
        }
        if release.plan.suite.references:
            verdicts["external"] = _judge_references(release)
        if release.config.noise_floor and all(verdict.passed for verdict in verdicts.values()):
            release.noise_floor = _measure_noise(
                release, batch, stage_dir / "noise-floor", progress
            )
    return verdicts


def run_candidate_eval(release: Release, progress: Progress) -> dict[str, Verdict]:
    """Evaluate the candidate and ask gate_run; with ``until_decided``, both sides in rounds."""
    stage_dir = release.journal.attempt_dir(Stage.CANDIDATE_EVAL)
    batch: Batch | None = first_batch_of(release.config, release.plan.suite)
    release.batches["candidate"] = []
    del release.batches["source"][1:]  # an earlier attempt may have gone on
    _put_together(release, "source")
    release.path = []
    number = 1
    sides = ["candidate"]
    verdicts: dict[str, Verdict] = {}
    with _asking(release, Stage.CANDIDATE_EVAL):
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


@contextmanager
def _asking(release: Release, stage: Stage) -> Iterator[None]:
    """Begin an attempt at a stage that asks, and drop the answers kept for it once they served.

    They outlive an attempt that the world cut short, and none whose samples were lost. What earlier
    attempts asked of the source is not remembered: no gate may have passed it.
    """
    journal = release.journal
    tried = journal.stage_dir(stage)
    release.source_inquiries = [
        each for each in release.source_inquiries if not each.directory.is_relative_to(tried)
    ]
    try:
        yield
    except Failure as failure:
        if failure.failure_class is FailureClass.SAMPLE_ACCOUNTING_FAILED:
            forget_requests(journal.run_dir, stage)
        raise
    forget_requests(journal.run_dir, stage)


def first_batch_of(config: Config, suite: Suite) -> Batch:
    """Return what both sides are asked first: all, unless the release looks in between."""
    if not config.until_decided:
        return EVERYTHING
    sizes = {task.name: task.samples for task in suite.tasks.values()}
    return first_batch(sizes, _limits(config))


def evaluate_source_ahead(
    release: Release, stage_dir: Path, progress: Progress, still_wanted: Callable[[], None]
) -> None:
    """Ask the source the first batch before its turn, into the directory of its coming stage."""
    batch = first_batch_of(release.config, release.plan.suite)
    where = _round_dir(release, stage_dir, 1, "source")
    _evaluate(release, "source", batch, where, progress, still_wanted)


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
    release: Release,
    side: str,
    batch: Batch,
    where: Path,
    progress: Progress,
    still_wanted: Callable[[], None] = lambda: None,
) -> Evaluation:
    plan, config = release.plan, release.config
    inquiry = Inquiry(
        side=side,
        suite=plan.suite,
        settings=harness_settings(config, plan.suite, plan.model),
        directory=where,
        request_cache=release.request_cache(where),
        stall_s=config.watchdog.evaluation_s,
        batch=batch,
    )
    if side == "source":
        remembered.recall(release, inquiry)
    evaluation = evaluate(
        inquiry, release.open_engine, release.tools, release.world, progress, still_wanted
    )
    if side == "source":
        release.source_inquiries.append(inquiry)
    return evaluation


def _judge_run(release: Release, side: str, path: Path) -> Verdict:
    summary = release.evaluations[side].summary
    asked = ask(RUN_GATES[side], gates.evaluate_run, summary=summary)
    verdict = file_inputs(release.journal.run_dir, asked)
    if release.replaying:
        return verdict
    write_json(path, summary)
    if side == "source" and verdict.passed:
        remembered.keep(release, release.source_inquiries)
    return verdict


def _judge_references(release: Release) -> Verdict:
    """Hold the source against its published scores, before anything is compared with it."""
    suite, results = release.plan.suite, release.evaluations["source"].results
    asked = ask(
        "external",
        gates.evaluate_external,
        scores=results.scores(),
        references=suite.references,
        scales={task.name: task.scale for task in suite.tasks.values()},
        asked=release.evaluations["source"].asked,
    )
    return file_inputs(release.journal.run_dir, asked)


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
    rows = ask_scores(release).verdict.per_task
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
    verdict = ask_lengths(release).verdict
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
    asked = {"conditions": _ask_conditions(release), "compare": ask_scores(release)}
    if release.plan.suite.generation_tasks:
        asked["verbosity"] = ask_lengths(release)
    run_dir = release.journal.run_dir
    return {gate: file_inputs(run_dir, each) for gate, each in asked.items()}


def _ask_conditions(release: Release) -> Judged:
    """Compare how both sides were asked; of questions that differ, say how many and which first."""
    source, candidate = (release.evaluations[side] for side in ("source", "candidate"))
    asked = ask(
        "conditions",
        gates.evaluate_conditions,
        baseline=source.conditions,
        candidate=candidate.conditions,
        may_differ=MAY_DIFFER,
    )
    if asked.verdict.passed:
        return asked
    return remark(asked, differing_questions(source.results, candidate.results).values())


def ask_lengths(release: Release) -> Judged:
    """Compare the lengths of both sides' answers: by intervals, or by means for bare scores."""
    source, candidate = (release.evaluations[side] for side in ("source", "candidate"))
    unmeasured = unmeasured_lengths(release.plan.suite, release.evaluations.values())
    if release.config.rule is Rule.THRESHOLD:
        return ask(
            "verbosity",
            gates.evaluate_verbosity,
            baseline=source.results.completion_tokens,
            candidate=candidate.results.completion_tokens,
            dropped_tasks=unmeasured,
            found_artifacts=True,
        )
    return ask(
        "verbosity",
        gates.evaluate_output_lengths,
        baseline=source.samples,
        candidate=candidate.samples,
        dropped_tasks=unmeasured,
    )


def ask_scores(release: Release) -> Judged:
    """Compare both sides by the configured rule, over everything that was asked so far."""
    config, suite = release.config, release.plan.suite
    source, candidate = (release.evaluations[side] for side in ("source", "candidate"))
    scales = {task.name: task.scale for task in suite.tasks.values()}
    directions = {task.name: task.higher_is_better for task in suite.tasks.values()}
    if config.rule is Rule.THRESHOLD:
        return ask(
            "compare",
            gates.evaluate_comparison,
            baseline=source.results.scores(),
            candidate=candidate.results.scores(),
            threshold=config.threshold,
            relative=config.relative,
            scales=scales,
            directions=directions,
        )
    return ask(
        "compare",
        gates.evaluate_noninferiority,
        baseline={**source.samples, "checkpoint": str(release.plan.model.path)},
        candidate={**candidate.samples, "checkpoint": str(release.checkpoint)},
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
