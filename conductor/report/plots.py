"""Draw the figures of a report as SVG that takes its colours from the page.

Invariants:
- The same document gives the same bytes: no clock, no random identifier, no setting of the user.
- Labels are hostile text: they are never parsed as formulas, and SVG escapes them.
- A figure without anything to show is the empty string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from conductor.report.rows import TONES
from conductor.report.wording import Document, fixed, whole_percent
from gates.criteria import CONFIDENCE

NORMAL_95 = 1.959964
"""Half-width of a 95 % interval in standard errors: the 97.5 % quantile of the normal law."""

PLOT_COLOURS = {
    "#010203": "var(--ink)",
    "#010204": "var(--line)",
    "#010205": "var(--baseline)",
    "#010206": "var(--candidate)",
    "#010207": "var(--good)",
    "#010208": "var(--bad)",
    "#010209": "var(--warn)",
    "#01020a": "var(--odd)",
}
"""Colours that figures are drawn with, and what the page makes of them in light and in dark."""
INK, LINE, BASELINE, CANDIDATE, GOOD, BAD, WARN, ODD = PLOT_COLOURS
TONE_COLOURS = {"good": GOOD, "bad": BAD, "warn": WARN, "odd": ODD}
MARKERS = {"pass": "o", "fail": "X", "undecided": "D", "anomalous": "s", None: "o"}
PLOT_STYLE: Mapping[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "day0",
    "text.parse_math": False,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
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
PANEL_COLUMNS = 3
LONGEST_TITLE = 22
"""Characters of a task's name above one of the panels."""
REACH = 6.0
"""Margins to each side of zero that a plot of drops shows at least; wider bounds leave it."""
BEYOND = 1.15
"""Part by which it shows more than the largest drop or margin."""

Draw = Callable[[Any], None]


def plot_scores(tasks: Iterable[Document]) -> str:
    """Draw both scores of every task, in percent of its scale, as an ``<svg>`` element.

    Bars are 95 % normal intervals made from the standard errors, cut at 0 and 100 %; a tick marks
    the worst candidate score within the limit. Tasks without a scale or with a baseline score off
    it, as a perplexity is, are left out.
    """
    rows = [task for task in tasks if task["scale"] and _is_on_scale(task["baseline"], task)]
    return _drawn("scores", len(rows), lambda figure: _draw_scores(figure, rows))


def plot_drops(tasks: Iterable[Document]) -> str:
    """Draw the drop of every task with its bounds against its margin, as an ``<svg>`` element.

    Everything is in percent of the scale, or of the baseline's score where that is beyond the
    scale, as a perplexity is. Bounds that reach far beyond the margins end in an arrow
    at the edge. Tasks without bounds or without a scale are left out.
    """
    rows = [task for task in tasks if has_bounds(task)]
    return _drawn("drops", len(rows), lambda figure: _draw_drops(figure, rows))


def has_bounds(task: Document) -> bool:
    """Tell whether a task can be drawn among the drops."""
    bounds = (task.get("drop_lower"), task.get("drop_upper"))
    return bool(_unit(task)) and task["drop"] is not None and bounds != (None, None)


def plot_lengths(tasks: Iterable[Document], *, limit: float | None) -> str:
    """Draw the change of the mean answer length of every task, as an ``<svg>`` element.

    Args:
        tasks: the rows of the document; those without counted lengths are left out.
        limit: the largest change allowed, as a fraction of the baseline's mean, if it is known.
    """
    rows = [task for task in tasks if _change(task) is not None]
    return _drawn("lengths", len(rows), lambda figure: _draw_lengths(figure, rows, limit))


def plot_path(path: Iterable[Document], tasks: Iterable[Document]) -> str:
    """Draw the bounds of the drop against the questions asked, one panel a task, as an ``<svg>``.

    Args:
        path: what every look showed, in order.
        tasks: the rows of the document, with scale and margin; the panels keep their order.
    """
    looks = [look for look in path if look["drop"] is not None]
    panels = [
        (task, mine)
        for task in tasks
        if _unit(task) and (mine := [look for look in looks if look["task"] == task["task"]])
    ]
    height = 0.6 + 2.3 * -(-len(panels) // PANEL_COLUMNS)
    return _drawn("path", len(panels), lambda figure: _draw_path(figure, panels), height=height)


def _drawn(name: str, rows: int, draw: Draw, *, height: float | None = None) -> str:
    if not rows:
        return ""
    import logging

    import matplotlib as mpl
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(PLOT_STYLE)
        figure = Figure(figsize=(8.6, height or 1.5 + 0.42 * rows), layout="constrained")
        draw(figure)
        return _inline_svg(figure, name)


def _inline_svg(figure: Any, name: str) -> str:
    """Return the figure as an element of a page that holds other figures as well."""
    import io

    stream = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    svg = stream.getvalue()
    svg = re.sub(r'<g id="', f'<g id="{name}-', svg[svg.index("<svg") :])
    for drawn, variable in PLOT_COLOURS.items():
        svg = svg.replace(drawn, variable)
    return svg


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
        [_percent(_worst_within(task), task) for _, task in limited],
        [place + OFFSET for place, _ in limited],
        label="worst candidate score within the limit",
        linestyle="none",
        marker="|",
        markersize=15,
        markeredgewidth=2,
        color=INK,
    )
    axes.set_title("Scores of both sides")
    axes.set_xlabel("score, % of the scale (the axis need not start at 0)")
    _finish_rows(figure, axes, rows)


