"""Whatever lies in a checkpoint's directory, ``gate_ptq`` answers: one verdict, and no traceback.

Each candidate is an export of the tiny dense model in which one file is replaced by what hypothesis
thinks of. None of them may pass. Headers and indexes that claim much are read by the real command,
in a process of its own whose memory is measured.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors_files import CONFIG, dense, modelopt_config, quantize, write_checkpoint

from conductor.gate_commands import ptq_main
from conductor.probes.safetensors_header import INDEX_FILE, SINGLE_FILE

MOST_BYTES = 1_000_000_000
FUZZED = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 2**63, 10**400])
    | st.floats(allow_nan=False)
    | st.text(max_size=9)
    | st.sampled_from(["BF16", "F32", "NVFP4", "modelopt", "FP8", "\ud800", "*", "re:(", "["]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=9)
            | st.sampled_from(
                [
                    "dtype",
                    "shape",
                    "data_offsets",
                    "__metadata__",
                    "weight_map",
                    "quant_algo",
                    "ignore",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)

ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["BF16", "U8", "F4", "F8_E4M3", "X"]) | JSON_VALUES,
        "shape": st.lists(st.integers(-2, 300), max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-2, 10**7), min_size=2, max_size=2) | JSON_VALUES,
    },
)

CONFIG_KEYS = st.sampled_from(
    [
        *CONFIG,
        "quantization_config",
        "text_config",
        "vision_config",
        "rope_scaling",
        "auto_map",
        "num_key_value_heads",
        "intermediate_size",
        "quant_method",
    ]
)


@pytest.fixture(scope="module")
def source() -> Iterator[Path]:
    with TemporaryDirectory() as directory:
        yield write_checkpoint(Path(directory) / "source", dense())


@pytest.fixture(scope="module")
def export() -> Iterator[Path]:
    with TemporaryDirectory() as directory:
        config = CONFIG | {"quantization_config": modelopt_config("NVFP4", group_size=16)}
        tensors = quantize(dense(), "modelopt-nvfp4")
        yield write_checkpoint(Path(directory) / "export", tensors, config, shards=2)


def ask(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, source: Path
) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the one JSON document that the command prints."""
    arguments = ["--checkpoint", str(checkpoint), "--source", str(source), "--recipe", "nvfp4"]
    capsys.readouterr()
    exit_code = ptq_main(arguments)
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert "Traceback" not in printed.err
    assert (exit_code == 0) == document["pass"]
    assert exit_code == 0 or (document["failure_class"] and document["detail"])
    return exit_code, document


def refused(
    capsys: pytest.CaptureFixture[str], export: Path, source: Path, file: str, content: bytes
) -> None:
    """Check that the export is refused once ``file`` in it holds ``content``."""
    with TemporaryDirectory() as directory:
        candidate = Path(directory) / "candidate"
        shutil.copytree(export, candidate)
        (candidate / file).write_bytes(content)
        exit_code, _ = ask(capsys, candidate, source)
        assert exit_code in (1, 2)


def framed(header: bytes, data_bytes: int = 0) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(data_bytes)


@FUZZED
@given(content=st.binary(max_size=200) | st.binary(max_size=99).map(framed))
def test_bytes_for_a_shard(
    capsys: pytest.CaptureFixture[str], export: Path, source: Path, content: bytes
) -> None:
    refused(capsys, export, source, "model-1.safetensors", content)


@FUZZED
@given(
    header=JSON_VALUES | st.dictionaries(st.text(max_size=5), ENTRIES, max_size=4),
    data_bytes=st.integers(0, 64),
)
def test_json_for_a_header(
    capsys: pytest.CaptureFixture[str], export: Path, source: Path, header: Any, data_bytes: int
) -> None:
    content = framed(json.dumps(header).encode(), data_bytes)
    refused(capsys, export, source, "model-1.safetensors", content)


