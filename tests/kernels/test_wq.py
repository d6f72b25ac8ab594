"""Weight-only integer products: kernel, op and packing against float64 on the decoded matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress_kernels import wq

pytest.importorskip("triton", reason="the kernels need triton")
Close = Callable[[str, Tensor, Tensor, float], None]
RATIO = {torch.float16: 1e-3, torch.bfloat16: 5e-3}  # of outputs rounded once
SHAPES = {2: (100, 576), 3: (70, 1024), 4: (130, 640), 8: (63, 320)}  # ragged rows, and blocks that reach beyond


def weight(bits: int, rows: int, inputs: int, groups: int) -> tuple[Tensor, Tensor]:
    """Codes with both extremes, a row of one value, and scales, one of them zero."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (rows, inputs), generator=generator, dtype=torch.uint8)
    codes[0], codes[1] = 0, 2**bits - 1
    scale = torch.rand(rows, groups, generator=generator).add_(0.1).mul_(0.02).half()
    scale[2] = 0
    return codes, scale


def decoded(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    values = codes.double().unflatten(1, (scale.shape[1], -1)) - 2.0 ** (bits - 1)
    return (values * scale.double()[..., None]).flatten(1)


def inputs_of(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("bits", wq.BITS)
@pytest.mark.parametrize("group", [0, 32, 64])
def test_reference_is_the_definition(bits: int, group: int) -> None:
    rows, inputs = SHAPES[bits]
    codes, scale = weight(bits, rows, inputs, inputs // group if group else 1)

    assert torch.equal(wq.reference(wq.pack(codes, scale, bits)), decoded(codes, scale, bits).float())


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize("bits", wq.BITS)
@pytest.mark.parametrize(("rows", "group", "splits"), [(1, 64, 1), (5, 32, 2), (16, 0, 1), (17, 64, 2), (65, 0, 3)])
def test_kernel(
    bits: int, rows: int, group: int, splits: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    from compress_kernels.gpu import launch
    from compress_kernels.gpu import wq as gpu

    out, inputs = SHAPES[bits]
    codes, scale = weight(bits, out, inputs, inputs // group if group else 1)
    x, bias = inputs_of(rows, inputs, dtype), inputs_of(1, out, dtype)[0]
    p = wq.pack(codes.to(device), scale.to(device), bits)
    config = launch.Config(rows=16 if rows > 8 else 8, outputs=64, splits=splits)

    got = gpu.linear(x.to(device), p, bias.to(device), config)

    want = x.double() @ decoded(codes, scale, bits).T + bias.double()
    assert_close("wq", got.cpu(), want, RATIO[dtype])


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize(("rows", "rank", "splits"), [(1, 16, 1), (17, 40, 3)])
def test_kernel_adds_the_low_rank_term_once(
    rows: int, rank: int, splits: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    from compress_kernels.gpu import launch
    from compress_kernels.gpu import wq as gpu

    codes, scale = weight(4, 130, 640, 5)
    x, u, v = inputs_of(rows, 640, dtype), inputs_of(130, rank, dtype), inputs_of(rank, 640, dtype) / 30
    p = wq.with_low_rank(wq.pack(codes.to(device), scale.to(device), 4), u.to(device), v.to(device))

    got = gpu.linear(x.to(device), p, None, launch.Config(rows=16, outputs=64, splits=splits))

    want = x.double() @ (decoded(codes, scale, 4) + u.double() @ v.double()).T
    assert_close("wq", got.cpu(), want, 2 * RATIO[dtype])  # V x is rounded, too


def test_op_adds_the_low_rank_term(assert_close: Close) -> None:
    codes, scale = weight(4, 64, 256, 2)
    x, u, v = (inputs_of(*shape, torch.float32) for shape in ((3, 256), (64, 5), (5, 256)))
    p = wq.with_low_rank(wq.pack(codes, scale, 4), u, v)

    got = wq.linear(p, x)

    assert_close("low rank", got, x.double() @ (decoded(codes, scale, 4) + u.double() @ v.double()).T, 2e-6)
    torch.library.opcheck(wq.wq_linear, (x, p.words, None, p.scale, p.u, p.v, None, 4, 128, 64))


@pytest.mark.parametrize(("left", "right"), [((64, 5), (4, 256)), ((64, 129), (129, 256))])
def test_ranks_that_do_not_fit_are_refused(left: tuple[int, int], right: tuple[int, int]) -> None:
    p = wq.pack(*weight(4, 64, 256, 2), 4)

    with pytest.raises(ValueError, match="one rank, 1 to 128"):
        wq.with_low_rank(p, torch.zeros(left), torch.zeros(right))


def test_counters_of_split_inputs_are_left_zero(device: torch.device) -> None:
    from compress_kernels.gpu import launch
    from compress_kernels.gpu import wq as gpu

    codes, scale = weight(4, 64, 1024, 8)
    p = wq.pack(codes.to(device), scale.to(device), 4)
    x = inputs_of(3, 1024, torch.float16).to(device)
    config = launch.Config(rows=8, outputs=64, splits=4)

    runs = [gpu.linear(x, p, None, config) for _ in range(3)]

    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert not launch.workspace(config, 3, 64, device)[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, *RATIO])
@pytest.mark.parametrize("bits", wq.BITS)
def test_op_on_the_cpu(bits: int, dtype: torch.dtype, assert_close: Close) -> None:
    out, inputs = SHAPES[bits]
    codes, scale = weight(bits, out, inputs, 1)
    x = inputs_of(6, inputs, dtype).view(2, 3, inputs)

    got = wq.linear(wq.pack(codes, scale, bits), x)

    # the matrix is rounded to the dtype before the product, as a decoded layer has it
    assert_close("op", got, x.double() @ decoded(codes, scale, bits).T, 2 * RATIO.get(dtype, 1e-6))


def test_op_is_registered_correctly() -> None:
    codes, scale = weight(4, 64, 256, 2)
    p = wq.pack(codes, scale, 4)

    torch.library.opcheck(
        wq.wq_linear, (inputs_of(3, 256, torch.float32), p.words, None, p.scale, None, None, None, 4, 128, 64)
    )


def test_op_compiles_whole(assert_close: Close) -> None:
    codes, scale = weight(4, 64, 256, 2)
    p = wq.pack(codes, scale, 4)
    x = inputs_of(3, 256, torch.float32)

    got = torch.compile(lambda x: wq.linear(p, x) + 1, fullgraph=True, backend="aot_eager")(x)

    assert_close("compiled", got, wq.linear(p, x) + 1, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 512)}, "words is torch.int16 of shape"),
        ({"x": torch.zeros(3, 256, dtype=torch.int32)}, "x is torch.int32"),
        ({"words": torch.zeros(2, 64, 32, dtype=torch.int32)}, "words is torch.int32"),
        ({"words": torch.zeros(64, 2, 32, dtype=torch.int16).transpose(0, 1)}, "words is not contiguous"),
        ({"scale": torch.zeros(3, 64)}, "scale is torch.float32 of shape"),
        ({"bias": torch.zeros(63)}, "bias is torch.float32 of shape"),
        ({"high": torch.zeros(1)}, "go with 3 bits"),
        ({"u": torch.zeros(64, 16)}, "u and v go together"),
        ({"u": torch.zeros(64, 20), "v": torch.zeros(20, 256)}, "u has rank 20"),
        ({"u": torch.zeros(64, 16), "v": torch.zeros(16, 255)}, "v is torch.float32 of shape"),
        ({"bits": 5}, "codes of 5 bits"),
        ({"group": 48}, "groups of 48"),
    ],
)
def test_what_a_kernel_would_read_wrongly_is_refused(change: dict[str, object], message: str) -> None:
    codes, scale = weight(4, 64, 256, 2)
    p = wq.pack(codes, scale, 4)
    right = {"x": torch.zeros(3, 256), "words": p.words, "high": None, "scale": p.scale, "u": None, "v": None,
             "bias": None, "bits": 4, "group": 128, "out": 64}  # fmt: skip

    with pytest.raises((ValueError, TypeError), match=message):
        wq.wq_linear(**(right | change))
