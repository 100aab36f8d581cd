import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from conductor.cli import app
from conductor.compatibility import Engine, Quantizer
from conductor.config import DEFAULTS, Executor, Rule, load_config, load_recorded
from conductor.failure import Failure


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "release.yaml"
    path.write_text(text)
    return path


def test_command_line_overrides_the_file_which_overrides_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: ./m\nrecipe: fp8\nthreshold: 0.02\nengine: {name: vllm, port: 8123}\n",
    )
    config = load_config(path, {"recipe": "int8", "threshold": None})
    assert (config.model, config.recipe, config.threshold) == ("./m", "int8", 0.02)
    assert (config.engine.name, config.engine.port) == (Engine.VLLM, 8123)
    assert config.origins["recipe"] == ("int8", "command line")
    assert config.origins["threshold"] == (0.02, str(path))
    assert config.origins["seed"] == (0, "default")


@pytest.mark.parametrize(("model", "suite"), [("demo", "demo"), ("org/name", "standard")])
def test_the_default_suite_fits_the_model(model: str, suite: str) -> None:
    assert load_config(None, {"model": model, "recipe": "int8"}).suite == suite


def test_every_value_has_an_origin() -> None:
    config = load_config(None, {"model": "demo", "recipe": "int8", "quantizer": "modelopt"})
    assert config.quantizer is Quantizer.MODELOPT
    assert config.document().keys() == DEFAULTS.keys()


