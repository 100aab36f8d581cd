"""What a release was asked to do: defaults, then YAML files, then the command line.

Files may extend each other; ``conductor.config_files`` reads them. Each value is known by its
dotted name (``engine.health_timeout_s``) in the file, in messages and in ``config.resolved.yaml``,
which records where it came from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conductor.compatibility import Engine, Quantizer
from conductor.config_files import PURPOSE, read_config_file
from conductor.deterministic import PINNED, contradictions, pin_settings
from conductor.documents import read_yaml, validate
from conductor.failure import Failure
from conductor.models import DEMO
from conductor.redaction import redact, redact_document
from conductor.suites import BUILT_IN
from gates import RECIPES, FailureClass
from gates.criteria import SCORE_THRESHOLD

DEFAULTS: Mapping[str, Any] = {
    "model": None,
    "recipe": None,
    "quantizer": None,
    "suite": None,
    "threshold": SCORE_THRESHOLD,
    "relative": False,
    "rule": "noninferiority",
    "until_decided": False,
    "first_batch": 200,
    "max_samples": None,
    "max_repeats": 1,
    "noise_floor": False,
    "discordance": None,
    "workspace": "day0-workspace",
    "seed": 0,
    "limit": None,
    "calibration.data": None,
    "calibration.split": "train",
    "calibration.text_column": "text",
    "calibration.samples": 128,
    "calibration.max_length": 512,
    "engine.name": None,
    "engine.dtype": "auto",
    "engine.tensor_parallel_size": 1,
    "engine.max_model_len": None,
    "engine.health_timeout_s": 1800.0,
    "engine.port": None,
    "engine.cpu_kv_cache_gib": 1,
    "engine.arguments": [],
    "evaluation.concurrency": 16,
    "evaluation.prompts_per_request": 8,
    "evaluation.request_timeout_s": 600,
    "run_name": None,
    "executor": "local",
    "cluster": None,
    "deterministic": False,
    "smoke": False,
    "tracking.uri": None,
    "tracking.experiment": "day0",
    "dry_run": False,
    "overlap": "auto",
    "fresh_baseline": False,
    "retry.limit": None,
    "retry.first_wait_s": 5.0,
    "retry.longest_wait_s": 300.0,
    "watchdog.quantize_s": 21600.0,
    "watchdog.evaluation_s": 1800.0,
    "watchdog.server_s": 300.0,
}

MAY_BE_PATHS = ("model", "recipe", "suite", "calibration.data")
"""Settings that name something built in, something on the Hub, or a path."""

BUILT_IN_NAMES = frozenset({DEMO, *BUILT_IN, *RECIPES})


DEFAULT = "default"
OPTION = "command line"
ENTRY = "config"
"""Stands among the recorded settings for the file that was named with ``--config``."""

Origins = Mapping[str, tuple[Any, str]]
"""Values by dotted name, each with where it comes from."""


class Rule(StrEnum):
    """How scores are compared."""

    NONINFERIORITY = "noninferiority"
    THRESHOLD = "threshold"


class Overlap(StrEnum):
    """Whether the source is served and evaluated while the candidate is being quantized."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Executor(StrEnum):
    """Where workers and servers run: on this machine, or in jobs of a Slurm cluster."""

    LOCAL = "local"
    SLURM = "slurm"


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where releases are logged unless the variables of MLflow say otherwise.

    Without a ``uri`` that is the workspace.
    """

    uri: str | None
    experiment: str


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How failures of the world are tried again.

    ``limit`` caps the retries of the triage table; waits are in seconds and double from the first
    to the longest, with jitter.
    """

    limit: int | None
    first_wait_s: float
    longest_wait_s: float


