"""Deltas of tenants, signs and low rank: kernels and ops against float64, for rows of several tenants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress_kernels import segments

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.slow]  # interpreted
Close = Callable[[str, Tensor, Tensor, float], None]
RATIO = {torch.float16: 1e-3, torch.bfloat16: 5e-3}  # of outputs rounded once
ROUNDED_TWICE = 1.5  # the inner product of two factors is rounded too
TENANTS = 4
COUNTS = {1: [1], 5: [2, 3], 16: [16], 17: [9, 0, 8], 40: [3, 20, 17]}  # rows of the tenants 3, 0, 2


def rows_of(counts: list[int], tile: int) -> Tensor:
    return segments.table(counts, [3, 0, 2][: len(counts)], tile, 8)


def matrices(out: int, inputs: int, each: int) -> tuple[Tensor, Tensor]:
    """Signs [T, out, in], of one tenant all alike, and scales, one of them zero."""
    generator = torch.Generator().manual_seed(out)
    positive = torch.rand(TENANTS, out, inputs, generator=generator) > 0.4
    positive[2] = False
    scale = torch.rand(TENANTS, each, generator=generator)
    scale[3, each // 2] = 0
    return positive, scale


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def added(base: Tensor, x: Tensor, deltas_TOI: Tensor, table: Tensor) -> Tensor:
    """base + x @ delta.T in float64, segment by segment."""
    y = base.double()
    for start, end, tenant in table.tolist():
        y[start:end] += x[start:end].double() @ deltas_TOI[tenant].double().T
    return y


def test_a_table_cuts_the_rows_of_tenants_in_tiles() -> None:
    got = segments.table([3, 0, 20], [5, 1, 0], 8, 6)

    assert got.tolist() == [[0, 3, 5], [3, 11, 0], [11, 19, 0], [19, 23, 0], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="5 segments of 8 rows; the table has 4"):
        segments.table([33, 0], [0, 1], 8, 4)


def test_signs_are_unpacked_as_they_were() -> None:
    positive, _ = matrices(70, 600, 1)

    words = segments.pack_signs(positive)

    assert torch.equal(torch.stack([segments.signs(each, (70, 600)) for each in words]), positive.float() * 2 - 1)


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize(
    ("rows", "tile", "out", "inputs", "each", "splits"),
    [(1, 8, 70, 600, 1, 1), (5, 8, 63, 1024, 63, 2), (16, 16, 128, 512, 128, 1), (17, 8, 64, 1100, 64, 3),
     (40, 32, 63, 512, 1, 1)],
)  # fmt: skip
def test_kernel_of_signs(
    rows: int, tile: int, out: int, inputs: int, each: int, splits: int, dtype: torch.dtype, device: torch.device,
    assert_close: Close,
) -> None:  # fmt: skip
    from compress_kernels.gpu import segments as gpu

    positive, scale = matrices(out, inputs, each)
    table, x, base = rows_of(COUNTS[rows], tile), noise(rows, inputs).to(dtype), noise(rows, out).to(dtype)
    y, words = base.to(device, copy=True), segments.pack_signs(positive).to(device)

    gpu.add_signs(y, x.to(device), words, scale.to(device), table.to(device), tile, splits)

    want = added(base, x, (positive.double() * 2 - 1) * scale.double()[..., None], table)
    assert_close("signs", y.cpu(), want, RATIO[dtype])


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize(
    ("rows", "tile", "out", "inputs", "rank", "splits"),
    [(1, 8, 70, 256, 16, 1), (5, 8, 63, 300, 5, 2), (16, 16, 128, 128, 80, 1), (17, 8, 64, 200, 33, 3),
     (40, 32, 63, 128, 64, 1)],
)  # fmt: skip
def test_kernels_of_two_factors(
    rows: int, tile: int, out: int, inputs: int, rank: int, splits: int, dtype: torch.dtype, device: torch.device,
    assert_close: Close,
) -> None:  # fmt: skip
    from compress_kernels.gpu import segments as gpu

    left, right = noise(TENANTS, out, rank).to(dtype), noise(TENANTS, rank, inputs).to(dtype)
    table, x, base = rows_of(COUNTS[rows], tile), noise(rows, inputs).to(dtype), noise(rows, out).to(dtype)
    y = base.to(device, copy=True)

    gpu.add_low_rank(y, x.to(device), left.to(device), right.to(device), table.to(device), tile, splits)

    want = added(base, x, left.double() @ right.double(), table)
    assert_close("low rank", y.cpu(), want, ROUNDED_TWICE * RATIO[dtype])


def test_rows_of_nobody_stay_as_they_are(device: torch.device) -> None:
    from compress_kernels.gpu import segments as gpu

    positive, scale = matrices(64, 512, 1)
    x, y = noise(6, 512).half().to(device), torch.full((6, 64), 3.0, dtype=torch.float16, device=device)
    table = torch.tensor([[1, 3, 0], [2, 2, 3], [4, 5, 1]], dtype=torch.int32, device=device)

    gpu.add_signs(y, x, segments.pack_signs(positive).to(device), scale.to(device), table, 8)
    gpu.add_low_rank(y, x, noise(4, 64, 4).half().to(device), noise(4, 4, 512).half().to(device), table, 8)

    assert (y[[0, 3, 5]] == 3).all() and (y[[1, 2, 4]] != 3).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, *RATIO])
def test_ops_on_the_cpu(dtype: torch.dtype, assert_close: Close) -> None:
    positive, scale = matrices(70, 600, 70)
    left, right = noise(TENANTS, 70, 5).to(dtype), noise(TENANTS, 5, 600).to(dtype)
    table, x, base = rows_of([3, 2, 6], 8), noise(11, 600).to(dtype), noise(11, 70).to(dtype)
    signed, factored = base.clone(), base.clone()

    segments.sign_segments(signed, x, segments.pack_signs(positive), scale, table, 8)
    segments.low_rank_segments(factored, x, left, right, table, 8)

    deltas = (positive.double() * 2 - 1) * scale.double()[..., None]
    assert_close("signs", signed, added(base, x, deltas, table), RATIO.get(dtype, 2e-6))
    assert_close("low rank", factored, added(base, x, left.double() @ right.double(), table), RATIO.get(dtype, 2e-6))


def test_ops_are_registered_correctly() -> None:
    positive, scale = matrices(64, 512, 1)
    y, x, table = noise(5, 64), noise(5, 512), rows_of([2, 3], 8)

    torch.library.opcheck(segments.sign_segments, (y, x, segments.pack_signs(positive), scale, table, 8))
    torch.library.opcheck(segments.low_rank_segments, (y, x, noise(4, 64, 3), noise(4, 3, 512), table, 8))


def test_ops_compile_whole() -> None:
    positive, scale = matrices(64, 512, 1)
    words, x, table = segments.pack_signs(positive), noise(5, 512), rows_of([2, 3], 8)

    def step(x: Tensor, base: Tensor) -> Tensor:
        y = base * 2
        segments.sign_segments(y, x, words, scale, table, 8)
        return y + 1

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, noise(5, 64))

    assert torch.equal(got, step(x, noise(5, 64)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 1024)}, "words is torch.int16 of shape"),
        ({"x": torch.zeros(2, 5, 512)}, "x and y must be matrices"),
        ({"x": torch.zeros(5, 512).half()}, "x is torch.float16"),
        ({"y": torch.zeros(4, 64)}, "y is torch.float32 of shape"),
        ({"y": torch.zeros(64, 5).T}, "y is not contiguous"),
        ({"scale": torch.ones(4)}, "scale is torch.float32 of shape"),
        ({"segments": torch.zeros(2, 3)}, "segments is torch.float32 of shape"),
        ({"tile": 12}, "tile is 12; allowed: 8, 16"),
    ],
)
def test_what_a_kernel_would_read_wrongly_is_refused(change: dict[str, object], message: str) -> None:
    right = {"y": torch.zeros(5, 64), "x": torch.zeros(5, 512), "words": torch.zeros(4, 1, 64, 32, dtype=torch.int16),
             "scale": torch.ones(4, 1), "segments": torch.zeros(2, 3, dtype=torch.int32), "tile": 8}  # fmt: skip

    with pytest.raises((ValueError, TypeError), match=message):
        segments.sign_segments(**(right | change))


def test_factors_of_another_shape_are_refused() -> None:
    table = torch.zeros(2, 3, dtype=torch.int32)

    with pytest.raises(ValueError, match=r"right is torch\.float32 of shape"):
        segments.low_rank_segments(
            torch.zeros(5, 64), torch.zeros(5, 512), torch.zeros(4, 64, 3), torch.zeros(4, 4, 512), table, 8
        )
