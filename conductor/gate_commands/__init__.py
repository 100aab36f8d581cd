"""The gates as commands: JSON or a directory in, one JSON verdict out.

Each command reads its input, checks the shape of JSON documents against the schema shipped in
``gates/schemas``, asks the gate, and prints the verdict. Exit codes: 0 the gate passed, 1 it
failed, 2 the input is unusable, 130 stopped by Ctrl-C. Whatever the input, standard output holds
one valid JSON document and there is no traceback. No limit is decided here.
"""

from conductor.gate_commands.compare import compare_main
from conductor.gate_commands.ptq import ptq_main
from conductor.gate_commands.run import run_main
from conductor.gate_commands.verbosity import verbosity_main

__all__ = ["compare_main", "ptq_main", "run_main", "verbosity_main"]
