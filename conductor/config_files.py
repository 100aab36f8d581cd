"""Configuration files that extend each other, and which of them each value comes from.

``extends:`` names one file or a list, relative to the file that says it. A file is applied after
those that it extends, in their order, and what is applied last holds: mappings merge, lists are
replaced, and null removes what was said before, so that the default holds again.

Invariants:

* A value is known by its dotted name and belongs to the one file that set it last.
* Each file is judged by itself, before it is merged, so that an error names the file at fault and
  the chain of files that led to it.
* Nothing is taken silently: a name that stands twice in a mapping is refused, where YAML would take
  the last.
* What is extended lies under a root: by default the project of the file that is read first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from conductor.documents import read_mapping, read_schema, refuse, validate

ROOTS = "DAY0_CONFIG_ROOTS"
"""Names the directories that files may be extended from, as PATH separates them."""

EXTENDS = "extends"

PURPOSE = "smoke_purpose."
"""Begins the names of the reasons that a smoke run gives; a dotted name follows."""

MOST_FILES_IN_A_CHAIN = 32
"""Deeper than a person can follow; keeps a generated tower of files from exhausting the stack."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One value, and the file that set it."""

    value: Any
    file: Path


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """What one file says itself, by dotted name (None removes), and the files that it extends."""

    path: Path
    values: Mapping[str, Any]
    extends: tuple[ConfigFile, ...]

    def applied(self) -> tuple[ConfigFile, ...]:
        """Return the files in the order in which they are applied; this one is the last.

        Of a file that is reached twice, the last time counts: whatever it says, it says again.
        """
        return tuple(reversed(self._backwards({}).values()))

    def _backwards(self, seen: dict[Path, ConfigFile]) -> dict[Path, ConfigFile]:
        if self.path not in seen:
            seen[self.path] = self
            for extended in reversed(self.extends):
                extended._backwards(seen)
        return seen


def read_config_file(path: Path, *, roots: Sequence[Path] | None = None) -> Mapping[str, Entry]:
    """Read a configuration file with all that it extends; each value by its dotted name.

    Raises:
        Failure: as :func:`open_config_file`.
    """
    return merge(open_config_file(path, roots=roots).applied())


def open_config_file(path: Path, *, roots: Sequence[Path] | None = None) -> ConfigFile:
    """Read a configuration file and the files that it extends.

    Args:
        path: the file; it may lie anywhere, since a person names it.
        roots: directories that hold the files it may extend; without them those in
            ``DAY0_CONFIG_ROOTS``, else :func:`project_of` the file.

    Raises:
        Failure: USER_CONFIG_ERROR naming the chain of files, the field and the remedy: a file is
            missing, no mapping, out of the roots, or extends itself; a name is unknown, or a value
            of the wrong type.
    """
    path = Path(os.path.realpath(path))  # a link extends what lies beside its target
    if roots is None:
        named = os.environ.get(ROOTS, "").split(os.pathsep)
        roots = [Path(each) for each in named if each] or [project_of(path)]
    reader = _Reader(roots=[root.resolve() for root in roots], read={})
    return reader.open(path, ())


def merge(files: Sequence[ConfigFile]) -> dict[str, Entry]:
    """Apply files one after the other."""
    merged: dict[str, Entry] = {}
    for file in files:
        for name, value in file.values.items():
            if value is None:
                _remove(merged, name)
            else:
                merged[name] = Entry(value=value, file=file.path)
    return merged


def project_of(path: Path) -> Path:
    """Return the nearest directory above ``path`` that holds ``configs`` or ``.git``.

    Where there is none, the file's own directory.
    """
    path = path.absolute()
    marks = ("configs", ".git")
    marked = (each for each in path.parents if any((each / mark).exists() for mark in marks))
    return next(marked, path.parent)


@cache
def setting_names() -> tuple[str, ...]:
    """Return the dotted name of every setting, as the schema of configurations has them."""
    properties = read_schema("config")["properties"]
    return tuple(
        name
        for key, kind in properties.items()
        if key not in (EXTENDS, PURPOSE.rstrip("."))
        for name in ([f"{key}.{inner}" for inner in kind.get("properties", ())] or [key])
    )


