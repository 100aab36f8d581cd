"""What a release was made from, field by field, and which stages a change of it makes void.

Everything that a decision depends on is one flat mapping of scalars, so that what was and what is
now can be compared and shown without knowing what a field means. Which stage depends on which
fields is a table. Invariants:

* A stage that is void makes all later ones void: they worked on what it made.
* What changes no result (where things are, how long is waited) is never collected, and so is never
  a drift. Every other field of the configuration is one, though it may make nothing void but the
  report.
* A new version of day0 starts no tool again: gates judge what is recorded.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from conductor.chain import STAGES, Stage
from conductor.config import DEFAULTS
from conductor.digests import Digests, document_digest
from conductor.engines.opening import engine_version
from conductor.preconditions import environments_needed

if TYPE_CHECKING:
    from conductor.config import Config
    from conductor.models import Model
    from conductor.probes.machine import Machine
    from conductor.release_state import Plan, World
    from conductor.suites import Suite

Scalar = str | int | float | bool | None

CHANGES_NO_RESULT = (
    *("config.workspace", "config.overlap", "config.fresh_baseline"),
    *("config.watchdog.", "config.retry.", "config.tracking.", "config.smoke_purpose."),
    *("config.run_name", "config.executor", "config.cluster"),
    *("config.engine.port", "config.engine.health_timeout_s"),
)
"""Settings by which the same release is carried out elsewhere, or more patiently."""

_MADE_FROM = (
    *("config.dry_run", "config.deterministic"),
    *("config.model", "config.recipe", "config.quantizer", "config.calibration.", "config.seed"),
    *("recipe.", "calibration.", "model.", "environment.quantize", "device"),
)
NEEDS: Mapping[Stage, tuple[str, ...]] = {
    Stage.SETUP: _MADE_FROM,
    Stage.PTQ: _MADE_FROM,
    Stage.DEPLOY: (
        *("config.engine.", "engine.", "accelerators", "suite.canary"),
        *("environment.serve", "environment.reference"),
    ),
    Stage.BASELINE_EVAL: (
        *("config.suite", "suite.definition", "suite.files.", "suite.data", "config.limit"),
        *("config.until_decided", "config.first_batch", "config.max_samples"),
        *("config.max_repeats", "config.noise_floor", "config.evaluation."),
        "environment.evaluate",
    ),
    Stage.CANDIDATE_EVAL: (),
    Stage.COMPARE: (
        *("config.threshold", "config.relative", "config.rule", "suite.reading"),
        "day0.",
    ),
    Stage.CLOSEOUT: ("",),
}
"""The beginnings of the names of the fields that each stage is the first to depend on.

The report, which closing out writes, tells of all of them.
"""

NEEDED_TO_LOOK = NEEDS[Stage.COMPARE][:-1]
"""What evaluating the candidate depends on as well where it looks at the drop to ask on or stop."""

_NOT_READ = (".*", "*.md")
"""Files beside a checkpoint that no tool reads."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One field that is not what it was, and the stages that this makes void, in their order.

    None stands for a field that is absent or has no value.
    """

    field: str
    was: Scalar
    now: Scalar
    invalidates: tuple[Stage, ...]


def collect(config: Config, plan: Plan, world: World, digests: Digests) -> dict[str, Scalar]:
    """Return everything that the release depends on, by field; digests are SHA-256.

    Raises:
        OSError: a file of the model, the suite, the recipe or the calibration cannot be read.
    """
    row, suite = plan.row, plan.suite
    settings = {f"config.{name}": _scalar(value) for name, (value, _) in config.origins.items()}
    return {
        **{
            name: value
            for name, value in settings.items()
            if not name.startswith(CHANGES_NO_RESULT)
        },
        "recipe.digest": _recipe_digest(plan, digests),
        "calibration.digest": _file_or_none(plan.quantize_request["calibration"]["path"], digests),
        **_describe_suite(suite, digests),
        "model.revision": plan.model.revision,
        **model_files(plan.model, digests),
        **lock_digests(environments_needed(row), world),
        "engine.name": str(row.engine),
        "engine.version": engine_version(row.engine, row.device, world.environments),
        "device": str(row.device),
        "accelerators": accelerators(world.machine),
        "day0.version": version("day0"),
    }


def differences(recorded: Mapping[str, Scalar], now: Mapping[str, Scalar]) -> tuple[Change, ...]:
    """Return what is not as it was, in the order of the stages, with what each change makes void.

    A setting that ``recorded`` does not know did not exist then; it had what is the default now.
    """
    was = {f"config.{name}": _scalar(value) for name, value in DEFAULTS.items()} | dict(recorded)
    looks = bool(now.get("config.until_decided"))
    changes = [
        Change(
            field=field,
            was=was.get(field),
            now=now.get(field),
            invalidates=_void(field, looks=looks),
        )
        for field in sorted({*recorded, *now})
        if not field.startswith(CHANGES_NO_RESULT) and not _same(was.get(field), now.get(field))
    ]
    return tuple(sorted(changes, key=lambda change: -len(change.invalidates)))


def model_files(model: Model, digests: Digests) -> dict[str, Scalar]:
    """Return the digest of every file of a checkpoint that a tool might read, as ``model.files.*``.

    Tools read the directory itself, and of those below it only that of further chat templates.

    Raises:
        OSError: a file cannot be read.
    """
    paths = [*model.path.iterdir(), *model.path.glob("additional_chat_templates/*")]
    return {
        f"model.files.{path.relative_to(model.path)}": digests.file(path)
        for path in sorted(paths)
        if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in _NOT_READ)
    }


def suite_files(suite: Suite, digests: Digests) -> dict[str, Scalar]:
    """Return the digests of the task and data files of a suite, as ``suite.files.*``.

    They are those under its ``include_path``, and those elsewhere that a task file names as its
    data or includes. Where a suite's data come from the Hub, ``suite.data`` says so: they have no
    digest before they are asked, and both sides' documents are paired by their hashes afterwards.

    Raises:
        OSError: a file cannot be read.
    """
    if suite.include_path is None:
        return {"suite.data": "hub"}
    found = digests.tree(suite.include_path, _is_by_product)
    return {
        "suite.data": "files",
        **{f"suite.files.{name}": facts["sha256"] for name, facts in found.items()},
        **{
            f"suite.files.{path}": digests.file(path)
            for path in sorted(_files_elsewhere(suite.include_path))
        },
    }


def lock_digests(names: list[str], world: World) -> dict[str, Scalar]:
    """Return the digests of the locks of environments, as ``environment.*``."""
    return {f"environment.{name}": world.environments.digest(name) for name in names}


def accelerators(machine: Machine) -> str:
    """Return what computes, by its makers' names: accelerators, or the processor without any."""
    return ", ".join(each.name for each in machine.accelerators) or machine.processor


