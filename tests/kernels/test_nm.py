"""N:M products: packing, kernels and ops against float64 on the masked matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.weights import Grid, Masked
from compress_kernels import dispatch, low_rank, nm

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.slow]  # interpreted
Close = Callable[[str, Tensor, Tensor, float], None]
RATIO = {torch.float16: 1e-3, torch.bfloat16: 5e-3}  # of outputs rounded once
EVERY = [(keep, of) for of in nm.SIZES for keep in range(1, of)]
SOME = [(1, 2), (1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (7, 8), (1, 16), (8, 16)]
FORMATS = {"half": 0, "int4": 64, "int8": 256, "fp8": 0}  # and a group each
OUT, IN = 70, 900  # ragged rows; a block that reaches beyond, and a last group that is not whole where M is 8 or 16


def mask_of(keep: int, of: int, out: int = OUT, inputs: int = IN, seed: int = 0) -> Tensor:
    """A random mask: every group keeps at most `keep`, the first rows exactly that many, one row nothing."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(out, -(-inputs // of), of, generator=generator)
    mask = torch.zeros(score.shape, dtype=torch.bool).scatter_(-1, score.topk(keep).indices, True)
    mask[out // 2 :] &= torch.rand(mask[out // 2 :].shape, generator=generator) < 0.7
    mask = mask.flatten(1)[:, :inputs].contiguous()
    mask[3] = False
    return mask


def weight(
    format: str, keep: int, of: int, dtype: torch.dtype = torch.float16, group: int | None = None, zeros: bool = False
) -> tuple[nm.Packed, Tensor]:
    """A packed weight, and its matrix as float64, made without the packing."""
    group = FORMATS[format] if group is None else group
    inputs = IN if group == 0 else 768
    generator = torch.Generator().manual_seed(keep + of)
    mask = mask_of(keep, of, inputs=inputs)
    values = torch.randn(OUT, inputs, generator=generator)
    values[:, ::7] = 0  # kept, and zero
    if format == "half":
        return nm.pack(values.to(dtype), mask, keep, of), values.to(dtype).double().masked_fill(~mask, 0)
    scale = torch.rand(OUT, inputs // group if group else 1, generator=generator).add_(0.1).mul_(0.02).half()
    scale[2] = 0
    each = scale.double().repeat_interleave(group or inputs, 1)
    if format == "fp8":
        eight = (values * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        return nm.pack_float8(eight, scale, mask, keep, of), (eight.double() * each).masked_fill(~mask, 0)
    bits = nm.BITS[format]
    codes = torch.randint(2**bits, values.shape, generator=generator, dtype=torch.uint8)
    codes[0], codes[1] = 0, 2**bits - 1
    zero = torch.randint(2**bits, scale.shape, generator=generator) if zeros else None
    middle = 2.0 ** (bits - 1) if zero is None else zero.double().repeat_interleave(group or inputs, 1)
    packed = nm.pack_codes(codes, scale, zero, bits, mask, keep, of)
    return packed, ((codes.double() - middle) * each).masked_fill(~mask, 0)


def inputs_of(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)


def moved(packed: nm.Packed, device: torch.device) -> nm.Packed:
    names = ("mask", "values", "scale", "zero", "u", "v")
    tensors = {name: t.to(device) for name in names if (t := getattr(packed, name)) is not None}
    return nm.Packed(**(vars(packed) | tensors))


def multiplied(
    packed: nm.Packed, x: Tensor, bias: Tensor | None, device: torch.device, rows: int, splits: int = 1
) -> Tensor:
    from compress_kernels.gpu import launch
    from compress_kernels.gpu import nm as gpu

    ready = gpu.planes(x.to(device), packed.of, packed.mask.shape[2])
    config = launch.Config(rows=rows, outputs=64, splits=splits, stages=2)
    t = None if packed.v is None else low_rank.inner(x, packed.v).to(device)
    return gpu.linear(ready, t, moved(packed, device), None if bias is None else bias.to(device), config).cpu()


# -- packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "of", "format"),
    [*((*size, "half") for size in EVERY), *((*size, format) for size in SOME for format in ("int4", "int8", "fp8"))],
)
def test_reference_is_the_masked_matrix(keep: int, of: int, format: str) -> None:
    packed, want = weight(format, keep, of, group=256 if FORMATS[format] else 0)

    assert torch.equal(nm.reference(packed), want.float())


@settings(max_examples=30)
@given(size=st.sampled_from(EVERY), out=st.integers(1, 70), inputs=st.integers(1, 600), seed=st.integers(0, 99))
def test_any_mask_survives_packing(size: tuple[int, int], out: int, inputs: int, seed: int) -> None:
    keep, of = size
    mask = mask_of(keep, of, max(out, 4), inputs, seed)
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)).half()

    assert torch.equal(nm.reference(nm.pack(values, mask, keep, of)), values.float().masked_fill(~mask, 0))


