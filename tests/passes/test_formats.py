"""The data-free formats: errors as in the specification, the same bytes as the libraries that read them, extremes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compress import Dense, Masked, RecipeError, UnsupportedWeight, pattern
from compress.model.site import Site
from compress.passes import FP8, HQQ, MXFP4, NF4, NVFP4, PASSES, RTN, Int8, Quantizer
from compress.passes.quantization.bnb import functional
from compress.passes.quantization.fp4 import e2m1
from compress.passes.quantization.hqq import first_grid, shrunk
from compress.weights import BOOKS, Hadamard, Product, Weight
from compress.weights.leaves import DYNAMIC

SiteMaker = Callable[..., Site]
FORMATS = [
    HQQ(), HQQ(bits=2, group=16), HQQ(bits=8, group=0), FP8(), FP8(tile="tensor"), FP8(tile="128x128"),
    FP8(format="e5m2"), FP8(power=True), MXFP4(), MXFP4(exponent="round"), MXFP4(exponent="search"), NVFP4(), NF4(),
    NF4(double=True), Int8(),
]  # fmt: skip
formats = pytest.mark.parametrize("step", FORMATS, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def rewrite(site_of: SiteMaker) -> Callable[[Quantizer, Tensor], Any]:
    return lambda step, w_OI: step.rewrite(site_of(w_OI))


Rewrite = Callable[[Quantizer, Tensor], Any]

# -- errors of the specification -------------------------------------------------------------------


def gaussian() -> Tensor:
    return torch.tensor(np.random.default_rng(0).standard_normal((256, 4096)), dtype=torch.float32)


def heavy_tailed() -> Tensor:
    return torch.tensor(np.random.default_rng(0).standard_t(5, (256, 4096)), dtype=torch.float32)


def relative_mse(got: Weight, want_OI: Tensor) -> float:
    return float((got.dense().double() - want_OI).square().mean() / want_OI.double().square().mean())


# E(w - w')**2 / E w**2 of normal weights, table 0.1 of the specification; 3 digits are given
GOLDEN = [
    (HQQ(bits=2), 0.188), (HQQ(bits=3), 0.0335), (FP8(), 7.0e-4), (FP8(format="e5m2"), 2.8e-3), (NF4(), 0.0084),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("step", "error"), GOLDEN, ids=str)
def test_the_error_on_normal_weights_is_that_of_the_specification(
    step: Quantizer, error: float, rewrite: Rewrite
) -> None:
    assert relative_mse(rewrite(step, gaussian()), gaussian()) == pytest.approx(error, rel=0.01)


@pytest.mark.slow
def test_a_zero_that_starts_as_a_real_number_beats_one_that_starts_as_a_code(rewrite: Rewrite) -> None:
    # the specification's .00758 rounds a 4-bit zero first; leaving that out must only help
    assert relative_mse(rewrite(HQQ(bits=4), gaussian()), gaussian()) < 0.00758


# mean |w - w'| of Student's t with 5 degrees, section 1.5: by RTN and by HQQ
STUDENT = [(4, 0.1196, 0.1124), (3, 0.2559, 0.2367), (2, 0.5579, 0.5549)]


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "rounded", "solved"), STUDENT)
def test_a_solved_zero_lessens_the_mean_error_of_heavy_tails(
    bits: int, rounded: float, solved: float, rewrite: Rewrite
) -> None:
    w_OI = heavy_tailed()
    by_rtn = float((rewrite(RTN(bits=bits), w_OI).dense() - w_OI).abs().mean())
    by_hqq = float((rewrite(HQQ(bits=bits), w_OI).dense() - w_OI).abs().mean())
    assert by_rtn == pytest.approx(rounded, rel=0.01)
    assert by_hqq == pytest.approx(solved, rel=0.01)  # another draw of the same distribution


BITS = [(NF4(), 4.5), (NF4(double=True), 4.127), (MXFP4(), 4.25), (NVFP4(), 4.5), (Int8(), 8), (FP8(), 8), (HQQ(), 4.5)]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "bits"), BITS, ids=str)
def test_bits_are_counted_with_their_scales(step: Quantizer, bits: float, rewrite: Rewrite) -> None:
    # 4096 wide, so that a scale a row adds 16 or 32 bits to 4096 weights
    got = 8 * rewrite(step, normal(256, 4096)).nbytes() / (256 * 4096)
    assert got == pytest.approx(bits, abs=0.009)


# -- HQQ -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_group_is_worse_than_before_its_zero_was_solved(bits: int, rewrite: Rewrite) -> None:
    w_OI = normal(33, 128)
    w_OGS = w_OI.unflatten(1, (-1, 64))
    scale, zero = first_grid(w_OGS, torch.ones_like(w_OGS, dtype=torch.bool), 2**bits - 1)
    before = ((w_OGS / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale - w_OGS
    after = rewrite(HQQ(bits=bits), w_OI).dense().unflatten(1, (-1, 64)) - w_OGS
    # 1e-5: the pass compares in steps of the grid, this in weights
    assert bool((after.abs().sum(-1) <= before.abs().sum(-1) * (1 + 1e-5)).all())


def test_the_threshold_is_that_of_the_quasi_norm() -> None:
    # |e| - |e|**(p - 1) / beta at p = .7, beta = 10
    errors = torch.tensor([-2.0, -0.1, 0.0, 0.1, 1.0])
    want = torch.tensor([-(2 - 2**-0.3 / 10), 0.0, 0.0, 0.0, 0.9])
    torch.testing.assert_close(shrunk(errors), want)


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**-6, 2.0**40])
def test_the_size_of_weights_does_not_matter_to_a_solved_zero(factor: float, rewrite: Rewrite) -> None:
    # scales that do not fit float16 stay float32: some weights then fall on the other side of a border
    plain, scaled = rewrite(HQQ(), normal(33, 128)), rewrite(HQQ(), normal(33, 128) * factor)
    assert float((plain.codes == scaled.codes).float().mean()) > 0.98
    assert relative_mse(scaled, normal(33, 128) * factor) == pytest.approx(
        relative_mse(plain, normal(33, 128)), rel=0.01
    )


def test_what_a_mask_cuts_does_not_move_a_solved_zero(site_of: SiteMaker) -> None:
    mask_OI = pattern("2:4").keep(normal(33, 128, seed=1).abs())
    results = []
    for noise in (0.0, 100.0):
        site = site_of(normal(33, 128))
        site.weight = Masked(Dense(normal(33, 128) + noise * ~mask_OI), mask_OI, "2:4")
        results.append(HQQ().rewrite(site))
    assert torch.equal(results[0].dense(), results[1].dense())


def test_a_group_far_from_zero_keeps_its_values(rewrite: Rewrite) -> None:
    # half a step of [0, 5.01] at most, where a float16 zero of the range [5, 5.01] would be off by 1/4 of its own
    w_OI = 5 + 0.01 * torch.rand(7, 64, generator=torch.Generator().manual_seed(0))
    assert float((rewrite(HQQ(), w_OI).dense() - w_OI).abs().max()) < 5.01 / 15 / 2


# -- FP8 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tile", "scales"), [("row", (130, 1)), ("tensor", (1, 1)), ("128x128", (2, 2))])
@pytest.mark.parametrize(("format", "limit"), [("e4m3", 448), ("e5m2", 57344)])
def test_the_largest_of_a_tile_is_the_largest_float(
    tile: str, scales: tuple[int, int], format: str, limit: int, rewrite: Rewrite
) -> None:
    got = rewrite(FP8(tile=tile, format=format), normal(130, 200))
    assert tuple(got.scale.shape) == scales
    assert got.scale.dtype == torch.bfloat16
    assert float(got.data.float().abs().max()) == limit


def test_powers_of_two_saturate_nothing(rewrite: Rewrite) -> None:
    w_OI = normal(33, 128)
    w_OI[0, 0] = 448 * 2.0**-3  # is one exactly: not rounded up
    got = rewrite(FP8(power=True), w_OI)
    mantissa, _ = torch.frexp(got.scale.float())
    assert torch.equal(mantissa, torch.full_like(mantissa, 0.5))
    assert bool((w_OI.abs() <= 448 * got.scale.float()).all())
    assert bool((w_OI.abs().amax(1, keepdim=True) > 224 * got.scale.float()).all())
    assert float(got.scale[0, 0]) == 2.0**-3


@pytest.mark.parametrize(("format", "mantissa"), [("e4m3", 3), ("e5m2", 2)])
def test_normal_floats_are_within_half_of_their_last_bit(format: str, mantissa: int, rewrite: Rewrite) -> None:
    w_OI = normal(33, 128).abs() + 0.1
    got = rewrite(FP8(format=format), w_OI).dense()
    # the largest of a row may saturate by what bfloat16 takes from its scale, 2**-9
    assert float(((got - w_OI) / w_OI).abs().max()) <= 2.0 ** -(mantissa + 1) + 2.0**-9


# -- FP4 -------------------------------------------------------------------------------------------


def test_codes_are_of_the_nearest_value_and_even_at_ties() -> None:
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    x = torch.cat((torch.linspace(-9, 9, 4097), torch.tensor([*ties, *(-tie for tie in ties)])))
    got = BOOKS["mxfp4"][:, 0][e2m1(x).long()]
    nearest = [ties.get(m, min(values, key=lambda v, m=m: abs(v - m))) for m in x.abs().tolist()]  # type: ignore[misc]
    want = torch.tensor(nearest) * x.sign()
    assert torch.equal(got, want)


def test_the_standard_takes_the_exponent_below(rewrite: Rewrite) -> None:
    largest = torch.tensor([1.0, 1.999, 2.0, 6.0, 7.9, 2.0**-100, 2.0**100])
    w_OI = largest[:, None] * torch.cat((torch.ones(7, 1), torch.zeros(7, 31)), 1)
    exponents = rewrite(MXFP4(), w_OI).scale.dense().float().log2()[:, 0].tolist()
    assert exponents == [-2, -2, -1, 0, 0, -102, 98]


@pytest.mark.parametrize("exponent", ["floor", "round"])
def test_a_searched_exponent_is_best_in_every_group(exponent: str, rewrite: Rewrite) -> None:
    w_OI = normal(33, 128)

    def errors(step: Quantizer) -> Tensor:
        return (rewrite(step, w_OI).dense() - w_OI).unflatten(1, (-1, 32)).square().sum(-1)

    searched, ruled = errors(MXFP4(exponent="search")), errors(MXFP4(exponent=exponent))
    assert bool((searched <= ruled * (1 + 1e-5)).all())  # 1e-5: float32 sums of 32 squares
    assert bool((searched < 0.9 * ruled).any())


def test_a_group_too_small_for_e4m3_is_not_lost(rewrite: Rewrite) -> None:
    w_OI = torch.ones(1, 32)
    w_OI[:, 16:] *= 2.0**-19  # its scale would be 448 * 2**-19, below half of the smallest e4m3 number
    assert float(rewrite(NVFP4(), w_OI).dense()[0, 16]) == pytest.approx(2.0**-19, rel=0.25)


# -- peers -----------------------------------------------------------------------------------------


def compressed_tensors(w_OI: Tensor, preset: str) -> dict[str, Tensor]:
    """What the library makes of a float32 weight by the ranges of its own observers."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.format = infer_module_format(torch.nn.Linear, scheme).value
    grouped = w_OI.float().unflatten(1, (-1, scheme.weights.group_size or w_OI.shape[1]))
    whole = generate_gparam(w_OI.float().min(), w_OI.float().max()) if preset == "NVFP4A16" else None
    scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights, global_scale=whole)
    stored = scale if "FP4" in preset else scale.bfloat16().float()  # as it is in a bfloat16 file
    state = {"weight": w_OI.float(), "weight_scale": stored}
    state |= {} if whole is None else {"weight_global_scale": whole}
    packed: dict[str, Tensor] = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)
    return packed


