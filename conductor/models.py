"""From what the user typed to a source checkpoint on disk.

A model is the built-in ``demo``, a local checkpoint directory, or a Hugging Face id, whose
revision is resolved to a commit so that the release can be repeated. Only safetensors weights are
accepted: pickled weights execute code when they are loaded.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from conductor.failure import Failure
from conductor.probes.machine import free_disk_bytes
from conductor.probes.reading import ProbeError
from conductor.probes.safetensors_header import pickled_files
from conductor.probes.source import check_weights, quantized_format
from gates import FailureClass

DEMO = "demo"
DEMO_PATH = Path(__file__).parent / "demo" / "model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A source checkpoint: what was asked for, where it is, and which commit it is.

    ``quantized`` is the method and the format of one that is quantized already, else None.
    """

    requested: str
    path: Path
    revision: str | None
    architecture: str
    weights_bytes: int
    max_positions: int | None
    quantized: tuple[str, str] | None


def resolve_model(requested: str) -> Model:
    """Find the source checkpoint for ``requested``, downloading it when it is a Hub id.

    Raises:
        Failure: USER_CONFIG_ERROR for a model that is not one; SYSTEMIC when the Hub fails.
    """
    if requested == DEMO:
        return inspect_checkpoint(requested, DEMO_PATH, None)
    path = Path(os.path.expanduser(requested))  # noqa: PTH111 - leaves an unknown ~user alone
    if path.exists():
        return inspect_checkpoint(requested, path.resolve(), None)
    if not _HUB_ID.fullmatch(requested):
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"there is no model {requested!r}: give {DEMO!r}, the directory of a checkpoint, or a "
            "Hugging Face id such as org/name or org/name@revision",
        )
    return _download(requested)


def inspect_checkpoint(requested: str, path: Path, revision: str | None) -> Model:
    """Check that ``path`` is a checkpoint with safetensors weights, reading no tensor.

    Raises:
        Failure: USER_CONFIG_ERROR saying what is missing and what to do.
    """
    if not path.is_dir():
        raise _refuse(path, "is not a directory; give the directory that holds config.json")
    config = _read_config(path)
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickled = pickled_files(path)
        if pickled:
            raise _refuse(
                path,
                f"has only pickled weights ({', '.join(pickled[:3])}), which run code when loaded; "
                "convert them to safetensors first",
            )
        raise _refuse(path, "holds no *.safetensors weights; give a complete checkpoint")
    try:
        check_weights(path)
        quantized = quantized_format(path)
    except ProbeError as error:
        raise Failure(FailureClass.USER_CONFIG_ERROR, f"model {path}: {error}") from None
    return Model(
        requested=requested,
        path=path,
        revision=revision,
        architecture=_architecture(config),
        weights_bytes=sum(file.stat().st_size for file in weights),
        max_positions=_max_positions(config),
        quantized=quantized,
    )


def _architecture(config: dict[str, Any]) -> str:
    """Return the name of the model's first architecture, if its config gives one."""
    match config.get("architectures"):
        case [str(name), *_]:
            return name
    return "unknown"


def _max_positions(config: dict[str, Any]) -> int | None:
    """Return the longest sequence in tokens that the model was made for, if its config says."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        value = section.get("max_position_embeddings")
        if type(value) is int and value > 0:
            return value
    return None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _refuse(path, "holds no config.json; give a checkpoint directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _refuse(path, f"has a config.json that cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise _refuse(path, "has a config.json that is not a mapping")
    return config


def _download(requested: str) -> Model:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = requested.partition("@")
    try:
        info = HfApi().model_info(repository, revision=revision or None, files_metadata=True)
        size = sum(file.size or 0 for file in info.siblings or [] if _is_wanted(file.rfilename))
        check_disk(Path(constants.HF_HUB_CACHE), size, "the Hugging Face cache (HF_HOME)")
        path = snapshot_download(
            repository, revision=info.sha, allow_patterns=_FILES, ignore_patterns=["*/*"]
        )
    except Failure:
        raise
    except GatedRepoError:
        raise _refuse_hub(
            requested, "is gated; accept its terms on the Hub, then set HF_TOKEN"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _refuse_hub(
            requested,
            f"is not on the Hub for this account ({type(error).__name__}); check name and "
            "revision, or log in with `hf auth login` or HF_TOKEN",
        ) from None
    except Exception as error:  # the Hub's client lets those of several HTTP libraries through
        raise Failure(
            FailureClass.SYSTEMIC,
            f"{requested!r} is no local directory, and the Hub cannot be reached for it "
            f"({type(error).__name__}); check the network, or give a local directory",
        ) from None
    commit = info.sha
    return inspect_checkpoint(requested, Path(path), commit)


def _refuse(path: Path, problem: str) -> Failure:
    return Failure(FailureClass.USER_CONFIG_ERROR, f"model {path} {problem}")


def _refuse_hub(requested: str, problem: str) -> Failure:
    return Failure(FailureClass.USER_CONFIG_ERROR, f"model {requested!r} {problem}")


def _is_wanted(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _FILES)


def check_disk(directory: Path, needed_bytes: int, what: str) -> None:
    """Refuse to start what the disk of ``directory`` cannot hold.

    Raises:
        Failure: SYSTEMIC, with the free and the needed MiB.
    """
    free = free_disk_bytes(directory)
    if free < needed_bytes:
        raise Failure(
            FailureClass.SYSTEMIC,
            f"{what} at {directory} has {free / 2**20:.0f} MiB free and needs "
            f"{needed_bytes / 2**20:.0f} MiB; free some space or choose another place",
        )
