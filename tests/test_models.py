import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors_files import write_file

from conductor import models
from conductor.failure import Failure
from conductor.models import resolve_model


def checkpoint(directory: Path, *files: str, config: object = None) -> str:
    directory.mkdir(exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    for name in files:
        (directory / name).write_bytes(b"12345678")
    return str(directory)


def test_a_local_checkpoint_is_found(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "text_config": {"max_position_embeddings": 9}}
    path = checkpoint(tmp_path / "m", config=config)
    write_file(tmp_path / "m" / "model.safetensors", {"w": ("BF16", (2,))})
    model = resolve_model(path)
    assert (model.architecture, model.revision, model.max_positions, model.quantized) == (
        "LlamaForCausalLM",
        None,
        9,
        None,
    )


@pytest.mark.parametrize("architectures", [None, [], [{"a": 1}], "Llama", [7]], ids=repr)
def test_an_architecture_that_is_no_name_is_unknown(tmp_path: Path, architectures: object) -> None:
    path = checkpoint(tmp_path / "m", config={"architectures": architectures})
    write_file(tmp_path / "m" / "model.safetensors", {"w": ("BF16", (2,))})
    assert resolve_model(path).architecture == "unknown"


def test_truncated_weights_are_refused_before_anything_runs(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m", config={})
    weights = tmp_path / "m" / "model.safetensors"
    write_file(weights, {"w": ("BF16", (2,))})
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(Failure, match=r"model\.safetensors") as caught:
        resolve_model(path)
    assert caught.value.failure_class == "USER_CONFIG_ERROR"


def test_the_demo_model_comes_with_the_package() -> None:
    model = resolve_model("demo")
    assert model.architecture == "LlamaForCausalLM"
    assert model.weights_bytes < 8_000_000


@pytest.mark.parametrize(
    ("files", "config", "words"),
    [
        pytest.param([], None, "config.json", id="empty"),
        pytest.param([], {}, "no *.safetensors", id="no-weights"),
        pytest.param(["pytorch_model.bin"], {}, "pickled", id="pickled"),
        pytest.param(["model.safetensors"], [1], "not a mapping", id="config-is-a-list"),
    ],
)
def test_unusable_directories_are_refused(
    tmp_path: Path, files: list[str], config: object, words: str
) -> None:
    with pytest.raises(Failure) as caught:
        resolve_model(checkpoint(tmp_path / "m", *files, config=config))
    assert caught.value.failure_class == "USER_CONFIG_ERROR"
    assert words in caught.value.message


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m", "model.safetensors")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(Failure, match="cannot be read"):
        resolve_model(path)


@pytest.mark.parametrize("name", ["no such model", "./nowhere", "a/b/c", "demoo"])
def test_what_is_no_model_is_refused_with_the_forms(name: str) -> None:
    with pytest.raises(Failure, match="Hugging Face id"):
        resolve_model(name)


def test_an_unreachable_hub_is_the_worlds_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Failure) as caught:
        resolve_model("org/name@main")
    assert caught.value.failure_class == "SYSTEMIC"


COMMIT = "5" * 40


class Hub:
    """A Hub on loopback that answers every request with ``answer``, and its client's cache."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.answer: Callable[[http.server.BaseHTTPRequestHandler], None] = lambda _: None
        self.asked: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path)
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def download(self, *, whole: bool = True, commit: str = COMMIT) -> Path:
        """Leave in the cache what an earlier download left, whole or cut short."""
        directory = self.cache / "models--org--name" / "snapshots" / commit
        directory.mkdir(parents=True)
        references = self.cache / "models--org--name" / "refs"
        references.mkdir(exist_ok=True)
        (references / "main").write_text(commit)
        (directory / "config.json").write_text("{}")
        names = ["model-1.safetensors", "model-2.safetensors"]
        index = {"metadata": {}, "weight_map": dict(zip("ab", names, strict=True))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        for tensor, name in zip("ab" if whole else "a", names, strict=False):
            write_file(directory / name, {tensor: ("BF16", (2,))})
        return directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(found.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield found
    found.server.shutdown()
    found.server.server_close()


def status(code: int) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    return lambda request: request.send_error(code)


def no_such_revision(request: http.server.BaseHTTPRequestHandler) -> None:
    request.send_response(404)
    request.send_header("X-Error-Code", "RevisionNotFound")
    request.send_header("content-length", "0")
    request.end_headers()


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")


@pytest.mark.parametrize("downloaded", [True, False])
@pytest.mark.parametrize("code", [429, 500, 503, 504])
def test_a_hub_that_refuses_for_the_moment_is_asked_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, code: int, downloaded: bool
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client's own attempts
    hub.answer = status(code)
    if downloaded:
        hub.download()
    with pytest.raises(Failure, match=f"HTTP {code}") as caught:
        resolve_model("org/name")
    assert caught.value.failure_class == "INFRA_TRANSIENT"


@pytest.mark.parametrize(
    ("name", "failure_class"),
    [
        ("ReadTimeout", "INFRA_TRANSIENT"),
        ("TimeoutError", "INFRA_TRANSIENT"),
        ("ConnectTimeout", "SYSTEMIC"),
        ("ConnectError", "SYSTEMIC"),
    ],
)
def test_no_answer_in_time_is_for_the_moment_and_no_connection_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, failure_class: str
) -> None:
    import httpx
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    error = TimeoutError("x") if name == "TimeoutError" else getattr(httpx, name)("x")

    def look_up(repository: str, revision: str | None) -> tuple[str, int]:
        raise error

    monkeypatch.setattr(models, "_look_up", look_up)
    with pytest.raises(Failure, match=name) as caught:
        resolve_model("org/name")
    assert caught.value.failure_class == failure_class


@pytest.mark.parametrize(
    ("requested", "revision"),
    [("org/name", None), ("org/name@main", None), ("org/name", COMMIT), ("org/name@main", COMMIT)],
)
def test_an_unreachable_hub_is_not_needed_for_a_whole_download(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, requested: str, revision: str | None
) -> None:
    path = hub.download()
    unreachable(monkeypatch)
    model = resolve_model(requested, revision)
    assert (model.path, model.revision) == (path, COMMIT)
    assert model.remark is not None
    assert COMMIT in model.remark


@pytest.mark.parametrize(
    ("whole", "requested"),
    [(False, "org/name"), (True, "org/name@v2"), (True, f"org/name@{'6' * 40}")],
)
def test_half_a_download_or_another_commit_does_not_do(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, whole: bool, requested: str
) -> None:
    hub.download(whole=whole)
    unreachable(monkeypatch)
    with pytest.raises(Failure, match="not downloaded whole") as caught:
        resolve_model(requested)
    assert caught.value.failure_class == "SYSTEMIC"


def test_the_recorded_commit_is_asked_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.answer = no_such_revision
    with pytest.raises(Failure) as caught:
        resolve_model("org/name@main", COMMIT)
    assert caught.value.failure_class == "USER_CONFIG_ERROR"
    assert any(COMMIT in path for path in hub.asked)


def test_a_hub_that_is_lost_in_a_download_is_asked_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(models, "_look_up", lambda *_: (COMMIT, 0))
    unreachable(monkeypatch)
    with pytest.raises(Failure, match="failed while") as caught:
        resolve_model("org/name")
    assert caught.value.failure_class == "INFRA_TRANSIENT"


def test_a_found_model_has_no_remark(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.download()
    monkeypatch.setattr(models, "_look_up", lambda *_: (COMMIT, 10))
    monkeypatch.setattr(models, "_fetch", lambda *_: path)
    model = resolve_model("org/name")
    assert (model.revision, model.remark) == (COMMIT, None)
