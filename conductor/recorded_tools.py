"""The tools of a dry run: they answer with what the real ones left behind once, and start nothing.

The record of a whole demo release comes with the package. Each tool leaves the same files and notes
the same events as the real one, so everything around the tools is tried for real: the probes read
a checkpoint, the gates judge answers. What the record does not cover is refused.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from conductor.compatibility import Device, Engine
from conductor.config import Config
from conductor.engines import REMEMBERED, EngineSession, Sides
from conductor.engines.opening import server_settings
from conductor.engines.vllm import next_log
from conductor.environments.builder import Environments, Status
from conductor.evaluation import Inquiry, ask
from conductor.executors.local import Note, Progress, Worker
from conductor.failure import Failure
from conductor.files import read_json, write_json
from conductor.models import DEMO_PATH
from conductor.probes.machine import Machine
from conductor.world import World
from gates import FailureClass
from gates.canary import Health

VERSION = 1
PACKAGE = Path(__file__).parent
RECORDED = PACKAGE / "demo" / "recorded"
DOCUMENT = "record.json"
ARCHIVE = "files.tar.xz"
PACKAGE_MARK = b"@package@"
"""Stands in a record for the directory of the package, wherever that was."""
SHRUNK = ".shrunk"
"""Ends the name of a file that is kept as what the demo model does not give of it."""
EVALUATION_STAGES = {"source": "baseline_eval", "candidate": "candidate_eval"}

WHERE = frozenset({"base_url", "output_dir", "request_cache", "concurrency", "timeout_s"})
"""Fields of a request that say where something is and how it is asked, not what is asked."""


def find_record(config: Config) -> Path:
    """Return the record that answers ``config``; raises Failure where there is none."""
    for path in sorted(RECORDED.iterdir()):
        record = Record(path)
        if (record.document["model"], record.document["recipe"]) == (config.model, config.recipe):
            return path
    known = ", ".join(f"`{Record(path).title}`" for path in sorted(RECORDED.iterdir()))
    raise Failure(
        FailureClass.USER_CONFIG_ERROR,
        f"--dry-run: nothing is recorded of {config.model} with recipe {config.recipe}; a dry run "
        f"can be made of {known}",
    )


@dataclass(frozen=True)
class Record:
    """What one release asked of its tools, and what they left."""

    directory: Path

    @cached_property
    def document(self) -> dict[str, Any]:
        """Requests, results, settings, answers to the canary, versions."""
        document: dict[str, Any] = _with_paths(read_json(self.directory / DOCUMENT))
        return document

    @property
    def device(self) -> Device:
        """What the tools ran on."""
        return Device(self.document["machine"]["device"])

    @property
    def title(self) -> str:
        """The command that was recorded."""
        return f"day0 release {self.document['model']} --recipe {self.document['recipe']}"

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Everything that the tools left, by name, as it is kept."""
        with tarfile.open(self.directory / ARCHIVE) as archive:
            return {
                member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
                for member in archive
            }

    def file(self, name: str) -> bytes:
        """Return a file that a tool left, with the paths of this package in it."""
        return self.files[name].replace(PACKAGE_MARK, str(PACKAGE).encode())

    def below(self, directory: str) -> Iterator[tuple[str, bytes]]:
        """Return the files below ``directory`` by their path in it, with weights made whole."""
        for name in self.files:
            if name.startswith(f"{directory}/"):
                path = name.removeprefix(f"{directory}/")
                yield (
                    path.removesuffix(SHRUNK),
                    (self._restored(name) if name.endswith(SHRUNK) else self.file(name)),
                )

    def _restored(self, name: str) -> bytes:
        from conductor.demo.export import restore

        source = DEMO_PATH / Path(name).name.removesuffix(SHRUNK)
        return restore(self.files[name], source.read_bytes())

    def refusal(self, words: str) -> Failure:
        """Return the failure that says what was asked beyond the record."""
        return Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"a dry run has the results of `{self.title}` alone, and {words}; leave out the "
            "settings that change it, or --dry-run",
        )


@cache
def _open(recorded: Path) -> Record:
    """Return a record that all dry runs of this process share: its files are large."""
    return Record(recorded)


