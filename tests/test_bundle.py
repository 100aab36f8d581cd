"""Bundles: the same bytes for the same run, and no trust in one that comes from elsewhere."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import shutil
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from conftest import run_day0

from conductor.evidence import bundle as bundles
from conductor.evidence.bundle import HEADER, bundle, is_weight
from conductor.evidence.seal import RUN_MANIFEST
from conductor.evidence.verify import verify
from conductor.failure import Failure
from conductor.run_lock import hold
from gates import FailureClass

WEIGHTS = "checkpoint/model.safetensors"
Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture(scope="session")
def archive(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(finished_run, tmp_path_factory.mktemp("bundle") / "run.tar.gz")


def members(archive: Path) -> Members:
    with tarfile.open(archive) as opened:
        return [(each, opened.extractfile(each).read()) for each in opened]  # type: ignore[union-attr]


def pack(path: Path, content: Members) -> Path:
    """Write an archive as bundles are, of whatever members."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 2, raw, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w|") as packed,
    ):
        for each, data in content:
            packed.addfile(each, io.BytesIO(data))
    return path


def test_the_same_run_gives_the_same_bytes(
    finished_run: Path, archive: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(finished_run, tmp_path / "moved" / "elsewhere"))
    for path in copy.rglob("*"):
        path.touch()
    again = bundle(copy, tmp_path / "again.tar.gz")
    assert again.read_bytes() == archive.read_bytes()
    assert archive.read_bytes().startswith(HEADER)


def test_it_holds_the_run_without_its_weights(finished_run: Path, archive: Path) -> None:
    names = {member.name.partition("/")[2] for member, _ in members(archive)}
    there = {
        path.relative_to(finished_run).as_posix()
        for path in finished_run.rglob("*")
        if path.is_file()
    }
    assert names == there - {"lock", WEIGHTS} | {"bundle.json"}
    findings = verify(archive)
    assert findings.problems == ()
    assert findings.not_checked == (f"{WEIGHTS} is not in the bundle",)


def test_a_checkpoint_beside_it_completes_it(finished_run: Path, archive: Path) -> None:
    findings = verify(archive, finished_run / "checkpoint")
    assert findings.problems == ()
    assert findings.not_checked == ()


def test_weights_travel_along_if_asked(finished_run: Path, tmp_path: Path) -> None:
    archive = bundle(finished_run, tmp_path / "whole.tar.gz", with_checkpoint=True)
    assert verify(archive).not_checked == ()
    content = members(archive)
    changed = [
        (member, data[:-1] + b"\1" if member.name.endswith(WEIGHTS) else data)
        for member, data in content
    ]
    found = verify(pack(tmp_path / "changed.tar.gz", changed)).problems
    assert {problem.file for problem in found} == {WEIGHTS}


