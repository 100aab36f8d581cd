"""Make the fixture of AWQ: a matrix packed by AutoAWQ, and what AutoAWQ itself reads in it.

Made with autoawq 0.2.9, torch 2.13.0+cpu and transformers 5.14.1 on a CPU, where the library packs
and dequantizes but does not search for smoothing factors:

    python make_autoawq.py ../../../conductor/demo/model autoawq-0.2.9
"""

import json
import sys
from pathlib import Path

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file

ROWS, GROUP = 32, 64
MODULE = "model.layers.1.self_attn.q_proj"
CONFIG = {
    "bits": 4,
    "group_size": GROUP,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}


def main(source: Path, target: Path) -> None:
    """Pack one matrix and write its tensors, the source's weights and the dequantized ones."""
    target.mkdir(exist_ok=True)
    weight = load_file(source / "model.safetensors")[f"{MODULE}.weight"][:ROWS]
    quantizer = object.__new__(AwqQuantizer)
    quantizer.group_size, quantizer.zero_point, quantizer.w_bit = GROUP, True, 4
    linear = torch.nn.Linear(weight.shape[1], ROWS, bias=False, dtype=torch.float16)
    linear.weight.data = weight.half()
    linear.weight.data, scales, zeros = quantizer.pseudo_quantize_tensor(linear.weight.data)
    packed = WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=scales.t().contiguous(), zeros=zeros.t().contiguous()
    )
    parts = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    read = dequantize_gemm(*parts.values(), 4, GROUP).T
    tensors = {**parts, "source": weight, "dequantized": read}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        target / "int4.safetensors",
    )
    (target / "int4.json").write_text(json.dumps(CONFIG, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
