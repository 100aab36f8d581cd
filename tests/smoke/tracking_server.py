"""Track a real release on a real MLflow server over HTTP, and read it back over HTTP.

Run as ``python -m tests.smoke.tracking_server DIRECTORY``; prints what the server shows as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from conductor.engines.vllm import free_port

RELEASE = ("release", "demo", "--recipe", "nvfp4_experts_only", "--json")
STARTS_WITHIN_S = 120


@contextmanager
def tracking_server(directory: Path) -> Iterator[str]:
    """Run a tracking server for as long as the block; its files are below ``directory``."""
    directory.mkdir(parents=True)
    uri = f"http://127.0.0.1:{free_port()}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{directory}/server.db"),
        *("--artifacts-destination", str(directory / "artifacts")),
        *("--host", "127.0.0.1", "--port", uri.rpartition(":")[2]),
    ]
    with (directory / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(f"{uri}/health", server)
        yield uri
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < end and server.poll() is None:
        try:
            if httpx.get(url, trust_env=False).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise SystemExit("the tracking server did not start; read server.log")


def shown_runs(uri: str, experiment: str) -> list[dict[str, Any]]:
    """Return the runs of an experiment as any client of the server sees them."""
    api = f"{uri}/api/2.0/mlflow/runs/search"
    answer = httpx.post(api, json={"experiment_ids": [experiment]}, trust_env=False)
    return answer.raise_for_status().json()["runs"]


def tags(run: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in run["data"]["tags"]}


def main(directory: Path) -> int:
    with tracking_server(directory / "server") as uri:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "conductor.cli", *RELEASE),
                *("--workspace", str(directory / "workspace")),
            ],
            env={**os.environ, "MLFLOW_TRACKING_URI": uri},
            stdout=subprocess.PIPE,
            text=True,
        )
        tracking = json.loads(done.stdout)["tracking"]
        api = f"{uri}/api/2.0/mlflow/runs/get"
        answer = httpx.get(api, params={"run_id": tracking["run_id"]}, trust_env=False)
        parent = answer.raise_for_status().json()["run"]
        runs = shown_runs(uri, parent["info"]["experiment_id"])
    children = [run for run in runs if tags(run).get("mlflow.parentRunId") == tracking["run_id"]]
    document = {
        "status": tracking["status"],
        "uri_is_the_server": tracking["uri"] == uri,
        "decision": tags(parent)["day0.decision"],
        "params": {param["key"]: param["value"] for param in parent["data"]["params"]},
        "stage_runs": len(children),
        "metrics": sum(len(run["data"].get("metrics", [])) for run in runs),
    }
    sys.stdout.write(f"{json.dumps(document, indent=2)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
