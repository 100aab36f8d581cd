"""Record what the tools of a finished demo release were asked and left, for ``--dry-run``.

Run as ``python -m conductor.demo.record RUN_DIRECTORY`` after a change to the demo model, its
suite, or what is asked of the tools. Paths of this machine are taken out; the exported weights are
kept as :mod:`conductor.demo.export` keeps them.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import yaml

from conductor.compatibility import Quantizer
from conductor.demo.export import shrink
from conductor.environments.builder import Environments
from conductor.models import DEMO_PATH
from conductor.quantizers import WORKERS
from conductor.recorded_tools import (
    ARCHIVE,
    DOCUMENT,
    EVALUATION_STAGES,
    PACKAGE,
    PACKAGE_MARK,
    RECORDED,
    SHRUNK,
    VERSION,
)

ACCESS_LINE = re.compile(rb"INFO: +\S+:\d+ - ")
SERVER_LINE = re.compile(rb"(?:\(\w+ pid=\d+\) )?INFO: +")
WEIGHTS = "model.safetensors"


def record(run_dir: Path, destination: Path) -> None:
    """Write the record of the release under ``run_dir``; raises ValueError for another decision."""
    report = _json(run_dir / "report.json")
    if report["decision"] != "ACCEPT":
        raise ValueError(f"{run_dir} was decided {report['decision']}; record one that is accepted")
    config = yaml.safe_load((run_dir / "config.resolved.yaml").read_text(encoding="utf-8"))
    document = {
        "version": VERSION,
        "model": config["model"]["value"],
        "recipe": config["recipe"]["value"],
        "day0_version": report["day0_version"],
        "machine": _json(run_dir / "env.json")["machine"] | {"system": "Linux"},
        "environments": _environments(_json(run_dir / "env.json")["environments"]),
        "quantize": {"script": _quantizer(report), **_worker(run_dir / "stages" / "ptq")},
        "canary": _json(run_dir / "stages" / "deploy" / "canary.json"),
        "sides": {
            side: _worker(run_dir / "stages" / stage) | _engine(run_dir / "stages" / stage)
            for side, stage in EVALUATION_STAGES.items()
        },
    }
    files = _files(run_dir)
    destination.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1) + "\n"
    for private, mark in _private(run_dir):
        text = text.replace(private.decode(), mark.decode())
        files = {name: data.replace(private, mark) for name, data in files.items()}
    (destination / DOCUMENT).write_text(text, encoding="utf-8")
    _pack(files, destination / ARCHIVE)


def _quantizer(report: dict[str, Any]) -> str:
    return WORKERS[Quantizer(report["recipe"]["quantizer"])]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _environments(used: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "digest": each["lock_digest"],
            "packages": {name: package["version"] for name, package in each["packages"].items()},
        }
        for name, each in used.items()
    }


def _worker(stage_dir: Path) -> dict[str, Any]:
    return {name: _json(stage_dir / f"{name}.json") for name in ("request", "progress", "result")}


def _engine(stage_dir: Path) -> dict[str, Any]:
    return {"settings": _json(stage_dir / "engine.json")["settings"]}


def _private(run_dir: Path) -> list[tuple[bytes, bytes]]:
    """Return the paths of this machine, and what stands for them in a record."""
    environments = Environments().root
    return [
        (str(run_dir).encode(), b"@run@"),
        (str(PACKAGE).encode(), PACKAGE_MARK),
        (str(environments).encode(), b"@environments@"),
        (str(Path.home()).encode(), b"@home@"),
    ]


def _files(run_dir: Path) -> dict[str, bytes]:
    """Return what the tools left behind, by its name in the archive."""
    stages = run_dir / "stages"
    files = {"quantize/stdout.log": (stages / "ptq" / "stdout.log").read_bytes()}
    for path in sorted((run_dir / "checkpoint").iterdir()):
        files[f"quantize/output/{path.name}"] = path.read_bytes()
    weights = files.pop(f"quantize/output/{WEIGHTS}")
    source = (DEMO_PATH / WEIGHTS).read_bytes()
    files[f"quantize/output/{WEIGHTS}{SHRUNK}"] = shrink(weights, source)
    for side, stage in EVALUATION_STAGES.items():
        stage_dir = stages / stage
        files[f"{side}/stdout.log"] = (stage_dir / "stdout.log").read_bytes()
        for path in sorted((stage_dir / "results").rglob("*")):
            if path.is_file():
                name = path.relative_to(stage_dir / "results")
                files[f"{side}/output/{name}"] = path.read_bytes()
        files |= {f"{side}/{name}.log": log for name, log in _server_log(run_dir, stage_dir)}
    return files


def _server_log(run_dir: Path, stage_dir: Path) -> list[tuple[str, bytes]]:
    """Return the lines that are read of a server's log: its start, the canary, the evaluation."""
    (server,) = _json(stage_dir / "engine.json")["servers"]
    log = (run_dir / server["log"]).read_bytes()
    before, evaluation = log[: server["offset"]], log[server["offset"] :]
    return [
        ("start", _lines(before, canary=False)),
        ("canary", _lines(before, canary=True)),
        ("evaluation", _lines(evaluation, canary=True)),
    ]


def _lines(log: bytes, *, canary: bool) -> bytes:
    lines = [line for line in log.splitlines(keepends=True) if SERVER_LINE.match(line)]
    return b"".join(line for line in lines if bool(ACCESS_LINE.search(line)) is canary)


def _pack(files: dict[str, bytes], archive: Path) -> None:
    """Write an archive whose bytes depend on nothing but ``files``."""
    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for name, data in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    record(Path(sys.argv[1]).resolve(), RECORDED / "int8")
