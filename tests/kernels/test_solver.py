"""The inner loops of compression as single launches, against their plain-torch specification and the passes' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import CalibrationError, Grid, pattern
from compress.passes import feedback
from compress.passes.feedback import Chosen, Given, Unrounded, feed_back
from compress.passes.pruning.dsnot import Form, dsnot
from compress.passes.pruning.swaps import swap_in_groups
from compress.passes.quantization.gptq import PLAIN, FittedGrids, falling, gptq
from compress.stats import Gram
from compress_kernels import solver

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.slow]  # interpreted
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
    [("rounded", 72, 5), ("rounded", 1, 70), ("mixed groups", 40, 32), ("eight bits", 17, 33), ("masked", 40, 5),
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
    there = grid and replace(
        grid,
        scale_GO=grid.scale_GO.to(device),
        group_B=grid.group_B.to(device),
        zero_GO=None if grid.zero_GO is None else grid.zero_GO.to(device),
    )
    chosen = chosen and replace(chosen, dead_B=chosen.dead_B.to(device))
    codes = solver.sweep(got_w, u.to(device), got_e, keep_BO=got_keep, steps=there, choice=chosen)

    assert_close("values", got_w.cpu(), want[0], RATIO)
    for column in range(outputs):  # whose sizes differ by orders of magnitude
        # what is left of a rounded weight, at eight bits a hundredth of it: a GPU fuses products and sums
        assert_close("errors", got_e.cpu()[:, column], want[1][:, column], 10 * RATIO)
    assert (codes is None) == (want[3] is None) and (codes is None or torch.equal(codes.cpu(), want[3]))
    assert (got_keep is None) == (want[2] is None) and (got_keep is None or torch.equal(got_keep.cpu(), want[2]))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5), (9, 64), (1, 2)])
def test_the_n_highest_of_m(n: int, m: int, device: torch.device) -> None:
    score = noise(300 if m < 16 else 40, m)
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


# -- the passes, given to the kernels ---------------------------------------------------------------


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, passes find kernels usable, on the interpreter too."""
    return lambda: monkeypatch.setattr(solver, "usable", lambda tensor: True)


ORDERED = {
    "groups": (Grid(bits=4, group=8), {}),
    "groups beyond a strip": (Grid(bits=3, group=24, symmetric=True), {}),
    "row": (Grid(bits=4), {}),
    "matrix": (Grid(bits=8, group=-1), {}),
    "order mixes groups": (Grid(bits=4, group=8), {"order_I": falling(noise(48))}),
    "order within groups": (Grid(bits=4, group=8), {"order_I": falling(noise(48), 8)}),
    "masked": (Grid(bits=4, group=16), {"keep_OI": noise(9, 48) > 0}),
}


@pytest.mark.parametrize("way", ORDERED)
def test_gptq_gives_the_same_codes(
    way: str, launching: Callable[[], None], device: torch.device, assert_close: Close
) -> None:
    grid, options = ORDERED[way]
    w, u = noise(9, 48), factor(48)
    want, want_loss = gptq(w, u, grid, **options)

    launching()
    options = {name: tensor.to(device) for name, tensor in options.items()}
    got, loss = gptq(w.to(device), u.to(device), grid, **options)

    assert torch.equal(got.codes.cpu(), want.codes)
    assert_close("scale", got.scale.cpu(), want.scale, RATIO)
    assert loss == pytest.approx(want_loss, rel=RATIO)


