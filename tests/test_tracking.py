"""Tracking: the plan, real MLflow stores, and servers that are down, hang, or die in the middle."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import report_documents
from filelock import FileLock

from conductor.redaction import UNREADABLE_URI, without_credentials
from conductor.report import write_report
from conductor.run_lock import hold
from conductor.tracking import (
    LOG,
    PENDING,
    RESULT,
    Tracking,
    TrackingPlan,
    TrackingStatus,
    _redact,
    _settings,
    _sole_use,
    log_release,
    main,
    plan_release,
    sync_runs,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DATA = Path(__file__).parent / "data"
UNTRACKED = {
    "status": "pending",
    "uri": None,
    "detail": "not sent yet",
    "run_id": None,
    "stage_run_ids": {},
}
STAGES = ["setup", "ptq", "deploy", "baseline_eval", "candidate_eval", "compare", "closeout"]


def example(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((DATA / f"report-{name}.json").read_text("utf-8"))
    return {**document, "tracking": UNTRACKED}


class TestPlan:
    def test_names_parameters_metrics_and_tags(self, tmp_path: Path) -> None:
        plan = plan_release(example("anomalous"), workspace=tmp_path)
        release = plan.release
        assert release.status == "FINISHED"
        assert release.finished_ms - release.started_ms == 100_300
        asked = ("model", "recipe", "quantizer", "engine", "suite", "threshold", "seed", "limit")
        assert [release.params[name] for name in asked] == [
            "demo", "int8", "llmcompressor", "vllm", "demo-wrong-reference", "0.01", "7", "200",
        ]  # fmt: skip
        assert release.metrics["baseline/compare"] == 0.884
        assert release.metrics["baseline_stderr/compare"] == 0.0227
        assert release.metrics["candidate/compare"] == 0.882
        assert release.metrics["drop/compare"] == 0.002
        assert release.tags["day0.decision"] == "ANOMALOUS"
        assert release.tags["day0.failure_class"] == "EXTERNAL_BASELINE_MISMATCH"
        assert release.tags["day0.exit_code"] == "3"
        compare = plan.stages["compare"].tags
        assert compare["day0.gate.gate_external"] == "EXTERNAL_BASELINE_MISMATCH"
        assert compare["day0.gate.gate_compare"] == "passed"
        assert plan.verdicts["verdicts/compare-gate_external.json"]["pass"] is False

    def test_logs_every_number_of_the_evidence(self, tmp_path: Path) -> None:
        document = report_documents.noise_floor() | {"tracking": UNTRACKED}
        release = plan_release(document, workspace=tmp_path).release
        assert release.params["rule"] == "noninferiority"
        gsm8k = {
            name.removesuffix("/gsm8k"): number
            for name, number in release.metrics.items()
            if name.endswith("/gsm8k")
        }
        assert gsm8k == {
            "baseline": 0.712,
            "baseline_stderr": 0.0125,
            "candidate": pytest.approx(0.708209),
            "candidate_stderr": 0.0126,
            "drop": pytest.approx(0.003791, abs=1e-6),
            "drop_lower": -0.0011,
            "drop_upper": 0.0087,
            "limit": 0.01,
            "questions": 1319,
            "repeats": 1,
            "lost": 9,
            "gained": 4,
            "p_within": 0.0213,
            "p_worse": 0.98,
            "p_worse_adjusted": 1.0,
            "agreement": 0.9901,
            "changed_answers": 0.412,
            "mcnemar_p": 0.2668,
            "baseline_length": 120.4,
            "candidate_length": 124.1,
            "length_change": 0.0307,
            "length_change_lower": 0.0102,
            "length_change_upper": 0.0517,
            "external_difference": -0.008,
            "noise_discordance": 0.00834,
            "noise_changed": 0.302,
        }
        assert release.metrics["kl/hellaswag"] == 0.0123
        assert release.metrics["logprob_shift/hellaswag"] == -0.031
        assert not any("," in name for name in release.metrics)
        assert all(isinstance(number, (int, float)) for number in release.metrics.values())

    @pytest.mark.parametrize("name", report_documents.KINDS)
    def test_takes_every_kind_of_document(self, name: str, tmp_path: Path) -> None:
        document = report_documents.KINDS[name]()
        plan = plan_release(document, workspace=tmp_path)
        assert plan.release.metrics["seconds"] == document["seconds"]

    def test_of_an_aborted_release_fails_and_leaves_out_what_was_not_reached(
        self, tmp_path: Path
    ) -> None:
        plan = plan_release(example("aborted"), workspace=tmp_path)
        assert plan.release.status == "FAILED"
        assert plan.release.tags["day0.decision"] == "none"
        assert plan.release.tags["day0.failure_class"] == "SYSTEMIC"
        assert "engine" not in plan.release.params
        assert {name: run.status for name, run in plan.stages.items()} == {
            "setup": "FAILED",
            "closeout": "FINISHED",
        }

    def test_takes_recorded_stage_times(self, tmp_path: Path) -> None:
        document = example("accept")
        document["stages"][1].update(
            started_at="2026-03-14T10:00:00.500Z", finished_at="2026-03-14T10:00:02Z"
        )
        ptq = plan_release(document, workspace=tmp_path).stages["ptq"]
        assert (ptq.started_ms, ptq.finished_ms) == (1773482400500, 1773482402000)

    def test_leaves_out_a_stage_that_did_not_end(self, tmp_path: Path) -> None:
        document = example("accept")
        document["stages"][1].update(state="running", finished_at=None, seconds=None)
        assert "ptq" not in plan_release(document, workspace=tmp_path).stages

    def test_names_the_calibration(self, tmp_path: Path) -> None:
        params = plan_release(example("limited"), workspace=tmp_path).release.params
        assert {name: params[name] for name in params if name.startswith("calibration")} == {
            "calibration_source": "/srv/day0/src/conductor/demo/calibration.jsonl",
            "calibration_samples": "128",
            "calibration_max_length": "64",
            "calibration_tokens": "5312",
        }
        params = plan_release(example("accept"), workspace=tmp_path).release.params
        assert params["calibration_samples"] == "0"
        params = plan_release(example("aborted"), workspace=tmp_path).release.params
        assert not any(name.startswith("calibration") for name in params)

    def test_takes_the_sentence_of_a_reason_without_its_log(self, tmp_path: Path) -> None:
        document = {**example("aborted"), "reasons": ["It died; its log ends:\n  MemoryError", "b"]}
        release = plan_release(document, workspace=tmp_path).release
        assert release.tags["mlflow.note.content"].startswith(
            "It died; its log ends:\n\nb\n\nNext:"
        )
        assert "MemoryError" not in json.dumps(asdict(release))

    def test_survives_its_file(self, tmp_path: Path) -> None:
        plan = plan_release(example("regression"), workspace=tmp_path)
        again = TrackingPlan.from_document(json.loads(json.dumps(asdict(plan))))
        assert json.dumps(asdict(again)) == json.dumps(asdict(plan))

    @pytest.mark.parametrize(
        ("names", "keys"),
        [
            pytest.param(["arc_easy", "mmlu-x.1 b"], ["arc_easy", "mmlu-x.1 b"], id="kept"),
            pytest.param(["acc,none"], ["acc_none"], id="comma"),
            pytest.param(["../../etc"], [".._.._etc"], id="path"),
            pytest.param([".."], ["__"], id="dots"),
            pytest.param(["a,b", "a_b", "a|b"], ["a_b", "a_b-2", "a_b-3"], id="same-key"),
            pytest.param(["<script>é"], ["_script__"], id="other-characters"),
            pytest.param(["x" * 999], ["x" * 200], id="long"),
        ],
    )
    def test_makes_metric_names_that_mlflow_takes(
        self, names: list[str], keys: list[str], tmp_path: Path
    ) -> None:
        document = example("accept")
        document["tasks"] = [{**document["tasks"][0], "task": name} for name in names]
        metrics = plan_release(document, workspace=tmp_path).release.metrics
        assert [name for name in metrics if name.startswith("drop/")] == [f"drop/{k}" for k in keys]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("http://u:p@host:5000/x", "http://host:5000/x", id="user-and-password"),
        pytest.param("http://token@host", "http://host", id="token"),
        pytest.param("http://u:p@ss@host", "http://host", id="at-in-password"),
        pytest.param("http://u:p/w?#@host", "http://***", id="slash-in-password"),
        pytest.param("postgresql+psycopg://u:p@h/db", "postgresql+psycopg://h/db", id="database"),
        pytest.param("us3r:s3cr3t@host", "host", id="no-scheme"),
        pytest.param("us3r:s3cr3t", UNREADABLE_URI, id="no-scheme-and-no-host"),
        pytest.param("us3r:s3cr3t@http://host", UNREADABLE_URI, id="before-the-scheme"),
        pytest.param("//us3r:s3cr3t@host/", UNREADABLE_URI, id="only-slashes"),
        pytest.param("http://us3r:s3cr3t @host/", "http://***", id="space"),
        pytest.param("http://us3r:s3cr3t%40host/", "http://***", id="quoted-at"),
        pytest.param("http://us3r:s3cr3t", "http://***", id="password-for-a-port"),
        pytest.param("http:///us3r:s3cr3t@host", "http://***", id="empty-host"),
        pytest.param("http://host:5000/?token=s3@cr3t", "http://***", id="at-in-query"),
        pytest.param("http://host:5000/x?token=s3cr3t", "http://host:5000/x", id="query"),
        pytest.param("http://host/#s3cr3t", "http://host/", id="fragment"),
        pytest.param("http://u:p@[::1]:5000/", "http://[::1]:5000/", id="ipv6"),
        pytest.param("postgresql:///db?password=s3cr3t", "postgresql:///db", id="database-query"),
        pytest.param("sqlite:////a b/m.db?key=s3cr3t", "sqlite:////a b/m.db", id="path-query"),
        pytest.param("/home/a@b/mlruns", "/home/a@b/mlruns", id="bare-path-kept"),
        pytest.param("file:///home/a@b", "file:///home/a@b", id="file-kept"),
        pytest.param("databricks", "databricks", id="word-kept"),
        pytest.param("sqlite:////home/a@b/m.db", "sqlite:////home/a@b/m.db", id="path-kept"),
        pytest.param("http://host:5000", "http://host:5000", id="nothing-to-drop"),
    ],
)
def test_tracking_uri_is_shown_without_credentials(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert _redact(f"no answer from {text}", text) == f"no answer from {shown}"


@pytest.mark.parametrize("message", ["bad login bob:s3%40t", "password s3@t", "s3%40t refused"])
def test_credentials_are_dropped_from_messages(message: str) -> None:
    shown = _redact(message, "https://bob:s3%40t@mlflow.example")
    assert "s3" not in shown
    assert "[REDACTED]" in shown


@pytest.mark.parametrize(
    "uri",
    [
        "us3r:s3cr3t@host",
        "http://us3r:s3cr3t@host/",
        "http://us3r:s3cr3t @host/",
        "http://us3r:s3cr3t%20@host/",
        "http://us3r:s3cr3t%40host/@host",
        "http://host/?token=s3cr3t",
        "http://host/?a=1&token=s3cr3t#x",
    ],
)
@pytest.mark.parametrize(
    "message",
    [
        "Invalid URL {uri}: no host",
        "Invalid URL {uri}/api/2.0/mlflow/experiments/get-by-name",
        "url: /?token=s3cr3t/api/2.0 (Caused by nothing)",
        "user us3r with s3cr3t refused",
        "headers were {{'Authorization': 'Basic dXMzcjpzM2NyM3Q='}}",
        "a proxy said us3r:s3cr3t@proxy:80",
    ],
)
def test_odd_uri_leaves_no_credentials_in_messages(uri: str, message: str) -> None:
    shown = _redact(message.format(uri=uri), uri)
    # a name or a password that this URI does not hold is nothing to know from a plain sentence
    secrets = [word for word in ("us3r", "s3cr3t") if word in uri or "refused" not in message]
    assert not [word for word in (*secrets, "dXMzcjpzM2NyM3Q") if word in shown], shown


@pytest.mark.parametrize(
    "uri", ["https://us3r:s3cr3t@h", "us3r:s3cr3t@h", "https://us3r:s3cr3t @h"]
)
def test_basic_form_of_the_credentials_is_dropped_without_its_word(uri: str) -> None:
    assert _redact("you sent dXMzcjpzM2NyM3Q= to me", uri) == "you sent [REDACTED]= to me"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://a:b@c and http://d:e@f", "at http://c and http://f"),
        ("get http://c/x?sig=1 now", "get http://c/x?[REDACTED] now"),
        ("authorization: bearer abc.d-e", "authorization: bearer [REDACTED]"),
        ("Is it up? Ask at 10:30.", "Is it up? Ask at 10:30."),
    ],
    ids=["user-information", "query", "bearer", "sentence-kept"],
)
def test_credentials_of_other_urls_are_dropped_from_messages(text: str, shown: str) -> None:
    assert _redact(text, "http://host:5000/?timeout=1") == shown


@pytest.mark.parametrize("value", [None, ""])
def test_local_store_is_the_default(value: str | None, tmp_path: Path) -> None:
    environ = {} if value is None else {"MLFLOW_TRACKING_URI": value}
    assert tracking_uri(environ, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri({"MLFLOW_TRACKING_URI": "http://h"}, tmp_path) == "http://h"
    assert tracking_uri(environ, tmp_path, "http://configured") == "http://configured"
    assert tracking_uri({"MLFLOW_TRACKING_URI": "http://h"}, tmp_path, "http://c") == "http://h"


def test_settings_bound_requests_and_keep_proxies_off_loopback() -> None:
    settings = _settings({"NO_PROXY": "corp.example", "MLFLOW_HTTP_REQUEST_TIMEOUT": "9"})
    assert settings["NO_PROXY"] == settings["no_proxy"] == "corp.example,127.0.0.1,localhost"
    assert settings["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "9"
    assert settings["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert settings["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.parametrize(
    "content",
    [None, "", "[]", "{}", '{"release": [], "stages": {}}', '{"stages": [1]}', "\xff"],
)
def test_file_that_is_no_plan_is_refused(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pending = tmp_path / PENDING
    if content is not None:
        pending.write_text(content, encoding="latin-1")
    assert main([str(pending)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert not (tmp_path / RESULT).exists()
    assert err.startswith(f"{pending}: not a pending record of a release: ")


class Place:
    """A workspace with one release whose report is written."""

    def __init__(self, workspace: Path, name: str, *, run_id: str | None = None) -> None:
        self.workspace = workspace
        self.document = example(name)
        self.document["run_id"] = run_id or self.document["run_id"]
        self.run_dir = workspace / "runs" / self.document["run_id"]
        self.run_dir.mkdir(parents=True)
        write_report(self.document, self.run_dir)
        self.pending = self.run_dir / PENDING

    def environ(self, **changes: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("MLFLOW_") and not name.lower().endswith("_proxy")
        }
        return {**kept, **changes}

    def log(self, **changes: str) -> Tracking:
        return log_release(
            self.document, self.run_dir, workspace=self.workspace, environ=self.environ(**changes)
        )


@pytest.fixture
def client_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], MlflowClient]:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")

    def make(uri: str) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri)

    return make


def runs_of(client: MlflowClient, run_id: str) -> list[Run]:
    experiment = client.get_experiment_by_name("day0")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"tags.`day0.run_id` = '{run_id}'"))


def check_record(client: MlflowClient, place: Place, tracking: Tracking, tmp_path: Path) -> None:
    """Read a release back and compare all of it with the plan."""
    plan = plan_release(place.document, workspace=place.workspace)
    assert tracking.run_id is not None
    parent = client.get_run(tracking.run_id)
    assert parent.info.run_name == place.document["run_id"]
    assert parent.info.status == plan.release.status
    assert parent.info.start_time == plan.release.started_ms
    assert parent.info.end_time == plan.release.finished_ms
    assert parent.data.params == plan.release.params
    assert parent.data.metrics == plan.release.metrics
    assert plan.release.tags.items() <= parent.data.tags.items()
    assert list(tracking.stage_run_ids) == list(plan.stages)
    for stage, run_id in tracking.stage_run_ids.items():
        run, planned = client.get_run(run_id), plan.stages[stage]
        assert run.data.tags["mlflow.parentRunId"] == tracking.run_id
        assert run.info.status == planned.status
        assert (run.info.start_time, run.info.end_time) == (planned.started_ms, planned.finished_ms)
        assert run.data.metrics == planned.metrics
    assert len(runs_of(client, place.document["run_id"])) == 1 + len(plan.stages)
    for key in plan.release.metrics:
        assert len(client.get_metric_history(tracking.run_id, key)) == 1

    copies = Path(client.download_artifacts(tracking.run_id, "", str(tmp_path)))
    for name in ("report.json", "report.md", "report.html"):
        assert (copies / name).read_bytes() == (place.run_dir / name).read_bytes()
    stamped = json.loads((copies / "report.json").read_text("utf-8"))["tracking"]
    assert stamped == tracking.document()
    for name, verdict in plan.verdicts.items():
        assert json.loads((copies / name).read_text("utf-8")) == verdict


@pytest.mark.tools
def test_local_store_holds_the_release_once(
    tmp_path: Path, client_for: Callable[[str], MlflowClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, copies = tmp_path / "elsewhere", tmp_path / "copies"
    elsewhere.mkdir()
    copies.mkdir()
    monkeypatch.chdir(elsewhere)
    place = Place(tmp_path / "a workspace", "accept")
    noted: list[str] = []
    first = log_release(
        place.document,
        place.run_dir,
        workspace=place.workspace,
        environ=place.environ(),
        note=lambda event, **facts: noted.append(f"{event} {facts.get('status', '')}".strip()),
    )
    assert noted == ["tool_started", "tool_finished logged"]
    assert first.status is TrackingStatus.LOGGED, first.detail
    assert first.uri == f"sqlite:///{place.workspace}/mlflow.db"
    assert not place.pending.exists()
    assert place.log() == first
    check_record(client_for(first.uri), place, first, copies)
    assert (place.workspace / "mlartifacts").is_dir()
    assert list(elsewhere.iterdir()) == []

    place.document["seed"] = 4321
    changed = place.log()
    assert changed.status is TrackingStatus.UNAVAILABLE
    assert "param" in changed.detail
    assert place.pending.exists()


@pytest.mark.tools
def test_two_releases_at_once_share_a_fresh_workspace(
    tmp_path: Path, client_for: Callable[[str], MlflowClient]
) -> None:
    workspace = tmp_path / "workspace"
    places = [Place(workspace, "accept", run_id=f"release-{number}") for number in (1, 2)]
    with ThreadPoolExecutor() as pool:
        trackings = list(pool.map(Place.log, places))
    assert [(t.status, t.detail) for t in trackings] == [(TrackingStatus.LOGGED, "")] * 2
    client = client_for(f"sqlite:///{workspace}/mlflow.db")
    for place, tracking in zip(places, trackings, strict=True):
        copies = tmp_path / place.document["run_id"]
        copies.mkdir()
        check_record(client, place, tracking, copies)


@pytest.mark.tools
def test_store_whose_making_was_killed_is_made_again(tmp_path: Path) -> None:
    place = Place(tmp_path / "workspace", "accept")
    unfinished = place.workspace / "mlflow.db.new"

    def kill_at_first_table() -> None:
        sender = psutil.Popen(
            [sys.executable, "-m", "conductor.tracking", str(place.pending)],
            cwd=Path(__file__).parents[1],
            env=place.environ(),
        )
        try:
            started = time.monotonic()
            while not (unfinished.exists() and unfinished.stat().st_size):
                assert time.monotonic() - started < 60
                time.sleep(0.005)
        finally:
            sender.kill()
            sender.wait()

    plan = plan_release(place.document, workspace=place.workspace)
    place.pending.write_text(json.dumps(asdict(plan)), encoding="utf-8")
    kill_at_first_table()
    unfinished.with_name("mlflow.db.new-journal").write_bytes(b"of the killed sender")
    assert not (place.workspace / "mlflow.db").exists()
    tracking = place.log()
    assert tracking.status is TrackingStatus.LOGGED, tracking.detail
    assert list(place.workspace.glob("mlflow.db.new*")) == []


@pytest.mark.tools
def test_store_that_another_process_holds_is_waited_for_within_the_limit(tmp_path: Path) -> None:
    place = Place(tmp_path / "workspace", "accept")
    with FileLock(place.workspace / "mlflow.db.lock"):
        started = time.monotonic()
        held = log_release(
            place.document,
            place.run_dir,
            workspace=place.workspace,
            environ=place.environ(),
            limit_s=3,
        )
    assert time.monotonic() - started < 15
    assert held.status is TrackingStatus.UNAVAILABLE
    assert "not done within 3 s" in held.detail
    assert not (place.workspace / "mlflow.db").exists()
    assert place.log().status is TrackingStatus.LOGGED


def test_store_that_stays_held_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conductor.tracking.LOCK_WAIT_S", 0.1)
    with (
        FileLock(tmp_path / "m.db.lock"),
        pytest.raises(TimeoutError, match=r"another process has held .*m\.db\.lock for 0\.1 s"),
        _sole_use(f"sqlite:///{tmp_path}/m.db", tmp_path),
    ):
        pytest.fail("the store was given out twice")


@pytest.mark.parametrize("uri", ["http://host", "sqlite://", "sqlite:///:memory:", "mlruns"])
def test_store_without_a_database_file_takes_no_lock(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with _sole_use(uri, tmp_path):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.tools
def test_resumed_release_replaces_its_aborted_record(
    tmp_path: Path, client_for: Callable[[str], MlflowClient]
) -> None:
    place = Place(tmp_path / "workspace", "aborted")
    aborted = place.log()
    place.document = {
        **example("accept"),
        "run_id": place.document["run_id"],
        "recipe": {**example("accept")["recipe"], "name": place.document["recipe"]["name"]},
    }
    write_report(place.document, place.run_dir)
    resumed = place.log()
    assert (resumed.status, resumed.run_id) == (TrackingStatus.LOGGED, aborted.run_id)
    assert resumed.uri is not None
    client = client_for(resumed.uri)
    parent = client.get_run(str(resumed.run_id))
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["day0.decision"] == "ACCEPT"
    assert parent.data.tags["day0.failure_class"] == "none"
    assert len(runs_of(client, place.document["run_id"])) == 1 + len(STAGES)


@contextmanager
def closed_port() -> Iterator[str]:
    """Hold a port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def fake_hanging_server() -> Iterator[str]:
    """Accept every connection and never answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.tools
@pytest.mark.parametrize("server", [closed_port, fake_hanging_server], ids=["dead", "hanging"])
def test_silent_server_costs_seconds_and_keeps_the_record(
    server: Callable[[], Any],
    tmp_path: Path,
    client_for: Callable[[str], MlflowClient],
) -> None:
    place = Place(tmp_path / "workspace", "regression")
    started = time.monotonic()
    with server() as address:
        tracking = place.log(
            MLFLOW_TRACKING_URI=f"http://alice:pass%40word@{address}",
            PYTHONWARNINGS="pass@word",  # which the sender's interpreter complains about by name
        )
    assert time.monotonic() - started < 45
    assert tracking.status is TrackingStatus.UNAVAILABLE
    assert tracking.run_id is None
    assert tracking.uri == f"http://{address}"
    assert address in tracking.detail
    assert tracking.detail.endswith(f"send it with: day0 sync {place.run_dir}")
    for secret in ("alice", "pass%40word", "pass@word"):
        for path in place.run_dir.iterdir():
            assert secret not in path.read_text("utf-8"), path
        assert secret not in json.dumps(tracking.document())
    log = (place.run_dir / LOG).read_text("utf-8")
    assert "'[REDACTED]'" in log
    assert f"unavailable at http://{address}: " in log

    (synced,) = sync_runs([place.run_dir], environ=place.environ())
    sent = synced.tracking
    assert synced.logged
    assert synced.words == f"{place.run_dir.name}: logged at {sent.uri} as run {sent.run_id}"
    left = json.loads((place.run_dir / RESULT).read_text("utf-8"))
    assert left == sent.document()
    assert not place.pending.exists()
    assert sent.uri is not None
    copies = tmp_path / "copies"
    copies.mkdir()
    check_record(client_for(sent.uri), place, sent, copies)


@pytest.mark.tools
def test_sender_is_ended_at_the_limit(tmp_path: Path) -> None:
    place = Place(tmp_path / "workspace", "accept")
    started = time.monotonic()
    tracking = log_release(
        place.document,
        place.run_dir,
        workspace=place.workspace,
        environ=place.environ(),
        limit_s=0.2,
    )
    assert time.monotonic() - started < 10
    assert tracking.status is TrackingStatus.UNAVAILABLE
    assert "not done within 0.2 s" in tracking.detail
    assert place.pending.exists()


@pytest.mark.tools
def test_sender_ends_with_a_killed_conductor(tmp_path: Path) -> None:
    place = Place(tmp_path / "workspace", "accept")
    code = (
        "import os; from pathlib import Path; from conductor.files import read_json\n"
        "from conductor.tracking import log_release\n"
        f"run_dir = Path({str(place.run_dir)!r})\n"
        "log_release(read_json(run_dir / 'report.json'), run_dir, workspace=run_dir.parents[1],"
        " environ=os.environ)"
    )
    with fake_hanging_server() as address:
        conductor = psutil.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            env=place.environ(MLFLOW_TRACKING_URI=f"http://{address}"),
        )
        try:
            family: list[psutil.Process] = []
            started = time.monotonic()
            while len(family) < 2 and time.monotonic() - started < 30:
                time.sleep(0.05)
                family = conductor.children(recursive=True)
            assert len(family) == 2, "supervisor and sender"
        finally:
            conductor.kill()
            conductor.wait()
        _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert place.pending.exists()


@pytest.mark.tools
def test_result_of_an_earlier_try_is_not_taken_for_this_one(tmp_path: Path) -> None:
    place = Place(tmp_path / "workspace", "accept")
    assert place.log().status is TrackingStatus.LOGGED
    again = log_release(
        place.document,
        place.run_dir,
        workspace=place.workspace,
        environ=place.environ(PYTHONHOME=str(tmp_path)),
    )
    assert again.status is TrackingStatus.UNAVAILABLE
    assert "left no result (exit status 1)" in again.detail
    assert place.pending.exists()


@pytest.mark.tools
def test_configured_store_and_experiment_hold_also_for_what_is_sent_later(
    tmp_path: Path, client_for: Callable[[str], MlflowClient]
) -> None:
    place = Place(tmp_path / "workspace", "accept")
    uri = f"sqlite:///{tmp_path}/chosen.db"
    late = log_release(
        place.document,
        place.run_dir,
        workspace=place.workspace,
        environ=place.environ(PYTHONHOME=str(tmp_path)),
        uri=uri,
        experiment="nightly",
    )
    assert (late.status, late.uri) == (TrackingStatus.UNAVAILABLE, uri)
    (synced,) = sync_runs([place.run_dir], environ=place.environ())
    assert (synced.logged, synced.tracking.uri) == (True, uri)
    assert client_for(uri).get_experiment_by_name("nightly") is not None
    assert not (place.workspace / "mlflow.db").exists()


class TestSync:
    def pending(self, workspace: Path, *run_ids: str) -> list[Place]:
        places = [Place(workspace, "accept", run_id=run_id) for run_id in run_ids]
        for place in places:
            plan = plan_release(place.document, workspace=workspace)
            place.pending.write_text(json.dumps(asdict(plan)), encoding="utf-8")
        return places

    def test_passes_over_a_run_with_nothing_to_send(self, tmp_path: Path) -> None:
        (tmp_path / "run-1").mkdir()
        assert sync_runs([tmp_path / "run-1", tmp_path / "absent"], environ={}) == []
        assert list((tmp_path / "run-1").iterdir()) == [], "nothing was written"

    def test_leaves_a_release_to_the_conductor_that_works_on_it(self, tmp_path: Path) -> None:
        (place,) = self.pending(tmp_path, "busy")
        with hold(place.run_dir):
            (synced,) = sync_runs([place.run_dir], environ=place.environ())
        assert synced.tracking.status is TrackingStatus.UNAVAILABLE
        assert str(os.getpid()) in synced.words, "it says who holds it"
        assert place.pending.exists()

    @pytest.mark.parametrize("content", ["", "[]", '{"stages": [1]}'])
    def test_names_a_file_that_is_no_plan(self, content: str, tmp_path: Path) -> None:
        (tmp_path / PENDING).write_text(content, encoding="utf-8")
        (synced,) = sync_runs([tmp_path], environ={})
        assert f"not sent: {tmp_path / PENDING}: not a pending record" in synced.words

    @pytest.mark.tools
    def test_sends_every_release(
        self, tmp_path: Path, client_for: Callable[[str], MlflowClient]
    ) -> None:
        places = self.pending(tmp_path, "first", "second")
        bad = tmp_path / "runs" / "bad"
        bad.mkdir()
        (bad / PENDING).write_text("{}", encoding="utf-8")
        runs = [places[0].run_dir, bad, places[1].run_dir]
        synced = sync_runs(runs, environ=places[0].environ())
        assert [one.logged for one in synced] == [True, False, True]
        client = client_for(f"sqlite:///{tmp_path}/mlflow.db")
        for place, one in zip(places, (synced[0], synced[2]), strict=True):
            copies = tmp_path / f"copies-{place.run_dir.name}"
            copies.mkdir()
            check_record(client, place, one.tracking, copies)
        assert sync_runs(runs[:1], environ=places[0].environ()) == []

    @pytest.mark.tools
    def test_store_that_hangs_costs_its_limit_once(self, tmp_path: Path) -> None:
        places = self.pending(tmp_path, "first", "second", "third")
        started = time.monotonic()
        with fake_hanging_server() as address:
            synced = sync_runs(
                [place.run_dir for place in places],
                environ=places[0].environ(MLFLOW_TRACKING_URI=f"http://{address}"),
                limit_s=2,
            )
        assert time.monotonic() - started < 10
        assert "not done within 2 s" in synced[0].words
        assert ["not tried" in one.words for one in synced] == [False, True, True]
        assert all(place.pending.exists() for place in places)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a real ``mlflow server`` on loopback in a process group of its own."""
    home = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{home}/server.db",
        "--artifacts-destination", str(home / "artifacts"), "--workers", "1",
    ]  # fmt: skip
    environ = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = (home / "server.log").open("wb")
    process = subprocess.Popen(
        command, cwd=home, env=environ, stdout=log, stderr=log, start_new_session=True
    )
    try:
        address = f"http://127.0.0.1:{port}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(240):
            assert process.poll() is None, (home / "server.log").read_text()
            try:
                opener.open(f"{address}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail((home / "server.log").read_text())
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


@pytest.mark.tools
def test_real_server_holds_the_release_and_no_proxy_sees_it(
    server: str, tmp_path: Path, client_for: Callable[[str], MlflowClient]
) -> None:
    place = Place(tmp_path / "workspace", "no-compare", run_id="served")
    with closed_port() as address:
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), f"http://{address}")
        tracking = place.log(MLFLOW_TRACKING_URI=server, **proxies)
    assert tracking.status is TrackingStatus.LOGGED, tracking.detail
    assert place.log(MLFLOW_TRACKING_URI=server) == tracking
    copies = tmp_path / "copies"
    copies.mkdir()
    check_record(client_for(server), place, tracking, copies)
    assert not (place.workspace / "mlflow.db").exists()


