"""The report: refused documents, escaping, order, determinism, and a page that asks for nothing."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_documents
from rich.console import Console

from conductor.report import (
    ReportError,
    render_html,
    render_markdown,
    terminal_summary,
    validated,
    write_report,
)
from conductor.report.argument import argue, what_would_decide
from conductor.report.plots import plot_drops, plot_lengths, plot_path, plot_scores
from gates.noninferiority import evaluate_noninferiority

OLD = ["accept", "regression", "anomalous", "infeasible", "aborted", "no-compare", "limited"]
EXAMPLES = [*OLD, *report_documents.KINDS]
PLOTS = {
    **dict.fromkeys(OLD, 1),
    **dict.fromkeys(("infeasible", "aborted", "early-stop"), 0),
    **dict.fromkeys(("noninferiority-accept", "noninferiority-regression", "noise-floor"), 3),
    "noninferiority-undecided": 3,
    "sequential": 4,
    "threshold-rule": 1,
    "on-a-cluster": 3,
}
HOSTILE = {
    "script": "<script>alert(1)</script>",
    "attribute": '" onload="alert(1)',
    "pipe": "a|b|c",
    "formula": r"$\frac{$ and $x$",
    "terminal escape": "red\x1b[31m\x07",
    "rich markup": "[bold red]loud[/] [/nothing]",
    "template": "{{ 7 * 7 }}{% for %}",
    "surrogate": "half\ud800",
    "reordering": "abc\u202egnp.exe",
    "lines": "one\ntwo\r\n| three |",
    "markdown": "# [x](javascript:alert(1)) `*_~",
    "nul": "a\x00b",
    "long": "x" * 5000,
}


def example(name: str) -> dict[str, Any]:
    make = report_documents.KINDS.get(name)
    return make() if make else report_documents.example(name)


class Page(HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(document: dict[str, Any], *, width: int = 100) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=False, color_system=None)
    console.print(terminal_summary(document, plain=False))
    return stream.getvalue()


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_written_in_three_forms(name: str, tmp_path: Path) -> None:
    document = example(name)
    write_report(document, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == document
    headline = document["decision"] or "NO DECISION"
    assert (tmp_path / "report.md").read_text("utf-8").startswith(f"# {headline}: ")
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    for fact in (headline, *document["reasons"], document["next_action"], document["run_id"]):
        assert fact in page.text
    for gate in document["gates"]:
        for subject, check in gate["document"]["checks"].items():
            assert subject in page.text
            assert check["detail"] in page.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]


@pytest.mark.parametrize("name", EXAMPLES)
def test_page_is_accessible_and_asks_for_nothing(name: str) -> None:
    html = render_html(example(name))
    page = Page(html)
    assert ("html", "lang", "en") in page.attributes
    assert page.tags["title"] == page.tags["h1"] == page.tags["main"] == 1
    assert page.headings[0] == "h1"
    assert all(int(b[1]) - int(a[1]) <= 1 for a, b in zip(page.headings, page.headings[1:]))  # noqa: B905
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == page.tags["iframe"] == 0
    outside = [
        (tag, name, value)
        for tag, name, value in page.attributes
        if name in {"src", "href", "xlink:href", "srcset", "action"} and not value.startswith("#")
    ]
    assert outside == []
    assert not re.search(r"url\((?!#)|@import", html)
    assert page.tags["svg"] == page.tags["figure"] == PLOTS[name]
    described = [tag for tag, attribute, _ in page.attributes if attribute == "aria-label"]
    assert len(described) >= PLOTS[name]
    ids = [value for tag, attribute, value in page.attributes if (tag, attribute) == ("g", "id")]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["regression", "sequential", "noise-floor"])
def test_same_document_gives_same_bytes(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        write_report(example(name), directory)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def breakage(path: str, value: Any, *, name: str = "accept") -> dict[str, Any]:
    """Return the ACCEPT example with one field replaced; ``...`` removes the field."""
    document = example(name)
    *parents, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    place: Any = document
    for step in parents:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        pytest.param("gates/0/document/pass", False, r"gates\[0\].document.pass", id="failed-gate"),
        pytest.param("gates", [], r"report.gates", id="accept-without-gates"),
        pytest.param("tasks", [], r"report.tasks", id="accept-without-tasks"),
        pytest.param("tasks/2/within_threshold", False, r"tasks\[2\].within", id="task-over-limit"),
        pytest.param(
            "tasks/2/within_threshold", None, r"tasks\[2\].within", id="task-not-compared"
        ),
        pytest.param("exit_code", 1, r"report.exit_code", id="accept-with-exit-code"),
        pytest.param("failure_class", "UNKNOWN", r"report.failure_class", id="accept-with-failure"),
        pytest.param("decision", None, r"report.(exit_code|publish)", id="publish-undecided"),
        pytest.param("publish", "do-not-publish", r"report.publish", id="accept-do-not-publish"),
        pytest.param("recipe/calibration", {"source": "x"}, "calibration", id="calibration-part"),
        pytest.param("settings/values", {"seed": 7}, "values", id="setting-not-in-words"),
        pytest.param("decision", "GO", r"report.decision", id="unknown-decision"),
        pytest.param("threshold", float("nan"), "JSON cannot", id="nan"),
        pytest.param("tasks/0/baseline", float("inf"), "JSON cannot", id="infinite-score"),
        pytest.param("tasks/0/baseline", True, r"tasks\[0\].baseline", id="bool-as-number"),
        pytest.param("size/source_bytes", -1, "size", id="negative-size"),
        pytest.param("size/source_bytes", 10**400, "size", id="400-digits"),
        pytest.param("stages", {}, r"report.stages", id="mapping-for-list"),
        pytest.param("model", [], r"report.model", id="list-for-mapping"),
        pytest.param("gates", None, r"report.gates", id="no-gates"),
        pytest.param("started_at", "yesterday", r"report.started_at", id="not-a-time"),
        pytest.param("seed", ..., "seed", id="missing"),
        pytest.param("sede", 1, "sede", id="unknown-field"),
        pytest.param(
            "gates/0/document/failure_class", "BAD_LUCK", r"gates\[0\].document", id="unknown-class"
        ),
        pytest.param("gates/0/document/checks", {}, r"gates\[0\].document", id="gate-unchecked"),
        pytest.param("versions", {"a": {1, 2}}, "JSON cannot", id="not-json"),
    ],
)
def test_bad_document_is_refused_and_writes_nothing(
    path: str, value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ReportError, match=message):
        write_report(breakage(path, value), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        pytest.param("tasks/1/outcome", "undecided", r"tasks\[1\].outcome", id="undecided"),
        pytest.param("tasks/1/outcome", "fail", r"tasks\[1\].outcome", id="failed"),
        pytest.param("tasks/1/outcome", None, r"tasks\[1\].outcome", id="no-outcome"),
        pytest.param("tasks/1/outcome", ..., r"tasks\[1\].*outcome", id="outcome-left-out"),
        pytest.param("tasks/1/drop_upper", None, r"tasks\[1\].drop_upper", id="unbounded"),
        pytest.param("tasks/1/drop_upper", ..., r"tasks\[1\].*drop_upper", id="bound-left-out"),
        pytest.param("tasks/0/outcome", "passed", r"tasks\[0\].outcome", id="unknown-outcome"),
        pytest.param("tasks/0/lost", -1, r"tasks\[0\].lost", id="negative-count"),
        pytest.param("tasks/0/p_within", 1.5, r"tasks\[0\].p_within", id="p-above-1"),
        pytest.param("tasks/0/drop_lower", float("-inf"), "JSON cannot", id="infinite-bound"),
        pytest.param("tasks/0/beside/kl", 0.1, "beside", id="mean-without-interval"),
        pytest.param("tasks/0/beside/lost/rate", 1.01, "beside", id="rate-above-1"),
        pytest.param("tasks/0/beside/agreed", 1, "beside", id="unknown-figure"),
        pytest.param("tasks/0/external/status", "fine", "external", id="unknown-status"),
        pytest.param("tasks/0/needed", {"more_repeats": 1}, "needed", id="needed-in-part"),
        pytest.param("rule", "superiority", r"report.rule", id="unknown-rule"),
        pytest.param("path", [{"round": 1}], r"path\[0\]", id="look-in-part"),
        pytest.param("path", None, r"report.path", id="no-path"),
        pytest.param("noise_floor", {"a": {}}, r"noise_floor", id="noise-in-part"),
        pytest.param("plan", [{"task": "a"}], r"plan\[0\]", id="plan-in-part"),
    ],
)
def test_evidence_that_is_wrong_or_does_not_carry_an_accept_is_refused(
    path: str, value: Any, message: str
) -> None:
    with pytest.raises(ReportError, match=message):
        validated(breakage(path, value, name="noninferiority-accept"))


def hostile(text: str) -> dict[str, Any]:
    """Return the REGRESSION example with ``text`` wherever another program's words may stand."""
    document = example("regression")
    document["reasons"] += [" ".join(text.split()), f"its log ends:\n{text}\n```\n</pre>{text}"]
    document["recipe"]["calibration"]["source"] = text
    document["settings"]["values"] = {text: text}
    document["deviations"].append(text)
    document["tasks"][0]["task"] = text
    document["tasks"][0]["metric"] = text
    document["versions"][text] = {text: text}
    document["settings"]["differences"].append({text: [text, None, True]})
    verdict = document["gates"][-1]["document"]
    verdict["detail"] = text
    verdict["notes"] = verdict["not_comparable"] = [text]
    verdict["checks"] = {
        text: {"passed": True, "observed": {text: text}, "limit": text, "detail": text}
    }
    document["tracking"]["detail"] = text
    return document