def nibbles(packed: Tensor) -> Tensor:
    """Codes from bytes, the low half first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def grouped_weight() -> Tensor:
    """Groups of every loudness, one of zeros, and a bfloat16's many ties."""
    w_OI = (normal(33, 256) * normal(33, 1, seed=1).exp()).bfloat16()
    w_OI[3] = 0
    return w_OI


def test_mxfp4_has_the_bytes_of_compressed_tensors(rewrite: Rewrite) -> None:
    peer = compressed_tensors(grouped_weight(), "MXFP4A16")
    got = rewrite(MXFP4(exponent="round"), grouped_weight())
    assert torch.equal(got.scale.dense().view(torch.uint8), peer["weight_scale"])
    assert torch.equal(got.codes, nibbles(peer["weight_packed"]))


def test_nvfp4_has_the_bytes_of_compressed_tensors(rewrite: Rewrite) -> None:
    peer = compressed_tensors(grouped_weight(), "NVFP4A16")
    got = rewrite(NVFP4(), grouped_weight())
    alive = grouped_weight().unflatten(1, (-1, 16)).abs().amax(-1) > 0  # the scale of a group of zeros means nothing
    assert torch.equal(got.codes, nibbles(peer["weight_packed"]))
    assert torch.equal(got.scale.data.float()[alive], peer["weight_scale"].float()[alive])
    torch.testing.assert_close(1 / got.scale.scale.view(1), peer["weight_global_scale"], rtol=2.0**-23, atol=0)


