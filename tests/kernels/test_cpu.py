"""Packed CPU products against their plain float64 specification, within bf16 precision."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.runtime.lower import lower, rule_of
from compress.runtime.maps import FewRows, IntegerProduct, Matrix, RoundedFirst, applied
from compress.weights import Dense, Diagonal, Grid, Hadamard, Masked, Product, Weight, rounded_for, rounded_inputs
from compress_kernels import cpu

Close = Callable[[str, Tensor, Tensor, float], None]
# x is exact; scale, offset and output are each rounded to bf16 (eps / 2); codes of the offset grid are up to 15, whose
# rounded scales add up like the code's root mean square over that of the weight, about 2
BF16 = torch.finfo(torch.bfloat16).eps
RATIO = 2 * BF16
SHAPES = [(1, 16, 32), (1, 64, 128), (2, 48, 64), (3, 16, 512), (4, 1024, 256), (7, 32, 4096), (63, 64, 256)]


def codes(bits: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def scales(rows: int, groups: int) -> Tensor:
    return (normal(rows, groups).abs() + 0.1) / 16


# -- int4 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "out", "columns", "group"), [(*s, g) for s in SHAPES for g in cpu.GROUPS if s[2] % g == 0]
)
def test_int4_with_zeros_is_the_specified_product(
    rows: int, out: int, columns: int, group: int, assert_close: Close
) -> None:
    code, scale = codes(4, out, columns), scales(out, columns // group)
    zero = codes(4, out, columns // group).float()
    x = normal(rows, columns).bfloat16()
    want = x.double() @ cpu.reference(code, scale, -zero * scale).double().T
    got = cpu.Int4.pack(code, scale, zero).linear(x)
    assert got.dtype == torch.bfloat16
    assert_close("int4", got, want, RATIO)


@pytest.mark.parametrize(("rows", "out", "columns"), SHAPES)
def test_int4_without_zeros_is_the_specified_product(rows: int, out: int, columns: int, assert_close: Close) -> None:
    code, scale = codes(4, out, columns), scales(out, columns // 32)
    x = normal(rows, columns).bfloat16()
    want = x.double() @ cpu.reference(code, scale, -8 * scale).double().T
    assert_close("int4", cpu.Int4.pack(code, scale, 8.0).linear(x), want, RATIO)


def test_int4_of_exact_numbers_is_exact() -> None:
    code = codes(4, 16, 32)
    x = torch.eye(32).bfloat16()  # each output is one weight
    got = cpu.Int4.pack(code, torch.full((16, 1), 0.5), torch.full((16, 1), 3.0)).linear(x)
    assert torch.equal(got.float(), ((code.float() - 3) / 2).T)


@pytest.mark.parametrize("zero", [0.0, 15.0])
def test_int4_reaches_both_ends_of_the_grid(zero: float) -> None:
    code = torch.tensor([0, 15], dtype=torch.uint8).repeat(16, 16)
    got = cpu.Int4.pack(code, torch.ones(16, 1), zero).linear(torch.eye(32).bfloat16())
    assert torch.equal(got.float().unique(), torch.tensor([0.0, 15.0]) - zero)


def test_int4_of_zero_inputs_is_zero() -> None:
    got = cpu.Int4.pack(codes(4, 32, 64), scales(32, 2), 8.0).linear(torch.zeros(3, 64).bfloat16())
    assert torch.equal(got, torch.zeros(3, 32).bfloat16())


# -- int8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "out", "columns"), SHAPES)
def test_int8_is_the_specified_product(rows: int, out: int, columns: int, assert_close: Close) -> None:
    code, scale = codes(8, out, columns), scales(out, 1)
    x = normal(rows, columns).bfloat16()
    want = x.double() @ cpu.reference(code, scale, -128 * scale).double().T
    got = cpu.Int8.pack(code, scale[:, 0]).linear(x)
    assert got.dtype == torch.bfloat16
    assert_close("int8", got, want, RATIO)


def test_int8_of_exact_numbers_is_exact() -> None:
    code = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(1, 2)
    got = cpu.Int8.pack(code, torch.full((16,), 0.5)).linear(torch.eye(32).bfloat16())
    assert torch.equal(got.float(), ((code.float() - 128) / 2).T)


# -- the specification and its use -----------------------------------------------------------------


@pytest.mark.parametrize("group", [8, 0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_specification_is_the_weight_expression(symmetric: bool, group: int) -> None:
    quantized = Grid(bits=4, group=group, symmetric=symmetric).quantize(normal(7, 24))
    zero = torch.tensor(8.0) if quantized.zero is None else quantized.zero.float()
    scale = quantized.scale.float()
    got = cpu.reference(quantized.codes, scale, -zero * scale)
    torch.testing.assert_close(got, quantized.dense(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "grid", "shape"),
    [
        ("cpu_int4", Grid(bits=4, group=64), (1024, 1024)),
        ("cpu_int4", Grid(bits=4, group=32, symmetric=True), (1024, 1024)),
        ("cpu_int8", Grid(bits=8, symmetric=True), (1024, 1024)),
        ("decoded", Grid(bits=8), (1024, 1024)),
        ("decoded", Grid(bits=3, group=64), (1024, 1024)),
        ("decoded", Grid(bits=4, group=16), (1024, 1024)),
        ("decoded", Grid(bits=4, group=64), (128, 256)),
        ("decoded", Grid(bits=4, group=64), (1030, 1024)),
        ("decoded", Grid(bits=4, group=-1), (1024, 1024)),
    ],
)
def test_a_packed_product_is_chosen_where_it_pays(rule: str, grid: Grid, shape: tuple[int, int]) -> None:
    quantized = grid.quantize(normal(*shape))
    assert rule_of(quantized, torch.bfloat16) == rule
    assert rule_of(quantized, torch.float32) == "decoded"


@pytest.mark.parametrize("rows", [1, cpu.FEW_ROWS[cpu.INT4], cpu.FEW_ROWS[cpu.INT4] + 1])
def test_few_rows_and_many_rows_agree(rows: int, assert_close: Close) -> None:
    quantized = Grid(bits=4, group=64).quantize(normal(1024, 1024))
    x = normal(rows, 1024).bfloat16()
    module = lower(quantized, torch.bfloat16)
    assert isinstance(module, FewRows)
    assert_close("rows", module(x[None])[0], Matrix(quantized.dense())(x.float()), RATIO)


# -- int8 inputs -------------------------------------------------------------------------------------

VNNI = pytest.mark.skipif(not cpu.multiplies_integers(), reason="this CPU cannot sum products of bytes exactly")
LARGE = (cpu.BLOCKED_FROM // 512, 512)  # the smallest that is kept blocked
FLOAT = 4 * torch.finfo(torch.float32).eps  # integers are exact; scales are multiplied in two steps


def signed(out: int, columns: int) -> Tensor:
    return (codes(8, out, columns).short() - 128).to(torch.int8)


@pytest.mark.parametrize(("out", "columns"), [(16, 32), (63, 100), (97, 31), LARGE])
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 65])
@pytest.mark.parametrize("offset", [False, True])
@VNNI
def test_integers_are_the_product_of_what_was_rounded(
    offset: bool, rows: int, out: int, columns: int, assert_close: Close
) -> None:
    code, scale, x = signed(out, columns), scales(out, 1)[:, 0], normal(rows, columns)
    x[0] = 0  # its scale is that of FLOOR
    shift = torch.linspace(-3, 3, out) if offset else None
    want = (
        rounded_inputs(x, "int8").double()
        @ ((code.double() + (0 if shift is None else shift[:, None])) * scale[:, None]).T
    )
    got = cpu.Integers.pack(code, scale, shift).linear(*cpu.rounded(x))
    assert_close("integers", got, want, FLOAT)
    assert not got[0].any()


def test_the_kernel_rounds_as_the_weights_package_does() -> None:
    x = torch.cat((normal(5, 64), torch.zeros(1, 64), normal(1, 64) * 1e-9))
    code, scale = cpu.rounded(x)
    assert torch.equal(code * scale, rounded_inputs(x, "int8"))


@pytest.mark.parametrize("columns", [512, cpu.WIDEST])
@VNNI
def test_the_largest_sums_of_integers_are_exact(columns: int) -> None:
    code = torch.full((cpu.BLOCKED_FROM // 512, columns), -128, dtype=torch.int8)
    for rows in (code, code[:1]):  # blocked, and plain if it is small
        got = cpu.Integers.pack(rows, torch.ones(len(rows))).linear(*cpu.rounded(torch.full((2, columns), 127.0)))
        assert torch.equal(got, torch.full((2, len(rows)), -127.0 * 128 * columns))


def test_sums_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="65537 inputs"):
        cpu.Integers.pack(torch.zeros(1, cpu.WIDEST + 1, dtype=torch.int8), torch.ones(1))


@VNNI
def test_no_rows_give_no_rows() -> None:
    for shape in ((16, 32), LARGE):
        assert cpu.Integers.pack(signed(*shape), torch.ones(shape[0])).linear(
            *cpu.rounded(torch.zeros(0, shape[1]))
        ).shape == (
            0,
            shape[0],
        )


@VNNI
def test_a_copy_of_a_module_shares_what_is_packed() -> None:
    module = lower(Grid(bits=8, symmetric=True).quantize(normal(*LARGE)), torch.float32, "int8")
    x = normal(2, LARGE[1])
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert cpu.nbytes(module.packed) == LARGE[0] * LARGE[1] + 2 * 4 * LARGE[0]


QUANTIZED = [
    Grid(bits=8, symmetric=True), Grid(bits=8), Grid(bits=4), Grid(bits=2, symmetric=True), Grid(bits=8, group=-1)
]  # fmt: skip


@pytest.mark.parametrize("transform", ["", "turned", "scaled", "masked"])
@pytest.mark.parametrize("grid", QUANTIZED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@VNNI
def test_integers_answer_for_rounded_inputs(
    dtype: torch.dtype, grid: Grid, transform: str, assert_close: Close
) -> None:
    weight: Weight = grid.quantize(normal(96, 64))
    if transform == "masked":
        weight = Masked(weight, normal(96, 64) > 0, "50%")
    elif transform:
        at_input = Hadamard(normal(64) > 0) if transform == "turned" else Diagonal(normal(64).abs() + 0.5)
        weight = Product(weight, at_input)
    x, bias = normal(2, 3, 64).to(dtype), normal(96).to(dtype)
    module = lower(weight, dtype, "int8")
    asymmetric = isinstance(weight, Masked) and not grid.symmetric  # a masked entry has no code that denotes 0
    assert isinstance(module, RoundedFirst if asymmetric else IntegerProduct)
    want = rounded_for(weight, x.float(), "int8").double() @ weight.dense().double().T + bias.double()
    got = applied(module, x, bias)
    assert got.dtype == dtype
    assert_close("rounded", got, want, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("grid", "inputs", "rule"),
    [(Grid(bits=8), "int8", "integers"), (Grid(bits=8), "fp8", "decoded"), (Grid(bits=8, group=32), "int8", "decoded"),
     (Grid(bits=4, group=32), "int8", "decoded")],
)  # fmt: skip
@VNNI
def test_integers_need_one_scale_a_row(grid: Grid, inputs: str, rule: str) -> None:
    weight = grid.quantize(normal(96, 64))
    assert rule_of(weight, torch.float32, inputs) == rule
    assert isinstance(lower(weight, torch.float32, inputs, floats=True), RoundedFirst)


def test_a_cpu_that_saturates_multiplies_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert isinstance(lower(Grid(bits=8).quantize(normal(96, 64)), torch.float32, "int8"), RoundedFirst)


def test_a_gradient_is_that_of_the_decoded_matrix(assert_close: Close) -> None:
    quantized = Grid(bits=4, group=64).quantize(normal(1024, 1024))
    x = normal(1, 1024).bfloat16().requires_grad_()
    lower(quantized, torch.bfloat16)(x).sum().backward()
    assert_close("gradient", x.grad, quantized.dense().bfloat16().sum(0, keepdim=True), RATIO)


# -- few weights -------------------------------------------------------------------------------------


def pruned(kept: float, out: int = 256, columns: int = 256) -> Masked:
    w = normal(out, columns)
    mask = torch.rand(out, columns, generator=torch.Generator().manual_seed(2)) < kept
    mask[3] = False  # a row without weights
    return Masked(Dense(w), mask, f"{1 - kept:.0%}")


@pytest.mark.parametrize(
    ("kept", "shape", "rule"),
    [(0.04, (1024, 1024), "cpu_sparse"), (0.1, (1024, 1024), "decoded"), (0.04, (1024, 1023), "decoded"),
     (0.04, (1027, 1031), "cpu_sparse")],
)  # fmt: skip
def test_zeros_are_skipped_where_almost_all_are(kept: float, shape: tuple[int, int], rule: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert rule_of(pruned(kept, *shape), dtype) == rule
    assert rule_of(pruned(kept, *shape), torch.float16) == "decoded"


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_skipping_zeros_changes_nothing(dtype: torch.dtype, rows: int, assert_close: Close) -> None:
    weight, x = pruned(0.04, 1027, 1031), normal(rows, 1, 1031).to(dtype)
    module, want = lower(weight, dtype), x.double() @ weight.dense().double().T
    assert_close("sparse", module(x), want, 4 * torch.finfo(dtype).eps)
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_sparse_rows_count_their_bytes() -> None:
    weight = pruned(0.04)
    kept = int(weight.mask_OI.sum())
    assert cpu.nbytes(cpu.Sparse.pack(weight.dense())) == kept * (4 + 8) + (256 + 1) * 8


@pytest.mark.parametrize("shape", [(16, 32), LARGE], ids=["plain", "blocked"])
@VNNI
def test_integers_are_traced_whole(shape: tuple[int, int]) -> None:
    module = lower(Grid(bits=8).quantize(normal(*shape)), torch.bfloat16, "int8")
    x = normal(3, shape[1]).bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))
