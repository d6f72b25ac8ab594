"""Quantized inputs: the grid of each token, by its definition."""

from __future__ import annotations

import pytest
import torch

from compress.weights import INPUTS, Dense, Diagonal, Hadamard, Weight, rounded_for, rounded_inputs


def tokens() -> torch.Tensor:
    return (
        torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    )


def test_int8_is_the_nearest_of_127_steps_of_the_largest_entry() -> None:
    x = tokens()
    step = x.abs().amax(-1, keepdim=True) / 127
    got = rounded_inputs(x, "int8")
    assert bool(((got - x).abs() <= step / 2 * 1.001).all())
    codes = got / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)


def test_fp8_is_within_half_a_mantissa_step() -> None:
    x = tokens()
    scale = x.abs().amax(-1, keepdim=True) / 448
    got = rounded_inputs(x, "fp8")
    torch.testing.assert_close((got / scale), (got / scale).to(torch.float8_e4m3fn).float(), rtol=1e-6, atol=1e-6)
    bound = torch.maximum(x.abs() * 2.0**-4, scale * 2.0**-10)  # 3 mantissa bits; half a subnormal step
    assert bool(((got - x).abs() <= bound * 1.001).all())


@pytest.mark.parametrize("kind", INPUTS)
def test_tokens_do_not_depend_on_each_other(kind: str) -> None:
    x = tokens()
    torch.testing.assert_close(rounded_inputs(x, kind)[1, 2], rounded_inputs(x[1, 2], kind), rtol=0, atol=0)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays_and_zeros_stay(kind: str, dtype: torch.dtype) -> None:
    got = rounded_inputs(torch.cat((tokens()[1], torch.zeros(1, 24))).to(dtype), kind)
    assert got.dtype == dtype
    assert bool((got[-1] == 0).all())
    assert bool(torch.isfinite(got).all())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed: int8, fp8"):
        rounded_inputs(tokens(), "int4")


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(
    "transform", [Hadamard(torch.arange(24) % 3 > 0), Diagonal(torch.arange(1.0, 25.0))], ids=["rotation", "scaling"]
)
def test_what_transforms_the_input_comes_before_the_rounding(transform: Weight, kind: str) -> None:
    x, inner = tokens()[1], torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    weight = Dense(inner) @ transform
    want = rounded_inputs(transform.linear(x), kind) @ inner.T
    torch.testing.assert_close(weight.linear(rounded_for(weight, x, kind)), want, rtol=1e-4, atol=1e-3)
    plain = weight.linear(rounded_inputs(x, kind))
    assert float((plain - want).norm()) > 1e-3 * float(want.norm())


@pytest.mark.parametrize("kind", INPUTS)
def test_a_term_beside_a_rotated_weight_leaves_the_rounding_in_the_rotation(kind: str) -> None:
    x, turned = tokens()[1], Dense(torch.randn(7, 24)) @ Hadamard(torch.arange(24) % 3 > 0)
    beside = Dense(torch.randn(7, 2)) @ Dense(torch.randn(2, 24))
    for together in (turned + beside, beside + turned):
        assert torch.equal(rounded_for(together, x, kind), rounded_for(turned, x, kind))
    assert not torch.equal(rounded_for(beside, x, kind), rounded_for(turned, x, kind))
