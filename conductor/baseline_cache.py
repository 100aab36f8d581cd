"""What a source answered, kept in the workspace, so that the next recipe does not ask it again.

An entry lies under the digest of its key: everything that the answers depend on, field by field.
Invariants:

* Any difference of any field is a miss. What is not known to be without effect is in the key.
* An entry is the whole question and all its answers, and every byte of it is verified on every hit;
  one that is not as it was kept is set aside and is a miss.
* An entry appears in one rename, whole. Whoever keeps one holds a lock that a crash releases, and
  first removes what a crash left.
* The cache is a convenience: a full or read-only workspace costs the entry and nothing else.
  ``notes`` tells what went wrong.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from filelock import FileLock

from conductor import files
from conductor.compatibility import Device
from conductor.digests import document_digest, file_digest, tree_digests, verify
from conductor.engines import CANARY_MAX_TOKENS
from conductor.engines.opening import engine_version
from conductor.evaluation import harness_settings
from conductor.harnesses.lm_eval import MAY_DIFFER, evaluation_request
from conductor.inputs import Scalar, accelerators, flatten, lock_digests, model_files, suite_files
from conductor.preconditions import environments_of
from conductor.redaction import names_secret, redact_document

if TYPE_CHECKING:
    from conductor.config import Config
    from conductor.digests import Digests
    from conductor.release_state import Plan, World
    from conductor.rounds import Batch

EVALUATION = ("request.json", "engine.json", "results", "result.json", "evaluation.json")
"""What an evaluation consists of, in the order in which it came to be: the last says it is done."""

KEY_FILE = "baseline-key.json"
"""Under this name a release leaves the key of what it asked the source, beside the answers."""

LOCK_WAIT_S = 60.0
"""Longest wait for another release that keeps an entry: copying the largest takes seconds."""

NEAREST = 3
"""Entries that are explained: those with the fewest fields that differ."""

_ENTRY = "entry.json"
_FILES = "files"
_PLACE = re.compile(r"[0-9a-f]{64}")
_PLACES = MAY_DIFFER | {"include_path"}

# Variables that engines and their arithmetic obey, and that reach them from the caller.
_OBEYED = (
    *("VLLM_", "TORCH", "CUBLAS_", "NVIDIA_TF32_OVERRIDE", "LMEVAL_"),
    *("OMP_NUM_THREADS", "MKL_"),
)


def baseline_key(
    config: Config,
    plan: Plan,
    world: World,
    settings: Mapping[str, Any],
    batch: Batch,
    digests: Digests,
) -> dict[str, Scalar]:
    """Return everything that the source's answers to ``batch`` depend on, by field.

    ``settings`` are those of the engine, as planned. The fields are those of the request to the
    harness, less where things are, and the digests of what it names. How scores are read and judged
    is none of them. Of a suite whose data come from the Hub only that is known; the comparison
    pairs both sides' documents by their hashes, so that data which changed since are noticed.

    Raises:
        OSError: a file of the model or the suite cannot be read.
    """
    environments = environments_of(plan.row.engine, plan.row.device)
    request = evaluation_request(
        plan.suite,
        harness_settings(config, plan.suite, plan.model),
        batch,
        output_dir=Path(),
        request_cache=Path(),
    )
    asked = {name: value for name, value in request.items() if name not in _PLACES}
    asked["sizes"] = {task: asked["sizes"][task] for task in asked["tasks"]}
    return {
        "kind": "evaluation",
        **flatten(asked, "request."),
        **suite_files(plan.suite, digests),
        "harness.version": world.environments.versions(environments[-1]).get("lm-eval"),
        "worker": digests.file(_worker("evaluate.py")),
        **_answered_by(plan, world, settings, environments, digests),
    }


def canary_key(
    plan: Plan, world: World, settings: Mapping[str, Any], digests: Digests
) -> dict[str, Scalar]:
    """Return everything that the source's answers to the canary depend on, by field.

    Raises:
        OSError: a file of the model cannot be read.
    """
    environments = environments_of(plan.row.engine, plan.row.device)[:1]
    return {
        "kind": "canary",
        "canary.prompts": document_digest(plan.suite.canary_prompts),
        "canary.max_tokens": CANARY_MAX_TOKENS,
        "worker": digests.file(_worker("answer_prompts.py")),
        **_answered_by(plan, world, settings, environments, digests),
    }


def has_same_files(key: Mapping[str, Scalar], inputs: Mapping[str, Scalar]) -> bool:
    """Tell whether a key holds the files of model and suite that a release began with.

    A server answers from what it loaded when it started; files that were edited since would put its
    answers under a key that is not theirs. ``inputs`` are those of ``inputs.collect``.
    """
    prefixes = ("model.files.", *(("suite.files.",) if key["kind"] == "evaluation" else ()))
    ours, theirs = (
        {name: value for name, value in each.items() if name.startswith(prefixes)}
        for each in (key, inputs)
    )
    return ours == theirs


def _answered_by(
    plan: Plan,
    world: World,
    settings: Mapping[str, Any],
    environments: list[str],
    digests: Digests,
) -> dict[str, Scalar]:
    """Return who answers: the model, the engine, its settings, the machine and its variables.

    It holds no secret, so that an entry has the same digest as its key, on disk and here.
    """
    row, machine = plan.row, world.machine
    answered_by: dict[str, Scalar] = {
        **model_files(plan.model, digests),
        **lock_digests(environments, world),
        "engine.name": str(row.engine),
        "engine.version": engine_version(row.engine, row.device, world.environments),
        **flatten(settings, "settings."),
        "device": str(row.device),
        "accelerators": accelerators(machine),
        # The order in which a processor adds up depends on how many of its cores do.
        "cores": machine.cores if row.device is Device.CPU else None,
        **{
            f"variables.{name}": value
            for name, value in world.environ.items()
            if name.startswith(_OBEYED) and not names_secret(name)
        },
    }
    return dict(redact_document(answered_by))


def _worker(name: str) -> Path:
    return Path(__file__).parent / "workers" / name


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry: its key, its files as they were kept, and which run kept it when (UTC)."""

    key: dict[str, str | int | float | bool | None]
    files: dict[str, dict[str, str | int]]
    run_id: str
    created: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field in which an entry's key is not ours; None stands for absent."""

    field: str
    theirs: Scalar
    ours: Scalar