def test_fp8_has_the_bytes_of_compressed_tensors(rewrite: Rewrite) -> None:
    # in float32: of bfloat16 weights it rounds the quotient to bfloat16 first, which moves 3 % of the codes
    w_OI = grouped_weight()[4:]  # and it has another scale for a row of zeros
    peer = compressed_tensors(w_OI, "FP8_DYNAMIC")
    got = rewrite(FP8(), w_OI)
    assert torch.equal(got.scale.float(), peer["weight_scale"].float())
    assert torch.equal(got.data.view(torch.uint8), peer["weight"].view(torch.uint8))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_decodes_as_bitsandbytes_decodes_it(double: bool, dtype: torch.dtype, rewrite: Rewrite) -> None:
    w_OI = (normal(100, 448) * normal(100, 1, seed=1).exp()).to(dtype)
    w_OI[5] = 0
    packed, state = functional().quantize_4bit(w_OI.float(), quant_type="nf4", compress_statistics=double)
    assert torch.equal(rewrite(NF4(double=double), w_OI).dense(), functional().dequantize_4bit(packed, state))


def test_the_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(functional().get_4bit_type("nf4", device="cpu"), BOOKS["nf4"][:, 0])
    assert torch.equal(functional().create_dynamic_map(), DYNAMIC)


