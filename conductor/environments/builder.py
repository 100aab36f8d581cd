"""Build the interpreters that workers run under, from lock files, so that a stage is repeatable.

The quantizers and the server pin conflicting versions of the same libraries, so each kind of worker
has an environment of its own. An environment is built in place, because a virtual environment
cannot be moved, and its stamp is written last: a directory without the stamp of today's lock is
never used. Bytecode is compiled at installation; without it the server takes twice as long to
start.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from conductor import files
from conductor.compatibility import Device
from conductor.failure import Failure
from conductor.redaction import know, redact
from gates import FailureClass

HERE = Path(__file__).parent
PYTHON = "3.11"
PLATFORM = "x86_64-manylinux_2_28"
STAMP = "day0-environment.json"
GIB = 1 << 30

BUILD_ATTEMPTS = 3
BUILD_WAIT_S = 1800
# uv's exit code when it could not do its work (network, disk), as opposed to 1, no solution.
UV_TROUBLE = 2
TAIL_LINES = 12
ASK_TIMEOUT_S = 120
"""Longest that an interpreter may take to list its packages; shared storage may be slow."""
# Room for the environment itself plus the unpacked wheels in uv's cache, which may lie on the same
# disk and is shared by links only where the file system allows it.
DISK_FACTOR = 2

# What a given interpreter has, in the words of installed_packages; the first on its path is used.
LISTING = """
import hashlib, json, platform
from importlib.metadata import distributions
found = {}
for each in distributions():
    if each.metadata["Name"]:
        record = each.read_text("RECORD")
        found.setdefault(each.metadata["Name"].lower().replace("_", "-"), {
            "version": each.version,
            "sha256": record and hashlib.sha256(record.encode()).hexdigest(),
        })
print(json.dumps({"python": platform.python_version(), "packages": found}))
"""

# Settings of pip that decide where packages come from; uv does not read them by itself.
PIP_TO_UV = {
    "find-links": "UV_FIND_LINKS",
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "default-timeout": "UV_HTTP_TIMEOUT",
}


class Status(StrEnum):
    """Tell whether an environment can be used as it is."""

    READY = "ready"
    ABSENT = "absent"
    STALE = "stale"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Describe one environment: what runs in it, on which devices, and its size once built."""

    name: str
    purpose: str
    devices: tuple[Device, ...]
    size_bytes: int

    @property
    def request(self) -> Path:
        """Return the file that says what we ask for, and why."""
        return HERE / f"{self.name}.in"

    @property
    def lock(self) -> Path:
        """Return the file that pins every package."""
        return HERE / f"{self.name}.txt"

    @property
    def excludes(self) -> tuple[str, ...]:
        """Return the option that keeps unwanted dependencies out, or nothing."""
        path = HERE / f"{self.name}.excludes"
        return ("--excludes", str(path)) if path.exists() else ()


BOTH = (Device.CPU, Device.CUDA)
# Sizes as measured on x86-64 Linux with CPU wheels; the CUDA server is an estimate.
ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(
            name="quantize",
            purpose="ModelOpt and llm-compressor",
            devices=BOTH,
            size_bytes=int(1.6 * GIB),
        ),
        Environment(
            name="serve-cpu",
            purpose="vLLM, CPU build",
            devices=(Device.CPU,),
            size_bytes=int(3.2 * GIB),
        ),
        Environment(
            name="serve-cuda",
            purpose="vLLM, CUDA build",
            devices=(Device.CUDA,),
            size_bytes=12 * GIB,
        ),
        Environment(
            name="evaluate",
            purpose="lm-eval against a served model",
            devices=BOTH,
            size_bytes=int(0.6 * GIB),
        ),
        Environment(
            name="reference",
            purpose="lm-eval with transformers in process",
            devices=BOTH,
            size_bytes=int(1.6 * GIB),
        ),
    )
}


class EnvironmentFailed(Failure):
    """Say which environment could not be built, what happened, and what to do about it."""

    def __init__(self, name: str, problem: str, remedy: str) -> None:
        """Keep the parts; the message joins them."""
        super().__init__(FailureClass.SYSTEMIC, f"environment {name}: {problem}. {remedy}")
        self.name = name
        self.problem = problem
        self.remedy = remedy


def find(name: str) -> Environment:
    """Return the environment of that name; raises :class:`EnvironmentFailed`."""
    if name not in ENVIRONMENTS:
        known = ", ".join(ENVIRONMENTS)
        raise EnvironmentFailed(name, "no such environment", f"Known: {known}.")
    return ENVIRONMENTS[name]


