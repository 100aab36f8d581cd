"""The ``day0`` command. The only module that prints or exits, apart from the gate commands."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from conductor.compatibility import Engine, Quantizer
from conductor.failure import Failure

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

RELEASE_HELP = """
Take one model from source to a publish decision.

MODEL is `demo`, the directory of a checkpoint, or a Hugging Face id (`org/name@revision`).

The stages run in this order, each followed by its gate, and none starts after a failed gate:
setup, ptq, deploy, baseline_eval, candidate_eval, compare, closeout.

Exit codes: 0 ACCEPT, 1 REGRESSION, 2 unusable input, 3 ANOMALOUS, 4 INFEASIBLE,
5 aborted because the machine or a service failed, 130 stopped on request.

Examples:

    day0 release demo --recipe int8

    day0 release ./Qwen3-8B --recipe nvfp4 --suite my-suite.yaml --threshold 0.005
"""


@app.callback()
def _root() -> None:
    """Keep ``release`` a subcommand while it is the only one."""


@app.command(help=RELEASE_HELP)
def release(
    model: Annotated[
        str | None, typer.Argument(help="What to release.", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="How to quantize: nvfp4, fp8, int8, int4_awq, w4a16, ... or a YAML file."
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="What to evaluate: demo, standard, or a YAML file.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Largest drop, as a fraction of a task's scale. [0.01]")
    ] = None,
    relative: Annotated[
        bool | None, typer.Option("--relative", help="Take the drop relative to the baseline.")
    ] = None,
    quantizer: Annotated[
        Quantizer | None, typer.Option(help="Who quantizes; what works here if left out.")
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="Who answers; what works here if left out.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Calibration text: a JSONL file or a Hub data set id.")
    ] = None,
    workspace: Annotated[
        Path | None, typer.Option(help="Where runs and tracking live. [day0-workspace]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with any of these and more; options override it.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="One seed for everything. [0]", min=0)] = None,
    limit: Annotated[
        int | None, typer.Option(help="Evaluate only the first N documents of a task.", min=1)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report document instead of the summary.")
    ] = False,
) -> None:
    """Run one release; the help text is RELEASE_HELP."""
    options = {
        "model": model,
        "recipe": recipe,
        "suite": suite,
        "threshold": threshold,
        "relative": relative,
        "quantizer": quantizer,
        "engine.name": engine,
        "calibration.data": calibration,
        "workspace": workspace and str(workspace),
        "seed": seed,
        "limit": limit,
    }
    try:
        document = _run_release(config, options)
    except Failure as failure:
        _stop(EXIT_UNUSABLE, f"error: {failure.message}")
    except OSError as error:
        _stop(EXIT_SYSTEMIC, f"error: {error.strerror or error}: {error.filename}")
    except KeyboardInterrupt:
        _stop(EXIT_STOPPED, "stopped on request; every process that was started has ended")
    _print_report(document, as_json=as_json)
    raise typer.Exit(document["exit_code"])


def _run_release(config_path: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    from rich.console import Console

    from conductor.config import load_config
    from conductor.display import open_display
    from conductor.environments.builder import Environments
    from conductor.journal import name_run
    from conductor.probes.machine import probe_machine
    from conductor.release import Conductor

    config = load_config(config_path, options)
    started = datetime.now(UTC)
    run_id = name_run(config.model, config.recipe, started, secrets.token_hex(2))
    signal.signal(signal.SIGTERM, _interrupt)
    machine = probe_machine()
    with open_display(Console(stderr=True)) as display:
        conductor = Conductor(
            environments=Environments(device=machine.device),
            machine=machine,
            environ=dict(os.environ),
            clock=lambda: datetime.now(UTC),
            sleep=time.sleep,
            observer=display,
        )
        return conductor.run(config, config.workspace / "runs" / run_id)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _print_report(document: dict[str, Any], *, as_json: bool) -> None:
    import json

    from rich.console import Console

    from conductor.report import terminal_summary

    if as_json:
        print(json.dumps(document, indent=2))
        return
    console = Console()
    console.print(
        terminal_summary(document, plain=not console.is_terminal),
        markup=False,
        soft_wrap=not console.is_terminal,
    )


def _stop(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
