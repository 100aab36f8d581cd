"""CPU time of the gate commands beside a bare Python script, in one run.

Run: ``.venv/bin/python benchmarks/gate_commands.py``. The aim: at most twice the CPU time of
``python -c "import json, argparse"`` plus 100 ms. Bytecode goes to a temporary directory, as an
installation would have it; each figure is the least of several runs, because other work on the
machine only ever adds.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data" / "gates"
REPEATS = 7
ALLOWANCE_S = 0.1
COMMANDS = {
    "gate_ptq": f"ptq_main(['--summary', '{DATA}/checkpoint-good.json'])",
    "gate_run": f"run_main(['--run', '{DATA}/run-good.json'])",
    "gate_compare": "compare_main(['--baseline', '{0}', '--candidate', '{0}'])".format(
        DATA / "scores-baseline.json"
    ),
    "gate_verbosity": "verbosity_main(['--baseline', '{0}', '--candidate', '{0}'])".format(
        DATA / "tokens-good.json"
    ),
}


def cpu_seconds(code: str, environ: dict[str, str]) -> float:
    """Return the least user and system time that ``python -c code`` takes, in seconds."""
    taken = []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(done.stderr.decode() or done.stdout.decode())
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def main() -> int:
    """Print the table; exit code 1 when a command is over its aim."""
    with TemporaryDirectory() as bytecode:
        environ = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "PYTHONPATH": str(ROOT)}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        bare = cpu_seconds("import json, argparse", environ)
        aim = 2 * bare + ALLOWANCE_S
        print(f"bare script {bare * 1000:.0f} ms CPU, aim {aim * 1000:.0f} ms")
        over = False
        for name, call in COMMANDS.items():
            code = f"from conductor import gate_commands; raise SystemExit(gate_commands.{call})"
            seconds = cpu_seconds(code, environ)
            over |= seconds > aim
            print(f"{name:15} {seconds * 1000:4.0f} ms CPU, {seconds / bare:.1f} x bare")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