@dataclass(frozen=True, kw_only=True)
class Row:
    """How near an entry is: the fields that differ, and, where none does, what is wrong with it."""

    run_id: str
    created: str
    differences: tuple[Difference, ...]
    damage: tuple[str, ...] = ()


class BaselineCache:
    """The entries under ``root``; ``notes`` are sentences on what went wrong, in their order."""

    def __init__(self, root: Path) -> None:
        """Look under ``root``, which need not be there."""
        self.root = root
        self.notes: list[str] = []

    def find(self, key: Mapping[str, Scalar]) -> Entry | None:
        """Return the entry for ``key`` if there is one and every byte of it is as it was kept."""
        place = self.root / document_digest(dict(key))
        if not os.path.lexists(place):
            return None
        entry, damage = _examine(place)
        return self._look_again(place) if damage else entry

    def _look_again(self, place: Path) -> Entry | None:
        """Return what is at ``place`` if it was only being replaced; else set it aside."""
        try:
            with self._lock():
                entry, damage = _examine(place)
                if damage:
                    _remove(aside := place.with_name(f"{place.name}.damaged"))
                    place.rename(aside)
        except (OSError, NotImplementedError):
            entry, damage = _examine(place)  # where nothing can be written, it stays where it is
        if not damage:
            return entry
        self.notes.append(
            f"the cached answers of the source in {place} are damaged and are not used: "
            f"{'; '.join(damage)}"
        )
        return None

    def restore(self, entry: Entry, directory: Path) -> bool:
        """Copy the files of ``entry`` into ``directory``; what says that all is done comes last.

        What is there under the same names is replaced. Returns False when the entry is gone or
        damaged meanwhile, or cannot be written; nothing of it is left then.
        """
        source = self.root / document_digest(entry.key) / _FILES
        tops = sorted({relative.partition("/")[0] for relative in entry.files}, key=_order)
        try:
            for top in reversed(tops):
                _remove(directory / top)
            for relative in sorted(entry.files, key=_order):
                _copy(source / relative, directory / relative, entry.files[relative]["sha256"])
        except OSError as error:
            self.notes.append(
                f"the cached answers of the source in {source.parent} cannot be used: {error}"
            )
            for top in tops:
                with suppress(OSError):
                    _remove(directory / top)
            return False
        return True

    def keep(
        self,
        key: Mapping[str, Scalar],
        directory: Path,
        *,
        run_id: str,
        created: str,
        names: Sequence[str] = EVALUATION,
    ) -> bool:
        """Keep the files and directories ``names`` of ``directory`` as the entry for ``key``.

        An entry that is there is replaced. Returns False when that cannot be done.
        """
        digest = document_digest(dict(key))
        temporary = self.root / f".{digest}.keeping"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._lock():
                self._remove_leftovers()
                try:
                    facts = _facts_of(directory, names)
                    for relative, fact in facts.items():
                        target = temporary / _FILES / relative
                        _copy(directory / relative, target, fact["sha256"])
                    entry = Entry(key=dict(key), files=facts, run_id=run_id, created=created)
                    document = msgspec.to_builtins(entry)
                    sealed = {**document, "sha256": document_digest(document)}
                    files.write_json(temporary / _ENTRY, sealed)
                    self._put(temporary, self.root / digest)
                finally:
                    self._remove_leftovers()
        except (OSError, NotImplementedError) as error:  # the latter: no locks on this file system
            self.notes.append(
                f"the answers of the source could not be kept under {self.root} for later "
                f"releases: {error}"
            )
            return False
        return True

    def explain(self, key: Mapping[str, Scalar], *, leaving_out: str | None = None) -> list[Row]:
        """Return the entries of the same kind that are nearest to ``key``, the nearest first.

        Those that the run ``leaving_out`` kept are passed over.
        """
        rows = [
            Row(
                run_id=entry.run_id,
                created=entry.created,
                differences=differences,
                damage=() if differences else tuple(_examine(place)[1]),
            )
            for place, entry in self._entries()
            if entry.key.get("kind") == key.get("kind") and entry.run_id != leaving_out
            for differences in [_differences(entry.key, key)]
        ]
        rows.sort(key=lambda row: row.created, reverse=True)
        return sorted(rows, key=lambda row: len(row.differences))[:NEAREST]

    def _entries(self) -> Iterator[tuple[Path, Entry]]:
        """Yield the entries that can be read, whatever became of their files."""
        with suppress(OSError):
            for place in self.root.iterdir():
                if _PLACE.fullmatch(place.name):
                    with suppress(_Damaged):
                        yield place, _read(place)

    def _put(self, temporary: Path, place: Path) -> None:
        """Move a finished entry to its place; the one that was there goes."""
        if os.path.lexists(place):
            place.rename(place.with_name(f".{place.name}.replaced"))
        temporary.rename(place)
        files.sync_directory(self.root)

    def _remove_leftovers(self) -> None:
        for path in [*self.root.glob(".*.keeping"), *self.root.glob(".*.replaced")]:
            with suppress(OSError):
                _remove(path)

    def _lock(self) -> FileLock:
        """Return the lock of whoever changes entries; a crash releases it."""
        return FileLock(self.root / ".lock", timeout=LOCK_WAIT_S)