def _is_on_scale(score: float | None, task: Document) -> bool:
    return score is not None and 0 <= score <= task["scale"]


def _worst_within(task: Document) -> float:
    better = -1 if task.get("higher_is_better") is False else 1
    return float(task["baseline"] - better * task["limit"])


def _interval(task: Document, side: str) -> tuple[float, float, float]:
    middle = _percent(task[side], task)
    half = _percent(NORMAL_95 * (task[f"{side}_stderr"] or 0.0), task)
    return middle, max(0.0, min(half, middle)), max(0.0, min(half, 100 - middle))


def _draw_drops(figure: Any, rows: list[Document]) -> None:
    axes = figure.add_subplot()
    reach = _reach(rows)
    axes.axvline(0, color=INK, linewidth=1, label="no drop")
    for place, task in enumerate(rows):
        _draw_margin(axes, place, task, label="margin" if place == 0 else None)
        _draw_bounds(axes, place, task, reach)
    ends = [end for task in rows for end in _ends(task, reach)]
    margins = [_percent(task["limit"], task) for task in rows if task["limit"] is not None]
    low, high = min(0.0, *ends), max(0.0, *ends, *margins)
    room = 0.06 * (high - low)
    axes.set_xlim(low - room, high + room)
    axes.set_title(f"Drop of every task with its one-sided {whole_percent(CONFIDENCE)} bounds")
    axes.set_xlabel("drop, % of the scale (to the right: the candidate is worse)")
    _label_right(axes, [_drop_label(task) for task in rows])
    _finish_rows(figure, axes, rows)


def _reach(rows: list[Document]) -> float:
    """Return how far from zero a plot of drops goes, in percent of the scale."""
    margins = [_percent(task["limit"], task) for task in rows if task["limit"] is not None]
    drops = [abs(_percent(task["drop"], task)) for task in rows]
    ends = [abs(_percent(end, task)) for task in rows for end in _bounds(task) if end is not None]
    wanted = max(REACH * max(margins, default=0.0), BEYOND * max(drops, default=0.0))
    return min(wanted, max(ends)) if wanted else max(ends)


def _bounds(task: Document) -> tuple[float | None, float | None]:
    return task["drop_lower"], task["drop_upper"]


def _ends(task: Document, reach: float) -> tuple[float, float]:
    """Return both ends of the bar of a task, in percent, cut where the plot ends."""
    lower, upper = _bounds(task)
    low = -reach if lower is None else _percent(lower, task)
    high = reach if upper is None else _percent(upper, task)
    return max(-reach, min(low, reach)), min(reach, max(high, -reach))


def _draw_margin(axes: Any, place: int, task: Document, *, label: str | None) -> None:
    if task["limit"] is None:
        return
    margin = _percent(task["limit"], task)
    axes.vlines(
        margin, place - 0.5, place + 0.5, color=BAD, linewidth=1.6, linestyles="--", label=label
    )


def _draw_bounds(axes: Any, place: int, task: Document, reach: float) -> None:
    outcome = task.get("outcome")
    colour = TONE_COLOURS[TONES[outcome]] if outcome else CANDIDATE
    low, high = _ends(task, reach)
    axes.hlines(place, low, high, color=colour, linewidth=2.4)
    lower, upper = _bounds(task)
    for end, bound, arrow in ((low, lower, "<"), (high, upper, ">")):
        cut = bound is None or abs(_percent(bound, task)) > reach
        axes.plot(end, place, marker=arrow if cut else "|", color=colour, markersize=8)
    axes.plot(
        _percent(task["drop"], task), place, marker=MARKERS[outcome], color=colour, markersize=7
    )


