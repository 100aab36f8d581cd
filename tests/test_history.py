"""The fold of events into the state of a release: every event, wrong ones, and random histories."""

import copy
import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.chain import STAGES, Stage, State
from conductor.documents import validate
from conductor.history import (
    HANDLERS,
    EventError,
    History,
    apply,
    chained,
    moment_of,
    replay,
    timestamp,
)

AT = "2026-01-02T03:04:05.000Z"
FILE = {"sha256": "0" * 64, "bytes": 3}


def event(name: str, elapsed_s: float | None = None, **facts: Any) -> dict[str, Any]:
    made = {"at": AT, "event": name, **facts}
    return made if elapsed_s is None else made | {"elapsed_s": elapsed_s}


BEGIN = event("release_started", 0.0, version=2, run_id="a-run", model="demo", recipe="int8")


def started(stage: str, attempt: int = 1, elapsed_s: float = 0.0, **facts: Any) -> dict[str, Any]:
    return event("stage_started", elapsed_s, stage=stage, attempt=attempt, **facts)


def finished(
    stage: str, state: str = "done", attempt: int = 1, elapsed_s: float = 0.0, **facts: Any
) -> dict[str, Any]:
    facts = {"detail": "", "failure_class": None, "outputs": None, **facts}
    return event("stage_finished", elapsed_s, stage=stage, attempt=attempt, state=state, **facts)


def test_a_release_that_went_through() -> None:
    history = replay(
        [
            BEGIN,
            started("setup", elapsed_s=1.0, inputs={"config.seed": 1}),
            event("tool_started", 2.0, tool="quantize.py", directory="stages/setup"),
            finished("setup", elapsed_s=4.5, outputs={"stages/setup/result.json": FILE}),
            event("release_finished", 5.0, decision="ACCEPT", exit_code=0),
        ]
    )
    setup = history.stages[Stage.SETUP]
    assert (setup.state, setup.attempts, setup.interruptions) == (State.DONE, 1, 0)
    assert setup.seconds == 3.5
    assert setup.inputs == {"config.seed": 1}
    assert setup.outputs == {"stages/setup/result.json": FILE}
    assert history.stages[Stage.PTQ].seconds is None
    assert history.worked_s == 5.0
    assert history.sessions == 1
    assert history.outcome == {"decision": "ACCEPT", "exit_code": 0}
    assert timestamp(history.started_at) == AT  # type: ignore[arg-type]
    validate(json.loads(json.dumps(history.document())), schema="manifest", where="manifest")


def test_time_is_counted_up_to_a_kill_and_from_the_resume() -> None:
    history = replay(
        [
            BEGIN,
            started("ptq", elapsed_s=10.0),
            event("tool_started", 40.0, tool="quantize.py", directory="stages/ptq"),
            # killed; nobody knows how long it went on
            event("release_resumed", 2.0, pid=2, day0_version="0.1.0"),
            event("stage_continued", 3.0, stage="ptq", attempt=1),
            finished("ptq", elapsed_s=8.0),
        ]
    )
    ptq = history.stages[Stage.PTQ]
    assert ptq.seconds == 30.0 + 5.0
    assert (ptq.attempts, ptq.interruptions) == (1, 1)
    assert history.worked_s == 40.0 + 8.0
    assert history.sessions == 2


def test_stages_that_overlap_count_their_own_time_and_the_release_counts_once() -> None:
    history = replay(
        [
            BEGIN,
            started("ptq", elapsed_s=0.0),
            started("baseline_eval", elapsed_s=1.0),
            finished("baseline_eval", elapsed_s=5.0),
            finished("ptq", elapsed_s=7.0),
        ]
    )
    assert history.stages[Stage.PTQ].seconds == 7.0
    assert history.stages[Stage.BASELINE_EVAL].seconds == 4.0
    assert history.worked_s == 7.0


