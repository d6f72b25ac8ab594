"""Products of 8-bit matrices: rounding bit for bit, kernel and op against float64 on the rounded matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.weights import rounded_inputs
from compress_kernels import w8a8

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.slow]  # interpreted
Close = Callable[[str, Tensor, Tensor, float], None]
RATIO = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}  # of outputs rounded once
FEW_BITS = 2e-5  # Hopper's tensor cores sum products of fp8 in fewer bits than float32
NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
KINDS = tuple(NAMES)


def inputs_of(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """A row of zeros, one near the largest float16, one of tiny values, ties of the rounding, and noise."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    x[1::5] = 0
    x[2::5] *= 1.5e4
    x[3::5] *= 1e-6
    x[4::5] = (torch.arange(width) % 255 - 127) / 2
    return x.to(dtype)


def weight(rows: int, inputs: int, groups: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes with both extremes in whole rows, and scales [groups, out], one of them zero."""
    generator = torch.Generator().manual_seed(inputs)
    codes = torch.randint(-128, 128, (rows, inputs), generator=generator).to(kind)
    limit = w8a8.LIMITS[kind]
    codes[0], codes[1] = torch.full((inputs,), limit).to(kind), torch.full((inputs,), -limit).to(kind)
    scale = torch.rand(groups, rows, generator=generator).add_(0.1).mul_(0.02)
    scale[:, 2] = 0
    return codes, scale


def product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """In float64, of x rounded as the specification rounds it."""
    rounded, step = w8a8.quantize(x, codes.dtype)
    matrix = codes.double() * scale.double().T.repeat_interleave(codes.shape[1] // len(scale), 1)
    return rounded.double() * step.double()[:, None] @ matrix.T + bias.double()


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize("kind", KINDS, ids=NAMES.get)
def test_rounding_is_the_one_of_passes(kind: torch.dtype, dtype: torch.dtype) -> None:
    x = inputs_of(15, 100, dtype)

    codes, scale = w8a8.quantize(x, kind)

    assert torch.equal((codes.float() * scale[:, None]).to(dtype), rounded_inputs(x, NAMES[kind]))


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize("width", [1, 63, 4096, 5000])
@pytest.mark.parametrize("kind", KINDS, ids=NAMES.get)
def test_one_launch_gives_the_same_bits(
    kind: torch.dtype, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    from compress_kernels.gpu import w8a8 as gpu

    x = inputs_of(15, width, dtype)
    x[5, 0], x[6, width // 2] = torch.inf, torch.nan

    codes, scale = gpu.quantize(x.to(device), kind)

    want = w8a8.quantize(x, kind)
    assert torch.equal(codes.cpu().view(torch.int8), want[0].view(torch.int8))
    torch.testing.assert_close(scale.cpu(), want[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize("kind", KINDS, ids=NAMES.get)
@pytest.mark.parametrize(
    ("rows", "out", "inputs", "groups", "splits"),
    [(1, 70, 320, 1, 1), (5, 63, 384, 3, 2), (16, 64, 192, 2, 1), (17, 130, 333, 1, 2), (65, 64, 256, 8, 1)],
)
def test_kernel(
    rows: int, out: int, inputs: int, groups: int, splits: int, kind: torch.dtype, dtype: torch.dtype,
    device: torch.device, assert_close: Close,
) -> None:  # fmt: skip
    from compress_kernels.gpu import launch
    from compress_kernels.gpu import w8a8 as gpu

    codes, scale = weight(out, inputs, groups, kind)
    x, bias = inputs_of(rows, inputs, dtype) / 256, torch.randn(out).to(dtype)
    config = launch.Config(rows=16 if rows > 8 else 8, outputs=64, splits=splits)

    rounded, step = gpu.quantize(x.to(device), kind)
    got = gpu.linear(rounded, step, codes.to(device), scale.to(device), bias.to(device), dtype, config)

    want = product(x, codes, scale, bias)
    for row in (0, 1, rows - 1):  # rows differ by orders of magnitude, so each is compared for itself
        assert_close("w8a8", got.cpu()[row % rows], want[row % rows], RATIO[dtype] + FEW_BITS * kind.is_floating_point)


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=NAMES.get)
def test_op_on_the_cpu(kind: torch.dtype, groups: int, dtype: torch.dtype, assert_close: Close) -> None:
    codes, scale = weight(70, 384, groups, kind)
    x, bias = inputs_of(6, 384, dtype) / 256, torch.randn(70).to(dtype)

    got = w8a8.linear(w8a8.pack(codes, scale.T), x.view(2, 3, 384), bias).view(6, 70)

    for row, want in enumerate(product(x, codes, scale, bias)):
        assert_close("op", got[row], want, RATIO[dtype])


def test_products_of_the_library_are_those_of_the_specification(assert_close: Close) -> None:
    for kind, through in ((torch.int8, w8a8.exact), (torch.float8_e4m3fn, w8a8.rowwise)):
        codes, scale = weight(64, 320, 1, kind)
        x = w8a8.quantize(inputs_of(80, 320, torch.bfloat16)[::5], kind)

        got = through(*x, codes, scale[0])

        assert_close(NAMES[kind], got, w8a8.reference(*x, codes, scale), RATIO[got.dtype])
        assert w8a8.by_library(65, codes, scale, torch.bfloat16)
        assert not w8a8.by_library(65, codes[:63], scale[:, :63], torch.bfloat16)


def test_what_has_no_kernel_is_not_packed() -> None:
    codes, scale = weight(8, 96, 1, torch.int8)

    assert w8a8.pack(codes, scale[:, :1]).nbytes == 8 * 96 + 8 * 4  # one scale for all rows
    for other, wrong in ((codes.view(torch.uint8), scale), (codes, scale.repeat(6, 1)), (codes, scale.repeat(5, 1))):
        with pytest.raises(ValueError, match=r"kernels for|do not cut 96 inputs"):
            w8a8.pack(other, wrong.T)


def test_a_row_that_is_not_finite_stays_so() -> None:
    codes, scale = weight(8, 64, 1, torch.int8)
    x = torch.ones(3, 64)
    x[1, 5] = torch.inf

    y = w8a8.w8a8_linear(x, codes, scale, None)

    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS, ids=NAMES.get)
def test_op_is_registered_correctly_and_compiles_whole(kind: torch.dtype) -> None:
    codes, scale = weight(64, 128, 2, kind)
    x = inputs_of(3, 128, torch.float32)

    utils = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    schema = ("test_schema",) if kind == torch.int8 else ()  # torch 2.13 compares no fp8 inputs
    torch.library.opcheck(w8a8.w8a8_linear, (x, codes, scale, None), test_utils=utils + schema)
    got = torch.compile(lambda x: w8a8.w8a8_linear(x, codes, scale, None) + 1, fullgraph=True, backend="aot_eager")(x)

    assert torch.equal(got, w8a8.w8a8_linear(x, codes, scale, None) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 64)}, "weight is torch.int8 of shape"),
        ({"x": torch.zeros(3, 128, dtype=torch.int32)}, "x is torch.int32"),
        ({"weight": torch.zeros(8, 128, dtype=torch.uint8)}, "weight is torch.uint8"),
        ({"weight": torch.zeros(128, 8, dtype=torch.int8).T}, "weight is not contiguous"),
        ({"scale": torch.ones(8)}, "scale is torch.float32 of shape"),
        ({"scale": torch.ones(8, 8)}, "8 groups do not cut 128 inputs"),
        ({"bias": torch.zeros(7)}, "bias is torch.float32 of shape"),
    ],
)
def test_what_a_kernel_would_read_wrongly_is_refused(change: dict[str, object], message: str) -> None:
    right = {"x": torch.zeros(3, 128), "weight": torch.zeros(8, 128, dtype=torch.int8), "scale": torch.ones(1, 8),
             "bias": None}  # fmt: skip

    with pytest.raises((ValueError, TypeError), match=message):
        w8a8.w8a8_linear(**(right | change))
