"""What each gate of a release was asked, kept so that anybody can ask it again.

A gate is called through :func:`ask` alone: its arguments become JSON first, without secrets, the
gate judges what the JSON says, and that is filed as ``evidence/<gate>.json`` beside
``verdicts/<gate>.json``. So a verdict is never more than what its evidence gives, on any machine,
without any tool.

Which functions answer under the name of a gate is a closed choice, so that evidence cannot bring a
milder judge along.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

import gates
from conductor.files import write_bytes
from conductor.redaction import redact, redact_document
from gates import FailureClass, Outcome, Recipe, StageFailure, Verdict
from gates.evidence import Bucket

EVIDENCE = "evidence"
VERDICTS = "verdicts"
DECISION = "decision"

Gate = Callable[..., Verdict]

GATES: Mapping[str, tuple[Gate, ...]] = MappingProxyType(
    {
        "ptq": (gates.evaluate_checkpoint,),
        "canary": (gates.evaluate_canary,),
        "baseline_run": (gates.evaluate_run,),
        "external": (gates.evaluate_external,),
        "candidate_run": (gates.evaluate_run,),
        "conditions": (gates.evaluate_conditions,),
        "compare": (gates.evaluate_noninferiority, gates.evaluate_comparison),
        "verbosity": (gates.evaluate_output_lengths, gates.evaluate_verbosity),
    }
)
"""The functions that may answer under the name of each gate."""

Document = Mapping[str, Any]


class GateInputError(ValueError):
    """Evidence that no gate can be asked with; the message says what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A gate's answer, with the document that it answered."""

    inputs: Document
    verdict: Verdict


def ask(name: str, function: Gate, /, **arguments: Any) -> Judged:
    """Ask the gate that is filed under ``name``, with ``arguments`` as JSON carries them."""
    text = json.dumps(
        {"gate": name, "function": function.__name__, "arguments": arguments, "remarks": []},
        default=_plain,
    )
    inputs = json.loads(text)
    if redact(text) != text:  # seen faster than every value is gone through
        inputs = redact_document(inputs)
    return Judged(inputs=inputs, verdict=judge(inputs))


def remark(judged: Judged, sentences: Iterable[str]) -> Judged:
    """Add to a verdict what the conductor knows beside it; it changes the detail and no check."""
    inputs = {**judged.inputs, "remarks": redact_document(list(sentences))}
    return Judged(inputs=inputs, verdict=judge(inputs))


def judge(inputs: Document) -> Verdict:
    """Ask a gate again, from the document of its inputs.

    Raises:
        GateInputError: the document is none of ours.
    """
    name, wanted, arguments = (inputs.get(key) for key in ("gate", "function", "arguments"))
    remarks = inputs.get("remarks")
    functions = {each.__name__: each for each in GATES.get(str(name), ())}
    if wanted not in functions:
        known = ", ".join(functions) or f"none: the gates are {', '.join(GATES)}"
        raise GateInputError(f"function: {wanted!r} does not answer as gate {name!r} ({known})")
    if not isinstance(arguments, dict) or not isinstance(remarks, list):
        raise GateInputError("arguments must be a mapping, and remarks a list of sentences")
    if "recipes" in arguments:
        arguments = {**arguments, "recipes": _recipes(arguments["recipes"])}
    try:
        verdict = functions[str(wanted)](**arguments)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise GateInputError(f"arguments: {type(error).__name__}: {error}") from None
    return replace(verdict, detail="; ".join([verdict.detail, *map(str, remarks)]))


def on_our_evidence(verdict: Verdict) -> Verdict:
    """Return a verdict as it counts in a release.

    Evidence that we collected and the gate cannot read is our fault, and not the user's.
    """
    if verdict.failure_class is FailureClass.USER_CONFIG_ERROR:
        return replace(verdict, failure_class=FailureClass.UNKNOWN)
    return verdict


def file_inputs(run_dir: Path, judged: Judged) -> Verdict:
    """Write what a gate was asked below ``run_dir``; return its verdict.

    Raises:
        OSError: it cannot be written.
    """
    _write(run_dir, judged.inputs["gate"], judged.inputs)
    return judged.verdict


def decision_inputs(
    verdicts: Mapping[str, Verdict], failures: Iterable[StageFailure], required: tuple[str, ...]
) -> dict[str, Any]:
    """Return what the decision was made from: verdicts by name, failed stages, required gates."""
    inputs: dict[str, Any] = redact_document(
        {
            "verdicts": list(verdicts),
            "failures": [asdict(failure) for failure in failures],
            "required": list(required),
        }
    )
    return inputs


def file_decision(run_dir: Path, inputs: Document) -> None:
    """Write what the decision was made from below ``run_dir``.

    Verdicts that it does not name are of attempts that were taken back; they are removed, with
    their evidence.
    """
    for directory in (run_dir / VERDICTS, run_dir / EVIDENCE):
        for path in directory.glob("*.json"):
            if path.stem not in (*inputs["verdicts"], DECISION):
                path.unlink()
    _write(run_dir, DECISION, inputs)


def judge_decision(inputs: Document, verdicts: Mapping[str, Verdict]) -> Outcome:
    """Decide again, from the document and the verdicts that it names.

    Raises:
        GateInputError: a verdict that it names is not there, or it is no such document.
    """
    try:
        named = {name: verdicts[name] for name in inputs["verdicts"]}
        failures = [
            StageFailure(**{**failure, "failure_class": FailureClass(failure["failure_class"])})
            for failure in inputs["failures"]
        ]
        return gates.decide(named, failures, tuple(inputs["required"]))
    except KeyError as error:
        raise GateInputError(f"there is no {error}") from None
    except (TypeError, ValueError) as error:
        raise GateInputError(str(error)) from None


def _write(run_dir: Path, name: str, document: Document) -> None:
    # In one line: samples of many questions would be ten times as long with one number on each.
    directory = run_dir / EVIDENCE
    directory.mkdir(exist_ok=True)
    write_bytes(directory / f"{name}.json", (json.dumps(document) + "\n").encode())


def _plain(value: object) -> Any:
    """Return what JSON has no word for in words of its own."""
    match value:
        case Recipe():
            return asdict(value)
        case set() | frozenset():
            return sorted(value)
        case Mapping():
            return dict(value)
        case PurePath():
            return str(value)
    raise TypeError(f"{type(value).__name__} is no evidence")


def _recipes(documents: object) -> dict[str, Recipe]:
    """Return the table of recipes in its JSON form as the gate wants it."""
    try:
        return {name: _recipe(document) for name, document in documents.items()}  # type: ignore[attr-defined]
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise GateInputError(f"arguments.recipes: {error}") from None


def _recipe(document: Document) -> Recipe:
    made_of = {"bucket": Bucket(document["bucket"]), "quantizes": tuple(document["quantizes"])}
    return Recipe(**{**document, **made_of})
