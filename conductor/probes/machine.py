"""What this machine is: device, memory, free disk. Measures, never decides."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conductor.compatibility import Device

NVIDIA_SMI_TIMEOUT_S = 20


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU as the driver describes it; memory in bytes where it has its own.

    ``compute_capability`` is major and minor, ``None`` where the driver does not say.
    """

    name: str
    memory_bytes: int | None
    driver: str
    compute_capability: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that a release runs on; sizes in bytes."""

    device: Device
    accelerators: tuple[Accelerator, ...]
    processor: str
    cores: int
    memory_bytes: int
    memory_available_bytes: int
    system: str

    def document(self) -> dict[str, Any]:
        """The machine as a JSON mapping."""
        return asdict(self)


def probe_machine() -> Machine:
    """Describe this machine; it has a CUDA device when the driver lists one."""
    import psutil

    accelerators = _probe_accelerators()
    memory = psutil.virtual_memory()
    return Machine(
        device=Device.CUDA if accelerators else Device.CPU,
        accelerators=accelerators,
        processor=_processor_name(),
        cores=psutil.cpu_count() or 1,
        memory_bytes=memory.total,
        memory_available_bytes=memory.available,
        system=platform.platform(),
    )


def _probe_accelerators() -> tuple[Accelerator, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    fields = "name,memory.total,driver_version,compute_cap"
    query = [f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            [program, *query], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if answer.returncode != 0:
        return ()
    rows = [line.split(", ") for line in answer.stdout.splitlines() if line.count(", ") == 3]
    return tuple(
        Accelerator(
            name=name,
            # Machines that share memory between processor and accelerator say [N/A].
            memory_bytes=int(mebibytes) * 2**20 if mebibytes.isdecimal() else None,
            driver=driver,
            compute_capability=_capability(capability),
        )
        for name, mebibytes, driver, capability in rows
    )


def _capability(text: str) -> tuple[int, int] | None:
    major, _, minor = text.strip().partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def free_disk_bytes(path: Path) -> int:
    """Return the free bytes of the file system that holds ``path`` or will hold it."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(existing).free
