"""Turn a release document into a report: JSON for programs, Markdown for reviews, HTML for people.

Invariants:
- The document is validated before anything is written; an ACCEPT whose gates do not all hold is
  refused here as well.
- ``report.json`` is the record and is written first: nothing that fails afterwards can cost it. A
  plot that cannot be drawn costs that plot alone.
- The same document gives the same bytes: no clock, no random identifier.
- Task names, details and observed values are hostile text. Every template escapes each value by
  default, control characters are made visible, and plot labels are never parsed as formulas.
- The HTML page asks for nothing outside itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conductor.digests import document_digest
from conductor.files import read_json, write_json, write_text
from conductor.rendering import templates
from conductor.report import argument, plots, rows, smoke, wording
from conductor.report.wording import Document, printable
from gates.criteria import CONFIDENCE, POWER

if TYPE_CHECKING:
    from rich.console import RenderableType


class ReportError(ValueError):
    """A release document that cannot be reported; the message names the field."""


def write_report(document: Document, run_dir: Path) -> None:
    """Validate ``document`` and write report.json, then report.md and report.html to ``run_dir``.

    Raises:
        ReportError: the document breaks ``gates/schemas/report.json``; nothing is written.
        OSError: a file cannot be written; each file is then the earlier one or the new one, whole.
    """
    document = write_record(document, run_dir)
    write_text(run_dir / "report.md", render_markdown(document))
    write_text(run_dir / "report.html", render_html(document))


def write_record(document: Document, run_dir: Path) -> dict[str, Any]:
    """Validate ``document``, write report.json alone, and return what was written.

    Raises:
        ReportError, OSError: as :func:`write_report`.
    """
    document = validated(document)
    write_json(run_dir / "report.json", document)
    return document


def read_report(run_dir: Path) -> dict[str, Any] | None:
    """Return the report document in ``run_dir``, or None where there is no whole one."""
    try:
        return validated(read_json(run_dir / "report.json"))
    except (OSError, ValueError):
        return None


def report_digest(report: Document | None) -> str | None:
    """Identify a report, less where it was logged, which may be later."""
    if report is None:
        return None
    return document_digest({name: each for name, each in report.items() if name != "tracking"})


def validated(document: Document) -> dict[str, Any]:
    """Return ``document`` as plain JSON values, checked against the schema.

    Halves of surrogate pairs, which no file can hold, become question marks.

    Raises:
        ReportError: one line per field that is missing, unknown or wrong.
    """
    import jsonschema_rs

    try:
        text = json.dumps(document, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ReportError(f"report: holds a value that JSON cannot: {error}") from None
    plain: dict[str, Any] = json.loads(text.encode(errors="replace"))
    validator = jsonschema_rs.validator_for(_schema("report.json"), retriever=_schema)
    problems = [
        f"{_dotted(error.instance_path)}: {error.message}" for error in validator.iter_errors(plain)
    ]
    if problems:
        raise ReportError("\n".join(problems))
    return plain


def render_markdown(document: Document, template: str = "report.md.j2", **more: Any) -> str:
    """Render a validated document as Markdown (GitHub tables); ``more`` is for the template."""
    return _render(template, document, escape=escape_markdown, more=more)


def render_html(document: Document) -> str:
    """Render a validated document as one HTML page with its styles and its plots inside."""
    return _render("report.html.j2", document, figures=_figures(printable(document)))


def terminal_summary(document: Document, *, plain: bool) -> RenderableType | str:
    """Summarize a validated document in plain lines, or as a rich renderable for a terminal."""
    from conductor.report.summary import summarize

    return summarize(document, plain=plain)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot for the page, or why there is none; both are empty where nothing is to be drawn."""

    svg: Any = ""
    problem: str = ""


def _figures(document: Document) -> dict[str, Figure]:
    tasks = rows.in_reading_order(document["tasks"])
    limit = rows.length_limit(document)
    return {
        "drops": _figure(lambda: plots.plot_drops(tasks)),
        "scores": _figure(lambda: plots.plot_scores(tasks)),
        "lengths": _figure(lambda: plots.plot_lengths(tasks, limit=limit)),
        "path": _figure(lambda: plots.plot_path(document.get("path", []), tasks)),
    }


