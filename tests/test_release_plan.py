"""What a release would do: its stages and why, sizes, questions, commands, and nothing written."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from job_folders import cluster, resources
from rich.console import Console

from conductor.baseline_cache import BaselineCache, Difference, Row, baseline_key
from conductor.chain import STAGES, Stage, State, Steps
from conductor.compatibility import Device
from conductor.config import Config, load_config
from conductor.digests import Digests
from conductor.documents import validate
from conductor.engines.opening import planned_settings
from conductor.environments.builder import Environments
from conductor.history import History, StageRecord
from conductor.inputs import Change
from conductor.models import DEMO_PATH, look_up_model
from conductor.probes.machine import Machine
from conductor.release_plan import Past, look_into_cache, plan_document, plan_report
from conductor.release_state import Plan
from conductor.rounds import EVERYTHING
from conductor.stages import choose_tools, find_source
from conductor.world import World

MACHINE = Machine(
    device=Device.CPU,
    accelerators=(),
    processor="any",
    cores=2,
    memory_bytes=2**35,
    memory_available_bytes=2**35,
    system="Linux",
)


def resolved(workspace: Path, **options: Any) -> tuple[Config, Plan, World]:
    given = {"model": "demo", "recipe": "int8", "workspace": str(workspace)}
    config = load_config(None, given | {name.replace("__", "."): v for name, v in options.items()})
    variables = {"DAY0_ENVIRONMENTS": "/environments", "PATH": "/bin"}
    world = World(
        environments=Environments(device=Device.CPU, variables=variables),
        environ=variables,
        machine=MACHINE,
    )
    return config, find_source(choose_tools(config, world), config, revision=None), world


def planned(
    workspace: Path, *, options: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Plan a release of the demo after checking its shape, and that nothing was written."""
    config, plan, world = resolved(workspace, **(options or {}))
    document = plan_document(config, plan, world, config.workspace / "runs" / "run-1", **more)
    validate(json.loads(json.dumps(document)), schema="release_plan", where="plan")
    assert not workspace.exists()
    return document


def actions(document: Mapping[str, Any]) -> dict[str, str]:
    return {step["stage"]: step["action"] for step in document["stages"]}


def reason(document: Mapping[str, Any], stage: Stage) -> str:
    return str(next(step["reason"] for step in document["stages"] if step["stage"] == stage))


def shown(document: Mapping[str, Any]) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(plan_report(document))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def history(**states: State) -> History:
    """Return a history in which the stages before those named are done."""
    found = History(run_id="run-1", started_at=datetime(2026, 3, 14, tzinfo=UTC))
    named = [STAGES.index(Stage(name)) for name in states]
    for number, stage in enumerate(STAGES):
        state = State.DONE if named and number < min(named) else State.PENDING
        state = states.get(stage, state)
        outputs = {"a": {"sha256": "0", "bytes": 1}} if state is State.DONE else None
        record = StageRecord(state=state, attempts=int(state is not State.PENDING), outputs=outputs)
        if state is State.FAILED:
            record.failure_class = "INFRA_TRANSIENT"
        found.stages[stage] = record
    return found


def changed(field: str, *invalidates: Stage) -> Change:
    return Change(field=field, was="a", now="b", invalidates=invalidates)


def remembered(*fields: str, damage: tuple[str, ...] = ()) -> Row:
    differences = tuple(Difference(field=field, theirs=1, ours=2) for field in fields)
    return Row(
        run_id="demo-int8-earlier", created="2026-03-14", differences=differences, damage=damage
    )


