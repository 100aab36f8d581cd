"""What a fleet is to release: a YAML file that people write, resolved into single releases.

Every release is a configuration of its own, as ``day0 release`` would resolve it, so nothing can
be asked of a fleet that could not be asked of a release. The whole file is judged before anything
runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

from conductor.config import Config, load_config
from conductor.documents import read_yaml, refuse, validate
from conductor.failure import Failure

NOT_IN_SETTINGS = ("model", "recipe", "suite", "extends")
"""What has a place of its own in the file."""
THE_SAME_FOR_ALL = ("workspace",)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One release that is asked for; ``settings`` are its own, by dotted name.

    Without a ``suite`` it is the one that a release of the model has by itself.
    """

    model: str
    recipe: str
    suite: str | None
    settings: Mapping[str, Any]

    def named(self) -> dict[str, str | None]:
        """What is released, as options of a release."""
        return {"model": self.model, "recipe": self.recipe, "suite": self.suite}

    @property
    def key(self) -> str:
        """The same for what is the same release, in whatever order its settings stand."""
        return json.dumps([self.named(), dict(self.settings)], sort_keys=True)

    def own_words(self) -> str:
        """Its own settings in one line."""
        return ", ".join(f"{name}: {value}" for name, value in self.settings.items())


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A fleet as it is asked for; ``config`` and ``settings`` hold for every release.

    ``at_once`` and ``max_jobs`` are None where the file does not say.
    """

    name: str
    file: Path
    config: Path | None
    settings: Mapping[str, Any]
    at_once: int | None
    max_jobs: int | None
    releases: tuple[Wanted, ...]

    def configure(
        self, wanted: Wanted, workspace: Path, more: Mapping[str, Any] = MappingProxyType({})
    ) -> Config:
        """Return the configuration of one release, with ``more`` settings by dotted name.

        Raises:
            Failure: USER_CONFIG_ERROR when it is not a usable one.
        """
        own = {**self.settings, **wanted.settings, **wanted.named(), **more}
        return load_config(self.config, own | {"workspace": str(workspace)})


def read_fleet_file(file: Path, workspace: Path | None = None) -> tuple[Asked, Path]:
    """Read what a fleet is to release, and return it with the workspace that it is released in.

    ``workspace`` is the one that the command line names. Names that are paths become absolute.

    Raises:
        Failure: USER_CONFIG_ERROR naming the file, the field and the remedy.
    """
    document = read_yaml(file, schema="fleet", what="fleet")
    where = f"fleet {file}"
    if not {"models", "releases"} & document.keys():
        raise refuse(where, "asks for nothing; say `models` and `recipes`, or `releases`, or both")
    settings = _settings(document.get("settings"), f"{where}: settings", NOT_IN_SETTINGS)
    config = file.parent / document["config"] if "config" in document else None
    base = load_config(config, settings | ({"workspace": str(workspace)} if workspace else {}), ())
    asked = Asked(
        name=document.get("name") or _name_of(file),
        file=file.absolute(),
        config=config and config.absolute(),
        settings=settings,
        at_once=document.get("at_once"),
        max_jobs=document.get("max_jobs"),
        releases=(),
    )
    stated_suite = base.origins["suite"][1] != "default"
    rows = list(_rows(document, where, base.suite if stated_suite else None))
    if not rows:
        raise refuse(where, "exclude: leaves nothing of the product; take some of it out")
    releases = _resolve(asked, rows, where, base.workspace)
    return replace(asked, releases=releases), base.workspace


def _name_of(file: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._")[:64] or "fleet"


def _settings(
    stated: Mapping[str, Any] | None, where: str, not_here: Sequence[str]
) -> dict[str, Any]:
    """Check settings, and return them by dotted name; null leaves the default."""
    stated = stated or {}
    misplaced = [name for name in not_here if name in stated]
    if misplaced:
        raise refuse(where, f"{', '.join(misplaced)}: is said elsewhere in the file; take it out")
    validate(stated, schema="config", where=where)
    flat: dict[str, Any] = {}
    for name, value in stated.items():
        inner = value if isinstance(value, Mapping) else None
        flat |= {f"{name}.{key}": each for key, each in inner.items()} if inner else {name: value}
    return flat


def _rows(
    document: Mapping[str, Any], where: str, suite: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the releases, each with where the file says so."""
    excluded = document.get("exclude", [])
    used = set()
    for model, recipe, each in product(
        document.get("models", []), document.get("recipes", []), document.get("suites", [suite])
    ):
        row = {"model": model, "recipe": recipe, "suite": each}
        hits = {n for n, out in enumerate(excluded) if all(row[k] == out[k] for k in out)}
        used |= hits
        if not hits:
            yield f"{model} with {recipe}", row
    for n, out in enumerate(excluded):
        if n not in used:
            words = ", ".join(f"{name}: {value}" for name, value in out.items())
            raise refuse(where, f"exclude: {words} is no part of the product; correct it")
    for number, row in enumerate(document.get("releases", []), start=1):
        yield f"releases.{number}", {"suite": suite, **row}


def _resolve(
    asked: Asked, rows: Sequence[tuple[str, dict[str, Any]]], where: str, workspace: Path
) -> tuple[Wanted, ...]:
    """Resolve every release; report all that is wrong, not the first."""
    problems = []
    places: dict[str, str] = {}
    found = []
    for place, row in rows:
        try:
            wanted = _resolve_one(asked, place, row, workspace)
        except Failure as failure:
            problems.append(f"{place}: {failure.message}")
            continue
        if (first := places.setdefault(wanted.key, place)) != place:
            problems.append(
                f"{place}: is the same release as {first}; take it out, or give it settings of "
                "its own"
            )
        found.append(wanted)
    if problems:
        raise refuse(where, "; ".join(problems))
    return tuple(found)


def _resolve_one(asked: Asked, place: str, row: Mapping[str, Any], workspace: Path) -> Wanted:
    own = _settings(row.get("settings"), "settings", (*NOT_IN_SETTINGS, *THE_SAME_FOR_ALL))
    wanted = Wanted(model=row["model"], recipe=row["recipe"], suite=row["suite"], settings=own)
    config = asked.configure(wanted, workspace)
    return replace(wanted, model=config.model, recipe=config.recipe, suite=config.suite)
