"""Hold every smoke configuration against the production configuration that it extends.

A smoke run proves something about production only where it is production with fewer samples. What
may differ is the table ``MAY_DIFFER``; anything else is refused, unless the smoke configuration
says in ``smoke_purpose`` why it differs. Invariants:

* The table is code: no configuration can widen it.
* What is counted (questions, repeats, calibration) may only be as in production, or less.
* A production file lies in a directory named ``prod``, in none named ``smoke``, and is no smoke
  run. An entry has one; what else it extends counts as its own, so that a file in between hides
  nothing.
* A reason is for what the file that gives it says or extends. A file of reasons that others extend
  gives none, and a value that is overridden takes its reason along.
* An entry is what resolves to ``smoke: true``, lies in a directory named ``smoke``, or extends the
  common file: turning ``smoke`` off does not turn the check off.
* A check that found nothing to check did not pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conductor.config import DEFAULTS, load_config
from conductor.config_files import PURPOSE, ConfigFile, Entry, merge, open_config_file, project_of
from conductor.failure import Failure
from conductor.redaction import redact_document

COMMON = "common_prodlike.yaml"
"""The file name of what all smoke configurations of a project share."""

MAY_DIFFER: Mapping[str, str] = {
    "smoke": "that it is a smoke run",
    "run_name": "how it is called",
    "workspace": "where it is kept",
    "cluster": "on which cluster it runs",
    "tracking.experiment": "where it is logged",
    "limit": "how many questions are asked",
    "first_batch": "how many questions are asked",
    "max_samples": "how many questions are asked",
    "calibration.samples": "how much text is calibrated on",
    "max_repeats": "how often a question is asked",
    "evaluation.concurrency": "how many requests are out at a time",
    "evaluation.prompts_per_request": "how many prompts a request holds",
}
"""What a smoke run may do otherwise than production, and what that changes."""

COUNTED = frozenset({"limit", "first_batch", "max_samples", "calibration.samples", "max_repeats"})
"""Of these, a smoke run may have less than production, not more; None stands for all there are."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One setting that a smoke run has otherwise than production, and the reason if it needs one.

    ``origin`` is the file that makes the difference, by a value or by removing one.
    """

    name: str
    production: Any
    smoke: Any
    origin: Path
    reason: str | None

    @property
    def allowed(self) -> bool:
        """True where smoke runs may differ, or this one says why it does."""
        return (self.name in MAY_DIFFER and not self.is_more) or self.reason is not None

    @property
    def is_more(self) -> bool:
        """True for more than production has of what is counted."""
        if self.name not in COUNTED or self.production is None:
            return False
        return self.smoke is None or bool(self.smoke > self.production)

    @property
    def words(self) -> str:
        """The setting with both values, and what allows them to differ."""
        values = f"{self.name}: {self.smoke!r}, {self.production!r} in production"
        if self.reason is not None:
            return f"{values}; purpose: {self.reason}"
        return f"{values} ({MAY_DIFFER[self.name]})" if self.allowed else values


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A smoke configuration beside production: what differs, and why it is refused if it is."""

    entry: Path
    production: Path | None
    differences: tuple[Difference, ...]
    problems: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return the comparison as JSON has it."""
        return {
            "entry": str(self.entry),
            "production": self.production and str(self.production),
            "differences": [
                {
                    "name": each.name,
                    "production": each.production,
                    "smoke": each.smoke,
                    "from": str(each.origin),
                    "allowed": each.allowed,
                    "reason": each.reason,
                }
                for each in self.differences
            ],
            "problems": list(self.problems),
        }


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Every smoke configuration that was found, and the files that are no configurations."""

    comparisons: Sequence[Comparison]
    unusable: Sequence[str]

    @property
    def refused(self) -> bool:
        """True when a smoke configuration differs from production where it may not."""
        return any(each.problems for each in self.comparisons)


def check(paths: Iterable[Path]) -> Checked:
    """Compare every smoke configuration in ``paths``, files or directories of them."""
    comparisons, unusable = [], []
    for path in _files(paths):
        try:
            file = open_config_file(path)
            load_config(path, {}, required=())
            if _is_entry(path, file):
                comparisons.append(compare(file))
        except Failure as failure:
            unusable.append(failure.message)
    return Checked(comparisons=comparisons, unusable=unusable)


def compare(entry: ConfigFile) -> Comparison:
    """Compare a smoke configuration with the production file that it extends."""
    smoke = merge(entry.applied())
    found = _production(entry)
    production = found[0] if len(found) == 1 else None
    reasons = _reasons(smoke, production)
    differences = tuple(_differences(entry, smoke, production, reasons)) if production else ()
    return Comparison(
        entry=entry.path,
        production=production.path if production else None,
        differences=differences,
        problems=(
            *_not_an_entry(entry, smoke, found),
            *_common_problems(entry),
            *(_say(each) for each in differences if not each.allowed),
            *(_idle_reasons(differences, reasons) if production else ()),
        ),
    )


