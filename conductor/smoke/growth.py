"""A manifest only grows: what protected something at an earlier revision protects it still.

What is different on purpose gets a scenario of its own beside the old one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conductor.failure import Failure, unusable
from conductor.smoke.manifest import Scenario, parse_manifest, read_manifest


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How a manifest differs from that of a revision: what protects less, and what is new."""

    weakened: tuple[str, ...]
    added: tuple[str, ...]
    kept: int


def compare_with_revision(path: Path, revision: str) -> Growth:
    """Compare the manifest in ``path`` with what it was at ``revision`` of its repository.

    One that the revision did not have yet is all new; one that cannot be read now is weakened.

    Raises:
        Failure: USER_CONFIG_ERROR when git does not know the revision, or cannot be asked.
    """
    text = _at_revision(path, revision)
    where = f"smoke manifest {path} at {revision}"
    then = parse_manifest(text, where=where, directory=path.parent) if text is not None else ()
    try:
        now = read_manifest(path)
    except Failure as failure:
        if text is None:
            raise
        return Growth(weakened=(failure.message,), added=(), kept=0)
    return compare(then, now)


def compare(then: Sequence[Scenario], now: Sequence[Scenario]) -> Growth:
    """Compare two manifests, scenario by scenario."""
    today = {each.name: each for each in now}
    known = {each.name for each in then}
    weakened: list[str] = []
    for old in then:
        new = today.get(old.name)
        problems = _losses(old, new) if new else ["was removed or renamed"]
        weakened += [f"{old.name}: {problem}" for problem in problems]
    return Growth(
        weakened=tuple(weakened),
        added=tuple(name for name in today if name not in known),
        kept=len(known & set(today)),
    )


def _losses(old: Scenario, new: Scenario) -> Iterator[str]:
    """Say what ``old`` demanded and ``new`` does not."""
    if new.command != old.command:
        yield "its command was changed; what is to be run beside it needs a scenario of its own"
    for expectation in old.expect:
        if not any(each.covers(expectation) for each in new.expect):
            wanted = f"{expectation.test} {expectation.wanted}"
            yield f"{expectation.subject}: {wanted} is not demanded any more, or less strictly"
    for words, mine, theirs in (
        ("needs", new.needs, old.needs),
        ("comes after", new.after, old.after),
    ):
        if more := sorted(set(mine) - set(theirs)):
            yield f"{words} {', '.join(more)} now, and can be skipped for it"
    if gone := sorted(set(old.owners) - set(new.owners)):
        yield f"does not protect {', '.join(gone)} any more"
    if old.quick and not new.quick:
        yield "is not among the quick ones any more"


def _at_revision(path: Path, revision: str) -> str | None:
    """Return a file as it was at a revision, or None where it was not there."""
    directory = path.absolute().parent
    while not directory.is_dir():  # it may be gone with its directory
        directory = directory.parent
    root = Path(_ask_git(directory, "rev-parse", "--show-toplevel").strip())
    commit = _ask_git(
        root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"
    ).strip()
    name = path.resolve().relative_to(root.resolve()).as_posix()
    if not _ask_git(root, "ls-tree", "--name-only", commit, "--", name).strip():
        return None
    return _ask_git(root, "show", f"{commit}:{name}")


def _ask_git(directory: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],  # noqa: S607
            cwd=directory,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        raise unusable("git is not installed, and nothing else knows earlier revisions") from None
    if done.returncode != 0:
        said = done.stderr.strip() or "no such revision"
        raise unusable(f"git {' '.join(arguments)} in {directory}: {said}; name a revision that "
                      "git knows with --base")  # fmt: skip
    return done.stdout