@pytest.mark.parametrize(("zero", "format"), [(None, "nibble"), (3.0, "nibble"), (2.5, "int4"), (16.0, "int4")])
def test_codes_are_masked_while_packed_if_zeros_are_codes(zero: float | None, format: str) -> None:
    codes, scale = torch.zeros(4, 512, dtype=torch.uint8), torch.ones(4, 1)
    zeros = None if zero is None else torch.full((4, 1), zero)

    packed = nm.pack_codes(codes, scale, zeros, 4, mask_of(2, 4, 4, 512), 2, 4)

    assert packed.format == format
    assert torch.equal(nm.reference(packed)[0].unique(), torch.tensor([-8.0 if zero is None else -zero, 0]).unique())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "group", "size"), [(4, 64, (2, 4)), (4, 0, (4, 8)), (8, 128, (2, 4)), (3, 64, (2, 4))]
)
def test_a_packed_weight_is_the_masked_quantized_expression(
    bits: int, group: int, size: tuple[int, int], symmetric: bool
) -> None:
    quantized = Grid(bits=bits, group=group, symmetric=symmetric).quantize(inputs_of(OUT, 768, torch.float32))
    mask = mask_of(*size, inputs=768)
    zero = torch.full_like(quantized.scale, 2 ** (bits - 1)) if quantized.zero is None else quantized.zero

    packed = nm.pack_codes(quantized.codes, quantized.scale, zero, 4 if bits < 4 else bits, mask, *size)

    want = Masked(quantized, mask, f"{size[0]}:{size[1]}").dense()
    torch.testing.assert_close(nm.reference(packed), want, rtol=1e-6, atol=1e-6)


def test_two_of_four_costs_nine_bits_an_input() -> None:
    packed = nm.pack(torch.randn(64, 1024).half(), mask_of(2, 4, 64, 1024), 2, 4)
    assert packed.nbytes * 8 == 9 * 64 * 1024


def test_two_of_four_codes_cost_three_bits_and_scales() -> None:
    codes, scale = torch.zeros(64, 1024, dtype=torch.uint8), torch.ones(64, 8).half()
    packed = nm.pack_codes(codes, scale, None, 4, mask_of(2, 4, 64, 1024), 2, 4)
    assert packed.nbytes * 8 == (3 + 16 / 128) * 64 * 1024


def test_a_group_that_keeps_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="a group of 4 keeps 3; 2:4 keeps at most 2"):
        nm.pack(torch.ones(4, 8).half(), torch.tensor([True, True, True, False] * 2).expand(4, 8), 2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values_OI": torch.zeros(4, 8)}, "values are torch.float32"),
        ({"mask_OI": torch.zeros(4, 8)}, "mask is torch.float32"),
        ({"mask_OI": torch.zeros(4, 4, dtype=torch.bool)}, "must be bool of shape"),
        ({"of": 5}, "2:5; kernels take"),
        ({"keep": 4}, "4:4; kernels take"),
    ],
)
def test_what_cannot_be_packed_is_refused(change: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"values_OI": torch.zeros(4, 8).half(), "mask_OI": torch.zeros(4, 8).bool()}

    with pytest.raises(ValueError, match=message):
        nm.pack(**(right | {"keep": 2, "of": 4} | change))


