"""Write the demo suite: held-out questions, lm-eval task files, suite documents, calibration text.

Run as a script; it needs PyYAML and nothing else, and writes the same bytes every time:

    python conductor/demo/make_suite.py [--output DIR]

The task files name their questions relative to their own directory, so the evaluation must run
with that directory as its working directory.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import yaml

from skills import END, PROMPT, SKILLS, Question, test_questions, training_question

QUESTIONS_PER_TASK = 1000
CALIBRATION_LINES = 256
CALIBRATION_SEED = 11
CANARY_SEED = 12
MAX_ANSWER_TOKENS = 16
"""The longest answer has 12 letters or digits and the end token."""

GENERATION_SKILLS = ("addition", "sorting", "reverse")

REFERENCE = {
    "addition": 0.938,
    "sorting": 0.988,
    "reverse": 0.998,
    "majority": 0.998,
    "compare": 0.871,
    "facts": 0.943,
}
"""Scores of the shipped weights in BF16 on these questions, measured as the source below says."""

DISCORDANCE = {
    "addition": 0.006,
    "sorting": 0.002,
    "reverse": 0.002,
    "majority": 0.002,
    "compare": 0.006,
    "facts": 0.008,
}
"""Share of questions that only one side answers right, about as the W8A8 export has it."""

REFERENCE_SOURCE = "shipped BF16 weights, lm-eval 0.4.13 with its transformers backend, on a CPU"
DESCRIPTION = "Six skills of the demo model, held-out questions: three generated, three by choice."
WRONG_SKILL = "sorting"
WRONG_BY = -0.2
WRONG_DESCRIPTION = (
    f"The demo suite with a wrong reference score for {WRONG_SKILL}, "
    "to show what an evaluation that disagrees with the published score looks like."
)


class OneLineDumper(yaml.SafeDumper):
    """Write a text with line breaks as one quoted line, so that every break can be seen."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Choose double quotes for a text with a line break."""
        style = '"' if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


OneLineDumper.add_representer(str, OneLineDumper.represent_text)


def main() -> None:
    """Write every file below the output directory."""
    parser = argparse.ArgumentParser(description="Write the demo suite.")
    here = Path(__file__).resolve().parent
    parser.add_argument("--output", type=Path, default=here, help="default: beside this script")
    output = parser.parse_args().output
    tasks = output / "suite"
    tasks.mkdir(parents=True, exist_ok=True)
    for skill in SKILLS:
        questions = test_questions(skill, QUESTIONS_PER_TASK)
        write_lines(tasks / f"{task_name(skill)}.jsonl", [row(question) for question in questions])
        write_yaml(tasks / f"{task_name(skill)}.yaml", task_file(skill))
    write_yaml(output / "suite.yaml", suite_document("demo", DESCRIPTION, REFERENCE))
    wrong = {**REFERENCE, WRONG_SKILL: round(REFERENCE[WRONG_SKILL] + WRONG_BY, 3)}
    write_yaml(
        output / "suite-wrong-reference.yaml",
        suite_document("demo-wrong-reference", WRONG_DESCRIPTION, wrong),
    )
    write_lines(output / "calibration.jsonl", calibration_rows())


def task_name(skill: str) -> str:
    """Return the name under which lm-eval knows a skill."""
    return f"demo_{skill}"


def row(question: Question) -> dict[str, Any]:
    """Return one line of a question file."""
    document: dict[str, Any] = {"question": question.text, "answer": question.answer}
    if question.choices:
        document["choices"] = list(question.choices)
    return document


def task_file(skill: str) -> dict[str, Any]:
    """Return the lm-eval task of a skill; greedy, no examples, the answer follows a line break."""
    document: dict[str, Any] = {
        "task": task_name(skill),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{task_name(skill)}.jsonl"}},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": PROMPT.format(question="{{question}}"),
        "doc_to_target": "answer",
        "target_delimiter": "",
    }
    if skill in GENERATION_SKILLS:
        document["output_type"] = "generate_until"
        document["generation_kwargs"] = {
            "until": [END, "\n"],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": MAX_ANSWER_TOKENS,
        }
    else:
        document["output_type"] = "multiple_choice"
        document["doc_to_choice"] = "choices"
    document["metric_list"] = [
        {"metric": metric(skill), "aggregation": "mean", "higher_is_better": True}
    ]
    document["metadata"] = {"version": 1.0}
    return document


def suite_document(name: str, description: str, reference: dict[str, float]) -> dict[str, Any]:
    """Return the suite: which tasks, how each is scored, and what it should score in BF16."""
    return {
        "name": name,
        "description": description,
        "include_path": "suite",
        "max_length": 255,
        "apply_chat_template": False,
        "canary_prompts": canary_prompts(),
        "tasks": {
            task_name(skill): {
                "metric": metric(skill),
                "filter": "none",
                "kind": "generation" if skill in GENERATION_SKILLS else "multiple_choice",
                "scale": 1.0,
                "higher_is_better": True,
                "samples": QUESTIONS_PER_TASK,
                "fewshot": 0,
                "reference": reference[skill],
                "discordance": DISCORDANCE[skill],
                "reference_source": REFERENCE_SOURCE,
            }
            for skill in SKILLS
        },
    }


def metric(skill: str) -> str:
    """Return the lm-eval metric that scores a skill."""
    return "exact_match" if skill in GENERATION_SKILLS else "acc"


def canary_prompts() -> list[str]:
    """Return one training question per skill, as the model reads it."""
    rng = random.Random(CANARY_SEED)
    return [training_question(skill, rng).prompt for skill in SKILLS]


def calibration_rows() -> list[dict[str, Any]]:
    """Return training questions with their answers, the skills in turn."""
    rng = random.Random(CALIBRATION_SEED)
    questions = [training_question(SKILLS[i % len(SKILLS)], rng) for i in range(CALIBRATION_LINES)]
    return [{"text": question.prompt + question.answer + END} for question in questions]


def write_lines(path: Path, documents: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def write_yaml(path: Path, document: dict[str, Any]) -> None:
    """Write a mapping in the order in which it was built."""
    path.write_text(yaml.dump(document, Dumper=OneLineDumper, sort_keys=False, width=100))


if __name__ == "__main__":
    main()
