"""``day0 smoke``, ``smoke check`` and ``done``: run what users run, and say whether it works."""

from __future__ import annotations

import json
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from conductor.cli.ending import EXIT_FAILED, ending_well
from conductor.cli.options import JsonOption, WorkspaceOption, workspace_of
from conductor.failure import Failure
from gates import FailureClass

if TYPE_CHECKING:
    from conductor.smoke.manifest import Scenario
    from conductor.smoke.record import Record, ScenarioRecord
    from conductor.smoke.running import Surroundings

ManifestOption = Annotated[
    Path | None,
    typer.Option(
        help="The scenarios. [tests/smoke/manifest.toml of the repository]", show_default=False
    ),
]
FullOption = Annotated[bool, typer.Option("--full", help="All scenarios, not the quick ones only.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="A scenario that is skipped fails.")]

MARKS = {"passed": "PASS", "failed": "FAIL", "skipped": "SKIP"}


def smoke(
    context: typer.Context,
    owner: Annotated[
        list[str] | None,
        typer.Option(help="Only what protects this feature; may be given again.", metavar="OWNER"),
    ] = None,
    full: FullOption = False,
    manifest: ManifestOption = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the smoke scenarios, live: real commands, real endpoints, no stubs.

    Each must show that something appeared. One whose needs this machine does not meet is skipped
    and never counts as passed.

    Exit codes: 0 passed, 1 not, or nothing passed, 2 unusable input, 5 this machine failed, 130
    stopped on request.

    Example: `day0 smoke --full`
    """
    if context.invoked_subcommand is not None:
        return
    from conductor.smoke.manifest import read_manifest
    from conductor.smoke.running import Task, carry_out, choose

    with ending_well():
        path = _manifest(manifest)
        scenarios = read_manifest(path)
        chosen = choose(scenarios, owners=owner or (), full=full)
        around = _surroundings(path)
        task = Task(
            scenarios=scenarios, chosen=chosen, required=chosen, around=around, strict=strict
        )
        record = carry_out(task, _ignore if as_json else _tell, _now)
        _end(record, as_json, around)


def check(
    base: Annotated[str, typer.Option(help="The revision to compare with.", metavar="REV")],
    manifest: ManifestOption = None,
) -> None:
    """Refuse a manifest that protects less than it did at a revision: it only grows.

    Exit codes: 0 nothing is protected less, 1 something is, 2 unusable input.

    Example: `day0 smoke check --base main`
    """
    from conductor.smoke.growth import compare_with_revision

    with ending_well():
        weakened = []
        for path in _own_manifests(_manifest(manifest)):
            growth = compare_with_revision(path, base)
            weakened += [f"{path}: {problem}" for problem in growth.weakened]
            print(f"{path}: {growth.kept} scenarios compared, {len(growth.added)} are new")
        for problem in weakened:
            print(f"weakened: {problem}")
        raise typer.Exit(EXIT_FAILED if weakened else 0)


def done(
    owner: Annotated[str, typer.Argument(help="A feature that scenarios protect.")],
    full: Annotated[
        bool, typer.Option("--full", help="The scenarios of all others as well.")
    ] = False,
    run: Annotated[
        str | None,
        typer.Option(help="A run whose candidate they are about.", metavar="RUN"),
    ] = None,
    manifest: ManifestOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say that something is done, if all its scenarios pass; the result is recorded.

    The record is `.day0/done/OWNER.json` in the repository, or with --run `smoke/OWNER.json` in the
    run, where `day0 publish` looks for it. With nothing to run, nothing is done.

    Exit codes: 0 done, 1 not, 2 unusable input, 5 this machine failed, 130 stopped on request.

    Example: `day0 done candidate --run demo-int8`
    """
    from conductor.run_status import find_run
    from conductor.smoke.manifest import check_name
    from conductor.smoke.record import record_path, write_record
    from conductor.smoke.running import Task, carry_out, carry_out_on_candidate

    with ending_well():
        check_name(owner)
        run_dir = find_run(run, workspace_of(workspace)) if run else None
        path = _manifest(manifest, required=run_dir is None)
        scenarios = _scenarios(path, with_candidate=run_dir is not None)
        own = [each for each in scenarios if owner in each.owners]
        around = _surroundings(path, run_dir)
        task = Task(
            scenarios=scenarios,
            chosen=scenarios if full and own else own,
            required=own,
            around=around,
            owner=owner,
        )
        told = _ignore if as_json else _tell
        if run_dir is None:
            record, filed = (
                carry_out(task, told, _now),
                record_path(around.repo, owner, of_run=False),
            )
            write_record(filed, record)
        else:
            record, filed = carry_out_on_candidate(task, told, _now)
        if not as_json:
            print(f"recorded in {filed}")
        _end(record, as_json, around)


def _manifest(given: Path | None, *, required: bool = True) -> Path:
    """Return the manifest: as named, else that of the repository we are in."""
    from conductor.smoke.manifest import MANIFEST

    if given is not None:
        return given.absolute()
    places = [place / MANIFEST for place in (Path.cwd(), *Path.cwd().parents)]
    found = next((path for path in places if path.exists()), None)
    if found is None and required:
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"there is no {MANIFEST} here or above; name a manifest with --manifest",
        )
    return found or Path.cwd() / MANIFEST


def _own_manifests(path: Path) -> list[Path]:
    """Return a manifest and, where the repository is ours, that of the candidate."""
    from conductor.smoke.manifest import CANDIDATE

    candidate = _repository(path).joinpath(*CANDIDATE.parts[-3:])
    return [path, candidate] if candidate.exists() else [path]


def _scenarios(path: Path, *, with_candidate: bool) -> tuple[Scenario, ...]:
    from conductor.smoke.manifest import CANDIDATE, join_manifests, read_manifest

    manifests = [read_manifest(CANDIDATE)] if with_candidate else []
    if path.exists() or not with_candidate:
        manifests.append(read_manifest(path))
    return join_manifests(*manifests)


def _surroundings(manifest: Path, run_dir: Path | None = None) -> Surroundings:
    from conductor.smoke.record import HOME
    from conductor.smoke.running import Surroundings
    from conductor.world import World

    repo = _repository(manifest)
    kept = repo / HOME / "smoke" / f"{_now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return Surroundings(repo=repo, kept=kept, run=run_dir, world=World.find(dict(os.environ)))


def _repository(manifest: Path) -> Path:
    """Return the repository of a manifest, or where we are if it lies in none."""
    marks = (".git", "pyproject.toml")
    return next(
        (place for place in manifest.parents if any((place / mark).exists() for mark in marks)),
        Path.cwd(),
    )


def _now() -> datetime:
    return datetime.now(UTC)


def _ignore(result: ScenarioRecord) -> None:
    """Tell nobody: the whole record is printed at the end."""


def _tell(result: ScenarioRecord) -> None:
    seconds = f" ({result.seconds:g} s)" if result.outputs else ""
    mark = MARKS[result.outcome]
    if mark == "SKIP":
        print(f"SKIP {result.name}: {'; '.join(result.problems)}", flush=True)
        return
    print(f"{mark} {result.name}{seconds}", flush=True)
    for problem in result.problems:
        print(f"     {problem}", flush=True)


def _end(record: Record, as_json: bool, around: Surroundings) -> NoReturn:
    """Print what the scenarios came to, and end with the exit code."""
    if as_json:
        print(json.dumps(record.document(), indent=2))
    else:
        skipped = [each for each in record.scenarios if each.outcome == "skipped"]
        if skipped:
            print(f"{len(skipped)} skipped, which is not passed:")
        for each in skipped:
            print(f"  {each.name}: {'; '.join(each.problems)}")
        if any(each.outcome == "failed" for each in record.scenarios):
            print(f"what they printed is in {around.kept}")
        of_owner = f"{record.owner}: " if record.owner else ""
        print(f"{of_owner}{'passed' if record.passed else 'NOT passed'}: {record.detail}")
    raise typer.Exit(0 if record.passed else EXIT_FAILED)
