"""Weight-only integer products: kernel, op and packing against float64 on the decoded matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.weights import BOOKS, Codebook, Dense, Nested, Permutation, Product, Quantized, Scaled
from compress_kernels import wq

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.slow]  # interpreted
F16, BF16 = torch.float16, torch.bfloat16
Close = Callable[[str, Tensor, Tensor, float], None]
RATIO = {torch.float16: 1e-3, torch.bfloat16: 5e-3}  # of outputs rounded once
SHAPES = {2: (70, 320), 3: (70, 576), 4: (130, 320), 8: (63, 384)}  # ragged rows, and blocks that reach beyond
SMALL = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
NF4 = torch.tensor([-1, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1])
TABLES = {"book": NF4, "short": NF4[5:10], "e2m1": torch.tensor(wq.E2M1)}


def weight(bits: int, rows: int, inputs: int, groups: int) -> tuple[Tensor, Tensor]:
    """Codes with both extremes, a row of one value, and scales, one of them zero."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (rows, inputs), generator=generator, dtype=torch.uint8)
    codes[0], codes[1] = 0, 2**bits - 1
    scale = torch.rand(rows, groups, generator=generator).add_(0.1).mul_(0.02).half()
    scale[2] = 0
    return codes, scale


def decoded(codes: Tensor, scale: Tensor, bits: int, zero: Tensor | None = None) -> Tensor:
    middle = 2.0 ** (bits - 1) if zero is None else zero.double()[..., None]
    values = codes.double().unflatten(1, (scale.shape[1], -1)) - middle
    return (values * scale.double()[..., None]).flatten(1)


def zeros_like(scale: Tensor, bits: int, real: bool) -> Tensor:
    """Zero points, some outside the codes if they are real numbers."""
    unit = torch.rand(scale.shape, generator=torch.Generator().manual_seed(7))
    return ((unit * 2 - 0.5) * 2**bits).half() if real else (unit * 2**bits).to(torch.uint8)