class TestNewRelease:
    def test_runs_every_stage(self, tmp_path: Path) -> None:
        document = planned(tmp_path / "none")
        assert set(actions(document).values()) == {"run"}
        directories = [Path(step["directory"]) for step in document["stages"]]
        run_dir = tmp_path / "none" / "runs" / "run-1"
        assert directories == [run_dir / "stages" / stage for stage in STAGES]

    def test_sizes_are_those_that_the_gate_will_expect(self, tmp_path: Path) -> None:
        sizes = planned(tmp_path / "none")["sizes"]
        weights = (DEMO_PATH / "model.safetensors").stat().st_size
        assert sizes["source_bytes"] == weights
        low, high = sizes["checkpoint_bytes"]
        assert weights / 2 < low < high < 0.6 * weights
        assert sizes["basis"] == "the source's headers"
        assert sizes["needed_bytes"] > 2 * weights
        assert sizes["free_bytes"] > 0
        assert sizes["download_bytes"] == 0

    def test_model_that_is_not_on_disk_is_described_by_size(self, tmp_path: Path) -> None:
        config, plan, world = resolved(tmp_path / "none")
        facts = {**vars(plan.model), "path": tmp_path / "hub", "weights_bytes": 16_000_000_000}
        plan = Plan(**{**vars(plan), "model": type(plan.model)(**facts)})
        document = plan_document(config, plan, world, tmp_path / "none" / "runs" / "run-1")
        validate(json.loads(json.dumps(document)), schema="release_plan", where="plan")
        assert document["model"]["on_disk"] is False
        assert document["sizes"]["download_bytes"] == 16_000_000_000
        assert document["sizes"]["checkpoint_bytes"][0] == 8_000_000_000
        assert "bits a weight" in document["sizes"]["basis"]
        assert "Download: 16 GB" in shown(document)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("options", "total"),
        [
            pytest.param({}, [12_000, 12_000], id="all"),
            pytest.param({"limit": 10}, [120, 120], id="limit"),
            pytest.param({"until_decided": True}, [2400, 12_000], id="until-decided"),
            pytest.param(
                {"until_decided": True, "max_samples": 500}, [2400, 6000], id="max-samples"
            ),
        ],
    )
    def test_questions(self, options: dict[str, Any], total: list[int], tmp_path: Path) -> None:
        questions = planned(tmp_path / "none", options=options)["questions"]
        assert questions["sides"] == ["source", "candidate"]
        assert questions["total"] == total

    def test_questions_of_a_size_that_nobody_states_are_not_guessed(self, tmp_path: Path) -> None:
        suite = tmp_path / "suite.yaml"
        suite.write_text(
            "name: s\ntasks:\n  t: {metric: acc, kind: multiple_choice}\n", encoding="utf-8"
        )
        document = planned(tmp_path / "none", options={"suite": str(suite)})
        assert document["questions"]["total"] is None
        assert "not known for t" in shown(document)

    def test_commands_are_those_that_would_be_started(self, tmp_path: Path) -> None:
        document = planned(tmp_path / "none")
        run_dir = tmp_path / "none" / "runs" / "run-1"
        found = [
            (each["stage"], Path(each["command"][0]).parts[2], each["command"])
            for each in document["commands"]
        ]
        assert [(stage, environment) for stage, environment, _ in found] == [
            ("ptq", "quantize"),
            ("deploy", "serve-cpu"),
            ("deploy", "serve-cpu"),
            ("baseline_eval", "evaluate"),
            ("candidate_eval", "evaluate"),
        ]
        quantize, candidate, source, baseline, _ = (command for *_, command in found)
        assert quantize[1].endswith("quantize_llmcompressor.py")
        assert quantize[2] == str(run_dir / "stages" / "ptq")
        assert candidate[candidate.index("--model") + 1] == str(run_dir / "checkpoint")
        assert source[source.index("--model") + 1] == str(DEMO_PATH)
        assert source[source.index("--max-model-len") + 1] == "256"
        assert baseline[2] == str(run_dir / "stages" / "baseline_eval")
        serving = document["commands"][1]["environ"]
        assert serving["VLLM_CPU_KVCACHE_SPACE"] == "1"
        assert "DAY0_ENVIRONMENTS" not in serving, "what is as it was is not repeated"
        request = document["commands"][0]["request"]
        assert (request["scheme"], request["output_dir"]) == ("W8A8", str(run_dir / "checkpoint"))
        assert document["commands"][3]["request"]["sizes"]["demo_facts"] == 1000
        assert "--max-model-len 256" in " ".join(shown(document).split())

    def test_commands_of_the_engine_without_a_server(self, tmp_path: Path) -> None:
        document = planned(tmp_path / "none", options={"recipe": "nvfp4"})
        assert document["engine"]["name"] == "transformers"
        scripts = [Path(each["command"][1]).name for each in document["commands"]]
        assert scripts[1:] == ["answer_prompts.py", "evaluate.py", "evaluate.py"]

    def test_fixed_port_is_shown(self, tmp_path: Path) -> None:
        document = planned(tmp_path / "none", options={"engine__port": 18123})
        command = document["commands"][1]["command"]
        assert command[command.index("--port") + 1] == "18123"

    def test_remembered_source_is_not_asked(self, tmp_path: Path) -> None:
        document = planned(tmp_path / "none", baseline=[remembered()])
        assert actions(document)["baseline_eval"] == "remembered"
        assert "demo-int8-earlier" in reason(document, Stage.BASELINE_EVAL)
        assert document["questions"]["sides"] == ["candidate"]
        assert "baseline_eval" not in {each["stage"] for each in document["commands"]}

    @pytest.mark.parametrize(
        ("rows", "why"),
        [
            pytest.param([], "remembers no answers", id="empty-cache"),
            pytest.param(
                [remembered("request.seed", "device")], "differs: request.seed, device", id="other"
            ),
            pytest.param(
                [remembered(damage=("x.jsonl: other content",))],
                "is damaged: x.jsonl: other content",
                id="damaged",
            ),
        ],
    )
    def test_miss_says_why(self, rows: list[Row], why: str, tmp_path: Path) -> None:
        document = planned(tmp_path / "none", baseline=rows)
        assert actions(document)["baseline_eval"] == "run"
        assert why in reason(document, Stage.BASELINE_EVAL)

    @pytest.mark.parametrize(
        ("options", "recipe", "found"),
        [
            pytest.param({}, "int8", ["hit"], id="same"),
            pytest.param({}, "fp8", ["hit"], id="second-recipe"),
            pytest.param({"seed": 1}, "int8", ["request.seed"], id="another-seed"),
            pytest.param({"fresh_baseline": True}, "int8", None, id="fresh-baseline"),
        ],
    )
    def test_cache_is_asked_for_what_a_release_would_ask(
        self, options: dict[str, Any], recipe: str, found: list[str] | None, tmp_path: Path
    ) -> None:
        config, plan, world = resolved(tmp_path)
        settings = planned_settings(config, plan.row.engine, Device.CPU, 255, nodes=1)
        key = baseline_key(config, plan, world, settings, EVERYTHING, Digests(None))
        answers = tmp_path / "answers"
        (answers / "results").mkdir(parents=True)
        for name in ("request.json", "engine.json", "result.json", "evaluation.json"):
            (answers / name).write_text("{}", encoding="utf-8")
        cache = BaselineCache(tmp_path / "cache" / "baseline")
        assert cache.keep(key, answers, run_id="earlier", created="2026-03-14"), cache.notes
        before = sorted(tmp_path.rglob("*"))
        rows = look_into_cache(*resolved(tmp_path, recipe=recipe, **options), Digests(None))
        assert sorted(tmp_path.rglob("*")) == before
        fields = rows and [each.field for row in rows for each in row.differences]
        assert fields == ([] if found == ["hit"] else found) or found[0] in (fields or [])

    def test_stages_after_the_last_step_are_left(self, tmp_path: Path) -> None:
        document = planned(tmp_path / "none", steps=Steps(last=Stage.PTQ))
        found = list(actions(document).values())
        assert found == ["run", "run", "leave", "leave", "leave", "leave", "leave"]
        assert "up to ptq" in reason(document, Stage.DEPLOY)
        assert document["questions"]["sides"] == []


