"""How to see the step that ended a release fail again: ``reproduce.sh``, and what it works from.

Beside the script lies ``reproduce/``: the request of the worker, its scripts, the lock of its
environment, digests of the checkpoints, and copies of what it read, where that is small. So a
person who has the run and nothing else can repeat the step, in the environment that it had.

Invariants:

* The script writes nothing into the run: it works in a directory of its own.
* What the person may have elsewhere is a variable, whose default is the copy, or where it was.
* Values reach the shell quoted, and no secret reaches the script: none is in a request, and
  variables are those of ``env.json``.
* A release that did not fail has neither script nor directory; the script is written last.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conductor.chain import Stage
from conductor.config import BUILT_IN_NAMES, DEFAULT, Config
from conductor.deterministic import PINNED
from conductor.digests import Digests
from conductor.engines.opening import longest_request, server_settings
from conductor.engines.vllm import ServerSettings, server_command, server_environ
from conductor.environments.builder import PYTHON, find
from conductor.evidence.environment import recorded_variables
from conductor.evidence.failing_step import FailingStep, Kind, find_failing_step
from conductor.executors.environ import worker_environ
from conductor.executors.local import WORKERS
from conductor.failure import Failure
from conductor.files import read_json, write_bytes, write_json, write_text
from conductor.harnesses.lm_eval import HARNESS_ENVIRON
from conductor.release_state import Release
from conductor.rendering import templates
from conductor.stage_files import CHECKPOINT, REJECTED
from conductor.suites import load_suite

SCRIPT = "reproduce.sh"
FOLDER = "reproduce"
FAILURE = f"{FOLDER}/failure.json"
LARGEST_COPY_BYTES = 64 * 2**20
"""What the step read is copied up to this size, each source by itself."""

LEFT_OUT = ("workspace", "run_name", "tracking.", "smoke_purpose.")
"""Settings that say where a release is kept, or why, and not what it does."""

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
NEVER_SET = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MLFLOW_TRACKING_URI")

Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Something that the step read: the script's variable for it, and where it was.

    ``copy`` is where it goes below ``reproduce/``, ``digests`` the file there that lists what it
    held, None where it is not to be checked.
    """

    name: str
    meaning: str
    recorded: str
    default: str
    copy: str
    digests: str | None = None

    @property
    def mark(self) -> str:
        """What stands for it in documents."""
        return f"@{self.name}@"


def write_reproduction(release: Release, exit_code: int) -> None:
    """Write what repeats the step that ended ``release``; remove what an earlier end had left.

    Args:
        release: one that came to its end.
        exit_code: what it ends with.

    Raises:
        OSError: something cannot be read or written.
    """
    run_dir = release.journal.run_dir
    (run_dir / SCRIPT).unlink(missing_ok=True)
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    step = find_failing_step(release, exit_code)
    if step is None:
        return
    folder = run_dir / FOLDER
    folder.mkdir()
    write_json(run_dir / FAILURE, step.document())
    details = {} if step.kind is Kind.GATE else _prepare(release, step, folder)
    write_text(run_dir / SCRIPT, _render(release, step, details))


def _prepare(release: Release, step: FailingStep, folder: Path) -> Document:
    """Fill ``folder`` with what the step works from; return what the script says of it."""
    name, document = _request(release, step)
    places = list(_places(release, step))
    marked = _mark(document, sorted(places, key=lambda each: len(each.recorded), reverse=True))
    server = _server(release, step)
    told = f"{marked} {server}"
    names = {each.name for each in places if each.mark in told or f"${each.name}" in told}
    if "SUITE" in names:
        names.add("TASKS")  # a suite names them itself
    used = [
        _provide(place, release.digests, _known_digests(release, place), folder)
        for place in places
        if place.name in names
    ]
    if document:
        write_json(folder / name, marked)
    environments = _environments(release, step)
    for each in environments:
        text = find(each["name"]).lock.read_text(encoding="utf-8")
        write_text(folder / f"{each['name']}.txt", text)
    if step.tool:
        for script in sorted(WORKERS.glob("*.py")):
            _copy_file(script, folder / "workers" / script.name)
    variables = [(place.name, place.meaning) for place in used]
    variables += [(e["variable"], f"interpreter of environment {e['name']}") for e in environments]
    return {
        "places": used,
        "variables": variables,
        "environments": environments,
        "document": name if document else None,
        "marks": " ".join([*(place.name for place in used), "WORK", *(["PORT"] if server else [])]),
        "server": server,
        "exports": _exports(release, step),
        "unset": [*NEVER_SET, *(PROXIES if _is_offline(release, step) else ())],
    }


def _request(release: Release, step: FailingStep) -> tuple[str, Document]:
    """Return the document that the step is started with, by the name of its file."""
    if step.kind is Kind.CONDUCTOR:
        return "config.yaml", _settings(release)
    if step.tool is None:
        return "request.json", {}
    request = read_json(release.journal.run_dir / step.directory / "request.json")
    own = {
        "output_dir": "@WORK@/output",
        "request_cache": "@WORK@/requests",
        "base_url": "http://127.0.0.1:@PORT@/v1",
    }
    return "request.json", {**request, **{n: v for n, v in own.items() if n in request}}


