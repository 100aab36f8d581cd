"""What is known of a fleet on disk: its record, with the run id of every release in it.

All run ids are drawn and written before the first release is made, so a release has one run
directory however often the fleet is stopped, killed or asked for again. What became of a release is
told by its own run directory, and nowhere else.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from conductor.config import Config
from conductor.documents import refuse, validate
from conductor.failure import Failure, unusable
from conductor.files import read_json, write_json
from conductor.fleet.asked import Asked, Wanted
from conductor.history import timestamp
from conductor.journal import name_run
from conductor.run_lock import Taken, hold

RECORD = "fleet.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One release of a fleet: its number from 1, what it is, and where it runs."""

    number: int
    wanted: Wanted
    config: Config
    run_dir: Path

    @property
    def run_id(self) -> str:
        """The name of its run."""
        return self.run_dir.name


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A fleet in its directory, ``<workspace>/fleets/<fleet id>``."""

    directory: Path
    asked: Asked
    created: str
    run_ids: tuple[str, ...]

    @property
    def fleet_id(self) -> str:
        """The name of the fleet, which is that of its directory."""
        return self.directory.name

    @property
    def workspace(self) -> Path:
        """The workspace of all its releases."""
        return self.directory.parent.parent

    def pairs(self) -> Iterator[tuple[Wanted, str]]:
        """Return what is asked for, each with its run id."""
        return zip(self.asked.releases, self.run_ids, strict=True)

    def releases(self) -> Iterator[Planned]:
        """Yield every release in its order.

        Raises:
            Failure: USER_CONFIG_ERROR when a configuration file has become unusable.
        """
        for number, (wanted, run_id) in enumerate(self.pairs(), start=1):
            yield Planned(
                number=number,
                wanted=wanted,
                config=self.asked.configure(wanted, self.workspace),
                run_dir=self.workspace / "runs" / run_id,
            )

    def write(self) -> None:
        """Put the record on disk; from here on a release keeps its run id."""
        write_json(self.directory / RECORD, self.document())

    def document(self) -> dict[str, Any]:
        """The record (schema ``fleet_record.json``)."""
        asked = self.asked
        return {
            "version": VERSION,
            "fleet": self.fleet_id,
            "file": str(asked.file),
            "created": self.created,
            "config": asked.config and str(asked.config),
            "settings": dict(asked.settings),
            "at_once": asked.at_once,
            "max_jobs": asked.max_jobs,
            "releases": [
                {"run_id": run_id, **wanted.named(), "settings": dict(wanted.settings)}
                for wanted, run_id in self.pairs()
            ],
        }


def directory_of(fleet_id: str, workspace: Path) -> Path:
    """Return where a fleet is recorded."""
    return workspace / "fleets" / fleet_id


@contextmanager
def hold_fleet(directory: Path) -> Iterator[None]:
    """Keep every other process away from a fleet while the block runs.

    Of one that is refused before it is recorded nothing is left.

    Raises:
        Failure: as ``run_lock.hold``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(directory))
        except Taken as taken:
            raise _at_work(directory, taken) from None
        try:
            yield
        finally:
            if not (directory / RECORD).exists():
                shutil.rmtree(directory, ignore_errors=True)


def _at_work(directory: Path, taken: Taken) -> Failure:
    if (who := taken.who) is None:
        return taken
    return unusable(
        f"{directory}: process {who.pid} on {who.host} works on it since {who.since} "
        f"({who.command}); see how far it is with the same command and --watch, wait for it, or "
        f"stop it with: kill -INT {who.pid}"
    )


def plan_fleet(asked: Asked, workspace: Path, now: datetime) -> Fleet:
    """Return the fleet as it is asked for, with the run ids that its releases have already.

    A release that is new gets one; one that is asked for no more is left out, and its run stays.
    Nothing is written.

    Raises:
        Failure: USER_CONFIG_ERROR when another file asks for a fleet of this name, or its record
            is unusable.
    """
    directory = directory_of(asked.name, workspace)
    known: dict[str, str] = {}
    created = timestamp(now)
    if (directory / RECORD).exists():
        before = read_fleet(directory)
        if before.asked.file != asked.file and before.asked.file.exists():
            raise refuse(
                f"fleet {asked.file}",
                f"name: {asked.name} is that of {before.asked.file} in this workspace; give one of "
                "them another name",
            )
        known = {each.key: run_id for each, run_id in before.pairs()}
        created = before.created
    drawn = secrets.token_hex(2)
    run_ids = [
        known.get(wanted.key) or _name(asked, wanted, workspace, now, f"{drawn}-{number:03}")
        for number, wanted in enumerate(asked.releases, start=1)
    ]
    return Fleet(directory=directory, asked=asked, created=created, run_ids=tuple(run_ids))


def _name(asked: Asked, wanted: Wanted, workspace: Path, now: datetime, suffix: str) -> str:
    config = asked.configure(wanted, workspace)
    return name_run(config.model, config.recipe, now, suffix, config.run_name)


def read_fleet(directory: Path) -> Fleet:
    """Return a fleet as it is recorded.

    Raises:
        Failure: USER_CONFIG_ERROR when the record is missing, damaged or of a newer day0.
    """
    path = directory / RECORD
    try:
        document = read_json(path)
    except FileNotFoundError:
        raise _unknown(directory) from None
    except (OSError, ValueError) as error:
        raise refuse(
            f"fleet record {path}",
            f"cannot be read ({error}); its releases are in {directory.parent.parent / 'runs'}, to "
            "be gone on with one by one: day0 resume RUN",
        ) from None
    if not isinstance(document, Mapping):
        raise refuse(f"fleet record {path}", "must be a mapping of names to values")
    validate(document, schema="fleet_record", where=f"fleet record {path}")
    config = document["config"]
    rows = document["releases"]
    return Fleet(
        directory=directory,
        asked=Asked(
            name=directory.name,
            file=Path(document["file"]),
            config=config and Path(config),
            settings=document["settings"],
            at_once=document["at_once"],
            max_jobs=document["max_jobs"],
            releases=tuple(
                Wanted(**{name: row[name] for name in ("model", "recipe", "suite", "settings")})
                for row in rows
            ),
        ),
        created=document["created"],
        run_ids=tuple(row["run_id"] for row in rows),
    )


def _unknown(directory: Path) -> Exception:
    there = sorted(each.parent.name for each in directory.parent.glob(f"*/{RECORD}"))
    return unusable(
        f"there is no fleet {directory.name!r} in {directory.parent.parent}; "
        + (f"there are: {', '.join(there)}" if there else "that workspace holds none")
    )
