"""CPU time and memory of the header checks on a checkpoint of 281,393 tensors, in one run.

Run: ``.venv/bin/python benchmarks/checkpoint_scan.py``. A mixture of experts with the width of
DeepSeek-V3, 61 layers of 384 experts, is written twice to a temporary directory: in BF16, and in
NVFP4 as ModelOpt exports it, 589 GB in 120 shards with 124 exclude patterns. The files are sparse:
headers and configuration are there, tensor bytes are holes. The aims: checks 1 to 4 (integrity,
completeness, intent and size, none of which reads a tensor) of the candidate beside its source take
at most three times the CPU time of ``json.loads`` over the candidate's headers alone, and under
1 GB of memory. The aim is held against parsing that keeps what was parsed, as whoever compares
headers must; where each result is dropped at once, the garbage collector has nothing to do and
``json`` takes a quarter of the time, which is printed as well. Each figure is of a fresh process
that has imported what it needs, and the least of several.
"""

from __future__ import annotations

import importlib
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
REPEATS = 3
MOST_BYTES = 1_000_000_000
RECIPE = "nvfp4_experts_only"

TENSORS, PATTERNS, SHARDS, APPARENT_GB = 281_393, 124, 120, 589
LAYERS, EXPERTS, LAYERS_WITHOUT_BIAS = 61, 384, 3
HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, HEAD = 7168, 2048, 163_840, 16, 128
BITS = {"BF16": 16, "F32": 32, "U8": 8, "F8_E4M3": 8}

Tensor = tuple[str, str, tuple[int, ...]]
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTERMEDIATE,
    "n_routed_experts": EXPERTS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def expert(module: str, *, quantized: bool) -> Iterator[Tensor]:
    """Yield the tensors of one expert: three in BF16, twelve in NVFP4."""
    for projection in ("gate_proj", "up_proj", "down_proj"):
        is_down = projection == "down_proj"
        rows, columns = (HIDDEN, INTERMEDIATE) if is_down else (INTERMEDIATE, HIDDEN)
        name = f"{module}.{projection}"
        if quantized:
            yield f"{name}.input_scale", "F32", ()
            yield f"{name}.weight", "U8", (rows, columns // 2)
            yield f"{name}.weight_scale", "F8_E4M3", (rows, columns // 16)
            yield f"{name}.weight_scale_2", "F32", ()
        else:
            yield f"{name}.weight", "BF16", (rows, columns)


def model(*, quantized: bool) -> Iterator[Tensor]:
    """Yield every tensor in the order of the layers."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        parent = f"model.layers.{layer}"
        yield f"{parent}.input_layernorm.weight", "BF16", (HIDDEN,)
        yield f"{parent}.self_attn.qkv_proj.weight", "BF16", ((HEADS + 2) * HEAD, HIDDEN)
        yield f"{parent}.self_attn.o_proj.weight", "BF16", (HIDDEN, HEADS * HEAD)
        yield f"{parent}.mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)
        if layer >= LAYERS_WITHOUT_BIAS:
            yield f"{parent}.mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)
        for number in range(EXPERTS):
            yield from expert(f"{parent}.mlp.experts.{number}", quantized=quantized)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCABULARY, HIDDEN)


def write_shards(directory: Path, tensors: list[Tensor]) -> int:
    """Write sparse shards of equal size and their index; return the bytes of all tensors."""
    sizes = [math.prod(shape) * BITS[dtype] // 8 for _, dtype, shape in tensors]
    total, position = sum(sizes), 0
    shards: list[list[tuple[Tensor, int]]] = [[] for _ in range(SHARDS)]
    for tensor, size in zip(tensors, sizes, strict=True):
        shards[position * SHARDS // total].append((tensor, size))
        position += size
    weight_map: dict[str, str] = {}
    for number, held in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        weight_map |= {name: file for (name, _, _), _ in held}
        write_sparse(directory / file, held)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def write_sparse(path: Path, held: list[tuple[Tensor, int]]) -> None:
    """Write one file whose tensor bytes are a hole in it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for (name, dtype, shape), size in held:
        begin, end = end, end + size
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)


def write_source(directory: Path) -> None:
    """Write the BF16 source."""
    directory.mkdir()
    write_shards(directory, list(model(quantized=False)))
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))