def _figure(draw: Callable[[], str]) -> Figure:
    from markupsafe import Markup

    try:
        return Figure(svg=Markup(draw()))  # noqa: S704 - matplotlib escapes every label
    except Exception as error:  # a plot is an extra: whatever stops it must not cost the page
        return Figure(problem=printable(f"{type(error).__name__}: {error}"))


def _render(
    template: str,
    document: Document,
    *,
    escape: Callable[[Any], Any] | None = None,
    figures: Mapping[str, Figure] | None = None,
    more: Document | None = None,
) -> str:
    """Fill a template: HTML escapes every value by itself, any other form with ``escape``."""
    environment = templates(escape)
    environment.filters.update(
        value=wording.say,
        fact=wording.fact,
        size=wording.size,
        duration=wording.duration,
        listed=wording.listed,
        fenced=_fenced,
    )
    shown: Document = printable(document)
    return environment.get_template(template).render(
        **shown,
        **_tables(shown),
        headline=wording.headline(shown),
        publish_words=wording.PUBLISH_WORDS[shown["publish"]],
        reason_parts=argument.reasons(shown),
        smoke_words=smoke.sentence(shown),
        engine_words=_engine_words(shown["engine"]),
        calibration_words=_calibration_words(shown["recipe"]),
        setting_values=shown["settings"].get("values", {}),
        confidence=wording.whole_percent(CONFIDENCE),
        power=wording.whole_percent(POWER),
        figures=figures or {},
        **printable(more or {}),
    )


def _tables(document: Document) -> dict[str, Any]:
    """Return the argument and the rows of every table; a table without rows is left out."""
    tasks = rows.in_reading_order(document["tasks"])
    return {
        "argument": argument.argue(document),
        "paired": rows.is_paired(tasks),
        "methods": argument.methods(tasks),
        "task_rows": [rows.task_row(task) for task in tasks],
        "undrawn": [task["task"] for task in tasks if not plots.has_bounds(task)],
        "answer_rows": rows.answer_rows(tasks),
        "length_rows": rows.length_rows(tasks),
        "likelihood_rows": rows.likelihood_rows(tasks),
        "external_rows": rows.external_rows(tasks),
        "unpublished": argument.unpublished(tasks),
        "path_rows": rows.path_rows(document),
        "noise_rows": rows.noise_rows(document),
        "plan_rows": rows.plan_rows(document),
        "weak_plans": argument.weak_plans(document),
        "gate_rows": rows.gate_rows(document),
        "job_rows": rows.job_rows(document),
        "cost": rows.cost(document),
    }


def _engine_words(engine: Document) -> str:
    if engine["name"] is None:
        return wording.fact(None)
    name = " ".join(filter(None, (engine["name"], engine["version"])))
    emulated = "emulates low-precision arithmetic" if engine["emulated"] else None
    where = f"on {engine['device']}" if engine["device"] else None
    return "; ".join(filter(None, (name, where, emulated, engine["note"])))


def _calibration_words(recipe: Document) -> str:
    calibration = recipe.get("calibration")
    if calibration is None:
        return wording.fact(None)
    if calibration["samples"] == 0:
        return "none"
    most, tokens = calibration["max_length"], calibration["tokens"]
    parts = (
        calibration["source"] or "source not known",
        f"{calibration['samples']:,} samples",
        None if most is None else f"at most {most:,} tokens each",
        None if tokens is None else f"{tokens:,} tokens in all",
    )
    return ", ".join(filter(None, parts))


def escape_markdown(value: Any) -> str:
    """Escape what Markdown, its tables or its raw HTML would read as more than text."""
    if hasattr(value, "__html__"):  # says of itself that it is escaped
        return str(value)
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$]|^(?:#|[+-] ))", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _fenced(text: str) -> Any:
    """Make a Markdown code block whose fence is longer than any in ``text``."""
    from markupsafe import Markup

    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return Markup(f"{fence}text\n{text}\n{fence}")  # noqa: S704 - nothing in a fence is markup


def _schema(address: str) -> Any:
    """Read the schema that ``report.json`` refers to by ``address``, or itself."""
    name = address.rpartition("/")[2]
    return json.loads(resources.files("gates").joinpath("schemas", name).read_text("utf-8"))


def _dotted(path: Iterable[str | int]) -> str:
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"report{steps}"
