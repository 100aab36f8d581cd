import pytest

from conductor.chain import EVERY_STEP, STAGES, Stage, State, Steps, check_steps, next_stage


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


@pytest.mark.parametrize(
    ("known", "last", "expected"),
    [
        pytest.param({}, Stage.SETUP, Stage.SETUP, id="the-last-itself-runs"),
        pytest.param(states(setup=State.DONE), Stage.SETUP, None, id="reached"),
        pytest.param(states(setup=State.DONE), Stage.PTQ, Stage.PTQ, id="on-the-way"),
        pytest.param(
            states(setup=State.DONE, ptq=State.FAILED),
            Stage.DEPLOY,
            Stage.CLOSEOUT,
            id="a-failure-before-it-closes-out",
        ),
        pytest.param(
            states(setup=State.FAILED), Stage.SETUP, Stage.CLOSEOUT, id="its-failure-closes-out"
        ),
        pytest.param(
            states(setup=State.DONE, ptq=State.FAILED), Stage.SETUP, None, id="failure-beyond-it"
        ),
        pytest.param(
            states(setup=State.DONE, ptq=State.RUNNING, baseline_eval=State.DONE),
            Stage.BASELINE_EVAL,
            Stage.PTQ,
            id="what-ran-ahead-is-not-the-end",
        ),
        pytest.param(
            dict.fromkeys(STAGES[:-1], State.DONE), Stage.CLOSEOUT, Stage.CLOSEOUT, id="whole-chain"
        ),
    ],
)
def test_next_stage_up_to_a_last(
    known: dict[Stage, State], last: Stage, expected: Stage | None
) -> None:
    assert next_stage(known, last) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param((None, None, None), EVERY_STEP, id="none"),
        pytest.param(("ptq", None, None), Steps(first=Stage.PTQ), id="from"),
        pytest.param((None, "deploy", None), Steps(last=Stage.DEPLOY), id="to"),
        pytest.param(
            ("ptq", "ptq", None), Steps(first=Stage.PTQ, last=Stage.PTQ), id="from-and-to-one"
        ),
        pytest.param(
            (None, None, "compare"), Steps(first=Stage.COMPARE, last=Stage.COMPARE), id="only"
        ),
    ],
)
def test_check_steps(options: tuple[str | None, str | None, str | None], expected: Steps) -> None:
    assert check_steps(*options) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(("quantize", None, None), "--from-step: 'quantize' is not a stage", id="from"),
        pytest.param((None, "PTQ", None), "--to-step: 'PTQ' is not a stage", id="to"),
        pytest.param((None, None, ""), "--only-step: '' is not a stage", id="only"),
        pytest.param(("deploy", "ptq", None), "deploy comes after --to-step ptq", id="backwards"),
        pytest.param(("ptq", None, "ptq"), "leave out --from-step", id="only-and-from"),
        pytest.param((None, "ptq", "ptq"), "leave out --from-step and --to-step", id="only-and-to"),
    ],
)
def test_impossible_steps_are_refused(
    options: tuple[str | None, str | None, str | None], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_steps(*options)
