"""A dry run answers from its record: the files and events of the real tools, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conductor.compatibility import Engine
from conductor.config import load_config
from conductor.demo.export import restore, shrink
from conductor.engines import Sides
from conductor.environments.builder import Status
from conductor.executors.local import Worker
from conductor.failure import Failure
from conductor.models import DEMO_PATH
from conductor.recorded_tools import (
    ARCHIVE,
    DOCUMENT,
    RECORDED,
    Record,
    RecordedTools,
    find_record,
    recorded_world,
)
from conductor.suites import load_suite
from gates import FailureClass

INT8 = RECORDED / "int8"
LARGEST_BYTES = 1_500_000
NOWHERE = Path("/nowhere/python")

Events = list[dict[str, Any]]


@pytest.fixture
def events() -> Events:
    return []


@pytest.fixture
def tools(events: Events) -> RecordedTools:
    return RecordedTools(INT8, lambda event, **facts: events.append({"event": event, **facts}))


def config(**options: Any) -> Any:
    return load_config(None, {"model": "demo", "recipe": "int8", **options})


def quantize_request(output: Path, **changes: Any) -> dict[str, Any]:
    return {**Record(INT8).document["quantize"]["request"], "output_dir": str(output), **changes}


def evaluate_request(side: str, output: Path, **changes: Any) -> dict[str, Any]:
    recorded = Record(INT8).document["sides"][side]["request"]
    return {**recorded, "output_dir": str(output), **changes}


def run(tools: RecordedTools, script: str, directory: Path, request: dict[str, Any]) -> Any:
    return tools.run_worker(
        Worker(script=script, interpreter=NOWHERE),
        directory,
        request,
        environ={},
        progress=lambda done, total, doing: None,
    )


def test_the_record_is_small_and_holds_no_path_of_the_machine_that_made_it() -> None:
    assert sum((INT8 / name).stat().st_size for name in (DOCUMENT, ARCHIVE)) < LARGEST_BYTES
    text = (INT8 / DOCUMENT).read_text(encoding="utf-8")
    everything = [text.encode(), *Record(INT8).files.values()]
    for private in (b"/root", b"/home/", b"/tmp/", b"/work/"):
        assert not [data for data in everything if private in data], private


def test_the_record_fits_the_demo_suite_and_model_of_this_package() -> None:
    request = Record(INT8).document["sides"]["source"]["request"]
    suite = load_suite("demo")
    assert request["sizes"] == {task.name: task.samples for task in suite.tasks.values()}
    assert Path(request["tokenizer"]) == DEMO_PATH
    prompts = [each["prompt"] for each in Record(INT8).document["canary"]["prompts"]]
    assert prompts == list(suite.canary_prompts)


def test_the_quantizer_leaves_a_checkpoint_and_the_events_of_a_run(
    tools: RecordedTools, events: Events, tmp_path: Path
) -> None:
    stage_dir, checkpoint = tmp_path / "ptq", tmp_path / "checkpoint"
    (stage_dir / "result.json").parent.mkdir()
    (stage_dir / "result.json").write_text("stale")
    request = quantize_request(checkpoint)
    result = run(tools, "quantize_llmcompressor.py", stage_dir, request)
    assert (result["status"], result["checkpoint"]) == ("ok", str(checkpoint))
    assert json.loads((stage_dir / "result.json").read_text()) == result
    assert json.loads((stage_dir / "request.json").read_text()) == request
    assert {path.name for path in stage_dir.iterdir()} == {
        *("request.json", "progress.json", "stdout.log", "result.json")
    }
    assert (checkpoint / "model.safetensors").stat().st_size > 1_000_000
    assert [(each["event"], each["directory"]) for each in events] == [
        ("tool_started", stage_dir),
        ("tool_finished", stage_dir),
    ]
    assert events[-1]["status"] == "ok"


def test_the_restored_weights_are_the_recorded_ones_and_others_are_not_shrunk(
    tools: RecordedTools, tmp_path: Path
) -> None:
    run(tools, "quantize_llmcompressor.py", tmp_path, quantize_request(tmp_path / "out"))
    export = (tmp_path / "out" / "model.safetensors").read_bytes()
    source = (DEMO_PATH / "model.safetensors").read_bytes()
    assert restore(shrink(export, source), source) == export
    with pytest.raises(ValueError, match="rounded to 8 bits"):
        shrink(export[:-1] + bytes([export[-1] ^ 1]), source)


def test_an_evaluation_leaves_every_answer_and_the_requests_in_the_servers_log(
    tools: RecordedTools, events: Events, tmp_path: Path
) -> None:
    session = open_session(tools)
    session.answer_canary(
        load_suite("demo").canary_prompts, tmp_path / "deploy", lambda done, total, doing: None
    )
    log = session.log("source")
    assert log is not None
    before = log.read_bytes().count(b'"POST ')
    run(tools, "evaluate.py", tmp_path / "eval", evaluate_request("source", tmp_path / "results"))
    assert len(list((tmp_path / "results").rglob("samples_*.jsonl"))) == 6
    assert log.read_bytes().count(b'"POST ') - before > 1000
    session.close()
    assert [each["event"] for each in events] == [
        *("server_started", "server_started", "tool_started", "tool_finished"),
        *("server_stopped", "server_stopped"),
    ]


def open_session(tools: RecordedTools, **options: Any) -> Any:
    sides = Sides(source=DEMO_PATH, candidate=Path("candidate"))
    return tools.open_session(Engine.VLLM, sides, config(**options), 255)


def test_a_server_that_is_started_again_has_another_log(
    tools: RecordedTools, tmp_path: Path
) -> None:
    session = open_session(tools)
    logs = []
    for _ in range(2):
        session.backend("source", tmp_path, lambda done, total, doing: None)
        logs.append(session.log("source").name)
        session.discard("source")
    assert logs == ["server-source.log", "server-source-2.log"]


def test_known_answers_of_the_source_spare_its_server(tools: RecordedTools, tmp_path: Path) -> None:
    session, prompts = open_session(tools), load_suite("demo").canary_prompts
    known = [{"text": "known"} for _ in prompts]
    evidence = session.answer_canary(prompts, tmp_path, lambda *_: None, known)
    assert [each["source"] for each in evidence["prompts"]] == known
    assert session.log("source") is None


@pytest.mark.parametrize(
    ("script", "changes", "words"),
    [
        pytest.param("quantize_modelopt.py", {}, "quantize_modelopt.py was not run", id="tool"),
        pytest.param("quantize_llmcompressor.py", {"scheme": "FP8"}, "scheme FP8", id="recipe"),
        pytest.param("quantize_llmcompressor.py", {"seed": 1}, "seed 1 in place of 0", id="seed"),
        pytest.param("quantize_llmcompressor.py", {"model_path": "/m"}, "model_path", id="model"),
        pytest.param("evaluate.py", {"limit": 10}, "limit 10 in place of None", id="limit"),
        pytest.param("evaluate.py", {"tasks": {"mmlu": 5}}, "tasks", id="suite"),
        pytest.param("evaluate.py", {"repeat": 1}, "repeat 1", id="noise-floor"),
        pytest.param("evaluate.py", {"served_name": "x"}, "evaluate.py was not run", id="side"),
        pytest.param("evaluate.py", {"new": 1}, "new 1 in place of None", id="unknown-setting"),
    ],
)
def test_what_was_not_recorded_is_refused_before_anything_is_noted(
    tools: RecordedTools,
    events: Events,
    tmp_path: Path,
    script: str,
    changes: dict[str, Any],
    words: str,
) -> None:
    request = quantize_request(tmp_path / "out", **changes)
    if script == "evaluate.py":
        request = evaluate_request("source", tmp_path / "out", **changes)
    with pytest.raises(Failure, match="`day0 release demo --recipe int8` alone") as refused:
        run(tools, script, tmp_path, request)
    assert words in refused.value.message
    assert refused.value.failure_class is FailureClass.USER_CONFIG_ERROR
    assert not events
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        pytest.param(Engine.TRANSFORMERS, {}, "engine transformers", id="engine"),
        pytest.param(Engine.VLLM, {"engine.dtype": "float16"}, "dtype float16", id="dtype"),
        pytest.param(Engine.VLLM, {"engine.max_model_len": 64}, "max_model_len 64", id="length"),
    ],
)
def test_other_engine_settings_are_refused(
    tools: RecordedTools, engine: Engine, options: dict[str, Any], words: str
) -> None:
    sides = Sides(source=DEMO_PATH, candidate=Path("candidate"))
    with pytest.raises(Failure, match=words):
        tools.open_session(engine, sides, config(**options), 255)


def test_other_prompts_are_refused(tools: RecordedTools, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="other prompts"):
        open_session(tools).answer_canary(["Hello"], tmp_path, lambda *_: None)


def test_a_record_is_found_by_model_and_recipe() -> None:
    assert find_record(config()) == INT8
    with pytest.raises(Failure, match="recipe w4a16; a dry run can be made of `day0 release demo"):
        find_record(config(recipe="w4a16"))


def test_the_world_of_a_record_needs_no_environment(tmp_path: Path) -> None:
    world = recorded_world(INT8, {"DAY0_ENVIRONMENTS": str(tmp_path / "none")})
    for name in ("quantize", "serve-cpu", "evaluate"):
        assert world.environments.status(name) is Status.READY
        assert world.environments.versions(name)
        assert len(world.environments.digest(name)) == 64
    assert world.environments.status("reference") is Status.ABSENT
    assert world.machine.device == "cpu"
    assert not (tmp_path / "none").exists()