def _settings(release: Release) -> Document:
    """Return the settings that somebody gave, as a configuration file has them."""
    document: Document = {}
    for name, (value, origin) in release.config.origins.items():
        if value is None or origin in (DEFAULT, PINNED) or name.startswith(LEFT_OUT):
            continue
        section, _, key = name.rpartition(".")
        (document.setdefault(section, {}) if section else document)[key] = value
    return document


def _places(release: Release, step: FailingStep) -> Iterator[Place]:
    """Yield what the step may read, where there is such a thing; the suite before its tasks."""
    yield Place(
        name="CHECKPOINT",
        meaning="the candidate",
        recorded=str(release.checkpoint),
        # Beside the script, also where the candidate was rejected and renamed since.
        default=f'"$here/$([ -d "$here/{REJECTED}" ] && echo {REJECTED} || echo {CHECKPOINT})"',
        copy="checkpoint",
        digests="checkpoint.sha256",
    )
    asked = step.kind is Kind.CONDUCTOR
    there = _as_asked(release.config) if asked else _as_resolved(release)
    if model := there["model"]:
        meaning = "the source"
        if (plan := release.resolved) and plan.model.revision:
            meaning += f", {plan.model.requested} of the Hub at revision {plan.model.revision}"
        yield _place("MODEL", meaning, model, "model", digests="model.sha256")
    if suite := there["suite"]:
        yield _place("SUITE", "the suite", suite, f"suite/{suite.name}")
        if tasks := _tasks_of(suite):
            inside = tasks.is_relative_to(suite.parent) and tasks != suite.parent
            copy = f"suite/{tasks.relative_to(suite.parent)}" if inside else "tasks"
            yield _place("TASKS", "the task files of the suite", tasks, copy)
    if data := there["calibration"]:
        yield _place("CALIBRATION", "calibration text", data, f"calibration/{data.name}")
    if recipe := there["recipe"]:
        yield _place("RECIPE", "the recipe", recipe, f"recipe/{recipe.name}")


def _as_asked(config: Config) -> dict[str, Path | None]:
    """Return the paths among the settings, as they stand there."""
    values = {
        "model": config.model,
        "suite": config.suite,
        "calibration": config.calibration.data,
        "recipe": config.recipe,
    }
    return {
        name: Path(value)
        if value and value not in BUILT_IN_NAMES and Path(value).exists()
        else None
        for name, value in values.items()
    }


def _as_resolved(release: Release) -> dict[str, Path | None]:
    """Return the paths that requests to workers and servers name."""
    plan = release.plan
    request = plan.quantize_request
    data, recipe = request["calibration"].get("path"), request.get("recipe_file")
    return {
        "model": plan.model.path,
        "suite": plan.suite.path,
        "calibration": Path(data) if data else None,
        "recipe": Path(recipe) if recipe else None,
    }


def _tasks_of(suite: Path) -> Path | None:
    with suppress(Failure):  # a suite that cannot be read is what may have failed
        return load_suite(str(suite)).include_path
    return None


def _place(name: str, meaning: str, path: Path, copy: str, digests: str | None = None) -> Place:
    return Place(
        name=name,
        meaning=meaning,
        recorded=str(path),
        default=shlex.quote(str(path)),
        copy=copy,
        digests=digests,
    )


def _known_digests(release: Release, place: Place) -> dict[str, str]:
    """Return what the stages recorded of the candidate, by its files; nothing of other places."""
    if place.name != "CHECKPOINT":
        return {}
    outputs = release.journal.stages[Stage.PTQ].outputs or {}
    return {
        name.removeprefix("checkpoint/"): facts["sha256"]
        for name, facts in outputs.items()
        if name.startswith("checkpoint/")
    }


def _provide(place: Place, digests: Digests, known: Mapping[str, str], folder: Path) -> Place:
    """Copy what a place holds where it is small, and list its digests; return it as it is now."""
    path = Path(place.recorded)
    listed = dict(known)
    if place.digests and not known and path.is_dir():
        listed = {name: facts["sha256"] for name, facts in digests.tree(path, _is_hidden).items()}
    if place.digests and listed:
        lines = [_digest_line(name, sha256) for name, sha256 in listed.items()]
        write_text(folder / place.digests, "".join(lines))
    else:
        place = replace(place, digests=None)
    if not path.exists() or _size_bytes(path) > LARGEST_COPY_BYTES:
        return place
    _copy(path, folder / place.copy)
    return replace(place, default=f'"$here"/{shlex.quote(f"{FOLDER}/{place.copy}")}')


def _is_hidden(relative: str) -> bool:
    return Path(relative).name.startswith(".")


