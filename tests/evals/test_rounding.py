"""One recipe run twice with floating-point sums in different orders."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from compress.model import travellers
from compress.recipe import Recipe, load
from compress_evals import rounding
from compress_evals.fidelity import evaluation_text
from compress_evals.folders import SHORTEST, evaluate_folders


def with_few_windows(path: Path) -> Recipe:
    recipe = load(path)
    return replace(recipe, calibration=replace(recipe.calibration, samples=16))


@pytest.mark.slow
def test_what_reads_no_data_is_the_same_and_what_does_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = evaluation_text()[:SHORTEST]
    monkeypatch.setattr(rounding, "evaluate_folders", partial(evaluate_folders, text=text))
    monkeypatch.setattr(rounding, "load", with_few_windows)
    before = travellers.CPU_TOKENS
    same, other = (rounding.again("builtin", name, (256, 2048), 12, tmp_path) for name in ("rtn-int8", "gptq-int2"))
    assert before == travellers.CPU_TOKENS
    assert same.kl[0] == same.kl[1] and all(paired.flips == 0 for paired in same.tasks.values())
    assert 0 < abs(other.kl[0] - other.kl[1]) < 0.05 and set(other.tasks) == set(rounding.TASKS)
    head, _, *lines = rounding.table([same, other]).splitlines()
    assert head.startswith("| recipe | KL, of each | trained (n = ") and len(lines) == 2
    assert lines[0].startswith("| rtn-int8 | ") and lines[0].count("| +0.0 (") == len(rounding.TASKS)


@pytest.mark.parametrize("tokens", [256, 4096])
def test_the_setting_is_put_back_whatever_happens(tokens: int) -> None:
    before = travellers.CPU_TOKENS
    with pytest.raises(KeyError), rounding.at_once(tokens):
        assert tokens == travellers.CPU_TOKENS
        raise KeyError
    assert before == travellers.CPU_TOKENS
