"""Whether a candidate may be published, what that would upload, and doing it.

Invariants:

* Every condition is looked at, and every one that does not hold is told.
* What is uploaded is read from the record of what was evaluated, not from what lies in a directory.
* A dry run does everything but ask the Hub and move or record anything.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conductor.chain import Stage
from conductor.digests import Digests, Recorded, tree_digest
from conductor.evidence.verify import verify
from conductor.failure import Failure
from conductor.history import History
from conductor.journal import Clock, Journal, read_history
from conductor.publishing import hub
from conductor.publishing.hub import CARD, File, Revision
from conductor.publishing.model_card import model_card, source_metadata
from conductor.publishing.rejected import move_rejected
from conductor.report import read_report
from conductor.report.wording import PUBLISH_WORDS, Document
from conductor.run_lock import hold
from conductor.smoke.record import read_record, record_path
from conductor.stage_files import CHECKPOINT, REJECTED, candidate_dir
from gates import Decision, FailureClass

OWNER = "candidate"
"""Who owns the smoke scenarios that the candidate of a release has to pass."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an attempt to publish.

    ``refused`` says why not, ``rejected`` where a rejected candidate lies now. ``files`` are what
    was or would be uploaded, the ``card`` among them; ``revision`` is what the Hub made of them.
    """

    run_id: str
    repo: str
    private: bool
    refused: tuple[str, ...] = ()
    rejected: Path | None = None
    files: tuple[File, ...] = ()
    card: str = ""
    revision: Revision | None = None

    def document(self) -> dict[str, Any]:
        """The outcome as a JSON mapping; sizes in bytes."""
        return {
            "run_id": self.run_id,
            "repo": self.repo,
            "private": self.revision.private if self.revision else self.private,
            "published": self.revision is not None,
            "refused": list(self.refused),
            "rejected": self.rejected and str(self.rejected),
            "commit": self.revision and self.revision.commit,
            "url": self.revision and self.revision.url,
            "files": [
                {"path": file.path, "bytes": file.size_bytes, "sha256": file.sha256}
                for file in self.files
            ],
            "card": self.card,
        }


def publish(
    run_dir: Path,
    repo: str,
    *,
    clock: Clock,
    digests: Digests,
    private: bool = False,
    dry_run: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Publish the candidate of a run, or say why not.

    Args:
        run_dir: the run directory.
        repo: ``namespace/name`` on the Hub.
        clock: stamps events.
        digests: takes the digests of the candidate's files.
        private: nobody else may see the repository.
        dry_run: say what would be uploaded, and ask the Hub nothing.
        sleep: waits between attempts at an upload, in seconds.

    Raises:
        Failure: USER_CONFIG_ERROR when the run cannot be read, somebody works on it, or the Hub
            refuses; INFRA_TRANSIENT and SYSTEMIC as :func:`conductor.publishing.hub.upload` does.
        OSError: a file cannot be read, or the run directory cannot be written.
    """
    hub.check_repo_id(repo)
    with hold(run_dir):
        history, report = read_history(run_dir), read_report(run_dir)
        run_id = history.run_id
        refused = tuple(_refusals(run_dir, history, report, digests))
        if refused or report is None:
            rejected = None if dry_run else _move_if_rejected(run_dir, history, clock)
            return Outcome(
                run_id=run_id, repo=repo, private=private, refused=refused, rejected=rejected
            )
        evaluated = evaluated_files(history)
        card = _card(run_dir, report, repo, evaluated)
        files = (*_files(run_dir, evaluated), File.of_bytes(CARD, card.encode()))
        offered = Outcome(run_id=run_id, repo=repo, private=private, files=files, card=card)
        if dry_run:
            return offered
        message = f"Publish release {run_id}"
        revision = hub.upload(files, repo=repo, private=private, message=message, sleep=sleep)
        _record(run_dir, revision, clock)
        return replace(offered, revision=revision)


def evaluated_files(history: History) -> Recorded:
    """Return the candidate as it was evaluated: its files by their path in the checkpoint."""
    outputs = history.stages[Stage.PTQ].outputs or {}
    return {
        name.removeprefix(f"{CHECKPOINT}/"): facts
        for name, facts in outputs.items()
        if name.startswith(f"{CHECKPOINT}/")
    }


