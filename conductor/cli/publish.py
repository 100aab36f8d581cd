"""``day0 publish``: the candidate of an accepted release, on the Hub."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from conductor.cli.ending import EXIT_FAILED, ending_well
from conductor.cli.options import JsonOption, WorkspaceOption, workspace_of

if TYPE_CHECKING:
    from conductor.publishing.publish import Outcome


def publish(
    run: Annotated[str, typer.Argument(help="A run's directory, its id or the beginning of one.")],
    repo: Annotated[str, typer.Option(help="Where to: `namespace/name` on the Hub.")],
    workspace: WorkspaceOption = None,
    private: Annotated[
        bool, typer.Option("--private", help="Nobody else may see the repository.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show files and model card; ask the Hub nothing, and move nothing."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Publish the candidate of an accepted release on the Hub, with a model card.

    Only what was evaluated is published: the decision is ACCEPT, `day0 verify` holds, the files are
    the evaluated ones, and the smoke scenarios of the candidate passed for them. A rejected
    candidate is moved to `REJECTED-checkpoint`. The token is HF_TOKEN's, or the login's.

    Exit codes: 0 published, 1 refused, 2 unusable input, 5 the Hub or this machine failed.

    Example: `day0 publish demo-int8 --repo me/demo-int8 --dry-run`
    """
    from conductor.digests import Digests
    from conductor.publishing.publish import publish as publish_run
    from conductor.run_status import find_run

    with ending_well():
        directory = workspace_of(workspace)
        outcome = publish_run(
            find_run(run, directory),
            repo,
            clock=lambda: datetime.now(UTC),
            digests=Digests(directory / "cache" / "digests.json"),
            private=private,
            dry_run=dry_run,
        )
        print(json.dumps(outcome.document(), indent=2) if as_json else _words(outcome))
        if outcome.refused:
            raise typer.Exit(EXIT_FAILED)


def _words(outcome: Outcome) -> str:
    if outcome.refused:
        return "\n".join(_refusal(outcome))
    if outcome.revision is None:
        return "\n".join(_offer(outcome))
    seen_by = "private" if outcome.revision.private else "public"
    return (
        f"published {outcome.run_id} as {outcome.repo} ({seen_by}), commit "
        f"{outcome.revision.commit}\n{outcome.revision.url}"
    )


def _refusal(outcome: Outcome) -> list[str]:
    lines = [f"{outcome.run_id} is not published:", *(f"- {why}" for why in outcome.refused)]
    if outcome.rejected:
        lines.append(f"the rejected candidate lies in {outcome.rejected}")
    return lines


def _offer(outcome: Outcome) -> list[str]:
    seen_by = "private" if outcome.private else "public"
    total = sum(file.size_bytes for file in outcome.files)
    return [
        f"{outcome.run_id} would be published as {outcome.repo} ({seen_by}), in one commit:",
        *(f"{file.size_bytes:>16,}  {file.path}" for file in outcome.files),
        f"{total:>16,}  bytes in {len(outcome.files)} files",
        "",
        outcome.card.rstrip("\n"),
    ]