def _files(paths: Iterable[Path]) -> Sequence[Path]:
    """Return the configurations among ``paths``; of a directory, all YAML files below it."""
    found: dict[Path, None] = {}
    for path in (Path(os.path.abspath(each)) for each in paths):  # noqa: PTH100 - without ".."
        below = sorted(path.rglob("*")) if path.is_dir() else []
        yaml = (each for each in below if each.suffix.lower() in (".yaml", ".yml"))
        found |= dict.fromkeys(yaml if path.is_dir() else [path])
    return list(found)


def _is_entry(path: Path, file: ConfigFile) -> bool:
    """Tell whether the file at ``path``, maybe a link, is to be held against production."""
    if file.path.name == COMMON:
        return any(_common_problems(file))
    return _is_smoke(file) or path.parent.name == "smoke"


def _is_smoke(file: ConfigFile) -> bool:
    """Tell whether a file says that it is a smoke run, or takes what they have in common."""
    applied = file.applied()
    stated = merge(applied).get("smoke")
    return bool(stated and stated.value) or any(each.path.name == COMMON for each in applied)


def _production(entry: ConfigFile) -> list[ConfigFile]:
    """Return the production files that are extended, less those that they extend themselves."""
    found = [
        each for each in entry.applied() if _lies_in_production(each.path) and not _is_smoke(each)
    ]
    below = {each.path for file in found for each in file.applied()[:-1]}
    return [each for each in found if each.path not in below]


def _lies_in_production(path: Path) -> bool:
    within = path.relative_to(project_of(path)).parts
    return path.parent.name == "prod" and "smoke" not in within


def _reasons(smoke: Mapping[str, Entry], production: ConfigFile | None) -> dict[str, Entry]:
    """Return the reasons of the entry by setting; production cannot give them for it."""
    others = {each.path for each in production.applied()} if production else set()
    return {
        name.removeprefix(PURPOSE): stated
        for name, stated in smoke.items()
        if name.startswith(PURPOSE) and stated.file not in others
    }


def _differences(
    entry: ConfigFile,
    smoke: Mapping[str, Entry],
    production: ConfigFile,
    reasons: Mapping[str, Entry],
) -> Iterable[Difference]:
    intended = merge(production.applied())
    for name, default in DEFAULTS.items():
        there, here = (side[name].value if name in side else default for side in (intended, smoke))
        if there != here:
            origin = _said_last(name, entry)
            reason = reasons.get(name)
            covers = reason is not None and origin in _covered(reason, entry)
            yield Difference(
                name=name,
                production=redact_document(there),
                smoke=here,
                origin=origin,
                reason=reason.value if reason and covers else None,
            )


def _said_last(name: str, entry: ConfigFile) -> Path:
    """Return the file that decides a setting, be it by removing its value or its section."""
    names = {name, name.partition(".")[0]}
    return next(each.path for each in reversed(entry.applied()) if names & each.values.keys())


def _covered(reason: Entry, entry: ConfigFile) -> set[Path]:
    """Return the files for which a reason is good: its own, and those that it extends."""
    (stating,) = (each for each in entry.applied() if each.path == reason.file)
    return {each.path for each in stating.applied()}


def _not_an_entry(
    entry: ConfigFile, smoke: Mapping[str, Entry], production: Sequence[ConfigFile]
) -> Iterable[str]:
    """Say what keeps a file from being a smoke run of one production configuration."""
    if "smoke" not in smoke or not smoke["smoke"].value:
        yield "smoke: is not true; a smoke configuration says that it is one"
    if not production:
        yield "extends: no production file, which lies in a directory named prod; extend one"
    if len(production) > 1:
        named = ", ".join(str(each.path) for each in production)
        yield f"extends: several production files ({named}) make one that nobody runs; extend one"
    if all(each.path.name != COMMON for each in entry.applied()):
        yield f"extends: no {COMMON}, which holds what smoke runs do otherwise; extend it"


def _common_problems(entry: ConfigFile) -> Iterable[str]:
    """Refuse a common file that sets, for all smoke runs, what is to be production's."""
    for common in entry.applied():
        if common.path.name == COMMON:
            for name in merge(common.applied()):
                if name not in MAY_DIFFER:
                    yield (
                        f"{name}: is set by {common.path} for all smoke runs; take it out there, "
                        f"where only these may be: {', '.join(MAY_DIFFER)}"
                    )


def _say(difference: Difference) -> str:
    remedy = "ask no more than production" if difference.is_more else "take it out"
    return (
        f"{difference.name}: {difference.smoke!r} in {difference.origin}, "
        f"{difference.production!r} in production; {remedy}, or give the reason there, or in a "
        f"file that extends it, under `smoke_purpose:` as `{difference.name}: ...`"
    )


def _idle_reasons(differences: Sequence[Difference], reasons: Iterable[str]) -> Iterable[str]:
    """Refuse reasons for what is as in production: they would cover a later difference."""
    differing = {each.name for each in differences}
    for name in reasons:
        if name not in differing:
            yield f"smoke_purpose: {name} is as in production; take the reason out"
