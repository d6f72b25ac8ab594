"""Lowering of factors: thin products are kept as factors, and nothing is multiplied twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress import Dense, Grid, Masked, Product, Weight, pattern
from compress.runtime.lower import lower, rule_of
from compress.runtime.maps import FewRows, Matrix, Parallel

WIDTH = 256


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(rank: int) -> Product:
    return Product(Dense(normal(WIDTH, rank)), Dense(normal(rank, WIDTH, seed=1)))


def masked() -> Weight:
    w = normal(WIDTH, WIDTH, seed=2)
    return Masked(Dense(w), pattern("2:4").keep(w.abs()), "2:4")


@pytest.mark.parametrize(("rank", "rule"), [(32, "factored"), (127, "factored"), (128, "decoded"), (200, "decoded")])
def test_a_product_stays_factored_while_that_is_cheaper(rank: int, rule: str) -> None:
    assert rule_of(factors(rank), torch.float32) == rule


def test_a_sum_with_a_term_as_large_as_the_whole_is_one_matrix() -> None:
    module = lower(masked() + factors(16), torch.float32)
    assert isinstance(module, Matrix)
    assert module.matrix.shape == (WIDTH, WIDTH)


def test_a_sum_of_thin_products_stays_thin() -> None:
    module = lower(factors(16) + factors(8), torch.float32)
    assert isinstance(module, Parallel)
    assert sum(part.numel() for part in module.buffers()) == 2 * WIDTH * 24


@pytest.mark.parametrize(
    "weight",
    [
        masked() + factors(16),
        factors(16) + factors(8),
        Grid(bits=4, group=64).quantize(normal(WIDTH, WIDTH)) + factors(8),
    ],
    ids=lambda weight: str(weight.describe()),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_compute_what_they_denote(weight: Weight, dtype: torch.dtype) -> None:
    x = normal(5, WIDTH, seed=3).to(dtype)
    want = x.double() @ weight.dense().double().T
    error = (lower(weight, dtype)(x).double() - want).norm() / want.norm()
    assert float(error) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("inputs", ["", "int8"])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_rows_give_no_rows(bits: int, inputs: str) -> None:
    weight = Grid(bits=bits, group=64 if bits == 4 else WIDTH, symmetric=True).quantize(normal(WIDTH, WIDTH))

    y = lower(weight, torch.bfloat16, inputs)(torch.zeros(2, 0, WIDTH, dtype=torch.bfloat16))

    assert y.shape == (2, 0, WIDTH)


@pytest.mark.parametrize("bits", [4, 8])
def test_views_of_x_are_read_as_copies_are(bits: int) -> None:
    weight = Grid(bits=bits, group=0 if bits == 8 else 32, symmetric=bits == 8).quantize(normal(256, 256))
    module = lower(weight, torch.bfloat16)
    assert isinstance(module, FewRows)
    x = normal(2, 5, 512, seed=1).bfloat16()
    for view in (x[:, -1, :256], x[:, -1:, ::2], x[..., :256].transpose(0, 1), x[0, :1, :256].expand(3, 256)):
        assert torch.equal(module(view), module(view.contiguous()))
