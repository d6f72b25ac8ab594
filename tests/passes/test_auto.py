"""Auto: it chooses the codec that fits the spectrum, within the bit budget, and is never worse than what it tried."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress import Auto, BitDelta, DeltaCoMe, Product, RecipeError, Site, Sum
from compress.passes.codec import kept_within
from compress.passes.probes import output_cost
from compress.weights import Masked, Quantized, Signs

OUT, IN = 96, 128


def tokens(mixed: float = 0.05) -> Tensor:
    """Inputs that depend on each other; white ones if they are not `mixed`."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(512, IN, generator=g) @ (torch.eye(IN) + mixed * torch.randn(IN, IN, generator=g))


def flat() -> Tensor:
    return 0.01 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


def steep() -> Tensor:
    g = torch.Generator().manual_seed(2)
    left, right = torch.randn(OUT, OUT, generator=g), torch.randn(OUT, IN, generator=g)
    return 0.01 * (left * torch.arange(1, OUT + 1) ** -1.5) @ right


def spiky() -> Tensor:
    g = torch.Generator().manual_seed(3)
    return 0.01 * torch.randn(OUT, IN, generator=g) * (torch.rand(OUT, IN, generator=g) < 0.06)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0.3, 0.5, 1.0, 1.3, 2.2, 4.5])
@pytest.mark.parametrize("kind", [flat, steep, spiky])
def test_it_stays_within_its_bits_and_is_the_best_it_tried(
    site_of: Callable[..., Site], bits: float, kind: Callable[[], Tensor]
) -> None:
    site = site_of(kind(), tokens())
    site.weight = weight = Auto(bits=bits, unbiased=False).rewrite(site)
    assert 8 * weight.nbytes() <= bits * OUT * IN
    tried = site.ledger["codecs"]
    assert output_cost(site) == pytest.approx(min(tried.values()), rel=1e-5)


def test_the_spectrum_decides(site_of: Callable[..., Site]) -> None:
    """Signs for a flat spectrum, bands for a steep one, single weights where few are not zero."""
    kinds = (flat, steep, spiky)
    made = {kind.__name__: Auto(bits=1.2, unbiased=False).rewrite(site_of(kind(), tokens(mixed=0))) for kind in kinds}
    assert isinstance(made["flat"], Signs)
    match made["steep"]:
        case Product(Quantized(), Quantized()) | Sum((Product(), *_)):
            pass
        case other:
            pytest.fail(other.describe())
    assert isinstance(made["spiky"], Masked)


@pytest.mark.slow
@pytest.mark.parametrize("step", [DeltaCoMe(bits=1.2), BitDelta(levels=1)])
def test_it_is_no_worse_than_a_fixed_codec(site_of: Callable[..., Site], step: DeltaCoMe | BitDelta) -> None:
    for kind in (flat, steep, spiky):
        alone, chosen = site_of(kind(), tokens()), site_of(kind(), tokens())
        alone.weight, chosen.weight = step.rewrite(alone), Auto(bits=1.2, unbiased=False).rewrite(chosen)
        assert output_cost(chosen) <= output_cost(alone) * (1 + 1e-5)


def test_trying_leaves_no_trace(site_of: Callable[..., Site]) -> None:
    site = site_of(flat(), tokens())
    before = site.view().clone()
    Auto(bits=1.2, unbiased=False).rewrite(site)
    assert torch.equal(site.view(), before)
    assert site.weight is site.original
    assert site.fallbacks == []


@pytest.mark.parametrize(("bits", "width"), [(0.5, 4), (1.0, 2), (2.0, 4)])
def test_the_share_kept_solves_its_equation(bits: float, width: int) -> None:
    p = kept_within(bits, width)
    mask = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) < p
    codes = Quantized(torch.zeros(512, 512, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.float16), None, width)
    stored = 8 * Masked(codes, mask, "chance").nbytes() / mask.numel()
    assert 0.93 * bits < stored <= bits


def test_too_few_bits_are_refused(site_of: Callable[..., Site]) -> None:
    with pytest.raises(RecipeError, match="no codec stores 96x128"):
        Auto(bits=0.001, unbiased=False).check("blocks.0.proj", (OUT, IN))


def test_without_its_input_it_still_fits_and_uses_its_bits(site_of: Callable[..., Site]) -> None:
    errors = []
    for bits in (0.25, 0.5, 1.5, 2.5, 3.5, 4.7):
        site = site_of(flat())
        weight = Auto(bits=bits, unbiased=False).rewrite_unfed(site)
        assert 8 * weight.nbytes() <= bits * OUT * IN
        errors.append(float((weight.dense() - site.original.data).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]
