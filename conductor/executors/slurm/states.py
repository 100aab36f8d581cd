"""What the states of Slurm's jobs mean, and what follows from each ending: tables.

A job's own ``outcome.json`` is the truth about its task; these tables are for a job that still
waits, and for one that ended without. Invariants:

* Every state and every pending reason that Slurm 22.05 to 25.05 has stands in a table; one that
  does not is taken for the mildest that it can be, and never crashes the conductor.
* A reason that may pass by itself waits: only what Slurm calls a breach of a limit on the single
  job, or what no node can ever satisfy, is impossible.

The names are those of Slurm's manual: ``job_state_codes.html``, ``job_reason_codes.html`` and
``squeue``'s manual page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from gates import FailureClass


class Means(StrEnum):
    """What a job's state means to whoever waits for it."""

    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    IMPOSSIBLE = "impossible"
    COMPLETED = "completed"
    FAILED = "failed"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out of memory"
    NODE_LOST = "node lost"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"


def _each(means: Means, names: str) -> Iterable[tuple[str, Means]]:
    return ((name, means) for name in names.split())


UNFINISHED: Mapping[str, Means] = MappingProxyType(
    dict(
        [
            *_each(Means.WAITING, "PENDING CONFIGURING POWER_UP_NODE REQUEUED REQUEUE_FED"),
            *_each(Means.RUNNING, "RUNNING COMPLETING STAGE_OUT SUSPENDED STOPPED SIGNALING"),
            *_each(Means.RUNNING, "RESIZING UPDATE_DB LAUNCH_FAILED RECONFIG_FAIL"),
            *_each(Means.HELD, "REQUEUE_HOLD SPECIAL_EXIT RESV_DEL_HOLD"),
        ]
    )
)
"""States of a job that Slurm still has to do with; it may start, or start again."""

FINISHED: Mapping[str, Means] = MappingProxyType(
    dict(
        [
            *_each(Means.COMPLETED, "COMPLETED"),
            *_each(Means.FAILED, "FAILED"),
            *_each(Means.TIMEOUT, "TIMEOUT"),
            *_each(Means.OUT_OF_MEMORY, "OUT_OF_MEMORY"),
            *_each(Means.NODE_LOST, "NODE_FAIL BOOT_FAIL"),
            *_each(Means.PREEMPTED, "PREEMPTED"),
            *_each(Means.CANCELLED, "CANCELLED REVOKED"),
            *_each(Means.IMPOSSIBLE, "DEADLINE"),
        ]
    )
)
"""States in which a job stays."""

_STATES = {**UNFINISHED, **FINISHED}

