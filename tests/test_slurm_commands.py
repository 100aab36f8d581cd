"""Slurm's commands and the queue that all share, with stand-ins for what the commands say."""

from __future__ import annotations

import stat
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from slurm_stand_in import (
    DOWN,
    FIELD,
    NO_ACCOUNTING,
    NOT_CONTACTED,
    RECORD,
    UP,
    Answer,
    StandInCommands,
    history_of,
    queue_of,
)

from conductor.executors.slurm.commands import (
    HISTORY_DAYS,
    Found,
    NotInstalled,
    Queue,
    Refused,
    Row,
    Slurm,
    Unreachable,
    Unreadable,
)
from gates import FailureClass

SUBMITTED_AT = 1795400441.0
"""2026-11-23T02:20:41 UTC."""
ROW = Row(
    job_id="7",
    name="day0-a",
    state="PENDING",
    reason="Priority",
    nodes="",
    submitted_at=SUBMITTED_AT,
    started_at=None,
    ended_at=None,
    restarts=0,
    exit_code=None,
    cancelled_by=None,
)
RAN = {
    "NodeList": "n1",
    "StartTime": "2026-11-23T02:20:45",
    "EndTime": "2026-11-23T02:20:46",
}
TIMES = {"started_at": SUBMITTED_AT + 4, "ended_at": SUBMITTED_AT + 5}


def row(**changes: Any) -> Row:
    return Row(**{**vars(ROW), **changes})


def slurm(commands: StandInCommands, environ: Mapping[str, str] | None = None) -> Slurm:
    return Slurm(timeout_s=60, environ=environ or {}, run=commands)


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        pytest.param({}, {}, id="waits"),
        pytest.param(
            {"StartTime": "2026-11-23T03:20:41", "EndTime": "2026-11-23T04:20:41"},
            {},
            id="what-slurm-expects-is-no-start",
        ),
        pytest.param(
            {"State": "RUNNING", "Reason": "None", **RAN},
            {"state": "RUNNING", "reason": "None", "nodes": "n1", "started_at": SUBMITTED_AT + 4},
            id="what-slurm-expects-is-no-end",
        ),
        pytest.param(
            {"State": "RUNNING", "Reason": "None", **RAN, "EndTime": "NONE"},
            {"state": "RUNNING", "reason": "None", "nodes": "n1", "started_at": SUBMITTED_AT + 4},
            id="no-time-limit",
        ),
        pytest.param(
            {"State": "COMPLETED", "Reason": "None", **RAN, "NodeList": "n[1-2]"},
            {
                "state": "COMPLETED",
                "reason": "None",
                "nodes": "n[1-2]",
                "exit_code": "0:0",
                **TIMES,
            },
            id="completed",
        ),
        pytest.param(
            {"State": "FAILED", "Reason": "NonZeroExitCode", **RAN, "exit_code": "768"},
            {
                "state": "FAILED",
                "reason": "NonZeroExitCode",
                "nodes": "n1",
                "exit_code": "3:0",
                **TIMES,
            },
            id="exit-status",
        ),
        pytest.param(
            {"State": "OUT_OF_MEMORY", "Reason": "OutOfMemory", **RAN, "exit_code": "253"},
            {
                "state": "OUT_OF_MEMORY",
                "reason": "OutOfMemory",
                "nodes": "n1",
                "exit_code": "0:125",
                **TIMES,
            },
            id="signal-and-core-bit",
        ),
        pytest.param(
            {
                "State": "CANCELLED",
                "Reason": "JobHeldUser",
                "StartTime": "2026-11-23T02:20:46",
                "EndTime": "2026-11-23T02:20:46",
            },
            {
                "state": "CANCELLED",
                "reason": "JobHeldUser",
                "exit_code": "0:0",
                "ended_at": SUBMITTED_AT + 5,
            },
            id="cancelled-before-it-started",
        ),
        pytest.param(
            {"Reason": "BeginTime", "RestartCnt": "2"},
            {"reason": "BeginTime", "restarts": 2},
            id="requeued",
        ),
        pytest.param(
            {"Reason": "ReqNodeNotAvail, UnavailableNodes:n[1-2]"},
            {"reason": "ReqNodeNotAvail, UnavailableNodes:n[1-2]"},
            id="reason-with-details",
        ),
        pytest.param({"Name": "x" * 300}, {"name": "x" * 300}, id="long-name"),
        pytest.param({"Name": "a|b c"}, {"name": "a|b c"}, id="name-with-bar-and-space"),
        pytest.param({"Name": "two\nlines"}, {"name": "two\nlines"}, id="name-of-two-lines"),
        pytest.param({"Name": f"a{FIELD}b"}, {"name": f"a{FIELD}b"}, id="name-with-separator"),
        pytest.param({"Name": ""}, {"name": ""}, id="no-name"),
    ],
)
def test_queue_reads(said: dict[str, str], seen: dict[str, Any]) -> None:
    assert slurm(StandInCommands(squeue=queue_of(said))).queue() == [row(**seen)]


