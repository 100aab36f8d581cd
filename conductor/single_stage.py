"""One stage on its own, with its gate: quantize, serve or evaluate without a release around it.

These compose the same pieces as the stages of a release, so what works here works there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gates
from conductor import quantizers
from conductor.compatibility import Device, Engine, Quantizer, check_loadable, rows_for
from conductor.config import Config
from conductor.engines import Sides
from conductor.engines.opening import longest_request
from conductor.engines.vllm import VllmSession
from conductor.evaluation import Inquiry, evaluate, harness_settings
from conductor.executors.local import Progress, ignore
from conductor.failure import Failure
from conductor.files import write_json
from conductor.models import Model, resolve_model
from conductor.preconditions import (
    check_environment,
    check_port,
    check_source,
    environments_of,
)
from conductor.stages import (
    ask_checkpoint,
    calibration_of,
    quantize,
    read_checkpoint,
)
from conductor.suites import load_suite
from conductor.tools import LocalTools
from conductor.world import World
from gates import FailureClass, Recipe, Verdict

CHECK_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a served model answers: an OpenAI-compatible base URL, the model's name, the key."""

    base_url: str
    model: str
    api_key: str


def quantize_only(config: Config, output: Path, world: World, progress: Progress) -> Verdict:
    """Quantize a model into ``output/checkpoint`` and ask gate_ptq; no engine is asked for.

    Raises:
        Failure: the request cannot work, or the quantizer failed.
        OSError: ``output`` exists already or cannot be written.
    """
    recipe = quantizers.find_recipe(config.recipe)
    quantizer = _choose_quantizer(config, recipe, world.machine.device)
    planned = quantizers.plan(quantizer, config.recipe, calibration_of(config))
    check_environment(world, "quantize")
    model = resolve_model(config.model)
    check_source(model)
    output.mkdir(parents=True)
    checkpoint = output / "checkpoint"
    tools = LocalTools(world, ignore)
    quantize(quantizer, planned, model, checkpoint, config, output, world, tools, progress)
    summary = read_checkpoint(checkpoint, model, recipe, progress)
    write_json(output / "checkpoint-summary.json", summary)
    return _keep(ask_checkpoint(summary, recipe).verdict, output)


def _choose_quantizer(config: Config, recipe: Recipe, device: Device) -> Quantizer:
    """Return the quantizer asked for, else the one whose export this device can serve best."""
    able = quantizers.able(config.recipe)
    if config.quantizer in able:
        return config.quantizer
    if config.quantizer is not None:
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"{config.quantizer} cannot carry out recipe {config.recipe}; {', '.join(able)} can",
        )
    return next((row.quantizer for row in rows_for(recipe.bucket, device, able)), able[0])


def evaluate_only(
    config: Config, output: Path, world: World, progress: Progress
) -> tuple[Verdict, Mapping[str, Any]]:
    """Evaluate one model into ``output`` and ask gate_run; return its verdict and the scores.

    Raises:
        Failure: the request cannot work, or a tool failed.
        OSError: ``output`` exists already or cannot be written.
    """
    suite = load_suite(config.suite)
    model = resolve_model(config.model)
    engine = config.engine.name or Engine.VLLM
    _check_engine(engine, config, world, model)
    output.mkdir(parents=True)
    tools = LocalTools(world, ignore)
    session = tools.open_session(engine, _alone(model), config, longest_request(suite, model))
    inquiry = Inquiry(
        side="source",
        suite=suite,
        settings=harness_settings(config, suite, model),
        directory=output,
        request_cache=output / "requests",
        stall_s=config.watchdog.evaluation_s,
    )
    try:
        evaluation = evaluate(inquiry, lambda: session, tools, world, progress)
    finally:
        session.close()
    write_json(output / "run-summary.json", evaluation.summary)
    return _keep(gates.evaluate_run(evaluation.summary), output), evaluation.results.scores()


def check_serving(
    config: Config, source: str, output: Path, world: World, progress: Progress
) -> Verdict:
    """Serve a checkpoint, compare its answers with those of ``source``, stop; ask gate_canary.

    Raises:
        Failure: the request cannot work, or the source cannot be served.
        OSError: ``output`` exists already or cannot be written.
    """
    suite = load_suite(config.suite)
    model, candidate = resolve_model(source), resolve_model(config.model)
    sides = Sides(source=model.path, candidate=candidate.path)
    engine = config.engine.name or Engine.VLLM
    _check_engine(engine, config, world, model, candidate)
    output.mkdir(parents=True)
    longest = longest_request(suite, model)
    session = LocalTools(world, ignore).open_session(engine, sides, config, longest)
    try:
        evidence = session.answer_canary(suite.canary_prompts, output, progress)
    finally:
        session.close()
    write_json(output / "canary.json", evidence)
    return _keep(gates.evaluate_canary(evidence), output)


def serve(
    config: Config,
    output: Path,
    world: World,
    progress: Progress,
    announce: Callable[[Endpoint], None],
) -> None:
    """Serve a model with vLLM until interrupted; ``announce`` is called once it answers.

    Raises:
        Failure: the request cannot work, or the server does not get healthy or dies.
        KeyboardInterrupt: stopped on request; the server has ended.
    """
    model = resolve_model(config.model)
    _check_engine(Engine.VLLM, config, world, model)
    output.mkdir(parents=True)
    session = LocalTools(world, ignore).open_session(Engine.VLLM, _alone(model), config, None)
    assert isinstance(session, VllmSession)
    try:
        backend = session.backend("source", output, progress)
        announce(
            Endpoint(
                base_url=backend["base_url"],
                model=backend["served_name"],
                api_key=session.secrets("source")["OPENAI_API_KEY"],
            )
        )
        while True:
            session.check("source")
            time.sleep(CHECK_EVERY_S)
    finally:
        session.close()


def _alone(model: Model) -> Sides:
    return Sides(source=model.path, candidate=model.path)


def _check_engine(engine: Engine, config: Config, world: World, *models: Model) -> None:
    check_port(config)
    for model in models:
        check_loadable(model.quantized, engine, world.machine.device)
    for name in environments_of(engine, world.machine.device):
        check_environment(world, name)


def _keep(verdict: Verdict, output: Path) -> Verdict:
    write_json(output / "verdict.json", verdict.document())
    return verdict