def test_nan_among_eight_bit_floats_is_refused() -> None:
    values = torch.full((4, 8), torch.nan).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="a kept value is NaN"):
        nm.pack_float8(values, torch.ones(4, 1), mask_of(2, 4, 4, 8), 2, 4)


@pytest.mark.parametrize(("of", "group"), [(4, 64), (4, 128), (8, 128), (8, 768), (16, 256), (2, 32)])
def test_groups_of_whole_runs_are_taken(of: int, group: int) -> None:
    assert not nm.unsupported("int4", 1, of, 768, group)


@pytest.mark.parametrize(("of", "group"), [(4, 32), (4, 192), (8, 64), (16, 128), (4, 512)])
def test_other_groups_are_refused(of: int, group: int) -> None:
    assert f"groups of {group}" in nm.unsupported("int4", 1, of, 768, group)


# -- kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "of"), SOME)
def test_planes_of_x(keep: int, of: int, device: torch.device) -> None:
    from compress_kernels.gpu import nm as gpu

    x = inputs_of(3, IN, torch.bfloat16)
    for count in nm.PLACES:
        assert torch.equal(gpu.planes(x.to(device), of, count).cpu(), nm.permuted(x, of, count))


@pytest.mark.parametrize(("keep", "of"), SOME)
@pytest.mark.parametrize("dtype", RATIO)
def test_kernel(keep: int, of: int, dtype: torch.dtype, device: torch.device, assert_close: Close) -> None:
    packed, want = weight("half", keep, of, dtype)
    x, bias = inputs_of(5, IN, dtype), inputs_of(1, OUT, dtype)[0]

    got = multiplied(packed, x, bias, device, 8, 2)

    assert_close("nm", got, x.double() @ want.T + bias.double(), RATIO[dtype])


