"""K-plane words against their definition, one code at a time."""

from __future__ import annotations

import pytest
import torch

from compress_kernels import formats


def codes_of(bits: int, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (63, 100), (64, 512), (65, 1030)])
def test_words_hold_every_code_and_zeros_behind(bits: int, rows: int, columns: int) -> None:
    codes = codes_of(bits, rows, columns)

    whole = formats.unpack_words(formats.pack_words(codes, bits), bits)

    assert torch.equal(whole[:rows, :columns], codes.int())
    assert not whole[rows:].any() and not whole[:, columns:].any()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_code_lies_where_the_layout_says(bits: int) -> None:
    width = formats.block(bits)
    codes = codes_of(bits, 3, 2 * width)

    words = formats.pack_words(codes, bits)

    for row, at in [(0, 0), (1, 1), (2, formats.PLACES), (2, width - 1), (1, width), (0, 2 * width - 1)]:
        within = at % width
        word = int(words[at // width, row, within % formats.PLACES]) & 0xFFFF
        assert (word >> (bits * (within // formats.PLACES))) & (2**bits - 1) == codes[row, at]
