import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conductor.config import DEFAULTS
from conductor.config_files import (
    MOST_FILES_IN_A_CHAIN,
    merge,
    open_config_file,
    project_of,
    read_config_file,
    setting_names,
)
from conductor.failure import Failure

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write files of a project by name and text; return the first."""

    def make(**files: str) -> Path:
        (tmp_path / "configs").mkdir(exist_ok=True)
        paths = [tmp_path / "configs" / f"{name}.yaml" for name in files]
        for path, text in zip(paths, files.values(), strict=True):
            path.write_text(text)
        return paths[0]

    return make


def values_of(path: Path) -> dict[str, Any]:
    return {name: entry.value for name, entry in read_config_file(path).items()}


def test_the_schema_and_the_defaults_know_the_same_settings() -> None:
    assert set(setting_names()) == set(DEFAULTS)


INHERITED: list[Any] = [
    pytest.param(
        {"a": "extends: b.yaml\nseed: 1\n", "b": "seed: 2\nlimit: 3\n"},
        {"seed": (1, "a"), "limit": (3, "b")},
        id="the-file-overrides-what-it-extends",
    ),
    pytest.param(
        {"a": "extends: [b.yaml, c.yaml]\n", "b": "seed: 2\nlimit: 2\n", "c": "seed: 3\n"},
        {"seed": (3, "c"), "limit": (2, "b")},
        id="later-overrides-earlier",
    ),
    pytest.param(
        {
            "a": "extends: b.yaml\nengine: {dtype: float32}\n",
            "b": "engine: {dtype: auto, port: 8000}\n",
        },
        {"engine.dtype": ("float32", "a"), "engine.port": (8000, "b")},
        id="mappings-merge",
    ),
    pytest.param(
        {
            "a": "extends: b.yaml\nengine: {arguments: [--x]}\n",
            "b": "engine: {arguments: [--y, --z]}\n",
        },
        {"engine.arguments": (["--x"], "a")},
        id="lists-replace",
    ),
    pytest.param(
        {"a": "extends: b.yaml\nseed: null\n", "b": "seed: 2\nlimit: 3\n"},
        {"limit": (3, "b")},
        id="null-removes",
    ),
    pytest.param(
        {
            "a": "extends: b.yaml\nengine: null\n",
            "b": "engine: {dtype: float32, port: 8000}\nseed: 1\n",
        },
        {"seed": (1, "b")},
        id="null-removes-a-section",
    ),
    pytest.param(
        {"a": "extends: [b.yaml, c.yaml]\n", "b": "seed: 2\n", "c": "seed: null\n"},
        {},
        id="null-removes-what-was-extended-before",
    ),
    pytest.param(
        {"a": "extends: b.yaml\nseed: 4\n", "b": "extends: c.yaml\nseed: null\n", "c": "seed: 1\n"},
        {"seed": (4, "a")},
        id="set-again-after-null",
    ),
    pytest.param(
        {
            "a": "extends: [b.yaml, c.yaml]\n",
            "b": "extends: d.yaml\nseed: 2\nlimit: 2\n",
            "c": "extends: d.yaml\nlimit: 3\n",
            "d": "seed: 4\nlimit: 4\n",
        },
        {"seed": (4, "d"), "limit": (3, "c")},
        id="what-is-extended-twice-counts-the-last-time",
    ),
    pytest.param(
        {
            "a": "extends: b.yaml\nsmoke: true\nsmoke_purpose: {engine.dtype: here}\n",
            "b": "smoke_purpose: {engine.dtype: there, seed: there}\n",
        },
        {
            "smoke": (True, "a"),
            "smoke_purpose.engine.dtype": ("here", "a"),
            "smoke_purpose.seed": ("there", "b"),
        },
        id="purposes-merge",
    ),
    pytest.param({"a": "extends: b.yaml\n", "b": "seed: 2\n"}, {"seed": (2, "b")}, id="wrapper"),
    pytest.param({"a": "extends: null\nseed: 2\n"}, {"seed": (2, "a")}, id="extends-nothing"),
    pytest.param(
        {"a": "engine: {<<: {dtype: float32, port: 8000}, dtype: auto}\n"},
        {"engine.dtype": ("auto", "a"), "engine.port": (8000, "a")},
        id="a-merge-key-is-overridden",
    ),
    pytest.param(
        {"a": "extends: &b [b.yaml]\nengine: {arguments: *b}\n", "b": "seed: 1\n"},
        {"seed": (1, "b"), "engine.arguments": (["b.yaml"], "a")},
        id="alias",
    ),
]


@pytest.mark.parametrize(("files", "expected"), INHERITED)
def test_files_extend_each_other(
    write: Write, files: dict[str, str], expected: dict[str, Any]
) -> None:
    read = read_config_file(write(**files))
    assert {name: (entry.value, entry.file.stem) for name, entry in read.items()} == expected


def test_paths_are_relative_to_the_file_that_names_them(write: Write, tmp_path: Path) -> None:
    (tmp_path / "configs" / "deep").mkdir(parents=True)
    (tmp_path / "configs" / "deep" / "inner.yaml").write_text("extends: ../base.yaml\n")
    assert values_of(write(top="extends: deep/inner.yaml\n", base="seed: 7\n")) == {"seed": 7}


def test_a_tower_of_diamonds_is_read_once_a_file(write: Write) -> None:
    height = MOST_FILES_IN_A_CHAIN - 1
    files = {f"f{n}": f"extends: [f{n + 1}.yaml, f{n + 1}.yaml]\n" for n in range(height)}
    path = write(**files, **{f"f{height}": "seed: 1\n"})
    applied = open_config_file(path).applied()
    assert [file.path.stem for file in applied] == [f"f{n}" for n in range(height, -1, -1)]
    assert merge(applied)["seed"].value == 1


def test_what_the_last_mention_decides_is_what_applying_every_mention_decides(
    write: Write,
) -> None:
    """Applying each file as often as it is mentioned, in full, comes to the same."""
    path = write(
        a="extends: [b.yaml, c.yaml, b.yaml]\n",
        b="extends: [d.yaml, e.yaml]\nseed: null\n",
        c="extends: [e.yaml, d.yaml]\nlimit: 1\n",
        d="seed: 1\nlimit: null\n",
        e="seed: 2\nlimit: 2\nthreshold: 0.2\n",
    )
    file = open_config_file(path)

    def mentions(each: Any) -> list[Any]:
        return [one for extended in each.extends for one in mentions(extended)] + [each]

    assert merge(file.applied()) == merge(mentions(file))


REFUSED: list[Any] = [
    pytest.param(
        {"a": "extends: b.yaml\n", "b": "extends: c.yaml\n", "c": "extends: b.yaml\n"},
        ["a.yaml -> ", "b.yaml -> ", "c.yaml -> ", "b.yaml: extends: the file extends itself"],
        id="cycle",
    ),
    pytest.param({"a": "extends: a.yaml\n"}, ["a.yaml: extends: the file extends"], id="itself"),
    pytest.param(
        {"a": "extends: b.yaml\n", "b": "extends: [gone.yaml]\n"},
        ["a.yaml -> ", "b.yaml -> ", "gone.yaml: extends: 'gone.yaml' is not there", "relative"],
        id="missing",
    ),
    pytest.param({"a": "extends: .\n"}, ["extends: '.' is not there"], id="directory"),
    pytest.param({"a": 'extends: "b\\0.yaml"\n'}, ["extends: ", "is no path"], id="no-path"),
    pytest.param(
        {"a": "extends: ../../x.yaml\n"},
        ["a.yaml -> ", "x.yaml: extends: '../../x.yaml' leads out of", "DAY0_CONFIG_ROOTS"],
        id="out-of-the-project",
    ),
    pytest.param({"a": "extends: /etc/hostname\n"}, ["leads out of"], id="absolute"),
    pytest.param(
        {"a": "extends: b.yaml\n", "b": "threshhold: 1\n"},
        ["a.yaml -> ", "b.yaml: threshhold: is no setting; did you mean threshold?"],
        id="unknown",
    ),
    pytest.param(
        {"a": "engine: {dtpe: auto}\n"}, ["engine.dtpe", "mean engine.dtype?"], id="unknown-inside"
    ),
    pytest.param({"a": "dtype: auto\n"}, ["dtype: is", "mean engine.dtype?"], id="out-of-section"),
    pytest.param(
        {"a": "smoke_purpose: {engine.dtpe: why}\n"}, ["mean engine.dtype?"], id="unknown-purpose"
    ),
    pytest.param({"a": "xyzzy: 1\n"}, ["xyzzy: is no setting"], id="like-nothing"),
    pytest.param({"a": "1: 1\n"}, ["1: is no setting"], id="name-is-a-number"),
    pytest.param(
        {"a": "extends: b.yaml\n", "b": "seed: one\n"},
        ["a.yaml -> ", "b.yaml: seed: ", "not of type"],
        id="wrong-type",
    ),
    pytest.param(
        {"a": "extends: b.yaml\nseed: 1\n", "b": "seed: one\n"},
        ["b.yaml: seed: "],
        id="wrong-type-though-overridden",
    ),
    pytest.param(
        {"a": "extends: b.yaml\n", "b": "seed: 1\nlimit: 2\nseed: 3\n"},
        ["a.yaml -> ", "b.yaml: seed: stands there twice (lines 1 and 3)", "leave one"],
        id="said-twice",
    ),
    pytest.param(
        {"a": "seed: 1\n'seed': 1\n"}, ["seed: stands there twice"], id="said-twice-in-quotes"
    ),
    pytest.param(
        {"a": "engine: {dtype: auto}\nseed: 1\nengine: {port: 8000}\n"},
        ["engine: stands there twice (lines 1 and 3)"],
        id="section-said-twice",
    ),
    pytest.param(
        {"a": "engine:\n  dtype: float32\n  dtype: auto\n"},
        ["dtype: stands there twice (lines 2 and 3)"],
        id="said-twice-in-a-section",
    ),
    pytest.param(
        {"a": "engine: {<<: [{dtype: float32, dtype: auto}]}\n"},
        ["dtype: stands there twice"],
        id="said-twice-in-what-is-merged",
    ),
    pytest.param(
        {"a": "extends: b.yaml\nextends: c.yaml\n", "b": "seed: 1\n", "c": "seed: 2\n"},
        ["extends: stands there twice"],
        id="extends-twice",
    ),
    pytest.param(
        {"a": "engine.dtype: auto\n"},
        ["engine.dtype: ", "write dtype below engine"],
        id="dotted-name",
    ),
    pytest.param(
        {"a": "extends: b.yaml\nengine.dtype: null\n", "b": "engine: {dtype: float32}\n"},
        ["engine.dtype: ", "write dtype below engine"],
        id="dotted-name-of-nothing",
    ),
    pytest.param(
        {"a": "run_name: 2026-01-02\n"}, ["run_name: 2026-01-02 ", "date", "quotes"], id="date"
    ),
    pytest.param(
        {"a": "engine: {dtype: 2026-01-02 03:04:05}\n"}, ["engine.dtype: ", "quotes"], id="time"
    ),
    pytest.param({"a": "run_name: !!binary aGk=\n"}, ["run_name: ", "bytes"], id="bytes"),
    pytest.param({"a": "run_name: !!set {a}\n"}, ["run_name: ", "set"], id="set"),
    pytest.param({"a": "threshold: .nan\n"}, ["threshold: nan "], id="nan"),
    pytest.param({"a": "watchdog: {server_s: .inf}\n"}, ["watchdog.server_s: inf "], id="inf"),
    pytest.param({"a": "engine: &e {arguments: *e}\n"}, ["JSON cannot"], id="holds-itself"),
    pytest.param({"a": 'workspace: "a\\0b"\n'}, ["workspace: "], id="no-path-for-a-workspace"),
    pytest.param({"a": "threshold: {a: 1}\n"}, ["threshold: "], id="mapping-for-number"),
    pytest.param({"a": "engine: vllm\n"}, ["engine: "], id="text-for-mapping"),
    pytest.param({"a": "engine: {arguments: [null]}\n"}, ["engine.arguments"], id="null-in-list"),
    pytest.param({"a": "extends: 3\n"}, ["extends: "], id="extends-a-number"),
    pytest.param({"a": "extends: {b: c}\n"}, ["extends: "], id="extends-a-mapping"),
    pytest.param({"a": "extends: [3]\n"}, ["extends.0: "], id="extends-a-list-of-numbers"),
    pytest.param({"a": "extends: ''\n"}, ["extends: "], id="extends-nothing-named"),
    pytest.param({"a": "smoke_purpose: {seed: ' '}\n"}, ["smoke_purpose.seed"], id="no-reason"),
    pytest.param(
        {"a": 'smoke_purpose: {seed: "\\u200b"}\n'}, ["smoke_purpose.seed"], id="invisible-reason"
    ),
    pytest.param({"a": "smoke_purpose: {seed: '- .'}\n"}, ["smoke_purpose.seed"], id="dots"),
    pytest.param({"a": "executor: moon\n"}, ["executor: "], id="no-such-executor"),
    pytest.param({"a": "run_name: '--'\n"}, ["run_name: "], id="name-of-dashes"),
    pytest.param(
        {"a": "extends: b.yaml\n", "b": "a: [unclosed\n"},
        ["a.yaml -> ", "b.yaml: is not valid YAML"],
        id="not-yaml",
    ),
    pytest.param({"a": "extends: b.yaml\n", "b": "- 1\n"}, ["b.yaml: must be a"], id="a-list"),
]


@pytest.mark.parametrize(("files", "words"), REFUSED)
def test_bad_files_are_refused_by_their_chain(
    write: Write, files: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(Failure) as caught:
        read_config_file(write(**files))
    assert caught.value.failure_class == "USER_CONFIG_ERROR"
    assert [word for word in words if word not in caught.value.message] == []


def test_a_chain_has_an_end(write: Write) -> None:
    files = {f"f{n}": f"extends: f{n + 1}.yaml\n" for n in range(MOST_FILES_IN_A_CHAIN + 1)}
    with pytest.raises(Failure, match=f"more than {MOST_FILES_IN_A_CHAIN} files in a chain"):
        read_config_file(write(**files))


def test_a_link_does_not_lead_out_of_the_roots(write: Write, tmp_path: Path) -> None:
    path = write(a="extends: b.yaml\n")
    outside = tmp_path.parent / f"{tmp_path.name}-outside.yaml"
    outside.write_text("seed: 1\n")
    (path.parent / "b.yaml").symlink_to(outside)
    with pytest.raises(Failure, match="leads out of"):
        read_config_file(path)
    assert read_config_file(path, roots=[tmp_path.parent])["seed"].file == outside


def test_a_file_that_is_a_link_extends_what_lies_beside_its_target(write: Write) -> None:
    path = write(a="extends: b.yaml\n", b="seed: 1\n")
    (path.parent / "deep").mkdir()
    link = path.parent / "deep" / "link.yaml"
    link.symlink_to(path)
    assert values_of(link) == values_of(write(c="extends: deep/link.yaml\n")) == {"seed": 1}


def test_a_link_to_itself_is_no_file(write: Write) -> None:
    path = write(a="").with_name("loop.yaml")
    path.symlink_to(path)
    with pytest.raises(Failure, match="cannot be read"):
        read_config_file(path)


def test_roots_are_configured(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.yaml").write_text("seed: 1\n")
    path = write(a="extends: ../elsewhere/b.yaml\n")
    assert values_of(path) == {"seed": 1}
    monkeypatch.setenv("DAY0_CONFIG_ROOTS", str(path.parent))
    with pytest.raises(Failure, match="leads out of"):
        read_config_file(path)
    monkeypatch.setenv("DAY0_CONFIG_ROOTS", os.pathsep.join([str(path.parent), str(elsewhere)]))
    assert values_of(path) == {"seed": 1}


@pytest.mark.parametrize(
    ("made", "file", "expected"),
    [
        pytest.param("p/configs/prod", "p/configs/prod/a.yaml", "p", id="configs"),
        pytest.param("p/.git", "p/deep/down/a.yaml", "p", id="checkout"),
        pytest.param("p/q/.git", "p/q/a.yaml", "p/q", id="nearest"),
        pytest.param("p", "p/a.yaml", "p", id="neither"),
    ],
)
def test_a_project_is_known_by_its_marks(
    tmp_path: Path, made: str, file: str, expected: str
) -> None:
    (tmp_path / made).mkdir(parents=True)
    assert project_of(tmp_path / file) == tmp_path / expected
