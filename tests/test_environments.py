"""The environments: what their locks promise, when one is ready, and what a build leaves behind."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from conductor.compatibility import Device
from conductor.environments import __main__ as command
from conductor.environments import builder
from conductor.environments.builder import (
    ENVIRONMENTS,
    STAMP,
    EnvironmentFailed,
    Environments,
    Status,
    default_root,
    installer_variables,
    names_for,
    pip_settings,
)
from gates import FailureClass

PIN = re.compile(r"[a-z0-9][a-z0-9.-]*==[0-9A-Za-z.+!]+")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_lock_pins_everything_and_names_no_place(name: str) -> None:
    lines = ENVIRONMENTS[name].lock.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert [line for line in pins if not PIN.fullmatch(line)] == []
    assert [line for line in lines if "://" in line or "/opt" in line or "/home" in line] == []
    assert [line for line in pins if line.startswith("torch==")] in ([], ["torch==2.13.0"])


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_lock_holds_what_was_asked_for(name: str) -> None:
    environment = ENVIRONMENTS[name]
    pins = dict(
        line.split("==")
        for line in environment.lock.read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    for line in environment.request.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            package, _, version = re.sub(r"\[.*\]", "", line).partition("==")
            assert package in pins
            assert pins[package] == version or not version


def test_excluded_packages_are_not_locked() -> None:
    pins = ENVIRONMENTS["serve-cpu"].lock.read_text(encoding="utf-8")
    assert ENVIRONMENTS["serve-cpu"].excludes
    assert not re.search(r"^torch(vision|audio|codec)==", pins, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (Device.CPU, ["quantize", "serve-cpu", "evaluate", "reference"]),
        (Device.CUDA, ["quantize", "serve-cuda", "evaluate", "reference"]),
    ],
)
def test_names_for(device: Device, expected: list[str]) -> None:
    assert names_for(device) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({"DAY0_ENVIRONMENTS": "/a", "XDG_CACHE_HOME": "/b"}, "/a", id="chosen"),
        pytest.param({"XDG_CACHE_HOME": "/b"}, "/b/day0/environments", id="xdg"),
        pytest.param(
            {"DAY0_ENVIRONMENTS": "", "XDG_CACHE_HOME": ""},
            f"{Path.home()}/.cache/day0/environments",
            id="empty-is-unset",
        ),
    ],
)
def test_default_root(variables: dict[str, str], expected: str) -> None:
    assert default_root(variables) == Path(expected)


@pytest.mark.parametrize(
    ("variables", "device", "settings", "expected"),
    [
        pytest.param({}, Device.CPU, {}, {"UV_TORCH_BACKEND": "cpu"}, id="cpu-torch"),
        pytest.param({}, Device.CUDA, {}, {"UV_TORCH_BACKEND": "auto"}, id="cuda-torch"),
        pytest.param(
            {}, Device.CPU, {"find-links": "/w /x"}, {"UV_FIND_LINKS": "/w,/x"}, id="find-links"
        ),
        pytest.param(
            {"UV_TORCH_BACKEND": "auto"},
            Device.CPU,
            {},
            {"UV_TORCH_BACKEND": "auto"},
            id="backend-chosen",
        ),
        pytest.param(
            {"UV_DEFAULT_INDEX": "mine"},
            Device.CUDA,
            {"index-url": "pips"},
            {"UV_DEFAULT_INDEX": "mine", "UV_TORCH_BACKEND": "auto"},
            id="uv-wins",
        ),
        pytest.param(
            {},
            Device.CUDA,
            {"extra-index-url": "a  b", "cert": "c.pem"},
            {
                "UV_INDEX": "a b",
                "UV_INDEX_STRATEGY": "unsafe-best-match",
                "SSL_CERT_FILE": "c.pem",
                "UV_TORCH_BACKEND": "auto",
            },
            id="all-indexes-count",
        ),
        pytest.param(
            {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": "/p", "HOME": "/h"},
            Device.CUDA,
            {},
            {"HOME": "/h", "UV_TORCH_BACKEND": "auto"},
            id="bytecode-is-wanted",
        ),
    ],
)
def test_installer_variables(
    variables: dict[str, str], device: Device, settings: dict[str, str], expected: dict[str, str]
) -> None:
    assert installer_variables(variables, device, settings) == expected


def test_pip_settings_come_from_variables_over_files(tmp_path: Path) -> None:
    configuration = tmp_path / "pip.conf"
    configuration.write_text("[global]\nfind-links = /from-file\nindex-url = http://file/\n")
    found = pip_settings(
        {
            "PATH": os.environ["PATH"],
            "PIP_CONFIG_FILE": str(configuration),
            "PIP_INDEX_URL": "http://variable/",
        }
    )
    assert found["find-links"] == "/from-file"
    assert found["index-url"] == "http://variable/"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environments:
    """Environments whose ``evaluate`` is one package of ours, installed without a network."""
    locks, wheels = tmp_path / "locks", tmp_path / "wheels"
    locks.mkdir()
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        info = f"tiny_package-{version}.dist-info"
        with zipfile.ZipFile(wheels / f"tiny_package-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("tiny_package.py", "VALUE = 1\n")
            wheel.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: tiny-package\nVersion: {version}\n",
            )
            wheel.writestr(
                f"{info}/WHEEL",
                "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            wheel.writestr(f"{info}/RECORD", "")
    (locks / "evaluate.txt").write_text("tiny-package==1.0\n")
    monkeypatch.setattr(builder, "HERE", locks)
    monkeypatch.setattr(builder, "BUILD_ATTEMPTS", 1)
    monkeypatch.setattr(builder, "pip_settings", lambda variables: {})  # half a second a build
    variables = {
        **os.environ,
        "UV_FIND_LINKS": str(wheels),
        "UV_OFFLINE": "1",
        "UV_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPYCACHEPREFIX": str(tmp_path / "elsewhere"),
    }
    return Environments(tmp_path / "root", variables=variables)


def test_build_makes_it_ready_once(tiny: Environments) -> None:
    assert tiny.status("evaluate") is Status.ABSENT
    assert tiny.versions("evaluate") == {}
    lines: list[str] = []
    assert tiny.build("evaluate", lines.append) is True
    assert any("tiny-package" in line for line in lines)
    assert tiny.status("evaluate") is Status.READY
    assert tiny.versions("evaluate") == {"tiny-package": "1.0"}
    assert tiny.interpreter("evaluate").exists()
    assert tiny.build("evaluate") is False


def test_build_compiles_bytecode_whatever_the_caller_exports(tiny: Environments) -> None:
    tiny.build("evaluate")
    assert list((tiny.root / "evaluate").glob("lib/*/site-packages/__pycache__/tiny_package.*.pyc"))


def test_changed_lock_is_stale_and_rebuilt(tiny: Environments) -> None:
    tiny.build("evaluate")
    ENVIRONMENTS["evaluate"].lock.write_text("tiny-package==2.0\n")
    assert tiny.status("evaluate") is Status.STALE
    assert tiny.build("evaluate") is True
    assert tiny.versions("evaluate") == {"tiny-package": "2.0"}


def test_other_device_is_stale(tiny: Environments) -> None:
    tiny.build("evaluate")
    assert Environments(tiny.root, device=Device.CUDA).status("evaluate") is Status.STALE


@pytest.mark.parametrize(
    "stamp", ["", "{", "[]", "null", '{"digest": 1}', '{"digest": "0"}', "\ufeff"]
)
def test_damaged_stamp_is_stale(tiny: Environments, stamp: str) -> None:
    tiny.build("evaluate")
    (tiny.root / "evaluate" / STAMP).write_text(stamp, encoding="utf-8")
    assert tiny.status("evaluate") is Status.STALE


def test_missing_interpreter_is_stale(tiny: Environments) -> None:
    tiny.build("evaluate")
    tiny.interpreter("evaluate").unlink()
    assert tiny.status("evaluate") is Status.STALE


def test_interrupted_build_is_not_ready_and_can_be_repeated(tiny: Environments) -> None:
    def interrupt(line: str) -> None:
        if "tiny-package" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.build("evaluate", interrupt)
    assert tiny.status("evaluate") is Status.STALE
    assert tiny.build("evaluate") is True
    assert tiny.status("evaluate") is Status.READY


def test_two_builders_do_not_collide(tiny: Environments) -> None:
    built: list[bool] = []
    threads = [
        threading.Thread(target=lambda: built.append(tiny.build("evaluate"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built) == [False, True]


def test_unreachable_package_is_an_error_with_the_log(tiny: Environments) -> None:
    ENVIRONMENTS["evaluate"].lock.write_text("tiny-package==3.0\n")
    with pytest.raises(EnvironmentFailed, match=r"evaluate\.log") as caught:
        tiny.build("evaluate")
    assert caught.value.failure_class is FailureClass.SYSTEMIC
    assert "tiny-package" in caught.value.problem
    assert "tiny-package" in (tiny.root / "evaluate.log").read_text()
    assert tiny.status("evaluate") is Status.STALE


def test_network_trouble_is_tried_again(
    tiny: Environments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "BUILD_ATTEMPTS", 2)
    tiny.variables |= {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0"}
    del tiny.variables["UV_OFFLINE"]
    lines: list[str] = []
    with pytest.raises(EnvironmentFailed, match="network"):
        tiny.build("evaluate", lines.append)
    assert sum("Failed to fetch" in line for line in lines) == 2


def test_full_disk_is_refused_before_anything_runs(
    tiny: Environments, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    with pytest.raises(EnvironmentFailed, match="GiB needed"):
        tiny.build("evaluate")
    assert not (tiny.root / "evaluate").exists()


def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    with pytest.raises(EnvironmentFailed, match="DAY0_ENVIRONMENTS"):
        Environments(tmp_path / "root").build("evaluate")


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailed, match="Known: quantize"):
        Environments(tmp_path).status("evaluat")


def test_command_builds_and_reports(
    tiny: Environments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in tiny.variables.items():
        monkeypatch.setenv(name, value)
    root = str(tiny.root)
    assert command.main(["build", "evaluate", "--root", root]) == 0
    assert capsys.readouterr().out.startswith("evaluate: built in ")
    assert command.main(["build", "evaluate", "--root", root]) == 0
    assert capsys.readouterr().out.startswith("evaluate: ready, 0.0 GiB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--device", "tpu"], "invalid"),
        (["build", "nothing"], "no such environment"),
        (["lock", "nothing"], "no such environment"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_command_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = command.main(arguments)
    except SystemExit as stopped:
        code = int(str(stopped.code))
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_given_interpreter_stands_for_an_environment(tmp_path: Path) -> None:
    given = Environments(tmp_path / "root", interpreters={"evaluate": Path(sys.executable)})
    assert given.status("evaluate") is Status.READY
    assert given.status("quantize") is Status.ABSENT
    assert given.interpreter("evaluate") == Path(sys.executable)
    assert given.build("evaluate") is False
    assert given.python_version("evaluate") == platform.python_version()
    assert given.versions("evaluate")["pytest"] == pytest.__version__
    assert len(given.packages("evaluate")["pytest"]["sha256"] or "") == 64
    assert not (tmp_path / "root").exists()


def test_a_given_interpreter_is_identified_by_its_packages(tmp_path: Path) -> None:
    here = Environments(tmp_path, interpreters={"evaluate": Path(sys.executable)})
    linked = tmp_path / "python"
    linked.symlink_to(sys.executable)  # a link outside its environment sees other packages
    other = Environments(tmp_path, interpreters={"evaluate": linked})
    again = Environments(tmp_path, interpreters={"evaluate": Path(sys.executable)})
    assert here.digest("evaluate") == again.digest("evaluate") != other.digest("evaluate")
    assert here.digest("quantize") == Environments(tmp_path).digest("quantize")


def test_a_given_interpreter_that_is_not_there_is_absent(tmp_path: Path) -> None:
    given = Environments(tmp_path, interpreters={"evaluate": tmp_path / "no" / "python"})
    assert given.status("evaluate") is Status.ABSENT
    assert given.versions("evaluate") == {}
    assert given.python_version("evaluate") is None
    with pytest.raises(EnvironmentFailed, match=r"no/python is not there.*Correct the path"):
        given.build("evaluate")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param("#!/bin/sh\nexit 3\n", "exit status 3", id="fails"),
        pytest.param("#!/bin/sh\necho hello\n", "does not list its packages", id="no-python"),
        pytest.param("", "does not list its packages", id="no-program"),
    ],
)
def test_a_given_interpreter_that_cannot_be_asked_is_refused(
    tmp_path: Path, script: str, said: str
) -> None:
    path = tmp_path / "python"
    path.write_text(script)
    path.chmod(0o755)
    given = Environments(tmp_path, interpreters={"evaluate": path})
    with pytest.raises(EnvironmentFailed, match=said):
        given.digest("evaluate")
