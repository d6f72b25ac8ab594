"""The recipe bench: the colour of a point tells what its recipe makes."""

from __future__ import annotations

import pytest

from compress_evals.bench import colour

BLUE, GREEN, ORANGE, PURPLE = "#1f6fb4", "#2e8540", "#d5641c", "#7b3fa0"


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ("dense", "#555555"),
        ("rtn-int4", BLUE), ("best-2bit", BLUE), ("smoothquant-w8a8", BLUE), ("quickstart", BLUE),
        ("svd-20", GREEN), ("best-lowrank-30", GREEN), ("transmla-50", GREEN),
        ("wanda-50", ORANGE), ("oats-50", ORANGE), ("shortgpt-25", ORANGE),
        ("wanda-2of4-gptq-int4", PURPLE), ("slim-2of4-int4", PURPLE), ("oats-50-gptq-int4", PURPLE),
    ],
)  # fmt: skip
def test_the_colour_tells_what_a_recipe_makes(recipe: str, wanted: str) -> None:
    assert colour(recipe) == wanted