def hostile_evidence(text: str) -> dict[str, Any]:
    """Return a sequential release with ``text`` wherever the new fields hold words of others."""
    document = example("sequential") | {
        name: example("noise-floor")[name] for name in ("noise_floor", "plan")
    }
    first = document["tasks"][0]
    document["path"] = [
        look | {"task": text} if look["task"] == first["task"] else look
        for look in document["path"]
    ]
    document["noise_floor"][text] = document["noise_floor"].pop(first["task"])
    document["plan"][0]["task"] = document["plan"][1]["task"] = text
    first["external"] |= {"source": text, "protocol": text}
    first |= {"task": text, "metric": text, "method": text, "outcome": "undecided"}
    first["needed"] = report_documents.undecided_row()["needed"]
    document["tasks"][2] |= {"outcome": "anomalous", "task": f"{text}2"}
    compare = next(gate for gate in document["gates"] if gate["gate"] == "gate_compare")
    compare["document"]["checks"][f"tasks.{text}2"] = {
        "passed": True, "observed": None, "limit": None, "detail": text,
    }  # fmt: skip
    return document | {
        "decision": "ANOMALOUS", "exit_code": 3, "publish": "needs-human",
        "failure_class": "INSUFFICIENT_EVIDENCE",
    }  # fmt: skip