def test_queue_asks_once_for_all_jobs_in_utc_and_without_the_users_own_defaults() -> None:
    commands = StandInCommands(squeue=queue_of({}, {"JobID": "8", "Name": "day0-b"}))
    environ = {
        "SQUEUE_PARTITION": "other",
        "SQUEUE_FORMAT": "%i",
        "SLURM_TIME_FORMAT": "relative",
        "TZ": "Asia/Tokyo",
        "SLURM_CONF": "/etc/slurm.conf",
        "PATH": "/usr/bin",
    }
    assert [each.name for each in slurm(commands, environ).queue()] == ["day0-a", "day0-b"]
    ((command,), (options,)) = commands.commands, commands.options
    assert {"--me", "--all", "--states=all", "--noheader"} < set(command)
    assert options["timeout"] == 60
    assert options["env"] == {
        "TZ": "UTC",
        "SLURM_TIME_FORMAT": "%Y-%m-%dT%H:%M:%S",
        "SLURM_CONF": "/etc/slurm.conf",
        "PATH": "/usr/bin",
    }


def test_an_empty_queue_has_no_rows() -> None:
    assert slurm(StandInCommands()).queue() == []


@pytest.mark.parametrize(
    ("printed", "problem"),
    [
        pytest.param(f"7{FIELD}PENDING{RECORD}\n", "2 fields instead of 10", id="few-fields"),
        pytest.param("7|PENDING|day0-a\n", "without its end", id="another-format"),
        pytest.param(f"{RECORD}\n", "1 fields instead of 10", id="nothing"),
        pytest.param("CLUSTER: other\n", "without its end", id="header-of-a-cluster"),
        pytest.param(
            str(queue_of({}, {})[1])[:-3],  # type: ignore[index]
            "without its end",
            id="cut-off",
        ),
        pytest.param(queue_of({"SubmitTime": "today"}), "no time: 'today'", id="time"),
        pytest.param(queue_of({"RestartCnt": "many"}), "no number: 'many'", id="restarts"),
        pytest.param(queue_of({"exit_code": "-1"}), "no number: '-1'", id="exit-code"),
        pytest.param("x" * 5000, "...", id="long-line-is-shortened"),
    ],
)
def test_queue_refuses_a_line_that_is_not_what_was_asked_for(
    printed: str | Answer, problem: str
) -> None:
    answer = (0, printed, "") if isinstance(printed, str) else printed
    with pytest.raises(Unreadable) as caught:
        slurm(StandInCommands(squeue=answer)).queue()
    assert caught.value.failure_class is FailureClass.SYSTEMIC
    assert caught.value.message.startswith("squeue printed ")
    assert problem in caught.value.message
    assert "squeue --version" in caught.value.message
    assert len(caught.value.message) < 500