@dataclass(frozen=True, kw_only=True)
class Watchdog:
    """Seconds without any progress after which a worker, or a silent server, counts as hung."""

    quantize_s: float
    evaluation_s: float
    server_s: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Text that the quantizer runs through the model; lengths in tokens."""

    data: str | None
    split: str
    text_column: str
    samples: int
    max_length: int


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How both checkpoints are served."""

    name: Engine | None
    dtype: str
    tensor_parallel_size: int
    max_model_len: int | None
    health_timeout_s: float
    port: int | None
    cpu_kv_cache_gib: int
    arguments: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Config:
    """One release, as asked for; nothing is resolved yet."""

    model: str
    recipe: str
    quantizer: Quantizer | None
    suite: str
    threshold: float
    relative: bool
    rule: Rule
    until_decided: bool
    first_batch: int
    max_samples: int | None
    max_repeats: int
    noise_floor: bool
    discordance: float | None
    workspace: Path
    seed: int
    limit: int | None
    calibration: Calibration
    engine: EngineConfig
    concurrency: int
    prompts_per_request: int
    request_timeout_s: int
    run_name: str | None
    executor: Executor
    cluster: str | None
    deterministic: bool
    smoke: bool
    smoke_purpose: Mapping[str, str]
    tracking: TrackingConfig
    dry_run: bool
    overlap: Overlap
    fresh_baseline: bool
    retry: Retry
    watchdog: Watchdog
    origins: Origins
    overridden: Origins
    entry: Path | None

    def document(self) -> dict[str, dict[str, Any]]:
        """Every value with its origin, as written to ``config.resolved.yaml``.

        The file that was named is told as well: the origins may be files that it extends, and it is
        the one to read again.
        """
        named = {ENTRY: (str(self.entry), OPTION)} if self.entry else {}
        return {
            name: {"value": value, "from": origin}
            for name, (value, origin) in (named | dict(self.origins)).items()
        }


def load_config(
    path: Path | None,
    options: Mapping[str, Any],
    required: Iterable[str] = ("model", "recipe"),
) -> Config:
    """Merge the defaults, the file at ``path`` with all it extends, and the ``options``.

    Args:
        path: a YAML file, or None.
        options: values of the command line by dotted name; None means that one was not given.
        required: names without which the command cannot work.

    Raises:
        Failure: USER_CONFIG_ERROR when a file is malformed or a required name is missing.
    """
    files, given = _read_files(path), _read_options(options)
    return _complete(_defaults() | files | given, required, _overridden(files, given), path)


def load_recorded(
    recorded: Path, path: Path | None, options: Mapping[str, Any]
) -> tuple[Config, Config]:
    """Return the configuration that a release began with, and what it would begin with now.

    Now, defaults and configuration files say what they say today; what the command line said then
    stands unless ``path`` or ``options`` say otherwise.

    Args:
        recorded: the ``config.resolved.yaml`` of the release.
        path: a YAML file in place of the one named then, or None.
        options: values by dotted name; None means that the option was not given.

    Raises:
        Failure: USER_CONFIG_ERROR when a file is malformed or missing.
    """
    if not recorded.exists():
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"{recorded}: is not there, and nothing else says how the release was asked for; put "
            "it back, or start a new release",
        )
    document = read_yaml(recorded, schema="resolved_config", what="recorded configuration")
    then = {name: (entry["value"], entry["from"]) for name, entry in document.items()}
    entry_then = _take_entry(then)
    validate(
        _nest({n: v for n, (v, _) in then.items() if v is not None}),
        schema="config",
        where=f"recorded configuration {recorded}",
    )
    entry = path or entry_then
    files = _read_files(entry)
    given = {name: each for name, each in then.items() if each[1] == OPTION}
    given |= _read_options(options)
    now = _defaults() | files | given
    now["workspace"] = _workspace_of(recorded.parent) or then.get("workspace", now["workspace"])
    return (
        _complete(_defaults() | then, (), {}, entry_then),
        _complete(now, ("model", "recipe"), _overridden(files, given), entry),
    )


def restore(document: Mapping[str, Mapping[str, Any]]) -> Config:
    """Return the configuration that :meth:`Config.document` wrote.

    Raises:
        Failure: USER_CONFIG_ERROR when it contradicts itself.
    """
    recorded = {name: (entry["value"], entry["from"]) for name, entry in document.items()}
    entry = _take_entry(recorded)
    return _complete(_defaults() | recorded, (), {}, entry)


def _overridden(files: Origins, given: Origins) -> Origins:
    """Return what files say and the command line says otherwise, as the files say it."""
    return {
        name: stated for name, stated in files.items() if given.get(name, stated)[0] != stated[0]
    }


