"""Wall time of the numeric scan beside ``cat`` of the same files, in one run.

Run: ``.venv/bin/python benchmarks/numeric_scan.py [FORMAT ...]``, with FORMAT one of fp8, int8 and
nvfp4; without, all of them. For each, writes a checkpoint of 2 GB and its BF16 source (6 to 8 GB of
disk together, removed afterwards): the layers of a model with 7 billion parameters, random weights
really quantized by an encoder of its own; all layers hold the same bytes. The aim: a scan takes at
most 1 / 0.7 of the time in which ``cat`` reads the candidate's files from a warm cache. Both
alternate, and each figure is the least of several, because other work on the machine only ever
adds.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

AIM = 1 / 0.7
REPEATS = 5
CANDIDATE_BYTES = 2_000_000_000
HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 4096, 14336, 1024, 32000
NEEDED_BYTES = 12_000_000_000

LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, tuple[str, tuple[int, ...], Array]]
"""Safetensors type, shape and raw bytes by name."""


def bf16(values: Array) -> tuple[str, tuple[int, ...], Array]:
    """Return float32 as BF16, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return "BF16", values.shape, rounded.astype(np.uint16)


def e4m3(values: Array) -> Array:
    """Return the bytes of the nearest E4M3 numbers, by rounding the bits of half floats.

    A half has the same sign, four bits of its exponent in reach after a shift of the bias by 8,
    and seven more bits of mantissa.
    """
    clipped = np.clip(values, -448, 448).astype(np.float32)
    bits = (clipped * np.float32(2.0**-8)).astype(np.float16).view(np.uint16)
    sign = (bits >> 8) & 0x80
    magnitude = bits & 0x7FFF
    rounded = (magnitude + 0x3F + ((magnitude >> 7) & 1)) >> 7
    return (sign | rounded).astype(np.uint8)


def e4m3_numbers() -> Array:
    """Return the numbers of the bytes 0 to 0x7E."""
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(exponent > 0, normal, mantissa / 8 * 2.0**-6).astype(np.float32)


def encode_fp8(values: Array) -> Tensors:
    """Return a linear as ModelOpt's FP8: one scale."""
    scale = np.float32(np.abs(values).max() / 448)
    return {
        "weight": ("F8_E4M3", values.shape, e4m3(values / scale)),
        "weight_scale": ("F32", (), np.array(scale)),
        "input_scale": ("F32", (), np.array(0.02, np.float32)),
    }


def encode_int8(values: Array) -> Tensors:
    """Return a linear as ModelOpt's INT8: one scale a row."""
    scale = np.abs(values).max(axis=1) / np.float32(127)
    weight = np.rint(values / scale[:, None]).astype(np.int8)
    return {
        "weight": ("I8", values.shape, weight),
        "weight_scale": ("F32", scale.shape, scale.astype(np.float32)),
        "input_scale": ("F32", (), np.array(0.02, np.float32)),
    }


