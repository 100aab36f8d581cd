"""Who asks the source, where several releases would ask it the same.

The first of them that is started leads; the others wait at the stages that ask the source until the
leader has passed them, and then find its answers in the cache. Invariants:

* A leader that ends without having passed a stage makes way: whoever waits takes its place.
* Which releases wait for each other decides how long a fleet takes, and nothing else. What may be
  taken from the cache is decided there, by everything that the answers depend on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from threading import Condition
from typing import Any

from conductor.chain import Stage
from conductor.config import Config
from conductor.executors.local import Progress
from conductor.inputs import CHANGES_NO_RESULT, NEEDS
from conductor.release_state import Release
from conductor.stages import STAGE_FUNCTIONS, StageFunction
from gates import Verdict

LOOK_S = 0.5
"""Longest that a release that was asked to stop goes on waiting."""

ASKING = (Stage.DEPLOY, Stage.BASELINE_EVAL)
"""The stages whose answers of the source are kept for the next release."""

_WHERE = ("config.executor", "config.cluster")
_DECIDING = (
    *("config.model", "config.seed", "config.dry_run", "config.deterministic", *_WHERE),
    *NEEDS[Stage.DEPLOY],
    *NEEDS[Stage.BASELINE_EVAL],
)


def baseline_of(config: Config, engine: str) -> str | None:
    """Return what is the same for all releases that ask their source the same; None shares nothing.

    ``engine`` is the one that answers.
    """
    if config.fresh_baseline:
        return None
    settings = {f"config.{name}": value for name, (value, _) in config.origins.items()}
    deciding = {
        name: value
        for name, value in settings.items()
        if name.startswith(_DECIDING) and (name in _WHERE or not name.startswith(CHANGES_NO_RESULT))
    }
    return json.dumps([engine, deciding], sort_keys=True)


class Sharing:
    """The releases that ask one source the same; each is known by its run id."""

    def __init__(self) -> None:
        """Begin with no leader and nothing passed."""
        self._changed = Condition()
        self._leader: str | None = None
        self._passed: set[Stage] = set()

    def lead(self, run_id: str) -> bool:
        """Tell whether a release that is started now is the one to ask."""
        with self._changed:
            if self._leader is None and not self._passed.issuperset(ASKING):
                self._leader = run_id
            return self._leader == run_id

    def wait(self, stage: Stage, run_id: str, progress: Progress) -> None:
        """Return when the answers of ``stage`` are there, or are for this release to get."""
        while leader := self._ahead_of(stage, run_id):
            progress(0, 0, f"waiting for the answers of the source that {leader} gets")

    def _ahead_of(self, stage: Stage, run_id: str) -> str | None:
        """Return who is to be waited for still; waits a moment where there is somebody."""
        with self._changed:
            if not self._may_go_on(stage, run_id):
                self._changed.wait(LOOK_S)
            return None if self._may_go_on(stage, run_id) else self._leader

    def _may_go_on(self, stage: Stage, run_id: str) -> bool:
        """Tell whether a release need not wait; it leads from now on where nobody does."""
        if stage in self._passed:
            return True
        self._leader = self._leader or run_id
        return self._leader == run_id

    def keep(self, stage: Stage) -> None:
        """Let the others go on: the answers of ``stage`` are there."""
        with self._changed:
            self._passed.add(stage)
            self._changed.notify_all()

    def leave(self, run_id: str) -> None:
        """Make way for another leader, if this release was the one."""
        with self._changed:
            if self._leader == run_id:
                self._leader = None
                self._changed.notify_all()


def sharing_stages(sharing: Sharing, run_id: str) -> Mapping[Stage, StageFunction]:
    """Return the stages of a release that asks its source when its turn has come."""
    taking_turns = {stage: _in_turn(stage, sharing, run_id) for stage in ASKING}
    return {**STAGE_FUNCTIONS, **taking_turns}


def _in_turn(stage: Stage, sharing: Sharing, run_id: str) -> StageFunction:
    carry_out: Callable[[Release, Progress], dict[str, Any]] = STAGE_FUNCTIONS[stage]

    def run(release: Release, progress: Progress) -> dict[str, Verdict]:
        if not release.replaying:
            sharing.wait(stage, run_id, progress)
        verdicts = carry_out(release, progress)
        if all(verdict.passed for verdict in verdicts.values()):
            sharing.keep(stage)
        return verdicts

    return run
