"""Evaluating the source beside the quantizer: when it is worthwhile, and how it ends."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from job_folders import cluster, resources

from conductor import ahead
from conductor.ahead import Ahead, NotWanted, beside_the_server, devices, is_worthwhile
from conductor.cluster.description import Cluster
from conductor.compatibility import Device
from conductor.config import load_config
from conductor.environments.builder import Environments
from conductor.probes.machine import Accelerator, Machine
from conductor.world import World

GPU = Accelerator(name="one", memory_bytes=2**36, driver="1", compute_capability=(9, 0))


def world(*, cores: int = 4, accelerators: int = 0, visible: str | None = None) -> World:
    machine = Machine(
        device=Device.CUDA if accelerators else Device.CPU,
        accelerators=(GPU,) * accelerators,
        processor="p",
        cores=cores,
        memory_bytes=2**36,
        memory_available_bytes=2**35,
        system="s",
    )
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return World(environments=Environments(Path("e")), environ=environ, machine=machine)


def on(cluster: Cluster) -> World:
    return World.on(cluster, {})


CASES: list[Any] = [
    pytest.param({}, world(cores=4), 1.0, True, True, id="idle-cores"),
    pytest.param({}, world(cores=2), 0.0, True, True, id="two-idle-cores"),
    pytest.param({}, world(cores=2), 0.1, True, False, id="one-busy-core-of-two"),
    pytest.param({}, world(cores=4), 1.0, False, False, id="no-memory-for-two-servers"),
    pytest.param({"dry_run": True}, world(cores=4), 0.0, True, False, id="dry-run"),
    pytest.param({}, world(accelerators=1), 0.0, False, False, id="one-device"),
    pytest.param({}, world(accelerators=2), 9.0, False, True, id="two-devices"),
    pytest.param({}, world(accelerators=2, visible="1"), 0.0, False, False, id="one-is-ours"),
    pytest.param(
        {"engine.tensor_parallel_size": 2}, world(accelerators=2), 0.0, False, False, id="both-used"
    ),
    pytest.param({}, on(cluster()), 9.0, False, True, id="an-allocation-for-each"),
    pytest.param({}, on(cluster(max_jobs=1)), 9.0, False, False, id="one-job-at-a-time"),
    pytest.param({"dry_run": True}, on(cluster()), 0.0, False, False, id="dry-run-on-a-cluster"),
    pytest.param(
        {"overlap": "always"}, on(cluster(max_jobs=1)), 9.0, False, True, id="always-on-a-cluster"
    ),
    pytest.param({"overlap": "never"}, on(cluster()), 9.0, False, False, id="never-on-a-cluster"),
    pytest.param({"overlap": "always"}, world(cores=1), 9.0, False, True, id="always"),
    pytest.param({"overlap": "never"}, world(cores=64), 0.0, True, False, id="never"),
]


@pytest.mark.parametrize(("options", "there", "load", "holds_both", "worthwhile"), CASES)
def test_overlapping_needs_room(
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    there: World,
    load: float,
    holds_both: bool,
    worthwhile: bool,
) -> None:
    monkeypatch.setattr(ahead.os, "getloadavg", lambda: (load, load, load))
    config = load_config(None, {"model": "demo", "recipe": "int8", **options})
    engine: Any = SimpleNamespace(holds_both=holds_both)
    assert is_worthwhile(config, engine, there) is worthwhile


@pytest.mark.parametrize(
    ("there", "names", "last"),
    [
        pytest.param(world(), [], None, id="none"),
        pytest.param(world(accelerators=1), ["0"], None, id="one"),
        pytest.param(world(accelerators=4), ["0", "1", "2", "3"], "3", id="four"),
        pytest.param(world(accelerators=4, visible="2,0"), ["2", "0"], "0", id="two-of-four"),
        pytest.param(world(accelerators=4, visible=""), [], None, id="hidden"),
        pytest.param(on(cluster(asked=resources(gpus=2))), ["0", "1"], None, id="jobs-share-none"),
    ],
)
def test_the_quantizer_takes_the_device_that_no_server_takes(
    there: World, names: list[str], last: str | None
) -> None:
    assert devices(there) == names
    expected = there if last is None else replace(there, environ={"CUDA_VISIBLE_DEVICES": last})
    assert beside_the_server(there) == expected


def test_waiting_passes_progress_on_and_ends_with_the_evaluation() -> None:
    shown: list[tuple[int, int, str]] = []
    may_end = threading.Event()

    def evaluate(progress: Any, still_wanted: Any) -> None:
        progress(3, 4, "asking")
        assert may_end.wait(10)

    running = Ahead(evaluate)

    def show(*report: Any) -> None:
        shown.append(report)
        if report == (3, 4, "asking"):
            may_end.set()

    running.wait(show)
    assert shown[-1] == (3, 4, "asking")
    assert running.problem is None


def test_cancelling_ends_it_where_it_is() -> None:
    ended: list[str] = []

    def evaluate(progress: Any, still_wanted: Any) -> None:
        try:
            while True:
                still_wanted()
                time.sleep(0.01)
        finally:
            ended.append("in order")

    running = Ahead(evaluate)
    running.cancel()
    assert ended == ["in order"]
    assert isinstance(running.problem, NotWanted)


def test_an_interruption_reaches_it_as_one() -> None:
    def evaluate(progress: Any, still_wanted: Any) -> None:
        while True:
            still_wanted()
            time.sleep(0.01)

    running = Ahead(evaluate)
    running.cancel(because=KeyboardInterrupt)
    assert isinstance(running.problem, KeyboardInterrupt)


def test_what_goes_wrong_ahead_is_kept_and_stops_nobody() -> None:
    def evaluate(progress: Any, still_wanted: Any) -> None:
        raise OSError(28, "No space left on device")

    running = Ahead(evaluate)
    running.wait(lambda *report: None)
    assert isinstance(running.problem, OSError)
