"""Read files that other programs wrote, with one error type for everything unusable.

Nothing here executes, unpickles or trusts a file: JSON only, bounded in size, refused with the
path, the problem and the remedy.
"""

from __future__ import annotations

import gc
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

COPY_AGAIN = "copy or export the checkpoint again"
"""Remedy for a checkpoint whose files cannot be used."""

LARGEST_JSON_BYTES = 64 << 20
"""Largest configuration or results file read whole; parsed, it takes up to ten times as much."""


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep the garbage collector from running, as while a checkpoint's headers are examined.

    Whenever many objects are made it looks through all of them in vain: a million objects are
    kept, none of them in a circle. What circles arise are collected afterwards.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class ProbeError(Exception):
    """A file or directory that holds no usable evidence."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        """Keep where it is, what is wrong with it and what the reader can do about it."""
        super().__init__(f"{path}: {problem}; {remedy}")
        self.path = path
        self.problem = problem
        self.remedy = remedy


def open_regular(path: Path, remedy: str) -> BinaryIO:
    """Open a regular file for reading; a pipe, socket or device could keep its reader for ever.

    Raises:
        ProbeError: it is absent, cannot be opened, or is no regular file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        raise ProbeError(path, "does not exist", remedy) from None
    except IsADirectoryError:
        raise ProbeError(path, "is a directory, not a regular file", remedy) from None
    except OSError as error:
        raise ProbeError(path, f"cannot be read ({error.strerror or error})", remedy) from None
    except ValueError as error:
        raise ProbeError(path, f"is no name of a file ({error})", remedy) from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ProbeError(path, "is not a regular file", remedy)
    return stream


def read_bytes(path: Path, remedy: str, *, largest: int = LARGEST_JSON_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        ProbeError: it is absent, cannot be read, or has more than ``largest`` bytes.
    """
    with open_regular(path, remedy) as stream:
        if os.fstat(stream.fileno()).st_size > largest:
            raise ProbeError(path, f"is larger than {largest} bytes", remedy)
        try:
            content = stream.read(largest + 1)
        except OSError as error:
            raise ProbeError(path, f"cannot be read ({error.strerror})", remedy) from None
    if len(content) > largest:
        raise ProbeError(path, f"is larger than {largest} bytes", remedy)
    return content


def read_text(path: Path, remedy: str) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        ProbeError: it is absent, too large to be what it should be, or not UTF-8.
    """
    try:
        return read_bytes(path, remedy).decode("utf-8")
    except UnicodeDecodeError:
        raise ProbeError(path, "is not UTF-8 text", remedy) from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ProbeError: the file cannot be read, is no JSON, or holds something other than an object.
    """
    return parse_object(read_text(path, remedy), path, remedy)


def parse_object(text: str | bytes, path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in ``text``; ``path`` names it in the error.

    Raises:
        ProbeError: it is no JSON, nested too deep, or something other than an object.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProbeError(path, f"is not valid JSON ({error})", remedy) from None
    if not isinstance(document, dict):
        raise ProbeError(path, f"holds a JSON {type(document).__name__}, not an object", remedy)
    return document
