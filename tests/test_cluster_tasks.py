"""Tasks: what the conductor writes down for a job, and what the job makes of it on its node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_slurm_following import CLUSTER

from conductor.chain import Stage
from conductor.cluster import tools
from conductor.cluster.tasks import (
    Node,
    Opened,
    canary_task,
    carry_out,
    evaluation_task,
    worker_task,
)
from conductor.cluster.tasks import on_node as on_a_node
from conductor.cluster.tools import SlurmTools
from conductor.compatibility import Device, Engine
from conductor.config import Config, load_config, restore
from conductor.engines import Sides
from conductor.evaluation import Inquiry, harness_settings
from conductor.executors.local import Worker
from conductor.executors.slurm.folders import JobFolder, Place
from conductor.executors.slurm.following import Connection, Errand
from conductor.failure import Failure
from conductor.models import DEMO_PATH, resolve_model
from conductor.recorded_tools import RECORDED, Record
from conductor.suites import load_suite
from conductor.tools import tools_here
from gates import FailureClass

GIVEN = {"root": None, "interpreters": {}, "used": []}


@pytest.fixture
def config() -> Config:
    return load_config(None, {"model": "demo", "recipe": "int8", "dry_run": True})


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "r-1" / "stages"


def on_node(task: dict[str, Any], config: Config) -> dict[str, Any]:
    document = on_a_node(task, config, Device.CPU, GIVEN)
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return plain


def done_here(task: dict[str, Any], config: Config, events: list[str]) -> Any:
    document = on_node(task, config)
    node = Node.find(document, {}, lambda event, **_: events.append(event), lambda *_: None)
    return carry_out(document, node)


def quantizing(stages: Path, **environ: str) -> dict[str, Any]:
    request = Record(RECORDED / "int8").document["quantize"]["request"]
    return worker_task(
        Worker(script="quantize_llmcompressor.py", interpreter=Path("/python")),
        stages / "ptq",
        {**request, "output_dir": str(stages.parent / "checkpoint")},
        environ={"HOME": "/home", "HF_HUB_OFFLINE": "1"},
        inherited={"HOME": "/home", "HTTPS_PROXY": "http://proxy", **environ},
        stall_s=60.0,
    )


def opened(config: Config, stages: Path) -> Opened:
    sides = Sides(source=DEMO_PATH, candidate=stages.parent / "checkpoint")
    length = load_suite("demo").max_length
    return Opened(engine=Engine.VLLM, sides=sides, config=config, max_length=length)


def test_a_configuration_is_restored_as_it_was(config: Config) -> None:
    restored = restore(json.loads(json.dumps(config.document())))
    assert restored.document() == config.document()
    task = restore(on_node({}, config)["config"])
    assert (task.model, task.engine, task.suite) == (config.model, config.engine, config.suite)
    assert (restored.engine, restored.dry_run) == (config.engine, True)


@pytest.mark.parametrize(
    ("options", "is_known_again"),
    [
        ({"workspace": "/elsewhere", "overlap": "never", "retry.limit": 0}, True),
        ({"seed": 0}, True),
        ({"seed": 1}, False),
        ({"engine.dtype": "float32"}, False),
    ],
    ids=["the-conductors-own", "said-again", "seed", "engine"],
)
def test_a_job_is_known_again_by_what_it_is_to_do(
    config: Config, stages: Path, options: dict[str, Any], is_known_again: bool
) -> None:
    later = load_config(None, {"model": "demo", "recipe": "int8", "dry_run": True, **options})
    task = quantizing(stages)
    assert (on_node(task, config) == on_node(task, later)) is is_known_again


def test_a_task_holds_the_variables_that_differ_and_no_other(stages: Path) -> None:
    task = quantizing(stages, API_TOKEN="x")
    assert task["set"] == {"HF_HUB_OFFLINE": "1"}
    assert task["unset"] == ["API_TOKEN", "HTTPS_PROXY"]


def test_a_worker_runs_and_is_not_run_again(config: Config, stages: Path) -> None:
    events: list[str] = []
    done_here(quantizing(stages), config, events)
    assert json.loads((stages / "ptq" / "result.json").read_text())["status"] == "ok"
    assert (stages.parent / "checkpoint" / "model.safetensors").exists()
    done_here(quantizing(stages), config, events)
    assert events.count("tool_started") == 1


def test_the_canary_answers_in_its_own_job(config: Config, stages: Path) -> None:
    prompts = load_suite("demo").canary_prompts
    task = canary_task(opened(config, stages), prompts, stages / "deploy", None)
    events: list[str] = []
    answer = done_here(task, config, events)
    assert len(answer["prompts"]) == len(prompts)
    assert events == ["server_started"] * 2 + ["server_stopped"] * 2


def inquire(config: Config, stages: Path) -> Inquiry:
    suite, model = load_suite("demo"), resolve_model("demo")
    return Inquiry(
        side="source",
        suite=suite,
        settings=harness_settings(config, suite, model),
        directory=stages / "baseline_eval",
        request_cache=stages / "baseline_eval" / "requests" / "all",
    )


def test_an_evaluation_is_known_again_after_both_sides_did_not_fit(
    config: Config, stages: Path
) -> None:
    """The source may be evaluated beside the stage that finds out."""
    inquiry, engine = inquire(config, stages), opened(config, stages)
    narrow = replace(engine, one_at_a_time=True)
    assert evaluation_task(narrow, inquiry) == evaluation_task(engine, inquiry)
    assert canary_task(narrow, [], stages, None) != canary_task(engine, [], stages, None)


def test_server_and_harness_are_in_one_job(config: Config, stages: Path) -> None:
    inquiry = inquire(config, stages)
    task = evaluation_task(opened(config, stages), inquiry)
    events: list[str] = []
    done_here(task, config, events)
    assert inquiry.is_answered(), "the conductor finds what it asked"
    assert events == ["server_started", "tool_started", "tool_finished", "server_stopped"]
    done_here(task, config, events)
    assert len(events) == 4


def test_a_node_that_is_not_what_the_cluster_is_said_to_have_is_refused(
    config: Config, stages: Path
) -> None:
    task = on_node(quantizing(stages), config) | {"device": "cuda"}
    with pytest.raises(Failure, match="is said to have cuda") as caught:
        Node.find(task, {}, lambda *_, **__: None, lambda *_: None)
    assert caught.value.failure_class is FailureClass.SYSTEMIC


def test_a_dry_run_for_a_cluster_with_gpus_is_one_of_what_was_recorded(
    config: Config, stages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errands: list[Errand] = []

    def carry_out_here(errand: Errand, connection: Connection) -> dict[str, Any]:
        errands.append(errand)
        node = Node.find(errand.task, {}, lambda *_, **__: None, lambda *_: None)
        return {"status": "ok", "answer": carry_out(errand.task, node)}

    monkeypatch.setattr(tools, "carry_out", carry_out_here)
    cluster = replace(CLUSTER, device=Device.CUDA)
    connection = Connection(cluster=cluster, slurm=None, queue=None, environ={})  # type: ignore[arg-type]
    world = replace(tools_here(config, {})[0], cluster=cluster)
    prompts = load_suite("demo").canary_prompts
    session = SlurmTools(world, lambda *_, **__: None, config, connection).open_session(
        Engine.VLLM, opened(config, stages).sides, config, load_suite("demo").max_length
    )
    evidence = session.answer_canary(prompts, stages / "deploy", lambda *_: None)
    assert len(evidence["prompts"]) == len(prompts)
    assert errands[0].resources == cluster.resources[Stage.DEPLOY]


class TestJob:
    """The job as Slurm starts it, less Slurm."""

    def start(self, folder: JobFolder, job_id: str = "7") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "conductor.cluster.job", str(folder.path)],
            env={**os.environ, "SLURM_JOB_ID": job_id, "SLURMD_NODENAME": "n1"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def intend(self, task: dict[str, Any], config: Config, stages: Path) -> JobFolder:
        place = Place.of(stages / "ptq")
        return JobFolder.intend(place, on_node(task, config), {}, at=0.0)

    def test_leaves_an_outcome_with_what_it_noted(self, config: Config, stages: Path) -> None:
        folder = self.intend(quantizing(stages), config, stages)
        assert self.start(folder).returncode == 0
        outcome = folder.read("outcome") or {}
        assert (outcome["status"], outcome["answer"]) == ("ok", None)
        assert [each["event"] for each in outcome["notes"]] == ["tool_started", "tool_finished"]
        assert {each["facts"]["directory"] for each in outcome["notes"]} == {"stages/ptq"}
        assert (folder.read("claim") or {})["node"] == "n1"
        assert (folder.read("node") or {})["dry_run"] is True

    def test_leaves_a_failure_in_words(self, config: Config, stages: Path) -> None:
        task = quantizing(stages)
        task["request"]["seed"] = 99
        folder = self.intend(task, config, stages)
        self.start(folder)
        outcome = folder.read("outcome") or {}
        assert (outcome["status"], outcome["failure_class"]) == ("failed", "USER_CONFIG_ERROR")
        assert "seed" in outcome["message"]

    def test_does_nothing_where_another_job_works(self, config: Config, stages: Path) -> None:
        folder = self.intend(quantizing(stages), config, stages)
        folder.claim("6", "n1", 0.0)
        assert self.start(folder).returncode == 0
        assert folder.read("outcome") is None

    def test_says_a_defect_of_ours_by_where_it_is(self, config: Config, stages: Path) -> None:
        folder = self.intend(quantizing(stages) | {"task": "dance"}, config, stages)
        self.start(folder)
        outcome = folder.read("outcome") or {}
        assert outcome["failure_class"] == "UNKNOWN"
        assert "KeyError: 'dance'" in outcome["message"]
