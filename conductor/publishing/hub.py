"""The Hub: one commit that holds exactly the files that were evaluated, or none.

Invariants:

* One commit makes everything visible. The client's own upload of a folder commits in several steps,
  and its readers would see parts of a checkpoint.
* Nothing is committed whose SHA-256, taken while it was uploaded, is another than was asked for.
* A file in the repository that is none of ours stops the upload; nothing of others is deleted.
* Afterwards the revision is listed and held against what was meant.
* An upload that was cut short goes on where it was: the Hub names files by their SHA-256, and takes
  none twice.
* The token (``HF_TOKEN``, or the login's) is read by the client alone.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conductor.failure import Failure, unusable
from conductor.redaction import redact
from gates import FailureClass

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

ATTEMPTS = 4
"""Tries at an upload; within each, the client tries most of its requests up to six times."""
LONGEST_WAIT_S = 30.0
CARD = "README.md"
MADE_BY_THE_HUB = frozenset({".gitattributes"})
"""Files that a new repository has from its beginning."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A file to be published: its path in the repository, its content, and what that has to be."""

    path: str
    content: Path | bytes
    sha256: str
    size_bytes: int

    @classmethod
    def of_bytes(cls, path: str, content: bytes) -> File:
        """Return a file that was made here."""
        sha256 = hashlib.sha256(content).hexdigest()
        return cls(path=path, content=content, sha256=sha256, size_bytes=len(content))


@dataclass(frozen=True, kw_only=True)
class Revision:
    """What a repository holds now: which commit, where it is shown, and to whom."""

    repo: str
    commit: str
    url: str
    private: bool


def check_repo_id(repo: str) -> None:
    """Refuse what names no repository, before anything is asked of the Hub.

    Raises:
        Failure: USER_CONFIG_ERROR, with the form of a name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise unusable(f"--repo {repo}: is no name of a repository; give namespace/name") from None
    if repo.count("/") != 1:
        raise unusable(f"--repo {repo}: does not say whose it is; give namespace/name")


def upload(
    files: Sequence[File],
    *,
    repo: str,
    private: bool,
    message: str,
    sleep: Callable[[float], None] = time.sleep,
) -> Revision:
    """Make one commit of ``files``, in a repository that is made if need be; return what it holds.

    Args:
        files: everything that the revision is to hold.
        repo: ``namespace/name``.
        private: whether nobody else may see it; an existing repository stays as it is.
        message: of the commit.
        sleep: waits between attempts, in seconds.

    Raises:
        Failure: USER_CONFIG_ERROR when the account may not, or the repository holds something else;
            INFRA_TRANSIENT when the Hub or the network failed; SYSTEMIC when what was published
            is not what was meant.
    """
    from huggingface_hub import HfApi, get_token
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

    if get_token() is None:
        raise unusable(
            "there is no token for the Hub; set HF_TOKEN, or log in with `hf auth login`"
        )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # warnings show signed addresses
    api = HfApi(library_name="day0")
    attempts = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(max=LONGEST_WAIT_S),
        retry=retry_if_exception(_is_passing),
        sleep=sleep,
        reraise=True,
    )
    try:
        revision = attempts(_commit, api, files, repo, private, message)
        problems = attempts(_differences, api, files, revision)
    except Failure:
        raise
    except Exception as error:  # the client lets those of several HTTP libraries through
        raise _explained(error, repo) from None
    if problems:
        raise Failure(
            FailureClass.SYSTEMIC,
            f"{revision.url} is not what was to be published: {'; '.join(problems)}; delete that "
            "revision",
        )
    return revision


def _commit(api: HfApi, files: Sequence[File], repo: str, private: bool, message: str) -> Revision:
    """Upload what the Hub does not have yet, then make one commit of everything.

    A commit whose answer was lost is found to be there when this is done again.
    """
    api.create_repo(repo, private=private, exist_ok=True)
    there = api.model_info(repo)
    if private and not there.private:
        raise unusable(
            f"{repo} is there already and public; name another repository, or make it private"
        )
    _check_nothing_else(api, files, repo, there.sha)
    _check_card(files)
    additions = [_addition(file) for file in files]
    api.preupload_lfs_files(repo, additions, free_memory=False)
    for file, addition in zip(files, additions, strict=True):
        if addition.upload_info.sha256.hex() != file.sha256:
            raise unusable(
                f"{file.path} changed while it was uploaded; nothing was published: find out what "
                "writes there"
            )
    made = api.create_commit(repo, additions, commit_message=message, parent_commit=there.sha)
    return Revision(
        repo=repo, commit=made.oid, url=str(made.commit_url), private=bool(there.private)
    )


def _check_nothing_else(api: HfApi, files: Sequence[File], repo: str, commit: str | None) -> None:
    """Refuse a repository with files that are none of ours: readers would take them for ours."""
    ours = {file.path for file in files} | MADE_BY_THE_HUB
    others = sorted(there.path for there in _listed(api, repo, commit) if there.path not in ours)
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise unusable(
            f"{repo} holds files that this candidate has not: {', '.join(others[:5])}{more}; "
            "delete them there, or name another repository"
        )


def _check_card(files: Sequence[File]) -> None:
    """Let the Hub read the card's metadata; it would refuse a bad one after everything is sent."""
    from huggingface_hub import ModelCard

    for file in files:
        if file.path == CARD and isinstance(file.content, bytes):
            ModelCard(file.content.decode()).validate()


