import json
from importlib import resources
from pathlib import Path

import pytest

from conductor.failure import Failure
from conductor.suites import BUILT_IN, check_perplexities, load_suite
from gates.criteria import ANSWER_LIMITS

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
    assert all((task.samples or 0) >= 1000 for task in suite.tasks.values())


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


def test_what_a_task_may_say_of_its_questions_and_its_reference(tmp_path: Path) -> None:
    suite = load_suite(
        write(
            tmp_path,
            "name: mine\ntasks:\n  t:\n    {metric: acc, kind: generation, reference: 0.7,\n"
            "    reference_source: a card, reference_protocol: 5 shots, clusters: story,\n"
            "    discordance: 0.03, limits: {truncated: 0.5}}\n"
            "  bare: {metric: acc, kind: generation}\n",
        )
    )
    task, bare = suite.tasks["t"], suite.tasks["bare"]
    assert (task.clusters, task.discordance, task.limits) == ("story", 0.03, {"truncated": 0.5})
    assert (bare.clusters, bare.discordance, bare.limits) == (None, None, {})
    assert suite.references == {"t": {"score": 0.7, "source": "a card", "protocol": "5 shots"}}


def test_limits_are_named_as_the_run_gate_names_them() -> None:
    schema = json.loads(resources.files("gates").joinpath("schemas/suite.json").read_text())
    task = schema["properties"]["tasks"]["additionalProperties"]["properties"]
    assert set(task["limits"]["propertyNames"]["enum"]) == set(ANSWER_LIMITS)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        pytest.param("discordance: 1.5", "discordance", id="discordance-above-1"),
        pytest.param("discordance: .nan", "discordance", id="discordance-nan"),
        pytest.param("clusters: ''", "clusters", id="no-name-of-a-field"),
        pytest.param("limits: {truncated: 2}", "limits.truncated", id="rate-above-1"),
        pytest.param("limits: {cut_off: 0.5}", "cut_off", id="no-such-limit"),
        pytest.param("limits: {}", "limits", id="no-limit-named"),
        pytest.param("reference_protocol: 5", "reference_protocol", id="protocol-no-text"),
    ],
)
def test_bad_fields_of_a_task_are_refused(tmp_path: Path, field: str, words: str) -> None:
    text = f"name: x\ntasks: {{t: {{metric: acc, kind: generation, {field}}}}}\n"
    with pytest.raises(Failure) as caught:
        load_suite(write(tmp_path, text))
    assert words in caught.value.message


def test_an_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(Failure, match="demo, standard"):
        load_suite("demmo")


@pytest.mark.parametrize(
    ("metric", "relative", "until_decided", "words"),
    [
        pytest.param("word_perplexity", True, True, "--until-decided", id="no-look-in-between"),
        pytest.param("bits_per_byte", False, False, "give --relative", id="no-full-score"),
        pytest.param("word_perplexity", True, False, None, id="whole-and-relative"),
        pytest.param("acc", False, True, None, id="a-mean"),
    ],
)
def test_perplexities_that_no_rule_compares_are_refused(
    tmp_path: Path, metric: str, relative: bool, until_decided: bool, words: str | None
) -> None:
    text = f"name: x\ntasks: {{t: {{metric: {metric}, kind: loglikelihood}}}}\n"
    suite = load_suite(write(tmp_path, text))
    if words is None:
        check_perplexities(suite, relative=relative, until_decided=until_decided)
        return
    with pytest.raises(Failure, match=words) as caught:
        check_perplexities(suite, relative=relative, until_decided=until_decided)
    assert "tasks.t.metric" in caught.value.message
    assert "suite.yaml" in caught.value.message