def _take_entry(recorded: dict[str, tuple[Any, str]]) -> Path | None:
    """Take the file that was named from what is recorded.

    A record from before files could extend each other names it as the origin of values only.
    """
    named = recorded.pop(ENTRY, None)
    origins = {origin for _, origin in recorded.values()} - {DEFAULT, OPTION, PINNED}
    found = named[0] if named else next(iter(origins), None)
    return Path(found) if found else None


def _workspace_of(run_dir: Path) -> tuple[str, str] | None:
    """Return the workspace that a run lies in now, which may have been moved with all its runs."""
    runs = run_dir.absolute().parent
    return (str(runs.parent), OPTION) if runs.name == "runs" else None


def _defaults() -> dict[str, tuple[Any, str]]:
    return {name: (value, DEFAULT) for name, value in DEFAULTS.items()}


def _read_files(path: Path | None) -> dict[str, tuple[Any, str]]:
    entries = read_config_file(path) if path else {}
    return {name: (entry.value, str(entry.file)) for name, entry in entries.items()}


def _read_options(options: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    given = {
        name: value.value if isinstance(value, Enum) else value
        for name, value in options.items()
        if value is not None
    }
    if given.get("executor") == Executor.LOCAL:
        given.setdefault("cluster", None)  # one that a file or the beginning names is not meant
    validate(_nest(given), schema="config", where="command line")
    return {name: (value, OPTION) for name, value in given.items()}


def _complete(
    values: dict[str, tuple[Any, str]],
    required: Iterable[str],
    overridden: Origins,
    entry: Path | None,
) -> Config:
    """Check what is required and what fits together; paths become absolute, to be found again."""
    for name in MAY_BE_PATHS:
        value, origin = values[name]
        if isinstance(value, str) and value not in BUILT_IN_NAMES and os.path.exists(value):  # noqa: PTH110
            values[name] = os.path.abspath(value), origin  # noqa: PTH100 - links keep their names
    for name in required:
        if values[name][0] is None:
            raise Failure(
                FailureClass.USER_CONFIG_ERROR,
                f"no {name} given: name it on the command line or as `{name}:` in the file "
                "given with --config",
            )
    if values["suite"][0] is None:
        values["suite"] = (_default_suite(values["model"][0]), "default")
    if values["deterministic"][0]:
        _refuse(contradictions(values, OPTION))
        values = pin_settings(values)
    _refuse(_contradictions(values))
    _refuse(_secrets_in(values))
    return _build(values, overridden, entry and entry.absolute())


def _secrets_in(values: Origins) -> list[str]:
    """Name the settings and files that hold a secret: all are recorded, compared and shown."""
    files = sorted({origin for _, origin in values.values()})
    return [
        f"{redact(file)}: its path holds a secret, or what looks like one; put the file elsewhere"
        for file in files
        if redact(file) != file
    ] + [
        f"{name} ({redact(origin)}) holds a secret, or what looks like one, and would be recorded; "
        "take it out, and give it in an environment variable (servers get an API key of their own)"
        for name, (value, origin) in values.items()
        if redact_document(value) != value
    ]


def _contradictions(settings: Origins) -> list[str]:
    """Say which settings contradict each other or would be ignored, and where they come from."""
    values = {name: value for name, (value, _) in settings.items()}
    until_decided = values["until_decided"]
    purposes = [name for name in values if name.startswith(PURPOSE)]
    problems: Mapping[str, tuple[bool, Iterable[str]]] = {
        "limit cannot stand beside until_decided: give max_samples instead, which bounds how many "
        "questions are asked": (
            until_decided and values["limit"] is not None,
            ("limit", "until_decided"),
        ),
        "rule: threshold cannot stand beside until_decided: observed drops give no ground to stop "
        "early; leave one of the two out": (
            until_decided and values["rule"] == Rule.THRESHOLD,
            ("rule", "until_decided"),
        ),
        "max_samples needs until_decided; to ask only the first documents, give limit": (
            values["max_samples"] is not None and not until_decided,
            ("max_samples", "until_decided"),
        ),
        "first_batch needs until_decided": (
            values["first_batch"] != DEFAULTS["first_batch"] and not until_decided,
            ("first_batch", "until_decided"),
        ),
        "max_repeats needs until_decided": (
            values["max_repeats"] > 1 and not until_decided,
            ("max_repeats", "until_decided"),
        ),
        "smoke_purpose needs smoke: true; production differs from nothing": (
            bool(purposes) and not values["smoke"],
            ("smoke", *purposes),
        ),
        "tracking.uri holds credentials, and configurations are kept where others read them; give "
        "them in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole in "
        "MLFLOW_TRACKING_URI": (_holds_credentials(values["tracking.uri"]), ("tracking.uri",)),
        "cluster needs executor: slurm; nothing runs on a cluster otherwise": (
            values["cluster"] is not None and values["executor"] != Executor.SLURM,
            ("cluster", "executor"),
        ),
        "threshold must be under 1 beside rule: noninferiority: no drop is larger": (
            values["threshold"] == 1 and values["rule"] == Rule.NONINFERIORITY,
            ("threshold", "rule"),
        ),
    }
    return [
        f"{problem} ({', '.join(f'{name}: {settings[name][1]}' for name in names)})"
        for problem, (holds, names) in problems.items()
        if holds
    ]


def _refuse(problems: list[str]) -> None:
    """Raise Failure when there are any."""
    if problems:
        raise Failure(FailureClass.USER_CONFIG_ERROR, "; ".join(problems))


def _holds_credentials(uri: str | None) -> bool:
    try:
        parts = urlsplit(uri or "")
    except ValueError:
        return True  # unreadable, and so not to be repeated
    return "@" in parts.netloc or bool(parts.query)


def _default_suite(model: str) -> str:
    return "demo" if model == DEMO else "standard"


def _whole(value: Any) -> Any:
    """Return ``8000.0`` as 8000: JSON and YAML know one kind of number, ports and seeds do not."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, key = name.partition(".") if "." in name else ("", "", name)
        (document.setdefault(section, {}) if section else document)[key] = value
    return document


def _build(values: Origins, overridden: Origins, entry: Path | None) -> Config:
    plain = {name: _whole(value) for name, (value, _) in values.items()}

    def section(prefix: str) -> dict[str, Any]:
        start = f"{prefix}."
        return {name.removeprefix(start): plain[name] for name in plain if name.startswith(start)}

    engine = section("engine")
    evaluation = section("evaluation")
    return Config(
        model=plain["model"],
        recipe=plain["recipe"] or "",
        quantizer=plain["quantizer"] and Quantizer(plain["quantizer"]),
        suite=plain["suite"],
        threshold=plain["threshold"],
        relative=plain["relative"],
        rule=Rule(plain["rule"]),
        until_decided=plain["until_decided"],
        first_batch=plain["first_batch"],
        max_samples=plain["max_samples"],
        max_repeats=plain["max_repeats"],
        noise_floor=plain["noise_floor"],
        discordance=plain["discordance"],
        workspace=Path(os.path.expanduser(plain["workspace"])).absolute(),  # noqa: PTH111
        seed=plain["seed"],
        limit=plain["limit"],
        calibration=Calibration(**section("calibration")),
        engine=EngineConfig(
            **engine
            | {
                "name": engine["name"] and Engine(engine["name"]),
                "arguments": tuple(engine["arguments"]),
            }
        ),
        concurrency=evaluation["concurrency"],
        prompts_per_request=evaluation["prompts_per_request"],
        request_timeout_s=evaluation["request_timeout_s"],
        run_name=plain["run_name"],
        executor=Executor(plain["executor"]),
        cluster=plain["cluster"],
        deterministic=plain["deterministic"],
        smoke=plain["smoke"],
        smoke_purpose=section("smoke_purpose"),
        tracking=TrackingConfig(**section("tracking")),
        dry_run=plain["dry_run"],
        overlap=Overlap(plain["overlap"]),
        fresh_baseline=plain["fresh_baseline"],
        retry=Retry(**section("retry")),
        watchdog=Watchdog(**section("watchdog")),
        origins=values,
        overridden=overridden,
        entry=entry,
    )
