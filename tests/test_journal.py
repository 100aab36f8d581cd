"""The journal of a release: what is on disk after every event, every kill and every full disk."""

import errno
import hashlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor import event_log, files
from conductor.chain import STAGES, Stage, State, next_stage
from conductor.documents import validate
from conductor.event_log import parse, read_log
from conductor.failure import Failure
from conductor.history import History, replay
from conductor.journal import Journal, name_run, read_history, timestamp
from gates import FailureClass

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DIGEST = {"sha256": "ab" * 32, "bytes": 7}


class TickingClock:
    """A clock that goes on by ``step`` at every look: as ``datetime``, or as monotonic seconds."""

    def __init__(self, step: timedelta = timedelta(seconds=1)) -> None:
        self.now = START
        self.step = step

    def __call__(self) -> datetime:
        self.now += self.step
        return self.now

    def ticks(self) -> float:
        return (self() - START).total_seconds()


def create(run_dir: Path) -> Journal:
    clock = TickingClock()
    return Journal.create(run_dir, clock=clock, ticks=clock.ticks, model="demo", recipe="int8")


def reopen(run_dir: Path) -> Journal:
    clock = TickingClock()
    return Journal.open(run_dir, clock=clock, ticks=clock.ticks)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return create(tmp_path / "runs" / "a-run")


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [parse(line) for line in (run_dir / "events.jsonl").read_bytes().splitlines()]


def manifest(run_dir: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run_dir / "manifest.json").read_text())
    return document


def contents(run_dir: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run_dir).as_posix(): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file()
    }


def test_manifest_follows_the_events(journal: Journal) -> None:
    journal.start(Stage.SETUP)
    journal.finish(Stage.SETUP, State.DONE)
    journal.start(Stage.PTQ)
    written = manifest(journal.run_dir)
    assert written["version"] == 2
    assert written["stages"]["setup"]["state"] == "done"
    assert written["stages"]["ptq"]["state"] == "running"
    assert written["stages"]["compare"]["state"] == "pending"
    assert [event["event"] for event in events(journal.run_dir)] == [
        "release_started",
        "stage_started",
        "stage_finished",
        "stage_started",
    ]


def broken_links(run_dir: Path) -> list[int]:
    """Return the numbers of the lines that do not carry the digest of the line before."""
    lines = (run_dir / "events.jsonl").read_bytes().splitlines()
    digests = [None, *(hashlib.sha256(line).hexdigest() for line in lines)]
    assert manifest(run_dir)["head"] == digests[-1]
    assert manifest(run_dir)["events"] == len(lines)
    return [
        number
        for number, (line, digest) in enumerate(zip(lines, digests, strict=False), start=1)
        if json.loads(line)["previous"] != digest
    ]


def test_every_event_carries_the_digest_of_the_one_before(journal: Journal) -> None:
    journal.start(Stage.SETUP)
    again = reopen(journal.run_dir)
    again.resume()
    again.go_on(Stage.SETUP)
    assert broken_links(journal.run_dir) == []
    path = journal.run_dir / "events.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"demo"', b'"Demo"'))
    assert broken_links(journal.run_dir) == [2]


def test_retries_get_directories_of_their_own(journal: Journal) -> None:
    journal.start(Stage.PTQ)
    first = journal.attempt_dir(Stage.PTQ)
    journal.finish(Stage.PTQ, State.FAILED)
    journal.start(Stage.PTQ)
    second = journal.attempt_dir(Stage.PTQ)
    assert first == journal.run_dir / "stages" / "ptq" == journal.stage_dir(Stage.PTQ)
    assert second == first / "attempt-2"
    assert journal.stages[Stage.PTQ].attempts == 2


def test_stage_seconds_cover_all_attempts(journal: Journal) -> None:
    journal.start(Stage.PTQ)
    assert journal.stages[Stage.PTQ].seconds is None
    journal.finish(Stage.PTQ, State.FAILED)
    once = journal.stages[Stage.PTQ].seconds
    journal.start(Stage.PTQ)
    journal.finish(Stage.PTQ, State.DONE)
    assert once is not None
    assert journal.stages[Stage.PTQ].seconds == 2 * once


def test_an_interrupted_stage_goes_on_in_its_directory(journal: Journal) -> None:
    journal.start(Stage.PTQ)
    first = journal.attempt_dir(Stage.PTQ)
    again = reopen(journal.run_dir)
    again.resume()
    again.go_on(Stage.PTQ)
    assert again.attempt_dir(Stage.PTQ) == first
    record = again.stages[Stage.PTQ]
    assert (record.attempts, record.interruptions) == (1, 1)
    assert again.history.sessions == 2


