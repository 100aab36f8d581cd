"""Secrets are known by where they come from, and gone from whatever is written."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_documents import example

from conductor import files, redaction
from conductor.config import load_config
from conductor.executors.local import SupervisedProcess, Worker, kept_result, run_worker
from conductor.failure import Failure
from conductor.redaction import REDACTED, Secrets, names_secret
from conductor.report import write_report
from conductor.tracking import log_release
from gates import FailureClass

SECRET = "pl4nted/s3cr+t é\"q'"
"""A value that every encoding writes otherwise."""
HUB_TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT"
HERE = str(Path(__file__).parents[1])[1:]
"""A part of the path that everything of ours begins with."""
NOWHERE = {"HOME": "/nonexistent"}
"""Variables without anybody's login."""


def knowing(*argv: str, **environ: str) -> Secrets:
    secrets = Secrets()
    secrets.know({**NOWHERE, **environ}, argv)
    return secrets


@pytest.fixture
def planted() -> Iterator[None]:
    """Let this process know ``SECRET`` for one test."""
    before = redaction._OURS._forms
    redaction.know({**NOWHERE, "PLANTED_TOKEN": SECRET})
    yield
    redaction._OURS._forms = before


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("HUGGING_FACE_HUB_TOKEN", True),
        ("OPENAI_API_KEY", True),
        ("MYAPIKEY", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("PGPASSWORD", True),
        ("db_passwd", True),
        ("GOOGLE_CREDENTIALS", True),
        ("NPM_AUTH", True),
        ("API_KEYS", True),
        ("DB_PASSWORDS", True),
        ("db_pwd", True),
        ("GITHUB_PAT", True),
        ("--api-key", True),
        ("--hf-token", True),
        ("X-Amz-Signature", True),
        ("MAX_TOKENS", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("KEYBOARD", False),
        ("MONKEY", False),
        ("AUTHOR", False),
        ("OLDPWD", False),
        ("CUDA_PATCH", False),
        ("HF_TOKEN_PATH", False),
        ("--token-file", False),
        ("PATH", False),
        ("", False),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert names_secret(name) is secret


@pytest.mark.parametrize(
    ("environ", "argv", "text", "shown"),
    [
        pytest.param({"A_TOKEN": "abcdefgh"}, [], "x abcdefgh y", f"x {REDACTED} y", id="variable"),
        pytest.param({"A_TOKEN": " abcdefgh\n"}, [], "<abcdefgh>", f"<{REDACTED}>", id="blanks"),
        pytest.param({"A_NAME": "abcdefgh"}, [], "abcdefgh", "abcdefgh", id="other-variable"),
        pytest.param({"A_TOKEN": "abcdefg"}, [], "abcdefg", "abcdefg", id="too-short"),
        pytest.param({"A_KEY": "12345678.5"}, [], "12345678.5", "12345678.5", id="number"),
        pytest.param({"A_KEY": "/usr/bin"}, [], "in /usr/bin", "in /usr/bin", id="path"),
        pytest.param(
            {"A_KEY": "CHANGELOG.rst"}, [], "CHANGELOG.rst", REDACTED, id="name-of-a-file"
        ),
        pytest.param(
            {"A_TOKEN": "candidate", "B_URL": "http://u:baseline_eval@h"},
            [],
            "candidate, baseline_eval",
            "candidate, baseline_eval",
            id="words-of-ours",
        ),
        pytest.param({"AUTH_USER": HERE}, [], f"at {HERE}", f"at {HERE}", id="where-it-runs"),
        pytest.param(
            {"A_KEY": "/usr/no-such"}, [], "/usr/no-such", REDACTED, id="path-that-is-none"
        ),
        pytest.param(
            {"A_KEY": "-----BEGIN-----\nMIIEvQIBADANBg\n"},
            [],
            "line\nMIIEvQIBADANBg",
            f"line\n{REDACTED}",
            id="a-line-of-it",
        ),
        pytest.param(
            {"A_KEY": "abcdefgh", "B_KEY": "abcdefghijkl"},
            [],
            "abcdefghijkl",
            REDACTED,
            id="longest-first",
        ),
        pytest.param(
            {}, ["serve", "--api-key", "abcdefgh"], "abcdefgh", REDACTED, id="after-an-option"
        ),
        pytest.param({}, ["--api-key=abcdefgh"], "abcdefgh", REDACTED, id="in-an-option"),
        pytest.param({}, ["--max-tokens", "abcdefgh"], "abcdefgh", "abcdefgh", id="other-option"),
        pytest.param(
            {}, ["--api-key", "--verbose-x"], "--verbose-x", "--verbose-x", id="next-option"
        ),
        pytest.param({}, ["--api-key"], "--api-key", "--api-key", id="option-without-a-value"),
        pytest.param(
            {"https_proxy": "http://alice:p%40ssw0rd@proxy:80"},
            [],
            "p@ssw0rd or p%40ssw0rd, /home/alice",
            f"{REDACTED} or {REDACTED}, /home/alice",
            id="password-in-a-proxy",
        ),
        pytest.param(
            {"SOME_URL": "see https://s3cr3t-token@host/x now"},
            [],
            "s3cr3t-token",
            REDACTED,
            id="name-alone-in-a-url",
        ),
        pytest.param(
            {"SOME_URL": "https://host/x?token=abcdefgh"},
            [],
            "abcdefgh",
            REDACTED,
            id="query-of-a-url",
        ),
        pytest.param(
            {"MLFLOW_TRACKING_URI": "alice:abcd/efgh@host"},
            [],
            "abcd/efgh",
            REDACTED,
            id="tracking-uri-without-a-scheme",
        ),
        pytest.param({"SOME": "https://h/a@b/cdefghi"}, [], "h/a@b", "h/a@b", id="at-in-a-path"),
    ],
)
def test_what_is_known(environ: Mapping[str, str], argv: list[str], text: str, shown: str) -> None:
    assert knowing(*argv, **environ).redact_known(text) == shown


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({"HF_TOKEN_PATH": "{}/mine"}, id="by-path"),
        pytest.param({"HF_HOME": "{}"}, id="under-its-home"),
        pytest.param({"XDG_CACHE_HOME": "{}/.."}, id="under-the-cache"),
        pytest.param({"HOME": "{}/home"}, id="under-the-users-home"),
    ],
)
def test_the_stored_token_of_the_hub_is_known(environ: dict[str, str], tmp_path: Path) -> None:
    hub = tmp_path / "huggingface"
    places = [hub / "mine", hub / "token", hub / "home" / ".cache" / "huggingface" / "token"]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("stored-secret\n")
    named = {name: value.format(hub) for name, value in environ.items()}
    assert knowing(**named).redact_known("stored-secret") == REDACTED


