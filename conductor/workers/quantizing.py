"""What both quantizing workers do alike: load the source, read calibration text, hand over a whole
checkpoint.

Like ``protocol``, a sibling that runs inside a stage environment. Weights are loaded from
safetensors only. A checkpoint appears under its name in one rename, so a killed worker leaves none;
what the quantizer has no business changing (tokenizer, chat template, generation settings) is
copied from the source byte for byte.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from determinism import exceptions, use_deterministic_algorithms
from protocol import Progress, WorkerFailure

# Written by the exporter, or not part of a checkpoint that is served from safetensors.
NOT_COPIED = {"config.json", "hf_quant_config.json", "recipe.yaml", "README.md"}
WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz"),
}
GENERATION_CONFIG = "generation_config.json"
COPIED_DIRECTORIES = ("additional_chat_templates",)
SHUFFLE_BUFFER = 10_000


@dataclass(kw_only=True)
class Calibration:
    """Tokenized calibration text: lists of token ids, and how many the quantizer asked for.

    ``taken`` holds the samples that were run, not those on offer: a recipe that needs no text
    records none.
    """

    source: str | None
    max_length: int
    samples: Sequence[Sequence[int]]
    progress: Progress
    taken: set[int] = field(default_factory=set)

    def take(self, index: int) -> Sequence[int]:
        """Return one sample and report progress."""
        self.taken.add(index)
        done, total = len(self.taken), len(self.samples)
        self.progress(done, total, f"calibrating {done}/{total}")
        return self.samples[index]

    def document(self) -> dict[str, Any]:
        """Return what the result records."""
        return {
            "source": self.source if self.taken else None,
            "samples": len(self.taken),
            "max_length": self.max_length,
            "tokens": sum(len(self.samples[index]) for index in self.taken),
        }


def choose_device(request: dict[str, Any]) -> str:
    """Return ``cpu`` or ``cuda``; call before anything imports torch.

    Both quantizers take an accelerator when they see one, so it is hidden when the CPU is meant.
    """
    if request["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise WorkerFailure(
            "SYSTEMIC",
            f"torch {torch.__version__} sees no GPU; install the driver and the CUDA build, or "
            "quantize on the CPU",
        )
    return "cuda"


def set_seed(seed: int) -> None:
    """Seed every generator that a quantizer may draw from; be deterministic if that is asked."""
    import transformers

    transformers.set_seed(seed)
    use_deterministic_algorithms()


def load_model(request: dict[str, Any], **options: Any) -> Any:
    """Load the source as a causal language model from safetensors, in its own precision."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    path = Path(request["model_path"])
    trust_remote_code = bool(request["trust_remote_code"])
    if not any(path.glob("*.safetensors")):
        raise WorkerFailure(
            "USER_CONFIG_ERROR",
            f"{path} holds no *.safetensors; pickled weights are never loaded, convert them first",
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        raise WorkerFailure(
            "MODEL_UNSUPPORTED",
            f"transformers {version('transformers')} does not know the model in {path} "
            f"({first_line(error)}); use a release that supports this architecture",
        ) from error
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", {}) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise WorkerFailure(
            "MODEL_UNSUPPORTED",
            f"a {config.model_type} model is not a causal language model that transformers "
            f"{version('transformers')} can build; choose another model",
        )
    with memory_failures():
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **options,
        )


def load_calibration(request: dict[str, Any], progress: Progress) -> Calibration:
    """Read and tokenize the calibration text; no samples when the request names no data."""
    wanted = request["calibration"]
    source = wanted["path"] or wanted["dataset"]
    samples = _tokenized(request) if source else []
    if source and not samples:
        raise WorkerFailure(
            "USER_CONFIG_ERROR",
            f"calibration data {source} holds no text; give rows with a {wanted['text_column']!r} "
            "field",
        )
    return Calibration(
        source=source, max_length=wanted["max_length"], samples=samples, progress=progress
    )


def _tokenized(request: dict[str, Any]) -> list[list[int]]:
    wanted = request["calibration"]
    tokenizer = _load_tokenizer(request)
    rows = _jsonl_rows(wanted) if wanted["path"] else _hub_rows(wanted)
    samples = []
    for number, row in rows:
        text = _text(tokenizer, row, wanted["text_column"], number)
        ids = tokenizer(text, truncation=True, max_length=wanted["max_length"])["input_ids"]
        if ids:
            samples.append(ids)
    return samples


def _load_tokenizer(request: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            request["model_path"],
            local_files_only=True,
            trust_remote_code=bool(request["trust_remote_code"]),
        )
    except (OSError, ValueError) as error:
        raise WorkerFailure(
            "USER_CONFIG_ERROR",
            f"{request['model_path']} has no tokenizer that transformers {version('transformers')} "
            f"can load ({first_line(error)}); complete the checkpoint",
        ) from error


