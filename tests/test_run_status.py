"""Where releases stand: every state, damaged and old run directories, finding runs, watching."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from job_folders import T0, claimed, job_ended, job_folder, submitted
from rich.console import Console

from conductor.chain import STAGES
from conductor.documents import validate
from conductor.failure import Failure
from conductor.run_lock import hold
from conductor.run_status import (
    find_run,
    resume_command,
    runs_document,
    runs_table,
    status_document,
    status_table,
    watch,
)

STARTED = "2026-03-14T10:00:00.000Z"
Event = Mapping[str, Any]


def event(name: str, elapsed_s: float = 0.0, **facts: Any) -> dict[str, Any]:
    at = f"2026-03-14T10:{int(elapsed_s) // 60:02}:{int(elapsed_s) % 60:02}.000Z"
    return {"at": at, "event": name, "elapsed_s": elapsed_s, **facts}


def opening(run_id: str, *, at: str = STARTED) -> dict[str, Any]:
    return {
        **event("release_started", version=2, run_id=run_id, model="demo", recipe="int8"),
        "day0_version": "0.1.0",
        "pid": 1,
        "at": at,
    }


def stage(name: str, begun: float, ended: float, state: str = "done") -> list[dict[str, Any]]:
    return [
        event("stage_started", begun, stage=name, attempt=1, inputs=None),
        event(
            "stage_finished",
            ended,
            stage=name,
            attempt=1,
            state=state,
            detail=f"{name} said so",
            failure_class=None if state == "done" else "INFRA_TRANSIENT",
            outputs={} if state == "done" else None,
        ),
    ]


HALFWAY = [
    *stage("setup", 0, 1),
    *stage("ptq", 1, 11),
    event("stage_started", 11, stage="deploy", attempt=1, inputs=None),
    event("server_started", 12, side="candidate", log="stages/deploy/server-candidate.log"),
]
EVALUATING = [
    *HALFWAY,
    event("stage_finished", 20, stage="deploy", attempt=1, state="done", detail="answers",
          failure_class=None, outputs={}),
    event("stage_started", 20, stage="baseline_eval", attempt=1, inputs=None),
    event("tool_started", 21, tool="evaluate.py", directory="stages/baseline_eval"),
]  # fmt: skip
ENDED = [entry for number, name in enumerate(STAGES) for entry in stage(name, number, number + 1)]
STOPPED = event("release_stopped", 30, stage="deploy")
ACCEPTED = event("release_finished", 30, decision="ACCEPT", exit_code=0)
CANCELLED = ("job_ended", 31)
ABORTED = event("release_finished", 30, decision=None, exit_code=5)


def make_run(
    workspace: Path, events: list[Event], run_id: str = "demo-int8-1", *, at: str = STARTED
) -> Path:
    run_dir = workspace / "runs" / run_id
    (run_dir / "stages").mkdir(parents=True)
    lines = [json.dumps(each) + "\n" for each in [opening(run_id, at=at), *events]]
    (run_dir / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    return run_dir


def checked(run_dir: Path) -> dict[str, Any]:
    """Return the status after checking its shape, and that looking left everything as it was."""
    before = snapshot(run_dir)
    document = status_document(run_dir)
    assert snapshot(run_dir) == before
    validate(json.loads(json.dumps(document)), schema="status", where="status")
    return document


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [directory, *sorted(directory.rglob("*"))]
    }


def shown(renderable: Any) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(renderable)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


@pytest.mark.parametrize(
    ("events", "held", "state", "current", "resumable"),
    [
        pytest.param([], False, "interrupted", "setup", True, id="killed-at-once"),
        pytest.param(HALFWAY, True, "running", "deploy", False, id="running"),
        pytest.param(HALFWAY, False, "interrupted", "deploy", True, id="killed"),
        pytest.param([*HALFWAY, STOPPED], False, "stopped", "deploy", True, id="stopped"),
        pytest.param(
            [*HALFWAY, STOPPED, event("server_stopped", 31, side="candidate")],
            False, "stopped", "deploy", True, id="stopped-then-servers-ended",
        ),
        pytest.param(
            [*HALFWAY, STOPPED, event("release_resumed", 0, pid=2, day0_version="0.1.0")],
            False, "interrupted", "deploy", True, id="resumed-then-killed",
        ),
        pytest.param(
            [*HALFWAY, STOPPED, event(*CANCELLED, state="CANCELLED"), event("jobs_cancelled", 32)],
            False, "stopped", "deploy", True, id="stopped-then-jobs-cancelled",
        ),
        pytest.param([*HALFWAY, STOPPED], True, "running", "deploy", False, id="being-resumed"),
        pytest.param([*ENDED, ACCEPTED], False, "finished", None, False, id="finished"),
        pytest.param([*ENDED, ACCEPTED], True, "finished", None, False, id="finishing"),
        pytest.param([*ENDED, ABORTED], False, "aborted", None, True, id="aborted"),
    ],
)  # fmt: skip
def test_state_of_a_release(
    events: list[Event],
    held: bool,
    state: str,
    current: str | None,
    resumable: bool,
    tmp_path: Path,
) -> None:
    run_dir = make_run(tmp_path, events)
    with hold(run_dir) if held else nullcontext():
        document = checked(run_dir)
    assert (document["state"], document["current"]) == (state, current)
    assert (document["held_by"] and document["held_by"]["pid"]) == (os.getpid() if held else None)
    assert document["resume"] == (f"day0 resume {run_dir}" if resumable else None)
    assert document["last_event"]["event"] == (events[-1]["event"] if events else "release_started")
    assert (state in shown(status_table(document))) is True


def test_stages_and_times(tmp_path: Path) -> None:
    cut_off = [
        *HALFWAY,
        event("release_resumed", 0, pid=2, day0_version="0.1.0"),
        event("stage_continued", 1, stage="deploy", attempt=1),
    ]
    document = checked(make_run(tmp_path, cut_off))
    stages = {row["stage"]: row for row in document["stages"]}
    assert list(stages) == list(STAGES)
    assert (stages["ptq"]["state"], stages["ptq"]["seconds"]) == ("done", 10)
    assert (stages["deploy"]["state"], stages["deploy"]["interruptions"]) == ("running", 1)
    assert (stages["compare"]["state"], stages["compare"]["attempts"]) == ("pending", 0)
    assert document["sessions"] == 2
    assert document["servers"] == [], "those of a process that is gone are not up"


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        ({"done": 1200, "total": 6000, "doing": "requests"}, "requests 1,200/6,000"),
        ({"done": 0, "total": 0, "doing": "loading lm-eval"}, "loading lm-eval"),
        (None, "evaluate.py started"),
        ([], "evaluate.py started"),
        ({"done": 1}, "evaluate.py started"),
        ("{", "evaluate.py started"),
        ('{"done": Infinity, "total": 1, "doing": "x"}', "evaluate.py started"),
        ("[" * 60_000, "evaluate.py started"),
    ],
    ids=["counted", "uncounted", "silent", "no-mapping", "incomplete", "torn", "infinite", "deep"],
)
def test_what_the_current_stage_is_doing(progress: Any, words: str, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, EVALUATING)
    where = run_dir / "stages" / "baseline_eval"
    where.mkdir()
    if progress is not None:
        text = progress if isinstance(progress, str) else json.dumps(progress)
        (where / "progress.json").write_text(text, encoding="utf-8")
    with hold(run_dir):
        document = checked(run_dir)
    (tool,) = document["tools"]
    assert (tool["tool"], tool["directory"]) == ("evaluate.py", "stages/baseline_eval")
    assert (tool["progress"] is None) == (words == "evaluate.py started")
    (line,) = (line for line in shown(status_table(document)).splitlines() if "baseline" in line)
    assert line.endswith(words)
    assert words not in shown(status_table(checked(run_dir))), "nobody is at it any more"


def test_servers_are_named_while_somebody_works(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, HALFWAY)
    with hold(run_dir):
        assert "servers: candidate" in shown(status_table(checked(run_dir)))
    assert "servers: candidate" not in shown(status_table(checked(run_dir)))


def test_sender_of_the_record_works_at_closing_out(tmp_path: Path) -> None:
    sending = [
        *ENDED[:12],
        event("stage_started", 20, stage="closeout", attempt=1, inputs=None),
        event("tool_started", 21, tool="conductor.tracking", directory="."),
    ]
    run_dir = make_run(tmp_path, sending)
    with hold(run_dir):
        text = shown(status_table(checked(run_dir)))
    (line,) = (line for line in text.splitlines() if line.startswith("closeout"))
    assert line.endswith("conductor.tracking started")


def test_progress_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, EVALUATING)
    (run_dir / "stages" / "baseline_eval").mkdir()
    os.mkfifo(run_dir / "stages" / "baseline_eval" / "progress.json")
    assert status_document(run_dir)["tools"][0]["progress"] is None


def test_tool_that_ended_is_not_at_work(tmp_path: Path) -> None:
    ended = event("tool_finished", 25, tool="evaluate.py", directory="stages/baseline_eval",
                  status="ok")  # fmt: skip
    assert checked(make_run(tmp_path, [*EVALUATING, ended]))["tools"] == []


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda run: (run / "manifest.json").write_text("{"), id="manifest-truncated"),
        pytest.param(lambda run: (run / "manifest.json").write_text("[]"), id="manifest-no-object"),
        pytest.param(lambda run: (run / "manifest.json").write_bytes(b"\xff\x00"), id="not-utf-8"),
        pytest.param(
            lambda run: (run / "events.jsonl").open("a").write('{"at": "2026-03-14T10'),
            id="last-event-torn",
        ),
    ],
)
def test_damaged_files_change_nothing(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, HALFWAY)
    whole = checked(run_dir)
    damage(run_dir)
    assert checked(run_dir) == whole


def test_manifest_of_version_1(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "old-1"
    run_dir.mkdir(parents=True)
    stages = dict.fromkeys(STAGES, "pending") | {"setup": "done", "ptq": "done"}
    manifest = {
        "version": 1, "run_id": "old-1", "model": "demo", "recipe": "int8", "stages": stages
    }  # fmt: skip
    (run_dir / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    document = checked(run_dir)
    assert (document["state"], document["last_event"]) == ("interrupted", None)
    assert document["unknown"], "what the files do not carry is told"
    assert document["resume"] == f"day0 resume {run_dir}"
    assert find_run(None, tmp_path) == run_dir


WRITER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from conductor.chain import STAGES, State
from conductor.journal import Journal
from conductor.run_lock import hold
journal = Journal.create(
    Path(sys.argv[1]), clock=lambda: datetime.now(UTC), model="demo", recipe="int8"
)
with hold(journal.run_dir):
    print("started", flush=True)
    for number in range(20):
        for stage in STAGES:
            journal.start(stage)
            journal.record("tool_started", tool="t", directory=journal.attempt_dir(stage))
            journal.record("tool_finished", tool="t", directory=journal.attempt_dir(stage),
                           status="ok")
            journal.finish(stage, State.DONE, detail="", outputs={})
        for stage in STAGES:
            journal.invalidate(stage, "once more")
    journal.close(decision="ACCEPT", exit_code=0)
"""


