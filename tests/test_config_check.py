import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from conductor.cli import app
from conductor.config import DEFAULTS, load_config
from conductor.config_check import MAY_DIFFER, check

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
ENTRY = "release/smoke/int8.yaml"

Edit = Callable[[str, str], Path]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Copy the configurations of the repository."""
    return Path(shutil.copytree(CONFIGS, tmp_path / "configs"))


@pytest.fixture
def edit(project: Path) -> Edit:
    """Add lines to a configuration of the copy, or make a new one."""

    def write(name: str, text: str) -> Path:
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + text)
        return path

    return write


def problems(*paths: Path) -> list[str]:
    checked = check(paths)
    assert checked.unusable == []
    return [problem for each in checked.comparisons for problem in each.problems]


def day0(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["config", *map(str, arguments)])


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=str(path.relative_to(CONFIGS))) for path in CONFIGS.rglob("*.yaml")],
)
def test_every_configuration_of_the_repository_loads(path: Path) -> None:
    config = load_config(path, {}, required=())
    if "prod" in path.parts or path.parent.parent.name == "demo":
        assert config.recipe


def test_the_smoke_runs_of_the_repository_are_production() -> None:
    checked = check([CONFIGS])
    assert {each.entry.relative_to(CONFIGS).as_posix() for each in checked.comparisons} >= {
        "demo/smoke/int8.yaml",
        "release/smoke/nvfp4.yaml",
        "release/smoke/fp8.yaml",
        "release/smoke/int8.yaml",
    }
    assert problems(CONFIGS) == []
    for each in checked.comparisons:
        assert each.production and each.production.parent.name == "prod"
        assert each.production.name == each.entry.name
        assert {"smoke", "calibration.samples"} <= {one.name for one in each.differences}


def test_what_may_differ_are_settings_and_in_the_documentation() -> None:
    assert MAY_DIFFER.keys() <= DEFAULTS.keys()
    page = (ROOT / "docs" / "configuring.md").read_text(encoding="utf-8")
    listed = page.partition("only:\n\n")[2].partition(".\n\n")[0]
    assert {name.strip("` \n") for name in listed.split(",")} == MAY_DIFFER.keys()


OTHERWISE: dict[str, Any] = {
    "model": "org/other",
    "recipe": "fp8",
    "quantizer": "modelopt",
    "suite": "demo",
    "threshold": 0.05,
    "relative": True,
    "rule": "threshold",
    "until_decided": True,
    "noise_floor": True,
    "discordance": 0.2,
    "seed": 1,
    "calibration.data": "org/data",
    "calibration.split": "test",
    "calibration.text_column": "other",
    "calibration.max_length": 128,
    "engine.name": "transformers",
    "engine.dtype": "float32",
    "engine.tensor_parallel_size": 2,
    "engine.max_model_len": 512,
    "engine.health_timeout_s": 5.0,
    "engine.port": 8000,
    "engine.cpu_kv_cache_gib": 2,
    "engine.arguments": ["--chat-template=other"],
    "evaluation.request_timeout_s": 5,
    "executor": "slurm",
    "deterministic": True,
    "tracking.uri": "http://localhost:1",
    "dry_run": True,
    "overlap": "never",
    "fresh_baseline": True,
    "retry.limit": 0,
    "retry.first_wait_s": 1.0,
    "retry.longest_wait_s": 1.0,
    "watchdog.quantize_s": 1.0,
    "watchdog.evaluation_s": 1.0,
    "watchdog.server_s": 1.0,
}


def test_every_setting_that_may_not_differ_is_tried() -> None:
    assert DEFAULTS.keys() - MAY_DIFFER.keys() == OTHERWISE.keys()


def said(name: str, value: Any) -> str:
    section, _, key = name.rpartition(".")
    return "\n" + yaml.safe_dump({section: {key: value}} if section else {name: value})


def of_its_own(name: str, value: Any) -> str:
    """An entry with one override; nothing may be asked twice in one mapping of YAML."""
    extends = "extends: [../prod/int8.yaml, ../../smoke/common_prodlike.yaml]\n"
    also = "limit: null\n" if name == "until_decided" else ""
    return extends + also + said(name, value)


@pytest.mark.parametrize("name", OTHERWISE)
def test_each_other_difference_is_refused_by_name_with_both_values(edit: Edit, name: str) -> None:
    value = OTHERWISE[name]
    path = edit("release/smoke/one.yaml", of_its_own(name, value))
    (problem,) = problems(path)
    assert problem.startswith(f"{name}: {value!r} in {path}, ")
    assert " in production; " in problem


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_difference_with_a_purpose_is_allowed_and_printed(edit: Edit, name: str) -> None:
    text = of_its_own(name, OTHERWISE[name]) + f"smoke_purpose: {{{name}: to try it out}}\n"
    path = edit("release/smoke/one.yaml", text)
    assert problems(path) == []
    done = day0("check", path)
    assert done.exit_code == 0
    assert f"differs: {name}: {OTHERWISE[name]!r}, " in done.stdout
    assert "in production; purpose: to try it out" in done.stdout


EXTENDED = "extends: [../prod/int8.yaml, ../../smoke/common_prodlike.yaml]\n"
SNEAKED: list[Any] = [
    pytest.param({"release/smoke/helper.yaml": "threshold: 0.5\n"}, id="helper-in-smoke"),
    pytest.param({"release/helper.yaml": "threshold: 0.5\n"}, id="helper-elsewhere"),
    pytest.param(
        {"release/helper.yaml": "extends: prod/int8.yaml\nthreshold: 0.5\n"},
        id="helper-that-extends-production",
    ),
    pytest.param(
        {
            "release/helper.yaml": "extends: deeper.yaml\n",
            "release/deeper.yaml": "threshold: 0.5\n",
        },
        id="helper-of-a-helper",
    ),
]


@pytest.mark.parametrize("helpers", SNEAKED)
@pytest.mark.parametrize("last", [True, False], ids=["helper-last", "helper-amid"])
def test_a_file_in_between_hides_nothing(edit: Edit, helpers: dict[str, str], last: bool) -> None:
    for name, text in helpers.items():
        edit(name, text)
    first = next(iter(helpers))
    helper = "helper.yaml" if "smoke" in first else "../helper.yaml"
    parts = ["../prod/int8.yaml", "../../smoke/common_prodlike.yaml"]
    parts.insert(2 if last else 1, helper)
    path = edit("release/smoke/one.yaml", yaml.safe_dump({"extends": parts}))
    (problem,) = problems(path)
    assert problem.startswith("threshold: 0.5 in ")


ROUNDS = "extends: [../prod/bounded.yaml, ../../smoke/common_prodlike.yaml]\nlimit: null\n"
BOUNDED = "until_decided: true\nfirst_batch: 50\nmax_samples: 100\nmax_repeats: 2\n"
AS_MUCH = "first_batch: 50\nmax_samples: 100\nmax_repeats: 2\ncalibration: {samples: 512}\n"
MORE: list[Any] = [
    pytest.param(BOUNDED, f"{ROUNDS}{AS_MUCH}", [], id="as-much"),
    pytest.param(BOUNDED, f"{ROUNDS}first_batch: 51\n", ["first_batch: 51"], id="first-batch"),
    pytest.param(BOUNDED, f"{ROUNDS}max_samples: 101\n", ["max_samples: 101"], id="samples"),
    pytest.param(BOUNDED, f"{ROUNDS}max_samples: null\n", ["max_samples: None"], id="all-samples"),
    pytest.param(BOUNDED, f"{ROUNDS}max_repeats: 3\n", ["max_repeats: 3"], id="repeats"),
    pytest.param(
        BOUNDED,
        f"{ROUNDS}calibration: {{samples: 513}}\n",
        ["calibration.samples: 513"],
        id="calibration",
    ),
    pytest.param("limit: 10\n", ROUNDS, ["limit: None"], id="all-questions"),
    pytest.param(
        "limit: 10\n", ROUNDS.replace("limit: null\n", ""), ["limit: 20"], id="common-asks-more"
    ),
    pytest.param(
        "limit: 10\n", f"{ROUNDS}smoke_purpose: {{limit: to see all}}\n", [], id="on-purpose"
    ),
]


@pytest.mark.parametrize(("production", "smoke", "words"), MORE)
def test_a_smoke_run_asks_no_more_than_production(
    edit: Edit, production: str, smoke: str, words: list[str]
) -> None:
    edit("release/prod/bounded.yaml", f"extends: base.yaml\n{production}")
    found = problems(edit("release/smoke/one.yaml", smoke))
    assert [each.partition(" in ")[0] for each in found] == words
    assert all("no more than production" in each for each in found)


def test_extending_what_production_extends_once_more_hides_nothing(edit: Edit) -> None:
    edit("release/shared.yaml", "threshold: 0.5\n")
    edit("release/prod/strict.yaml", "extends: ../shared.yaml\nrecipe: int8\nthreshold: 0.01\n")
    text = "extends: [../prod/strict.yaml, ../shared.yaml, ../../smoke/common_prodlike.yaml]\n"
    (problem,) = problems(edit("release/smoke/one.yaml", text))
    assert problem.startswith("threshold: 0.5 in ")


def test_what_production_sets_and_smoke_removes_differs(edit: Edit) -> None:
    path = edit("release/smoke/one.yaml", f"{EXTENDED}calibration: {{max_length: null}}\n")
    (problem,) = problems(path)
    assert problem.startswith(f"calibration.max_length: 512 in {path}, 2048 in production")
    wrapper = edit("old/one.yaml", "extends: ../release/smoke/one.yaml\n")
    assert problems(wrapper) == [problem]


REASONED: list[Any] = [
    pytest.param("threshold: 0.5\nsmoke_purpose: {threshold: why}\n", "", True, id="same-file"),
    pytest.param("threshold: 0.5\n", "smoke_purpose: {threshold: why}\n", True, id="above"),
    pytest.param("smoke_purpose: {threshold: why}\n", "threshold: 0.5\n", False, id="below"),
    pytest.param(
        "threshold: 0.02\nsmoke_purpose: {threshold: why}\n",
        "threshold: 0.5\n",
        False,
        id="of-another-value",
    ),
    pytest.param(
        "threshold: 0.5\nsmoke_purpose: {threshold: why}\n",
        "smoke_purpose: null\n",
        False,
        id="taken-back",
    ),
    pytest.param(
        "engine: null\nsmoke_purpose: {engine.dtype: why}\n", "", True, id="of-a-removed-section"
    ),
    pytest.param(
        "smoke_purpose: {engine.dtype: why}\n", "engine: null\n", False, id="removed-further-up"
    ),
]


@pytest.mark.parametrize(("shared", "own", "allowed"), REASONED)
def test_a_reason_is_for_what_its_file_says_or_extends(
    edit: Edit, shared: str, own: str, allowed: bool
) -> None:
    edit("release/prod/exact.yaml", "extends: base.yaml\nengine: {dtype: float32}\n")
    edit("release/shared.yaml", shared)
    extends = "extends: [../prod/exact.yaml, ../../smoke/common_prodlike.yaml, ../shared.yaml]\n"
    path = edit("release/smoke/one.yaml", extends + own)
    assert (problems(path) == []) == allowed
    assert problems(edit("old/one.yaml", "extends: ../release/smoke/one.yaml\n")) == problems(path)


REFUSED: list[Any] = [
    pytest.param(
        "extends: ../../smoke/common_prodlike.yaml\nrecipe: int8\n",
        ["extends: no production file"],
        id="no-production",
    ),
    pytest.param(
        "extends: ../prod/int8.yaml\nsmoke: true\n", ["extends: no common_prodlike"], id="no-common"
    ),
    pytest.param(
        "recipe: int8\n",
        ["smoke: is not true", "no production file", "no common_prodlike"],
        id="lies-in-smoke-only",
    ),
    pytest.param(f"{EXTENDED}smoke: false\n", ["smoke: is not true"], id="smoke-turned-off"),
    pytest.param(f"{EXTENDED}smoke: null\n", ["smoke: is not true"], id="smoke-removed"),
    pytest.param(
        "extends: [../prod/int8.yaml, ../prod/fp8.yaml, ../../smoke/common_prodlike.yaml]\n",
        ["extends: several production files"],
        id="two-productions",
    ),
    pytest.param(
        f"{EXTENDED}smoke_purpose: {{threshold: to try}}\n",
        ["smoke_purpose: threshold is as in production"],
        id="purpose-of-nothing",
    ),
    pytest.param(
        f"{EXTENDED}threshold: 0.5\nsmoke_purpose: {{seed: to try}}\n",
        ["threshold: 0.5 in", "smoke_purpose: seed is as in production"],
        id="purpose-of-another",
    ),
    pytest.param(
        f"{EXTENDED}threshold: 0.5\nseed: 3\n", ["threshold: 0.5 in", "seed: 3 in"], id="all-told"
    ),
]


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_what_is_no_smoke_run_of_production_is_refused(
    edit: Edit, text: str, words: list[str]
) -> None:
    path = edit("release/smoke/one.yaml", text)
    found = problems(path)
    assert len(found) == len(words)
    assert all(word in problem for problem, word in zip(found, words, strict=True))
    done = day0("check", path.parents[2])
    assert done.exit_code == 1
    assert done.stdout.count("REFUSED: ") == 1


def test_a_file_is_compared_once_by_whatever_path(edit: Edit, project: Path) -> None:
    path = edit("release/smoke/deep/../idle.yaml", "recipe: int8\n")
    assert len(problems(path, project / "release/smoke/idle.yaml")) == 3


ACCEPTED: list[Any] = [
    pytest.param(EXTENDED, id="plain"),
    pytest.param(f"{EXTENDED}limit: 5\nrun_name: quick\n", id="less-still"),
    pytest.param(
        "extends: [../prod/base.yaml, ../prod/int8.yaml, ../../smoke/common_prodlike.yaml]\n",
        id="also-what-production-extends",
    ),
    pytest.param(
        "extends: [../../smoke/common_prodlike.yaml, ../prod/int8.yaml]\n", id="common-first"
    ),
    pytest.param(f"{EXTENDED}threshold: 0.01\n", id="said-again"),
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_smoke_runs_of_production_are_accepted(edit: Edit, text: str) -> None:
    assert problems(edit("release/smoke/one.yaml", text)) == []


def test_old_paths_keep_working_with_a_wrapper_of_one_line(edit: Edit, project: Path) -> None:
    smoke = edit("old/smoke-int8.yaml", "extends: ../release/smoke/int8.yaml\n")
    production = edit("old/int8.yaml", "extends: ../release/prod/int8.yaml\n")
    for wrapper, moved in ((smoke, ENTRY), (production, "release/prod/int8.yaml")):
        there = load_config(project / moved, {}, required=())
        assert load_config(wrapper, {}, required=()).origins == there.origins
    comparisons = {each.entry: each for each in check([project]).comparisons}
    assert comparisons[smoke].production == project / "release/prod/int8.yaml"
    assert not comparisons[smoke].problems
    assert production not in comparisons
    entry = edit("release/smoke/one.yaml", EXTENDED.replace("../prod/", "../../old/"))
    assert problems(entry) == []


def test_a_wrapper_adds_no_difference_unseen(edit: Edit) -> None:
    wrapper = edit("old/smoke-int8.yaml", "extends: ../release/smoke/int8.yaml\nthreshold: 0.5\n")
    (problem,) = problems(wrapper)
    assert problem.startswith(f"threshold: 0.5 in {wrapper}, 0.01 in production")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        pytest.param("threshold: 0.5\n", "threshold: is set by", id="threshold"),
        pytest.param(
            "smoke_purpose: {calibration.samples: all}\n", "smoke_purpose.calib", id="purpose"
        ),
    ],
)
def test_the_common_file_widens_nothing(edit: Edit, project: Path, line: str, word: str) -> None:
    common = edit("smoke/common_prodlike.yaml", line)
    found = problems(project / ENTRY)
    assert any(problem.startswith(word) and str(common) in problem for problem in found)


def test_no_smoke_run_hides_by_the_case_of_its_suffix(edit: Edit, project: Path) -> None:
    path = edit("release/smoke/one.YAML", f"{EXTENDED}threshold: 0.5\n")
    assert problems(project) == problems(path) != []


def test_what_production_should_not_hold_is_not_repeated(edit: Edit) -> None:
    held = "extends: base.yaml\ntracking: {uri: 'http://user:planted@host'}\n"
    edit("release/prod/held.yaml", held)
    text = EXTENDED.replace("int8", "held") + "tracking: {uri: null}\n"
    done = day0("check", edit("release/smoke/one.yaml", text))
    assert "refused: tracking.uri: None in" in done.stdout
    assert "planted" not in done.output


def test_no_smoke_run_hides_by_the_name_of_the_common_file(edit: Edit) -> None:
    text = "extends: ../prod/int8.yaml\nsmoke: true\nthreshold: 0.5\n"
    found = problems(edit("release/smoke/common_prodlike.yaml", text))
    assert any(problem.startswith("threshold: 0.5 in ") for problem in found)


@pytest.mark.parametrize("smoke", ["false", "null"])
def test_turning_smoke_off_elsewhere_does_not_turn_the_check_off(edit: Edit, smoke: str) -> None:
    extended = EXTENDED.replace("../prod/", "prod/").replace("../../smoke/", "../smoke/")
    path = edit("release/one.yaml", f"{extended}smoke: {smoke}\nthreshold: 0.5\n")
    assert [problem.partition(":")[0] for problem in problems(path)] == ["smoke", "threshold"]


def test_production_gives_no_reason_for_its_smoke_runs(edit: Edit, project: Path) -> None:
    edit("release/prod/int8.yaml", "smoke_purpose: {threshold: lenient}\n")
    entry = edit("release/smoke/one.yaml", f"{EXTENDED}threshold: 0.5\n")
    assert [problem.partition(":")[0] for problem in problems(entry)] == ["threshold"]
    (unusable,) = check([project / "release/prod"]).unusable
    assert "smoke_purpose needs smoke: true" in unusable


def test_production_does_not_lie_among_smoke_runs(edit: Edit) -> None:
    edit("release/smoke/prod/easy.yaml", "extends: ../../prod/int8.yaml\nthreshold: 0.5\n")
    entry = edit("release/smoke/one.yaml", EXTENDED.replace("../prod/int8", "prod/easy"))
    (problem,) = problems(entry)
    assert problem.startswith("threshold: 0.5 in ")


def test_production_that_says_it_is_smoke_is_held_against_production(edit: Edit) -> None:
    path = edit("release/prod/quick.yaml", "extends: base.yaml\nsmoke: true\nthreshold: 0.5\n")
    found = problems(path)
    assert [problem.partition(":")[0] for problem in found] == ["extends", "threshold"]


@pytest.mark.parametrize(
    ("made", "arguments", "words"),
    [
        pytest.param({}, ["gone"], "cannot be read", id="missing"),
        pytest.param({"release/smoke/bad.yaml": "seed: one\n"}, ["configs"], "seed", id="bad"),
        pytest.param(
            {"release/smoke/bad.yaml": f"{EXTENDED}until_decided: true\n"},
            ["configs"],
            "release/smoke/bad.yaml",
            id="contradiction",
        ),
        pytest.param({}, ["configs/release/prod"], "no smoke configuration", id="none-there"),
        pytest.param({}, ["configs/smoke"], "no smoke configuration", id="common-alone"),
    ],
)
def test_a_check_that_could_not_check_is_no_pass(
    edit: Edit,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: dict[str, str],
    arguments: list[str],
    words: str,
) -> None:
    for name, text in made.items():
        edit(name, text)
    monkeypatch.chdir(project.parent)
    done = day0("check", *arguments)
    assert (done.exit_code, words in done.stderr) == (2, True)


def test_configs_are_checked_unless_others_are_named(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.parent)
    done = day0("check", "--json")
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert len(document["comparisons"]) == 5
    assert (project / ENTRY).as_posix() in {each["entry"] for each in document["comparisons"]}
    assert all(each["allowed"] for one in document["comparisons"] for each in one["differences"])
    assert not document["unusable"]
    monkeypatch.chdir(project)
    assert day0("check").exit_code == 2


def test_show_names_the_file_of_every_value(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.parent)
    shown = day0("show", "configs/release/smoke/until_decided.yaml")
    assert shown.exit_code == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in shown.stdout.splitlines()}
    assert lines.keys() == DEFAULTS.keys()
    assert lines["threshold"] == "0.01  (configs/release/prod/base.yaml)"
    assert lines["until_decided"] == "true  (configs/release/prod/until_decided.yaml)"
    assert lines["calibration.samples"] == "16  (configs/smoke/common_prodlike.yaml)"
    assert lines["max_samples"] == "20  (configs/release/smoke/until_decided.yaml)"
    assert lines["limit"] == "null  (default)"
    document = json.loads(day0("show", "configs/release/prod/base.yaml", "--json").stdout)
    base = str(project / "release/prod/base.yaml")
    assert document["threshold"] == {"value": 0.01, "from": base}
    assert document["overlap"] == {"value": "auto", "from": "default"}


@pytest.mark.parametrize("file", ["gone.yaml", "configs"])
def test_show_refuses_what_is_no_configuration(
    project: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.chdir(project.parent)
    shown = day0("show", file)
    assert (shown.exit_code, "cannot be read" in shown.stderr) == (2, True)