@pytest.mark.parametrize(
    ("format", "rows", "tile", "splits"),
    [*((format, 1, 8, 1) for format in FORMATS), ("half", 16, 16, 2), ("half", 65, 64, 1), ("int4", 17, 16, 2)],
)
@pytest.mark.parametrize("dtype", RATIO)
def test_formats(
    format: str, rows: int, tile: int, splits: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    packed, want = weight(format, 2, 4, dtype)
    x = inputs_of(rows, want.shape[1], dtype)

    got = multiplied(packed, x, None, device, tile, splits)

    assert_close("nm", got, x.double() @ want.T, RATIO[dtype])


@pytest.mark.parametrize(
    ("bits", "of", "group"), [(4, 4, 128), (4, 4, 64), (8, 4, 64), (4, 8, 768), (4, 2, 0), (8, 16, 256)]
)
@pytest.mark.parametrize("dtype", RATIO)
def test_codes_with_zeros(
    bits: int, of: int, group: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    packed, want = weight(f"int{bits}", of // 2, of, group=group, zeros=True)
    x = inputs_of(3, want.shape[1], dtype)

    got = multiplied(packed, x, None, device, 8)

    assert_close("nm", got, x.double() @ want.T, RATIO[dtype])


@pytest.mark.parametrize(
    ("keep", "of", "format"),
    [
        *((*size, "half") for size in SOME),
        *((2, 4, format) for format in ("int4", "int8", "fp8")),
        *((keep, of, "int4") for keep, of in ((1, 4), (3, 4), (2, 8))),
    ],
)
def test_dense_kernel(keep: int, of: int, format: str, device: torch.device) -> None:
    from compress_kernels.gpu import nm as gpu

    packed, want = weight(format, keep, of, torch.float16, group=256 if FORMATS[format] else 0)

    got = gpu.dense(moved(packed, device), torch.float16).cpu()

    assert torch.equal(got, want.float().half())


def test_split_inputs_give_the_same_bits_and_leave_zeros(device: torch.device) -> None:
    from compress_kernels.gpu import launch

    packed, _ = weight("half", 2, 4)
    x = inputs_of(3, IN, torch.float16)

    runs = [multiplied(packed, x, None, device, 8, 2) for _ in range(3)]

    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert not launch.workspace(launch.Config(rows=8, outputs=64, splits=2), 3, OUT, device)[1].any()


@pytest.mark.parametrize("rows", [3, dispatch.HALF_DENSE_ABOVE + 1])
def test_few_rows_and_many_rows_agree(rows: int, device: torch.device, assert_close: Close) -> None:
    from compress_kernels.gpu import nm as gpu

    packed, want = weight("int4", 2, 4)
    x = inputs_of(rows, want.shape[1], torch.bfloat16).to(device)

    got = gpu.product(x[None], None, moved(packed, device), None)

    assert_close("nm", got[0].cpu(), x.cpu().double() @ want.T, 2 * RATIO[torch.bfloat16])


@pytest.mark.parametrize("rows", [1, 9, 33, 256])
@pytest.mark.parametrize(("keep", "of"), SOME)
def test_tiles_fit_the_shared_memory_and_are_split_evenly(keep: int, of: int, rows: int) -> None:
    from compress_kernels.gpu import launch
    from compress_kernels.gpu import nm as gpu

    packed, _ = weight("half", keep, of)

    config = gpu.heuristic(rows, OUT, packed, torch.device("cpu"))

    width = packed.mask.shape[2]
    buffers = 2 * width * (config.outputs * (1 + packed.values.shape[1]) + 16 * config.rows) * (config.stages - 1)
    assert buffers <= launch.SHARED and packed.mask.shape[1] % config.outputs == 0
    assert width * config.rows >= 64 * config.warps  # two numbers of x a thread: else they are not copied ahead
    assert config.splits <= packed.mask.shape[0]


def test_planes_may_be_made_before(device: torch.device) -> None:
    from compress_kernels.gpu import nm as gpu

    packed = moved(weight("half", 2, 4)[0], device)
    x = inputs_of(2, IN, torch.float16).to(device)
    ready = gpu.planes(x, packed.of, packed.mask.shape[2])

    assert torch.equal(gpu.product(x, ready, packed, None), gpu.product(x, None, packed, None))


@pytest.mark.parametrize(("format", "rank", "splits"), [("half", 5, 2), ("int4", 32, 1)])
def test_the_low_rank_term_is_added_once(
    format: str, rank: int, splits: int, device: torch.device, assert_close: Close
) -> None:
    packed, want = weight(format, 2, 4)
    factors = inputs_of(OUT, rank, torch.float16), inputs_of(rank, want.shape[1], torch.float16)
    packed = nm.with_low_rank(packed, *factors)
    x = inputs_of(5, want.shape[1], torch.float16)

    got = multiplied(packed, x, None, device, 8, splits)

    whole = x.double() @ (want + factors[0].double() @ factors[1].double()).T
    assert_close("nm", got, whole, RATIO[torch.float16])
    assert_close("op", nm.linear(packed, x), whole, 2 * RATIO[torch.float16])


# -- ops -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *RATIO])
@pytest.mark.parametrize("format", FORMATS)
def test_op_on_the_cpu(format: str, dtype: torch.dtype, assert_close: Close) -> None:
    packed, want = weight(format, 2, 4, torch.float16)
    x = inputs_of(6, want.shape[1], dtype).view(2, 3, -1)

    got = nm.linear(packed, x)

    # the matrix is rounded to the dtype before the product, as a decoded layer has it
    assert_close("op", got, x.double() @ want.T, 2 * RATIO.get(dtype, 1e-6))
    assert_close("dense", nm.dense(packed, dtype), want, RATIO.get(dtype, 1e-6))


@pytest.mark.parametrize("format", ["int4"])
def test_ops_are_registered_correctly(format: str) -> None:
    p, _ = weight(format, 2, 4)
    x = inputs_of(3, p.shape[1], torch.float32).requires_grad_()
    kind = (p.format, p.keep, p.of, p.group, OUT)

    torch.library.opcheck(
        nm.nm_linear, (x, None, p.mask, p.values, p.scale, p.zero, None, None, torch.zeros(OUT), *kind)
    )
    torch.library.opcheck(nm.nm_dense, (p.mask, p.values, p.scale, p.zero, *kind, p.shape[1], torch.float32))
    torch.library.opcheck(nm.nm_planes, (x.detach(), 4, 32))


def test_gradients_are_those_of_the_dense_product(assert_close: Close) -> None:
    packed, want = weight("half", 2, 4)
    factors = inputs_of(OUT, 16, torch.float64), inputs_of(16, IN, torch.float64)
    x, bias = inputs_of(4, IN, torch.float64).view(2, 2, IN), torch.zeros(OUT, dtype=torch.float64)
    packed = nm.with_low_rank(packed, *factors)
    leaves = [t.requires_grad_() for t in (x, packed.u, packed.v, bias) if t is not None]

    nm.linear(packed, x, bias).square().sum().backward()
    got = [leaf.grad for leaf in leaves]
    again = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    (again[0] @ (want + again[1] @ again[2]).T + again[3]).square().sum().backward()

    for name, leaf, other in zip(("x", "u", "v", "bias"), got, again, strict=True):
        assert leaf is not None and other.grad is not None
        assert_close(name, leaf, other.grad, 1e-6)


def test_op_compiles_whole(assert_close: Close) -> None:
    packed, _ = weight("int4", 2, 4)
    x = inputs_of(3, packed.shape[1], torch.float32)

    got = torch.compile(lambda x: nm.linear(packed, x) + 1, fullgraph=True, backend="aot_eager")(x)

    assert_close("compiled", got, nm.linear(packed, x) + 1, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 1280)}, "mask is torch.int16 of shape"),
        ({"x": torch.zeros(3, 768, dtype=torch.int32)}, "x is torch.int32"),
        ({"planes": torch.zeros(3, 768)}, "planes is torch.float32 of shape"),
        ({"mask": torch.zeros(2, 128, 32, dtype=torch.int32)}, "mask is torch.int32"),
        ({"values": torch.zeros(2, 1, 128, 32, dtype=torch.int16)}, "values is torch.int16 of shape"),
        ({"scale": None}, "scales go with int4"),
        ({"scale": torch.zeros(3, 128)}, "scale is torch.float32 of shape"),
        ({"zero": torch.zeros(128)}, "zero is torch.float32 of shape"),
        ({"bias": torch.zeros(1)}, "bias is torch.float32 of shape"),
        ({"u": torch.zeros(OUT, 16)}, "u and v must be given together"),
        ({"format": "int5"}, "values as 'int5'"),
        ({"format": "half"}, "half in groups of 128"),
        ({"group": 48}, "in groups of 48"),
    ],
)
def test_what_a_kernel_would_read_wrongly_is_refused(change: dict[str, Any], message: str) -> None:
    p, _ = weight("int4", 2, 4, group=128)
    right = {
        "x": torch.zeros(3, 768),
        "planes": None,
        "u": None,
        "v": None,
        "bias": None,
        "out": OUT,
    } | {name: getattr(p, name) for name in ("mask", "values", "scale", "zero", "format", "keep", "of", "group")}

    with pytest.raises((ValueError, TypeError), match=message):
        nm.nm_linear(**(right | change))


def test_a_gpu_does_not_mix_floats() -> None:
    with pytest.raises(TypeError, match="a GPU takes one 16-bit float"):
        nm.fits(torch.zeros(1).half(), "half", torch.bfloat16)