ENDED = row(state="COMPLETED", reason="None", nodes="n1", exit_code="0:0", **TIMES)


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        pytest.param({}, {}, id="completed"),
        pytest.param(
            {"State": "CANCELLED by 1000", "NodeList": "None assigned", "Start": "None"},
            {"state": "CANCELLED", "nodes": "", "started_at": None, "cancelled_by": "1000"},
            id="cancelled-by-somebody-before-it-started",
        ),
        pytest.param({"State": "CANCELLED"}, {"state": "CANCELLED"}, id="cancelled-by-nobody"),
        pytest.param(
            {"State": "RUNNING", "End": "Unknown"},
            {"state": "RUNNING", "ended_at": None, "exit_code": None},
            id="runs",
        ),
        pytest.param(
            {
                "State": "PENDING",
                "Start": "Unknown",
                "End": "Unknown",
                "NodeList": "None assigned",
            },
            {
                "state": "PENDING",
                "nodes": "",
                "started_at": None,
                "ended_at": None,
                "exit_code": None,
            },
            id="waits",
        ),
        pytest.param(
            {
                "State": "FAILED",
                "NodeList": "None assigned",
                "ExitCode": "1:0",
                "Start": "2026-11-23T02:20:41",
                "End": "2026-11-23T02:20:46",
            },
            {"state": "FAILED", "nodes": "", "started_at": None, "exit_code": "1:0"},
            id="refused-by-sbatch",
        ),
        pytest.param(
            {"State": "OUT_OF_MEMORY", "ExitCode": "0:125"},
            {"state": "OUT_OF_MEMORY", "exit_code": "0:125"},
            id="out-of-memory",
        ),
    ],
)
def test_history_reads(said: dict[str, str], seen: dict[str, Any]) -> None:
    commands = StandInCommands(sacct=history_of(said))
    assert slurm(commands).history(["day0-a"]) == [row(**{**vars(ENDED), **seen})]


def test_history_counts_the_restarts_of_each_job_and_puts_the_newest_last() -> None:
    printed = history_of(
        {"JobIDRaw": "9", "Submit": "2026-11-23T02:22:51", "State": "COMPLETED"},
        {"JobIDRaw": "9", "Submit": "2026-11-23T02:20:41", "State": "REQUEUED"},
        {"JobIDRaw": "8", "Submit": "2026-11-23T02:21:00", "State": "NODE_FAIL"},
    )
    rows = slurm(StandInCommands(sacct=printed)).history(["day0-a"])
    assert [(each.job_id, each.state, each.restarts) for each in rows] == [
        ("9", "REQUEUED", 0),
        ("8", "NODE_FAIL", 0),
        ("9", "COMPLETED", 1),
    ]


def test_history_asks_for_all_names_in_every_state_and_for_those_that_never_could_run() -> None:
    commands = StandInCommands()
    assert slurm(commands).history(["day0-a", "day0-b"]) == []
    (command,) = commands.commands
    assert {"--name=day0-a,day0-b", "--duplicates", "--endtime=now"} < set(command)
    assert f"--starttime=now-{HISTORY_DAYS}days" in command
    (states,) = (each for each in command if each.startswith("--state="))
    assert {"PENDING", "CANCELLED", "NODE_FAIL", "REQUEUED"} < {*states[8:].split(",")}


@pytest.mark.parametrize(
    "printed",
    [
        pytest.param("7|COMPLETED\n", id="few-fields"),
        pytest.param("\n", id="nothing"),
        pytest.param(history_of({"End": "later"}), id="time"),
    ],
)
def test_history_refuses_a_line_that_is_not_what_was_asked_for(printed: str | Answer) -> None:
    answer = (0, printed, "") if isinstance(printed, str) else printed
    with pytest.raises(Unreadable, match=r"^sacct printed "):
        slurm(StandInCommands(sacct=answer)).history(["day0-a"])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(NO_ACCOUNTING, "Slurm accounting storage is disabled", id="no-accounting"),
        pytest.param((1, "", ""), "sacct ended with exit status 1", id="silent"),
        pytest.param(
            subprocess.TimeoutExpired("sacct", 60), "sacct did not answer within 60 s", id="slow"
        ),
    ],
)
def test_history_cannot_be_had_without_accounting(answer: Answer, message: str) -> None:
    commands = StandInCommands(sacct=answer)
    with pytest.raises(Unreachable, match=message):
        slurm(commands).history(["day0-a"])
    assert not commands.called("scontrol"), "the controller has nothing to do with it"


ASKED = [
    pytest.param("squeue", lambda one: one.queue(), id="queue"),
    pytest.param("scancel", lambda one: one.cancel(["7"]), id="cancel"),
    pytest.param("sbatch", lambda one: one.test_only(["--nodes=1"]), id="test-only"),
]