@pytest.mark.parametrize(
    "stamp",
    [
        pytest.param("1970-01-01T00:00:00.000Z", id="long-ago"),
        pytest.param("2999-01-01T00:00:00.000Z", id="far-ahead"),
        pytest.param("yesterday", id="no-time"),
        pytest.param(None, id="null"),
        pytest.param(5, id="number"),
        pytest.param("0001-01-01T00:00:00.000+23:00", id="out-of-range"),
    ],
)
def test_stamps_change_no_state_and_no_duration(stamp: Any) -> None:
    events = [BEGIN, started("ptq", elapsed_s=1.0), finished("ptq", elapsed_s=4.0)]
    usual = replay(events)
    other = replay([BEGIN, events[1], events[2] | {"at": stamp}])
    assert other.states == usual.states
    assert other.stages[Stage.PTQ].seconds == usual.stages[Stage.PTQ].seconds == 3.0
    assert other.worked_s == usual.worked_s


def test_events_without_elapsed_time_count_none() -> None:
    events = [dict(BEGIN), started("ptq"), finished("ptq")]
    for each in events:
        each.pop("elapsed_s", None)
    history = replay(events)
    assert history.stages[Stage.PTQ].state is State.DONE
    assert history.stages[Stage.PTQ].seconds is None


def test_a_retry_is_another_attempt() -> None:
    history = replay(
        [
            BEGIN,
            started("ptq", elapsed_s=0.0),
            finished("ptq", "failed", elapsed_s=2.0, failure_class="INFRA_TRANSIENT", detail="a"),
            started("ptq", attempt=2, elapsed_s=10.0),
        ]
    )
    ptq = history.stages[Stage.PTQ]
    assert (ptq.state, ptq.attempts, ptq.failures) == (State.RUNNING, 2, 1)
    assert (ptq.failure_class, ptq.detail, ptq.finished_at) == (None, "", None)
    assert ptq.seconds == 2.0


def test_a_lower_number_of_attempts_is_not_believed() -> None:
    history = replay([BEGIN, started("ptq", attempt=3), started("ptq", attempt=1)])
    assert history.stages[Stage.PTQ].attempts == 3


def test_a_stage_taken_back_forgets_its_files_and_keeps_its_attempts() -> None:
    history = replay(
        [
            BEGIN,
            started("ptq", inputs={"a": 1}),
            finished("ptq", outputs={"checkpoint/x": FILE}),
            event("stage_invalidated", stage="ptq", reason="changed: recipe.digest"),
        ]
    )
    ptq = history.stages[Stage.PTQ]
    assert (ptq.state, ptq.attempts) == (State.PENDING, 1)
    assert ptq.inputs is None and ptq.outputs is None
    assert "changed: recipe.digest" in ptq.troubles[0]


def test_reopening_takes_back_failures_and_closeout_only() -> None:
    history = replay(
        [
            BEGIN,
            started("setup"),
            finished("setup"),
            started("ptq"),
            finished("ptq", "failed", gate="ptq", failure_class="SIZE_NOT_REDUCED"),
            started("closeout"),
            finished("closeout"),
            event("release_finished", decision="ANOMALOUS", exit_code=3),
            event("release_reopened", reason="resumed"),
        ]
    )
    assert history.stages[Stage.SETUP].state is State.DONE
    assert history.stages[Stage.PTQ].state is State.PENDING
    assert history.stages[Stage.PTQ].attempts == 1
    assert history.stages[Stage.CLOSEOUT].state is State.PENDING
    assert history.outcome == {}


def test_accepted_drift_is_kept() -> None:
    change = {"field": "config.seed", "was": 1, "now": 2, "invalidates": ["ptq", "compare"]}
    assert replay([BEGIN, event("drift_accepted", changes=[change])]).changes == [change]


CHANGE = {"field": "config.seed", "was": 1, "now": 2, "invalidates": ["ptq"]}


@pytest.mark.parametrize("name", CHANGE)
@pytest.mark.parametrize("wrong", [None, 5], ids=["missing", "number"])
def test_a_change_that_does_not_say_what_changed_is_refused(name: str, wrong: int | None) -> None:
    change = {key: value for key, value in CHANGE.items() if key != name}
    if wrong is not None and name not in ("was", "now"):
        change[name] = wrong
    with pytest.raises(EventError, match="changes"):
        replay([BEGIN, event("drift_accepted", changes=[change])])


