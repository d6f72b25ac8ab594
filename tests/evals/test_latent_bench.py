"""The latent bench: variants that are compared with each other store the same bytes per token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress.recipe import from_dict
from compress.runtime.kv import maker
from compress_evals.latent import removed, speed, variants


@pytest.mark.parametrize("kept", [0.375, 0.25])
def test_variants_of_a_share_keep_the_same_bytes(tiny_llama: Path, tmp_path: Path, ids: Tensor, kept: float) -> None:
    held = {}
    for i, (name, step) in enumerate(variants(kept, 24, 48)):
        recipe = from_dict({"passes": [step], "calibration": {"samples": 4, "length": 32}})
        model: Any = compress.load(compress.run(tiny_llama, recipe, tmp_path / str(i)).out, kv=None)
        cache = maker(model, "latent")()
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        held[name] = cache.nbytes()
    assert len(held) == 2
    assert set(held.values()) == {2 * ids.numel() * round(kept * 48) * 4 + 21 * 4}


def test_a_share_whose_factors_save_nothing_is_left_out() -> None:
    """A rank of 16 of a matrix 24 x 48: factors of 24 x 16 and 16 x 48 are as many numbers."""
    assert removed(16, 24, 48) == 0
    assert [[next(iter(step)) for _, step in variants(kept, 24, 48)] for kept in (2 / 3, 0.5)] == [
        ["transmla"], ["transmla", "svd-llm"]
    ]  # fmt: skip


def test_both_caches_are_timed(tiny_llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import compress_evals.latent as bench

    monkeypatch.setattr(bench, "NEW", 3)
    monkeypatch.setattr(bench, "RUNS", 2)
    recipe = from_dict({"passes": ["transmla"], "calibration": {"samples": 4, "length": 32}})
    model = compress.load(compress.run(tiny_llama, recipe, tmp_path / "out").out, kv=None)
    cells = speed("half", model, maker(model, "latent")).split("|")
    plain, latent, (ratio, *_) = float(cells[2]), float(cells[3]), cells[4].split()
    assert latent / plain == pytest.approx(float(ratio), rel=0.5)