def test_a_stage_taken_back_gets_a_new_directory(journal: Journal) -> None:
    journal.start(Stage.PTQ)
    journal.finish(Stage.PTQ, State.DONE, outputs={"checkpoint/x": DIGEST})
    first = journal.attempt_dir(Stage.PTQ)
    journal.invalidate(Stage.PTQ, "changed: recipe.digest")
    journal.start(Stage.PTQ)
    assert journal.attempt_dir(Stage.PTQ) == first / "attempt-2"


@pytest.mark.parametrize(
    ("prepare", "act", "words"),
    [
        pytest.param(
            lambda j: (j.start(Stage.PTQ), j.finish(Stage.PTQ, State.DONE)),
            lambda j: j.start(Stage.PTQ),
            "ptq is done; invalidate it",
            id="start-a-done-stage",
        ),
        pytest.param(
            lambda j: None,
            lambda j: j.go_on(Stage.PTQ),
            "ptq is pending; only a running stage goes on",
            id="go-on-with-nothing",
        ),
        pytest.param(
            lambda j: None,
            lambda j: j.record("stage_finished", stage="ptq", state="odd"),
            "attempt",
            id="a-wrong-field",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_not_written(
    journal: Journal, prepare: Callable[[Journal], Any], act: Callable[[Journal], Any], words: str
) -> None:
    prepare(journal)
    before = contents(journal.run_dir)
    with pytest.raises(ValueError, match=words):
        act(journal)
    assert contents(journal.run_dir) == before


def test_a_run_directory_is_never_reused(journal: Journal) -> None:
    before = contents(journal.run_dir)
    with pytest.raises(FileExistsError):
        create(journal.run_dir)
    assert contents(journal.run_dir) == before


def test_files_are_there_with_the_first_event(tmp_path: Path) -> None:
    clock = TickingClock()
    journal = Journal.create(
        tmp_path / "r", clock=clock, model="m", recipe="r", files={"config.resolved.yaml": "a: 1\n"}
    )
    assert (journal.run_dir / "config.resolved.yaml").read_text() == "a: 1\n"
    assert events(journal.run_dir)[0]["run_id"] == "r"
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_outcome_is_in_the_manifest(journal: Journal) -> None:
    journal.start(Stage.SETUP, inputs={"config.seed": 1, "model.revision": None})
    journal.finish(Stage.SETUP, State.DONE, outputs={"stages/setup/result.json": DIGEST})
    journal.close(decision="ACCEPT", exit_code=0)
    written = manifest(journal.run_dir)
    validate(written, schema="manifest", where="manifest.json")
    assert written["decision"] == "ACCEPT"
    assert events(journal.run_dir)[-1]["event"] == "release_finished"


def test_facts_are_written_as_they_will_be_read(journal: Journal) -> None:
    inside, outside = journal.run_dir / "stages" / "ptq", Path("/elsewhere")
    journal.record(
        "tool_started",
        tool="quantize.py",
        directory=inside,
        others=(inside, outside),
        seconds=float("nan"),
        failure_class=FailureClass.SYSTEMIC,
        where={Stage.PTQ: inside},
        thing=object,
    )
    last = events(journal.run_dir)[-1]
    assert last["directory"] == "stages/ptq"
    assert last["others"] == ["stages/ptq", "/elsewhere"]
    assert last["seconds"] == "nan"
    assert last["failure_class"] == "SYSTEMIC"
    assert last["where"] == {"ptq": "stages/ptq"}
    assert reopen(journal.run_dir).history == journal.history


def test_a_clock_that_jumps_changes_no_duration(tmp_path: Path) -> None:
    clock, ticks = TickingClock(step=timedelta(days=-400)), TickingClock()
    journal = Journal.create(
        tmp_path / "r", clock=clock, ticks=ticks.ticks, model="demo", recipe="int8"
    )
    journal.start(Stage.SETUP)
    journal.finish(Stage.SETUP, State.DONE)
    assert journal.stages[Stage.SETUP].seconds == 1.0
    assert journal.started_at > START - timedelta(days=401)
    assert reopen(journal.run_dir).history == journal.history


def test_seconds_of_the_release_go_on_between_events(journal: Journal) -> None:
    first = journal.worked_s()
    assert journal.worked_s() > first >= journal.history.worked_s
    again = reopen(journal.run_dir)
    again.resume()
    assert again.worked_s() > journal.history.worked_s


def test_threads_may_record_at_the_same_time(journal: Journal) -> None:
    def work(number: int) -> None:
        for count in range(10):
            journal.record("tool_started", tool=f"{number}", directory=f"{count}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(events(journal.run_dir)) == 41
    assert broken_links(journal.run_dir) == []
    assert not read_log(journal.run_dir).damaged
    assert reopen(journal.run_dir).history == journal.history


def test_opening_a_healthy_run_writes_nothing(journal: Journal) -> None:
    journal.start(Stage.SETUP)
    before = contents(journal.run_dir)
    inode = (journal.run_dir / "manifest.json").stat().st_ino
    opened = reopen(journal.run_dir)
    assert contents(journal.run_dir) == before
    assert (journal.run_dir / "manifest.json").stat().st_ino == inode
    assert opened.history == journal.history
    assert (opened.run_id, opened.model, opened.recipe) == ("a-run", "demo", "int8")
    assert opened.started_at == journal.started_at


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def make_binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def make_list(path: Path) -> None:
    path.write_text("[1, 2]")


def make_deep(path: Path) -> None:
    path.write_text("[" * 200_000)


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"running"', '"done"'))


def make_older(path: Path) -> None:
    path.write_text(json.dumps({"version": 2, "run_id": "a-run", "stages": {}}))


def make_odd_version(path: Path) -> None:
    path.write_text(json.dumps({"version": "3", "stages": []}))


def make_first_version(path: Path) -> None:
    stages = dict.fromkeys(STAGES, "done")
    path.write_text(
        json.dumps({"version": 1, "run_id": "x", "model": "m", "recipe": "r", "stages": stages})
    )


def make_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def make_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_huge(path: Path) -> None:
    os.truncate(path, 2**40)


def make_device_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGES = [
    remove, empty, truncate, make_binary, make_list, make_deep, edit, make_older, make_odd_version,
    make_first_version, make_link, make_dangling, make_pipe, make_huge, make_device_link,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_manifest_that_is_not_right_is_written_again(
    journal: Journal, damage: Callable[[Path], None]
) -> None:
    journal.start(Stage.SETUP)
    path = journal.run_dir / "manifest.json"
    right = path.read_bytes()
    damage(path)
    there = contents(journal.run_dir) if damage is not make_huge else {}
    assert read_history(journal.run_dir) == journal.history
    if there:
        assert contents(journal.run_dir) == there, "reading writes nothing"
    assert reopen(journal.run_dir).history == journal.history
    assert path.read_bytes() == right
    assert not path.is_symlink()


@pytest.mark.parametrize("where", ["manifest.json", "events.jsonl"])
def test_a_newer_version_is_refused_and_left_alone(journal: Journal, where: str) -> None:
    path = journal.run_dir / where
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))
    before = contents(journal.run_dir)
    for read in (reopen, read_history):
        with pytest.raises(Failure) as refused:
            read(journal.run_dir)
        assert refused.value.failure_class is FailureClass.USER_CONFIG_ERROR
        for part in (str(path), "version 3 is newer than version 2", "use the day0 that wrote it"):
            assert part in refused.value.message
    assert contents(journal.run_dir) == before


def test_events_of_a_newer_day0_are_kept(journal: Journal) -> None:
    with (journal.run_dir / "events.jsonl").open("a") as stream:
        stream.write('{"at": "x", "event": "moon_phase", "stage": ["odd"]}\n')
    again = reopen(journal.run_dir)
    again.start(Stage.SETUP)
    assert [event["event"] for event in events(journal.run_dir)][1:] == [
        "moon_phase",
        "stage_started",
    ]


TORN = [
    pytest.param(b'{"at": "2026', id="half"),
    pytest.param(b"{", id="a-byte"),
    pytest.param(b"\0" * 512, id="zeros-after-a-power-cut"),
    pytest.param(b"\xff\xfe", id="binary"),
    pytest.param('{"event": "é"'.encode()[:-2], id="inside-a-character"),
]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_last_line_is_dropped(journal: Journal, torn: bytes) -> None:
    journal.start(Stage.SETUP)
    path = journal.run_dir / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert read_history(journal.run_dir) == journal.history
    assert path.read_bytes() == whole + torn
    assert reopen(journal.run_dir).history == journal.history
    assert path.read_bytes() == whole


@pytest.mark.parametrize("torn", TORN)
def test_appending_never_joins_a_torn_line(journal: Journal, torn: bytes) -> None:
    path = journal.run_dir / "events.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    journal.start(Stage.SETUP)
    assert [event["event"] for event in events(journal.run_dir)] == [
        "release_started",
        "stage_started",
    ]
    assert broken_links(journal.run_dir) == []


def test_a_last_line_that_lost_only_its_newline_counts(journal: Journal) -> None:
    journal.start(Stage.SETUP)
    path = journal.run_dir / "events.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    again = reopen(journal.run_dir)
    assert again.history == journal.history
    again.finish(Stage.SETUP, State.DONE)
    assert len(events(journal.run_dir)) == 3


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"garbage", id="no-json"),
        pytest.param(b"[]", id="no-object"),
        pytest.param(b'{"event": "stage_started", "stage": "nonsense", "attempt": 1}', id="field"),
        pytest.param(b'{"event": "release_reopened", "reason": "r", "elapsed_s": NaN}', id="nan"),
        pytest.param(b'{"event": "release_reopened", "reason": "r", "elapsed_s": 1e999}', id="inf"),
        pytest.param(b'{"event": "x", "n": ' + b"9" * 5000 + b"}", id="endless-number"),
        pytest.param(b'{"at": "2026-01-02T03:04:05.000Z"}', id="nameless"),
        pytest.param(b"\0" * 100, id="zeros"),
    ],
)
def test_a_damaged_line_is_not_guessed_at(journal: Journal, line: bytes) -> None:
    path = journal.run_dir / "events.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    journal.start(Stage.SETUP)
    before = contents(journal.run_dir)
    with pytest.raises(Failure) as refused:
        reopen(journal.run_dir)
    assert refused.value.failure_class is FailureClass.USER_CONFIG_ERROR
    assert f"{path}: line 2 is no event" in refused.value.message
    assert f"day0 repair {journal.run_dir}" in refused.value.message
    seen = read_history(journal.run_dir)
    assert seen.states == journal.states
    assert "line 2 is no event" in seen.unknown[0]
    assert contents(journal.run_dir) == before


