"""The environment variables of workers and servers: the caller's, less what must not reach them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

LOOPBACK_HOSTS = "127.0.0.1,localhost"
_PROXIES = {"http_proxy", "https_proxy", "all_proxy", "ftp_proxy"}
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
# Nothing of ours may leak into another interpreter, and no worker talks to the tracking server.
_OURS = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}


def on_path(environ: Mapping[str, str], interpreter: Path) -> dict[str, str]:
    """Put an environment's own programs first: its libraries call ninja and the like by name."""
    return {**environ, "PATH": f"{interpreter.parent}{os.pathsep}{environ.get('PATH', os.defpath)}"}


def worker_environ(environ: Mapping[str, str], *, offline: bool) -> dict[str, str]:
    """Return the environment for a worker or a server.

    Args:
        environ: the conductor's environment.
        offline: nothing beyond loopback will be asked for: proxies are dropped and the Hugging
            Face libraries are told not to try. Otherwise proxies stay, but not for loopback.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name not in _OURS
        and not name.startswith("MLFLOW_")
        and not (offline and name.lower() in _PROXIES)
    }
    kept |= {"NO_PROXY": LOOPBACK_HOSTS, "no_proxy": LOOPBACK_HOSTS}
    if not offline:
        known = environ.get("NO_PROXY") or environ.get("no_proxy")
        if known:
            kept |= dict.fromkeys(("NO_PROXY", "no_proxy"), f"{LOOPBACK_HOSTS},{known}")
    kept |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # Threads that spin while they wait take the cores from those that work: on two busy cores a
    # quantizer took 139 s with spinning and 50 s without.
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if offline:
        kept |= dict.fromkeys(_OFFLINE, "1")
    return kept
