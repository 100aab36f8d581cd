"""What a file contains, as a SHA-256: how a release knows that its inputs and outputs are the same.

Invariants:

* A small file is read every time; only a file above :data:`LARGE_BYTES` is remembered, and only
  under everything that the file system says of its identity. An edit that keeps size and
  modification time still moves the time of change, which no call can set back.
* A link into a Hub cache is what its name says: the Hub names large files by their SHA-256.
* The memory is a convenience: damaged, unwritable or contended, it costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from conductor import files

LARGE_BYTES = 64 * 2**20
"""From this size on a file is remembered: reading many of them takes longer than a release should
wait. Reading one takes longer than a tick of the file system's clock, so that no later edit can
have the time of change that was remembered."""
REMEMBERED = 4096
"""Files that the memory holds: the shards of some hundred large models, in about 1 MB."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of the contents of ``path`` in hexadecimal, reading it in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def document_digest(document: Any) -> str:
    """Return the SHA-256 of a JSON document, whatever the order of its keys.

    Raises:
        TypeError, ValueError: it is no JSON.
    """
    text = json.dumps(document, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


Exclude = Callable[[str], bool]
"""Tells of a path relative to some root whether to pass it over, with all that is below it."""

Recorded = Mapping[str, Mapping[str, Any]]
"""Of each file, by its path relative to some root: ``sha256`` and ``bytes``."""


def nothing(relative: str) -> bool:
    """Pass nothing over."""
    return False


class Digests:
    """Digests of files, with those of large files remembered between releases.

    Threads may share one: a large file that several ask for at the same time is read once.
    """

    def __init__(self, memory: Path | None) -> None:
        """Remember in the file ``memory``, or, with None, for as long as this object lives."""
        self._memory = memory
        self._known = _recall(memory)
        self._lock = Lock()
        self._reading: dict[str, Lock] = {}

    def file(self, path: Path) -> str:
        """Return the SHA-256 of the contents of ``path``.

        Raises:
            OSError: the file cannot be read.
        """
        real = path.resolve(strict=True)
        facts = real.stat()
        if facts.st_size < LARGE_BYTES:
            return file_digest(real)
        if _is_in_hub_cache(path, real):
            return real.name
        identity = _identity(real, facts)
        with self._lock:
            reading = self._reading.setdefault(identity, Lock())
        with reading:
            if (known := self._known.get(identity)) is not None:
                return known
            digest = file_digest(real)
            if _identity(real, real.stat()) == identity:  # else it changed while it was read
                with self._lock:
                    self._remember(identity, digest)
        return digest

    def tree(self, root: Path, exclude: Exclude = nothing) -> dict[str, dict[str, Any]]:
        """Do what :func:`tree_digests` does, with what is remembered."""
        return tree_digests(root, exclude, self.file)

    def verify(self, root: Path, recorded: Recorded) -> list[str]:
        """Do what :func:`verify` does, with what is remembered."""
        return verify(root, recorded, self.file)

    def _remember(self, identity: str, digest: str) -> None:
        self._known[identity] = digest
        if self._memory is None:
            return
        # What another release wrote since is kept; the newest come last.
        together = {**_recall(self._memory), identity: digest}
        newest = dict(list(together.items())[-REMEMBERED:])
        with suppress(OSError):
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(self._memory, newest)


def tree_digests(
    root: Path,
    exclude: Exclude = nothing,
    digest: Callable[[Path], str] = file_digest,
) -> dict[str, dict[str, Any]]:
    """Return ``{relative path: {"sha256", "bytes"}}`` of every file below ``root``.

    Links are followed; a directory that was seen under another name is not gone into again.

    Args:
        root: a directory.
        exclude: asked about each file and directory.
        digest: what takes the digest of a file.

    Raises:
        OSError: a file or directory cannot be read.
    """
    found = {}
    seen = set()
    for directory, names, file_names in os.walk(root, onerror=_raise, followlinks=True):
        here = Path(directory)
        if (real := here.resolve()) in seen:
            names.clear()
            continue
        seen.add(real)
        relative = here.relative_to(root)
        names[:] = sorted(name for name in names if not exclude((relative / name).as_posix()))
        for name in file_names:
            path, inside = here / name, (relative / name).as_posix()
            if path.is_file() and not exclude(inside):
                found[inside] = {"sha256": digest(path), "bytes": path.stat().st_size}
    return dict(sorted(found.items()))


def tree_digest(recorded: Recorded) -> str:
    """Return the SHA-256 of a tree: of the names of its files and what each contains."""
    return document_digest({name: facts["sha256"] for name, facts in recorded.items()})


def checkpoint_digest(directory: Path) -> str:
    """Return the digest by which a checkpoint is known: of every file below ``directory``.

    Raises:
        OSError: a file or directory cannot be read.
    """
    return tree_digest(tree_digests(directory))


def verify(
    root: Path, recorded: Recorded, digest: Callable[[Path], str] = file_digest
) -> list[str]:
    """Return one sentence for each file below ``root`` that is not as ``recorded``.

    It is missing, has another size, or other contents; a file too many is nobody's business.
    ``digest`` takes the digest of a file.
    """
    problems = []
    for relative, facts in recorded.items():
        path = root / relative
        try:
            size = path.stat().st_size
            if not path.is_file():  # a pipe would be waited for
                problems.append(f"{relative} is no file")
            elif size != facts["bytes"]:
                problems.append(f"{relative} has {size} bytes, recorded were {facts['bytes']}")
            elif digest(path) != facts["sha256"]:
                problems.append(f"{relative} has other contents than recorded")
        except FileNotFoundError:
            problems.append(f"{relative} is missing")
        except OSError as error:
            problems.append(f"{relative} cannot be read ({error.strerror or error})")
    return problems


def _is_in_hub_cache(path: Path, real: Path) -> bool:
    """Tell whether ``path`` is a link of a Hub snapshot to a blob that is named by its SHA-256.

    Blobs that are not in large-file storage are named by a git hash, which has 40 digits.
    """
    return (
        path.is_symlink()
        and real.parent.name == "blobs"
        and _SHA256.fullmatch(real.name) is not None
        and real.parent.with_name("snapshots") in path.parent.resolve().parents
    )


def _identity(real: Path, facts: os.stat_result) -> str:
    numbers = facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
    return json.dumps([str(real), *numbers])


def _recall(memory: Path | None) -> dict[str, str]:
    """Return what ``memory`` holds; nothing when it is missing, damaged or no memory of ours."""
    if memory is None:
        return {}
    try:
        document = files.read_json(memory)
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {
        identity: digest
        for identity, digest in document.items()
        if isinstance(digest, str) and _SHA256.fullmatch(digest)
    }


def _raise(error: OSError) -> None:
    raise error
