"""``day0 release`` and ``resume``: from source to decision, and on from where it stopped."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from conductor.chain import STAGES, Steps, check_steps
from conductor.cli.ending import EXIT_STOPPED, Ending, display, ending_well, load, stop
from conductor.cli.options import (
    AROUND,
    QUESTIONS,
    VERDICT,
    CalibrationOption,
    ClusterOption,
    ConfigOption,
    EngineOption,
    ExecutorOption,
    JsonOption,
    LimitOption,
    ModelArgument,
    QuantizerOption,
    RecipeOption,
    RelativeOption,
    RunArgument,
    SeedOption,
    SuiteOption,
    ThresholdOption,
    WorkspaceOption,
    workspace_of,
)
from conductor.config import Overlap, Rule
from conductor.failure import Failure
from gates import FailureClass

if TYPE_CHECKING:
    from conductor.config import Config
    from conductor.display import LiveDisplay, PlainDisplay
    from conductor.release import Conductor

GOING_ON = "Going on"
STEPS = ", ".join(STAGES)

FromStepOption = Annotated[
    str | None,
    typer.Option(
        help=f"Do again from this step on; those before it must be done: {STEPS}.",
        metavar="STEP",
        rich_help_panel=GOING_ON,
    ),
]
ToStepOption = Annotated[
    str | None,
    typer.Option(
        help="Stop after this step, to be resumed later.", metavar="STEP", rich_help_panel=GOING_ON
    ),
]
OnlyStepOption = Annotated[
    str | None,
    typer.Option(
        help="Do this step again, and no other.", metavar="STEP", rich_help_panel=GOING_ON
    ),
]
AcceptDriftOption = Annotated[
    bool,
    typer.Option(
        "--accept-drift",
        help="Go on although something that the release depends on has changed; what it makes "
        "void is done again, and the report says so.",
        rich_help_panel=GOING_ON,
    ),
]
PlanOnlyOption = Annotated[
    bool,
    typer.Option(
        "--plan-only",
        help="Print what would run, what would be re-used and why, sizes and commands; write "
        "nothing.",
        rich_help_panel=GOING_ON,
    ),
]


def release(
    model: ModelArgument = None,
    recipe: RecipeOption = None,
    suite: SuiteOption = None,
    threshold: ThresholdOption = None,
    relative: RelativeOption = None,
    rule: Annotated[
        Rule | None,
        typer.Option(
            help="noninferiority: a task passes when the upper bound of its drop is under the "
            "margin, and stays undecided when the questions are too few to tell. threshold: "
            "the observed drop alone is held to it, chance included. [noninferiority]",
            metavar="RULE",
            rich_help_panel=VERDICT,
        ),
    ] = None,
    until_decided: Annotated[
        bool | None,
        typer.Option(
            "--until-decided",
            help="Ask questions drawn by lot in growing batches, and stop as soon as one task "
            "fails or all pass; the error rates hold at every look. Not with --limit or --rule "
            "threshold.",
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    first_batch: Annotated[
        int | None,
        typer.Option(
            help="With --until-decided: questions of each task before the first look. [200]",
            min=1,
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    max_samples: Annotated[
        int | None,
        typer.Option(
            help="With --until-decided: most questions of each task. [all]",
            min=1,
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    max_repeats: Annotated[
        int | None,
        typer.Option(
            help="With --until-decided: answers to each question of tasks that sample, each under "
            "a seed of its own. [1]",
            min=1,
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    noise_floor: Annotated[
        bool | None,
        typer.Option(
            "--noise-floor",
            help="Evaluate the source twice and report how far it differs from itself.",
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    quantizer: QuantizerOption = None,
    engine: EngineOption = None,
    calibration: CalibrationOption = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
    run: Annotated[
        str | None,
        typer.Option(
            "--resume",
            help="Go on with this run: its directory, its id or the beginning of one.",
            metavar="RUN",
            rich_help_panel=GOING_ON,
        ),
    ] = None,
    from_step: FromStepOption = None,
    to_step: ToStepOption = None,
    only_step: OnlyStepOption = None,
    accept_drift: AcceptDriftOption = False,
    plan_only: PlanOnlyOption = False,
    dry_run: Annotated[
        bool | None,
        typer.Option(
            "--dry-run",
            help="Go through the whole chain with recorded results in place of the tools.",
            rich_help_panel=GOING_ON,
        ),
    ] = None,
    fresh_baseline: Annotated[
        bool | None,
        typer.Option(
            "--fresh-baseline",
            help="Evaluate the source anew although its evaluation is cached.",
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic",
            help="Pin every seed, ask one question at a time, and ask the tools for their "
            "deterministic modes; the report says what could not be pinned.",
            rich_help_panel=AROUND,
        ),
    ] = None,
    overlap: Annotated[
        Overlap | None,
        typer.Option(
            help="Evaluate the source while the candidate is quantized: auto (where there is room "
            "for both), always, never. [auto]",
            metavar="WHEN",
            rich_help_panel=AROUND,
        ),
    ] = None,
    executor: ExecutorOption = None,
    cluster: ClusterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take one model from source to a publish decision.

    The stages run in this order, each followed by its gate, and none starts after a failed gate:
    setup, ptq, deploy, baseline_eval, candidate_eval, compare, closeout.

    Source and candidate answer the same questions, and each task is judged by an interval of its
    drop: pass, fail, or undecided. ACCEPT needs every task to pass; `day0 plan` says beforehand
    whether a suite has enough questions for that.

    A release that is stopped or killed goes on with `day0 resume`; nothing that came to its end is
    run twice. A second recipe for the same model finds the source's evaluation in the workspace.

    Exit codes: 0 ACCEPT, 1 REGRESSION, 2 unusable input, 3 ANOMALOUS, 4 INFEASIBLE,
    5 aborted because the machine or a service failed, 130 stopped on request and resumable.

    Example: `day0 release demo --recipe int8`
    """
    options = {
        "model": model,
        "recipe": recipe,
        "suite": suite,
        "threshold": threshold,
        "relative": relative,
        "rule": rule,
        "until_decided": until_decided,
        "first_batch": first_batch,
        "max_samples": max_samples,
        "max_repeats": max_repeats,
        "noise_floor": noise_floor,
        "quantizer": quantizer,
        "engine.name": engine,
        "calibration.data": calibration,
        "workspace": workspace and str(workspace),
        "seed": seed,
        "limit": limit,
        "dry_run": dry_run,
        "fresh_baseline": fresh_baseline,
        "overlap": overlap,
        "deterministic": deterministic,
        "executor": executor,
        "cluster": cluster,
    }
    with ending_well() as ending:
        steps = _steps(from_step, to_step, only_step)
        if run is not None:
            _go_on(run, workspace, config, options, steps, accept_drift, plan_only, as_json, ending)
        resolved = load(config, options)
        run_dir = resolved.workspace / "runs" / _name(resolved)
        if plan_only:
            _print_plan(resolved, steps, as_json, run_dir)
        if steps.first not in (None, STAGES[0]):
            raise Failure(
                FailureClass.USER_CONFIG_ERROR,
                f"--from-step {steps.first} skips steps that a new release has not done; say which "
                "release is meant with --resume RUN",
            )
        ending.resume_with = _resume_command(run_dir)
        with display() as shown:
            conductor = _conductor(resolved, shown)
            document = _until_stopped(lambda: conductor.run(resolved, run_dir, steps), ending)
        _end(document, as_json)


