"""The ``day0`` command: the only place that prints, and that ends with an exit code."""

from __future__ import annotations

import typer

from conductor.cli import plan, release, runs, single_stages
from conductor.cli.options import SINGLE_STAGE_EXITS

app = typer.Typer(
    help="Quantize a model, prove the checkpoint, serve it, evaluate it, and decide.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
cache = typer.Typer(
    help="The cache of baseline evaluations.", no_args_is_help=True, rich_markup_mode="markdown"
)

app.command()(release.release)
app.command()(release.resume)
app.command()(runs.status)
app.command()(runs.runs)
app.command()(runs.repair)
app.command()(runs.sync)
app.add_typer(cache, name="cache")
cache.command()(runs.explain)
app.command()(plan.plan)
app.command(epilog=SINGLE_STAGE_EXITS)(single_stages.ptq)
app.command(epilog=SINGLE_STAGE_EXITS)(single_stages.serve)
app.command(epilog=SINGLE_STAGE_EXITS)(single_stages.evaluate)


def main() -> None:
    """Run the command line."""
    app()