@FUZZED
@given(data=st.data())
def test_one_entry_of_a_good_header_changed(
    capsys: pytest.CaptureFixture[str], export: Path, source: Path, data: st.DataObject
) -> None:
    content = (export / "model-1.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    name = data.draw(st.sampled_from(sorted(header)))
    entry = data.draw(ENTRIES.filter(lambda entry: entry != header[name]) | JSON_VALUES)
    changed = framed(json.dumps(header | {name: entry}).encode()) + content[end:]
    refused(capsys, export, source, "model-1.safetensors", changed)


@FUZZED
@given(index=JSON_VALUES | st.fixed_dictionaries({"weight_map": JSON_VALUES}))
def test_json_for_an_index(
    capsys: pytest.CaptureFixture[str], export: Path, source: Path, index: Any
) -> None:
    refused(capsys, export, source, INDEX_FILE, json.dumps(index).encode())


@FUZZED
@given(
    config=JSON_VALUES
    | st.dictionaries(CONFIG_KEYS, JSON_VALUES, max_size=5)
    | st.fixed_dictionaries({"quantization_config": JSON_VALUES}).map(lambda part: CONFIG | part)
)
def test_json_for_a_configuration(
    capsys: pytest.CaptureFixture[str], export: Path, source: Path, config: Any
) -> None:
    refused(capsys, export, source, "config.json", json.dumps(config).encode())


@FUZZED
@given(stated=st.fixed_dictionaries({"quantization": JSON_VALUES}) | JSON_VALUES)
def test_json_for_the_file_of_modelopt(
    capsys: pytest.CaptureFixture[str], export: Path, source: Path, stated: Any
) -> None:
    refused(capsys, export, source, "hf_quant_config.json", json.dumps(stated).encode())


ENTRY = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


def _vast_claim(path: Path) -> None:
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")


def _vast_tensor(path: Path) -> None:
    entry = {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}
    path.write_bytes(framed(json.dumps({"a": entry}).encode()))


def _of(head: bytes, repeated: bytes, tail: bytes, megabytes: int = 99) -> Any:
    def write(path: Path) -> None:
        header = head + repeated * (megabytes * 10**6 // len(repeated)) + tail
        path.write_bytes(framed(header, 1))

    return write


def _many_names(path: Path) -> None:
    names = (b'"%x":%s' % (number, ENTRY) for number in range(1_500_000))
    path.write_bytes(framed(b"{" + b",".join(names) + b"}", 1))


@pytest.mark.parametrize(
    ("write", "file"),
    [
        pytest.param(_vast_claim, SINGLE_FILE, id="claims-2-to-63"),
        pytest.param(_vast_tensor, SINGLE_FILE, id="tensor-of-2-to-62"),
        pytest.param(_of(b'{"a":', b"[", b""), SINGLE_FILE, id="deep"),
        pytest.param(_of(b'{"a":[', b"[],", b"[]]}"), SINGLE_FILE, id="nested-lists"),
        pytest.param(
            _of(b'{"a":{"dtype":"U8","shape":[', b"999,", b'1],"data_offsets":[0,1]}}'),
            SINGLE_FILE,
            id="long-shape",
        ),
        pytest.param(_of(b"{", b'"a":0,', b'"b":0}'), SINGLE_FILE, id="one-name-again-and-again"),
        pytest.param(_many_names, SINGLE_FILE, id="many-names"),
        pytest.param(
            _of(b'{"__metadata__":{', b'"k":"v",', b'"k":"v"}}'), SINGLE_FILE, id="metadata"
        ),
        pytest.param(_of(b'{"a":' + ENTRY + b"}", b" ", b""), SINGLE_FILE, id="padding"),
        pytest.param(_of(b'{"a":', b"9", b"}"), SINGLE_FILE, id="one-integer"),
        pytest.param(_of(b'{"', "é".encode(), b'":0}'), SINGLE_FILE, id="one-name"),
        pytest.param(
            lambda path: path.write_bytes(
                b'{"weight_map":{' + b'"a":"b",' * 12_000_000 + b'"":""}}'
            ),
            INDEX_FILE,
            id="index-of-one-name",
        ),
        pytest.param(
            lambda path: path.write_bytes(b'{"weight_map":' + b"[[]," * 24_000_000),
            INDEX_FILE,
            id="index-of-lists",
        ),
    ],
)
def test_memory_and_time_have_a_bound(tmp_path: Path, source: Path, write: Any, file: str) -> None:
    candidate = tmp_path / "candidate"
    candidate.mkdir()
    (candidate / "config.json").write_text(json.dumps(CONFIG))
    write(candidate / file)
    code = "import sys; from conductor.gate_commands import ptq_main; sys.exit(ptq_main())"
    command = [sys.executable, "-c", code]
    command += ["--checkpoint", str(candidate), "--source", str(source), "--recipe", "nvfp4"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (30, 30)),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    printed, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (1, 2)
    assert json.loads(printed)["pass"] is False
    assert b"Traceback" not in errors
    assert usage.ru_maxrss * 1024 < MOST_BYTES
