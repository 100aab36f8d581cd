"""Bringing a task to its end by jobs: submitted once, found again, judged by how they ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from conductor.cluster.description import SUBMITTED, Cluster, Resources
from conductor.compatibility import Device
from conductor.executors.slurm import following
from conductor.executors.slurm.commands import Found, Refused, Row
from conductor.executors.slurm.folders import JobFolder, Place
from conductor.executors.slurm.following import Connection, Errand, carry_out
from conductor.executors.slurm.submission import NotSubmitted
from conductor.failure import Failure, Stalled, Stopped
from gates import FailureClass

OK = {"status": "ok", "answer": 42, "notes": [], "at": 30.0}
RESOURCES = Resources(
    partition=None,
    account=None,
    qos=None,
    constraint=None,
    nodes=1,
    gpus=2,
    cpus=None,
    memory_gib=None,
    time_minutes=10,
    container_image=None,
    container_mounts=(),
    modules=(),
    setup=(),
    extra={},
)
CLUSTER = Cluster(
    name="here",
    file=Path("clusters.yaml"),
    device=Device.CPU,
    accelerator=None,
    python=Path("/python"),
    environments=None,
    interpreters={},
    resources=dict.fromkeys(SUBMITTED, RESOURCES),
    max_jobs=None,
    continuations=2,
    poll_s=5.0,
    command_timeout_s=1.0,
)


def row(name: str, state: str, reason: str = "", **facts: Any) -> Row:
    stated: dict[str, Any] = {
        "job_id": "7",
        "name": name,
        "state": state,
        "reason": reason,
        "nodes": "n1",
        "submitted_at": 10.0,
        "started_at": None,
        "ended_at": None,
        "restarts": 0,
        "exit_code": None,
        "cancelled_by": None,
    }
    return Row(**stated | facts)


@dataclass
class StandInSlurm:
    """In place of a cluster: each submitted job goes through ``plan``, one state at a look.

    A plan's step is a state, a state with a reason, a mapping (the outcome that the job writes at
    that moment) or None: nobody answers. ``jobs`` are known from the beginning.
    """

    plans: list[list[Any]] = field(default_factory=list)
    jobs: dict[str, list[Any]] = field(default_factory=dict)
    submissions: list[Any] = field(default_factory=list)
    refuses: bool = False
    is_up: bool = True
    now: float = 0.0
    submitted: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    folders: dict[str, JobFolder] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)

    def submit(self, folder: JobFolder, *_: Any) -> str:
        how = self.submissions.pop(0) if self.submissions else "accepted"
        if how == "down":
            self.is_up = False
            raise NotSubmitted("Unable to contact slurm controller")
        self.is_up = True
        self.folders[folder.name] = folder
        if how != "refused":
            self.submitted.append(folder.name)
            self.jobs[folder.name] = self.plans.pop(0)
        if how != "accepted":
            raise NotSubmitted(str(how))
        return str(6 + len(self.submitted))

    def find(self, name: str, *, fresh: bool = False) -> Found:
        plan = self.jobs.get(name)
        found = Found(row=self.rows.get(name), asked_at=self.now, reachable=True, accounted=True)
        if not plan:
            return found
        step = plan.pop(0) if len(plan) > 1 else plan[0]
        if step is None:
            return replace(found, reachable=False)
        if isinstance(step, Mapping):
            self.folders[name].write("outcome", step)
            return found
        facts = step if isinstance(step, tuple) else (step,)
        self.rows[name] = row(name, *facts[:2], **(facts[2] if len(facts) > 2 else {}))
        return replace(found, row=self.rows[name])

    def cancel(self, job_ids: list[str]) -> None:
        self.cancelled += job_ids

    def history(self, names: list[str]) -> list[Row]:
        return [row(name, "CANCELLED", cancelled_by="1001") for name in names]

    def answers(self) -> bool:
        return self.is_up

    def test_only(self, options: Any) -> str:
        if self.refuses:
            raise Refused("invalid partition specified: gpus")
        return "would start"

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Desk:
    """Somebody who has one task to be done in ``directory``."""

    directory: Path
    slurm: StandInSlurm
    goes_on: bool = True
    resources: Resources = RESOURCES
    task: Mapping[str, Any] = field(default_factory=lambda: {"task": "worker"})
    notes: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    still_wanted: Callable[[], None] = lambda: None

    def ask(self) -> dict[str, Any]:
        connection = Connection(
            cluster=CLUSTER,
            slurm=self.slurm,  # type: ignore[arg-type]
            queue=self.slurm,  # type: ignore[arg-type]
            environ={},
            clock=lambda: self.slurm.now,
            ticks=lambda: self.slurm.now,
            sleep=self.slurm.sleep,
        )
        errand = Errand(
            place=Place.of(self.directory),
            task=self.task,
            resources=self.resources,
            goes_on=self.goes_on,
            module="conductor.cluster.job",
            note=lambda event, **facts: self.notes.append((event, facts)),
            noted=lambda name: sum(facts.get("job") == name for _, facts in self.notes),
            progress=lambda done, total, doing: self.told.append(doing),
            still_wanted=lambda: self.still_wanted(),
        )
        return carry_out(errand, connection)

    def folders(self) -> list[JobFolder]:
        return JobFolder.all_of(self.directory)

    def noted(self, event: str) -> list[Mapping[str, Any]]:
        return [facts for name, facts in self.notes if name == event]


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> StandInSlurm:
    stand_in = StandInSlurm()
    monkeypatch.setattr(following, "submit", stand_in.submit)
    return stand_in


@pytest.fixture
def desk(tmp_path: Path, slurm: StandInSlurm) -> Desk:
    return Desk(tmp_path / "runs" / "r-1" / "stages" / "ptq", slurm)


def test_a_task_is_submitted_and_its_outcome_returned(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.plans = [["PENDING", ("RUNNING", "", {"started_at": 20.0}), OK]]
    assert desk.ask()["answer"] == 42
    (name,) = slurm.submitted
    assert name.startswith("day0-r-1-ptq-1-")
    assert [event for event, _ in desk.notes] == ["job_submitted", "job_ended"]
    (ended,) = desk.noted("job_ended")
    assert (ended["state"], ended["gpus"], ended["queued_s"]) == ("COMPLETED", 2, 10.0)
    assert desk.ask()["answer"] == 42, "asked again, it is not done again"
    assert slurm.submitted == [name]


def test_what_the_job_noted_is_passed_on_once(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.plans = [[{**OK, "notes": [{"event": "tool_started", "facts": {"tool": "t"}}]}]]
    desk.ask()
    (desk.folders()[0].path / "ended.json").unlink()  # as by a death just before it was written
    desk.ask()
    assert desk.noted("tool_started") == [{"tool": "t", "job": slurm.submitted[0]}]


def left_by_a_dead_conductor(desk: Desk, number: str | None = None) -> JobFolder:
    place = Place.of(desk.directory)
    folder = JobFolder.intend(place, desk.task, {"resources": {}}, at=0.0)
    if number:
        folder.write("submitted", {"job_id": number, "at": 1.0})
    desk.slurm.folders[folder.name] = folder
    return folder


@pytest.mark.parametrize("number", [None, "7"], ids=["before-it-had-a-number", "after"])
def test_a_job_that_somebody_submitted_is_found_again(
    desk: Desk, slurm: StandInSlurm, number: str | None
) -> None:
    folder = left_by_a_dead_conductor(desk, number)
    slurm.jobs[folder.name] = ["RUNNING", OK]
    assert desk.ask()["answer"] == 42
    assert slurm.submitted == []


def test_an_intent_that_was_never_submitted_is(desk: Desk, slurm: StandInSlurm) -> None:
    folder = left_by_a_dead_conductor(desk)
    slurm.plans = [["RUNNING", OK]]
    desk.ask()
    assert slurm.submitted == [folder.name], "under the name that was written down"
    assert slurm.now >= following.SETTLE_POLLS * CLUSTER.poll_s, (
        "not before accounting may have caught up"
    )


def test_a_job_that_slurm_has_forgotten_is_lost_and_not_submitted_again(
    desk: Desk, slurm: StandInSlurm
) -> None:
    left_by_a_dead_conductor(desk, "7")
    with pytest.raises(Failure, match="LOST") as caught:
        desk.ask()
    assert caught.value.failure_class is FailureClass.INFRA_TRANSIENT
    assert slurm.submitted == []


def test_an_outcome_counts_whatever_slurm_says(desk: Desk, slurm: StandInSlurm) -> None:
    folder = left_by_a_dead_conductor(desk, "7")
    folder.write("outcome", OK)
    slurm.jobs[folder.name] = ["NODE_FAIL"]
    assert desk.ask()["answer"] == 42


def test_who_cancelled_a_job_is_asked_of_accounting(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.plans = [["RUNNING", "CANCELLED"]]
    with pytest.raises(Stopped, match="cancelled by user id 1001"):
        desk.ask()


@pytest.mark.parametrize(
    ("state", "goes_on", "failure_class"),
    [
        ("OUT_OF_MEMORY", True, FailureClass.OUT_OF_MEMORY),
        ("NODE_FAIL", True, FailureClass.INFRA_TRANSIENT),
        ("BOOT_FAIL", True, FailureClass.INFRA_TRANSIENT),
        ("PREEMPTED", True, FailureClass.INFRA_TRANSIENT),
        ("FAILED", True, FailureClass.INFRA_TRANSIENT),
        ("COMPLETED", True, FailureClass.INFRA_TRANSIENT),
        ("TIMEOUT", False, FailureClass.SYSTEMIC),
    ],
)
def test_an_end_without_an_outcome_is_a_failure(
    desk: Desk, slurm: StandInSlurm, state: str, goes_on: bool, failure_class: FailureClass
) -> None:
    desk.goes_on = goes_on
    slurm.plans = [["RUNNING", state]]
    with pytest.raises(Failure, match=state) as caught:
        desk.ask()
    assert caught.value.failure_class is failure_class
    assert len(slurm.submitted) == 1


def test_a_job_that_ran_into_its_walltime_is_continued(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.plans = [["TIMEOUT"], ["RUNNING", "TIMEOUT"], [OK]]
    assert desk.ask()["answer"] == 42
    assert "starting" not in desk.told
    assert "continued after its walltime, 1 of 2: starting" in desk.told
    assert [each.path.name for each in desk.folders()] == ["1", "2", "3"]
    assert len({each.name for each in desk.folders()}) == 3


def test_continuations_come_to_an_end(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.plans = [["TIMEOUT"], ["TIMEOUT"], ["TIMEOUT"], [OK]]
    with pytest.raises(Failure, match="continued 2 times") as caught:
        desk.ask()
    assert caught.value.failure_class is FailureClass.SYSTEMIC


def test_a_job_that_somebody_cancelled_stops_the_run_until_it_is_resumed(
    desk: Desk, slurm: StandInSlurm
) -> None:
    slurm.plans = [["RUNNING", ("CANCELLED", "", {"cancelled_by": "1002"})], [OK]]
    with pytest.raises(Stopped, match="cancelled by user id 1002"):
        desk.ask()
    assert len(slurm.submitted) == 1
    assert desk.ask()["answer"] == 42
    assert len(slurm.submitted) == 2


def test_a_held_job_says_so_and_stays(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.plans = [[("PENDING", "JobHeldUser")]]
    with pytest.raises(Stopped, match=r"JobHeldUser.*scontrol release 7"):
        desk.ask()
    assert not slurm.cancelled
    slurm.jobs[slurm.submitted[0]] = ["RUNNING", OK]
    assert desk.ask()["answer"] == 42
    assert len(slurm.submitted) == 1


def test_an_impossible_job_says_why_and_is_cancelled(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.plans = [[("PENDING", "PartitionTimeLimit")]]
    with pytest.raises(Failure, match="PartitionTimeLimit") as caught:
        desk.ask()
    assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR
    assert slurm.cancelled == ["7"]


def test_a_reason_that_passes_is_none(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.plans = [[("PENDING", "JobHeldUser"), ("PENDING", "Priority"), "RUNNING", OK]]
    assert desk.ask()["answer"] == 42
    assert "queued (Priority)" in desk.told


def test_a_controller_that_is_down_is_waited_for(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.plans = [["RUNNING", *[None] * 50, OK]]
    assert desk.ask()["answer"] == 42
    assert any("controller is down" in doing for doing in desk.told)


def test_a_job_that_ends_while_the_controller_is_down_is_done(
    desk: Desk, slurm: StandInSlurm
) -> None:
    slurm.plans = [[None, OK, None]]
    assert desk.ask()["answer"] == 42


def test_submitting_waits_for_the_controller(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.submissions = ["down", "down", "accepted"]
    slurm.plans = [[OK]]
    assert desk.ask()["answer"] == 42
    assert len(slurm.submitted) == 1


def test_a_submission_that_died_over_its_answer_is_found(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.submissions = ["sbatch was ended after 60 s"]
    slurm.plans = [["PENDING", "RUNNING", OK]]
    assert desk.ask()["answer"] == 42
    assert len(slurm.submitted) == 1


def test_what_slurm_will_not_have_is_refused_in_its_words(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.submissions, slurm.refuses = ["refused"] * 9, True
    with pytest.raises(Failure, match=r"invalid partition.*clusters\.yaml") as caught:
        desk.ask()
    assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR


def test_a_refusal_that_leaves_a_dead_job_is_one(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.submissions = ["Requested node configuration is not available"] * 9
    slurm.plans = [[("FAILED", "BadConstraints")] for _ in slurm.submissions]
    with pytest.raises(Failure, match=r"Slurm refuses .* node configuration") as caught:
        desk.ask()
    assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR


def test_a_refusal_by_a_controller_that_was_just_started_passes(
    desk: Desk, slurm: StandInSlurm
) -> None:
    slurm.submissions, slurm.refuses = ["refused", "refused", "accepted"], True
    slurm.plans = [[OK]]
    assert desk.ask()["answer"] == 42


def test_a_refused_job_has_waited_for_nothing(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.submissions, slurm.refuses = ["refused"] * 9, True
    with pytest.raises(Failure):
        desk.ask()
    (ended,) = desk.noted("job_ended")
    assert (ended["state"], ended["queued_s"], ended["ran_s"]) == ("REFUSED", 0.0, 0.0)
    assert JobFolder.are_over(desk.directory)


def test_a_job_that_never_started_has_waited_and_not_run(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.plans = [[("PENDING", "PartitionTimeLimit", {"submitted_at": 0.5})]]
    with pytest.raises(Failure):
        desk.ask()
    (ended,) = desk.noted("job_ended")
    assert ended["queued_s"] >= following.HELD_POLLS * CLUSTER.poll_s - 0.5
    assert ended["ran_s"] == 0.0


def test_a_passing_refusal_is_tried_again(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.submissions = ["refused", "refused", "accepted"]
    slurm.plans = [[OK]]
    assert desk.ask()["answer"] == 42


def test_an_interrupted_conductor_leaves_the_job(desk: Desk, slurm: StandInSlurm) -> None:
    slurm.plans = [["RUNNING"]]
    interruptions = iter([None, None, None, KeyboardInterrupt()])

    def interrupt() -> None:
        if error := next(interruptions):
            raise error

    desk.still_wanted = interrupt
    with pytest.raises(Stopped, match=r"job 7 .*goes on without us"):
        desk.ask()
    assert not slurm.cancelled
    desk.still_wanted = lambda: None
    slurm.jobs[slurm.submitted[0]] = [OK]
    assert desk.ask()["answer"] == 42
    assert len(slurm.submitted) == 1


def test_a_job_that_is_not_wanted_any_more_is_cancelled(desk: Desk, slurm: StandInSlurm) -> None:
    class NotWanted(Exception):
        pass

    answers = iter([None, None, None, NotWanted()])

    def check() -> None:
        if error := next(answers, None):
            raise error

    slurm.plans = [["RUNNING"]]
    desk.still_wanted = check
    with pytest.raises(NotWanted):
        desk.ask()
    assert slurm.cancelled == ["7"]


def test_a_job_for_another_task_is_not_taken_for_this_one(desk: Desk, slurm: StandInSlurm) -> None:
    folder = left_by_a_dead_conductor(desk, "7")
    slurm.jobs[folder.name] = ["RUNNING", "RUNNING", None, "COMPLETING", "CANCELLED"]
    desk.task = {"task": "worker", "request": {"seed": 1}}
    slurm.plans = [[OK]]
    assert desk.ask()["answer"] == 42
    assert {*slurm.cancelled} == {"7"}
    assert len(desk.folders()) == 2
    assert slurm.jobs[folder.name] == ["CANCELLED"], "it has left the directory to the other"


@pytest.mark.parametrize("stalled", [True, False])
def test_a_failed_task_is_a_failure_of_its_class(
    desk: Desk, slurm: StandInSlurm, stalled: bool
) -> None:
    slurm.plans = [
        [
            {
                "status": "failed",
                "failure_class": "INFRA_TRANSIENT",
                "message": "it hangs",
                "stalled": stalled,
                "at": 1.0,
            }
        ]
    ]
    with pytest.raises(Failure, match="it hangs") as caught:
        desk.ask()
    assert isinstance(caught.value, Stalled) is stalled


@pytest.mark.parametrize(("memory_gib", "is_named"), [(4.5, True), (None, False)])
def test_want_of_memory_names_what_the_job_had(
    desk: Desk, slurm: StandInSlurm, memory_gib: float | None, is_named: bool
) -> None:
    said = "the server ended with exit status 1\nits last lines"
    outcome = {"status": "failed", "failure_class": "OUT_OF_MEMORY", "message": said, "at": 1.0}
    slurm.plans = [[outcome]]
    desk.resources = replace(RESOURCES, memory_gib=memory_gib)
    with pytest.raises(Failure) as caught:
        desk.ask()
    first, _, last = caught.value.message.partition("\n")
    assert caught.value.failure_class is FailureClass.OUT_OF_MEMORY
    remedy = "its job had 4.5 GiB, raise memory_gib of ptq in clusters.yaml if that is too little"
    assert (remedy in first) is is_named
    assert last == "its last lines"


def test_records_of_processes_end_with_their_job(desk: Desk, slurm: StandInSlurm) -> None:
    """One that was killed cannot remove its own."""
    record = desk.directory / "worker.process.json"
    desk.directory.mkdir(parents=True)
    record.touch()
    slurm.plans = [["RUNNING", "FAILED"]]
    with pytest.raises(Failure):
        desk.ask()
    assert not record.exists()


def test_what_dead_writers_left_unfinished_is_removed(desk: Desk, slurm: StandInSlurm) -> None:
    folder = left_by_a_dead_conductor(desk, "7")
    slurm.jobs[folder.name] = ["RUNNING", OK]
    left = [folder.path / ".ended.json.1.1.tmp", desk.directory / ".progress.json.999999.tmp"]
    for each in left:
        each.write_text("half")
    (desk.directory / "datasets-cache-x").mkdir()
    desk.ask()
    assert not [each for each in [*left, desk.directory / "datasets-cache-x"] if each.exists()]


class TestFolders:
    def test_two_jobs_of_one_folder_one_works(self, desk: Desk) -> None:
        folder = left_by_a_dead_conductor(desk)
        assert folder.claim("7", "n1", 1.0)
        assert not folder.claim("8", "n2", 2.0)
        assert folder.job_id == "7"

    def test_a_requeued_job_goes_on_in_its_folder(self, desk: Desk) -> None:
        folder = left_by_a_dead_conductor(desk)
        assert folder.claim("7", "n1", 1.0)
        assert folder.claim("7", "n2", 2.0)
        assert folder.read("claim") == {"job_id": "7", "node": "n2", "at": 2.0, "restarts": 1}

    def test_a_folder_without_an_intent_is_used_again(self, desk: Desk) -> None:
        (desk.directory / "jobs" / "1").mkdir(parents=True)
        assert left_by_a_dead_conductor(desk).path.name == "1"
        assert left_by_a_dead_conductor(desk).path.name == "2"

    def test_a_submission_under_way_is_waited_for(self, desk: Desk) -> None:
        folder = left_by_a_dead_conductor(desk)
        with folder.nobody_submits(1.0, lambda _: None) as alone:
            assert alone
            with folder.nobody_submits(0.0, lambda _: None) as also:
                assert not also

    @pytest.mark.parametrize(
        ("below", "stage", "relative"),
        [
            ("ptq", "ptq", "stages/ptq"),
            ("candidate_eval/round-2/source", "candidate_eval", None),
        ],
    )
    def test_a_place_is_read_off_its_directory(
        self, tmp_path: Path, below: str, stage: str, relative: str | None
    ) -> None:
        place = Place.of(tmp_path / "stages" / "runs" / "r" / "stages" / below)
        assert (place.run_dir, place.stage) == (tmp_path / "stages" / "runs" / "r", stage)
        assert place.relative == (relative or f"stages/{below}")
