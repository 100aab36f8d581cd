"""``day0 plan``: what a suite can tell, before anything is asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from conductor.cli.ending import ending_well, load
from conductor.cli.options import (
    ConfigOption,
    DiscordanceOption,
    JsonOption,
    LimitOption,
    ModelArgument,
    RelativeOption,
    SuiteOption,
    ThresholdOption,
)

if TYPE_CHECKING:
    from rich.table import Table

    from conductor.planning import Outlook


def plan(
    model: ModelArgument = None,
    suite: SuiteOption = None,
    threshold: ThresholdOption = None,
    relative: RelativeOption = None,
    discordance: DiscordanceOption = None,
    limit: LimitOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
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
    with ending_well():
        resolved = load(config, options, ())
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