def test_looking_while_a_journal_is_written(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "busy"
    run_dir.parent.mkdir()
    command = [sys.executable, "-c", WRITER, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == b"started\n"
        states = []
        while writer.poll() is None:
            document = status_document(run_dir)
            validate(json.loads(json.dumps(document)), schema="status", where="status")
            states.append(document["state"])
            assert len(document["tools"]) <= 1
    assert writer.returncode == 0
    assert states == sorted(states, key=["running", "finished"].index), "never interrupted"
    assert states.count("running") > 3
    assert checked(run_dir)["decision"] == "ACCEPT"


class TestJobs:
    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        """A release whose quantizer runs on a node while the source's evaluation waits."""
        name, facts = job_ended("stages/ptq", 1, queued_s=60.0, ran_s=30.0, state="TIMEOUT")
        events = [
            *stage("setup", 0, 1),
            event("stage_started", 1, stage="ptq", attempt=1, inputs=None),
        ]
        run_dir = make_run(tmp_path, [*events, {**event(name, 90), **facts}])
        running = job_folder(run_dir, number=2, submitted=submitted("18"), claim=claimed("18"))
        (running.path / "progress.json").write_text(
            '{"done": 3, "total": 9, "doing": "calibrating"}'
        )
        waits = {"state": "PENDING", "reason": "Priority"}
        job_folder(run_dir, "stages/baseline_eval", submitted=submitted("19"), seen=waits)
        return run_dir

    def test_how_long_they_wait_apart_from_how_long_they_run(self, run_dir: Path) -> None:
        checked(run_dir)
        document = status_document(run_dir, clock=lambda: datetime.fromtimestamp(T0 + 900, UTC))
        validate(json.loads(json.dumps(document)), schema="status", where="status")
        rows = [
            (job["job_id"], job["standing"], job["queued_s"], job["ran_s"])
            for job in document["jobs"]
        ]
        assert rows == [
            ("17", "ended", 60.0, 30.0),
            ("18", "running", 180.0, 720.0),
            ("19", "queued", 900.0, None),
        ]
        queued = {row["stage"]: row["queued_s"] for row in document["stages"]}
        assert (queued["ptq"], queued["baseline_eval"], queued["setup"]) == (240.0, 900.0, None)
        text = shown(status_table(document))
        assert "job 18 (ptq): running on n1 12 min 00 s, after queued 3 min 00 s" in text
        assert "job 19 (baseline_eval): queued 15 min 00 s (Priority)" in text

    def test_a_log_is_told_what_changes(self, run_dir: Path) -> None:
        stream = StringIO()
        with hold(run_dir):

            def end(_: float) -> None:
                (run_dir / "holder.json").unlink()

            watch(run_dir, Console(file=stream, width=200), sleep=end)
        assert "ptq: running: job 18 on n1: calibrating 3/9\n" in stream.getvalue()
        assert "baseline_eval: pending: job 19 queued (Priority)\n" in stream.getvalue()

    def test_runs_count_them(self, run_dir: Path) -> None:
        document = runs_document(run_dir.parent.parent)
        validate(json.loads(json.dumps(document)), schema="runs", where="runs")
        assert document["runs"][0]["jobs"] == {"running": 1, "queued": 1}
        assert "1 running, 1 queued" in shown(runs_table(document))

    def test_a_release_of_this_machine_has_none(self, tmp_path: Path) -> None:
        run_dir = make_run(tmp_path, HALFWAY)
        assert checked(run_dir)["jobs"] == []
        assert "queued" not in shown(status_table(checked(run_dir)))


def test_resume_command_can_be_pasted() -> None:
    assert resume_command(Path("/a b/runs/x")) == "day0 resume '/a b/runs/x'"


class TestRuns:
    def test_newest_comes_first_by_its_events(self, tmp_path: Path) -> None:
        make_run(tmp_path, HALFWAY, "b", at="2026-03-14T09:00:00.000Z")
        make_run(tmp_path, [*ENDED, ACCEPTED], "a", at="2026-03-14T10:00:00.000Z")
        os.utime(tmp_path / "runs" / "b")
        document = runs_document(tmp_path)
        validate(json.loads(json.dumps(document)), schema="runs", where="runs")
        rows = [(row["run_id"], row["state"], row["decision"]) for row in document["runs"]]
        assert rows == [("a", "finished", "ACCEPT"), ("b", "interrupted", None)]
        assert "deploy" in shown(runs_table(document))

    def test_one_that_tells_nothing_costs_its_own_row(self, tmp_path: Path) -> None:
        make_run(tmp_path, HALFWAY, "good")
        bad = tmp_path / "runs" / "future"
        bad.mkdir()
        (bad / "manifest.json").write_text('{"version": 3}', encoding="utf-8")
        (tmp_path / "runs" / "stray.txt").write_text("", encoding="utf-8")
        document = runs_document(tmp_path)
        validate(json.loads(json.dumps(document)), schema="runs", where="runs")
        states = {row["run_id"]: row["state"] for row in document["runs"]}
        assert states == {"good": "interrupted", "future": "unreadable"}
        assert "version 3 is newer" in document["runs"][-1]["problem"]
        text = shown(runs_table(document))
        assert "unreadable" in text
        assert document["runs"][-1]["problem"] in text.replace("\n", " ")

    @pytest.mark.parametrize("name", ["nowhere", "empty", "a-file"])
    def test_workspace_without_releases(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "empty" / "runs").mkdir(parents=True)
        (tmp_path / "a-file").write_text("", encoding="utf-8")
        document = runs_document(tmp_path / name)
        assert document["runs"] == []
        assert "holds no release" in shown(runs_table(document))


class TestFindRun:
    @pytest.fixture
    def workspace(self, tmp_path: Path) -> Path:
        make_run(tmp_path, [], "demo-int8-20260314-1", at="2026-03-14T09:00:00.000Z")
        make_run(tmp_path, [], "demo-fp8-20260314-2", at="2026-03-14T12:00:00.000Z")
        make_run(tmp_path, [], "demo-int8-20260315-3", at="2026-03-14T11:00:00.000Z")
        os.utime(tmp_path / "runs" / "demo-int8-20260314-1")
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "found"),
        [
            pytest.param(None, "demo-fp8-20260314-2", id="latest-by-its-events"),
            pytest.param("demo-int8-20260314-1", "demo-int8-20260314-1", id="run-id"),
            pytest.param("demo-int8-20260315", "demo-int8-20260315-3", id="beginning"),
            pytest.param("demo-f", "demo-fp8-20260314-2", id="short-beginning"),
            pytest.param("{runs}/demo-int8-20260314-1", "demo-int8-20260314-1", id="path"),
            pytest.param("{runs}/demo-int8-20260314-1/", "demo-int8-20260314-1", id="slash"),
        ],
    )
    def test_finds(self, name: str | None, found: str, workspace: Path) -> None:
        runs = workspace / "runs"
        assert find_run(name and name.format(runs=runs), workspace) == runs / found

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            pytest.param("demo-int8", r"several releases.*-1.*-3", id="ambiguous"),
            pytest.param("llama", r"no release 'llama'.*there are: demo-fp8", id="unknown"),
            pytest.param("", r"no release ''", id="empty"),
            pytest.param("../runs", r"no release", id="no-run-directory"),
            pytest.param("/etc", r"no release '/etc'", id="another-directory"),
        ],
    )
    def test_refuses(self, name: str, message: str, workspace: Path) -> None:
        with pytest.raises(Failure, match=message) as refused:
            find_run(name, workspace)
        assert refused.value.failure_class == "USER_CONFIG_ERROR"

    def test_directory_here_does_not_hide_a_run_id(
        self, workspace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (workspace / "demo-fp8").mkdir()
        monkeypatch.chdir(workspace)
        assert find_run("demo-fp8", workspace).name == "demo-fp8-20260314-2"

    def test_a_few_of_many_are_named(self, tmp_path: Path) -> None:
        for number in range(13):
            make_run(tmp_path, [], f"run-{number:02}")
        with pytest.raises(Failure, match=r"run-03.*run-12, and 3 earlier"):
            find_run("x", tmp_path)

    def test_nothing_to_find(self, tmp_path: Path) -> None:
        with pytest.raises(Failure, match="holds no release; start one with `day0 release`"):
            find_run(None, tmp_path)


class TestWatch:
    def growing(self, run_dir: Path, steps: list[list[Event]]) -> Callable[[float], None]:
        """Return a ``sleep`` in which the release gets on by a step."""
        left: Iterator[list[Event]] = iter(steps)

        def sleep(seconds: float) -> None:
            with (run_dir / "events.jsonl").open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(each) + "\n" for each in next(left))

        return sleep

    @pytest.mark.parametrize("terminal", [False, True], ids=["plain", "terminal"])
    def test_ends_with_the_release(self, terminal: bool, tmp_path: Path) -> None:
        run_dir = make_run(tmp_path, ENDED[:4])
        console = Console(file=StringIO(), force_terminal=terminal, width=200)
        sleep = self.growing(run_dir, [ENDED[4:5], [], [*ENDED[5:], ACCEPTED]])
        with hold(run_dir):
            document = watch(run_dir, console, 0.1, sleep=sleep)
        assert document["decision"] == "ACCEPT"
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "finished, ACCEPT" in text
        if not terminal:
            lines = text.splitlines()
            assert len(lines) == len(set(lines)), "what did not change is not said again"
            assert "deploy: running" in lines
            assert "deploy: done: deploy said so" in lines

    def test_ends_when_nobody_works_on_it(self, tmp_path: Path) -> None:
        run_dir = make_run(tmp_path, HALFWAY)
        console = Console(file=StringIO(), width=200)
        document = watch(run_dir, console)
        assert document["state"] == "interrupted"
        assert f"day0 resume {run_dir}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_looking_imports_nothing_heavy() -> None:
    code = (
        "import sys, conductor.run_status; "
        "print([n for n in ('numpy', 'rich', 'jsonschema_rs', 'mlflow', 'httpx', "
        "'huggingface_hub', 'jinja2') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ODD: list[Any] = [
    pytest.param({"event": "tool_started", "directory": "d"}, id="no-tool"),
    pytest.param({"event": "tool_started", "directory": 5, "tool": "t"}, id="directory-number"),
    pytest.param({"event": "tool_started", "directory": [], "tool": "t"}, id="directory-list"),
    pytest.param({"event": "tool_started", "directory": "d", "tool": 7}, id="tool-number"),
    pytest.param({"event": "tool_finished", "directory": {}}, id="finished-mapping"),
    pytest.param({"event": "server_started", "side": {}}, id="side-mapping"),
    pytest.param({"event": "server_started", "side": "candidate", "log": 7}, id="log-number"),
]


@pytest.mark.parametrize("odd", ODD)
def test_an_event_of_a_tool_that_says_nonsense_is_passed_over(
    odd: dict[str, Any], tmp_path: Path
) -> None:
    whole = checked(make_run(tmp_path / "whole", EVALUATING))
    document = checked(make_run(tmp_path / "odd", [*EVALUATING, {"at": STARTED, **odd}]))
    assert (document["tools"], document["servers"]) == (whole["tools"], whole["servers"])


def test_stages_are_named_where_a_detail_is_longer_than_the_terminal(tmp_path: Path) -> None:
    long = {**ENDED[-1], "detail": "word " * 100}
    console = Console(width=80, record=True, file=StringIO())
    console.print(status_table(checked(make_run(tmp_path, [*ENDED[:-1], long]))))
    assert {"setup", "baseline_eval", "closeout", "done"} <= set(console.export_text().split())