def test_a_decision_is_one_that_there_is() -> None:
    with pytest.raises(EventError, match="decision: 'MAYBE' is none"):
        replay([BEGIN, event("release_finished", decision="MAYBE", exit_code=0)])


def test_an_established_state_is_taken_over() -> None:
    found = {"state": "done", "attempts": 2, "outputs": {"verdicts/ptq.json": FILE}}
    history = replay(
        [
            event(
                "state_established",
                source="manifest version 1",
                run_id="old",
                model="m",
                recipe="r",
                started_at=AT,
                stages={"ptq": found, "deploy": {"state": "failed", "attempts": 1, "gate": "x"}},
                unknown=["nobody knows"],
            )
        ]
    )
    assert (history.run_id, history.model, history.recipe) == ("old", "m", "r")
    assert history.begun
    assert history.stages[Stage.PTQ].state is State.DONE
    assert history.stages[Stage.PTQ].outputs == found["outputs"]
    assert history.stages[Stage.DEPLOY].gate == "x"
    assert history.stages[Stage.SETUP].state is State.PENDING
    assert history.unknown == ["nobody knows"]


def test_establishing_never_lowers_the_number_of_attempts() -> None:
    lower = {"ptq": {"state": "pending", "attempts": 0}}
    history = replay(
        [BEGIN, started("ptq", attempt=3), event("state_established", stages=lower, unknown=[])]
    )
    assert history.stages[Stage.PTQ].attempts == 3


@pytest.mark.parametrize("name", ["server_started", "a_newer_event", "release_stopped", ""])
def test_other_events_change_nothing_but_the_chain(name: str) -> None:
    before = replay([BEGIN])
    after = replay([BEGIN, event(name, stage=["x"], attempt="many")])
    assert (after.events, before.events) == (2, 1)
    assert after.head != before.head
    assert replace(after, events=before.events, head=before.head) == before


def test_the_head_is_the_digest_of_the_last_line() -> None:
    last = event("release_resumed", 1.0, previous="é")
    history = replay([BEGIN, last])
    assert history.head == hashlib.sha256(json.dumps(last).encode()).hexdigest()
    assert history.document()["head"] == history.head
    assert history.document()["events"] == 2
    assert chained(history, event("next"))["previous"] == history.head
    assert chained(History(), BEGIN)["previous"] is None


GOOD: dict[str, dict[str, Any]] = {
    "release_started": BEGIN,
    "release_resumed": event("release_resumed", 1.0, pid=2, day0_version="0"),
    "stage_started": started("ptq", inputs={"a": 1}),
    "stage_continued": event("stage_continued", stage="ptq", attempt=1),
    "stage_finished": finished("ptq", outputs={"a": FILE}),
    "stage_invalidated": event("stage_invalidated", stage="ptq", reason="r"),
    "drift_accepted": event("drift_accepted", changes=[]),
    "release_reopened": event("release_reopened", reason="r"),
    "release_finished": event("release_finished", decision="ACCEPT", exit_code=0),
    "state_established": event(
        "state_established", stages={"ptq": {"state": "done", "attempts": 1}}, unknown=[]
    ),
}