def test_a_bundle_that_was_unpacked_by_hand_holds(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (run_dir,) = tmp_path.iterdir()
    assert verify(run_dir).problems == ()


def test_a_byte_changed_in_each_kind_of_file_is_named(archive: Path, tmp_path: Path) -> None:
    content = members(archive)
    kinds = {(member.name.split("/")[1], Path(member.name).suffix): member for member, _ in content}
    assert len(kinds) > 15
    for chosen in kinds.values():
        changed = [
            (member, bytes([data[0] ^ 1]) + data[1:] if member is chosen else data)
            for member, data in content
        ]
        found = verify(pack(tmp_path / "changed.tar.gz", changed)).problems
        assert chosen.name.partition("/")[2] in {problem.file for problem in found}


def test_a_byte_changed_in_the_archive_is_found(archive: Path, tmp_path: Path) -> None:
    sound = archive.read_bytes()
    chance = random.Random(0)
    path = tmp_path / "run.tar.gz"
    size = len(sound)
    for offset in [*range(2, 10), *(chance.randrange(size) for _ in range(8)), size - 1, size - 8]:
        content = bytearray(sound)
        content[offset] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        assert verify(path).problems, offset


@pytest.mark.parametrize("kept", [11, 0.3, 0.999])
def test_an_archive_that_was_cut_off_is_found(archive: Path, tmp_path: Path, kept: float) -> None:
    sound = archive.read_bytes()
    path = tmp_path / "run.tar.gz"
    path.write_bytes(sound[: int(kept if kept > 1 else kept * len(sound))])
    (problem,) = verify(path).problems
    assert problem.file == "run.tar.gz"


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **more: Any
) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for field, value in {"type": kind, "linkname": link, "mode": 0o644, **more}.items():
        setattr(made, field, value)
    return made


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(b"\0", id="a-zero"),
        pytest.param(b"\0" * 512, id="zeros"),
        pytest.param(b"junk", id="junk"),
        pytest.param(gzip.compress(b"", mtime=0), id="nothing-compressed"),
        pytest.param(gzip.compress(b"more", mtime=0), id="something-compressed"),
    ],
)
def test_what_follows_the_end_of_an_archive_is_found(
    archive: Path, tmp_path: Path, more: bytes
) -> None:
    path = tmp_path / "run.tar.gz"
    path.write_bytes(archive.read_bytes() + more)
    (problem,) = verify(path).problems
    assert problem.file == "run.tar.gz"


def test_what_follows_the_last_file_is_found(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.tar.gz"
    content = gzip.decompress(archive.read_bytes()) + b"x" * 20_000
    with path.open("wb") as stream, gzip.GzipFile("", "wb", 6, stream, mtime=0) as packed:
        packed.write(content)
    (problem,) = verify(path).problems
    assert problem.problem == "something follows its last file"


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_without_end_is_not_taken_into_memory(tmp_path: Path, kind: bytes) -> None:
    size = 50 * 2**20
    path = tmp_path / "run.tar.gz"
    with path.open("wb") as stream, gzip.GzipFile("", "wb", 6, stream, mtime=0) as packed:
        packed.write(member("x", kind, size=size).tobuf(tarfile.USTAR_FORMAT))
        packed.write(bytes(size))
    tracemalloc.start()
    (problem,) = verify(path).problems
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "has a header of more than" in problem.problem
    assert most < 20 * 2**20


def test_an_archive_of_something_else_is_refused_by_its_own_name(tmp_path: Path) -> None:
    path = pack(tmp_path / "run.tar.gz", [(member("run/x"), b"x")])
    with pytest.raises(Failure, match=re.escape(f"{path}: no release is recorded here")):
        verify(path)


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        pytest.param(member("../outside"), "does not lie below", id="above"),
        pytest.param(member("run/../../outside"), "does not lie below", id="above-within"),
        pytest.param(member("/etc/outside"), "does not lie below", id="absolute"),
        pytest.param(member("run/./outside"), "does not lie below", id="dots"),
        pytest.param(member("outside"), "does not lie below", id="at-the-top"),
        pytest.param(member("run/a", tarfile.SYMTYPE, "/etc/passwd"), "no regular", id="link"),
        pytest.param(member("run/a", tarfile.LNKTYPE, "run/b"), "no regular", id="hard-link"),
        pytest.param(member("run/a", tarfile.FIFOTYPE), "no regular", id="pipe"),
        pytest.param(member("run/a", tarfile.CHRTYPE), "no regular", id="device"),
        pytest.param(member("run/a", tarfile.DIRTYPE), "no regular", id="directory"),
        pytest.param(member("run/" + "n" * 300), "no name that a file", id="long-name"),
        pytest.param(member("run/bundle.json"), "is there twice", id="twice"),
        pytest.param(member("run/bundle.json/x"), "stands where another", id="below-a-file"),
        pytest.param(member("other/x"), "2 directories at its top", id="two-tops"),
        pytest.param(member("run/a", mode=0o777), "has a mode, an owner", id="mode"),
        pytest.param(member("run/a", mtime=1), "has a mode, an owner or a time", id="time"),
        pytest.param(member("run/a", uname="me"), "has a mode, an owner", id="owner"),
    ],
)
def test_what_no_bundle_holds_is_refused_and_lands_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: tarfile.TarInfo, words: str
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    path = pack(tmp_path / "run.tar.gz", [(member("run/bundle.json"), b""), (hostile, b"")])
    (problem,) = verify(path).problems
    assert words in problem.problem
    assert set(tmp_path.rglob("*")) == {temporary, path}