def small_floats(form: str, rows: int, inputs: int) -> Tensor:
    """Every finite code, subnormal ones and both zeros too, then random ones."""
    codes = torch.arange(256).repeat(-(-rows * inputs // 256))[: rows * inputs].view(rows, inputs).to(torch.uint8)
    data = codes.view(SMALL[form])
    return torch.where(data.float().isfinite(), data.float(), 1.0).to(SMALL[form])


def multiplied(p: wq.Packed, x: Tensor, bias: Tensor | None, device: torch.device, **config: Any) -> Tensor:
    """The kernel's product, in tiles that several programs share."""
    from compress_kernels.gpu import launch
    from compress_kernels.gpu import wq as gpu

    chosen = launch.Config(**({"rows": 16 if len(x) > 8 else 8, "outputs": 64} | config))
    there = replace(p, **{f.name: v.to(device) for f in fields(p) if isinstance(v := getattr(p, f.name), Tensor)})
    return gpu.linear(x.to(device), there, None if bias is None else bias.to(device), chosen).cpu()


def arguments(p: wq.Packed) -> tuple[Any, ...]:
    """Of the op, after x, without a bias."""
    return (p.words, p.high, p.scale, p.zero, p.book, p.order, p.u, p.v, None, p.form, p.group, p.shape[0])


def inputs_of(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("bits", wq.INTEGERS)
@pytest.mark.parametrize("group", [0, 32, 64])
def test_reference_is_the_definition(bits: int, group: int) -> None:
    rows, inputs = SHAPES[bits]
    codes, scale = weight(bits, rows, inputs, inputs // group if group else 1)

    assert torch.equal(wq.reference(wq.pack(codes, scale, bits)), decoded(codes, scale, bits).float())


@pytest.mark.parametrize("bits", wq.INTEGERS)
@pytest.mark.parametrize(
    ("rows", "group", "splits", "dtype"),
    [(1, 64, 1, F16), (5, 32, 2, BF16), (16, 0, 1, F16), (17, 64, 2, BF16), (65, 0, 3, F16)],
)
def test_kernel(
    bits: int, rows: int, group: int, splits: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    out, inputs = SHAPES[bits]
    codes, scale = weight(bits, out, inputs, inputs // group if group else 1)
    x, bias = inputs_of(rows, inputs, dtype), inputs_of(1, out, dtype)[0]

    got = multiplied(wq.pack(codes, scale, bits), x, bias, device, splits=splits)

    assert_close("wq", got, x.double() @ decoded(codes, scale, bits).T + bias.double(), RATIO[dtype])


@pytest.mark.parametrize(
    ("bits", "rows", "group", "real", "subnormal", "dtype"),
    [(2, 5, 64, False, False, F16), (3, 1, 64, True, False, BF16), (4, 17, 0, True, False, BF16),
     (4, 1, 32, False, False, F16), (8, 3, 128, True, False, BF16), (8, 1, 64, False, False, F16),
     (2, 1, 32, True, True, BF16), (3, 3, 0, False, True, F16), (4, 5, 64, True, True, F16),
     (4, 16, 0, False, True, BF16)],
)  # fmt: skip
def test_kernel_with_zero_points(
    bits: int, rows: int, group: int, real: bool, subnormal: bool, dtype: torch.dtype, device: torch.device,
    assert_close: Close,
) -> None:  # fmt: skip
    out, inputs = SHAPES[bits]
    codes, scale = weight(bits, out, inputs, inputs // group if group else 1)
    zero, x = zeros_like(scale, bits, real), inputs_of(rows, inputs, dtype)
    p = wq.pack(codes, scale, bits, zero)

    got = multiplied(p, x, None, device, splits=2, subnormal=subnormal)

    matrix = decoded(codes, scale, bits, zero)
    assert torch.equal(wq.reference(p), matrix.float()) or real
    assert_close("reference", wq.reference(p), matrix, 1e-6)
    assert_close("wq", got, x.double() @ matrix.T, RATIO[dtype])


@pytest.mark.parametrize("spread", [2.0**-80, 1e-3, 2.0**100])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_subnormal_codes_lose_nothing_of_large_and_small_rows(
    bits: int, spread: float, device: torch.device, assert_close: Close
) -> None:
    out, inputs = SHAPES[bits]
    codes, scale = weight(bits, out, inputs, 1)
    x = (inputs_of(2, inputs, BF16).float() * torch.tensor([[spread], [1.0]])).bfloat16()
    p = wq.pack(codes, scale, bits)

    got = multiplied(p, x, None, device, subnormal=True)

    want = x.double() @ decoded(codes, scale, bits).T
    for row in range(2):  # each row by itself, else the larger one hides the other
        assert_close(f"row {row}", got[row], want[row], RATIO[BF16])


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize(("form", "rows", "tile"), [("e4m3", 5, (1, 192)), ("e5m2", 1, (128, 128)),
                                                    ("e4m3", 17, (64, 128)), ("e4m3", 1, (70, 192))])  # fmt: skip
def test_kernel_of_small_floats(
    form: str, rows: int, tile: tuple[int, int], dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    data, x = small_floats(form, 70, 192), inputs_of(rows, 192, dtype)
    scale = torch.rand(-(-70 // tile[0]), -(-192 // tile[1]), generator=torch.Generator().manual_seed(3)) / 1000
    whole = scale.repeat_interleave(tile[0], 0)[:70].repeat_interleave(tile[1], 1)[:, :192]
    p = wq.pack_floats(data, scale, tile)

    got = multiplied(p, x, None, device, splits=2)

    assert torch.equal(wq.reference(p), data.float() * whole)
    assert_close(form, got, x.double() @ (data.double() * whole.double()).T, RATIO[dtype])


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize(
    ("book", "rows", "group"), [("book", 5, 64), ("short", 1, 0), ("e2m1", 3, 16), ("e2m1", 17, 32), ("book", 1, 48)]
)
def test_kernel_of_books(
    book: str, rows: int, group: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    entries = TABLES[book]
    codes, scale = weight(4, 70, 192, 192 // group if group else 1)
    codes = codes % len(entries)
    matrix = (entries.double()[codes.long()].unflatten(1, (scale.shape[1], -1)) * scale.double()[..., None]).flatten(1)
    x = inputs_of(rows, 192, dtype)
    if group == 48:
        with pytest.raises(ValueError, match="groups of 48 of 192 inputs"):
            wq.pack_book(codes, entries, scale)
        return
    p = wq.pack_book(codes, entries, scale)

    got = multiplied(p, x, None, device)

    assert p.form == ("e2m1" if book == "e2m1" else "book")
    assert torch.equal(wq.reference(p), matrix.float())
    assert_close(book, got, x.double() @ matrix.T, RATIO[dtype])


@pytest.mark.parametrize(("subnormal", "zero"), [(False, False), (False, True), (True, True)])
def test_kernel_of_reordered_inputs(subnormal: bool, zero: bool, device: torch.device, assert_close: Close) -> None:
    codes, scale = weight(4, 70, 320, 10)
    zeros = zeros_like(scale, 4, False) if zero else None
    order = torch.randperm(320, generator=torch.Generator().manual_seed(2))
    x = inputs_of(3, 320, F16)
    p = wq.with_order(wq.pack(codes, scale, 4, zeros), order)

    got = multiplied(p, x, None, device, subnormal=subnormal)

    want = x.double()[:, order] @ decoded(codes, scale, 4, zeros).T
    assert_close("order", got, want, RATIO[F16])
    assert_close("reference", x.double() @ wq.reference(p).double().T, want, 1e-6)


FORMS: dict[str, Callable[[Tensor, Tensor], wq.Packed]] = {
    "int3 zero": lambda codes, scale: wq.pack(codes % 8, scale, 3, zeros_like(scale, 3, True)),
    "int8": lambda codes, scale: wq.pack(codes * 17, scale, 8),
    "ordered": lambda codes, scale: wq.with_order(wq.pack(codes, scale, 4), torch.arange(192).flip(0)),
    "e4m3": lambda codes, scale: wq.pack_floats(small_floats("e4m3", *codes.shape), scale, (1, 64)),
    "e5m2": lambda codes, scale: wq.pack_floats(small_floats("e5m2", *codes.shape), scale[:, :1], (1, 192)),
    "e2m1": lambda codes, scale: wq.pack_book(codes, TABLES["e2m1"], scale),
    "book": lambda codes, scale: wq.pack_book(codes, NF4, scale),
}


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize("form", FORMS)
def test_decoding_in_one_launch(form: str, dtype: torch.dtype, device: torch.device, assert_close: Close) -> None:
    codes, scale = weight(4, 70, 192, 3)
    p = FORMS[form](codes, scale)
    x, bias = inputs_of(3, 192, dtype), inputs_of(1, 70, dtype)[0]

    u, v = inputs_of(70, 16, dtype), inputs_of(16, 192, dtype) / 30

    got = multiplied(wq.with_low_rank(p, u, v), x, bias, device, dense=True)

    want = x.double() @ (wq.reference(p).double() + u.double() @ v.double()).T + bias.double()
    assert_close(form, got, want, 2 * RATIO[dtype])


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize(("rows", "rank", "splits"), [(1, 16, 1), (17, 40, 3)])
def test_kernel_adds_the_low_rank_term_once(
    rows: int, rank: int, splits: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    codes, scale = weight(4, 130, 640, 5)
    x, u, v = inputs_of(rows, 640, dtype), inputs_of(130, rank, dtype), inputs_of(rank, 640, dtype) / 30

    got = multiplied(wq.with_low_rank(wq.pack(codes, scale, 4), u, v), x, None, device, splits=splits)

    want = x.double() @ (decoded(codes, scale, 4) + u.double() @ v.double()).T
    assert_close("wq", got, want, 2 * RATIO[dtype])  # V x is rounded, too


def test_op_adds_the_low_rank_term(assert_close: Close) -> None:
    codes, scale = weight(4, 64, 256, 2)
    x, u, v = (inputs_of(*shape, torch.float32) for shape in ((3, 256), (64, 5), (5, 256)))
    p = wq.with_low_rank(wq.pack(codes, scale, 4), u, v)

    got = wq.linear(p, x)

    assert_close("low rank", got, x.double() @ (decoded(codes, scale, 4) + u.double() @ v.double()).T, 2e-6)
    torch.library.opcheck(wq.wq_linear, (x, *arguments(p)))


@pytest.mark.parametrize(("left", "right"), [((64, 5), (4, 256)), ((64, 129), (129, 256))])
def test_ranks_that_do_not_fit_are_refused(left: tuple[int, int], right: tuple[int, int]) -> None:
    p = wq.pack(*weight(4, 64, 256, 2), 4)

    with pytest.raises(ValueError, match="must share one rank from 1 to 128"):
        wq.with_low_rank(p, torch.zeros(left), torch.zeros(right))


def test_tiles_that_do_not_divide_the_rows_are_refused(device: torch.device) -> None:
    p = wq.pack(*weight(4, 130, 640, 5), 4)

    with pytest.raises(ValueError, match="tiles of 128 outputs for 192 rows"):
        multiplied(p, inputs_of(1, 640, F16), None, device, outputs=128)


@pytest.mark.parametrize(("rows", "dense"), [(1, False), (256, False), (257, True)])
def test_many_rows_are_decoded_first(rows: int, dense: bool, device: torch.device) -> None:
    from compress_kernels.gpu import wq as gpu

    chosen = gpu.heuristic("int4", rows, 4096, 4096, 128, device)

    assert chosen.dense is dense and not chosen.subnormal


def quantized(bits: int, scales: tuple[int, int], zero: torch.dtype | None) -> Quantized:
    codes, _ = weight(bits, 70, 256, 1)
    scale = torch.rand(scales, generator=torch.Generator().manual_seed(1)).half()
    return Quantized(codes, scale, None if zero is None else zeros_like(scale, bits, zero is torch.float16), bits)


def pack_quantized(w: Quantized) -> wq.Packed:
    return wq.pack(w.codes, w.scale, w.bits, w.zero)


def pack_scaled(w: Scaled) -> wq.Packed:
    return wq.pack_floats(w.data, w.scale, (w.rows, w.columns))


def pack_codebook(w: Codebook) -> wq.Packed:
    return wq.pack_book(w.codes, w.book, w.scale.dense())


def codebook(name: str, group: int) -> Codebook:
    codes, scale = weight(4, 70, 256, 256 // group)
    nested = Nested(torch.arange(scale.numel()).remainder(256).byte().view(scale.shape), torch.rand(
        -(-scale.numel() // Nested.BLOCK)), torch.tensor([0.1]))  # fmt: skip
    return Codebook(codes, BOOKS[name], nested if name == "nf4" else Dense(scale), name)


def scaled(form: str, tile: tuple[int, int]) -> Scaled:
    scale = torch.rand(-(-70 // tile[0]), -(-256 // tile[1]), generator=torch.Generator().manual_seed(1))
    return Scaled(small_floats(form, 70, 256), scale, *tile)


EXPRESSIONS: dict[str, tuple[Any, Callable[[Any], wq.Packed]]] = {
    "int4 of one grid": (quantized(4, (1, 1), None), pack_quantized),
    "int2g64": (quantized(2, (70, 4), torch.uint8), pack_quantized),
    "int3row with real zeros": (quantized(3, (70, 1), torch.float16), pack_quantized),
    "int8 of one grid with a zero": (quantized(8, (1, 1), torch.uint8), pack_quantized),
    "e4m3tensor": (scaled("e4m3", (70, 256)), pack_scaled),
    "e4m3b128x128": (scaled("e4m3", (128, 128)), pack_scaled),
    "e4m3b64x192": (scaled("e4m3", (64, 192)), pack_scaled),
    "e5m2row": (scaled("e5m2", (1, 256)), pack_scaled),
    "nf4g64d": (codebook("nf4", 64), pack_codebook),
    "mxfp4g32": (codebook("mxfp4", 32), pack_codebook),
    "nvfp4g16": (codebook("nvfp4", 16), pack_codebook),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_the_specification_is_the_weight_expression(name: str) -> None:
    expression, packing = EXPRESSIONS[name]

    got = wq.reference(packing(expression))

    torch.testing.assert_close(got, expression.dense(), rtol=1e-6, atol=0)


def test_the_specification_of_an_order_is_the_weight_expression() -> None:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(2))
    inner = quantized(4, (70, 4), torch.uint8)

    got = wq.reference(wq.with_order(pack_quantized(inner), order))

    torch.testing.assert_close(got, Product(inner, Permutation(order)).dense())


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
@pytest.mark.parametrize("bits", wq.INTEGERS)
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

    torch.library.opcheck(wq.wq_linear, (inputs_of(3, 256, torch.float32).requires_grad_(), *arguments(p)))


@pytest.mark.parametrize("form", FORMS)
def test_op_of_every_form(form: str, assert_close: Close) -> None:
    p = FORMS[form](*weight(4, 70, 192, 3))
    x = inputs_of(2, 192, torch.float32)

    got = wq.linear(p, x)

    assert_close(form, got, x.double() @ wq.reference(p).double().T, 2e-6)
    torch.library.opcheck(wq.wq_linear, (x, *arguments(p)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("packing", "message"),
    [
        (lambda: wq.pack_floats(torch.full((64, 64), torch.nan).to(SMALL["e4m3"]), torch.ones(1, 1), (64, 64)), "NaN"),
        (lambda: wq.pack_floats(torch.full((64, 64), torch.inf).to(SMALL["e5m2"]), torch.ones(1, 1), (64, 64)), "NaN"),
        (lambda: wq.pack_floats(torch.zeros(64, 64), torch.ones(1, 1), (64, 64)), "data is torch.float32"),
        (lambda: wq.pack_book(torch.zeros(64, 64).byte(), torch.zeros(17), torch.ones(64, 1)), "17 entries"),
        (lambda: wq.pack(torch.zeros(64, 64).byte(), torch.ones(64, 1), 5), "form int5"),
        (lambda: wq.with_order(wq.pack(*weight(4, 64, 64, 1), 4), torch.zeros(64)), "not a permutation"),
    ],
)
def test_what_has_no_kernel_is_not_packed(packing: Callable[[], wq.Packed], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packing()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_specification(form: str, assert_close: Close) -> None:
    p = FORMS[form](*weight(4, 70, 192, 3))
    u, v, bias = (inputs_of(*shape, torch.float64) for shape in ((70, 16), (16, 192), (1, 70)))
    p = replace(p, scale=p.scale.double(), u=u, v=v)
    x = inputs_of(6, 192, torch.float64).view(2, 3, 192)
    leaves = [t.requires_grad_() for t in (x, p.scale, u, v, bias[0])]

    def through_the_op(x: Tensor, scale: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return wq.linear(replace(p, scale=scale, u=u, v=v), x, bias)

    def specified(x: Tensor, scale: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return x @ (wq.reference(replace(p, scale=scale)) + u @ v).T + bias

    weights = inputs_of(6, 70, torch.float64).view(2, 3, 70)
    got = torch.autograd.grad((through_the_op(*leaves) * weights).sum(), leaves)
    want = torch.autograd.grad((specified(*leaves) * weights).sum(), leaves)

    for name, a, b in zip(("x", "scale", "u", "v", "bias"), got, want, strict=True):
        assert_close(name, a, b, 1e-12)


def test_gradients_are_the_slopes() -> None:
    p = wq.pack(*weight(4, 4, 32, 1), 4)
    u, v, bias = (inputs_of(*shape, torch.float64) for shape in ((4, 16), (16, 32), (1, 4)))
    x, scale = inputs_of(2, 32, torch.float64), p.scale.double()
    leaves = [t.requires_grad_() for t in (x, scale, u, v, bias[0])]

    def product(x: Tensor, scale: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return wq.linear(replace(p, scale=scale, u=u, v=v), x, bias)

    assert torch.autograd.gradcheck(product, leaves)


def test_decoding_op_is_registered_correctly() -> None:
    p = FORMS["ordered"](*weight(4, 70, 192, 3))
    given = (p.words, p.high, p.scale, p.zero, p.book, p.order, p.form, p.group, *p.shape, torch.bfloat16)

    torch.library.opcheck(wq.wq_dense, given)
    assert torch.equal(wq.dense(p, torch.bfloat16), wq.reference(p).bfloat16())


def test_op_compiles_whole(assert_close: Close) -> None:
    codes, scale = weight(4, 64, 256, 2)
    p = wq.pack(codes, scale, 4)
    x = inputs_of(3, 256, torch.float32)

    got = torch.compile(lambda x: wq.linear(p, x) + 1, fullgraph=True, backend="aot_eager")(x)

    assert_close("compiled", got, wq.linear(p, x) + 1, 1e-6)


def test_gradients_compile_whole(assert_close: Close) -> None:
    p = FORMS["book"](*weight(4, 70, 192, 3))
    u, v = inputs_of(70, 16, torch.float32), inputs_of(16, 192, torch.float32)
    x, scale = inputs_of(3, 192, torch.float32), p.scale.float()
    leaves = [t.requires_grad_() for t in (x, scale, u, v)]

    def loss(x: Tensor, scale: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return wq.linear(replace(p, scale=scale, u=u, v=v), x).square().sum()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)

    for name, a, b in zip(("x", "scale", "u", "v"), got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert_close(name, a, b, 1e-6)


@pytest.mark.parametrize("shape", [(192,), (0, 192), (2, 1, 192)])
def test_op_takes_any_number_of_rows(shape: tuple[int, ...]) -> None:
    p = FORMS["int8"](*weight(4, 70, 192, 3))
    x = torch.ones(shape, requires_grad=True)

    y = wq.linear(p, x)
    (grad,) = torch.autograd.grad(y.sum(), x)

    assert y.shape == (*shape[:-1], 70)
    torch.testing.assert_close(grad, wq.reference(p).sum(0).expand(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 512)}, "words is torch.int16 of shape"),
        ({"x": torch.zeros(3, 256, dtype=torch.int32)}, "x is torch.int32"),
        ({"words": torch.zeros(2, 64, 32, dtype=torch.int32)}, "words is torch.int32"),
        ({"words": torch.zeros(64, 2, 32, dtype=torch.int16).transpose(0, 1)}, "words is not contiguous"),
        ({"scale": torch.zeros(3, 64)}, "scale is torch.float32 of shape"),
        ({"bias": torch.zeros(63)}, "bias is torch.float32 of shape"),
        ({"high": torch.zeros(1)}, "high does not go with"),
        ({"form": "int3"}, "high is missing"),
        ({"form": "book"}, "book is missing"),
        ({"form": "e2m1", "zero": torch.zeros(2, 64)}, "zero does not go with"),
        ({"zero": torch.zeros(2, 64, dtype=torch.int8)}, "zero is torch.int8"),
        ({"zero": torch.zeros(1, 64)}, "zero is torch.float32 of shape"),
        ({"order": torch.arange(256)}, "order is torch.int64"),
        ({"u": torch.zeros(64, 16)}, "u and v must be given together"),
        ({"u": torch.zeros(64, 20), "v": torch.zeros(20, 256)}, "u has rank 20"),
        ({"u": torch.zeros(64, 16), "v": torch.zeros(16, 255)}, "v is torch.float32 of shape"),
        ({"form": "int5"}, "weights of form int5"),
        ({"group": 48}, "groups of 48"),
    ],
)
def test_what_a_kernel_would_read_wrongly_is_refused(change: dict[str, object], message: str) -> None:
    codes, scale = weight(4, 64, 256, 2)
    p = wq.pack(codes, scale, 4)
    right = {"x": torch.zeros(3, 256), "words": p.words, "high": None, "scale": p.scale, "zero": None,
             "book": None, "order": None, "u": None, "v": None, "bias": None, "form": "int4", "group": 128,
             "out": 64}  # fmt: skip

    with pytest.raises((ValueError, TypeError), match=message):
        wq.wq_linear(**(right | change))