def write_candidate(directory: Path) -> None:
    """Write the NVFP4 export, with its configuration in both places."""
    directory.mkdir()
    tensors = list(model(quantized=True))
    total = write_shards(directory, tensors)
    excluded = ["lm_head", "model.embed_tokens"]
    for layer in range(LAYERS):
        excluded += [f"model.layers.{layer}.{part}" for part in ("self_attn*", "mlp.gate")]
    found = (len(tensors), len(excluded), total // 10**9)
    if found != (TENSORS, PATTERNS, APPARENT_GB):
        raise SystemExit(f"the checkpoint is another than the one meant: {found}")
    stated = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None}
    producer = {"name": "modelopt", "version": "0.47.0"}
    document = {"producer": producer, "quantization": {**stated, "exclude_modules": excluded}}
    (directory / "hf_quant_config.json").write_text(json.dumps(document, indent=2))
    group = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    groups = {"group_0": {"weights": group, "input_activations": group, "targets": ["Linear"]}}
    mirrored = {
        "config_groups": groups,
        "ignore": excluded,
        "quant_algo": "NVFP4",
        "quant_method": "modelopt",
        "producer": producer,
    }
    config = {**CONFIG, "quantization_config": mirrored}
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def parse_and_drop(checkpoint: Path, source: Path) -> str:
    """Parse the candidate's headers and keep nothing, which leaves the collector idle."""
    return f"{sum(len(json.loads(header)) - 1 for header in headers(checkpoint))} tensors"


def parse_and_keep(checkpoint: Path, source: Path) -> str:
    """Parse the candidate's headers and keep them, as whoever compares them must."""
    parsed = [json.loads(header) for header in headers(checkpoint)]
    return f"{sum(map(len, parsed)) - len(parsed)} tensors"


def headers(checkpoint: Path) -> Iterator[bytes]:
    """Yield the header of every file."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as stream:
            yield stream.read(int.from_bytes(stream.read(8), "little"))


def read_headers(checkpoint: Path, source: Path) -> str:
    """Read the candidate's headers and index, with all checks of integrity."""
    from conductor.probes.findings import Findings
    from conductor.probes.safetensors_header import read_weights

    findings = Findings()
    weights = read_weights(checkpoint, findings)
    return f"{len(weights.tensors)} tensors, {len(findings.document())} kinds of findings"


def check_headers(checkpoint: Path, source: Path) -> str:
    """Run checks 1 to 4 on the candidate beside its source."""
    from conductor.probes.checkpoint import probe_headers
    from gates import RECIPES

    summary = probe_headers(checkpoint, source, RECIPES[RECIPE])
    kinds = [finding["kind"] for finding in summary["findings"]]
    return f"{summary['layer_precision_counts']['NVFP4']} layers in NVFP4, findings: {kinds}"


MEASURED: dict[str, tuple[Callable[[Path, Path], str], float | None]] = {
    "json, kept": (parse_and_keep, None),
    "json, dropped": (parse_and_drop, None),
    "read_weights": (read_headers, None),
    "probe_headers": (check_headers, 3.0),
}
"""What is measured, and how many times the first of them it may take."""


def measure(name: str, checkpoint: Path, source: Path) -> tuple[float, float, int, str]:
    """Return least CPU and wall seconds, most bytes of memory, and the answer."""
    command = [sys.executable, __file__, name, str(checkpoint), str(source)]
    runs = []
    for _ in range(REPEATS):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr}")
        runs.append(json.loads(done.stdout))
    best = min(runs, key=lambda run: run["cpu_s"])
    return best["cpu_s"], best["wall_s"], max(run["peak_bytes"] for run in runs), best["answer"]


def measured_here(name: str, checkpoint: Path, source: Path) -> None:
    """Run one thing in this process and print its figures as JSON."""
    sys.path.insert(0, str(ROOT))
    importlib.import_module("conductor.probes.checkpoint")
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    answer = MEASURED[name][0](checkpoint, source)
    figures = {
        "cpu_s": time.process_time() - cpu_s,
        "wall_s": time.perf_counter() - wall_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "answer": answer,
    }
    print(json.dumps(figures))


def main() -> int:
    """Print the table; exit code 1 when an aim is missed."""
    if len(sys.argv) > 1:
        measured_here(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
        return 0
    missed = False
    with TemporaryDirectory() as directory:
        checkpoint, source = Path(directory) / "candidate", Path(directory) / "source"
        write_candidate(checkpoint)
        write_source(source)
        least = 0.0
        for name, (_, aim) in MEASURED.items():
            cpu_s, wall_s, peak_bytes, answer = measure(name, checkpoint, source)
            least = least or cpu_s
            ratio = cpu_s / least
            held = "" if aim is None else f", aim {aim:g} x and under {MOST_BYTES / 1e6:.0f} MB"
            missed |= aim is not None and (ratio > aim or peak_bytes > MOST_BYTES)
            print(
                f"{name:15} {cpu_s:.2f} s CPU, {wall_s:.2f} s, {peak_bytes / 1e6:.0f} MB, "
                f"{ratio:.2f} x json{held} ({answer})",
                flush=True,
            )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
