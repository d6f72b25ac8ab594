"""The inner loops of compression as single launches, against their plain-torch specification and the passes' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compress_kernels import solver

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = pytest.mark.usefixtures("poisoned")
Close = Callable[[str, Tensor, Tensor, float], None]
# errors of float32 sums of up to 128 products, each rounded, in another order: 128**0.5 * 2**-24 is 7e-7
RATIO = 5e-6


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def factor(columns: int) -> Tensor:
    """The upper factor of the inverse Gram of correlated inputs, as a part of a wider one: its rows are apart."""
    x = noise(4 * columns, columns) @ (torch.eye(columns) + noise(columns, columns) / columns**0.5)
    gram = x.T @ x / len(x) + 0.01 * torch.eye(columns)
    wide = torch.full((columns, columns + 7), torch.nan)
    wide[:, 3:-4] = torch.linalg.cholesky(torch.linalg.inv(gram.double()), upper=True).float()
    return wide[:, 3:-4]


def steps(w_BO: Tensor, bits: int, groups: int, *, zero: bool) -> solver.Steps:
    """Grids of the range of a matrix, one a little wider than the next, their columns mixed."""
    scale = w_BO.abs().amax(0).clamp(min=1e-3) * torch.linspace(1.0, 1.2, groups)[:, None] * 2 / (2**bits - 1)
    zeros = torch.randint(2**bits, (groups, w_BO.shape[1]), generator=torch.Generator().manual_seed(3)).float()
    group_B = torch.arange(len(w_BO), dtype=torch.int32) % groups
    return solver.Steps(bits=bits, scale_GO=scale, zero_GO=zeros if zero else None, group_B=group_B)


def choice(columns: int, n: int, m: int) -> solver.Choice:
    dead = torch.zeros(columns, dtype=torch.bool)
    dead[[1, columns - 1]] = True
    return solver.Choice(n=n, m=m, dead_B=dead)


def moved(device: torch.device, *tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.to(device, copy=True) for tensor in tensors]


WAYS: dict[str, tuple[dict[str, Any], ...]] = {
    "rounded": ({"bits": 4, "groups": 1, "zero": False}, {}),
    "mixed groups": ({"bits": 3, "groups": 5, "zero": True}, {}),
    "eight bits": ({"bits": 8, "groups": 2, "zero": True}, {}),
    "masked": ({}, {"keep": True}),
    "masked and rounded": ({"bits": 2, "groups": 2, "zero": True}, {"keep": True}),
    "2:4": ({}, {"n": 2, "m": 4}),
    "1:8 and rounded": ({"bits": 4, "groups": 2, "zero": False}, {"n": 1, "m": 8}),
    "15:16": ({}, {"n": 15, "m": 16}),
}


@pytest.mark.parametrize(
    ("way", "columns", "outputs"),
    [("rounded", 128, 5), ("rounded", 1, 70), ("mixed groups", 40, 32), ("eight bits", 17, 33), ("masked", 40, 5),
     ("masked and rounded", 33, 20), ("2:4", 40, 20), ("1:8 and rounded", 24, 33), ("15:16", 32, 20)],
)  # fmt: skip
def test_sweep(way: str, columns: int, outputs: int, device: torch.device, assert_close: Close) -> None:
    grids, mask = WAYS[way]
    w, u = noise(columns, outputs), factor(columns)
    w[:, 1], w[:, 2] = 0, w[:, 2] * 1e4  # an output of zeros, one of large weights
    keep = torch.rand(columns, outputs, generator=torch.Generator().manual_seed(1)) > 0.5 if "keep" in mask else None
    chosen = choice(columns, mask["n"], mask["m"]) if "n" in mask else None
    grid = steps(w, **grids) if grids else None
    want = solver.sweep_reference(w, u, keep, grid, chosen)

    on = torch.zeros_like(w, dtype=torch.bool) if chosen else keep
    got_w, got_e, got_keep = moved(device, w, torch.empty_like(w), on)
    there = None if grid is None else solver.Steps(
        bits=grid.bits, scale_GO=grid.scale_GO.to(device), group_B=grid.group_B.to(device),
        zero_GO=None if grid.zero_GO is None else grid.zero_GO.to(device),
    )  # fmt: skip
    chosen = chosen and solver.Choice(n=chosen.n, m=chosen.m, dead_B=chosen.dead_B.to(device))
    codes = solver.sweep(got_w, u.to(device), got_e, keep_BO=got_keep, steps=there, choice=chosen)

    assert_close("values", got_w.cpu(), want[0], RATIO)
    for column in range(outputs):  # whose sizes differ by orders of magnitude
        assert_close("errors", got_e.cpu()[:, column], want[1][:, column], RATIO)
    assert (codes is None) == (want[3] is None) and (codes is None or torch.equal(codes.cpu(), want[3]))
    assert (got_keep is None) == (want[2] is None) and (got_keep is None or torch.equal(got_keep.cpu(), want[2]))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5), (9, 64), (1, 2)])
def test_the_n_highest_of_m(n: int, m: int, device: torch.device) -> None:
    from compress.weights import pattern

    score = noise(300, m)
    score[::3] = score[::3].round()  # ties
    score[1], score[2, 0], score[3] = 0, torch.inf, -torch.inf

    got = solver.keep_nm(score.to(device), n).cpu()

    assert torch.equal(got, solver.keep_nm_reference(score, n))
    assert torch.equal(got, pattern(f"{n}:{m}").keep(score))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "inputs"), [(1, 128), (100, 130), (129, 256), (0, 5), (70, 63)])
def test_gram(tokens: int, inputs: int, dtype: torch.dtype, device: torch.device, assert_close: Close) -> None:
    x, before = noise(tokens + 1, inputs)[1:].to(dtype), noise(inputs, inputs)
    total = before.to(device, copy=True)

    solver.add_gram(total, x.to(device).contiguous())
    solver.mirror(total)

    want = before.triu() + before.triu(1).T + x.double().T @ x.double()
    assert_close("gram", total.cpu(), want, RATIO)
    assert torch.equal(total, total.T)
