"""The ``day0`` command: the place where a release is printed and turned into an exit code."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from conductor.compatibility import Engine, Quantizer
from conductor.config import Rule
from conductor.failure import Failure
from gates import FailureClass

if TYPE_CHECKING:
    from rich.table import Table

    from conductor.config import Config
    from conductor.display import LiveDisplay, PlainDisplay
    from conductor.planning import Outlook
    from gates import Verdict

EXIT_FAILED = 1
EXIT_UNUSABLE = 2
EXIT_SYSTEMIC = 5
EXIT_STOPPED = 130

app = typer.Typer(
    help="Quantize a model, prove the checkpoint, serve it, evaluate it, and decide.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

MODEL_HELP = "`demo`, a checkpoint directory, or a Hugging Face id (`org/name@revision`)."
SINGLE_STAGE_EXITS = (
    "Exit codes: 0 the gate passed, 1 it failed, 2 unusable input, 5 the machine or a tool failed, "
    "130 stopped on request."
)

WHAT = "Model and tools"
QUESTIONS = "Questions"
VERDICT = "Decision"
AROUND = "Everything else"

ModelArgument = Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="How to quantize: nvfp4, fp8, int8, int4_awq, w4a16, ... or a YAML file.",
        rich_help_panel=WHAT,
    ),
]
SuiteOption = Annotated[
    str | None,
    typer.Option(
        help="What to evaluate: demo, standard, or a YAML file. [demo for the demo model, else "
        "standard]",
        rich_help_panel=QUESTIONS,
    ),
]
QuantizerOption = Annotated[
    Quantizer | None,
    typer.Option(
        help="Who quantizes: modelopt or llmcompressor. [what works here]",
        metavar="NAME",
        rich_help_panel=WHAT,
    ),
]
EngineOption = Annotated[
    Engine | None,
    typer.Option(
        help="Who answers: vllm or transformers. [what works here]",
        metavar="NAME",
        rich_help_panel=WHAT,
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(help="Calibration text: a JSONL file or a Hub data set id.", rich_help_panel=WHAT),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="YAML with any of these and more; options override it.", rich_help_panel=AROUND
    ),
]
SeedOption = Annotated[
    int | None, typer.Option(help="One seed for everything. [0]", min=0, rich_help_panel=AROUND)
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        help="Ask only the first N documents of each task; no ground for publishing.",
        min=1,
        rich_help_panel=QUESTIONS,
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        help="Margin: largest drop allowed, as a fraction of a task's scale. [0.01]",
        rich_help_panel=VERDICT,
    ),
]
RelativeOption = Annotated[
    bool | None,
    typer.Option(
        "--relative",
        help="Take the margin as a fraction of the baseline's score; perplexities need it.",
        rich_help_panel=VERDICT,
    ),
]
DiscordanceOption = Annotated[
    float | None,
    typer.Option(
        help="Share of questions expected to be right on one side only; 0.02 to 0.10 is usual. "
        "More of them hide a drop of the same size. [the suite's, else 0.08]",
        rich_help_panel=VERDICT,
    ),
]
OutputOption = Annotated[
    Path, typer.Option(help="A directory that does not exist yet.", resolve_path=True)
]


@app.command()
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
    workspace: Annotated[
        Path | None,
        typer.Option(help="Where runs and tracking live. [day0-workspace]", rich_help_panel=AROUND),
    ] = None,
    config: ConfigOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print the report document instead of the summary.",
            rich_help_panel=AROUND,
        ),
    ] = False,
) -> None:
    """Take one model from source to a publish decision.

    The stages run in this order, each followed by its gate, and none starts after a failed gate:
    setup, ptq, deploy, baseline_eval, candidate_eval, compare, closeout.

    Source and candidate answer the same questions, and each task is judged by an interval of its
    drop: pass, fail, or undecided. ACCEPT needs every task to pass; `day0 plan` says beforehand
    whether a suite has enough questions for that.

    Exit codes: 0 ACCEPT, 1 REGRESSION, 2 unusable input, 3 ANOMALOUS, 4 INFEASIBLE,
    5 aborted because the machine or a service failed, 130 stopped on request.

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
    }
    with _ending_well():
        with _display() as display:
            document = _run_release(_load(config, options), display)
        if as_json:
            print(json.dumps(document, indent=2))
        else:
            _print_summary(document)
        raise typer.Exit(document["exit_code"])


@app.command()
def plan(
    model: ModelArgument = None,
    suite: SuiteOption = None,
    threshold: ThresholdOption = None,
    relative: RelativeOption = None,
    discordance: DiscordanceOption = None,
    limit: LimitOption = None,
    config: ConfigOption = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel=AROUND),
    ] = False,
) -> None:
    """Say what a suite can tell, before anything is asked.

    Per task: how many questions, the margin, the smallest drop that they tell from none, and the
    power: the chance that a candidate that loses nothing is shown to pass. No model is loaded: its
    name only says which suite a release of it would take.

    Exit codes: 0 whatever the figures say, 2 unusable input.

    Example: `day0 plan demo --threshold 0.02`
    """
    from conductor.planning import look_ahead
    from conductor.suites import check_perplexities, load_suite

    options = {
        "model": model,
        "suite": suite,
        "threshold": threshold,
        "relative": relative,
        "discordance": discordance,
        "limit": limit,
    }
    with _ending_well():
        resolved = _load(config, options, ())
        chosen = load_suite(resolved.suite)
        check_perplexities(chosen, relative=resolved.relative, until_decided=resolved.until_decided)
        outlook = look_ahead(
            chosen,
            threshold=resolved.threshold,
            relative=resolved.relative,
            discordance=resolved.discordance,
            limit=resolved.max_samples or resolved.limit,
        )
        if as_json:
            print(json.dumps(outlook.document(), indent=2))
        else:
            _print_outlook(outlook)


