"""Durable writes: a reader sees the old file or the whole new one, never a part of either."""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from threading import get_native_id
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary sibling that is fsynced and renamed.

    Raises:
        OSError: the disk is full or the directory cannot be written; ``path`` is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{get_native_id()}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make names in ``directory`` durable: a rename may otherwise be lost with the power.

    File systems that cannot do it for a directory are left to their own ways.
    """
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, document: Any) -> None:
    """Write ``document`` as indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON document.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8 JSON, or nested deeper than anybody would.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Read a file that nothing but a file may stand for: no link, no pipe, no device.

    Raises:
        OSError: it cannot be read, is something else, or holds more than ``most_bytes``.
    """
    # Opening a pipe would wait for a writer without O_NONBLOCK.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags), "rb") as stream:  # noqa: PTH123
        facts = os.fstat(stream.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if facts.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"more than {most_bytes:,} bytes", str(path))
        return stream.read()
