"""The fault corpus: minimal changes to good exports, each with what the gate must say of it.

A row is one thing that went wrong in an export somewhere: what was done, to which clean export, and
the text that names the culprit. ``python tests/fault_corpus.py docs/reference/fault-corpus.md``
writes the page of both tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from encoders import bf16, floats
from encoders_packed import AWQ_PLACES
from exports_on_disk import EXPORTS, encoder
from models_on_disk import (
    Raw,
    edited,
    read_file,
    read_json,
    read_tensors,
    write_file,
    write_tensors,
)

from conductor.files import write_text
from conductor.reference_pages import page, table
from gates import FailureClass

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Copied:
    """A copy of a clean export that a fault may change, and the source it was made from."""

    directory: Path
    source: Path

    @contextmanager
    def tensors(self) -> Iterator[dict[str, Raw]]:
        """Give all tensors to be changed in place; write them back, and an index that fits."""
        index = self.directory / INDEX
        shard_of = read_json(index)["weight_map"] if index.exists() else {}
        shards = sorted(set(shard_of.values())) or [SINGLE]
        found = {name: shard for shard in shards for name in self.names(shard)}
        stored: dict[str, Raw] = {}
        for shard in shards:
            stored |= read_tensors(self.directory / shard)
        yield stored
        for shard in shards:
            mine = {n: raw for n, raw in stored.items() if found.get(n, shards[-1]) == shard}
            write_tensors(self.directory / shard, mine)
        if shard_of:
            with edited(index) as document:
                document["weight_map"] = {n: found.get(n, shards[-1]) for n in sorted(stored)}

    def names(self, shard: str) -> list[str]:
        """Return the names of a file's tensors."""
        return [n for n in read_file(self.directory / shard)[0] if n != "__metadata__"]

    def in_source(self) -> dict[str, Raw]:
        """Return the source's tensors."""
        stored: dict[str, Raw] = {}
        for path in self.source.glob("*.safetensors"):
            stored |= read_tensors(path)
        return stored

    def holding(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        files = sorted(self.directory.glob("*.safetensors"))
        return next(path for path in files if name in self.names(path.name))


Change = Callable[[Copied], None]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One row: ``finding`` is the check that fails, or the kind of finding that it reports.

    ``named`` is text that the verdict's detail holds; ``options`` are more for the command line.
    """

    name: str
    base: str
    finding: str
    named: str
    change: Change
    check: str
    failure_class: FailureClass
    options: tuple[str, ...] = ()


Row = tuple[str, str, str, str, Change]


def _faults(check: str, failure_class: FailureClass, *rows: Row) -> tuple[Fault, ...]:
    return tuple(
        Fault(
            name=name,
            base=base,
            finding=finding,
            named=named,
            change=change,
            check=check,
            failure_class=failure_class,
        )
        for name, base, finding, named, change in rows
    )


def edit(function: Callable[[dict[str, Raw]], None]) -> Change:
    """Change the tensors."""

    def change(copied: Copied) -> None:
        with copied.tensors() as tensors:
            function(tensors)

    return change


def stored(name: str, function: Callable[[np.ndarray], Any]) -> Change:
    """Change the stored elements of one tensor; the function changes in place, or returns anew."""

    def change(tensors: dict[str, Raw]) -> None:
        dtype, array = tensors[name]
        result = function(array)
        changed = array if result is None else np.asarray(result, array.dtype, order="C")
        tensors[name] = (dtype, changed)

    return edit(change)


def element(name: str, value: float, at: int = 0) -> Change:
    """Set one stored element."""
    return stored(name, lambda array: array.reshape(-1).__setitem__(at, value))


def times(name: str, factor: float) -> Change:
    """Multiply the values of a floating-point tensor."""

    def change(tensors: dict[str, Raw]) -> None:
        dtype, array = tensors[name]
        if dtype == "BF16":
            tensors[name] = bf16(floats((dtype, array)) * factor)
        else:
            tensors[name] = (dtype, (array * factor).astype(array.dtype))

    return edit(change)


def drop(*patterns: str) -> Change:
    """Remove the tensors whose whole name matches one of the patterns."""

    def change(tensors: dict[str, Raw]) -> None:
        lost = [n for n in tensors if any(re.fullmatch(pattern, n) for pattern in patterns)]
        assert lost, patterns
        for name in lost:
            del tensors[name]

    return edit(change)


def copy_parts(to: str, of: str, *parts: str) -> Change:
    """Give a module the parts of another; without ``parts``, all that both have."""

    def change(tensors: dict[str, Raw]) -> None:
        names = parts or tuple(n.removeprefix(f"{of}.") for n in tensors if n.startswith(f"{of}."))
        for part in names:
            tensors[f"{to}.{part}"] = tensors[f"{of}.{part}"]

    return edit(change)


def swap(one: str, other: str) -> Change:
    """Exchange the tensors of two modules, or of two names."""

    def change(tensors: dict[str, Raw]) -> None:
        pairs = [
            (name, other + name.removeprefix(one))
            for name in tensors
            if name == one or name.startswith(f"{one}.")
        ]
        assert pairs, one
        for name, twin in pairs:
            tensors[name], tensors[twin] = tensors[twin], tensors[name]

    return edit(change)


def invert(name: str) -> Change:
    """Write 1/x for x."""
    return stored(name, lambda array: (1 / array).astype(array.dtype))


def unquantize(*modules: str) -> Change:
    """Put the source's own weight in the place of a module's parts."""

    def change(copied: Copied) -> None:
        source = copied.in_source()
        with copied.tensors() as tensors:
            for module in modules:
                for name in [n for n in tensors if n.startswith(f"{module}.")]:
                    if not name.endswith(".bias"):
                        del tensors[name]
                tensors[f"{module}.weight"] = source[f"{module}.weight"]

    return change


def requantize(module: str, encode_linear: Callable[..., dict[str, Raw]]) -> Change:
    """Store a module in another way, made from the source's weight."""

    def change(copied: Copied) -> None:
        weight = floats(copied.in_source()[f"{module}.weight"])
        with copied.tensors() as tensors:
            for name in [n for n in tensors if n.startswith(f"{module}.")]:
                if not name.endswith(".bias"):
                    del tensors[name]
            for part, raw in encode_linear(module, weight).items():
                tensors[f"{module}.{part}"] = raw

    return change


def setting(file: str, path: str, value: Any) -> Change:
    """Set what stands in a JSON file under a path of keys and places; ``...`` removes it."""

    def change(copied: Copied) -> None:
        with edited(copied.directory / file) as document:
            place = document
            *parents, last = path.split("/")
            for name in parents:
                place = place[int(name) if isinstance(place, list) else name]
            if value is ...:
                del place[last]
            else:
                place[int(last) if isinstance(place, list) else last] = value

    return change


def config(path: str, value: Any) -> Change:
    """Set a field of ``config.json``."""
    return setting("config.json", path, value)


def declared(path: str, value: Any) -> Change:
    """Set a field of the quantization configuration."""
    return config(f"quantization_config/{path}", value)


def exclude(*modules: str) -> Change:
    """Add to the list of excluded modules, wherever the checkpoint has it."""

    def change(copied: Copied) -> None:
        with edited(copied.directory / "config.json") as document:
            document["quantization_config"]["ignore"] += modules
        file = copied.directory / "hf_quant_config.json"
        if file.exists():
            with edited(file) as document:
                document["quantization"]["exclude_modules"] += modules

    return change


def include(*modules: str) -> Change:
    """Take modules off the list of excluded ones."""

    def change(copied: Copied) -> None:
        with edited(copied.directory / "config.json") as document:
            listed = document["quantization_config"]["ignore"]
            listed[:] = [module for module in listed if module not in modules]
        file = copied.directory / "hf_quant_config.json"
        if file.exists():
            with edited(file) as document:
                listed = document["quantization"]["exclude_modules"]
                listed[:] = [module for module in listed if module not in modules]

    return change


def as_it_is(copied: Copied) -> None:
    """Change nothing: what is asked for is the fault."""


def both(*changes: Change) -> Change:
    """Make one change after the other: one fault that shows in several places."""

    def change(copied: Copied) -> None:
        for each in changes:
            each(copied)

    return change


def header(name: str, function: Callable[[dict[str, Any], bytes], Any]) -> Change:
    """Change the header of the file that holds a tensor; may return other tensor bytes."""

    def change(copied: Copied) -> None:
        path = copied.holding(name)
        entries, data = read_file(path)
        result = function(entries, data)
        write_file(path, entries, data if result is None else result)

    return change


def contents(file: str, function: Callable[[bytes], bytes]) -> Change:
    """Change the bytes of a file."""

    def change(copied: Copied) -> None:
        path = copied.directory / file
        path.write_bytes(function(path.read_bytes()))

    return change


def template(function: Callable[[str], str]) -> Change:
    """Change the chat template, wherever it stands."""

    def change(copied: Copied) -> None:
        path = copied.directory / "chat_template.jinja"
        if path.exists():
            path.write_text(function(path.read_text(encoding="utf-8")), encoding="utf-8")
            return
        with edited(copied.directory / "tokenizer_config.json") as document:
            document["chat_template"] = function(document["chat_template"])

    return change


def added(file: str, content: str) -> Change:
    """Add a file."""

    def change(copied: Copied) -> None:
        (copied.directory / file).write_text(content, encoding="utf-8")

    return change


def without(*files: str) -> Change:
    """Delete files."""

    def change(copied: Copied) -> None:
        for file in files:
            (copied.directory / file).unlink()

    return change


L0, L1 = "model.layers.0", "model.layers.1"
Q0, K0, V0, O0 = (f"{L0}.self_attn.{name}_proj" for name in "qkvo")
Q1, K1, V1, O1 = (f"{L1}.self_attn.{name}_proj" for name in "qkvo")
GATE0, UP0, DOWN0 = (f"{L0}.mlp.{name}_proj" for name in ("gate", "up", "down"))
GATE1, UP1, DOWN1 = (f"{L1}.mlp.{name}_proj" for name in ("gate", "up", "down"))
EXPERT = f"{L1}.mlp.experts.3"
FUSED = f"{L1}.feed_forward.experts.gate_up_proj"
SECOND = "model-00002-of-00002.safetensors"

MODELOPT, COMPRESSED = "llama-modelopt-nvfp4", "llama-compressed-nvfp4"
MOE = "moe-modelopt-nvfp4"
HF_QUANT = "hf_quant_config.json"


def _move(entry: dict[str, Any], by: int) -> None:
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


def _overlap(entries: dict[str, Any], data: bytes) -> None:
    entries[f"{K0}.weight"]["data_offsets"] = entries[f"{V0}.weight"]["data_offsets"]


def _hole(entries: dict[str, Any], data: bytes) -> bytes:
    begin = entries[f"{K0}.weight"]["data_offsets"][0]
    for name, entry in entries.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= begin:
            _move(entry, 64)
    return data[:begin] + bytes(64) + data[begin:]


def _say(name: str, **facts: Any) -> Change:
    """Change what a header says of a tensor."""
    return header(name, lambda entries, data: entries[name].update(facts))


def _repeat_name(content: bytes) -> bytes:
    """Give two tensors of a header one name of the same length."""
    assert len(K0) == len(V0)
    return content.replace(f'"{K0}.weight"'.encode(), f'"{V0}.weight"'.encode(), 1)


def _in_two_shards(copied: Copied) -> None:
    name = "model.norm.weight"
    path = next(p for p in copied.directory.glob("*.safetensors") if p != copied.holding(name))
    write_tensors(path, read_tensors(path) | {name: read_tensors(copied.holding(name))[name]})


def _unlist(name: str) -> Change:
    def change(copied: Copied) -> None:
        with edited(copied.directory / INDEX) as document:
            del document["weight_map"][name]

    return change


def _list_only(name: str) -> Change:
    """Take a tensor out of its shard, and leave it in the index."""

    def change(copied: Copied) -> None:
        path = copied.holding(name)
        tensors = read_tensors(path)
        del tensors[name]
        write_tensors(path, tensors)

    return change


def _dangle(copied: Copied) -> None:
    path = copied.directory / SECOND
    path.unlink()
    path.symlink_to("../blobs/3f2a")


def _length(of: Callable[[int], int]) -> Change:
    def change(content: bytes) -> bytes:
        return of(int.from_bytes(content[:8], "little")).to_bytes(8, "little") + content[8:]

    return contents(SINGLE, change)


INTEGRITY = _faults(
    "integrity",
    FailureClass.CHECKPOINT_NOT_SERVABLE,
    ("a shard is cut short", MOE, "truncated", SECOND, contents(SECOND, lambda b: b[:-100])),
    ("a shard is empty", MOE, "unusable_header", SECOND, contents(SECOND, lambda b: b"")),
    ("a shard is missing", MOE, "missing_shard", SECOND, without(SECOND)),
    ("a shard is a link to a blob that was not copied", MOE, "dangling_link", SECOND, _dangle),
    (
        "a shard holds the text of a failed download",
        MOE,
        "unusable_header",
        SECOND,
        contents(SECOND, lambda b: b"<!DOCTYPE html>" * 9),
    ),
    (
        "the header's length is one byte too long",
        MODELOPT,
        "unusable_header",
        SINGLE,
        _length(lambda n: n + 1),
    ),
    (
        "the header claims 2^63 bytes",
        MODELOPT,
        "unusable_header",
        SINGLE,
        _length(lambda n: 2**63),
    ),
    (
        "two tensors share their bytes",
        MODELOPT,
        "overlapping",
        V0,
        header(K0 + ".weight", _overlap),
    ),
    ("64 bytes belong to no tensor", MODELOPT, "hole", SINGLE, header(K0 + ".weight", _hole)),
    (
        "bytes follow the last tensor",
        MODELOPT,
        "hole",
        SINGLE,
        contents(SINGLE, lambda b: b + bytes(512)),
    ),
    (
        "a shape has more elements than there are bytes",
        MODELOPT,
        "unusable_tensor",
        Q0,
        _say(f"{Q0}.weight", shape=[512, 128]),
    ),
    (
        "a type is wider than the bytes",
        MODELOPT,
        "unusable_tensor",
        Q0,
        _say(f"{Q0}.weight_scale", dtype="F32"),
    ),
    (
        "a type is none that exists",
        MODELOPT,
        "unusable_tensor",
        Q0,
        _say(f"{Q0}.weight_scale", dtype="F8_E9M9"),
    ),
    (
        "offsets are negative",
        MODELOPT,
        "unusable_tensor",
        Q0,
        _say(f"{Q0}.weight_scale", data_offsets=[-8, 0]),
    ),
    (
        "a header names one tensor twice",
        MODELOPT,
        "duplicate_name",
        V0,
        contents(SINGLE, _repeat_name),
    ),
    ("two shards hold one tensor", MOE, "duplicate_name", "model.norm.weight", _in_two_shards),
    (
        "the index lists a scale that its shard lacks",
        MOE,
        "not_in_shard",
        EXPERT,
        _list_only(f"{EXPERT}.up_proj.weight_scale"),
    ),
    (
        "the index does not list a tensor",
        MOE,
        "not_in_index",
        EXPERT,
        _unlist(f"{EXPERT}.up_proj.weight_scale"),
    ),
    (
        "the index names the wrong shard",
        MOE,
        "not_in_shard",
        "model.norm.weight",
        setting(INDEX, "weight_map/model.norm.weight", "model-00001-of-00002.safetensors"),
    ),
    (
        "pickled weights stand beside the safetensors",
        MODELOPT,
        "pickled",
        "pytorch_model.bin",
        added("pytorch_model.bin", "\x80\x02"),
    ),
)


def _lose_layer(copied: Copied) -> None:
    with copied.tensors() as tensors:
        for name in [name for name in tensors if name.startswith(f"{L1}.")]:
            del tensors[name]


def _flip_bit(array: np.ndarray) -> None:
    array.reshape(-1)[7] ^= 1 << 9


COMPLETENESS = _faults(
    "completeness",
    FailureClass.QUANT_COVERAGE_FAILURE,
    (
        "the multi-token-prediction layer is lost",
        "deepseek-modelopt-nvfp4",
        "lost",
        "model.layers.2",
        drop(r"model\.layers\.2\..*"),
    ),
    (
        "the projection of the prediction layer is lost",
        "deepseek-block-fp8",
        "lost",
        "model.layers.2.eh_proj",
        drop(r".*\.eh_proj\.weight"),
    ),
    (
        "one expert is lost",
        MOE,
        "lost",
        EXPERT,
        drop(re.escape(EXPERT) + r"\..*"),
    ),
    ("one projection is lost", COMPRESSED, "lost", DOWN1, drop(re.escape(DOWN1) + r"\..*")),
    ("a whole layer is lost", MODELOPT, "lost", L1, _lose_layer),
    ("a bias is lost", "tied-awq", "lost", f"{Q0}.bias", drop(f"{Q0}.bias")),
    (
        "the biases of fused experts are lost",
        "gpt-oss-mxfp4",
        "lost",
        "experts.gate_up_proj_bias",
        drop(r".*\.gate_up_proj_bias"),
    ),
    ("attention sinks are lost", "gpt-oss-mxfp4", "lost", "self_attn.sinks", drop(r".*\.sinks")),
    (
        "the router's correction bias is lost",
        "deepseek-modelopt-nvfp4",
        "lost",
        "e_score_correction_bias",
        drop(r".*\.e_score_correction_bias"),
    ),
    (
        "the gate of the shared expert is lost",
        "moe-compressed-w4a16",
        "lost",
        "shared_expert_gate",
        drop(re.escape(L0) + r"\.mlp\.shared_expert_gate\.weight"),
    ),
    ("a head norm is lost", MOE, "lost", f"{L0}.self_attn.q_norm", drop(r".*\.0\..*q_norm.*")),
    ("the head is lost", MODELOPT, "lost", "lm_head", drop(r"lm_head\.weight")),
    (
        "the vision tower is lost",
        "vision-compressed-fp8",
        "lost",
        "model.visual",
        drop(r"model\.visual\..*"),
    ),
    (
        "the projector of the vision tower is lost",
        "vision-modelopt-nvfp4",
        "lost",
        "visual.merger",
        drop(r".*\.merger\..*"),
    ),
    (
        "a norm has another shape",
        MODELOPT,
        "reshaped",
        f"{L0}.input_layernorm",
        stored(f"{L0}.input_layernorm.weight", lambda a: a[:128]),
    ),
    (
        "a norm is called another 16-bit type",
        MODELOPT,
        "altered",
        "model.norm",
        _say("model.norm.weight", dtype="F16"),
    ),
    (
        "the embeddings are padded",
        MODELOPT,
        "reshaped",
        "embed_tokens",
        stored("model.embed_tokens.weight", lambda a: np.pad(a, ((0, 128), (0, 0)))),
    ),
    (
        "one bit of the embeddings is flipped",
        MODELOPT,
        "altered",
        "embed_tokens",
        stored("model.embed_tokens.weight", _flip_bit),
    ),
    ("the head is scaled", MODELOPT, "altered", "lm_head", times("lm_head.weight", 1.05)),
    ("a router is altered", MOE, "altered", f"{L1}.mlp.gate", times(f"{L1}.mlp.gate.weight", 1.1)),
    (
        "two norms are exchanged",
        "tied-gptq",
        "altered",
        f"{L0}.input_layernorm",
        swap(f"{L0}.input_layernorm", f"{L0}.post_attention_layernorm"),
    ),
    (
        "a bias is zeroed",
        "tied-nf4",
        "altered",
        f"{V1}.bias",
        stored(f"{V1}.bias", lambda a: a * 0),
    ),
    (
        "the vision tower is noise",
        "vision-compressed-fp8",
        "altered",
        "visual.blocks.1.attn.qkv",
        stored("model.visual.blocks.1.attn.qkv.weight", lambda a: a[::-1]),
    ),
    (
        "the prediction layer is that of another model",
        "deepseek-modelopt-nvfp4",
        "altered",
        "model.layers.2.eh_proj",
        times("model.layers.2.eh_proj.weight", -1.0),
    ),
    (
        "attention that the recipe leaves alone is rounded",
        "llama-modelopt-nvfp4-mlp",
        "altered",
        Q0,
        stored(f"{Q0}.weight", lambda a: a & 0xFFF0),
    ),
)


def _group_of(size: int) -> Callable[..., dict[str, Raw]]:
    return encoder("ct-packed", group=size)


def _fp8_k_proj(copied: Copied) -> None:
    """Declare and store one projection in FP8, in a group of its own."""
    requantize(K1, encoder("ct-fp8"))(copied)
    with edited(copied.directory / "config.json") as document:
        groups = document["quantization_config"]["config_groups"]
        fp8 = {**groups["group_0"]["weights"], "num_bits": 8, "strategy": "channel"}
        fp8 |= {"group_size": None, "scale_dtype": None}
        groups["group_1"] = {"targets": [K1], "weights": fp8, "format": "float-quantized"}
        groups["group_0"]["targets"] = [r"re:.*(?<!1\.self_attn\.k)_proj$"]


def _plain_fused(copied: Copied) -> None:
    source = copied.in_source()
    with copied.tensors() as tensors:
        for name in [name for name in tensors if name.startswith(FUSED)]:
            del tensors[name]
        tensors[FUSED] = source[FUSED]


def _plain_attention(copied: Copied) -> None:
    modules = [Q0, K0, V0, O0, Q1, K1, V1, O1]
    unquantize(*modules)(copied)
    exclude(*(f"{layer}.self_attn*" for layer in (L0, L1)))(copied)


def _prefix_names(tensors: dict[str, Raw]) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


def _undeclared(copied: Copied) -> None:
    config("quantization_config", ...)(copied)
    without(HF_QUANT)(copied)


INTENT = _faults(
    "intent",
    FailureClass.QUANT_COVERAGE_FAILURE,
    (
        "one q_proj is left in 16 bits and excluded",
        MODELOPT,
        "left_unquantized",
        Q1,
        both(unquantize(Q1), exclude(Q1)),
    ),
    (
        "one down_proj is left in 16 bits and ignored",
        COMPRESSED,
        "left_unquantized",
        DOWN0,
        both(unquantize(DOWN0), exclude(DOWN0)),
    ),
    (
        "one o_proj is left in 16 bits and declared quantized",
        "llama-compressed-fp8-dynamic",
        "left_unquantized",
        O0,
        unquantize(O0),
    ),
    ("all attention is left in 16 bits", MODELOPT, "left_unquantized", Q0, _plain_attention),
    (
        "one projection of an expert is left in 16 bits",
        MOE,
        "left_unquantized",
        EXPERT,
        both(unquantize(f"{EXPERT}.down_proj"), exclude(f"{EXPERT}.down_proj")),
    ),
    (
        "the fused experts of one layer are left in 16 bits",
        "fused-moe-modelopt-nvfp4",
        "left_unquantized",
        FUSED,
        both(_plain_fused, exclude(FUSED)),
    ),
    (
        "one linear is left by GPTQ",
        "tied-gptq",
        "left_unquantized",
        UP1,
        unquantize(UP1),
    ),
    (
        "one linear is left by bitsandbytes",
        "tied-nf4",
        "left_unquantized",
        UP1,
        unquantize(UP1),
    ),
    (
        "an exclude pattern is widened over quantized attention",
        MODELOPT,
        "not_declared",
        Q0,
        exclude(f"{L0}.self_attn*"),
    ),
    (
        "an ignore pattern is widened over a quantized layer",
        COMPRESSED,
        "not_declared",
        DOWN1,
        exclude(r"re:.*layers\.1\.mlp.*"),
    ),
    (
        "AWQ's list names what is quantized",
        "tied-awq",
        "not_declared",
        Q0,
        declared("modules_to_not_convert", ["self_attn"]),
    ),
    (
        "a target list leaves out down_proj",
        "llama-compressed-int8",
        "not_declared",
        DOWN0,
        declared("config_groups/group_0/targets", [r"re:.*(q|k|v|o|gate|up)_proj$"]),
    ),
    (
        "the head is quantized and declared",
        COMPRESSED,
        "not_intended",
        "lm_head",
        both(requantize("lm_head", encoder("ct-nvfp4")), include("lm_head")),
    ),
    (
        "the head is quantized and excluded",
        MODELOPT,
        "not_intended",
        "lm_head",
        requantize("lm_head", encoder("modelopt-nvfp4")),
    ),
    (
        "a router is quantized",
        "moe-compressed-w4a16",
        "not_intended",
        f"{L0}.mlp.gate",
        both(requantize(f"{L0}.mlp.gate", encoder("ct-packed")), include(f"{L0}.mlp.gate")),
    ),
    (
        "a linear of the vision tower is quantized",
        "vision-compressed-fp8",
        "not_intended",
        "visual.blocks.0.mlp.linear_fc1",
        both(
            requantize("model.visual.blocks.0.mlp.linear_fc1", encoder("ct-fp8")),
            include("model.visual.blocks.0.mlp.linear_fc1"),
        ),
    ),
    (
        "the prediction layer is quantized",
        "deepseek-modelopt-nvfp4",
        "not_intended",
        "model.layers.2",
        requantize("model.layers.2.mlp.experts.0.up_proj", encoder("modelopt-nvfp4")),
    ),
    (
        "attention is quantized under a recipe for experts only",
        "moe-modelopt-nvfp4-experts",
        "not_intended",
        Q0,
        requantize(Q0, encoder("modelopt-nvfp4")),
    ),
    (
        "one layer is FP8 where NVFP4 is declared",
        MODELOPT,
        "declared_otherwise",
        V0,
        requantize(V0, encoder("modelopt-fp8")),
    ),
    (
        "one k_proj is FP8, stored and declared, between q and v in NVFP4",
        COMPRESSED,
        "mixed_group",
        K1,
        _fp8_k_proj,
    ),
    (
        "a weight is called another 8-bit type",
        "llama-modelopt-fp8",
        "unknown_layout",
        Q0,
        _say(f"{Q0}.weight", dtype="F8_E5M2"),
    ),
    (
        "a weight lies turned",
        MODELOPT,
        "unknown_layout",
        Q0,
        stored(f"{Q0}.weight", lambda a: a.T),
    ),
    (
        "8 bits are declared where 4 are stored",
        "llama-compressed-w4a16",
        "declared_otherwise",
        DOWN0,
        declared("config_groups/group_0/weights/num_bits", 8),
    ),
    (
        "the group size in the configuration is not that of the tensors",
        "llama-compressed-w4a16",
        "wrong_group_size",
        DOWN0,
        declared("config_groups/group_0/weights/group_size", 64),
    ),
    (
        "one layer has another group size",
        "llama-compressed-w4a16",
        "wrong_group_size",
        UP0,
        requantize(UP0, _group_of(64)),
    ),
    (
        "the block size in the configuration is not that of the tensors",
        "llama-block-fp8",
        "unknown_layout",
        DOWN0,
        declared("weight_block_size", [64, 64]),
    ),
    (
        "GPTQ declares another group size than its tensors have",
        "tied-gptq",
        "wrong_group_size",
        "down_proj",
        both(declared("group_size", 64), setting("quantize_config.json", "group_size", 64)),
    ),
    (
        "the two configurations name different algorithms",
        MODELOPT,
        "contradiction",
        HF_QUANT,
        setting(HF_QUANT, "quantization/quant_algo", "FP8"),
    ),
    (
        "the two configurations exclude different modules",
        MODELOPT,
        "contradiction",
        HF_QUANT,
        setting(HF_QUANT, "quantization/exclude_modules", ["lm_head", f"{L0}.mlp*"]),
    ),
    (
        "the two configurations of GPTQ differ in bits",
        "tied-gptq",
        "contradiction",
        "quantize_config.json",
        setting("quantize_config.json", "bits", 8),
    ),
    (
        "the way of storing is that of another precision",
        "llama-compressed-fp8-dynamic",
        "contradiction",
        "int-quantized",
        declared("config_groups/group_0/format", "int-quantized"),
    ),
    (
        "one scale is declared where each row has one",
        "llama-compressed-fp8-dynamic",
        "contradiction",
        "weight_scale",
        declared("config_groups/group_0/weights/strategy", "tensor"),
    ),
    (
        "symmetric weights are declared and there are zero points",
        "llama-compressed-w4a16-zero-points",
        "contradiction",
        "weight_zero_point",
        declared("config_groups/group_0/weights/symmetric", True),
    ),
    (
        "an ignore pattern is no regular expression",
        "llama-compressed-int8",
        "contradiction",
        "re.*[",
        exclude("re:re.*["),
    ),
    (
        "the two configurations declare different caches",
        "llama-modelopt-fp8",
        "contradiction",
        "NVFP4",
        setting(HF_QUANT, "quantization/kv_cache_quant_algo", "NVFP4"),
    ),
    (
        "bitsandbytes declares the other table of numbers",
        "tied-nf4",
        "declared_otherwise",
        "declared FP4",
        declared("bnb_4bit_quant_type", "fp4"),
    ),
    (
        "static inputs are declared and have no scales",
        "llama-compressed-fp8-dynamic",
        "missing_companion",
        DOWN0,
        declared("config_groups/group_0/input_activations/dynamic", False),
    ),
    (
        "every name has a prefix that no loader takes off",
        MODELOPT,
        "lost",
        "model.embed_tokens",
        edit(_prefix_names),
    ),
    (
        "the list of a mixed checkpoint leaves out a layer",
        "llama-modelopt-mixed",
        "not_declared",
        UP1,
        both(
            setting("config.json", f"quantization_config/quantized_layers/{UP1}", ...),
            setting(HF_QUANT, f"quantization/quantized_layers/{UP1}", ...),
        ),
    ),
    (
        "the list of a mixed checkpoint gives a layer another algorithm",
        "llama-modelopt-mixed",
        "declared_otherwise",
        UP1,
        both(
            setting("config.json", f"quantization_config/quantized_layers/{UP1}/quant_algo", "FP8"),
            setting(HF_QUANT, f"quantization/quantized_layers/{UP1}/quant_algo", "FP8"),
        ),
    ),
    ("the quantization is declared nowhere", MODELOPT, "not_declared", DOWN0, _undeclared),
    (
        "the loader of gpt-oss is told to leave the experts alone",
        "gpt-oss-mxfp4",
        "not_declared",
        "experts.gate_up_proj",
        declared("modules_to_not_convert", ["model.layers.*.mlp.experts", "lm_head"]),
    ),
)

UNKNOWN = _faults(
    "intent",
    FailureClass.MODEL_UNSUPPORTED,
    (
        "a method that this gate cannot read",
        "tied-awq",
        "unknown_format",
        "hqq",
        declared("quant_method", "hqq"),
    ),
    (
        "an algorithm that this gate cannot read",
        "llama-modelopt-fp8",
        "unknown_format",
        "FP7_SPECIAL",
        both(
            declared("quant_algo", "FP7_SPECIAL"),
            setting(HF_QUANT, "quantization/quant_algo", "FP7_SPECIAL"),
        ),
    ),
    (
        "a packing of AWQ that this gate cannot read",
        "tied-awq",
        "unknown_format",
        "gemv",
        declared("version", "gemv_fast"),
    ),
)


def _keep_originals(copied: Copied) -> None:
    source = copied.in_source()
    with copied.tensors() as tensors:
        packed = [name for name in tensors if name.endswith(".weight_packed")]
        for name in packed:
            plain = name.removesuffix("_packed")
            tensors[plain] = source[plain]


def _store_twice(copied: Copied) -> None:
    with copied.tensors() as tensors:
        for name in [name for name in tensors if "_proj" in name]:
            tensors[f"original.{name}"] = tensors[name]


SIZE = (
    *_faults(
        "size",
        FailureClass.SIZE_NOT_REDUCED,
        (
            "the original weights are kept beside the packed ones",
            COMPRESSED,
            "left_beside",
            "mlp.down_proj.weight",
            _keep_originals,
        ),
        (
            "every quantized tensor is stored twice",
            "llama-compressed-fp8-dynamic",
            "size",
            "source",
            _store_twice,
        ),
    ),
    *_faults(
        "size",
        FailureClass.QUANT_COVERAGE_FAILURE,
        (
            "half of the experts are gone",
            MOE,
            "expected_size",
            "missing",
            drop(r".*\.experts\.[4-7]\..*"),
        ),
    ),
)

NAN_E4M3, NAN_E8M0 = 0x7F, 0xFF


def _swap_nibbles(array: np.ndarray) -> np.ndarray:
    return (array >> 4) | (array << 4)


def _transpose(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T).reshape(array.shape)


def _lower_zero_points(array: np.ndarray) -> np.ndarray:
    """Take one from each 4-bit number, as if the first version's offset were stored."""
    nibbles = [((array.view(np.uint32) >> shift) - 1 & 0xF) << shift for shift in range(0, 32, 4)]
    return np.bitwise_or.reduce(nibbles).astype(np.uint32).view(np.int32)


def _in_order(array: np.ndarray) -> np.ndarray:
    """Pack AWQ's numbers in the order of the rows, as other formats do."""
    words = array.view(np.uint32)
    placed = [
        ((words >> np.uint32(4 * place)) & 0xF) << np.uint32(4 * row)
        for place, row in enumerate(AWQ_PLACES)
    ]
    return np.bitwise_or.reduce(placed).view(np.int32)


def _as_signed(array: np.ndarray) -> np.ndarray:
    return (array.view(np.uint32) ^ np.uint32(0x88888888)).view(np.int32)


def _halve_blocks(array: np.ndarray) -> np.ndarray:
    text = bytes(array).replace(b'"blocksize": 64', b'"blocksize": 32')
    return np.frombuffer(text, np.uint8)


def _split_gate_up(array: np.ndarray) -> np.ndarray:
    """Put all gate rows before all up rows, where the format interleaves them."""
    return np.concatenate([array[:, 0::2], array[:, 1::2]], axis=1)


NUMBERS = _faults(
    "numbers",
    FailureClass.QUANT_COVERAGE_FAILURE,
    (
        "a block scale is NaN",
        MODELOPT,
        "non_finite_scale",
        Q0,
        element(f"{Q0}.weight_scale", NAN_E4M3, at=33),
    ),
    (
        "a block scale is NaN with its sign bit set",
        COMPRESSED,
        "non_finite_scale",
        DOWN1,
        element(f"{DOWN1}.weight_scale", 0xFF, at=-1),
    ),
    (
        "an expert's block scale is NaN",
        MOE,
        "non_finite_scale",
        EXPERT,
        element(f"{EXPERT}.gate_proj.weight_scale", NAN_E4M3, at=500),
    ),
    (
        "a block scale of fused experts is NaN",
        "fused-moe-modelopt-nvfp4",
        "non_finite_scale",
        FUSED,
        element(f"{FUSED}_weight_scale", NAN_E4M3, at=4000),
    ),
    (
        "a power-of-two scale is NaN",
        "llama-compressed-mxfp4",
        "non_finite_scale",
        K0,
        element(f"{K0}.weight_scale", NAN_E8M0, at=77),
    ),
    (
        "a scale of gpt-oss is NaN",
        "gpt-oss-mxfp4",
        "non_finite_scale",
        "experts.down_proj",
        element(f"{L1}.mlp.experts.down_proj_scales", NAN_E8M0, at=300),
    ),
    (
        "a scale of a tensor is infinite",
        "llama-modelopt-fp8",
        "non_finite_scale",
        O1,
        stored(f"{O1}.weight_scale", lambda a: a * np.inf),
    ),
    (
        "a scale of a row is NaN",
        "llama-compressed-int8",
        "non_finite_scale",
        UP0,
        element(f"{UP0}.weight_scale", 0x7FC0, at=9),
    ),
    (
        "a global scale is NaN",
        MODELOPT,
        "non_finite_scale",
        GATE0,
        stored(f"{GATE0}.weight_scale_2", lambda a: a * np.nan),
    ),
    (
        "an input scale is NaN",
        MOE,
        "non_finite_scale",
        EXPERT,
        stored(f"{EXPERT}.up_proj.input_scale", lambda a: a * np.nan),
    ),
    (
        "a cache scale is NaN",
        "llama-modelopt-fp8",
        "non_finite_scale",
        "k_scale",
        stored(f"{K1}.k_scale", lambda a: a * np.nan),
    ),
    (
        "an inverse block scale is infinite",
        "deepseek-block-fp8",
        "non_finite_scale",
        "kv_b_proj",
        element(f"{L0}.self_attn.kv_b_proj.weight_scale_inv", np.inf),
    ),
    (
        "a smoothing factor is NaN",
        "llama-modelopt-int4-awq",
        "non_finite_scale",
        DOWN0,
        element(f"{DOWN0}.pre_quant_scale", 0x7FC0, at=5),
    ),
    (
        "a scale of AWQ is infinite",
        "tied-awq",
        "non_finite_scale",
        V0,
        element(f"{V0}.scales", np.inf, at=3),
    ),
    (
        "a largest magnitude of bitsandbytes is NaN",
        "tied-nf4",
        "non_finite_scale",
        Q1,
        element(f"{Q1}.weight.absmax", np.nan, at=3),
    ),
    (
        "a scale of a tensor is zero",
        "llama-modelopt-fp8",
        "zero_scale",
        Q0,
        stored(f"{Q0}.weight_scale", lambda a: a * 0),
    ),
    (
        "the block scales of a row are zero",
        MODELOPT,
        "zero_scale",
        Q0,
        stored(f"{Q0}.weight_scale", lambda a: a[5].fill(0)),
    ),
    (
        "an input scale is zero",
        MODELOPT,
        "zero_scale",
        DOWN1,
        stored(f"{DOWN1}.input_scale", lambda a: a * 0),
    ),
    (
        "a scale of a row is negative",
        "llama-modelopt-int8",
        "negative_scale",
        K0,
        stored(f"{K0}.weight_scale", lambda a: a.__setitem__(4, -a[4])),
    ),
    (
        "a block scale is negative",
        COMPRESSED,
        "negative_scale",
        K0,
        stored(f"{K0}.weight_scale", lambda a: a.__setitem__((4, 4), a[4, 4] | 0x80)),
    ),
    (
        "an input scale is negative",
        "llama-compressed-fp8-static",
        "negative_scale",
        K0,
        times(f"{K0}.input_scale", -1.0),
    ),
    (
        "the global scale of a layer is missing",
        MODELOPT,
        "missing_companion",
        GATE0,
        drop(re.escape(GATE0) + r"\.weight_scale_2"),
    ),
    (
        "the block scales of a layer are missing",
        COMPRESSED,
        "missing_companion",
        GATE0,
        drop(re.escape(GATE0) + r"\.weight_scale"),
    ),
    (
        "one expert has no input scale",
        MOE,
        "missing_companion",
        EXPERT,
        drop(re.escape(EXPERT) + r"\.up_proj\.input_scale"),
    ),
    (
        "static inputs have no scale anywhere",
        "llama-modelopt-fp8",
        "missing_companion",
        DOWN0,
        drop(r".*\.input_scale"),
    ),
    (
        "inverse block scales are missing",
        "llama-block-fp8",
        "missing_companion",
        O0,
        drop(re.escape(O0) + r".*_inv"),
    ),
    (
        "the zero points of AWQ are missing",
        "tied-awq",
        "missing_companion",
        O0,
        drop(re.escape(O0) + r"\.qzeros"),
    ),
    (
        "the largest magnitudes of bitsandbytes are missing",
        "tied-nf4",
        "missing_companion",
        O0,
        drop(re.escape(O0) + r"\.weight\.absmax"),
    ),
    (
        "a layer's cache has no scale for values",
        "llama-modelopt-fp8",
        "missing_companion",
        f"{L1}.self_attn (without v_scale)",
        drop(re.escape(V1) + r"\.v_scale"),
    ),
    (
        "reordered columns of GPTQ have no groups",
        "llama-gptq-reordered",
        "missing_companion",
        Q0,
        drop(re.escape(Q0) + r"\.g_idx"),
    ),
    (
        "a column of GPTQ belongs to a group that there is not",
        "llama-gptq-reordered",
        "not_decodable",
        DOWN0,
        element(f"{DOWN0}.g_idx", 5),
    ),
    (
        "the size of blocks of bitsandbytes is not that of its scales",
        "tied-nf4",
        "not_decodable",
        Q0,
        stored(f"{Q0}.weight.quant_state.bitsandbytes__nf4", _halve_blocks),
    ),
    (
        "the stored shape is not that of the packed weight",
        "llama-compressed-w4a16",
        "not_decodable",
        f"{Q0}.weight_shape",
        stored(f"{Q0}.weight_shape", lambda a: a // 2),
    ),
    (
        "zero points of GPTQ are read as another version's",
        "tied-gptq",
        "sqnr_shortfall_db",
        "self_attn",
        both(
            declared("checkpoint_format", "gptq_v2"),
            setting("quantize_config.json", "checkpoint_format", "gptq_v2"),
        ),
    ),
    (
        "an input scale is beyond all activations",
        "llama-modelopt-fp8",
        "implausible_scale",
        f"{Q0}.input_scale",
        times(f"{Q0}.input_scale", 1e30),
    ),
    (
        "the scales of gate_proj and up_proj are swapped",
        "llama-compressed-w4a16",
        "gain_scatter",
        f"{L0}.mlp.gate_proj",
        swap(f"{L0}.mlp.gate_proj.weight_scale", f"{L0}.mlp.up_proj.weight_scale"),
    ),
    (
        "one scale of a row is four times too large",
        "llama-compressed-fp8-dynamic",
        "sqnr_shortfall_db",
        Q0,
        stored(f"{Q0}.weight_scale", lambda a: a.__setitem__(3, a[3] + (2 << 7))),
    ),
    (
        "scales of scales are eight times too large",
        "tied-nf4-nested",
        "gain_error_percent",
        Q0,
        times(f"{Q0}.weight.nested_absmax", 8.0),
    ),
    (
        "the table of bitsandbytes is upside down",
        "tied-nf4",
        "sqnr_shortfall_db",
        Q0,
        stored(f"{Q0}.weight.quant_map", lambda a: a[::-1]),
    ),
    (
        "the scales of gpt-oss are moved by one block",
        "gpt-oss-mxfp4",
        "sqnr_shortfall_db",
        "experts.down_proj (expert 3)",
        stored(f"{L1}.mlp.experts.down_proj_scales", lambda a: np.roll(a, 1, axis=2)),
    ),
    (
        "a norm is halved and its readers are not rescaled",
        COMPRESSED,
        "altered",
        f"{L0}.input_layernorm",
        times(f"{L0}.input_layernorm.weight", 0.5),
    ),
    (
        "the scales of gpt-oss are missing",
        "gpt-oss-mxfp4",
        "missing_companion",
        "experts.down_proj",
        drop(r".*\.1\..*\.down_proj_scales"),
    ),
    (
        "one expert keeps the input scale that calibration starts with",
        MOE,
        "neutral_input_scale",
        EXPERT,
        stored(f"{EXPERT}.down_proj.input_scale", lambda a: a * 0 + 1),
    ),
    (
        "an expert that no token reached has an input scale far from the others",
        MOE,
        "expert_scale_octaves",
        EXPERT,
        times(f"{EXPERT}.down_proj.input_scale", 2.0**-12),
    ),
    (
        "a weight holds NaN",
        "llama-modelopt-fp8",
        "non_finite_weight",
        V1,
        element(f"{V1}.weight", NAN_E4M3, at=999),
    ),
    (
        "a norm that is kept holds NaN",
        MODELOPT,
        "non_finite_weight",
        f"{L1}.input_layernorm",
        element(f"{L1}.input_layernorm.weight", 0x7FC0, at=11),
    ),
    (
        "the embeddings hold an infinity",
        COMPRESSED,
        "non_finite_weight",
        "embed_tokens",
        element("model.embed_tokens.weight", 0x7F80, at=12345),
    ),
    (
        "a weight is zero throughout",
        MODELOPT,
        "zero_weight",
        UP1,
        stored(f"{UP1}.weight", lambda a: a * 0),
    ),
    (
        "an expert is zero throughout",
        "moe-compressed-w4a16",
        "zero_weight",
        EXPERT,
        stored(f"{EXPERT}.up_proj.weight_packed", lambda a: np.full_like(a, -0x77777778)),
    ),
    (
        "a weight is constant",
        "llama-compressed-int8",
        "constant_weight",
        UP1,
        stored(f"{UP1}.weight", lambda a: a * 0 + 3),
    ),
    (
        "two experts' block scales are exchanged",
        MOE,
        "sqnr_shortfall_db",
        EXPERT,
        swap(f"{EXPERT}.up_proj.weight_scale", f"{L1}.mlp.experts.5.up_proj.weight_scale"),
    ),
    (
        "two experts' weights are exchanged",
        "moe-compressed-nvfp4a16",
        "sqnr_shortfall_db",
        EXPERT,
        swap(f"{EXPERT}.down_proj", f"{L1}.mlp.experts.5.down_proj"),
    ),
    (
        "two fused experts' scales are exchanged",
        "fused-moe-modelopt-nvfp4",
        "sqnr_shortfall_db",
        FUSED,
        stored(f"{FUSED}_weight_scale", lambda a: a[[1, 0, 2, 3]]),
    ),
    (
        "an expert's up_proj is another's, where the source's experts are stacked",
        "stacked-moe-modelopt-nvfp4",
        "sqnr_shortfall_db",
        f"{L1}.mlp.experts.3.up_proj",
        copy_parts(f"{L1}.mlp.experts.3.up_proj", f"{L1}.mlp.experts.2.up_proj"),
    ),
    (
        "an expert's gate_proj is another's, where the source's experts are fused",
        "fused-moe-compressed-fp8",
        "sqnr_shortfall_db",
        f"{L1}.feed_forward.experts.3.gate_proj",
        copy_parts(
            f"{L1}.feed_forward.experts.3.gate_proj", f"{L1}.feed_forward.experts.2.gate_proj"
        ),
    ),
    (
        "an expert's up_proj is another's, where the source's experts are fused",
        "fused-moe-compressed-fp8",
        "sqnr_shortfall_db",
        f"{L1}.feed_forward.experts.3.up_proj",
        copy_parts(f"{L1}.feed_forward.experts.3.up_proj", f"{L1}.feed_forward.experts.2.up_proj"),
    ),
    (
        "k_proj and v_proj are exchanged",
        "llama-block-fp8",
        "sqnr_shortfall_db",
        K0,
        swap(K0, V0),
    ),
    (
        "gate_proj and up_proj are exchanged",
        "llama-compressed-fp8-block",
        "sqnr_shortfall_db",
        GATE1,
        swap(GATE1, UP1),
    ),
    (
        "a weight is that of another layer",
        MODELOPT,
        "sqnr_shortfall_db",
        O1,
        copy_parts(O1, O0),
    ),
    (
        "the block scales are those of another layer",
        MODELOPT,
        "sqnr_shortfall_db",
        O1,
        copy_parts(O1, O0, "weight_scale"),
    ),
    (
        "rows are permuted",
        "llama-compressed-w4a16",
        "sqnr_shortfall_db",
        Q1,
        both(
            stored(f"{Q1}.weight_packed", lambda a: np.roll(a, 64, axis=0)),
            stored(f"{Q1}.weight_scale", lambda a: np.roll(a, 64, axis=0)),
        ),
    ),
    (
        "nibbles are exchanged",
        MODELOPT,
        "sqnr_shortfall_db",
        GATE1,
        stored(f"{GATE1}.weight", _swap_nibbles),
    ),
    (
        "nibbles of packed weights are exchanged",
        "llama-compressed-mxfp4",
        "sqnr_shortfall_db",
        GATE1,
        stored(f"{GATE1}.weight_packed", _swap_nibbles),
    ),
    (
        "nibbles of bitsandbytes are exchanged",
        "tied-nf4",
        "sqnr_shortfall_db",
        GATE1,
        stored(f"{GATE1}.weight", _swap_nibbles),
    ),
    (
        "block scales are transposed",
        MODELOPT,
        "sqnr_shortfall_db",
        Q0,
        stored(f"{Q0}.weight_scale", _transpose),
    ),
    (
        "scales of square blocks are transposed",
        "llama-block-fp8",
        "sqnr_shortfall_db",
        Q0,
        stored(f"{Q0}.weight_scale_inv", lambda a: a[::-1, ::-1].T * [[1, 3], [0.3, 1]]),
    ),
    (
        "a global scale is inverted",
        MODELOPT,
        "gain_error_percent",
        V0,
        invert(f"{V0}.weight_scale_2"),
    ),
    (
        "a global scale that divides is inverted",
        COMPRESSED,
        "gain_error_percent",
        V0,
        invert(f"{V0}.weight_global_scale"),
    ),
    (
        "an inverse scale is stored as it is",
        "deepseek-block-fp8",
        "gain_error_percent",
        "q_a_proj",
        invert(f"{L0}.self_attn.q_a_proj.weight_scale_inv"),
    ),
    (
        "a scale is twice what it should be",
        "llama-modelopt-fp8",
        "gain_error_percent",
        UP0,
        times(f"{UP0}.weight_scale", 2.0),
    ),
    (
        "scales of rows are a tenth too large",
        "llama-compressed-fp8-dynamic",
        "gain_error_percent",
        UP0,
        times(f"{UP0}.weight_scale", 1.1),
    ),
    (
        "powers of two are one too high",
        "llama-compressed-mxfp4",
        "gain_error_percent",
        O1,
        stored(f"{O1}.weight_scale", lambda a: a + 1),
    ),
    (
        "largest magnitudes of bitsandbytes are off",
        "tied-nf4",
        "gain_error_percent",
        O1,
        times(f"{O1}.weight.absmax", 64.0),
    ),
    (
        "largest magnitudes of rows are in units of 127",
        "tied-llm-int8",
        "gain_error_percent",
        O1,
        times(f"{O1}.SCB", 1 / 127),
    ),
    (
        "zero points of GPTQ are off by one",
        "tied-gptq",
        "sqnr_shortfall_db",
        Q0,
        stored(f"{Q0}.qzeros", _lower_zero_points),
    ),
    (
        "columns of GPTQ belong to other groups",
        "tied-gptq",
        "sqnr_shortfall_db",
        "down_proj",
        stored(f"{DOWN0}.g_idx", lambda a: a[::-1]),
    ),
    (
        "AWQ's numbers lie in the order of the rows",
        "tied-awq",
        "sqnr_shortfall_db",
        Q0,
        stored(f"{Q0}.qweight", _in_order),
    ),
    (
        "packed integers are signed",
        "llama-compressed-w4a16",
        "sqnr_shortfall_db",
        K1,
        stored(f"{K1}.weight_packed", _as_signed),
    ),
    (
        "zero points are lost",
        "llama-compressed-w4a16-zero-points",
        "sqnr_shortfall_db",
        K1,
        drop(re.escape(K1) + r"\.weight_zero_point"),
    ),
    (
        "gate and up of gpt-oss are not interleaved",
        "gpt-oss-mxfp4",
        "sqnr_shortfall_db",
        "experts.gate_up_proj",
        both(
            stored(f"{L0}.mlp.experts.gate_up_proj_blocks", _split_gate_up),
            stored(f"{L0}.mlp.experts.gate_up_proj_scales", _split_gate_up),
        ),
    ),
    (
        "smoothing factors are lost",
        "llama-modelopt-int4-awq",
        "sqnr_shortfall_db",
        O0,
        drop(re.escape(O0) + r"\.pre_quant_scale"),
    ),
    (
        "half of the blocks are those of another row",
        MODELOPT,
        "sqnr_shortfall_db",
        DOWN0,
        stored(f"{DOWN0}.weight", lambda a: np.concatenate([a[:128], a[:128]])),
    ),
)


GENERATION, TOKENIZER = "generation_config.json", "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


def _exchange_words(copied: Copied) -> None:
    with edited(copied.directory / TOKENIZER) as document:
        vocabulary = document["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def _lose_added_token(copied: Copied) -> None:
    with edited(copied.directory / TOKENIZER) as document:
        document["added_tokens"] = [t for t in document["added_tokens"] if t["id"] != 3]


def _add_first_token(copied: Copied) -> None:
    token = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    with edited(copied.directory / TOKENIZER) as document:
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": each, "type_id": 0}} for each in "AB"],
            "special_tokens": {"<|endoftext|>": token},
        }


def _lose_merges(copied: Copied) -> None:
    with edited(copied.directory / TOKENIZER) as document:
        document["model"]["merges"] = document["model"]["merges"][:10]


def _move_template(change: Callable[[str], str]) -> Change:
    """Move the template into a file of its own, and change it on the way."""

    def move(copied: Copied) -> None:
        with edited(copied.directory / TOKENIZER_CONFIG) as document:
            text = change(document.pop("chat_template"))
        (copied.directory / "chat_template.jinja").write_text(text, encoding="utf-8")

    return move


METADATA = _faults(
    "metadata",
    FailureClass.QUANT_COVERAGE_FAILURE,
    (
        "the end token is another one in config.json",
        MODELOPT,
        "metadata",
        "eos",
        config("eos_token_id", 0),
    ),
    (
        "the end token is another one for generation",
        MODELOPT,
        "metadata",
        "eos",
        setting(GENERATION, "eos_token_id", 0),
    ),
    (
        "one of two end tokens for generation is lost",
        COMPRESSED,
        "metadata",
        "eos",
        setting(GENERATION, "eos_token_id", [0]),
    ),
    (
        "the end token is another one in the tokenizer's configuration",
        MODELOPT,
        "metadata",
        "eos_token",
        setting(TOKENIZER_CONFIG, "eos_token", "<|endoftext|>"),
    ),
    (
        "the padding token is the end token",
        "tied-awq",
        "metadata",
        "pad_token",
        setting(TOKENIZER_CONFIG, "pad_token", "<|im_end|>"),
    ),
    (
        "the end token has another number in tokenizer.json",
        MODELOPT,
        "metadata",
        "<|im_end|>",
        setting(TOKENIZER, "added_tokens/2/content", "<|im_fin|>"),
    ),
    (
        "a chat template is moved and altered",
        "tied-awq",
        "metadata",
        "template",
        _move_template(lambda t: t.replace("'<|im_start|>assistant\\n'", "'<|im_start|>model\\n'")),
    ),
    (
        "a newline of the chat template is lost",
        MODELOPT,
        "metadata",
        "template",
        template(lambda t: t.replace("'<|im_end|>\\n' }}\n{%- elif", "'<|im_end|>' }}\n{%- elif")),
    ),
    ("the chat template is lost", MODELOPT, "metadata", "template", without("chat_template.jinja")),
    (
        "the chat template is that of another family",
        MODELOPT,
        "metadata",
        "template",
        template(lambda _: "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"),
    ),
    (
        "the chat template does not show tools",
        COMPRESSED,
        "metadata",
        "template",
        template(lambda t: t.replace("tool | tojson", "tool.name")),
    ),
    (
        "the chat template leaves out the reasoning",
        COMPRESSED,
        "metadata",
        "template",
        template(lambda t: t.replace("reasoning_content", "thought")),
    ),
    (
        "the chat template does not open the answer",
        "tied-gptq",
        "metadata",
        "template",
        template(lambda t: t[: t.index("{%- if add_generation_prompt")]),
    ),
    (
        "the chat template is no template",
        MODELOPT,
        "metadata",
        "template",
        template(lambda t: t.replace("{%- endfor %}", "", 1)),
    ),
    (
        "the rotary base is another one",
        MODELOPT,
        "metadata",
        "rope_theta",
        config("rope_parameters/rope_theta", 10000.0),
    ),
    (
        "the rotary scaling is lost",
        MODELOPT,
        "metadata",
        "factor",
        config("rope_parameters/factor", ...),
    ),
    (
        "the rotary scaling of an older file is lost",
        "llama-block-fp8",
        "metadata",
        "rope",
        config("rope_scaling", None),
    ),
    (
        "the longest context is another one",
        MODELOPT,
        "metadata",
        "max_position_embeddings",
        config("max_position_embeddings", 2048),
    ),
    (
        "the head is called tied and is not",
        MODELOPT,
        "metadata",
        "tie_word_embeddings",
        config("tie_word_embeddings", True),
    ),
    (
        "the head is called untied and is not stored",
        "tied-modelopt-fp8",
        "metadata",
        "tie_word_embeddings",
        config("tie_word_embeddings", False),
    ),
    ("the type is another one", MODELOPT, "metadata", "dtype", config("dtype", "float16")),
    (
        "the architecture is another one",
        MODELOPT,
        "metadata",
        "architectures",
        config("architectures", ["MistralForCausalLM"]),
    ),
    ("a layer too many", MODELOPT, "metadata", "num_hidden_layers", config("num_hidden_layers", 3)),
    (
        "the heads are counted otherwise",
        "tied-gptq",
        "metadata",
        "num_key_value_heads",
        config("num_key_value_heads", 4),
    ),
    ("norms are less exact", MODELOPT, "metadata", "rms_norm_eps", config("rms_norm_eps", 1e-05)),
    (
        "fewer experts answer",
        MOE,
        "metadata",
        "num_experts_per_tok",
        config("num_experts_per_tok", 1),
    ),
    (
        "experts' answers are weighted otherwise",
        "deepseek-block-fp8",
        "metadata",
        "routed_scaling_factor",
        config("routed_scaling_factor", 1.0),
    ),
    (
        "the attention window is another one",
        "gpt-oss-mxfp4",
        "metadata",
        "sliding_window",
        config("sliding_window", 64),
    ),
    (
        "the text model's heads are counted otherwise",
        "vision-compressed-fp8",
        "metadata",
        "num_attention_heads",
        config("text_config/num_attention_heads", 2),
    ),
    (
        "the vision tower's patches are larger",
        "vision-modelopt-nvfp4",
        "metadata",
        "patch_size",
        config("vision_config/patch_size", 14),
    ),
    (
        "two entries of the vocabulary are exchanged",
        MODELOPT,
        "metadata",
        "tokeniz",
        _exchange_words,
    ),
    ("an added token is lost", COMPRESSED, "metadata", "<think>", _lose_added_token),
    ("merges are lost", "tied-awq", "metadata", "tokeniz", _lose_merges),
    (
        "the tokenizer lowers case",
        MODELOPT,
        "metadata",
        "tokeniz",
        setting(TOKENIZER, "normalizer", {"type": "Lowercase"}),
    ),
    (
        "the tokenizer puts a space first",
        MODELOPT,
        "metadata",
        "tokeniz",
        setting(TOKENIZER, "pre_tokenizer/add_prefix_space", True),
    ),
    (
        "a special token is none any more",
        MODELOPT,
        "metadata",
        "<|im_start|>",
        setting(TOKENIZER, "added_tokens/1/special", False),
    ),
    (
        "the tokenizer adds a token first",
        COMPRESSED,
        "metadata",
        "tokeniz",
        _add_first_token,
    ),
    (
        "the prediction layer is not announced",
        "deepseek-modelopt-nvfp4",
        "metadata",
        "num_nextn_predict_layers",
        config("num_nextn_predict_layers", 0),
    ),
    ("the tokenizer is lost", MODELOPT, "metadata", TOKENIZER, without(TOKENIZER)),
    (
        "a default of generation is another one",
        MODELOPT,
        "metadata",
        "temperature",
        setting(GENERATION, "temperature", 1.0),
    ),
    (
        "generation is greedy by default",
        COMPRESSED,
        "metadata",
        "do_sample",
        setting(GENERATION, "do_sample", False),
    ),
    ("the defaults of generation are lost", MODELOPT, "metadata", GENERATION, without(GENERATION)),
    (
        "the preprocessor of images is lost",
        "vision-compressed-fp8",
        "metadata",
        "preprocessor_config.json",
        without("preprocessor_config.json"),
    ),
    (
        "the configuration names code to load",
        MODELOPT,
        "metadata",
        "auto_map",
        config("auto_map", {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}),
    ),
    (
        "code is added",
        MODELOPT,
        "metadata",
        "modeling_llama.py",
        added("modeling_llama.py", "import os\n"),
    ),
)

_BLACKWELL = ("--engine", "vllm", "--device", "cuda", "--compute-capability", "10.0")


def _unservable(name: str, base: str, named: str, change: Change, *options: str) -> Fault:
    return Fault(
        name=name,
        base=base,
        finding="not_loadable",
        named=named,
        change=change,
        check="servability",
        failure_class=FailureClass.CHECKPOINT_NOT_SERVABLE,
        options=options,
    )


SERVABILITY = (
    _unservable(
        "an excluded name is part of others, and vLLM takes it for those",
        MODELOPT,
        K0,
        exclude(f"{L0}.self_attn.q"),
        *_BLACKWELL,
    ),
    _unservable(
        "vLLM on a CPU is to serve NVFP4",
        MODELOPT,
        "NVFP4",
        as_it_is,
        *("--engine", "vllm", "--device", "cpu"),
    ),
    _unservable(
        "vLLM is to serve an algorithm that its ModelOpt loader does not take",
        "llama-modelopt-int8",
        "W8A8_SQ_PER_CHANNEL",
        as_it_is,
        *_BLACKWELL,
    ),
    _unservable(
        "transformers is to serve what it would answer garbage from",
        "llama-modelopt-fp8",
        "drops the scales",
        as_it_is,
        *("--engine", "transformers", "--device", "cpu"),
    ),
    _unservable(
        "four heads are to be split over three ranks",
        "llama-compressed-int8",
        "not divisible by 3 ranks",
        as_it_is,
        *("--engine", "vllm", "--device", "cpu", "--tensor-parallel", "3"),
    ),
)

FAULTS = (*INTEGRITY, *COMPLETENESS, *INTENT, *UNKNOWN, *SIZE, *NUMBERS, *METADATA, *SERVABILITY)

_CHECKS = {
    "integrity": "Integrity",
    "completeness": "Completeness against the source",
    "intent": "Coverage: meant, declared and so",
    "size": "Size",
    "numbers": "Numbers",
    "metadata": "Metadata by meaning",
    "servability": "Servability",
}


def corpus_page() -> str:
    """Return the page of both tables."""
    return page("Fault corpus", _parts())


def _parts() -> Iterator[str]:
    yield (
        "What `gate_ptq` is tried on, on every change: small models with real numbers, exported in "
        "every format as its quantizer writes it. Every clean export passes; every fault is one "
        "minimal change to a clean export, is refused with the failure class below, and the "
        "verdict's detail names what was changed."
    )
    yield f"## {len(EXPORTS)} clean exports"
    yield table(
        ["export", "source", "recipe", "format"],
        [
            [f"`{name}`", export.source, f"`{export.recipe}`", export.format]
            for name, export in EXPORTS.items()
        ],
    )
    yield f"## {len(FAULTS)} faults"
    for check, title in _CHECKS.items():
        rows = [fault for fault in FAULTS if fault.check == check]
        yield f"### {title}: {len(rows)}"
        yield table(
            ["fault", "in", "failure class", "named in the detail"],
            [
                [fault.name, f"`{fault.base}`", f"`{fault.failure_class}`", f"`{fault.named}`"]
                for fault in rows
            ],
        )


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), corpus_page())
