"""Make the fixtures of MXFP4 and of FP8 in blocks: tensors, and what transformers reads in them.

Made with transformers 5.14.1 and torch 2.13.0+cpu on a CPU:

    python make_transformers.py ../../../conductor/demo/model transformers-5.14.1

The FP8 tensors are those that transformers itself writes; it quantizes to MXFP4 on a GPU only, so
those bytes are drawn at random, and only how they are read can be compared.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

MODULE = "model.layers.1.mlp.gate_proj"

FP8 = {
    "fp8-blocks": (FineGrainedFP8Config(weight_block_size=(32, 64)), (64, 256)),
    "fp8-blocks-powers": (
        FineGrainedFP8Config(weight_block_size=(32, 64), scale_fmt="ue8m0"),
        (64, 256),
    ),
    "fp8-whole": (FineGrainedFP8Config(weight_block_size=None), (32, 256)),
}


def write(target: Path, name: str, tensors: dict, config) -> None:
    """Write the tensors and the configuration of one fixture."""
    target.mkdir(exist_ok=True)
    save_file(
        {part: tensor.contiguous() for part, tensor in tensors.items()},
        target / f"{name}.safetensors",
    )
    stated = json.dumps(config.to_dict(), indent=1, sort_keys=True)
    (target / f"{name}.json").write_text(stated + "\n")


def main(source: Path, target: Path) -> None:
    """Write one file and one configuration for each way to store a matrix."""
    whole = load_file(source / "model.safetensors")[f"{MODULE}.weight"]
    for name, (config, (rows, columns)) in FP8.items():
        quantizer = SimpleNamespace(quantization_config=config)
        weight = whole[:rows, :columns].contiguous()
        saved = Fp8Quantize(quantizer).convert({"weight": weight})
        read = Fp8Dequantize(quantizer).convert(
            {"weight$": saved["weight"], "weight_scale_inv": saved["weight_scale_inv"].float()}
        )["weight"]
        write(target, name, {**saved, "source": weight, "dequantized": read}, config)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 8, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 124, (3, 8, 4), dtype=torch.uint8, generator=generator)
    read = convert_moe_packed_tensors(blocks, scales)
    tensors = {"blocks": blocks, "scales": scales, "dequantized": read}
    write(target, "mxfp4-experts", tensors, Mxfp4Config(modules_to_not_convert=["lm_head"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
