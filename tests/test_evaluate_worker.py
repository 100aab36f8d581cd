"""What the evaluation's worker adds to lm-eval: answers that are kept, refusals, signs of life."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conductor.demo import __file__ as demo_file
from conductor.environments.builder import Environments
from conductor.executors.environ import on_path, worker_environ
from conductor.executors.local import WORKERS
from conductor.harnesses.lm_eval import HARNESS_ENVIRON
from conductor.probes.machine import probe_machine

DEMO = Path(demo_file).parent


@pytest.fixture
def cache_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The worker's module, imported as the worker imports it."""
    monkeypatch.syspath_prepend(str(WORKERS))
    import request_cache

    return request_cache


def key_of(kind: str, args: Iterable[Any]) -> str | None:
    text = json.dumps([kind, *args])
    return None if "unkept" in text else hashlib.sha256(text.encode()).hexdigest()


class Model:
    """Answers in batches of two, in the order of the questions' lengths, as lm-eval's models do."""

    def __init__(self, answer: Any, dies_after: int | None = None) -> None:
        self.answer = answer
        self.dies_after = dies_after
        self.asked: list[str] = []
        self.batches: list[list[str]] = []

    def set_cache_hook(self, hook: Any) -> None:
        self.hook = hook

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n].args[0]))
        answers: list[Any] = [None] * len(requests)
        for first in range(0, len(order), 2):
            self.hook.flush()
            batch = order[first : first + 2]
            self.batches.append([requests[n].args[0] for n in batch])
            for number in batch:
                if self.dies_after == len(self.asked):
                    raise KeyboardInterrupt
                (question,) = requests[number].args
                self.asked.append(question)
                answers[number] = self.answer(question, len(self.asked))
                self.hook.add_partial("generate_until", (question,), answers[number])
        return answers

    loglikelihood = generate_until

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        self.hook.add_partial("loglikelihood", None, (0.5, True))  # a window of a text
        return [float(len(request.args[0])) for request in requests]


def ask(
    module: Any,
    directory: Path,
    questions: Sequence[str],
    answer: Callable[[str, int], Any] = lambda question, number: question.upper(),
    *,
    kind: str = "generate_until",
    made_for: Any = None,
    by_batch: bool = True,
    dies_after: int | None = None,
) -> tuple[list[Any] | None, Model, Any]:
    class Fresh(Model):
        """A class of its own, since the cache stands before the methods of a class."""

    cache = module.RequestCache(directory, {"model": made_for}, key_of, by_batch=by_batch)
    cache.remember(Fresh)
    model = Fresh(answer, dies_after)
    try:
        requests = [SimpleNamespace(args=(question,)) for question in questions]
        return getattr(model, kind)(requests), model, cache
    except KeyboardInterrupt:
        return None, model, cache


QUESTIONS = ["aaaaaaa", "b", "cccccc", "b", "eeeee", "ffff", "b"]


@pytest.mark.parametrize("dies_after", range(7))
def test_what_is_left_is_asked_in_the_batches_it_would_have_been_in(
    cache_module: Any, tmp_path: Path, dies_after: int
) -> None:
    whole, through, _ = ask(cache_module, tmp_path / "whole", QUESTIONS)
    ask(cache_module, tmp_path / "cut", QUESTIONS, dies_after=dies_after)
    answers, rest, cache = ask(cache_module, tmp_path / "cut", QUESTIONS)
    done = dies_after // 2
    assert answers == whole == [question.upper() for question in QUESTIONS]
    assert rest.batches == through.batches[done:]
    assert cache.taken == 2 * done
    again, nobody, _ = ask(cache_module, tmp_path / "cut", QUESTIONS)
    assert again == whole
    assert nobody.asked == []


def test_an_endpoint_loses_no_answer(cache_module: Any, tmp_path: Path) -> None:
    ask(cache_module, tmp_path, QUESTIONS, by_batch=False, dies_after=3)
    _, rest, _ = ask(cache_module, tmp_path, QUESTIONS, by_batch=False)
    assert len(rest.asked) == len(QUESTIONS) - 3


def test_a_question_asked_again_keeps_its_own_answers(cache_module: Any, tmp_path: Path) -> None:
    def drawn(question: str, number: int) -> str:
        return f"{question} {number}"

    first, _, _ = ask(cache_module, tmp_path, ["b", "b", "b"], drawn)
    again, _, _ = ask(cache_module, tmp_path, ["b", "b", "b", "b"], drawn)
    assert first == ["b 1", "b 2", "b 3"]
    assert again == [*first, "b 1"]


