"""A run as one archive, and how one that came from anywhere is opened.

A bundle is a gzipped tar of the sealed files of a run, its events, its manifest and its seal, below
one directory. The same run gives the same bytes: names are in order, and no time, owner or mode is
kept. The candidate's weights are left out unless asked for; ``bundle.json`` names them, and the
seal keeps their digests.

A bundle that is opened is not trusted: it may hold regular files below one directory and nothing
else, and as much as :data:`LARGEST_UNPACKED_BYTES`. Weights are digested as they pass and not kept.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Any

from conductor import event_log
from conductor.evidence.seal import CHECKPOINTS, LEFT_OUT, RUN_MANIFEST, Facts
from conductor.failure import unusable
from conductor.files import read_json, replacing
from conductor.repair import MANIFEST
from conductor.run_lock import holder

VERSION = 1
SUFFIX = ".tar.gz"
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
BESIDE_THE_SEAL = (event_log.NAME, MANIFEST, RUN_MANIFEST)

HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
"""The first bytes of a bundle: gzip without a name and a time; no checksum covers them."""

LENGTH_BYTES = 4
"""The last bytes of gzip say how long its contents are."""

LARGEST_UNPACKED_BYTES = 64 * 2**30
"""Bytes that are kept of a bundle: samples of the largest suites take a few."""
MOST_FILES = 100_000
LONGEST_NAME_BYTES = 255
LARGEST_HEADER_BYTES = 2**20
"""What may stand between the contents of two files; a reader of archives takes it into memory."""
PIECE_BYTES = 2**20
COMPRESSION = 6


class DamagedBundle(Exception):
    """An archive that holds what no bundle holds, or that cannot be read to its end."""

    def __init__(self, member: str, problem: str) -> None:
        """Keep which member it is, empty for the archive itself, and what is wrong with it."""
        super().__init__(f"{member}: {problem}" if member else problem)
        self.member = member
        self.problem = problem


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """A bundle that was opened: where its files are now, and the facts of all that it holds.

    ``passed`` are the weights that were digested and not kept.
    """

    run_dir: Path
    passed: Facts


def bundle(run_dir: Path, output: Path, *, with_checkpoint: bool = False) -> Path:
    """Write a sealed run to the archive ``output``, which appears whole; return its path.

    Raises:
        Failure: USER_CONFIG_ERROR when somebody works on the run, it was never sealed, or
            ``output`` is no place for it.
        OSError: a file cannot be read, or the archive not written.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise unusable(f"--output {output}: name a file in a directory that is there")
    if output.resolve().is_relative_to(run_dir.resolve()):
        raise unusable(
            f"--output {output}: lies in the run, which is sealed; name a place outside of it"
        )
    if (who := holder(run_dir)) is not None:
        raise unusable(f"{run_dir}: process {who.pid} works on it; wait for its end")
    try:
        seal = read_json(run_dir / RUN_MANIFEST)
        run_id, sealed = str(seal["run_id"]), list(seal["files"])
    except FileNotFoundError:
        raise unusable(
            f"{run_dir}: was never sealed, because it has not come to its end; resume it with: "
            f"day0 resume {run_dir}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise unusable(
            f"{run_dir / RUN_MANIFEST}: is no seal; ask: day0 verify {run_dir}"
        ) from None
    left_out = [] if with_checkpoint else sorted(filter(is_weight, sealed))
    names = sorted({*sealed, *BESIDE_THE_SEAL} - set(left_out))
    document = json.dumps({"version": VERSION, "left_out": left_out}, indent=2) + "\n"
    with replacing(output) as stream, _compressed(stream) as archive:
        _add(archive, f"{run_id}/{LEFT_OUT}", BytesIO(document.encode()))
        for name in names:
            with (run_dir / name).open("rb") as content:
                _add(archive, f"{run_id}/{name}", content)
    return output


def is_weight(name: str) -> bool:
    """Tell whether a path below a run directory is a file of the candidate's weights."""
    path = PurePosixPath(name)
    return path.parts[0] in CHECKPOINTS and path.suffix in WEIGHTS


