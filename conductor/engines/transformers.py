"""The reference engine: plain transformers, in the process of the worker that asks.

For formats that no server can run on the device at hand. Its low-precision arithmetic is emulated,
and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conductor.compatibility import Device
from conductor.engines import CANARY_MAX_TOKENS, REMEMBERED, Sides
from conductor.executors.local import Note, Progress, Worker, run_worker
from gates.canary import Health

SIDES = ("candidate", "source")


class TransformersSession:
    """Answer prompts by loading the checkpoint inside a worker; nothing keeps running."""

    def __init__(
        self,
        sides: Sides,
        *,
        interpreter: Path,
        device: Device,
        dtype: str,
        environ: Mapping[str, str],
        stall_s: float,
        note: Note,
    ) -> None:
        """Keep what the workers need; ``stall_s`` seconds without progress count as a hang."""
        self._sides = sides
        self._interpreter = interpreter
        self._device = device
        self._dtype = dtype
        self._environ = environ
        self._stall_s = stall_s
        self._note = note

    def answer_canary(
        self,
        prompts: Sequence[str],
        stage_dir: Path,
        progress: Progress,
        source_answers: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Load the checkpoints, one after the other, and let them answer."""
        asked = SIDES if source_answers is None else ("candidate",)
        result = run_worker(
            Worker(script="answer_prompts.py", interpreter=self._interpreter),
            stage_dir,
            {
                "checkpoints": {side: str(self._sides.path(side)) for side in asked},
                "tokenizer": str(self._sides.source),
                "prompts": list(prompts),
                "max_tokens": CANARY_MAX_TOKENS,
                "dtype": self._dtype,
                "device": self._device,
            },
            environ=self._environ,
            progress=progress,
            stall_s=self._stall_s,
            note=self._note,
        )
        errors = result["load_errors"]
        answers = {"source": source_answers, **result["answers"]}
        loads = {"candidate": "loads", "source": "loads" if "source" in asked else REMEMBERED}
        health = {side: Health.DIED if side in errors else Health.OK for side in SIDES}
        return {
            "engine": "transformers",
            "served_name": "candidate",
            "expected_name": "candidate",
            "health": health["candidate"],
            "health_detail": errors.get("candidate", loads["candidate"]),
            "source_health": health["source"],
            "source_health_detail": errors.get("source", loads["source"]),
            "prompts": []
            if errors
            else [
                {"prompt": prompt, "candidate": answer, "source": reference}
                for prompt, answer, reference in zip(
                    prompts, answers["candidate"], answers["source"], strict=True
                )
            ],
        }

    def backend(self, side: str, stage_dir: Path, progress: Progress) -> dict[str, Any]:
        """Name the checkpoint; the harness loads it itself."""
        return {
            "backend": "in_process",
            "model_path": str(self._sides.path(side)),
            "tokenizer": str(self._sides.source),
            "dtype": self._dtype,
            "device": self._device,
            "batch_size": 64,
        }

    def secrets(self, side: str) -> Mapping[str, str]:
        """Nothing is secret in process."""
        return {}

    def check(self, side: str) -> None:
        """Nothing keeps running that could die apart from the worker itself."""

    def settings(self, side: str) -> Mapping[str, Any]:
        """Return what decides how a checkpoint answers."""
        return {"engine": "transformers", "device": self._device, "dtype": self._dtype}

    def log(self, side: str) -> Path | None:
        """There is no server."""
        return None

    def begin(self, side: str, stage_dir: Path) -> None:
        """Nothing can be started beforehand: workers load the checkpoints."""

    @property
    def holds_both(self) -> bool:
        """True: every worker loads its own model, and none stays."""
        return True

    def discard(self, side: str) -> None:
        """Nothing keeps running that could be stopped."""

    def narrow(self) -> None:
        """Checkpoints are loaded one after the other as it is."""

    def close(self) -> None:
        """Nothing was started."""
