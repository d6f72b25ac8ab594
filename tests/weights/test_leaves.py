"""Each leaf decodes to the matrix of its definition, entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from compress.errors import UnsupportedWeight
from compress.weights import (
    BOOKS,
    Codebook,
    Dense,
    Diagonal,
    External,
    Hadamard,
    Masked,
    Nested,
    Permutation,
    Quantized,
    Scaled,
    Signs,
)
from compress.weights.leaves import DYNAMIC


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize(("scales", "group"), [((5, 3), 4), ((5, 1), 12), ((1, 1), 12), ((1, 3), 4)])
def test_codes_denote_scale_times_distance_from_zero(scales: tuple[int, int], group: int, symmetric: bool) -> None:
    codes, scale, zero = integers(8, 5, 12), normal(*scales).abs(), integers(8, *scales)
    got = Quantized(codes, scale, None if symmetric else zero, bits=3).dense()
    middle = torch.full(scales, 4) if symmetric else zero

    def entry(r: int, c: int) -> float:
        at = (r % scales[0], c // group)
        return float(scale[at]) * (int(codes[r, c]) - int(middle[at]))

    torch.testing.assert_close(got, torch.tensor([[entry(r, c) for c in range(12)] for r in range(5)]))


@pytest.mark.parametrize("rows", [1, 5])
def test_signs_denote_plus_or_minus_the_scale(rows: int) -> None:
    positive, scale = normal(5, 7) > 0, normal(rows, 1).abs()
    got = Signs(positive, scale).dense()
    assert torch.equal(got.sign() > 0, positive)
    assert torch.equal(got.abs(), scale.expand(5, 7))


@pytest.mark.parametrize("rows", [1, 5])
def test_codes_of_a_book_denote_its_entries_side_by_side(rows: int) -> None:
    codes, book, scale = integers(10, 5, 3).long(), normal(10, 4), normal(rows, 1)
    want = torch.stack([torch.cat([book[codes[r, c]] for c in range(3)]) * scale[r % rows] for r in range(5)])
    torch.testing.assert_close(Codebook(codes, book, Dense(scale)).dense(), want)


@pytest.mark.parametrize(
    ("entries", "bits"), [(1, 1), (2, 1), (3, 2), (16, 4), (17, 5), (256, 8), (257, 9), (4096, 12)]
)
def test_a_book_takes_as_many_bits_as_its_last_code(entries: int, bits: int) -> None:
    assert Codebook(integers(1, 2, 3).long(), normal(entries, 2), Dense(normal(1, 1))).bits == bits


@pytest.mark.parametrize(("scales", "group"), [((5, 3), 4), ((1, 1), 12), ((1, 3), 4)])
def test_scales_of_a_book_are_a_weight_by_group(scales: tuple[int, int], group: int) -> None:
    codes, book, factors = integers(16, 5, 12), BOOKS["nf4"], Dense(normal(scales[0], 2)) @ Dense(normal(2, scales[1]))
    want = book[codes.long(), 0] * factors.dense().repeat_interleave(group, 1)
    torch.testing.assert_close(Codebook(codes, book, factors, "nf4").dense(), want)


def test_the_nf4_table_is_the_quantiles_of_a_normal() -> None:
    # QLoRA, appendix E: quantiles of offset .9677083, 8 positive and 7 negative, and 0; divided by the largest
    positive, negative = (norm.ppf(np.linspace(0.9677083, 0.5, count)[:-1]) for count in (9, 8))
    table = np.sort(np.concatenate((positive, [0.0], -negative))) / positive.max()
    torch.testing.assert_close(BOOKS["nf4"][:, 0], torch.tensor(table, dtype=torch.float32), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("tile", "scales"), [((2, 8), (3, 2)), ((1, 12), (5, 1)), ((5, 12), (1, 1)), ((4, 5), (2, 3))])
def test_small_floats_denote_themselves_times_the_scale_of_their_tile(
    tile: tuple[int, int], scales: tuple[int, int]
) -> None:
    data, scale = normal(5, 12).to(torch.float8_e4m3fn), normal(*scales)
    got = Scaled(data, scale, *tile).dense()
    want = [[float(data[r, c].float() * scale[r // tile[0], c // tile[1]]) for c in range(12)] for r in range(5)]
    torch.testing.assert_close(got, torch.tensor(want))


def test_nested_scales_count_their_blocks_over_the_flattened_matrix() -> None:
    codes, absmax, offset = integers(256, 3, 100), normal(2).abs(), normal(1)
    flat = [float(DYNAMIC[code] * absmax[at // 256] + offset) for at, code in enumerate(codes.flatten().tolist())]
    torch.testing.assert_close(Nested(codes, absmax, offset).dense(), torch.tensor(flat).view(3, 100))


def test_the_dynamic_format_spans_seven_decades() -> None:
    assert len(DYNAMIC.unique()) == 256
    assert torch.equal(DYNAMIC, DYNAMIC.sort().values)
    assert set(DYNAMIC.tolist()) == {-value for value in DYNAMIC.tolist() if value != 1} | {1.0}
    # 2**i values of each sign lie in the decade that ends at 10**(i - 6), i from 0 to 6; 0 and 1 are extra
    counts = np.histogram(DYNAMIC.numpy(), bins=10.0 ** np.arange(-7, 1))[0]
    assert counts.tolist() == [1, 2, 4, 8, 16, 32, 64 + 1]


@pytest.mark.parametrize(("blocks", "offsets"), [(1, 1), (3, 1), (2, 2)])
def test_nested_scales_need_a_maximum_a_block(blocks: int, offsets: int) -> None:
    with pytest.raises(UnsupportedWeight, match=r"offsets for codes of \(3, 100\)"):
        Nested(integers(256, 3, 100), normal(blocks), normal(offsets))


def test_a_diagonal_scales_each_input() -> None:
    assert torch.equal(Diagonal(normal(4)).dense(), torch.diag(normal(4)))


def test_a_permutation_reads_its_order() -> None:
    order = torch.tensor([2, 0, 3, 1])
    x = torch.tensor([10.0, 11.0, 12.0, 13.0])
    assert (Permutation(order).dense() @ x).tolist() == [12, 10, 13, 11]
    assert Permutation(order).linear(x).tolist() == [12, 10, 13, 11]


def sylvester(size: int) -> Tensor:
    """Entry (i, j) is -1 to the number of bits that i and j share."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


