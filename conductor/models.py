"""From what the user typed to a source checkpoint on disk.

A model is the built-in ``demo``, a local checkpoint directory, or a Hugging Face id, whose
revision is resolved to a commit so that the release can be repeated. Only safetensors weights are
accepted: pickled weights execute code when they are loaded. Where the Hub cannot be reached, what
was downloaded before will do if it is whole.
"""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from conductor.failure import Failure
from conductor.probes.machine import free_disk_bytes
from conductor.probes.reading import ProbeError
from conductor.probes.safetensors_header import pickled_files
from conductor.probes.source import UNKNOWN, check_weights, quantized_format
from gates import FailureClass

DEMO = "demo"
DEMO_PATH = Path(__file__).parent / "demo" / "model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A source checkpoint: what was asked for, where it is, and which commit it is.

    ``quantized`` is the method and the format of one that is quantized already, else None.
    ``remark`` says what a report should tell of how it was found.
    """

    requested: str
    path: Path
    revision: str | None
    architecture: str
    weights_bytes: int
    max_positions: int | None
    quantized: tuple[str, str] | None
    remark: str | None = None


def resolve_model(requested: str, revision: str | None = None) -> Model:
    """Find the source checkpoint for ``requested``, downloading it when it is a Hub id.

    Args:
        requested: what the user typed.
        revision: the commit that an earlier part of the release had of a Hub id.

    Raises:
        Failure: USER_CONFIG_ERROR for a model that is not one; INFRA_TRANSIENT when the Hub refuses
            for the moment, or is lost in a download; SYSTEMIC when it cannot be reached and the
            model is not there from before.
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
    return _download(requested, revision)


def look_up_model(requested: str, revision: str | None = None) -> Model:
    """Find a source checkpoint as :func:`resolve_model` does, but download and write nothing.

    One that is not on this disk is described by what the Hub says: ``path`` is where it would be.

    Raises:
        Failure: as :func:`resolve_model`.
    """
    there = requested == DEMO or Path(os.path.expanduser(requested)).exists()  # noqa: PTH111
    if there or not _HUB_ID.fullmatch(requested):
        return resolve_model(requested, revision)
    return _download(requested, revision, only_describe=True)


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


def _download(requested: str, revision: str | None, *, only_describe: bool = False) -> Model:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, asked = requested.partition("@")
    revision = revision or asked or None
    try:
        commit, size = _look_up(repository, revision)
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
        if _is_for_the_moment(error):
            raise _try_later(requested, error) from None
        known = _find_downloaded(requested, repository, revision)
        if known is None:
            raise _unreachable(requested, error) from None
        return known
    if only_describe:
        there = _downloaded(repository, commit)
        if there is None:
            return _describe(requested, repository, commit)
        return inspect_checkpoint(requested, there, commit)
    path = _fetch(requested, repository, commit, size)
    return inspect_checkpoint(requested, path, commit)


def _describe(requested: str, repository: str, commit: str) -> Model:
    """Return what the Hub says of a model that is not on this disk."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        info = HfApi().model_info(repository, revision=commit, files_metadata=True)
    except Exception as error:  # it answered a moment ago
        raise _try_later(requested, error) from None
    config = info.config or {}
    weights = [
        file.size or 0
        for file in info.siblings or []
        if _is_wanted(file.rfilename) and file.rfilename.endswith(".safetensors")
    ]
    if not weights:
        raise _refuse_hub(requested, "holds no *.safetensors weights; give another checkpoint")
    folder = repo_folder_name(repo_id=repository, repo_type="model")
    method = (config.get("quantization_config") or {}).get("quant_method")
    return Model(
        requested=requested,
        path=Path(constants.HF_HUB_CACHE) / folder / "snapshots" / commit,
        revision=commit,
        architecture=_architecture(config),
        weights_bytes=sum(weights),
        max_positions=_max_positions(config),
        quantized=(str(method), UNKNOWN) if method else None,
    )


def _look_up(repository: str, revision: str | None) -> tuple[str, int]:
    """Return the commit of a revision, and how many bytes of it are wanted."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    size = sum(file.size or 0 for file in info.siblings or [] if _is_wanted(file.rfilename))
    assert info.sha, "the Hub named no commit"
    return info.sha, size


def _fetch(requested: str, repository: str, commit: str, size: int) -> Path:
    """Download what is not there yet; what came in before an interruption is kept by the client.

    Raises:
        Failure: INFRA_TRANSIENT when the Hub, which was there a moment ago, fails; SYSTEMIC when
            the disk is full.
    """
    from huggingface_hub import constants, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    if _downloaded(repository, commit) is None:
        check_disk(cache, size, "the Hugging Face cache (HF_HOME)")
    try:
        path = snapshot_download(
            repository, revision=commit, allow_patterns=_FILES, ignore_patterns=["*/*"]
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise Failure(
                FailureClass.SYSTEMIC,
                f"the disk of the Hugging Face cache at {cache} is full; free some space, or set "
                "HF_HOME to another place",
            ) from None
        raise _try_later(requested, error) from None
    return Path(path)


def _find_downloaded(requested: str, repository: str, revision: str | None) -> Model | None:
    """Return what was downloaded of a revision if it is whole, with a remark that says so."""
    path = _downloaded(repository, revision)
    if path is None:
        return None
    try:
        model = inspect_checkpoint(requested, path, path.name)
    except Failure:  # part of a download that was cut short
        return None
    return replace(
        model,
        remark=f"the Hub could not be reached; {requested} is what was downloaded earlier, commit "
        f"{path.name}",
    )


def _downloaded(repository: str, revision: str | None) -> Path | None:
    """Return the directory of a commit, branch or tag in the Hub's cache, if nothing is missing.

    The client knows that from its list of the commit's files, where it has kept one.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=_FILES,
                ignore_patterns=["*/*"],
                local_files_only=True,
            )
        )
    except (OSError, ValueError):
        return None


def _is_for_the_moment(error: BaseException) -> bool:
    """Tell whether the Hub is there and cannot answer now: 429, 5xx, or no answer in time.

    One to which no connection comes about is not there.
    """
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TimeoutException", "Timeout", "TimeoutError"}) and not (
        names & {"ConnectTimeout"}
    )


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _try_later(requested: str, error: BaseException) -> Failure:
    status = _status(error)
    reason = f"HTTP {status}" if status else type(error).__name__
    return Failure(
        FailureClass.INFRA_TRANSIENT,
        f"the Hub failed while {requested!r} was fetched ({reason}); try again later, or give a "
        "local directory",
    )


def _unreachable(requested: str, error: BaseException) -> Failure:
    status = _status(error)
    reason = f"HTTP {status}" if status else type(error).__name__
    return Failure(
        FailureClass.SYSTEMIC,
        f"{requested!r} is no local directory, the Hub cannot be reached for it ({reason}), and "
        "it was not downloaded whole before; check the network, or give a local directory",
    )


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
