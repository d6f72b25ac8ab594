"""Entries that a mask keeps, against PyTorch's own selection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.weights import kept

DTYPES = (torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.int32,
          torch.float32, torch.float64)  # fmt: skip


def drawn(rows: int, columns: int, share: float, dtype: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and a mask that keeps a share of it."""
    generator = torch.Generator().manual_seed(seed)
    octets = torch.randint(0, 2 if dtype == torch.bool else 256, (rows, columns * dtype.itemsize), generator=generator)
    return octets.to(torch.uint8).view(dtype), torch.rand(rows, columns, generator=generator) < share


@given(
    rows=st.integers(0, 9), columns=st.integers(1, 40), share=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), part=st.sampled_from((1, 7, 1 << 18)),
)  # fmt: skip
def test_what_is_taken_is_put_back(rows: int, columns: int, share: float, dtype: Any, seed: int, part: int) -> None:
    whole, mask = drawn(rows, columns, share, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "PART", part)
        taken = kept.take(whole, mask)
        again = kept.put(torch.zeros_like(whole), mask, taken)
    assert kept.kept_of(mask) == int(mask.sum()) == len(taken)
    assert torch.equal(
        taken.view(torch.uint8), whole[mask].view(torch.uint8) if len(taken) else taken.view(torch.uint8)
    )
    assert torch.equal(kept.where(mask.reshape(-1)), mask.reshape(-1).nonzero()[:, 0])
    wanted = torch.where(mask, kept.words(whole), 0)
    assert torch.equal(kept.words(again), wanted)


def test_what_is_not_in_order_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, mask = drawn(6, 8, 0.5, torch.float32, 3)
    assert torch.equal(kept.take(whole.T, mask.T), whole.T[mask.T])