def outside_fences(markdown: str) -> str:
    """Drop code blocks as CommonMark delimits them: a fence ends at one that is not shorter."""
    return re.sub(r"^(`{3,})text\n.*?^\1`*$", "", markdown, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("make", [hostile, hostile_evidence], ids=["words", "evidence"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_stays_text(
    text: str, make: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    document = make(text)
    write_report(document, tmp_path)
    html = (tmp_path / "report.html").read_text("utf-8")
    markdown = outside_fences((tmp_path / "report.md").read_text("utf-8"))
    page, plain_page = Page(html), Page(render_html(make("harmless")))
    assert page.tags.keys() == plain_page.tags.keys()
    drawn = {"g", "path", "text", "use"}  # a long name leaves room for fewer ticks
    assert {tag: n for tag, n in page.tags.items() if tag not in drawn} == {
        tag: n for tag, n in plain_page.tags.items() if tag not in drawn
    }
    handlers = [name for _, name, _ in page.attributes if name.startswith("on")]
    assert handlers == []
    if text.isprintable():
        assert page.text.count(text) >= 8

    table_columns = [
        len(re.findall(r"(?<!\\)\|", line))
        for line in markdown.splitlines()
        if line.startswith("|")
    ]
    harmless_columns = [
        len(re.findall(r"(?<!\\)\|", line))
        for line in outside_fences(render_markdown(make("harmless"))).splitlines()
        if line.startswith("|")
    ]
    assert table_columns == harmless_columns
    assert "<" not in markdown

    lines = terminal_summary(document, plain=True)
    assert isinstance(lines, str)
    harmless_lines = str(terminal_summary(make("x"), plain=True)).split("\n")
    assert len(lines.splitlines()) == len(harmless_lines)
    for output in (lines, rendered(document)):
        assert not set(output) & set("\x00\x07\x1b\u202e\ud800")


class TestLogTail:
    """A reason with the end of a log below its sentence."""

    SENTENCE = "worker.py ended with exit status 1 and left no result.json."
    TAIL = "    Traceback:\n\n      ````\n    | MemoryError |"

    def document(self) -> dict[str, Any]:
        return {**example("aborted"), "reasons": ["First.", f"{self.SENTENCE}\n{self.TAIL}\n"]}

    @pytest.mark.parametrize("plain", [True, False], ids=["plain", "rich"])
    def test_stays_out_of_the_terminal(self, plain: bool) -> None:
        document = self.document()
        shown = (
            str(terminal_summary(document, plain=True)) if plain else rendered(document, width=200)
        )
        assert f"{self.SENTENCE} (more in the report)" in shown
        assert shown.count("(more in the report)") == 1
        assert "MemoryError" not in shown

    def test_is_kept_as_it_is_in_the_page(self) -> None:
        html = render_html(self.document())
        assert f'<p class="reason">{self.SENTENCE}</p>\n<pre>{self.TAIL}</pre>' in html
        assert html.count("<pre>") == 1

    def test_is_fenced_in_markdown(self) -> None:
        markdown = render_markdown(self.document())
        assert f"\n\n`````text\n{self.TAIL}\n`````\n\n" in markdown
        assert "MemoryError" not in outside_fences(markdown)


def test_plot_that_cannot_be_drawn_costs_only_the_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(example("accept"), tmp_path)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert page.tags["svg"] == page.tags["figure"] == 0
    assert "The plot of the scores could not be drawn (ModuleNotFoundError: " in page.text
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == example("accept")


@pytest.mark.parametrize("name", ["drops", "scores", "lengths", "path"])
def test_failing_plot_costs_only_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ValueError("no \x1b[31mink")

    monkeypatch.setattr(f"conductor.report.plots.plot_{name}", fail)
    page = Page(render_html(example("sequential")))
    assert page.tags["svg"] == page.tags["figure"] == 3
    assert f"The plot of the {name} could not be drawn (ValueError: no \ufffd[31mink)" in page.text


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_record_is_written_whatever_becomes_of_the_other_forms(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=name):
        write_report(example("accept"), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == example("accept")


def test_accepted_release_may_need_a_person() -> None:
    document = example("limited")
    assert validated(document) == document
    assert str(terminal_summary(document, plain=True)).startswith(
        "decision: ACCEPT (a person has to decide)\n"
    )
    assert "# ACCEPT: a person has to decide\n" in render_markdown(document)
    assert "ACCEPT: a person has to decide" in Page(render_html(document)).text


@pytest.mark.parametrize(
    ("name", "calibration", "words"),
    [
        pytest.param(
            "limited",
            {"source": "text.jsonl", "samples": 1024, "max_length": 512, "tokens": 5312},
            "text.jsonl, 1,024 samples, at most 512 tokens each, 5,312 tokens in all",
            id="full",
        ),
        pytest.param(
            "limited",
            {"source": None, "samples": 3, "max_length": None, "tokens": None},
            "source not known, 3 samples",
            id="in-part",
        ),
        pytest.param(
            "accept",
            {"source": None, "samples": 0, "max_length": 64, "tokens": 0},
            "none",
            id="not-needed",
        ),
        pytest.param("aborted", None, "not known", id="not-reached"),
        pytest.param("limited", ..., "not known", id="not-recorded"),
    ],
)
def test_calibration_is_shown(name: str, calibration: Any, words: str) -> None:
    document = example(name)
    document["recipe"]["calibration"] = calibration
    if calibration is ...:
        del document["recipe"]["calibration"]
    document = validated(document)
    assert f'<tr><th scope="row">calibration</th><td>{words}</td></tr>' in render_html(document)
    assert f"| calibration | {words} |\n" in render_markdown(document)


def test_values_of_equal_settings_are_a_table() -> None:
    html, markdown = render_html(example("limited")), render_markdown(example("limited"))
    assert '<tr><th scope="row">gen_kwargs.max_gen_toks</th><td>32</td></tr>' in html
    assert "<summary>12 settings were equal on both sides</summary>" in html
    assert "| gen_kwargs.max_gen_toks | 32 |\n" in markdown
    assert "12 settings were equal on both sides.\n" in markdown


def test_markup_is_shown_literally_in_the_terminal() -> None:
    assert "[bold red]loud[/]" in rendered(hostile(HOSTILE["rich markup"]), width=200)


def test_failed_gate_and_failed_check_come_first() -> None:
    page = Page(render_html(example("anomalous")))
    gates = page.text.index("Gates\n")
    text = page.text[gates:]
    assert text.index("gate_external") < text.index("gate_ptq")
    assert text.index("compare: distance") < text.index("addition: distance")


def test_plain_summary_has_one_line_per_gate_and_task() -> None:
    lines = str(terminal_summary(example("regression"), plain=True)).splitlines()
    assert lines[0] == "decision: REGRESSION (do not publish)"
    assert sum(line.startswith("gate ") for line in lines) == 7
    tasks = [line for line in lines if line.startswith("task ")]
    assert len(tasks) == 6
    assert tasks[0] == (
        "task compare: baseline 0.8840 ± 0.0101, candidate 0.8470 ± 0.0114, "
        "drop +0.0370, limit 0.0100, over limit"
    )
    assert any(line.startswith("MLflow: unavailable: ") for line in lines)


def test_rich_summary_shows_the_same_facts() -> None:
    output = rendered(example("accept"), width=120)
    for fact in ("ACCEPT: publish", "gate_verbosity", "0.8820 ± 0.0102", "7d1e0b4c9f2a4c56"):
        assert fact in output


@pytest.mark.parametrize(
    ("drop", "scale", "shown"),
    [
        pytest.param(0.01, 1.0, "drop +0.0100, limit 0.0100", id="at-the-limit"),
        pytest.param(0.010004, 1.0, "drop +0.01000400, limit 0.01000000", id="just-outside"),
        pytest.param(0.009996, 1.0, "drop +0.00999600, limit 0.01000000", id="just-inside"),
        pytest.param(0.02, 1.0, "drop +0.0200, limit 0.0100", id="outside"),
        pytest.param(-0.02, 1.0, "drop -0.0200, limit 0.0100", id="gain"),
        pytest.param(2.0, 100.0, "drop +2.00, limit 1.00", id="percent"),
        pytest.param(None, None, "drop none, limit 0.0100", id="not-compared"),
    ],
)
def test_drop_and_limit_never_look_alike_when_they_differ(
    drop: float | None, scale: float | None, shown: str
) -> None:
    document = example("regression")
    task = document["tasks"][0]
    task.update(drop=drop, scale=scale, limit=0.01 * (scale or 1))
    assert shown in str(terminal_summary(document, plain=True))


class TestPlot:
    def test_names_every_task_and_follows_the_page_colours(self) -> None:
        svg = plot_scores(example("accept")["tasks"])
        for task in example("accept")["tasks"]:
            assert f">{task['task']}<" in svg
        for colour in ("--ink", "--line", "--baseline", "--candidate"):
            assert f"var({colour})" in svg
        assert "#0102" not in svg

    def test_is_empty_without_scores(self) -> None:
        assert plot_scores([]) == ""
        unscaled = [{**task, "scale": None} for task in example("accept")["tasks"]]
        assert plot_scores(unscaled) == ""

    def test_draws_only_the_side_that_was_scored(self) -> None:
        svg = plot_scores(example("no-compare")["tasks"])
        assert "baseline, 95 % interval" in svg
        assert "candidate, 95 % interval" not in svg

    def test_is_the_same_for_rates_and_percentages(self) -> None:
        rates = example("accept")["tasks"]
        percentages = copy.deepcopy(rates)
        for task in percentages:
            task["scale"] = 100.0
            for name in ("baseline", "candidate", "baseline_stderr", "candidate_stderr", "limit"):
                task[name] *= 100
        assert re.findall(">([^<]+)</text>", plot_scores(rates)) == re.findall(
            ">([^<]+)</text>", plot_scores(percentages)
        )

    def test_leaves_out_a_score_that_has_no_upper_end(self) -> None:
        svg = plot_scores(example("noninferiority-undecided")["tasks"])
        assert ">gsm8k<" in svg
        assert "wikitext" not in svg

    def test_marks_the_limit_on_the_worse_side(self) -> None:
        (task,) = example("noninferiority-accept")["tasks"][:1]
        rates = plot_scores([task]), plot_scores([task | {"higher_is_better": False}])
        assert rates[0] != rates[1]

    def test_ignores_the_settings_of_the_user(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import matplotlib as mpl

        expected = plot_scores(example("accept")["tasks"])
        with mpl.rc_context({"font.size": 30, "text.usetex": True, "svg.fonttype": "path"}):
            assert plot_scores(example("accept")["tasks"]) == expected


def segments(svg: str, colour: str) -> list[tuple[float, float]]:
    """Return the ends in x of the lines drawn in a colour, from the legend at the top down."""
    lines = re.findall(rf'd="M (\S+) (\S+) \s*L (\S+) \S+ \s*"[^>]*stroke: var\(--{colour}\)', svg)
    return [(float(x0), float(x1)) for x0, _, x1 in sorted(lines, key=lambda line: float(line[1]))]


class TestDrops:
    """The forest plot, measured in the drawing itself."""

    def test_bars_are_drawn_to_the_scale_of_the_margin(self) -> None:
        tasks = example("noninferiority-accept")["tasks"]
        svg = plot_drops(tasks)
        bars = [bar for bar in segments(svg, "good") if bar[0] != bar[1]]
        assert len(bars) == len(tasks)
        origin = segments(svg, "ink")[-1][0]
        unit = segments(svg, "bad")[-1][0] - origin
        assert unit > 20
        for task, bar in zip(tasks, bars, strict=True):
            drawn = [(x - origin) / unit for x in bar]
            expected = [task[name] / task["limit"] for name in ("drop_lower", "drop_upper")]
            assert drawn == pytest.approx(expected, abs=0.01)

    def test_says_outcome_drop_and_bounds_of_every_task(self) -> None:
        svg = plot_drops(example("noninferiority-regression")["tasks"])
        for text in (
            "fail  +3.60 (+3.04..+4.17)",
            "undecided  +0.26 (-0.91..+1.43)",
            "pass  +0.38 (-0.11..+0.87)",
            "drop, % of the scale (to the right: the candidate is worse)",
            "Drop of every task with its one-sided 95 % bounds",
            "margin",
            "no drop",
        ):
            assert f">{text}<" in svg
        for colour in ("good", "bad", "warn"):
            assert f"var(--{colour})" in svg

    def test_cuts_wide_bounds_and_leaves_the_others_readable(self) -> None:
        tasks = example("noninferiority-accept")["tasks"]
        wide = tasks[0] | {"drop_lower": None, "drop_upper": 0.9, "outcome": "undecided"}
        svg = plot_drops([wide, *tasks[1:]])
        assert ">undecided  +0.38 (…..+90.00)<" in svg
        origin = segments(svg, "ink")[-1][0]
        ((low, high),) = [bar for bar in segments(svg, "warn") if bar[0] != bar[1]]
        unit = segments(svg, "bad")[-1][0] - origin
        assert [(low - origin) / unit, (high - origin) / unit] == pytest.approx([-6, 6], abs=0.01)

    def test_is_empty_without_bounds(self) -> None:
        assert plot_drops(example("accept")["tasks"]) == ""
        assert plot_drops(example("threshold-rule")["tasks"]) == ""
        assert plot_drops([]) == ""

    def test_takes_a_perplexity_relative_to_the_baseline(self) -> None:
        task = example("noninferiority-undecided")["tasks"][3]
        task |= {"drop": 0.1231, "drop_lower": 0.0, "drop_upper": 0.2462, "limit": 0.1231}
        assert ">undecided  +1.00 (+0.00..+2.00)<" in plot_drops([task])


def test_path_has_a_panel_for_every_task_in_their_order() -> None:
    document = example("sequential")
    svg = plot_path(document["path"], document["tasks"])
    titles = [f"{task['task']}: pass" for task in document["tasks"]]
    assert [text for text in re.findall(">([^<]+)</text>", svg) if text in titles] == titles
    for text in ("questions asked", "drop, % of the scale", "margin", "bounds at each look"):
        assert f">{text}<" in svg
    assert plot_path([], document["tasks"]) == plot_path(document["path"], []) == ""


def test_lengths_are_drawn_against_the_limit_of_the_gate() -> None:
    tasks = example("noninferiority-accept")["tasks"]
    svg = plot_lengths(tasks, limit=0.05)
    assert ">largest change allowed<" in svg
    assert svg.count(">120.4 to 124.1 tokens<") == 2
    assert "hellaswag" not in svg
    assert "largest change allowed" not in plot_lengths(tasks, limit=None)
    assert plot_lengths(example("accept")["tasks"], limit=0.05) == ""
    assert "largest change allowed" in render_html(example("noninferiority-accept"))


def test_paired_task_is_one_line() -> None:
    lines = str(terminal_summary(example("noninferiority-accept"), plain=True)).splitlines()
    assert [line for line in lines if line.startswith("task ")] == [
        "task gsm8k: pass: baseline 0.7120, candidate 0.7082, drop +0.0038 (bounds "
        "-0.0011..+0.0087), margin 0.0100, 1319 questions, 9 lost, 4 gained",
        "task hellaswag: pass: baseline 0.8010, candidate 0.7989, drop +0.0021 (bounds "
        "+0.0001..+0.0042), margin 0.0100, 10042 questions, 91 lost, 70 gained",
        "task ifeval: pass: baseline 55.30, candidate 55.18, drop +0.12 (bounds -0.61..+0.88), "
        "margin 1.00, 541 questions",
    ]


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "rich"])
def test_the_terminal_says_once_why_a_task_is_undecided(plain: bool) -> None:
    document = example("noninferiority-undecided")
    gate = document["gates"][-1]
    said = "2 undecided, 1 pass of 3 task(s); arc_challenge: undecided: 36 lost"
    gate["gate"] = "compare"
    gate["document"] |= {"detail": said, "pass": False}
    document["reasons"] = [f"compare: {said}"]
    shown = str(terminal_summary(document, plain=True)) if plain else rendered(document, width=200)
    assert "compare: 2 undecided, 1 pass of 3 task(s)" in shown
    assert "arc_challenge: undecided: 36 lost" not in shown
    assert shown.count("arc_challenge is undecided") == 1
    markdown = render_markdown(document)
    assert markdown.index("## Why") < markdown.index("36 lost")


@pytest.mark.parametrize("name", ["noninferiority-regression", "sequential", "regression"])
def test_no_number_is_cut_off_in_a_terminal_of_80_columns(name: str) -> None:
    document = example(name)
    document["tasks"][0]["task"] = "a_task_with_a_long_name_of_its_own"
    output = rendered(document, width=80)
    assert "…" not in output
    assert all(len(line) <= 80 for line in output.splitlines())


def test_a_terminal_says_of_a_few_undecided_tasks_what_would_decide_them() -> None:
    document = example("noninferiority-undecided")
    document["tasks"] = [
        report_documents.undecided_row() | {"task": f"t{number}"} for number in range(40)
    ]
    lines = str(terminal_summary(document, plain=True)).splitlines()
    said = [line for line in lines if line.startswith("evidence: ")]
    assert len(said) == 6
    assert said[-1] == "evidence: 35 further tasks undecided: the report says what would decide"
    assert render_markdown(document).count("is undecided: ") == 40


@pytest.mark.parametrize(
    ("until_decided", "words"),
    [
        pytest.param(True, "drawn by lot, as many as it took", id="batches"),
        pytest.param(False, "questions per task | all", id="whole"),
        pytest.param(None, "questions per task | all", id="earlier-version"),
    ],
)
def test_how_many_questions_were_to_be_asked(until_decided: bool | None, words: str) -> None:
    document = example("noninferiority-accept")
    if until_decided is not None:
        document["until_decided"] = until_decided
    assert words in render_markdown(validated(document))


def test_a_gate_that_passed_says_its_sum_on_the_terminal_and_all_in_the_report() -> None:
    document = example("noninferiority-accept")
    document["gates"][0]["document"]["detail"] = "all well; bits per weight: 4.5" + 100 * "."
    document["gates"][1]["document"]["detail"] = "4 within; 2 asked too few"
    shown = str(terminal_summary(document, plain=True))
    assert "all well" in shown
    assert "bits per weight" not in shown
    assert "4 within; 2 asked too few" in shown
    assert "bits per weight" in render_markdown(document)


def test_a_stage_whose_gate_failed_is_not_told_twice() -> None:
    document = example("noninferiority-regression")
    stage = next(stage for stage in document["stages"] if stage["name"] == "compare")
    stage["state"] = "failed"
    assert "Stage compare failed" not in render_markdown(document)


def test_tasks_stand_in_the_order_of_their_outcomes() -> None:
    lines = str(terminal_summary(example("noninferiority-regression"), plain=True)).splitlines()
    tasks = [line.split(": ")[:2] for line in lines if line.startswith("task ")]
    assert tasks == [
        ["task math", "fail"],
        ["task arc_challenge", "undecided"],
        ["task gsm8k", "pass"],
        ["task hellaswag", "pass"],
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param(
            {},
            "x is undecided: its drop lies within -0.0091..+0.0143, and so does the margin 0.0100. "
            "To decide it with 80 % power: 2,477 more questions if the candidate loses nothing, or "
            "4,530 more questions if the true drop is the observed one.",
            id="more-questions",
        ),
        pytest.param(
            {"needed": (0, 1, None, False)},
            "A candidate that loses nothing would usually have passed by now. To decide it with "
            "80 % power: 1 more question if the true drop is the observed one.",
            id="enough-if-lossless",
        ),
        pytest.param(
            {"needed": (900, None, 3, False)},
            "900 more questions if the candidate loses nothing, or 3 more answers to every "
            "question. If the true drop is the observed one, it is too close to the margin for any "
            "number of questions.",
            id="repeats-and-drop-at-the-margin",
        ),
        pytest.param(
            {"needed": (900, None, None, True)},
            "To decide it with 80 % power: 900 more questions if the candidate loses nothing. The "
            "benchmark does not have so many: it is too small for this margin, whatever is done "
            "with it: take a larger one, or settle on a wider margin before looking at scores "
            "again.",
            id="too-small",
        ),
        pytest.param(
            {"needed": (None, None, None, True)},
            "The benchmark is too small for this margin, whatever is done with it: take a larger "
            "one, or settle on a wider margin before looking at scores again.",
            id="too-small-for-any-number",
        ),
        pytest.param(
            {"needed": (149, 149, None, False)},
            "To decide it with 80 % power: 149 more questions if the candidate loses nothing.",
            id="nothing-lost",
        ),
        pytest.param(
            {"drop_lower": 0.0123, "needed": (0, 10, None, False)},
            "its drop is above +0.0123 taken by itself, but that is not shown with 95 % confidence "
            "for all tasks together (Holm's correction).",
            id="not-after-holm",
        ),
        pytest.param(
            {"method": "betting", "p_within": 0.25},
            "The evidence for a pass is 4.0 of the 20 that decide.",
            id="betting",
        ),
        pytest.param(
            {"drop_lower": None, "drop_upper": None},
            "x is undecided: the evidence gives no bounds of its drop.",
            id="no-bounds",
        ),
        pytest.param(
            {"drop_lower": None}, "its drop lies within unbounded..+0.0143", id="one-bound"
        ),
    ],
)
def test_undecided_task_says_what_would_decide_it(fields: dict[str, Any], words: str) -> None:
    task = report_documents.undecided_row() | {"task": "x"} | fields
    if "needed" in fields:
        task["needed"] = dict(zip(report_documents.NEEDED, fields["needed"], strict=True))
    assert words in what_would_decide(task)
    document = example("noninferiority-undecided") | {"tasks": [task]}
    validated(document)
    assert words in " ".join(Page(render_html(document)).text.split())
    assert words in str(terminal_summary(document, plain=True))


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param(
            "noninferiority-accept",
            [
                "Rule: both sides answered the same questions",
                "Shown to pass, 3 of 3 tasks: gsm8k, hellaswag, ifeval. Closest to its margin is "
                "ifeval: its drop is below +0.88 with 95 % confidence, and the margin is 1.00.",
                "These gates hold: ",
                "Therefore ACCEPT: publish.",
                "Next: ",
            ],
            id="accept",
        ),
        pytest.param(
            "noninferiority-regression",
            [
                "Rule: ",
                "math fails: its drop is above +0.0304 with 95 % confidence, and the margin is "
                "0.0100 (p below 0.0001 after Holm's correction). Of 5,000 questions the candidate "
                "lost 240 and gained 60.",
                "arc_challenge is undecided: ",
                "Shown to pass, 2 of 4 tasks: gsm8k, hellaswag.",
                "These gates hold: ",
                "Therefore REGRESSION (ACCURACY_REGRESSION): do not publish.",
                "Next: ",
            ],
            id="regression",
        ),
        pytest.param(
            "sequential",
            [
                "Rule: ",
                "Questions were asked in 5 growing rounds, in an order fixed beforehand.",
                "Shown to pass, ",
                "These gates hold: ",
                "Therefore ACCEPT",
                "Next: ",
            ],
            id="sequential",
        ),
        pytest.param(
            "threshold-rule",
            [
                "Rule: the observed drop of a task may be at most 0.01 of the scale. Without "
                "paired answers there are no bounds, so the rule cannot tell a loss from chance.",
                "compare is over the limit: drop +0.0370, limit 0.0100.",
                "reverse is over the limit",
                "sorting is over the limit",
                "addition is over the limit",
                "2 tasks within the limit: majority, facts.",
                "These gates hold: ",
                "Therefore REGRESSION",
                "Next: ",
            ],
            id="threshold",
        ),
        pytest.param(
            "early-stop",
            [
                "No scores were compared: the release ended before both sides had them.",
                "Gate gate_ptq (ptq) failed: ",
                "Therefore INFEASIBLE (MODEL_UNSUPPORTED): do not publish.",
                "Next: ",
            ],
            id="early",
        ),
        pytest.param(
            "aborted",
            [
                "No scores were compared: ",
                "Stage setup failed; the reason is at the head of this report.",
                "Therefore NO DECISION (SYSTEMIC): ",
                "Next: ",
            ],
            id="aborted",
        ),
    ],
)
def test_argument_leads_to_the_decision(name: str, steps: list[str]) -> None:
    document = example(name)
    argued = argue(document)
    assert len(argued) == len(steps), argued
    for said, expected in zip(argued, steps, strict=True):
        assert said.startswith(expected)
    page = Page(render_html(document))
    assert all(step in page.text for step in argued)
    assert "\n## Why\n\n1. " in render_markdown(document)


def test_anomalous_task_says_why_it_is_not_believed() -> None:
    document = example("noninferiority-undecided")
    document["tasks"][0] |= {"outcome": "anomalous", "drop": None, "drop_fraction": None}
    checks = next(g for g in document["gates"] if g["gate"] == "gate_compare")["document"]["checks"]
    checks["tasks.gsm8k"] = {
        "passed": False, "observed": None, "limit": None, "detail": "gsm8k: 3 questions are gone",
    }  # fmt: skip
    said = "gsm8k is not believed, so it is judged neither way: gsm8k: 3 questions are gone"
    assert said in argue(document)
    del checks["tasks.gsm8k"]
    assert "gsm8k is not believed, so it is judged neither way" in argue(document)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        pytest.param(
            "noninferiority-accept",
            [
                "Beside accuracy",
                "99.01 % (98.33..99.42)",
                "41.20 % (38.60..43.90)",
                "120.4 (61 / 112 / 190.5)",
                "+3.07 % (+1.02..+5.17)",
                "0.0123 (0.0101..0.0147)",
                "-0.031 (-0.052..-0.009)",
                "External references",
                "externally unverified",
                "8 shots there, 5 here",
                "No published score for: ifeval.",
                "Tango's score interval for the difference of paired shares: gsm8k, hellaswag",
                "541, 4 answers each, 180 clusters",
            ],
            id="beside-and-external",
        ),
        pytest.param(
            "noise-floor",
            [
                "Noise floor",
                "0.83 %",
                "30.20 %",
                "0.0004",
                "What this suite could tell",
                "2.39 %",
                "27.10 %",
                "3,092",
                "Likely to stay undecided even without any loss (power below 80 %): ifeval.",
            ],
            id="noise-and-plan",
        ),
        pytest.param(
            "sequential",
            ["Path to the decision", "3,200", "unbounded..+0.0538", "-0.0062..+0.0087"],
            id="path",
        ),
    ],
)
def test_evidence_is_shown_in_both_forms(name: str, facts: list[str]) -> None:
    document = validated(example(name))
    text = Page(render_html(document)).text
    markdown = render_markdown(document).replace("\\", "")
    for fact in facts:
        assert fact in text
        assert fact in markdown


