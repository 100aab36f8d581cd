"""Turn a release document into a report: JSON for programs, Markdown for reviews, HTML for people.

Invariants:
- The document is validated before anything is written; an ACCEPT whose gates do not all hold is
  refused here as well.
- ``report.json`` is the record and is written first: nothing that fails afterwards can cost it. A
  plot that cannot be drawn costs the plot alone.
- The same document gives the same bytes: no clock, no random identifier.
- Task names, details and observed values are hostile text. Every template escapes each value by
  default, control characters are made visible, and plot labels are never parsed as formulas.
- The HTML page asks for nothing outside itself.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conductor.files import write_json, write_text

if TYPE_CHECKING:
    from rich.console import RenderableType

Document = Mapping[str, Any]

NO_DECISION = "NO DECISION"
NORMAL_95 = 1.959964
"""Half-width of a 95 % interval in standard errors: the 97.5 % quantile of the normal law."""

PUBLISH_WORDS = {
    "publish": "publish",
    "do-not-publish": "do not publish",
    "needs-human": "a person has to decide",
}
WITHIN_WORDS = {True: "within limit", False: "over limit", None: "not compared"}
STYLES = {
    "ACCEPT": "bold green",
    "REGRESSION": "bold red",
    "ANOMALOUS": "bold yellow",
    "INFEASIBLE": "bold magenta",
    NO_DECISION: "bold",
}
PLOT_COLOURS = {
    "#010203": "var(--ink)",
    "#010204": "var(--line)",
    "#010205": "var(--baseline)",
    "#010206": "var(--candidate)",
}
"""Colours that the plot is drawn with, and what the page makes of them in light and in dark."""
INK, LINE, BASELINE, CANDIDATE = PLOT_COLOURS
PLOT_STYLE: Mapping[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "day0",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
}
OFFSET = 0.14
SIDES = (("baseline", BASELINE, "o", -OFFSET), ("candidate", CANDIDATE, "D", OFFSET))
"""Side, colour, marker, and place below the line of the task in rows."""
LONGEST_LABEL = 36


class ReportError(ValueError):
    """A release document that cannot be reported; the message names the field."""


def write_report(document: Document, run_dir: Path) -> None:
    """Validate ``document`` and write report.json, then report.md and report.html to ``run_dir``.

    Raises:
        ReportError: the document breaks ``gates/schemas/report.json``; nothing is written.
        OSError: a file cannot be written; each file is then the earlier one or the new one, whole.
    """
    document = validated(document)
    write_json(run_dir / "report.json", document)
    write_text(run_dir / "report.md", render_markdown(document))
    write_text(run_dir / "report.html", render_html(document))


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


def render_markdown(document: Document) -> str:
    """Render a validated document as Markdown (GitHub tables)."""
    return _render("report.md.j2", document, escape=_escape_markdown)


def render_html(document: Document) -> str:
    """Render a validated document as one HTML page with its styles and its plot inside."""
    plot, plot_problem = "", ""
    try:
        plot = plot_scores(_by_drop(_printable(document["tasks"])))
    except Exception as error:  # the plot is an extra: whatever stops it must not cost the page
        plot_problem = _printable(f"{type(error).__name__}: {error}")
    return _render("report.html.j2", document, plot=plot, plot_problem=plot_problem)


def terminal_summary(document: Document, *, plain: bool) -> RenderableType | str:
    """Summarize a validated document: decision, gates, tasks, paths and run IDs.

    Args:
        document: the validated document.
        plain: True gives lines of text for a log, False a rich renderable for a terminal.
    """
    shown: Document = _printable(document)
    if plain:
        return "\n".join(" ".join(line.split()) for line in _plain_lines(shown))
    return _rich_summary(shown)


def plot_scores(tasks: Iterable[Document]) -> str:
    """Draw both scores of every task, in percent of its scale, as an ``<svg>`` element.

    Bars are 95 % normal intervals made from the standard errors, cut at 0 and 100 %; a tick marks
    the lowest candidate score within the limit. Tasks without a baseline score or a scale are left
    out; without any task the result is the empty string.
    """
    rows = [task for task in tasks if task["baseline"] is not None and task["scale"] is not None]
    if not rows:
        return ""
    import logging

    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(PLOT_STYLE)
        figure = Figure(figsize=(9, 1.1 + 0.42 * len(rows)), layout="constrained")
        FigureCanvasSVG(figure)
        _draw_scores(figure, rows)
        return _inline_svg(figure)


def _draw_scores(figure: Any, rows: list[Document]) -> None:
    axes = figure.add_subplot()
    for side, colour, marker, offset in SIDES:
        placed = [(place, task) for place, task in enumerate(rows) if task[side] is not None]
        if not placed:
            continue
        intervals = [_interval(task, side) for _, task in placed]
        axes.errorbar(
            x=[middle for middle, _, _ in intervals],
            y=[place + offset for place, _ in placed],
            xerr=[[below for _, below, _ in intervals], [above for _, _, above in intervals]],
            label=f"{side}, 95 % interval",
            fmt=marker,
            color=colour,
            markersize=6,
            elinewidth=1.6,
            capsize=3,
        )
    limited = [(place, task) for place, task in enumerate(rows) if task["limit"] is not None]
    axes.plot(
        [_percent(task["baseline"] - task["limit"], task) for _, task in limited],
        [place + OFFSET for place, _ in limited],
        label="lowest candidate score within the limit",
        linestyle="none",
        marker="|",
        markersize=15,
        markeredgewidth=2,
        color=INK,
    )
    axes.set_yticks(range(len(rows)), [_label(task["task"]) for task in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("score, % of the scale (the axis need not start at 0)")
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)


def _inline_svg(figure: Any) -> str:
    import io

    stream = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, variable in PLOT_COLOURS.items():
        svg = svg.replace(drawn, variable)
    return svg


def _interval(task: Document, side: str) -> tuple[float, float, float]:
    middle = _percent(task[side], task)
    half = _percent(NORMAL_95 * (task[f"{side}_stderr"] or 0.0), task)
    return middle, max(0.0, min(half, middle)), max(0.0, min(half, 100 - middle))


def _percent(score: float, task: Document) -> float:
    return float(100 * score / task["scale"])


def _label(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


def _render(
    template: str,
    document: Document,
    *,
    escape: Callable[[Any], Any] | None = None,
    plot: str = "",
    plot_problem: str = "",
) -> str:
    """Fill a template: HTML escapes every value by itself, any other form with ``escape``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("conductor"),
        autoescape=select_autoescape(["html.j2"]),
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        value=_value, fact=_fact, size=_size, duration=_duration, fenced=_fenced
    )
    shown: Document = _printable(document)
    return environment.get_template(template).render(
        **shown,
        headline=_headline(shown),
        publish_words=PUBLISH_WORDS[shown["publish"]],
        reason_parts=[split_reason(reason) for reason in shown["reasons"]],
        engine_words=_engine_words(shown["engine"]),
        calibration_words=_calibration_words(shown["recipe"]),
        setting_values=shown["settings"].get("values", {}),
        task_rows=[_task_row(task) for task in _by_drop(shown["tasks"])],
        gate_rows=_gate_rows(shown),
        plot=Markup(plot),  # noqa: S704 - drawn by plot_scores, which escapes every label
        plot_problem=plot_problem,
    )


