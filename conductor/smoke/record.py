"""What a set of scenarios came to, on disk, so that others can check it.

A record says on which code the scenarios were run, by digest, how each is defined and how it ended.
It speaks for that code alone: after an edit it is out of date.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from conductor import digests
from conductor.documents import refuse, validate
from conductor.files import read_json, write_json
from gates.smoke import Outcome, evaluate_smoke

VERSION = 1
HOME = Path(".day0")
"""Where, below the repository, records and the output of scenarios lie; git ignores it."""

PACKAGES = ("conductor", "gates")
"""What the code is where there is no git to ask."""


@dataclass(frozen=True, kw_only=True)
class ScenarioRecord:
    """How one scenario ended; ``outputs`` holds a SHA-256 by stream."""

    name: str
    definition: str
    outcome: Outcome
    problems: Sequence[str]
    seconds: float
    outputs: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the scenarios of ``owner`` came to; digests in hexadecimal, ``when`` in UTC.

    ``checkpoint`` is the digest of the candidate that was tried, as of ``checkpoint_digest``.
    """

    owner: str | None
    passed: bool
    detail: str
    when: str
    code: str
    checkpoint: str | None
    scenarios: Sequence[ScenarioRecord]

    def document(self) -> dict[str, Any]:
        """Return the JSON form, described by ``schemas/smoke_record.json``."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def parse(cls, document: Mapping[str, Any], where: str) -> Self:
        """Read what :meth:`document` returned.

        Raises:
            Failure: USER_CONFIG_ERROR when it has another shape, or says that scenarios passed
                which did not.
        """
        validate(document, schema="smoke_record", where=where)
        scenarios = tuple(
            ScenarioRecord(**entry | {"outcome": Outcome(entry["outcome"])})
            for entry in document["scenarios"]
        )
        if document["passed"] and not evaluate_smoke(outcomes(scenarios)).passed:
            raise refuse(where, "passed is true, and its scenarios did not pass; run them again")
        rest = {name: document[name] for name in ("owner", "passed", "detail", "when", "code")}
        return cls(scenarios=scenarios, checkpoint=document["checkpoint"], **rest)


def outcomes(scenarios: Sequence[ScenarioRecord]) -> dict[str, dict[str, Any]]:
    """Return what the smoke gate is asked about: outcome and problems by name."""
    return {
        each.name: {"outcome": each.outcome, "problems": list(each.problems)} for each in scenarios
    }


def record_path(place: Path, owner: str, *, of_run: bool) -> Path:
    """Return where the record of an owner lies in a repository, or in a run directory."""
    directory = place / "smoke" if of_run else place / HOME / "done"
    return directory / f"{owner}.json"


def write_record(path: Path, record: Record) -> None:
    """Write a record, with the directories above it.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record.document())


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        Failure: USER_CONFIG_ERROR when it is no record, or contradicts itself.
    """
    where = f"smoke record {path}"
    try:
        document = read_json(path)
    except ValueError as error:
        raise refuse(where, f"is not JSON ({error}); run `day0 done` again") from None
    return Record.parse(document, where)


def code_digest(root: Path) -> str:
    """Return the SHA-256 over the code below ``root``, with what is not committed.

    In a git work tree: every file that git does not ignore. Elsewhere: our packages, those below
    ``root`` if they are there.

    Raises:
        OSError: a file cannot be read.
    """
    names = _git_files(root)
    if names is None:
        home = root if (root / PACKAGES[0]).is_dir() else Path(__file__).parents[2]
        found = {
            f"{package}/{name}": facts["sha256"]
            for package in PACKAGES
            for name, facts in digests.tree_digests(home / package, _is_bytecode).items()
        }
        return digests.document_digest(found)
    return digests.document_digest({name: _entry_digest(root / name) for name in names})


def _git_files(root: Path) -> list[str] | None:
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(["git", *listing], cwd=root, capture_output=True)  # noqa: S607
    except FileNotFoundError:  # no git on this machine
        return None
    if done.returncode != 0:
        return None
    names = done.stdout.decode("utf-8", "surrogateescape").split("\0")
    return sorted({name for name in names if name})


def _entry_digest(path: Path) -> str | None:
    """Return the digest of a file, or of where a link leads; None where nothing is left of it."""
    if path.is_symlink():
        return hashlib.sha256(bytes(path.readlink())).hexdigest()
    return digests.file_digest(path) if path.is_file() else None


def _is_bytecode(name: str) -> bool:
    return name.rpartition("/")[2] == "__pycache__"