RUN, KEEP, CONTINUE = "run", "keep", "continue"


@pytest.mark.parametrize(
    ("past", "steps", "found"),
    [
        pytest.param(
            Past(history=history(baseline_eval=State.RUNNING)),
            Steps(),
            [KEEP, KEEP, KEEP, CONTINUE, RUN, RUN, RUN],
            id="cut-off",
        ),
        pytest.param(
            Past(history=history(ptq=State.FAILED)),
            Steps(),
            [KEEP, RUN, RUN, RUN, RUN, RUN, RUN],
            id="failed",
        ),
        pytest.param(
            Past(history=history(), changes=[]), Steps(), [RUN] * 7, id="nothing-done"
        ),
        pytest.param(
            Past(
                history=history(compare=State.PENDING),
                changes=[changed("recipe.digest", *STAGES[1:]), changed("config.discordance")],
            ),
            Steps(),
            [RUN, RUN, RUN, RUN, RUN, RUN, RUN],
            id="drift",
        ),
        pytest.param(
            Past(
                history=history(compare=State.PENDING), changes=[changed("config.discordance")]
            ),
            Steps(),
            [RUN, KEEP, KEEP, KEEP, KEEP, RUN, RUN],
            id="drift-without-effect",
        ),
        pytest.param(
            Past(
                history=history(closeout=State.DONE),
                damaged={Stage.CANDIDATE_EVAL: ["result.json is missing"]},
            ),
            Steps(),
            [KEEP, KEEP, KEEP, KEEP, RUN, RUN, RUN],
            id="damaged",
        ),
        pytest.param(
            Past(history=history(closeout=State.DONE)), Steps(), [KEEP] * 7, id="finished"
        ),
        pytest.param(
            Past(history=history(closeout=State.DONE)),
            Steps(first=Stage.COMPARE),
            [KEEP, KEEP, KEEP, KEEP, KEEP, RUN, RUN],
            id="from-step",
        ),
    ],
)  # fmt: skip
def test_resumed_release(past: Past, steps: Steps, found: list[str], tmp_path: Path) -> None:
    document = planned(tmp_path / "none", past=past, steps=steps)
    assert list(actions(document).values()) == found
    started = {each["stage"] for each in document["commands"]}
    kept = {stage for stage, action in actions(document).items() if action == KEEP}
    assert not started & kept