def _refusals(
    run_dir: Path, history: History, report: Document | None, digests: Digests
) -> Iterator[str]:
    """Say every reason not to publish."""
    yield from _undecided(history, report)
    for problem in verify(run_dir).problems:
        yield f"day0 verify: {problem.file}: {problem.problem}"
    evaluated = evaluated_files(history)
    yield from _changed(run_dir, evaluated, digests)
    yield from _unproven(run_dir, evaluated)


def _undecided(history: History, report: Document | None) -> Iterator[str]:
    decision = history.outcome.get("decision")
    if decision != Decision.ACCEPT:
        yield f"the decision is {decision}, not ACCEPT" if decision else "there is no decision"
    if report is None:
        yield "report.json is missing, or not a whole report"
    elif report["decision"] != decision:
        yield f"report.json says {report['decision']}, the events say {decision}"
    elif decision == Decision.ACCEPT and report["publish"] != "publish":
        yield f"the report says: {PUBLISH_WORDS[report['publish']]}. {report['next_action']}"


def _changed(run_dir: Path, evaluated: Recorded, digests: Digests) -> Iterator[str]:
    """Say how the directory differs from what was evaluated."""
    if not evaluated:
        yield "no file of a candidate is recorded as evaluated"
        return
    directory = candidate_dir(run_dir)
    if not directory.is_dir():
        yield f"{directory.name} is missing"
        return
    if directory.name == REJECTED:
        yield f"the candidate was rejected, and lies in {REJECTED}"
    for problem in digests.verify(directory, evaluated):
        yield f"{directory.name}/{problem}"
    for name in sorted(digests.tree(directory).keys() - evaluated.keys()):
        yield f"{directory.name}/{name} was not there when the candidate was evaluated"


def _unproven(run_dir: Path, evaluated: Recorded) -> Iterator[str]:
    """Say why the smoke scenarios that the release owns do not speak for this candidate."""
    remedy = f"day0 done {OWNER} --run {shlex.quote(str(run_dir))}"
    try:
        record = read_record(record_path(run_dir, OWNER, of_run=True))
    except FileNotFoundError:
        yield f"the smoke scenarios of the {OWNER} were not run; {remedy}"
        return
    except Failure as failure:
        yield failure.message
        return
    if record.owner != OWNER:
        yield f"smoke/{OWNER}.json is the record of {record.owner}; {remedy}"
    if not record.passed:
        yield f"the smoke scenarios of the {OWNER} did not pass; {remedy}"
    if record.checkpoint != tree_digest(evaluated):
        yield f"the smoke scenarios of the {OWNER} were run on another checkpoint; {remedy}"


def _move_if_rejected(run_dir: Path, history: History, clock: Clock) -> Path | None:
    """Move a candidate that a decision speaks against; one without a decision stays."""
    if history.outcome.get("decision") in (None, Decision.ACCEPT):
        return None
    return move_rejected(run_dir, clock=clock)


def _card(run_dir: Path, report: Document, repo: str, evaluated: Recorded) -> str:
    source = [run_dir / CHECKPOINT / CARD]
    if report["model"]["path"] is not None:
        source.append(Path(report["model"]["path"]) / CARD)
    return model_card(
        report,
        repo=repo,
        source=source_metadata(source),
        checkpoint_digest=tree_digest(evaluated),
    )


def _files(run_dir: Path, evaluated: Recorded) -> Iterator[File]:
    """Yield what was evaluated, but for a card of the source's: ours takes its place."""
    for name, facts in evaluated.items():
        if name != CARD:
            yield File(
                path=name,
                content=run_dir / CHECKPOINT / name,
                sha256=facts["sha256"],
                size_bytes=facts["bytes"],
            )


def _record(run_dir: Path, revision: Revision, clock: Clock) -> None:
    """Note in the run where its candidate is now."""
    try:
        Journal.open(run_dir, clock=clock).record(
            "candidate_published",
            repo=revision.repo,
            commit=revision.commit,
            url=revision.url,
            private=revision.private,
        )
    except OSError as error:
        raise Failure(
            FailureClass.SYSTEMIC,
            f"published as {revision.url}, which {run_dir} could not record ({error.strerror}); "
            "make it writable, and publish again",
        ) from None
