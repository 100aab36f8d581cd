"""The demo's files are what its scripts make, and the model has not seen the questions."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from conductor.environments.builder import Environments

DEMO = Path(__file__).parent.parent / "conductor" / "demo"
MODEL = DEMO / "model"
SUITES = ("suite.yaml", "suite-wrong-reference.yaml")
TASKS = sorted(path.stem for path in (DEMO / "suite").glob("*.yaml"))
GENERATED = (
    *SUITES,
    "calibration.jsonl",
    *(f"suite/{task}{suffix}" for task in TASKS for suffix in (".yaml", ".jsonl")),
)
CHANCE = {"demo_majority": 1 / 3, "demo_compare": 1 / 2, "demo_facts": 1 / 4}


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


@pytest.fixture(scope="module")
def remade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(DEMO / "make_suite.py"), "--output", str(output)]
    subprocess.run(command, check=True, timeout=60)
    return output


@pytest.fixture(scope="module")
def skills() -> Any:
    import conductor.demo.skills as module

    return module


@pytest.fixture(scope="module")
def trained_texts(skills: Any) -> set[str]:
    """Draw 30,000 questions as the training script does."""
    rng = random.Random(1)
    names = rng.choices(skills.SKILLS, k=30_000)
    return {skills.training_question(name, rng).text for name in names}


def test_all_six_tasks_are_there() -> None:
    expected = ["addition", "compare", "facts", "majority", "reverse", "sorting"]
    assert [f"demo_{skill}" for skill in expected] == TASKS


@pytest.mark.parametrize("name", GENERATED)
def test_file_is_what_the_script_makes(name: str, remade: Path) -> None:
    assert (DEMO / name).read_bytes() == (remade / name).read_bytes()


def test_script_makes_no_other_file(remade: Path) -> None:
    made = {path.relative_to(remade).as_posix() for path in remade.rglob("*") if path.is_file()}
    assert made == set(GENERATED)


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_many_different_and_answerable(task: str) -> None:
    rows = read_lines(DEMO / "suite" / f"{task}.jsonl")
    assert len(rows) >= 1000
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        choices = row.get("choices", [row["answer"]])
        assert row["answer"] in choices
        assert len(set(choices)) == len(choices)


@pytest.mark.parametrize("task", TASKS)
def test_no_question_is_in_the_training_split(
    task: str, trained_texts: set[str], skills: Any
) -> None:
    rows = read_lines(DEMO / "suite" / f"{task}.jsonl")
    asked = {row["question"] for row in rows}
    assert asked.isdisjoint(trained_texts)
    skill = task.removeprefix("demo_")
    if skill != "facts":
        assert all(skills.in_test_split(skill, text) for text in asked)


def test_held_out_phrasing_of_a_fact_is_never_trained(skills: Any) -> None:
    rng = random.Random(2)
    facts = {(fact.entity, fact.relation): fact for fact in skills.world().facts}
    held_out = {fact.question(fact.held_out_phrasing).text for fact in facts.values()}
    drawn = {skills.training_question("facts", rng).text for _ in range(30_000)}
    assert len(facts) == 3000
    assert len(drawn) > 8000, "nearly all of the 9,000 trained phrasings come up"
    assert drawn.isdisjoint(held_out)


@pytest.mark.parametrize(
    ("skill", "text", "answer"),
    [
        pytest.param("addition", "What is {}+{}?", lambda a, b: str(int(a) + int(b)), id="sum"),
        pytest.param("sorting", "Sort {}.", lambda s: "".join(sorted(s)), id="sorted"),
        pytest.param("reverse", "Reverse {}.", lambda s: "".join(reversed(s)), id="reversed"),
        pytest.param(
            "majority",
            "Most common letter in {}?",
            lambda s: max("ABC", key=s.count),
            id="most-common",
        ),
        pytest.param(
            "compare",
            "Is {} larger than {}?",
            lambda a, b: "yes" if int(a) > int(b) else "no",
            id="larger",
        ),
    ],
)
def test_answers_are_right(skill: str, text: str, answer: Any) -> None:
    before, *separators = text.split("{}")
    for row in read_lines(DEMO / "suite" / f"demo_{skill}.jsonl"):
        rest = row["question"].removeprefix(before)
        operands = []
        for separator in separators:
            operand, _, rest = rest.partition(separator)
            operands.append(operand)
        assert answer(*operands) == row["answer"], row["question"]


def test_calibration_text_is_from_the_training_split(skills: Any) -> None:
    texts = [row["text"] for row in read_lines(DEMO / "calibration.jsonl")]
    asked = {
        row["question"] for task in TASKS for row in read_lines(DEMO / "suite" / f"{task}.jsonl")
    }
    assert len(texts) == 256
    for text in texts:
        question = text.removeprefix("Question: ").partition("\n")[0]
        assert text.startswith(skills.PROMPT.format(question=question))
        assert text.endswith(skills.END)
        assert question not in asked


@pytest.mark.parametrize("name", SUITES)
def test_suite_agrees_with_task_files_and_questions(name: str) -> None:
    suite = read_yaml(DEMO / name)
    assert sorted(suite["tasks"]) == TASKS
    for task, row in suite["tasks"].items():
        directory = DEMO / suite["include_path"]
        file = read_yaml(directory / f"{task}.yaml")
        (metric,) = file["metric_list"]
        questions = directory / file["dataset_kwargs"]["data_files"]["test"]
        kinds = {"generate_until": "generation", "multiple_choice": "multiple_choice"}
        assert file["task"] == task
        assert row["metric"] == metric["metric"]
        assert row["higher_is_better"] is metric["higher_is_better"]
        assert row["kind"] == kinds[file["output_type"]]
        assert row["fewshot"] == file["num_fewshot"]
        assert row["samples"] == len(read_lines(questions))
        assert CHANCE.get(task, 0.0) + 0.2 < row["reference"] <= row["scale"] == 1.0


def test_only_one_reference_differs_in_the_wrong_suite() -> None:
    right, wrong = (read_yaml(DEMO / name)["tasks"] for name in SUITES)
    different = {task for task in right if right[task] != wrong[task]}
    assert different == {"demo_sorting"}
    gap = right["demo_sorting"]["reference"] - wrong["demo_sorting"]["reference"]
    assert gap == pytest.approx(0.2)


def test_checkpoint_is_small_whole_and_bf16() -> None:
    files = {path.name for path in MODEL.iterdir()}
    header = read_header(MODEL / "model.safetensors")
    config = json.loads((MODEL / "config.json").read_text())
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8_000_000
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert header["model.embed_tokens.weight"]["shape"] == [
        config["vocab_size"],
        config["hidden_size"],
    ]


def test_tokenizer_agrees_with_the_model(skills: Any) -> None:
    vocabulary = json.loads((MODEL / "tokenizer.json").read_text())
    config = json.loads((MODEL / "config.json").read_text())
    ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    assert len(vocabulary["model"]["vocab"]) == config["vocab_size"]
    assert ids == {skills.END: config["eos_token_id"], "<|pad|>": config["pad_token_id"]}


def test_chat_template_makes_the_prompt_of_the_training(skills: Any) -> None:
    import jinja2

    environment = jinja2.Environment(autoescape=False)  # prompts are not HTML
    template = environment.from_string((MODEL / "chat_template.jinja").read_text())
    question = {"role": "user", "content": "What is 123+456?"}
    answer = {"role": "assistant", "content": "579"}
    prompt = skills.PROMPT.format(question=question["content"])
    render = template.render
    eos = skills.END
    assert render(messages=[question], add_generation_prompt=True, eos_token=eos) == prompt
    assert render(messages=[question, answer], eos_token=eos) == f"{prompt}579{eos}"


@pytest.mark.tools
def test_training_learns_and_makes_the_same_tokenizer(tmp_path: Path) -> None:
    python = Environments().interpreter("reference")
    script = str(DEMO / "train.py")
    command = [str(python), script, "--output", str(tmp_path), "--steps", "20", "--log-every", "5"]
    variables = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    finished = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=300, env=variables
    )
    losses = [json.loads(line)["loss"] for line in finished.stdout.splitlines()]
    assert len(losses) == 4
    assert losses[-1] < 0.9 * losses[0]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes()
    shapes = {n: t["shape"] for n, t in read_header(MODEL / "model.safetensors").items()}
    remade = {n: t["shape"] for n, t in read_header(tmp_path / "model.safetensors").items()}
    assert remade == shapes