def flatten(document: Mapping[str, Any], prefix: str) -> dict[str, Scalar]:
    """Return the scalars of a JSON mapping by dotted name; a list becomes its JSON text."""
    flat: dict[str, Scalar] = {}
    for name, value in document.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = _scalar(value)
    return flat


def _scalar(value: Any) -> Scalar:
    """Return ``value`` as a scalar that JSON gives back; of an enumeration, what it stands for."""
    if isinstance(value, str):
        return str(value)
    return value if value is None or isinstance(value, int | float) else json.dumps(value)


def _same(was: Scalar, now: Scalar) -> bool:
    """Compare as JSON does, where true is not 1; whole numbers may be written either way."""
    return was == now and isinstance(was, bool) == isinstance(now, bool)


def _void(field: str, *, looks: bool) -> tuple[Stage, ...]:
    for number, stage in enumerate(STAGES):
        also = NEEDED_TO_LOOK if looks and stage is Stage.CANDIDATE_EVAL else ()
        if field.startswith(NEEDS[stage] + also):
            return STAGES[number:]
    return ()


def _recipe_digest(plan: Plan, digests: Digests) -> str:
    """Identify what the quantizer is told to do, less the calibration and where files are."""
    request = {
        name: value for name, value in plan.quantize_request.items() if name != "calibration"
    }
    file = _file_or_none(request.pop("recipe_file"), digests)
    return document_digest({**request, "quantizer": plan.row.quantizer, "file": file})


def _file_or_none(path: str | None, digests: Digests) -> str | None:
    return digests.file(Path(path)) if path else None


def _describe_suite(suite: Suite, digests: Digests) -> dict[str, Scalar]:
    """Return the suite by what it decides: the answers, the canary's, and how scores are read."""
    document = asdict(suite)
    for place in ("name", "path", "include_path"):
        del document[place]
    canary, reading = document.pop("canary_prompts"), document.pop("tasks")
    asked = {
        name: {field: task.pop(field) for field in ("fewshot", "samples")}
        for name, task in reading.items()
    }
    return {
        "suite.definition": document_digest({**document, "tasks": asked}),
        "suite.canary": document_digest(canary),
        "suite.reading": document_digest(reading),
        **suite_files(suite, digests),
    }


def _is_by_product(relative: str) -> bool:
    return relative.rpartition("/")[2] in ("__pycache__", ".git")


class _TaskFileLoader(yaml.SafeLoader):
    """Read a task file for the paths it names: lm-eval's own tags become null."""


_TaskFileLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _files_elsewhere(include_path: Path) -> set[Path]:
    """Return the files outside ``include_path`` that its task files name."""
    found = set()
    for path in [*include_path.rglob("*.yaml"), *include_path.rglob("*.yml")]:
        try:
            document = yaml.load(path.read_text(encoding="utf-8"), _TaskFileLoader)  # noqa: S506
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            continue  # lm-eval will say what is wrong with it
        if isinstance(document, dict):
            named = [document.get(key) for key in ("include", "dataset_path", "dataset_kwargs")]
            for text in _texts(named):
                if Path(text).is_absolute() or ".." in Path(text).parts:
                    # Data are found from the directory of the suite, includes from the task file.
                    found |= _files_at(include_path, text) | _files_at(path.parent, text)
    inside = include_path.resolve()
    return {path for path in found if not path.is_relative_to(inside)}


def _files_at(directory: Path, pattern: str) -> set[Path]:
    """Return the files that ``pattern`` names from ``directory``, or that lie below such ones."""
    found = set()
    for match in glob.glob(pattern, root_dir=directory):  # noqa: PTH207 - may be absolute
        path = (directory / match).resolve()
        found |= {path} if path.is_file() else {each for each in path.rglob("*") if each.is_file()}
    return found


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            yield from _texts(list(value.values()))
        case list():
            for each in value:
                yield from _texts(each)