def test_int8_has_the_codes_of_bitsandbytes(rewrite: Rewrite) -> None:
    w_OI = normal(33, 128).half().float()
    codes, absmax, _ = functional().int8_vectorwise_quant(w_OI)
    got = rewrite(Int8(), w_OI)
    assert torch.equal(got.codes.short() - 128, codes.short())
    torch.testing.assert_close(got.scale[:, 0] * 127, absmax, rtol=2.0**-22, atol=0)


# -- extremes --------------------------------------------------------------------------------------

EXTREMES: dict[str, Tensor] = {
    "zeros": torch.zeros(3, 256),
    "constant": torch.full((3, 256), 0.3),
    "negative": torch.full((3, 256), -0.3),
    "tiny": normal(3, 256) * 1e-30,
    "subnormal": normal(3, 256) * 1e-41,
    "huge": normal(3, 256) * 1e30,
    "mixed": normal(3, 256) * torch.tensor([[1e-30], [0.0], [1e30]]),
    "bfloat16": (normal(3, 256) * 1e30).bfloat16(),
    "one": torch.eye(3, 256),
}


@pytest.mark.parametrize("name", EXTREMES)
@formats
def test_extreme_weights_stay_finite(step: Quantizer, name: str, rewrite: Rewrite) -> None:
    got = rewrite(step, EXTREMES[name]).dense()
    assert bool(got.isfinite().all())
    assert float(got.abs().max()) <= 1.2 * float(EXTREMES[name].abs().max())  # a double-coded scale overshoots most


@pytest.mark.parametrize("name", ["constant", "negative", "huge", "bfloat16"])
@formats
def test_no_size_of_weights_is_lost(step: Quantizer, name: str, rewrite: Rewrite) -> None:
    assert relative_mse(rewrite(step, EXTREMES[name]), EXTREMES[name]) < 0.4


