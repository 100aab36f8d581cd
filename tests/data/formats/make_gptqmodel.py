"""Make the fixtures of GPTQ: exports of GPTQModel, and what GPTQModel itself reads in them.

Made with gptqmodel 7.6.0, torch 2.13.0+cpu and transformers 5.23.0 on a CPU:

    GPTQMODEL_CPU_WORKERS=2 python make_gptqmodel.py ../../../conductor/demo/model gptqmodel-7.6.0

One matrix of each export is kept, cut to its first 32 rows: its tensors as they lie on disk, the
source's weights, and the weights that the library dequantizes.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file

ROWS = 32
MODULE = "model.layers.1.self_attn.q_proj"

EXPORTS = {
    "int4": {"bits": 4, "group_size": 128},
    "int4-asymmetric-reordered": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True},
    "int8-rows": {"bits": 8, "group_size": -1, "act_group_aware": False},
    "int3": {"bits": 3, "group_size": 64},
    "int2-v2": {"bits": 2, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "dynamic": {
        "bits": 4,
        "group_size": 128,
        "dynamic": {r"-:.*\.0\.mlp\.": {}, r".*\.1\.self_attn": {"bits": 8, "group_size": 64}},
    },
}

TEXTS = [f"Question: what is {n} plus {n + 1}? Answer: {2 * n + 1}. " * 6 for n in range(32)]


def main(source: Path, target: Path) -> None:
    """Quantize ``source`` in every way and write one file and one configuration for each."""
    target.mkdir(exist_ok=True)
    weights = load_file(source / "model.safetensors")
    for name, settings in EXPORTS.items():
        with tempfile.TemporaryDirectory() as export:
            settings = {"desc_act": False, "sym": True, **settings}
            model = GPTQModel.load(str(source), QuantizeConfig(**settings), device="cpu")
            model.quantize(TEXTS, batch_size=4)
            model.save(export)
            stored = load_file(Path(export) / "model.safetensors")
            config = json.loads((Path(export) / "config.json").read_text())
            model = GPTQModel.load(export, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
            read = model.model.get_submodule(MODULE).dequantize_weight().T
        stated = config["quantization_config"]
        stated.pop("meta")
        words = ROWS * (stated["bits"] if name != "dynamic" else 8) // 32
        cut = {"qweight": ROWS, "scales": ROWS, "qzeros": words, "g_idx": None}
        parts = {part: stored[f"{MODULE}.{part}"][..., :end] for part, end in cut.items()}
        parts["source"] = weights[f"{MODULE}.weight"][:ROWS]
        parts["dequantized"] = read[:ROWS]
        save_file(
            {part: tensor.contiguous() for part, tensor in parts.items()},
            target / f"{name}.safetensors",
        )
        (target / f"{name}.json").write_text(json.dumps(stated, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
