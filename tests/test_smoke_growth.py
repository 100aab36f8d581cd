"""The manifest only grows: each way to protect less is found, and what is stricter is not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from conductor.failure import Failure
from conductor.smoke.growth import compare_with_revision

OLD = """
[[scenario]]
name = "before"
owners = ["y"]
command = ["echo", "before"]
expect = [{ stdout_contains = "before" }]
timeout_s = 5

[[scenario]]
name = "a"
owners = ["x", "y"]
command = ["echo", "hello"]
expect = [
    { exit_code = 0 },
    { stdout_contains = "hello" },
    { output_matches = "^hello$" },
    { json_path = "n", at_least = 5 },
    { json_path = "s", equals = "ACCEPT" },
    { file = "{tmp}/f", contains = "made" },
]
timeout_s = 5
quick = true
"""

NEW_SCENARIO = OLD[: OLD.index("[[scenario]]", 5)].replace('name = "before"', 'name = "new"')


def git(directory: Path, *arguments: str) -> None:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=directory, check=True, capture_output=True)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A manifest that is committed in a repository."""
    git(tmp_path, "init", "--quiet")
    path = tmp_path / "tests" / "manifest.toml"
    path.parent.mkdir()
    path.write_text(OLD)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "m")
    return path


STRICTER = [
    pytest.param('"echo", "hello"', '"echo", "hello"', id="same"),
    pytest.param('stdout_contains = "hello"', 'stdout_contains = "hello world"', id="longer"),
    pytest.param("at_least = 5", "at_least = 6", id="more"),
    pytest.param("{ exit_code = 0 },", '{ exit_code = 0 }, { stderr_contains = "words" },', id="+"),
    pytest.param("[[scenario]]\nname = \"a\"", NEW_SCENARIO + "[[scenario]]\nname = \"a\"",
                 id="new-scenario"),
    pytest.param('owners = ["x", "y"]', 'owners = ["x", "y", "z"]', id="new-owner"),
    pytest.param('owners = ["y"]', 'owners = ["y"]\nquick = true', id="quick-now"),
]  # fmt: skip

WEAKER = [
    pytest.param('name = "a"', 'name = "b"', "a: was removed or renamed", id="renamed"),
    pytest.param(OLD[OLD.index("[[scenario]]", 5) :], "", "a: was removed", id="removed"),
    pytest.param(
        '"echo", "hello"', '"echo", "hello", "x"', "its command was changed", id="command"
    ),
    pytest.param("{ exit_code = 0 },", "", "exit code", id="exit-code-dropped"),
    pytest.param("{ exit_code = 0 },", "{ exit_code = 1 },", "exit code", id="exit-code-changed"),
    pytest.param('{ stdout_contains = "hello" },', "", "stdout: contains", id="literal-dropped"),
    pytest.param('contains = "hello"', 'contains = "hell"', "stdout: contains", id="literal-short"),
    pytest.param(
        'contains = "hello"', 'contains = "other"', "stdout: contains", id="literal-other"
    ),
    pytest.param('"^hello$"', '"^hello"', "output: matches", id="regex-broadened"),
    pytest.param('"^hello$"', '"^hello$|^bye$"', "output: matches", id="regex-or"),
    pytest.param("at_least = 5", "at_least = 4", "JSON n: at_least", id="less"),
    pytest.param(
        'equals = "ACCEPT"', 'matches = "ACCEPT|REGR"', "JSON s: equals", id="equals-gone"
    ),
    pytest.param('json_path = "s"', 'json_path = "t"', "JSON s: equals", id="other-path"),
    pytest.param('"{tmp}/f"', '"{tmp}/*"', "file {tmp}/f: contains", id="any-file"),
    pytest.param("quick = true", "", "not among the quick ones", id="not-quick"),
    pytest.param("quick = true", 'needs = ["gpu"]', "needs gpu now", id="need"),
    pytest.param("quick = true", 'after = ["before"]', "comes after before now", id="after"),
    pytest.param('owners = ["x", "y"]', 'owners = ["x"]', "not protect y", id="owner"),
    pytest.param("timeout_s = 5\nquick", "timeout_s = 0\nquick", "timeout_s: must", id="timeout-0"),
    pytest.param(OLD, "", "at least one", id="emptied"),
]


def change(manifest: Path, old: str, new: str) -> None:
    assert old in OLD
    manifest.write_text(new.join(OLD.rsplit(old, 1)))


@pytest.mark.parametrize(("old", "new"), STRICTER)
def test_what_protects_as_much(manifest: Path, old: str, new: str) -> None:
    change(manifest, old, new)
    growth = compare_with_revision(manifest, "HEAD")
    assert growth.weakened == ()
    assert growth.kept == 2


@pytest.mark.parametrize(("old", "new", "words"), WEAKER)
def test_what_protects_less(manifest: Path, old: str, new: str, words: str) -> None:
    change(manifest, old, new)
    assert words in "\n".join(compare_with_revision(manifest, "HEAD").weakened)


def test_a_manifest_that_was_removed_is_weakened(manifest: Path) -> None:
    manifest.unlink()
    manifest.parent.rmdir()
    assert "cannot be read" in compare_with_revision(manifest, "HEAD").weakened[0]


def test_a_revision_without_the_manifest_has_nothing_to_compare(manifest: Path) -> None:
    other = manifest.with_name("other.toml")
    other.write_text(OLD)
    growth = compare_with_revision(other, "HEAD")
    assert (growth.weakened, growth.added, growth.kept) == ((), ("before", "a"), 0)


@pytest.mark.parametrize("revision", ["no-such", "--all", "HEAD:tests"])
def test_a_revision_that_git_does_not_know_is_refused(manifest: Path, revision: str) -> None:
    with pytest.raises(Failure, match="name a revision"):
        compare_with_revision(manifest, revision)


def test_outside_a_repository_nothing_can_be_compared(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="git"):
        compare_with_revision(tmp_path / "manifest.toml", "HEAD")