def _addition(file: File) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=file.content)


def _differences(api: HfApi, files: Sequence[File], revision: Revision) -> list[str]:
    """Say of each file whether the revision holds something else in its place."""
    there = {each.path: each for each in _listed(api, revision.repo, revision.commit)}
    return [
        f"{file.path} {'has other contents' if file.path in there else 'is missing'}"
        for file in files
        if file.path not in there or not _is_same(file, there[file.path])
    ]


def _is_same(file: File, there: RepoFile) -> bool:
    """Compare by SHA-256 in large-file storage, elsewhere by the name that git gives contents."""
    if there.lfs is not None:
        return there.lfs.sha256 == file.sha256
    content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
    header = b"blob %d\0" % len(content)
    return there.blob_id == hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def _listed(api: HfApi, repo: str, commit: str | None) -> Iterator[RepoFile]:
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo, recursive=True, revision=commit)
    return (each for each in tree if isinstance(each, RepoFile))


def _is_passing(error: BaseException) -> bool:
    """Tell whether the same may go well a moment later: a lost connection, 408, 429, 5xx."""
    for each in _causes(error):
        status = _status(each)
        if status is not None:
            return status in (408, 429) or status >= 500
        # Which HTTP library the client is made of is its own affair; this name they share.
        if "TransportError" in {kind.__name__ for kind in type(each).__mro__}:
            return True
    return False


def _explained(error: BaseException, repo: str) -> Failure:
    """Say what the Hub answered, and the remedy; never the address, which may be signed."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    causes = list(_causes(error))
    if any(isinstance(each, OfflineModeIsEnabled) for each in causes):
        return unusable(f"{repo} cannot be reached: unset HF_HUB_OFFLINE")
    status = next((found for each in causes if (found := _status(each)) is not None), None)
    said = next((said for each in causes if (said := getattr(each, "server_message", None))), None)
    answer = f"HTTP {status}" + (f": {said.splitlines()[0]}" if said else "")
    if isinstance(error, ValueError):  # what the client makes of a refused card or file
        return unusable(f"the Hub does not take it: {error}")
    match status:
        case None:
            what = redact(f"{type(causes[-1]).__name__}: {causes[-1]}".splitlines()[0])
        case 401:
            return unusable(f"the Hub does not know this token ({answer}); renew HF_TOKEN")
        case 402 | 403 | 404:
            return unusable(
                f"this account may not write to {repo} ({answer}); check the namespace, and that "
                "the token has the right to write"
            )
        case 409 | 412:
            what = f"{repo} was changed by somebody else meanwhile; {answer}"
        case _:
            what = answer
    return Failure(
        FailureClass.INFRA_TRANSIENT,
        f"{repo} was not published ({what}); publish again: what was uploaded is not sent twice",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it: the client wraps what goes wrong with one file of many."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