@pytest.mark.parametrize(
    "encode",
    [
        pytest.param(str, id="plain"),
        pytest.param(quote, id="quoted"),
        pytest.param(lambda text: quote(text, safe=""), id="quoted-whole"),
        pytest.param(json.dumps, id="json"),
        pytest.param(lambda text: json.dumps(text, ensure_ascii=False), id="json-unescaped"),
        pytest.param(repr, id="python"),
        pytest.param(lambda text: base64.b64encode(text.encode()).decode(), id="base64"),
    ],
)
def test_a_value_is_hidden_however_it_is_encoded(encode: Any) -> None:
    written = encode(SECRET)
    shown = knowing(A_PASSWORD=SECRET).redact_known(f"[{written}]")
    assert REDACTED in shown
    assert written.strip("\"'=") not in shown


def test_basic_authentication_of_a_url_is_hidden() -> None:
    header = base64.b64encode(b"alice:p@ssword").decode()
    secrets = knowing(http_proxy="http://alice:p%40ssword@proxy")
    assert secrets.redact_known(f"sent {header}") == f"sent {REDACTED}="


@pytest.mark.parametrize("user", ["", "u", "us", "use", "user"])
def test_a_password_is_hidden_in_the_base64_of_whatever_it_stands_in(user: str) -> None:
    header = base64.b64encode(f"{user}:p4ssword-é&more".encode()).decode()
    shown = knowing(A_PASSWORD="p4ssword-é").redact_known(f"denied Basic {header}")
    hidden, told = shown.removeprefix("denied Basic ").split(REDACTED)
    assert len(hidden) + len(told) < len(header) - 12


