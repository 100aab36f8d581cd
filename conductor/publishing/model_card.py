"""The model card of an accepted candidate: what its release measured, and nothing else.

Of the source's own card only licence and descent are kept: what it claims was measured on another
model. No path of the machine that made the release is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conductor.files import read_regular
from conductor.report import render_markdown
from conductor.report.wording import Document, listed, printable

LARGEST_CARD_BYTES = 2**20
KEPT = ("license", "license_name", "license_link", "base_model")
"""Metadata of the source's card that hold for the candidate as well."""
SETTINGS: Mapping[str, str] = {
    "apply_chat_template": "chat template applied",
    "engine.dtype": "number format of the engine",
    "engine.max_model_len": "longest sequence of the engine, tokens",
    "max_length": "longest sequence of a question, tokens",
    "seed": "seed",
}
"""Settings of both evaluations that say how a score can be compared, and what to call them."""
PACKAGES = (
    *("torch", "transformers", "vllm", "llmcompressor", "nvidia-modelopt"),
    *("compressed-tensors", "lm-eval"),
)
"""Packages that make and measure a checkpoint."""


def source_metadata(paths: Iterable[Path]) -> dict[str, Any]:
    """Return what is kept of the source's card: the first of ``paths`` that is one.

    A card that cannot be read says nothing.
    """
    import yaml
    from huggingface_hub import ModelCard

    for path in paths:
        try:
            text = read_regular(path.resolve(), LARGEST_CARD_BYTES).decode()
            data = ModelCard(text, ignore_metadata_errors=True).data
        except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
            continue
        return {name: data.get(name) for name in KEPT if data.get(name)}
    return {}


def model_card(
    report: Document, *, repo: str, source: Mapping[str, Any], checkpoint_digest: str
) -> str:
    """Return the text of the card: metadata with the results, then what they mean.

    Args:
        report: a validated release document (schema ``report.json``).
        repo: ``namespace/name`` of the repository that it is for.
        source: metadata of the source's card; see :func:`source_metadata`.
        checkpoint_digest: SHA-256 of the evaluated files together.
    """
    from huggingface_hub import ModelCard

    name = repo.rpartition("/")[2]
    body = render_markdown(
        _without_places(report),
        "model_card.md.j2",
        name=name,
        source_words=_source_words(report["model"]),
        licence_words=_licence_words(source),
        conditions=_conditions(report),
        packages=_packages(report["versions"]),
        tracking_runs=_tracking_runs(report["tracking"]),
        checkpoint_digest=checkpoint_digest,
    )
    return str(ModelCard(f"---\n{_metadata(report, name, source)}\n---\n\n{body}"))


def _without_places(report: Document) -> Document:
    """Return the report with the name of calibration text that lay in a file, not its place."""
    calibration = report["recipe"].get("calibration")
    if (
        not calibration
        or not calibration["source"]
        or not Path(calibration["source"]).is_absolute()
    ):
        return report
    named = {**calibration, "source": Path(calibration["source"]).name}
    return {**report, "recipe": {**report["recipe"], "calibration": named}}


def _metadata(report: Document, name: str, source: Mapping[str, Any]) -> str:
    """Return the YAML at the card's head."""
    from huggingface_hub import ModelCardData

    hub_id = _hub_id(report["model"])
    descent = {"base_model": hub_id, "base_model_relation": "quantized"} if hub_id else {}
    results = _results(report)
    data = ModelCardData(
        **{**source, **descent},
        model_name=name,
        tags=["day0"],
        eval_results=results or None,
    )
    return data.to_yaml()


def _results(report: Document) -> list[Any]:
    """Return one evaluation result a task that was scored, in units of its scale."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=printable(task["task"]),
            dataset_name=printable(task["task"]),
            metric_type=printable(task["metric"]),
            metric_value=task["candidate"],
            metric_args={
                "scale": task["scale"],
                "higher_is_better": task["higher_is_better"],
                "questions": task["samples"],
                "standard_error": task["candidate_stderr"],
                "drop_from_source": task["drop"],
                "drop_bounds": [task.get("drop_lower"), task.get("drop_upper")],
            },
        )
        for task in report["tasks"]
        if task["candidate"] is not None and task["metric"] is not None
    ]


def _hub_id(model: Document) -> str | None:
    """Return the Hub id of the source; None of a directory, which has no commit."""
    return model["requested"].partition("@")[0] if model["revision"] else None


def _source_words(model: Document) -> str:
    return _hub_id(model) or Path(model["requested"]).name


def _licence_words(source: Mapping[str, Any]) -> str:
    if "license" not in source:
        return "The release recorded no licence; look for it at the source."
    return f"The licence is the source's, as its card has it: {source['license']}."


def _conditions(report: Document) -> list[tuple[str, str]]:
    values = report["settings"].get("values", {})
    return [(words, values[name]) for name, words in SETTINGS.items() if name in values]


def _packages(versions: Document) -> str:
    """Say the versions of what made and measured the checkpoint, in each environment."""
    said = {
        environment: [
            f"{package} {installed[package]}" for package in PACKAGES if package in installed
        ]
        for environment, installed in versions.items()
    }
    words = [
        f"{environment}: {listed(packages)}" for environment, packages in said.items() if packages
    ]
    return "; ".join(words) or "not recorded"


def _tracking_runs(tracking: Document) -> str:
    """Say the run IDs, without the server: its address is its owner's affair."""
    runs = {"release": tracking["run_id"], **tracking["stage_run_ids"]}
    return listed(f"{stage} {run_id}" for stage, run_id in runs.items() if run_id) or "none"