def _headline(document: Document) -> str:
    return document["decision"] or NO_DECISION


def split_reason(reason: str) -> tuple[str, str]:
    """Split a reason into its sentence, the first line, and the evidence after it."""
    sentence, _, evidence = reason.strip().partition("\n")
    return sentence, evidence.strip("\n")


def _short_reasons(document: Document) -> Iterable[str]:
    for sentence, evidence in map(split_reason, document["reasons"]):
        yield f"{sentence} (more in the report)" if evidence else sentence


def _engine_words(engine: Document) -> str:
    if engine["name"] is None:
        return _fact(None)
    name = " ".join(filter(None, (engine["name"], engine["version"])))
    emulated = "emulates low-precision arithmetic" if engine["emulated"] else None
    where = f"on {engine['device']}" if engine["device"] else None
    return "; ".join(filter(None, (name, where, emulated, engine["note"])))


def _calibration_words(recipe: Document) -> str:
    calibration = recipe.get("calibration")
    if calibration is None:
        return _fact(None)
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


def _by_drop(tasks: Iterable[Document]) -> list[Document]:
    """Order tasks for reading: the largest drop first, tasks without one last."""

    def gain(task: Document) -> float:
        return math.inf if task["drop_fraction"] is None else -task["drop_fraction"]

    return sorted(tasks, key=gain)


