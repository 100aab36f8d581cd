"""``day0 ptq``, ``serve`` and ``evaluate``: one stage on its own, with its gate."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from conductor.cli.ending import EXIT_FAILED, display, ending_well, load
from conductor.cli.options import (
    CalibrationOption,
    ConfigOption,
    EngineOption,
    LimitOption,
    ModelArgument,
    OutputOption,
    QuantizerOption,
    RecipeOption,
    SeedOption,
    SuiteOption,
)
from conductor.failure import unusable

if TYPE_CHECKING:
    from conductor.config import Config
    from conductor.world import World
    from gates import Verdict


def ptq(
    output: OutputOption,
    model: ModelArgument = None,
    recipe: RecipeOption = None,
    quantizer: QuantizerOption = None,
    calibration: CalibrationOption = None,
    config: ConfigOption = None,
    seed: SeedOption = None,
) -> None:
    """Quantize a model and prove what was written; prints the verdict of gate_ptq.

    Example: `day0 ptq demo --recipe int8 --output ./demo-int8`
    """
    from conductor.single_stage import quantize_only

    options = {
        "model": model,
        "recipe": recipe,
        "quantizer": quantizer,
        "calibration.data": calibration,
        "seed": seed,
    }
    with ending_well():
        with display() as shown:
            resolved = load(config, options)
            world = _find_here(resolved)
            verdict = quantize_only(resolved, output, world, shown.stage_progress)
        _print_verdict(verdict)


def serve(
    output: OutputOption,
    model: ModelArgument = None,
    source: Annotated[
        str | None,
        typer.Option(help="Ask both models the canary's prompts, compare the answers, and stop."),
    ] = None,
    suite: SuiteOption = None,
    engine: EngineOption = None,
    config: ConfigOption = None,
    seed: SeedOption = None,
) -> None:
    """Serve a checkpoint on loopback until Ctrl-C, or with --source check that it answers well.

    Example: `day0 serve ./demo-int8/checkpoint --source demo --suite demo --output ./check`
    """
    from conductor import single_stage

    options = {
        "model": model,
        "suite": suite,
        "engine.name": engine,
        "seed": seed,
    }
    with ending_well(), display() as shown:
        resolved = load(config, options, ("model",))
        world = _find_here(resolved)
        if source is None:
            single_stage.serve(resolved, output, world, shown.stage_progress, _announce)
        else:
            verdict = single_stage.check_serving(
                resolved, source, output, world, shown.stage_progress
            )
            _print_verdict(verdict)


def evaluate(
    output: OutputOption,
    model: ModelArgument = None,
    suite: SuiteOption = None,
    engine: EngineOption = None,
    config: ConfigOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
) -> None:
    """Evaluate a model on a suite and check that the run is complete; prints verdict and scores.

    Example: `day0 evaluate demo --suite demo --output ./demo-baseline`
    """
    from conductor.single_stage import evaluate_only

    options = {
        "model": model,
        "suite": suite,
        "engine.name": engine,
        "seed": seed,
        "limit": limit,
    }
    with ending_well():
        with display() as shown:
            resolved = load(config, options, ("model",))
            world = _find_here(resolved)
            verdict, scores = evaluate_only(resolved, output, world, shown.stage_progress)
        _print_verdict(verdict, scores=scores)


def _find_here(config: Config) -> World:
    """Look at this machine; refuse a configuration whose work is to be done by jobs.

    Raises:
        Failure: USER_CONFIG_ERROR where the executor is not this machine.
    """
    from conductor.config import Executor
    from conductor.tools import tools_here

    if config.executor is not Executor.LOCAL:
        _, origin = config.origins["executor"]
        raise unusable(
            f"executor: {config.executor} ({origin}) is for whole releases, and this command works "
            "on the machine that it is typed on; take the setting out, and start the command on a "
            "node, within an allocation of your own"
        )
    # Recorded results stand for a whole release, and for no stage on its own.
    return tools_here(replace(config, dry_run=False), dict(os.environ))[0]


def _announce(endpoint: Any) -> None:
    print(f"base URL: {endpoint.base_url}", f"model: {endpoint.model}", sep="\n")
    print(f"API key: {endpoint.api_key}", "Ctrl-C stops it.", sep="\n", flush=True)


def _print_verdict(verdict: Verdict, **more: Any) -> NoReturn:
    print(json.dumps({**verdict.document(), **more}, indent=2))
    raise typer.Exit(0 if verdict.passed else EXIT_FAILED)
