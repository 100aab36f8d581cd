"""Quantize and dequantize with compressed-tensors and ModelOpt: ``python <this> <directory>``.

Runs in the environment of the quantizers. Writes one ``.npz`` for each case with the stored
elements of every part and the weight that the library makes of them, and ``cases.json``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from modelopt.torch.export.quant_utils import from_quantized_weight, to_quantized_weight
from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor
from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

ROWS, COLUMNS = 160, 256
WEIGHT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)) * 0.03
WEIGHT[3] += 0.05

NAMES = {
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}
CASES: list[dict[str, Any]] = []


def save(library: str, name: str, precision: str, parts: dict[str, Any], expected: Any) -> None:
    arrays, types = {"expected": expected.float().numpy()}, {}
    for part, value in parts.items():
        value = value.data.contiguous()
        types[part] = NAMES[value.dtype]
        raw = value.view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value
        arrays[part] = raw.numpy()
    file = f"{len(CASES)}.npz"
    np.savez(Path(sys.argv[1]) / file, **arrays)
    CASES.append(
        {
            "library": library,
            "name": name,
            "precision": precision,
            "file": file,
            "parts": types,
        }
    )


def extremes(args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    if args.strategy == "tensor":
        return WEIGHT.min().reshape(1), WEIGHT.max().reshape(1)
    if args.strategy == "channel":
        return WEIGHT.amin(1, keepdim=True), WEIGHT.amax(1, keepdim=True)
    if args.strategy == "block":
        rows, columns = args.block_structure
        blocks = WEIGHT.reshape(ROWS // rows, rows, COLUMNS // columns, columns)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = WEIGHT.reshape(ROWS, -1, args.group_size)
    return groups.amin(2), groups.amax(2)


def parameters(args: QuantizationArgs, **more: Any) -> dict[str, Any]:
    scale, zero_point = calculate_qparams(*extremes(args), args, **more)
    found = {"weight": WEIGHT.clone(), "weight_scale": scale.float()}
    if not args.symmetric:
        found["weight_zero_point"] = zero_point.to(torch.int8)
    return found


def compressed(compressor: Any, name: str, precision: str, **options: Any) -> None:
    groups = options.pop("groups", None)
    args = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = parameters(args)
    if groups is not None:
        state["weight_g_idx"] = groups
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    save("ct", name, precision, stored, expected)


def four_bit_floats() -> None:
    """Unpack and dequantize in 32 bits; the compressors themselves do it in 16."""
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    whole = generate_gparam(WEIGHT.min(), WEIGHT.max()).reshape(1)
    state = parameters(args, global_scale=whole) | {"weight_global_scale": whole}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored = NVFP4PackedCompressor.compress(state, scheme)
    numbers = unpack_fp4_from_uint8(stored["weight_packed"], ROWS, COLUMNS, dtype=torch.float32)
    scale = stored["weight_scale"].float()
    expected = dequantize(numbers, scale, global_scale=whole, dtype=torch.float32)
    save("ct", "nvfp4", "NVFP4", stored, expected)

    args = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = parameters(args)
    stored = MXFP4PackedCompressor.compress(state, scheme)
    numbers = unpack_fp4_from_uint8(stored["weight_packed"], ROWS, COLUMNS, dtype=torch.float32)
    scale = decompress_mx_scale(stored["weight_scale"]).float()
    save("ct", "mxfp4", "MXFP4", stored, dequantize(numbers, scale, dtype=torch.float32))


def compressed_tensors() -> None:
    four_bit_floats()
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
    for bits in (4, 8, 3):
        for symmetric in (True, False):
            options = {"num_bits": bits, "type": "int", "symmetric": symmetric}
            for extra in ({"strategy": "group", "group_size": 64}, {"strategy": "channel"}):
                name = f"packed {bits} {extra['strategy']} {symmetric}"
                compressed(PackedQuantizationCompressor, name, f"INT{bits}", **options, **extra)
    compressed(
        PackedQuantizationCompressor,
        "packed act-order",
        "INT4",
        num_bits=4,
        type="int",
        strategy="group",
        group_size=64,
        actorder="group",
        groups=(order // 64).to(torch.int32),
    )
    for symmetric in (True, False):
        for strategy in ("tensor", "channel"):
            compressed(
                NaiveQuantizationCompressor,
                f"int8 {strategy} {symmetric}",
                "INT8",
                num_bits=8,
                type="int",
                strategy=strategy,
                symmetric=symmetric,
            )
    for extra in (
        {"strategy": "tensor"},
        {"strategy": "channel"},
        {"strategy": "block", "block_structure": [32, 64]},
    ):
        name = f"fp8 {extra['strategy']}"
        options = {"num_bits": 8, "type": "float", **extra}
        compressed(NaiveQuantizationCompressor, name, "FP8", **options)
    compressed(
        MXFP8QuantizationCompressor,
        "mxfp8",
        "MXFP8",
        num_bits=8,
        type="float",
        strategy="group",
        group_size=32,
        scale_dtype="torch.uint8",
    )


def modelopt() -> None:
    quantized, scale, whole = NVFP4QTensor.quantize(WEIGHT.clone(), 16)
    expected = quantized.dequantize(
        dtype=torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16}
    )
    parts = {"weight": quantized._quantized_data, "weight_scale": scale, "weight_scale_2": whole}
    save("modelopt", "NVFP4QTensor", "NVFP4", parts, expected)

    quantized, scale = MXFP4QTensor.quantize(WEIGHT.clone(), 32)
    expected = quantized.dequantize(dtype=torch.float32, scale=scale, block_sizes={-1: 32})
    scale = scale.reshape(ROWS, -1)
    parts = {"weight": quantized._quantized_data, "weight_scale": scale}
    save("modelopt", "MXFP4QTensor", "MXFP4", parts, expected)

    quantized, scale = MXFP8QTensor.quantize(WEIGHT.clone())
    expected = quantized.dequantize(dtype=torch.float32, scale=scale, block_sizes={-1: 32})
    parts = {"weight": quantized._quantized_data, "weight_scale": scale}
    save("modelopt", "MXFP8QTensor", "MXFP8", parts, expected)

    for name, blocks in (("tensor", None), ("block", {-1: 32, -2: 32})):
        quantized, scale = FP8QTensor.quantize(WEIGHT.clone(), block_sizes=blocks)
        expected = quantized.dequantize(dtype=torch.float32, scale=scale, block_sizes=blocks)
        scale = scale.reshape(()) if blocks is None else scale.reshape(ROWS // 32, -1)
        parts = {"weight": quantized._quantized_data, "weight_scale": scale.float()}
        save("modelopt", f"FP8QTensor {name}", "FP8", parts, expected)

    scale = WEIGHT.abs().amax(1) / 127
    stored = to_quantized_weight(WEIGHT.clone(), scale, "int8_sq")
    expected = from_quantized_weight(stored, scale, "int8_sq", torch.float32)
    save("modelopt", "int8_sq", "INT8", {"weight": stored, "weight_scale": scale}, expected)

    # ModelOpt packs INT4 for export and has nothing that unpacks it: these are the numbers packed.
    scale = WEIGHT.abs().reshape(ROWS, -1, 128).amax(2) / 7
    stored = to_quantized_weight(WEIGHT.clone(), scale, "int4_awq", block_size=128)
    spread = scale.repeat_interleave(128, dim=1)
    expected = (WEIGHT / spread).round().clamp(-8, 7) * spread
    save("modelopt", "int4_awq", "INT4", {"weight": stored, "weight_scale": scale}, expected)


compressed_tensors()
modelopt()
(Path(sys.argv[1]) / "cases.json").write_text(json.dumps(CASES))
