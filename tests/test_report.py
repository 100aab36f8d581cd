"""The report: refused documents, escaping, order, determinism, and a page that asks for nothing."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conductor.report import (
    ReportError,
    plot_scores,
    render_html,
    render_markdown,
    terminal_summary,
    validated,
    write_report,
)

DATA = Path(__file__).parent / "data"
EXAMPLES = ["accept", "regression", "anomalous", "infeasible", "aborted", "no-compare", "limited"]
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
    document: dict[str, Any] = json.loads((DATA / f"report-{name}.json").read_text("utf-8"))
    return document


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
    assert page.tags["svg"] == (1 if example(name)["tasks"] else 0)
    if page.tags["svg"]:
        assert any(
            n == "aria-label" and v and v.startswith("Dot plot") for _, n, v in page.attributes
        )


def test_same_document_gives_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        write_report(example("regression"), directory)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def breakage(path: str, value: Any) -> dict[str, Any]:
    """Return the ACCEPT example with one field replaced; ``...`` removes the field."""
    document = example("accept")
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


def outside_fences(markdown: str) -> str:
    """Drop code blocks as CommonMark delimits them: a fence ends at one that is not shorter."""
    return re.sub(r"^(`{3,})text\n.*?^\1`*$", "", markdown, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_stays_text(text: str, tmp_path: Path) -> None:
    document = hostile(text)
    write_report(document, tmp_path)
    html = (tmp_path / "report.html").read_text("utf-8")
    markdown = outside_fences((tmp_path / "report.md").read_text("utf-8"))
    page, plain_page = Page(html), Page(render_html(hostile("harmless")))
    assert page.tags == plain_page.tags
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
        for line in outside_fences(render_markdown(hostile("harmless"))).splitlines()
        if line.startswith("|")
    ]
    assert table_columns == harmless_columns
    assert "<" not in markdown

    lines = terminal_summary(document, plain=True)
    assert isinstance(lines, str)
    assert len(lines.splitlines()) == len(
        str(terminal_summary(hostile("x"), plain=True)).split("\n")
    )
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
    assert "The plot of these scores could not be drawn (ModuleNotFoundError: " in page.text
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == example("accept")


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

    def test_ignores_the_settings_of_the_user(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import matplotlib as mpl

        expected = plot_scores(example("accept")["tasks"])
        with mpl.rc_context({"font.size": 30, "text.usetex": True, "svg.fonttype": "path"}):
            assert plot_scores(example("accept")["tasks"]) == expected


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
