"""What headers and an index say of a checkpoint's tensors, and everything that can be wrong there.

One minimal fault for each finding of the check "integrity", and several at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conductor.probes.findings import Findings
from conductor.probes.safetensors_header import (
    INDEX_FILE,
    LARGEST_HEADER_BYTES,
    SINGLE_FILE,
    Tensor,
    Weights,
    dangling_links,
    pickled_files,
    read_weights,
    read_whole,
)
from conductor.probes.source import ProbeError
from gates.findings import KINDS

ONE, TWO, THREE = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
MLP = "model.layers.1.mlp.up_proj.weight"


def entry(begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> Any:
    dimensions = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": dimensions, "data_offsets": [begin, end]}


def write_header(path: Path, header: bytes | str | dict[str, Any], data_bytes: int) -> None:
    content = json.dumps(header) if isinstance(header, dict) else header
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data_bytes))


def write_index(directory: Path, weight_map: Any, **more: Any) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map, **more}))


def weight_map_of(directory: Path) -> dict[str, str]:
    return dict(json.loads((directory / INDEX_FILE).read_text())["weight_map"])


@pytest.fixture
def single(tmp_path: Path) -> Path:
    header = {"__metadata__": {"format": "pt"}, "a": entry(0, 4), MLP: entry(4, 12, "F32", [2])}
    write_header(tmp_path / SINGLE_FILE, header, 12)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    shards = {
        ONE: {"a": entry(0, 4), "b": entry(4, 8)},
        TWO: {"c": entry(0, 8, "BF16", [2, 2]), MLP: entry(8, 12)},
        THREE: {"d": entry(0, 4, "F32", [])},
    }
    for file, header in shards.items():
        write_header(tmp_path / file, header, max(e["data_offsets"][1] for e in header.values()))
    weight_map = {name: file for file, header in shards.items() for name in header}
    write_index(tmp_path, weight_map, metadata={"total_size": 24})
    return tmp_path


def found(directory: Path) -> dict[str, list[str]]:
    return examined(directory)[1]


def examined(directory: Path) -> tuple[Weights, dict[str, list[str]]]:
    findings = Findings()
    weights = read_weights(directory, findings)
    document = findings.document()
    return weights, {part["kind"]: part["names"] for part in document}


def test_a_file(single: Path) -> None:
    weights, wrong = examined(single)
    assert not wrong
    assert weights.tensors == {
        "a": Tensor("U8", (4,), (0, 4)),
        MLP: Tensor("F32", (2,), (4, 12)),
    }
    assert weights.size_bytes == 12
    assert weights.tensors[MLP].size_bytes == 8
    assert weights.shard_of == {"a": SINGLE_FILE, MLP: SINGLE_FILE}
    assert weights.data_start == {SINGLE_FILE: (single / SINGLE_FILE).stat().st_size - 12}
    assert weights.broken == frozenset()
    assert read_whole(single) == weights


def test_shards(sharded: Path) -> None:
    weights, wrong = examined(sharded)
    assert not wrong
    assert list(weights.tensors) == ["a", "b", "c", MLP, "d"]
    assert weights.shard_of == {"a": ONE, "b": ONE, "c": TWO, MLP: TWO, "d": THREE}
    assert set(weights.data_start) == {ONE, TWO, THREE}
    assert weights.size_bytes == 24
    assert read_whole(sharded) == weights


@pytest.mark.parametrize(
    ("header", "data_bytes"),
    [
        pytest.param({"a": entry(0, 4), "z": entry(4, 4, "F32", [0, 7])}, 4, id="zero-size-last"),
        pytest.param({"a": entry(0, 4), "z": entry(0, 0)}, 4, id="zero-size-first"),
        pytest.param({"b": entry(4, 8), "a": entry(0, 4)}, 8, id="another-order"),
        pytest.param({"a": entry(0, 3, "F4", [6])}, 3, id="four-bits"),
        pytest.param({"a": entry(0, 3, "F6_E2M3", [2, 2])}, 3, id="six-bits"),
        pytest.param({"a": entry(0, 1, "U8", [1] * 16)}, 1, id="sixteen-dimensions"),
        pytest.param({"é\n\u2028": entry(0, 4)}, 4, id="odd-name"),
        pytest.param({"": entry(0, 4)}, 4, id="empty-name"),
        pytest.param({'"shape"': entry(0, 4)}, 4, id="quoted-name"),
        pytest.param({"a": entry(0, 4) | {"more": {"shape": []}}}, 4, id="further-keys"),
        pytest.param({"a": entry(0, 4), "__metadata__": None}, 4, id="null-metadata"),
        pytest.param(
            {"__metadata__": {"config": '{"a": {"dtype": "x"}}'}, "a": entry(0, 4)},
            4,
            id="json-in-metadata",
        ),
        pytest.param(
            {"__metadata__": {"a": "},", "b": "}"}, "a": entry(0, 4)}, 4, id="braces-in-metadata"
        ),
        pytest.param({"a": entry(0, 4), "__metadata__": {}}, 4, id="metadata-last"),
        pytest.param(json.dumps({"a": entry(0, 4)}) + " " * 77, 4, id="padded"),
        pytest.param(json.dumps({"a": entry(0, 4)}, indent=9), 4, id="spaced"),
        pytest.param(
            b'{"a":{"dty\\u0070e":"U8","shape":[4],"data_offsets":[0,4]}}', 4, id="escapes"
        ),
    ],
)
def test_nothing_wrong(tmp_path: Path, header: Any, data_bytes: int) -> None:
    write_header(tmp_path / SINGLE_FILE, header, data_bytes)
    weights, wrong = examined(tmp_path)
    assert not wrong
    assert weights.size_bytes == data_bytes


E1, E2 = json.dumps(entry(0, 4)), json.dumps(entry(4, 8))


@pytest.mark.parametrize(
    ("header", "data_bytes", "kind", "name"),
    [
        pytest.param("[]", 4, "unusable_header", "Expected `object`", id="a-list"),
        pytest.param("", 4, "unusable_header", "truncated", id="empty"),
        pytest.param('{"a": 1', 4, "unusable_header", "truncated", id="cut-json"),
        pytest.param(b'{"\xff": 1}', 4, "unusable_header", "utf-8", id="not-utf-8"),
        pytest.param('{"\\ud800": 1}', 4, "unusable_header", "JSON", id="lone-surrogate"),
        pytest.param('{"a":' + "[" * 99_999, 4, "unusable_header", "too deep", id="deep"),
        pytest.param(
            {"__metadata__": {"n": 1}, "a": entry(0, 4)}, 4, "unusable_header", "str", id="metadata"
        ),
        pytest.param('{"__metadata__":{},}', 0, "unusable_header", "JSON", id="comma-too-many"),
        pytest.param(
            f'{{"__metadata__":{{}}"a":{E1}}}', 4, "unusable_header", "JSON", id="comma-too-few"
        ),
        pytest.param({"a": 7}, 4, "unusable_tensor", "a, Expected `object`", id="a-number"),
        pytest.param({"a": {}}, 4, "unusable_tensor", "`dtype`", id="no-dtype"),
        pytest.param(
            {"a": {"dtype": "U8", "shape": [4]}}, 4, "unusable_tensor", "data_off", id="no-place"
        ),
        pytest.param(
            {"a": entry(0, 4, "X9")}, 4, "unusable_tensor", "type that is not known", id="new-type"
        ),
        pytest.param(
            {"a": entry(0, 4, "X9", [0])}, 4, "unusable_tensor", "not known", id="new-type-empty"
        ),
        pytest.param({"a": entry(0, 4, "U8", [-4])}, 4, "unusable_tensor", ">= 0", id="negative"),
        pytest.param(
            {"a": entry(0, 4, "U8", [-2, -2])}, 4, "unusable_tensor", ">= 0", id="both-negative"
        ),
        pytest.param({"a": entry(0, 4, "U8", [4.0])}, 4, "unusable_tensor", "int", id="a-float"),
        pytest.param({"a": entry(0, 1, "U8", [True])}, 1, "unusable_tensor", "int", id="a-bool"),
        pytest.param({"a": entry(0, 1, "U8", [1] * 17)}, 1, "unusable_tensor", "16", id="17-dims"),
        pytest.param(
            {"a": entry(0, 4, "U8", [10**400])}, 4, "unusable_tensor", "U8 [1000", id="huge-integer"
        ),
        pytest.param(
            {"a": entry(0, 4, "U8", [2**62] * 16)}, 4, "unusable_tensor", "U8 [", id="huge-product"
        ),
        pytest.param(
            {"a": entry(0, 4, "F32", [2])}, 4, "unusable_tensor", "F32 [2] in bytes 0", id="size"
        ),
        pytest.param(
            {"a": entry(4, 0, shape=[4])}, 4, "unusable_tensor", "bytes 4 to 0", id="backwards"
        ),
        pytest.param({"a": entry(0, 2, "F4", [3])}, 2, "unusable_tensor", "F4 [3]", id="half-byte"),
        pytest.param(
            '{"a": {"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
            4,
            "unusable_tensor",
            "a, gives a key twice",
            id="key-twice",
        ),
        pytest.param({"a": entry(0, 4)}, 3, "truncated", "a, bytes 0 to 4 of 3", id="short"),
        pytest.param(
            {"a": entry(0, 2**62)}, 4, "truncated", "bytes 0 to 4611686018427387904 of 4", id="vast"
        ),
        pytest.param(
            {"a": entry(0, 4), "b": entry(3, 7)},
            7,
            "overlapping",
            "b, bytes 3 to 7, overlaps a",
            id="overlap",
        ),
        pytest.param(
            {"a": entry(0, 4), "b": entry(0, 4)}, 4, "overlapping", "b, bytes 0 to 4", id="shared"
        ),
        pytest.param(
            {"a": entry(0, 9), "b": entry(2, 4)}, 9, "overlapping", "b, bytes 2 to 4", id="within"
        ),
        pytest.param({"a": entry(0, 4)}, 5, "hole", "bytes 4 to 5 of 5", id="hole-at-end"),
        pytest.param({"a": entry(1, 4)}, 4, "hole", "bytes 0 to 1 of 4", id="hole-at-start"),
        pytest.param(
            {"a": entry(0, 2), "b": entry(3, 5)}, 5, "hole", "bytes 2 to 3", id="hole-between"
        ),
        pytest.param(
            f'{{"a": {E1}, "a": {E1}}}', 4, "duplicate_name", "a, 2 times", id="identical-twice"
        ),
        pytest.param(
            f'{{"a": {E1}, "\\u0061": {E2}}}', 8, "duplicate_name", "a, 2 times", id="twice-escaped"
        ),
    ],
)
def test_one_fault_in_a_file(
    tmp_path: Path, header: Any, data_bytes: int, kind: str, name: str
) -> None:
    write_header(tmp_path / SINGLE_FILE, header, data_bytes)
    weights, wrong = examined(tmp_path)
    assert list(wrong) == [kind]
    assert wrong[kind][0].startswith(SINGLE_FILE)
    assert name in wrong[kind][0]
    assert KINDS[kind].check == "integrity"
    if kind not in ("hole", "unusable_header"):
        assert weights.broken
    assert not weights.broken & weights.tensors.keys()
    with pytest.raises(ProbeError, match=r"model\.safetensors"):
        read_whole(tmp_path)


def test_everything_wrong_in_a_file_is_reported(tmp_path: Path) -> None:
    header = {
        "a": entry(0, 4),
        "b": entry(3, 6),
        "c": entry(6, 7, "X"),
        "d": {},
        "e": entry(8, 10),
        "f": entry(10, 30),
    }
    write_header(tmp_path / SINGLE_FILE, header, 12)
    weights, wrong = examined(tmp_path)
    assert {kind: len(names) for kind, names in wrong.items()} == {
        "unusable_tensor": 2,
        "truncated": 1,
        "overlapping": 1,
    }
    assert set(weights.tensors) == {"e"}
    assert weights.broken == {"a", "b", "c", "d", "f"}


def _cut(directory: Path) -> None:
    path = directory / TWO
    os.truncate(path, path.stat().st_size - 1)


def _renamed_in_shard(directory: Path) -> None:
    path = directory / THREE
    path.write_bytes(path.read_bytes().replace(b'"d"', b'"e"'))


def _in_another_shard(directory: Path) -> None:
    write_index(directory, weight_map_of(directory) | {"d": ONE})


def _in_two_shards(directory: Path) -> None:
    write_header(directory / THREE, {"d": entry(0, 4), "a": entry(4, 8)}, 8)


def _twice_in_the_index(directory: Path) -> None:
    path = directory / INDEX_FILE
    path.write_text(path.read_text().replace('"a":', f'"a": "{ONE}", "a":'))


def _link_to_nowhere(directory: Path) -> None:
    (directory / TWO).unlink()
    (directory / TWO).symlink_to("../blobs/gone")


def _pipe(directory: Path) -> None:
    (directory / TWO).unlink()
    os.mkfifo(directory / TWO)


def _directory(directory: Path) -> None:
    (directory / TWO).unlink()
    (directory / TWO).mkdir()


def _shard_left_out_of_index(directory: Path) -> None:
    kept = {n: file for n, file in weight_map_of(directory).items() if file != THREE}
    write_index(directory, kept)


def _claims_much(directory: Path) -> None:
    (directory / TWO).write_bytes((2**63).to_bytes(8, "little") + b"{}")


def _large_header(directory: Path) -> None:
    with (directory / TWO).open("wb") as stream:
        stream.write((LARGEST_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(LARGEST_HEADER_BYTES + 100)


@pytest.mark.parametrize(
    ("break_it", "expected", "broken"),
    [
        pytest.param(_cut, {"truncated": f"{TWO}: {MLP}, bytes 8 to 12 of 11"}, {MLP}, id="cut"),
        pytest.param(
            lambda d: os.truncate(d / TWO, 7), {"unusable_header": TWO}, {"c", MLP}, id="no-header"
        ),
        pytest.param(
            _claims_much,
            {"unusable_header": f"{TWO} (is no whole safetensors file: 10 bytes, header of 9223"},
            {"c", MLP},
            id="claims-2-to-63",
        ),
        pytest.param(_large_header, {"unusable_header": TWO}, {"c", MLP}, id="header-too-large"),
        pytest.param(
            lambda d: (d / TWO).unlink(),
            {"missing_shard": f"{TWO} (2 tensors)"},
            {"c", MLP},
            id="missing-shard",
        ),
        pytest.param(_link_to_nowhere, {"dangling_link": TWO}, {"c", MLP}, id="dangling-shard"),
        pytest.param(_pipe, {"unusable_header": f"{TWO} (is not a reg"}, {"c", MLP}, id="pipe"),
        pytest.param(_directory, {"unusable_header": f"{TWO} (is a dir"}, {"c", MLP}, id="folder"),
        pytest.param(
            _renamed_in_shard,
            {"not_in_shard": f"{THREE}: d", "not_in_index": f"{THREE}: e"},
            {"d", "e"},
            id="renamed",
        ),
        pytest.param(
            _in_another_shard,
            {"not_in_shard": f"{ONE}: d, is in {THREE}"},
            {"d"},
            id="in-another-shard",
        ),
        pytest.param(
            _in_two_shards, {"duplicate_name": f"{THREE}: a, also in {ONE}"}, {"a"}, id="in-two"
        ),
        pytest.param(
            _twice_in_the_index,
            {"duplicate_name": f"{INDEX_FILE}: a, 2 times"},
            set(),
            id="twice-in-index",
        ),
        pytest.param(
            _shard_left_out_of_index,
            {"not_in_index": f"{THREE}: d"},
            {"d"},
            id="shard-not-in-index",
        ),
        pytest.param(
            lambda d: (d / INDEX_FILE).unlink(),
            {"missing_index": INDEX_FILE},
            set(),
            id="no-index",
        ),
        pytest.param(
            lambda d: write_header(d / SINGLE_FILE, {"a": entry(0, 4)}, 4),
            {"two_sets": f"{SINGLE_FILE} beside {INDEX_FILE}"},
            set(),
            id="two-sets",
        ),
    ],
)
def test_one_fault_in_shards(
    sharded: Path, break_it: Callable[[Path], object], expected: dict[str, str], broken: set[str]
) -> None:
    break_it(sharded)
    weights, wrong = examined(sharded)
    assert set(wrong) == set(expected)
    for kind, name in expected.items():
        assert len(wrong[kind]) == 1
        assert wrong[kind][0].startswith(name)
        assert KINDS[kind].failure_class is not None
    assert weights.broken == broken
    assert set(weights.tensors) == {"a", "b", "c", MLP, "d"} - broken
    assert set(weights.shard_of) == set(weights.tensors)
    with pytest.raises(ProbeError) as caught:
        read_whole(sharded)
    assert str(sharded) in str(caught.value)
    assert next(iter(expected.values())) in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("do", "kind", "name"),
    [
        pytest.param(
            lambda d: (d / "adapter_model.safetensors").touch(),
            "stray_file",
            f"adapter_model.safetensors (not in {INDEX_FILE})",
            id="stray",
        ),
        pytest.param(
            lambda d: os.mkfifo(d / "consolidated.safetensors"),
            "stray_file",
            "consolidated.safetensors",
            id="stray-pipe",
        ),
        pytest.param(
            lambda d: write_index(d, weight_map_of(d), metadata={"total_size": 9}),
            "wrong_total_size",
            f"{INDEX_FILE} (total_size 9, tensors 24)",
            id="total-size",
        ),
        pytest.param(
            lambda d: write_index(d, weight_map_of(d), metadata={"total_size": "24"}),
            "wrong_total_size",
            f"{INDEX_FILE} (total_size is no number)",
            id="total-size-text",
        ),
    ],
)
def test_worth_a_note(sharded: Path, do: Callable[[Path], object], kind: str, name: str) -> None:
    do(sharded)
    weights, wrong = examined(sharded)
    assert list(wrong) == [kind]
    assert wrong[kind][0].startswith(name)
    assert KINDS[kind].failure_class is None
    assert len(weights.tensors) == 5
    assert read_whole(sharded).tensors == weights.tensors


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": 24.0}, {"other": [1]}])
def test_total_size_that_says_nothing_wrong(sharded: Path, metadata: Any) -> None:
    write_index(sharded, weight_map_of(sharded), metadata=metadata)
    assert found(sharded) == {}


def test_several_faults_at_once(sharded: Path) -> None:
    _cut(sharded)
    _renamed_in_shard(sharded)
    (sharded / ONE).unlink()
    (sharded / "tokenizer.json").symlink_to("gone")
    (sharded / "extra.safetensors").touch()
    weights, wrong = examined(sharded)
    assert set(wrong) == {
        "truncated",
        "missing_shard",
        "not_in_shard",
        "not_in_index",
        "dangling_link",
        "stray_file",
    }
    assert set(weights.tensors) == {"c"}
    with pytest.raises(ProbeError) as caught:
        read_whole(sharded)
    assert all(part in caught.value.problem for part in (ONE, MLP, "tokenizer.json"))


def test_findings_are_grouped_by_module_kind(sharded: Path) -> None:
    _cut(sharded)
    findings = Findings()
    read_weights(sharded, findings)
    assert [part["groups"] for part in findings.document()] == [{"mlp": 1}]


def test_links_to_blobs(sharded: Path) -> None:
    blobs, snapshot = sharded / "blobs", sharded / "snapshots"
    blobs.mkdir()
    snapshot.mkdir()
    for number, name in enumerate((ONE, TWO, THREE, INDEX_FILE)):
        (sharded / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../blobs/{number}")
    weights, wrong = examined(snapshot)
    assert not wrong
    assert len(weights.tensors) == 5


def test_an_index_of_the_single_file(single: Path) -> None:
    write_index(single, {"a": SINGLE_FILE, MLP: SINGLE_FILE})
    assert found(single) == {}


def test_a_stray_beside_a_single_file(single: Path) -> None:
    (single / "adapter_model.safetensors").touch()
    assert list(found(single)) == ["stray_file"]


def test_a_file_of_another_name(single: Path) -> None:
    (single / SINGLE_FILE).rename(single / "weights.safetensors")
    weights, wrong = examined(single)
    assert not wrong
    assert weights.shard_of["a"] == "weights.safetensors"


@pytest.mark.parametrize(
    ("kept", "absent"),
    [((2,), "model-00001-of-00003"), ((1, 3), "model-00002-of-00003"), ((0, 2), "model-00001-of")],
    ids=["one-of-three", "two-of-three", "counted-from-zero"],
)
def test_a_series_without_index_says_what_is_absent(
    tmp_path: Path, kept: tuple[int, ...], absent: str
) -> None:
    for number in kept:
        path = tmp_path / f"model-0000{number}-of-00003.safetensors"
        write_header(path, {f"t{number}": entry(0, 4)}, 4)
    assert found(tmp_path)["missing_shard"][0].startswith(absent)


def test_names_in_two_files_without_index(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        write_header(tmp_path / name, {"a": entry(0, 4), name: entry(4, 8)}, 8)
    weights, wrong = examined(tmp_path)
    assert wrong["duplicate_name"] == ["y.safetensors: a, also in x.safetensors"]
    assert weights.broken == {"a"}
    assert set(weights.shard_of) == set(weights.tensors) == {"x.safetensors", "y.safetensors"}


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "x\\u0000"}}',
        '{"weight_map": {"\\ud800": "x"}}',
        '{"weight_map": ' + "[" * 99_999,
        b'{"weight_map": {"\xff": "x"}}',
    ],
)
def test_an_index_that_cannot_be_read(single: Path, index: str | bytes) -> None:
    (single / INDEX_FILE).write_bytes(index.encode() if isinstance(index, str) else index)
    weights, wrong = examined(single)
    (name,) = wrong.pop("unusable_file")
    assert name.startswith(f"{INDEX_FILE} (")
    assert weights.tensors
    assert not wrong
    with pytest.raises(ProbeError, match=INDEX_FILE):
        read_whole(single)


def test_an_index_that_is_a_pipe(single: Path) -> None:
    os.mkfifo(single / INDEX_FILE)
    assert found(single) == {"unusable_file": [f"{INDEX_FILE} (is not a regular file)"]}


@pytest.mark.parametrize("name", ["s" * 5000, "shard \udcff"])
def test_an_index_with_hostile_file_names(single: Path, name: str) -> None:
    raw = json.dumps({"weight_map": {"a": "shard ?"}}).encode()
    raw = raw.replace(b"shard ?", name.encode(errors="replace"))
    (single / INDEX_FILE).write_bytes(raw)
    assert set(found(single)) == {"missing_shard", "two_sets"}


@pytest.mark.parametrize(
    ("prepare", "problem"),
    [
        (lambda d: d.rmdir(), "is no directory"),
        (lambda d: None, "holds no safetensors weights"),
        (lambda d: (d / "pytorch_model.bin").touch(), "pickled weights only"),
        (lambda d: write_header(d / SINGLE_FILE, {}, 0), "holds no weights"),
        (lambda d: write_header(d / SINGLE_FILE, {"a": entry(0, 0)}, 0), "holds no weights"),
    ],
    ids=["no-directory", "nothing", "pickled", "no-tensors", "no-bytes"],
)
def test_no_checkpoint_at_all(
    tmp_path: Path, prepare: Callable[[Path], object], problem: str
) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    prepare(directory)
    for read in (read_whole, lambda d: read_weights(d, Findings())):
        with pytest.raises(ProbeError, match=problem):
            read(directory)


def test_pickled_files_and_dangling_links(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    for name in ("a.bin", "part/b.pt", "c.txt", "d.PT"):
        (tmp_path / name).touch()
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "part" / "gone.bin").symlink_to("nowhere")
    assert pickled_files(tmp_path) == ["a.bin", "d.PT", "part/b.pt", "part/gone.bin"]
    assert dangling_links(tmp_path) == ["circle", "part/gone.bin"]


def test_a_long_name_is_shortened(tmp_path: Path) -> None:
    write_header(tmp_path / SINGLE_FILE, {"n" * 100_000: entry(0, 4)}, 3)
    assert len(found(tmp_path)["truncated"][0]) < 400