@app.command(epilog=SINGLE_STAGE_EXITS)
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
    from conductor.release_state import World
    from conductor.single_stage import quantize_only

    options = {
        "model": model,
        "recipe": recipe,
        "quantizer": quantizer,
        "calibration.data": calibration,
        "seed": seed,
    }
    with _ending_well():
        with _display() as display:
            resolved, world = _load(config, options), World.find(dict(os.environ))
            verdict = quantize_only(resolved, output, world, display.stage_progress)
        _print_verdict(verdict)


@app.command(epilog=SINGLE_STAGE_EXITS)
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
    from conductor.release_state import World

    options = {
        "model": model,
        "suite": suite,
        "engine.name": engine,
        "seed": seed,
    }
    with _ending_well(), _display() as display:
        resolved, world = _load(config, options, ("model",)), World.find(dict(os.environ))
        if source is None:
            single_stage.serve(resolved, output, world, display.stage_progress, _announce)
        else:
            verdict = single_stage.check_serving(
                resolved, source, output, world, display.stage_progress
            )
            _print_verdict(verdict)


@app.command(epilog=SINGLE_STAGE_EXITS)
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
    from conductor.release_state import World
    from conductor.single_stage import evaluate_only

    options = {
        "model": model,
        "suite": suite,
        "engine.name": engine,
        "seed": seed,
        "limit": limit,
    }
    with _ending_well():
        with _display() as display:
            resolved, world = _load(config, options, ("model",)), World.find(dict(os.environ))
            verdict, scores = evaluate_only(resolved, output, world, display.stage_progress)
        _print_verdict(verdict, scores=scores)


def _load(
    path: Path | None, options: dict[str, Any], required: tuple[str, ...] = ("model", "recipe")
) -> Config:
    from conductor.config import load_config

    return load_config(path, options, required)


def _run_release(config: Config, display: LiveDisplay | PlainDisplay) -> dict[str, Any]:
    from conductor.journal import name_run
    from conductor.release import Conductor
    from conductor.release_state import World

    run_id = name_run(config.model, config.recipe, datetime.now(UTC), secrets.token_hex(2))
    conductor = Conductor(
        world=World.find(dict(os.environ)),
        clock=lambda: datetime.now(UTC),
        sleep=time.sleep,
        observer=display,
    )
    return conductor.run(config, config.workspace / "runs" / run_id)


@contextmanager
def _display() -> Iterator[LiveDisplay | PlainDisplay]:
    from rich.console import Console

    from conductor.display import open_display

    with open_display(Console(stderr=True)) as display:
        yield display


@contextmanager
def _ending_well() -> Iterator[None]:
    """Turn what may stop a command into one message and a documented exit code."""
    # Also where a shell started us with SIGINT ignored, as it does for background jobs.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        yield
    except Failure as failure:
        refused = failure.failure_class is FailureClass.USER_CONFIG_ERROR
        _stop(EXIT_UNUSABLE if refused else EXIT_SYSTEMIC, f"error: {failure.message}")
    except FileExistsError as error:
        _stop(EXIT_UNUSABLE, f"error: {error.filename} exists already; name another directory")
    except OSError as error:
        _stop(EXIT_SYSTEMIC, f"error: {error.strerror or error}: {error.filename}")
    except typer.Exit:
        raise
    except Exception as error:
        # An exit code of 1 says REGRESSION; a defect of ours must not look like one.
        traceback.print_exc(limit=-3)
        _stop(EXIT_SYSTEMIC, f"error: a defect of day0: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        _stop(EXIT_STOPPED, "stopped on request; every process that was started has ended")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _stop(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(code)


def _announce(endpoint: Any) -> None:
    print(f"base URL: {endpoint.base_url}", f"model: {endpoint.model}", sep="\n")
    print(f"API key: {endpoint.api_key}", "Ctrl-C stops it.", sep="\n", flush=True)


def _print_outlook(outlook: Outlook) -> None:
    from rich.console import Console

    console = Console()
    console.print(_outlook_table(outlook))
    for line in OUTLOOK_WORDS:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if outlook.power is not None:
        console.print(f"Power of the suite, all tasks together: {outlook.power:.0%}.")
    for warning in outlook.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)


OUTLOOK_WORDS = (
    "discordant: assumed share of questions right on one side only; min drop: the smallest "
    "that can be told from none;",
    "power: the chance that a candidate that loses nothing is shown to pass; needed: questions for "
    "a power of 80 %.",
)


def _outlook_table(outlook: Outlook) -> Table:
    from rich.table import Table

    table = Table(title=f"What suite {outlook.suite} can tell")
    table.add_column("task", no_wrap=True, overflow="fold")
    for heading in ("questions", "margin", "discordant", "min drop", "power", "needed"):
        table.add_column(heading, justify="right")
    for task in outlook.tasks:
        unknown = task.questions is None
        table.add_row(
            task.task,
            "?" if unknown else f"{task.questions:,}",
            f"{task.margin:.2%}",
            f"{task.discordance:.1%}",
            "?" if task.detectable_drop is None else f"{task.detectable_drop:.2%}",
            "?" if task.power is None else f"{task.power:.0%}",
            "none" if task.needed is None else f"{task.needed:,}",
        )
    return table


def _print_verdict(verdict: Verdict, **more: Any) -> NoReturn:
    print(json.dumps({**verdict.document(), **more}, indent=2))
    raise typer.Exit(0 if verdict.passed else EXIT_FAILED)


def _print_summary(document: dict[str, Any]) -> None:
    from rich.console import Console

    from conductor.report import terminal_summary

    console = Console()
    plain = not console.is_terminal
    console.print(terminal_summary(document, plain=plain), markup=False, soft_wrap=plain)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
