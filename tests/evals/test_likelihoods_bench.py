"""The likelihood bench: both ways of computing logits give the same sums."""

from __future__ import annotations

from compress_evals.likelihoods import SHAPES, WAYS, scored

TINY = {**SHAPES, "vocab_size": 500, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}


def test_both_ways_give_the_same_sums() -> None:
    whole, end = (scored(way, 30, 12, 4, TINY) for way in WAYS)
    assert whole["sum"] == end["sum"] < 0
    assert min(whole["peak"], end["peak"]) > 0