@contextmanager
def unpacked(path: Path) -> Iterator[Unpacked]:
    """Open a bundle in a directory of its own for as long as the block runs.

    Raises:
        Failure: USER_CONFIG_ERROR when it is no gzipped file, or cannot be read.
        DamagedBundle: it is one, and no sound bundle.
        OSError: there is no room for it.
    """
    try:
        with path.open("rb") as raw:
            start = raw.read(len(HEADER))
    except OSError as error:
        raise unusable(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if start[:2] != HEADER[:2]:
        raise unusable(f"{path}: is no bundle; make one with: day0 bundle RUN")
    if start != HEADER:
        raise DamagedBundle("", "its first bytes are not those of a bundle")
    with TemporaryDirectory(prefix="day0-verify-") as directory:
        yield _unpack(path, Path(directory))


@contextmanager
def _compressed(stream: IO[bytes]) -> Iterator[tarfile.TarFile]:
    with (
        gzip.GzipFile("", "wb", COMPRESSION, stream, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        yield archive


def _add(archive: tarfile.TarFile, name: str, content: IO[bytes]) -> None:
    size = content.seek(0, os.SEEK_END)
    content.seek(0)
    archive.addfile(_header(name, size), content)


def _header(name: str, size: int) -> tarfile.TarInfo:
    """Return how a file stands in a bundle: no time, no owner, one mode."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


class _Metered(gzip.GzipFile):
    """A compressed stream that is read up to an allowance, which is given anew for each file."""

    left = LARGEST_HEADER_BYTES

    def allow(self, size: int) -> None:
        """Let ``size`` bytes of content be read, and the header after them."""
        self.left = size + LARGEST_HEADER_BYTES

    def read(self, size: int | None = -1) -> bytes:
        """Read as any stream does; raises DamagedBundle beyond the allowance."""
        piece = super().read(size)
        self.left -= len(piece)
        if self.left < 0:
            raise DamagedBundle("", f"has a header of more than {LARGEST_HEADER_BYTES:,} bytes")
        return piece


def _unpack(path: Path, into: Path) -> Unpacked:
    """Lay down the files of a bundle below ``into``; raises DamagedBundle."""
    passed: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    room = LARGEST_UNPACKED_BYTES
    try:
        with path.open("rb") as raw, _Metered(fileobj=raw) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = _checked(member, seen)
                    stream.allow(member.size)
                    content = archive.extractfile(member)
                    assert content is not None  # of a regular file there is some
                    if is_weight(name.partition("/")[2]):
                        passed[name.partition("/")[2]] = _digested(content)
                        continue
                    room -= member.size
                    if room < 0:
                        raise DamagedBundle(name, f"is beyond {LARGEST_UNPACKED_BYTES:,} bytes")
                    _lay_down(content, into / name)
            _check_end(raw, stream)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedBundle("", f"cannot be read to its end ({error})") from None
    tops = {name.partition("/")[0] for name in seen}
    if len(tops) != 1:
        raise DamagedBundle("", f"holds {len(tops)} directories at its top; a bundle has one")
    return Unpacked(run_dir=into / tops.pop(), passed=passed)


def _check_end(raw: IO[bytes], stream: gzip.GzipFile) -> None:
    """Read what is left, with the checksum behind it, and see that nothing else follows."""
    while piece := stream.read(PIECE_BYTES):
        if piece.strip(b"\0"):
            raise DamagedBundle("", "something follows its last file")
    raw.seek(-LENGTH_BYTES, os.SEEK_END)
    if int.from_bytes(raw.read(), "little") != stream.tell() % 2 ** (8 * LENGTH_BYTES):
        raise DamagedBundle("", "something follows its end")


def _checked(member: tarfile.TarInfo, seen: set[str]) -> str:
    """Return the name of a member that may be laid down; raises DamagedBundle."""
    name, path = member.name, PurePosixPath(member.name)
    if member.type != tarfile.REGTYPE or member.sparse is not None:
        raise DamagedBundle(name, "is no regular file; a bundle holds nothing else")
    if path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or str(path) != name:
        raise DamagedBundle(name, "does not lie below the directory of the bundle")
    if name in seen:
        raise DamagedBundle(name, "is there twice")
    header = {**member.get_info(), "chksum": 0}
    if header != _header(name, member.size).get_info():
        raise DamagedBundle(name, "has a mode, an owner or a time that no bundle keeps")
    if "\0" in name or max(len(os.fsencode(part)) for part in path.parts) > LONGEST_NAME_BYTES:
        raise DamagedBundle(name[:LONGEST_NAME_BYTES], "is no name that a file can have")
    if len(seen) >= MOST_FILES:
        raise DamagedBundle(name, f"is beyond {MOST_FILES:,} files")
    seen.add(name)
    return name


def _digested(content: IO[bytes]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    while piece := content.read(PIECE_BYTES):
        digest.update(piece)
        size += len(piece)
    return {"sha256": digest.hexdigest(), "bytes": size}


def _lay_down(content: IO[bytes], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as stream:
            while piece := content.read(PIECE_BYTES):
                stream.write(piece)
    except (FileExistsError, NotADirectoryError) as error:
        raise DamagedBundle(path.name, f"stands where another file is ({error})") from None