@pytest.mark.parametrize(("program", "ask"), ASKED)
@pytest.mark.parametrize(
    ("answer", "ping", "raised", "message"),
    [
        pytest.param(NOT_CONTACTED, DOWN, Unreachable, "Unable to contact", id="down"),
        pytest.param(NOT_CONTACTED, UP, Refused, "Unable to contact", id="says-no"),
        pytest.param((1, "", ""), UP, Refused, "ended with exit status 1", id="silent"),
        pytest.param(
            NOT_CONTACTED,
            subprocess.TimeoutExpired("scontrol", 60),
            Unreachable,
            "Unable to contact",
            id="ping-hangs",
        ),
        pytest.param(
            subprocess.TimeoutExpired("it", 60),
            UP,
            Unreachable,
            "not answer within 60 s",
            id="hangs",
        ),
        pytest.param(PermissionError("no"), UP, Unreachable, "could not be run: no", id="unusable"),
        pytest.param(FileNotFoundError("no"), UP, NotInstalled, "is not on PATH", id="missing"),
    ],
)
def test_no_answer_is_told_from_no(
    program: str,
    ask: Any,
    answer: Answer,
    ping: Answer,
    raised: type[Exception],
    message: str,
) -> None:
    with pytest.raises(raised, match=message) as caught:
        ask(slurm(StandInCommands(**{program: answer, "scontrol": ping})))
    assert type(caught.value) is raised