def test_every_event_that_counts_has_an_example() -> None:
    assert GOOD.keys() == HANDLERS.keys()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        pytest.param(name, field, value, id=f"{name}-{field}-{label}")
        for name, fields in {
            "release_started": ("model", "recipe", "run_id", "elapsed_s"),
            "stage_started": ("stage", "attempt", "inputs", "elapsed_s"),
            "stage_continued": ("stage", "attempt"),
            "stage_finished": ("stage", "attempt", "state", "outputs", "detail", "gate"),
            "stage_invalidated": ("stage", "reason"),
            "drift_accepted": ("changes",),
            "release_reopened": ("reason",),
            "release_finished": ("decision", "exit_code"),
            "state_established": ("stages", "unknown", "model"),
        }.items()
        for field in fields
        for label, value in {
            "list": [["x"]],
            "number": -1,
            "boolean": True,
            "mapping": {"x": {"y": 1}},
        }.items()
        if not (field == "stages" and label == "x")
    ],
)
def test_a_wrong_field_is_named_and_changes_nothing(name: str, field: str, value: Any) -> None:
    history = History() if name == "release_started" else replay([BEGIN])
    before = copy.deepcopy(history)
    with pytest.raises(EventError, match=field if field != "stages" else "stage"):
        apply(history, GOOD[name] | {field: value})
    assert history == before


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        pytest.param({"stage": "no-such-stage"}, "is not a stage", id="unknown-stage"),
        pytest.param({"state": "exploded"}, "is not a state", id="unknown-state"),
        pytest.param({"state": "running"}, "does not finish", id="finished-running"),
        pytest.param({"attempt": 0}, "attempt", id="attempt-zero"),
        pytest.param({"attempt": 10**400}, "attempt", id="attempt-huge"),
        pytest.param({"attempt": 1.0}, "attempt", id="attempt-float"),
        pytest.param({"elapsed_s": float("nan")}, "elapsed_s", id="elapsed-nan"),
        pytest.param({"elapsed_s": float("inf")}, "elapsed_s", id="elapsed-infinite"),
        pytest.param({"elapsed_s": 10**400}, "elapsed_s", id="elapsed-huge"),
        pytest.param({"outputs": {"a": {"sha256": "x"}}}, r"outputs\.a", id="output-no-size"),
        pytest.param({"outputs": {"/etc/passwd": FILE}}, "below the run", id="output-elsewhere"),
        pytest.param({"outputs": {"a/../../b": FILE}}, "below the run", id="output-above"),
        pytest.param({"outputs": {"a\0": FILE}}, "below the run", id="output-no-name"),
        pytest.param(
            {"outputs": {"a": {"sha256": "x", "bytes": -1}}}, r"outputs\.a", id="output-negative"
        ),
        pytest.param({"event": None}, "event: must be a text, is absent", id="event-absent"),
        pytest.param({"stage": "x" * 10_000}, "is not a stage", id="long"),
    ],
)
def test_wrong_values(wrong: dict[str, Any], word: str) -> None:
    history = replay([BEGIN])
    before = copy.deepcopy(history)
    with pytest.raises(EventError, match=word) as refused:
        apply(history, GOOD["stage_finished"] | wrong)
    assert len(str(refused.value)) < 400
    assert history == before


def test_a_release_begins_once() -> None:
    with pytest.raises(EventError, match="started before"):
        replay([BEGIN, BEGIN])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(
    name=st.sampled_from([*HANDLERS, "other"]),
    changed=st.dictionaries(
        st.sampled_from(
            [
                *("stage", "state", "attempt", "elapsed_s", "inputs", "outputs", "stages", "gate"),
                *("changes", "unknown", "decision", "exit_code", "reason", "detail", "at"),
                "failure_class",
            ]
        ),
        JSON | st.sampled_from([*STAGES, *State]),
        max_size=4,
    ),
)
@settings(max_examples=300, deadline=None)
def test_any_event_is_applied_whole_or_refused_whole(name: str, changed: dict[str, Any]) -> None:
    history = History() if name == "release_started" else replay([BEGIN])
    before = copy.deepcopy(history)
    try:
        apply(history, GOOD.get(name, event(name)) | changed)
    except EventError:
        assert history == before
    else:
        document = json.loads(json.dumps(history.document(), allow_nan=False))
        assert document["stages"].keys() == set(STAGES)


@pytest.mark.parametrize(
    ("stamp", "known"),
    [(AT, True), ("2026-01-02T03:04:05+02:00", True), ("x", False), (None, False), (7, False)],
)
def test_moment_of(stamp: Any, known: bool) -> None:
    assert (moment_of(stamp) is not None) is known