def explain_run(run_dir: Path, workspace: Path) -> list[str]:
    """Say of each evaluation of the source in ``run_dir`` which entries are nearest to its key.

    Entries that the run kept itself are left out: they came too late for it. Reads only.
    """
    cache = BaselineCache(workspace / "cache" / "baseline")
    paths = sorted((run_dir / "stages").rglob(KEY_FILE))
    if not paths:
        return [f"run {run_dir.name} has not come to asking the source: it left no {KEY_FILE}"]
    lines = []
    for path in paths:
        lines.append(f"{path.parent.relative_to(run_dir)}:")
        try:
            key = files.read_json(path)
            rows = cache.explain(key, leaving_out=run_dir.name)
        except (OSError, ValueError, AttributeError) as error:
            lines.append(f"  {path} cannot be read: {error}")
        else:
            lines += [f"  {line}" for line in say(rows)]
    return lines


def say(rows: Sequence[Row]) -> list[str]:
    """Return rows in words, one line an entry and one a field."""
    if not rows:
        return ["no answers of another run are in the cache"]
    lines = []
    for row in rows:
        lines.append(f"kept by run {row.run_id} on {row.created}: {_verdict(row)}")
        lines += [
            f"  {each.field}: {_shorten(each.theirs)} there, {_shorten(each.ours)} here"
            for each in row.differences
        ]
    return lines


