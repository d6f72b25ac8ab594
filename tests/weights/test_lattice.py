"""The lattice books: their definition, nearest points against all points, and the published distortions."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from compress.weights import BOOKS, Codebook, Dense
from compress.weights.lattice import (
    E8,
    E8P,
    INNER,
    PATTERNS,
    ROOTS,
    SHIFT,
    e8p_codes,
    e8p_patterns,
    e8p_points,
    inside,
    nearest,
    nearest_e8p,
)

ALL = torch.arange(1 << 16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- definition ------------------------------------------------------------------------------------


def test_e8p_has_the_published_number_of_points_and_norm() -> None:
    assert len(torch.unique(E8P, dim=0)) == 1 << 16
    assert float(E8P.square().sum(1).mean()) == pytest.approx(9.57, abs=0.005)


def test_the_patterns_are_all_up_to_norm_10_and_29_of_norm_12() -> None:
    norms = e8p_patterns().square().sum(1)
    assert int((norms <= 10).sum()) == 227
    assert int((norms == 12).sum()) == 29
    assert len(torch.unique(PATTERNS, dim=0)) == 256


def test_a_point_less_its_shift_is_of_halves_with_an_even_sum() -> None:
    shift = torch.where(ALL >= 1 << 15, SHIFT, -SHIFT)
    plain = E8P - shift[:, None]
    assert bool((plain % 1 == 0.5).all())
    assert bool((plain.sum(1) % 2 == 0).all())


def test_e8p_is_a_part_of_e8_less_a_quarter(naive: ModuleType) -> None:
    assert all(naive.in_e8(point) for point in (E8P[::61] + SHIFT).tolist())


def test_a_point_gives_its_code_back() -> None:
    assert torch.equal(e8p_codes(e8p_points(ALL)), ALL.int())


def test_e8_has_the_241_shortest_points_and_15_more(naive: ModuleType) -> None:
    assert len(torch.unique(E8, dim=0)) == 256
    assert all(naive.in_e8(point) for point in E8.tolist())
    assert E8.square().sum(1).long().bincount().tolist() == [1, 0, 240, 0, 15]


@pytest.mark.parametrize(("name", "bytes_each"), [("e8p", 2), ("e8", 1)])
def test_a_lattice_book_is_not_stored(name: str, bytes_each: int) -> None:
    leaf = Codebook(torch.zeros(6, 4, dtype=torch.int32), BOOKS[name], Dense(torch.ones(1, 1)), name)
    assert leaf.nbytes() == 6 * 4 * bytes_each + 4


# -- nearest points --------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0, 10.0])
def test_the_nearest_point_is_nearest_of_all(spread: float) -> None:
    x = spread * normal(100, 8)
    found = (x - E8P[nearest_e8p(x).long()]).square().sum(1)
    least = torch.cdist(x.double(), E8P.double()).square().amin(1)
    torch.testing.assert_close(found.double(), least, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_point_is_nearest_to_itself() -> None:
    assert torch.equal(nearest_e8p(E8P), ALL.int())


@pytest.mark.parametrize("count", [0, 1, 257])
def test_any_number_of_vectors_can_be_searched(count: int) -> None:
    assert nearest_e8p(normal(count, 8)).shape == (count,)


def test_steps_stay_in_the_book() -> None:
    points = E8P[::37]
    known = set(map(tuple, E8P[PATTERNS.square().sum(1)[ALL & 255] <= INNER].tolist()))
    want = [[tuple(point) in known for point in (own + ROOTS).tolist()] for own in points[:200]]
    assert inside(points[:200] + SHIFT, ROOTS).tolist() == want


def metric(seed: int) -> Tensor:
    """Of a correlated block: upper triangular, condition 4 to 20."""
    return torch.linalg.qr(normal(16, 8, seed=seed) + 2 * torch.eye(8).repeat(2, 1))[1] / 4


@pytest.mark.parametrize("seed", range(4))
def test_steps_in_a_metric_find_nearly_always_the_nearest_of_all(seed: int) -> None:
    x, m = normal(500, 8), metric(seed)

    def cost(codes: Tensor) -> Tensor:
        return ((x - E8P[codes.long()]) @ m).square().sum(1)

    found, plain, best = (cost(c) for c in (nearest_e8p(x, m), nearest_e8p(x), nearest(x @ m, E8P @ m)[0]))
    assert bool((found <= plain * (1 + 1e-5)).all())
    assert float((found <= best * (1 + 1e-4) + 1e-6).float().mean()) > 0.9
    assert found.sum() < best.sum() + 0.1 * (plain.sum() - best.sum())


def test_a_metric_that_is_plain_changes_nothing() -> None:
    x = normal(500, 8)
    assert torch.equal(nearest_e8p(x, 3 * torch.eye(8)), nearest_e8p(x))


# -- published distortions -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(naive: ModuleType) -> Tensor:
    weight: Tensor = naive.golden_gaussian().float()
    return weight.view(-1, 8)[:20000]  # a seventh: the standard error of the distortion is then 0.3 %


@pytest.mark.parametrize(("scale", "want"), [(0.9, 0.0993), (1.0, 0.0921), (1.03, 0.0915), (1.1, 0.0929)])
def test_the_distortion_of_a_normal_is_the_published_one(scale: float, want: float, vectors: Tensor) -> None:
    error = vectors - E8P[nearest_e8p(vectors * scale).long()] / scale
    assert float(error.square().mean()) == pytest.approx(want, rel=0.02)


def test_coding_what_is_left_gives_the_published_4_bits(vectors: Tensor) -> None:
    x = vectors * 1.03
    left = x - E8P[nearest_e8p(x).long()]
    left = left - E8P[nearest_e8p(left * 3.45).long()] / 3.45
    assert float(left.square().mean()) / 1.03**2 == pytest.approx(0.0097, rel=0.02)


def test_256_points_of_e8_give_a_third_bit(vectors: Tensor) -> None:
    x = vectors * 0.98
    left = x - E8P[nearest_e8p(x).long()]
    finer = left - E8[nearest(left * 2.04, E8)[0]] / 2.04
    assert float(finer.square().mean()) < float(left.square().mean()) / 3
