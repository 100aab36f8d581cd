import pytest

from conductor.chain import STAGES, Stage, State, next_stage


def states(**known: State) -> dict[Stage, State]:
    return {Stage(name): state for name, state in known.items()}


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        pytest.param({}, Stage.SETUP, id="nothing-known"),
        pytest.param(states(setup=State.DONE), Stage.PTQ, id="first-done"),
        pytest.param(states(setup=State.RUNNING), Stage.SETUP, id="interrupted-runs-again"),
        pytest.param(states(setup=State.FAILED), Stage.CLOSEOUT, id="failed-closes-out"),
        pytest.param(
            states(setup=State.DONE, ptq=State.FAILED), Stage.CLOSEOUT, id="gate-failed-closes-out"
        ),
        pytest.param(
            states(setup=State.DONE, ptq=State.FAILED, closeout=State.RUNNING),
            Stage.CLOSEOUT,
            id="interrupted-closeout-runs-again",
        ),
        pytest.param(
            states(setup=State.FAILED, closeout=State.DONE), None, id="closed-out-is-over"
        ),
        pytest.param(dict.fromkeys(STAGES, State.DONE), None, id="all-done"),
    ],
)
def test_next_stage(known: dict[Stage, State], expected: Stage | None) -> None:
    assert next_stage(known) == expected


@pytest.mark.parametrize("failing", [stage for stage in STAGES if stage != Stage.CLOSEOUT])
def test_no_stage_but_closeout_follows_a_failure(failing: Stage) -> None:
    known: dict[Stage, State] = {}
    run = []
    while (stage := next_stage(known)) is not None:
        run.append(stage)
        known[stage] = State.FAILED if stage == failing else State.DONE
    assert run == [*STAGES[: STAGES.index(failing) + 1], Stage.CLOSEOUT]
