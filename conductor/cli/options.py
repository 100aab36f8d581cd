"""What several commands can be told, each option described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conductor.compatibility import Engine, Quantizer
from conductor.config import DEFAULTS, Executor

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
ExecutorOption = Annotated[
    Executor | None,
    typer.Option(
        help="Where workers and servers run: local (this machine) or slurm (jobs). [local]",
        metavar="NAME",
        rich_help_panel=AROUND,
    ),
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        help="With --executor slurm: the cluster, by its name in clusters.yaml. [the only one]",
        metavar="NAME",
        rich_help_panel=AROUND,
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

JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print JSON for programs instead.", rich_help_panel=AROUND),
]
WorkspaceOption = Annotated[
    Path | None,
    typer.Option(help="Where runs and tracking live. [day0-workspace]", rich_help_panel=AROUND),
]
RunArgument = Annotated[
    str | None,
    typer.Argument(
        help="A run's directory, its id or the beginning of one; the latest if left out.",
        show_default=False,
    ),
]


def workspace_of(given: Path | None) -> Path:
    """Return the workspace that a command looks into."""
    return (given or Path(DEFAULTS["workspace"])).expanduser().absolute()