@pytest.mark.parametrize("damage", [make_link, make_pipe, make_huge, make_device_link])
def test_a_log_that_is_no_file_is_refused(journal: Journal, damage: Callable[[Path], None]) -> None:
    damage(journal.run_dir / "events.jsonl")
    for read in (reopen, read_history):
        with pytest.raises(Failure, match=r"events\.jsonl: cannot be read"):
            read(journal.run_dir)


def test_blank_lines_and_other_line_ends_are_harmless(journal: Journal) -> None:
    journal.start(Stage.SETUP)
    path = journal.run_dir / "events.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert reopen(journal.run_dir).history == journal.history


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_directory_that_holds_no_release_is_refused(tmp_path: Path, name: str) -> None:
    for read in (reopen, read_history):
        with pytest.raises(Failure, match="no release is recorded here"):
            read(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


class Killed(BaseException):
    """Stands for SIGKILL: no handler may do anything about it."""


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let nothing reach the disk from the ``step``-th write on, and raise there."""
    seen: list[str] = []

    def guard(owner: Any, name: str, *, half: bool = False) -> None:
        real = getattr(owner, name)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == step and half:
                real(args[0], args[1][: len(args[1]) // 2])
            if len(seen) >= step:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    with monkeypatch.context() as patch:
        monkeypatch = patch
        guard(os, "write", half=True)
        guard(os, "fsync")
        guard(os, "ftruncate")
        guard(os, "unlink")
        guard(os, "rename")
        guard(os, "replace")
        yield seen


def run_two_stages(run_dir: Path) -> None:
    journal = create(run_dir)
    journal.start(Stage.SETUP)
    journal.finish(Stage.SETUP, State.DONE, detail="x" * 300)
    journal.start(Stage.PTQ)


def count_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    with killed_at(10**6, monkeypatch) as seen:
        run_two_stages(tmp_path / "counted")
    return len(seen)


def test_a_kill_at_any_write_loses_at_most_the_event_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every kill the events are a beginning of the whole, and opening makes all agree."""
    steps = count_steps(monkeypatch, tmp_path)
    assert steps >= 20
    whole = [event["event"] for event in events(tmp_path / "counted")]
    lengths = set()
    for step in range(1, steps + 1):
        run_dir = tmp_path / f"killed-{step}"
        with pytest.raises(Killed), killed_at(step, monkeypatch):
            run_two_stages(run_dir)
        if not run_dir.exists():
            continue  # it had not begun
        seen = read_history(run_dir)
        journal = reopen(run_dir)
        assert journal.history == seen
        left = [event["event"] for event in events(run_dir)]
        assert left == whole[: len(left)]
        assert manifest(run_dir) == json.loads(json.dumps(journal.history.document()))
        lengths.add(len(left))
        journal.resume()
        stage = next_stage(journal.states)
        assert stage in {Stage.SETUP, Stage.PTQ}
    assert lengths == set(range(1, len(whole) + 1))


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, room: int = 0) -> Iterator[None]:
    """Let no more than ``room`` bytes be written."""
    real = os.write
    left = [room]

    def write(descriptor: int, content: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, content[: left[0]])
        left[0] -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(event_log.os, "write", write)
        yield