LOOKS_LIKE_A_SECRET = [
    pytest.param(f"at {HUB_TOKEN}.", f"at {REDACTED}.", id="hub-token"),
    pytest.param("sk-proj-0123456789abcdef", REDACTED, id="api-key"),
    pytest.param("http://u:p@ss@host/x", f"http://{REDACTED}@host/x", id="user-information"),
    pytest.param("Bearer abc.d3f-gh", f"Bearer {REDACTED}", id="bearer"),
    pytest.param(
        "{'Authorization': 'Basic YTpi'}", f"{{'Authorization': 'Basic {REDACTED}'}}", id="header"
    ),
    pytest.param(
        "https://s3/x?X-Amz-Signature=ab12&part=7",
        f"https://s3/x?X-Amz-Signature={REDACTED}&part=7",
        id="signed-url",
    ),
    pytest.param("?a=1&amp;key=abc#d", f"?a=1&amp;key={REDACTED}#d", id="query-in-html"),
    pytest.param("run --api-key abcdefgh x", f"run --api-key {REDACTED} x", id="option"),
    pytest.param("['--hf-token', 'abcdefgh']", f"['--hf-token', '{REDACTED}']", id="command"),
    pytest.param("--vllm-api-key=abcdefgh", f"--vllm-api-key={REDACTED}", id="option-with-equals"),
]


@pytest.mark.parametrize(("text", "shown"), LOOKS_LIKE_A_SECRET)
def test_what_looks_like_a_secret_is_hidden(text: str, shown: str) -> None:
    assert Secrets().redact(text) == shown
    assert Secrets().redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "hf_quant_config.json",
        "hf_transfer",
        "risk-averse-people-of-1990s",
        "sk-learn-extension",
        "a bearer of instruments",
        "Is it up? Ask at 10:30, me@home.",
        "models:/name@alias",
        "http://host:5000/x and a@b",
        "--tokenizer some/where/else",
        "--max-num-batched-tokens 8192000000",
        "--api-key --seed",
        "task?monkeys=1",
        "Authorization failed for everybody",
        '{"token": "0123456789abcdef"}',
    ],
)
def test_plain_words_stay(text: str) -> None:
    assert Secrets().redact(text) == text


@pytest.mark.parametrize(
    ("document", "redacted"),
    [
        pytest.param({"a": {"b": [HUB_TOKEN]}}, {"a": {"b": [REDACTED]}}, id="nested"),
        pytest.param({HUB_TOKEN: 1}, {REDACTED: 1}, id="name"),
        pytest.param(
            ["vllm", "--api-key", "abcdefgh"], ["vllm", "--api-key", REDACTED], id="command"
        ),
        pytest.param(("--token", "abcdefgh"), ("--token", REDACTED), id="tuple"),
        pytest.param(["--token", 7, "abcdefgh"], ["--token", 7, "abcdefgh"], id="not-the-next"),
        pytest.param(["--api-key", "/usr/bin"], ["--api-key", "/usr/bin"], id="path"),
        pytest.param([None, True, 1, 2.5, "x"], [None, True, 1, 2.5, "x"], id="scalars"),
    ],
)
def test_documents_are_redacted_value_by_value(document: Any, redacted: Any) -> None:
    assert Secrets().redact_document(document) == redacted
    assert Secrets().redact_document(redacted) == redacted


SECRETS = knowing(A_TOKEN=SECRET, B_KEY="REDACTED", C_KEY="]abcdef[", URL="http://a:bcdefghi@h")
PIECES = st.sampled_from(
    [
        *(SECRET, "abcdefgh", "REDACTED", "]abcdef[", "http://a:bcdefghi@h", "://", "@", "hf_"),
        *(HUB_TOKEN, "Bearer ", "a1", "?key=", " ", "--token=", "--token ", '"', "x", REDACTED),
    ]
)


@given(st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join))
def test_redacting_again_changes_nothing_and_no_secret_is_left(text: str) -> None:
    once = SECRETS.redact(text)
    assert SECRETS.redact(once) == once
    assert SECRET not in once


