"""The patched interpreter against torch, in the cases where the original one is wrong."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton")
tl = triton.language
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted where there is a GPU")


@pytest.fixture(scope="module")
def kernels(load_helper: Any) -> ModuleType:
    return load_helper("probes")  # type: ignore[no-any-return]


def ramp(dtype: torch.dtype, spread: float) -> torch.Tensor:
    return (torch.randn(1024, generator=torch.Generator().manual_seed(0)) * spread).to(dtype)


def test_products_of_bfloat16(kernels: ModuleType) -> None:
    a, b = ramp(torch.bfloat16, 1).view(32, 32), ramp(torch.bfloat16, 3).view(32, 32)
    c = torch.full((32, 32), torch.nan)

    kernels.product[(1,)](a, b, c, 32)

    torch.testing.assert_close(c, a.float() @ b.float())


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_round_to_nearest_and_saturate(kernels: ModuleType, to: torch.dtype, spread: float) -> None:
    x, y = ramp(torch.float32, spread), torch.zeros(1024, dtype=to)
    largest = torch.finfo(to).max if to != torch.bfloat16 else float("inf")

    kernels.cast[(1,)](x, y, 1024)

    assert torch.equal(y.float(), x.clamp(-largest, largest).to(to).float())


def test_sums_of_bfloat16_are_rounded_once(kernels: ModuleType) -> None:
    x, y = ramp(torch.bfloat16, 1), ramp(torch.bfloat16, 2).flip(0)
    z = torch.zeros_like(x)

    kernels.add[(1,)](x, y, z, 1024)

    assert torch.equal(z, x + y)


def test_a_loop_may_end_where_an_argument_says(kernels: ModuleType) -> None:
    y = torch.zeros(1)

    kernels.count[(1,)](y, 7)

    assert y.item() == 7
