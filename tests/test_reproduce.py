"""What repeats the step that ended a release: it runs, elsewhere, and fails in the same way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from job_folders import cluster, job_folder, name_of

from conductor.chain import Stage, State
from conductor.compatibility import TABLE, Engine, Row
from conductor.config import load_config
from conductor.digests import Digests
from conductor.environments.builder import STAMP, Environments
from conductor.evidence import reproduce
from conductor.evidence.failing_step import Kind, find_failing_step
from conductor.evidence.reproduce import write_reproduction
from conductor.failure import Failure
from conductor.files import write_json
from conductor.journal import Journal
from conductor.models import resolve_model
from conductor.probes.machine import probe_machine
from conductor.release_state import Plan, Release
from conductor.stages import quantize
from conductor.suites import load_suite
from conductor.tools import LocalTools
from conductor.world import World
from gates import RECIPES, FailureClass

VLLM = next(row for row in TABLE if row.engine is Engine.VLLM and row.device == "cpu")
TRANSFORMERS = next(row for row in TABLE if row.engine is Engine.TRANSFORMERS)
HOSTILE = "it's a $(touch hacked) `model` \"}"
"""A name that no shell may read as more than a name."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    place = tmp_path / "source of it" / HOSTILE
    shutil.copytree(resolve_model("demo").path, place)
    return place


@pytest.fixture
def environments(tmp_path: Path) -> Environments:
    """Environments of which each is this interpreter, stamped as built."""
    built = Environments(tmp_path / "environments", variables={})
    for name in ("quantize", "serve-cpu", "evaluate", "reference"):
        python = built.interpreter(name)
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
        (built.root / name / STAMP).write_text(json.dumps({"digest": built.digest(name)}, indent=2))
    return built


Make = Callable[..., Release]


