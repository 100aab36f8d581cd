"""The tables of Slurm's states: every state, every pending reason, every ending."""

from __future__ import annotations

import pytest

from conductor.executors.slurm.states import (
    ENDINGS,
    FAILED_REASONS,
    FINISHED,
    PENDING_REASONS,
    UNFINISHED,
    Means,
    has_ended,
    meaning,
    state_name,
)
from gates import TRIAGE, FailureClass

STATES = (
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED"),
    *("SIGNALING", "RESIZING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"),
    *("RESV_DEL_HOLD", "COMPLETED", "FAILED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY"),
    *("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "CANCELLED", "REVOKED"),
)
"""As squeue's manual page of 22.05 has them."""

TRES = ["BB", "Billing", "Energy", "GRES", "License", "Unknown"]
"""What limits of one form are named after; those on CPUs, memory and nodes have forms of their
own."""


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_in_one_table(state: str) -> None:
    assert (state in UNFINISHED) != (state in FINISHED)
    assert has_ended(state) == (state in FINISHED)


@pytest.mark.parametrize(
    ("state", "reason", "means"),
    [
        pytest.param("PENDING", "Priority", Means.WAITING, id="pending"),
        pytest.param("CONFIGURING", "None", Means.WAITING, id="nodes-boot"),
        pytest.param("REQUEUED", "None", Means.WAITING, id="requeued"),
        pytest.param("RUNNING", "None", Means.RUNNING, id="running"),
        pytest.param("COMPLETING", "None", Means.RUNNING, id="completing"),
        pytest.param("SUSPENDED", "None", Means.RUNNING, id="suspended"),
        pytest.param("STOPPED", "None", Means.RUNNING, id="stopped"),
        pytest.param("PENDING", "JobHeldUser", Means.HELD, id="held-by-its-user"),
        pytest.param("PENDING", "JobHeldAdmin", Means.HELD, id="held-by-an-administrator"),
        pytest.param("PENDING", "JobHoldMaxRequeue", Means.HELD, id="requeued-too-often"),
        pytest.param("PENDING", "job requeued in held state", Means.HELD, id="requeued-and-held"),
        pytest.param("PENDING", "launch failed requeued held", Means.HELD, id="launch-failed"),
        pytest.param("PENDING", "launch_failed_requeued_held", Means.HELD, id="as-in-brackets"),
        pytest.param("SPECIAL_EXIT", "job requeued in held state", Means.HELD, id="special-exit"),
        pytest.param("REQUEUE_HOLD", "None", Means.HELD, id="requeue-hold"),
        pytest.param("RESV_DEL_HOLD", "ReservationDeleted", Means.HELD, id="reservation-deleted"),
        pytest.param("PENDING", "PartitionConfig", Means.IMPOSSIBLE, id="more-nodes-than-are"),
        pytest.param("PENDING", "BadConstraints", Means.IMPOSSIBLE, id="bad-constraints"),
        pytest.param("FAILED", "BadConstraints", Means.IMPOSSIBLE, id="refused-by-sbatch"),
        pytest.param("DEADLINE", "DeadLine", Means.IMPOSSIBLE, id="deadline"),
        pytest.param(
            "PENDING", "QOSMaxWallDurationPerJobLimit", Means.IMPOSSIBLE, id="walltime-of-qos"
        ),
        pytest.param("PENDING", "QOSMaxJobsPerUserLimit", Means.WAITING, id="own-jobs-running"),
        pytest.param("PENDING", "AssocGrpCpuLimit", Means.WAITING, id="jobs-of-the-account"),
        pytest.param(
            "PENDING", "ReqNodeNotAvail, UnavailableNodes:n1", Means.WAITING, id="node-is-down"
        ),
        pytest.param(
            "PENDING", "ReqNodeNotAvail(Unavailable:n1)", Means.WAITING, id="details-in-brackets"
        ),
        pytest.param("PENDING", "(Resources)", Means.WAITING, id="reason-in-brackets"),
        pytest.param("COMPLETED", "None", Means.COMPLETED, id="completed"),
        pytest.param("FAILED", "NonZeroExitCode", Means.FAILED, id="failed"),
        pytest.param("FAILED", "JobLaunchFailure", Means.FAILED, id="killed-at-its-start"),
        pytest.param("FAILED", "None", Means.FAILED, id="failed-says-accounting"),
        pytest.param("FAILED", "OutOfMemory", Means.OUT_OF_MEMORY, id="failed-for-memory"),
        pytest.param("FAILED", "TimeLimit", Means.TIMEOUT, id="failed-for-time"),
        pytest.param("FAILED", "NodeDown", Means.NODE_LOST, id="failed-for-its-node"),
        pytest.param("TIMEOUT", "TimeLimit", Means.TIMEOUT, id="timeout"),
        pytest.param("OUT_OF_MEMORY", "OutOfMemory", Means.OUT_OF_MEMORY, id="out-of-memory"),
        pytest.param("OUT_OF_ME+", "", Means.OUT_OF_MEMORY, id="cut-off"),
        pytest.param("NODE_FAIL", "NodeDown", Means.NODE_LOST, id="node-fail"),
        pytest.param("BOOT_FAIL", "None", Means.NODE_LOST, id="boot-fail"),
        pytest.param("PREEMPTED", "None", Means.PREEMPTED, id="preempted"),
        pytest.param("CANCELLED", "BeginTime", Means.CANCELLED, id="cancelled"),
        pytest.param("CANCELLED by 1000", "", Means.CANCELLED, id="cancelled-by"),
        pytest.param("CANCELLED+", "", Means.CANCELLED, id="cancelled-cut-off"),
        pytest.param("REVOKED", "", Means.CANCELLED, id="revoked"),
        pytest.param("PENDING", "NewReasonOf2031", Means.WAITING, id="unknown-reason-waits"),
        pytest.param("FAILED", "NewReasonOf2031", Means.FAILED, id="unknown-reason-of-an-end"),
        pytest.param("EXPEDITING", "None", Means.RUNNING, id="unknown-state-is-asked-again"),
        pytest.param("RE+", "None", Means.RUNNING, id="cut-off-too-soon"),
        pytest.param("", "", Means.RUNNING, id="nothing"),
        pytest.param("PENDING", "", Means.WAITING, id="no-reason-yet"),
        pytest.param("RUNNING", "JobHeldUser", Means.RUNNING, id="an-old-reason-counts-no-more"),
        pytest.param("CANCELLED", "JobHeldUser", Means.CANCELLED, id="held-then-cancelled"),
    ],
)
def test_means(state: str, reason: str, means: Means) -> None:
    assert meaning(state, reason) is means


@pytest.mark.parametrize("group", ["AssocGrp", "QOSGrp"])
@pytest.mark.parametrize("tres", TRES)
def test_limits_on_a_group_pass(group: str, tres: str) -> None:
    for suffix in ("", "Minutes", "RunMinutes"):
        assert PENDING_REASONS[f"{group}{tres}{suffix}"] is Means.WAITING


@pytest.mark.parametrize("tres", TRES)
def test_limits_on_the_single_job_never_pass_and_those_on_all_of_a_user_do(tres: str) -> None:
    single = [f"{scope}Max{tres}{of}" for scope in ("Assoc", "QOS") for of in ("PerJob", "PerNode")]
    for name in {*single, f"QOSMin{tres}"} - {"AssocMaxLicensePerNode", "QOSMaxLicensePerNode"}:
        assert PENDING_REASONS[name] is Means.IMPOSSIBLE, name
    for name in (f"QOSMax{tres}PerUser", f"Max{tres}PerAccount"):
        assert PENDING_REASONS[name] is Means.WAITING, name


def test_pending_reasons_are_told_apart_without_regard_to_case() -> None:
    assert len({name.casefold() for name in PENDING_REASONS}) == len(PENDING_REASONS)
    assert set(PENDING_REASONS.values()) == {Means.WAITING, Means.HELD, Means.IMPOSSIBLE}


@pytest.mark.parametrize(
    ("state", "name"),
    [
        pytest.param("CANCELLED by 1000", "CANCELLED", id="by"),
        pytest.param("NODE_F+", "NODE_FAIL", id="cut-off"),
        pytest.param("COMPL+", "COMPL+", id="of-several"),
        pytest.param("XYZ+", "XYZ+", id="of-none"),
    ],
)
def test_state_name(state: str, name: str) -> None:
    assert state_name(state) == name


def test_every_meaning_that_ends_the_wait_has_an_ending() -> None:
    assert set(ENDINGS) == set(Means) - {Means.WAITING, Means.RUNNING}
    assert set(FINISHED.values()) | set(FAILED_REASONS.values()) < set(ENDINGS)


@pytest.mark.parametrize(
    ("means", "failure_class", "retries"),
    [
        pytest.param(Means.COMPLETED, FailureClass.INFRA_TRANSIENT, 1, id="completed"),
        pytest.param(Means.FAILED, FailureClass.INFRA_TRANSIENT, 1, id="failed"),
        pytest.param(Means.TIMEOUT, FailureClass.SYSTEMIC, 0, id="timeout"),
        pytest.param(Means.OUT_OF_MEMORY, FailureClass.OUT_OF_MEMORY, 1, id="out-of-memory"),
        pytest.param(Means.NODE_LOST, FailureClass.INFRA_TRANSIENT, 1, id="node-lost"),
        pytest.param(Means.PREEMPTED, FailureClass.INFRA_TRANSIENT, 1, id="preempted"),
        pytest.param(Means.IMPOSSIBLE, FailureClass.USER_CONFIG_ERROR, 0, id="impossible"),
    ],
)
def test_endings_are_triaged(means: Means, failure_class: FailureClass, retries: int) -> None:
    assert ENDINGS[means].failure_class is failure_class
    assert TRIAGE[failure_class].retries == retries


@pytest.mark.parametrize("means", [Means.CANCELLED, Means.HELD])
def test_what_a_person_did_stops_the_release_and_is_no_failure(means: Means) -> None:
    assert ENDINGS[means].failure_class is None
    assert "day0 resume" in ENDINGS[means].words
