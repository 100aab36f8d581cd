"""The ``day0`` command: the only place that prints, and that ends with an exit code."""

from __future__ import annotations

import typer

from conductor.cli import (
    cluster,
    config,
    evidence,
    fleet,
    plan,
    publish,
    release,
    runs,
    single_stages,
    smoke,
    stop,
)
from conductor.cli.ending import Commands
from conductor.cli.options import SINGLE_STAGE_EXITS

app = typer.Typer(
    cls=Commands,
    help="Quantize a model, prove the checkpoint, serve it, evaluate it, and decide.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
cache = typer.Typer(
    help="The cache of baseline evaluations.", no_args_is_help=True, rich_markup_mode="markdown"
)
configuration = typer.Typer(
    help="What configurations say, and whether smoke runs are production.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
clusters = typer.Typer(
    help="Slurm clusters: what is said of them, and whether it holds.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
scenarios = typer.Typer(rich_markup_mode="markdown")

app.command()(release.release)
app.command()(release.resume)
app.command()(fleet.fleet)
app.command()(stop.stop)
app.command()(runs.status)
app.command()(runs.runs)
app.command()(runs.repair)
app.command()(runs.sync)
app.command()(evidence.verify)
app.command()(evidence.bundle)
app.command()(publish.publish)
app.add_typer(cache, name="cache")
cache.command()(runs.explain)
app.add_typer(configuration, name="config")
configuration.command()(config.show)
configuration.command()(config.check)
app.add_typer(clusters, name="cluster")
clusters.command()(cluster.check)
clusters.command()(cluster.show)
clusters.command("list")(cluster.list_clusters)
app.add_typer(scenarios, name="smoke")
scenarios.callback(invoke_without_command=True)(smoke.smoke)
scenarios.command()(smoke.check)
app.command()(smoke.done)
app.command()(plan.plan)
app.command(epilog=SINGLE_STAGE_EXITS)(single_stages.ptq)
app.command(epilog=SINGLE_STAGE_EXITS)(single_stages.serve)
app.command(epilog=SINGLE_STAGE_EXITS)(single_stages.evaluate)


def main() -> None:
    """Run the command line."""
    app()