class FakeFailingRelay:
    """Pass traffic on to a real server until ``requests`` were seen, then die or hang."""

    def __init__(self, server: str, *, requests: int, hangs: bool) -> None:
        self.target = ("127.0.0.1", int(server.rpartition(":")[2]))
        self.left, self.hangs, self.over = requests, hangs, False
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            upstream = socket.create_connection(self.target)
            self.sockets += [client, upstream]
            for source, target, counted in ((client, upstream, True), (upstream, client, False)):
                threading.Thread(
                    target=self.pump, args=(source, target, counted), daemon=True
                ).start()

    def pump(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        try:
            while chunk := source.recv(65536):
                if counted:
                    self.left -= chunk.count(b" HTTP/1.1\r\n")
                    self.over = self.over or self.left < 0
                if self.over and not self.hangs:
                    return self.close()
                if not self.over:
                    target.sendall(chunk)
        except OSError:
            return None

    def close(self) -> None:
        for opened in (self.listener, *self.sockets):
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
            opened.close()


@pytest.mark.tools
@pytest.mark.parametrize("hangs", [False, True], ids=["dies", "hangs"])
@pytest.mark.parametrize(
    ("requests", "ended"), [(8, 1), (30, len(STAGES))], ids=["among-stages", "among-artifacts"]
)
def test_server_lost_in_the_middle_is_completed_later(
    server: str,
    requests: int,
    ended: int,
    hangs: bool,
    tmp_path: Path,
    client_for: Callable[[str], MlflowClient],
) -> None:
    place = Place(tmp_path / "workspace", "accept", run_id=f"lost-{requests}-{hangs}")
    before = (place.run_dir / "report.json").read_bytes()
    relay = FakeFailingRelay(server, requests=requests, hangs=hangs)
    started = time.monotonic()
    tracking = place.log(MLFLOW_TRACKING_URI=relay.address)
    assert time.monotonic() - started < 45
    relay.close()
    assert relay.over
    assert tracking.status is TrackingStatus.UNAVAILABLE
    assert place.pending.exists()
    assert (place.run_dir / "report.json").read_bytes() == before
    client = client_for(server)
    begun = runs_of(client, place.document["run_id"])
    parent = next(run for run in begun if "day0.stage" not in run.data.tags)
    assert parent.info.status == "RUNNING"
    assert sum(run.info.status == "FINISHED" for run in begun) == ended
    assert bool(client.list_artifacts(parent.info.run_id)) == (ended == len(STAGES))

    again = place.log(MLFLOW_TRACKING_URI=server)
    assert again.status is TrackingStatus.LOGGED, again.detail
    copies = tmp_path / "copies"
    copies.mkdir()
    check_record(client, place, again, copies)
