"""The seal of a release: ``run_manifest.json``, which holds the digest of every file of the run.

The seal is made when everything else is written, and its own digest goes into the chain of events
(``evidence_sealed``). The log, the manifest that follows from it and the lock are not in it: the
log is held by its chain, the manifest by the log.

What adds to a finished run seals again what it touched and nothing else, so that a file which was
changed behind the conductor's back goes on being found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from conductor import event_log
from conductor.digests import file_digest, tree_digest, tree_digests
from conductor.files import read_regular, write_bytes
from conductor.journal import Clock, Journal, read_history
from conductor.repair import MANIFEST, read_object
from conductor.run_lock import HOLDER, LOCK
from conductor.stage_files import CHECKPOINT, REJECTED

RUN_MANIFEST = "run_manifest.json"
VERSION = 1
SEALED = "evidence_sealed"
"""The event that holds the digest of the seal."""

LEFT_OUT = "bundle.json"
"""What a bundle says of the files that it left out; see :mod:`conductor.evidence.bundle`."""

UNSEALED = frozenset({RUN_MANIFEST, event_log.NAME, MANIFEST, LOCK, HOLDER, LEFT_OUT})
TEMPORARY = ".*.tmp"
"""What a conductor that died may have left; the next one removes it."""

CHECKPOINTS = (CHECKPOINT, REJECTED)
"""Where the candidate lies: a rejected one is moved."""

LARGEST_SEAL_BYTES = 256 * 2**20

Facts = Mapping[str, Mapping[str, Any]]
"""Of each file, by its path below the run directory: ``sha256`` and ``bytes``."""


def seal(run_dir: Path, digest: Callable[[Path], str] = file_digest) -> str:
    """Write the seal over every file below ``run_dir``; return its SHA-256, to be recorded.

    Args:
        run_dir: a run that the caller holds, with everything written but its last events.
        digest: what takes the digest of a file.

    Raises:
        OSError: a file cannot be read, or the seal cannot be written.
    """
    content = _render(run_dir, tree_digests(run_dir, is_unsealed, digest))
    write_bytes(run_dir / RUN_MANIFEST, content)
    return _sha256(content)


def reseal(run_dir: Path, changed: Collection[str], *, clock: Clock) -> None:
    """Seal again what was changed in a finished run, and record it; the caller holds the run.

    A run that was never sealed stays so, and a seal that nobody recorded is left as it is. The
    event comes first: where death comes between, the old seal lies there, and this can be done
    again.

    Args:
        run_dir: the run directory.
        changed: files or directories below it that were written, moved or removed; everything else
            keeps the digest that it was sealed with.
        clock: stamps the event.

    Raises:
        Failure: the journal of the run is damaged or cannot be written.
        OSError: a file cannot be read, or the seal cannot be written.
    """
    try:
        content = read_regular(run_dir / RUN_MANIFEST, LARGEST_SEAL_BYTES)
    except FileNotFoundError:
        return
    if _sha256(content) not in _recorded_seals(run_dir):
        return
    sealed: Facts = json.loads(content)["files"]
    files = {name: facts for name, facts in sealed.items() if not _is_below(name, changed)}
    for place in changed:
        files |= _facts_below(run_dir, place)
    content = _render(run_dir, files)
    journal = Journal.open(run_dir, clock=clock)
    journal.record(SEALED, sha256=_sha256(content), changed=sorted(changed))
    write_bytes(run_dir / RUN_MANIFEST, content)


def seals(run_dir: Path, name: str) -> bool:
    """Tell whether the seal of a run names the file ``name``; without a seal there is none."""
    return name in (read_object(run_dir / RUN_MANIFEST).get("files") or ())


def is_unsealed(name: str) -> bool:
    """Tell of a path below a run directory whether the seal passes it over."""
    return name in UNSEALED or fnmatch(name.rpartition("/")[2], TEMPORARY)


def checkpoint_files(files: Facts) -> dict[str, Mapping[str, Any]]:
    """Return the candidate's files among those of a run, by their path in the checkpoint."""
    return {
        name.partition("/")[2]: facts
        for name, facts in files.items()
        if name.partition("/")[0] in CHECKPOINTS
    }


def seal_document(run_id: str, files: Facts) -> dict[str, Any]:
    """Return the seal over ``files`` (schema ``run_manifest.json``)."""
    candidate = checkpoint_files(files)
    return {
        "version": VERSION,
        "run_id": run_id,
        "files": dict(sorted(files.items())),
        "checkpoint": tree_digest(candidate) if candidate else None,
    }


def _recorded_seals(run_dir: Path) -> list[object]:
    """Return the digests of all seals that the events of a run tell of."""
    events = map(event_log.parse, event_log.read_log(run_dir).sound)
    return [event.get("sha256") for event in events if event["event"] == SEALED]


def _render(run_dir: Path, files: Facts) -> bytes:
    document = seal_document(read_history(run_dir).run_id, files)
    return (json.dumps(document, indent=2) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _facts_below(run_dir: Path, place: str) -> dict[str, dict[str, Any]]:
    """Return the facts of what is at ``place`` now: a file, a directory, or nothing."""
    path = run_dir / place
    if path.is_dir():
        return {f"{place}/{name}": facts for name, facts in tree_digests(path).items()}
    if path.is_file():
        return {place: {"sha256": file_digest(path), "bytes": path.stat().st_size}}
    return {}


def _is_below(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(f"{place}/") for place in places)
