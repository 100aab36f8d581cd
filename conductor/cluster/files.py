"""Read ``clusters.yaml``: the user's for all projects, and the project's own, merged.

Invariants:

* The project's entry is merged over the user's of the same name: mappings merge, lists are
  replaced, and null removes what was said before, so that the default holds again.
* What a stage asks for is merged in the same way over what is asked for all stages.
* Each file is judged by itself before it is merged, so that an error names the file at fault.
* Every value is known by its dotted name and the file that it comes from.
* No entry sets an option of sbatch that a submission depends on, and none holds a secret.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

from conductor.chain import Stage
from conductor.compatibility import Device
from conductor.config_files import ConfigFile, merge, project_of
from conductor.documents import read_mapping, read_schema, refuse, validate
from conductor.failure import unusable
from conductor.redaction import names_secret, redact, redact_document

CLUSTERS = "DAY0_CLUSTERS"
"""Names the user's file, where it is not the usual one."""

FILE_NAME = "clusters.yaml"
SCHEMA = "slurm_clusters"

SUBMITTED = (Stage.PTQ, Stage.DEPLOY, Stage.BASELINE_EVAL, Stage.CANDIDATE_EVAL)
"""Stages whose work is done by jobs."""

DEFAULT = "default"
DEFAULTS: Mapping[str, Any] = {
    "python": sys.executable,
    "continuations": 3,
    "poll_s": 10,
    "command_timeout_s": 60,
}
RESOURCE_DEFAULTS: Mapping[str, Any] = {"nodes": 1, "time": "4:00:00"}

FIELDS: Mapping[str, str] = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "nodes": "nodes",
    "gpus": "gpus",
    "gpus-per-node": "gpus",
    "gpus-per-task": "gpus",
    "cpus-per-task": "cpus",
    "mem": "memory_gib",
    "mem-per-cpu": "memory_gib",
    "mem-per-gpu": "memory_gib",
    "time": "time",
    "container-image": "container.image",
    "container-mounts": "container.mounts",
}
"""Options of sbatch that have a field, which ``extra`` does not stand in for."""