def _verdict(row: Row) -> str:
    if row.differences:
        number = len(row.differences)
        return f"{number} {'field differs' if number == 1 else 'fields differ'}"
    if row.damage:
        return f"equal in every field, but damaged: {'; '.join(row.damage)}"
    return "equal in every field, to be used unless --fresh-baseline is given"


def _shorten(value: Scalar) -> str:
    if isinstance(value, str):
        return f"{value[:12]}..." if _PLACE.fullmatch(value) else value
    return "nothing" if value is None else json.dumps(value)


def _differences(
    theirs: Mapping[str, Scalar], ours: Mapping[str, Scalar]
) -> tuple[Difference, ...]:
    # As texts, as keys are compared: JSON's true is not its 1.
    return tuple(
        Difference(field=name, theirs=theirs.get(name), ours=ours.get(name))
        for name in sorted({*theirs, *ours})
        if json.dumps(theirs.get(name)) != json.dumps(ours.get(name))
        or (name in theirs) != (name in ours)
    )


class _Damaged(OSError):
    """What is there is not what was kept."""


def _examine(place: Path) -> tuple[Entry | None, list[str]]:
    """Return the entry at ``place``, where it can be read, and all that is wrong with it."""
    try:
        entry = _read(place)
        return entry, _unexpected(place, entry) or verify(place / _FILES, entry.files)
    except OSError as error:
        return None, [str(error)]


def _read(place: Path) -> Entry:
    """Read what an entry says of itself; raises :class:`_Damaged`."""
    path = place / _ENTRY
    if place.is_symlink() or path.is_symlink() or not path.is_file():
        raise _Damaged(f"{_ENTRY} is missing or no file")
    try:
        document = files.read_json(path)
        seal = document.pop("sha256")
        if document_digest(document) != seal:
            raise _Damaged(f"{_ENTRY} has other contents than were written")
        entry = msgspec.convert(document, Entry)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, _Damaged):
            raise
        raise _Damaged(f"{_ENTRY} cannot be read ({error})") from None
    if document_digest(entry.key) != place.name:
        raise _Damaged(f"{_ENTRY} holds the key of another entry")
    return entry


def _unexpected(place: Path, entry: Entry) -> list[str]:
    """Name what does not belong to an entry, links above all, and what is missing from it."""
    kept = {_ENTRY, *(f"{_FILES}/{relative}" for relative in entry.files)}
    found = {
        path.relative_to(place).as_posix(): path
        for path in place.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    return [
        *(f"{name} is a link" for name, path in sorted(found.items()) if path.is_symlink()),
        *(f"{name} was not kept" for name in sorted(found.keys() - kept)),
        *(f"{name} is missing" for name in sorted(kept - found.keys())),
    ]


def _facts_of(directory: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return digests and sizes of all files of ``directory`` that ``names`` stand for."""
    facts: dict[str, dict[str, Any]] = {}
    for name in names:
        path = directory / name
        if path.is_dir():
            facts |= {f"{name}/{inner}": fact for inner, fact in tree_digests(path).items()}
        else:
            facts[name] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    return facts


def _order(relative: str) -> tuple[int, str]:
    """Sort by when a file came to be, so that what says that all is done comes last."""
    top = relative.partition("/")[0]
    return EVALUATION.index(top) if top in EVALUATION else 0, relative


def _copy(source: Path, target: Path, digest: str | int) -> None:
    """Copy a file durably and in one rename; raises :class:`_Damaged` for other contents."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with source.open("rb") as original, temporary.open("wb") as copy:
            shutil.copyfileobj(original, copy)
            copy.flush()
            os.fsync(copy.fileno())
        if file_digest(temporary) != digest:
            raise _Damaged(f"{source} has other contents than recorded")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    files.sync_directory(target.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
