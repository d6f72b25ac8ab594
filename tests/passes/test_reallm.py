"""Codes plus low rank: refits never increase the error, a rule decides if factors pay off, and the fit is stored."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import Product, Quantized, RecipeError, Sum
from compress.model.site import Site
from compress.passes import VQ, ReALLM
from compress.passes.whitened import bits_saved, output_basis
from compress.weights import pack, specify, unpack

SiteMaker = Callable[..., Site]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(width: int) -> Tensor:
    x = normal(4 * width, width, seed=1) @ (torch.eye(width) + normal(width, width, seed=2) / width**0.5)
    x = x * (0.5 * normal(width, seed=3)).exp()
    return x.T @ x / len(x)


def weight(rows: int = 64, columns: int = 96, strength: float = 1.0) -> Tensor:
    """Noise and a strong part of rank 4."""
    return normal(rows, columns) + strength * normal(rows, 4, seed=5) @ normal(4, columns, seed=6)


# -- low rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24), (32, 32)])
def test_the_error_of_the_basis_is_the_tail_of_the_whitened_spectrum(
    rows: int, columns: int, naive: ModuleType
) -> None:
    w, gram = normal(rows, columns).double(), gram_of(columns).double()
    basis = output_basis(w, gram, 5)
    torch.testing.assert_close(basis.T @ basis, torch.eye(5).double(), rtol=0, atol=1e-6)
    tail = torch.linalg.svdvals(w @ torch.linalg.cholesky(gram))[5:].square().sum()
    assert naive.energy(w - basis @ basis.T @ w, gram) == pytest.approx(float(tail), rel=1e-4)


def test_without_statistics_the_basis_is_that_of_the_matrix() -> None:
    w = normal(24, 40)
    left = torch.linalg.svd(w).U[:, :5]
    basis = output_basis(w, torch.eye(40), 5)
    torch.testing.assert_close(basis @ basis.T, left @ left.T, rtol=0, atol=1e-4)


def test_bits_saved_are_those_of_the_spread() -> None:
    w = normal(24, 40)
    assert bits_saved(w, w / 2) == pytest.approx(1.0)
    assert bits_saved(w, w) == 0.0


def test_bits_saved_are_the_bits_that_the_output_gains(site_of: SiteMaker, naive: ModuleType) -> None:
    w, gram = weight(128, 128, 0.5), gram_of(128)
    code = VQ(rotate=True).coder(site_of(w, gram_II=gram))
    step = ReALLM(rank=4)
    factors = step.fitted(w, torch.eye(128)).dense()
    plain = naive.proxy_loss(w, code(w).dense(), gram)
    apart = naive.proxy_loss(w, code(w - factors).dense() + factors, gram)
    assert bits_saved(w, w - factors) == pytest.approx(log(plain / apart, 4), abs=0.05)


# -- the pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["half", "int8"])
def test_factors_fitted_again_are_never_worse(precision: str, site_of: SiteMaker, naive: ModuleType) -> None:
    w, gram = weight(), gram_of(96)
    step = ReALLM(rank=4, precision=precision)
    first = step.fitted(w, torch.eye(96)).dense()
    coded = step.coder(site_of(w, gram_II=gram))(w - first).dense()
    again = step.fitted(w - coded, gram).dense()
    assert naive.energy(coded + again - w, gram) <= naive.energy(coded + first - w, gram)


def test_more_rounds_are_never_worse(site_of: SiteMaker, naive: ModuleType) -> None:
    w, gram = weight(), gram_of(96)
    losses = [
        naive.proxy_loss(w, ReALLM(rank=4, rounds=rounds, always=True).rewrite(site_of(w, gram_II=gram)).dense(), gram)
        for rounds in (1, 2, 4)
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    "options", [{}, {"precision": "int8"}, {"precision": "int4"}, {"book": "kmeans", "rotate": False}], ids=str
)
def test_what_is_stored_is_what_was_fitted(options: dict[str, Any], site_of: SiteMaker, naive: ModuleType) -> None:
    w, gram = weight(), gram_of(96)
    result = ReALLM(rank=4, always=True, **options).rewrite(site_of(w, gram_II=gram))
    assert isinstance(result, Sum)
    codes, factors = result.terms
    assert isinstance(factors, Product)
    assert isinstance(factors.left, Quantized) == ("precision" in options)
    again = unpack(specify(result), pack(result))
    assert torch.equal(again.dense(), codes.dense() + factors.dense())
    plain = {name: value for name, value in options.items() if name != "precision"}
    coded = VQ(**plain).rewrite(site_of(w, gram_II=gram))
    assert naive.proxy_loss(w, again.dense(), gram) < naive.proxy_loss(w, coded.dense(), gram)


def test_factors_are_left_out_where_they_cost_more_than_they_save(site_of: SiteMaker) -> None:
    flat = site_of(weight(strength=0.0), gram_II=gram_of(96))
    result = ReALLM(rank=4).rewrite(flat)
    assert result.describe() == "e8prow@had"
    assert torch.equal(result.dense(), VQ().rewrite(flat).dense())
    assert 0 < flat.ledger["low_rank"]["saves_bits"] < flat.ledger["low_rank"]["costs_bits"]
    steep = site_of(weight(strength=3.0), gram_II=gram_of(96))
    result = ReALLM(rank=4).rewrite(steep)
    assert result.describe() == "e8prow@had + r4"
    assert steep.ledger["low_rank"]["saves_bits"] > steep.ledger["low_rank"]["costs_bits"]
    assert steep.ledger["low_rank"]["costs_bits"] == pytest.approx(16 * 4 * (64 + 96) / (64 * 96))


def test_without_statistics_only_codes_remain(site_of: SiteMaker) -> None:
    assert ReALLM(rank=4, always=True).rewrite_unfed(site_of(weight())).describe() == "e8prow@had"


def test_a_rank_that_is_not_low_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"reallm: a\.b: rank 16 is not a low rank for a matrix 16x64"):
        ReALLM().check("a.b", (16, 64))