PENDING_REASONS: Mapping[str, Means] = MappingProxyType(
    dict(
        [
            *_each(
                Means.WAITING,
                """
                None Priority Resources Dependency BeginTime Licenses Prolog Cleaning Reservation
                ReqNodeNotAvail NodeDown FrontEndDown PartitionDown PartitionInactive Constraints
                SchedDefer FedJobLock JobArrayTaskLimit WaitingForScheduling AccountingPolicy
                BurstBufferResources BurstBufferStageIn PowerNotAvail PowerReserved
                SystemFailure JobLaunchFailure NonZeroExitCode RaisedSignal TimeLimit
                InactiveLimit OutOfMemory BlockMaxError BlockFreeAction
                AssociationJobLimit AssociationResourceLimit AssociationTimeLimit
                AssocMaxJobsLimit AssocMaxSubmitJobLimit
                AssocGrpBB AssocGrpBBMinutes AssocGrpBBRunMinutes
                AssocGrpBilling AssocGrpBillingMinutes AssocGrpBillingRunMinutes
                AssocGrpCpuLimit AssocGrpCPUMinutesLimit AssocGrpCPURunMinutesLimit
                AssocGrpEnergy AssocGrpEnergyMinutes AssocGrpEnergyRunMinutes
                AssocGrpGRES AssocGrpGRESMinutes AssocGrpGRESRunMinutes
                AssocGrpLicense AssocGrpLicenseMinutes AssocGrpLicenseRunMinutes
                AssocGrpMemLimit AssocGrpMemMinutes AssocGrpMemRunMinutes
                AssocGrpNodeLimit AssocGrpNodeMinutes AssocGrpNodeRunMinutes
                AssocGrpUnknown AssocGrpUnknownMinutes AssocGrpUnknownRunMinutes
                AssocGrpJobsLimit AssocGrpSubmitJobsLimit AssocGrpWallLimit
                QOSJobLimit QOSResourceLimit QOSTimeLimit QOSUsageThreshold
                QOSGrpBB QOSGrpBBMinutes QOSGrpBBRunMinutes
                QOSGrpBilling QOSGrpBillingMinutes QOSGrpBillingRunMinutes
                QOSGrpCpuLimit QOSGrpCPUMinutesLimit QOSGrpCPURunMinutesLimit
                QOSGrpEnergy QOSGrpEnergyMinutes QOSGrpEnergyRunMinutes
                QOSGrpGRES QOSGrpGRESMinutes QOSGrpGRESRunMinutes
                QOSGrpLicense QOSGrpLicenseMinutes QOSGrpLicenseRunMinutes
                QOSGrpMemLimit QOSGrpMemoryMinutes QOSGrpMemoryRunMinutes
                QOSGrpNodeLimit QOSGrpNodeMinutes QOSGrpNodeRunMinutes
                QOSGrpUnknown QOSGrpUnknownMinutes QOSGrpUnknownRunMinutes
                QOSGrpJobsLimit QOSGrpSubmitJobsLimit QOSGrpWallLimit
                QOSMaxBBPerUser QOSMaxBillingPerUser QOSMaxCpuPerUserLimit QOSMaxEnergyPerUser
                QOSMaxGRESPerUser QOSMaxJobsPerUserLimit QOSMaxLicensePerUser QOSMaxMemoryPerUser
                QOSMaxNodePerUserLimit QOSMaxSubmitJobPerUserLimit QOSMaxUnknownPerUser
                MaxBBPerAccount MaxBillingPerAccount MaxCpuPerAccount MaxEnergyPerAccount
                MaxGRESPerAccount MaxJobsPerAccount MaxLicensePerAccount MaxMemoryPerAccount
                MaxNodePerAccount MaxSubmitJobsPerAccount MaxUnknownPerAccount
                """,
            ),
            *_each(
                Means.HELD,
                """
                JobHeldUser JobHeldAdmin JobHoldMaxRequeue ReservationDeleted
                BurstBufferOperation launch_failed_requeued_held job_requeued_in_held_state
                job_requeued_in_special_exit_state
                """,
            ),
            *_each(
                Means.IMPOSSIBLE,
                """
                BadConstraints PartitionConfig PartitionNodeLimit PartitionTimeLimit
                MaxMemPerLimit ReservationInvalid DeadLine DependencyNeverSatisfied
                AccountNotAllowed InvalidAccount InvalidQOS QOSNotAllowed
                AssocMaxBBMinutesPerJob AssocMaxBBPerJob AssocMaxBBPerNode
                AssocMaxBillingMinutesPerJob AssocMaxBillingPerJob AssocMaxBillingPerNode
                AssocMaxCpuMinutesPerJobLimit AssocMaxCpuPerJobLimit AssocMaxCpuPerNode
                AssocMaxEnergyMinutesPerJob AssocMaxEnergyPerJob AssocMaxEnergyPerNode
                AssocMaxGRESMinutesPerJob AssocMaxGRESPerJob AssocMaxGRESPerNode
                AssocMaxLicenseMinutesPerJob AssocMaxLicensePerJob
                AssocMaxMemMinutesPerJob AssocMaxMemPerJob AssocMaxMemPerNode
                AssocMaxNodeMinutesPerJob AssocMaxNodePerJobLimit
                AssocMaxUnknownMinutesPerJob AssocMaxUnknownPerJob AssocMaxUnknownPerNode
                AssocMaxWallDurationPerJobLimit
                QOSMaxBBMinutesPerJob QOSMaxBBPerJob QOSMaxBBPerNode
                QOSMaxBillingMinutesPerJob QOSMaxBillingPerJob QOSMaxBillingPerNode
                QOSMaxCpuMinutesPerJobLimit QOSMaxCpuPerJobLimit QOSMaxCpuPerNode
                QOSMaxEnergyMinutesPerJob QOSMaxEnergyPerJob QOSMaxEnergyPerNode
                QOSMaxGRESMinutesPerJob QOSMaxGRESPerJob QOSMaxGRESPerNode
                QOSMaxLicenseMinutesPerJob QOSMaxLicensePerJob
                QOSMaxMemoryMinutesPerJob QOSMaxMemoryPerJob QOSMaxMemoryPerNode
                QOSMaxNodeMinutesPerJob QOSMaxNodePerJobLimit
                QOSMaxUnknownMinutesPerJob QOSMaxUnknownPerJob QOSMaxUnknownPerNode
                QOSMaxWallDurationPerJobLimit
                QOSMinBB QOSMinBilling QOSMinCpuNotSatisfied QOSMinEnergy QOSMinGRES
                QOSMinLicense QOSMinMemory QOSMinNode QOSMinUnknown
                """,
            ),
        ]
    )
)
"""Why a job waits, by the first word of ``squeue``'s reason."""