@pytest.fixture
def make(tmp_path: Path, model: Path, environments: Environments) -> Make:
    """Make a release of ``model`` whose stages before ``stage`` are done, and which works on it."""

    def make_release(
        stage: Stage = Stage.PTQ,
        *,
        row: Row = VLLM,
        resolved: bool = True,
        calibration: Path | None = None,
        environ: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Release:
        given = {"model": str(model), "recipe": "int8", "suite": "demo", **options}
        given["calibration.data"] = calibration and str(calibration)
        config = load_config(None, given)
        journal = Journal.create(
            tmp_path / "runs" / "run", clock=lambda: datetime.now(UTC), model="m", recipe="int8"
        )
        world = World(
            environments=environments, environ=environ or {}, machine=cpu(probe_machine())
        )
        release = Release(
            config=config,
            journal=journal,
            world=world,
            tools=LocalTools(world, journal.record),
            digests=Digests(None),
        )
        if resolved:
            wanted = {"path": calibration and str(calibration), "dataset": None}
            release.resolved = Plan(
                model=resolve_model(str(model)),
                recipe=RECIPES["int8"],
                suite=load_suite("demo"),
                row=row,
                quantize_request={"scheme": "W8A8", "calibration": wanted},
            )
        for each in Stage:
            journal.start(each)
            journal.attempt_dir(each)
            if each is stage:
                return release
            journal.finish(each, State.DONE, outputs={}, detail="done")
        raise AssertionError(stage)

    return make_release


def cpu(machine: Any) -> Any:
    return replace(machine, device="cpu", accelerators=())


def fail(release: Release, stage: Stage, message: str = "no", gate: str | None = None) -> None:
    release.journal.finish(
        stage, State.FAILED, detail=message, failure_class=FailureClass.SYSTEMIC, gate=gate
    )


def moved(release: Release, tmp_path: Path) -> Path:
    """Return a copy of the run alone, with everything else that the release had out of reach."""
    elsewhere = tmp_path / "else where" / "run"
    elsewhere.parent.mkdir()
    shutil.move(release.journal.run_dir, elsewhere)
    shutil.move(tmp_path / "source of it", tmp_path / "gone")
    return elsewhere


def repeat(run_dir: Path, environments: Environments, **variables: str) -> Any:
    """Run the script in a directory of its own; the run must stay as it was."""
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    script = run_dir / "reproduce.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    done = subprocess.run(
        ["bash", script, run_dir.parent / "work"],
        env={"PATH": os.environ["PATH"], "DAY0_ENVIRONMENTS": str(environments.root), **variables},
        cwd=run_dir.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert not list(run_dir.parent.rglob("hacked"))
    return done


@pytest.fixture
def fake_quantizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have a quantizer of this body in the place of the real one."""
    from conductor.executors import local

    workers = tmp_path / "workers"
    workers.mkdir()
    shutil.copy(local.WORKERS / "protocol.py", workers)
    monkeypatch.setattr(local, "WORKERS", workers)
    monkeypatch.setattr(reproduce, "WORKERS", workers)

    def write(body: str) -> None:
        imports = "import json, os, sys\nfrom pathlib import Path\nfrom protocol import *\n"
        (workers / "quantize_llmcompressor.py").write_text(imports + body + "\nrun(main)\n")

    return write


def quantize_and_fail(release: Release) -> Failure:
    plan = release.plan
    with pytest.raises(Failure) as caught:
        quantize(
            plan.row.quantizer,
            plan.quantize_request,
            plan.model,
            release.checkpoint,
            release.config,
            release.journal.attempt_dir(Stage.PTQ),
            release.world,
            release.tools,
            lambda *_: None,
        )
    release.journal.finish(
        Stage.PTQ,
        State.FAILED,
        detail=str(caught.value),
        failure_class=caught.value.failure_class,
    )
    return caught.value


READS = """
def main(request, progress):
    held = sorted(path.name for path in Path(request["model_path"]).iterdir())
    text = Path(request["calibration"]["path"]).read_text()
"""
ENDINGS = [
    pytest.param(
        '    raise WorkerFailure("MODEL_UNSUPPORTED", f"no: {held} {text}")', 0, 1, id="reported"
    ),
    pytest.param('    raise KeyError(f"no: {held} {text}")', 1, 1, id="crashed"),
    pytest.param('    print("no:", held, text)\n    os._exit(7)', 7, 7, id="left"),
    pytest.param('    print("no:", held, text, flush=True)\n    os.kill(os.getpid(), 9)', 137, 137,
                 id="killed"),
]  # fmt: skip


@pytest.mark.parametrize(("ending", "process_exit_code", "exit_code"), ENDINGS)
def test_a_worker_fails_again_with_the_run_alone(
    make: Make,
    tmp_path: Path,
    environments: Environments,
    fake_quantizer: Callable[[str], None],
    ending: str,
    process_exit_code: int,
    exit_code: int,
) -> None:
    text = tmp_path / "source of it" / "some text.jsonl"
    release = make(calibration=text)
    text.write_text("calibrating")
    fake_quantizer(READS + ending)
    failure = quantize_and_fail(release)
    write_reproduction(release, exit_code=5)
    run_dir = moved(release, tmp_path)
    recorded = json.loads((run_dir / "reproduce" / "failure.json").read_text())
    assert recorded["kind"] == Kind.WORKER
    assert recorded["process_exit_code"] == process_exit_code
    assert recorded["exit_code"] == exit_code
    assert recorded["message"] == failure.message
    done = repeat(run_dir, environments)
    assert done.returncode == exit_code, done.stdout + done.stderr
    assert "model.safetensors" in done.stdout and "calibrating" in done.stdout


def test_a_worker_that_does_not_fail_again_is_told(
    make: Make,
    tmp_path: Path,
    environments: Environments,
    fake_quantizer: Callable[[str], None],
) -> None:
    release = make()
    fake_quantizer(
        'def main(request, progress):\n    if "OMP_NUM_THREADS" not in os.environ:\n'
        '        raise WorkerFailure("SYSTEMIC", "no")\n    return {}'
    )
    quantize_and_fail(release)
    write_reproduction(release, exit_code=5)
    done = repeat(moved(release, tmp_path), environments, OMP_NUM_THREADS="1")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "now:  exit code 0, ok: ")


def test_the_variables_of_then_hold(
    make: Make,
    tmp_path: Path,
    environments: Environments,
    fake_quantizer: Callable[[str], None],
) -> None:
    secret = "planted-secret-1234"
    environ = {"OMP_NUM_THREADS": "3; touch hacked", "HF_TOKEN": secret, "VLLM_API_KEY": secret}
    release = make(environ=environ)
    fake_quantizer(
        "def main(request, progress):\n"
        '    raise WorkerFailure("SYSTEMIC", os.environ["OMP_NUM_THREADS"])'
    )
    quantize_and_fail(release)
    write_reproduction(release, exit_code=5)
    run_dir = moved(release, tmp_path)
    done = repeat(run_dir, environments, OMP_NUM_THREADS="9")
    assert "now:  exit code 1, SYSTEMIC: 3; touch hacked" in done.stdout
    for path in run_dir.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_another_model_is_refused(
    make: Make,
    model: Path,
    tmp_path: Path,
    environments: Environments,
    fake_quantizer: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reproduce, "LARGEST_COPY_BYTES", 1000)
    release = make()
    fake_quantizer('def main(request, progress):\n    raise WorkerFailure("SYSTEMIC", "no")')
    quantize_and_fail(release)
    write_reproduction(release, exit_code=5)
    assert not (release.journal.run_dir / "reproduce" / "model").exists()
    run_dir = moved(release, tmp_path)
    gone = tmp_path / "gone" / HOSTILE
    absent = repeat(run_dir, environments)
    assert absent.returncode == 120 and "set MODEL" in absent.stderr
    shutil.rmtree(run_dir.parent / "work")
    assert repeat(run_dir, environments, MODEL=str(gone)).returncode == 1
    shutil.rmtree(run_dir.parent / "work")
    (gone / "config.json").write_text("{}")
    changed = repeat(run_dir, environments, MODEL=str(gone))
    assert changed.returncode == 120 and "config.json: FAILED" in changed.stdout


def test_it_overwrites_nothing(
    make: Make,
    tmp_path: Path,
    environments: Environments,
    fake_quantizer: Callable[[str], None],
) -> None:
    release = make()
    fake_quantizer('def main(request, progress):\n    raise WorkerFailure("SYSTEMIC", "no")')
    quantize_and_fail(release)
    write_reproduction(release, exit_code=5)
    run_dir = moved(release, tmp_path)
    (run_dir.parent / "work").mkdir()
    done = repeat(run_dir, environments)
    assert done.returncode == 120 and "is there already" in done.stderr


def test_an_environment_of_another_lock_is_not_used(
    make: Make,
    tmp_path: Path,
    environments: Environments,
    fake_quantizer: Callable[[str], None],
) -> None:
    release = make()
    fake_quantizer('def main(request, progress):\n    raise WorkerFailure("SYSTEMIC", "no")')
    quantize_and_fail(release)
    write_reproduction(release, exit_code=5)
    (environments.root / "quantize" / STAMP).write_text('{"digest": "another"}')
    fake_uv = tmp_path / "bin" / "uv"
    fake_uv.parent.mkdir()
    fake_uv.write_text('#!/bin/sh\necho "uv $@" >&2\nexit 1\n')
    fake_uv.chmod(0o755)
    run_dir = moved(release, tmp_path)
    done = repeat(run_dir, environments, PATH=f"{fake_uv.parent}:{os.environ['PATH']}")
    assert done.returncode == 120
    assert "uv venv" in done.stderr and "set PYTHON" in done.stderr
    assert (run_dir / "reproduce" / "quantize.txt").read_text().count("==") > 50


def test_a_server_that_leaves_leaves_again(
    make: Make, tmp_path: Path, environments: Environments
) -> None:
    release = make(Stage.DEPLOY, **{"engine.arguments": ["--no-such-option"]})
    deploy = release.journal.attempt_dir(Stage.DEPLOY)
    health = {"health": "died", "source_health": "died"}
    write_json(deploy / "canary.json", {**health, "prompts": []})
    for side in ("source", "candidate"):
        (deploy / f"server-{side}.log").write_text("usage: ...")
        (deploy / f"server-{side}.exit_code").write_text("2\n")
    fail(release, Stage.DEPLOY, gate="canary")
    write_reproduction(release, exit_code=5)
    run_dir = moved(release, tmp_path)
    recorded = json.loads((run_dir / "reproduce" / "failure.json").read_text())
    assert (recorded["kind"], recorded["side"]) == (Kind.SERVER, "source")
    assert (recorded["exit_code"], recorded["log"]) == (2, "stages/deploy/server-source.log")
    # This interpreter has no vLLM: the server leaves at once.
    done = repeat(run_dir, environments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "No module named" in done.stdout and "then: exit code 2; now" in done.stdout
    script = (run_dir / "reproduce.sh").read_text()
    assert '--model "$MODEL" --served-model-name source' in script
    assert "--no-such-option" in script


def test_a_gate_is_asked_again_by_verifying(
    make: Make, tmp_path: Path, environments: Environments
) -> None:
    release = make()
    write_json(release.journal.run_dir / "verdicts" / "ptq.json", {"detail": "it covers nothing"})
    fail(release, Stage.PTQ, gate="ptq")
    write_reproduction(release, exit_code=4)
    run_dir = moved(release, tmp_path)
    day0 = tmp_path / "day0"
    day0.write_text('#!/bin/sh\necho "$@"\n[ -z "$CHANGED" ]\n')
    day0.chmod(0o755)
    done = repeat(run_dir, environments, DAY0=str(day0))
    assert done.returncode == 1 and f"verify {run_dir}" in done.stdout
    assert "it covers nothing" in done.stdout
    assert repeat(run_dir, environments, DAY0=str(day0), CHANGED="yes").returncode == 120
    absent = repeat(run_dir, environments, DAY0="no-such-day0")
    assert absent.returncode == 120 and "is not installed" in absent.stderr


def test_a_refused_request_is_refused_again(
    make: Make, model: Path, tmp_path: Path, environments: Environments
) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    release = make(Stage.SETUP, resolved=False)
    fail(release, Stage.SETUP, "truncated")
    write_reproduction(release, exit_code=2)
    run_dir = moved(release, tmp_path)
    day0 = tmp_path / "day0"
    day0.write_text(f'#!/bin/sh\nexec {sys.executable} -m conductor.cli "$@"\n')
    day0.chmod(0o755)
    repository = str(Path(__file__).parent.parent)
    day0.write_text(day0.read_text().replace("exec ", f"PYTHONPATH='{repository}' exec "))
    done = repeat(run_dir, environments, DAY0=str(day0))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "model.safetensors" in done.stdout + done.stderr
    assert "then: exit code 2; now: exit code 2" in done.stdout


def test_a_request_that_comes_through_this_time_ends_with_0(
    make: Make, tmp_path: Path, environments: Environments
) -> None:
    release = make(Stage.SETUP, resolved=False, dry_run=True, model="demo")
    fail(release, Stage.SETUP, "there was no room")
    write_reproduction(release, exit_code=5)
    day0 = tmp_path / "day0"
    for words, status in (("stopped after setup, as asked; resume with: x", 0), ("stopped", 130)):
        day0.write_text(f"#!/bin/sh\necho '{words}'\nexit 130\n")
        day0.chmod(0o755)
        done = repeat(release.journal.run_dir, environments, DAY0=str(day0))
        assert (done.returncode, done.stderr) == (status, "")
        assert f"then: exit code 5; now: exit code {status}" in done.stdout
        shutil.rmtree(release.journal.run_dir.parent / "work")


def test_a_step_of_a_cluster_is_repeated_where_one_is(
    make: Make, tmp_path: Path, environments: Environments, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = make(Stage.SETUP, resolved=False, dry_run=True, model="demo")
    release.world = replace(release.world, cluster=cluster())
    fail(release, Stage.SETUP, "no node has as many cores")
    write_reproduction(release, exit_code=2)
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    day0 = bin_dir / "day0"
    day0.write_text('#!/bin/sh\n[ "$1" = cluster ] && exit 2\necho resources >&2\nexit 2\n')
    day0.chmod(0o755)

    def again() -> tuple[int, str]:
        done = repeat(release.journal.run_dir, environments, DAY0=str(day0))
        shutil.rmtree(release.journal.run_dir.parent / "work")
        return done.returncode, done.stdout + done.stderr

    code, said = again()
    if shutil.which("sbatch") is None:
        assert (code, "there is no sbatch here" in said) == (120, True)
    (bin_dir / "sbatch").write_text("#!/bin/sh\n")
    (bin_dir / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    code, said = again()
    assert (code, "cluster is not described here" in said) == (120, True)
    day0.write_text("#!/bin/sh\n[ $1 = cluster ] && exit 0\npwd\nexit 2\n")
    code, said = again()
    assert (code, "then: exit code 2; now: exit code 2" in said) == (2, True)
    assert str(release.journal.run_dir.parent) in said.splitlines(), "where a clusters.yaml may lie"


def test_what_was_asked_for_by_path_travels(
    make: Make, tmp_path: Path, environments: Environments
) -> None:
    asked = tmp_path / "source of it"
    shutil.copytree(load_suite("demo").path.parent / "suite", asked / "suite")
    shutil.copy(load_suite("demo").path, asked / "suite.yaml")
    (asked / "text.jsonl").write_text("{}")
    release = make(
        Stage.SETUP,
        resolved=False,
        suite=str(asked / "suite.yaml"),
        calibration=asked / "text.jsonl",
    )
    fail(release, Stage.SETUP)
    write_reproduction(release, exit_code=2)
    run_dir = moved(release, tmp_path)
    day0 = tmp_path / "day0"
    day0.write_text('#!/bin/sh\ncat "$3"\nexit 2\n')
    day0.chmod(0o755)
    done = repeat(run_dir, environments, DAY0=str(day0))
    assert done.returncode == 2, done.stderr
    config = json.loads(done.stdout.partition("then:")[0])
    assert Path(config["model"]).is_relative_to(run_dir)
    assert load_suite(config["suite"]).include_path == run_dir / "reproduce" / "suite" / "suite"
    assert Path(config["calibration"]["data"]).read_text() == "{}"
    assert "workspace" not in config


def test_an_exit_code_is_of_the_last_start(
    make: Make, fake_quantizer: Callable[[str], None]
) -> None:
    release = make()
    fake_quantizer("def main(request, progress):\n    os._exit(7)")
    quantize_and_fail(release)
    stage_dir = release.journal.attempt_dir(Stage.PTQ)
    assert (stage_dir / "stdout.exit_code").read_text() == "7\n"
    fake_quantizer("def main(request, progress):\n    return {}")
    with pytest.raises(pytest.fail.Exception):
        quantize_and_fail(release)
    assert not (stage_dir / "stdout.exit_code").exists()


def test_what_did_not_fail_has_no_script(make: Make) -> None:
    release = make(Stage.CLOSEOUT)
    run_dir = release.journal.run_dir
    (run_dir / "reproduce").mkdir()
    (run_dir / "reproduce.sh").write_text("of an earlier end")
    write_reproduction(release, exit_code=0)
    assert not (run_dir / "reproduce.sh").exists()
    assert not (run_dir / "reproduce").exists()


def tool(event: str, directory: str, **facts: Any) -> tuple[str, dict[str, Any]]:
    return event, {"tool": "evaluate.py", "directory": directory, **facts}


BASELINE = "stages/baseline_eval"


def job(event: str, number: int, **facts: Any) -> tuple[str, dict[str, Any]]:
    return event, {"name": name_of(BASELINE, number), "directory": BASELINE, **facts}


ENDPOINT = {"backend": "endpoint", "served_name": "source"}
IN_PROCESS = {"backend": "in_process"}
STEPS = [
    pytest.param(
        [tool("tool_started", BASELINE), tool("tool_finished", BASELINE, status="failed")],
        ENDPOINT,
        (Kind.WORKER_AND_SERVER, "source"),
        id="against-a-server",
    ),
    pytest.param(
        [tool("tool_started", BASELINE), tool("tool_finished", BASELINE, status="crashed")],
        IN_PROCESS,
        (Kind.WORKER, None),
        id="in-process",
    ),
    pytest.param(
        [("server_started", {"side": "source", "log": f"{BASELINE}/server-source.log"})],
        ENDPOINT,
        (Kind.SERVER, "source"),
        id="server-that-never-served",
    ),
    pytest.param(
        [tool("tool_started", BASELINE), tool("tool_finished", BASELINE, status="ok")],
        ENDPOINT,
        (Kind.CONDUCTOR, None),
        id="reading-what-it-left",
    ),
    pytest.param(
        [tool("tool_finished", f"{BASELINE}-of-another", status="failed")],
        ENDPOINT,
        (Kind.CONDUCTOR, None),
        id="another-stage",
    ),
    pytest.param([], ENDPOINT, (Kind.CONDUCTOR, None), id="nothing-was-started"),
    pytest.param(
        [
            job("job_submitted", 1),
            tool("tool_started", BASELINE),
            tool("tool_finished", BASELINE, status="failed"),
            job("job_ended", 1),
        ],
        ENDPOINT,
        (Kind.WORKER_AND_SERVER, "source"),
        id="job-whose-worker-failed",
    ),
    pytest.param(
        [job("job_submitted", 1), job("job_ended", 1, state="OUT_OF_MEMORY")],
        ENDPOINT,
        (Kind.WORKER_AND_SERVER, "source"),
        id="job-that-ended-over-its-worker",
    ),
    pytest.param(
        [
            job("job_submitted", 1),
            tool("tool_finished", BASELINE, status="failed"),
            job("job_ended", 1),
            job("job_submitted", 2),
            job("job_ended", 2, state="NODE_FAIL"),
        ],
        ENDPOINT,
        (Kind.WORKER_AND_SERVER, "source"),
        id="job-after-another",
    ),
]


@pytest.mark.parametrize(("events", "request_document", "expected"), STEPS)
def test_which_step_it_was(
    make: Make,
    events: list[tuple[str, dict[str, Any]]],
    request_document: dict[str, Any],
    expected: tuple[Kind, str | None],
) -> None:
    release = make(Stage.BASELINE_EVAL)
    directory = release.journal.attempt_dir(Stage.BASELINE_EVAL)
    write_json(directory / "request.json", request_document)
    if any(name == "job_submitted" for name, _ in events):
        for number in (1, 2):
            job_folder(release.journal.run_dir, BASELINE, number, task={"task": "evaluation"})
        (directory / "stdout.log").write_text("as far as it got")
    for name, facts in events:
        release.journal.record(name, **facts)
    fail(release, Stage.BASELINE_EVAL)
    step = find_failing_step(release, exit_code=5)
    assert step is not None and (step.kind, step.side) == expected
    write_reproduction(release, exit_code=5)
    script = release.journal.run_dir / "reproduce.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_what_cannot_be_loaded_is_loaded_again(make: Make) -> None:
    release = make(Stage.DEPLOY, row=TRANSFORMERS)
    deploy = release.journal.attempt_dir(Stage.DEPLOY)
    write_json(deploy / "canary.json", {"health": "died", "source_health": "ok", "prompts": []})
    write_json(deploy / "request.json", {"checkpoints": {"candidate": str(release.checkpoint)}})
    release.checkpoint.mkdir()
    (release.checkpoint / "config.json").write_text("{}")
    fail(release, Stage.DEPLOY, gate="canary")
    step = find_failing_step(release, exit_code=4)
    assert step is not None and (step.kind, step.tool) == (Kind.WORKER, "answer_prompts.py")
    write_reproduction(release, exit_code=4)
    folder = release.journal.run_dir / "reproduce"
    request = json.loads((folder / "request.json").read_text())
    assert request["checkpoints"]["candidate"] == "@CHECKPOINT@"
    assert (folder / "checkpoint" / "config.json").exists()


def test_a_candidate_that_was_rejected_since_is_found_under_its_new_name(
    make: Make, environments: Environments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "LARGEST_COPY_BYTES", 0)
    release = make(Stage.DEPLOY, row=TRANSFORMERS)
    deploy = release.journal.attempt_dir(Stage.DEPLOY)
    write_json(deploy / "canary.json", {"health": "died", "source_health": "ok", "prompts": []})
    write_json(deploy / "request.json", {"checkpoints": {"candidate": str(release.checkpoint)}})
    release.checkpoint.mkdir()
    (release.checkpoint / "config.json").write_text("{}")
    fail(release, Stage.DEPLOY, gate="canary")
    write_reproduction(release, exit_code=4)
    run_dir = release.journal.run_dir
    rejected = release.checkpoint.rename(run_dir / "REJECTED-checkpoint")
    assert "does not hold" not in repeat(run_dir, environments, PYTHON=sys.executable).stderr
    filled = json.loads((run_dir.parent / "work" / "request.json").read_text())
    assert filled["checkpoints"] == {"candidate": str(rejected)}


def test_a_dry_run_is_repeated_as_one(make: Make) -> None:
    release = make(Stage.PTQ, dry_run=True)
    release.journal.record("tool_finished", tool="t", directory="stages/ptq", status="failed")
    fail(release, Stage.PTQ)
    step = find_failing_step(release, exit_code=2)
    assert step is not None and step.kind is Kind.CONDUCTOR


NAMES = [
    pytest.param("a b.txt", id="space"),
    pytest.param("back\\slash", id="backslash"),
    pytest.param("new\nline", id="newline"),
    pytest.param("-c", id="option"),
]


@pytest.mark.parametrize("name", NAMES)
def test_digests_are_as_sha256sum_reads_them(tmp_path: Path, name: str) -> None:
    from hashlib import sha256

    (tmp_path / name).write_text("x")
    line = reproduce._digest_line(name, sha256(b"x").hexdigest())
    (tmp_path / "list").write_text(line)
    command = ["sha256sum", "--check", "--strict", "--", "list"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.tools
def test_the_real_quantizer_fails_again(make: Make, tmp_path: Path) -> None:
    text = tmp_path / "source of it" / "text.jsonl"
    text.write_text('{"words": "under another name"}\n')
    release = make(calibration=text)
    real = Environments(variables=dict(os.environ))
    release.world = replace(release.world, environments=real, environ=dict(os.environ))
    request = dict(release.plan.quantize_request)
    request |= {"recipe_file": None, "trust_remote_code": False, "awq": False, "ignore": []}
    request |= {"scheme": "NVFP4", "targets": ["Linear"]}
    request["calibration"] |= {"text_column": "text", "samples": 4, "max_length": 64, "seed": 0}
    release.resolved = replace(release.plan, quantize_request=request)
    failure = quantize_and_fail(release)
    assert "must be text" in failure.message
    write_reproduction(release, exit_code=2)
    done = repeat(moved(release, tmp_path), real)
    assert done.returncode == 1
    assert "now:  exit code 1, USER_CONFIG_ERROR" in done.stdout and "must be text" in done.stdout
