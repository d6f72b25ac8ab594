"""A recipe's `accept` rule: a run that loses too much exits with code 5 and names the task.

These tests ask some questions of three tasks; `test_comparison.py` tests the rule for every task, and that a
measurement too small to exclude a loss is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import compress
from compress_evals.fidelity import evaluation_text
from compress_evals.folders import SHORTEST

TASKS = ["facts_trained", "facts_mc", "facts_context3"]
RECIPE = """
model: builtin
passes:
  - {method}
accept: {{suite: facts, max_drop: 0.08, confidence: 0.95}}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the dense model's answers stay."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def fewer_questions(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is judged on 60 questions a task, enough for these two recipes; no rule reads the text's fidelity."""
    whole, text = compress.evaluate, evaluation_text()[:SHORTEST]

    def evaluate(path: Path, base: str, device: str) -> Any:
        return whole(path, base, device=device, only=TASKS, limit=60, text=text, cache=cache)

    monkeypatch.setattr(compress, "evaluate", evaluate)


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


def test_a_recipe_may_accept_by_real_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(compress, "evaluate", lambda path, base, **options: asked.update(options) or exit_early())

    def exit_early() -> Any:
        raise compress.RecipeError("asked")

    with pytest.raises(compress.RecipeError, match="asked"):
        compress.accept(tmp_path, "builtin", compress.Accept(suite="kick_mini", data_dir=str(tmp_path)))
    assert asked == {"device": "cpu", "suite": "kick_mini", "data_dir": tmp_path}
