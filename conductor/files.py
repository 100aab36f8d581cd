"""Durable writes: a reader sees the old file or the whole new one, never a part of either.

What is written as text or as a document holds no secret (``conductor.redaction``).
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_native_id
from typing import Any, BinaryIO

from conductor.redaction import known_forms, redact, redact_document, redact_known

_CHUNK_BYTES = 8 * 2**20


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary sibling that is fsynced and renamed.

    Raises:
        OSError: the disk is full or the directory cannot be written; ``path`` is then untouched.
    """
    with replacing(path) as stream:
        stream.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield what becomes ``path`` when the block ends, through a sibling fsynced and renamed.

    Where the block does not come to its end, ``path`` stays as it is and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{get_native_id()}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
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
    """Write ``text`` as UTF-8 without its secrets; see :func:`write_bytes`."""
    write_bytes(path, redact(text).encode())


def write_json(path: Path, document: Any) -> None:
    """Write ``document`` as indented JSON without its secrets; NaN and infinity are refused."""
    write_bytes(path, _dumps(document).encode())


def _dumps(document: Any) -> str:
    """Return ``document`` as redacted JSON: value by value, so that it stays JSON.

    That is done only where the text holds a secret at all, which is quickly seen.
    """
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    if redact(text) == text:
        return text
    return json.dumps(redact_document(document), indent=2, allow_nan=False) + "\n"


def redact_files(directory: Path) -> list[Path]:
    """Replace known secrets in the files that tools wrote below ``directory``; return which.

    Logs are passed over: what is written into them is redacted already, and they may grow. What
    only looks like a secret is left alone: these are the tools' files, and answers of a model.
    A file or directory whose name holds a secret is renamed.

    Raises:
        OSError: a file cannot be read, replaced or renamed.
    """
    forms = [form.encode("utf-8", "surrogateescape") for form in known_forms()]
    found = []
    for where, directories, names in os.walk(directory, topdown=False):
        for name in sorted(names):
            path = Path(where, name)
            if path.suffix != ".log" and path.is_file() and _holds_any(path, forms):
                text = path.read_bytes().decode("utf-8", "surrogateescape")
                write_bytes(path, redact_known(text).encode("utf-8", "surrogateescape"))
                found.append(directory / redact_known(str(path.relative_to(directory))))
        for name in sorted([*directories, *names]):
            if redact_known(name) != name:
                Path(where, name).replace(Path(where, redact_known(name)))
    return sorted(found)


def _holds_any(path: Path, forms: list[bytes]) -> bool:
    """Tell whether a file holds one of ``forms``, reading it in pieces that overlap."""
    overlap = max(map(len, forms), default=1) - 1
    end = b""
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            piece = end + chunk
            if any(form in piece for form in forms):
                return True
            end = piece[max(0, len(piece) - overlap) :]
    return False


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
