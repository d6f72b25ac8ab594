"""The openings that the benches print are those of the pages in `recipes/`, but for line breaks."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from compress_evals import deltas, lowrank, quantization

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("bench", [deltas, lowrank, quantization], ids=lambda bench: bench.__name__.rpartition(".")[2])
def test_a_page_has_the_opening_that_its_bench_prints(bench: ModuleType) -> None:
    page = (RECIPES / f"{bench.__name__.rpartition('.')[2]}.md").read_text(encoding="utf-8")
    title, _, opening = bench.HEAD.partition("\n")
    assert page.startswith(f"{title}\n")
    assert " ".join(opening.split()) in " ".join(page.split())


def test_the_page_of_quantization_says_what_its_cells_are() -> None:
    page = (RECIPES / "quantization.md").read_text(encoding="utf-8")
    assert page.count(f"\n{quantization.CELLS}\n") == len(quantization.BITS)