def test_a_launch_never_holds_the_end_of_a_grid_and_the_beginning_of_the_next(
    launching: Callable[[], None], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    w, u = noise(9, 48), factor(48)
    want = FittedGrids(Grid(bits=4, group=24), w, PLAIN)
    feed_back(w, u, want, block=48)

    launching()
    monkeypatch.setattr(feedback, "LAUNCH", 16)
    got = FittedGrids(Grid(bits=4, group=24), w.to(device), PLAIN)
    feed_back(w.to(device), u.to(device), got, block=48)

    assert torch.equal(got.codes_OI.cpu(), want.codes_OI)
    torch.testing.assert_close([each.cpu() for each in got.result()], list(want.result()))


@pytest.mark.parametrize("sparsity", ["2:4", "3:8", "3:6", 0.5], ids=str)
@pytest.mark.parametrize("bits", [0, 4])
def test_sparsegpt_gives_the_same_mask(
    bits: int, sparsity: float | str, launching: Callable[[], None], device: torch.device, assert_close: Close
) -> None:
    w, u, dead = noise(9, 48), factor(48), torch.arange(48) == 5

    def fed_back(where: torch.device | str) -> tuple[Tensor, ...]:
        grids = FittedGrids(Grid(bits=bits, group=24), w.to(where), PLAIN) if bits else Unrounded()
        values, keep, _ = feed_back(
            w.to(where), u.to(where), grids, Chosen(pattern(sparsity, "matrix"), dead.to(where)), 32
        )
        return values.cpu(), torch.as_tensor(keep).cpu()

    want = fed_back("cpu")
    launching()
    got = fed_back(device)

    assert torch.equal(got[1], want[1])
    assert_close("values", got[0], want[0], RATIO)


def test_a_given_mask_is_compensated_alike(
    launching: Callable[[], None], device: torch.device, assert_close: Close
) -> None:
    w, u, keep = noise(9, 48), factor(48), noise(9, 48) > 0
    want = feed_back(w, u, Unrounded(), Given(keep))

    launching()
    got = feed_back(w.to(device), u.to(device), Unrounded(), Given(keep.to(device)))

    assert_close("values", got[0].cpu(), want[0], RATIO)
    assert got[2] == pytest.approx(want[2], rel=RATIO)


def test_a_score_that_is_no_number_is_refused_there_too(launching: Callable[[], None], device: torch.device) -> None:
    w, u = noise(9, 48), factor(48)
    w[3, 40] = torch.nan

    launching()
    for score in (lambda: feed_back(w.to(device), u.to(device), Unrounded(), Chosen(pattern("2:4"))),
                  lambda: pattern("2:4").keep(w.to(device))):  # fmt: skip
        with pytest.raises(CalibrationError, match="a pruning score is NaN"):
            score()


@pytest.mark.parametrize("m", [0, 4, 6])
@pytest.mark.parametrize("form", ["guarded", "reference"])
def test_dsnot_gives_the_same_mask(form: Form, m: int, launching: Callable[[], None], device: torch.device) -> None:
    w, mean = noise(37, 48), noise(48)
    keep = pattern(f"{m // 2}:{m}" if m else 0.5).keep(w.abs())
    given = (w, keep, mean, mean.square() * 0.3, mean.abs() + 0.1)
    options: dict[str, Any] = {"m": m, "form": form, "cycles": 9, "threshold": 0.05}
    want = dsnot(*given, **options)

    launching()
    got = dsnot(*(tensor.to(device) for tensor in given), **options).cpu()

    assert torch.equal(got, want)
    assert (want != keep).any(1).sum() > 10  # rows that changed


@pytest.mark.parametrize("m", [4, 6, 8])
def test_swaps_in_groups_are_the_same(
    m: int, launching: Callable[[], None], device: torch.device, assert_close: Close
) -> None:
    w, x = noise(33, 72), noise(200, 72) @ (torch.eye(72) + noise(72, 72) / 10)  # two programs, two blocks
    keep = pattern(f"{m // 2}:{m}").keep(w.abs())
    given = (w, w * keep, keep, x.T @ x / 200)
    want = swap_in_groups(*given, m, 2)

    launching()
    got = swap_in_groups(*(tensor.to(device) for tensor in given), m, 2)

    assert torch.equal(got[1].cpu(), want[1]) and torch.equal(got[2].cpu(), want[2])
    assert_close("values", got[0].cpu(), want[0], 0)
    assert want[2].sum() > 33


def test_a_gram_gathers_halves_and_floats(
    launching: Callable[[], None], device: torch.device, assert_close: Close
) -> None:
    x = noise(40, 130)
    launching()
    gram = Gram(130, device)

    gram.update(x[:15].half().to(device))
    gram.update(x[15:20].to(device))
    gram.update(x[20:].bfloat16().to(device))

    seen = torch.cat((x[:15].half().double(), x[15:20].double(), x[20:].bfloat16().double()))
    assert_close("gram", gram.value().cpu(), seen.T @ seen / 40, RATIO)
