"""Metadata by meaning: one change each on faithful stand-ins, and rewrites that change nothing.

``data/metadata`` holds stand-ins of four families with small vocabularies, and beside each the same
checkpoint as transformers 5 writes it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.probes import guarded
from conductor.probes.metadata import chat_templates, metadata_diffs
from conductor.probes.metadata.model_config import config_diffs
from conductor.probes.reading import ProbeError

DATA = Path(__file__).parent / "data" / "metadata"
FAMILIES = ("llama3", "qwen3", "gpt_oss", "deepseek")

Change = Callable[[Path], object]


def diffs_after(tmp_path: Path, family: str, *changes: Change) -> list[str]:
    candidate = tmp_path / "candidate"
    shutil.copytree(DATA / family, candidate)
    for change in changes:
        change(candidate)
    return compare(DATA / family, candidate)


def compare(source: Path, candidate: Path) -> list[str]:
    configs = [json.loads((side / "config.json").read_bytes()) for side in (source, candidate)]
    return metadata_diffs(source, candidate, *configs)


def edit(name: str, change: Callable[[Any], object]) -> Change:
    def apply(directory: Path) -> None:
        path = directory / name
        document = json.loads(path.read_bytes()) if path.exists() else {}
        change(document)
        path.write_text(json.dumps(document), encoding="utf-8")

    return apply


def put(name: str, **fields: Any) -> Change:
    return edit(name, lambda document: document.update(fields))


def drop(name: str, *fields: str) -> Change:
    return edit(name, lambda document: [document.pop(field) for field in fields])


def config(**fields: Any) -> Change:
    return put("config.json", **fields)


def generation(**fields: Any) -> Change:
    return put("generation_config.json", **fields)


def tokenizer(**fields: Any) -> Change:
    return put("tokenizer_config.json", **fields)


def template(old: str, new: str) -> Change:
    def swap(document: dict[str, Any]) -> None:
        assert old in document["chat_template"]
        document["chat_template"] = document["chat_template"].replace(old, new)

    return edit("tokenizer_config.json", swap)


def move_template(directory: Path, change: Callable[[str], str] = str) -> None:
    path = directory / "tokenizer_config.json"
    document = json.loads(path.read_bytes())
    (directory / "chat_template.jinja").write_text(
        change(document.pop("chat_template")), encoding="utf-8"
    )
    path.write_text(json.dumps(document))


def remove(name: str) -> Change:
    return lambda directory: (directory / name).unlink()


def write(name: str, text: str) -> Change:
    def apply(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")

    return apply


def fast(change: Callable[[Any], object]) -> Change:
    return edit("tokenizer.json", change)


def swap_ids(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    vocabulary["Ģ"], vocabulary["ģ"] = vocabulary["ģ"], vocabulary["Ģ"]


def copied_fields(name: str) -> Any:
    return json.loads((DATA / name).read_bytes())


TOKENS = "llama3/tokenizer.json"

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

CHANGED: dict[str, tuple[str, Change, str]] = {
    "architecture": ("llama3", config(architectures=["X"]), "config.json architectures: "),
    "layers": ("llama3", config(num_hidden_layers=31), "num_hidden_layers: 32 in the source, 31"),
    "unheard-of": ("gpt_oss", config(swiglu_limit=8.0), "config.json swiglu_limit: 7.0"),
    "field-gone": ("deepseek", drop("config.json", "v_head_dim"), "v_head_dim: 128 in the source"),
    "false-is-not-0": ("llama3", config(attention_bias=0), "config.json attention_bias: false"),
    "positions": (
        "llama3",
        config(max_position_embeddings=8192),
        "max_position_embeddings: 131072 in the source, 8192 in the candidate",
    ),
    "rope-theta": ("llama3", config(rope_theta=10000.0), "rope rope_theta: 500000.0"),
    "rope-gone": ("llama3", config(rope_scaling=None), 'rope rope_type: "llama3"'),
    "rope-added": ("qwen3", config(rope_scaling=YARN), 'rope rope_type: "default"'),
    "rope-two-thetas": (
        "llama3",
        config(rope_parameters={"rope_theta": 10000.0}),
        "rope rope_theta",
    ),
    "rope-rotates-less": ("qwen3", config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "tied": ("llama3", config(tie_word_embeddings=True), "tie_word_embeddings: false"),
    "tied-unsaid": ("llama3", drop("config.json", "tie_word_embeddings"), "tie_word_embeddings"),
    "dtype": (
        "llama3",
        config(torch_dtype="float16"),
        'dtype: "bfloat16" in the source, "float16"',
    ),
    "experts": ("qwen3", config(num_experts_per_tok=4), "num_experts_per_tok: 8"),
    "shared-experts": ("deepseek", config(n_shared_experts=0), "n_shared_experts: 1"),
    "dense-layers": ("deepseek", config(first_k_dense_replace=0), "first_k_dense_replace: 3"),
    "routing-scale": ("deepseek", config(routed_scaling_factor=1.0), "routed_scaling_factor: 2.5"),
    "routing-score": ("deepseek", config(scoring_func="softmax"), 'scoring_func: "sigmoid"'),
    "routing-groups": ("deepseek", config(topk_group=8), "topk_group: 4"),
    "routing-norm": ("qwen3", config(norm_topk_prob=False), "norm_topk_prob: true"),
    "mtp": ("deepseek", config(num_nextn_predict_layers=0), "num_nextn_predict_layers: 1"),
    "layer-types": ("gpt_oss", config(layer_types=["full_attention"] * 24), "layer_types"),
    "window": ("gpt_oss", config(sliding_window=4096), "sliding_window: 128 in the source, 4096"),
    "window-added": (
        "llama3",
        config(sliding_window=4096),
        "config.json sliding_window: absent in the source, 4096",
    ),
    "softcapping-added": ("llama3", config(final_logit_softcapping=30.0), "final_logit_softcap"),
    "config-eos": ("llama3", config(eos_token_id=2), "config.json eos_token_id"),
    "config-pad": ("gpt_oss", config(pad_token_id=3), "config.json pad_token_id"),
    "config-bos-against-generation": (
        "gpt_oss",
        config(bos_token_id=3),
        "config.json bos_token_id: absent in the source (elsewhere",
    ),
    "generation-eos": (
        "llama3",
        edit("generation_config.json", lambda d: d["eos_token_id"].pop()),
        "generation_config.json eos_token_id: [",
    ),
    "generation-eos-unsaid": (
        "llama3",
        drop("generation_config.json", "eos_token_id"),
        "generation_config.json eos_token_id",
    ),
    "tokenizer-eos": (
        "llama3",
        tokenizer(eos_token="<|end_of_text|>"),
        'tokenizer_config.json eos_token: "<|eot_id|>" in the source, "<|end_of_text|>"',
    ),
    "tokenizer-eos-unsaid": (
        "qwen3",
        drop("tokenizer_config.json", "eos_token"),
        'tokenizer_config.json eos_token: "<|im_end|>" in the source, absent',
    ),
    "tokens-map-eos": (
        "llama3",
        put("special_tokens_map.json", eos_token="<|eom_id|>"),
        "special_tokens_map.json eos_token",
    ),
    "tokens-map-new-and-wrong": (
        "qwen3",
        put("special_tokens_map.json", eos_token="<|endoftext|>"),
        "special_tokens_map.json eos_token: absent in the source",
    ),
    "pad-token": ("qwen3", tokenizer(pad_token="<|im_end|>"), "tokenizer_config.json pad_token"),
    "longest-text": ("qwen3", tokenizer(model_max_length=512), "model_max_length: 131072"),
    "adds-eos": ("deepseek", tokenizer(add_eos_token=True), "add_eos_token: false"),
    "cleans-up": ("qwen3", tokenizer(clean_up_tokenization_spaces=True), "clean_up_tokeniz"),
    "added-token-flag": (
        "qwen3",
        edit(
            "tokenizer_config.json",
            lambda d: next(iter(d["added_tokens_decoder"].values())).update(lstrip=True),
        ),
        "tokenizer_config.json added_tokens_decoder",
    ),
    "tokenizer-configuration-gone": (
        "gpt_oss",
        remove("tokenizer_config.json"),
        "tokenizer_config.json is absent in the candidate",
    ),
    "template-newline": (
        "qwen3",
        template(
            '"<|im_start|>assistant\\n" }}\n    {%- if enable',
            '"<|im_start|>assistant" }}\n    {%- if enable',
        ),
        "renders the conversation 'user' differently: ",
    ),
    "template-moved-and-altered": (
        "llama3",
        lambda d: move_template(d, lambda text: text.replace("Today is", "It is")),
        "chat_template.jinja chat template 'default' renders the conversation 'user' differently",
    ),
    "template-shadowed-one-altered": (
        "llama3",
        lambda d: (
            write(
                "chat_template.jinja",
                copied_fields("llama3/tokenizer_config.json")["chat_template"],
            )(d),
            template("Today is", "It is")(d),
        ),
        "tokenizer_config.json chat template 'default' renders",
    ),
    "template-tools": (
        "qwen3",
        template("tool | tojson", "tool | tojson(indent=1)"),
        "renders the conversation 'tools offered' differently",
    ),
    "template-tool-call": (
        "gpt_oss",
        template("commentary json<|message|>", "commentary<|message|>"),
        "renders the conversation 'tool called' differently",
    ),
    "template-tool-result": (
        "qwen3",
        template("\\n</tool_response>", "</tool_response>"),
        "renders the conversation 'tool called and answered' differently",
    ),
    "template-thinking": (
        "deepseek",
        template('("<think>" if thinking else "</think>")', '"</think>"'),
        "renders the conversation 'user, thinking on' differently",
    ),
    "template-not-thinking": (
        "qwen3",
        template("enable_thinking is false", "enable_thinking is none"),
        "renders the conversation 'user, thinking off' differently",
    ),
    "template-reasoning": (
        "qwen3",
        template('"<think>\\n" ~ thought', '"<think>" ~ thought'),
        "differently",
    ),
    "template-effort": (
        "gpt_oss",
        template('reasoning_effort | default("medium")', '"medium"'),
        "renders the conversation 'model identity' differently",
    ),
    "template-clock": (
        "gpt_oss",
        template("%Y-%m-%d", "%d.%m.%Y"),
        "Current date: 2025-03-04\\n",
    ),
    "template-earlier-thought": (
        "deepseek",
        template('said.split("</think>", 1)[1] if "</think>" in said else said', "said"),
        "renders the conversation 'reasoning in the text' differently",
    ),
    "template-refuses-no-more": (
        "llama3",
        template('raise_exception("one call at a time")', '""'),
        "renders the conversation 'two tools called at once' differently: nothing (it fails)",
    ),
    "template-broken": ("llama3", template("{%- endfor %}", ""), "nothing (it fails) in the cand"),
    "template-late-turn": (
        "llama3",
        template(
            "{%- for message in rest %}",
            "{%- for message in rest %}{%- if loop.index > 6 %}!{% endif %}",
        ),
        "renders the conversation 'eight turns' differently",
    ),
    "template-gone": (
        "deepseek",
        drop("tokenizer_config.json", "chat_template"),
        "tokenizer_config.json chat template 'default' of the source: absent in the candidate",
    ),
    "template-new": (
        "qwen3",
        write("additional_chat_templates/rag.jinja", "{{ documents }}"),
        "additional_chat_templates/rag.jinja chat template 'rag': absent in the source",
    ),
    "token-id": ("llama3", fast(swap_ids), "tokenizer.json vocabulary 'Ģ' (2 differ): "),
    "merge-gone": ("llama3", fast(lambda d: d["model"]["merges"].pop(3)), "tokenizer.json merge 3"),
    "merging": ("llama3", fast(lambda d: d["model"].update(ignore_merges=False)), "ignore_merges"),
    "dropping": ("qwen3", fast(lambda d: d["model"].update(dropout=0.1)), "model dropout"),
    "added-token": (
        "qwen3",
        fast(lambda d: d["added_tokens"][0].update(special=False)),
        "tokenizer.json added token '<|endoftext|>': ",
    ),
    "added-token-gone": (
        "qwen3",
        fast(lambda d: d["added_tokens"].pop()),
        "tokenizer.json added token '</think>': ",
    ),
    "normalizer": (
        "qwen3",
        fast(lambda d: d.update(normalizer=None)),
        "tokenizer.json encoding of",
    ),
    "digits": (
        "llama3",
        fast(
            lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(
                pattern={"Regex": r"\p{N}|\P{N}+"}
            )
        ),
        "tokenizer.json encoding of",
    ),
    "post-processor": (
        "llama3",
        fast(lambda d: d.update(post_processor=None)),
        "tokenizer.json encoding with special tokens of ''",
    ),
    "decoder": ("llama3", fast(lambda d: d.update(decoder=None)), "tokenizer.json decoding of"),
    "tokenizer-broken": (
        "llama3",
        fast(lambda d: d.update(decoder={"type": "None such"})),
        'tokenizer.json (whether it can be loaded): "it can" in the source, "it cannot (',
    ),
    "tokenizer-gone": ("llama3", remove("tokenizer.json"), "tokenizer.json is absent"),
    "temperature": (
        "llama3",
        generation(temperature=1.0),
        "generation_config.json temperature: 0.6 in the source, 1.0 in the candidate",
    ),
    "top-k-gone": (
        "qwen3",
        drop("generation_config.json", "top_k"),
        "top_k: 20 in the source, abs",
    ),
    "penalty-new": ("qwen3", generation(repetition_penalty=1.1), "repetition_penalty: absent"),
    "min-p-new": ("llama3", generation(min_p=0.1), "min_p: absent in the source, 0.1"),
    "length-new": ("llama3", generation(max_new_tokens=16), "max_new_tokens: absent"),
    "suppressed": ("llama3", generation(suppress_tokens=[7]), "suppress_tokens: absent"),
    "stop-strings": ("llama3", generation(stop_strings=["\n"]), "stop_strings: absent in the"),
    "greedy": ("llama3", generation(do_sample=False), "do_sample: true in the source, false"),
    "added-tokens-beside": (
        "llama3",
        write("added_tokens.json", '{"<|begin_of_text|>": 3}'),
        "added_tokens.json '<|begin_of_text|>': absent in the source, 3 in the candidate, unlike",
    ),
    "special-token-listed": (
        "llama3",
        tokenizer(additional_special_tokens=["Question"]),
        'tokenizer_config.json additional_special_tokens: absent in the source, "Question"',
    ),
    "special-token-named": (
        "llama3",
        tokenizer(extra_special_tokens={"image_token": {"content": "the"}}),
        'tokenizer_config.json extra_special_tokens: absent in the source, "the"',
    ),
    "special-tokens-split": (
        "llama3",
        tokenizer(split_special_tokens=True),
        "split_special_tokens: false in the source, true in the candidate",
    ),
    "code-named": ("llama3", config(auto_map={"AutoModel": "x.X"}), "which names code to load"),
    "tokenizer-code-named": (
        "llama3",
        tokenizer(auto_map={"AutoTokenizer": "x.X"}),
        "tokenizer_config.json auto_map, which names code to load: absent in the source",
    ),
    "code-added": (
        "llama3",
        write("sub/modeling_x.py", "raise SystemExit"),
        "code that the source does not have: sub/modeling_x.py",
    ),
    "no-json": (
        "llama3",
        write("generation_config.json", "{"),
        "generation_config.json: is not valid JSON",
    ),
    "no-object": ("llama3", write("tokenizer_config.json", "[]"), "tokenizer_config.json: holds"),
    "tokenizer-no-json": ("llama3", write("tokenizer.json", "{"), "cannot be compared: "),
    "template-no-text": (
        "llama3",
        lambda d: (d / "chat_template.jinja").write_bytes(b"\xff\xfe"),
        "chat_template.jinja: is not UTF-8 text in the candidate",
    ),
}


@pytest.mark.parametrize(("family", "change", "said"), CHANGED.values(), ids=CHANGED.keys())
def test_a_change_of_meaning_is_said(
    tmp_path: Path, family: str, change: Change, said: str
) -> None:
    """One sentence says it; a second one may say what it does to a text."""
    diffs = diffs_after(tmp_path, family, change)
    assert any(said in diff for diff in diffs), diffs
    assert len({diff.split()[0] for diff in diffs}) == 1, diffs
    assert len(diffs) <= 2, diffs


def reindent(directory: Path) -> None:
    for path in directory.glob("*.json"):
        document = json.loads(path.read_bytes())
        path.write_text(json.dumps(document, indent=4, sort_keys=True) + "\n")


SAME: dict[str, tuple[str, Change]] = {
    "untouched": ("llama3", lambda _: None),
    "reindented": ("deepseek", reindent),
    "library-version": ("llama3", config(transformers_version="9.9", use_cache=False, _name="x")),
    "quantized": ("qwen3", config(quantization_config={"quant_method": "modelopt"})),
    "dtype-renamed": (
        "qwen3",
        lambda d: (drop("config.json", "torch_dtype")(d), config(dtype="bfloat16")(d)),
    ),
    "whole-number": ("qwen3", config(rope_theta=1000000)),
    "rope-in-the-newer-spelling": (
        "llama3",
        lambda d: edit(
            "config.json",
            lambda c: c.update(
                rope_parameters={**c.pop("rope_scaling"), "rope_theta": c.pop("rope_theta")}
            ),
        )(d),
    ),
    "experts-renamed": (
        "qwen3",
        edit("config.json", lambda c: c.update(num_local_experts=c.pop("num_experts"))),
    ),
    "defaults-filled-in": ("llama3", config(head_dim=128, pad_token_id=None, sliding_window=None)),
    "no-layer-slides": ("qwen3", config(layer_types=["full_attention"] * 48)),
    "one-token-as-list": (
        "llama3",
        edit("config.json", lambda c: c.update(eos_token_id=[c["eos_token_id"]])),
    ),
    "tokens-in-another-order": (
        "llama3",
        edit("generation_config.json", lambda g: g["eos_token_id"].reverse()),
    ),
    "pad-set-for-calibration": ("llama3", tokenizer(pad_token="<|eot_id|>", padding_side="left")),
    "token-without-its-properties": (
        "deepseek",
        edit("tokenizer_config.json", lambda t: t.update(eos_token=t["eos_token"]["content"])),
    ),
    "stop-token-named": (
        "qwen3",
        put("special_tokens_map.json", bos_token="<|endoftext|>", unk_token="<|endoftext|>"),
    ),
    "no-tokens-map": ("llama3", remove("special_tokens_map.json")),
    "special-tokens-listed": ("llama3", tokenizer(additional_special_tokens=["<|eot_id|>"])),
    "special-tokens-not-split": ("llama3", tokenizer(split_special_tokens=False)),
    "added-tokens-written": (
        "llama3",
        lambda d: write(
            "added_tokens.json",
            json.dumps({t["content"]: t["id"] for t in copied_fields(TOKENS)["added_tokens"]}),
        )(d),
    ),
    "tokens-map-written": (
        "qwen3",
        put("special_tokens_map.json", eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    ),
    "tokenizer-class-renamed": ("llama3", tokenizer(tokenizer_class="TokenizersBackend")),
    "template-in-its-own-file": ("gpt_oss", move_template),
    "template-by-name": (
        "qwen3",
        edit(
            "tokenizer_config.json",
            lambda t: t.update(chat_template=[{"name": "default", "template": t["chat_template"]}]),
        ),
    ),
    "template-twice": (
        "qwen3",
        lambda d: write(
            "chat_template.jinja", copied_fields("qwen3/tokenizer_config.json")["chat_template"]
        )(d),
    ),
    "template-commented": ("llama3", template("{{- bos_token }}", "{# ours #}{{- bos_token }}")),
    "template-spelled-out": (
        "deepseek",
        template("eos_token }}", '"<\uff5cend▁of▁sentence\uff5c>" }}'),
    ),
    "template-last-newline": ("llama3", lambda d: move_template(d, lambda text: text + "\n")),
    "truncates": ("llama3", fast(lambda d: d.update(truncation={"max_length": 64}))),
    "pads": ("llama3", fast(lambda d: d.update(padding={"strategy": "BatchLongest"}))),
    "merges-as-text": (
        "llama3",
        fast(lambda d: d["model"].update(merges=[" ".join(m) for m in d["model"]["merges"]])),
    ),
    "normalizer-in-a-sequence": (
        "qwen3",
        fast(lambda d: d.update(normalizer={"type": "Sequence", "normalizers": [d["normalizer"]]})),
    ),
    "generation-default-said": ("llama3", generation(repetition_penalty=1.0, top_k=50)),
    "generation-says-less": ("gpt_oss", drop("generation_config.json", "transformers_version")),
}


@pytest.mark.parametrize(("family", "change"), SAME.values(), ids=SAME.keys())
def test_a_rewrite_without_meaning_is_no_difference(
    tmp_path: Path, family: str, change: Change
) -> None:
    assert diffs_after(tmp_path, family, change) == []


def test_a_token_that_only_the_candidate_names(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(DATA / "llama3", source)
    (source / "special_tokens_map.json").unlink()
    drop("tokenizer_config.json", "bos_token", "eos_token")(source)
    named = tmp_path / "named"
    shutil.copytree(source, named)
    tokenizer(eos_token="<|eot_id|>")(named)
    assert compare(source, named) == []
    tokenizer(eos_token="<|start_header_id|>")(named)
    (diff,) = compare(source, named)
    assert diff.startswith("tokenizer_config.json eos_token: absent in the source")
    tokenizer(eos_token="<|eot_id|>", bos_token="<|begin_of_text|>")(named)
    (diff,) = compare(source, named)
    assert "renders the conversation 'user' differently" in diff


@pytest.mark.parametrize("lstrip", [False, True])
def test_added_tokens_that_only_the_candidate_describes(tmp_path: Path, lstrip: bool) -> None:
    source = tmp_path / "source"
    shutil.copytree(DATA / "llama3", source)
    drop("tokenizer_config.json", "added_tokens_decoder")(source)
    candidate = tmp_path / "candidate"
    shutil.copytree(source, candidate)
    token = copied_fields(TOKENS)["added_tokens"][0]
    tokenizer(added_tokens_decoder={str(token["id"]): {**token, "lstrip": lstrip}})(candidate)
    diffs = compare(source, candidate)
    assert bool(diffs) == lstrip
    assert all(f"added_tokens_decoder {token['id']}: absent" in diff for diff in diffs)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_again_is_no_difference(family: str) -> None:
    assert compare(DATA / family, DATA / f"{family}_saved_again_v5") == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        pytest.param({}, {"do_sample": True}, None, id="unsaid"),
        pytest.param({"do_sample": None}, {"do_sample": True}, None, id="null"),
        pytest.param({"top_p": 0.9}, {"top_p": 0.9, "do_sample": True}, None, id="settings-kept"),
        pytest.param({"do_sample": False}, {"do_sample": True}, "do_sample: false", id="greedy"),
        pytest.param({"do_sample": True}, {}, "do_sample: true", id="no-more"),
        pytest.param(
            {}, {"do_sample": True, "temperature": 0.6}, "temperature: absent", id="temperature"
        ),
        pytest.param({}, {"do_sample": True, "top_k": 20}, "top_k: absent", id="top-k"),
        pytest.param({"top_p": 0.9}, {"do_sample": True, "top_p": 1.0}, "top_p: 0.9", id="top-p"),
    ],
)
def test_a_candidate_may_be_said_to_sample(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], said: str | None
) -> None:
    for name, stated in (("source", before), ("candidate", after)):
        shutil.copytree(DATA / "llama3", tmp_path / name)
        drop("generation_config.json", "do_sample", "temperature", "top_p")(tmp_path / name)
        generation(**stated)(tmp_path / name)
    diffs = compare(tmp_path / "source", tmp_path / "candidate")
    assert diffs == [] if said is None else (len(diffs) == 1 and said in diffs[0]), diffs


VISION = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "image_mean": [0.5, 0.5, 0.5],
    "do_convert_rgb": None,
}
SIZE = {"shortest_edge": 3136, "longest_edge": 12845056}
SAVED = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": SIZE,
    "patch_size": 14,
    "image_mean": [0.5, 0.5, 0.5],
    "do_resize": True,
}


@pytest.mark.parametrize(
    ("written", "said"),
    [
        pytest.param({"preprocessor_config.json": SAVED}, None, id="saved-again"),
        pytest.param({"processor_config.json": {"image_processor": SAVED}}, None, id="nested"),
        pytest.param({}, "preprocessor_config.json is absent in the candidate", id="gone"),
        pytest.param(
            {"preprocessor_config.json": {**SAVED, "patch_size": 16}},
            "preprocessor_config.json patch_size: 14 in the source, 16 in the candidate",
            id="patch",
        ),
        pytest.param(
            {"processor_config.json": {"image_processor": {**SAVED, "image_mean": [0, 0, 0]}}},
            "preprocessor_config.json image_mean",
            id="mean",
        ),
        pytest.param(
            {"preprocessor_config.json": {**SAVED, "size": {**SIZE, "longest_edge": 1000}}},
            "preprocessor_config.json max_pixels: 12845056 in the source, 1000",
            id="size",
        ),
    ],
)
def test_processors(tmp_path: Path, written: dict[str, Any], said: str | None) -> None:
    source, candidate = tmp_path / "source", tmp_path / "candidate"
    for directory in (source, candidate):
        shutil.copytree(DATA / "qwen3", directory)
    (source / "preprocessor_config.json").write_text(json.dumps(VISION))
    for name, document in written.items():
        (candidate / name).write_text(json.dumps(document))
    diffs = compare(source, candidate)
    assert diffs == [] if said is None else said in diffs[0]


WHOLE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
BF16, F16 = {"dtype": "bfloat16"}, {"dtype": "float16"}


def quantized_by(method: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method}}


def tied(whole: bool | None, text: bool | None) -> dict[str, Any]:
    """Return what a model with parts says of its tie as a whole, and in its text part."""
    name = "tie_word_embeddings"
    part = {} if text is None else {name: text}
    return {"text_config": {"vocab_size": 8, **part}} | ({} if whole is None else {name: whole})


@pytest.mark.parametrize(
    ("source", "candidate", "said"),
    [
        pytest.param(
            {"vision_config": {"depth": 32}},
            {"vision_config": {"depth": 31}},
            "vision_config.depth",
            id="nested",
        ),
        pytest.param(
            {"vision_config": {"depth": 32}}, {}, "config.json vision_config: {", id="part-gone"
        ),
        pytest.param(
            {"text_config": {"num_experts": 8}},
            {"text_config": {"num_experts": 4}},
            "text_config.num_experts",
            id="text",
        ),
        pytest.param(
            {"hidden_size": 8, "rope_theta": 5, "eos_token_id": 1},
            {"text_config": {"hidden_size": 8, "rope_parameters": {"rope_theta": 5.0}}},
            None,
            id="moved-into-a-part",
        ),
        pytest.param(
            {
                "rope_theta": 9,
                "rope_local_base_freq": 5,
                "rope_scaling": {"type": "linear", "factor": 8},
            },
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 9},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5},
                }
            },
            None,
            id="rope-by-layer-type",
        ),
        pytest.param(
            {"rope_theta": 9, "rope_local_base_freq": 5},
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 9},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 6},
                }
            },
            "config.json rope sliding_attention.rope_theta: 5 in the source, 6",
            id="rope-of-one-layer-type",
        ),
        pytest.param(
            {"num_hidden_layers": 4, "sliding_window_pattern": 2},
            {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
            None,
            id="pattern-spelled-out",
        ),
        pytest.param(
            {"num_hidden_layers": 4, "full_attention_interval": 4},
            {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
            "config.json layer_types",
            id="pattern-spelled-out-wrongly",
        ),
        pytest.param({"torch_dtype": "float32"}, {"dtype": "bfloat16"}, None, id="32-bits-to-16"),
        pytest.param({"torch_dtype": "float16"}, {"dtype": "float32"}, "dtype", id="16-bits-to-32"),
        pytest.param(BF16, {**F16, **quantized_by("awq")}, None, id="awq-in-its-own-16-bits"),
        pytest.param(F16, {**BF16, **quantized_by("gptq")}, None, id="gptq-in-its-own-16-bits"),
        pytest.param(
            {**BF16, "text_config": BF16},
            {**F16, "text_config": F16, **quantized_by("awq")},
            None,
            id="parts-in-its-own-16-bits",
        ),
        pytest.param(
            BF16, {"dtype": "float32", **quantized_by("awq")}, "dtype", id="awq-in-32-bits"
        ),
        pytest.param(
            BF16, {**F16, **quantized_by("modelopt")}, "dtype", id="no-16-bits-of-its-own"
        ),
        pytest.param(BF16, {**F16, **quantized_by(["awq"])}, "dtype", id="a-list-is-no-method"),
        pytest.param(BF16, F16, 'dtype: "bfloat16" in the source', id="not-quantized"),
        pytest.param(tied(True, False), tied(True, True), None, id="tie-said-twice"),
        pytest.param(tied(None, True), tied(True, None), None, id="tie-moved"),
        pytest.param(tied(True, None), tied(None, True), None, id="tie-moved-back"),
        pytest.param(
            tied(True, False),
            tied(False, False),
            "config.json tie_word_embeddings: true in the source, false in the candidate",
            id="untied",
        ),
        pytest.param(
            tied(True, None), tied(None, False), "tie_word_embeddings", id="untied-in-the-part"
        ),
        pytest.param(
            tied(None, False), tied(True, False), "tie_word_embeddings", id="tied-above-the-part"
        ),
        pytest.param(
            tied(False, True), tied(True, True), "tie_word_embeddings", id="tied-by-the-part-only"
        ),
        pytest.param(
            {"sliding_window": 9, "use_sliding_window": False},
            {"sliding_window": None, "use_sliding_window": False},
            None,
            id="window-not-used",
        ),
        pytest.param(WHOLE, {**WHOLE, "mup_width": 2}, "mup_width: absent", id="factor"),
        pytest.param(WHOLE, {**WHOLE, "logit_scale": 0.5}, "logit_scale: absent", id="scale"),
        pytest.param(WHOLE, {**WHOLE, "router_softcap": 30.0}, "softcap: absent", id="softcap"),
        pytest.param(
            {**WHOLE, "logit_scale": None}, {**WHOLE, "logit_scale": 2}, "logit_scale", id="null"
        ),
        pytest.param(
            WHOLE, {**WHOLE, "query_pre_attn_scalar": 9}, "query_pre", id="attention-factor"
        ),
        pytest.param(
            WHOLE,
            {
                **WHOLE,
                "query_pre_attn_scalar": 4,
                "mup_x": 1,
                "lm_head_multiplier": 1.0,
                "router_softcap": 0,
                "logit_scale": None,
            },
            None,
            id="factors-that-change-nothing",
        ),
        pytest.param(
            {"num_local_experts": 8},
            {"num_local_experts": 8, "num_experts": 4},
            "num_experts: 4 in the candidate, which has 8 as num_local_experts",
            id="two-names",
        ),
        pytest.param(
            {"n_layer": 8, "num_layers": 9},
            {"n_layer": 8, "num_layers": 9},
            None,
            id="source's-own",
        ),
        pytest.param(BF16, {**BF16, "torch_dtype": "float32"}, "torch_dtype: ", id="two-dtypes"),
        pytest.param(BF16, {**BF16, "torch_dtype": "torch.bfloat16"}, None, id="one-dtype-twice"),
    ],
)
def test_configurations(
    source: dict[str, Any], candidate: dict[str, Any], said: str | None
) -> None:
    diffs = list(config_diffs(source, candidate))
    assert diffs == [] if said is None else (len(diffs) == 1 and said in diffs[0]), diffs


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "it takes longer than 2 s",
            id="endless",
        ),
        pytest.param("{% set x = 'a' * 99999999999 %}{{ x }}", "memory", id="memory"),
    ],
)
def test_a_template_that_never_ends_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setattr(chat_templates, "TIMEOUT_S", 2.0)
    (diff,) = diffs_after(tmp_path, "llama3", write("chat_template.jinja", text))
    assert diff.startswith("chat_template.jinja chat template 'default': its text differs")
    assert reason in diff


def test_a_template_that_nobody_renders_is_compared_as_text(tmp_path: Path) -> None:
    source, candidate = tmp_path / "source", tmp_path / "candidate"
    for directory, name in ((source, "one"), (candidate, "other")):
        shutil.copytree(DATA / "llama3", directory)
        (directory / "chat_template.jinja").write_text("{{ raise_exception('" + name + "') }}")
        drop("tokenizer_config.json", "chat_template")(directory)
    (diff,) = compare(source, candidate)
    assert "neither side renders a conversation" in diff


def test_a_pipe_is_a_difference_and_not_waited_for(tmp_path: Path) -> None:
    def replace(directory: Path) -> None:
        (directory / "tokenizer.json").unlink()
        os.mkfifo(directory / "tokenizer.json")

    (diff,) = diffs_after(tmp_path, "llama3", replace)
    assert diff == "tokenizer.json: is not a regular file in the candidate"


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_source_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    shutil.copytree(DATA / "llama3", tmp_path / "source")
    (tmp_path / "source" / name).write_text("{")
    with pytest.raises(ProbeError, match="is not valid JSON"):
        compare(tmp_path / "source", DATA / "llama3")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(
        [
            *("rope_scaling", "rope_parameters", "rope_theta", "eos_token_id", "text_config"),
            *("layer_types", "num_hidden_layers", "sliding_window_pattern", "dtype", "model_type"),
        ]
    ),
    value=JSON,
)
def test_any_value_in_a_configuration_is_compared(name: str, value: object) -> None:
    stated = json.loads((DATA / "llama3" / "config.json").read_bytes())
    odd = {**stated, name: value}
    assert all(isinstance(diff, str) for diff in config_diffs(stated, odd))
    assert list(config_diffs(odd, odd)) == []


@pytest.mark.parametrize("value", [None, True, 10**400, "text", [], [[]], [{}], {}, {"a": {}}])
@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("generation_config.json", "eos_token_id"),
        ("tokenizer_config.json", "chat_template"),
        ("tokenizer_config.json", "added_tokens_decoder"),
        ("tokenizer_config.json", "eos_token"),
        ("tokenizer.json", "model"),
        ("tokenizer.json", "added_tokens"),
        ("preprocessor_config.json", "size"),
    ],
)
def test_odd_values_of_a_candidate_end_in_sentences(
    tmp_path: Path, file: str, field: str, value: object
) -> None:
    diffs = diffs_after(tmp_path, "qwen3", put(file, **{field: value}))
    assert all(isinstance(diff, str) for diff in diffs)
    assert diffs or file == "preprocessor_config.json" or field == "added_tokens_decoder"


def test_a_guarded_task_keeps_its_answers_before_a_failure(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(
        "import json, sys\nprint(json.load(sys.stdin), flush=True)\nraise SystemExit(3)"
    )
    outcome = guarded.run(task, 7)
    assert outcome.answers == [7]
    assert "it failed with code 3" in outcome.problem
