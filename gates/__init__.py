"""Gates: pure functions from evidence to verdicts, and from verdicts to a decision.

Nothing here reads a file, a clock or the environment. Each ``evaluate_*`` takes plain mappings and
returns a :class:`Verdict`; none of them raises on bad evidence.
"""

from gates.canary import evaluate_canary
from gates.compare import evaluate_comparison
from gates.conditions import evaluate_conditions
from gates.criteria import RECIPES, Recipe
from gates.decide import (
    REQUIRED_GATES,
    TRIAGE,
    Action,
    Outcome,
    StageFailure,
    Triage,
    decide,
)
from gates.evidence import EvidenceError
from gates.external import evaluate_external
from gates.lengths import evaluate_output_lengths
from gates.noninferiority import evaluate_noninferiority
from gates.ptq import evaluate_checkpoint
from gates.run import evaluate_run
from gates.smoke import evaluate_smoke
from gates.verbosity import evaluate_verbosity
from gates.verdict import Check, Decision, FailureClass, Verdict

__all__ = [
    "RECIPES",
    "REQUIRED_GATES",
    "TRIAGE",
    "Action",
    "Check",
    "Decision",
    "EvidenceError",
    "FailureClass",
    "Outcome",
    "Recipe",
    "StageFailure",
    "Triage",
    "Verdict",
    "decide",
    "evaluate_canary",
    "evaluate_checkpoint",
    "evaluate_comparison",
    "evaluate_conditions",
    "evaluate_external",
    "evaluate_noninferiority",
    "evaluate_output_lengths",
    "evaluate_run",
    "evaluate_smoke",
    "evaluate_verbosity",
]
