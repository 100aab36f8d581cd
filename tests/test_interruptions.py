"""A release is killed at every durable write, and comes to the same end as one that is not."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import interrupted
import psutil
import pytest
from conftest import descendants_with
from run_checks import all_problems, outcome, read_events, submissions

DRY_RUN = ("release", "demo", "--recipe", "int8", "--dry-run", "--overlap", "never")
SEED = 0
AT_ONCE = 2
KILLED = -9
NEVER = 1_000_000
"""A number of a point that no release reaches."""
LONGEST_S = 300
TOLD = 3000
"""Characters of a log that a failing test shows."""
SOME, MORE = 24, 40
"""Deaths that are tried offline, and second deaths beside all points with the real tools."""

EXIT_CODES = threading.Lock()
"""Held where exit codes are read: ``start`` reads those of all processes, and each exists once."""

# Forked from a process that has loaded everything, a release costs half as much.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("interrupted", "conductor.cli", "conductor.display", "conductor.release"),
        *("conductor.recorded_tools", "conductor.demo.export", "conductor.report.plots"),
        *("conductor.report.summary", "conductor.probes.values.examination", "gates.statistics"),
        *("matplotlib.pyplot", "matplotlib.backends.backend_svg", "jinja2", "jsonschema_rs"),
        *("rich.progress", "pydantic.type_adapter"),
    ]
)


def day0(log: Path, *words: str) -> int:
    """Run ``interrupted.py`` with ``words``; return the exit code, negative for a signal."""
    process = FORKS.Process(target=interrupted.run_quietly, args=(log, list(words)))
    with EXIT_CODES:
        process.start()
    if not wait([process.sentinel], LONGEST_S):
        process.kill()
        return pytest.fail(f"{words} hangs: {log.read_text()[-TOLD:]}")
    with EXIT_CODES:
        process.join()
    assert process.exitcode is not None
    return process.exitcode


@dataclass(frozen=True)
class Whole:
    """A dry run that nothing interrupted: its points, and what it came to."""

    points: list[str]
    outcome: dict[str, Any]

    def starts(self, point: int) -> list[int]:
        """Return how often each tool is to be started where a death meets point ``point``.

        Twice, if its start was written down by then and its result was not; else once.
        """
        expected = []
        for start, name in enumerate(self.points, start=1):
            if "appended" in name and " tool_started " in name:
                after = self.points[start:]
                result = next(i for i, each in enumerate(after, start=1) if _is_result(each))
                expected.append(2 if start <= point < start + result else 1)
        return sorted(expected)


def _is_result(point: str) -> bool:
    return point.startswith("after ") and point.endswith("/result.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    directory = tmp_path_factory.mktemp("whole")
    workspace, log = directory / "workspace", directory / "log"
    assert day0(log, "0", *DRY_RUN, "--workspace", str(workspace)) == 0, log.read_text()
    lines = log.read_text().splitlines()
    points = [line for line in lines if line.partition(" ")[0] in ("before", "after", "appended")]
    assert int(lines[-1]) == len(points) > 100
    (run_dir,) = (workspace / "runs").iterdir()
    assert all_problems(run_dir) == []
    return Whole(points=points, outcome=outcome(run_dir))


def run_of(workspace: Path) -> Path | None:
    """Return the run of a workspace; None where the release died before it had one."""
    runs = [path for path in (workspace / "runs").glob("*") if not path.name.startswith(".")]
    return runs[0] if runs else None


def killed(whole: Whole, directory: Path, *points: int) -> Iterator[str]:
    """Kill a dry run at the first point and its resumptions at the others; say what is wrong."""
    workspace, log = directory / "workspace", directory / "log"
    directory.mkdir()
    code = day0(log, str(points[0]), *DRY_RUN, "--workspace", str(workspace))
    if code != KILLED:
        yield f"ended with {code} in place of a death: {log.read_text()[-TOLD:]}"
        return
    run_dir = run_of(workspace)
    if run_dir is None:
        if (code := day0(log, str(NEVER), "resume", "--workspace", str(workspace))) != 2:
            yield f"there is no run, and resuming it ends with {code}: {log.read_text()[-TOLD:]}"
        return
    for point in points[1:]:
        code = day0(log, str(point), "resume", str(run_dir))
        if code not in (KILLED, 0):
            yield f"the resumed release ended with {code}: {log.read_text()[-TOLD:]}"
    if (code := day0(log, str(NEVER), "resume", str(run_dir))) != 0:
        yield f"resuming ended with {code}: {log.read_text()[-TOLD:]}"
        return
    yield from all_problems(run_dir)
    if outcome(run_dir) != whole.outcome:
        yield "decision, scores or verdicts are others"
    if len(points) == 1 and sorted(submissions(run_dir).values()) != whole.starts(points[0]):
        yield f"tools were started {dict(submissions(run_dir))}"


def collect(whole: Whole, tmp_path: Path, deaths: list[tuple[int, ...]]) -> dict[str, list[str]]:
    """Try all ``deaths``; return what is wrong by the names of the points."""

    def attempt(points: tuple[int, ...]) -> tuple[str, list[str]]:
        name = " then ".join([whole.points[points[0] - 1], *map(str, points[1:])])
        directory = tmp_path / "-".join(map(str, points))
        return f"{points}: {name}", list(killed(whole, directory, *points))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return {name: problems for name, problems in pool.map(attempt, deaths) if problems}


# Every point takes minutes, so it is tried with the tests that take minutes anyway.
@pytest.mark.parametrize(
    "at_most",
    [
        pytest.param(SOME, id="some-points"),
        pytest.param(None, id="every-point", marks=pytest.mark.tools),
    ],
)
def test_a_dry_run_that_dies_ends_as_if_nothing_had_happened(
    whole: Whole, tmp_path: Path, at_most: int | None
) -> None:
    points = range(1, len(whole.points) + 1)
    chosen = sorted(random.Random(SEED).sample(points, at_most or len(points)))
    assert collect(whole, tmp_path, [(point,) for point in chosen]) == {}
    assert not descendants_with(tmp_path)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(SOME // 3, id="some-points"),
        pytest.param(MORE, id="more-points", marks=pytest.mark.tools),
    ],
)
def test_a_dry_run_that_dies_twice_ends_as_if_nothing_had_happened(
    whole: Whole, tmp_path: Path, number: int
) -> None:
    chance = random.Random(SEED)
    first = chance.sample(range(1, len(whole.points) + 1), number)
    deaths = [(point, chance.randint(1, len(whole.points) - point + 10)) for point in first]
    assert collect(whole, tmp_path, deaths) == {}
    assert not descendants_with(tmp_path)


REAL = ("release", "demo", "--recipe", "int8", "--overlap", "never")
POLL_S = 0.02
SETTINGS = """
retry: {first_wait_s: 0.1, longest_wait_s: 1}
watchdog: {quantize_s: 25}
"""
QUANTIZE, EVALUATE = "quantize_llmcompressor.py", "evaluate.py"
SERVER = "vllm.entrypoints.openai.api_server"
SUPERVISOR = "supervise.py"
ANSWERS = 100
"""Answers after which an evaluation counts as being in its middle."""


class RealRelease:
    """One release with real tools, in processes that die; each is resumed by the next."""

    def __init__(self, directory: Path) -> None:
        self.workspace = directory / "workspace"
        directory.mkdir()
        self.settings = directory / "settings.yaml"
        self.settings.write_text(SETTINGS)
        self.log = directory / "log"
        self.deaths: list[str] = []

    @property
    def run_dir(self) -> Path:
        run_dir = run_of(self.workspace)
        assert run_dir is not None, self.log.read_text()
        return run_dir

    def start(self, number: int = NEVER, at: str = "") -> psutil.Popen:
        """Start or resume the release, to be killed at the ``number``-th point ``at``."""
        arguments = [*REAL, "--workspace", str(self.workspace), "--config", str(self.settings)]
        if self.workspace.exists():
            arguments = ["resume", str(self.run_dir)]
        with self.log.open("a") as log:
            return psutil.Popen(
                [sys.executable, interrupted.__file__, "--at", at, str(number), *arguments],
                stdout=log,
                stderr=log,
            )

    def die_at(self, at: str, number: int = 1) -> None:
        """Let it die at its ``number``-th point ``at``."""
        self.expect(self.start(number, at), KILLED, at)

    def expect(self, conductor: psutil.Popen, code: int, what: str) -> None:
        self.deaths.append(what)
        assert conductor.wait(LONGEST_S * 2) == code, f"{what}: {self.log.read_text()[-TOLD:]}"

    def wait_for(self, what: Callable[[], Any]) -> Any:
        """Return what ``what`` returns once that is something."""
        end = time.monotonic() + LONGEST_S
        while not (found := what()):
            assert time.monotonic() < end, self.log.read_text()[-TOLD:]
            time.sleep(POLL_S)
        return found

    def family(self, conductor: psutil.Popen, words: str) -> list[psutil.Process]:
        """Return the processes below ``conductor`` that have ``words`` on their command."""
        found = []
        for process in conductor.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                command = " ".join(process.cmdline())
                # A child that has not become its command yet looks like the conductor itself.
                if words in command and interrupted.__file__ not in command:
                    found.append(process)
        return found

    def running(self, conductor: psutil.Popen, script: str) -> list[psutil.Process]:
        """Return the processes of a worker or a server, without their supervisor."""
        supervisors = self.family(conductor, SUPERVISOR)
        return [each for each in self.family(conductor, script) if each not in supervisors]

    def answered(self, conductor: psutil.Popen, stage: str) -> bool:
        """True when the evaluation that ``conductor`` started in a stage has some answers."""
        for path in (self.run_dir / "stages" / stage).rglob("progress.json"):
            progress = json.loads(path.read_text())
            if path.stat().st_mtime > conductor.create_time() and progress["done"] > ANSWERS:
                return True
        return False


def kill(*processes: psutil.Process) -> None:
    for process in processes:
        process.kill()


def die_while_setting_up_and_quantizing(release: RealRelease) -> None:
    release.die_at("holder.json")
    release.die_at("appended", 1)
    for at in ("before", "after"):
        release.die_at(f"{at} runs/{release.run_dir.name}/manifest.json")
    release.die_at("stages/setup/inputs.json")
    release.die_at("stages/setup/result.json")
    release.die_at("stage_finished setup")
    release.die_at("stage_started ptq")
    release.die_at(f"tool_started {QUANTIZE}")

    conductor = release.start()
    release.wait_for(lambda: release.running(conductor, QUANTIZE))
    time.sleep(1.5)
    kill(conductor)
    release.expect(conductor, KILLED, "while quantizing")

    conductor = release.start()
    release.wait_for(lambda: release.running(conductor, QUANTIZE))
    kill(*release.family(conductor, SUPERVISOR), conductor)
    release.expect(conductor, KILLED, "while quantizing, with the supervisor")

    conductor = release.start()
    release.wait_for(lambda: release.running(conductor, QUANTIZE))
    conductor.send_signal(signal.SIGTERM)
    release.expect(conductor, 130, "SIGTERM while quantizing")

    # A worker that hangs is ended by the watchdog and tried again; then it dies.
    conductor = release.start(2, f"tool_finished {QUANTIZE}")
    for worker in release.wait_for(lambda: release.running(conductor, QUANTIZE)):
        worker.suspend()
    release.expect(conductor, KILLED, "a hanging worker, and after the next one's end")
    assert statuses(release.run_dir, QUANTIZE) == ["stalled", "ok"]
    release.die_at("checkpoint-summary.json")
    release.die_at("verdicts/ptq.json")
    release.die_at("stage_finished ptq")


def statuses(run_dir: Path, tool: str) -> list[str]:
    """Return how the last two runs of a tool ended."""
    events = read_events(run_dir)
    return [
        event["status"]
        for event in events
        if event["event"] == "tool_finished" and event["tool"] == tool
    ][-2:]


def die_while_serving_and_evaluating(release: RealRelease) -> None:
    release.die_at("server_started")

    conductor = release.start()
    release.wait_for(lambda: len(release.running(conductor, SERVER)) > 1)
    kill(*release.family(conductor, SUPERVISOR), conductor)
    release.expect(conductor, KILLED, "while servers load, with their supervisors")

    release.die_at("canary.json")

    conductor = release.start()
    release.wait_for(lambda: release.answered(conductor, "baseline_eval"))
    kill(conductor)
    release.expect(conductor, KILLED, "while the source is evaluated")

    # A server that dies costs a retry; the request cache spares what was answered.
    conductor = release.start(2, f"tool_finished {EVALUATE}")
    release.wait_for(lambda: release.answered(conductor, "baseline_eval"))
    kill(*release.wait_for(lambda: release.running(conductor, SERVER)))
    release.expect(conductor, KILLED, "a dead server, and after the end of the next evaluation")
    release.die_at("evaluation.json")
    release.die_at("verdicts/baseline_run.json")

    conductor = release.start()
    release.wait_for(lambda: release.answered(conductor, "candidate_eval"))
    kill(*release.family(conductor, SUPERVISOR), conductor)
    release.expect(conductor, KILLED, "while the candidate is evaluated, with the supervisors")
    release.die_at("before", 1)
    release.die_at(f"tool_finished {EVALUATE}")
    release.die_at("verdicts/candidate_run.json")


def die_while_deciding(release: RealRelease) -> None:
    release.die_at("verdicts/compare.json")
    release.die_at("stage_finished compare")
    release.die_at("before runs/" + release.run_dir.name + "/report.json")
    release.die_at("release_finished")


@pytest.mark.tools
@pytest.mark.timeout(1800)
def test_a_real_release_that_dies_again_and_again_ends_as_one_that_does_not(
    tmp_path: Path,
) -> None:
    plain = RealRelease(tmp_path / "plain")
    plain.expect(plain.start(), 0, "not at all")
    release = RealRelease(tmp_path / "killed")
    die_while_setting_up_and_quantizing(release)
    die_while_serving_and_evaluating(release)
    die_while_deciding(release)
    release.expect(release.start(), 0, "no more")
    assert len(release.deaths) > 20
    assert not descendants_with(tmp_path)
    assert all_problems(release.run_dir) == []
    assert findings(release.run_dir) == findings(plain.run_dir)


def findings(run_dir: Path) -> dict[str, Any]:
    """Return what a real release came to; what its servers logged is not the same twice."""
    document = outcome(run_dir)
    gates = {name: verdict["pass"] for name, verdict in document.pop("verdicts").items()}
    return {**document, "gates": gates}
