"""Skills call the command line and nothing else, and what they call exists."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from conductor.cli import app
from gates import RECIPES

ROOT = Path(__file__).parent.parent
SKILLS = {path.parent.name: path for path in sorted((ROOT / "skills").glob("*/SKILL.md"))}
EVALS = json.loads((ROOT / "tests" / "evals.json").read_text())
GATES = {"gate_ptq", "gate_run", "gate_compare", "gate_verbosity"}


def front_matter(path: Path) -> dict[str, Any]:
    _, header, _ = path.read_text().split("---\n", 2)
    document: dict[str, Any] = yaml.safe_load(header)
    return document


def commands(path: Path) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    stripped = [re.sub(r"[\[\]]", "", line).strip() for line in lines]
    return [shlex.split(line, comments=True) for line in stripped if line]


def test_the_five_skills_are_there() -> None:
    assert set(SKILLS) == {"day0-release", "ptq", "deployment", "evaluation", "compare-results"}


@pytest.mark.parametrize("name", SKILLS)
def test_a_skill_says_when_and_when_not(name: str) -> None:
    header = front_matter(SKILLS[name])
    assert header["name"] == name
    assert "Do NOT use" in header["description"]
    assert len(SKILLS[name].read_text().splitlines()) <= 70


@pytest.mark.parametrize("name", SKILLS)
def test_a_skill_calls_commands_and_options_that_exist(name: str) -> None:
    called = commands(SKILLS[name])
    assert called
    day0 = get_command(app).commands
    for command in called:
        if command[0] in GATES:
            continue
        assert command[0] == "day0", command
        known = {option for parameter in day0[command[1]].params for option in parameter.opts}
        used = {word for word in command[2:] if word.startswith("--")}
        assert used <= known, command


@pytest.mark.parametrize("name", SKILLS)
def test_a_skill_names_recipes_that_exist(name: str) -> None:
    words = set(
        re.findall(r"`(nvfp4\w*|mxfp4\w*|fp8|int\d\w*|w4a16\w*|nf4)`", SKILLS[name].read_text())
    )
    assert words <= RECIPES.keys()


def test_evals_cover_every_skill_and_near_misses() -> None:
    assert len(EVALS) >= 12
    assert len({case["name"] for case in EVALS}) == len(EVALS)
    routed = {skill for case in EVALS for skill in case["skills"]}
    assert routed == set(SKILLS)
    assert sum(not case["skills"] for case in EVALS) >= 2
    assert all(case["query"] and case["expected_behavior"] for case in EVALS)
