"""What this machine is: device, memory, free disk. Measures, never decides."""

from __future__ import annotations

import platform
import re
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
    """The machine that a release runs on; sizes in bytes, None where nobody measured them."""

    device: Device
    accelerators: tuple[Accelerator, ...]
    processor: str
    cores: int | None
    memory_bytes: int | None
    memory_available_bytes: int | None
    system: str | None

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


@dataclass(frozen=True, kw_only=True)
class DriverReport:
    """What ``nvidia-smi`` says without arguments, word for word; ``failure`` is why it is useless.

    ``cuda_version`` is the newest CUDA that the driver runs, ``None`` where it does not say.
    """

    text: str
    cuda_version: str | None
    failure: str | None


def probe_driver() -> DriverReport:
    """Ask the driver of the accelerators about itself."""
    text, failure = _ask_nvidia_smi()
    stated = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d[\d.]*)", text)
    return DriverReport(text=text, cuda_version=stated and stated[1], failure=failure)


def _ask_nvidia_smi(*arguments: str) -> tuple[str, str | None]:
    """Return what ``nvidia-smi`` printed, and what kept it from answering."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "", "there is no nvidia-smi on this machine"
    try:
        answer = subprocess.run(
            [program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=NVIDIA_SMI_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return "", f"nvidia-smi did not answer within {NVIDIA_SMI_TIMEOUT_S} s"
    except OSError as error:
        return "", f"nvidia-smi cannot be started ({error.strerror or error})"
    failure = f"nvidia-smi ended with exit status {answer.returncode}"
    return answer.stdout, failure if answer.returncode else None


def _probe_accelerators() -> tuple[Accelerator, ...]:
    fields = "name,memory.total,driver_version,compute_cap"
    text, failure = _ask_nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    if failure:
        return ()
    rows = [line.split(", ") for line in text.splitlines() if line.count(", ") == 3]
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
