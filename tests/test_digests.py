"""Digests: what is read anew, what is remembered, and what a memory may not be believed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conductor import digests
from conductor.digests import Digests, document_digest, file_digest, tree_digests, verify

Counted = Callable[[], int]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Count every file as large, and the files that are read."""
    read: list[Path] = []

    def counting(path: Path) -> str:
        read.append(path)
        return file_digest(path)

    monkeypatch.setattr(digests, "LARGE_BYTES", 1)
    monkeypatch.setattr(digests, "file_digest", counting)
    return read


@pytest.mark.parametrize("content", [b"", b"abc", b"x" * 3_000_000], ids=["empty", "short", "long"])
def test_a_file_has_the_digest_of_its_contents(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "file", content)
    assert file_digest(path) == sha256(content) == Digests(None).file(path)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param({"a": 1, "b": 2}, {"b": 2, "a": 1}, True, id="order"),
        pytest.param({"a": 1}, {"a": True}, False, id="one-and-true"),
        pytest.param({"a": 1}, {"a": 1.0}, False, id="int-and-float"),
        pytest.param({"a": None}, {}, False, id="null-and-absent"),
        pytest.param({"a": "\udcff"}, {"a": "\udcfe"}, False, id="names-that-are-no-text"),
    ],
)
def test_documents(one: object, other: object, same: bool) -> None:
    assert (document_digest(one) == document_digest(other)) is same


def test_a_small_file_is_read_every_time(tmp_path: Path) -> None:
    path = write(tmp_path / "file", b"aaaa")
    memory = Digests(tmp_path / "digests.json")
    assert memory.file(path) == sha256(b"aaaa")
    times = path.stat()
    write(path, b"bbbb")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert memory.file(path) == sha256(b"bbbb")
    assert not (tmp_path / "digests.json").exists()


def test_a_large_file_is_read_once_by_all_releases(tmp_path: Path, reads: list[Path]) -> None:
    path = write(tmp_path / "file", b"weights")
    for _ in range(3):
        memory = Digests(tmp_path / "cache" / "digests.json")
        assert memory.file(path) == memory.file(path) == sha256(b"weights")
    assert reads == [path]


def test_a_large_file_is_read_once_by_threads_that_ask_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "file", b"weights")
    read: list[Path] = []

    def read_slowly(path: Path) -> str:
        read.append(path)
        time.sleep(0.1)
        return sha256(b"weights")

    monkeypatch.setattr(digests, "LARGE_BYTES", 1)
    monkeypatch.setattr(digests, "file_digest", read_slowly)
    memory = Digests(None)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(memory.file, [path] * 4)) == {sha256(b"weights")}
    assert read == [path]


def edit_in_place(path: Path) -> None:
    times = path.stat()
    write(path, b"WEIGHTS")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def put_another_in_its_place(path: Path) -> None:
    times = path.stat()
    other = write(path.with_name("other"), b"WEIGHTS")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [edit_in_place, put_another_in_its_place])
def test_an_edit_of_same_size_and_time_is_seen(
    tmp_path: Path, reads: list[Path], change: Callable[[Path], None]
) -> None:
    path = write(tmp_path / "file", b"weights")
    memory = tmp_path / "digests.json"
    assert Digests(memory).file(path) == sha256(b"weights")
    change(path)
    assert Digests(memory).file(path) == sha256(b"WEIGHTS")
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "file", b"weights")

    def slow(reading: Path) -> str:
        digest = file_digest(reading)
        edit_in_place(reading)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(digests, "file_digest", slow)
        Digests(tmp_path / "digests.json").file(path)
    assert Digests(tmp_path / "digests.json").file(path) == sha256(b"WEIGHTS")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"a": "', id="cut-off"),
        pytest.param(b"[1]", id="list"),
        pytest.param(b"\xff\xfe", id="no-text"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"KNOWN": 1}', id="number"),
        pytest.param(b'{"KNOWN": "abc"}', id="no-digest"),
    ],
)
def test_a_damaged_memory_is_empty(tmp_path: Path, reads: list[Path], damage: bytes) -> None:
    path = write(tmp_path / "file", b"weights")
    memory = tmp_path / "digests.json"
    Digests(memory).file(path)
    (known,) = json.loads(memory.read_text())
    memory.write_bytes(damage.replace(b'"KNOWN"', json.dumps(known).encode()))
    assert Digests(memory).file(path) == sha256(b"weights")
    assert Digests(memory).file(path) == sha256(b"weights")
    assert len(reads) == 2


@pytest.mark.parametrize("place", ["file/digests.json", "directory"])
def test_a_memory_that_cannot_be_written_costs_nothing(
    tmp_path: Path, reads: list[Path], place: str
) -> None:
    path = write(tmp_path / "file", b"weights")
    (tmp_path / "directory").mkdir()
    assert Digests(tmp_path / place).file(path) == sha256(b"weights")