def _drop_label(task: Document) -> str:
    lower, upper = ("…" if end is None else f"{_percent(end, task):+.2f}" for end in _bounds(task))
    drop = f"{_percent(task['drop'], task):+.2f} ({lower}..{upper})"
    return f"{task['outcome']}  {drop}" if task.get("outcome") else drop


def _draw_lengths(figure: Any, rows: list[Document], limit: float | None) -> None:
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, linewidth=1, label="no change")
    for sign in (-1, 1) if limit is not None else ():
        label = "largest change allowed" if sign > 0 else None
        axes.axvline(100 * sign * (limit or 0.0), color=BAD, linestyle="--", label=label)
    for place, task in enumerate(rows):
        lengths = task["beside"]["length"]
        ends = [lengths["change_lower"], lengths["change_upper"]]
        if None not in ends:
            axes.hlines(place, 100 * ends[0], 100 * ends[1], color=CANDIDATE, linewidth=2.4)
            axes.plot([100 * end for end in ends], [place] * 2, "|", color=CANDIDATE, markersize=8)
        axes.plot(100 * lengths["change"], place, "o", color=CANDIDATE, markersize=7)
    axes.set_title(
        f"Change of the mean answer length with its one-sided {whole_percent(CONFIDENCE)} bounds"
    )
    axes.set_xlabel("change, % of the baseline's mean tokens (to the right: longer answers)")
    _label_right(axes, [_length_label(task["beside"]["length"]) for task in rows])
    _finish_rows(figure, axes, rows)


def _change(task: Document) -> float | None:
    lengths = (task.get("beside") or {}).get("length") or {}
    change: float | None = lengths.get("change")
    return change


def _length_label(lengths: Document) -> str:
    sides = (fixed(lengths[f"{side}_mean"], 1) for side in ("baseline", "candidate"))
    return f"{' to '.join(sides)} tokens"


def _draw_path(figure: Any, panels: list[tuple[Document, list[Document]]]) -> None:
    columns = min(PANEL_COLUMNS, len(panels))
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat
    for axes, (task, looks) in zip(grid, panels, strict=False):
        _draw_panel(axes, task, looks)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False)
    figure.supxlabel("questions asked", fontsize=10)
    figure.supylabel("drop, % of the scale", fontsize=10)


def _draw_panel(axes: Any, task: Document, looks: list[Document]) -> None:
    asked = [look["questions"] for look in looks]
    nan = float("nan")
    lower, upper, drop = (
        [nan if look[name] is None else _percent(look[name], task) for look in looks]
        for name in ("drop_lower", "drop_upper", "drop")
    )
    axes.vlines(asked, lower, upper, color=CANDIDATE, linewidth=1.6)
    for bound, label in ((lower, "bounds at each look"), (upper, None)):
        axes.plot(asked, bound, "_-", color=CANDIDATE, linewidth=0.8, markersize=8, label=label)
    axes.plot(asked, drop, "o", color=CANDIDATE, markersize=4, label="drop seen so far")
    axes.axhline(0, color=INK, linewidth=1, label="no drop")
    if task["limit"] is not None:
        margin = _percent(task["limit"], task)
        axes.axhline(margin, color=BAD, linestyle="--", linewidth=1.6, label="margin")
        ends = [abs(value) for value in (lower[-1], upper[-1]) if value == value]
        reach = max(REACH * margin, BEYOND * max(ends, default=0.0))
        axes.set_ylim(-reach, reach)
    axes.set_title(f"{_label(task['task'], LONGEST_TITLE)}: {looks[-1]['outcome'] or 'open'}")
    axes.set_xlim(left=0)
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _label_right(axes: Any, labels: list[str]) -> None:
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(labels)), labels)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)


def _finish_rows(figure: Any, axes: Any, rows: list[Document]) -> None:
    """Give a plot of one row per task its names, its grid and its legend."""
    axes.set_yticks(range(len(rows)), [_label(task["task"]) for task in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)


def _percent(number: float, task: Document) -> float:
    unit = _unit(task)
    if not unit:
        raise ValueError(f"{task['task']} has no scale")
    return 100 * number / unit


def _unit(task: Document) -> float | None:
    """Return what a task's percentages are of; a score that has no upper end has no scale."""
    unit: float | None = task["scale"]
    if unit and task["baseline"] is not None and not _is_on_scale(task["baseline"], task):
        unit = abs(task["baseline"])
    return unit


def _label(name: str, longest: int = LONGEST_LABEL) -> str:
    name = " ".join(name.split())
    return name if len(name) <= longest else name[: longest - 1] + "…"