def resume(
    run: RunArgument = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    from_step: FromStepOption = None,
    to_step: ToStepOption = None,
    only_step: OnlyStepOption = None,
    accept_drift: AcceptDriftOption = False,
    plan_only: PlanOnlyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Go on with a release that was stopped, killed or aborted.

    What came to its end, and still is as it was, is not run again; what was cut short goes on. If
    something that the release depends on has changed since, it says what, and nothing is done.

    Exit codes: as of `day0 release`.

    Example: `day0 resume`
    """
    with ending_well() as ending:
        steps = _steps(from_step, to_step, only_step)
        _go_on(run, workspace, config, {}, steps, accept_drift, plan_only, as_json, ending)


def _go_on(
    run: str | None,
    workspace: Path | None,
    config: Path | None,
    options: dict[str, Any],
    steps: Steps,
    accept_drift: bool,
    plan_only: bool,
    as_json: bool,
    ending: Ending,
) -> NoReturn:
    from conductor.config import load_recorded
    from conductor.looking_back import finished_report
    from conductor.release import CONFIG
    from conductor.run_status import find_run

    run_dir = find_run(run, workspace_of(workspace))
    asked = {name for name, value in options.items() if value is not None} - {"workspace"}
    only_on = steps == Steps() and not (plan_only or accept_drift or config or asked)
    if only_on and (document := finished_report(run_dir, _now)):
        _end(document, as_json)
    then, now = load_recorded(run_dir / CONFIG, config, options)
    if plan_only:
        _print_plan(now, steps, as_json, run_dir, then)
    ending.resume_with = _resume_command(run_dir)
    with display() as shown:
        conductor = _conductor(now, shown)
        document = _until_stopped(
            lambda: conductor.resume(run_dir, then, now, steps, accept_drift=accept_drift), ending
        )
    _end(document, as_json)


def _steps(from_step: str | None, to_step: str | None, only_step: str | None) -> Steps:
    try:
        return check_steps(from_step, to_step, only_step)
    except ValueError as error:
        raise Failure(FailureClass.USER_CONFIG_ERROR, str(error)) from None


def _name(config: Config) -> str:
    from conductor.journal import name_run

    return name_run(
        config.model, config.recipe, datetime.now(UTC), secrets.token_hex(2), config.run_name
    )


def _now() -> datetime:
    return datetime.now(UTC)


def _resume_command(run_dir: Path) -> str:
    from conductor.run_status import resume_command

    return resume_command(run_dir)


def _conductor(config: Config, shown: LiveDisplay | PlainDisplay) -> Conductor:
    from conductor.release import Conductor
    from conductor.tools import find_tools

    world, open_tools = find_tools(config, dict(os.environ))
    return Conductor(
        world=world,
        clock=_now,
        sleep=time.sleep,
        observer=shown,
        open_tools=open_tools,
    )


def _until_stopped(work: Callable[[], dict[str, Any]], ending: Ending) -> dict[str, Any]:
    from conductor.release import StoppedAsAsked

    try:
        return work()
    except StoppedAsAsked as stopped:
        stop(EXIT_STOPPED, f"{stopped}; resume with: {ending.resume_with}")


def _print_plan(
    config: Config, steps: Steps, as_json: bool, run_dir: Path, then: Config | None = None
) -> NoReturn:
    """Print what a release would do, and end; ``then`` is how one in ``run_dir`` began."""
    from conductor.digests import Digests
    from conductor.journal import read_history
    from conductor.looking_back import damaged_outputs, look_back
    from conductor.models import look_up_model
    from conductor.release_plan import Past, look_into_cache, plan_document, plan_report
    from conductor.stages import choose_tools, find_source
    from conductor.tools import find_tools

    world, _ = find_tools(config, dict(os.environ))
    digests = Digests(None)
    if then is None:
        choice = choose_tools(config, world)
        past, plan = None, find_source(choice, config, revision=None, find=look_up_model)
    else:
        history = read_history(run_dir)
        plan, _, changes = look_back(run_dir, history, then, config, world, digests)
        damaged = damaged_outputs(run_dir, history, digests)
        past = Past(history=history, changes=changes, damaged=damaged)
    baseline = look_into_cache(config, plan, world, digests)
    document = plan_document(
        config, plan, world, run_dir, steps=steps, past=past, baseline=baseline
    )
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        from rich.console import Console

        console = Console()
        console.print(plan_report(document), soft_wrap=not console.is_terminal)
    raise typer.Exit(0)


def _end(document: dict[str, Any], as_json: bool) -> NoReturn:
    """Print what a release came to, and end with its exit code."""
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        from rich.console import Console

        from conductor.report import terminal_summary

        console = Console()
        plain = not console.is_terminal
        console.print(terminal_summary(document, plain=plain), markup=False, soft_wrap=plain)
    raise typer.Exit(document["exit_code"])