def nearest_name(name: str) -> str:
    """Return ``; did you mean ...?`` for the setting most like ``name``, or nothing."""
    names = setting_names()
    by_key = {known.rpartition(".")[2]: known for known in names}
    found = get_close_matches(name, names, n=1) or [
        by_key[key] for key in get_close_matches(name.rpartition(".")[2], by_key, n=1)
    ]
    return f"; did you mean {found[0]}?" if found else ""


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads each file once, however often it is extended."""

    roots: Sequence[Path]
    read: dict[Path, ConfigFile]

    def open(self, path: Path, above: tuple[Path, ...]) -> ConfigFile:
        """Read ``path``, which the last of the files ``above`` extends."""
        chain = (*above, path)
        where = f"configuration {' -> '.join(map(str, chain))}"
        if path in above:
            raise refuse(where, "extends: the file extends itself; take it out of one of them")
        if len(chain) > MOST_FILES_IN_A_CHAIN:
            problem = f"extends: more than {MOST_FILES_IN_A_CHAIN} files in a chain; use fewer"
            raise refuse(where, problem)
        if path not in self.read:
            document = _read_one(path, where)
            self.read[path] = ConfigFile(
                path=path,
                values=dict(_flatten(document)),
                extends=tuple(
                    self.open(self._find(text, path, where), chain) for text in _extended(document)
                ),
            )
        return self.read[path]

    def _find(self, text: str, path: Path, where: str) -> Path:
        """Return the file that ``path`` names in its ``extends:``."""
        try:
            found = (path.parent / text).resolve()
            inside = any(found.is_relative_to(root) for root in self.roots)
            there = inside and found.is_file()
        except (OSError, RuntimeError, ValueError) as error:
            raise refuse(where, f"extends: {text!r} is no path ({error}); correct it") from None
        if not inside:
            roots = os.pathsep.join(map(str, self.roots))
            raise refuse(
                f"{where} -> {found}",
                f"extends: {text!r} leads out of {roots}; move the file there, or name all "
                f"directories with configurations in {ROOTS}",
            )
        if not there:
            raise refuse(
                f"{where} -> {found}",
                f"extends: {text!r} is not there; paths are relative to the file that names them",
            )
        return found


def _read_one(path: Path, where: str) -> dict[str, Any]:
    """Read one file and hold it against the schema; what is null is said of no type."""
    document = read_mapping(path, where=where)
    if problems := list(_odd(document)):
        raise refuse(where, "; ".join(problems))
    stated = {
        name: _without_nulls(value) if isinstance(value, Mapping) else value
        for name, value in _without_nulls(document).items()
    }
    validate(stated, schema="config", where=where)
    return document


def _odd(document: Mapping[Any, Any]) -> Iterator[str]:
    """Say which names are no settings, and which values YAML reads as what no setting is."""
    for name in document:
        section, _, key = str(name).partition(".")
        if key and section in _sections():
            yield f"{name}: is no name by itself; write {key} below {section}"
    for name, value in _flatten(document):
        if not _is_known(name):
            yield f"{name}: is no setting{nearest_name(name)}"
        elif isinstance(value, date | bytes | set):
            kind = type(value).__name__
            yield f"{name}: {value!s} is of the type {kind}; put text into quotes"
        elif isinstance(value, float) and not isfinite(value):
            yield f"{name}: {value} is no number that can be counted with; give another"


def _flatten(document: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted names with their values; a section that is no mapping has its own name."""
    for name, value in document.items():
        if name in _sections() and isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        elif name != EXTENDS:
            yield str(name), value


def _is_known(name: str) -> bool:
    return name.removeprefix(PURPOSE) in setting_names() or name in _sections()


def _sections() -> set[str]:
    return {name.partition(".")[0] for name in (*setting_names(), PURPOSE) if "." in name}


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _extended(document: Mapping[str, Any]) -> Sequence[str]:
    extended: str | Sequence[str] | None = document.get(EXTENDS)
    return [extended] if isinstance(extended, str) else extended or []


def _remove(merged: dict[str, Entry], name: str) -> None:
    """Take back a value, or all values of a section."""
    for each in [each for each in merged if each == name or each.startswith(f"{name}.")]:
        del merged[each]
