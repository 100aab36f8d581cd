"""The generated pages: up to date, and every recipe with all that a reader must know of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from conductor.reference_pages import ALWAYS_LEFT_ALONE, pages
from gates import RECIPES
from gates.criteria import MODULE_KINDS

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"


@pytest.mark.parametrize("name", sorted(pages()))
def test_reference_pages_are_up_to_date(name: str) -> None:
    assert (REFERENCE / name).read_text(encoding="utf-8") == pages()[name], "run `make docs`"


def section(recipe: str) -> str:
    return pages()["recipes.md"].partition(f"## `{recipe}`\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", RECIPES)
def test_every_module_kind_is_quantized_or_left_alone(name: str) -> None:
    rows = dict(
        line.strip("| ").split(" | ") for line in section(name).splitlines() if "modules" in line
    )
    meant = rows["modules quantized"].split(", ")
    others = rows["modules left alone"].split(", ")
    assert meant == list(RECIPES[name].quantizes)
    assert sorted([*meant, *others]) == sorted([*MODULE_KINDS, *ALWAYS_LEFT_ALONE])


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        pytest.param("fp8", "FP8, 8 bits, 8 with scales", id="format"),
        pytest.param("fp8", "50.0% of a 16-bit source's", id="half"),
        pytest.param("nvfp4", "28.1% of a 16-bit source's", id="scales-count"),
        pytest.param("w4a16", "25.8% to 26.8% of a 16-bit source's", id="scales-vary"),
        pytest.param(
            "int8",
            "| llmcompressor | `W8A8` | vllm on cpu, vllm on cuda, "
            "transformers on cpu (emulated), transformers on cuda (emulated) |",
            id="answered",
        ),
        pytest.param("int8", "| modelopt | `int8` | nothing |", id="not-answered"),
    ],
)
def test_recipe_says(name: str, fact: str) -> None:
    assert fact in section(name)