def test_rows_of_the_accuracy_gate_fit_the_report() -> None:
    questions = [f"{number}:document:prompt" for number in range(400)]
    right = [number % 4 > 0 for number in range(400)]

    def samples(scores: list[bool], text: str) -> dict[str, Any]:
        return {
            "metric": "acc",
            "filter": "none",
            "higher_is_better": True,
            "scale": 1.0,
            "size": 400,
            "questions": questions,
            "scores": [int(score) for score in scores],
            "lengths": [10 + number % 7 for number in range(400)],
            "answers": [f"{text}{number % 50 == 0}{number}" for number in range(400)],
            "choice_logprobs": [[-0.1 - number / 1000, -2.0] for number in range(400)],
        }

    worse = [score and number % 9 > 0 for number, score in enumerate(right)]
    mixed = [score != (number % 20 < 2) for number, score in enumerate(right)]
    gone = samples(right, "") | {"questions": [*questions[:-1], "another"]}
    baseline = dict.fromkeys(("same", "worse", "mixed", "gone"), samples(right, "a"))
    candidate = {"same": samples(right, "b"), "worse": samples(worse, "b")}
    candidate |= {"mixed": samples(mixed, "b"), "gone": gone}
    verdict = evaluate_noninferiority({"tasks": baseline}, {"tasks": candidate})
    document = example("noninferiority-undecided")
    template = document["tasks"][0]
    document["gates"] = [{"gate": "compare", "stage": "compare", "document": verdict.document()}]
    document["tasks"] = [
        {**template, **row, "task": task, "scale": 1.0} for task, row in verdict.per_task.items()
    ]
    document = validated(document)
    outcomes = {task["task"]: task["outcome"] for task in document["tasks"]}
    assert outcomes == {
        "gone": "anomalous", "mixed": "undecided", "same": "pass", "worse": "fail",
    }  # fmt: skip
    argued = " ".join(argue(document))
    for said in (
        "gone is not believed, so it is judged neither way: gone: ",
        "worse fails: ",
        "mixed is undecided: ",
        "Shown to pass, 1 of 4 tasks: same.",
    ):
        assert said in argued
    assert Page(render_html(document)).tags["svg"] == 3