def _jsonl_rows(wanted: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return a seeded choice of rows, each with the file and line it comes from."""
    path = Path(wanted["path"])
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                rows.append((f"{path}:{number}", json.loads(line)))
    except (OSError, ValueError) as error:
        raise WorkerFailure(
            "USER_CONFIG_ERROR",
            f"cannot read calibration data {path} ({first_line(error)}); give a file with one JSON "
            "object a line",
        ) from error
    chosen = random.Random(wanted["seed"])  # noqa: S311
    return chosen.sample(rows, min(wanted["samples"], len(rows)))


def _hub_rows(wanted: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield rows of a Hub data set without downloading all of it."""
    import datasets

    try:
        stream = datasets.load_dataset(wanted["dataset"], split=wanted["split"], streaming=True)
        shuffled = stream.shuffle(seed=wanted["seed"], buffer_size=SHUFFLE_BUFFER)
        for number, row in enumerate(itertools.islice(shuffled, wanted["samples"]), start=1):
            yield f"{wanted['dataset']} sample {number}", row
    except (ValueError, FileNotFoundError) as error:
        raise WorkerFailure(
            "USER_CONFIG_ERROR",
            f"no calibration data {wanted['dataset']!r} with split {wanted['split']!r} "
            f"({first_line(error)}); check both, or give a local JSONL file",
        ) from error
    except OSError as error:
        raise WorkerFailure(
            "INFRA_TRANSIENT",
            f"cannot reach calibration data {wanted['dataset']!r} ({first_line(error)}); try "
            "again, or give a local JSONL file",
        ) from error


def _text(tokenizer: Any, row: Any, column: str, where: str) -> str:
    """Return a row's text; a list of chat messages goes through the chat template."""
    value = row.get(column) if isinstance(row, dict) else None
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(value, tokenize=False))
    raise WorkerFailure(
        "USER_CONFIG_ERROR",
        f"calibration data {where}: {column!r} must be text, or chat messages for a model with a "
        "chat template; name another text column",
    )


@contextmanager
def memory_failures() -> Iterator[None]:
    """Turn running out of memory into a failure that names the remedy."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise WorkerFailure(
            "SYSTEMIC",
            "the model does not fit in memory with this calibration; use a larger machine, or "
            "fewer and shorter calibration samples",
        ) from error


@contextmanager
def quantizer_failures(quantizer: str) -> Iterator[None]:
    """Turn what a quantizer raises over a sound request into an unsupported model."""
    try:
        with memory_failures():
            yield
    except (WorkerFailure, OSError):
        raise
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        raise WorkerFailure(
            "MODEL_UNSUPPORTED",
            f"{quantizer} cannot quantize this model with this recipe ({first_line(error)}); try "
            "another recipe or quantizer",
        ) from error


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def export(request: dict[str, Any], save: Callable[[Path], None]) -> Path:
    """Let ``save`` write the quantized weights, complete the checkpoint, and give it its name."""
    source, output = Path(request["model_path"]), Path(request["output_dir"])
    partial = output.with_name(f".{output.name}.partial")
    for leftover in (partial, output):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        save(partial)
        _copy_from_source(source, partial)
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        partial.rename(output)
    except Exception as error:
        _explain_full_disk(source, partial, error)
        raise
    return output


def _explain_full_disk(source: Path, partial: Path, error: Exception) -> None:
    """Say that the disk is full where it is: exporters raise errors of many kinds then."""
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    free = shutil.disk_usage(partial.parent).free
    if free < weights:
        raise WorkerFailure(
            "SYSTEMIC",
            f"the checkpoint cannot be written ({first_line(error)}): {partial.parent} has "
            f"{free // 2**20} MiB free; free some space",
        ) from error


def _copy_from_source(source: Path, partial: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and _is_copied(path.name):
            shutil.copyfile(path, partial / path.name)
    for name in COPIED_DIRECTORIES:
        if (source / name).is_dir():
            shutil.copytree(source / name, partial / name, dirs_exist_ok=True)
    if not (source / GENERATION_CONFIG).exists():
        # Invented by the exporter: the source stops and samples by other defaults.
        (partial / GENERATION_CONFIG).unlink(missing_ok=True)


def _is_copied(name: str) -> bool:
    return not (
        name.startswith(".")
        or name in NOT_COPIED
        or name.endswith(".index.json")
        or Path(name).suffix in WEIGHT_SUFFIXES
    )


def describe(
    request: dict[str, Any],
    *,
    checkpoint: Path,
    package: str,
    matched: int,
    calibration: Calibration,
    started: float,
) -> dict[str, Any]:
    """Return the worker's result; ``matched`` counts the layers whose weights were quantized."""
    packages = (package, "torch", "transformers", "compressed-tensors")
    return {
        "checkpoint": str(checkpoint),
        "quantizer": package,
        "quantizer_version": version(package),
        "scheme": request["scheme"],
        "matched": matched,
        "seconds": round(time.monotonic() - started, 1),
        "calibration": calibration.document(),
        "versions": {name: version(name) for name in packages},
        **exceptions(),
    }
