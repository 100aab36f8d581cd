"""Make the fixtures of bitsandbytes: matrices as it saves them, and what it dequantizes.

Made with bitsandbytes 0.50.2, torch 2.13.0+cpu and transformers 5.14.1 on a CPU:

    python make_bitsandbytes.py ../../../conductor/demo/model bitsandbytes-0.50.2
"""

import json
import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

MODULE = "model.layers.1.self_attn.q_proj"

EXPORTS = {
    "nf4": ({"bnb_4bit_quant_type": "nf4"}, (32, 256)),
    "nf4-nested": ({"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, (80, 256)),
    "fp4": ({"bnb_4bit_quant_type": "fp4"}, (32, 256)),
    "nf4-odd": ({"bnb_4bit_quant_type": "nf4"}, (27, 43)),
    "nf4-in-bf16": (
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
        (32, 256),
    ),
    "int8": ({}, (32, 256)),
}
"""Settings, and how much of the matrix is quantized: also so that blocks go on in the next row."""


def four_bit(weight: torch.Tensor, config: BitsAndBytesConfig) -> tuple[dict, torch.Tensor]:
    """Return what a 4-bit linear saves, and its weight dequantized."""
    linear = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    linear.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
        module=linear,
    )
    linear.to("cpu")
    state = linear.weight.quant_state
    return linear.state_dict(), bnb.functional.dequantize_4bit(linear.weight.data, state)


def eight_bit(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """Return what an 8-bit linear saves, and its weight dequantized."""
    linear = bnb.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False
    )
    linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    linear.to("cpu")
    saved = linear.state_dict()
    read = bnb.functional.int8_vectorwise_dequant(saved["weight"], saved["SCB"])
    return saved, read


def main(source: Path, target: Path) -> None:
    """Quantize one matrix in every way and write one file and one configuration for each."""
    target.mkdir(exist_ok=True)
    whole = load_file(source / "model.safetensors")[f"{MODULE}.weight"]
    for name, (settings, (rows, columns)) in EXPORTS.items():
        weight = whole[:rows, :columns].contiguous()
        bits = {"load_in_8bit": True} if name == "int8" else {"load_in_4bit": True}
        config = BitsAndBytesConfig(**bits, **settings)
        if name == "int8":
            saved, read = eight_bit(weight)
        else:
            saved, read = four_bit(weight.float(), config)
        parts = {**saved, "source": weight, "dequantized": read.float()}
        save_file(
            {part: tensor.contiguous() for part, tensor in parts.items()},
            target / f"{name}.safetensors",
        )
        stated = json.dumps(config.to_dict(), indent=1, sort_keys=True)
        (target / f"{name}.json").write_text(stated + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
