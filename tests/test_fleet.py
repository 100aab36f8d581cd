"""Fleets: what a file asks for, who runs when, what is kept, and what it all comes to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_day0
from run_checks import read_events, shape_problems

from conductor import closeout
from conductor.chain import Stage
from conductor.config import Config, load_config
from conductor.executors.local import Note
from conductor.executors.slurm import following
from conductor.executors.slurm.slots import JobSlots
from conductor.failure import Failure
from conductor.fleet.asked import Asked, read_fleet_file
from conductor.fleet.board import Standing
from conductor.fleet.places import Places
from conductor.fleet.record import RECORD, hold_fleet, plan_fleet, read_fleet
from conductor.fleet.running import Crew, Prepared, exit_code, prepare
from conductor.fleet.sharing import ASKING, Sharing, baseline_of
from conductor.fleet.show import fleet_table, headline, lines, read_status
from conductor.fleet.summary import summary_document, summary_html, write_summary
from conductor.recorded_tools import RecordedTools, find_record, recorded_world
from conductor.run_lock import hold
from conductor.tools import OpenTools, Tools
from conductor.tracking import Tracking, TrackingStatus
from conductor.world import World
from gates import FailureClass

ROWS = {"models": ["demo"], "recipes": ["int8"]}
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def clock() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., tuple[Asked, Path]]:
    """Read a fleet file with these contents."""

    def read(**document: Any) -> tuple[Asked, Path]:
        path = tmp_path / "week.yaml"
        path.write_text(yaml.safe_dump(document))
        return read_fleet_file(path, tmp_path / "workspace")

    return read


def named(asked: Asked) -> list[tuple[str, str, str | None]]:
    return [(each.model, each.recipe, each.suite) for each in asked.releases]


CASES: list[Any] = [
    pytest.param(ROWS, [("demo", "int8", "demo")], id="one"),
    pytest.param(
        {"models": ["demo", "org/m"], "recipes": ["int8", "fp8"]},
        [
            ("demo", "int8", "demo"),
            ("demo", "fp8", "demo"),
            ("org/m", "int8", "standard"),
            ("org/m", "fp8", "standard"),
        ],
        id="product-with-the-suites-of-the-models",
    ),
    pytest.param(
        {**ROWS, "suites": ["demo", "standard"]},
        [("demo", "int8", "demo"), ("demo", "int8", "standard")],
        id="suites",
    ),
    pytest.param(
        {**ROWS, "settings": {"suite": "standard"}}, "suite: is said elsewhere", id="suite-setting"
    ),
    pytest.param(
        {
            "models": ["demo", "org/m"],
            "recipes": ["int8", "fp8"],
            "exclude": [{"model": "demo", "recipe": "fp8"}, {"model": "org/m"}],
        },
        [("demo", "int8", "demo")],
        id="excluded",
    ),
    pytest.param(
        {**ROWS, "exclude": [{"recipe": "fp8"}]}, "exclude: .*fp8.* no part", id="nothing-excluded"
    ),
    pytest.param(
        {**ROWS, "exclude": [{"recipe": "int8"}]}, "exclude: leaves nothing", id="all-excluded"
    ),
    pytest.param(
        {**ROWS, "releases": [{"model": "demo", "recipe": "int8", "settings": {"seed": 1}}]},
        [("demo", "int8", "demo"), ("demo", "int8", "demo")],
        id="same-with-other-settings",
    ),
    pytest.param(
        {**ROWS, "releases": [{"model": "demo", "recipe": "int8"}]},
        r"releases\.1: is the same release as demo with int8",
        id="twice",
    ),
    pytest.param(
        {**ROWS, "releases": [{"model": "demo", "recipe": "int8", "suite": "demo"}]},
        "is the same release as",
        id="twice-by-the-default-suite",
    ),
    pytest.param({"models": ["demo"]}, "recipes", id="no-recipes"),
    pytest.param({"name": "x"}, "week.yaml: asks for nothing; say `models`", id="nothing"),
    pytest.param(
        {
            "releases": [
                {"model": "demo", "recipe": "int8", "settings": {"seed": 1, "threshold": 0.1}},
                {"model": "demo", "recipe": "int8", "settings": {"threshold": 0.1, "seed": 1}},
            ]
        },
        r"releases\.2: is the same release as releases\.1",
        id="twice-in-another-order",
    ),
    pytest.param({**ROWS, "name": "a/b"}, "name", id="name-of-a-directory"),
    pytest.param({**ROWS, "at_once": 0}, "at_once", id="none-at-once"),
    pytest.param({**ROWS, "speed": 9}, "speed", id="unknown"),
    pytest.param({**ROWS, "settings": {"treshold": 1}}, "settings: .*treshold", id="no-setting"),
    pytest.param({**ROWS, "settings": {"engine": {"dtype": 3}}}, "dtype", id="wrong-type"),
    pytest.param(
        {"releases": [{"model": "demo", "recipe": "int8", "settings": {"workspace": "w"}}]},
        "workspace: is said elsewhere",
        id="workspace-of-its-own",
    ),
    pytest.param(
        {"releases": [{"model": "demo", "recipe": "int8", "settings": {"limit": 5}}],
         "settings": {"until_decided": True}},
        r"releases\.1: .*limit cannot stand beside until_decided",
        id="settings-that-contradict",
    ),
    pytest.param({**ROWS, "config": "none.yaml"}, "none.yaml", id="no-such-configuration"),
]  # fmt: skip


@pytest.mark.parametrize(("document", "expected"), CASES)
def test_what_a_file_asks_for(
    ask: Callable[..., tuple[Asked, Path]], document: dict[str, Any], expected: Any
) -> None:
    if isinstance(expected, str):
        with pytest.raises(Failure, match=f"(?s){expected}") as refused:
            ask(**document)
        assert refused.value.failure_class is FailureClass.USER_CONFIG_ERROR
    else:
        asked, _ = ask(**document)
        assert named(asked) == expected


def test_settings_come_from_the_file_then_inline_then_the_release(
    ask: Callable[..., tuple[Asked, Path]], tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text("suite: standard\nseed: 1\nthreshold: 0.1\nlimit: 9\n")
    asked, workspace = ask(
        config="base.yaml",
        settings={"seed": 2, "threshold": 0.2, "engine": {"dtype": "float32"}},
        releases=[{"model": "demo", "recipe": "int8", "settings": {"seed": 3}}],
    )
    config = asked.configure(asked.releases[0], workspace)
    assert (config.limit, config.threshold, config.seed) == (9, 0.2, 3)
    assert (config.suite, config.engine.dtype) == ("standard", "float32")
    assert config.workspace == tmp_path / "workspace"


def test_the_workspace_may_be_configured(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(yaml.safe_dump({**ROWS, "settings": {"workspace": str(tmp_path / "there")}}))
    assert read_fleet_file(path)[1] == tmp_path / "there"


def test_run_ids_are_drawn_once(ask: Callable[..., tuple[Asked, Path]]) -> None:
    asked, workspace = ask(**ROWS)
    first = plan_fleet(asked, workspace, NOW)
    first.directory.mkdir(parents=True)
    first.write()
    more, _ = ask(models=["demo"], recipes=["fp8", "int8"])
    second = plan_fleet(more, workspace, clock())
    assert second.run_ids[1] == first.run_ids[0] == read_fleet(first.directory).run_ids[0]
    assert second.run_ids[0] not in first.run_ids
    assert read_fleet(first.directory).asked == asked
    assert not shape_problems(first.document(), "fleet_record")
    assert second.created == first.created


def test_a_release_is_the_same_in_whatever_order_its_settings_stand(
    ask: Callable[..., tuple[Asked, Path]],
) -> None:
    settings = {"seed": 1, "threshold": 0.1}
    drawn: list[tuple[str, ...]] = []
    for names in (["seed", "threshold"], ["threshold", "seed"]):
        own = {name: settings[name] for name in names}
        asked, workspace = ask(releases=[{"model": "demo", "recipe": "int8", "settings": own}])
        fleet = plan_fleet(asked, workspace, NOW if not drawn else clock())
        fleet.directory.mkdir(parents=True, exist_ok=True)
        fleet.write()
        drawn.append(fleet.run_ids)
    assert drawn[0] == drawn[1]


def test_who_works_on_a_fleet_is_named_with_what_to_do(tmp_path: Path) -> None:
    directory = tmp_path / "fleets" / "week"
    with (
        hold_fleet(directory),
        pytest.raises(Failure, match=rf"process {os.getpid()} .*--watch.*kill -INT") as caught,
        hold_fleet(directory),
    ):
        pytest.fail("there are two")
    assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR
    assert "day0 stop" not in caught.value.message


def test_a_name_belongs_to_one_file(ask: Callable[..., tuple[Asked, Path]], tmp_path: Path) -> None:
    asked, workspace = ask(**ROWS)
    fleet = plan_fleet(asked, workspace, NOW)
    fleet.directory.mkdir(parents=True)
    fleet.write()
    other = tmp_path / "other" / "week.yaml"
    other.parent.mkdir()
    other.write_text(yaml.safe_dump(ROWS))
    again, _ = read_fleet_file(other, workspace)
    with pytest.raises(Failure, match=r"name: week is that of .*week\.yaml in this workspace"):
        plan_fleet(again, workspace, NOW)
    (tmp_path / "week.yaml").unlink()  # it was moved
    assert plan_fleet(again, workspace, NOW).run_ids == fleet.run_ids


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, "there is no fleet 'week'", id="missing"),
        pytest.param("{", "cannot be read", id="no-json"),
        pytest.param("[]", "must be a mapping", id="list"),
        pytest.param('{"version": 2}', "version", id="newer"),
    ],
)
def test_a_record_that_is_unusable_is_refused(
    tmp_path: Path, content: str | None, words: str
) -> None:
    directory = tmp_path / "fleets" / "week"
    directory.mkdir(parents=True)
    if content is not None:
        (directory / RECORD).write_text(content)
    with pytest.raises(Failure, match=words):
        read_fleet(directory)


def config(**options: Any) -> Config:
    return load_config(None, {"model": "demo", "recipe": "int8", **options})


@pytest.mark.parametrize(
    ("options", "same"),
    [
        pytest.param({"recipe": "fp8", "quantizer": "modelopt"}, True, id="recipe"),
        pytest.param({"threshold": 0.2, "rule": "threshold"}, True, id="verdict"),
        pytest.param({"run_name": "x", "overlap": "never"}, True, id="how"),
        pytest.param({"calibration.samples": 4}, True, id="calibration"),
        pytest.param({"engine.port": 99}, True, id="port"),
        pytest.param({"suite": "standard"}, False, id="suite"),
        pytest.param({"model": "org/m", "suite": "demo"}, False, id="model"),
        pytest.param({"limit": 4}, False, id="limit"),
        pytest.param({"seed": 4}, False, id="seed"),
        pytest.param({"engine.dtype": "float32"}, False, id="engine"),
        pytest.param({"evaluation.concurrency": 2}, False, id="evaluation"),
        pytest.param({"executor": "slurm", "cluster": "c"}, False, id="cluster"),
    ],
)
def test_who_asks_the_source_the_same(options: dict[str, Any], same: bool) -> None:
    assert (baseline_of(config(), "vllm") == baseline_of(config(**options), "vllm")) is same


def test_another_engine_or_a_fresh_baseline_shares_nothing() -> None:
    assert baseline_of(config(), "vllm") != baseline_of(config(), "transformers")
    assert baseline_of(config(fresh_baseline=True), "vllm") is None


def waiting(sharing: Sharing, stage: Stage, run_id: str) -> threading.Thread:
    thread = threading.Thread(target=sharing.wait, args=(stage, run_id, lambda *_: None))
    thread.start()
    return thread


def test_followers_wait_for_the_leader_stage_by_stage() -> None:
    sharing = Sharing()
    assert sharing.lead("first")
    assert not sharing.lead("second")
    told: list[str] = []
    sharing.wait(Stage.DEPLOY, "first", lambda *_: pytest.fail("the leader waits for nobody"))
    follower = waiting(sharing, Stage.DEPLOY, "second")
    assert follower.is_alive()
    sharing.keep(Stage.DEPLOY)
    follower.join(timeout=5)
    assert not follower.is_alive()
    follower = waiting(sharing, Stage.BASELINE_EVAL, "second")
    time.sleep(0.05)
    assert follower.is_alive()
    sharing.keep(Stage.BASELINE_EVAL)
    follower.join(timeout=5)
    assert not follower.is_alive()
    assert not told


def test_a_leader_that_ends_early_makes_way_for_one_of_those_who_wait() -> None:
    sharing = Sharing()
    assert sharing.lead("first")
    followers = [waiting(sharing, Stage.BASELINE_EVAL, name) for name in ("second", "third")]
    time.sleep(0.05)
    sharing.leave("first")
    deadline = time.monotonic() + 5
    while all(each.is_alive() for each in followers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [each.is_alive() for each in followers].count(True) == 1
    sharing.keep(Stage.BASELINE_EVAL)
    for each in followers:
        each.join(timeout=5)
        assert not each.is_alive()


def test_whoever_comes_after_the_answers_leads_nobody() -> None:
    sharing = Sharing()
    assert sharing.lead("first")
    for stage in ASKING:
        sharing.keep(stage)
    sharing.leave("first")
    assert not sharing.lead("second")


def test_a_release_that_is_to_stop_waits_no_longer() -> None:
    sharing = Sharing()
    sharing.lead("first")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sharing.wait(Stage.DEPLOY, "second", stop)


def test_slots_bound_how_many_jobs_there_are() -> None:
    slots = JobSlots(2)
    inside, most = [0], [0]
    lock = threading.Lock()

    def job() -> None:
        with slots.one(lambda: None):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=job) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [2]


def test_who_waits_for_a_slot_can_give_up_and_a_failed_job_frees_its_own() -> None:
    slots = JobSlots(1)

    def give_up() -> None:
        raise KeyboardInterrupt

    with slots.one(give_up), pytest.raises(KeyboardInterrupt), slots.one(give_up):
        pytest.fail("there was one slot")
    with pytest.raises(ValueError, match="broken"), slots.one(give_up):
        raise ValueError("broken")
    with slots.one(give_up):
        pass


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        pytest.param([("finished", "ACCEPT"), ("kept", "ACCEPT")], 0, id="accepted"),
        pytest.param([("finished", "ACCEPT"), ("kept", "REGRESSION")], 1, id="regression"),
        pytest.param([("finished", "INFEASIBLE")], 1, id="infeasible"),
        pytest.param([("aborted", None), ("finished", "REGRESSION")], 5, id="aborted"),
        pytest.param([("stopped", None), ("finished", "ACCEPT")], 130, id="stopped"),
        pytest.param([("waiting", None), ("finished", "ACCEPT")], 130, id="not-begun"),
        pytest.param([("stopped", None), ("aborted", None)], 5, id="aborted-and-stopped"),
    ],
)
def test_the_worst_end_is_the_exit_code(rows: list[tuple[str, str | None]], code: int) -> None:
    assert exit_code((Standing(state), decision) for state, decision in rows) == code


def logged(*_: Any, **__: Any) -> Tracking:
    return Tracking(status=TrackingStatus.DISABLED, uri=None, detail="not asked for")


Find = Callable[[Config], tuple[World, OpenTools]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Find]:
    """What the tools once left answers releases that are no dry runs, so they keep baselines."""
    monkeypatch.setattr(closeout, "log_release", logged)
    record = find_record(config())

    def find(change: Callable[[Tools, Config], Tools] = lambda tools, _: tools) -> Find:
        def found(config: Config) -> tuple[World, OpenTools]:
            def open_tools(_: World, note: Note) -> Tools:
                return change(RecordedTools(record, note), config)

            return recorded_world(record, dict(os.environ)), open_tools

        return found

    return find


def ready(asked: Asked, workspace: Path, find: Find) -> Prepared:
    fleet = plan_fleet(asked, workspace, clock())
    fleet.directory.mkdir(parents=True, exist_ok=True)
    fleet.write()
    return prepare(fleet, find)


def several(count: int) -> dict[str, Any]:
    """Ask for releases that ask their source the same, all at once."""
    return {
        "settings": {"overlap": "never"},
        "at_once": count,
        "releases": [
            {"model": "demo", "recipe": "int8", "settings": {"threshold": (2 + n) / 100}}
            for n in range(count)
        ],
    }


def evaluations_of_the_source(run_dir: Path) -> int:
    return sum(
        event["event"] == "tool_started" and event["directory"].startswith("stages/baseline_eval")
        for event in read_events(run_dir)
    )


def summarize(crew: Crew, prepared: Prepared) -> dict[str, Any]:
    return summary_document(
        prepared.fleet,
        prepared.releases,
        crew.board.document(),
        exit_code=exit_code(crew.board.states()),
        now=clock(),
    )


def test_the_source_is_evaluated_once_and_a_finished_fleet_is_kept(
    ask: Callable[..., tuple[Asked, Path]], recorded: Callable[..., Find], tmp_path: Path
) -> None:
    asked, workspace = ask(**several(2))
    prepared = ready(asked, workspace, recorded())
    assert prepared.baselines == {1: 1, 2: 1}
    crew = Crew(prepared, find=recorded(), clock=clock)
    shown: list[Mapping[str, Any]] = []
    crew.work(shown.append)
    runs = [each.run_dir for each in prepared.releases]
    assert [evaluations_of_the_source(run) for run in runs].count(1) == 1
    assert sum(map(evaluations_of_the_source, runs)) == 1
    summary = summarize(crew, prepared)
    assert summary["totals"]["baselines"] == {"evaluated": 1, "reused": 1}
    assert (summary["exit_code"], summary["totals"]["decisions"]["ACCEPT"]) == (0, 2)
    assert not shape_problems(summary, "fleet_summary")
    assert not shape_problems(read_status(prepared.fleet.directory), "fleet_status")
    assert read_status(prepared.fleet.directory) == json.loads(json.dumps(shown[-1]))
    write_summary(summary, tmp_path)
    page = (tmp_path / "summary.html").read_text()
    assert all(run.name in page for run in runs)
    assert "2 ACCEPT" in page
    assert "1 evaluated, 1 reused" in page

    before = [len(read_events(run)) for run in runs]
    again = Crew(prepared, find=recorded(), clock=clock)
    again.work(shown.append)
    assert [len(read_events(run)) for run in runs] == before
    assert {row["state"] for row in shown[-1]["releases"]} == {"kept"}
    assert not shape_problems(summarize(again, prepared), "fleet_summary")


class Broken:
    """Tools of a release whose quantizer does not work; the others do."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tools, name)

    def run_worker(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise Failure(FailureClass.SYSTEMIC, "the disk of the quantizer is gone")


def test_a_leader_that_fails_ends_nobody_else_and_is_tried_again_later(
    ask: Callable[..., tuple[Asked, Path]], recorded: Callable[..., Find]
) -> None:
    asked, workspace = ask(**several(2))
    first = recorded(lambda tools, config: Broken(tools) if config.threshold == 0.02 else tools)  # type: ignore[arg-type, return-value]
    prepared = ready(asked, workspace, first)
    crew = Crew(prepared, find=first, clock=clock)
    crew.work(lambda _: None)
    rows = crew.board.document()["releases"]
    assert [row["state"] for row in rows] == ["aborted", "finished"]
    assert "the disk of the quantizer is gone" in rows[0]["problem"]
    assert sum(evaluations_of_the_source(each.run_dir) for each in prepared.releases) == 1
    summary = summarize(crew, prepared)
    assert (summary["exit_code"], summary["totals"]["undecided"]) == (5, 1)
    assert not shape_problems(summary, "fleet_summary")

    crew = Crew(prepared, find=recorded(), clock=clock)
    crew.work(lambda _: None)
    rows = crew.board.document()["releases"]
    assert [row["state"] for row in rows] == ["finished", "kept"]
    assert evaluations_of_the_source(prepared.releases[0].run_dir) == 0


class Slow:
    """Tools of a release that work until nobody wants it any more."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tools, name)

    def run_worker(self, *args: Any, still_useful: Callable[[], None], **kwargs: Any) -> Any:
        for _ in range(3000):
            still_useful()
            time.sleep(0.01)
        pytest.fail("nobody stopped it")


class Failing(Broken):
    """Tools of a release that fail in a way that is tried again, after a while."""

    def run_worker(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise Failure(FailureClass.INFRA_TRANSIENT, "the network is down")


@pytest.mark.parametrize(
    ("tools", "doing"),
    [
        pytest.param(Slow, "", id="while-a-tool-works"),
        pytest.param(Failing, "failed: the network is down", id="while-a-retry-is-waited-for"),
    ],
)
def test_every_release_stops_within_seconds_and_those_to_come_do_not_begin(
    ask: Callable[..., tuple[Asked, Path]],
    recorded: Callable[..., Find],
    tools: Callable[[Tools], Any],
    doing: str,
) -> None:
    asked, workspace = ask(
        settings={"overlap": "never", "retry": {"first_wait_s": 60}},
        at_once=2,
        releases=several(3)["releases"],
    )
    prepared = ready(asked, workspace, recorded())
    crew = Crew(prepared, find=recorded(lambda each, _: tools(each)), clock=clock)
    stopped_at: list[float] = []

    def stop_once_all_work(document: Mapping[str, Any]) -> None:
        at_work = [row["stage"] is Stage.PTQ for row in document["releases"]]
        there = [row["doing"] for row in document["releases"]]
        if at_work == [True, True, False] and there[:2] == [doing] * 2 and not stopped_at:
            stopped_at.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crew.work(stop_once_all_work)
    assert time.monotonic() - stopped_at[0] < 3
    states = [row["state"] for row in crew.board.document()["releases"]]
    assert states == ["stopped", "stopped", "waiting"]
    assert [each.run_dir.exists() for each in prepared.releases] == [True, True, False]
    assert read_events(prepared.releases[0].run_dir)[-1]["event"] == "release_stopped"
    summary = summarize(crew, prepared)
    assert not shape_problems(summary, "fleet_summary")
    assert summary["exit_code"] == 130


def test_releases_on_a_cluster_share_one_connection_and_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clusters.yaml").write_text("clusters:\n  c: {device: cpu, max_jobs: 3}\n")
    monkeypatch.chdir(tmp_path)
    connected: list[following.Connection] = []
    really_connect = following.connect

    def connect(*args: Any) -> following.Connection:
        connected.append(really_connect(*args))
        return connected[-1]

    monkeypatch.setattr(following, "COMMANDS", ())
    monkeypatch.setattr(following, "connect", connect)
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    places = Places(environ, 2)
    options = {"executor": "slurm", "cluster": "c", "dry_run": True}
    worlds = [places.find(config(**options, threshold=n / 100))[0] for n in (1, 2)]
    assert [world.cluster and world.cluster.name for world in worlds] == ["c", "c"]
    (connection,) = connected
    one = connection.slots

    def give_up() -> None:
        raise KeyboardInterrupt

    with one(give_up), one(give_up), pytest.raises(KeyboardInterrupt), one(give_up):
        pytest.fail("the fleet allows two jobs")


def test_a_machine_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places({}, None)
    first, again = (places.find(config(dry_run=True, threshold=n / 100)) for n in (1, 2))
    assert first is again
    assert places.find(config()) is not first


def test_a_defect_and_a_held_run_cost_their_own_rows_only(
    ask: Callable[..., tuple[Asked, Path]],
    recorded: Callable[..., Find],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, workspace = ask(**several(3))
    prepared = ready(asked, workspace, recorded())
    done: list[int] = []

    def carry_out(crew: Crew, each: Any) -> None:
        if each.number == 1:
            raise RuntimeError("never thought of")
        if each.number == 2:
            each.run_dir.mkdir(parents=True)
            with hold(each.run_dir), hold(each.run_dir):
                pass
        done.append(each.number)

    monkeypatch.setattr(Crew, "_release", carry_out)
    crew = Crew(prepared, find=recorded(), clock=clock)
    crew.work(lambda _: None)
    rows = crew.board.document()["releases"]
    assert rows[0]["problem"] == "a defect of day0: RuntimeError: never thought of"
    assert "works on it" in rows[1]["problem"]
    assert done == [3]


def test_at_most_so_many_releases_are_in_progress(
    ask: Callable[..., tuple[Asked, Path]],
    recorded: Callable[..., Find],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, workspace = ask(**{**several(3), "at_once": 2})
    inside, most, lock = [0], [0], threading.Lock()

    def carry_out(crew: Crew, each: Any) -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        with lock:
            inside[0] -= 1

    monkeypatch.setattr(Crew, "_release", carry_out)
    Crew(ready(asked, workspace, recorded()), find=recorded(), clock=clock).work(lambda _: None)
    assert most == [2]


@pytest.mark.parametrize(
    ("settings", "at_once", "expected"),
    [
        pytest.param({"dry_run": True}, None, 8, id="dry-runs"),
        pytest.param({}, None, 1, id="real-tools-here"),
        pytest.param({}, 3, 3, id="as-asked"),
    ],
)
def test_one_release_at_a_time_fills_this_machine(
    ask: Callable[..., tuple[Asked, Path]],
    recorded: Callable[..., Find],
    settings: dict[str, Any],
    at_once: int | None,
    expected: int,
) -> None:
    asked, workspace = ask(**ROWS, settings=settings, **({"at_once": at_once} if at_once else {}))
    assert prepare(plan_fleet(asked, workspace, NOW), recorded()).at_once == expected


def test_what_cannot_begin_is_refused_before_anything_runs(
    ask: Callable[..., tuple[Asked, Path]], recorded: Callable[..., Find]
) -> None:
    asked, workspace = ask(models=["demo"], recipes=["int8", "nonsense"], suites=["demo", "gone"])
    with pytest.raises(Failure, match=r"nonsense.*gone|gone.*nonsense"):
        prepare(plan_fleet(asked, workspace, NOW), recorded())
    assert not workspace.exists()


def board(rows: list[dict[str, Any]]) -> dict[str, Any]:
    empty = {
        "model": "demo", "recipe": "int8", "suite": "demo", "settings": "", "baseline": None,
        "state": "waiting", "stage": None, "doing": "", "decision": None, "since": None,
        "seconds": None, "queued_s": 0.0, "problem": None,
    }  # fmt: skip
    return {
        "fleet": "week",
        "releases": [
            {"number": n, "run_id": f"r{n}", **empty, **row} for n, row in enumerate(rows, start=1)
        ],
    }


def test_a_table_and_lines_for_people() -> None:
    from rich.console import Console

    document = board(
        [
            {"state": "finished", "decision": "ACCEPT", "stage": "closeout", "seconds": 90.0},
            {"state": "running", "stage": "ptq", "doing": "layer 3/9", "queued_s": 61.0,
             "since": "2026-01-02T03:03:05.000Z", "settings": "seed: [1]"},
            {"state": "aborted", "problem": "the disk is full\x1b[2J", "model": "/m/llama"},
            {},
        ]
    )  # fmt: skip
    assert not shape_problems(document, "fleet_status")
    assert headline(document) == "week: 4 releases: 1 ACCEPT, 1 aborted, 1 running, 1 waiting"
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(fleet_table(document, NOW))
    text = console.export_text()
    for words in ("1 min 30 s", "1 min 00 s", "1 min 01 s", "layer 3/9", "seed: [1]", "disk"):
        assert words in text
    assert "\x1b" not in text
    assert "/m/" not in text
    assert list(lines(document)) == [
        "1 demo int8: ACCEPT",
        "2 demo int8 (seed: [1]): ptq",
        "3 llama int8: aborted: the disk is full\N{REPLACEMENT CHARACTER}[2J",
    ]


@pytest.mark.parametrize("content", ["", "[]", '{"fleet": 3}'])
def test_a_status_that_cannot_be_read_shows_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path)["releases"] == []


def test_names_in_a_summary_are_text(
    ask: Callable[..., tuple[Asked, Path]], recorded: Callable[..., Find]
) -> None:
    asked, workspace = ask(models=["<script>alert(1)</script>"], recipes=["int8"])
    prepared = ready(asked, workspace, recorded())
    page = summary_html(summarize(Crew(prepared, find=recorded(), clock=clock), prepared))
    assert "<script>" not in page
    assert "http" not in page.replace("http-equiv", "")


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "conductor.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stderr is not None
    assert any(each.strip() == line for each in process.stderr), f"{line!r} was never said"


def test_a_fleet_is_planned_stopped_watched_and_gone_on_with(
    tmp_path: Path, workspace: Path
) -> None:
    file = tmp_path / "week.yaml"
    rows = [
        {"model": "demo", "recipe": "int8", "settings": {"threshold": n / 100}} for n in range(2, 7)
    ]
    settings = {"dry_run": True}
    file.write_text(yaml.safe_dump({"settings": settings, "releases": rows, "at_once": 2}))
    words = ["fleet", str(file), "--workspace", str(workspace)]
    planned = run_day0(*words, "--plan-only", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert [row["state"] for row in json.loads(planned.stdout)["releases"]] == ["new"] * 5
    assert not workspace.exists()

    first = "1 demo int8 (threshold: 0.02): ACCEPT"
    working = start(*words)
    wait_for_line(working, first)
    watching = start(*words, "--watch")
    wait_for_line(watching, first)
    asked_to_stop = time.monotonic()
    working.send_signal(signal.SIGINT)
    _, errors = working.communicate(timeout=60)
    assert working.returncode == 130, errors
    assert time.monotonic() - asked_to_stop < 10
    assert "resume with: day0 fleet --resume week --workspace" in errors
    watching.communicate(timeout=60)
    assert watching.returncode == 0
    stopped = json.loads((workspace / "fleets" / "week" / "summary.json").read_text())
    assert not shape_problems(stopped, "fleet_summary")
    assert (stopped["exit_code"], stopped["totals"]["undecided"] > 0) == (130, True)
    runs = {path.name for path in (workspace / "runs").iterdir()}

    assert "keep: ACCEPT" in run_day0(*words, "--plan-only").stdout
    finished = run_day0("fleet", "--resume", "week", "--workspace", str(workspace), "--json")
    assert finished.exit_code == 0, finished.stderr
    summary = json.loads(finished.stdout)
    assert not shape_problems(summary, "fleet_summary")
    assert summary["totals"]["decisions"]["ACCEPT"] == 5
    after = {path.name for path in (workspace / "runs").iterdir()}
    assert (len(after), runs <= after) == (5, True)


def test_a_fleet_that_is_killed_makes_no_run_twice(tmp_path: Path, workspace: Path) -> None:
    file = tmp_path / "week.yaml"
    rows = [{"model": "demo", "recipe": "int8", "settings": {"threshold": n / 100}} for n in (2, 3)]
    file.write_text(yaml.safe_dump({"settings": {"dry_run": True}, "releases": rows, "at_once": 1}))
    words = ["fleet", str(file), "--workspace", str(workspace)]
    process = start(*words)
    while not (runs := list((workspace / "runs").glob("[!.]*"))):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    planned = json.loads((workspace / "fleets" / "week" / RECORD).read_text())
    (workspace / "runs" / f".{planned['releases'][1]['run_id']}.new").mkdir(exist_ok=True)
    finished = run_day0(*words)
    assert finished.exit_code == 0, finished.stderr
    after = {path.name for path in (workspace / "runs").iterdir()}
    assert after == {row["run_id"] for row in planned["releases"]}
    assert runs[0].name in after


def test_two_processes_do_not_work_on_one_fleet(tmp_path: Path) -> None:
    file = tmp_path / "week.yaml"
    file.write_text(yaml.safe_dump({**ROWS, "settings": {"dry_run": True}}))
    directory = tmp_path / "workspace" / "fleets" / "week"
    directory.mkdir(parents=True)
    with hold(directory):
        refused = run_day0("fleet", str(file), "--workspace", str(tmp_path / "workspace"))
    assert (refused.exit_code, "works on it" in refused.stderr) == (2, True)
    assert not (directory / RECORD).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param([], "name either the file", id="neither"),
        pytest.param(["gone.yaml"], "gone.yaml: cannot be read", id="no-file"),
        pytest.param(["odd.yaml"], "nothing is recorded of demo", id="no-such-dry-run"),
        pytest.param(["--resume", "x"], "there is no fleet 'x'", id="no-fleet"),
        pytest.param(["f.yaml", "--resume", "x"], "name either", id="both"),
    ],
)
def test_unusable_requests_end_with_2(tmp_path: Path, words: list[str], said: str) -> None:
    odd = {"models": ["demo"], "recipes": ["fp8"], "settings": {"dry_run": True}}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(odd))
    words = [str(tmp_path / each) if each.endswith(".yaml") else each for each in words]
    finished = run_day0("fleet", *words, "--workspace", str(tmp_path))
    assert finished.exit_code == 2
    assert not list(tmp_path.glob("fleets/*"))
    assert said in finished.stderr
    assert "Traceback" not in finished.stderr