def encode_nvfp4(values: Array) -> Tensors:
    """Return a linear as ModelOpt's NVFP4: an E4M3 scale for 16 columns, and one for all."""
    rows, columns = values.shape
    groups = values.reshape(rows, columns // 16, 16)
    largest = np.abs(groups).max(axis=2)
    whole = np.float32(largest.max() / (6 * 448))
    scale = e4m3(largest / 6 / whole)
    scaled = groups / np.maximum(e4m3_numbers()[scale] * whole, 1e-30)[:, :, None]
    steps = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    codes = np.searchsorted(steps, np.abs(scaled)).astype(np.uint8)
    codes |= np.where(scaled < 0, np.uint8(8), np.uint8(0))
    flat = codes.reshape(rows, columns)
    return {
        "weight": ("U8", (rows, columns // 2), flat[:, 0::2] | (flat[:, 1::2] << 4)),
        "weight_scale": ("F8_E4M3", scale.shape, scale),
        "weight_scale_2": ("F32", (), np.array(whole)),
        "input_scale": ("F32", (), np.array(0.02, np.float32)),
    }


ENCODERS: Mapping[str, Callable[[Array], Tensors]] = {
    "fp8": encode_fp8,
    "int8": encode_int8,
    "nvfp4": encode_nvfp4,
}


def write_shard(path: Path, tensors: Tensors) -> None:
    """Write one safetensors file."""
    header, position = {}, 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + raw.nbytes],
        }
        position += raw.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, _, raw in tensors.values():
            stream.write(memoryview(np.ascontiguousarray(raw).reshape(-1).view(np.uint8)))


def write_checkpoints(directory: Path, encode: Callable[[Array], Tensors]) -> int:
    """Write ``source`` and ``candidate``; return the candidate's bytes."""
    generator = np.random.default_rng(0)
    plain, quantized = {}, {}
    for module, shape in LINEARS.items():
        weight = bf16(generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02))
        values = (weight[2].astype(np.uint32) << 16).view(np.float32)
        plain[f"{module}.weight"] = weight
        quantized |= {f"{module}.{part}": tensor for part, tensor in encode(values).items()}
    norms = {
        f"{name}.weight": bf16(np.ones(HIDDEN, np.float32))
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    embedding = bf16(generator.standard_normal((VOCABULARY, HIDDEN), dtype=np.float32))
    outside = {"model.embed_tokens.weight": embedding}
    layer_bytes = sum(raw.nbytes for _, _, raw in quantized.values())
    layers = math.ceil((CANDIDATE_BYTES - embedding[2].nbytes) / layer_bytes)
    for name, tensors in (("source", plain), ("candidate", quantized)):
        shards = [outside] + [
            {f"model.layers.{layer}.{part}": t for part, t in {**tensors, **norms}.items()}
            for layer in range(layers)
        ]
        write_shards(directory / name, shards)
    return embedding[2].nbytes + layers * layer_bytes


def write_shards(directory: Path, shards: list[Tensors]) -> None:
    """Write a directory of shards with their index."""
    directory.mkdir()
    shard_of = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(directory / file, tensors)
        shard_of |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": shard_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def scan(directory: Path, *, deep: bool) -> dict[str, float]:
    """Scan the candidate of a directory in this process; return seconds and bytes."""
    from conductor.probes.findings import Findings, Measurements
    from conductor.probes.formats import ALL_LAYOUTS
    from conductor.probes.formats.layout import PLAIN, UNDECLARED
    from conductor.probes.pairs import Kept, Pair, Stored
    from conductor.probes.safetensors_header import read_whole
    from conductor.probes.values import numbers

    def stored(weights: Any, module: str, shape: tuple[int, int]) -> Stored:
        names = {
            name.removeprefix(f"{module}."): name
            for name in weights.tensors
            if name.startswith(f"{module}.")
        }
        parts = {part: weights.tensors[name] for part, name in names.items()}
        layout = next(each for each in (PLAIN, *ALL_LAYOUTS) if each.holds(parts, shape))
        return Stored(module=module, layout=layout, parts=parts, tensors=names, shape=shape)

    source, candidate = (read_whole(directory / name) for name in ("source", "candidate"))
    pairs, kept = [], []
    for name, tensor in source.tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith("_proj.weight"):
            shape = (tensor.shape[0], tensor.shape[1])
            both = (stored(weights, module, shape) for weights in (source, candidate))
            pair = Pair(kind="mlp", source=next(both), candidate=next(both), scheme=UNDECLARED)
            pairs.append(pair)
        else:
            kept.append(Kept(kind="other", source_name=name, candidate_name=name))
    findings, measurements = Findings(), Measurements()
    usage, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    seen = numbers.scan(
        candidate,
        source,
        pairs,
        kept,
        findings,
        measurements,
        deep=deep,
        progress=lambda done, total: None,
    )
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    worst = max(
        entry["worst"][0]["value"]
        for entry in measurements.document()
        if entry["measure"] == "sqnr_shortfall_db"
    )
    if seen["kinds"]["mlp"]["tensors"] != len(pairs) or worst > 1:
        raise SystemExit(f"the scan misread a good checkpoint: {seen}, {worst} dB")
    if [each for each in findings.document() if each["kind"] != "all_input_scales_neutral"]:
        raise SystemExit(f"the scan found faults in a good checkpoint: {findings.document()}")
    return {
        "seconds": seconds,
        "cpu": after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime,
        "memory_bytes": peak_memory_bytes(),
    }


def peak_memory_bytes() -> int:
    """Return the most memory that this process held, without that of the one it came from."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def scan_apart(directory: Path, *, deep: bool) -> dict[str, float]:
    """Scan in a process of its own, so that its memory is its own."""
    arguments = ["--scan", str(directory), "--deep"] if deep else ["--scan", str(directory)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def seconds_of_cat(files: list[Path]) -> float:
    """Return how long ``cat`` takes to read files."""
    started = time.perf_counter()
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def compare(format_name: str) -> bool:
    """Print the figures of one format; tell whether the aim is met."""
    with TemporaryDirectory(prefix="numeric-scan-") as temporary:
        directory = Path(temporary)
        free = shutil.disk_usage(directory).free
        if free < NEEDED_BYTES:
            raise SystemExit(f"{directory}: {free} bytes free, {NEEDED_BYTES} needed; set TMPDIR")
        size = write_checkpoints(directory, ENCODERS[format_name])
        files = sorted((directory / "candidate").glob("*.safetensors"))
        scan_apart(directory, deep=False)
        cats, scans = [], []
        for _ in range(REPEATS):
            cats.append(seconds_of_cat(files))
            scans.append(scan_apart(directory, deep=False))
        deep = scan_apart(directory, deep=True)
    cat, best = min(cats), min(scans, key=lambda figures: figures["seconds"])
    ratio = best["seconds"] / cat
    print(
        f"{format_name:6} {size / 1e9:.2f} GB  cat {cat:.2f} s  scan {best['seconds']:.2f} s "
        f"({ratio:.2f} x cat, aim {AIM:.2f}; {best['cpu']:.2f} s CPU on {os.cpu_count()} "
        f"processors, peak memory {best['memory_bytes'] / 1e6:.0f} MB)  "
        f"deep {deep['seconds']:.1f} s, {deep['cpu']:.1f} s CPU, "
        f"{deep['memory_bytes'] / 1e6:.0f} MB",
        flush=True,
    )
    return ratio <= AIM


def main(arguments: list[str]) -> int:
    """Print a line for each format; exit code 1 when one is over the aim."""
    if "--scan" in arguments:
        directory = Path(arguments[arguments.index("--scan") + 1])
        print(json.dumps(scan(directory, deep="--deep" in arguments)))
        return 0
    unknown = [name for name in arguments if name not in ENCODERS]
    if unknown:
        raise SystemExit(f"no such format: {', '.join(unknown)}; known: {', '.join(ENCODERS)}")
    within = [compare(name) for name in arguments or ENCODERS]
    return 0 if all(within) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