@pytest.mark.parametrize("unit", ["x", "-", "sk-", "://", "?", "&a", "--a", "bearer ", "a.b+", "@"])
def test_no_text_takes_long(unit: str) -> None:
    """A pattern that begins at every letter, and goes on to the end, takes hours for these."""
    text = unit * (500_000 // len(unit))
    started = time.monotonic()
    secrets = knowing(f"--token={text}", A_TOKEN=text, B_URL=text, C_PROXY=text)
    secrets.redact(text + "\n" + text[1:])
    secrets.begun(text[:-1])
    assert time.monotonic() - started < 5


def test_a_value_that_is_no_utf_8_is_hidden(tmp_path: Path) -> None:
    secret = os.fsdecode(b"\xff-pl4nted-\xfe")
    assert (
        knowing(A_TOKEN=secret, B_URL=f"http://{secret}@h").redact(f"<{secret}>") == "<[REDACTED]>"
    )
    log = printed(tmp_path, "say(b'[', secret, b']')", A_TOKEN=secret)
    assert log == b"[[REDACTED]]"


def test_redaction_is_fast() -> None:
    """50 MB take about 3 s here; a pattern that looks back from every letter takes minutes."""
    line = '{"text": "the bearer of news? a&b; https://host/x/y sk- hf_ -- 10:30", "n": [1, 2]}\n'
    text = line * (5_000_000 // len(line))
    secrets = knowing(**{f"NAME{number}_TOKEN": f"value-{number}-é" for number in range(10)})
    started = time.monotonic()
    assert secrets.redact(text) == text
    assert time.monotonic() - started < 2


class TestFiles:
    def test_what_is_written_holds_no_secret(self, tmp_path: Path, planted: None) -> None:
        files.write_text(tmp_path / "text", f"a {SECRET} b")
        files.write_json(tmp_path / "json", {"a": [SECRET, HUB_TOKEN], "ok": True})
        assert (tmp_path / "text").read_text() == f"a {REDACTED} b"
        assert files.read_json(tmp_path / "json") == {"a": [REDACTED, REDACTED], "ok": True}

    def test_a_document_stays_json_where_a_secret_is_made_of_json(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redaction._OURS, "_forms", ('"ok": true',))
        document = {"ok": True, "said": 'it is "ok": true'}
        files.write_json(tmp_path / "json", document)
        assert files.read_json(tmp_path / "json") == {"ok": True, "said": f"it is {REDACTED}"}

    def test_files_of_tools_are_redacted_but_for_logs(self, tmp_path: Path, planted: None) -> None:
        (tmp_path / "deep").mkdir()
        written = {
            "deep/results.json": json.dumps({"token": SECRET}).encode(),
            "binary": b"\0\xff" + SECRET.encode() + b"\xfe",
            "looks": HUB_TOKEN.encode(),
            "server.log": SECRET.encode(),
        }
        for name, content in written.items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "link").symlink_to("nowhere")
        changed = files.redact_files(tmp_path)
        assert sorted(changed) == [tmp_path / "binary", tmp_path / "deep/results.json"]
        assert (tmp_path / "binary").read_bytes() == b"\0\xff[REDACTED]\xfe"
        assert files.read_json(tmp_path / "deep/results.json") == {"token": REDACTED}
        for name in ("looks", "server.log"):
            assert (tmp_path / name).read_bytes() == written[name]
        assert files.redact_files(tmp_path) == []

    def test_names_are_redacted_too(self, tmp_path: Path, planted: None) -> None:
        quoted = quote(SECRET, safe="")
        (tmp_path / quoted / "deep").mkdir(parents=True)
        (tmp_path / quoted / "deep" / f"{quoted}.json").write_text(SECRET)
        shown = tmp_path / REDACTED / "deep" / f"{REDACTED}.json"
        assert files.redact_files(tmp_path) == [shown]
        assert shown.read_text() == REDACTED

    def test_a_secret_across_two_pieces_is_found(
        self, tmp_path: Path, planted: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "_CHUNK_BYTES", 7)
        (tmp_path / "x").write_text("0123" + SECRET)
        assert files.redact_files(tmp_path) == [tmp_path / "x"]


def test_a_failure_repeats_no_secret(planted: None) -> None:
    failure = Failure(FailureClass.SYSTEMIC, f"no answer from http://a:b@host with {SECRET}")
    assert failure.message == f"no answer from http://{REDACTED}@host with {REDACTED}"
    assert str(failure) == failure.message


PRINTING = """
import os, sys, time
out = sys.stdout.buffer
def say(*parts, pause=0.0):
    for part in parts:
        out.write(part)
        out.flush()
        time.sleep(pause)
secret = os.environb[b"A_TOKEN"]
"""


def printed(tmp_path: Path, body: str, **environ: str) -> bytes:
    """Return what the log holds of a program after it has ended."""
    log = tmp_path / "log"
    with SupervisedProcess(
        [sys.executable, "-c", PRINTING + body],
        environ={**os.environ, "A_TOKEN": SECRET, **environ},
        log=log,
        grace_s=1.0,
    ) as process:
        while process.poll() is None:
            time.sleep(0.02)
    return log.read_bytes()


class TestLogs:
    @pytest.mark.parametrize(
        ("body", "log"),
        [
            pytest.param("say(b'a ' + secret + b' b\\n')", b"a [REDACTED] b\n", id="in-a-line"),
            pytest.param("say(b'a ', secret[:5], secret[5:])", b"a [REDACTED]", id="at-the-end"),
            pytest.param(
                "say(secret[:9], secret[9:17], secret[17:] + b'.\\n', pause=1.2)",
                b"[REDACTED].\n",
                id="slowly",
            ),
            pytest.param(
                "print(secret.decode(), file=sys.stderr)", b"[REDACTED]\n", id="on-standard-error"
            ),
            pytest.param(
                "say(b'\\xff\\xc3' + secret + b'\\x00\\xa9\\r\\n')",
                b"\xff\xc3[REDACTED]\x00\xa9\r\n",
                id="bytes-that-are-no-utf-8",
            ),
            pytest.param(
                "import subprocess; subprocess.run([sys.executable, '-c', "
                "'import os; print(os.environ[\"A_TOKEN\"])'])",
                b"[REDACTED]\n",
                id="of-a-grandchild",
            ),
            pytest.param(
                "say(b'x' * 3_000_000 + secret + b'y' * 3_000_000)",
                b"x" * 3_000_000 + b"[REDACTED]" + b"y" * 3_000_000,
                id="in-a-line-of-megabytes",
            ),
            pytest.param("say(b''); os._exit(3)", b"", id="nothing"),
        ],
    )
    def test_hold_what_was_printed_without_secrets(
        self, tmp_path: Path, body: str, log: bytes
    ) -> None:
        assert printed(tmp_path, body) == log

    def test_hold_a_line_before_it_is_ended(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        body = "say(b'10%\\r', b'20%', secret[:6]); time.sleep(600)"
        with SupervisedProcess(
            [sys.executable, "-c", PRINTING + body],
            environ={**os.environ, "A_TOKEN": SECRET},
            log=log,
            grace_s=1.0,
        ):
            deadline = time.monotonic() + 10
            while not log.read_bytes().endswith(b"20%") and time.monotonic() < deadline:
                time.sleep(0.02)
            assert log.read_bytes() == b"10%\r20%"
            began = time.process_time()
            time.sleep(0.5)
            assert time.process_time() - began < 0.4
            assert log.read_bytes() == b"10%\r20%", "the beginning of a secret is held back"
        assert log.read_bytes() == b"10%\r20%" + SECRET[:6].encode()

    def test_are_whole_when_much_is_printed_at_the_end(self, tmp_path: Path) -> None:
        log = printed(tmp_path, "out.write(b'line\\n' * 400_000); out.flush(); os._exit(0)")
        assert log == b"line\n" * 400_000

    def test_hold_what_is_printed_while_the_family_is_ended(self, tmp_path: Path) -> None:
        body = (
            "import signal\n"
            "def end(*_): say(b'ending ' + b'.' * 300_000 + secret + b'\\n'); os._exit(0)\n"
            "signal.signal(signal.SIGTERM, end); say(b'ready\\n'); time.sleep(600)"
        )
        log = tmp_path / "log"
        process = SupervisedProcess(
            [sys.executable, "-c", PRINTING + body],
            environ={**os.environ, "A_TOKEN": SECRET},
            log=log,
            grace_s=5.0,
        )
        deadline = time.monotonic() + 10
        while log.read_bytes() != b"ready\n" and time.monotonic() < deadline:
            time.sleep(0.02)
        process.stop()
        assert log.read_bytes() == b"ready\nending " + b"." * 300_000 + b"[REDACTED]\n"

    def test_that_take_nothing_more_keep_nobody_waiting(self, tmp_path: Path) -> None:
        with SupervisedProcess(
            [sys.executable, "-c", PRINTING + "say(b'x' * 1_000_000); sys.exit(4)"],
            environ={**os.environ, "A_TOKEN": SECRET},
            log=Path("/dev/full"),
            grace_s=1.0,
        ) as process:
            deadline = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert process.poll() == 4

    def test_are_whole_though_the_supervisor_was_stopped_meanwhile(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        body = "say(b'ready\\n'); time.sleep(0.3); say(b'x' * 200_000, secret)"
        with SupervisedProcess(
            [sys.executable, "-c", PRINTING + body],
            environ={**os.environ, "A_TOKEN": SECRET},
            log=log,
            grace_s=1.0,
        ) as process:
            deadline = time.monotonic() + 20
            while log.read_bytes() != b"ready\n" and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(1)
            assert log.read_bytes() == b"ready\n"
            os.kill(process.pid, signal.SIGCONT)
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        assert log.read_bytes() == b"ready\n" + b"x" * 200_000 + b"[REDACTED]"

    def test_are_no_reason_to_outlive_a_supervisor_that_was_killed(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        with SupervisedProcess(
            [sys.executable, "-c", PRINTING + "while True: say(b'on and on\\n')"],
            environ={**os.environ, "A_TOKEN": SECRET},
            log=log,
            grace_s=1.0,
        ) as process:
            deadline = time.monotonic() + 20
            while not log.read_bytes() and time.monotonic() < deadline:
                time.sleep(0.02)
            (child,) = psutil.Process(process.pid).children()
            os.kill(process.pid, signal.SIGKILL)
            # Nobody looks after the process here: its output has nowhere to go, and so it ends.
            _, alive = psutil.wait_procs([child], timeout=5)
            assert alive == []

    def test_a_secret_of_the_command_line_alone_is_hidden(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        with SupervisedProcess(
            ["/bin/echo", "--api-key", "of-the-command-line"], environ={}, log=log
        ) as process:
            while process.poll() is None:
                time.sleep(0.02)
        assert log.read_bytes() == b"--api-key [REDACTED]\n"


WORKER = """
import json, os, sys
from pathlib import Path
stage = Path(sys.argv[1])
secret = os.environ["A_TOKEN"]
print("starting with", secret)
(stage / "results").mkdir()
(stage / "results" / "r.json").write_text(json.dumps({"model_args": {"api_key": secret}}))
(stage / "result.json").write_text(json.dumps({"status": "ok", "said": secret}))
"""


def test_a_worker_leaves_no_secret_behind(
    tmp_path: Path, planted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conductor.executors.local.WORKERS", tmp_path)
    (tmp_path / "worker.py").write_text(WORKER)
    stage, noted = tmp_path / "stage", []
    request = {"prompts": [f"who is http://a:b@c and what is {SECRET}?"]}
    result = run_worker(
        Worker(script="worker.py", interpreter=Path(sys.executable)),
        stage,
        request,
        environ={**os.environ, "A_TOKEN": SECRET},
        progress=lambda done, total, doing: None,
        note=lambda event, **facts: noted.append((event, facts)),
    )
    assert result["said"] == REDACTED
    hidden = [stage / "result.json", stage / "results" / "r.json"]
    assert ("secrets_hidden", {"files": hidden}) in noted
    written = {path: path.read_text() for path in stage.rglob("*") if path.is_file()}
    assert not [path for path, text in written.items() if "pl4nted" in text]
    assert written[stage / "stdout.log"] == f"starting with {REDACTED}\n"
    assert kept_result(stage, request) == result, "the same request, though it is told otherwise"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        pytest.param(
            {"engine.arguments": ["--api-key", "abcdefgh"]}, "engine.arguments", id="option"
        ),
        pytest.param({"model": f"{HUB_TOKEN}/model"}, "model", id="hub-token"),
        pytest.param(
            {"calibration.data": "https://u:p@host/text"}, "calibration.data", id="user-information"
        ),
        pytest.param({"suite": f"suites/{SECRET}"}, "suite", id="known"),
    ],
)
def test_a_configuration_that_holds_a_secret_is_refused(
    options: dict[str, Any], named: str, planted: None
) -> None:
    with pytest.raises(Failure, match=rf"^{named} \(command line\) holds a secret") as caught:
        load_config(None, {"model": "demo", "recipe": "int8", **options})
    assert caught.value.failure_class is FailureClass.USER_CONFIG_ERROR
    assert not [each for each in ("abcdefgh", HUB_TOKEN, "u:p@", SECRET) if each in str(caught)]


def test_a_configuration_file_below_a_secret_is_refused(tmp_path: Path, planted: None) -> None:
    file = tmp_path / SECRET / "release.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("model: demo\nrecipe: int8\n")
    with pytest.raises(Failure, match="its path holds a secret") as caught:
        load_config(file, {})
    assert SECRET not in str(caught.value)


def places_of(secrets: list[str], *directories: Path) -> list[str]:
    """Search every byte of every file, and every name."""
    forms = {form.encode() for secret in secrets for form in redaction._forms(secret)}
    return [
        f"{path}: {form!r}"
        for directory in directories
        for path in directory.rglob("*")
        for form in forms
        if form in os.fsencode(path) or (path.is_file() and form in path.read_bytes())
    ]


PLANTED = {
    "A_TOKEN": SECRET,
    "HF_TOKEN": HUB_TOKEN,
    "https_proxy": "http://alice:pl4nted-proxy@127.0.0.1:9",
    "VLLM_SOMETHING": "http://bob:pl4nted-other@127.0.0.1:9",
    # What an interpreter cannot make sense of it repeats on standard error.
    "PYTHONWARNINGS": SECRET,
    # Passwords that are words of every document.
    "B_PASSWORD": "candidate",
    "C_PASSWORD": "integrity",
}


def day0(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``day0`` with planted secrets; return what it came to and said."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "conductor.cli", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **PLANTED, "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_leaves_no_secret_anywhere(tmp_path: Path) -> None:
    ended = day0(
        *("release", "demo", "--recipe", "int8", "--dry-run", "--json"),
        *("--workspace", str(tmp_path)),
    )
    assert ended.returncode == 0, ended.stderr
    assert not places_of([SECRET, HUB_TOKEN, "pl4nted-proxy", "pl4nted-other"], tmp_path)
    assert not [each for each in (SECRET, HUB_TOKEN, "pl4nted") if each in str(ended)]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["status", HUB_TOKEN], id="refused-by-us"),
        pytest.param([HUB_TOKEN], id="no-such-command"),
        pytest.param(["release", "--rule", HUB_TOKEN], id="no-such-choice"),
        pytest.param(["config", HUB_TOKEN], id="no-such-command-of-a-group"),
        pytest.param(["status", "one", "two", HUB_TOKEN], id="too-many"),
    ],
)
def test_a_command_repeats_no_secret(arguments: list[str]) -> None:
    ended = day0(*arguments)
    assert ended.returncode == 2
    assert REDACTED in ended.stderr
    assert HUB_TOKEN not in ended.stderr + ended.stdout


@pytest.mark.tools
def test_the_tracking_store_holds_no_secret(tmp_path: Path, planted: None) -> None:
    """Secrets in whatever of a report is logged, also across the end of a text that is cut."""
    document = example("accept")
    run_dir = tmp_path / "runs" / document["run_id"]
    run_dir.mkdir(parents=True)
    document["tracking"] = {
        "status": "pending",
        "uri": None,
        "detail": "",
        "run_id": None,
        "stage_run_ids": {},
    }
    document["reasons"] = [f"because {SECRET}", "x" * 4975 + SECRET]
    document["next_action"] = f"Ask http://u:pl4nted-url@host with {HUB_TOKEN}."
    document["model"]["requested"] = f"model-{SECRET}"
    document["gates"][0]["document"]["detail"] = f"said {SECRET}"
    write_report(document, run_dir)
    tracking = log_release(document, run_dir, workspace=tmp_path, environ={**os.environ, **PLANTED})
    assert tracking.status == "logged", tracking.detail
    assert not places_of([SECRET, HUB_TOKEN, "pl4nted-url", "pl4nted-proxy", "pl4nted"], tmp_path)
    assert REDACTED.encode() in (tmp_path / "mlflow.db").read_bytes()
    assert REDACTED in (run_dir / "tracking.log").read_text(), "the interpreter's complaint"