def test_reasons_for_ending_survive(cache_module: Any, tmp_path: Path) -> None:
    def answer(question: str, number: int) -> str:
        return cache_module.Answer.of(question, "length") if "a" in question else question

    for _ in range(2):
        answers, _, _ = ask(cache_module, tmp_path, ["a 😀 \ud800", "b"], answer)
        assert answers == ["a 😀 \ud800", "b"]
        assert [getattr(each, "finish_reason", None) for each in answers] == ["length", None]


@pytest.mark.parametrize(
    "value", [(-0.1 - 0.2, True), (-math.inf, False), (0, True), -1e-300, -12.5], ids=repr
)
def test_likelihoods_come_back_to_the_last_bit(
    cache_module: Any, tmp_path: Path, value: Any
) -> None:
    for _ in range(2):
        answers, _, _ = ask(cache_module, tmp_path, ["b"], lambda *_: value, kind="loglikelihood")
        assert answers == [value]
        assert type(answers[0]) is type(value)


def test_what_a_model_does_not_report_is_kept_in_the_end(cache_module: Any, tmp_path: Path) -> None:
    for taken in (0, 2):
        answers, _, cache = ask(cache_module, tmp_path, ["a", "bb"], kind="loglikelihood_rolling")
        assert (answers, cache.taken) == ([1.0, 2.0], taken)


def test_what_cannot_be_kept_is_asked_again(cache_module: Any, tmp_path: Path) -> None:
    for _ in range(2):
        answers, model, _ = ask(cache_module, tmp_path, ["unkept", "b"])
        assert answers == ["UNKEPT", "B"]
        assert "unkept" in model.asked


def test_other_settings_start_over(cache_module: Any, tmp_path: Path) -> None:
    ask(cache_module, tmp_path, QUESTIONS, made_for="source")
    _, model, cache = ask(cache_module, tmp_path, QUESTIONS, made_for="candidate")
    assert cache.taken == 0
    assert len(model.asked) == len(QUESTIONS)
    _, _, cache = ask(cache_module, tmp_path, QUESTIONS, made_for="candidate")
    assert cache.taken == len(QUESTIONS)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], int]] = {
    "last line torn": (lambda content: content[:-9], 2),
    "last line without its end": (lambda content: content[:-1], 2),
    "zeros at the end": (lambda content: content + bytes(999), 3),
    "a line in the middle": (lambda c: c.replace(b"\n[[", b"\n!!", 1), 2),
    "a line of another form": (lambda c: c + b'{"a": 1}\n[1]\n7\n', 3),
    "head gone": (lambda content: content.split(b"\n", 1)[1], 0),
    "empty": (lambda content: b"", 0),
    "no text": (lambda content: b"\x80" * 99, 0),
}


