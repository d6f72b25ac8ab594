"""Every op of a packed form can be exported, with any number of rows of x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_kernels import bitmap, nm, w8a8, wq

OUT, IN = 64, 256


def draw(below: int) -> Tensor:
    return torch.randint(below, (OUT, IN), generator=torch.Generator().manual_seed(below), dtype=torch.uint8)


def mask() -> Tensor:
    first_two = torch.tensor([True, True, False, False])
    return first_two.repeat(OUT, IN // 4)


FORMS: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "wq": (wq.pack(draw(16), torch.rand(OUT, 2).half(), 4), wq.linear),
    "nm": (nm.pack(torch.randn(OUT, IN).half(), mask(), 2, 4), nm.linear),
    "bitmap": (bitmap.pack(torch.randn(OUT, IN).half(), mask()), bitmap.linear),
    "w8a8": (w8a8.pack((draw(255).short() - 127).to(torch.int8), torch.rand(OUT, 1)), w8a8.linear),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_product_is_exported_for_any_number_of_rows(name: str) -> None:
    form, linear = FORMS[name]

    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return linear(form, x)

    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(Product(), (torch.randn(3, IN),), dynamic_shapes={"x": {0: rows}})
    x = torch.randn(17, IN)

    torch.testing.assert_close(program.module()(x), linear(form, x))