FAILED_REASONS: Mapping[str, Means] = MappingProxyType(
    {
        **{name: means for name, means in PENDING_REASONS.items() if means is Means.IMPOSSIBLE},
        "NodeDown": Means.NODE_LOST,
        "SystemFailure": Means.NODE_LOST,
        "OutOfMemory": Means.OUT_OF_MEMORY,
        "TimeLimit": Means.TIMEOUT,
    }
)
"""Reasons that say more than the state FAILED does; ``sbatch`` refused a job with one of the
impossible ones and left its row in the queue."""


def _folded(reason: str) -> str:
    """Return a reason as the tables have it: no detail after a comma, no spaces, no case."""
    return reason.partition(",")[0].strip().strip("()").replace(" ", "_").casefold()


_PENDING = {_folded(name): means for name, means in PENDING_REASONS.items()}
_FAILED = {_folded(name): means for name, means in FAILED_REASONS.items()}


def state_name(state: str) -> str:
    """Return a state without what sacct adds to it (``CANCELLED by 1000``, ``OUT_OF_ME+``)."""
    word = state.partition(" ")[0]
    if not word.endswith("+"):
        return word
    matches = [name for name in _STATES if name.startswith(word[:-1])]
    return matches[0] if len(matches) == 1 else word


def has_ended(state: str) -> bool:
    """Tell whether a job in this state stays in it."""
    return state_name(state) in FINISHED


def meaning(state: str, reason: str) -> Means:
    """Return what a job's state and reason mean.

    A state that no table has is taken for one of a job that runs, and is asked about again; a
    reason that no table has leaves what the state says.
    """
    means = _STATES.get(state_name(state), Means.RUNNING)
    if means is Means.WAITING:
        return _PENDING.get(_folded(reason), means)
    if means is Means.FAILED:
        return _FAILED.get(_folded(reason), means)
    return means


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What follows when a job came to this and left no outcome of its own.

    ``failure_class`` is for the triage table, which says whether it is tried again; None stops
    the release, to be resumed. ``words`` say what happened and what a person can do about it.
    """

    failure_class: FailureClass | None
    words: str


ENDINGS: Mapping[Means, Ending] = MappingProxyType(
    {
        Means.COMPLETED: Ending(
            failure_class=FailureClass.INFRA_TRANSIENT,
            words="the job ended well and left no outcome; look whether its node writes to the "
            "workspace that this machine reads, and read the job's log",
        ),
        Means.FAILED: Ending(
            failure_class=FailureClass.INFRA_TRANSIENT,
            words="the job failed before it could say why; read its log",
        ),
        Means.TIMEOUT: Ending(
            failure_class=FailureClass.SYSTEMIC,
            words="give the stage more time in clusters.yaml, or let a job that can be continued "
            "be so more often (continuations)",
        ),
        Means.OUT_OF_MEMORY: Ending(
            failure_class=FailureClass.OUT_OF_MEMORY,
            words="the job needed more memory than it had asked for; raise the stage's memory_gib "
            "in clusters.yaml",
        ),
        Means.NODE_LOST: Ending(
            failure_class=FailureClass.INFRA_TRANSIENT,
            words="the job's node failed, or never came up; if it happens again, leave that node "
            "out with extra: {exclude: NODE} in clusters.yaml",
        ),
        Means.PREEMPTED: Ending(
            failure_class=FailureClass.INFRA_TRANSIENT,
            words="the job gave way to another of a higher priority; if it happens again, ask for "
            "a partition or QOS that is not preempted",
        ),
        Means.CANCELLED: Ending(
            failure_class=None,
            words="somebody cancelled the job; ask them why, then continue with day0 resume",
        ),
        Means.HELD: Ending(
            failure_class=None,
            words="the job is held and waits for a person; release it with scontrol release, or "
            "cancel it with scancel, then continue with day0 resume",
        ),
        Means.IMPOSSIBLE: Ending(
            failure_class=FailureClass.USER_CONFIG_ERROR,
            words="the job can never start as it was asked for; correct the stage's resources in "
            "clusters.yaml, and try them with day0 cluster check",
        ),
    }
)
"""Every ending; a job that waits or runs has none. TIMEOUT is looked up once the job may not be
continued any more."""