@pytest.mark.parametrize("room", [0, 10, 150])
def test_an_event_that_finds_no_room_counts_and_is_written_later(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    journal.start(Stage.PTQ)
    with full_disk(monkeypatch, room), pytest.raises(OSError, match="No space left"):
        journal.finish(Stage.PTQ, State.FAILED, detail="d" * 200)
    assert journal.states[Stage.PTQ] is State.FAILED
    assert len(events(journal.run_dir)) == 2, "no part of it is left"
    journal.start(Stage.CLOSEOUT)
    assert [event["event"] for event in events(journal.run_dir)][1:] == [
        "stage_started",
        "stage_finished",
        "stage_started",
    ]
    assert reopen(journal.run_dir).history == journal.history
    assert broken_links(journal.run_dir) == []


def test_a_manifest_that_finds_no_room_is_behind_and_caught_up(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="quota"):
        patch.setattr(files, "write_bytes", lambda *_: refuse(0))
        journal.start(Stage.SETUP)
    assert manifest(journal.run_dir)["stages"]["setup"]["state"] == "pending"
    assert reopen(journal.run_dir).states[Stage.SETUP] is State.RUNNING
    assert manifest(journal.run_dir)["stages"]["setup"]["state"] == "running"


def test_a_directory_that_cannot_be_written_is_told(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (journal.run_dir / "manifest.json").unlink()

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "write_bytes", refuse)
    with pytest.raises(Failure, match=r"Read-only.*make the directory writable") as told:
        reopen(journal.run_dir)
    assert told.value.failure_class is FailureClass.SYSTEMIC
    assert read_history(journal.run_dir) == journal.history


def test_reading_while_another_process_writes(journal: Journal) -> None:
    done = threading.Event()
    seen: list[int] = []

    def read() -> None:
        while not done.is_set():
            history = read_history(journal.run_dir)
            assert not history.unknown
            seen.append(history.stages[Stage.PTQ].attempts)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(30):
        journal.start(Stage.PTQ)
        journal.finish(Stage.PTQ, State.FAILED)
    done.set()
    reader.join()
    assert seen and seen == sorted(seen)


def test_log_of_prefers_the_worker(journal: Journal) -> None:
    assert journal.log_of(Stage.PTQ) is None
    journal.start(Stage.PTQ)
    assert journal.log_of(Stage.PTQ) is None
    directory = journal.attempt_dir(Stage.PTQ)
    (directory / "server-source.log").touch()
    assert journal.log_of(Stage.PTQ) == directory / "server-source.log"
    (directory / "stdout.log").touch()
    assert journal.log_of(Stage.PTQ) == directory / "stdout.log"


class Driver:
    """A conductor made of nothing but its journal, which anything may happen to."""

    def __init__(self, run_dir: Path, chance: random.Random) -> None:
        self.journal = create(run_dir)
        self.chance = chance
        self.run_dir = run_dir
        self.attempts = dict.fromkeys(STAGES, 0)
        self.completed: set[Stage] = set()
        self.is_over = False

    def check(self) -> None:
        """Hold the state on disk against the one in memory, and both against the invariants."""
        history = self.journal.history
        assert replay(parse(line) for line in read_log(self.run_dir).sound) == history
        for stage, record in history.stages.items():
            assert record.attempts >= self.attempts[stage]
            self.attempts[stage] = record.attempts
        if history.states[Stage.CLOSEOUT] is State.DONE:
            assert next_stage(history.states) is None

    def step(self) -> None:
        """Do what a conductor does next: begin the next stage, or end the running one."""
        journal = self.journal
        stage = next_stage(journal.states)
        if stage is None:
            journal.close(decision="ACCEPT", exit_code=0)
            self.is_over = True
        elif journal.states[stage] is State.PENDING:
            assert stage not in self.completed, "a done stage is never started again"
            if stage is Stage.CLOSEOUT:
                before = [journal.states[each] for each in STAGES[:-1]]
                assert State.FAILED in before or set(before) == {State.DONE}
            journal.start(stage, inputs={"n": self.chance.randint(0, 9)})
        elif self.chance.random() < 0.3:
            journal.record("tool_started", tool="t", directory=journal.attempt_dir(stage))
        else:
            failed = stage is not Stage.CLOSEOUT and self.chance.random() < 0.15
            state = State.FAILED if failed else State.DONE
            journal.finish(stage, state, outputs=None if failed else {"f": DIGEST})
            if not failed:
                self.completed.add(stage)

    def crash(self) -> None:
        """Die between two events, or in the middle of one, or before the manifest's rename."""
        path = self.run_dir / "events.jsonl"
        match self.chance.randrange(3):
            case 0:
                path.write_bytes(path.read_bytes() + b'{"at": "20'[: self.chance.randint(1, 10)])
            case 1:
                (self.run_dir / "manifest.json").unlink()
            case _:
                pass
        before = self.journal.history
        self.journal = reopen(self.run_dir)
        assert self.journal.history == before
        self.journal.resume()
        for stage in STAGES:
            if self.journal.states[stage] is State.RUNNING:
                self.journal.go_on(stage)

    def stop(self) -> None:
        self.journal.record("release_stopped", stage=None)
        self.crash()

    def drift(self) -> None:
        """Accept a change that takes back a stage and all after it."""
        first = self.chance.randrange(len(STAGES))
        change = {"field": "f", "was": 1, "now": 2, "invalidates": list(STAGES[first:])}
        self.journal.record("drift_accepted", changes=[change])
        for stage in STAGES[first:]:
            if self.journal.states[stage] is not State.PENDING:
                self.journal.invalidate(stage, "changed: f")
                self.completed.discard(stage)

    def reopen(self) -> None:
        self.journal.reopen("resumed")
        self.completed.discard(Stage.CLOSEOUT)
        self.is_over = False


@given(
    doings=st.lists(
        st.sampled_from(["step"] * 6 + ["crash", "stop", "drift", "reopen"]), max_size=25
    ),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_whatever_happens_the_release_comes_to_its_end(
    tmp_path_factory: pytest.TempPathFactory, doings: list[str], seed: int
) -> None:
    run_dir = tmp_path_factory.mktemp("random") / "run"
    driver = Driver(run_dir, random.Random(seed))
    for doing in doings:
        if not driver.is_over or doing in {"crash", "reopen"}:
            getattr(driver, doing)()
        driver.check()
    for _ in range(200):
        if driver.is_over and next_stage(driver.journal.states) is None:
            break
        driver.step()
        driver.check()
    assert next_stage(driver.journal.states) is None
    validate(manifest(run_dir), schema="manifest", where="manifest.json")
    assert broken_links(run_dir) == []
    shutil.rmtree(run_dir)


@pytest.mark.parametrize(
    ("model", "recipe", "expected"),
    [
        pytest.param("demo", "int8", "demo-int8-20260102-030405-ab12", id="plain"),
        pytest.param(
            "org/Model_X@main", "nvfp4", "model-x-main-nvfp4-20260102-030405-ab12", id="hub-id"
        ),
        pytest.param("/a/b/", "x/My Recipe.yaml", "b-my-recipe-20260102-030405-ab12", id="paths"),
    ],
)
def test_name_run(model: str, recipe: str, expected: str) -> None:
    assert name_run(model, recipe, START, "ab12") == expected


def test_a_run_may_be_named() -> None:
    named = name_run("demo", "int8", START, "ab12", "Nightly smoke/1")
    assert named == "nightly-smoke-1-20260102-030405-ab12"


def test_timestamps_are_utc() -> None:
    assert timestamp(START) == "2026-01-02T03:04:05.000Z"


def test_an_empty_history_has_every_stage_pending() -> None:
    assert set(History().states.values()) == {State.PENDING}