def test_decision_that_stands_is_kept(tmp_path: Path) -> None:
    ended = history(baseline_eval=State.FAILED, closeout=State.DONE)
    for stage in (Stage.CANDIDATE_EVAL, Stage.COMPARE):
        ended.stages[stage] = StageRecord()
    ended.outcome = {"decision": "ANOMALOUS", "exit_code": 3}
    document = planned(tmp_path / "none", past=Past(history=ended))
    assert list(actions(document).values()) == [KEEP] * 4 + ["leave"] * 2 + [KEEP]
    assert reason(document, Stage.BASELINE_EVAL) == "failed, which is why the decision is ANOMALOUS"
    assert document["commands"] == []
    assert "Questions: none" in shown(document)


class Hub(BaseHTTPRequestHandler):
    """A Hub that knows one model, without any file of it to be had."""

    def do_GET(self) -> None:
        files = {"config.json": 900, "model.safetensors": 3_000_000, "pytorch_model.bin": 5}
        body = json.dumps(
            {
                "id": "org/name",
                "sha": "5" * 40,
                "config": {"architectures": ["LlamaForCausalLM"]},
                "siblings": [{"rfilename": name, "size": size} for name, size in files.items()],
            }
        ).encode()
        self.send_response(200 if self.path.startswith("/api/models/org/name") else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the cache of the client of a Hub on loopback."""
    from huggingface_hub import constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield tmp_path / "hub"
        server.shutdown()


def test_model_on_the_hub_is_looked_up_and_not_downloaded(hub: Path) -> None:
    model = look_up_model("org/name")
    assert model.path == hub / "models--org--name" / "snapshots" / ("5" * 40)
    assert (model.weights_bytes, model.architecture) == (3_000_000, "LlamaForCausalLM")
    assert (model.revision, model.quantized) == ("5" * 40, None)
    assert not hub.exists()


def test_model_on_this_disk_needs_no_hub(hub: Path) -> None:
    assert look_up_model(str(DEMO_PATH)).path == DEMO_PATH
    assert look_up_model("demo").path == DEMO_PATH


def test_reasons_of_a_resumed_release_name_what_changed(tmp_path: Path) -> None:
    past = Past(
        history=history(compare=State.PENDING),
        changes=[changed("recipe.digest", *STAGES[1:]), changed("config.threshold", *STAGES[5:])],
        damaged={Stage.DEPLOY: ["canary.json is missing"]},
    )
    document = planned(tmp_path / "none", past=past)
    assert reason(document, Stage.PTQ) == "recipe.digest changed"
    assert reason(document, Stage.DEPLOY) == "recipe.digest changed"
    assert document["changes"][0]["invalidates"] == list(STAGES[1:])
    assert "changed: recipe.digest was 'a', is 'b'" in shown(document)


def test_attempts_get_directories_of_their_own(tmp_path: Path) -> None:
    document = planned(tmp_path / "none", past=Past(history=history(ptq=State.FAILED)))
    ptq = next(step for step in document["stages"] if step["stage"] == "ptq")
    assert ptq["directory"].endswith("stages/ptq/attempt-2")
    assert document["commands"][0]["command"][2] == ptq["directory"]


def test_cut_off_attempt_keeps_its_directory(tmp_path: Path) -> None:
    document = planned(tmp_path / "none", past=Past(history=history(ptq=State.RUNNING)))
    assert document["stages"][1]["directory"].endswith("stages/ptq")


def test_failure_is_named(tmp_path: Path) -> None:
    document = planned(tmp_path / "none", past=Past(history=history(deploy=State.FAILED)))
    assert "INFRA_TRANSIENT" in reason(document, Stage.DEPLOY)
    assert "deploy runs" in reason(document, Stage.COMPARE)


class TestOnACluster:
    def test_each_stage_says_what_its_jobs_ask_for(self, tmp_path: Path) -> None:
        workspace = tmp_path / "workspace"
        config, plan, here = resolved(workspace)
        hall = cluster(Path("/shared"), asked=resources(gpus=4, extra={"nice": 5}))
        hall = replace(hall, resources={**hall.resources, Stage.PTQ: resources(setup=("a", "b"))})
        document = plan_document(
            config, plan, replace(here, cluster=hall), config.workspace / "runs" / "run-1"
        )
        validate(json.loads(json.dumps(document)), schema="release_plan", where="plan")
        assert document["cluster"] == {"name": "hall", "file": "/shared/clusters.yaml"}
        asked = {step["stage"]: step["resources"] for step in document["stages"]}
        assert [stage for stage, each in asked.items() if each is None] == [
            "setup", "compare", "closeout",
        ]  # fmt: skip
        assert (asked["ptq"]["gpus"], asked["candidate_eval"]["gpus"]) == (1, 4)
        text = shown(document)
        assert "Jobs of cluster hall (/shared/clusters.yaml):" in text
        assert "  ptq: partition gpu; nodes 1; gpus 1; cpus 8; time_minutes 60; setup a, b" in text
        assert "gpus 4; cpus 8; time_minutes 60; extra nice=5" in text
        assert "Commands, in this order, on nodes of cluster hall" in text

    def test_nothing_is_asked_for_what_is_kept(self, tmp_path: Path) -> None:
        config, plan, here = resolved(tmp_path / "workspace")
        past = Past(history=history(deploy=State.PENDING))
        document = plan_document(
            config, plan, replace(here, cluster=cluster()), tmp_path / "runs" / "run-1", past=past
        )
        asked = {step["stage"]: step["resources"] for step in document["stages"]}
        assert asked["ptq"] is None and asked["deploy"] is not None

    def test_here_there_is_none(self, tmp_path: Path) -> None:
        document = planned(tmp_path / "workspace")
        assert document["cluster"] is None
        assert {each["resources"] is None for each in document["stages"]} == {True}
        assert "cluster" not in shown(document)
