"""Real releases of the demo model: real quantizers, real servers, real lm-eval, real MLflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import descendants_with, run_day0

from conductor.models import DEMO_PATH
from conductor.suites import BUILT_IN

pytestmark = pytest.mark.tools

GATES = ["ptq", "canary", "baseline_run", "external", "candidate_run", "conditions", "compare"]


def test_int8_on_vllm_is_accepted(workspace: Path) -> None:
    done = run_day0("release", "demo", "--recipe", "int8", "--workspace", str(workspace), "--json")
    report = done.report
    assert (done.exit_code, report["decision"]) == (0, "ACCEPT"), done.stderr
    assert report["engine"]["name"] == "vllm"
    assert not report["engine"]["emulated"]
    assert [gate["gate"] for gate in report["gates"]] == [*GATES, "verbosity"]
    assert all(gate["document"]["pass"] for gate in report["gates"])
    assert len(report["tasks"]) >= 4
    assert all(task["samples"] >= 500 for task in report["tasks"])
    assert all(0.5 < task["baseline"] <= 1.0 for task in report["tasks"])
    assert all(0 < task["baseline_stderr"] < 0.05 for task in report["tasks"])
    assert all(0 < task["candidate_stderr"] < 0.05 for task in report["tasks"])
    for name in ("report.json", "report.md", "report.html", "manifest.json", "env.json"):
        assert (Path(report["paths"]["run"]) / name).stat().st_size > 0
    assert_tracked(report)


def assert_tracked(report: dict[str, Any]) -> None:
    """Read the release back from the tracking store that its report names."""
    from mlflow import MlflowClient

    tracking = report["tracking"]
    assert tracking["status"] == "logged"
    client = MlflowClient(tracking_uri=tracking["uri"])
    parent = client.get_run(tracking["run_id"])
    assert parent.data.tags["day0.decision"] == report["decision"]
    assert parent.data.params["recipe"] == report["recipe"]["name"]
    for task in report["tasks"]:
        assert parent.data.metrics[f"baseline/{task['task']}"] == task["baseline"]
        assert parent.data.metrics[f"candidate_stderr/{task['task']}"] == task["candidate_stderr"]
    for stage, run_id in tracking["stage_run_ids"].items():
        assert client.get_run(run_id).data.tags["mlflow.parentRunId"] == tracking["run_id"], stage
    assert len(tracking["stage_run_ids"]) == 6
    assert {file.path for file in client.list_artifacts(tracking["run_id"])} >= {
        *("report.html", "report.json", "report.md", "verdicts")
    }


def test_nvfp4_in_process_is_undecided_and_says_what_would_decide_it(workspace: Path) -> None:
    done = run_day0("release", "demo", "--recipe", "nvfp4", "--workspace", str(workspace), "--json")
    report = done.report
    assert (done.exit_code, report["decision"]) == (3, "ANOMALOUS"), done.stderr
    assert report["failure_class"] == "INSUFFICIENT_EVIDENCE"
    assert report["engine"]["name"] == "transformers"
    assert report["engine"]["emulated"]
    undecided = [task for task in report["tasks"] if task["outcome"] == "undecided"]
    assert undecided
    for task in undecided:
        assert task["drop_lower"] < task["limit"] * 2
        assert task["drop_upper"] > task["limit"]
        assert task["needed"]["more_questions_if_lossless"] is not None


def test_a_release_asks_until_it_is_decided(workspace: Path) -> None:
    done = run_day0(
        *("release", "demo", "--recipe", "int8", "--until-decided", "--first-batch", "100"),
        *("--threshold", "0.03", "--noise-floor", "--workspace", str(workspace), "--json"),
    )
    report = done.report
    assert (done.exit_code, report["decision"]) == (0, "ACCEPT"), done.stderr
    assert report["publish"] == "publish"
    last = {look["task"]: look for look in report["path"]}
    assert {look["outcome"] for look in last.values()} == {"pass"}
    assert max(look["round"] for look in report["path"]) > 1
    for task in report["tasks"]:
        assert task["questions"] == task["samples"] == last[task["task"]]["questions"] < 1000
        assert task["method"] == "betting"
        assert task["drop_upper"] < task["limit"]
    assert {row["questions"] for row in report["noise_floor"].values()} == {100}
    rounds = Path(report["paths"]["run"]) / "stages" / "candidate_eval" / "round-2"
    planned = [
        json.loads((rounds / side / "results" / "planned.json").read_text())
        for side in ("source", "candidate")
    ]
    assert planned[0] == planned[1]
    asked = json.loads((rounds / "source" / "request.json").read_text())["questions"]
    assert {part["from"] for part in asked.values()} == {100}
    assert all(len(planned[0][task]["documents"]) == 60 for task in asked)


def test_a_baseline_far_from_its_reference_is_anomalous(workspace: Path) -> None:
    suite = BUILT_IN["demo"].with_name("suite-wrong-reference.yaml")
    done = run_day0(
        *("release", "demo", "--recipe", "fp8", "--suite", str(suite)),
        *("--workspace", str(workspace), "--json"),
    )
    report = done.report
    assert (done.exit_code, report["decision"]) == (3, "ANOMALOUS"), done.stderr
    assert report["failure_class"] == "EXTERNAL_BASELINE_MISMATCH"
    states = {stage["name"]: stage["state"] for stage in report["stages"]}
    assert (states["baseline_eval"], states["candidate_eval"]) == ("failed", "pending")


def test_settings_under_which_no_server_gets_healthy_abort(workspace: Path, tmp_path: Path) -> None:
    config = tmp_path / "hasty.yaml"
    config.write_text("engine: {health_timeout_s: 1}\n")
    done = run_day0(
        *("release", "demo", "--recipe", "int8", "--config", str(config)),
        *("--workspace", str(workspace), "--json"),
    )
    report = done.report
    assert (done.exit_code, report["decision"]) == (5, None), done.stderr
    assert report["failure_class"] == "SYSTEMIC"
    assert "not even the source" in " ".join(report["reasons"])
    assert "health_timeout_s" in " ".join(report["reasons"])


def test_a_checkpoint_that_does_not_load_is_told_from_its_source(tmp_path: Path) -> None:
    broken = tmp_path / "another-shape"
    shutil.copytree(DEMO_PATH, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_size": 512}))
    done = run_day0(
        *("serve", str(broken), "--source", "demo", "--suite", "demo"),
        *("--output", str(tmp_path / "check")),
    )
    assert done.exit_code == 1, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["failure_class"] == "CHECKPOINT_NOT_SERVABLE"
    assert not descendants_with(tmp_path)


def test_stages_run_on_their_own_with_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "Mine.yaml"
    recipe.write_text(
        "quant_stage:\n  quant_modifiers:\n    QuantizationModifier:\n"
        "      {targets: [Linear], scheme: W8A8, ignore: ['re:.*lm_head$']}\n"
    )
    made = run_day0("ptq", "demo", "--recipe", str(recipe), "--output", "made")
    assert made.exit_code == 0, made.stdout + made.stderr
    asked = run_day0(
        *("evaluate", "made/checkpoint", "--suite", "demo", "--engine", "transformers"),
        *("--limit", "20", "--output", "scores"),
    )
    assert asked.exit_code == 0, asked.stdout + asked.stderr
    assert json.loads(asked.stdout)["scores"]["demo_reverse"] > 0.5
    again = run_day0("ptq", "demo", "--recipe", "int8", "--output", "made")
    assert (again.exit_code, "exists already" in again.stderr) == (2, True)


def test_truncated_weights_are_refused_in_setup(workspace: Path, tmp_path: Path) -> None:
    broken = tmp_path / "truncated-weights"
    shutil.copytree(DEMO_PATH, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    refused(
        *(str(broken), "--recipe", "int8"),
        workspace=workspace,
        exit_code=2,
        words="model.safetensors",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_release_that_is_stopped(
    workspace: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "conductor.cli", "release", "demo", "--recipe", "int8"),
            *("--workspace", str(workspace)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server_log = "stages/deploy/server-candidate.log"
    deadline = time.monotonic() + 300
    while not list(workspace.glob(f"runs/*/{server_log}")):
        assert time.monotonic() < deadline, "the server was never started"
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.2)
    time.sleep(5)
    family = [p for p in descendants_with(workspace) if p.pid != process.pid]
    assert family
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert "stopped on request" in output
    deadline = time.monotonic() + 30
    while any(p.is_running() for p in family) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [p for p in family if p.is_running()]


def refused(*arguments: str, workspace: Path, exit_code: int, words: str) -> None:
    done = run_day0("release", *arguments, "--workspace", str(workspace))
    output = done.stdout + done.stderr
    assert done.exit_code == exit_code, output
    assert words in " ".join(output.split()), output
    assert "Traceback" not in output


def test_a_quantizer_that_is_killed_is_tried_again(workspace: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "conductor.cli", "release", "demo"),
            *("--recipe", "nvfp4_experts_only", "--workspace", str(workspace), "--json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (workers := processes_of("quantize_llmcompressor.py", workspace)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers[-1].kill()
    output, _ = process.communicate(timeout=300)
    report = json.loads(output)
    assert (process.returncode, report["decision"]) == (4, "INFEASIBLE")
    ptq = next(stage for stage in report["stages"] if stage["name"] == "ptq")
    assert ptq["attempts"] == 2
    assert any(each.startswith("ptq: attempt 1 failed") for each in report["deviations"])


def processes_of(script: str, workspace: Path) -> list[psutil.Process]:
    """The processes that run ``script`` for this workspace, the supervisor before the worker."""
    found = descendants_with(workspace)
    return [p for p in found if any(script in part for part in p.cmdline())]


def test_requests_that_cannot_work_are_refused_in_setup(workspace: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse = {"workspace": workspace, "exit_code": 2}
    refused("demo", "--recipe", "nvfp5", words="nvfp5", **refuse)
    refused(str(empty), "--recipe", "int8", words="config.json", **refuse)
    refused(
        *("demo", "--recipe", "fp8", "--quantizer", "modelopt", "--engine", "transformers"),
        words="garbage",
        **refuse,
    )


def test_a_port_in_use_is_refused_in_setup(workspace: Path, tmp_path: Path) -> None:
    config = tmp_path / "port.yaml"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config.write_text(f"engine: {{port: {port}}}\n")
        refused(
            *("demo", "--recipe", "int8", "--config", str(config)),
            workspace=workspace,
            exit_code=5,
            words=f"{port} is in use",
        )


def test_a_workspace_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    refused("demo", "--recipe", "int8", workspace=blocked / "ws", exit_code=5, words="file")


def test_tracking_that_is_down_costs_seconds_not_the_decision(workspace: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
    started = time.monotonic()
    done = run_day0(
        *("release", "demo", "--recipe", "nvfp4_experts_only"),
        *("--workspace", str(workspace), "--json"),
        environ={**os.environ, "MLFLOW_TRACKING_URI": uri},
    )
    report = done.report
    assert report["decision"] == "INFEASIBLE"
    assert report["tracking"]["status"] == "unavailable"
    pending = Path(report["paths"]["run"]) / "tracking-pending.json"
    assert json.loads(pending.read_text())
    assert time.monotonic() - started < 120