def _task_row(task: Document) -> dict[str, Any]:
    digits = _digits(task)
    return {
        "task": task["task"],
        "metric": task["metric"] or "not recorded",
        "baseline": _score(task["baseline"], task["baseline_stderr"], digits),
        "candidate": _score(task["candidate"], task["candidate_stderr"], digits),
        "drop": _number(task["drop"], digits, sign="+"),
        "limit": _number(task["limit"], digits),
        "scale": _value(task["scale"]),
        "samples": _value(task["samples"]),
        "within": task["within_threshold"],
        "words": WITHIN_WORDS[task["within_threshold"]],
    }


def _digits(task: Document) -> int:
    """Choose decimals: 4 for a scale of 1, 2 for 100; more where drop and limit look alike."""
    digits = max(0, 4 - round(math.log10(task["scale"] or 1)))
    drop, limit = task["drop"], task["limit"]
    if drop is None or limit is None or drop == limit:
        return digits
    alike = round(drop, digits) == round(limit, digits)
    return digits + 4 if alike else digits


def _number(number: float | None, digits: int, *, sign: str = "") -> str:
    return "none" if number is None else f"{number:{sign}z.{digits}f}"


def _score(score: float | None, stderr: float | None, digits: int) -> str:
    if score is None:
        return "none"
    if stderr is None:
        return _number(score, digits)
    return f"{_number(score, digits)} ± {_number(stderr, digits)}"


def _gate_rows(document: Document) -> list[dict[str, Any]]:
    """List every gate with its checks, failed gates and failed checks first."""
    rows = [_gate_row(gate) for gate in document["gates"]]
    return sorted(rows, key=lambda row: bool(row["passed"]))


def _gate_row(gate: Document) -> dict[str, Any]:
    verdict = gate["document"]
    checks = [{"subject": subject, **check} for subject, check in verdict["checks"].items()]
    return {
        "gate": gate["gate"],
        "stage": gate["stage"],
        "passed": verdict["pass"],
        "words": "passed" if verdict["pass"] else "FAILED",
        "failure_class": verdict["failure_class"],
        "detail": verdict["detail"],
        "checks": sorted(checks, key=lambda check: bool(check["passed"])),
        "held": sum(check["passed"] for check in checks),
        "notes": verdict["notes"],
        "not_comparable": verdict["not_comparable"],
    }


def _plain_lines(document: Document) -> Iterable[str]:
    yield f"decision: {_headline(document)} ({PUBLISH_WORDS[document['publish']]})"
    for reason in _short_reasons(document):
        yield f"reason: {reason}"
    yield f"next: {document['next_action']}"
    for row in _gate_rows(document):
        yield f"gate {_gate_line(row)}"
    for row in map(_task_row, _by_drop(document["tasks"])):
        yield (
            f"task {row['task']}: baseline {row['baseline']}, candidate {row['candidate']}, "
            f"drop {row['drop']}, limit {row['limit']}, {row['words']}"
        )
    for deviation in document["deviations"]:
        yield f"deviation: {deviation}"
    for name, text in _places(document):
        yield f"{name}: {text}"


