"""Packed CPU products against their plain specification, in float64, within what bf16 can hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.runtime.lower import FewRows, Matrix, explain, lower
from compress.weights import Grid
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
    assert explain(quantized, torch.bfloat16) == rule
    assert explain(quantized, torch.float32) == "decoded"


@pytest.mark.parametrize("rows", [1, cpu.FEW_ROWS, cpu.FEW_ROWS + 1, 9])
def test_few_rows_and_many_rows_agree(rows: int, assert_close: Close) -> None:
    quantized = Grid(bits=4, group=64).quantize(normal(1024, 1024))
    x = normal(rows, 1024).bfloat16()
    module = lower(quantized, torch.bfloat16)
    assert isinstance(module, FewRows)
    assert_close("rows", module(x[None])[0], Matrix(quantized.dense())(x.float()), RATIO)