@pytest.mark.parametrize("name", OLD)
def test_sections_without_evidence_are_left_out(name: str) -> None:
    text = Page(render_html(example(name))).text + render_markdown(example(name))
    for heading in ("Beside accuracy", "External references", "Path to", "Noise floor", "could"):
        assert heading not in text.replace("could not", "")


def test_bounds_and_margin_never_look_alike_when_they_differ() -> None:
    document = example("noninferiority-accept")
    document["tasks"][0]["drop_upper"] = 0.009998
    assert "(bounds -0.00110000..+0.00999800), margin 0.01000000" in str(
        terminal_summary(document, plain=True)
    )


def test_rich_summary_shows_bounds_flips_and_outcomes() -> None:
    output = rendered(example("noninferiority-regression"), width=160)
    for fact in ("-0.0011..+0.0087", "240 / 60", "undecided", "2,477 more questions"):
        assert fact in output


def test_validated_returns_plain_json_values() -> None:
    document = example("accept")
    document["deviations"] = ()
    assert validated(document)["deviations"] == []


def test_importing_loads_nothing_heavy() -> None:
    heavy = "matplotlib", "mlflow", "numpy", "jinja2", "jsonschema_rs", "rich"
    code = (
        f"import sys, conductor.report, conductor.tracking; print({heavy!r} & sys.modules.keys())"
    )
    code = code.replace(repr(heavy), repr(set(heavy)))
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_jobs_stand_apart_from_the_time_of_their_stages(tmp_path: Path) -> None:
    document = example("on-a-cluster")
    write_report(document, tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "| ptq | done | " in text and "| 6 min 40 s | 2 h 00 min | 16.00 |" in text
    assert "| 17 | ptq | n1 | CANCELLED | 3 min 20 s | 1 h 00 min | 2 nodes, 4 GPUs each |" in text
    assert "| day0-run-deploy-1-0c | deploy | not known | not known |" in text
    page = Page((tmp_path / "report.html").read_text("utf-8")).text
    for fact in ("Jobs", "day0-run-deploy-1-0c", "2 nodes, 4 GPUs each"):
        assert fact in page
    plain = terminal_summary(document, plain=True)
    assert "cost: 3 jobs, queued not known, ran not known" in plain


@pytest.mark.parametrize(
    ("gpu_hours", "words"),
    [
        pytest.param(None, None, id="not-known"),
        pytest.param(0.0, "cost: 0.00 GPU hours", id="none-held"),
        pytest.param(1.6, "cost: 1.60 GPU hours", id="some"),
    ],
)
def test_gpu_hours_that_are_not_known_are_not_zero(
    gpu_hours: float | None, words: str | None
) -> None:
    document = example("noninferiority-accept") | {"gpu_hours": gpu_hours}
    plain = terminal_summary(document, plain=True)
    assert isinstance(plain, str)
    assert (words in plain) if words else ("cost:" not in plain)
    assert ("GPU hours" in render_markdown(document)) is (words is not None)