def test_a_bundle_is_kept_up_to_a_bound(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "LARGEST_UNPACKED_BYTES", 100_000)
    (problem,) = verify(archive).problems
    assert "is beyond 100,000 bytes" in problem.problem


def test_a_run_that_has_not_ended_has_no_bundle(finished_run: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(finished_run, tmp_path / "run"))
    with hold(run_dir), pytest.raises(Failure, match="works on it"):
        bundle(run_dir, tmp_path / "a.tar.gz")
    (run_dir / RUN_MANIFEST).unlink()
    with pytest.raises(Failure, match="never sealed"):
        bundle(run_dir, tmp_path / "a.tar.gz")
    (run_dir / RUN_MANIFEST).write_text("[]")
    with pytest.raises(Failure, match="is no seal"):
        bundle(run_dir, tmp_path / "a.tar.gz")


@pytest.mark.parametrize("place", [".", "new/run.tar.gz", "run/run.tar.gz", "run/stages/a.tar.gz"])
def test_an_archive_is_not_written_where_it_does_not_belong(
    finished_run: Path, tmp_path: Path, place: str
) -> None:
    run_dir = tmp_path / "run"
    run_dir.symlink_to(finished_run)
    with pytest.raises(Failure, match="--output ") as refused:
        bundle(run_dir, tmp_path / place)
    assert refused.value.failure_class is FailureClass.USER_CONFIG_ERROR
    assert list(tmp_path.iterdir()) == [run_dir]
    assert verify(run_dir).problems == ()


def test_an_archive_appears_whole_or_not_at_all(finished_run: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run_dir / "report.md").unlink()
    with pytest.raises(FileNotFoundError):
        bundle(run_dir, tmp_path / "a.tar.gz")
    assert list(tmp_path.iterdir()) == [run_dir]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("checkpoint/model.safetensors", True),
        ("checkpoint/part/model-1.gguf", True),
        ("REJECTED-checkpoint/pytorch_model.bin", True),
        ("checkpoint/config.json", False),
        ("stages/ptq/model.safetensors", False),
        ("checkpoint.bin", False),
    ],
)
def test_is_weight(name: str, expected: bool) -> None:
    assert is_weight(name) is expected


def test_names_in_an_archive_do_not_steer_the_terminal(tmp_path: Path) -> None:
    hostile = member("run/\x1b[2J\nrun.tar.gz: everything holds", tarfile.FIFOTYPE)
    path = pack(tmp_path / "run.tar.gz", [(member("run/bundle.json"), b""), (hostile, b"")])
    told = run_day0("verify", str(path))
    assert told.exit_code == 1
    assert "\x1b" not in told.stdout
    assert len(told.stdout.splitlines()) == 2


def test_the_commands(finished_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.tar.gz"
    made = run_day0("bundle", str(finished_run), "--output", str(path))
    assert made.exit_code == 0
    assert f"{path}: {path.stat().st_size:,} bytes, SHA-256 " in made.stdout
    checked = run_day0("verify", str(path), "--json")
    assert checked.exit_code == 0
    assert json.loads(checked.stdout)["holds"]
    path.write_bytes(path.read_bytes()[:-4])
    assert run_day0("verify", str(path)).exit_code == 1
    path.write_text("hello")
    refused = run_day0("verify", str(path))
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "is no bundle" in refused.stderr