def test_writers_keep_what_others_wrote_up_to_a_bound(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "REMEMBERED", 3)
    memory = tmp_path / "digests.json"
    first, second = Digests(memory), Digests(memory)
    paths = [write(tmp_path / str(number), b"%d" % number) for number in range(4)]
    for number, path in enumerate(paths):
        (first, second)[number % 2].file(path)
    reads.clear()
    for path in reversed(paths):
        Digests(memory).file(path)
    assert reads == [paths[0]]


HUB = "models--org--name"


@pytest.mark.parametrize(
    ("blob", "link", "believed"),
    [
        pytest.param(f"{HUB}/blobs/{'a' * 64}", f"{HUB}/snapshots/c/w", True, id="hub"),
        pytest.param(f"{HUB}/blobs/{'a' * 40}", f"{HUB}/snapshots/c/w", False, id="git-hash"),
        pytest.param(f"{HUB}/blobs/{'a' * 64}", "elsewhere/w", False, id="no-snapshot"),
        pytest.param(f"{HUB}/other/{'a' * 64}", f"{HUB}/snapshots/c/w", False, id="no-blob"),
        pytest.param(f"{HUB}/blobs/{'a' * 64}", f"{HUB}/blobs/{'b' * 64}", False, id="in-blobs"),
    ],
)
def test_the_hub_names_its_large_files(
    tmp_path: Path, reads: list[Path], blob: str, link: str, believed: bool
) -> None:
    path = write(tmp_path / blob, b"weights")
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(path)
    expected = path.name if believed else sha256(b"weights")
    assert Digests(None).file(tmp_path / link) == expected
    assert bool(reads) is not believed


def test_a_small_file_of_the_hub_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / HUB / "blobs" / ("a" * 64), b"config")
    link = tmp_path / HUB / "snapshots" / "c" / "config.json"
    link.parent.mkdir(parents=True)
    link.symlink_to(path)
    assert Digests(None).file(link) == sha256(b"config")


def test_a_tree(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root / "b" / "file", b"b")
    write(root / "a", b"a")
    write(root / "skipped" / "file", b"s")
    write(root / "b" / "skipped.txt", b"s")
    (root / "link").symlink_to(root / "a")
    write(tmp_path / "outside" / "file", b"outside")
    (root / "directory-link").symlink_to(tmp_path / "outside")
    (root / "outer").symlink_to(root)
    (root / "broken").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe")
    found = tree_digests(root, lambda relative: "skipped" in relative)
    assert found == {
        "a": {"sha256": sha256(b"a"), "bytes": 1},
        "b/file": {"sha256": sha256(b"b"), "bytes": 1},
        "directory-link/file": {"sha256": sha256(b"outside"), "bytes": 7},
        "link": {"sha256": sha256(b"a"), "bytes": 1},
    }
    assert Digests(None).tree(root, lambda relative: "skipped" in relative) == found


def test_a_tree_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tree_digests(tmp_path / "nowhere")


def flip(path: Path) -> None:
    edit = bytearray(path.read_bytes())
    edit[0] ^= 1
    path.write_bytes(edit)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(lambda path: None, None, id="same"),
        pytest.param(lambda path: path.unlink(), "a/file is missing", id="missing"),
        pytest.param(lambda path: path.write_bytes(b"ab"), "a/file has 2 bytes", id="cut-off"),
        pytest.param(flip, "a/file has other contents", id="flipped"),
        pytest.param(replace_by_pipe, "a/file is no file", id="pipe"),
        pytest.param(
            lambda path: (path.unlink(), path.mkdir()), "a/file is no file", id="directory"
        ),
    ],
)
@pytest.mark.parametrize("check", [verify, Digests(None).verify], ids=["anew", "remembering"])
def test_verify(
    tmp_path: Path,
    change: Callable[[Path], None],
    problem: str | None,
    check: Callable[..., list[str]],
) -> None:
    path = write(tmp_path / "a" / "file", b"abc")
    write(tmp_path / "b", b"b")
    recorded = tree_digests(tmp_path)
    change(path)
    write(tmp_path / "unrecorded", b"more")
    found = check(tmp_path, recorded)
    assert len(found) == (0 if problem is None else 1)
    assert all(sentence.startswith(problem or "") for sentence in found)


def test_verifying_anew_believes_no_name(tmp_path: Path, reads: list[Path]) -> None:
    blob = write(tmp_path / HUB / "blobs" / ("a" * 64), b"weights")
    root = tmp_path / HUB / "snapshots" / "c"
    root.mkdir(parents=True)
    (root / "w").symlink_to(blob)
    recorded = {"w": {"sha256": blob.name, "bytes": 7}}
    assert Digests(None).verify(root, recorded) == []
    assert verify(root, recorded) == ["w has other contents than recorded"]
