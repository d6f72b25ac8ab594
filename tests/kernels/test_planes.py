"""Products with codes that stay packed, in addition to the tests of tenants."""

from __future__ import annotations

import torch

from compress_kernels import planes


def test_what_is_cached_in_inference_serves_gradients_too() -> None:
    words = planes.pack(torch.randint(2, (5, 24), generator=torch.Generator().manual_seed(0)), 1)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = planes.products(x, [3], [words], 1).clone()
    x.requires_grad_()

    y = planes.products(x.repeat(2, 1), [6], [words], 1)
    y.sum().backward()

    torch.testing.assert_close(y[:3], expected)
    assert x.grad is not None