def _with_paths(value: Any) -> Any:
    """Put the directory of this package in the place of its mark, throughout a document."""
    if isinstance(value, dict):
        return {name: _with_paths(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_paths(each) for each in value]
    if isinstance(value, str):
        return value.replace(PACKAGE_MARK.decode(), str(PACKAGE))
    return value


class RecordedEnvironments(Environments):
    """The worker environments that the record was made with; none is needed on this machine."""

    def __init__(self, record: Record, variables: Mapping[str, str]) -> None:
        """Take the place of the environments of this machine."""
        super().__init__(device=record.device, variables=variables)
        self._recorded: dict[str, dict[str, Any]] = record.document["environments"]

    def status(self, name: str) -> Status:
        """Return ready for what was recorded."""
        return Status.READY if name in self._recorded else Status.ABSENT

    def digest(self, name: str) -> str:
        """Return what the environment was built from."""
        digest: str = self._recorded[name]["digest"]
        return digest

    def versions(self, name: str) -> dict[str, str]:
        """Return the packages that were installed."""
        versions: dict[str, str] = self._recorded[name]["packages"]
        return versions

    def packages(self, name: str) -> dict[str, dict[str, str | None]]:
        """Return the packages that were installed; of their files nothing is recorded."""
        return {
            package: {"version": version, "sha256": None}
            for package, version in self.versions(name).items()
        }

    def python_version(self, name: str) -> None:
        """Return ``None``: it is not recorded."""


def recorded_world(recorded: Path, environ: Mapping[str, str]) -> World:
    """Return the machine and the environments that the record was made on and with."""
    record = Record(recorded)
    machine = record.document["machine"]
    return World(
        environments=RecordedEnvironments(record, environ),
        environ=environ,
        machine=Machine(**{**machine, "device": record.device, "accelerators": ()}),
    )


class RecordedTools:
    """Answer for the workers and the engine of a release; see ``conductor.tools.Tools``."""

    def __init__(self, recorded: Path, note: Note) -> None:
        """Read the record under ``recorded``; ``note`` is told what would be started."""
        self._record = _open(recorded)
        self._note = note
        self._session = RecordedSession(self._record, note)

    def run_worker(
        self,
        worker: Worker,
        stage_dir: Path,
        request: Mapping[str, Any],
        *,
        environ: Mapping[str, str],
        progress: Progress,
        still_useful: Callable[[], None] = lambda: None,
        stall_s: float | None = None,
    ) -> dict[str, Any]:
        """Lay down what the worker left when it was asked the same; return its result."""
        recorded, left = self._recorded(worker.script, request)
        self._compare(worker.script, recorded["request"], request)
        stage_dir.mkdir(parents=True, exist_ok=True)
        for stale in ("result.json", "progress.json"):
            (stage_dir / stale).unlink(missing_ok=True)
        write_json(stage_dir / "request.json", request)
        tool = {"tool": worker.script, "directory": stage_dir}
        ended_as = "ended"
        self._note("tool_started", **tool)
        try:
            still_useful()
            write_json(stage_dir / "progress.json", recorded["progress"])
            progress(*(recorded["progress"][name] for name in ("done", "total", "doing")))
            self._lay_down(left, stage_dir, Path(request["output_dir"]))
            result = _at(recorded["result"], recorded["request"]["output_dir"], request)
            write_json(stage_dir / "result.json", result)
            ended_as = "ok"
        finally:
            self._note("tool_finished", **tool, status=ended_as)
        return result

    def _lay_down(self, left: str, stage_dir: Path, output: Path) -> None:
        """Write what a worker left: its log, and what it made."""
        (stage_dir / "stdout.log").write_bytes(self._record.file(f"{left}/stdout.log"))
        shutil.rmtree(output, ignore_errors=True)
        for name, data in self._record.below(f"{left}/output"):
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(data)
        if left in EVALUATION_STAGES:
            self._session.answer(left)

    def open_session(
        self, engine: Engine, sides: Sides, config: Config, max_length: int | None
    ) -> EngineSession:
        """Open the engine that was recorded; what it once answered needs no pins to be the same."""
        unpinned = replace(config, deterministic=False)
        settings = server_settings(unpinned, self._record.device, max_length)
        wanted = {"engine": engine, **settings.document()}
        self._compare("the engine", self._record.document["sides"]["source"]["settings"], wanted)
        self._session.tokenizer = str(sides.source)
        return self._session

    def ask(
        self,
        inquiry: Inquiry,
        session: EngineSession,
        world: World,
        progress: Progress,
        still_wanted: Callable[[], None],
    ) -> None:
        """Let the recorded harness ask."""
        ask(inquiry, session, self, world, progress, still_wanted)

    def _recorded(self, script: str, request: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        """Return what is recorded of a worker, and the directory of what it left."""
        document = self._record.document
        if script == document["quantize"]["script"]:
            return document["quantize"], "quantize"
        side = str(request.get("served_name"))
        if script == "evaluate.py" and side in document["sides"]:
            return document["sides"][side], side
        raise self._record.refusal(f"{script} was not run for it")

    def _compare(self, asked: str, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse what differs in anything but the place."""
        differences = [
            f"{name} {now[name]} in place of {recorded.get(name)}"
            for name in now
            if name not in WHERE and now[name] != recorded.get(name)
        ]
        if differences:
            raise self._record.refusal(f"{asked} would be asked for {', '.join(differences)}")


def _at(result: Mapping[str, Any], was: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a worker's result with the place where it writes this time."""
    return {
        name: request["output_dir"] if value == was else value for name, value in result.items()
    }


class RecordedSession:
    """The engine of the record: its answers and its logs; no process and no port."""

    def __init__(self, record: Record, note: Note) -> None:
        """Keep what answers; nothing counts as started yet."""
        self.tokenizer = ""
        self._record = record
        self._note = note
        self._logs: dict[str, Path] = {}
        self._lock = Lock()

    def answer_canary(
        self,
        prompts: Sequence[str],
        stage_dir: Path,
        progress: Progress,
        source_answers: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Return what both sides answered; the source is not asked again where that is known."""
        evidence: dict[str, Any] = self._record.document["canary"]
        if [each["prompt"] for each in evidence["prompts"]] != list(prompts):
            raise self._record.refusal("the canary would ask other prompts")
        sides = ("candidate", "source") if source_answers is None else ("candidate",)
        for side in sides:
            self._serve(side, stage_dir)
            self._append(side, "canary")
        progress(len(prompts), len(prompts), "canary: recorded")
        if source_answers is None:
            return evidence
        return evidence | {
            "source_health": Health.OK,
            "source_health_detail": REMEMBERED,
            "prompts": [
                {**each, "source": answer}
                for each, answer in zip(evidence["prompts"], source_answers, strict=True)
            ],
        }

    def begin(self, side: str, stage_dir: Path) -> None:
        """Count the server of ``side`` as started."""
        self._serve(side, stage_dir)

    def backend(self, side: str, stage_dir: Path, progress: Progress) -> dict[str, Any]:
        """Name the server that answered then; nothing listens there."""
        self._serve(side, stage_dir)
        recorded = self._record.document["sides"][side]["request"]
        return {
            "backend": "endpoint",
            "base_url": recorded["base_url"],
            "served_name": side,
            "tokenizer": self.tokenizer,
            "device": None,
            "batch_size": 1,
        }

    def secrets(self, side: str) -> Mapping[str, str]:
        """Nothing listens, so there is no key."""
        return {}

    def check(self, side: str) -> None:
        """What was recorded does not die."""

    def settings(self, side: str) -> Mapping[str, Any]:
        """Return the settings under which ``side`` answered."""
        settings: dict[str, Any] = self._record.document["sides"][side]["settings"]
        return settings

    def log(self, side: str) -> Path | None:
        """Return the log of the server that counts as running for ``side``."""
        return self._logs.get(side)

    def answer(self, side: str) -> None:
        """Log the requests of the whole evaluation of ``side``."""
        self._append(side, "evaluation")

    @property
    def holds_both(self) -> bool:
        """True: nothing takes any room."""
        return True

    def discard(self, side: str) -> None:
        """Count the server of ``side`` as stopped."""
        with self._lock:
            if self._logs.pop(side, None):
                self._note("server_stopped", side=side)

    def narrow(self) -> None:
        """Nothing takes memory."""

    def close(self) -> None:
        """Count every server as stopped."""
        for side in list(self._logs):
            self.discard(side)

    def _serve(self, side: str, stage_dir: Path) -> None:
        """Count a server as started, with a log of its own, unless one runs already."""
        with self._lock:
            if side in self._logs:
                return
            stage_dir.mkdir(parents=True, exist_ok=True)
            log = next_log(stage_dir, side)
            self._note("server_started", side=side, log=log)
            log.write_bytes(self._record.file(f"{side}/start.log"))
            self._logs[side] = log

    def _append(self, side: str, part: str) -> None:
        with self._logs[side].open("ab") as log:
            log.write(self._record.file(f"{side}/{part}.log"))
