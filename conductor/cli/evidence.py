"""``day0 verify`` and ``bundle``: evidence that another person can check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conductor.cli.ending import EXIT_FAILED, ending_well
from conductor.cli.options import JsonOption, RunArgument, WorkspaceOption, workspace_of

if TYPE_CHECKING:
    from conductor.evidence.verify import Findings


def verify(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|BUNDLE]",
            help="A run as for `day0 status`, or a bundle; the latest run if left out.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A copy of the candidate, to be held against the one evaluated."),
    ] = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check, offline, that a run or a bundle still says what was found: digests, events, decision.

    Every file is digested again, every gate asked again with its evidence, and the decision made
    again; whatever does not hold is named.

    Exit codes: 0 everything holds, 1 something does not, 2 no run and no bundle, 5 it cannot look
    (no permission, no room).

    Example: `day0 verify demo-int8.tar.gz`
    """
    from conductor.evidence.verify import verify as check
    from conductor.run_status import find_run

    with ending_well():
        is_bundle = run is not None and Path(run).is_file()
        path = Path(run or "") if is_bundle else find_run(run, workspace_of(workspace))
        findings = check(path, checkpoint)
        if as_json:
            print(json.dumps({"path": str(path), **findings.document()}, indent=2))
        else:
            _show(path, findings)
        raise typer.Exit(EXIT_FAILED if findings.problems else 0)


def _show(path: Path, findings: Findings) -> None:
    from conductor.report.wording import printable

    lines = [
        *(f"checked: {sentence}" for sentence in findings.checked),
        *(f"not checked: {sentence}" for sentence in findings.not_checked),
        *(f"wrong: {problem}" for problem in findings.problems),
    ]
    for line in lines:  # names in a bundle are somebody else's
        print(printable(line.replace("\n", "\\n")))
    count = len(findings.problems)
    wrong = "1 thing does not hold" if count == 1 else f"{count} things do not hold"
    print(f"{path}: {wrong if count else 'everything holds'}")


def bundle(
    run: RunArgument = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write it. [<run id>.tar.gz]", show_default=False),
    ] = None,
    with_checkpoint: Annotated[
        bool,
        typer.Option("--with-checkpoint", help="Take the candidate's weights along as well."),
    ] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Write a finished run to one archive that another person can verify; weights are left out.

    The same run gives the same bytes.

    Exit codes: 0 written, 2 no such run, or one that has not come to its end.

    Example: `day0 bundle demo-int8 --output demo-int8.tar.gz`
    """
    from conductor.digests import file_digest
    from conductor.evidence import bundle as bundles
    from conductor.run_status import find_run

    with ending_well():
        run_dir = find_run(run, workspace_of(workspace))
        archive = output or Path(f"{run_dir.name}{bundles.SUFFIX}")
        bundles.bundle(run_dir, archive, with_checkpoint=with_checkpoint)
        print(f"{archive}: {archive.stat().st_size:,} bytes, SHA-256 {file_digest(archive)}")
