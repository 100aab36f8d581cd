"""From what the user typed to a source checkpoint on disk.

A model is the built-in ``demo``, a local checkpoint directory, or a Hugging Face id, whose
revision is resolved to a commit so that the release can be repeated. Only safetensors weights are
accepted: pickled weights execute code when they are loaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conductor.failure import Failure
from gates import FailureClass

DEMO = "demo"
DEMO_PATH = Path(__file__).parent / "demo" / "model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A source checkpoint: what was asked for, where it is, and which commit it is."""

    requested: str
    path: Path
    revision: str | None
    architecture: str
    weights_bytes: int


def resolve_model(requested: str) -> Model:
    """Find the source checkpoint for ``requested``, downloading it when it is a Hub id.

    Raises:
        Failure: USER_CONFIG_ERROR for a model that is not one; SYSTEMIC when the Hub fails.
    """
    if requested == DEMO:
        return inspect_checkpoint(requested, DEMO_PATH, None)
    path = Path(requested).expanduser()
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
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED)
        if pickled:
            raise _refuse(
                path,
                f"has only pickled weights ({', '.join(pickled[:3])}), which run code when loaded; "
                "convert them to safetensors first",
            )
        raise _refuse(path, "holds no *.safetensors weights; give a complete checkpoint")
    architectures = config.get("architectures")
    return Model(
        requested=requested,
        path=path,
        revision=revision,
        architecture=architectures[0]
        if isinstance(architectures, list) and architectures
        else "unknown",
        weights_bytes=sum(file.stat().st_size for file in weights),
    )


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
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repository, _, revision = requested.partition("@")
    try:
        commit = HfApi().model_info(repository, revision=revision or None).sha
        path = snapshot_download(repository, revision=commit, allow_patterns=_FILES)
    except RepositoryNotFoundError:
        raise Failure(
            FailureClass.USER_CONFIG_ERROR,
            f"the Hub has no model {repository!r} that this account can see; check the name, or "
            "log in with `hf auth login` or HF_TOKEN",
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise Failure(
            FailureClass.SYSTEMIC,
            f"{requested!r} is no local directory, and the Hub cannot be reached for it "
            f"({type(error).__name__}); check the network, or give a local directory",
        ) from None
    return inspect_checkpoint(requested, Path(path), commit)


def _refuse(path: Path, problem: str) -> Failure:
    return Failure(FailureClass.USER_CONFIG_ERROR, f"model {path} {problem}")