def a_program(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_real_program_that_hangs_is_ended_in_time(tmp_path: Path) -> None:
    a_program(tmp_path, "squeue", "exec /bin/sleep 60")
    started = time.monotonic()
    with pytest.raises(Unreachable, match=r"within 0\.2 s"):
        Slurm(timeout_s=0.2, environ={"PATH": str(tmp_path)}).queue()
    assert time.monotonic() - started < 10


def test_a_real_program_is_looked_for_on_the_path_that_was_given(tmp_path: Path) -> None:
    a_program(tmp_path, "scontrol", "exit 0")
    asked = Slurm(timeout_s=10, environ={"PATH": str(tmp_path)})
    assert asked.answers()
    with pytest.raises(NotInstalled, match=r"^squeue is not on PATH: .*login node"):
        asked.queue()


@pytest.mark.parametrize(
    ("answer", "answers"),
    [
        pytest.param(UP, True, id="up"),
        pytest.param(DOWN, False, id="down"),
        pytest.param(subprocess.TimeoutExpired("scontrol", 60), False, id="hangs"),
    ],
)
def test_answers(answer: Answer, answers: bool) -> None:
    assert slurm(StandInCommands(scontrol=answer)).answers() is answers


def test_whether_it_answers_is_unknown_without_scontrol() -> None:
    with pytest.raises(NotInstalled):
        slurm(StandInCommands(scontrol=FileNotFoundError("scontrol"))).answers()


def test_cancel_names_all_jobs_at_once() -> None:
    commands = StandInCommands(scancel=(0, "", ""))
    slurm(commands).cancel(["7", "8"])
    assert commands.commands == [["scancel", "7", "8"]]


def test_cancel_of_nothing_cancels_nothing() -> None:
    commands = StandInCommands()
    slurm(commands).cancel([])
    assert commands.commands == []


def test_a_trial_submits_nothing_and_returns_what_sbatch_said() -> None:
    said = "sbatch: Job 17 to start at 2026-11-23T06:35:05 using 1 processors\n"
    commands = StandInCommands(sbatch=(0, "", said))
    assert slurm(commands).test_only(["--nodes=1", "job.sh"]) == said.strip()
    assert commands.commands == [["sbatch", "--test-only", "--nodes=1", "job.sh"]]
    assert commands.options[0]["input"], "without a file, sbatch reads the script from its input"


class Clock:
    """A clock that stands until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Looked:
    """A queue over stand-ins, with its clock."""

    def __init__(self, **answers: Any) -> None:
        self.commands, self.clock = StandInCommands(**answers), Clock()
        self.queue = Queue(slurm(self.commands), poll_s=10, ticks=self.clock)

    def find(self, name: str = "day0-a", *, after_s: float = 0, fresh: bool = False) -> Found:
        self.clock.now += after_s
        return self.queue.find(name, fresh=fresh)

    @property
    def calls(self) -> tuple[int, int]:
        """Calls of squeue and of sacct."""
        squeue, sacct = (len(self.commands.called(each)) for each in ("squeue", "sacct"))
        assert self.queue.calls == squeue
        return squeue, sacct


def states(found: Found) -> tuple[str | None, bool, bool]:
    return found.row.state if found.row else None, found.reachable, found.accounted


RUNS = {"State": "RUNNING", "Reason": "None", **RAN}
IS_OVER = {"State": "COMPLETED", "Reason": "None", **RAN}


@pytest.mark.parametrize(
    ("asks", "calls"),
    [
        pytest.param([(0, False)], 1, id="first"),
        pytest.param([(0, False), (0, False), (9.9, False)], 1, id="within-poll"),
        pytest.param([(0, False), (10, False)], 2, id="after-poll"),
        pytest.param([(0, False), (0.1, True)], 2, id="fresh"),
        pytest.param([(0, True), (0, True)], 1, id="fresh-at-once"),
        pytest.param([(0, False), (5, True), (5, False)], 2, id="fresh-serves-the-others"),
        pytest.param([(10, False)] * 50, 50, id="every-poll"),
    ],
)
def test_squeue_is_asked_no_more_often_than_needed(
    asks: list[tuple[float, bool]], calls: int
) -> None:
    looked = Looked(squeue=queue_of(RUNS))
    for after_s, fresh in asks:
        assert states(looked.find(after_s=after_s, fresh=fresh)) == ("RUNNING", True, True)
    assert looked.calls == (calls, 0)


def test_one_look_serves_two_hundred_jobs() -> None:
    names = [f"day0-{number}" for number in range(200)]
    looked = Looked(squeue=queue_of(*({**RUNS, "Name": name} for name in names)))
    for _ in range(10):
        found = [looked.find(name) for name in names * 5]
        assert {states(each) for each in found} == {("RUNNING", True, True)}
        assert [each.row and each.row.name for each in found] == names * 5
        looked.clock.now += 10
    assert looked.calls == (10, 0)


def test_threads_that_ask_at_once_share_one_look() -> None:
    looked = Looked(squeue=queue_of({**RUNS, "Name": "day0-a"}, {**RUNS, "Name": "day0-b"}))
    start, found = threading.Barrier(16), []

    def ask(name: str) -> None:
        start.wait()
        found.append(states(looked.find(name, fresh=True)))

    threads = [threading.Thread(target=ask, args=(f"day0-{'ab'[n % 2]}",)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [("RUNNING", True, True)] * 16
    assert looked.calls == (1, 0)


def test_a_look_that_was_under_way_is_not_fresh() -> None:
    """A job that was submitted while squeue was listing may be missing from its list."""
    looked = Looked()
    listing, submitted = threading.Event(), threading.Event()

    def slow(_command: object) -> Answer:
        if listing.is_set():
            return queue_of(RUNS)
        listing.set()
        submitted.wait(30)
        return queue_of()

    looked.commands.answers["squeue"] = slow
    other = threading.Thread(target=looked.find, args=("day0-b",))
    other.start()
    listing.wait(30)
    looked.clock.now += 1
    threading.Timer(0.1, submitted.set).start()
    assert states(looked.find(fresh=True)) == ("RUNNING", True, True)
    other.join(30)
    assert looked.calls[0] == 2


@pytest.mark.parametrize(
    ("jobs", "counts"),
    [
        pytest.param([{"JobID": "5", **IS_OVER}, {"JobID": "7", **RUNS}], "7", id="not-ended"),
        pytest.param([{"JobID": "7", **RUNS}, {"JobID": "5", **IS_OVER}], "7", id="any-order"),
        pytest.param(
            [
                {"JobID": "8", **IS_OVER, "SubmitTime": "2026-11-23T02:20:42"},
                {"JobID": "5", **IS_OVER},
            ],
            "8",
            id="newest",
        ),
    ],
)
def test_of_jobs_with_one_name_counts(jobs: list[dict[str, str]], counts: str) -> None:
    found = Looked(squeue=queue_of(*jobs)).find()
    assert found.row
    assert found.row.job_id == counts


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"squeue": NOT_CONTACTED, "scontrol": DOWN}, id="down"),
        pytest.param({"squeue": NOT_CONTACTED, "scontrol": UP}, id="came-back-in-between"),
        pytest.param({"squeue": subprocess.TimeoutExpired("squeue", 60)}, id="hangs"),
        pytest.param({"squeue": FileNotFoundError("squeue")}, id="missing"),
    ],
)
def test_while_slurm_is_not_there_what_was_last_seen_is_kept(fault: dict[str, Answer]) -> None:
    looked = Looked(squeue=queue_of(RUNS))
    looked.find()
    looked.commands.answers |= fault
    found = looked.find(after_s=10)
    assert states(found) == ("RUNNING", False, True)
    assert found.trouble
    assert states(looked.find(after_s=5)) == ("RUNNING", False, True)
    assert looked.calls == (2, 0), "a controller that is down is not asked more often"
    looked.commands.answers |= {"squeue": queue_of(IS_OVER), "scontrol": UP}
    found = looked.find(after_s=5)
    assert (states(found), found.trouble) == (("COMPLETED", True, True), "")


def test_a_job_that_was_never_seen_is_unknown_while_slurm_is_not_there() -> None:
    looked = Looked(squeue=NOT_CONTACTED, scontrol=DOWN)
    assert states(looked.find()) == (None, False, True)
    assert looked.calls == (1, 0), "accounting alone cannot say that there is no such job"


def test_jobs_out_of_the_queue_are_looked_up_together_and_remembered() -> None:
    looked = Looked(squeue=queue_of({**RUNS, "Name": "a"}, {**RUNS, "Name": "b"}, RUNS))
    for name in ("a", "b", "day0-a"):
        looked.find(name)
    looked.commands.answers |= {
        "squeue": queue_of(RUNS),
        "sacct": history_of({"JobName": "a"}, {"JobName": "b", "State": "NODE_FAIL"}),
    }
    assert states(looked.find("a", after_s=10)) == ("COMPLETED", True, True)
    assert states(looked.find("b")) == ("NODE_FAIL", True, True)
    assert looked.calls == (2, 1)
    assert "--name=a,b" in looked.commands.called("sacct")[0]
    for _ in range(5):
        assert states(looked.find("a", after_s=100, fresh=True)) == ("COMPLETED", True, True)
    assert looked.calls == (2, 1)
    looked.find(after_s=10)
    assert looked.calls == (3, 1), "what has ended is not asked for again"


def test_what_has_ended_stays_known_while_slurm_is_not_there() -> None:
    looked = Looked(squeue=queue_of(IS_OVER))
    looked.find()
    looked.commands.answers |= {"squeue": NOT_CONTACTED, "scontrol": DOWN}
    assert states(looked.find(after_s=10, fresh=True)) == ("COMPLETED", True, True)


def test_a_requeued_job_is_what_the_queue_says_and_not_what_accounting_says() -> None:
    looked = Looked(squeue=queue_of({}), sacct=history_of({"State": "NODE_FAIL"}))
    assert states(looked.find()) == ("PENDING", True, True)
    assert looked.calls == (1, 0)


def test_accounting_that_lags_does_not_make_a_job_run_again() -> None:
    looked = Looked(sacct=history_of({"State": "RUNNING", "End": "Unknown"}))
    assert states(looked.find()) == (None, True, True)
    looked.commands.answers["sacct"] = history_of({})
    assert states(looked.find(after_s=5)) == (None, True, True)
    assert looked.calls == (1, 1)
    assert states(looked.find(after_s=5)) == ("COMPLETED", True, True)


def test_without_accounting_a_job_out_of_the_queue_is_nowhere() -> None:
    looked = Looked(squeue=queue_of(RUNS), sacct=NO_ACCOUNTING)
    looked.find()
    looked.commands.answers["squeue"] = queue_of()
    found = looked.find(after_s=10)
    assert states(found) == (None, True, False)
    assert "accounting" in found.trouble
    looked.commands.answers["sacct"] = history_of({})
    assert states(looked.find(after_s=10)) == ("COMPLETED", True, True)


def test_the_row_that_sbatch_left_of_a_refused_job_is_an_end() -> None:
    refused = {"State": "FAILED", "Reason": "BadConstraints", "exit_code": "1"}
    found = Looked(squeue=queue_of(refused)).find()
    assert found.row
    assert (found.row.reason, found.row.exit_code, found.row.started_at) == (
        "BadConstraints",
        "0:1",
        None,
    )


def test_a_line_that_cannot_be_read_is_no_answer() -> None:
    looked = Looked(squeue=queue_of(RUNS))
    looked.find()
    looked.commands.answers["squeue"] = (0, "what?\n", "")
    with pytest.raises(Unreadable):
        looked.find(after_s=10)
    assert states(looked.find()) == ("RUNNING", False, True)