def names_for(device: Device) -> list[str]:
    """Return the environments that a machine of this kind needs."""
    return [name for name, each in ENVIRONMENTS.items() if device in each.devices]


def default_root(variables: Mapping[str, str]) -> Path:
    """Return where environments live unless the caller says otherwise."""
    chosen = variables.get("DAY0_ENVIRONMENTS")
    if chosen:
        return Path(chosen)
    cache = variables.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "day0" / "environments"


class Environments:
    """Build and look up the worker environments under one root directory.

    An interpreter that is given stands for an environment of its name: somebody else built it, so
    it is what its packages are, and is never built or changed here.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        device: Device = Device.CPU,
        variables: Mapping[str, str] | None = None,
        interpreters: Mapping[str, Path] | None = None,
    ) -> None:
        """Choose root, device (whose torch build is wanted), variables, and given interpreters."""
        self.variables = dict(os.environ if variables is None else variables)
        # Absolute, but with its links kept: uv writes the path into the environment.
        self.root = Path(os.path.abspath(root or default_root(self.variables)))  # noqa: PTH100
        self.device = Device(device)
        self.given = dict(interpreters or {})
        self._listings: dict[str, dict[str, Any]] = {}

    def status(self, name: str) -> Status:
        """Return ready only for a finished build of today's lock whose interpreter exists."""
        if name in self.given:
            return Status.READY if self.given[name].exists() else Status.ABSENT
        home = self._home(name)
        if not home.exists():
            return Status.ABSENT
        try:
            stamp = json.loads((home / STAMP).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return Status.STALE
        same = isinstance(stamp, dict) and stamp.get("digest") == self.digest(name)
        return Status.READY if same and self.interpreter(name).exists() else Status.STALE

    def digest(self, name: str) -> str:
        """Identify what a build depends on: the lock, Python, and the device's torch.

        A given interpreter is identified by its version and its packages.
        """
        if name in self.given:
            return hashlib.sha256(
                json.dumps(self._listing(name), sort_keys=True).encode()
            ).hexdigest()
        digest = hashlib.sha256(f"{PYTHON} {self.device}\n".encode())
        digest.update(find(name).lock.read_bytes())
        return digest.hexdigest()

    def interpreter(self, name: str) -> Path:
        """Return the path of the environment's Python, whether or not it is built."""
        return self.given.get(name) or self._home(name) / "bin" / "python"

    def versions(self, name: str) -> dict[str, str]:
        """Return the version of every package that is installed; empty when nothing is built."""
        if name in self.given:
            return {package: str(each["version"]) for package, each in self.packages(name).items()}
        return {
            package: version for package, version, _ in _distributions(self._site_packages(name))
        }

    def packages(self, name: str) -> dict[str, dict[str, str | None]]:
        """Return of every package that is installed what :func:`installed_packages` says."""
        if name in self.given:
            packages: dict[str, dict[str, str | None]] = self._listing(name)["packages"]
            return packages
        return installed_packages(self._site_packages(name))

    def python_version(self, name: str) -> str | None:
        """Return the version of an environment's Python, or ``None`` where none is built."""
        if name in self.given:
            version: str | None = self._listing(name)["python"]
            return version
        try:
            lines = (self._home(name) / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        settings = (line.partition("=") for line in lines)
        return next((v.strip() for name, _, v in settings if name.strip() == "version_info"), None)

    def size_bytes(self, name: str) -> int:
        """Return the disk space of a built environment, links to uv's cache counted in full."""
        return sum(
            path.lstat().st_size
            for path in self._home(name).rglob("*")
            if path.is_file() and not path.is_symlink()
        )

    def build(self, name: str, on_line: Callable[[str], None] = lambda line: None) -> bool:
        """Make the environment ready; return False when it already was.

        ``on_line`` gets each line of the installer's output. Raises :class:`EnvironmentFailed`.
        Two builders of one environment do not collide: the second waits and finds it ready.
        """
        if self.status(name) is Status.READY:
            return False
        if name in self.given:
            raise EnvironmentFailed(
                name,
                f"its given interpreter {self.given[name]} is not there",
                "Correct the path, or leave it out and the environment is built.",
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f"{name}.lock", timeout=BUILD_WAIT_S):
                if self.status(name) is Status.READY:
                    return False
                self._check_disk(name)
                self._install(name, on_line)
        except Timeout as error:
            raise EnvironmentFailed(
                name,
                f"another build has held it for {BUILD_WAIT_S // 60} minutes",
                f"End that build, or remove {self.root / f'{name}.lock'} if none is running.",
            ) from error
        except OSError as error:
            raise EnvironmentFailed(
                name,
                f"cannot write under {self.root}: {error.strerror or error}",
                "Choose a directory you can write with DAY0_ENVIRONMENTS.",
            ) from error
        return True

    def _listing(self, name: str) -> dict[str, Any]:
        """Ask a given interpreter, once, for its version and packages; none where it is absent."""
        if not self.given[name].exists():
            return {"python": None, "packages": {}}
        if name not in self._listings:
            try:
                answer = subprocess.run(
                    [str(self.given[name]), "-I", "-c", LISTING],
                    env=self.variables,
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=ASK_TIMEOUT_S,
                )
                self._listings[name] = json.loads(answer.stdout)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                raise EnvironmentFailed(
                    name,
                    f"{self.given[name]} was given, and does not list its packages ({error})",
                    "Name an interpreter that runs on this machine too.",
                ) from None
        return self._listings[name]

    def _home(self, name: str) -> Path:
        return self.root / find(name).name

    def _site_packages(self, name: str) -> list[Path]:
        return list(self._home(name).glob("lib/python*/site-packages"))

    def _check_disk(self, name: str) -> None:
        needed = DISK_FACTOR * ENVIRONMENTS[name].size_bytes
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise EnvironmentFailed(
                name,
                f"{free / GIB:.1f} GiB free under {self.root}, {needed / GIB:.1f} GiB needed",
                "Free some space, or choose another disk with DAY0_ENVIRONMENTS.",
            )

    def _install(self, name: str, on_line: Callable[[str], None]) -> None:
        environment = ENVIRONMENTS[name]
        home = self._home(name)
        started = time.monotonic()
        if home.exists():
            (home / STAMP).unlink(missing_ok=True)
            shutil.rmtree(home)
        variables = installer_variables(self.variables, self.device, pip_settings(self.variables))
        with (self.root / f"{name}.log").open("w", encoding="utf-8") as log:
            uv = _Installer(name, variables, log, on_line)
            uv.run("venv", "--no-project", "--python", python_request(), str(home))
            uv.run(
                *("pip", "install", "--python", str(self.interpreter(name))),
                *("--compile-bytecode", "--no-progress", *environment.excludes),
                *("-r", str(environment.lock)),
            )
        stamp = {"digest": self.digest(name), "seconds": round(time.monotonic() - started, 1)}
        files.write_json(home / STAMP, stamp)


class _WorldAtFault(EnvironmentFailed):
    """Mark a failure of the network or the disk, which another attempt may not meet."""


class _Installer:
    """Run uv, keep what it says in a log, and try again when the world was at fault."""

    def __init__(
        self,
        name: str,
        variables: Mapping[str, str],
        log: TextIO,
        on_line: Callable[[str], None],
    ) -> None:
        """Keep the environment's name for messages, and uv's process variables."""
        self.name = name
        self.variables = dict(variables)
        know(self.variables)  # among them what pip's own files say of its index
        self.log = log
        self.on_line = on_line

    def run(self, *arguments: str) -> None:
        """Run one uv command; raises :class:`EnvironmentFailed` with its last lines."""
        attempts = Retrying(
            stop=stop_after_attempt(BUILD_ATTEMPTS),
            wait=wait_exponential(multiplier=2, max=30),
            retry=retry_if_exception_type(_WorldAtFault),
            reraise=True,
        )
        attempts(self._run_once, arguments)

    def _run_once(self, arguments: tuple[str, ...]) -> None:
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        with subprocess.Popen(
            uv_command(*arguments),
            env=self.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            try:
                for line in map(redact, process.stdout or ()):
                    self.log.write(line)
                    tail.append(line.rstrip())
                    self.on_line(line.rstrip())
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            self.log.flush()
            failure = _WorldAtFault if process.returncode == UV_TROUBLE else EnvironmentFailed
            raise failure(
                self.name,
                f"uv {arguments[0]} exited with {process.returncode}: " + " | ".join(tail),
                "Check the network, the package index (PIP_INDEX_URL, PIP_FIND_LINKS) and the "
                f"disk; the whole output is in {self.log.name}.",
            )


def installed_packages(directories: Iterable[Path]) -> dict[str, dict[str, str | None]]:
    """Return ``{package: {"version", "sha256"}}`` of what is installed under ``directories``.

    ``sha256`` is that of the package's ``RECORD``, which holds the digest of each of its files;
    ``None`` where its installer left none.
    """
    return {
        package: {"version": version, "sha256": _record_digest(path)}
        for package, version, path in _distributions(directories)
    }


def _distributions(directories: Iterable[Path]) -> list[tuple[str, str, Path]]:
    """Return name, version and metadata directory of every installed package, by name."""
    found = {}
    for path in (path for directory in directories for path in directory.glob("*.dist-info")):
        package, _, version = path.name.removesuffix(".dist-info").partition("-")
        found[package.lower().replace("_", "-")] = version, path
    return [(package, version, path) for package, (version, path) in sorted(found.items())]


def _record_digest(path: Path) -> str | None:
    try:
        return hashlib.sha256((path / "RECORD").read_bytes()).hexdigest()
    except OSError:
        return None


def uv_command(*arguments: str) -> list[str]:
    """Return the command line of the uv that is installed beside us."""
    return [sys.executable, "-m", "uv", "--color", "never", *arguments]


def python_request() -> str:
    """Return what to ask uv for: this interpreter where its version fits the locks."""
    fits = f"{sys.version_info.major}.{sys.version_info.minor}" == PYTHON
    return sys.executable if fits else PYTHON


def pip_settings(variables: Mapping[str, str]) -> dict[str, str]:
    """Return pip's own settings {"find-links": "..."} from its variables and its files.

    Without a pip in this interpreter, the variables alone count.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        env=dict(variables),
        capture_output=True,
        text=True,
        check=False,
    )
    settings: dict[str, str] = {}
    for line in listed.stdout.splitlines() if listed.returncode == 0 else ():
        key, _, quoted = line.partition("=")
        section, _, setting = key.rpartition(".")
        if section in ("global", "install"):
            settings[setting] = str(ast.literal_eval(quoted))
    for setting in PIP_TO_UV:
        value = variables.get("PIP_" + setting.upper().replace("-", "_"))
        if value:
            settings[setting] = value
    return settings


def installer_variables(
    variables: Mapping[str, str], device: Device, settings: Mapping[str, str]
) -> dict[str, str]:
    """Return uv's process variables: what pip was told, unless uv was told otherwise.

    Variables that would move or suppress bytecode are dropped.
    """
    result = {
        name: value
        for name, value in variables.items()
        if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "VIRTUAL_ENV")
    }
    for setting, variable in PIP_TO_UV.items():
        if setting in settings:
            # pip separates several values by white space; uv wants commas for find-links alone.
            separator = "," if setting == "find-links" else " "
            result.setdefault(variable, separator.join(settings[setting].split()))
    if "UV_INDEX" in result:
        # pip looks for a version in all its indexes; uv by default only in the first that knows
        # the package, which may lack the pinned version.
        result.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    if device is Device.CPU and "UV_FIND_LINKS" not in result:
        # From the main index torch brings gigabytes of CUDA libraries.
        result.setdefault("UV_TORCH_BACKEND", "cpu")
    if device is Device.CUDA:
        # The build of torch that this machine's driver can run.
        result.setdefault("UV_TORCH_BACKEND", "auto")
    return result


def lock(name: str, variables: Mapping[str, str]) -> None:
    """Resolve ``<name>.in`` anew and write ``<name>.txt``; raises :class:`EnvironmentFailed`."""
    environment = find(name)
    device = environment.devices[0]
    settings = pip_settings(variables)
    if device is Device.CUDA:
        # A folder of CPU wheels must not decide what a machine with a GPU gets.
        settings.pop("find-links", None)
    resolved = subprocess.run(
        uv_command(
            *("pip", "compile", "--quiet", "--no-header", "--no-annotate"),
            *("--no-emit-index-url", "--no-emit-find-links"),
            *("--python-version", PYTHON, "--python-platform", PLATFORM),
            *environment.excludes,
            str(environment.request),
        ),
        env=installer_variables(variables, device, settings),
        capture_output=True,
        text=True,
        check=False,
    )
    if resolved.returncode:
        raise EnvironmentFailed(
            name, resolved.stderr.strip(), f"Correct {environment.request.name}."
        )
    # The local label of a build ("+cpu") is left to the machine that installs it.
    pins = re.sub(r"\+cpu$", "", resolved.stdout, flags=re.MULTILINE)
    made_by = f"python -m conductor.environments lock {name}"
    header = f"# Made by `{made_by}` for CPython {PYTHON}, {PLATFORM}.\n"
    files.write_text(environment.lock, header + pins)