REFUSED: list[Any] = [
    pytest.param("model: demo\nrecipe: int8\nthreshhold: 1\n", "threshhold", id="unknown-key"),
    pytest.param("threshold: .nan\n", "threshold", id="nan"),
    pytest.param("threshold: 2\n", "threshold", id="threshold-above-1"),
    pytest.param("limit: 0\n", "limit", id="limit-0"),
    pytest.param("engine: vllm\n", "engine", id="scalar-for-mapping"),
    pytest.param("engine: {port: 99999}\n", "engine.port", id="port-out-of-range"),
    pytest.param("- model\n", "must be a mapping", id="list"),
    pytest.param("model: [unclosed\n", "not valid YAML", id="not-yaml"),
    pytest.param("recipe: int8\n", "no model given", id="no-model"),
    pytest.param("model: demo\n", "no recipe given", id="no-recipe"),
    pytest.param("", "must be a mapping", id="empty"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(Failure) as caught:
        load_config(path, {})
    assert caught.value.failure_class == "USER_CONFIG_ERROR"
    assert words in caught.value.message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"absent\.yaml.*check the path"):
        load_config(tmp_path / "absent.yaml", {})


def test_settings_of_the_comparison(tmp_path: Path) -> None:
    text = "until_decided: true\nmax_samples: 500\nmax_repeats: 3\nnoise_floor: true\n"
    given = {"model": "demo", "recipe": "int8"}
    config = load_config(write(tmp_path, text), given)
    assert (config.until_decided, config.first_batch, config.max_samples) == (True, 200, 500)
    assert (config.max_repeats, config.noise_floor, config.discordance) == (3, True, None)
    assert (config.rule, load_config(None, given).until_decided) == (Rule.NONINFERIORITY, False)
    assert load_config(None, {**given, "rule": Rule.THRESHOLD}).rule is Rule.THRESHOLD


CONTRADICTIONS: list[Any] = [
    pytest.param({"until_decided": True, "limit": 5}, "max_samples instead", id="limit-and-rounds"),
    pytest.param(
        {"until_decided": True, "rule": Rule.THRESHOLD}, "no ground to stop", id="bare-and-rounds"
    ),
    pytest.param({"max_samples": 5}, "max_samples needs", id="most-without-rounds"),
    pytest.param({"first_batch": 50}, "first_batch needs", id="first-of-no-rounds"),
    pytest.param({"max_repeats": 2}, "max_repeats needs", id="repeats-without-rounds"),
    pytest.param({"threshold": 1.0}, "threshold must be under 1", id="threshold-is-the-scale"),
    pytest.param({"cluster": "hall"}, "cluster needs executor: slurm", id="cluster-but-here"),
    pytest.param({"executor": "pbs"}, "executor", id="no-such-executor"),
    pytest.param({"executor": "slurm", "cluster": ""}, "cluster", id="cluster-without-a-name"),
    pytest.param({"rule": "guess"}, "rule", id="no-such-rule"),
    pytest.param({"first_batch": 0}, "first_batch", id="empty-batch"),
    pytest.param({"discordance": 1.5}, "discordance", id="discordance-above-1"),
]


@pytest.mark.parametrize(("options", "words"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(Failure) as caught:
        load_config(None, {"model": "demo", "recipe": "int8", **options})
    assert words in caught.value.message


def test_where_it_runs(tmp_path: Path) -> None:
    path = write(tmp_path, "model: demo\nrecipe: int8\nexecutor: slurm\ncluster: hall\n")
    config = load_config(path, {})
    assert (config.executor, config.cluster) == (Executor.SLURM, "hall")
    other = load_config(path, {"cluster": "field"})
    assert (other.executor, other.cluster) == (Executor.SLURM, "field")
    here = load_config(path, {"executor": Executor.LOCAL})
    assert (here.executor, here.cluster) == (Executor.LOCAL, None)
    with pytest.raises(Failure, match="cluster: command line, executor: command line"):
        load_config(path, {"executor": "local", "cluster": "hall"})


@pytest.mark.parametrize(
    ("options", "executor", "cluster"),
    [
        pytest.param({}, Executor.SLURM, "hall", id="as-it-began"),
        pytest.param({"cluster": "field"}, Executor.SLURM, "field", id="elsewhere"),
        pytest.param({"executor": "local"}, Executor.LOCAL, None, id="here"),
    ],
)
def test_where_a_release_goes_on(
    tmp_path: Path, options: dict[str, Any], executor: Executor, cluster: str | None
) -> None:
    began = load_config(
        None, {"model": "demo", "recipe": "int8", "executor": "slurm", "cluster": "hall"}
    )
    recorded = tmp_path / "config.resolved.yaml"
    recorded.write_text(yaml.safe_dump(began.document()))
    then, now = load_recorded(recorded, None, options)
    assert (then.executor, then.cluster) == (Executor.SLURM, "hall")
    assert (now.executor, now.cluster) == (executor, cluster)


def test_a_contradiction_names_the_files_that_make_it(tmp_path: Path) -> None:
    path = write(tmp_path, "model: demo\nrecipe: int8\nuntil_decided: true\n")
    with pytest.raises(Failure) as caught:
        load_config(path, {"limit": 5})
    assert f"(limit: command line, until_decided: {path})" in caught.value.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1])
def test_bad_options_are_refused_before_anything_runs(value: float) -> None:
    with pytest.raises(Failure, match=r"command line: .*"):
        load_config(None, {"model": "demo", "recipe": "int8", "threshold": value})


def test_settings_of_the_run(tmp_path: Path) -> None:
    text = (
        "model: demo\nrecipe: int8\nrun_name: nightly\nexecutor: local\nsmoke: true\n"
        "smoke_purpose: {engine.dtype: as the device has it}\n"
        "tracking: {uri: http://host:5000, experiment: nightly}\n"
    )
    config = load_config(write(tmp_path, text), {})
    assert (config.run_name, config.executor, config.smoke) == ("nightly", Executor.LOCAL, True)
    assert (config.tracking.uri, config.tracking.experiment) == ("http://host:5000", "nightly")
    assert config.smoke_purpose == {"engine.dtype": "as the device has it"}
    plain = load_config(None, {"model": "demo", "recipe": "int8"})
    assert (plain.run_name, plain.smoke, plain.smoke_purpose) == (None, False, {})
    assert (plain.tracking.uri, plain.tracking.experiment) == (None, "day0")


@pytest.mark.parametrize(
    "uri",
    [
        pytest.param("http://user:secret@host", id="password"),
        pytest.param("http://secret@host", id="user"),
        pytest.param("http://host/?token=secret", id="query"),
        pytest.param("http://[secret/", id="unreadable"),
    ],
)
def test_credentials_stay_out_of_configurations(tmp_path: Path, uri: str) -> None:
    text = f"model: demo\nrecipe: int8\ntracking: {{uri: {uri!r}}}\n"
    with pytest.raises(Failure, match="MLFLOW_TRACKING_PASSWORD") as caught:
        load_config(write(tmp_path, text), {})
    assert "secret" not in caught.value.message


def test_a_purpose_is_for_smoke_runs(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="smoke_purpose needs smoke: true"):
        load_config(write(tmp_path, "model: demo\nrecipe: int8\nsmoke_purpose: {seed: x}\n"), {})


def test_what_the_command_line_overrides_is_known(tmp_path: Path) -> None:
    path = write(tmp_path, "model: demo\nrecipe: int8\nseed: 3\nlimit: 5\n")
    config = load_config(path, {"seed": 4, "limit": 5, "threshold": 0.02})
    assert config.overridden == {"seed": (3, str(path))}


class Extended:
    """A recorded release whose file extends another."""

    def __init__(self, directory: Path) -> None:
        (directory / "configs").mkdir()
        self.base = directory / "configs" / "base.yaml"
        self.entry = directory / "configs" / "entry.yaml"
        self.base.write_text("model: demo\nrecipe: int8\nseed: 3\nthreshold: 0.02\n")
        self.entry.write_text("extends: base.yaml\nseed: 4\n")
        self.recorded = directory / "workspace" / "runs" / "one" / "config.resolved.yaml"
        self.recorded.parent.mkdir(parents=True)
        config = load_config(self.entry, {"limit": 5})
        self.recorded.write_text(yaml.safe_dump(config.document()))


@pytest.fixture
def extended(tmp_path: Path) -> Extended:
    return Extended(tmp_path)


def test_a_release_goes_on_from_the_file_that_was_named(extended: Extended) -> None:
    then, now = load_recorded(extended.recorded, None, {})
    values = {name: value for name, (value, _) in then.origins.items()}
    expected = {**values, "workspace": str(extended.recorded.parents[2])}
    assert {name: value for name, (value, _) in now.origins.items()} == expected
    assert (now.seed, now.threshold, now.limit) == (4, 0.02, 5)
    assert then.entry == now.entry == extended.entry
    assert then.origins["threshold"] == now.origins["threshold"] == (0.02, str(extended.base))
    assert now.document()["config"] == {"value": str(extended.entry), "from": "command line"}


def test_a_change_of_a_file_that_is_extended_is_seen_on_resuming(extended: Extended) -> None:
    extended.base.write_text("model: demo\nrecipe: int8\nthreshold: 0.03\n")
    extended.entry.write_text("extends: base.yaml\n")
    then, now = load_recorded(extended.recorded, None, {"limit": 6})
    assert (then.threshold, then.seed, then.limit) == (0.02, 4, 5)
    assert (now.threshold, now.seed, now.limit) == (0.03, 0, 6)


def test_a_file_that_says_nothing_any_more_is_still_the_one(extended: Extended) -> None:
    extended.entry.write_text("extends: base.yaml\nlimit: 7\n")
    document = load_config(
        extended.entry, {"limit": 5, "model": "demo", "recipe": "fp8", "seed": 1, "threshold": 0.5}
    ).document()
    assert str(extended.entry) not in {each["from"] for each in document.values()}
    extended.recorded.write_text(yaml.safe_dump(document))
    _, now = load_recorded(extended.recorded, None, {})
    assert now.entry == extended.entry
    assert now.overridden["limit"] == (7, str(extended.entry))


def test_records_from_before_files_extended_each_other_are_read(extended: Extended) -> None:
    document = load_config(extended.base, {}).document()
    del document["config"]
    extended.recorded.write_text(yaml.safe_dump(document))
    then, now = load_recorded(extended.recorded, None, {})
    assert then.entry == now.entry == extended.base
    assert now.threshold == 0.02


def test_a_record_names_its_file_by_a_path(extended: Extended) -> None:
    document = load_config(extended.entry, {}).document()
    document["config"]["value"] = 3
    extended.recorded.write_text(yaml.safe_dump(document))
    with pytest.raises(Failure, match=r"recorded configuration .*config\.value: 3"):
        load_recorded(extended.recorded, None, {})


def test_another_file_may_be_named_on_resuming(extended: Extended) -> None:
    _, now = load_recorded(extended.recorded, extended.base, {})
    assert (now.seed, now.entry) == (3, extended.base)


def test_purposes_survive_resuming(extended: Extended) -> None:
    text = "extends: base.yaml\nsmoke: true\nsmoke_purpose: {calibration.max_length: short}\n"
    extended.entry.write_text(text)
    document = load_config(extended.entry, {}).document()
    extended.recorded.write_text(yaml.safe_dump(document))
    then, now = load_recorded(extended.recorded, None, {})
    assert then.smoke_purpose == now.smoke_purpose == {"calibration.max_length": "short"}


def test_a_release_is_carried_out_as_its_files_say(tmp_path: Path) -> None:
    base, entry = tmp_path / "base.yaml", tmp_path / "entry.yaml"
    base.write_text("model: demo\nrecipe: int8\ndry_run: true\noverlap: never\n")
    entry.write_text(f"extends: base.yaml\nrun_name: nightly\nworkspace: {tmp_path}\n")

    def day0(*arguments: str, exit_code: int) -> str:
        done = CliRunner().invoke(app, [*arguments, "--workspace", str(tmp_path)])
        assert done.exit_code == exit_code, done.output
        return done.stdout

    day0("release", "--config", str(entry), "--overlap", "auto", "--to-step", "ptq", exit_code=130)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("nightly-")
    recorded = yaml.safe_load((run_dir / "config.resolved.yaml").read_text())
    assert recorded["config"] == {"value": str(entry), "from": "command line"}
    assert recorded["recipe"] == {"value": "int8", "from": str(base)}
    base.write_text("model: demo\nrecipe: int8\ndry_run: true\nthreshold: 0.02\n")
    drifted = CliRunner().invoke(app, ["resume", str(run_dir), "--workspace", str(tmp_path)])
    assert (drifted.exit_code, "config.threshold: 0.01 then, 0.02 now" in drifted.output) == (
        2,
        True,
    )
    base.write_text("model: demo\nrecipe: int8\ndry_run: true\noverlap: never\n")
    report = json.loads(day0("resume", str(run_dir), "--json", exit_code=0))
    assert f"overlap is 'auto' by the command line, 'never' in {base}" in report["deviations"]
