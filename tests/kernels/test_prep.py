"""The preparation of x: the kernel against its specification, and the specification against its bound."""

from __future__ import annotations

import pytest
import torch

from compress_kernels import prep

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.slow]  # interpreted


def plan(subnormal: bool, ordered: bool, low: int = 4, unit: int = 64) -> prep.Plan:
    return prep.Plan(block=128, unit=unit, low=low, places=32, ordered=ordered, subnormal=subnormal, sums=True)


def rows(dtype: torch.dtype) -> torch.Tensor:
    """Rows of all sizes, one of zeros, of more than one pass over a row."""
    x = torch.randn(5, 2240, generator=torch.Generator().manual_seed(0))
    return (x * torch.tensor([[1e-4], [1.0], [3e3], [0.0], [1e-2]])).to(dtype)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("subnormal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel_is_the_specification(subnormal: bool, ordered: bool, dtype: torch.dtype, device: torch.device) -> None:
    from compress_kernels.gpu import prep as gpu

    x, wanted = rows(dtype), plan(subnormal, ordered)
    order = torch.randperm(2240, generator=torch.Generator().manual_seed(1)).int() if ordered else None

    got = gpu.prepare(x.to(device), wanted, None if order is None else order.to(device))

    want = prep.reference(x, wanted, order)
    assert got.x.dtype == want.x.dtype and torch.equal(got.x.cpu(), want.x)
    torch.testing.assert_close(got.sums.cpu(), want.sums, rtol=1e-5, atol=1e-5 * float(want.sums.abs().amax()))
    if subnormal:
        assert torch.equal(got.factor.cpu()[[0, 1, 2, 4]], want.factor[[0, 1, 2, 4]])


@pytest.mark.parametrize("low", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaled_rows_are_within_the_bound(low: int, dtype: torch.dtype) -> None:
    x = rows(dtype) * torch.logspace(0, -6, 2240).to(dtype)

    ready = prep.reference(x, plan(True, False, low), None)

    place = torch.arange(ready.x.shape[1]) // 32 * low % 8
    back = torch.ldexp(ready.x.double(), place)[:, :2240] * ready.factor[:, None]
    error = (back - x.double()).abs().amax(1)
    assert bool((error <= 2.0**-33 * x.double().abs().amax(1)).all())
    assert bool((ready.x.abs() < 2.0**15).all())