@pytest.mark.parametrize(("n", "block"), [(1, 1), (2, 2), (13, 1), (24, 8), (48, 16), (64, 64), (96, 32)])
def test_a_hadamard_rotation_is_sylvesters_matrix_block_by_block(n: int, block: int) -> None:
    positive = normal(n) > 0
    want = torch.block_diag(*[sylvester(block)] * (n // block)) / block**0.5
    rotation = Hadamard(positive)
    assert rotation.block == block
    torch.testing.assert_close(rotation.dense(), want * torch.where(positive, 1.0, -1.0))


@pytest.mark.parametrize("n", [13, 48, 256])
def test_a_hadamard_rotation_is_orthogonal(n: int) -> None:
    dense = Hadamard(normal(n) > 0).dense()
    torch.testing.assert_close(dense @ dense.T, torch.eye(n), rtol=0, atol=1e-5)


def test_a_base_is_its_tensor() -> None:
    data = normal(3, 4)
    assert External(data, "base", "w").dense() is data
    assert External(data, "base", "w").describe() == "base"


@pytest.mark.parametrize("scales", [(5, 5), (4, 3), (2, 1)])
def test_scales_must_divide_the_codes(scales: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedWeight, match="do not divide codes of"):
        Quantized(integers(8, 5, 12), normal(*scales), None, bits=3)


def test_expressions_combine_by_operators() -> None:
    left, right = Dense(normal(5, 2)), Dense(normal(2, 7))
    combined = Masked(Dense(normal(5, 7)), normal(5, 7) > 0, "50%") + left @ right
    assert combined.describe() == "50% + r2"
    assert [child.describe() for child in combined.children()] == ["50%", "r2"]
    torch.testing.assert_close(combined.dense(), normal(5, 7) * (normal(5, 7) > 0) + left.data @ right.data)


def test_a_weight_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Dense(normal(2, 2)).data = normal(3, 3)  # type: ignore[misc]