def _gate_line(row: Document) -> str:
    result = f"{row['words']}, {row['held']} of {len(row['checks'])} checks hold"
    cause = f" {row['failure_class']}" if row["failure_class"] else ""
    detail = f": {row['detail']}" if row["detail"] else ""
    return f"{row['gate']} ({row['stage']}) {result}{cause}{detail}"


def _places(document: Document) -> Iterable[tuple[str, str]]:
    """Say where the report, the checkpoint and the MLflow runs are."""
    paths, tracking = document["paths"], document["tracking"]
    yield "report", paths["report_html"]
    if paths["checkpoint"]:
        yield "checkpoint", paths["checkpoint"]
    if tracking["status"] != "logged":
        yield "MLflow", f"{tracking['status']}: {tracking['detail']}"
        return
    yield "MLflow", tracking["uri"] or "not recorded"
    yield "MLflow run", tracking["run_id"] or "not recorded"
    for stage, run_id in tracking["stage_run_ids"].items():
        yield f"MLflow run of {stage}", run_id


def _rich_summary(document: Document) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    headline = _headline(document)
    parts: list[RenderableType] = [
        Text(f"{headline}: {PUBLISH_WORDS[document['publish']]}", style=STYLES[headline]),
        *map(Text, _short_reasons(document)),
        Text(f"Next: {document['next_action']}"),
        *(Text(f"Deviation: {deviation}", style="yellow") for deviation in document["deviations"]),
    ]
    gates = _gate_rows(document)
    if gates:
        table = Table("gate", "stage", "result", "checks that hold", "detail", title="Gates")
        for row in gates:
            held = f"{row['held']} of {len(row['checks'])}"
            cells = [row["gate"], row["stage"], row["words"], held, row["detail"]]
            table.add_row(*map(Text, cells), style=None if row["passed"] else "red")
        parts.append(table)
    tasks = [_task_row(task) for task in _by_drop(document["tasks"])]
    if tasks:
        table = Table(title="Scores ± standard errors")
        for name in ("task", "baseline", "candidate", "drop", "limit", "verdict"):
            table.add_column(name, justify="left" if name in ("task", "verdict") else "right")
        for row in tasks:
            names = ("task", "baseline", "candidate", "drop", "limit", "words")
            cells = [row[name] for name in names]
            table.add_row(*map(Text, cells), style="red" if row["within"] is False else None)
        parts.append(table)
    places = Table.grid(padding=(0, 2))
    places.add_column(no_wrap=True)
    places.add_column(overflow="fold")
    for name, text in _places(document):
        places.add_row(Text(name), Text(text))
    return Group(*parts, places)


def _value(value: Any) -> str:
    """Say a JSON value in words that fit a table cell."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_value(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return str(value)


def _fact(value: Any) -> str:
    """Say a fact that a release may not have reached; counts get thousands separators."""
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else _value(value)


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return _fact(None)
    return f"{size_bytes / 2**20:,.2f} MiB ({size_bytes:,} bytes)"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _escape_markdown(value: Any) -> str:
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


def _printable(value: Any) -> Any:
    """Replace characters that would steer a terminal or reorder text, at any depth."""
    if isinstance(value, str):
        return "".join("\N{REPLACEMENT CHARACTER}" if _steers(char) else char for char in value)
    if isinstance(value, Mapping):
        return {_printable(name): _printable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return value


def _steers(char: str) -> bool:
    """Tell control, format and surrogate characters; line breaks and tabs are harmless."""
    return char not in "\n\t" and unicodedata.category(char) in {"Cc", "Cf", "Cs"}


def _schema(address: str) -> Any:
    """Read the schema that ``report.json`` refers to by ``address``, or itself."""
    name = address.rpartition("/")[2]
    return json.loads(resources.files("gates").joinpath("schemas", name).read_text("utf-8"))


def _dotted(path: Iterable[str | int]) -> str:
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"report{steps}"
