from pathlib import Path

import pytest

from conductor.failure import Failure
from conductor.suites import BUILT_IN, load_suite

MINIMAL = "name: mine\ntasks:\n  t: {metric: acc, kind: multiple_choice}\n"


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_suites_load(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert len(suite.tasks) >= 4


def test_the_demo_suite_is_local_and_mixed() -> None:
    suite = load_suite("demo")
    kinds = {task.kind for task in suite.tasks.values()}
    assert suite.is_local
    assert kinds == {"generation", "multiple_choice"}
    assert all((task.samples or 0) >= 500 for task in suite.tasks.values())


def test_defaults_of_a_minimal_suite(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, MINIMAL))
    task = suite.tasks["t"]
    assert (task.filter, task.scale, task.higher_is_better) == ("none", 1.0, True)
    assert (task.samples, task.fewshot, task.reference) == (None, None, None)
    assert not suite.is_local
    assert suite.canary_prompts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("name: x\ntasks: {}\n", "tasks", id="no-tasks"),
        pytest.param("name: x\ntasks: {t: {metric: acc}}\n", "kind", id="no-kind"),
        pytest.param(MINIMAL + "include_path: nowhere\n", "include_path", id="no-such-directory"),
        pytest.param(MINIMAL + "max_length: long\n", "max_length", id="wrong-type"),
        pytest.param("name: a/b\ntasks: {}\n", "name", id="name-with-slash"),
    ],
)
def test_bad_suites_are_refused_by_field(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(Failure) as caught:
        load_suite(write(tmp_path, text))
    assert words in caught.value.message
    assert "suite.yaml" in caught.value.message


def test_an_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(Failure, match="demo, standard"):
        load_suite("demmo")