def _digest_line(name: str, sha256: str) -> str:
    """Return a line as ``sha256sum`` writes and reads it."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
    return f"{'' if escaped == name else chr(92)}{sha256}  {escaped}\n"


def _files(path: Path) -> list[Path]:
    """Return the files of a directory less hidden ones, or the file itself."""
    if path.is_file():
        return [path]
    return [
        each
        for each in sorted(path.rglob("*"))
        if each.is_file() and not any(map(_is_hidden, each.relative_to(path).parts))
    ]


def _size_bytes(path: Path) -> int:
    return sum(each.stat().st_size for each in _files(path))


def _copy(path: Path, target: Path) -> None:
    for each in _files(path):
        _copy_file(each, target if each == path else target / each.relative_to(path))


def _copy_file(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, path.read_bytes())


def _mark(value: Any, places: Sequence[Place]) -> Any:
    """Put marks in the place of the paths in a document."""
    if isinstance(value, dict):
        return {name: _mark(each, places) for name, each in value.items()}
    if isinstance(value, list):
        return [_mark(each, places) for each in value]
    if isinstance(value, str):
        for place in places:
            if value == place.recorded or value.startswith(f"{place.recorded}/"):
                return place.mark + value.removeprefix(place.recorded)
    return value


def _environments(release: Release, step: FailingStep) -> list[dict[str, str]]:
    """Return the environments of the step's processes, each with the variable for its Python."""
    wanted = {}
    if step.tool:
        wanted["PYTHON"] = _environment_of(step)
    if step.side:
        wanted["SERVER_PYTHON"] = f"serve-{release.world.machine.device}"
    return [
        {"variable": variable, "name": name, "digest": release.world.environments.digest(name)}
        for variable, name in wanted.items()
    ]


def _environment_of(step: FailingStep) -> str:
    if step.stage is Stage.PTQ:
        return "quantize"
    return "evaluate" if step.kind is Kind.WORKER_AND_SERVER else "reference"


def _server(release: Release, step: FailingStep) -> str | None:
    """Return the command of the step's server as words of the shell; None without one."""
    if step.side is None:
        return None
    checkpoint = "$CHECKPOINT" if step.side == "candidate" else "$MODEL"
    command = server_command(
        Path("$SERVER_PYTHON"),
        _server_settings(release),
        checkpoint=Path(checkpoint),
        served_name=step.side,
        port=0,
    )
    command[command.index("--port") + 1] = "$PORT"
    ours = ("$SERVER_PYTHON", checkpoint, "$PORT")
    return " ".join(f'"{word}"' if word in ours else shlex.quote(word) for word in command)


def _server_settings(release: Release) -> ServerSettings:
    plan = release.plan
    length = longest_request(plan.suite, plan.model)
    return server_settings(release.config, release.world.machine.device, length)


def _is_offline(release: Release, step: FailingStep) -> bool:
    """Tell whether the step was told to ask nothing beyond loopback."""
    if step.kind is Kind.CONDUCTOR:
        return False
    if step.stage is Stage.PTQ:
        return release.plan.quantize_request["calibration"]["dataset"] is None
    return step.kind is Kind.SERVER or step.tool != "evaluate.py" or release.plan.suite.is_local


def _exports(release: Release, step: FailingStep) -> list[tuple[str, str]]:
    """Return the variables that the step's processes had from us, or by the caller's choice.

    A variable that names a path of the other machine is left out; ``env.json`` has it.
    """
    recorded = recorded_variables(release.world.environ)
    chosen = {name: value for name, value in recorded.items() if "/" not in value}
    if step.kind is not Kind.CONDUCTOR:
        chosen = worker_environ(chosen, offline=_is_offline(release, step))
    if step.tool == "evaluate.py":
        chosen |= HARNESS_ENVIRON
    if step.side:
        chosen |= server_environ({}, _server_settings(release), "")
        del chosen["VLLM_API_KEY"]
    exports = [(name, shlex.quote(value)) for name, value in sorted(chosen.items())]
    if step.tool == "evaluate.py" and release.plan.suite.is_local:
        # The data sets' cache recognizes local files by their times, not by their content.
        exports.append(("HF_DATASETS_CACHE", '"$WORK/datasets"'))
    return exports


def _render(release: Release, step: FailingStep, details: Document) -> str:
    from importlib.metadata import version

    environment = templates()
    asked, cluster = step.kind is Kind.CONDUCTOR, release.world.cluster
    doing = step.tool or (f"the server of the {step.side}" if step.side else None)
    doing = doing or (f"gate {step.gate}" if step.gate else "day0 itself")
    return environment.get_template(f"{SCRIPT}.j2").render(
        {
            "what": f"{doing} in stage {step.stage}, attempt {step.attempt}",
            "kind": step.kind,
            "stage": step.stage,
            "gate": step.gate,
            "side": step.side,
            "tool": step.tool and shlex.quote(f"workers/{step.tool}"),
            "exit_code": step.exit_code,
            "day0_version": version("day0"),
            "python": PYTHON,
            "cluster": cluster and asked and shlex.quote(cluster.name),
            "device": release.world.machine.device,
            "health_timeout_s": int(release.config.engine.health_timeout_s),
            "variables": [],
            **details,
        }
    )