@formats
def test_zeros_stay_zeros(step: Quantizer, rewrite: Rewrite) -> None:
    w_OI = normal(3, 256)
    w_OI[1] = 0
    assert int(rewrite(step, w_OI).dense()[1].count_nonzero()) == 0


# -- composition and refusals ----------------------------------------------------------------------


@formats
def test_pruned_weights_stay_exactly_zero(step: Quantizer, site_of: SiteMaker) -> None:
    site = site_of(normal(33, 256))
    mask_OI = pattern("2:4").keep(normal(33, 256).abs())
    site.weight = Masked(Dense(normal(33, 256)), mask_OI, "2:4")
    site.weight = step.rewrite(site)
    assert torch.equal(site.weight.mask_OI, mask_OI)
    assert int(site.module.weight[~mask_OI].count_nonzero()) == 0
    site.measure(output=False)
    assert site.weight_error < 0.5


@formats
def test_a_rotated_weight_is_quantized_behind_its_rotation(step: Quantizer, site_of: SiteMaker) -> None:
    site = site_of(normal(33, 256))
    rotation = Hadamard(normal(256, seed=2) > 0)
    site.weight = Product(Dense(normal(33, 256) @ rotation.dense().T), rotation)
    site.weight = step.rewrite(site)
    site.measure(output=False)
    assert isinstance(site.weight, Product)
    assert site.weight_error < 0.5


@pytest.mark.parametrize(
    ("step", "width", "reason"),
    [
        (NF4(), 96, "nf4: a.b: its blocks of 64 do not divide its width of 96"),
        (MXFP4(), 48, "mxfp4: a.b: its blocks of 32 do not divide its width of 48"),
        (NVFP4(), 40, "nvfp4: a.b: its blocks of 16 do not divide its width of 40"),
        (HQQ(), 96, "hqq: a.b: group 64 does not divide its width of 96"),
    ],
)
def test_a_width_that_does_not_fit_is_refused_before_any_work(step: Quantizer, width: int, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        step.check("a.b", (33, width))


@pytest.mark.parametrize("options", [{"symmetric": True}, {"search": True}, {"group": -1}], ids=str)
def test_a_solved_zero_leaves_nothing_to_search(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="hqq: it fits zero points by row or group"):
        HQQ(**options)


@formats
def test_low_rank_factors_are_rounded_where_blocks_divide_them(step: Quantizer, site_of: SiteMaker) -> None:
    site = site_of(normal(33, 128))
    site.weight = Dense(normal(33, 128)) + Dense(normal(33, 64)) @ Dense(normal(64, 128))
    rounded = replace(step, factors=True).rewrite(site).terms[1]
    assert [type(factor) for factor in (rounded.left, rounded.right)] == [type(step.rewrite(site).terms[0])] * 2


@pytest.mark.parametrize("step", [NF4(factors=True), MXFP4(factors=True), NVFP4(factors=True)], ids=str)
def test_factors_that_blocks_do_not_divide_are_refused(step: Any, site_of: SiteMaker) -> None:
    site = site_of(normal(33, 128))
    site.weight = Dense(normal(33, 128)) + Dense(normal(33, 5)) @ Dense(normal(5, 128))
    reason = rf"{step.name}: blocks\.0\.proj: its blocks of {step.block} do not divide the rank of 5; use another rank"
    with pytest.raises(UnsupportedWeight, match=reason):
        step.rewrite(site)


def test_a_solved_zero_of_a_narrow_factor_is_one_a_row(site_of: SiteMaker) -> None:
    site = site_of(normal(33, 128))
    site.weight = Dense(normal(33, 128)) + Dense(normal(33, 5)) @ Dense(normal(5, 128))
    assert HQQ(factors=True).rewrite(site).terms[1].left.describe() == "int4rowr"


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(RecipeError, match=r"nf4 needs bitsandbytes: pip install bitsandbytes"):
        NF4().check("a.b", (33, 128))


@pytest.mark.parametrize("name", ["hqq", "fp8", "mxfp4", "nvfp4", "nf4", "int8"])
def test_a_format_can_round_the_inputs_too(name: str, site_of: SiteMaker) -> None:
    site = site_of(normal(33, 128))
    PASSES[name](inputs="int8").rewrite(site)
    assert site.inputs == "int8"