@pytest.mark.parametrize(("damage", "kept"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_costs_what_it_hit(
    cache_module: Any, tmp_path: Path, damage: Callable[[bytes], bytes], kept: int
) -> None:
    whole, _, _ = ask(cache_module, tmp_path, ["a", "bb", "ccc"], by_batch=False)
    path = tmp_path / "answers.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    for expected in (kept, 3):
        answers, _, cache = ask(cache_module, tmp_path, ["a", "bb", "ccc"], by_batch=False)
        assert (answers, cache.taken) == (whole, expected)


def in_worker(script: str, stage_dir: Path, **environ: str) -> subprocess.Popen[bytes]:
    """Start a script in the place of a worker, with the worker's modules beside it."""
    stage_dir.mkdir(exist_ok=True)
    code = f"import sys; sys.path.insert(0, {str(WORKERS)!r})\n" + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=stage_dir, env={**os.environ, **environ}
    )


@pytest.mark.parametrize(
    ("doing", "shows"),
    [
        pytest.param("while True: sum(range(10**5)); time.sleep(0.01)", True, id="computes"),
        pytest.param("while True: f.write(bytes(9999)); time.sleep(0.05)", True, id="downloads"),
        pytest.param("time.sleep(60)", False, id="sleeps"),
        pytest.param("a, b = socket.socketpair(); a.recv(1)", False, id="waits for a server"),
    ],
)
def test_a_pulse_shows_work_and_nothing_else(tmp_path: Path, doing: str, shows: bool) -> None:
    process = in_worker(
        f"""
        import socket, time, pulse
        from pathlib import Path
        pulse.PULSE_S = 0.2
        reports = []
        def progress(done, total, doing):
            reports.append(doing)
            Path("reports").write_text("\\n".join(reports))
        pulse.Pulse(progress)(0, 0, "loading")
        f = open("downloaded", "wb", buffering=0)
        {doing}
        """,
        tmp_path,
    )
    try:
        reports = tmp_path / "reports"
        end = time.monotonic() + (20 if shows else 2)
        while time.monotonic() < end:
            lines = reports.read_text().splitlines() if reports.exists() else []
            if shows and len(lines) > 2:
                break
            time.sleep(0.05)
        assert lines[0] == "loading"
        # Starting up is work as well; it shows in one report at most.
        assert len(lines) > 2 if shows else len(lines) <= 2
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def request(directory: Path, cache: Path | None, **more: Any) -> dict[str, Any]:
    return {
        "tasks": {"demo_addition": 0, "demo_compare": 0},
        "sizes": {"demo_addition": 1000, "demo_compare": 1000},
        "questions": None,
        "repeat": 0,
        "include_path": str(DEMO / "suite"),
        "apply_chat_template": False,
        "generation": None,
        "seed": 0,
        "limit": 100,
        "concurrency": 4,
        "timeout_s": 60,
        "max_length": 255,
        "output_dir": str(directory / "results"),
        "request_cache": str(cache) if cache else None,
        "tokenizer": str(DEMO / "model"),
        **more,
    }


IN_PROCESS = {
    "backend": "in_process",
    "model_path": str(DEMO / "model"),
    "dtype": "auto",
    "device": "cpu",
    "batch_size": 32,
}


def start_evaluation(document: dict[str, Any], directory: Path) -> subprocess.Popen[bytes]:
    directory.mkdir(exist_ok=True)
    (directory / "request.json").write_text(json.dumps(document))
    environment = "reference" if document["backend"] == "in_process" else "evaluate"
    interpreter = Environments(device=probe_machine().device).interpreter(environment)
    environ = {
        **worker_environ(os.environ, offline=True),
        **HARNESS_ENVIRON,
        "HF_DATASETS_CACHE": str(directory / "datasets"),
    }
    with (directory / "stdout.log").open("ab") as log:
        return subprocess.Popen(
            [str(interpreter), str(WORKERS / "evaluate.py"), str(directory)],
            env=on_path(environ, interpreter),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def finish(process: subprocess.Popen[bytes], directory: Path) -> dict[str, Any]:
    assert process.wait(300) == 0, (directory / "stdout.log").read_text()[-2000:]
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return result


def written(directory: Path) -> dict[str, Any]:
    """Return the samples byte by byte, and the results without what tells runs apart."""
    files = {
        path.name.rsplit("_", 1)[0]: path.read_bytes()
        for path in (directory / "results").rglob("samples_*.jsonl")
    }
    files["lengths"] = (directory / "results/completion_tokens.json").read_bytes()
    (results,) = (directory / "results").rglob("results_*.json")
    return {**files, "results": json.loads(results.read_text())["results"]}


@pytest.mark.tools
def test_an_evaluation_in_process_that_was_killed_comes_out_the_same(tmp_path: Path) -> None:
    whole, cut, cache = tmp_path / "whole", tmp_path / "cut", tmp_path / "cache"
    result = finish(start_evaluation(request(whole, None, **IN_PROCESS), whole), whole)
    assert result["answers_kept"] == 0
    process = start_evaluation(request(cut, cache, **IN_PROCESS), cut)
    answers = cache / "answers.jsonl"
    while not answers.exists() or answers.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, (cut / "stdout.log").read_text()[-2000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = finish(start_evaluation(request(cut, cache, **IN_PROCESS), cut), cut)
    assert 3 * 32 <= result["answers_kept"] < 300
    assert written(cut) == written(whole)


REFUSING = """
    import http.server, os, sys, time
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            if sys.argv[1] == "silence":
                time.sleep(60)
            if sys.argv[1] == "death":
                os._exit(1)
            self.send_error(int(sys.argv[1]))
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    print(server.server_port, flush=True)
    server.serve_forever()
"""


@pytest.mark.tools
@pytest.mark.parametrize(
    ("answer", "concurrency", "words"),
    [
        ("429", 4, "HTTP 429"),
        ("503", 1, "HTTP 503"),
        ("silence", 4, "without an answer for 1 s"),
        ("death", 4, "took no request"),
        ("death", 1, "took no request"),
    ],
)
def test_refusals_say_what_was_refused(
    tmp_path: Path, answer: str, concurrency: int, words: str
) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(REFUSING), answer], stdout=subprocess.PIPE
    )
    try:
        assert server.stdout
        port = int(server.stdout.readline())
        document = request(
            tmp_path,
            tmp_path / "cache",
            backend="endpoint",
            base_url=f"http://127.0.0.1:{port}/v1",
            served_name="m",
            device=None,
            batch_size=1,
        )
        result = finish(
            start_evaluation(
                {**document, "limit": 2, "concurrency": concurrency, "timeout_s": 1}, tmp_path
            ),
            tmp_path,
        )
    finally:
        server.kill()
        server.wait()
    assert (result["status"], result["failure_class"]) == ("failed", "INFRA_TRANSIENT")
    assert words in result["message"]