OURS = (
    *("array", "begin", "chdir", "clusters", "dependency", "error", "export", "export-file"),
    *("get-user-env", "help", "hold", "input", "job-name", "kill-on-invalid-dep", "no-requeue"),
    *("ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "quiet", "requeue"),
    *("signal", "test-only", "uid", "gid", "usage", "verbose", "version", "wait", "wrap"),
)
"""Options of sbatch that a submission depends on."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """A cluster as files have it: every value by its dotted name, with where it comes from.

    Resources are known by their stage (``stages.ptq.partition``), wherever they are said. ``file``
    is the last file that describes the cluster.
    """

    name: str
    file: Path
    settings: Mapping[str, tuple[Any, str]]

    def document(self) -> dict[str, Any]:
        """Return the description as JSON has it."""
        settings = {
            name: {"value": value, "from": origin}
            for name, (value, origin) in self.settings.items()
        }
        return {"name": self.name, "file": str(self.file), "settings": settings}

    def value(self, name: str) -> Any:
        """Return a setting; None where nobody says it and it has no default."""
        return self.settings[name][0] if name in self.settings else None

    def section(self, name: str) -> dict[str, Any]:
        """Return the settings of a section, by their names in it."""
        start = f"{name}."
        return {
            each.removeprefix(start): value
            for each, (value, _) in self.settings.items()
            if each.startswith(start)
        }

    def where(self, name: str) -> str:
        """Say where a setting stands, or would stand, for messages."""
        origin = self.settings[name][1] if name in self.settings else self.file
        return f"clusters {origin}: clusters.{self.name}.{name}"


def find_described(name: str | None, environ: Mapping[str, str], directory: Path) -> Described:
    """Return what the files say of one cluster; None is the only one that is described.

    Raises:
        Failure: as :func:`read_clusters`, or for a cluster that is not described.
    """
    described = read_clusters(environ, directory)
    known = ", ".join(described)
    if name is None and len(described) > 1:
        raise unusable(f"several clusters are described; name one of them: {known}")
    if name is None:
        return next(iter(described.values()))
    if name not in described:
        files = ", ".join(map(str, _files(environ, directory)))
        raise unusable(f"cluster {name}: is not described in {files}{_nearest(name, described)}")
    return described[name]


def read_clusters(environ: Mapping[str, str], directory: Path) -> dict[str, Described]:
    """Return every cluster that the user or the project describes, by name.

    Args:
        environ: process variables; they say where the user's file lies.
        directory: where the project's file is looked for, and in its parents up to the project.

    Raises:
        Failure: USER_CONFIG_ERROR naming file, field and remedy, or that there is no file.
    """
    paths = _files(environ, directory)
    if not paths:
        raise unusable(
            f"no cluster is described: write {_users_file(environ)}, or {FILE_NAME} in the project "
            "(docs/clusters.md says what stands there)"
        )
    said = [(path, _read(path)) for path in paths]
    names = dict.fromkeys(name for _, clusters in said for name in clusters)
    return {
        name: _described(name, [(path, each[name]) for path, each in said if name in each])
        for name in names
    }


def _files(environ: Mapping[str, str], directory: Path) -> list[Path]:
    """Return the user's file and the project's, as far as they are there; each once."""
    user = _users_file(environ)
    if environ.get(CLUSTERS) and not user.is_file():
        raise unusable(f"{CLUSTERS}: {user} is no file; correct the variable, or unset it")
    project = directory.absolute() / FILE_NAME
    above = [each for each in project.parents if each.is_relative_to(project_of(project))]
    found = [path for path in (each / FILE_NAME for each in above) if path.is_file()][:1]
    paths = [*([user] if user.is_file() else ()), *found]
    return list({os.path.realpath(path): path for path in paths}.values())


def _users_file(environ: Mapping[str, str]) -> Path:
    if chosen := environ.get(CLUSTERS):
        return Path(chosen).expanduser().absolute()
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "day0" / FILE_NAME


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Read one file; of every cluster, the values by dotted name, None for what is null."""
    where = f"clusters {path}"
    document = read_mapping(path, where=where)
    _refuse(where, _odd(document, read_schema(SCHEMA), ()))
    _refuse(where, _secrets(document))
    validate(_without_nulls(document), schema=SCHEMA, where=where)
    read = {name: dict(_flatten(said)) for name, said in document["clusters"].items()}
    _refuse(where, _taken(read))
    return read


def _refuse(where: str, problems: Iterable[str]) -> None:
    if said := "; ".join(problems):
        raise refuse(where, said)


def _odd(value: Any, schema: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[str]:
    """Say which names are no settings, which texts YAML reads as something else or have no form."""
    if reference := schema.get("$ref"):
        schema = read_schema(SCHEMA)["$defs"][reference.rpartition("/")[2]]
    match schema.get("type"), value:
        case "object", Mapping():
            yield from _odd_names(value, schema, above)
        case "array", list():
            for index, inner in enumerate(value):
                yield from _odd(inner, schema["items"], (*above, str(index)))
        case "string", int() | float() | date():
            yield _misread(".".join(above), value)
        case "string", str() if _has_no_form(value, schema):
            yield f"{'.'.join(above)}: {value!r} does not fit; wanted: {schema['description']}"
        case _, float() if not isfinite(value):
            yield f"{'.'.join(above)}: {value} is no number that can be counted with; give another"


def _odd_names(
    value: Mapping[Any, Any], schema: Mapping[str, Any], above: tuple[str, ...]
) -> Iterator[str]:
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key, inner in value.items():
        name = (*above, str(key))
        if not isinstance(key, str):
            yield _misread(".".join(name), key)
        elif kind := known.get(key, others):
            yield from _odd(inner, kind, name)
        else:
            yield f"{'.'.join(name)}: is no setting{_nearest(key, known)}"


def _misread(name: str, value: Any) -> str:
    kind = type(value).__name__
    return f"{name}: YAML reads this as {value} ({kind}); put it into quotes"


def _has_no_form(value: str, schema: Mapping[str, Any]) -> bool:
    """Tell whether a text is refused, and the schema says in words what it takes."""
    return "description" in schema and not re.search(schema.get("pattern", ""), value)


def _nearest(name: str, known: Iterable[str]) -> str:
    found = get_close_matches(name, known := list(known), n=1)
    return f"; did you mean {found[0]}?" if found else f" (known: {', '.join(known)})"


def _secrets(document: Mapping[str, Any]) -> Iterator[str]:
    """Name the values that hold a secret: all are recorded and shown."""
    for name, value in _flatten(document):
        if redact_document(value) != value or _assigns_secret(name, value):
            yield (
                f"{redact(name)}: holds a secret, or what looks like one, and would be recorded; "
                "take it out, and give it in an environment variable, or in a file that only you "
                "can read"
            )


def _assigns_secret(name: str, value: Any) -> bool:
    """Tell whether a line of the shell says a secret itself, not where to find it."""
    lines = (
        "\n".join(map(str, value)) if name.endswith(".setup") and isinstance(value, list) else ""
    )
    assigned = re.findall(r"(\w+)=[\"']?([^\s\"';]+)", lines)
    return any(names_secret(key) and said[0] not in "$`/~" for key, said in assigned)


def _flatten(values: Any, start: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is no mapping by its dotted name."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _flatten(value, f"{start}.{name}" if start else str(name))
    else:
        yield start, values


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {name: _without_nulls(each) for name, each in value.items() if each is not None}


def _taken(read: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Say which options under ``extra`` have a field, or are set by a submission.

    Slurm takes the beginning of an option's name for the whole.
    """
    for name in (f"clusters.{cluster}.{each}" for cluster, said in read.items() for each in said):
        above, _, option = name.rpartition(".extra.")
        if not above:
            continue
        if field := next((FIELDS[each] for each in FIELDS if each.startswith(option)), None):
            yield f"{name}: has a field of its own; say it as {above}.{field}"
        elif any(each.startswith(option) for each in OURS):
            yield f"{name}: is set by day0, which depends on it; take it out"


def _described(name: str, said: Sequence[tuple[Path, Mapping[str, Any]]]) -> Described:
    """Merge what the files say of one cluster."""
    own = _merged([(path, _own(values)) for path, values in said])
    settings = {each: (value, DEFAULT) for each, value in DEFAULTS.items()} | own
    defaults = {**RESOURCE_DEFAULTS, "gpus": int(own.get("device", ("",))[0] == Device.CUDA)}
    for stage in SUBMITTED:
        asked = _merged(
            (path, _below(section, values))
            for section in ("resources", f"stages.{stage}")
            for path, values in said
        )
        asked = {each: (value, DEFAULT) for each, value in defaults.items()} | asked
        settings |= {f"stages.{stage}.{each}": value for each, value in asked.items()}
    return Described(name=name, file=said[-1][0], settings=settings)


def _merged(layers: Iterable[tuple[Path, Mapping[str, Any]]]) -> dict[str, tuple[Any, str]]:
    files = [ConfigFile(path=path, values=values, extends=()) for path, values in layers]
    return {name: (entry.value, str(entry.file)) for name, entry in merge(files).items()}


def _own(values: Mapping[str, Any]) -> dict[str, Any]:
    sections = ("resources", "stages")
    return {name: each for name, each in values.items() if name.partition(".")[0] not in sections}


def _below(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{section}."
    return {
        name.removeprefix(start): each for name, each in values.items() if name.startswith(start)
    }
