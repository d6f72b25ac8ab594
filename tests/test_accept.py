"""A recipe's `accept` rule: a run that loses too much exits 5 and says which task."""

from __future__ import annotations

from pathlib import Path

import pytest

import compress

RECIPE = """
model: builtin
passes:
  - {method}
accept: {{suite: facts, max_drop: 0.08, confidence: 0.95}}
"""


@pytest.mark.slow
def test_a_destructive_recipe_is_not_accepted(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.format(method="magnitude: {sparsity: 2:4}"))
    with pytest.raises(compress.AcceptanceError, match="facts_trained") as caught:
        compress.run(None, tmp_path / "r.yaml", tmp_path / "o")
    assert caught.value.exit_code == 5
    assert (tmp_path / "o" / "compress.json").exists()


@pytest.mark.slow
def test_a_gentle_recipe_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.format(method="rtn: {bits: 8, group: 0}"))
    assert compress.run(None, tmp_path / "r.yaml", tmp_path / "o").fallbacks == 0
