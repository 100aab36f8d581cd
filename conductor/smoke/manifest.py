"""The scenarios of a manifest: what to run, who is protected by it, and what must appear.

A scenario that asserts nothing positive is refused when the manifest is read, so no scenario is
ever judged by eye.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conductor.digests import document_digest
from conductor.documents import refuse
from conductor.failure import Failure
from conductor.smoke.expectations import Expectation, Unusable, parse_expectation
from conductor.smoke.needs import check_need

MANIFEST = Path("tests/smoke/manifest.toml")
"""Where a repository has its scenarios."""

CANDIDATE = Path(__file__).with_name("candidate.toml")
"""The scenarios that the candidate of every release has to pass; they come with the program."""

PLACEHOLDERS = ("python", "day0", "repo", "tmp", "workspace", "run")
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
PLACEHOLDER = re.compile(r"\{([a-z0-9_]+)\}")
REQUIRED = ("name", "owners", "command", "expect", "timeout_s")
OPTIONAL = ("needs", "after", "quick")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One thing that must work.

    ``command`` is a list of arguments with placeholders. ``after`` names scenarios that must have
    passed before, in the same workspace. ``quick`` ones are run also without ``--full``.
    """

    name: str
    owners: tuple[str, ...]
    command: tuple[str, ...]
    expect: tuple[Expectation, ...]
    needs: tuple[str, ...]
    after: tuple[str, ...]
    timeout_s: float
    quick: bool
    definition: str
    """SHA-256 of its entry in the manifest."""

    @property
    def uses_run(self) -> bool:
        """Tell whether it is about the candidate of a release."""
        files = [each.pattern or "" for each in self.expect]
        return any("{run}" in text for text in (*self.command, *files))


def read_manifest(path: Path) -> tuple[Scenario, ...]:
    """Read the scenarios of a manifest.

    Raises:
        Failure: USER_CONFIG_ERROR when the file cannot be read, or a scenario cannot be used.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); name another with --manifest"
        raise refuse(f"smoke manifest {path}", problem) from None
    except ValueError as error:
        raise refuse(f"smoke manifest {path}", f"is not UTF-8: {error}") from None
    return parse_manifest(text, where=f"smoke manifest {path}", directory=path.parent)


def parse_manifest(text: str, *, where: str, directory: Path) -> tuple[Scenario, ...]:
    """Read the scenarios of a manifest's text; paths in it are relative to ``directory``.

    Raises:
        Failure: USER_CONFIG_ERROR naming ``where``, the scenario, the field and the remedy.
    """
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise refuse(where, f"is not valid TOML: {error}") from None
    entries = document.pop("scenario", None)
    if document:
        raise refuse(where, f"{', '.join(sorted(document))}: not known; it holds [[scenario]] only")
    if not isinstance(entries, list) or not entries:
        raise refuse(where, "must hold at least one [[scenario]]")
    scenarios: list[Scenario] = []
    for number, entry in enumerate(entries, start=1):
        name = entry.get("name") if isinstance(entry, Mapping) else None
        try:
            scenarios.append(_scenario(entry, [each.name for each in scenarios], directory))
        except Unusable as error:
            raise refuse(f"{where}: scenario {name or number}", str(error)) from None
    return tuple(scenarios)


def join_manifests(*manifests: Sequence[Scenario]) -> tuple[Scenario, ...]:
    """Put manifests together.

    Raises:
        Failure: USER_CONFIG_ERROR when two of them have a scenario of the same name.
    """
    together = tuple(each for manifest in manifests for each in manifest)
    names = [each.name for each in together]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise refuse("smoke manifests", f"{', '.join(twice)}: there twice; give one another name")
    return together


def check_name(owner: str) -> None:
    """Refuse what cannot be the name of an owner.

    Raises:
        Failure: USER_CONFIG_ERROR.
    """
    if not _is_name(owner):
        raise refuse(f"owner {owner!r}", "must be lower-case words and digits joined by hyphens")


def _scenario(entry: Any, earlier: Sequence[str], directory: Path) -> Scenario:
    if not isinstance(entry, Mapping):
        raise Unusable("must be a table; begin it with [[scenario]]")
    if missing := [key for key in REQUIRED if key not in entry]:
        raise Unusable(f"{', '.join(missing)}: missing")
    if unknown := sorted(set(entry) - {*REQUIRED, *OPTIONAL}):
        raise Unusable(f"{', '.join(unknown)}: not known; known: {', '.join(REQUIRED + OPTIONAL)}")
    name = entry["name"]
    if not _is_name(name):
        raise Unusable("name: must be lower-case words and digits joined by hyphens")
    if name in earlier:
        raise Unusable("name: another scenario has it; give this one a name of its own")
    owners = _texts(entry, "owners")
    if not owners or not all(map(_is_name, owners)):
        raise Unusable("owners: must name at least one, in lower-case words joined by hyphens")
    return Scenario(
        name=name,
        owners=owners,
        command=_command(entry),
        expect=_expectations(entry["expect"], directory),
        needs=_needs(entry),
        after=_after(entry, earlier),
        timeout_s=_timeout(entry["timeout_s"]),
        quick=_quick(entry.get("quick", False)),
        definition=document_digest(entry),
    )


def _command(entry: Mapping[str, Any]) -> tuple[str, ...]:
    command = _texts(entry, "command")
    if not command or not command[0]:
        raise Unusable("command: must name what to run; there is no shell, so it is a list")
    for text in command:
        for found in PLACEHOLDER.findall(text):
            if found not in PLACEHOLDERS:
                known = ", ".join(f"{{{each}}}" for each in PLACEHOLDERS)
                raise Unusable(f"command: {{{found}}} is not known; known: {known}")
        if "{day0}" in text and text != "{day0}":
            raise Unusable("command: {day0} stands for several arguments; give it alone")
    return command


def _expectations(entries: Any, directory: Path) -> tuple[Expectation, ...]:
    if not isinstance(entries, list):
        raise Unusable("expect: must be a list of tables")
    found = []
    for number, entry in enumerate(entries, start=1):
        try:
            found.append(parse_expectation(entry, directory))
        except Unusable as error:
            raise Unusable(f"expect, number {number}: {error}") from None
    if not any(each.is_positive for each in found):
        raise Unusable(
            "expect: asserts nothing positive; besides the exit code, say what must appear"
        )
    return tuple(found)


def _needs(entry: Mapping[str, Any]) -> tuple[str, ...]:
    needs = _texts(entry, "needs")
    for need in needs:
        try:
            check_need(need)
        except Failure as failure:
            raise Unusable(f"needs: {failure.message}") from None
    return needs


def _after(entry: Mapping[str, Any], earlier: Sequence[str]) -> tuple[str, ...]:
    after = _texts(entry, "after")
    if unknown := [each for each in after if each not in earlier]:
        raise Unusable(f"after: {', '.join(unknown)}: no scenario that stands above this one")
    return after


def _timeout(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise Unusable("timeout_s: must be a number of seconds above 0")
    return float(value)


def _quick(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Unusable("quick: must be true or false")
    return value


def _texts(entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = entry.get(key, [])
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise Unusable(f"{key}: must be a list of texts")
    return tuple(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None
