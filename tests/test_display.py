import io

import pytest
from rich.console import Console

from conductor.chain import Stage, State
from conductor.display import LiveDisplay, PlainDisplay, open_display


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=120, color_system=None), stream


@pytest.mark.parametrize(("terminal", "kind"), [(True, LiveDisplay), (False, PlainDisplay)])
def test_the_display_fits_where_it_writes(terminal: bool, kind: type) -> None:
    assert isinstance(open_display(console(terminal=terminal)[0]), kind)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failed_stage_leaves_one_line(terminal: bool) -> None:
    where, stream = console(terminal=terminal)
    with open_display(where) as display:
        display.stage_started(Stage.PTQ, 1)
        display.stage_progress(3, 128, "calibrating [3/128]")
        display.stage_finished(Stage.PTQ, State.FAILED, "no [room]\n    a log tail")
    assert "no [room]" in stream.getvalue()
    assert "a log tail" not in stream.getvalue()


def test_a_new_stage_forgets_the_length_of_the_last() -> None:
    where, _ = console(terminal=True)
    with LiveDisplay(where) as display:
        display.stage_started(Stage.PTQ, 1)
        display.stage_progress(3, 128, "calibrating")
        display.stage_started(Stage.COMPARE, 1)
        (row,) = display._progress.tasks
        assert (row.total, row.completed) == (None, 0)
        display.stage_progress(0, 0, "comparing")
        assert row.total is None


def test_plain_lines_say_the_attempt() -> None:
    where, stream = console(terminal=False)
    with PlainDisplay(where) as display:
        display.stage_started(Stage.DEPLOY, 2)
    assert stream.getvalue() == "deploy: started, attempt 2\n"
